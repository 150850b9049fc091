"""The gradients of a step, summed in float64 over its batches and over the ranks that have other pairs.

A sum in float32 depends on its order, and so on how many ranks share a step: too much for objectives that look at small
differences. FSDP adds up by itself, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import parallel


class Gradients:
    """Sums of what backward leaves in the weights of an adapter, over so many batches."""

    def __init__(self, weights: Sequence[Tensor], batches: int) -> None:
        self.weights, self.batches = weights, batches
        self.mine = [weight for weight in weights if not parallel.is_pooled(weight)]
        self.sums: list[Tensor] = []

    def take(self) -> None:
        """Add what a backward pass has left, and leave zeros; what the only one has left stays where it is."""
        if self.batches == 1:
            return
        own = self._own()
        self.sums = self.sums or [torch.zeros_like(grad, dtype=torch.float64) for grad in own]
        for total, grad in zip(self.sums, own, strict=True):
            total.add_(grad)
            grad.zero_()

    def finish(self) -> None:
        """Leave the sums of all batches of all ranks in the weights, zeros where no pair has any; every rank must ask."""
        own = self._own()
        if self.batches == 1 and parallel.size() == 1:
            return
        sums = self.sums or [grad.double() for grad in own]
        for weight, total in zip(self.mine, sums, strict=True):
            parallel.complete(weight, total)
        parallel.add_up(sums)
        for weight, total in zip(self.mine, sums, strict=True):
            weight.grad = parallel.like(weight, total.to(weight.dtype))

    def _own(self) -> list[Tensor]:
        """What this rank holds of each gradient that backward does not add up over the ranks."""
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return [parallel.own_part(weight.grad)[0] for weight in self.mine if weight.grad is not None]
