"""Several processes at one work: the one door to torch.distributed. A process is a rank; alone it is rank 0 of 1, and
nothing here costs it anything.

`joined` makes the ranks that torchrun started one group. Whatever goes from rank to rank is a tensor or JSON, never a
pickle. Work ends on all ranks or on none: an error of one ends the others, and so does its death.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.utils import get_total_norm

from ..errors import ConfigError, WorkError

T = TypeVar("T")

BEAT = 2.0
"""Seconds between two signs of life."""
PATIENCE = 15
"""Signs of life that may be missing before a rank counts as lost: half a minute in all."""
_LAST_WORDS = 10.0  # seconds that a process has to end when it has failed
IN_TURN = 32
"""Items that a rank works on before all show what they have."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


_grid: dict[str, Any] = {"tensor": 1, "group": None}
"""How many neighbouring ranks hold one copy of the decoder together, and the group of those that hold the same part."""


def share() -> int:
    """Which share of the work this rank takes: ranks that hold a copy of the decoder together take the same one."""
    return rank() // int(_grid["tensor"])


def shares() -> int:
    return size() // int(_grid["tensor"])


def apart() -> None:
    """From here on each rank has a decoder, or tokens, of its own."""
    _grid.update(tensor=1, group=None)
    if size() > 1:
        in_turn().begin()


def first() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


# ---- the group ------------------------------------------------------------------------------------------------------


@contextmanager
def joined() -> Iterator[Watch]:
    """Be one of the ranks that torchrun started, until the block ends; an error in it ends the other ranks too."""
    store, own, count = next(iter(rendezvous("env://")))
    _take_device()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=own, world_size=count)
    watch = Watch(PrefixStore("watch", store.clone()), own, count)
    try:
        yield watch
        barrier()
    except BaseException:
        watch.speaks()  # whoever fails first has said so before its connections close
        watch.stop()
        _end_soon()
        raise
    watch.stop()
    dist.destroy_process_group()
    apart()


