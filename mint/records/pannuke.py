"""PanNuke's folds into Records: `images.npy` (N, H, W, 3) and `types.npy` (N,), mapped and never read whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecordError
from ..images.arrays import map_array
from ..types import Record
from .rows import Row

TISSUES = (
    *("Adrenal_gland", "Bile-duct", "Bladder", "Breast", "Cervix", "Colon", "Esophagus", "HeadNeck", "Kidney", "Liver"),
    *("Lung", "Ovarian", "Pancreatic", "Prostate", "Skin", "Stomach", "Testis", "Thyroid", "Uterus"),
)
ARRAYS = ("images.npy", "types.npy")
_NAME_BYTES = 4096


def fold_records(folds: Sequence[Path]) -> Iterator[Row]:
    """The tiles of each fold: id `fold1/17`, image `…/fold1/images.npy#17`, label one of the 19 tissues.

    A fold is called by its own folder (`Fold 1/images/fold1` and `fold1` are both `fold1`), by its whole path where two
    have the same name.
    """
    names = [fold.resolve().name for fold in folds]
    for fold, name in zip(folds, names, strict=True):
        yield from _fold(fold, name if names.count(name) == 1 else str(fold))


def tissue(name: str) -> str | None:
    """PanNuke's own spelling of a tissue, found by its letters only: 'bile duct' is 'Bile-duct'."""
    return _BY_LETTERS.get(_letters(name))


def _fold(fold: Path, name: str) -> Iterator[Row]:
    pictures, types = (map_array(fold / name) for name in ARRAYS)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype.kind not in "uif":
        found = f"{pictures.dtype} of shape {pictures.shape}"
        raise RecordError(f"{fold / 'images.npy'}: {found}, numbers of shape (N, H, W, 3) were wanted")
    if types.dtype.kind not in "US" or types.itemsize > _NAME_BYTES or types.size != len(pictures):
        found = f"{types.dtype} of shape {types.shape}"
        raise RecordError(f"{fold / 'types.npy'}: {found}, {len(pictures)} names were wanted, one for each image")
    for index in range(len(pictures)):
        where = f"{fold / 'types.npy'}: item {index}"
        label = _tissue_at(types.reshape(-1), index)
        if label is None:
            yield where, RecordError(f"{where}: none of PanNuke's 19 tissues; wanted {', '.join(TISSUES)}")
        else:
            yield where, Record(f"{name}/{index}", image=f"{fold / 'images.npy'}#{index}", label=label)


def _tissue_at(types: np.ndarray[Any, Any], index: int) -> str | None:
    """The tissue named by one item, decoded from its bytes: numpy makes broken texts of bad code points."""
    order, kind = types.dtype.str[:2]
    encoding = "utf-8" if kind == "S" else "utf-32-be" if order == ">" else "utf-32-le"
    return tissue(types[index : index + 1].tobytes().decode(encoding, "replace"))


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalpha())


_BY_LETTERS = {_letters(name): name for name in TISSUES} | {"headandneck": "HeadNeck"}
