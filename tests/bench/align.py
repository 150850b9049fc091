"""One ORPO step of MINT against TRL + PEFT: the same checkpoint, adapter, pairs and losses. One JSON line a comparison.

    python tests/bench/align.py [--sizes 30M 120M] [--lengths 512/64/64 256/128/128] [--dtypes float32 bfloat16]

Each side runs in a process of its own, as a user would run it; they step about, and medians are compared. Memory is
the peak above what is resident when the model is loaded. `gemm_share` is the part of the machine's own matrix-product
rate that our step reaches, counting each token once, two products per frozen weight and two per vocabulary row.
`--computing` times what each process computed, on one thread, which other users of a shared machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
warnings.simplefilter("ignore")

from checkpoints import write_llama  # noqa: E402


def _size(width: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip(names, (width, layers, heads, kv_heads, inner), strict=True))


SIZES: dict[str, dict[str, int]] = {
    "30M": _size(384, 8, 6, 2, 1536),
    "120M": _size(768, 12, 12, 4, 2816),
}
VOCABULARY, PAIRS, RANK, BETA = 32000, 4, 16, 0.1
CLOCKS = {False: time.perf_counter, True: time.process_time}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, size: str) -> Path:
    """A checkpoint of that size, drawn narrow so that losses are sane."""
    return write_llama(folder, std=0.02, vocab_size=VOCABULARY, **SIZES[size])


def texts(lengths: str) -> list[tuple[list[int], list[int], list[int]]]:
    """Random pairs of exactly so many tokens: prompt, chosen, rejected."""
    generator = torch.Generator().manual_seed(0)
    counts = [int(part) for part in lengths.split("/")]
    return [
        tuple(torch.randint(300, VOCABULARY, (n,), generator=generator).tolist() for n in counts)  # type: ignore[misc]
        for _ in range(PAIRS)
    ]


def ours(folder: Path, lengths: str, dtype: str, recompute: bool) -> tuple[Callable[[], float], Any]:
    """A function that makes one step and returns its loss, and the decoder."""
    from mint.config import AlignSettings
    from mint.decoders import load_decoder, lora
    from mint.training import Trainer
    from mint.training.batches import TokenPair

    decoder = load_decoder(folder, dtype=dtype)
    lora.attach(decoder.network, "all-linear", rank=RANK, alpha=2 * RANK)
    decoder.network.model.recompute = recompute
    pairs = [TokenPair(str(i), p + c, p + r, len(p), len(p)) for i, (p, c, r) in enumerate(texts(lengths))]
    settings = AlignSettings(
        batch_size=PAIRS, steps=10**6, epochs=1e6, schedule="constant", warmup=0, save_every=0, beta=BETA
    )
    trainer = Trainer(decoder, settings, Path("unused"), pairs)
    decoder.network.train()
    return lambda: float(trainer.advance()["loss"]), decoder


def peers(folder: Path, lengths: str, dtype: str, recompute: bool) -> tuple[Callable[[], float], Any]:
    """The same step by trl.experimental.orpo's own forward and loss, and PEFT's adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    args = ORPOConfig(output_dir=tempfile.mkdtemp(), beta=BETA, bf16=False, gradient_checkpointing=recompute, report_to=[],
                      per_device_train_batch_size=PAIRS, max_length=4096, use_cpu=True, disable_tqdm=True)  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, lora_dropout=0.0)
    trainer = ORPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    network = trainer.model.to(kind).train()  # pure bfloat16: the adapter too
    if recompute:  # as its `train` does, which is not called here
        network.gradient_checkpointing_enable({"use_reentrant": False})
        assert network.is_gradient_checkpointing
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    batch = _trl_batch(lengths)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = trainer.get_batch_loss_metrics(network, batch, train_eval="train")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        return float(loss)

    return step, network