def _end_soon() -> None:
    """A process that fails ends, even if it waits for others while it does."""
    timer = threading.Timer(_LAST_WORDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _take_device() -> None:
    """The GPU of this rank, where there are any."""
    count, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if count:
        torch.cuda.set_device(own % count)


class Watch:
    """Signs of life, counted in the store: a rank that gives none is lost, and then this process ends itself.

    A rank that died while others wait for it in NCCL would otherwise be waited for until that gives up.
    """

    def __init__(self, store: Any, own: int, count: int) -> None:
        self.store, self.own, self.count = store, own, count
        self.over, self.spoken, self.first = threading.Event(), False, False
        self.watched = range(1, count) if own == 0 else (0,)
        self.seen = dict.fromkeys(self.watched, (0, 0))  # beats, and how often that many were found
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def speaks(self) -> bool:
        """Whether this rank is the first to fail, and so the one that tells why."""
        if not self.spoken:
            self.spoken = True
            self.first = self.store.add("failed", 1) == 1
        return self.first

    def stop(self) -> None:
        """No more signs of life. A thread that is within the store while Python ends would abort the process."""
        self.over.set()
        self.thread.join(_LAST_WORDS)

    def _beat(self) -> None:
        """Every so often: I am here; are the others? Did one fail a while ago, and this one has not noticed yet?"""
        failed = 0
        while not self.over.wait(BEAT):
            try:
                self.store.add(f"beat {self.own}", 1)
                failed += self.store.add("failed", 0) > 0
                lost = next((other for other in self.watched if self._silent(other)), None)
            except RuntimeError:
                lost = 0  # the store is gone, and the machine with it that held it
            if lost is not None or failed > 2:
                self._end(lost)

    def _silent(self, other: int) -> bool:
        beats, times = self.seen[other]
        now = self.store.add(f"beat {other}", 0)
        self.seen[other] = (beats, times + 1) if now == beats else (now, 0)
        return self.seen[other][1] > PATIENCE

    def _end(self, lost: int | None) -> None:
        if self.over.is_set():
            return
        if lost is not None and self._first_to_tell():
            print(f"mint: {_lost(f'process {lost}')}", file=sys.stderr, flush=True)
        os._exit(1)

    def _first_to_tell(self) -> bool:
        try:
            return self.speaks()
        except RuntimeError:
            return True


def _lost(who: str) -> str:
    return (
        f"{who} of the {size()} that work together is gone: it was killed, ran out of memory, or its machine is off; "
        f"start all of them again, a training run with --resume"
    )


@contextmanager
def together() -> Iterator[None]:
    """A step that all ranks take; if one of them is gone, the others end."""
    try:
        yield
    except RuntimeError as error:
        raise WorkError(_lost("a process")) from error


# ---- tensors of which each rank holds a part -----------------------------------------------------------------------

Part = tuple[slice, ...]


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return size() > 1 and _shards().is_part(tensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; every rank must ask."""
    return _shards().whole(tensor) if size() > 1 else tensor


def own_part(tensor: Tensor) -> tuple[Tensor, Part]:
    """What this rank holds of a tensor, and which rows (and columns) of the whole that is; (): all of them."""
    return _shards().own_part(tensor) if size() > 1 else (tensor, ())


def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, or what belongs there into this rank's part of it."""
    own, part = own_part(tensor)
    with torch.no_grad():
        own.copy_(value[part] if part else value)


def spread(network: Any, device: torch.device, *, shard: bool, tensor: int) -> None:
    """Cut a decoder on the meta device into the parts of all ranks, and make room for this one's: `tensor` neighbouring
    ranks compute on the same tokens and share each product, and with `shard` the others share what is left (FSDP2)."""
    _grid.update(group=_shards().spread(network, device, shard=shard, tensor=tensor), tensor=tensor)


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor of which this rank holds `own` where it holds a part of `tensor`."""
    out: Tensor = _shards().like(tensor, own) if size() > 1 else own
    return out


def settle(network: Any) -> None:
    """After reading: frozen parts become plain tensors."""
    _shards().settle(network)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a trained matrix, to compute with."""
    out: Tensor = _shards().local(tensor) if size() > 1 else tensor
    return out


def complete(weight: Tensor, total: Tensor) -> None:
    """Add up this rank's sum of the gradients of a matrix over the ranks that compute on the same tokens, in place."""
    if size() > 1:
        _shards().complete(weight, total)


def is_pooled(weight: Tensor) -> bool:
    """Whether backward adds up the gradient of a trained matrix over the ranks that have other tokens."""
    return size() > 1 and bool(_shards().is_pooled(weight))


def kinds(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors, those together that are spread over the same ranks."""
    out: list[list[Tensor]] = _shards().kinds(tensors) if size() > 1 else [list(tensors)]
    return out


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, of those in parts the whole."""
    if any(map(is_part, tensors)):
        out: Tensor = _shards().total_norm(tensors)
        return out
    return get_total_norm(tensors)


def head_factor(matrix: Tensor) -> Tensor:
    """The matrix A of an adapter on the head, to compute with: each rank has all of it."""
    out: Tensor = _vocabulary().head_factor(matrix) if size() > 1 else matrix
    return out


def logits(hidden: Tensor, head: Tensor, low: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """Logits of this rank's rows with a head in parts: (n, D), (V, D) -> (n, V). An adapter as `token_logprob` has it."""
    with in_turn().of("logits"):
        out: Tensor = _vocabulary().logits(hidden, head, low, up)
    return out


def row_logsumexp(hidden: Tensor, head: Tensor) -> Tensor:
    """logsumexp over the vocabulary of this rank's rows with a head in parts: (n, D), (V, D) -> (n,) float32."""
    with in_turn().of("row_logsumexp"):
        out: Tensor = _vocabulary().spread_logsumexp(hidden, head)
    return out


def in_turn() -> Any:
    """In which order ranks do what needs the parts of all, where they ask different things: see `Turns`."""
    return import_module(f"{__name__}.turns").TURNS


def _vocabulary() -> Any:
    return import_module(f"{__name__}.vocabulary")


def looked_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table that is spread over the ranks: (n,), (V, D) -> (n, D); not differentiable, such a table is frozen."""
    with in_turn().of("looked_up"):
        out: Tensor = _vocabulary().looked_up(ids, table)
    return out


def token_logprob(
    hidden: Tensor, head: Tensor, labels: Tensor, *, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """log p(label) with a head that is spread over the ranks: (n, D), (V, D), (n,) -> (n,); differentiable in `hidden`, and
    in `low` (n, r) and `up`, this rank's rows of the B of an adapter on the head."""
    out: Tensor = _vocabulary().token_logprob(hidden, head, labels, low, up)
    return out


def _shards() -> Any:
    """`shards` is imported where there are several ranks: it is large."""
    return import_module(f"{__name__}.shards")


# ---- what goes from rank to rank ------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait until every rank is here."""
    highest(0.0)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over the shares of the work, in place; those of one dtype travel as one."""
    if shares() == 1 or not tensors:
        return
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):  # in one order on all ranks
        same = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        with together():
            dist.all_reduce(flat, group=_grid["group"])
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def highest(*numbers: float) -> list[float]:
    """The highest of each number over the ranks."""
    if size() == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    with together():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def gathered(value: Any) -> list[Any]:
    """The JSON values of all ranks, in their order, on every rank."""
    if size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    with together():
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = max(int(length) for length in lengths)
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(rows, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_first(value: Any) -> Any:
    """The JSON value of rank 0, on every rank."""
    return gathered(value if first() else None)[0]


def shared_out(
    items: Iterable[T],
    work: Callable[[list[T], list[str] | None], Iterable[Any]],
    skipped: list[str] | None = None,
    turn: int = IN_TURN,
) -> Iterator[Any]:
    """What `work` makes of the items, in their order and on every rank, each of which has worked on its share alone.

    Every rank sees all items and takes `turn` of them in turn, so that no more than a round is held. What `work` makes
    is JSON; what it appends to the list it is given is appended to `skipped`.
    """
    items = iter(items)
    while held := list(islice(items, turn * shares())):
        left_out: list[str] | None = None if skipped is None else []
        made = list(work(held[share() * turn : (share() + 1) * turn], left_out))
        for rows, faults in gathered([made, left_out])[:: size() // shares()]:
            if skipped is not None:
                skipped.extend(faults)
            yield from rows


def check_gpus() -> None:
    """Stop where more processes were started than there are GPUs for them."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes for {torch.cuda.device_count()} GPUs of this machine; start one for each, or --device cpu"
        )
