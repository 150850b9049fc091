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
    if isinstance(result, dict):
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
    from .runs import holds_run, read_run

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
@_settings
@click.option("--config", help="A run.json (or run folder): its settings, but for those given here.")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the audit of the pairs and stop.")
def align(config: str | None, resume: bool, dry_run: bool, skip_bad: bool, **given: Any) -> dict[str, Any]:
    """Align a decoder on preference pairs: an adapter comes out.

    \b
    Example:  python cli.py align --model meta-llama/Llama-3.2-3B-Instruct --pairs pairs.jsonl --out runs/first
    """
    from . import pipeline

    settings = _resolve(given, config, resume)
    if not settings.pairs:
        raise ConfigError("--pairs: nothing to train on; wanted a JSON-lines file of preference pairs")
    skipped: list[str] | None = [] if skip_bad else None
    try:
        return pipeline.align(settings, resume=resume, dry_run=dry_run, skipped=skipped)
    finally:
        _listed(skipped)


@command("seed", "device", "dtype", "date", "skip_bad")
@click.argument("cases", required=False)
@click.option("--note", help="The note of one case.")
@click.option("--model", required=True, help="Folder or hub name of the decoder.")
@click.option("--adapter", help="Adapter folder, ours or PEFT's.")
@click.option("--labels", help="The closed set: a file with one label a line, or CSV or JSON.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Classes to name.")
@click.option("--mode", type=click.Choice(["rank", "text"]), default="rank", show_default=True, help="How to answer.")
@click.option(
    "--normalise", type=click.Choice(["sum", "mean"]), default="sum", show_default=True, help="Of a label's tokens."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Text mode: at most so many."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Text mode: 0 takes the likeliest token."
)
@click.option("--out", help="JSON-lines file of predictions.")
def predict(cases: str | None, note: str | None, out: str | None, skip_bad: bool, **words: Any) -> Any:
    """Predict the classes of a note, or of every case of a file or folder.

    \b
    Example:  python cli.py predict --model DIR --mode text --note "Long palpebral fissures, short stature."
    """
    from . import pipeline
    from .predictions import prediction_row, write_predictions
    from .types import Record

    if (cases is None) == (note is None):
        raise ConfigError("wanted either CASES (a file or folder) or --note, and not both")
    if note is not None and words["mode"] == "text" and out is None:
        return _stream(note, **words)
    skipped: list[str] | None = [] if skip_bad else None
    source: Any = cases if note is None else [Record("note", note=note)]
    words.pop("temperature"), words.pop("seed")
    answers = pipeline.predict(source, skipped=skipped, **words)
    if out is not None:
        return {"out": out, "cases": write_predictions(out, answers)}
    return (_table(answer) if note is not None else prediction_row(answer) for answer in answers)


def _stream(note: str, *, model: str, adapter: str | None, max_new_tokens: int, temperature: float, seed: int,
            device: str, dtype: str, date: str | None, top: int, **_: Any) -> dict[str, Any]:  # fmt: skip
    """Print the answer to one note as it is generated; what is returned is the whole of it."""
    from .decoders import load_decoder
    from .prompts import prompt_messages
    from .types import Record

    decoder = load_decoder(model, adapter=adapter, device=device, dtype=dtype, date=date)
    messages = prompt_messages(Record("note", note=note), "note", k=top)
    ids, said, shown = decoder.tokenizer.chat_ids(messages, generate=True), [], ""

    def hear(_: int, token: int) -> None:
        nonlocal shown
        said.append(token)
        text = decoder.tokenizer.decode(said)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a letter: wait for the rest
            click.echo(text[len(shown) :], nl=False)
            shown = text

    decoder.generate([ids], max_new_tokens, temperature, seed=seed, on_token=hear)
    click.echo()
    return {}


def _table(answer: Any) -> str:
    """One ranking for a person."""
    rows = [
        f"{place:3}  {entry['probability']:7.4f}  {entry['label']}" for place, entry in enumerate(answer.ranking, 1)
    ]
    return answer.text if answer.text is not None else "\n".join(rows)


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
