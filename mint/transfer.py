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


class Arriving:
    """A tensor on its way to the processor, from when the device comes to it. To wait for it is to wait for its own copy
    alone, and not for what the device was told to do after it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._here = tensor.to("cpu", non_blocking=True)
        self._copied = None
        if tensor.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def is_here(self) -> bool:
        """Whether it can be had without waiting."""
        return self._copied is None or self._copied.query()

    def here(self) -> Tensor:
        """On the processor."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._here


def arriving(numbers: Tensor) -> Callable[[], list[Any]]:
    """Starts a copy of some numbers to the processor. What is returned waits for it and gives them."""
    coming = Arriving(numbers)
    return lambda: coming.here().tolist()
