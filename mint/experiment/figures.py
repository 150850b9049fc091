"""From the answers of all systems and seeds to one table: means, intervals over cases and seeds, paired differences.

Shapes: S seeds, N cases. A system that draws nothing by the seed has one run, which stands for each seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation import judge
from ..evaluation.bootstrap import Floats, crossed_means, interval
from ..labels import LabelSet
from ..types import Prediction, Record
from .arms import ARMS
from .tasks import Task

FIGURES = ("top_1", "top_10", "mean_reciprocal_rank")
RESAMPLES = 2000
HEADS = {"top_1": "top-1, %", "top_10": "top-10, %"}

Runs = Mapping[int, Sequence[Prediction]]
"""The answers of each seed."""


def case_figures(
    runs: Runs, judged: Sequence[Record], classes: Sequence[str], seeds: Sequence[int]
) -> dict[str, Floats]:
    """Each figure of each run and case: name -> (S, N)."""
    known = LabelSet(classes)
    found = {seed: judge(answers, judged, labels=known, tops=(1, 10)) for seed, answers in runs.items()}
    rows = [found[seed] if seed in found else next(iter(found.values())) for seed in seeds]
    return {name: np.array([[outcome.figures[name] for outcome in row] for row in rows]) for name in FIGURES}


def with_interval(values: Floats, groups: Sequence[str], share: bool = False) -> dict[str, Any]:
    """The mean of (S, N), its 95 % interval over cases and seeds, and the mean of each seed. A `share` of all or none has
    an interval too, as so many groups allow; a difference that is always 0 has none."""
    drawn = crossed_means(values, groups, RESAMPLES, seed=0)
    low, high = interval(drawn, groups=len(set(groups)) if share else None)
    return {"value": float(values.mean()), "interval": [low, high], "seeds": values.mean(1).tolist()}


@dataclass(frozen=True)
class Table:
    """Systems by name, each with its figures, and the student less each of the others, case by case and seed by seed."""

    rows: Mapping[str, Mapping[str, Any]]
    student: str
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def gap_closed(self, best: Mapping[str, float]) -> dict[str, float]:
        """How much of the way from the base to the best possible the student has gone."""
        base, student = self.rows["base"], self.rows[self.student]
        way = {key: best[key] - base[key]["value"] for key in HEADS}
        return {key: (student[key]["value"] - base[key]["value"]) / way[key] for key in HEADS if way[key] > 0}

    def lines(self, ceilings: Mapping[str, Mapping[str, float]]) -> list[str]:
        """The table as text, in percent."""
        lines = [_line("", HEADS.values())]
        lines += [_line(ARMS[name].title, (_cell(row[key]) for key in HEADS)) for name, row in self.rows.items()]
        lines += [_line(name, (f"{100 * best[key]:.1f}{'':16}" for key in HEADS)) for name, best in ceilings.items()]
        if self.differences:
            lines += [
                "",
                _line(f"{ARMS[self.student].title} less", (head.replace("%", "points") for head in HEADS.values())),
            ]
        return lines + [
            _line(f"  {ARMS[name].title}", (_cell(row[key], "+") for key in HEADS))
            for name, row in self.differences.items()
        ]


def _line(name: str, cells: Any) -> str:
    return f"{name:36}" + "".join(f"{cell:>24}" for cell in cells)


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    low, high = figure["interval"]
    return f"{100 * figure['value']:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def table(task: Task, answers: Mapping[str, Runs], seeds: Sequence[int]) -> Table:
    """The table of some systems; the student is MINT where it is among them, else the last that was trained."""
    figures = {name: case_figures(runs, task.judged, task.classes, seeds) for name, runs in answers.items()}
    rows = {
        name: {key: with_interval(values, task.groups, share=True) for key, values in own.items()}
        for name, own in figures.items()
    }
    trained = [name for name in rows if ARMS[name].trains]
    student = "orpo" if "orpo" in rows else (trained or list(rows))[-1]
    less = {
        name: {key: with_interval(figures[student][key] - own[key], task.groups) for key in FIGURES}
        for name, own in figures.items()
        if name != student
    }
    return Table(rows, student, less)
