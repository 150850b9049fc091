"""Generation and prefill against transformers, and against the floor: python tests/bench/generate.py

One JSON line per comparison, on a random Llama of about 120M parameters. Times are never shown, only ratios of medians,
with both sides and the floor interleaved in one run. The floor of a step is one pass over all weights by bare matrix
products. `generate` compares whole calls (prompt and new tokens), `decode` the new tokens after the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from checkpoints import llama_config, write_tokenizer  # noqa: E402

from mint.decoders import Decoder, load_decoder  # noqa: E402
from mint.decoders.generation import Sampling, generate  # noqa: E402
from mint.progress import set_quiet  # noqa: E402

SIZE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "eos_token_id": None,
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(rounds: int, **sides: Callable[[], Any]) -> dict[str, float]:
    """The median time of each side; every round runs all sides once, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, work in sides.items():
            times[name].append(seconds(work))
    return {name: median(found[1:]) for name, found in times.items()}


def say(**line: Any) -> None:
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def floor(decoder: Decoder, batch: int) -> Callable[[], None]:
    """One pass over the weights: every linear layer and the head on (B, in) rows, and nothing else."""
    linears = [m.weight for m in decoder.network.modules() if isinstance(m, torch.nn.Linear)]
    rows = {w.shape[1]: torch.randn(batch, w.shape[1]).to(w.dtype) for w in linears}

    @torch.inference_mode()
    def once() -> None:
        for weight in linears:
            torch.nn.functional.linear(rows[weight.shape[1]], weight)

    return once


def write_model(folder: Path, layers: int) -> None:
    """Weights as narrow as trained ones: wide ones would fill the activations with denormal numbers, which are slow."""
    torch.manual_seed(0)
    write_tokenizer(folder)
    config = llama_config(**{**SIZE, "num_hidden_layers": layers, "initializer_range": 0.02})
    LlamaForCausalLM(config).save_pretrained(folder)


def compare_generation(decoder: Decoder, oracle: Any, batch: int, options: argparse.Namespace) -> None:
    prompts = torch.randint(0, SIZE["vocab_size"], (batch, options.prompt))
    once = floor(decoder, batch)

    def ours(count: int) -> Callable[[], Any]:
        return lambda: generate(decoder.network, prompts.tolist(), count, Sampling(), (), decoder.device)

    def theirs(count: int) -> Callable[[], Any]:
        fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return lambda: oracle.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **fixed)

    def passes() -> None:
        for _ in range(options.new - 1):
            once()

    count = options.new
    found = interleaved(
        options.rounds, ours=ours(count), theirs=theirs(count), floor=passes, our_first=ours(1), their_first=theirs(1)
    )
    our_decode, their_decode = found["ours"] - found["our_first"], found["theirs"] - found["their_first"]
    named = {"dtype": str(decoder.dtype).removeprefix("torch."), "batch": batch, "prompt": options.prompt, "new": count}
    say(comparison="generate", **named, times_transformers=found["theirs"] / found["ours"])
    say(
        comparison="decode",
        **named,
        times_transformers=their_decode / our_decode,
        of_the_floor=found["floor"] / our_decode,
        transformers_of_the_floor=found["floor"] / their_decode,
    )


def compare_prefill(decoder: Decoder, oracle: Any, options: argparse.Namespace) -> None:
    """Prompt to logits of the next token, keys and values kept."""
    ids: Tensor = torch.randint(0, SIZE["vocab_size"], (1, options.prefill))

    @torch.inference_mode()
    def theirs() -> None:
        oracle(input_ids=ids, use_cache=True, logits_to_keep=1)

    def ours() -> None:
        generate(decoder.network, ids.tolist(), 1, Sampling(), (), decoder.device)

    found = interleaved(options.rounds, ours=ours, theirs=theirs)
    dtype = str(decoder.dtype).removeprefix("torch.")
    say(comparison="prefill", dtype=dtype, tokens=options.prefill, times_transformers=found["theirs"] / found["ours"])


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    set_quiet(True)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.layers)
        for dtype in options.dtypes:
            decoder = load_decoder(folder, device="cpu", dtype=dtype)
            oracle = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            for batch in options.batches:
                compare_generation(decoder, oracle, batch, options)
            compare_prefill(decoder, oracle, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
