"""What `align` without arguments tells: the whole of MINT on simulated patients, from the teacher to the report.

A teacher that sees photo and note ranks the diseases of each patient; a tiny Llama that sees the note alone learns from
the rankings; and on patients that neither has met, both are compared with the best that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from . import pipeline
from .answers import opening
from .builtin.cases import STUDENT, TEACHER
from .builtin.rare_disease import ceiling, classes, draw_cases
from .config import AlignSettings
from .devices import one_thread
from .encoders import Encoder, load_encoder
from .evaluation import measure
from .evaluation.predictions import write_predictions
from .files import write_text
from .labels import LabelSet
from .pairs.files import write_pairs
from .progress import say
from .ranking import rank
from .report import write_report
from .report.cases import shown_cases
from .training.runs import check_new, holds_run, read_metrics, read_run
from .types import Prediction, Record, Report

TRAIN, TEST, SIDE = 4000, 300, 64
"""Patients to learn from, patients to be judged by, and pixels of a side of their photos."""

SETTINGS: Mapping[str, Any] = {
    "model": str(STUDENT),
    "dtype": "float32",
    "lr": 1e-3,
    "rank": 64,
    "alpha": 64.0,
    "epochs": 1.0,
    "batch_size": 8,
    "nll": "chosen",
    "first_weight": 5.0,
    "save_every": 0,
}
"""Where the story differs from the defaults of `align`: the student is tiny, so its steps are long."""

CHOICES: Mapping[str, Any] = {"label_first": True}
"""Where its pairs differ: a simulated patient's diagnosis is known, so it stands before what the teacher lists."""

BASE, ALIGNED, TAUGHT = "base, note alone", "aligned, note alone", "teacher, photo and note"
NOTE_CEILING, BOTH_CEILING = "best possible, note alone", "best possible, photo and note"
_REMARK = (
    "Patients, notes and photos are simulated: drawn from a table of published findings, never from a person. "
    "Because the simulation is known, so is the best possible answer. Nothing was trained on those who judge."
)


@dataclass(frozen=True, slots=True)
class Told:
    """What came of it: a report for each system, what no system can pass, and where everything lies."""

    folder: Path
    reports: Mapping[str, Report]
    ceilings: Mapping[str, Mapping[str, float]]
    next: str

    def as_dict(self) -> dict[str, Any]:
        systems = {
            name: {key: {"value": report.metrics[key], "interval": report.intervals[key]} for key in _COLUMNS}
            for name, report in self.reports.items()
        }
        return {"systems": systems, "ceilings": dict(self.ceilings), "gap_closed": self.gap_closed(), **self.places()}

    def places(self) -> dict[str, str]:
        names = {"adapter": "adapter", "predictions": "predictions.jsonl", "report": "report.html"}
        return {what: str(self.folder / name) for what, name in names.items()}

    def gap_closed(self) -> dict[str, float]:
        """How much of the way from the base to the ceiling of the note the student has gone."""
        base, aligned, best = self.reports[BASE].metrics, self.reports[ALIGNED].metrics, self.ceilings[NOTE_CEILING]
        return {key: (aligned[key] - base[key]) / max(best[key] - base[key], 1e-9) for key in _COLUMNS}

    def __str__(self) -> str:
        gap = self.gap_closed()
        closed = f"{gap['top_1']:.0%} of the way from the base to the ceiling in top-1, {gap['top_10']:.0%} in top-10"
        places = [f"{what + ':':13}{where}" for what, where in self.places().items()]
        told = [f"The aligned student went {closed}.", INTERVALS, *fill(_REMARK, 100).splitlines()]
        return "\n".join([*self._table(), "", *told, "", *places, f"next:        {self.next}"])

    def _table(self) -> list[str]:
        """Systems and ceilings, in percent, each system with its 95 % interval."""
        rows = [f"{'':32}" + "".join(f"{head:>22}" for head in _COLUMNS.values())]
        for name, report in self.reports.items():
            cells = (cell(report.metrics[key], report.intervals[key]) for key in _COLUMNS)
            rows.append(f"{name:32}" + "".join(f"{cell:>22}" for cell in cells))
        for name, best in self.ceilings.items():
            rows.append(f"{name:32}" + "".join(f"{cell(best[key]):>22}" for key in _COLUMNS))
        return rows


_COLUMNS = {"top_1": "top-1, %", "top_10": "top-10, %"}
INTERVALS = "In brackets: 95 % intervals, by bootstrap over those who judge."


def cell(value: float, between: tuple[float, float] | None = None) -> str:
    """A share in percent, with its interval if it has one."""
    if between is None:
        return f"{100 * value:.1f}{'':14}"
    return f"{100 * value:.1f} ({100 * between[0]:.1f} to {100 * between[1]:.1f})"


