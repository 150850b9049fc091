"""Hostile versions of every kind of file that others hand over: only MINT's own errors come out, in bounded memory and
time, no file outside the folder is read, and none is written.

    python tests/fuzz.py --inputs 100000 --seed 1      a line for each kind: how many were read, refused, and at what cost
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mutations import link_instead, put_back, variant
from PIL import Image
from students import saved, trainer_of, write_state_of_two, write_student
from test_records_hostile import SEEDS

import mint
from mint.builtin.cases import TEACHER, TISSUE_STUDENT
from mint.chat import chat_tokenizer
from mint.config import AlignSettings
from mint.decoders import load_decoder
from mint.encoders import load_encoder
from mint.encoders.scorefile import ScoreFile
from mint.errors import MintError
from mint.evaluation.predictions import read_predictions
from mint.images import open_image
from mint.labels import read_labels
from mint.pairs.files import read_candidates, read_pairs
from mint.progress import set_quiet
from mint.prompts import read_template
from mint.records import read_records
from mint.records.hpo import read_hpo
from mint.retrieval import open_retriever
from mint.training import runs
from mint.weights import open_checkpoint
from mint.weights.adapters import read_adapter

SECONDS, MEMORY = 10.0, 1 << 30
"""Of computing time, and of memory beyond the start, that one input may take. A picture of the most pixels that are
opened takes half of the memory."""
HANG = 600
"""Seconds of the clock, which a machine with other work takes from."""
PAIR = {"id": "a", "prompt": "thin", "chosen": [{"role": "assistant", "content": "red"}], "rejected": "blue"}
SHOWN = ({"image": "picture.png"}, {"images": ["picture.jpeg"]}, {"image": "records/fold/images.npy#0"}, {})
PICTURES = ("png", "jpeg", "gif", "webp", "tiff", "bmp")
RECORDS = {
    "lines.jsonl": "lines", "lines.jsonl.gz": "gzip", "document.json": "document", "packet.json": "packet",
    "own.csv": "csv", "own.tsv": "tsv", "gmdb.tsv": "gmdb", "gestalt.csv": "gestaltmml", "packets.zip": "zip",
    "fold/types.npy": "types", "fold/images.npy": "images",
}  # fmt: skip
OBO = """format-version: 1.2

[Term]
id: HP:0000316
name: Hypertelorism

