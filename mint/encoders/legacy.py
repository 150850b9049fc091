"""Checkpoints that exist only as a PyTorch pickle: PLIP's `pytorch_model.bin` and GestaltMML's `.pt`.

They are read by torch.load with `weights_only`, which builds tensors and runs nothing else, and only where there is no
safetensors file.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

PICKLE = "pytorch_model.bin"
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU, without the `module.` that a wrapped training run prepends."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the checkpoint's folder with its weights")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_plain_zip(path))
    except _DAMAGE as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"{path}: not a plain table of tensors ({why}); fetch it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: not a plain table of tensors; save the network's state_dict() alone")
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: a tensor without a name; save the network's state_dict() alone")
    wrapped = bool(found) and all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in found.items()}


def _is_plain_zip(path: Path) -> bool:
    """Whether it is the zip that torch.save writes; one with compressed members, which it never has, is refused."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which torch.save never does")
    return True


def fill_from_pickle(
    model: nn.Module,
    path: Path,
    tensors: dict[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str | None] = str,
) -> None:
    """Give every parameter of `model` its tensor; anything missing, unexpected or misshapen is named."""
    given = {new: value for name, value in tensors.items() if (new := rename(name)) is not None}
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in wanted]
    for name, value in given.items():
        if name in wanted and (value.shape != wanted[name].shape or not value.is_floating_point()):
            faults.append(f"{name} is {value.dtype} {list(value.shape)}, wanted {list(wanted[name].shape)}")
    if faults:
        more = f" and {len(faults) - 8:,} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{path}: {'; '.join(faults[:8])}{more}; give the checkpoint that fits config.json")
    copies = {name: value.to(device, dtype, copy=True) for name, value in given.items()}
    model.load_state_dict(copies, assign=True)
