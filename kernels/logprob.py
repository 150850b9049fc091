"""`token_logprob` on a GPU: two products per vocabulary tile, and one kernel between them that crosses the tile once.

Shapes: N rows, D width, V vocabulary, r rank of a LoRA on the head, t columns of a vocabulary tile.

The driver is that of walk.py. The logsumexp of the other classes is kept as a reference level and a sum,

    others = level + log(total),       total = sum of exp(logit - level) over the classes seen so far, without the label

and the tile is overwritten by its terms of `total`, so that the second product adds to the running sum in float32:
`sum += terms @ weight`. The level rises only when a logit exceeds it by more than SLACK, which after the first tiles
happens to few rows; the program of such a row scales its sums itself. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import log_sigmoid, one_minus_exp
from .places import FUSED, on_its_device
from .reference import TokenLogprob, check
from .walk import Head, Walk, Walked, sum_dtype

SLACK = 8.0
"""How far above the level a logit may lie, in nats: exp(8) is far from the end of float16 too."""

LARGEST = 8192
"""Columns of a tile that one program holds in registers; a wider tile is read twice."""


@triton.jit
def _fold_kernel(
    logits, stride, labels, level, total, label_logit, sums, low_sums, first, columns, D, r,
    SLACK: tl.constexpr, WANTED: tl.constexpr, LOOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of a tile: label out, the rest into (level, total), and the terms of `total` in its place if WANTED."""
    row = tl.program_id(0).to(tl.int64)
    exact = level.dtype.element_ty
    logits += row * stride
    at = tl.arange(0, BLOCK)
    label = tl.load(labels + row) - first
    old = tl.load(level + row)
    now, seen = old, tl.load(total + row)
    stop = columns if LOOP else BLOCK
    if WANTED and LOOP:  # the terms of the whole tile need one level
        for start in range(0, stop, BLOCK):
            x = tl.load(logits + start + at, mask=start + at < columns, other=float("-inf")).to(exact)
            now = _risen(now, tl.max(tl.where(start + at == label, float("-inf"), x)), SLACK)
        seen *= tl.exp(old - now)
    for start in range(0, stop, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < columns, other=float("-inf")).to(exact)
        its = start + at == label
        found = tl.sum(tl.where(its, x, 0.0))
        tl.store(label_logit + row, found, mask=(label >= start) & (label < tl.minimum(start + BLOCK, columns)))
        x = tl.where(its, float("-inf"), x)
        risen = _risen(now, tl.max(x), SLACK)
        terms = tl.exp(x - risen)
        seen = seen * tl.exp(now - risen) + tl.sum(terms)
        now = risen
        if WANTED:
            tl.store(logits + start + at, terms.to(logits.dtype.element_ty), mask=start + at < columns)
    tl.store(level + row, now)
    tl.store(total + row, seen)
    factor = tl.exp(old - now)
    if WANTED and first > 0 and factor < 1.0:
        _scale_row(sums + row * D, D, factor, BLOCK_D)
        if low_sums is not None:
            _scale_row(low_sums + row * r, r, factor, BLOCK_D)


@triton.jit
def _risen(level, peak, SLACK: tl.constexpr):
    return tl.where(peak > level + SLACK, peak, level)


