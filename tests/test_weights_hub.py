"""Hub names, against a small hub on this machine: what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

SHA = "a" * 40
SHARDS = {"w1": "model-00001-of-00002.safetensors", "w2": "model-00002-of-00002.safetensors"}
MODEL = {
    "config.json": b'{"hidden_size": 2}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"x",
    "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": SHARDS}).encode(),
    **{shard: save({name: torch.full((2,), 3.0)}) for name, shard in SHARDS.items()},
}
UNWANTED = {
    "README.md": b"words",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"graph",
    "evil.py": b"code",
}
REPOSITORIES = {"me/model": MODEL | UNWANTED, "me/pickles": {"config.json": b"{}"} | UNWANTED, "me/gated": {}}
REPOSITORIES["me/broken"] = REPOSITORIES["me/model"]


@dataclass
class Hub:
    address: str
    cache: Path
    asked: list[str] = field(default_factory=list)

    def open(self, *names: str, **environment: str) -> list[str]:
        """What opening each of the names gives, in a process of its own: the tensors' sum, or the error."""
        child = (
            "import sys, torch\n"
            "from mint.errors import CheckpointError\n"
            "from mint.weights import open_checkpoint\n"
            "for name in sys.argv[1:]:\n"
            "    try:\n"
            "        checkpoint = open_checkpoint(name)\n"
            "        out = torch.zeros(2)\n"
            "        checkpoint.read('w2', out)\n"
            "        files = sorted(path.name for path in checkpoint.folder.iterdir())\n"
            "        print(sorted(checkpoint.tensors), out.tolist(), files)\n"
            "    except CheckpointError as error:\n"
            "        print('refused:', error)\n"
        )
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith("HF_")}
        given = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.cache), "NO_PROXY": "*", "no_proxy": "*"}
        answer = subprocess.run(
            [sys.executable, "-c", child, *names],
            env=kept | given | environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return answer.stdout.splitlines()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    asked: list[str] = []
    breaks = [True]

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0].strip("/")
            token = self.headers.get("Authorization", "")
            if path.startswith("api/models/"):
                name, what = "/".join(path.split("/")[2:4]), path.split("/")[4]
                if name not in REPOSITORIES:
                    self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                elif name == "me/gated" and token != "Bearer let-me-in":
                    self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
                else:
                    self.send(200, json.dumps(listing(name, what)).encode(), {}, body)
                return
            owner, model, _resolve, _revision, file = path.split("/", 4)
            name = f"{owner}/{model}"
            asked.append(file)
            if name == "me/broken" and body and file == SHARDS["w2"] and breaks:
                breaks.pop()
                self.send(403, b"{}", {}, body)
                return
            data = REPOSITORIES[name][file]
            self.send(200, data, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, body)

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", asked)
    server.shutdown()
    server.server_close()


def listing(name: str, what: str) -> object:
    files = REPOSITORIES[name]
    if what == "tree":
        oid = {file: hashlib.sha1(data).hexdigest() for file, data in files.items()}
        return [{"type": "file", "path": file, "size": len(data), "oid": oid[file]} for file, data in files.items()]
    return {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]}


def test_a_hub_name_is_fetched_once_and_only_what_is_needed_of_it(hub):
    lines = hub.open("me/model", "me/model")
    assert lines[0] == lines[1]
    assert lines[0] == f"['w1', 'w2'] [3.0, 3.0] {sorted(MODEL)}"
    assert set(hub.asked) == set(MODEL)
    offline = hub.open("me/model", "me/other", HF_HUB_OFFLINE="1")
    assert offline[0] == lines[0]
    assert offline[1].startswith(
        "refused: me/other: not a folder, and not complete in the hub's cache; unset HF_HUB_OFFLINE"
    )


def test_a_gated_missing_or_pickled_model_and_a_nonsense_name_say_what_to_do(hub):
    gated, missing, pickled, nonsense = hub.open("me/gated", "me/missing", "me/pickles", "not a name!")
    assert gated.startswith("refused: me/gated: access is gated; ask for it")
    assert f"{hub.address}/me/gated" in gated
    assert missing.startswith("refused: me/missing: no such folder and, for this token, no such model on the hub")
    assert "wanted model.safetensors" in pickled
    assert "save_pretrained(NEW)" in pickled
    assert "pytorch_model.bin" not in hub.asked
    assert nonsense == "refused: not a name!: neither a folder nor a hub name; give a folder that exists or owner/model"


def test_a_download_that_breaks_off_says_so_and_goes_on_when_asked_again(hub):
    broken, whole = hub.open("me/broken", "me/broken")
    assert broken.startswith("refused: me/broken: the download failed (")
    assert broken.endswith("); type the same again to go on with it")
    assert whole.startswith("['w1', 'w2'] [3.0, 3.0]")
    assert hub.asked.count("config.json") == 2  # its head and its body, once


def test_the_token_is_taken_from_its_usual_place(hub):
    (line,) = hub.open("me/gated", HF_TOKEN="let-me-in")
    assert "no config.json" in line  # the door is open, and the repository behind it is empty


def test_without_a_network_the_cache_serves_and_what_is_not_there_is_refused(hub):
    first = hub.open("me/model")
    lines = hub.open("me/model", "me/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert lines[0] == first[0]
    assert lines[1] == (
        "refused: me/other: not a folder, and the hub cannot be reached; "
        "check the network, or give a folder that exists"
    )
