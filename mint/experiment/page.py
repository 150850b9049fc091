"""The result of an experiment, told three times from the same figures: text, experiment.json, experiment.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..evaluation import measure
from ..files import write_json
from ..labels import LabelSet
from ..report import write_report
from ..report.cases import shown_cases
from ..report.charts import line_chart
from ..report.markup import card, percent, section, text
from ..training.runs import read_metrics
from ..types import Report
from .arms import ARMS, Bench
from .figures import HEADS, Table
from .study import Outcomes, Plan, run

NOTE_CEILING = "best possible, note alone"
_SEEDS = "Intervals: 95 % bootstrap over cases (of one publication together) and seeds."
_WRITTEN = (
    "The same systems judged by the list that each writes freely, where nothing keeps it to the closed set. "
    "One that learnt the true label alone writes a single name."
)
_FIRST = "Calibration, confusion and cases are those of the first seed."


@dataclass(frozen=True)
class Told:
    """What came of an experiment and where it lies."""

    bench: Bench
    plan: Plan
    found: Outcomes

    def as_dict(self) -> dict[str, Any]:
        task, found = self.bench.task, self.found
        named = {name: {"title": ARMS[name].title, **row} for name, row in found.table.rows.items()}
        return {
            "task": task.name,
            "remark": task.remark,
            "judged": len(task.judged),
            "groups": len(set(task.groups)),
            "classes": len(task.classes),
            "seeds": list(self.plan.seeds),
            "systems": named,
            "ceilings": dict(task.ceilings),
            "student": found.table.student,
            "differences": dict(found.table.differences),
            "written": dict(found.written.rows),
            "gap_closed": self.gap_closed(),
            "varied": {name: [_point(value, of) for value, of in points] for name, points in found.varied.items()},
            "train_sizes": [_point(size, of) for size, of in found.curve],
            "tuned": dict(found.tuned),
            "seconds": dict(found.seconds),
            "settings": self.bench.settings.as_dict(),
            "pairs": dict(self.bench.choices),
            "labelled": self.bench.labelled,
        }

    def gap_closed(self) -> dict[str, float]:
        best = self.bench.task.ceilings.get(NOTE_CEILING)
        return self.found.table.gap_closed(best) if best and "base" in self.found.table.rows else {}

    def __str__(self) -> str:
        task, found = self.bench.task, self.found
        seeds = f"{len(self.plan.seeds)} seed{'s' if len(self.plan.seeds) > 1 else ''}"
        lines = [
            f"{len(task.judged):,} cases of {len(set(task.groups)):,} groups, {len(task.classes)} classes, {seeds}"
        ]
        if self.bench.labelled is not None:
            lines += [f"of the cases to learn from, {self.bench.labelled:,} are diagnosed"]
        lines += [*found.table.lines(task.ceilings), "", "The list as it is written, not ranked:"]
        lines += [*found.written.lines({}), "", *self._closed(), _SEEDS, task.remark, *self._tuned()]
        for name, points in [*found.varied.items(), ("training cases", found.curve)]:
            lines += ["", *_varied_lines(name, points)] if points else []
        files = [self.bench.folder / name for name in ("experiment.json", "experiment.html", "predictions")]
        return "\n".join([*(line for line in lines), "", *map(str, files)])

    def _closed(self) -> list[str]:
        way = [f"{share:.0%} in {HEADS[key].split(',')[0]}" for key, share in self.gap_closed().items()]
        title = ARMS[self.found.table.student].title
        return [f"{title} closes {', '.join(way)} of the distance from base to the best of the note."] if way else []

    def _tuned(self) -> list[str]:
        return [
            f"{ARMS[name].title}: of {len(entry['tried'])} settings tried, lr {entry['taken']['lr']:g} and "
            f"{entry['taken']['epochs']:g} epochs were taken"
            for name, entry in self.found.tuned.items()
        ]


def _point(value: Any, of: Table) -> dict[str, Any]:
    return {"value": value, "systems": dict(of.rows)}


def _varied_lines(name: str, points: Sequence[tuple[Any, Table]]) -> list[str]:
    """A line for each value and system."""
    lines = [f"{name:36}" + "".join(f"{head:>24}" for head in HEADS.values())]
    for value, of in points:
        for line, row in zip(of.lines({})[1:], of.rows, strict=False):
            lines.append(f"{value!s:>10}  {ARMS[row].title:24}" + line[36:])
    return lines


def tell(bench: Bench, plan: Plan) -> Told:
    """Run the plan and write what came of it."""
    told = Told(bench, plan, run(bench, plan))
    write_json(bench.folder / "experiment.json", told.as_dict())
    _write_page(told)
    return told


def _write_page(told: Told) -> None:
    bench, found = told.bench, told.found
    student = ARMS[found.table.student].title
    first = {ARMS[name].title: next(iter(runs.values())) for name, runs in found.answers.items()}
    reports = {ARMS[name].title: _report(told, name) for name in found.table.rows}
    reports[student] = replace(reports[student], cases=shown_cases(bench.task.judged, first))
    names = ("model", "lr", "epochs", "batch_size", "beta", "nll", "first_weight", "rank")
    about = {name.replace("_", " "): getattr(bench.settings, name) for name in names}
    write_report(
        bench.folder / "experiment.html",
        reports,
        title="What a student of the note learns from a teacher of note and photo",
        student=student,
        base=ARMS["base"].title if "base" in found.table.rows else None,
        teacher=ARMS["teacher"].title,
        ceilings=bench.task.ceilings,
        goal=NOTE_CEILING if bench.task.ceilings else None,
        curve=read_metrics(bench.folder / "runs" / f"{found.table.student}-{told.plan.seeds[0]}" / "metrics.jsonl"),
        about={
            "cases": bench.task.name,
            "diagnosed": bench.labelled or "all",
            **about,
            **bench.choices,
            "seeds": len(told.plan.seeds),
        },
        remark=f"{bench.task.remark} {_SEEDS} {_FIRST}",
        sections=_sections(found),
    )


def _report(told: Told, name: str) -> Report:
    """The report of one system: the first seed's, with the figures and intervals of all seeds in their places."""
    runs, row, task = told.found.answers[name], told.found.table.rows[name], told.bench.task
    first = measure(next(iter(runs.values())), task.judged, labels=LabelSet(task.classes), tops=(1, 10))
    values = {key: figure["value"] for key, figure in row.items()}
    intervals = {key: (figure["interval"][0], figure["interval"][1]) for key, figure in row.items()}
    return replace(first, metrics={**first.metrics, **values}, intervals={**first.intervals, **intervals})


