"""Load time and peak memory of a checkpoint: ours against transformers' from_pretrained and against plain reading.

    python tests/bench/load.py --gb 1 --repeats 5

Every load runs in a process of its own, the sides interleaved, and every page of the loaded weights is touched. `read`
is the files' bytes read once into memory and kept, `scan` the same bytes read into one small buffer and forgotten.
Prints one JSON line per comparison: medians, their ratio, and each side's peak resident memory above what the process
held before, as a multiple of the loaded model's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mint.progress import progress, set_quiet
from mint.weights import Checkpoint, fill, open_checkpoint
from mint.weights.shards import write_checkpoint

SIDES = ("ours", "transformers", "read", "scan")
WIDTH, MLP, VOCABULARY = 1024, 4096, 32_000


def config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": WIDTH // 64,
        "num_key_value_heads": WIDTH // 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    block = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 2, WIDTH),
        "self_attn.v_proj": (WIDTH // 2, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    ends = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    blocks = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    return {**ends, **blocks, "lm_head.weight": (VOCABULARY, WIDTH)}


def make(folder: Path, gigabytes: float) -> None:
    """A random bfloat16 Llama of about that size, in two shards or more."""
    per_layer = sum(torch.Size(shape).numel() for name, shape in shapes(1).items() if "layers" in name)
    layers = max(1, int((gigabytes * 1e9 / 2 - 2 * VOCABULARY * WIDTH) / per_layer))
    write_checkpoint(folder, numbers(layers), config(layers), shard_bytes=gigabytes * 0.6e9)


def numbers(layers: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes(layers).items():
        yield name, torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """An empty model on the meta device whose parameters are named and shaped as the checkpoint's tensors."""
    model = nn.Module()
    for name, info in checkpoint.tensors.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.empty(info.shape, dtype=info.dtype, device="meta")))
    return model


def load_ours(folder: Path, dtype: torch.dtype) -> nn.Module:
    checkpoint = open_checkpoint(folder)
    model = skeleton(checkpoint)
    fill(model, checkpoint, device="cpu", dtype=dtype)
    return model


def load_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def read(folder: Path, _: torch.dtype) -> nn.Module:
    model = nn.Module()
    model.kept = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]  # type: ignore[assignment]
    return model


def scan(folder: Path, _: torch.dtype) -> nn.Module:
    buffer = memoryview(bytearray(4 << 20))
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return nn.Module()


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def child(side: str, folder: Path, dtype: torch.dtype) -> None:
    load: Callable[[Path, torch.dtype], nn.Module]
    load = {"ours": load_ours, "transformers": load_transformers, "read": read, "scan": scan}[side]
    set_quiet(True)
    if side == "transformers":
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        _ = transformers.LlamaForCausalLM
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("VmRSS"), time.perf_counter()
    model = load(folder, dtype)
    touched = sum(float(weight.detach().view(-1)[::1024].float().sum()) for weight in model.parameters())
    seconds = time.perf_counter() - start
    size = sum(weight.nbytes for weight in model.parameters())
    peak = resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak": peak, "bytes": size, "sum": touched}))


def measure(side: str, folder: Path, dtype: str, cold: bool) -> dict[str, float]:
    if cold:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--dtype", dtype]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(answer.splitlines()[-1])
    return result


def compare(folder: Path, dtype: str, repeats: int, cold: bool) -> None:
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    measure("scan", folder, dtype, cold=False)
    order = [side for _ in range(repeats) for side in SIDES]
    for side in progress(order, f"loading as {dtype}", len(order), "load"):
        runs[side].append(measure(side, folder, dtype, cold))
    seconds = {side: statistics.median(run["seconds"] for run in runs[side]) for side in SIDES}
    peak = {side: statistics.median(run["peak"] / runs["ours"][0]["bytes"] for run in runs[side]) for side in SIDES}
    same = runs["ours"][0]["sum"] == runs["transformers"][0]["sum"]
    for other in SIDES[1:]:
        line = {
            "bench": "load",
            "dtype": dtype,
            "cold": cold,
            "against": other,
            "seconds_ours": round(seconds["ours"], 3),
            f"seconds_{other}": round(seconds[other], 3),
            "ratio": round(seconds["ours"] / seconds[other], 3),
            "peak_over_model_ours": round(peak["ours"], 3),
            f"peak_over_model_{other}": round(peak[other], 3),
            "model_bytes": int(runs["ours"][0]["bytes"]),
            "same_weights": same,
            "repeats": repeats,
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint in 10^9 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, getattr(torch, options.dtype))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        make(folder, options.gb)
        for dtype in ("bfloat16", "float32"):
            compare(folder, dtype, options.repeats, options.cold)


if __name__ == "__main__":
    main()
