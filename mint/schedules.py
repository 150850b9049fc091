"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math


def scheduled(step: int, total: int, kind: str, warmup: int = 0) -> float:
    """The share for step 0, 1, ... of `total`: up from 1/warmup over `warmup` steps, then `kind`.

    linear goes down to 0 just after the last step, cosine likewise along half a wave, constant stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1 - done
    if kind == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0