def _trl_batch(lengths: str) -> dict[str, torch.Tensor]:
    batch: dict[str, list[list[int]]] = {}
    for prompt, chosen, rejected in texts(lengths):
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            batch.setdefault(f"{side}_input_ids", []).append(prompt + answer)
            batch.setdefault(f"{side}_attention_mask", []).append([1] * len(prompt + answer))
            batch.setdefault(f"{side}_labels", []).append([-100] * len(prompt) + answer)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def gemm_rate(size: str, tokens: int, dtype: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations per second of the largest product of a layer, as this machine makes it now."""
    width, inner = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    x, w = (
        torch.randn(tokens, width, dtype=getattr(torch, dtype)),
        torch.randn(inner, width, dtype=getattr(torch, dtype)),
    )
    start = clock()
    for _ in range(4):
        torch.nn.functional.linear(x, w)
    return 4 * 2 * tokens * width * inner / (clock() - start)


def needed(size: str, lengths: str) -> tuple[float, int]:
    """Operations of a step that the mathematics needs, and its tokens."""
    s = SIZES[size]
    width, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    head = width // s["num_attention_heads"]
    linear = layers * (2 * width * width + 2 * width * head * s["num_key_value_heads"] + 3 * width * inner)
    prompt, chosen, rejected = (int(part) for part in lengths.split("/"))
    tokens, rows = PAIRS * (prompt + chosen + rejected - 2), PAIRS * (prompt - 1 + chosen + rejected)
    seen = prompt * prompt / 2 + chosen * (prompt + chosen / 2) + rejected * (prompt + rejected / 2)
    attention = PAIRS * layers * 14 * width * seen  # 2 products forward, 5 backward
    adapters = (
        layers * RANK * (4 * width + 2 * width + 2 * head * s["num_key_value_heads"] + 3 * (width + inner)) * tokens * 6
    )
    return 4 * linear * tokens + attention + adapters + 4 * width * VOCABULARY * rows, tokens


def compare(size: str, lengths: str, dtype: str, rounds: int, recompute: bool, computing: bool) -> dict[str, Any]:
    """Both sides step about, each in its own process, as a user would run it; the ratio of medians."""
    operations, tokens = needed(size, lengths)
    with tempfile.TemporaryDirectory() as place:
        folder = make(Path(place), size)
        sides = {side: Side(side, folder, lengths, dtype, recompute, computing) for side in ("ours", "peers")}
        first = {name: side.step() for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        memory, rates = {}, []
        for _ in range(rounds):
            for name, side in sides.items():
                found = side.step()
                times[name].append(found["seconds"])
                memory[name] = int(found["peak"])
            rates.append(gemm_rate(size, tokens, dtype, CLOCKS[computing]))
        for side in sides.values():
            side.close()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bench": "align", "size": size, "lengths": lengths, "dtype": dtype, "recompute": recompute, "computing": computing,
        "loss_ours": first["ours"]["loss"], "loss_peers": first["peers"]["loss"],
        "seconds_ours": round(seconds["ours"], 3), "seconds_peers": round(seconds["peers"], 3),
        "time_ratio": round(seconds["ours"] / seconds["peers"], 3),
        "memory_ours": memory["ours"], "memory_peers": memory["peers"],
        "memory_ratio": round(memory["ours"] / memory["peers"], 3),
        "gemm_share": round(operations / seconds["ours"] / statistics.median(rates), 3),
    }  # fmt: skip


class Side:
    """One side in a process of its own, which makes a step when it is asked."""

    def __init__(self, side: str, folder: Path, lengths: str, dtype: str, recompute: bool, computing: bool) -> None:
        words = [sys.executable, __file__, "--child", side, str(folder), lengths, dtype]
        words += ["--recompute"] * recompute + ["--computing"] * computing
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def step(self) -> dict[str, float]:
        """Loss and seconds of one step, and the peak bytes above the loaded model so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise RuntimeError("a side of the comparison ended before its step")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def child(side: str, folder: str, lengths: str, dtype: str, recompute: bool, clock: Callable[[], float]) -> None:
    """Steps on request; the peak is counted from what is resident before the first."""
    step, _ = {"ours": ours, "peers": peers}[side](Path(folder), lengths, dtype, recompute)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    for _ in sys.stdin:
        start = clock()
        loss = step()
        seconds = clock() - start
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        found = {"loss": loss, "seconds": seconds, "peak": int(peak.split()[1]) * 1024 - before}
        print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--lengths", nargs="+", default=["512/64/64", "256/128/128"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--computing", action="store_true")
    words = parser.parse_args()
    if words.computing:
        torch.set_num_threads(1)
    if words.child:
        child(*words.child, recompute=words.recompute, clock=CLOCKS[words.computing])
        return
    for size in words.sizes:
        for lengths in words.lengths:
            for dtype in words.dtypes:
                line = compare(size, lengths, dtype, words.rounds, words.recompute, words.computing)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
