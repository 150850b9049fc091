"""Reports and a training curve -> one self-contained HTML page: no script, and nothing is fetched from anywhere.

Whatever comes from users (names, notes, answers, settings) is escaped, and the page forbids itself any foreign content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_text
from ..types import Report
from .charts import ForestRow, Point, forest, line_chart
from .closeup import calibration_section, cases_section, classes_section, confusion_section
from .markup import attribute, card, percent, section, text
from .stylesheet import STYLE

_CURVES: tuple[tuple[str, str, Mapping[str, str], bool], ...] = (
    ("Loss", "", {"loss": "loss", "nll_loss": "negative log-likelihood", "eval_loss": "held-out loss"}, False),
    (
        "Chosen against rejected",
        "Mean log odds of the chosen answer; above 0 it is the likelier one.",
        {"log_odds_chosen": "log odds"},
        True,
    ),
    ("Speed", "", {"tokens_per_second": "tokens per second"}, True),
)
_WORDS = {
    "top_1": ("Top-k", "Share of cases whose true label is among the first k names; Top-1: named first."),
    "mean_reciprocal_rank": ("MRR", "Mean reciprocal rank: the mean of 1 / the place of the true label."),
    "outside_set": ("Outside", "Share of the names given that are not in the closed set."),
    "calibration_error": (
        "Calibration",
        "Expected calibration error: mean distance between the first name's stated probability and its accuracy.",
    ),
    "coverage": ("Coverage", "Share of the teacher's first k classes that the answer names among its first k."),
    "avoidance": ("Avoidance", "Share of the classes that the teacher ranks last which the answer leaves out."),
    "car": ("CAR", "Coverage c and avoidance a in one figure: (1 + w) c a / (w c + a)."),
}
_COLUMNS: Mapping[str, tuple[str, bool]] = {
    "mean_reciprocal_rank": ("MRR", False),
    "outside_set": ("Outside, %", True),
    "calibration_error": ("Calibration", False),
    "coverage": ("Coverage, %", True),
    "avoidance": ("Avoidance, %", True),
    "car": ("CAR", False),
}


def write_report(path: str | Path, reports: Mapping[str, Report], **parts: Any) -> None:
    """Write the page of `report_page` to a file, beside and renamed."""
    write_text(path, report_page(reports, **parts))


def report_page(
    reports: Mapping[str, Report],
    *,
    title: str,
    student: str,
    base: str | None = None,
    teacher: str | None = None,
    ceilings: Mapping[str, Mapping[str, float]] | None = None,
    goal: str | None = None,
    curve: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, Any] | None = None,
    remark: str = "",
    sections: str = "",
) -> str:
    """The page as text. `reports` has one report per system, in reading order; `student` names the one shown in full.

    `ceilings` holds what no system can pass ({"note alone": {"top_1": 0.8}}), `goal` the one that the student is
    measured against; `curve` the rows of metrics.jsonl, `about` settings to print, `remark` a caution for the reader
    (whether photos are simulated, for instance). The student's `Report.cases` are shown at the end. `sections` are
    further parts of the page below the results, made with markup.py.
    """
    if student not in reports or any(name not in reports for name in (base, teacher) if name is not None):
        raise ConfigError(f"report: the student {student!r}, base and teacher must be among {', '.join(reports)}")
    bounds = dict(ceilings or {})
    kinds = dict.fromkeys(reports, "other")
    kinds |= {name: kind for name, kind in ((teacher, "teacher"), (base, "base"), (student, "student")) if name}
    shown = reports[student]
    parts = [
        _header(title, _summary(reports, student, base, bounds, goal), about or {}, remark),
        "<main>",
        _results(reports, kinds, bounds),
        sections,
        _training(curve),
        calibration_section(shown),
        confusion_section(shown),
        classes_section(shown),
        cases_section(shown, kinds),
        _words_section(reports),
        "</main>",
        "<footer>Made by MINT. A research tool: not for diagnosis.</footer>",
    ]
    return _document(title, "\n".join(part for part in parts if part))


def _document(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{attribute(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _header(title: str, summary: str, about: Mapping[str, Any], remark: str) -> str:
    rows = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in about.items())
    return (
        f'<header><p class="kicker">MINT report</p><h1>{text(title)}</h1><p class="lead">{summary}</p>'
        + (f'<p class="remark">{text(remark)}</p>' if remark else "")
        + (f'<dl class="about">{rows}</dl>' if rows else "")
        + "</header>"
    )


def _summary(
    reports: Mapping[str, Report],
    student: str,
    base: str | None,
    ceilings: Mapping[str, Mapping[str, float]],
    goal: str | None,
) -> str:
    """One sentence with the result: the student, its interval, where it started, and how much of the way it went."""
    report = reports[student]
    share = report.metrics["top_1"]
    words = f"{text(student)}: the right label is named first in <b>{percent(share)} %</b>{_between(report, 'top_1')}"
    words += f" of {report.metrics['cases']:,.0f} cases"
    if base is None:
        return words + "."
    start, bound = reports[base].metrics["top_1"], ceilings.get(goal or "", {}).get("top_1", 0.0)
    words += f"; {text(base)}: in {percent(start)} %."
    if bound > start:
        way = percent((share - start) / (bound - start), 0)
        words += f" From there to the ceiling ({text(goal)}, {percent(bound)} %) it has gone {way} % of the way."
    return words


def _between(report: Report, name: str) -> str:
    if name not in report.intervals:
        return ""
    low, high = report.intervals[name]
    return f" ({percent(low)} to {percent(high)})"


def _tops(report: Report) -> list[str]:
    """top_1, top_5, ... in the order of their numbers."""
    return sorted((name for name in report.metrics if name.startswith("top_")), key=lambda name: int(name[4:]))


def _results(
    reports: Mapping[str, Report], kinds: Mapping[str, str], ceilings: Mapping[str, Mapping[str, float]]
) -> str:
    tops = sorted({name for report in reports.values() for name in _tops(report)}, key=lambda name: int(name[4:]))
    charts = ""
    for top in dict.fromkeys([tops[0], tops[-1]]):
        rows = [
            ForestRow(name, report.metrics[top], report.intervals.get(top), kinds[name])
            for name, report in reports.items()
            if top in report.metrics
        ]
        bounds = {name: figures[top] for name, figures in ceilings.items() if top in figures}
        charts += card(_top_name(top), forest(rows, bounds))
    intro = "Right answers in percent of the cases, with 95 % intervals."
    return section("Results", f'<div class="grid one">{charts}</div>{_table(reports, kinds, ceilings, tops)}', intro)


def _top_name(top: str) -> str:
    return "Right label first" if top == "top_1" else f"Right label among the first {int(top[4:])}"


def _table(
    reports: Mapping[str, Report],
    kinds: Mapping[str, str],
    ceilings: Mapping[str, Mapping[str, float]],
    tops: Sequence[str],
) -> str:
    present = {name for report in reports.values() for name in report.metrics}
    columns = {top: (f"Top-{int(top[4:])}, %", True) for top in tops}
    columns |= {name: column for name, column in _COLUMNS.items() if name in present}
    head = "".join(f'<th scope="col">{words}</th>' for words, _ in columns.values())
    body = ""
    for name, report in reports.items():
        cells = "".join(_table_cell(report.metrics, report.intervals, key, *columns[key]) for key in columns)
        body += f'<tr class="{kinds[name]}"><th scope="row">{text(name)}</th>{cells}</tr>'
    for name, figures in ceilings.items():
        cells = "".join(_table_cell(figures, {}, key, *columns[key]) for key in columns)
        body += f'<tr class="ceiling"><th scope="row">{text(name)}</th>{cells}</tr>'
    head = f'<thead><tr><th scope="col" class="name"></th>{head}</tr></thead>'
    return f'<div class="scroll"><table class="plain results">{head}<tbody>{body}</tbody></table></div>'


def _table_cell(
    figures: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], key: str, _: str, is_share: bool
) -> str:
    def shown(value: float) -> str:
        return percent(value) if is_share else f"{value:.3f}"

    if key not in figures:
        return '<td class="soft">\N{EN DASH}</td>'
    between = (
        f"<small>{shown(intervals[key][0])}\N{EN DASH}{shown(intervals[key][1])}</small>" if key in intervals else ""
    )
    return f"<td>{shown(figures[key])}{between}</td>"


def _training(curve: Sequence[Mapping[str, Any]]) -> str:
    cards = ""
    for title, intro, names, zero in _CURVES:
        series = {words: _points(curve, key) for key, words in names.items()}
        drawing = line_chart(series, "step", zero)
        cards += card(title, drawing, intro)
    return section("Training", f'<div class="grid">{cards}</div>' if cards else "")


def _points(curve: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of the rows that have both as finite numbers."""
    rows = (row for row in curve if _is_number(row.get("step")) and _is_number(row.get(key)))
    return [(float(row["step"]), float(row[key])) for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _words_section(reports: Mapping[str, Report]) -> str:
    present = {name for report in reports.values() for name in report.metrics}
    words = [entry for name, entry in _WORDS.items() if name in present]
    if any(report.intervals for report in reports.values()):
        words.append(
            (
                "Interval",
                "95 % bootstrap over cases, those of one group together; of a share of 0 or 100 %, the exact binomial one.",
            )
        )
    rows = "".join(f"<dt>{name}</dt><dd>{attribute(meaning)}</dd>" for name, meaning in words)
    return section("How to read this", f'<dl class="words">{rows}</dl>')
