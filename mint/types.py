"""What flows between the stages, as small frozen values. Everything else in MINT turns one of these into the next.

Record -> Ranking -> PreferencePair -> TokenTree -> (log-probabilities) -> Prediction -> Report
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .transfer import sent

Message = dict[str, Any]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": str or a list of parts}."""


@dataclass(frozen=True, slots=True)
class Record:
    """One case: what is known of it, in any modality.

    `image` is a path, a path with the item of an array or archive behind '#' (`fold1/images.npy#17`), an open picture, or
    what draws one when asked (`image.draw()`, as the built-in tasks' do).
    `terms` are the findings present and `excluded` those looked for and absent, each as written in the source.
    """

    id: str
    note: str = ""
    image: Any = None
    label: str | None = None
    labels: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    sex: str | None = None
    age: str | None = None
    ethnicity: str | None = None
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """All classes of one case, best first, with the teacher's score of each."""

    id: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt and two answers: `chosen` is preferred to `rejected`.

    `prompt`, `chosen` and `rejected` are message lists; plain strings where the source has plain strings. `where` is the
    place in its file (`pairs.jsonl:17`), for messages.
    """

    id: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    image: Any = None
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A forest of tokens in depth-first order: every token of several texts, once.

    Token i may attend to token j exactly when `j <= i < end[j]`, and stands at `position[i]`, its depth.
    An edge leads from a token to the next token of a text: the hidden state of `sources[e]` must predict `labels[e]`.
    Path p is one scored text; its edges are `member_edges[member_paths == p]`. An edge that two texts share is stored
    once and is a member of both. A token that nothing follows predicts nothing, so it is a label but not a token.
    """

    ids: Tensor  # (T,) int64
    end: Tensor  # (T,) int64
    position: Tensor  # (T,) int64
    sources: Tensor  # (E,) int64
    labels: Tensor  # (E,) int64
    member_edges: Tensor  # (M,) int64
    member_paths: Tensor  # (M,) int64
    paths: int
    images: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def path_sums(self, token_logp: Tensor) -> Tensor:
        """Log-probability of each path: (E,) -> (P,)."""
        sums = token_logp.new_zeros(self.paths)
        return sums.index_add(0, self.member_paths, token_logp[self.member_edges])

    def path_lengths(self) -> Tensor:
        """Number of scored tokens of each path: (P,)."""
        return self.member_paths.new_zeros(self.paths).index_add_(
            0, self.member_paths, torch.ones_like(self.member_paths)
        )

    def to(self, device: torch.device | str) -> TokenTree:
        """The same tree with its tensors on `device`, all in one copy."""
        if self.ids.device.type == torch.device(device).type:
            return self
        tensors = [getattr(self, name) for name in _TREE_TENSORS]
        moved = sent(torch.cat(tensors), device).split([len(tensor) for tensor in tensors])
        return TokenTree(**dict(zip(_TREE_TENSORS, moved, strict=True)), paths=self.paths, images=self.images)


_TREE_TENSORS = ("ids", "end", "position", "sources", "labels", "member_edges", "member_paths")


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one case: classes best first with log-probability and probability, or free text, or both."""

    id: str
    ranking: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    passages: tuple[str, ...] = ()

    def top(self, k: int) -> tuple[str, ...]:
        return tuple(str(entry["label"]) for entry in self.ranking[:k])


@dataclass(frozen=True, slots=True)
class Report:
    """Metrics of a set of predictions, with what is needed to draw them."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: Sequence[dict[str, Any]] = ()
    confusion: Sequence[tuple[str, str, int]] = ()
    calibration: Sequence[dict[str, float]] = ()
    cases: Sequence[dict[str, Any]] = ()
