"""`python -m mint.kernels.bench [--json] [--out FILE] [--only PART ...]`: the kernels on this machine, in one table.

First that they are right (against float64, and on a GPU that nothing waits for the device and a CUDA graph takes them),
then how fast: the median of rounds in which all sides take turns, beside the floor that the machine's own matrix product
sets, and beside the peers that are installed. A processor gets smaller sizes; there only the ratios mean anything.
What fails or is too slow is named in the table. Exit code 1 if a check or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .checks import GPU
from .measures import FIRST, PARTS
from .timing import Line, Part, Rates, apart, begun, drop

TOTAL = 470.0
"""Seconds of the whole run unless it is told otherwise: under 8 minutes."""
HERE = ("-m", "mint.kernels.bench")
COLUMNS = "{:<20}{:<32}{:<20}{:>10}{:>9}{:>10}{:>9}{:>9}{:>16}"
FORMS = {"ms": "{:.3f}", "to_ours": "{:.2f}", "floor_ms": "{:.3f}", "fraction": "{:.0%}", "mib": "{:.0f}"}


def run(
    parts: Mapping[str, Part],
    only: Sequence[str],
    size: str,
    command: Sequence[str],
    total: float = TOTAL,
    ahead: bool = GPU,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """The report of some parts in so many seconds; `command` is what starts this program anew for one of them. With `ahead`
    a part loads its packages while the one before it is measured, which on a processor would disturb that. `say` hears
    which part is at work."""
    report: dict[str, Any] = {"device": "unknown", "torch": torch.__version__, "size": size, "rates": None,
                              "checks": [], "lines": [], "failed": {}}  # fmt: skip
    every, stop = {**FIRST, **{name: parts[name] for name in only}}, time.monotonic() + total
    left, waiting = list(every), deque[Any]()
    try:
        for at, (name, part) in enumerate(every.items(), 1):
            say(f"bench {at}/{len(every)}: {name}")
            while left and len(waiting) < 1 + ahead:
                waiting.append(begun([*command, "--part", left.pop(0), "--size", size]))
            for line in lines_of(name, part, waiting.popleft(), report["rates"], stop - time.monotonic(), total):
                note(report, name, line)
    finally:
        for child in waiting:
            drop(child)
    return report


def lines_of(name: str, part: Part, child: Any, rates: Rates | None, left: float, total: float) -> Iterator[Line]:
    """What a part that was begun finds, or why it is not gone on with."""
    if name != "rates" and rates is None:
        drop(child)
        yield {"failed": "not started: the rates of this machine could not be measured"}
    elif left < 1:
        drop(child)
        yield {"failed": f"not started: the {total:.0f} s of the whole run were over"}
    else:
        yield from apart(child, json.dumps(rates), min(part.limit, left))


def note(report: dict[str, Any], part: str, line: Line) -> None:
    """Put a line of a part where it belongs."""
    if "rates" in line:
        report |= line
    elif "check" in line:
        report["checks"].append(line)
    elif "side" in line:
        report["lines"].append({"part": part, **line})
    else:
        report["failed"][part] = line["failed"]


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['device']}, torch {report['torch']}"]
    if report["rates"]:
        products, copies = (report["rates"][name] / 1e12 for name in ("products", "bytes"))
        lines.append(f"{products:.2f} TFLOP/s in products, {copies:.3f} TB/s in copies")
    for one in report["checks"]:
        verdict = "right" if one["right"] else "WRONG"
        lines.append(f"{verdict}  {one['check']:<36} error {one['error']:.1e}, at most {one['limit']:.0e}")
    lines.append(COLUMNS.format("bench", "case", "side", "ms", "to ours", "floor ms", "reached", "MiB", "per second"))
    lines += [_row(one) for one in report["lines"]]
    return "\n".join([*lines, *(f"FAILED  {name}: {why}" for name, why in report["failed"].items())])


def _row(one: Line) -> str:
    start = (one["bench"], one["case"], one["side"])
    if "failed" in one:
        return COLUMNS.format(*start, *[""] * 6).rstrip() + f"  FAILED  {one['failed']}"
    shown = [_shown(one[name], form) for name, form in FORMS.items()]
    rate = f"{one['per_second']:,.1f} {one['unit']}" if "unit" in one else ""
    return COLUMNS.format(*start, *shown, rate).rstrip()


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def faults(report: dict[str, Any]) -> list[str]:
    """The parts that came to no end, and the checks that found something wrong."""
    wrong = [f"{one['check']}: error {one['error']:.1e}" for one in report["checks"] if not one["right"]]
    return [*(f"{name}: {why}" for name, why in report["failed"].items()), *wrong]


def write(path: str | Path, report: dict[str, Any]) -> None:
    """Beside its place and renamed."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(path)


def main(parts: Mapping[str, Part] = PARTS, command: Sequence[str] = HERE, about: str | None = __doc__) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--size", choices=("gpu", "cpu", "tiny"), default="gpu" if GPU else "cpu",
                        help="tiny: whether every line runs")  # fmt: skip
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds of the whole run")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers that are worked on")
    parser.add_argument("--part", choices=[*FIRST, *parts], help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.part:
        part = {**FIRST, **parts}[words.part]
        part.load()
        torch.manual_seed(words.seed)
        for line in part.lines(words.size, json.loads(sys.stdin.readline())):
            print(json.dumps(line), flush=True)
        return 0
    report = run(parts, words.only, words.size, [*command, "--seed", str(words.seed)], words.total)
    if words.out:
        write(words.out, report)
    print(json.dumps(report) if words.json else table(report))
    return 1 if faults(report) else 0


if __name__ == "__main__":
    sys.exit(main())
