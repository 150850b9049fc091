"""Weights in oneDNN's own order of blocks, while a processor writes text.

A step of generation multiplies a few rows by every weight, and what it waits for is the reading of the weights: in blocks
they are read 1.3 to 1.7 times as fast as row by row. Layers of the same input (q, k, v; gate, up) are packed as one. Packing
costs about what four steps do, and the blocks are a second copy. So it is done only for a text of some length and where
there is memory to spare, and given back with the text's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..devices import free_memory
from ..kernels import products
from .layers import Linear, Together
from .lora import LoRALinear

STEPS = 16
"""A shorter text is written with the weights as they lie."""
FLOAT32_ROWS = 4
"""Fewer rows in float32 gain nothing from it."""


@contextmanager
def packed(network: Any, rows: int, steps: int, device: torch.device) -> Iterator[None]:
    """Inside, products of prediction take packed weights, in blocks that suit so many rows."""
    weights = _worth_packing(network, rows, device) if steps >= STEPS else []
    holders = _holders(network, weights)
    for holder, held in holders:
        whole = held[0] if len(held) == 1 else torch.cat(held)
        vars(holder)["packed"] = torch.ops.mkldnn._reorder_linear_weight(whole.detach(), rows)
    try:
        yield
    finally:
        for holder, _ in holders:
            vars(holder).pop("packed", None)  # another text of the same network may have given it back


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
    """The weights that `quick_product` takes, each once; none where a second copy would fill half of the free memory."""
    if device.type != "cpu":
        return []
    layers = [m for m in network.modules() if isinstance(m, Linear) or (isinstance(m, LoRALinear) and m.quick)]
    whole = {id(layer.weight): layer.weight for layer in layers if not parallel.is_part(layer.weight)}
    weights = [weight for weight in whole.values() if _gains(weight, rows)]
    return weights if 2 * sum(weight.nbytes for weight in weights) < free_memory(device) else []


def _gains(weight: Tensor, rows: int) -> bool:
    return products.has_onednn(weight.dtype) and (weight.dtype != torch.float32 or rows >= FLOAT32_ROWS)
