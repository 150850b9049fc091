"""Bytes changed at random in every kind of file that others hand over: only MINT's own errors come out, and files outside
the folder are never opened. A few of each kind in CI; MINT_FUZZ=10000 is the long run, which prints what it counted."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from students import trainer_of, write_student

from mint.chat import chat_tokenizer
from mint.config import AlignSettings
from mint.encoders.scorefile import ScoreFile
from mint.errors import MintError
from mint.evaluation.predictions import read_predictions
from mint.images import open_image
from mint.labels import read_labels
from mint.pairs.files import read_pairs
from mint.training import runs
from mint.weights import open_checkpoint
from mint.weights.adapters import read_adapter

COUNT = int(os.environ.get("MINT_FUZZ", "40"))
PIECES = [b"", b"[", b"{", b'"', b"-1", b"1e999", b"null", b"true", b"9" * 30, b"../", b"NaN", b"\\ud800", b"\xff", b"\x00",
          b"\xff\xff\xff\x7f", b"\n", b",", b"[" * 2000]  # fmt: skip
PAIR = {"id": "a", "prompt": "thin", "chosen": [{"role": "assistant", "content": "red"}], "rejected": "blue"}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes replaced, cut, doubled, or moved; sometimes only the start is kept."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        span = draw.choice([0, 1, 1, 2, 4, 8, 40])
        new = draw.choice([draw.choice(PIECES), draw.randbytes(draw.choice([1, 2, 8])), data[start : start + span] * 2])
        data = data[:start] + new + data[start + span :]
    return data[: draw.randrange(len(data) + 1)] if draw.random() < 0.05 else data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its base, each file of which is then broken."""
    folder = tmp_path_factory.mktemp("made")
    base = write_student(folder / "base", num_hidden_layers=1, shards="100KB")
    trainer_of(base, folder / "run", 4, steps=1, rank=1, targets=("q_proj",)).run()
    runs.write_run(folder / "run", AlignSettings().as_dict(), {"pairs": 4})
    lines = [{**PAIR, "id": f"{n}", "chosen": "red"} for n in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"id": f"{n}", "ranking": [{"label": "a", "logprob": -0.1, "probability": 0.9}]} for n in range(4)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.jsonl").write_text(
        "".join(json.dumps({"id": f"{n}", "scores": {"a": 1, "b": n}}) + "\n" for n in range(4))
    )
    (folder / "labels.csv").write_text('label,name\n"Kabuki, 1",a\nNoonan,b\n')
    np.save(folder / "scores.npy", np.eye(4, 3, dtype=np.float32))
    (folder / "classes.txt").write_text("a\nb\nc\n")
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(folder / f"picture.{kind}")
    return folder


def loaded_state(path: Path) -> None:
    runs.load_state(path.parents[1])


READERS: dict[str, Callable[[Path], Any]] = {
    "base/config.json": lambda p: open_checkpoint(p.parent),
    "base/model.safetensors.index.json": lambda p: open_checkpoint(p.parent),
    "base/tokenizer.json": lambda p: chat_tokenizer(p.parent, {"model_type": "llama"}).plain_ids("thin nose"),
    "base/tokenizer_config.json": lambda p: chat_tokenizer(p.parent, {"model_type": "llama"}).plain_ids("thin nose"),
    "run/adapter/adapter_config.json": lambda p: read_adapter(p.parent),
    "run/adapter/adapter_model.safetensors": lambda p: read_adapter(p.parent),
    "run/checkpoint/state.safetensors": loaded_state,
    "run/run.json": lambda p: AlignSettings.from_dict(runs.read_run(p)),
    "pairs.jsonl": lambda p: list(read_pairs(p)),
    "predictions.jsonl": lambda p: list(read_predictions(p)),
    "scores.jsonl": ScoreFile,
    "scores.npy": ScoreFile,
    "labels.csv": read_labels,
    **{
        f"picture.{kind}": lambda p: np.asarray(open_image(p)) for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp")
    },
}


@pytest.mark.parametrize("name", READERS)
def test_changed_bytes_raise_nothing_but_our_own_errors(made: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(made, tmp_path / "made")
    path, data, draw, found = tmp_path / "made" / name, (made / name).read_bytes(), random.Random(name), Counter[str]()
    READERS[name](path)
    for number in range(COUNT):
        path.write_bytes(mutated(data, draw))
        try:
            READERS[name](path)
            found["read"] += 1
        except MintError as error:
            found[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"{name}, change {number}: {type(error).__name__}: {error}") from error
    if "MINT_FUZZ" in os.environ:
        print(f"\n{name}: {COUNT} changed, {dict(found)}", file=sys.stderr)
    assert found["read"] < COUNT
