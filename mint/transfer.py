"""Tensors between the processor and a device, without the one waiting for the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, copied when the device has come to it. A GPU takes it from pinned memory, for from any other
    the processor would have to wait until then."""
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def arriving(numbers: Tensor) -> Callable[[], list[Any]]:
    """Starts a copy of some numbers to the processor. What is returned gives them: it waits for that copy alone, and not for
    what the device was told to do after it."""
    here = numbers.to("cpu", non_blocking=True)
    if numbers.device.type != "cuda":
        return here.tolist
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(numbers.device))

    def values() -> list[Any]:
        there.synchronize()
        out: list[Any] = here.tolist()
        return out

    return values
