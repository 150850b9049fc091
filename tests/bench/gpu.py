"""Everything that is to be measured on a GPU in one call: the kernels, then training, text and ranks of a Llama 3.2 3B.

    python tests/bench/gpu.py --out bench.json           under 8 minutes on an H200
    python tests/bench/gpu.py --size tiny                whether every line runs, on any machine

The options, the table and the JSON are those of `python -m mint.kernels.bench`, whose parts come first; then steps of the
vision model of 11B. The models have random weights and the peers (transformers, TRL, PEFT and Liger) the same sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mint.kernels.checks import DEVICE, DTYPE, gap
from mint.kernels.measures import PARTS
from mint.kernels.timing import Line, Part, Rates, Side, compared
from models import SIZES, Size, attach, decoder_of, our_step, pairs_of, theirs, trl_step, turning_with_liger, with_liger
from models_vision import RANK, seeing_decoder, seeing_operations, seeing_step
from models_vision import SIZES as VISION_SIZES

from mint.decoders import Decoder
from mint.decoders.generation import Sampling, generate, steps
from mint.decoders.replay import STEPS
from mint.kernels import bench
from mint.progress import set_quiet
from mint.scoring import Ranker


def peers(*packages: str) -> bool:
    return all(find_spec(package) for package in packages)


def operations(size: Size, lengths: tuple[int, int, int], pairs: int, rank: int) -> float:
    """What the mathematics of a step needs: each token of a tree once, two products a frozen weight, three an adapter's,
    two a predicted token and row of the head, seven a seen pair of tokens in attention."""
    prompt, chosen, rejected = lengths
    tokens, edges = prompt + chosen + rejected, prompt - 1 + chosen + rejected
    seen = prompt * prompt / 2 + sum(answer * (prompt + answer / 2) for answer in (chosen, rejected))
    attention = 14 * size.layers * size.heads * size.head * seen
    linear = (4 * size.weights + 6 * size.adapters(rank)) * tokens
    return pairs * (linear + attention + 4 * size.width * size.vocabulary * edges)


def training(rank_at: int, lengths_at: int) -> Callable[[str, Rates], Iterator[Line]]:
    """A part: the step of one rank and one length of pairs."""

    def lines(name: str, rate: Rates) -> Iterator[Line]:
        size = SIZES[name]
        if rank_at >= len(size.ranks) or lengths_at >= len(size.lengths):
            return
        rank, lengths = size.ranks[rank_at], size.lengths[lengths_at]
        pairs = pairs_of(size, lengths)
        sides: dict[str, Side] = {"ours": our_step(attach(decoder_of(size), rank), pairs)}
        if peers("trl", "peft", "transformers", "datasets"):
            sides["TRL + PEFT"] = later(lambda: trl_step(theirs(size), pairs, rank))
            if rank_at == 0 and peers("liger_kernel") and DEVICE == "cuda":  # its kernels are Triton's
                made = later(lambda: turning_with_liger(trl_step(with_liger(theirs(size)), pairs, rank)))
                sides["TRL + PEFT + Liger"] = made
        floor = operations(size, lengths, len(pairs), rank) / rate["products"]
        case = f"{'/'.join(map(str, lengths))}, r {rank}, {len(pairs)} pairs"
        yield from compared("training step", case, sides, floor, rounds=size.rounds, count=(len(pairs), "pairs"))

    return lines


def seeing(trained: bool) -> Callable[[str, Rates], Iterator[Line]]:
    """A part: the step of the vision model, its tower trained, or frozen and its features kept from the epoch before."""

    def lines(name: str, rate: Rates) -> Iterator[Line]:
        size = VISION_SIZES[name]
        with TemporaryDirectory() as folder:
            decoder = seeing_decoder(size, Path(folder), trained)
            floor = seeing_operations(decoder, size, trained) / rate["products"]
            case = f"tower {'trained' if trained else 'cached'}, {'/'.join(map(str, size.lengths))}, r {RANK}"
            sides: dict[str, Side] = {"ours": seeing_step(decoder, size)}
            count = (size.pairs, "pairs")
            yield from compared("vision step", case, sides, floor, rounds=size.rounds, count=count)

    return lines


def later(make: Callable[[], Side]) -> Side:
    """A side that is made at its first run, so that what fails in its making is its own failure."""
    made: list[Side] = []

    def side() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return side


def prompts_of(size: Size, rows: int, length: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(2, size.vocabulary, (rows, length), generator=drawn).tolist()


def decoding(name: str, rate: Rates) -> Iterator[Line]:
    """New tokens of every row, greedy, and on a GPU some at a time, for it goes on while the one before is looked at. The
    floor reads the weights and the keys and values once for each."""
    size = SIZES[name]
    together = min(8, size.steps) if DEVICE == "cuda" else 1
    decoder, model = decoder_of(size), theirs(size) if peers("transformers") else None
    for rows in size.batches:
        prompts = prompts_of(size, rows, size.prompt)
        sides: dict[str, Side] = {"ours": our_tokens(decoder, prompts, size.steps + 4 * together, together)}
        if model is not None:
            sides["transformers"] = later(lambda given=prompts: their_tokens(model, given, together))
        held = 2 * size.layers * size.kv_heads * size.head * rows * size.prompt
        weights = size.weights + size.width * size.vocabulary
        floor = max(DTYPE.itemsize * (weights + held) / rate["bytes"], 2 * weights * rows / rate["products"])
        case, count = f"batch {rows} after {size.prompt}", (rows * together, "tokens")
        rounds = size.steps // together
        yield from compared(f"{together} new tokens", case, sides, floor * together, rounds=rounds, count=count)


def our_tokens(decoder: Decoder, prompts: list[list[int]], room: int, together: int) -> Side:
    made = steps(decoder.network, prompts, room, Sampling().chooser(len(prompts)), decoder.device)

    def side() -> list[list[int]]:
        with torch.inference_mode():
            return list(islice(made, together))

    side()  # the prompts
    return side


def their_tokens(model: Any, prompts: list[list[int]], together: int) -> Side:
    """Forward passes of one token with the cache of the prompts, and the choice of the next."""
    with torch.inference_mode():
        held = model(torch.tensor(prompts, device=DEVICE), use_cache=True, logits_to_keep=1).past_key_values
    token = torch.ones(len(prompts), 1, dtype=torch.int64, device=DEVICE)

    def side() -> Any:
        with torch.inference_mode():
            logits = (model(token, past_key_values=held, use_cache=True).logits[:, -1] for _ in range(together))
            return [each.argmax(-1).tolist() for each in logits]

    return side


def prefill(name: str, rate: Rates) -> Iterator[Line]:
    """A long prompt, to its first new token."""
    size = SIZES[name]
    decoder, prompt = decoder_of(size), prompts_of(size, 1, size.prefill)
    sides: dict[str, Side] = {"ours": lambda: generate(decoder.network, prompt, 1, Sampling(), (), decoder.device)}
    if peers("transformers"):
        sides["transformers"] = later(lambda: their_prefill(theirs(size), prompt))
    attention = 4 * size.layers * size.heads * size.head * size.prefill**2 / 2
    floor = (2 * size.weights * size.prefill + attention) / rate["products"]
    count = (size.prefill, "tokens")
    yield from compared("prefill", f"{size.prefill} tokens", sides, floor, rounds=size.rounds, count=count)


def their_prefill(model: Any, prompt: list[list[int]]) -> Side:
    ids = torch.tensor(prompt, device=DEVICE)

    @torch.inference_mode()
    def side() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    return side


def ranking(name: str, rate: Rates) -> Iterator[Line]:
    """Every label of a closed set after a prompt: nine tokens of its own each, and its end."""
    size = SIZES[name]
    ranker = Ranker(decoder_of(size), [f"label {at}" for at in range(size.labels)])
    weights = size.weights * (size.prompt + ranker.layout.size) + size.width * size.vocabulary * (
        ranker.layout.size + 1
    )
    for cases in (1, 8):
        prompts = prompts_of(size, cases, size.prompt)
        sides: dict[str, Side] = {"ours": lambda given=prompts: ranker.logp(given)}
        floor = 2 * cases * weights / rate["products"]
        case = f"{size.labels} labels, {cases} cases together"
        yield from compared("rank", case, sides, floor, rounds=size.rounds, count=(cases, "cases"))


def replayed(name: str, _rate: Rates) -> Iterator[Line]:
    """A check: the logits of steps, which a GPU replays from a graph, against those of whole rows without a cache."""
    size, count = SIZES["tiny" if name == "tiny" else "cpu"], STEPS + 8
    decoder, prompts = decoder_of(size), prompts_of(size, 2, 500 if name == "gpu" else size.prompt)
    prompts[0], seen = prompts[0][3:], []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.max(dim=-1).indices

    with torch.inference_mode():
        written = list(steps(decoder.network, prompts, count, choose, decoder.device))
    error = 0.0
    for row, prompt in enumerate(prompts):
        whole = decoder.logits([prompt + [tokens[row] for tokens in written[:-1]]])[0, -count:]
        error = max(error, gap(torch.stack([logits[row] for logits in seen]), whole))
    limit = 3e-2 if torch.bfloat16 == DTYPE else 1e-4
    yield {"check": "steps of generation", "error": error, "limit": limit, "right": error <= limit}


PEERS = ("transformers", "datasets", "peft", "trl.experimental.orpo")
MODEL_PARTS = {
    "replayed": Part(replayed, 45),
    "step_16_long": Part(training(0, 0), 75, PEERS),
    "decode": Part(decoding, 60, PEERS[:1]),
    "step_256_long": Part(training(1, 0), 75, PEERS),
    "prefill": Part(prefill, 45, PEERS[:1]),
    "rank": Part(ranking, 45),
    "step_16_short": Part(training(0, 1), 75, PEERS),
    "vision_cached": Part(seeing(False), 60),
    "vision_trained": Part(seeing(True), 60),
    "step_256_short": Part(training(1, 1), 75, PEERS),
}

if __name__ == "__main__":
    set_quiet(True)
    last = {"tiles": PARTS["tiles"]}  # what can be left out if time is short
    first = {name: part for name, part in PARTS.items() if name not in last}
    sys.exit(bench.main(first | MODEL_PARTS | last, (__file__,), __doc__))
