"""Prediction over a closed set: rank mode, best-first search and list mode against transformers. One JSON line a comparison.

    python tests/bench/rank.py [--size 120M] [--labels 500] [--label-tokens 8] [--prompt 300] [--names FILE] [--rounds 3]
                               [--only rank list search] [--computing]

`separate` is one sequence a label, in batches, by transformers; only `--separate` of the labels are timed and the time
is scaled up to all. It computes all logits, as the obvious code does; with `--keep-logits`, those of the label's rows
alone. `shared` is transformers with the prompt's keys and values computed once and repeated over batches of labels.
With `--names`, a file of one name a line, the labels are these names, in a byte-pair vocabulary learnt on them. A random
label has `--label-tokens` tokens and its end. `gemm_share` is the part of the machine's own matrix-product rate that
rank mode reaches, counting each distinct token once. Search is timed on a model that was trained on `--best` of the
labels after the prompt, until their NLL a token is `--until`, or for `--align` steps.
Time: both sides in one process, turn about, median; with `--computing`, of the time that one thread computed, which other
users of a shared machine disturb less. Memory: the peak of each side above the loaded model, in one process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), *(str(p) for p in Path(__file__).resolve().parents[1:3])]
warnings.simplefilter("ignore")

from align import SIZES, VOCABULARY, gemm_rate  # noqa: E402
from checkpoints import SPECIALS, tokenizer, write_llama  # noqa: E402

from mint.decoders import Decoder, load_decoder  # noqa: E402
from mint.decoders.heads import head_weight  # noqa: E402
from mint.decoders.trunks import Trunks  # noqa: E402
from mint.labels import LabelSet  # noqa: E402
from mint.listing import Lister, lines_of  # noqa: E402
from mint.scoring import Layout, Ranker  # noqa: E402
from mint.search import best_first  # noqa: E402
from mint.trees import Text, token_tree  # noqa: E402
from mint.tries import Texts, build_trie  # noqa: E402

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 256,
}
Work = Callable[[], Any]
clock = time.perf_counter


def write_model(folder: Path, size: str, names: Sequence[str]) -> Path:
    """A checkpoint of that size, with a tokenizer that has whole words of the names."""
    write_llama(folder, std=0.02, vocab_size=VOCABULARY, **SIZES[size])
    if names:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        made = tokenizer()
        learnt = Tokenizer(models.BPE(ignore_merges=True))
        learnt.pre_tokenizer, learnt.decoder = made.pre_tokenizer, made.decoder
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=SPECIALS, initial_alphabet=alphabet)
        learnt.train_from_iterator([f" {name}" for name in names], trainer)
        learnt.save(str(folder / "tokenizer.json"))
    return folder


def answers_of(decoder: Decoder, names: Sequence[str], words: Any) -> list[list[int]]:
    """The ids of each label with its end: the names', or random ones that share nothing."""
    end = decoder.tokenizer.special("<|eot_id|>")
    if names:
        return [[*ids, end] for ids in decoder.tokenizer.encode_all(names)]
    drawn = torch.Generator().manual_seed(1)
    firsts = torch.randperm(VOCABULARY - 400, generator=drawn)[: words.labels].tolist()
    rest = torch.randint(400, VOCABULARY, (words.labels, words.label_tokens - 1), generator=drawn).tolist()
    return [[400 + first, *ids, end] for first, ids in zip(firsts, rest, strict=True)]


def ranker_of(decoder: Decoder, answers: list[list[int]]) -> Ranker:
    """A ranker of labels that are given as ids."""
    ranker = Ranker(decoder, [str(n) for n in range(len(answers))])
    layout = Layout((), build_trie(Texts.of(answers)), torch.tensor([len(answer) for answer in answers]))
    object.__setattr__(ranker, "layout", layout)
    return ranker


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


def picked(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logp = torch.gather(logits.float().log_softmax(-1), 2, labels[..., None])[..., 0]
    return (logp * mask).sum(1)


@torch.inference_mode()
def separate(model: Any, prompt: list[int], answers: list[list[int]], batch: int, keep: bool) -> torch.Tensor:
    found = []
    for at in range(0, len(answers), batch):
        labels, mask = padded(answers[at : at + batch])
        ids = torch.cat([torch.tensor([prompt]).expand(len(labels), -1), labels[:, :-1]], dim=1)
        rows = labels.shape[1]
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows if keep else 0).logits
        found.append(picked(logits[:, -rows:], labels, mask))
    return torch.cat(found)