@triton.jit
def _scale_row(row, width, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        tl.store(row + start + at, tl.load(row + start + at, mask=inside) * factor, mask=inside)


@triton.jit
def _finish_kernel(
    weight, stride, step, labels, level, total, label_logit, sums, logp, V, D, BLOCK: tl.constexpr
):  # fmt: skip
    """One row at the end: log p(label), and the sum becomes (1 - p) (W[label] - sum / total) in place."""
    row = tl.program_id(0).to(tl.int64)
    label, seen = tl.load(labels + row), tl.load(total + row)
    others = tl.load(level + row) + tl.where(seen > 0, tl.log(tl.where(seen > 0, seen, 1.0)), 0.0)
    value, unsure = log_sigmoid(tl.load(label_logit + row) - others)
    tl.store(logp + row, value)
    if sums is not None:
        at = tl.arange(0, BLOCK)
        inverse = tl.where(seen > 0, 1.0 / tl.where(seen > 0, seen, 1.0), 0.0)
        known = tl.where((label >= 0) & (label < V), D, 0)  # columns of W[label]: none where there is no such label
        for start in range(0, D, BLOCK):
            inside = start + at < D
            own = tl.load(weight + label * stride + (start + at) * step, mask=start + at < known, other=0.0)
            own = own.to(sums.dtype.element_ty)
            mean = tl.load(sums + row * D + start + at, mask=inside, other=0.0) * inverse
            tl.store(sums + row * D + start + at, (own - mean) * unsure, mask=inside)


@triton.jit
def _spread_kernel(logits, stride, labels, logp, label_logit, grad, first, columns, BLOCK: tl.constexpr):
    """A piece of a row of logits becomes grad (one-hot - p), in place."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value, scale = tl.load(logp + row), tl.load(grad + row)
    x = tl.load(logits + row * stride + at, mask=at < columns).to(value.dtype)
    p = tl.exp(x - (tl.load(label_logit + row) - value))
    out = tl.where(at == tl.load(labels + row) - first, one_minus_exp(value), -p) * scale
    tl.store(logits + row * stride + at, out.to(logits.dtype.element_ty), mask=at < columns)


@triton.jit
def _scaled_kernel(direction, grad, out, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grad + row)
    x = tl.load(direction + row * D + at, mask=at < D).to(scale.dtype) * scale
    tl.store(out + row * D + at, x.to(out.dtype.element_ty), mask=at < D)


def block(width: int, largest: int = LARGEST) -> dict[str, int]:
    """BLOCK and warps of a program that crosses `width` elements: 16 elements a thread."""
    size = min(triton.next_power_of_2(width), largest)
    return {"BLOCK": size, "num_warps": min(max(size // 512, 1), 32), "num_stages": 1, **FUSED}


class KernelWalk(Walk):
    """The walk with kernels between its products. A tile of 4,096 rows by 4,096 columns of bfloat16 is 32 MiB."""

    rows, elements = 4096, 1 << 24

    def __init__(
        self, hidden: Tensor, labels: Tensor, sums: Tensor | None, low_sums: Tensor | None, _skip: float = 0.0
    ) -> None:
        exact, n = sum_dtype(hidden), hidden.shape[0]
        self.labels, self.sums, self.low_sums, self.first = labels, sums, low_sums, 0
        self.level = hidden.new_full((n,), torch.finfo(exact).min / 2, dtype=exact)
        self.total = hidden.new_zeros(n, dtype=exact)
        self.label_logit = hidden.new_full((n,), float("nan"), dtype=exact)  # a label that is never met stays NaN

    def fold(self, logits: Tensor, first: int) -> Tensor:
        columns, self.first = logits.shape[1], first
        widths = [0 if sums is None else sums.shape[1] for sums in (self.sums, self.low_sums)]
        _fold_kernel[(len(logits),)](
            logits, logits.stride(0), self.labels, self.level, self.total, self.label_logit, self.sums, self.low_sums,
            first, columns, *widths, SLACK=SLACK, WANTED=self.sums is not None, LOOP=columns > LARGEST,
            BLOCK_D=1024, maxnreg=min(32 * logits.element_size(), 128), **block(columns),
        )  # fmt: skip
        return logits

    def gather(self, share: Tensor, weight: Tensor, up: Tensor | None) -> None:
        for sums, rows in ((self.sums, weight), (self.low_sums, up)):
            if sums is not None and rows is not None:
                _add_product(sums, share, rows, begin=self.first == 0)

    def finish(self, head: Head) -> tuple[Tensor, Tensor]:
        logp = torch.empty_like(self.total)
        for sums, weight in ((self.sums, head.weight), (self.low_sums, head.up)):
            if weight is not None and (sums is not None or weight is head.weight):
                _finish_kernel[(len(logp),)](
                    weight, *weight.stride(), self.labels, self.level, self.total, self.label_logit, sums, logp,
                    *weight.shape, **block(weight.shape[1], 4096),
                )  # fmt: skip
        return logp, self.label_logit

    @staticmethod
    def spread(logits: Tensor, first: int, labels: Tensor, logp: Tensor, label_logit: Tensor, grad: Tensor) -> Tensor:
        launch = block(logits.shape[1], 2048)
        grid = (len(logits), triton.cdiv(logits.shape[1], launch["BLOCK"]))
        _spread_kernel[grid](
            logits, logits.stride(0), labels, logp, label_logit, grad.contiguous(), first, logits.shape[1], **launch
        )
        return logits

    @staticmethod
    def scaled(direction: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.ops.mint.scaled(direction, grad, dtype)

    @classmethod
    def over(
        cls, hidden: Tensor, low: Tensor | None, head: Head, labels: Tensor, tile: int | None, wanted: bool,
        skip: float = 0.0,  # noqa: ARG003 - cuBLAS cannot leave a product out on the device's own word (README.md)
    ) -> Walked:  # fmt: skip
        logp, label_logit, *directions = torch.ops.mint.over(hidden, low, *head, labels, tile, wanted)
        return Walked(logp, label_logit, *(given(one) for one in directions))

    @classmethod
    def again(
        cls, hidden: Tensor, low: Tensor | None, head: Head, labels: Tensor, walked: Walked, grad: Tensor,
        tile: int | None, wants: list[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        out = torch.ops.mint.again(hidden, low, *head, labels, walked.logp, walked.label_logit, grad, tile, wants)
        return tuple(given(one) for one in out)


WALK = KernelWalk


def _add_product(sums: Tensor, terms: Tensor, rows: Tensor, begin: bool) -> None:
    """sums (n, D) float32 += terms (n, t) @ rows (t, D), or = where it begins; no product is rounded on its way."""
    if terms.dtype == sums.dtype:
        torch.addmm(sums, terms, rows, beta=0 if begin else 1, out=sums)
    elif terms.is_cuda:
        torch.addmm(sums, terms, rows, beta=0 if begin else 1, out_dtype=sums.dtype, out=sums)
    else:  # Triton's interpreter, on a processor
        torch.addmm(sums, terms.to(sums.dtype), rows.to(sums.dtype), beta=0 if begin else 1, out=sums)


# Operators that torch.compile takes as they are; an operator has no way to say None, so nothing is an empty tensor.


def given(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.ndim == 2 or len(tensor) else None


@torch.library.custom_op("mint::over", mutates_args=())
@on_its_device
def _over(
    hidden: Tensor, low: Tensor | None, weight: Tensor, bias: Tensor | None, up: Tensor | None, labels: Tensor,
    tile: int | None, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    walked = super(KernelWalk, KernelWalk).over(hidden, low, Head(weight, bias, up), labels, tile, wanted)
    return tuple(hidden.new_empty(0) if one is None else one for one in walked)


@_over.register_fake
def _(hidden, low, *rest):
    wanted = rest[-1]
    logp, nothing = hidden.new_empty(len(hidden), dtype=sum_dtype(hidden)), hidden.new_empty(0)
    directions = [
        x.new_empty(x.shape, dtype=logp.dtype) if wanted and x is not None else nothing for x in (hidden, low)
    ]
    return logp, torch.empty_like(logp), *directions


@torch.library.custom_op("mint::again", mutates_args=())
@on_its_device
def _again(
    hidden: Tensor, low: Tensor | None, weight: Tensor, bias: Tensor | None, up: Tensor | None, labels: Tensor,
    logp: Tensor, label_logit: Tensor, grad: Tensor, tile: int | None, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head, walked = Head(weight, bias, up), Walked(logp, label_logit, None, None)
    out = super(KernelWalk, KernelWalk).again(hidden, low, head, labels, walked, grad, tile, wants)
    return tuple(hidden.new_empty(0) if one is None else one for one in out)


@_again.register_fake
def _(hidden, _low, weight, bias, up, *rest):
    pairs = zip((weight, bias, up), rest[-1], strict=True)
    return tuple(torch.empty_like(x) if want and x is not None else hidden.new_empty(0) for x, want in pairs)


@torch.library.custom_op("mint::scaled", mutates_args=())
@on_its_device
def _scaled(direction: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    out, launch = torch.empty_like(direction, dtype=dtype), block(direction.shape[1], 2048)
    grid = (len(direction), triton.cdiv(direction.shape[1], launch["BLOCK"]))
    _scaled_kernel[grid](direction, grad.contiguous(), out, direction.shape[1], **launch)
    return out


@_scaled.register_fake
def _(direction, _grad, dtype):
    return torch.empty_like(direction, dtype=dtype)


def token_logprob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    tile: int | None = None,
    skip: float = 0.0,
) -> Tensor:
    """As in reference.py, but nothing is left out, and a label outside 0..V-1, which no kernel can refuse without waiting,
    gives NaN in its row."""
    check(hidden, head, labels, skip)
    recording = torch.is_grad_enabled()
    return TokenLogprob.apply(hidden, head, labels.contiguous(), bias, low, up, tile, recording, KernelWalk)
