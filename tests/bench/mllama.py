"""One ORPO step on 4 image pairs against transformers' Mllama + PEFT, written the ordinary way: images repeated.

    python tests/bench/mllama.py [--side 280] [--width 384] [--text-width 512] [--lengths 64/48/48] [--rounds 3]
                                 [--towers trained frozen] [--tokens-per-batch 2048] [--skip-memory]

Both sides hold the same weights and adapters and see the same pictures of four tiles. With a frozen tower the second
epoch is measured, in which ours reads what it kept. Time: both sides in one process, step about, the ratio of medians.
`cpu_ratio` counts the seconds that each side computed, which other users of a shared machine disturb less. Memory: each
side in a process of its own, the peak above what is resident when the model is loaded. One JSON line a comparison.
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
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.simplefilter("ignore")

from checkpoints_mllama import oracle_inputs, picture, widen_tokenizer, write_mllama  # noqa: E402

PAIRS, RANK, BETA = 4, 16, 0.1
FROZEN = ("language_model", "multi_modal_projector")


def make(folder: Path, options: argparse.Namespace) -> None:
    """A checkpoint of those sizes, drawn narrow so that losses are sane."""
    width, text = options.width, options.text_width
    tower = {"hidden_size": width, "attention_heads": width // 64, "intermediate_size": 4 * width}
    tower |= {"num_hidden_layers": 9, "num_global_layers": 3, "image_size": options.side}
    tower |= {"intermediate_layers_indices": [1, 3, 5, 7], "vision_output_dim": 5 * width}
    words = {
        "hidden_size": text,
        "intermediate_size": 3 * text,
        "num_hidden_layers": 8,
        "num_attention_heads": text // 64,
    }
    words |= {"num_key_value_heads": text // 128, "cross_attention_layers": [3, 6], "vocab_size": options.vocabulary}
    write_mllama(folder, text={**words, "rms_norm_eps": 1e-5}, vision=tower, std=0.02)
    widen_tokenizer(folder, options.vocabulary)


def texts(options: argparse.Namespace) -> list[tuple[list[int], list[int], list[int]]]:
    """Random pairs of so many tokens, prompt/chosen/rejected, the image after the first five."""
    generator = torch.Generator().manual_seed(0)
    counts = [int(part) for part in options.lengths.split("/")]
    rows = []
    for _ in range(PAIRS):
        prompt, *answers = (
            torch.randint(300, options.vocabulary - 9, (n,), generator=generator).tolist() for n in counts
        )
        rows.append(([*prompt[:5], options.vocabulary, *prompt[6:]], *answers))
    return rows


def pictures(options: argparse.Namespace) -> list[Any]:
    return [picture(2 * options.side, 2 * options.side, seed=number) for number in range(PAIRS)]


def ours(folder: Path, options: argparse.Namespace, tower: str) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    from mint.config import AlignSettings
    from mint.decoders import load_decoder, lora
    from mint.decoders.vision_cache import FeatureStore
    from mint.training import Trainer
    from mint.training.batches import TokenPair

    decoder = load_decoder(folder, dtype="float32", device="cpu")
    lora.attach(decoder.network, "all-linear" if tower == "trained" else FROZEN, rank=RANK, alpha=2 * RANK)
    assert decoder.eyes is not None
    decoder.eyes.store = FeatureStore(folder / "features", 20 * 10**9)
    pairs = [
        TokenPair(str(i), p + c, p + r, len(p), len(p), image=image, image_token=options.vocabulary)
        for i, ((p, c, r), image) in enumerate(zip(texts(options), pictures(options), strict=True))
    ]
    settings = AlignSettings(
        batch_size=PAIRS, steps=10**6, epochs=1e6, schedule="constant", warmup=0, save_every=0, beta=BETA,
        tokens_per_batch=options.tokens_per_batch,
    )  # fmt: skip
    trainer = Trainer(decoder, settings, Path("unused"), pairs)
    decoder.network.train()
    return lambda: float(trainer.advance()["loss"])


def peers(folder: Path, options: argparse.Namespace, tower: str) -> Callable[[], float]:
    """The same step in eight rows of transformers' model, four chosen and four rejected, each with its image."""
    from peft import LoraConfig, get_peft_model
    from transformers import MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]
    targets = [name for name in linear if tower == "trained" or "vision_model" not in name]
    network = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)).train()
    weights = [part for part in network.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    given, first = _rows(options)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = _orpo(network(**given).logits, given["input_ids"], first, options.vocabulary)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return float(loss)

    return step


def _rows(options: argparse.Namespace) -> tuple[dict[str, Tensor], int]:
    """What the model takes for all chosen and then all rejected texts, and where the answers begin."""
    rows = texts(options)
    shown = pictures(options)
    both = [
        oracle_inputs(prompt + answers[side], [image], options.vocabulary, options.side)
        for side in (0, 1)
        for (prompt, *answers), image in zip(rows, shown, strict=True)
    ]
    return {name: torch.cat([row[name] for row in both]) for name in both[0]}, len(rows[0][0])


def _orpo(logits: Tensor, ids: Tensor, first: int, image_token: int) -> Tensor:
    """ORPO of rows of equal length: likelihood over prompt and chosen, log odds of mean log-probabilities."""
    labels = ids[:, 1:]
    scored = labels != image_token
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.where(scored, 0)[..., None])[..., 0] * scored
    chosen, rejected = logp[:, first - 1 :].mean(-1).chunk(2)
    odds = chosen - torch.log1p(-chosen.exp()) - rejected + torch.log1p(-rejected.exp())
    likelihood = -logp[:PAIRS].sum() / scored[:PAIRS].sum()
    return likelihood - BETA * torch.nn.functional.logsigmoid(odds).mean()


