"""Generation and prefill against transformers, and against the floor: python tests/bench/generate.py

One JSON line per comparison, on a random Llama of about 120M parameters. Times are never shown, only ratios of medians,
with both sides and the floor interleaved in one run. The floor of a step is one pass over all weights by bare matrix
products. `generate` compares whole calls (prompt and new tokens), `step` single steps of a row that is being written.
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
from mint.decoders.generation import Sampling, generate, steps  # noqa: E402
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


clock = time.perf_counter


def seconds(work: Callable[[], Any]) -> float:
    start = clock()
    work()
    return clock() - start


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


def named(decoder: Decoder, **more: Any) -> dict[str, Any]:
    return {"dtype": str(decoder.dtype).removeprefix("torch."), **more}


def compare_generation(decoder: Decoder, oracle: Any, batch: int, options: argparse.Namespace) -> None:
    """Whole calls: the prompts read, and all new tokens."""
    prompts, new = torch.randint(0, SIZE["vocab_size"], (batch, options.prompt)), options.new
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    found = interleaved(
        options.rounds,
        ours=lambda: generate(decoder.network, prompts.tolist(), new, Sampling(), (), decoder.device),
        theirs=lambda: oracle.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **fixed),
    )
    size = named(decoder, batch=batch, prompt=options.prompt, new=new)
    say(comparison="generate", **size, times_transformers=found["theirs"] / found["ours"])


@torch.inference_mode()
def compare_steps(decoder: Decoder, oracle: Any, batch: int, options: argparse.Namespace) -> None:
    """One new token of every row at a time, the sides taking turns; of transformers the bare forward pass."""
    prompts = torch.randint(0, SIZE["vocab_size"], (batch, options.prompt))
    made = steps(decoder.network, prompts.tolist(), options.new + 2, Sampling().chooser(batch), decoder.device)
    next(made)  # the prompts
    held = oracle(prompts, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.zeros(batch, 1, dtype=torch.int64)
    found = interleaved(
        options.new,
        ours=lambda: next(made),
        floor=floor(decoder, batch),
        theirs=lambda: oracle(token, past_key_values=held, use_cache=True).logits[:, -1].argmax(-1),
    )
    say(
        comparison="step",
        **named(decoder, batch=batch, prompt=options.prompt, steps=options.new),
        times_transformers=found["theirs"] / found["ours"],
        of_the_floor=found["floor"] / found["ours"],
        transformers_of_the_floor=found["floor"] / found["theirs"],
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
    ratio = found["theirs"] / found["ours"]
    say(comparison="prefill", **named(decoder, tokens=options.prefill), times_transformers=ratio)


def main() -> None:
    global clock
    options = parse()
    if options.cpu_time:
        options.threads, clock = 1, time.thread_time
    torch.set_num_threads(options.threads)
    set_quiet(True)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.layers)
        for dtype in options.dtypes:
            decoder = load_decoder(folder, device="cpu", dtype=dtype)
            oracle = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            for batch in options.batches:
                compare_steps(decoder, oracle, batch, options)
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
    parser.add_argument("--cpu-time", action="store_true", help="one thread's own time: for a machine that others use")
    return parser.parse_args()


if __name__ == "__main__":
    main()
