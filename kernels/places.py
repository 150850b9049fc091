"""Where and how kernels run: Triton launches on the device that is current, not on the one that the tensors lie on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


FUSED = {"enable_fp_fusion": True}
"""Every launch asks for multiply-and-add in one rounding; Triton does so unasked up to 3.9, which warns of it."""


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """The function, with the GPU of its first tensor as the current one for as long as it runs."""

    @wraps(launch)
    def there(*given: P.args, **named: P.kwargs) -> T:
        tensor = next(one for one in given if isinstance(one, Tensor))
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return launch(*given, **named)
        with torch.cuda.device(tensor.device):
            return launch(*given, **named)

    return there