SIDES: dict[str, Callable[..., Callable[[], float]]] = {"ours": ours, "peers": peers}


def compare(folder: Path, options: argparse.Namespace, tower: str) -> dict[str, Any]:
    """Both sides step about; the ratio of medians, and memory from two children."""
    memory = {} if options.skip_memory else {side: _memory(side, folder, options, tower) for side in SIDES}
    sides = {name: side(folder, options, tower) for name, side in SIDES.items()}
    losses = {name: step() for name, step in sides.items()}  # the first epoch
    times: dict[str, list[float]] = {name: [] for name in sides}
    computing: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, step in sides.items():
            start, start_computing = time.perf_counter(), time.process_time()
            step()
            times[name].append(time.perf_counter() - start)
            computing[name].append(time.process_time() - start_computing)
    seconds, cpu = ({n: statistics.median(v) for n, v in measured.items()} for measured in (times, computing))
    line = {"bench": "mllama", "tower": tower, "lengths": options.lengths, "tokens_per_batch": options.tokens_per_batch}
    line |= {f"loss_{name}": round(loss, 5) for name, loss in losses.items()}
    line |= {f"seconds_{name}": round(value, 3) for name, value in seconds.items()}
    line["time_ratio"] = round(seconds["ours"] / seconds["peers"], 3)
    line |= {f"cpu_{name}": round(value, 3) for name, value in cpu.items()}
    line["cpu_ratio"] = round(cpu["ours"] / cpu["peers"], 3)
    if memory:
        line |= {f"memory_{name}": value for name, value in memory.items()}
        line["memory_ratio"] = round(memory["ours"] / memory["peers"], 3)
    return line


def _memory(side: str, folder: Path, options: argparse.Namespace, tower: str) -> int:
    words = [sys.executable, __file__, "--child", side, str(folder), tower]
    words += ["--side", str(options.side), "--lengths", options.lengths, "--vocabulary", str(options.vocabulary)]
    words += ["--tokens-per-batch", str(options.tokens_per_batch)]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(out.strip().splitlines()[-1])


def child(options: argparse.Namespace) -> None:
    """Peak bytes of two steps above what is resident before the first."""
    side, folder, tower = options.child
    step = SIDES[side](Path(folder), options, tower)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    step(), step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024 - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--side", type=int, default=280)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--text-width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--lengths", default="64/48/48")
    parser.add_argument("--towers", nargs="+", default=["trained", "frozen"], choices=["trained", "frozen"])
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), options)
        for tower in options.towers:
            print(json.dumps(compare(Path(place), options, tower)), flush=True)


if __name__ == "__main__":
    main()
