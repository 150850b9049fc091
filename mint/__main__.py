"""The command line: `python -m mint COMMAND`. A command turns words into a call of `pipeline` and its result into words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from .config import AlignSettings
from .errors import ConfigError, MintError, WorkError
from .progress import say, set_quiet

Command = Callable[..., Any]
_KINDS: dict[str, Any] = {"str": str, "int": int, "float": float}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mint-transfer", prog_name="mint", message="%(prog)s %(version)s")
def cli() -> None:
    """Moves what a multimodal model knows into a decoder that sees one modality, by preference optimisation."""


def main() -> None:
    """Entry point of `mint`, `python -m mint` and `python cli.py`."""
    cli(prog_name="mint")


def command(*names: str) -> Callable[[Command], click.Command]:
    """A command with the options that all have; its return value is printed, its errors become one line."""

    def decorate(body: Command) -> click.Command:
        @wraps(body)
        def guarded(quiet: bool, as_json: bool, traceback: bool, **words: Any) -> None:
            set_quiet(quiet)
            try:
                _show(body(**words), as_json)
            except MintError as error:
                if traceback:
                    raise
                click.echo(f"mint: {' '.join(str(error).split())}", err=True)
                sys.exit(1 if isinstance(error, WorkError) else 2)

        run: Command = guarded
        for option in (
            click.option("--quiet", is_flag=True, help="No progress and no remarks on stderr."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
            click.option("--traceback", is_flag=True, help="On an error, the whole traceback."),
        ):
            run = option(run)
        for name in names:
            run = _SHARED[name](run)
        return cli.command(name=body.__name__.rstrip("_"))(run)

    return decorate


_SHARED: dict[str, Callable[[Command], Command]] = {
    "seed": click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
    "device": click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
    "dtype": click.option("--dtype", default="auto", show_default=True, help="auto, float32 or bfloat16."),
    "date": click.option("--date", help="The date in the chat template, like '26 Jul 2024'; today's unless given."),
    "skip_bad": click.option("--skip-bad", is_flag=True, help="Leave bad rows out and list them on stderr."),
}


def _show(result: Any, as_json: bool) -> None:
    """A result on stdout: an object as lines of name and value, rows one by one, or all of it as one JSON object."""
    if hasattr(result, "as_dict"):
        click.echo(json.dumps(result.as_dict(), ensure_ascii=False) if as_json else str(result))
    elif isinstance(result, dict):
        lines = [f"{name}: {value}" for name, value in result.items()]
        click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines))
    elif isinstance(result, Iterator):
        rows = list(result) if as_json else result
        click.echo(json.dumps({"rows": rows}, ensure_ascii=False)) if as_json else _print_rows(rows)


def _print_rows(rows: Iterable[Any]) -> None:
    for row in rows:
        click.echo(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))


def _settings(body: Command) -> Command:
    """An option for every setting of a run. One that is not given stays None, so that --config can fill it."""
    for setting in reversed(fields(AlignSettings)):
        kind = str(setting.type).removesuffix(" | None")
        name, meaning = setting.name.replace("_", "-"), setting.metadata["help"]
        shown = "" if setting.default in ("", None, False) else f"  [default: {_written(setting.default)}]"
        if kind == "bool":
            body = click.option(f"--{name}/--no-{name}", setting.name, default=None, help=meaning + shown)(body)
        else:
            body = click.option(f"--{name}", setting.name, type=_KINDS.get(kind, str), help=meaning + shown)(body)
    return body


def _written(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _resolve(given: dict[str, Any], config: str | None, resume: bool) -> AlignSettings:
    """The settings: those given, else those of --config or of the run to be resumed, else the defaults."""
    from .training.runs import holds_run, read_run

    values = {name: value for name, value in given.items() if value is not None}
    if "targets" in values:
        values["targets"] = tuple(part.strip() for part in values["targets"].split(",") if part.strip())
    out = values.get("out", AlignSettings().out)
    config = out if config is None and resume and holds_run(Path(out)) else config
    stored = AlignSettings.from_dict(read_run(Path(config)), config).as_dict() if config else {}
    return AlignSettings(**{**stored, **values})


def _listed(skipped: list[str] | None) -> None:
    """Say what --skip-bad left out."""
    for fault in skipped or []:
        say(f"left out: {fault}")
    if skipped:
        say(f"left out {len(skipped)} in all")


@command("skip_bad")
@click.argument("cases", required=False)
@_settings
@click.option("--teacher", help="What ranks the classes of CASES: a ViLT or CLIP checkpoint, or a file of scores.")
@click.option("--config", help="A run.json (or run folder): its settings, but for those given here.")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the audit of the pairs and stop.")
def align(cases: str | None, config: str | None, resume: bool, dry_run: bool, skip_bad: bool, teacher: str | None,
          **given: Any) -> Any:  # fmt: skip
    """Align a decoder on preference pairs: an adapter comes out.

    The pairs are those of --pairs, or come from --teacher and CASES. Without any of them: the built-in rare-disease
    task, offline and in minutes, from the teacher to a report.

    \b
    Example:  python cli.py align
    Example:  python cli.py align --model meta-llama/Llama-3.2-3B-Instruct --pairs pairs.jsonl --out runs/first
    """
    from . import pipeline

    own_task = cases == "builtin:rare-disease" or (cases is None and given["model"] is None)
    if own_task and not (given["pairs"] or config or resume or dry_run):
        return _showcase(given, teacher)
    settings = _resolve(given, config, resume)
    skipped: list[str] | None = [] if skip_bad else None
    try:
        pairs = _taught(cases, teacher, settings)
        return pipeline.align(settings, pairs, resume=resume, dry_run=dry_run, skipped=skipped)
    finally:
        _listed(skipped)


def _showcase(given: dict[str, Any], teacher: str | None) -> Any:
    """The built-in task from the teacher to the report; its own settings hold where none is given."""
    from . import showcase

    chosen = {name: value for name, value in given.items() if value is not None}
    settings = _resolve({**showcase.SETTINGS, "out": str(showcase.new_folder()), **chosen}, None, False)
    return showcase.tell(settings, teacher=teacher)


def _taught(cases: str | None, teacher: str | None, settings: AlignSettings) -> Any:
    """The pairs of CASES as the teacher ranks them; None where a file of pairs is given."""
    from . import pipeline

    if (cases is None) != (teacher is None) or (cases is None) == (not settings.pairs):
        raise ConfigError("wanted --pairs FILE, or CASES with --teacher, or none of them (the built-in task)")
    return None if cases is None or teacher is None else list(pipeline.prefer(cases, teacher=teacher))


@command("seed", "device", "dtype", "date", "skip_bad")
@click.argument("cases", required=False)
@click.option("--note", help="The note of one case.")
@click.option("--image", help="The picture of one case, for a vision model; with --note it sees both.")
@click.option(
    "--modality", type=click.Choice(["note", "image", "both"]), help="What of each case is seen [default: note]."
)
@click.option("--kind", type=click.Choice(["disease", "tissue"]), default="disease", show_default=True,
              help="Of classes.")  # fmt: skip
@click.option("--meta-masking", is_flag=True, help="Text before an image sees nothing of it, as in Meta's own code.")
@click.option(
    "--model", help="Folder or hub name of the decoder [default: that of the newest run, or the shipped one]."
)
@click.option("--adapter", help="Adapter folder, ours or PEFT's.")
@click.option("--labels", help="The closed set: a file with one label a line, or CSV or JSON.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Classes to name.")
@click.option("--mode", type=click.Choice(["rank", "list", "text"]), default="rank", show_default=True,
              help="Exact probabilities of all labels, the aligned list of --top of them, or free text.")  # fmt: skip
@click.option("--normalise", type=click.Choice(["sum", "mean", "prior"]), default="sum", show_default=True,
              help="Rank by a label's log-probability, by its mean per token, or less that after an empty case.")  # fmt: skip
@click.option("--retrieve", help="File or folder of documents; the passages that fit best stand before the case.")
@click.option("--retriever", help="BERT checkpoint that finds passages by meaning; unless given, by words (BM25).")
@click.option("--passages", type=click.IntRange(1), default=3, show_default=True, help="Passages before a case.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Text mode: at most so many."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Text mode: 0 takes the likeliest token."
)
@click.option("--format", "form", type=click.Choice(["auto", "jsonl", "csv", "table"]), default="auto", show_default=True,
              help="Of the output; auto: a table for one case, else JSON lines.")  # fmt: skip
@click.option("--out", help="JSON-lines (or CSV) file of predictions; a run that was killed is taken up again.")
def predict(cases: str | None, note: str | None, image: str | None, out: str | None, skip_bad: bool, form: str,
            **words: Any) -> Any:  # fmt: skip
    """Predict the classes of a note, of a picture, of every case of a file or folder, or of standard input (-): JSON
    lines, or a note a line.

    \b
    Example:  python cli.py predict --note "Short stature, webbed neck, pulmonic stenosis."
    Example:  python cli.py predict --model DIR --mode text --note "Long palpebral fissures, short stature."
    """
    from . import pipeline
    from .evaluation.outputs import Output, printed

    if (cases is None) == (note is None and image is None):
        raise ConfigError("wanted either CASES (a file, a folder or -), or --note or --image, and not both")
    if words["model"] is None:
        words |= _newest(words)
    words["modality"] = words["modality"] or ("note" if image is None else "image" if note is None else "both")
    skipped: list[str] | None = [] if skip_bad else None
    source = _cases(cases, note, image, skipped)
    if cases is None and words["mode"] == "text" and out is None and words["retrieve"] is None:
        return _stream(source[0], **words)
    words.pop("temperature"), words.pop("seed")
    if out is None:
        auto = "jsonl" if cases is not None else "table"
        return printed(pipeline.predict(source, skipped=skipped, **words), auto if form == "auto" else form)
    output = Output(out, {"cases": cases, "note": note, "image": image, **words}, form)
    count = output.write(pipeline.predict(source, skipped=skipped, done=output.done, **words))
    _listed(skipped)
    return {"out": out, "cases": count}


def _cases(cases: str | None, note: str | None, image: str | None, skipped: list[str] | None) -> Any:
    """What `pipeline.predict` takes: a path, or the records of --note and --image or of standard input."""
    from .records import read_stream
    from .types import Record

    if cases is None:
        return [Record("case", note=note or "", image=image)]
    return read_stream(sys.stdin.buffer, skipped=skipped) if cases == "-" else cases


def _newest(words: dict[str, Any]) -> dict[str, Any]:
    """What the newest run says of a model, its adapter and its closed set, but for what is given."""
    from . import showcase

    return {name: value for name, value in showcase.newest().items() if words.get(name) is None}


def _stream(one: Any, *, model: str, max_new_tokens: int, temperature: float, seed: int, top: int, modality: str,
            kind: str, **words: Any) -> dict[str, Any]:  # fmt: skip
    """Print the answer to one case as it is generated."""
    from .decoders import load_decoder
    from .predicting import Questioner

    loading = {name: words[name] for name in ("adapter", "device", "dtype", "date", "meta_masking")}
    decoder = load_decoder(model, **loading)
    asked = Questioner(decoder, mode="text", modality=modality, kind=kind, top=top, max_new_tokens=max_new_tokens).put(
        one
    )
    ids, said, shown = decoder.tokenizer.chat_ids(asked.messages, generate=True), [], ""

    def hear(_: int, token: int) -> None:
        nonlocal shown
        said.append(token)
        text = decoder.tokenizer.decode(said)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a letter: wait for the rest
            click.echo(text[len(shown) :], nl=False)
            shown = text

    decoder.generate([ids], max_new_tokens, temperature, seed=seed, images=[asked.images], on_token=hear)
    click.echo()
    return {}


@command("skip_bad")
@click.argument("cases")
@click.option("--teacher", required=True, help="ViLT or CLIP checkpoint, GestaltMML's .pt, or a file of scores.")
@click.option("--modality", type=click.Choice(["note", "image", "both"]), default="note", show_default=True,
              help="What of a case the student will see.")  # fmt: skip
@click.option(
    "--kind", type=click.Choice(["disease", "tissue"]), default="disease", show_default=True, help="Of classes."
)
@click.option("--chosen-k", type=click.IntRange(1), help="Classes of the chosen answer [default: 10, tissues 5].")
@click.option("--rejected-q", type=click.IntRange(1), help="Classes of the rejected answer [default: 15, tissues 5].")
@click.option("--rejected", type=click.Choice(["bottom", "near", "random"]), default="bottom", show_default=True,
              help="Where rejected classes come from: the end of the ranking, just below the chosen, anywhere.")  # fmt: skip
@click.option("--label-first", is_flag=True, help="Put the known label before the teacher's classes.")
@click.option("--label-within", type=click.IntRange(1), help="Leave out cases whose label the teacher ranks lower.")
@click.option("--template", help="A text file with the words of the prompt: {note}, {k}, {labels}.")
@click.option("--temperature", type=float, help="Of the teacher's scores, where they are kept.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random negatives.")
@click.option("--out", required=True, help="JSON-lines file of pairs.")
def prefer(cases: str, out: str, skip_bad: bool, template: str | None, **choices: Any) -> dict[str, Any]:
    """Rank the classes of each case with a teacher and write the preference pairs.

    \b
    Example:  python cli.py prefer cases.csv --teacher teacher/ --out pairs.jsonl
    """
    from . import pipeline
    from .pairs.files import write_pairs
    from .prompts import read_template

    words = None if template is None else read_template(template)
    skipped: list[str] | None = [] if skip_bad else None
    count = write_pairs(out, pipeline.prefer(cases, skipped=skipped, template=words, **choices))
    _listed(skipped)
    return {"out": out, "pairs": count}


@command("seed", "device")
@click.argument("cases")
@click.option("--base", default="none", show_default=True, help="ViLT checkpoint to start from, or none.")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Passes over the cases.")
@click.option("--lr", type=float, default=0.0, help="Learning rate; 5e-5 on a checkpoint, 5e-4 from nothing.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Cases of a step.")
@click.option(
    "--loss", type=click.Choice(["bce", "cross_entropy"]), default="bce", show_default=True, help="Of the classes."
)
@click.option("--class-weights", type=click.Choice(["none", "balanced", "root"]), default="none", show_default=True,
              help="How much more rare classes count.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the training in --out.")
@click.option("--out", required=True, help="Folder of the teacher.")
def teach(cases: str, base: str, out: str, **choices: Any) -> dict[str, Any]:
    """Train the fusion encoder on cases with photo, note and label.

    \b
    Example:  python cli.py teach cases.csv --base dandelin/vilt-b32-mlm --out teacher/
    """
    from . import pipeline

    taught = pipeline.teach(cases, out=out, base=None if base == "none" else base, **choices)
    scores = {"validation_top_1": taught.top1, "validation_top_10": taught.top10}
    return {"out": str(taught.folder), "classes": len(taught.classes), "steps": taught.steps, **scores}


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
    from . import pipeline
    from .report import write_report

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

    results: dict[str, Any] = import_module("mint.kernels.bench").results(out)
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
    from . import pipeline

    return pipeline.merge(model, adapter, out, **loading)


if __name__ == "__main__":
    main()
