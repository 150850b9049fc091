"""Tokens after one prompt that grow as a tree: what a text has, and what it may come to have, read side by side.

Shapes: n tokens of a pass, S tokens of the line, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import blocks
from .trunks import Trunks


@dataclass(slots=True, eq=False)
class Token:
    """A token of the tree. The one above all others stands for the last of the prompt."""

    id: int = -1
    part: int = -1  # of the text, as the writer counts its parts
    above: Token | None = None
    depth: int = -1  # after the prompt
    column: int = -1  # where on the trunk's line it was read
    state: Tensor | None = None  # (D,) once it is read
    below: dict[int, Token] = field(default_factory=dict)

    def then(self, ids: Sequence[int], part: int = -1) -> Token:
        """The last of the tokens that follow, each made once."""
        token = self
        for one in ids:
            if one not in token.below:
                token.below[one] = Token(one, part, token, token.depth + 1)
            token = token.below[one]
        return token

    def path(self) -> list[Token]:
        """The tokens from the first after the prompt down to this one."""
        found: list[Token] = []
        token = self
        while token.above is not None:
            found.append(token)
            token = token.above
        return found[::-1]

    def unread(self) -> list[Token]:
        """Those of its path that are still to be read."""
        return [token for token in self.path() if token.column < 0]


def read(trunk: Trunks, tokens: Sequence[Token]) -> None:
    """Compute the states of tokens in one pass; those above them are read already, or stand before them here."""
    for column, token in enumerate(tokens, trunk.size):
        token.column = column
    above = [[own.column for own in token.path()] for token in tokens]
    states = grow(trunk, [token.id for token in tokens], [token.depth for token in tokens], above)
    for token, state in zip(tokens, states, strict=True):
        token.state = state


def grow(trunk: Trunks, ids: Sequence[int], depth: Sequence[int], above: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states (n, D) of tokens at some depths after the one prompt. Each sees the prompt, and the columns of the line
    that are its path: the i-th of them, `trunk.size + i`, among them."""
    first, prompt = trunk.size, trunk.lengths[0]
    seen = torch.zeros(len(ids), first + len(ids), dtype=torch.bool)
    seen[:, :prompt] = True
    for row, columns in enumerate(above):
        seen[row, list(columns)] = True
    return trunk.run(torch.tensor(ids), torch.tensor(depth) + prompt, blocks.masked(seen), keep=True)
