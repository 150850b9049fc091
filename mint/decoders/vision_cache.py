"""What a frozen tower made of each picture, kept on disk within a bound as it is; what was used longest ago goes first.

A GPU is not waited for: what it has made goes to disk once it is on the processor, while later pictures are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WorkError
from ..files import replacing
from ..transfer import Arriving
from ..weights.tensorfiles import TensorReader, read_header, write_tensors

_SUFFIX = ".safetensors"
_TENSOR = "features"
_HEADER = 256  # at most, in a file with one tensor
AHEAD = 1 << 30
"""Bytes that may be on their way; then the first of them is waited for, while the GPU has the others to make."""


@dataclass(frozen=True, slots=True)
class FeatureStore:
    """A folder of features by name, of at most `limit` bytes in all."""

    folder: Path
    limit: int
    coming: dict[Path, Arriving] = field(default_factory=dict)  # made, and not on disk yet

    def fetch(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, made if it is not there: on the CPU, or where it was made a moment ago."""
        path = self.folder / f"{name}{_SUFFIX}"
        try:
            os.utime(path)  # used now
        except FileNotFoundError:
            return self._made(path, make)
        return _read(path)

    def _made(self, path: Path, make: Callable[[], Tensor]) -> Tensor:
        if path not in self.coming:
            self.coming[path] = Arriving(make().contiguous())
        tensor = self.coming[path].tensor
        self._keep([path for path, one in self.coming.items() if one.is_here()])
        while sum(one.tensor.nbytes for one in self.coming.values()) > AHEAD:
            self._keep([next(iter(self.coming))])
        return tensor

    def finish(self) -> None:
        """Keep all that was made."""
        self._keep(list(self.coming))

    def _keep(self, paths: Sequence[Path]) -> None:
        for path in paths:
            tensor = self.coming.pop(path).here()
            size = tensor.nbytes + _HEADER
            if size <= self.limit:
                self._make_room(size)
                with replacing(path) as file:
                    write_tensors(file, {_TENSOR: tensor})

    def _make_room(self, size: int) -> None:
        """Drop files, the one used longest ago first, until `size` bytes more fit."""
        found = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry) for entry in self.folder.glob(f"*{_SUFFIX}")]
        total = sum(held for _, held, _ in found)
        for _, held, entry in sorted(found):
            if total + size <= self.limit:
                return
            entry.unlink(missing_ok=True)
            total -= held


def _read(path: Path) -> Tensor:
    info = read_header(path).get(_TENSOR)
    if info is None or len(info.shape) != 3 or not info.dtype.is_floating_point:
        raise WorkError(f"{path}: not features of a picture; delete the file, it will be made again")
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with TensorReader() as reader:
        reader.read(info, tensor)
    return tensor
