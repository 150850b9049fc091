"""The image tower against transformers' on this machine: forward, and forward with backward, checkpointed or not.

    python tests/bench/tower.py [--repeat 5] [--tiles 4 2] [--image-size 280] [--width 384] [--device cpu]

A tower of more than 20 million parameters; both sides hold the same weights and run interleaved. One JSON line per
comparison; a ratio is that of the median seconds, theirs to ours, so above 1 is faster. `cpu_ratio` counts the seconds
that this process computed, which other users of a shared machine disturb less than they do the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from mint.decoders.vision import VisionTower
from mint.decoders.vision_config import read_vision_config

Batch = tuple[Tensor, Tensor, Tensor]


def towers(options: argparse.Namespace) -> tuple[MllamaVisionModel, VisionTower]:
    """Theirs and ours, with the same weights."""
    torch.manual_seed(0)
    chosen = list(range(options.layers))[1::2][:5]
    config = MllamaVisionConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        attention_heads=options.heads or options.width // 64,
        num_hidden_layers=options.layers,
        num_global_layers=options.global_layers,
        image_size=options.image_size,
        intermediate_layers_indices=chosen,
        vision_output_dim=options.width * (1 + len(chosen)),
    )
    config._attn_implementation = "sdpa"
    dtype = getattr(torch, options.dtype)
    theirs = MllamaVisionModel(config).to(options.device, dtype)
    for name, parameter in theirs.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(parameter, 0.5)
    ours = VisionTower(read_vision_config(config.to_dict(), "bench")).to(options.device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(options: argparse.Namespace, tiles: int) -> Batch:
    """One picture of `tiles` tiles, the rest of its four absent."""
    mask = torch.tensor([[1] * tiles + [0] * (4 - tiles)]).repeat(options.pictures, 1)
    side = options.image_size
    pixels = torch.randn(options.pictures, 4, 3, side, side) * mask[:, :, None, None, None]
    ids = torch.full((options.pictures,), {1: 1, 2: 2, 3: 3, 4: 6}[tiles])
    return pixels.to(options.device, getattr(torch, options.dtype)), ids.to(options.device), mask.to(options.device)


def run_theirs(tower: MllamaVisionModel, given: Batch) -> Tensor:
    features: Tensor = tower(*(part[:, None] for part in given)).last_hidden_state[:, 0]
    return features


def timed(run: Callable[[], Tensor], backward: bool, device: str) -> tuple[float, float, float]:
    """Seconds of one run by the clock and by this process, and peak GPU memory in MiB (0 on a CPU)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, start_computing = time.perf_counter(), time.process_time()
    with torch.set_grad_enabled(backward):
        features = run()
    if backward:
        features.square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return time.perf_counter() - start, time.process_time() - start_computing, peak


def compare(name: str, sides: list[Callable[[], Tensor]], backward: bool, options: argparse.Namespace) -> None:
    """Run both in turns and print the line."""
    measured: list[list[tuple[float, float, float]]] = [[], []]
    for turn in range(options.repeat + 1):
        for side, results in zip(sides, measured, strict=True):
            result = timed(side, backward, options.device)
            if turn:
                results.append(result)
    theirs, ours = (statistics.median(result[0] for result in results) for results in measured)
    their_cpu, our_cpu = (statistics.median(result[1] for result in results) for results in measured)
    line = {"bench": f"tower/{name}", "device": options.device, "dtype": options.dtype, "pictures": options.pictures}
    line |= {"transformers_seconds": round(theirs, 4), "mint_seconds": round(ours, 4), "ratio": round(theirs / ours, 2)}
    line["cpu_ratio"] = round(their_cpu / our_cpu, 2)
    if options.device == "cuda":
        line |= {"peak_mib": [round(max(result[2] for result in results)) for results in measured]}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tiles", type=int, nargs="*", default=[4, 2])
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--global-layers", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    theirs, ours = towers(options)
    line = {"parameters": sum(parameter.numel() for parameter in ours.parameters()), "threads": torch.get_num_threads()}
    print(json.dumps(line), flush=True)
    for tiles in options.tiles:
        given = batch(options, tiles)
        sides = [lambda given=given: run_theirs(theirs, given), lambda given=given: ours(*given)]
        with torch.no_grad():
            wanted, found = (side() for side in sides)
        difference = float((wanted - found).abs().max() / wanted.abs().max())
        print(json.dumps({"tiles": tiles, "relative_difference": difference}), flush=True)
        ours.checkpointing = False
        compare(f"forward/{tiles} tiles", sides, False, options)
        compare(f"forward and backward/{tiles} tiles", sides, True, options)
        ours.checkpointing = True
        compare(f"forward and backward, ours checkpointed/{tiles} tiles", sides, True, options)


if __name__ == "__main__":
    main()
