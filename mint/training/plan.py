"""What each GPU will hold when a decoder is spread over several, from shapes alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..decoders import Decoder

SIZES = (2, 4, 8, 16, 32, 64)


def plan(decoder: Decoder, tokens: int, recompute: bool, ranks: int) -> dict[str, int]:
    """Bytes on each of so many GPUs, for batches of at most `tokens` tokens a GPU.

    Everything is cut evenly, but the two blocks that are whole for as long as they compute (one at work, one on its way)
    and the activations, which belong to a GPU's own tokens.
    """
    named = dict(decoder.network.named_parameters())
    base = _bytes(tensor for name, tensor in named.items() if ".lora_" not in name)
    adapter = _bytes(tensor for name, tensor in named.items() if ".lora_" in name)
    block = max(_bytes(layer.parameters()) for layer in decoder.network.text.layers)
    found = {
        "weights_bytes": -(-base // ranks),
        "blocks_at_work_bytes": 2 * block,
        "adapter_bytes": -(-adapter // ranks),
        "gradient_and_optimiser_bytes": -(-3 * adapter // ranks),  # a gradient and two moments
        "activation_bytes": activations(decoder, tokens, recompute),
    }
    return {**found, "total_bytes": sum(found.values())}


def plan_together(decoder: Decoder, tokens: int, recompute: bool, ranks: int) -> dict[str, int]:
    """Bytes on each of the GPUs that hold a decoder together (`--tensor-parallel`): products are cut, norms are not, and of
    an adapter the side that meets whole rows is on every GPU. Activations are counted as if none of them were cut."""
    named = dict(decoder.network.named_parameters())
    matrices = _bytes(tensor for name, tensor in named.items() if ".lora_" not in name and tensor.ndim > 1)
    norms = _bytes(tensor for tensor in named.values() if tensor.ndim == 1)
    adapters = {name: tensor for name, tensor in named.items() if ".lora_" in name}
    cut = _bytes(
        tensor for name, tensor in adapters.items() if ("lora_A" in name) == any(part in name for part in _ROWS)
    )
    adapter = -(-cut // ranks) + _bytes(adapters.values()) - cut
    found = {
        "weights_bytes": -(-matrices // ranks) + norms,
        "adapter_bytes": adapter,
        "gradient_and_optimiser_bytes": 3 * adapter,
        "activation_bytes": activations(decoder, tokens, recompute),
    }
    return {**found, "total_bytes": sum(found.values())}


_ROWS = ("o_proj", "down_proj")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def activations(decoder: Decoder, tokens: int, recompute: bool) -> int:
    """Bytes that a batch keeps for backward: about seven widths and three inner widths of each layer, or the input alone
    of each and all of one; and the directions of the vocabulary in float32."""
    config = decoder.network.config
    layer = 7 * config.hidden_size + 3 * config.intermediate_size
    layers = config.num_hidden_layers
    kept = layers * config.hidden_size + layer if recompute else layers * layer
    return int(tokens * (kept * decoder.dtype.itemsize + 4 * config.hidden_size))


def plans(decoder: Decoder, tokens: int, recompute: bool | None, together: int | None = None) -> dict[str, Any]:
    """The plan for each usual number of GPUs, or for so many that hold a decoder together; activations are recomputed
    unless the settings say otherwise."""
    again = recompute is not False
    if together is not None:
        return {f"on_each_of_{together}_gpus": plan_together(decoder, tokens, again, together)}
    return {f"on_{ranks}_gpus": plan(decoder, tokens, again, ranks) for ranks in SIZES}
