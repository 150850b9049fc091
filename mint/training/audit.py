"""What a training run would do, before it does it: tokens, boundaries, truncation, sharing, memory and time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..config import AlignSettings
from ..decoders import Decoder, lora
from ..progress import progress
from .batches import TokenPair, split, step_pairs, steps_per_epoch, total_steps
from .objectives import objective_batch
from .plan import batch_bytes, largest_batch, plans


def audit(decoder: Decoder, pairs: Sequence[TokenPair], settings: AlignSettings) -> dict[str, Any]:
    """Counts over all pairs, and memory and time to expect, as one flat object."""
    tokenizer = decoder.tokenizer
    begin, ends = tokenizer.special("<|begin_of_text|>"), {tokenizer.special("<|eot_id|>"), tokenizer.end_id()}
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    prompts = Counter(tuple(pair.chosen[: pair.chosen_first]) for pair in pairs)
    computed, apart = _tokens(pairs, settings, decoder.picture_tokens)
    counts = {
        "pairs": len(pairs),
        "steps": total_steps(len(pairs), settings),
        "begin_of_text_missing": sum(text[0] != begin for text in texts),
        "begin_of_text_doubled": sum(text.count(begin) > 1 for text in texts),
        "end_of_turn_missing": sum(text[-1] not in ends for text in texts),
        "answers_that_begin_differently_tokenised": sum(pair.chosen_first != pair.rejected_first for pair in pairs),
        "prompts_cut": sum(pair.cut_prompt > 0 for pair in pairs),
        "prompt_tokens_cut": sum(pair.cut_prompt for pair in pairs),
        "answers_cut": sum(pair.cut_answers > 0 for pair in pairs),
        "prompts_that_repeat": sum(prompts.values()) - len(prompts),
        "pictures": sum(pair.image is not None for pair in pairs),
        "longest_text": max(len(text) for text in texts),
        "tokens_one_by_one": apart,
        "tokens_computed": computed,
        "share_saved": round(1 - computed / max(apart, 1), 4),
    }
    return counts | _expected(decoder, pairs, settings, computed)


def _tokens(pairs: Sequence[TokenPair], settings: AlignSettings, picture: int) -> tuple[int, int]:
    """Tokens of one epoch as trees, and as separate texts."""
    computed = apart = 0
    steps = steps_per_epoch(len(pairs), settings.batch_size)
    for step in progress(range(steps), "audit", steps, "step"):
        for group in split(step_pairs(pairs, step, settings), settings.tokens_per_batch, picture):
            made = objective_batch(group, settings)
            computed, apart = computed + len(made.tree), apart + made.apart
    return computed, apart


def _expected(decoder: Decoder, pairs: Sequence[TokenPair], settings: AlignSettings, tokens: int) -> dict[str, Any]:
    """Bytes and seconds: weights, adapter with its gradients and moments, activations of the largest batch."""
    size = decoder.dtype.itemsize
    weights = sum(p.numel() for n, p in decoder.network.named_parameters() if ".lora_" not in n) * size
    adapter = sum(a.numel() + b.numel() for a, b in lora.tensors(decoder.network).values()) * 4 * 4
    epochs = total_steps(len(pairs), settings) / steps_per_epoch(len(pairs), settings.batch_size)
    operations = 4 * (weights / size) * tokens * epochs
    expected = {
        "weights_bytes": weights,
        "adapter_and_optimiser_bytes": adapter,
        "activation_bytes": batch_bytes(decoder, pairs, settings),
    }
    if settings.spread:  # nothing was loaded, so nothing can be timed
        return expected | plans(
            decoder, largest_batch(pairs, settings), settings.recompute, settings.tensor_parallel, settings.shard
        )
    return expected | {"seconds_expected": round(operations / (0.6 * _rate(decoder)), 1)}


def _rate(decoder: Decoder) -> float:
    """Operations per second of a matrix product on this device, measured in some hundredths of a second."""
    x = torch.ones(1024, 1024, dtype=decoder.dtype, device=decoder.device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)
