"""The processes that torchrun started as one group, from its start to its end: who watches whom, and what ends all.

Work ends on all ranks or on none: an error of one ends the others, and so does its death.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..errors import ConfigError
from .messages import barrier
from .ranks import apart, lost, size

BEAT = 2.0
"""Seconds between two signs of life."""
PATIENCE = 15
"""Signs of life that may be missing before a rank counts as lost: half a minute in all."""
_LAST_WORDS = 10.0  # seconds that a process has to end when it has failed


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
                gone = next((other for other in self.watched if self._silent(other)), None)
            except RuntimeError:
                gone = 0  # the store is gone, and the machine with it that held it
            if gone is not None or failed > 2:
                self._end(gone)

    def _silent(self, other: int) -> bool:
        beats, times = self.seen[other]
        now = self.store.add(f"beat {other}", 0)
        self.seen[other] = (beats, times + 1) if now == beats else (now, 0)
        return self.seen[other][1] > PATIENCE

    def _end(self, gone: int | None) -> None:
        if self.over.is_set():
            return
        if gone is not None and self._first_to_tell():
            print(f"mint: {lost(f'process {gone}')}", file=sys.stderr, flush=True)
        os._exit(1)

    def _first_to_tell(self) -> bool:
        try:
            return self.speaks()
        except RuntimeError:
            return True


def check_gpus() -> None:
    """Stop where more processes were started than there are GPUs for them."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes for {torch.cuda.device_count()} GPUs of this machine; start one for each, or --device cpu"
        )
