"""Comparisons under other settings: `--vary` (k, q, any number of a run), a learning curve, and `--tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ..config import AlignSettings
from ..errors import ConfigError
from .arms import Bench

CHOICES = {"chosen-k": int, "rejected-q": int, "label-within": int, "rejected": str}
"""What of the pairs can be varied beside the numbers of a run."""
LABELLED = "labelled"
"""And how many of the cases to learn from have a known diagnosis."""
RATES = (0.5, 1.0, 2.0)
"""What --tune multiplies the learning rate by, unless rates are given."""

_NUMBERS = {
    setting.name.replace("_", "-"): int if str(setting.type).startswith("int") else float
    for setting in fields(AlignSettings)
    if str(setting.type).split(" ")[0] in ("int", "float")
}


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`chosen-k=1,5,10` as its name and its values."""
    name, equals, listed = text.partition("=")
    kinds: Mapping[str, Any] = {**CHOICES, LABELLED: int, **_NUMBERS}
    if not equals or name not in kinds or not listed:
        raise ConfigError(f"--vary {text}: wanted NAME=VALUE,VALUE with NAME one of {', '.join(kinds)}")
    return name, [_value(kinds[name], part, text) for part in listed.split(",")]


def _value(kind: Any, part: str, text: str) -> Any:
    try:
        return kind(part.strip())
    except ValueError:
        raise ConfigError(f"--vary {text}: {part!r} is no {kind.__name__}; give numbers with commas between") from None


def varied(bench: Bench, name: str, value: Any) -> Bench:
    """The same bench with one thing different, in a folder of its own; itself where that is how it is."""
    folder, key = bench.folder / "vary" / f"{name}={value}", name.replace("-", "_")
    usual = {"chosen_k": bench.k, "rejected_q": bench.q, LABELLED: bench.labelled}
    tuned = any(key in settings for settings in bench.own.values())
    if not tuned and value == {**bench.settings.as_dict(), **usual, **bench.choices}.get(key):
        return bench
    if name == LABELLED:
        return _fresh(bench, folder=folder, labelled=value)
    if name in CHOICES:
        return _fresh(bench, folder=folder, choices={**bench.choices, key: value})
    own = {arm: {k: v for k, v in settings.items() if k != key} for arm, settings in bench.own.items()}
    return _fresh(bench, folder=folder, settings=replace(bench.settings, **{key: value}), own=own)


def sized(bench: Bench, size: int) -> Bench:
    """The same bench with so many cases to learn from. Fewer cases are fewer steps: the passes over them stay."""
    if size == bench.size:
        return bench
    return _fresh(bench, folder=bench.folder / "train-sizes" / str(size), size=size)


def tried(bench: Bench, arm: str, lr: float, epochs: float) -> Bench:
    """A bench of the tuning part, with a learning rate and a length of training to be tried for one arm."""
    if bench.task.for_tuning is None:
        raise ConfigError("--tune: these cases have no validation part to tune on")
    own = {**bench.own, arm: {"lr": lr, "epochs": epochs}}
    folder = bench.folder / "tune" / arm / f"lr={lr:g},epochs={epochs:g}"
    return _fresh(bench, task=bench.task.for_tuning(), folder=folder, own=own)


def grid(settings: AlignSettings, rates: Sequence[float], epochs: Sequence[float]) -> list[tuple[float, float]]:
    """The same few learning rates and lengths for every arm."""
    return [
        (lr, length)
        for lr in (rates or [factor * settings.lr for factor in RATES])
        for length in (epochs or [settings.epochs])
    ]


def _fresh(bench: Bench, **changes: Any) -> Bench:
    """A copy that shares the decoder, but no pairs."""
    return replace(bench, _pairs={}, **changes)
