"""`evaluate`, `merge` and `bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..errors import WorkError
from .frame import command

if TYPE_CHECKING:  # for its types torch would be waited for
    from ..types import Report


@dataclass(frozen=True)
class Measured:
    """A report as it is printed: each metric with its interval."""

    report: Report
    out: str | None

    def as_dict(self) -> dict[str, Any]:
        return {**self.report.metrics, "intervals": self.report.intervals, **self._page()}

    def __str__(self) -> str:
        lines = [f"{name}: {_number(value)}{self._interval(name)}" for name, value in self.report.metrics.items()]
        return "\n".join([*lines, *(f"{name}: {place}" for name, place in self._page().items())])

    def _interval(self, name: str) -> str:
        low, high = self.report.intervals.get(name, (None, None))
        return "" if low is None or high is None else f" ({_number(low)} to {_number(high)})"

    def _page(self) -> dict[str, str]:
        return {} if self.out is None else {"out": self.out}


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


@command("seed")
@click.argument("predictions")
@click.option("--truth", required=True, help="The cases with their labels: a file or folder of any format.")
@click.option("--labels", help="The closed set, one label a line; names outside it are counted.")
@click.option(
    "--pairs",
    help="A teacher's pairs of the same cases: coverage of what it chose, avoidance of what it rejected, CAR.",
)
@click.option(
    "--image-folder",
    "image_folders",
    multiple=True,
    help="Folder in which pictures of --pairs may lie besides that of the file; may be given several times.",
)
@click.option(
    "--similarity",
    type=click.FloatRange(0, 1),
    help="How alike a name may be to a label to count as it; unless given, only its own spellings and aliases count.",
)
@click.option("--out", help="HTML page of the results.")
def evaluate(predictions: str, truth: str, out: str | None, **choices: Any) -> Measured:
    """Compare predictions with the truth: the metrics, with 95 % intervals by the bootstrap.

    \b
    Example:  python cli.py evaluate predictions.jsonl --truth cases.csv --out report.html
    Example:  python cli.py evaluate predictions.jsonl --truth cases.csv --pairs pairs.jsonl
    """
    from .. import pipeline
    from ..report import write_report

    report = pipeline.evaluate(predictions, truth=truth, **choices)
    if out is not None:
        write_report(out, {"predictions": report}, title="Predictions against the truth", student="predictions")
    return Measured(report, out)


@command("seed", "device", "dtype")
@click.option("--out", help="JSON file of the results.")
def bench(out: str | None, **choices: Any) -> Any:
    """Time the kernels and a training step on this machine against plain PyTorch, as ratios.

    \b
    Example:  python cli.py bench --out bench.json
    """
    from .. import bench as benches

    results = benches.results(out, **choices)
    if results.faults:
        raise WorkError(f"not all of the bench is right or came to its end: {'; '.join(results.faults)}")
    return results


@command("device", "dtype")
@click.option("--model", required=True, help="Folder or hub name of the base decoder.")
@click.option("--adapter", required=True, help="Adapter folder, ours or PEFT's.")
@click.option("--out", required=True, help="Folder of the merged checkpoint.")
def merge(model: str, adapter: str, out: str, **loading: Any) -> dict[str, Any]:
    """Write base + adapter as a plain checkpoint.

    \b
    Example:  python cli.py merge --model DIR --adapter runs/first/adapter --out merged
    """
    from ..decoders import merging

    return merging.merge(model, adapter, out, **loading)
