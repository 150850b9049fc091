"""The steps that a CUDA graph replays, here without a graph: the same logits, one sequence of operations, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_llama
from test_no_waiting import launched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mint.decoders import Decoder, generation, load_decoder, replay
from mint.decoders.cache import FixedCache
from mint.decoders.generation import Sampling
from mint.decoders.packing import packed

__all__ = ["launched"]
VOCABULARY = 320


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(write_llama(tmp_path_factory.mktemp("llama")), device="cpu", dtype="float32")


def without_graph(read: Callable[[], Tensor], advance: Callable[[], None], _: torch.device) -> Callable[[], Tensor]:
    """What a capture does and what its graph repeats."""
    read()

    def repeat() -> Tensor:
        logits = read()
        advance()
        return logits

    return repeat


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU: weights that lie together, and a graph's steps."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(generation, "packed", lambda network, rows, count, _: packed(network, rows, count, gpu))
    monkeypatch.setattr(generation, "worth_replaying", lambda *_: True)
    monkeypatch.setattr(replay, "captured", without_graph)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY - 20, (n,), generator=drawn).tolist() for n in lengths]


def logits_of(decoder: Decoder, prompts: list[list[int]], forced: list[list[int]]) -> list[Tensor]:
    """Logits (B, V) of every step, the tokens of each step being given."""
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return torch.tensor([row[len(seen) - 1] for row in forced])

    with torch.inference_mode():
        list(generation.steps(decoder.network, prompts, len(forced[0]), choose, decoder.device))
    return seen


def gap(decoder: Decoder, lengths: tuple[int, ...], request: pytest.FixtureRequest) -> float:
    prompts, forced = prompts_of(*lengths), prompts_of(*(40 for _ in lengths), seed=1)
    plain = logits_of(decoder, prompts, forced)
    request.getfixturevalue("replaying")
    found = logits_of(decoder, prompts, forced)
    assert len(found) == len(plain) == 40
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("lengths", [(20,), (3, 31, 14), (16, 1), (15,)])
def test_the_logits_are_those_of_the_plain_steps(
    decoder: Decoder, lengths: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    assert gap(decoder, lengths, request) < 1e-5


FAULTS: dict[str, Callable[[FixedCache], Any]] = {
    "the column stays": lambda held: held.lengths.add_(1),
    "the position stays": lambda held: held.now.add_(1),
    "the first column goes on": lambda held: (held.now.add_(1), held.lengths.add_(1), held.first.add_(1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_forgets_something_would_show(
    decoder: Decoder, fault: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(FixedCache, "advance", FAULTS[fault])
    assert gap(decoder, (3, 31), request) > 1e-3


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.3, seed=2)])
def test_the_text_is_that_of_the_plain_steps(decoder: Decoder, how: Sampling, request: pytest.FixtureRequest) -> None:
    prompts = prompts_of(9, 22)
    plain = generation.generate(decoder.network, prompts, 30, how, (), decoder.device)
    request.getfixturevalue("replaying")
    assert generation.generate(decoder.network, prompts, 30, how, (), decoder.device) == plain


class Written(TorchDispatchMode):
    """Every operation with the shapes that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = [(tuple(x.shape), x.dtype) for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
        self.lines.append((str(func), *places))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("replaying")
def test_a_step_is_the_same_operations_on_the_same_memory_and_waits_for_nothing(decoder: Decoder) -> None:
    held = FixedCache(prompts_of(5, 9), 20, decoder.device)

    @torch.inference_mode()
    def steps() -> Iterator[list[tuple[Any, ...]]]:
        network = decoder.network
        network(held.line.ids, held.line.position, held.prefill)
        tokens = torch.tensor([3, 4])
        while True:
            with packed(network, 2, 20, torch.device("cuda")), Written() as written:
                network.lm_head(network(tokens, held.position, held.stepping))
                held.advance()
            yield written.lines

    made = steps()
    first, places = next(made), [t.data_ptr() for t in (held.now, held.lengths, held.keys[0], held.values[0])]
    again = [next(made) for _ in range(3)]
    assert all(lines == first for lines in again)
    assert places == [t.data_ptr() for t in (held.now, held.lengths, held.keys[0], held.values[0])]
    names = {line[0] for line in first}
    assert not [name for name in names if any(word in name for word in ("_local_scalar", "nonzero", "unique", "lift"))]
    assert any("index_copy_" in name for name in names)
    layers = len(decoder.network.model.layers)
    products = [line[0] for line in first if any(word in line[0] for word in ("linear", "mm.", "addmm_"))]
    assert len(products) == 4 * layers + 1
    assert sum("addmm_" in name for name in products) == layers


class Counted(TorchDispatchMode):
    """Notes every operation that a GPU would launch a kernel for."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_layer_of_a_step_is_nine_launches(tmp_path: Path, launched: list[str]) -> None:
    """On tensors without content, which go the way of a GPU's."""
    network = load_decoder(write_llama(tmp_path), device="cpu", dtype="bfloat16").network
    held, heads = FixedCache(prompts_of(5, 9), 20, torch.device("cpu")), network.config.num_key_value_heads
    for name in ("first", "now", "lengths"):
        setattr(held, name, getattr(held, name).to("meta"))
    for layer in range(len(network.model.layers)):
        shape = 2, heads, held.columns, network.config.head_dim
        held.keys[layer], held.values[layer] = torch.empty(2, *shape, dtype=torch.bfloat16, device="meta")
    network.to("meta")
    tokens, network.model.rope.inverse = torch.tensor([3, 4], device="meta"), network.model.rope.inverse.to("meta")
    with torch.inference_mode(), packed(network, 2, 20, torch.device("cuda")), Counted(launched):
        network.lm_head(network(tokens, held.position, held.stepping))
        held.advance()
    step = ["_norm_kernel", "mm", "_part_kernel", "_whole_kernel", "mm", "_norm_kernel", "mm", "_gate_kernel", "addmm_"]
    begin = launched.index("_norm_kernel")
    layers = [launched[at : at + 9] for at in range(begin, len(launched), 9)]
    names = [[name.split(".")[0].replace("linear", "mm") for name in layer] for layer in layers]
    assert names[: len(held.keys)] == [step] * len(held.keys)
    assert len(launched) - 9 * len(held.keys) <= 12


def test_the_next_step_is_under_way_while_the_tokens_of_one_are_looked_at(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    order: list[str] = []

    def arriving(tokens: Tensor) -> Callable[[], list[Any]]:
        return lambda: (order.append("read"), tokens.tolist())[1]

    request.getfixturevalue("replaying")
    real = replay.Replay.__call__
    monkeypatch.setattr(generation, "arriving", arriving)
    monkeypatch.setattr(replay.Replay, "__call__", lambda *given: (order.append("step"), real(*given))[1])
    assert len(generation.generate(decoder.network, prompts_of(9), 20, Sampling(), (), decoder.device)[0]) == 20
    assert order == [*["step", "read"] * 19, "read"]


def test_graphs_are_for_long_texts_of_a_bare_network_on_a_gpu(decoder: Decoder) -> None:
    gpu, network = torch.device("cuda"), decoder.network
    assert replay.worth_replaying(network, 64, gpu)
    assert not replay.worth_replaying(network, 64, torch.device("cpu"))
    assert not replay.worth_replaying(network, replay.STEPS - 1, gpu)
    assert not replay.worth_replaying(object(), 64, gpu)
