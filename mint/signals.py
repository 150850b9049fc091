"""Asked to stop, by a queue that wants the machine back (SIGTERM) or by Ctrl-C (SIGINT): noted, and answered in time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ASKING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Within the block SIGTERM ends the work as Ctrl-C does, by a KeyboardInterrupt: nothing half written is left."""
    listening = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if listening else None
    try:
        yield
    finally:
        if listening:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within the block a first signal is only noted, for whoever asks; a second one ends the process at once.

    Only the main thread of a process can listen; elsewhere nothing changes.
    """
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        seen.append(number)
        for each in _ASKING:
            signal.signal(each, signal.SIG_DFL)

    listening = _ASKING if threading.current_thread() is threading.main_thread() else ()
    before = {each: signal.signal(each, note) for each in listening}
    try:
        yield lambda: bool(seen)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
