"""Image vectors kept on disk by the content of the image, so that no image goes through the same network twice.

A cache folder has one folder for each network and way of preparing pixels; in it, each run adds files of rows (key,
vector). A key is a hash of the image's content: the same picture under another name is the same picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, RecordError
from ..files import replacing
from ..images import KEY_BYTES, content_key
from ..images.arrays import map_array
from ..images.rules import ClipSettings
from ..types import Record
from .clip import ClipModel
from .encoder import with_pictures

PER_FILE = 4096


class FeatureCache:
    """Vectors by image content, for one network and one way of preparing pixels."""

    def __init__(self, folder: str | Path, network: ClipModel, settings: ClipSettings) -> None:
        self.folder = Path(folder) / _fingerprint(network, settings)
        self.rows: dict[bytes, tuple[Path, int]] = {}  # keys in memory, vectors on disk
        self.fresh: dict[bytes, np.ndarray] = {}  # vectors not yet written
        for path in sorted(self.folder.glob("*.npy")):
            self._index(path)

    def _index(self, path: Path) -> None:
        for row, key in enumerate(np.asarray(_open_rows(path)["key"])):
            self.rows.setdefault(key.tobytes(), (path, row))

    def features(self, records: Sequence[Record], compute: Callable[[Sequence[Record]], Tensor]) -> Tensor:
        """Vectors (n, E) of the records' images; those not seen before are computed, and written down by and by."""
        keys = with_pictures(records, lambda pictures: [content_key(picture) for picture in pictures])
        known = self._read({key for key in keys if key in self.rows})
        new = {key: r for key, r in zip(keys, records, strict=True) if key not in known and key not in self.fresh}
        if new:
            vectors = compute(list(new.values())).float().cpu().numpy()
            self.fresh.update(zip(new, vectors, strict=True))
        found = torch.from_numpy(np.stack([known[key] if key in known else self.fresh[key] for key in keys]))
        if len(self.fresh) >= PER_FILE:
            self.flush()
        return found

    def _read(self, keys: set[bytes]) -> dict[bytes, np.ndarray]:
        opened = {path: _open_rows(path)["vector"] for path in {self.rows[key][0] for key in keys}}
        return {key: opened[path][row] for key, (path, row) in ((key, self.rows[key]) for key in keys)}

    def flush(self) -> None:
        """Write down what was computed."""
        if not self.fresh:
            return
        keys = b"".join(self.fresh)
        vectors = np.stack(list(self.fresh.values()))
        rows = np.zeros(len(vectors), dtype=_row_type(vectors.shape[1]))
        rows["key"], rows["vector"] = np.frombuffer(keys, dtype=f"V{KEY_BYTES}"), vectors
        path = self.folder / f"{hashlib.sha256(keys).hexdigest()[:32]}.npy"
        with replacing(path) as file:
            np.save(file, rows, allow_pickle=False)
        self.fresh.clear()
        self._index(path)


def _row_type(width: int) -> np.dtype[Any]:
    return np.dtype([("key", f"V{KEY_BYTES}"), ("vector", "<f4", (width,))])


def _open_rows(path: Path) -> np.ndarray:
    try:
        rows = map_array(path)
    except RecordError as error:
        raise ConfigError(f"{path}: not a file of cached image vectors ({error}); delete it") from error
    if rows.ndim != 1 or rows.dtype.names != ("key", "vector") or rows.dtype["key"].itemsize != KEY_BYTES:
        raise ConfigError(f"{path}: {rows.dtype} {rows.shape} is not a file of cached image vectors; delete it")
    return rows


def _fingerprint(network: ClipModel, settings: ClipSettings) -> str:
    """Names the network, its weights, and the way its pixels are prepared."""
    hashed = hashlib.blake2b(repr((network.config.vision, settings)).encode(), digest_size=KEY_BYTES)
    for name, value in network.state_dict().items():
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
