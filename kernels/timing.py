"""How sides of a comparison are timed, and how the parts of a bench are run one after the other.

A part is a function that yields lines. Each runs in a process of its own, with a limit of time: neither its memory nor a
fault of the device reaches the next part, and a part or a side that fails is a line with its reason.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import torch

from .checks import DEVICE, GPU, normal

Side = Callable[[], Any]
Line = dict[str, Any]
Rates = dict[str, float]
ROUNDS = 7 if GPU else 3


class Part(NamedTuple):
    """`lines(size, rates)`, where size is "gpu", "cpu" or "tiny", the seconds that it may take, and the packages that it
    loads before they begin to count."""

    lines: Callable[[str, Rates], Iterator[Line]]
    limit: float = 60.0
    packages: tuple[str, ...] = ()

    def load(self) -> None:
        """Import what is installed of the packages; what cannot be imported fails again where it is used, and is named."""
        for name in self.packages:
            with suppress(Exception):
                import_module(name)


def seconds(side: Side) -> float:
    """One run. On a GPU between two events, so that the time of the launches in Python is seen only if it is longer."""
    if not GPU:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    side()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def peak(side: Side) -> int | None:
    """Bytes above what was held before, of a first run and of a later one; not measured on a processor."""
    if not GPU:
        side()
        return None
    before, found = torch.cuda.memory_allocated(), []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        side()
        found.append(torch.cuda.max_memory_allocated() - before)
    return max(found)


def compared(
    bench: str,
    case: str,
    sides: dict[str, Side],
    floor: float | None = None,
    *,
    rounds: int = ROUNDS,
    count: tuple[float, str] | None = None,
) -> Iterator[Line]:
    """A line for each side: the median of rounds in which all take turns, its ratio to the first side, the fraction of the
    floor (seconds) that it reaches, and what it makes in a second if `count` says how many of what one run makes."""
    memory: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for name, side in sides.items():
        try:
            memory[name] = peak(side)  # compiles, tunes, fills the allocator
        except Exception as error:  # noqa: BLE001 (a side is other people's code too: its fault is its line)
            failed[name] = said(error)
    turns = [{name: seconds(sides[name]) for name in memory} for _ in range(rounds)]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in memory}
    first, floor = medians.get(next(iter(sides))), floor if GPU else None  # a shared processor has no steady rate
    for name in sides:
        line: Line = {"bench": bench, "case": case, "side": name}
        if name in failed:
            yield line | {"failed": failed[name]}
            continue
        yield line | {
            "ms": medians[name] * 1e3,
            "to_ours": None if first is None else medians[name] / first,
            "floor_ms": None if floor is None else floor * 1e3,
            "fraction": None if floor is None else floor / medians[name],
            "mib": None if (held := memory[name]) is None else held / 2**20,
            **({} if count is None else {"per_second": count[0] / medians[name], "unit": count[1]}),
        }


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def rates(size: str) -> Rates:
    """What this machine gives: operations a second of a square product, bytes a second of a copy."""
    n, room = {"gpu": (8192, 1 << 30), "cpu": (1024, 1 << 24), "tiny": (64, 1 << 12)}[size]
    x, y, held = normal(n, n), normal(n, n), torch.empty(room, dtype=torch.uint8, device=DEVICE)
    product, copy = (min(seconds(side) for _ in range(8)) for side in (lambda: torch.mm(x, y), held.clone))
    return {"products": 2 * n**3 / product, "bytes": 2 * room / copy}


def begun(command: Sequence[str]) -> subprocess.Popen[str]:
    """A process that loads what it needs and then waits for a line of input."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # in a session of its own, with what it starts, compilers too, so that all of it ends together
    return subprocess.Popen([sys.executable, *command], **pipes, text=True, start_new_session=True)


def apart(child: subprocess.Popen[str], word: str, limit: float) -> Iterator[Line]:
    """The lines that a process prints as JSON once it was given a word, as they come; then a line that names what ended it,
    if that was not its end."""
    started = time.monotonic()
    with child:
        words: list[str] = []
        listener = threading.Thread(target=lambda: words.extend(child.stderr or ()))  # a full pipe would stop it
        stopper = threading.Timer(limit, end, (child,))
        listener.start()
        stopper.start()
        try:
            tell(child, word)
            for line in child.stdout or ():
                if line.startswith("{"):  # libraries print to this stream too
                    yield json.loads(line)
            child.wait()
        finally:
            stopper.cancel()
            end(child)
            listener.join()
    if child.returncode:
        late = time.monotonic() - started >= limit
        last = next((word.strip() for word in reversed(words) if word.strip()), "no word")
        yield {"failed": f"longer than its {limit:.0f} s" if late else f"exit code {child.returncode}: {last[:300]}"}


def tell(child: subprocess.Popen[str], word: str) -> None:
    """Give a process its line of input."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it has come to its end, and its exit code says why
        os.write(
            child.stdin.fileno(), f"{word}\n".encode()
        )  # nothing stays in a buffer, to fail once more at its close


def drop(child: subprocess.Popen[str]) -> None:
    """Stop a process that was never given its line."""
    with child:
        end(child)


def end(child: subprocess.Popen[str]) -> None:
    """Stop a process and all that it has started."""
    with suppress(ProcessLookupError):  # it has come to its end
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
