"""`evaluate`, `merge` and `bench`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import WorkError
from .frame import command


@command("seed")
@click.argument("predictions")
@click.option("--truth", required=True, help="The cases with their labels: a file or folder of any format.")
@click.option("--labels", help="The closed set, one label a line; names outside it are counted.")
@click.option("--out", help="HTML page of the results.")
def evaluate(predictions: str, truth: str, labels: str | None, out: str | None, seed: int) -> dict[str, Any]:
    """Compare predictions with the truth.

    \b
    Example:  python cli.py evaluate predictions.jsonl --truth cases.csv --out report.html
    """
    from .. import pipeline
    from ..report import write_report

    report = pipeline.evaluate(predictions, truth=truth, labels=labels, seed=seed)
    if out is not None:
        write_report(out, {"predictions": report}, title="Predictions against the truth", student="predictions")
    return {**report.metrics, **({} if out is None else {"out": out})}


@command()
@click.option("--out", help="JSON file of the results.")
def bench(out: str | None) -> dict[str, Any]:
    """Time the kernels on this machine against plain PyTorch, as ratios.

    \b
    Example:  python cli.py bench --out bench.json
    """
    from importlib import import_module

    module = import_module("mint.kernels.bench")
    results: dict[str, Any] = module.results(out)
    if not module.good(results):
        raise WorkError(f"not all of the bench is right or came to its end:\n{module.table(results)}")
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
