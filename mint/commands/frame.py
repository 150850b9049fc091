"""What all commands share: their group, the common options, how results and errors are printed."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from typing import Any

import click

from .. import __version__
from ..errors import ConfigError, MintError, Stopped, WorkError
from ..progress import say, set_quiet
from ..signals import ended_in_order

Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mint", message="%(prog)s %(version)s")
def cli() -> None:
    """Moves what a multimodal model knows into a decoder that sees one modality, by preference optimisation."""


def command(*names: str, ranks: bool = False) -> Callable[[Command], click.Command]:
    """A command with the options that all have; its return value is printed, its errors become one line.

    `ranks`: whether several processes can share its work, as torchrun starts them; then the first one alone prints.
    """

    def decorate(body: Command) -> click.Command:
        @wraps(body)
        def guarded(quiet: bool, as_json: bool, traceback: bool, **words: Any) -> None:
            set_quiet(quiet)
            with ended_in_order() if not _several() else nullcontext(), _joined() as speaks, _told(traceback, speaks):
                if not ranks and _several():
                    raise ConfigError(f"{body.__name__}: is the work of one process; start it without torchrun")
                if "reading" in names:
                    words["reading"] = _reading(words)
                _show(body(**words), as_json)

        own = {option.name for option in getattr(body, "__click_params__", ())}
        run: Command = guarded
        for option in (
            click.option("--quiet", is_flag=True, help="No progress and no remarks on stderr."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
            click.option("--traceback", is_flag=True, help="On an error, the whole traceback."),
        ):
            run = option(run)
        for name in (*names, *(name for name in _IDLE if name not in {*names, *own})):
            run = (_SHARED if name in names else _IDLE)[name](run)
        first = " ".join((body.__doc__ or "").split("\n\n")[0].split())
        made = cli.command(name=body.__name__, short_help=first)(run)
        made.params.sort(key=lambda option: (option.name not in own) + (not option.expose_value))  # the help's order
        return made

    return decorate


@contextmanager
def _told(traceback: bool, speaks: Callable[[], bool]) -> Iterator[None]:
    """What ends a command, as one line and an exit code: 2 for wrong input, 1 for work that failed, 0 for work that was
    stopped in order, with the words that go on with it."""
    try:
        yield
    except Stopped as stop:
        click.echo(f"{stop}; to go on: {_again(stop)}")
    except MintError as error:
        if traceback:
            raise
        if speaks():
            click.echo(f"mint: {' '.join(str(error).split())}", err=True)
        sys.exit(1 if isinstance(error, WorkError) else 2)
    except KeyboardInterrupt:
        click.echo("mint: stopped before the end; no file is left half written, type the same again", err=True)
        sys.exit(1)
    except OSError as error:
        if traceback or error.errno == errno.EPIPE:  # whoever read has heard enough
            raise
        click.echo(f"mint: {error.filename or 'standard output'}: {error.strerror or error}; see that it can be "
                   "read and written, and that the disk is not full", err=True)  # fmt: skip
        sys.exit(1)


@contextmanager
def _joined() -> Iterator[Callable[[], bool]]:
    """Be one of the processes that torchrun started, if it did; gives what tells whether an error is for this one to show."""
    if not _several():
        yield lambda: True
        return
    from .. import parallel

    with parallel.joined() as watch:
        if not parallel.first():
            set_quiet(True)
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if parallel.first() else nowhere):
            yield watch.speaks


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _again(stop: Stopped) -> str:
    """The words that continue a run: those that began it, with --resume."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if stop.folder is None:
        return shlex.join(["python", sys.argv[0], *words])
    out = [] if any(word.split("=")[0] == "--out" for word in words) else ["--out", stop.folder]
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    started = ["torchrun", "--nproc-per-node", here] if _several() else ["python"]
    return shlex.join([*started, sys.argv[0], *words, *out, "--resume"])


def _reading_options(run: Command) -> Command:
    for option in (
        click.option("--image-folder", help="Where image paths start from [default: the folder of the table]."),
        click.option("--hpo", help="Names of HPO ids, for tables of ids: hp.obo, hp.json or a table of id and name."),
        click.option("--columns", help="A table's own names of columns, like id=file,image=file,label=tissue."),
    ):
        run = option(run)
    return run


def _reading(words: dict[str, Any]) -> dict[str, Any]:
    """The options of `_reading_options`, taken out of `words`, as `read_records` wants them."""
    asked = {"images": words.pop("image_folder"), "hpo": words.pop("hpo"), "columns": _columns(words.pop("columns"))}
    return {name: value for name, value in asked.items() if value is not None}


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    wrong = next(("".join(pair) for pair in pairs if not (pair[0].strip() and pair[2].strip())), None)
    if wrong is not None:
        raise ConfigError(f"--columns: {wrong!r}; wanted our name = the table's name, like label=tissue")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


_SHARED: dict[str, Callable[[Command], Command]] = {
    "reading": _reading_options,
    "seed": click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
    "device": click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
    "dtype": click.option("--dtype", default="auto", show_default=True, help="auto, float32 or bfloat16."),
    "date": click.option("--date", help="The date in the chat template, like '26 Jul 2024'; today's unless given."),
    "skip_bad": click.option("--skip-bad", is_flag=True, help="Leave bad rows out and list them on stderr."),
}


_UNUSED = "Taken by every command; nothing here depends on it."
_IDLE: dict[str, Callable[[Command], Command]] = {
    "seed": click.option("--seed", type=int, expose_value=False, help=_UNUSED),
    "device": click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), expose_value=False, help=_UNUSED),
    "dtype": click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), expose_value=False, help=_UNUSED
    ),
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


def listed(skipped: list[str] | None) -> None:
    """Say what --skip-bad left out."""
    for fault in skipped or []:
        say(f"left out: {fault}")
    if skipped:
        say(f"left out {len(skipped)} in all")
