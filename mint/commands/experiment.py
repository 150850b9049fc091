"""`experiment`: all systems side by side over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, Stopped
from ..files import locked
from .frame import command
from .options import given_choices, given_settings, pair_options, settings_options

_NOT_HERE = (
    "pairs",
    "image_folder",
    "out",
    "adapter",
    "objective",
    "held_out",
    "eval_every",
    "seed",
    "meta_masking",
    "cache_gb",
)
_PLAN = ("vary", "train_sizes", "vary_objectives", "tune", "tune_lr", "tune_epochs")
_BENCH = ("labelled", "tellings", "documents", "passages", "dpo_from", "dpo_lr")
_OF_FILES = (
    "labels",
    "draw_faces",
    "min_cases",
    "min_findings",
    "folds",
    "teacher_base",
    "teacher_epochs",
    "teacher_lr",
)


def _listed(kind: Any) -> Any:
    """An option's value with commas in it, as a list."""

    def parts(_: Any, __: Any, value: str | None) -> list[Any]:
        try:
            return [kind(part.strip()) for part in (value or "").split(",") if part.strip()]
        except ValueError:
            raise click.BadParameter(f"{value}: wanted numbers with commas between") from None

    return parts


@command("seed")
@click.argument("cases", required=False, default="builtin:rare-disease")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many seeds, from --seed on.")
@click.option(
    "--objectives",
    default="base,rag,sft,sft-list,dpo,orpo",
    show_default=True,
    callback=_listed(str),
    help="Systems, comma between; teacher, naive Bayes and ceilings are always there.",
)
@click.option("--out", default="runs/experiment", show_default=True, help="Folder; what is finished in it is kept.")
@click.option(
    "--teacher",
    help="ViLT or CLIP checkpoint, a file of scores, or `bayes`: naive Bayes over all findings. "
    "Unless given: the shipped one; for a file of cases one that is trained here on its training part.",
)
@click.option("--train", type=click.IntRange(2), help="Cases to learn from [default: 800; all of a file].")
@click.option(
    "--labelled",
    type=click.IntRange(1),
    help="Of the built-in patients to learn from, how many have a known diagnosis [default: all].",
)
@click.option(
    "--tellings",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of a file: how often students are told each training case, first by its note, then by random parts of the findings "
    "in it; --epochs passes over all of them. A note that was not made from findings stays whole.",
)
@click.option("--test", type=click.IntRange(2), help="Built-in patients to be judged by [default: 300].")
@click.option(
    "--validation",
    type=click.IntRange(2),
    default=200,
    show_default=True,
    help="Built-in patients that --tune, or --judge validation, judges by.",
)
@click.option(
    "--judge",
    type=click.Choice(["test", "validation"]),
    default="test",
    show_default=True,
    help="Which built-in patients judge: those of the test, or others while a method is being worked on.",
)
@click.option("--labels", help="File with the closed set, a label a line [default: diseases with --min-cases].")
@click.option(
    "--min-cases",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Training cases that a disease of a file needs to be in the closed set.",
)
@click.option(
    "--draw-faces",
    is_flag=True,
    help="Give cases without a photo a simulated one, drawn from their "
    "photo-visible findings, which then leave a note that was made from the findings.",
)
@click.option(
    "--photo-terms",
    help="A table of HPO terms with a column is_photo: what a photo shows [default: what can be drawn].",
)
@click.option(
    "--min-findings",
    type=click.IntRange(0),
    help="With --draw-faces, findings that photo and note of a judged case must each have [default: 2].",
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    default=3,
    show_default=True,
    help="Each training case is scored by a teacher that was trained on the other folds of publications.",
)
@click.option(
    "--teacher-base",
    help="ViLT checkpoint that the teacher starts from; `none`: from nothing [default: the "
    "shipped teacher, with --draw-faces].",
)
@click.option("--teacher-epochs", type=click.IntRange(1), default=10, show_default=True, help="Passes of the teacher.")
@click.option("--teacher-lr", type=float, default=0.0, help="Learning rate of the teacher [default: as `teach`].")
@click.option("--documents", help="What RAG finds passages in [default: the training cases with their labels].")
@click.option("--passages", type=click.IntRange(1), default=3, show_default=True, help="Passages of a prompt of RAG.")
@click.option(
    "--dpo-from",
    type=click.Choice(["sft", "sft-list"]),
    default="sft-list",
    show_default=True,
    help="The SFT model that DPO starts from and is held against.",
)
@click.option(
    "--dpo-lr",
    type=click.FloatRange(0, min_open=True),
    help="Learning rate of DPO, which goes on from a trained model, where --tune takes none [default: --lr].",
)
@click.option(
    "--vary", multiple=True, help="NAME=VALUE,VALUE: chosen-k, rejected-q, labelled, or a number of a run; repeatable."
)
@click.option(
    "--train-sizes",
    callback=_listed(int),
    help="A learning curve over so many training cases: 100,200,400; the teacher stays as it is.",
)
@click.option(
    "--vary-objectives",
    default="orpo",
    show_default=True,
    callback=_listed(str),
    help="Systems that --vary and --train-sizes run.",
)
@click.option(
    "--tune", is_flag=True, help="First try the same few learning rates for each system on a validation part."
)
@click.option("--tune-lr", callback=_listed(float), help="Rates to try [default: half, once and twice --lr].")
@click.option("--tune-epochs", callback=_listed(float), help="Lengths to try [default: --epochs].")
@pair_options
@settings_options(leave_out=_NOT_HERE, defaults=False)
def experiment(cases: str, seed: int, seeds: int, objectives: list[str], out: str, **words: Any) -> Any:
    """Compare base, retrieval, SFT, DPO and MINT on the same cases over seeds: one table with intervals.

    CASES is builtin:rare-disease (unless given), or a file or folder, which is split by its own column `split` or by
    publication. Of the result: the table on stdout; experiment.json, experiment.html and predictions/ in --out. A run
    that was stopped is gone on with by the same command. Of the model and its training, what is not given is as in
    `align` without arguments, the same for every system; DPO trains for as long again after its SFT model.

    \b
    Example:  python cli.py experiment --out runs/experiment
    Example:  python cli.py experiment cases.jsonl.gz --draw-faces --out runs/real
    """
    from ..builtin.cases import is_builtin
    from ..config import AlignSettings
    from ..experiment import Bench, Plan, check_objectives, tell
    from ..showcase import CHOICES, SETTINGS

    check_objectives(objectives)
    pairs = {**CHOICES, **given_choices(words)}
    taken = {name: words.pop(name) for name in (*_PLAN, *_BENCH)}
    settings = {name: words.pop(name) for name in AlignSettings.__dataclass_fields__ if name in words}
    if not is_builtin(cases) and (taken["labelled"] or any(text.startswith("labelled=") for text in taken["vary"])):
        raise ConfigError(
            "--labelled: the teacher of a file of cases is trained on all their labels; it is for the built-in patients"
        )
    if is_builtin(cases) and taken["tellings"] > 1:
        raise ConfigError(
            "--tellings: the notes of the built-in patients are worded, not made from findings; it is for files"
        )
    if (taken["tune_lr"] or taken["tune_epochs"]) and not taken["tune"]:
        raise ConfigError("--tune-lr, --tune-epochs: are what --tune tries; give --tune too")
    run = AlignSettings(**{**SETTINGS, "out": out, **given_settings(settings)})
    plan = Plan(objectives, list(range(seed, seed + seeds)), **{name: taken[name] for name in _PLAN})
    try:
        with locked(out):
            task = _task(cases, Path(out), run.device, words)
            return tell(Bench(task, run, Path(out), pairs, words["train"], **{n: taken[n] for n in _BENCH}), plan)
    except Stopped as stop:  # of one of its trainings: the whole goes on by the same command
        raise Stopped(str(stop)) from stop


