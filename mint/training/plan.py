"""What a GPU will hold, alone or of several that a decoder is spread over, from shapes alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..config import AlignSettings
from ..decoders import Decoder
from .batches import TokenPair

SIZES = (2, 4, 8, 16, 32, 64)
_ROWS = ("o_proj", "down_proj")


def plan(decoder: Decoder, tokens: int, recompute: bool, data: int, tensor: int) -> dict[str, int]:
    """Bytes on each of data x tensor GPUs, for batches of at most `tokens` tokens a GPU.

    `tensor` GPUs share each product and the vocabulary; norms, a tower, and of an adapter the side that meets whole rows
    are on each of them. `data` GPUs share by FSDP what is left, but for the vocabulary where products are shared. Two
    blocks are whole then for as long as they compute (one at work, one on its way). Activations belong to a GPU's own
    tokens, and are counted as if no product were shared.
    """
    network = decoder.network
    named = {name: tensor for name, tensor in network.named_parameters() if ".lora_" not in name}
    tables = {id(table): table for table in (network.lm_head.weight, network.text.embed_tokens.weight)}
    inner = {id(p): p for name, p in network.text.layers.named_parameters() if p.ndim > 1 and "lora_" not in name}
    matrices, vocabulary = _bytes(inner.values()), _bytes(tables.values())
    rest = _bytes(named.values()) - matrices - vocabulary
    weights = -(-matrices // (data * tensor)) - (-vocabulary // (tensor if tensor > 1 else data)) - (-rest // data)
    cut, whole = _adapter(network)
    adapter = -(-cut // (data * tensor)) - (-whole // data)
    block = max(_bytes(layer.parameters()) for layer in network.text.layers)
    found = {
        "weights_bytes": weights,
        "blocks_at_work_bytes": 2 * block // tensor if data > 1 else 0,
        "adapter_bytes": adapter,
        "gradient_and_optimiser_bytes": 3 * adapter,  # a gradient and two moments
        "activation_bytes": activations(decoder, tokens, recompute),
    }
    return {**found, "total_bytes": sum(found.values())}


def _adapter(network: Any) -> tuple[int, int]:
    """Bytes of the sides of adapters that are cut with a product, and of those that meet whole rows of it."""
    text = {id(parameter) for parameter in (*network.text.parameters(), *network.lm_head.parameters())}
    sides: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            matched = ("lora_A" in name) == any(part in name for part in _ROWS)
            sides[matched and id(parameter) in text].append(parameter)
    return _bytes(sides[True]), _bytes(sides[False])


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


def largest_batch(pairs: Sequence[TokenPair], settings: AlignSettings) -> int:
    """Tokens of the largest batch that there can be."""
    sizes = [pair.size for pair in pairs]
    return min(max(settings.tokens_per_batch, *sizes), sum(sizes))


def batch_bytes(decoder: Decoder, pairs: Sequence[TokenPair], settings: AlignSettings) -> int:
    """Bytes that the largest batch keeps for backward, its pictures too, if nothing is computed again."""
    return activations(decoder, largest_batch(pairs, settings), False) + _tower(decoder, pairs, settings)


def _tower(decoder: Decoder, pairs: Sequence[TokenPair], settings: AlignSettings) -> int:
    """The part of the pictures, where the tower is trained: about ten widths and two inner widths a layer."""
    if decoder.eyes is None or not any(x.requires_grad for x in decoder.network.model.vision_model.parameters()):
        return 0
    most = max(settings.tokens_per_batch // decoder.picture_tokens, 1)
    pictures = min(most, settings.batch_size, sum(pair.image is not None for pair in pairs))
    vision = decoder.network.config.vision
    layers = vision.num_hidden_layers + vision.num_global_layers
    kept = layers * (10 * vision.hidden_size + 2 * vision.intermediate_size)
    return int(pictures * decoder.picture_tokens * kept * decoder.dtype.itemsize)


def plans(
    decoder: Decoder, tokens: int, recompute: bool | None, together: int | None = None, shard: bool = False
) -> dict[str, Any]:
    """The plan for each usual number of GPUs that share by FSDP, alone or as rows of so many that hold a decoder together,
    or for such a row alone; activations are recomputed unless the settings say otherwise."""
    again, row = recompute is not False, together or 1
    if row > 1 and not shard:
        return {f"on_each_of_{row}_gpus": plan(decoder, tokens, again, 1, row)}
    fit = (ranks for ranks in SIZES if ranks % row == 0 and ranks > row)
    return {f"on_{ranks}_gpus": plan(decoder, tokens, again, ranks // row, row) for ranks in fit}
