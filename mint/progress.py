"""Progress of long work on stderr: how far, how fast, how long still. One line that is redrawn on a terminal, a line
every ten seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_state = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """Silence (or not) every progress line of this process."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    return _state["quiet"]


class Progress:
    """`with Progress("training", total=100, unit="step") as bar: bar.advance(1, "loss 0.31")`."""

    def __init__(self, what: str, total: int | None = None, unit: str = "item", before: int = 0) -> None:
        """`before` items were done earlier, and tell nothing of the rate."""
        self.what, self.total, self.unit = what, total, unit
        self.done = self.before = before
        self.note = ""
        self.start = self.drawn = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.done and not _state["quiet"]:
            self._draw(end="\n")

    def advance(self, by: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + by, note or self.note
        now = time.monotonic()
        if not _state["quiet"] and now - self.drawn >= (0.1 if self.terminal else 10.0):
            self.drawn = now
            self._draw(end="" if self.terminal else "\n")

    def line(self) -> str:
        """The line as it would be drawn now."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.before) / seconds
        shown = f"{self.what} {self.done:,}" + (f"/{self.total:,}" if self.total else "")
        shown += f" {self.unit}s  {rate:,.1f}/s" if rate >= 1 or not rate else f" {self.unit}s  {1 / rate:,.1f} s each"
        if self.total and rate:
            shown += (
                f"  {_clock((self.total - self.done) / rate)} left"
                if self.done < self.total
                else f"  {_clock(seconds)}"
            )
        return shown + (f"  {self.note}" if self.note else "")

    def _draw(self, end: str) -> None:
        lead = "\r\x1b[K" if self.terminal else ""
        print(lead + self.line(), end=end, file=sys.stderr, flush=True)


def progress(items: Iterable[T], what: str, total: int | None = None, unit: str = "item") -> Iterator[T]:
    """The same items, with a progress line."""
    with Progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr, unless quiet."""
    if not _state["quiet"]:
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
