"""The folder of a run: run.json, metrics.jsonl, checkpoint/, adapter/. What is in it survives any kill.

The checkpoint is one file that is replaced by a rename: either the old state is there or the new one, whole.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import AlignSettings
from ..errors import CheckpointError, ConfigError
from ..files import add_text, read_json, replacing, write_json, write_text
from ..jsonlines import read_metrics
from ..weights.tensorfiles import TensorReader, read_header, write_tensors

__all__ = [
    "STATE",
    "Metrics",
    "add_evaluation",
    "check_new",
    "check_state",
    "holds_run",
    "load_state",
    "read_metrics",
    "read_run",
    "save_state",
    "settings_to_resume",
    "write_run",
]

STATE = "checkpoint/state.safetensors"
_JSON = "json"


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in the folder. One that was ended before that is begun again when it is resumed."""
    return (folder / "run.json").exists()


def check_new(folder: Path) -> None:
    """Refuse to start a new run over an old one."""
    if holds_run(folder):
        raise ConfigError(f"{folder}: holds a run already; give --resume to continue it, or another --out")


def write_run(folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """run.json: every resolved setting, and what else the results depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(folder / "run.json", {"settings": dict(settings), **facts, "versions": versions})


def read_run(path: Path) -> dict[str, Any]:
    """The settings of a run.json, or of the run folder that holds it."""
    path = path / "run.json" if path.is_dir() else path
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("settings"), dict):
        raise ConfigError(f"{path}: wanted an object with 'settings', as a run writes it")
    settings: dict[str, Any] = value["settings"]
    return settings


def settings_to_resume(folder: Path, settings: AlignSettings) -> AlignSettings:
    """The settings of the run in `folder`, if those given are the same; what is left to `auto` or to none counts as so.

    The pairs may lie elsewhere by now: the checkpoint knows them by their tokens. And a checkpoint is whole, so it can be
    gone on with by more or fewer processes, among which the decoder is spread in another way.
    """
    stored = AlignSettings.from_dict(read_run(folder), str(folder / "run.json"))
    for name, given in settings.as_dict().items():
        held = getattr(stored, name)
        if name not in ("out", "pairs", "shard", "tensor_parallel") and given not in (None, "auto", held):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{folder}: {option} is {given}, the run was begun with {held}; resume with the same settings"
            )
    pairs = settings.pairs or stored.pairs
    return replace(
        stored, out=settings.out, pairs=pairs, shard=settings.shard, tensor_parallel=settings.tensor_parallel
    )


def save_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Tensors and a JSON object in one file, replaced at once."""
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with replacing(folder / STATE) as file:
        write_tensors(file, {**{k: v.detach().cpu().contiguous() for k, v in tensors.items()}, _JSON: text})


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_state` wrote last; None if the run was ended before that."""
    path = folder / STATE
    if not path.is_file():
        return None
    tensors = {}
    with TensorReader() as reader:
        for name, info in read_header(path).items():
            tensors[name] = torch.empty(info.shape, dtype=info.dtype)
            reader.read(info, tensors[name])
    try:
        state = json.loads(tensors.pop(_JSON).numpy().tobytes())
    except (KeyError, TypeError, ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or not {"step", "best", "pairs"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a run; give the folder that a run wrote")
    return tensors, state


def check_state(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that was made with another adapter or for another objective."""
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise CheckpointError(
                f"{folder / STATE}: {name} is {shape}, wanted {list(tensor.shape)}; resume with the same settings"
            )


def add_evaluation(folder: Path, row: Mapping[str, Any]) -> None:
    """A line of evaluations.jsonl: the metrics of the held-out part after a step."""
    rows = [old for old in read_metrics(folder / "evaluations.jsonl") if old["step"] < row["step"]]
    write_text(folder / "evaluations.jsonl", "".join(json.dumps(x) + "\n" for x in [*rows, row]))


class Metrics:
    """metrics.jsonl, a line per step; on resuming, lines after the checkpoint's step are dropped and made again."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= after_step] if after_step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, row: Mapping[str, Any]) -> None:
        add_text(self.path, json.dumps(row, allow_nan=False) + "\n")
