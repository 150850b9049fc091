"""Ranks that hold one decoder in parts, and ask it different things: what needs the parts of all is done by all, in turn.

Before such work a rank says of which kind it is, and the highest kind that any rank says comes first. A rank that wants
another, or nothing any more, helps: it does work of that kind on nothing of its own, and asks again. So a rank may have
more to ask than the others, or know a picture already that they have to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .messages import highest

_DONE = "done"


class Turns:
    """The kinds of work that ranks do together, by name, each with what helps in it; none where all ask the same."""

    def __init__(self) -> None:
        self.helps: dict[str, Callable[[], Any]] = {}
        self.depth, self.training = 0, False

    def begin(self, training: bool = False) -> None:
        """Of another decoder. What helps has no gradient; prediction runs in inference mode, and so must what helps in it."""
        self.helps.clear()
        self.training = training

    def add(self, kind: str, help_in: Callable[[], Any]) -> None:
        """A kind of work. All ranks add the same ones in the same order."""
        self.helps[kind] = help_in

    def around(self, module: nn.Module, kind: Callable[..., str]) -> None:
        """Every call of a module is such work, of the kind that its arguments say."""
        module.register_forward_pre_hook(lambda _, given: self.enter(kind(*given)), prepend=True)
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def enter(self, kind: str) -> None:
        """From here to `leave` all ranks do work of this kind; what it consists of takes no turn of its own."""
        if not self.depth and (kind in self.helps or kind == _DONE):
            self._wait(kind)
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        self.enter(kind)
        try:
            yield
        finally:
            self.leave()

    def finish(self) -> None:
        """Help the others until none has anything left to ask."""
        if self.helps:
            with self.of(_DONE):
                pass

    def _wait(self, kind: str) -> None:
        """Help in what others want first."""
        kinds = [_DONE, *self.helps]
        while (chosen := kinds[int(highest(kinds.index(kind))[0])]) != kind:
            self.depth += 1
            with torch.no_grad() if self.training else torch.inference_mode():
                self.helps[chosen]()
            self.depth -= 1


TURNS = Turns()
