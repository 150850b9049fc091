"""A step that was given to the device, and the line of metrics that it becomes once its numbers have come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import AlignSettings
from ..errors import WorkError
from ..losses import OBJECTIVES
from .batches import TokenPair
from .objectives import METRICS


@dataclass(frozen=True, slots=True)
class Launched:
    """A step, counted from 1, with what is known of it before its numbers are."""

    step: int
    members: Sequence[TokenPair]
    rate: float
    tokens: int
    start: float  # when the processor began with it
    numbers: Callable[[], list[float]]  # METRICS and the gradient's norm; waits for them

    def refuse_not_finite(self) -> None:
        """Stop before a step that is not a number gets into an adapter on disk."""
        loss, *_, gradient = values = self.numbers()
        if math.isfinite(gradient) and all(map(math.isfinite, values[:2])):
            return
        names = ", ".join(repr(pair.id) for pair in self.members)
        raise WorkError(
            f"step {self.step}: loss {loss}, gradient norm {gradient}; pairs of the step: {names}; nothing of it "
            f"was kept and the last checkpoint is intact: start again with a lower --lr, or without these pairs"
        )

    def metrics(self, settings: AlignSettings, epoch: float, seconds: float, peak: int) -> dict[str, Any]:
        """Its line of metrics.jsonl."""
        *values, gradient = self.numbers()
        row: dict[str, Any] = dict(zip(METRICS, values, strict=True))
        if not OBJECTIVES[settings.objective].preference:
            row.update({name: None for name in METRICS if name not in ("loss", "nll_loss", "logps/chosen")})
        return {
            "step": self.step,
            "epoch": round(epoch, 6),
            **row,
            "grad_norm": gradient,
            "learning_rate": self.rate,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": peak,
        }
