"""Which rank this process is, of how many, and which share of the work it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch.distributed as dist

from ..errors import WorkError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


grid: dict[str, Any] = {"tensor": 1, "group": None}
"""How many neighbouring ranks hold one copy of the decoder together, and the group of those that hold the same part."""


def share() -> int:
    """Which share of the work this rank takes: ranks that hold a copy of the decoder together take the same one."""
    return rank() // int(grid["tensor"])


def shares() -> int:
    return size() // int(grid["tensor"])


def apart() -> None:
    """From here on each rank has a decoder, or tokens, of its own."""
    grid.update(tensor=1, group=None)
    if size() > 1:
        in_turn().begin()


def first() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def in_turn() -> Any:
    """In which order ranks do what needs the parts of all, where they ask different things: see `Turns`."""
    return import_module(f"{__package__}.turns").TURNS


def lost(who: str) -> str:
    """What is said where a rank is gone."""
    return (
        f"{who} of the {size()} that work together is gone: it was killed, ran out of memory, or its machine is off; "
        f"start all of them again, a training run with --resume"
    )


@contextmanager
def together() -> Iterator[None]:
    """A step that all ranks take; if one of them is gone, the others end."""
    try:
        yield
    except RuntimeError as error:
        raise WorkError(lost("a process")) from error