[Term]
id: HP:0000508
name: Ptosis
alt_id: HP:0000509
"""


def _rows(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make(folder: Path) -> Path:
    """One good file of every kind: a base, a run, teachers, cases, pairs, scores, pictures."""
    base = write_student(folder / "base", num_hidden_layers=1, shards="100KB")
    trainer_of(base, folder / "run", 4, steps=1, rank=1, targets=("q_proj",)).run()
    write_state_of_two(folder / "two/checkpoint")
    runs.write_run(folder / "run", AlignSettings().as_dict(), {"pairs": 4})
    for name, source in (("vilt", TEACHER), ("mllama", TISSUE_STUDENT)):
        shutil.copytree(source, folder / name)
    ranking = [{"label": "a", "logprob": -0.1, "probability": 0.9}]
    texts = {
        "pairs.jsonl": _rows(*({**PAIR, "id": f"{n}", "chosen": "red", **shown} for n, shown in enumerate(SHOWN))),
        "predictions.jsonl": _rows(*({"id": f"{n}", "ranking": ranking} for n in range(4))),
        "candidates.jsonl": _rows(*({"id": f"{n}", "candidates": ["a", "b"]} for n in range(4))),
        "scores.jsonl": _rows(*({"id": f"{n}", "scores": {"a": 1, "b": n}} for n in range(4))),
        "labels.csv": 'label,name\n"Kabuki, 1",a\nNoonan,b\n',
        "classes.txt": "a\nb\nc\n",
        "template.txt": "A case: {note}\nName {k} of {labels}.\n",
        "hp.obo": OBO,
        "hp.json": json.dumps({"graphs": [{"nodes": [{"id": "http://x/HP_0000316", "lbl": "Hypertelorism"}]}]}),
        "documents/a.jsonl": _rows({"title": "Noonan", "text": "webbed neck " * 30}, {"title": "b", "text": "thin"}),
        "documents/b.csv": "name,text\nKabuki,long palpebral fissures\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, kind in RECORDS.items():
        (folder / "records" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "records" / name).write_bytes(SEEDS[kind])
    np.save(folder / "scores.npy", np.eye(4, 3, dtype=np.float32))
    (folder / "tiles/Breast").mkdir(parents=True)
    for kind in PICTURES:
        Image.radial_gradient("L").resize((24, 20)).convert("RGB").save(folder / f"picture.{kind}")
    shutil.copy(folder / "picture.png", folder / "tiles/Breast/picture.png")
    away = folder.parent / "away"
    away.mkdir()
    shutil.copy(folder / "picture.png", away)
    for home in (folder, folder / "records"):
        (home / "linked").symlink_to(away)
    return folder


def _cases(path: Path) -> Any:
    """The cases of a file or folder with their pictures, bad ones left out; what is said of bad rows is one line each."""
    skipped: list[str] = []
    cases = list(read_records(path.parent if path.parent.name == "fold" else path, skipped=skipped))
    if any("\n" in message for message in skipped):
        raise AssertionError("what is said of a bad row is more than one line")
    for case in cases[:20]:
        with suppress(MintError):
            open_image(case.image)
    return cases


def _tiles(path: Path) -> Any:
    return [np.asarray(open_image(case.image)) for case in read_records(path.parents[1])]


def _words(path: Path) -> Any:
    return chat_tokenizer(path.parent, {"model_type": "llama"}).plain_ids("thin nose")


def _decoder(path: Path) -> Any:
    return load_decoder(path.parent, device="cpu", dtype="float32")


def _shapes(path: Path) -> Any:
    return load_decoder(path.parent, device="meta")


def _teacher(path: Path) -> Any:
    return load_encoder(path.parent, device="cpu")


READERS: dict[str, Callable[[Path], Any]] = {
    "base/config.json": _decoder,
    "base/model.safetensors.index.json": lambda p: open_checkpoint(p.parent),
    "base/model-00001-of-00008.safetensors": _decoder,
    "base/tokenizer.json": _words,
    "base/tokenizer_config.json": _words,
    "mllama/config.json": _shapes,
    "mllama/preprocessor_config.json": _shapes,
    "vilt/config.json": _teacher,
    "vilt/preprocessor_config.json": _teacher,
    "vilt/tokenizer.json": _teacher,
    "run/adapter/adapter_config.json": lambda p: read_adapter(p.parent),
    "run/adapter/adapter_model.safetensors": lambda p: read_adapter(p.parent),
    "run/checkpoint/state.json": lambda p: saved(p.parents[1]),
    "run/checkpoint/rank-0.safetensors": lambda p: saved(p.parents[1]),
    "two/checkpoint/rank-1.safetensors": lambda p: saved(p.parents[1]),
    "run/run.json": lambda p: AlignSettings.from_dict(runs.read_run(p)),
    "run/metrics.jsonl": runs.read_metrics,
    "pairs.jsonl": lambda p: [open_image(pair.image) for pair in read_pairs(p) if pair.image is not None],
    "predictions.jsonl": lambda p: list(read_predictions(p)),
    "candidates.jsonl": read_candidates,
    "scores.jsonl": ScoreFile,
    "scores.npy": ScoreFile,
    "labels.csv": read_labels,
    "template.txt": read_template,
    "hp.obo": read_hpo,
    "hp.json": read_hpo,
    "documents/a.jsonl": lambda p: open_retriever(p.parent),
    "documents/b.csv": lambda p: open_retriever(p.parent),
    "tiles/Breast/picture.png": _tiles,
    **{f"records/{name}": _cases for name in RECORDS},
    **{f"picture.{kind}": lambda p: np.asarray(open_image(p)) for kind in PICTURES},
}
FOLDERS = ("base/", "vilt/", "run/adapter/", "run/checkpoint/", "two/checkpoint/", "tiles/", "records/fold/")
LINKED = tuple(name for name in READERS if name.startswith(FOLDERS))
"""Files that belong to a folder that is opened as a whole: another may not stand in their place by a link."""


@dataclass
class Watch:
    """What is opened while `home` is read: of the file system, code and `home` alone, and nothing is changed."""

    home: str
    on: bool = False
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        code = [sys.prefix, sys.base_prefix, *map(os.path.dirname, (mint.__file__, __file__)), *sys.path]
        self.allowed = tuple(os.path.realpath(path) + "/" for path in (self.home, *code) if path)
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            known = isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(self.allowed)
            if not known or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen.append(f"open {path!r} {mode!r}")
        elif event in _CHANGES:
            self.seen.append(f"{event} {args!r}"[:200])

    @contextmanager
    def looking(self) -> Iterator[None]:
        self.seen.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False


_CHANGES = {
    f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "symlink", "link", "chmod", "chown", "truncate")
}
_CHANGES |= {"os.system", "os.exec", "os.posix_spawn", "os.fork", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
_CHANGES |= {"subprocess.Popen", "socket.connect", "pickle.find_class"}


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


def attack(made: Path, name: str, count: int, draw: random.Random, watch: Watch, kept: Path | None = None) -> Tally:
    """So many hostile versions of one file, each read as MINT reads it; those that get through are put in `kept`."""
    path, tally, away = made / name, Tally(), made.parent / "away"
    away.mkdir(exist_ok=True)
    good = path.read_bytes()
    READERS[name](path)
    for number in range(count):
        if name in LINKED and draw.random() < 0.05:
            link_instead(path, draw, away)
        else:
            path.write_bytes(variant(name, good, draw, away))
        fault = _read(name, path, tally, watch)
        if fault:
            tally.faults.append(f"{name}, input {number}: {fault}")
            if kept is not None and path.is_file() and not path.is_symlink():
                shutil.copy(path, kept / f"{name.replace('/', '-')}.{number}")
        put_back(path, good)
    return tally


def _read(name: str, path: Path, tally: Tally, watch: Watch) -> str:
    """Read one input and count what came of it; what is wrong is told in words."""
    begun, memory, fault = time.process_time(), _memory(), ""
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        with watch.looking():
            READERS[name](path)
        tally.counts["read"] += 1
    except MintError as error:
        tally.counts["refused"] += 1
        said = " ".join(str(error).split())
        if not said.isprintable() or len(said) > 20_000:
            fault = f"a message that is not one short line of text: {said[:200]!a}"
    except BaseException as error:
        fault = f"{type(error).__name__}: {str(error)[:200]!a}"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    spent = time.process_time() - begun
    tally.slowest = max(tally.slowest, spent)
    if spent > SECONDS or _memory() - memory > MEMORY:
        fault = f"{spent:.1f} s of computing, {(_memory() - memory) >> 20} MiB: too much for one input"
    return fault or "; ".join(watch.seen)


def _memory() -> int:
    """The most that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class Hung(BaseException):
    """Not an Exception: nobody may take it for an error of the file system."""