@torch.inference_mode()
def shared(model: Any, prompt: list[int], answers: list[list[int]], batch: int) -> torch.Tensor:
    import copy

    start = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    found = []
    for at in range(0, len(answers), batch):
        labels, mask = padded(answers[at : at + batch])
        cache = copy.deepcopy(start.past_key_values)
        cache.batch_repeat_interleave(len(labels))
        more = model(input_ids=labels[:, :-1], past_key_values=cache, use_cache=True).logits
        found.append(picked(torch.cat([start.logits.expand(len(labels), -1, -1), more], dim=1), labels, mask))
    return torch.cat(found)


def timed(sides: dict[str, Work], rounds: int) -> dict[str, float]:
    """The median seconds of each, turn about after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in sides.items():
            start = clock()
            work()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(work: Work) -> int:
    """The most bytes that are resident while it works, above what was before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would hide what is taken now
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    work()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def operations(size: str, prompt: int, layout: Layout) -> tuple[float, int]:
    """Operations that the ranking needs, each distinct token once, and its tokens."""
    s = SIZES[size]
    width, layers, head = s["hidden_size"], s["num_hidden_layers"], 64
    heads, kv = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    linear = layers * (2 * width * heads + 2 * width * kv + 3 * width * s["intermediate_size"])
    tokens, inner = prompt + layout.size, layout.trie.inner()
    seen = prompt * prompt / 2 + float((layout.trie.depth[inner] + 1 + prompt).sum())
    return 2 * linear * tokens + 4 * heads * layers * seen + 2 * width * VOCABULARY * (layout.size + 1), tokens


def rank(decoder: Decoder, model: Any, prompt: list[int], answers: list[list[int]], words: Any) -> dict[str, Any]:
    ranker, some = ranker_of(decoder, answers), answers[: words.separate]
    sides: dict[str, Work] = {
        "ours": lambda: ranker.logp([prompt])[0],
        "separate": lambda: separate(model, prompt, some, words.batch, words.keep_logits),
        "shared": lambda: shared(model, prompt, answers, 4 * words.batch),
    }
    ours, apart, together = (work() for work in sides.values())
    seconds = timed(sides, words.rounds)
    seconds["separate"] *= len(answers) / len(some)
    needs, tokens = operations(words.size, len(prompt), ranker.layout)
    rate = statistics.median(gemm_rate(words.size, tokens, words.dtype, clock) for _ in range(3))
    return {
        "bench": "rank", "labels": len(answers), "tokens": tokens,
        "difference": float(max((ours[: len(some)] - apart).abs().max(), (ours - together).abs().max())),
        "times_separate": round(seconds["separate"] / seconds["ours"], 2),
        "times_shared": round(seconds["shared"] / seconds["ours"], 2),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "gemm_share": round(needs / seconds["ours"] / rate, 3),
        "peak_bytes": {name: peak(work) for name, work in sides.items()},
    }  # fmt: skip


def align(decoder: Decoder, prompt: list[int], answers: list[list[int]], words: Any) -> dict[str, float]:
    """Train until some labels are likely after the prompt: to a mean NLL of `--until` a token, or for `--align` steps."""
    tree = token_tree([Text([*prompt, *answer], len(prompt)) for answer in answers[: words.best]])
    decoder.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.network.parameters(), lr=words.lr)
    nll, steps = math.inf, 0
    while nll > words.until and steps < words.align:
        optimizer.zero_grad()
        loss = -decoder.token_logp(tree).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        nll, steps = float(loss.detach()), steps + 1
    decoder.network.requires_grad_(False)
    return {"steps": steps, "nll": round(nll, 3)}


def search(decoder: Decoder, prompt: list[int], answers: list[list[int]], words: Any) -> dict[str, Any]:
    ranker = ranker_of(decoder, answers)

    def best() -> Any:
        with torch.inference_mode():
            trunk = Trunks(decoder.network, [prompt], decoder.device)
        return best_first(trunk, head_weight(decoder.network), ranker.layout.trie, 10)

    sides: dict[str, Work] = {"full": lambda: ranker.logp([prompt])[0], "search": best}
    full, found = sides["full"](), best()
    if found is None:
        return {"bench": "search", "labels": len(answers), "gave_way": True}
    seconds = timed(sides, words.rounds)
    return {
        "bench": "search", "labels": len(answers), "tokens": ranker.layout.size, "opened": found.opened,
        "same": list(found.texts) == full.sort(descending=True, stable=True).indices[:10].tolist(),
        "times_full": round(seconds["full"] / seconds["search"], 2),
        "peak_bytes": {name: peak(work) for name, work in sides.items()},
    }  # fmt: skip


