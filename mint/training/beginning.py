"""What is settled before the first step of a run: its folder, what was left open in its settings, which pairs are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import parallel
from ..config import AlignSettings
from ..decoders import Decoder
from ..devices import free_memory
from ..errors import ConfigError
from ..progress import say
from . import runs
from .batches import TokenPair
from .plan import batch_bytes


def chosen(settings: AlignSettings | None, choices: Mapping[str, Any], resume: bool) -> AlignSettings:
    """`choices` by name over `settings`; where there are none, over those of the run to be resumed or the defaults."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in choices.items()}
    if settings is None:
        run = Path(values.get("out", AlignSettings().out))
        stored = runs.read_run(run) if resume and runs.holds_run(run) else {}
        settings = AlignSettings.from_dict(stored, str(run))
    return AlignSettings.from_dict({**settings.as_dict(), **values}, "align") if values else settings


def admitted(folder: Path, settings: AlignSettings, resume: bool) -> AlignSettings:
    """The settings of the run that is to be continued in the folder, or those given if the folder is free for them."""
    if not resume:
        runs.check_new(folder)
    elif runs.holds_run(folder):
        return runs.settings_to_resume(folder, settings)
    else:
        say(f"{folder}: holds no run yet, so one is begun")
    return settings


def parted(
    pairs: Sequence[TokenPair], settings: AlignSettings, skipped: Sequence[str] | None
) -> tuple[list[TokenPair], list[TokenPair]]:
    """The pairs to train on, of which there must be one, and those held out."""
    training = [pair for pair in pairs if _share(pair.id) >= settings.held_out]
    if not training:
        why = f" (left out: {skipped[0]})" if skipped else ""
        raise ConfigError(
            f"{settings.pairs or 'pairs'}: no pair to train on{why}; give at least one, or a smaller --held-out"
        )
    return training, [pair for pair in pairs if _share(pair.id) < settings.held_out]


def _share(name: str) -> float:
    """A number in [0, 1) that the name alone decides: which pairs are held out never changes."""
    return int.from_bytes(hashlib.sha256(f"held-out|{name}".encode()).digest()[:8], "big") / 2**64


def resolved(decoder: Decoder, settings: AlignSettings, pairs: Sequence[TokenPair]) -> AlignSettings:
    """The settings with what was left open decided: run.json holds them, so a run can be repeated on another day."""
    decoder.network.model.recompute = _recompute(decoder, settings, pairs)
    return replace(
        settings,
        date=decoder.tokenizer.date,
        dtype=str(decoder.dtype).removeprefix("torch."),
        device=decoder.device.type,
        recompute=decoder.network.model.recompute,
        nll=settings.scope,
    )


def _recompute(decoder: Decoder, settings: AlignSettings, pairs: Sequence[TokenPair]) -> bool:
    """Activation checkpointing by choice, or when a batch would take more than half of the free memory."""
    if settings.recompute is not None:
        return settings.recompute
    needed, free = batch_bytes(decoder, pairs, settings), free_memory(decoder.device)
    wanted = bool(parallel.highest(needed > free / 2)[0])  # the same on all ranks
    if wanted:
        sizes = f"activations of {needed / 2**30:.1f} GiB against {free / 2**30:.1f} GiB free"
        say(f"{sizes}: they are computed again in backward")
    return wanted


def report_cuts(pairs: Sequence[TokenPair]) -> None:
    """Say how many texts the limits have cut."""
    prompts, answers = sum(pair.cut_prompt > 0 for pair in pairs), sum(pair.cut_answers > 0 for pair in pairs)
    if prompts or answers:
        say(f"of {len(pairs):,} pairs {prompts:,} had their prompt cut and {answers:,} an answer; see --max-length")
