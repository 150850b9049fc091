"""Two functions that lose all digits near 1 if they are written plainly, for Triton kernels: log(1 + x) and 1 - exp(y).

Both use that rounding 1 + x (or exp(y)) to u makes an error that log(u) makes too, so the quotient is exact again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def one_minus_exp(y):
    """1 - exp(y) for y <= 0."""
    u = tl.exp(y)
    near = (y > -1.0) & (u != 1.0)
    quotient = (1.0 - u) * (y / tl.log(tl.where(near, u, 0.5)))
    return tl.where(near, quotient, tl.where(u == 1.0, -y, 1.0 - u))


@triton.jit
def log_sigmoid(x):
    """(log sigmoid(x), sigmoid(-x)): the logarithm and its slope."""
    small = tl.exp(-tl.abs(x))
    slope = tl.where(x > 0, small, 1.0) / (1.0 + small)
    return tl.minimum(x, 0.0) - log1p(small), slope