def _hung(*_: Any) -> None:
    raise Hung(f"no answer in {HANG} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    asked = parser.parse_args()
    faulthandler.enable()
    set_quiet(True)
    signal.signal(signal.SIGALRM, _hung)
    names = [name for name in READERS if asked.only in name]
    kept = Path(tempfile.mkdtemp(prefix="mint-fuzz-"))
    made = make(kept / "made")
    watch, total, begun = Watch(str(made)), Tally(), _memory()
    for place, name in enumerate(names):
        share = asked.inputs // len(names) + (place < asked.inputs % len(names))
        found = attack(made, name, share, random.Random(f"{asked.seed} {name}"), watch, kept)
        print(
            f"{name:42} {share:7,}  {dict(found.counts)}  slowest {found.slowest:.2f} s  {len(found.faults)} faults",
            flush=True,
        )
        print("".join(f"    {fault}\n" for fault in found.faults[:20]), end="", flush=True)
        total.counts += found.counts
        total.faults += found.faults
    grown = (_memory() - begun) >> 20
    print(
        f"{asked.inputs:,} inputs, seed {asked.seed}: {dict(total.counts)}, "
        f"{len(total.faults)} faults; at most {grown} MiB more"
    )
    if total.faults:
        print(f"the inputs lie in {kept}")
    else:
        shutil.rmtree(kept)
    return int(bool(total.faults))


if __name__ == "__main__":
    sys.exit(main())
