"""Nothing waits for the device where the vocabulary is in parts either: shown as in test_no_waiting.py, without other ranks,
whose part in what is added up and sent round is left out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_no_waiting import WaitError, launched, watched
from torch import Tensor

from mint.parallel import vocabulary

__all__ = ["launched"]
RANKS, OWN, ROWS, WIDTH, VOCABULARY = 3, 1, 5, 8, 30
DATA = SimpleNamespace(
    mesh_dim_names=("data",), size=lambda: RANKS, get_local_rank=lambda: OWN, get_group=lambda: "all ranks"
)


class Sent:
    """torch.distributed, as far as the vocabulary asks it: tells where what it is given lies, and does nothing with it."""

    ReduceOp = dist.ReduceOp

    def __init__(self) -> None:
        self.places: list[tuple[str, str]] = []

    def all_gather(self, parts: list[Tensor], own: Tensor, group: Any) -> None:
        self._note("all_gather", own, group)
        if own.device.type == "cpu":  # how many rows each rank has
            for rank, part in enumerate(parts):
                part.fill_(ROWS if rank == OWN else 2 * rank)

    def broadcast(self, tensor: Tensor, group_src: int, group: Any) -> None:  # noqa: ARG002
        self._note("broadcast", tensor, group)

    def all_reduce(self, tensor: Tensor, _how: Any = None, group: Any = None) -> None:
        self._note("all_reduce", tensor, group)

    def reduce(self, tensor: Tensor, group_dst: int, group: Any) -> None:  # noqa: ARG002
        self._note("reduce", tensor, group)

    def _note(self, name: str, tensor: Tensor, group: Any) -> None:
        assert group == "all ranks"
        self.places.append((name, tensor.device.type))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The second of three ranks, with rows 10..19 of every table."""
    found = Sent()
    monkeypatch.setattr(vocabulary, "dist", found)
    monkeypatch.setattr(vocabulary, "_mesh", lambda _: DATA)
    monkeypatch.setattr(vocabulary, "own_part", lambda whole: (whole[10:20], (slice(10, 20),)))
    return found


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scored() -> tuple[Tensor, ...]:
    """Log-probabilities with an adapter on the head, and their gradients."""
    hidden, low, up = (meta(*shape).requires_grad_() for shape in ((ROWS, WIDTH), (ROWS, 2), (10, 2)))
    labels = meta(ROWS, dtype=torch.int64)
    logp = vocabulary.token_logprob(hidden, meta(VOCABULARY, WIDTH), labels, low, up)
    return logp, *torch.autograd.grad(logp.sum(), (hidden, low, up))


def looked_up() -> tuple[Tensor, ...]:
    return (vocabulary.looked_up(meta(ROWS, dtype=torch.int64), meta(VOCABULARY, WIDTH)),)


def test_a_vocabulary_in_parts_is_crossed_by_the_kernels_and_waits_for_nothing(
    launched: list[str], sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch):
        found = scored()
    assert [tuple(one.shape) for one in found] == [(ROWS,), (ROWS, WIDTH), (ROWS, 2), (10, 2)]
    assert launched.count("_fold_kernel") == RANKS - 1  # the first rank has no rows
    assert "_spread_kernel" in launched
    assert [name for name, place in sent.places if place == "cpu"] == ["all_gather"]


@pytest.mark.usefixtures("launched")
def test_embeddings_in_parts_wait_for_nothing(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch):
        (found,) = looked_up()
    assert found.shape == (ROWS, WIDTH)
    assert [name for name, place in sent.places if place == "cpu"] == ["all_gather"]


def what_is_there(table: Tensor, asked: Tensor) -> Tensor:
    rows, here = table.new_zeros(len(asked), table.shape[1]), (asked >= 0) & (asked < len(table))
    rows[here] = table[asked[here]]
    return rows


def told_by_the_device(own: Tensor, mesh: Any) -> list[int]:
    return [int(torch.full((1,), len(own), device=own.device))] * mesh.size()


FAULTS: dict[str, Callable[..., Any]] = {"_own_rows": what_is_there, "row_counts": told_by_the_device}


@pytest.mark.usefixtures("launched", "sent")
@pytest.mark.parametrize("work", [scored, looked_up])
@pytest.mark.parametrize("name", FAULTS)
def test_a_vocabulary_that_waits_would_show(
    monkeypatch: pytest.MonkeyPatch, name: str, work: Callable[[], tuple[Tensor, ...]]
) -> None:
    monkeypatch.setattr(vocabulary, name, FAULTS[name])
    with watched(monkeypatch), pytest.raises(WaitError):
        work()