def _task(cases: str, out: Path, device: str, words: dict[str, Any]) -> Any:
    """The built-in task, or the one that a file of cases makes."""
    from ..builtin.cases import TEACHER, is_builtin
    from ..experiment import builtin_task, file_task

    if is_builtin(cases):
        if cases != "builtin:rare-disease":
            raise ConfigError(f"{cases}: experiment compares students of notes; wanted builtin:rare-disease or a file")
        sizes = {"train": words["train"], "validation": words["validation"]}
        judged = words["test"] if words["judge"] == "test" else words["validation"]
        return builtin_task(teacher=words["teacher"], test=judged, split=words["judge"], device=device, **sizes)
    chosen = {name: words[name] for name in _OF_FILES}
    if chosen["teacher_base"] is None and chosen["draw_faces"]:
        chosen["teacher_base"] = str(TEACHER)
    if chosen["teacher_base"] == "none":
        chosen["teacher_base"] = None
    terms = _photo_terms(words["photo_terms"])
    return file_task(cases, folder=out, teacher=words["teacher"], photo_terms=terms, device=device, **chosen)


def _photo_terms(path: str | None) -> frozenset[str]:
    """The labels, in small letters, of the terms that a table marks as visible on a photo."""
    from ..records.hpo import marked_terms

    return frozenset() if path is None else marked_terms(path, "is_photo")
