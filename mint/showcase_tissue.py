"""What `align builtin:tissue` tells: MINT on pictures, from the teacher to the report.

A CLIP teacher compares each tile with sentences about 19 tissues; a tiny Llama 3.2 Vision, whose image tower stays as it
is, learns from the rankings; and on tiles that neither has met, base, aligned student and teacher are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from . import pipeline
from .answers import opening
from .builtin.cases import TISSUE_STUDENT, TISSUE_TEACHER
from .builtin.nuclei import draw_tissue_cases
from .builtin.tissue_facts import tissues
from .builtin.tissue_pool import SIDE
from .config import AlignSettings
from .decoders import Decoder, load_decoder
from .devices import one_thread
from .encoders import Encoder, load_encoder
from .encoders.encoder import in_batches
from .evaluation import measure
from .evaluation.predictions import write_predictions
from .files import replacing_folder, write_text
from .images import open_image
from .labels import LabelSet
from .pairs import PAPER_SIZES
from .pairs.files import write_pairs
from .progress import progress, say
from .prompts import default_template, prompt_messages
from .report import write_report
from .report.cases import shown_cases
from .showcase import INTERVALS, cell, teacher_predictions
from .showcase import newest as newest_run
from .training.runs import check_new, holds_run, read_metrics
from .types import Prediction, Record, Report

TRAIN, TEST = 600, 300
"""Tiles to learn from, and tiles to be judged by."""
LISTED = PAPER_SIZES["tissue"][0]
RUNS = "runs/tissue"

SETTINGS: Mapping[str, Any] = {
    "model": str(TISSUE_STUDENT),
    "dtype": "float32",
    "targets": ("language_model", "multi_modal_projector"),
    "lr": 2e-3,
    "epochs": 4.0,
    "batch_size": 8,
    "nll": "chosen",
    "cache_gb": 1.0,
    "save_every": 0,
}
"""Where the story differs from the defaults of `align`: the tower is frozen, and steps are long for so small a student."""

BASE, ALIGNED, TAUGHT = "base", "aligned", "teacher"
_COLUMNS = {"top_1": "top-1, %", "top_5": "top-5, %", "outside_set": "outside the set, %"}
_REMARK = (
    "Tiles are simulated: drawn from a table of what tissues look like, never from a slide. "
    "Nothing was trained on those that judge. "
    "Rankings are over the closed set; the share outside it is of the names that a student writes when it writes freely."
)


@dataclass(frozen=True, slots=True)
class Told:
    """What came of it: a report for each system, and where everything lies."""

    folder: Path
    reports: Mapping[str, Report]
    next: str

    def as_dict(self) -> dict[str, Any]:
        systems = {
            name: {key: {"value": report.metrics[key], "interval": report.intervals[key]} for key in _COLUMNS}
            for name, report in self.reports.items()
        }
        return {"systems": systems, **self.places()}

    def places(self) -> dict[str, str]:
        names = {"adapter": "adapter", "predictions": "predictions.jsonl", "report": "report.html", "tiles": "tiles"}
        return {what: str(self.folder / name) for what, name in names.items()}

    def __str__(self) -> str:
        """Systems in percent, each with its 95 % interval, then the places."""
        rows = [f"{'':12}" + "".join(f"{head:>26}" for head in _COLUMNS.values())]
        rows += [
            f"{name:12}" + "".join(f"{cell(report.metrics[key], report.intervals[key]):>26}" for key in _COLUMNS)
            for name, report in self.reports.items()
        ]
        places = [f"{what + ':':13}{where}" for what, where in self.places().items()]
        told = [INTERVALS, *fill(_REMARK, 100).splitlines()]
        return "\n".join([*rows, "", *told, "", *places, f"next:        {self.next}"])


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
    """Run the story into `settings.out`. `choices` are those of `prefer_pairs`; `split` is that of the judging tiles."""
    folder = Path(settings.out)
    check_new(folder)
    learnt = list(draw_tissue_cases(train, settings.seed, "train", SIDE))
    judged = list(draw_tissue_cases(test, 0, split, SIDE))
    stored = {record.id: record for record in stored_tiles([*learnt, *judged], folder / "tiles")}
    learnt, judged = ([stored[record.id] for record in records] for records in (learnt, judged))
    encoder = load_encoder(teacher or TISSUE_TEACHER, classes=tissues(), device=settings.device)
    say(
        f"1. The teacher compares {train} simulated tiles with sentences about {len(tissues())} tissues and ranks these."
    )
    settings = replace(settings, pairs=str(folder / "pairs.jsonl"))
    pairs = pipeline.prefer(learnt, teacher=encoder, modality="image", kind="tissue", **choices)
    write_pairs(settings.pairs, pairs)
    say(
        f"2. Its rankings are preference pairs: {settings.pairs}; the answers that it ranks last are the rejected ones."
    )
    say("3. A tiny Llama 3.2 Vision is aligned on them (ORPO + LoRA); its tower looks at each tile once.")
    pipeline.align(settings)
    say(f"4. {test} tiles that nobody has met:")
    return _judged(folder, settings, encoder, judged)


def stored_tiles(records: Sequence[Record], folder: Path) -> list[Record]:
    """The same records with their pictures as files, so that pairs can name them and people look at them."""
    with replacing_folder(folder) as beside:
        for record in progress(records, "tiles", len(records), "tile"):
            open_image(record.image).save(beside / f"{record.id}.png")
    return [replace(record, image=str(folder / f"{record.id}.png")) for record in records]


def _judged(folder: Path, settings: AlignSettings, encoder: Encoder, judged: Sequence[Record]) -> Told:
    """Figures and the page."""
    known = LabelSet(tissues())
    answers, reports = {}, {}
    for name, adapter in ((BASE, None), (ALIGNED, folder / "adapter")):
        loading: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype, "date": settings.date}
        decoder = load_decoder(settings.model, adapter=adapter, **loading)
        answers[name] = list(pipeline.predict(judged, model=decoder, labels=known, top=None, **_asked()))
        written = measure(free_answers(decoder, judged), judged, labels=known, tops=(1, LISTED))
        reports[name] = _with_outside(measure(answers[name], judged, labels=known, tops=(1, LISTED)), written)
    answers[TAUGHT] = teacher_predictions(encoder, judged)
    reports[TAUGHT] = measure(answers[TAUGHT], judged, labels=known, tops=(1, LISTED))
    reports[ALIGNED] = replace(reports[ALIGNED], cases=shown_cases(judged, answers))
    write_text(folder / "labels.txt", "".join(f"{name}\n" for name in tissues()))
    write_predictions(folder / "predictions.jsonl", answers[ALIGNED])
    _write_page(folder, settings, reports)
    return Told(folder, reports, f"python cli.py predict --image {judged[0].image}")


def _asked() -> dict[str, Any]:
    """How a student is asked: as in training for a list of so many, of which each tissue in turn is the first name."""
    template = default_template("image", "tissue").replace("{k}", str(LISTED))
    return {"modality": "image", "kind": "tissue", "template": template, "opening": opening("tissue")}


def _with_outside(ranked: Report, written: Report) -> Report:
    """The figures of the ranking, but what lies outside the set from the answers that were written freely."""
    metrics = {**ranked.metrics, "outside_set": written.metrics["outside_set"]}
    return replace(
        ranked, metrics=metrics, intervals={**ranked.intervals, "outside_set": written.intervals["outside_set"]}
    )


def free_answers(decoder: Decoder, records: Iterable[Record], longest: int = 64) -> list[Prediction]:
    """What a student writes about each tile where nothing holds it to the closed set."""
    found = []
    for part in in_batches(records, 50):
        asked = [prompt_messages(record, "image", kind="tissue", k=LISTED) for record in part]
        ids = [decoder.tokenizer.chat_ids(messages, generate=True) for messages in asked]
        texts = decoder.generate(ids, longest, images=[[record.image] for record in part])
        found += [Prediction(r.id, text=decoder.tokenizer.decode(t)) for r, t in zip(part, texts, strict=True)]
    return found


def _write_page(folder: Path, settings: AlignSettings, reports: Mapping[str, Report]) -> None:
    names = ("objective", "beta", "rank", "lr", "epochs", "batch_size", "seed")
    write_report(
        folder / "report.html",
        reports,
        title="Tissues from pictures",
        student=ALIGNED,
        base=BASE,
        teacher=TAUGHT,
        curve=read_metrics(folder / "metrics.jsonl"),
        about={name.replace("_", " "): getattr(settings, name) for name in names},
        remark=_REMARK,
    )


def new_folder(root: str | Path = RUNS) -> Path:
    """The first of runs/tissue/1, runs/tissue/2, ... that holds no run."""
    number = 1
    while holds_run(Path(root) / str(number)):
        number += 1
    return Path(root) / str(number)


def newest(root: str | Path = RUNS) -> dict[str, Any]:
    """How `predict` loads the newest tissue run that ended in an adapter, or the shipped base where there is none."""
    if any((run.parent / "adapter").is_dir() for run in Path(root).glob("*/run.json")):
        return newest_run(root) | _asked()
    say(
        f"no run in {root}/: the shipped base answers, which is not aligned; `python cli.py align builtin:tissue` does it"
    )
    return {"model": str(TISSUE_STUDENT), "labels": tuple(tissues()), **_asked()}
