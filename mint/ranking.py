"""Scores of a teacher -> rankings: all classes of a case, best first (the upstream model's answer in MINT).

Shapes: N cases, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError, RecordError
from .types import Ranking


def rank(
    ids: Sequence[str],
    scores: Tensor,
    classes: Sequence[str],
    *,
    candidates: Sequence[Sequence[str] | None] | None = None,
    temperature: float | None = None,
) -> list[Ranking]:
    """The classes of each case by falling score (N, C); equal scores keep the order of `classes`.

    `candidates` narrows a case to some of the classes (None: all of them). Without a temperature a ranking holds the
    scores as they are; with one, log softmax(scores / temperature) over the case's candidates. The order is the same.
    """
    _check(ids, scores, classes, temperature)
    scores = scores.detach().to("cpu", torch.float64)
    _refuse_not_finite(ids, scores, classes)
    if candidates is None:
        sizes = [len(classes)] * len(ids)
    else:
        mask = _candidate_mask(ids, classes, candidates)
        sizes = mask.sum(dim=1).tolist()
        scores = scores.masked_fill(~mask, -torch.inf)
    if temperature is not None:
        scores = torch.log_softmax(scores / temperature, dim=1)
    falling, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return [
        Ranking(id=case, labels=tuple(classes[c] for c in row_order[:size]), scores=tuple(row_scores[:size]))
        for case, row_order, row_scores, size in zip(ids, order.tolist(), falling.tolist(), sizes, strict=True)
    ]


def _check(ids: Sequence[str], scores: Tensor, classes: Sequence[str], temperature: float | None) -> None:
    if scores.shape != (len(ids), len(classes)):
        shape, wanted = tuple(scores.shape), (len(ids), len(classes))
        raise ConfigError(f"scores of shape {shape} for {len(ids)} cases and {len(classes)} classes; wanted {wanted}")
    if not classes or len(set(classes)) != len(classes):
        twice = next((name for name in classes if classes.count(name) > 1), None)
        found = f"the class {twice!r} occurs twice" if classes else "there are no classes"
        raise ConfigError(f"classes: {found}; every class is wanted once")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature {temperature}: a number above 0 is wanted")


def _refuse_not_finite(ids: Sequence[str], scores: Tensor, classes: Sequence[str]) -> None:
    wrong = (~torch.isfinite(scores)).nonzero()
    if len(wrong):
        n, c = wrong[0].tolist()
        raise RecordError(
            f"case {ids[n]!r}: the teacher's score of {classes[c]!r} is {scores[n, c].item()}; "
            "finite scores are wanted (look at this case's image and note, or at the teacher)"
        )


def _candidate_mask(ids: Sequence[str], classes: Sequence[str], candidates: Sequence[Sequence[str] | None]) -> Tensor:
    """(N, C): which classes stand for election in each case."""
    if len(candidates) != len(ids):
        raise ConfigError(f"candidates for {len(candidates)} cases, but there are {len(ids)} cases")
    column = {name: c for c, name in enumerate(classes)}
    mask = torch.zeros(len(ids), len(classes), dtype=torch.bool)
    for n, (case, names) in enumerate(zip(ids, candidates, strict=True)):
        if names is None:
            mask[n] = True
            continue
        unknown = next((name for name in names if name not in column), None)
        if unknown is not None or not names:
            found = f"the candidate {unknown!r} is no class of the teacher" if names else "no candidates"
            raise RecordError(f"case {case!r}: {found}; name some of its {len(classes)} classes")
        mask[n, [column[name] for name in names]] = True
    return mask
