"""Tensors to a checkpoint folder in the official layout: model.safetensors, or shards with an index, and config.json.

Memory stays bounded: one tensor at a time, and what waits for its header waits on the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import refuse_to_replace, replacing_folder, write_json
from ..progress import progress
from .hub import INDEX, SINGLE, SMALL_FILES, member
from .tensorfiles import lay_out, raw


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    *,
    copy_from: Path | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a checkpoint folder, which takes its place when it is complete.

    `tensors` may be a generator, and is asked for one tensor at a time. Tokenizer and generation files are copied from
    the checkpoint folder `copy_from`.
    """
    refuse_to_replace(folder, "config.json")
    with replacing_folder(folder) as beside:
        if copy_from is not None:
            _copy_small_files(Path(copy_from), beside)
        write_json(beside / "config.json", config)
        counted = progress(tensors, "writing weights", unit="tensor")
        _name_shards(beside, list(_write_shards(beside, counted, int(shard_bytes))))


def _copy_small_files(source: Path, target: Path) -> None:
    for name in sorted(os.listdir(source)):
        if name != "config.json" and any(fnmatchcase(name, pattern) for pattern in SMALL_FILES):
            shutil.copyfile(member(source, name), target / name)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, int]]:
    """Write shard-1, shard-2, ... of at most `limit` bytes (or one tensor) and yield the names and sizes in each."""
    number, seen = 1, set()
    with ExitStack() as spools:
        shard = _Shard(folder, spools)
        for name, tensor in tensors:
            if name in seen:
                raise CheckpointError(f"{folder}: tensor {name} is written twice")
            seen.add(name)
            if shard.sizes and shard.spooled + tensor.nbytes > limit:
                yield shard.close(folder / f"shard-{number}")
                shard, number = _Shard(folder, spools), number + 1
            shard.add(name, tensor)
        yield shard.close(folder / f"shard-{number}")


class _Shard:
    """A safetensors file in the making. The header stands first but is known last, so the tensors wait in a spool."""

    def __init__(self, folder: Path, spools: ExitStack) -> None:
        self._spool: IO[bytes] = spools.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._starts: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.spooled = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._shapes[name] = (tensor.dtype, tuple(tensor.shape))
        self._starts[name], self.sizes[name] = self.spooled, tensor.nbytes
        self._spool.write(raw(tensor))
        self.spooled += tensor.nbytes

    def close(self, path: Path) -> dict[str, int]:
        head, names = lay_out(self._shapes)
        with self._spool as spool, path.open("wb") as file:
            file.write(head)
            for name in names:
                spool.seek(self._starts[name])
                _copy_bytes(spool, file, self.sizes[name])
            file.flush()
            os.fsync(file.fileno())
        return self.sizes


def _copy_bytes(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count:
        piece = source.read(min(count, 8 << 20))
        target.write(piece)
        count -= len(piece)


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards their official names, which say how many there are; several get an index."""
    if len(shards) == 1:
        os.replace(folder / "shard-1", folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"shard-{number}", folder / name)
        weight_map |= dict.fromkeys(sizes, name)
    total = sum(sum(sizes.values()) for sizes in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
