"""The folder of a run: run.json, metrics.jsonl, checkpoint/, adapter/. What is in it survives any kill.

The checkpoint is a folder that takes the place of the one before: a kill leaves one of the two, whole.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import AlignSettings
from ..errors import CheckpointError, ConfigError
from ..files import add_text, read_json, write_json, write_text
from ..jsonlines import read_metrics
from ..weights.states import read_facts

__all__ = [
    "CHECKPOINT",
    "Metrics",
    "add_evaluation",
    "check_new",
    "holds_run",
    "read_metrics",
    "read_run",
    "read_state",
    "settings_to_resume",
    "write_run",
]

CHECKPOINT = "checkpoint"


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in the folder. One that was ended before that is begun again when it is resumed."""
    return (folder / "run.json").exists()


def check_new(folder: Path) -> None:
    """Refuse to start a new run over an old one."""
    if holds_run(folder):
        raise ConfigError(f"{folder}: holds a run already; give --resume to continue it, or another --out")


def write_run(folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """run.json: every resolved setting, and what else the results depend on."""
    versions = {"mint": __version__, "python": platform.python_version(), "torch": torch.__version__}
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
        if name not in ("out", "pairs", "image_folder", "shard", "tensor_parallel") and given not in (
            None,
            "auto",
            held,
        ):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{folder}: {option} is {given}, the run was begun with {held}; resume with the same settings"
            )
    source = settings if settings.pairs else stored
    return replace(
        stored, out=settings.out, pairs=source.pairs, image_folder=source.image_folder, shard=settings.shard,
        tensor_parallel=settings.tensor_parallel,
    )  # fmt: skip


def read_state(folder: Path) -> dict[str, Any] | None:
    """The numbers of the last checkpoint: step, best loss, fingerprint of the pairs, ranks; None if there is none yet."""
    state = read_facts(folder / CHECKPOINT)
    if state is None:
        return None
    step, best = state.get("step"), state.get("best", "")
    numbers = type(step) is int and step >= 0 and (best is None or (type(best) is float and math.isfinite(best)))
    if not numbers or not isinstance(state.get("pairs"), str):
        raise CheckpointError(f"{folder / CHECKPOINT}: not a checkpoint of a run; give the folder that a run wrote")
    return state


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
