"""Multimodal encoders, the teachers: `load_encoder` opens one, and each has `classes` and gives `scores` of records.

vilt.py and clip.py are the networks; fusion.py and zeroshot.py give them records to score; scorefile.py needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..devices import pick_device
from ..errors import CheckpointError, ConfigError
from ..weights import SMALL_FILES, open_checkpoint
from .encoder import Encoder, choose_dtype
from .fusion import PICKLES, FusionEncoder, open_fusion, open_gestalt, released_gestalt
from .scorefile import ScoreFile
from .zeroshot import ClipEncoder, open_clip

__all__ = ["ClipEncoder", "Encoder", "FusionEncoder", "ScoreFile", "load_encoder"]


def load_encoder(
    folder_or_name: str | Path,
    *,
    classes: Iterable[str] | None = None,
    templates: Iterable[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    cache: str | Path | None = None,
    seed: int = 0,
) -> Encoder:
    """A teacher: a ViLT or CLIP checkpoint (folder or hub name), GestaltMML's `.pt`, or a file of scores.

    `classes` picks some of a ViLT teacher's classes, names those of one that states none, and is what CLIP looks for;
    `templates` are CLIP's sentences with {} in the class's place, and `cache` a folder for its image vectors; `seed`
    draws the classifier of a ViLT checkpoint that has none.
    """
    path, kind = Path(folder_or_name), ""
    place, number = pick_device(device), choose_dtype(dtype)
    if path.is_file() and path.suffix not in PICKLES:
        _only_clip(folder_or_name, templates, cache)
        return ScoreFile(path, classes)
    released = released_gestalt(path)
    if released is None:
        small = open_checkpoint(folder_or_name, files=SMALL_FILES)
        kind = str(small.config.get("model_type"))
        if kind == "clip":
            return open_clip(
                folder_or_name, small, classes=classes, templates=templates, cache=cache, device=place, dtype=number
            )
    _only_clip(folder_or_name, templates, cache)
    if released is not None:
        return open_gestalt(released, classes=classes, device=place, dtype=number)
    if kind == "vilt":
        checkpoint = open_checkpoint(folder_or_name)
        return open_fusion(checkpoint, classes=classes, device=place, dtype=number, seed=seed)
    raise CheckpointError(f"{folder_or_name}: config.json has model_type {kind!r}, a teacher is vilt or clip")


def _only_clip(name: str | Path, templates: Iterable[str] | None, cache: str | Path | None) -> None:
    if templates is not None or cache is not None:
        given = "templates" if templates is not None else "cache"
        raise ConfigError(f"{given}: {name} is no CLIP encoder and has no use for it; leave it out")
