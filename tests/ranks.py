"""Several ranks on one machine, as torchrun starts them, without paying its start: forked from a server that has imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from mint import parallel
from mint.progress import set_quiet


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start_ranks(count: int, work: Callable[..., None], *words: Any) -> list[BaseProcess]:
    """`work(*words)` on so many ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mint.pipeline", "torch.distributed.checkpoint", "torch._dynamo", "students", "ranks"]
    )
    port = free_port()
    processes = [context.Process(target=_rank, args=(rank, count, port, work, words)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, count: int, port: int, work: Callable[..., None], words: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    set_quiet(True)
    if count == 1:
        work(*words)
        return
    with parallel.joined():
        work(*words)


def on_ranks(count: int, work: Callable[..., None], *words: Any) -> None:
    """The same, to a good end on every rank."""
    processes = start_ranks(count, work, *words)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
