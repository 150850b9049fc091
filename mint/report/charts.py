"""Charts as HTML and SVG fragments: forest plot, line chart, reliability diagram, confusion matrix.

Pure functions of numbers and names. Every name is escaped; colours come from the page's style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .markup import attribute, percent, text

Point = tuple[float, float]
Interval = tuple[float, float]

WIDTH, HEIGHT = 300, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 10, 40
_MOST_POINTS = 240


# ---- forest plot ----


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One line of a forest plot: a share of 0..1 with its interval; `kind` is the class that colours it."""

    name: str
    share: float
    interval: Interval | None = None
    kind: str = "other"


def forest(rows: Sequence[ForestRow], ceilings: Mapping[str, float]) -> str:
    """Shares as dots with intervals on one scale of 0 to 100; a ceiling is a dashed line through all rows."""
    lines = "".join(
        f'<i class="ceiling c{n}" style="left:{_at(share)}"></i>' for n, share in enumerate(ceilings.values())
    )
    ticks = "".join(f'<span style="left:{tick}%">{tick}</span>' for tick in (0, 25, 50, 75, 100))
    key = "".join(
        f'<li><i class="dash c{n}"></i>{text(name)} <b>{percent(share)}</b></li>'
        for n, (name, share) in enumerate(ceilings.items())
    )
    body = "".join(_forest_row(row, lines) for row in rows)
    axis = f'<div class="row axis"><span></span><span class="scale">{ticks}</span><span></span></div>'
    return f'<div class="forest">{body}{axis}</div>' + (f'<ul class="legend">{key}</ul>' if key else "")


def _forest_row(row: ForestRow, lines: str) -> str:
    whisker, words = "", ""
    if row.interval is not None:
        low, high = row.interval
        whisker = f'<i class="whisker" style="left:{_at(low)};width:{_at(high - low)}"></i>'
        words = f" <small>{percent(low)} to {percent(high)}</small>"
    track = f'<span class="track">{lines}{whisker}<i class="dot" style="left:{_at(row.share)}"></i></span>'
    value = f'<span class="value"><b>{percent(row.share)}</b>{words}</span>'
    return f'<div class="row {attribute(row.kind)}"><span class="name">{text(row.name)}</span>{track}{value}</div>'


def _at(share: float) -> str:
    return f"{percent(min(max(share, 0.0), 1.0), 2)}%"


# ---- drawings with two axes ----


@dataclass(frozen=True, slots=True)
class Axes:
    """Round numbers along both sides of a drawing, and the way from a point to its place between them."""

    across: Sequence[float]
    up: Sequence[float]
    height: int = HEIGHT

    def place(self, point: Point) -> Point:
        x = (point[0] - self.across[0]) / (self.across[-1] - self.across[0])
        y = (point[1] - self.up[0]) / (self.up[-1] - self.up[0])
        return _LEFT + x * (WIDTH - _LEFT - _RIGHT), self.height - _BOTTOM - y * (self.height - _TOP - _BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join("{:.1f} {:.1f}".format(*self.place(point)) for point in points)

    def drawn(self, name: str, below: str, inside: str) -> str:
        """The whole drawing: grid, numbers, the words below, and what is drawn inside."""
        grid = "".join(self._level(value) for value in self.up)
        y = self.height - _BOTTOM + 16
        numbers = "".join(
            f'<text x="{self.place((value, 0))[0]:.1f}" y="{y}" class="mid">{number(value)}</text>'
            for value in self.across
        )
        words = (
            f'<text x="{(WIDTH + _LEFT - _RIGHT) / 2}" y="{self.height - 4}" class="mid word">{attribute(below)}</text>'
        )
        frame = f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{attribute(name)}">'
        return f"{frame}{grid}{numbers}{words}{inside}</svg>"

    def _level(self, value: float) -> str:
        y = self.place((self.across[0], value))[1]
        line = f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{number(value)}</text>'


def scale(low: float, high: float, steps: int = 4) -> list[float]:
    """Round numbers at equal distances (1, 2 or 5 times a power of ten) that enclose low and high."""
    if not high - low > 1e-12 * max(abs(low), abs(high), 1e-300):
        room = max(abs(low), abs(high)) if abs(high) > 1e-300 else 1.0  # a smaller one has no half
        low, high = low - room / 2, high + room / 2
    rough = (high - low) / steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10, 20) if power * times >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(tick * step, 12) if abs(step) > 1e-9 else tick * step for tick in range(first, last + 1)]


