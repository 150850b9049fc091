"""Weights as a text that is being written reads them best.

A step of generation multiplies a few rows by every weight, and what it waits for is the reading of the weights, so layers of
the same input (q, k, v; gate, up) multiply as one where no adapter stands among them.

On a processor they are read 1.3 to 1.7 times as fast in oneDNN's own blocks as row by row. Packing costs about what four
steps do, and the blocks are a second copy. So it is done only for a text of some length and where there is memory to spare,
and given back with the text's end, though the process keeps its memory, in large pages, for the next text.

On a GPU the weights of such layers are laid one below the other, once: then a view shows them as one, and each is still the
parameter that it was, under its name, with no second copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..devices import ask_for_large_pages, free_memory
from ..kernels import products
from .layers import Linear, Together
from .lora import LoRALinear

STEPS = 16
"""A shorter text is written with the weights as they lie."""
FLOAT32_ROWS = 4
"""Fewer rows in float32 gain nothing from it."""
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def packed(network: Any, rows: int, steps: int, device: torch.device) -> Iterator[None]:
    """Inside, products of prediction take packed weights, in blocks that suit so many rows."""
    weights = _worth_packing(network, rows, device) if steps >= STEPS else []
    holders = _holders(network, weights)
    if weights and device.type == "cpu":
        copied = max(sum(weight.nbytes for weight in held) for _, held in holders)  # before it is packed
        ask_for_large_pages(sum(weight.nbytes for weight in weights) + copied)
    try:
        for holder, held in holders:
            if device.type == "cpu":
                whole = held[0] if len(held) == 1 else torch.cat(held)
                vars(holder)["packed"] = torch.ops.mkldnn._reorder_linear_weight(whole.detach(), rows)
            elif len(held) > 1:
                vars(holder)["packed"] = laid_together(held)
        yield
    finally:
        for holder, _ in holders:
            vars(holder).pop("packed", None)  # another text of the same network may have given it back


@torch.inference_mode(False)
@torch.no_grad()
def laid_together(weights: Sequence[Tensor]) -> Tensor:
    """A view of weights (n, D) of one width, one below the other, where they lie from now on."""
    rows, width = [len(weight) for weight in weights], weights[0].shape[1]
    with _ONE_AT_A_TIME:  # a graph of one thread's text reads them where they lie
        if not all(_is_next(one, other) for one, other in pairwise(weights)):
            for weight, part in zip(weights, torch.cat(list(weights)).split(rows), strict=True):
                weight.data = part
    return weights[0].detach().as_strided((sum(rows), width), (width, 1))


def _is_next(one: Tensor, other: Tensor) -> bool:
    """Whether the rows of the other follow in the same memory."""
    in_one = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    follows = one.data_ptr() + one.nbytes == other.data_ptr()
    return in_one and follows and one.is_contiguous() and other.is_contiguous()


def _holders(network: Any, weights: list[Tensor]) -> list[tuple[Any, list[Tensor]]]:
    """Who holds the blocks of which weights: layers of one input have them as one, unless there is an adapter among them;
    every other weight has its own."""
    left = {id(weight): weight for weight in weights}
    holders: list[tuple[Any, list[Tensor]]] = []
    for module in network.modules():
        layers = module.layers() if isinstance(module, Together) else []
        if layers and all(isinstance(layer, Linear) and id(layer.weight) in left for layer in layers):
            holders.append((module, [left.pop(id(layer.weight)) for layer in layers]))
    return [*holders, *((weight, [weight]) for weight in left.values())]


def _worth_packing(network: Any, rows: int, device: torch.device) -> list[Tensor]:
    """The weights that `quick_product` takes, each once; none where a second copy would fill half of the free memory. On a
    GPU there is no second copy, but parts of a decoder that is spread over several are left alone."""
    if device.type != "cpu":
        modules = list(network.modules())
        spread = any(parallel.is_part(weight) for module in modules for weight in module.parameters(recurse=False))
        return [] if spread else [module.weight for module in modules if isinstance(module, Linear)]
    layers = [m for m in network.modules() if isinstance(m, Linear) or (isinstance(m, LoRALinear) and m.quick)]
    whole = {id(layer.weight): layer.weight for layer in layers if not parallel.is_part(layer.weight)}
    weights = [weight for weight in whole.values() if _gains(weight, rows)]
    return weights if 2 * sum(weight.nbytes for weight in weights) < free_memory(device) else []


def _gains(weight: Tensor, rows: int) -> bool:
    return products.has_onednn(weight.dtype) and (weight.dtype != torch.float32 or rows >= FLOAT32_ROWS)
