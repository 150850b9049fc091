"""Predictions against the truth -> Report: the figures of the paper's tables, each with an interval.

Names are compared as labels of the closed set: the name itself, its spellings, its declared aliases. A similar name
counts only where a similarity threshold is asked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..answers import Named, parse_answer
from ..errors import ConfigError, RecordError
from ..labels import LabelSet, letters
from ..types import Message, Prediction, PreferencePair, Record, Report
from .bootstrap import Floats, interval, resampled_sums

OUTSIDE = "(outside the set)"
NOTHING = "(no answer)"

TeacherLists = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""For each case the classes that its teacher chose, best first, and those that it rejected."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one answer compares with the truth. Figures are per case; their means are the metrics of a report."""

    id: str
    group: str
    truth: str
    first: str
    figures: Mapping[str, float]
    confidence: float | None = None


def measure(
    predictions: Iterable[Prediction],
    truth: Iterable[Record],
    *,
    labels: LabelSet | None = None,
    tops: Sequence[int] = (1, 5, 10),
    lists: TeacherLists | None = None,
    car_weight: float = 0.5,
    similarity: float | None = None,
    bins: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """The report on predictions for the cases of `truth`; see `judge` for the figures and `summarise` for the rest."""
    outcomes = judge(
        predictions, truth, labels=labels, tops=tops, lists=lists, car_weight=car_weight, similarity=similarity
    )
    return summarise(outcomes, bins=bins, resamples=resamples, seed=seed)


def judge(
    predictions: Iterable[Prediction],
    truth: Iterable[Record],
    *,
    labels: LabelSet | None = None,
    tops: Sequence[int] = (1, 5, 10),
    lists: TeacherLists | None = None,
    car_weight: float = 0.5,
    similarity: float | None = None,
) -> list[Outcome]:
    """The figures of each case, in the order of `truth`. A name that an answer repeats counts at its first place only.

    top_k                 1 if a true label is among the first k names, else 0
    mean_reciprocal_rank  1 / the place of the first true label, 0 if there is none
    outside_set           share of the first max(tops) names that are no label of the closed set (only with `labels`)
    no_answer             1 if the answer holds no name at all, else 0

    With `lists`, T the k classes that the teacher chose, R the q that it rejected, and P the first k names of the answer:
    coverage              |P and T| / k        the share of the teacher's list that the answer covers
    avoidance             1 - |P and R| / q    the share of the rejected classes that the answer avoids
    car                   (1 + w) c a / (w c + a), 0 where c or a is 0; w = car_weight, c coverage, a avoidance
    """
    records = _by_id(truth, "true")
    answers = _by_id(predictions, "predicted")
    _check_same_cases(records, answers)
    if not tops or min(tops) < 1:
        raise ConfigError(f"tops {list(tops)}: whole numbers from 1 are wanted")
    known = labels or labels_of(records.values())
    judged = []
    for record in records.values():
        prediction = answers[record.id]
        true = _true_labels(record, known)
        names = _names(prediction, known, similarity)
        figures = _figures(names, true, tops, closed=labels is not None)
        if lists is not None:
            figures |= _list_figures(record.id, names, lists, known, car_weight)
        first = NOTHING if not names else names[0].label or OUTSIDE
        judged.append(Outcome(record.id, record.group or record.id, true[0], first, figures, _confidence(prediction)))
    return judged


def labels_of(records: Iterable[Record]) -> LabelSet:
    """The labels that cases have, where no closed set is given."""
    return LabelSet(sorted({name for record in records for name in _true_names(record)}), source="truth")


def lists_of_pairs(pairs: Iterable[PreferencePair], known: LabelSet) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """The names of the chosen and of the rejected answer of each pair, as `judge` takes them."""
    return {pair.id: (_listed(pair.chosen, known), _listed(pair.rejected, known)) for pair in pairs}


def _listed(answer: str | list[Message], known: LabelSet) -> list[str]:
    text = answer if isinstance(answer, str) else str(answer[-1]["content"])
    return [entry.text for entry in parse_answer(text, known)]


def _by_id(items: Iterable[Any], what: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for item in items:
        if item.id in table:
            raise RecordError(f"case {item.id!r} is {what} twice; keep one")
        table[item.id] = item
    return table


def _check_same_cases(records: Mapping[str, Record], answers: Mapping[str, Prediction]) -> None:
    if not records:
        raise RecordError("no cases to evaluate; the truth is empty")
    for have, want, words in (
        (answers, records, "has no prediction"),
        (records, answers, "has a prediction but no truth"),
    ):
        lacking = [name for name in want if name not in have]
        if lacking:
            others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise RecordError(f"case {lacking[0]!r}{others} {words}; give the same cases on both sides")


def _true_names(record: Record) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(([record.label] if record.label is not None else []) + list(record.labels)))
    if not names:
        raise RecordError(f"case {record.id!r}: has no label; only labelled cases can be evaluated")
    return names


def _true_labels(record: Record, known: LabelSet) -> list[str]:
    found = []
    for name in _true_names(record):
        label = known.find(name)
        if label is None:
            raise RecordError(
                f"case {record.id!r}: its label {name!r} is none of the {len(known)} labels; add it or declare an alias"
            )
        found.append(label)
    return found


def _names(prediction: Prediction, known: LabelSet, similarity: float | None) -> list[Named]:
    """The names of an answer, best first, each once."""
    if prediction.ranking:
        written = (str(entry["label"]) for entry in prediction.ranking)
        named = [Named(text, known.find(text, similarity)) for text in written]
    else:
        named = parse_answer(prediction.text or "", known, similarity)
    once: dict[str, Named] = {}
    for entry in named:
        once.setdefault(_key(entry), entry)
    return list(once.values())


def _key(entry: Named) -> str:
    """What makes two names the same: the label, or outside the set the letters."""
    return entry.label if entry.label is not None else f"\0{letters(entry.text)}"


def _figures(names: Sequence[Named], true: Sequence[str], tops: Sequence[int], closed: bool) -> dict[str, float]:
    place = next((place for place, entry in enumerate(names, start=1) if entry.label in true), None)
    figures = {f"top_{k}": float(place is not None and place <= k) for k in tops}
    figures["mean_reciprocal_rank"] = 1 / place if place else 0.0
    if closed:
        shown = names[: max(tops)]
        figures["outside_set"] = sum(entry.label is None for entry in shown) / max(len(shown), 1)
    figures["no_answer"] = float(not names)
    return figures


def _list_figures(
    case: str, names: Sequence[Named], lists: TeacherLists, known: LabelSet, weight: float
) -> dict[str, float]:
    if case not in lists:
        raise RecordError(f"case {case!r}: has no list of the teacher; rank this case too, or leave the lists out")
    chosen, rejected = (set(map(_key, (Named(name, known.find(name)) for name in side))) for side in lists[case])
    if not chosen or not rejected:
        raise RecordError(
            f"case {case!r}: the teacher's list is empty; at least one chosen and one rejected are wanted"
        )
    answered = set(map(_key, names[: len(chosen)]))
    coverage = len(answered & chosen) / len(chosen)
    avoidance = 1 - len(answered & rejected) / len(rejected)
    both = coverage > 0 and avoidance > 0
    car = (1 + weight) * coverage * avoidance / (weight * coverage + avoidance) if both else 0.0
    return {"coverage": coverage, "avoidance": avoidance, "car": car}


def _confidence(prediction: Prediction) -> float | None:
    """The probability that the answer gives its first name."""
    value = prediction.ranking[0].get("probability") if prediction.ranking else None
    return None if value is None else float(value)


def summarise(
    outcomes: Sequence[Outcome], *, bins: int = 10, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Report:
    """Means of all figures with bootstrap intervals over groups, calibration, a table per class, and the confusion.

    calibration_error is the expected calibration error: in `bins` equal steps of the first name's probability, the
    distance of mean probability and accuracy, weighted by cases. macro_top_1 is the mean of top-1 over classes.
    """
    if not outcomes or bins < 1:
        raise ConfigError(f"{len(outcomes)} outcomes and {bins} bins: at least one of each is wanted")
    names = list(outcomes[0].figures)
    values = np.array([[outcome.figures[name] for name in names] for outcome in outcomes])  # (N, M)
    groups = [outcome.group for outcome in outcomes]
    count = np.ones((len(outcomes), 1))
    sums = resampled_sums(np.hstack([values, count]), groups, resamples, seed)  # (R, M + 1)
    metrics = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
    shares = {name: len(set(groups)) for name in names if name.startswith("top_")}
    intervals = {name: interval(sums[:, m] / sums[:, -1], level, shares.get(name)) for m, name in enumerate(names)}
    rows, gaps = _calibration(outcomes, bins)
    if rows:
        metrics["calibration_error"] = float(np.abs(gaps[:, :-1].sum(axis=0)).sum() / gaps[:, -1].sum())
        drawn = resampled_sums(gaps, groups, resamples, seed)
        intervals["calibration_error"] = interval(
            np.abs(drawn[:, :-1]).sum(axis=1) / np.maximum(drawn[:, -1], 1), level
        )
    per_class = _per_class(outcomes)
    metrics["macro_top_1"] = sum(row["top_1"] for row in per_class) / len(per_class)
    metrics |= {"cases": float(len(outcomes)), "classes": float(len(per_class))}
    confusion = Counter((outcome.truth, outcome.first) for outcome in outcomes)
    counted = [
        (true, first, times) for (true, first), times in sorted(confusion.items(), key=lambda item: (-item[1], item[0]))
    ]
    return Report(metrics=metrics, intervals=intervals, per_class=per_class, confusion=counted, calibration=rows)


def _hit(outcome: Outcome) -> float:
    return float(outcome.figures["mean_reciprocal_rank"] == 1)


def _calibration(outcomes: Sequence[Outcome], bins: int) -> tuple[list[dict[str, float]], Floats]:
    """The table of non-empty bins; per case (N, bins + 1) confidence - accuracy in its bin, and whether it counts."""
    gaps = np.zeros((len(outcomes), bins + 1))
    members: dict[int, list[Outcome]] = defaultdict(list)
    for row, outcome in zip(gaps, outcomes, strict=True):
        if outcome.confidence is not None:
            which = min(int(outcome.confidence * bins), bins - 1)
            members[which].append(outcome)
            row[which], row[-1] = outcome.confidence - _hit(outcome), 1.0
    rows = [
        {
            "low": which / bins,
            "high": (which + 1) / bins,
            "count": float(len(inside)),
            "confidence": sum(outcome.confidence or 0.0 for outcome in inside) / len(inside),
            "accuracy": sum(map(_hit, inside)) / len(inside),
        }
        for which, inside in sorted(members.items())
    ]
    return rows, gaps


def _per_class(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per true label: its cases, its figures, how often it was named first and how often rightly."""
    members: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        members[outcome.truth].append(outcome)
    named = Counter(outcome.first for outcome in outcomes)
    shown = [name for name in outcomes[0].figures if name.startswith("top_") or name == "mean_reciprocal_rank"]
    rows = []
    for label, inside in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        figures = {name: sum(outcome.figures[name] for outcome in inside) / len(inside) for name in shown}
        figures["top_1"] = sum(map(_hit, inside)) / len(inside)
        right = sum(outcome.first == label for outcome in inside)
        precision = right / named[label] if named[label] else None
        rows.append(
            {"label": label, "cases": len(inside), **figures, "named_first": named[label], "precision": precision}
        )
    return rows
