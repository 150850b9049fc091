"""`align`: pairs in, adapter out; without arguments the whole story on the built-in task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..config import AlignSettings
from ..errors import ConfigError
from .frame import command, listed
from .options import given_choices, given_settings, pair_options, settings_options


def _resolve(given: dict[str, Any], config: str | None, resume: bool) -> AlignSettings:
    """The settings: those given, else those of --config or of the run to be resumed, else the defaults."""
    from ..training.runs import holds_run, read_run

    values = given_settings(given)
    out = values.get("out", AlignSettings().out)
    config = out if config is None and resume and holds_run(Path(out)) else config
    stored = AlignSettings.from_dict(read_run(Path(config)), config).as_dict() if config else {}
    return AlignSettings(**{**stored, **values})


@command("skip_bad", ranks=True)
@click.argument("cases", required=False)
@settings_options()
@click.option("--teacher", help="What ranks the classes of CASES: a ViLT or CLIP checkpoint, or a file of scores.")
@click.option(
    "--draw-faces", is_flag=True, help="Give cases without a photo a simulated one, drawn from their findings."
)
@click.option(
    "--modality", type=click.Choice(["note", "image", "both"]), help="What of CASES the student sees [default: note]."
)
@click.option("--kind", type=click.Choice(["disease", "tissue"]), help="Of the classes of CASES [default: disease].")
@pair_options
@click.option("--config", help="A run.json (or run folder): its settings, but for those given here.")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the audit of the pairs and stop.")
def align(cases: str | None, config: str | None, resume: bool, dry_run: bool, skip_bad: bool, teacher: str | None,
          draw_faces: bool, **given: Any) -> Any:  # fmt: skip
    """Align a decoder on preference pairs: an adapter comes out.

    The pairs are those of --pairs, or come from --teacher and CASES. Without any of them: the built-in rare-disease
    task, offline and in minutes, from the teacher to a report; with builtin:tissue the same for pictures of tissue.

    \b
    Example:  python cli.py align
    Example:  python cli.py align builtin:tissue
    Example:  python cli.py align --model meta-llama/Llama-3.2-3B-Instruct --pairs pairs.jsonl --out runs/first
    """
    from .. import pipeline
    from ..builtin.cases import is_builtin
    from ..records import home_of
    from ..training.runs import holds_run

    choices = given_choices(given, "modality", "kind")
    own_task = cases in ("builtin:rare-disease", "builtin:tissue") or (cases is None and given["model"] is None)
    if own_task and not (given["pairs"] or config or resume or dry_run):
        return _showcase(cases, given, teacher, choices)
    where = Path(given["out"] or AlignSettings().out)
    if resume and not (cases or given["pairs"] or config or holds_run(where)):
        raise ConfigError(f"--resume: {where} holds no run; correct --out, or give --pairs or CASES to begin one")
    settings = _resolve(given, config, resume)
    skipped: list[str] | None = [] if skip_bad else None
    try:
        pairs = _taught(cases, teacher, settings, draw_faces, choices, skipped)
        if cases is not None and not is_builtin(cases):
            settings = replace(settings, image_folder=(str(home_of(cases)),))
        return pipeline.align(settings, pairs, resume=resume, dry_run=dry_run, skipped=skipped)
    finally:
        listed(skipped)


def _showcase(task: str | None, given: dict[str, Any], teacher: str | None, choices: dict[str, Any]) -> Any:
    """A built-in task from the teacher to the report; its own settings hold where none is given."""
    from .. import parallel, showcase, showcase_tissue

    if parallel.size() > 1:
        raise ConfigError(
            "the built-in task is the work of one process; leave torchrun out, or give --model and --pairs"
        )
    if wrong := choices.keys() & {"modality", "kind"}:
        raise ConfigError(f"--{min(wrong)}: the built-in task has its own; leave it out, or give CASES of yours")
    story: Any = showcase_tissue if task == "builtin:tissue" else showcase
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = _resolve({**story.SETTINGS, "out": str(story.new_folder()), **chosen}, None, False)
    return story.tell(settings, teacher=teacher, **choices)


def _taught(
    cases: str | None, teacher: str | None, settings: AlignSettings, draw_faces: bool, choices: dict[str, Any],
    skipped: list[str] | None,
) -> Any:  # fmt: skip
    """The pairs of CASES as the teacher ranks them; None where a file of pairs is given."""
    from .. import pipeline
    from ..builtin.portraits import SIMULATED, with_drawn_face
    from ..progress import say
    from ..records import read_records

    if (cases is None) != (teacher is None) or (cases is None) == (not settings.pairs):
        raise ConfigError("wanted --pairs FILE, or CASES with --teacher, or none of them (the built-in task)")
    if cases is None or teacher is None:
        if draw_faces:
            raise ConfigError("--draw-faces: faces are drawn for CASES that a --teacher looks at; give both")
        if choices:
            name = min(choices).replace("_", "-")
            raise ConfigError(f"--{name}: says how a --teacher makes pairs of CASES; give both, or leave it out")
        return None
    if settings.image_folder:
        raise ConfigError(
            "--image-folder: is for the pictures of --pairs, those of CASES are found there; leave it out"
        )
    source: Any = cases
    if draw_faces:
        say(SIMULATED)
        source = map(with_drawn_face, read_records(cases, skipped=skipped))
    return list(pipeline.prefer(source, teacher=teacher, skipped=skipped, seed=settings.seed, **choices))
