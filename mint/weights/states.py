"""The state of a run on disk: a folder with a safetensors file of each rank and state.json, replaced whole.

Each rank writes what it holds, and reads what it needs, by torch.distributed.checkpoint (`parallel.checkpoints`): a
state that N ranks saved is gone on with by M. Every header is read strictly here before torch opens a file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..errors import CheckpointError, WorkError
from ..files import member, member_object, replacing_folder, write_json
from .tensorfiles import TensorInfo, describe, read_described, shown, write_tensors

FACTS = "state.json"
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor, the whole of it, by name."""


def file_of(rank: int) -> str:
    return f"rank-{rank}.safetensors"


# ---- written --------------------------------------------------------------------------------------------------------


def save_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors, whole or in parts, and a JSON object; every rank must ask, with a name of its own for what it has alone."""
    with replacing_folder(folder) if parallel.first() else nullcontext() as made:
        beside = Path(parallel.from_first(None if made is None else str(made)))
        parallel.save_parts(tensors, lambda own, told: _write(beside, folder, own, told))
        if made is not None:
            write_json(made / FACTS, {**facts, "ranks": parallel.size()})


def _write(beside: Path, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """This rank's file, in the folder that the first one has made."""
    if not beside.is_dir():
        raise WorkError(
            f"{folder}: process {parallel.rank()} does not see it, and each writes a part of a checkpoint; "
            f"give an --out on a disk that all machines share"
        )
    try:
        with (beside / file_of(parallel.rank())).open("wb") as file:
            write_tensors(file, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WorkError(
            f"{folder}: cannot be written ({error.strerror}); free some space or give another place"
        ) from error


# ---- read -----------------------------------------------------------------------------------------------------------


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The JSON object of the state in `folder`, or None where there is no state."""
    if not os.path.lexists(folder):
        return None
    facts = member_object(folder, FACTS)
    ranks = facts.get("ranks")
    if type(ranks) is not int or ranks < 1:
        raise CheckpointError(f"{folder}: not the state of a run, {FACTS} is missing or broken; start a new run")
    return facts


def read_shapes(folder: Path) -> Shapes:
    """What tensors the state in `folder` holds, each of them whole; what is missing, doubled or foreign is refused."""
    pieces: dict[str, list[Piece]] = {}
    for name in _files(folder):
        for piece in _read_pieces(member(folder, name)):
            pieces.setdefault(piece[0].name, []).append(piece)
    return {name: _whole(folder, name, parts) for name, parts in pieces.items()}


def load_state(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this rank's parts of them, with the state in `folder`, which must have all of them alike."""
    found = read_shapes(folder)
    for name, tensor in tensors.items():
        wanted = describe(tensor.dtype, tuple(tensor.shape))
        has = describe(*found[name]) if name in found else "missing"
        if has != wanted:
            raise CheckpointError(f"{folder}: {name} is {has}, wanted {wanted}; resume with the same settings")
    parallel.load_parts(folder, tensors)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of this rank's generators, by names that no other rank has."""
    states = {f"random.cpu.{parallel.rank()}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random.cuda.{parallel.rank()}"] = torch.cuda.get_rng_state(device)
    return states


def take_up_random_states(states: Mapping[str, Tensor], device: torch.device, source: Path) -> None:
    """Put the generators where they were."""
    for name, state in states.items():
        try:
            torch.cuda.set_rng_state(state, device) if ".cuda." in name else torch.set_rng_state(state)
        except RuntimeError as error:
            raise CheckpointError(f"{source}: {name} is no state of a generator ({error}); start a new run") from error


Piece = tuple[TensorInfo, tuple[int, ...]]
"""A part of a tensor as a file holds it, and at which row (and column) of the whole it begins."""


def _files(folder: Path) -> list[str]:
    """The names of the files, one for each rank that saved, and none beside them."""
    ranks = (read_facts(folder) or {}).get("ranks", 0)
    found = {entry.name for entry in folder.iterdir() if entry.name.endswith(".safetensors")}
    wanted = {file_of(rank) for rank in range(min(ranks, len(found) + 1))}
    for name in sorted(found ^ wanted):
        what = "is missing" if name in wanted else "does not belong there"
        raise CheckpointError(
            f"{folder}: {shown(name)} {what}, saved were {ranks} files of tensors; copy the folder again, or start a new run"
        )
    return sorted(found)


def _read_pieces(path: Path) -> list[Piece]:
    """The tensors of one file, and where each begins."""
    infos, metadata = read_described(path)
    try:
        told = json.loads(metadata.get(parallel.SHARDING, "null"))
    except (ValueError, RecursionError):
        told = None
    told = told if isinstance(told, dict) else {}
    return [(info, _begin(path, info, told.get(name))) for name, info in infos.items()]


def _begin(path: Path, info: TensorInfo, told: Any) -> tuple[int, ...]:
    begin = told.get(parallel.OFFSETS) if isinstance(told, dict) else None
    if (
        not isinstance(begin, list)
        or len(begin) != len(info.shape)
        or not all(type(at) is int and 0 <= at < 1 << 62 for at in begin)
        or 0 in info.shape
    ):
        raise CheckpointError(
            f"{path}: tensor {shown(info.name)} ({info}) does not say what part of the whole it is; copy the file again"
        )
    return tuple(begin)


def _whole(folder: Path, name: str, pieces: Sequence[Piece]) -> tuple[torch.dtype, tuple[int, ...]]:
    """What the pieces of one tensor make together: a grid of which each field is there once."""
    (first, origin), *_ = pieces
    alike = all(info.dtype == first.dtype and len(begin) == len(origin) for info, begin in pieces)
    spans = [_spans(pieces, way) for way in range(len(origin) if alike else 0)]
    once = len({begin for _, begin in pieces}) == len(pieces) == math.prod(map(len, spans))
    if not (alike and once and all(map(_gapless, spans))):
        raise CheckpointError(
            f"{folder}: the parts of {shown(name)} leave a gap or overlap; copy the folder again, or start a new run"
        )
    return first.dtype, tuple(of[-1][1] for of in spans)


def _spans(pieces: Sequence[Piece], way: int) -> list[tuple[int, int]]:
    """From where to where pieces reach along one dimension."""
    return sorted({(begin[way], begin[way] + info.shape[way]) for info, begin in pieces})


def _gapless(spans: Sequence[tuple[int, int]]) -> bool:
    begins, ends = zip(*spans, strict=True)
    return (0, *ends[:-1]) == begins