@one_thread()
def tell(
    settings: AlignSettings,
    *,
    teacher: str | Path | None = None,
    train: int = TRAIN,
    test: int = TEST,
    split: str = "test",
    **choices: Any,
) -> Told:
    """Run the story into `settings.out`. `choices` are those of `prefer_pairs`; `split` is that of the judging patients."""
    folder = Path(settings.out)
    check_new(folder)
    learnt, judged = list(draw_cases(train, settings.seed, "train", SIDE)), list(draw_cases(test, 0, split, SIDE))
    encoder = load_encoder(teacher or TEACHER, device=settings.device)
    say(f"1. The teacher sees a simulated photo and the note of {train} patients and ranks {len(classes())} diseases.")
    settings = replace(settings, pairs=str(folder / "pairs.jsonl"))
    write_pairs(settings.pairs, pipeline.prefer(learnt, teacher=encoder, **{**CHOICES, **choices}))
    say(
        f"2. Its rankings are preference pairs: {settings.pairs}; the answers that it ranks last are the rejected ones."
    )
    say("3. A tiny Llama that sees the note alone is aligned on them (ORPO + LoRA).")
    pipeline.align(settings)
    say(f"4. {test} patients that nobody has met:")
    answers = _answers(settings, encoder, judged)
    return _judged(folder, answers, judged, settings)


def _answers(settings: AlignSettings, encoder: Encoder, judged: Sequence[Record]) -> dict[str, list[Prediction]]:
    """What base, aligned student and teacher say of the same patients."""
    loading = {"device": settings.device, "dtype": settings.dtype, "date": settings.date}
    asked: dict[str, Any] = {
        "model": settings.model,
        "labels": classes(),
        "top": None,
        "opening": opening("disease"),
        **loading,
    }
    base = list(pipeline.predict(judged, **asked))
    aligned = list(pipeline.predict(judged, adapter=Path(settings.out) / "adapter", **asked))
    write_text(Path(settings.out) / "labels.txt", "".join(f"{name}\n" for name in classes()))
    write_predictions(Path(settings.out) / "predictions.jsonl", aligned)
    return {BASE: base, ALIGNED: aligned, TAUGHT: teacher_predictions(encoder, judged)}


def teacher_predictions(encoder: Encoder, records: Sequence[Record]) -> list[Prediction]:
    """The teacher's rankings with its probabilities."""
    found = rank([record.id for record in records], encoder.scores(records), encoder.classes, temperature=1.0)
    return [
        Prediction(
            ranking.id,
            tuple(
                {"label": label, "logprob": score, "probability": math.exp(score)}
                for label, score in zip(ranking.labels, ranking.scores, strict=True)
            ),
        )
        for ranking in found
    ]


def _judged(
    folder: Path, answers: Mapping[str, list[Prediction]], judged: Sequence[Record], settings: AlignSettings
) -> Told:
    """Figures, ceilings and the page."""
    known = LabelSet(classes())
    reports = {name: measure(given, judged, labels=known, tops=(1, 5, 10)) for name, given in answers.items()}
    ceilings = {NOTE_CEILING: _ceiling(judged, "note"), BOTH_CEILING: _ceiling(judged, "both")}
    reports[ALIGNED] = replace(reports[ALIGNED], cases=shown_cases(judged, answers))
    told = Told(
        folder, reports, ceilings, 'python cli.py predict --note "Short stature, webbed neck, pulmonic stenosis."'
    )
    write_report(
        folder / "report.html",
        reports,
        title="Rare diseases from the note alone",
        student=ALIGNED,
        base=BASE,
        teacher=TAUGHT,
        ceilings=ceilings,
        goal=NOTE_CEILING,
        curve=read_metrics(folder / "metrics.jsonl"),
        about=_about(settings),
        remark=_REMARK,
    )
    return told


def _ceiling(judged: Iterable[Record], modality: Any) -> dict[str, float]:
    return {f"top_{k}": share for k, share in ceiling(judged, modality, (1, 5, 10)).items()}


def _about(settings: AlignSettings) -> dict[str, Any]:
    names = ("objective", "beta", "rank", "lr", "epochs", "batch_size", "seed")
    return {name.replace("_", " "): getattr(settings, name) for name in names}


def new_folder(root: str | Path = "runs") -> Path:
    """The first of runs/rare-disease, runs/rare-disease-2, ... that holds no run."""
    folder, number = Path(root) / "rare-disease", 2
    while holds_run(folder):
        folder, number = Path(root) / f"rare-disease-{number}", number + 1
    return folder


def newest(root: str | Path = "runs") -> dict[str, Any]:
    """How `predict` loads the newest run that ended in an adapter, or the shipped base where there is none."""
    runs = [path.parent for path in Path(root).glob("*/run.json") if (path.parent / "adapter").is_dir()]
    if not runs:
        say(f"no run in {root}/: the shipped base answers, which knows simulated patients alone and is not aligned; "
            "`python cli.py align` aligns it")  # fmt: skip
        return {"model": str(STUDENT), "labels": classes(), "opening": opening("disease")}
    run = max(runs, key=lambda folder: (folder / "run.json").stat().st_mtime_ns)
    settings = read_run(run)
    known = ", which knows simulated cases alone" if Path(settings["model"]).parent == STUDENT.parent else ""
    say(f"model: {settings['model']} with {run / 'adapter'}{known}")
    found = {"model": settings["model"], "adapter": str(run / "adapter"), "date": settings.get("date")}
    if (run / "labels.txt").is_file():
        found |= {"labels": str(run / "labels.txt"), "opening": opening("disease")}
    return found