def note_of(decoder: Decoder, tokens: int) -> list[dict[str, str]]:
    """A conversation of so many tokens, or the few more of the last word."""
    note = ""
    while len(decoder.tokenizer.chat_ids([{"role": "user", "content": note}], generate=True)) < tokens:
        note += " and short"
    return [{"role": "user", "content": note}]


def lists(decoder: Decoder, model: Any, names: Sequence[str], words: Any) -> dict[str, Any]:
    """List mode against `generate` with the same trie as its prefix function."""
    known, k = LabelSet(names), 10
    messages = note_of(decoder, words.prompt)
    lister, parts = Lister(decoder, known), lines_of(decoder.tokenizer, known.labels, "disease")
    prompt = decoder.tokenizer.chat_ids(messages, generate=True)
    numbers = [decoder.tokenizer.encode(f"{place}.") for place in range(2, k + 1)]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        """The tokens that may follow, read off the answer so far."""
        written, taken = ids[len(prompt) + len(parts.start) :].tolist(), []
        for line in range(k):
            trie, node = parts.trie(line == k - 1), -1
            left = parts.through[line == k - 1].copy()
            for name in taken:
                left[trie.path(int(trie.leaf[name]))] -= 1
            while node < 0 or trie.end[node] > node + 1:
                options = [int(c) for c in trie.children(node) if left[c] > 0]
                if not written:
                    return [int(trie.token[c]) for c in options]
                token = written.pop(0)
                node = next(c for c in options if trie.token[c] == token)
            taken.append(int(trie.text_at()[node]))
            for number in numbers[line] if line + 1 < k else []:
                if not written:
                    return [number]
                written.pop(0)
        return [decoder.tokenizer.special("<|eot_id|>")]

    end = decoder.tokenizer.special("<|eot_id|>")
    ids = torch.tensor([[*prompt, *parts.start]])

    @torch.inference_mode()
    def theirs() -> list[int]:
        out = model.generate(ids, do_sample=False, max_new_tokens=600, prefix_allowed_tokens_fn=allowed, eos_token_id=end,
                             pad_token_id=end, attention_mask=torch.ones_like(ids))  # fmt: skip
        return out[0, len(prompt) :].tolist()

    ours, other = lister.write("a", messages, k), theirs()
    sides: dict[str, Work] = {"ours": lambda: lister.write("a", messages, k), "generate": theirs}
    seconds = timed(sides, words.rounds)
    return {
        "bench": "list", "names": len(known), "prompt": len(prompt), "tokens": len(other),
        "same": decoder.tokenizer.decode(other) == ours.text,
        "times_generate": round(seconds["generate"] / seconds["ours"], 2),
        "peak_bytes": {name: peak(work) for name, work in sides.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="120M", choices=[*SIZES, "tiny"])
    parser.add_argument("--dtype", default="float32")
    for name, value in {"labels": 500, "label-tokens": 8, "prompt": 300, "rounds": 3, "batch": 16, "separate": 64,
                        "align": 60, "best": 20}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--until", type=float, default=1.0)
    parser.add_argument("--names", type=Path)
    parser.add_argument("--keep-logits", action="store_true")
    parser.add_argument("--only", nargs="+", choices=("rank", "list", "search"), default=("rank", "list", "search"))
    parser.add_argument("--computing", action="store_true")
    words = parser.parse_args()
    if words.computing:
        global clock
        clock = time.thread_time
        torch.set_num_threads(1)
    SIZES["tiny"] = TINY
    from transformers import LlamaForCausalLM

    names = words.names.read_text().splitlines() if words.names else []
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(Path(place) / "model", words.size, names)
        decoder = load_decoder(folder, device="cpu", dtype=words.dtype)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, words.dtype)).eval()
        prompt = torch.randint(400, VOCABULARY, (words.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        answers = answers_of(decoder, names, words)
        facts = {"size": words.size, "dtype": words.dtype, "labels_are": "names" if names else "random"}
        if "rank" in words.only:
            print(json.dumps({**facts, **rank(decoder, model, prompt, answers, words)}), flush=True)
        if names and "list" in words.only:
            print(json.dumps({**facts, **lists(decoder, model, names, words)}), flush=True)
        if "search" not in words.only:
            return
        aligned = align(decoder, prompt, answers, words)
        print(json.dumps({**facts, "aligned": aligned, **search(decoder, prompt, answers, words)}), flush=True)


if __name__ == "__main__":
    main()
