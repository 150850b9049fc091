"""NumPy files without trust: mapped, not read, and never unpickled."""

from __future__ import annotations

import warnings
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from ..errors import RecordError

_FAULTS = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, MemoryError)


def map_array(path: str | Path) -> np.ndarray[Any, Any]:
    """The array of an `.npy` file, mapped into memory: only what is looked at is read."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise RecordError(f"{path}: a folder, pipe or device, and not an .npy file; fetch it again")
        with open(path, "rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise RecordError(f"{path}: not an .npy file; fetch it again, or write it with numpy.save")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote, and reads them
            array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (*_FAULTS, SyntaxError, TokenError) as fault:
        why = (str(fault) or type(fault).__name__).splitlines()[0]
        raise RecordError(f"{path}: not an array that can be read ({why}); write it again with numpy.save") from fault
    if not array.nbytes:
        raise RecordError(f"{path}: an array of shape {array.shape} and type {array.dtype} is empty; fetch it again")
    return array