def _sections(found: Outcomes) -> str:
    """What a report of one run has not: differences, variations, what was tuned."""
    student = ARMS[found.table.student].title
    less = {ARMS[name].title: row for name, row in found.table.differences.items()}
    parts = [
        section(f"{student} less the others", _figures_table(less), "Points of percent, case by case, seed by seed."),
        section(
            "As written", _figures_table({ARMS[name].title: row for name, row in found.written.rows.items()}), _WRITTEN
        ),
    ]
    for name, points in [*found.varied.items(), ("training cases", found.curve)]:
        if points:
            parts.append(section(f"By {name}", _curves(name, points)))
    if found.tuned:
        parts.append(section("Tuning", _tuning(found.tuned), "On a validation part alone, the same tries for each."))
    return "\n".join(parts)


def _figures_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{words.split(",")[0]}</th>' for words in HEADS.values())
    body = ""
    for name, row in rows.items():
        cells = "".join(f"<td>{_value(row[key])}</td>" for key in HEADS)
        body += f'<tr><th scope="row">{text(name)}</th>{cells}</tr>'
    return _plain(head, body)


def _plain(head: str, body: str) -> str:
    head = f'<thead><tr><th scope="col" class="name"></th>{head}</tr></thead>'
    return f'<div class="scroll"><table class="plain results">{head}<tbody>{body}</tbody></table></div>'


def _value(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{percent(figure['value'])}<small>{percent(low)} to {percent(high)}</small>"


def _curves(name: str, points: Sequence[tuple[Any, Table]]) -> str:
    """Top-1 and top-10 by the value where it is a number, and the figures with their intervals."""
    drawings = ""
    numbers = all(isinstance(value, int | float) for value, _ in points) and len(points) > 1
    for key, head in HEADS.items() if numbers else ():
        series = {
            ARMS[arm].title: [(float(value), 100 * of.rows[arm][key]["value"]) for value, of in points]
            for arm in points[0][1].rows
        }
        drawings += card(head, line_chart(series, name))
    rows = {f"{name} {value}: {ARMS[arm].title}": row for value, of in points for arm, row in of.rows.items()}
    return f'<div class="grid">{drawings}</div>{_figures_table(rows)}'


def _tuning(tuned: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{words}</th>' for words in ("lr", "epochs", "top-1, %", "top-10, %"))
    body = ""
    for name, entry in tuned.items():
        for point in entry["tried"]:
            taken = all(point[key] == value for key, value in entry["taken"].items())
            cells = f"<td>{point['lr']:g}</td><td>{point['epochs']:g}</td>"
            cells += "".join(f"<td>{percent(point[key])}</td>" for key in ("top_1", "top_10"))
            title = f"{ARMS[name].title}{' (taken)' if taken else ''}"
            body += f'<tr><th scope="row">{text(title)}</th>{cells}</tr>'
    return _plain(head, body)