def number(value: float) -> str:
    """A short number for an axis: 0.25, 1,200, 30k, 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most a few hundred points: the means of equal stretches, so that no stretch is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    bounds = [n * len(points) // _MOST_POINTS for n in range(_MOST_POINTS + 1)]
    stretches = [points[begin:end] for begin, end in pairwise(bounds)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]


def line_chart(series: Mapping[str, Sequence[Point]], below: str, zero: bool = False) -> str:
    """Lines over steps with a legend; with `zero`, the level 0 is always in sight and drawn."""
    lines = {name: thinned(points) for name, points in series.items() if points}
    if not lines:
        return ""
    xs, ys = ([point[side] for points in lines.values() for point in points] for side in (0, 1))
    axes = Axes(scale(min(xs), max(xs)), scale(min([*ys, 0.0] if zero else ys), max([*ys, 0.0] if zero else ys)))
    inside = f'<path class="zero" d="{axes.path([(axes.across[0], 0), (axes.across[-1], 0)])}"/>' if zero else ""
    inside += "".join(f'<path class="line l{n}" d="{axes.path(points)}"/>' for n, points in enumerate(lines.values()))
    inside += "".join(_end(axes.place(points[-1]), n) for n, points in enumerate(lines.values()))
    legend = "".join(
        f'<li><i class="swatch l{n}"></i>{text(name)} <b>{number(float(f"{points[-1][1]:.3g}"))}</b></li>'
        for n, (name, points) in enumerate(lines.items())
    )
    return f'<ul class="legend">{legend}</ul>' + axes.drawn(f"{', '.join(lines)} by {below}", below, inside)


def _end(place: Point, which: int) -> str:
    return f'<circle class="point l{which}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3"/>'


def reliability(rows: Sequence[Mapping[str, float]]) -> str:
    """Accuracy against stated probability, bin by bin; on the diagonal a probability means what it says.

    A dot's area follows the number of its cases; the bar from it to the diagonal is the gap.
    """
    axes = Axes([0, 25, 50, 75, 100], [0, 25, 50, 75, 100], height=WIDTH)
    most = max(row["count"] for row in rows)
    inside = f'<path class="diagonal" d="{axes.path([(0, 0), (100, 100)])}"/>'
    for row in rows:
        stated, right = 100 * row["confidence"], 100 * row["accuracy"]
        x, y = axes.place((stated, right))
        radius = 3 + 7 * math.sqrt(row["count"] / most)
        words = f"{row['count']:.0f} cases: stated {stated:.1f} %, right {right:.1f} %"
        inside += f'<path class="gap" d="{axes.path([(stated, stated), (stated, right)])}"/>'
        inside += f'<circle class="bin" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{words}</title></circle>'
    return axes.drawn("How often the first name is right, by its stated probability", "stated probability, %", inside)


# ---- confusion ----


def confusion_matrix(counts: Sequence[tuple[str, str, int]], most: int = 12) -> str:
    """True labels down, first names across, for the labels that are confused most; shares of each row by depth."""
    names = _most_confused(counts, most)
    table = {(true, first): times for true, first, times in counts}
    totals: dict[str, int] = {}
    for true, _, times in counts:
        totals[true] = totals.get(true, 0) + times
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    rows = ""
    for true in names:
        if true in totals:
            cells = "".join(_cell(true, first, table.get((true, first), 0), totals[true]) for first in names)
            rows += f'<tr><th scope="row">{text(true)}</th>{cells}</tr>'
    return f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _most_confused(counts: Sequence[tuple[str, str, int]], most: int) -> list[str]:
    """Labels by how many cases they lose or gain wrongly; where nothing is confused, by how many they have."""
    wrong: dict[str, int] = {}
    for true, first, times in counts:
        for name in {true, first}:
            wrong[name] = wrong.get(name, 0) + (times if true != first else 0)
    return sorted(sorted(wrong, key=lambda name: -wrong[name])[:most])


def _cell(true: str, first: str, times: int, total: int) -> str:
    kind = "right" if true == first else "wrong"
    title = attribute(f"{true} named {first}: {times} of {total}")
    shade = f' style="--share:{times / total:.3f}"' if times else ""
    return f'<td class="{kind}"{shade} title="{title}">{times or ""}</td>'
