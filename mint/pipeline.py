"""The whole story on one screen: teach, prefer, align, predict, evaluate. Each verb is what the command of its name calls.

records --encoder--> scores --> ranking --> pairs --> token trees --> decoder + LoRA --> adapter --> predictions --> report
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import parallel
from .builtin.cases import records_of
from .config import AlignSettings
from .decoders import Decoder, student
from .decoders.vision_cache import FeatureStore
from .encoders import Encoder, load_encoder
from .errors import ConfigError, RecordError
from .evaluation import labels_of, lists_of_pairs, measure
from .evaluation.predictions import read_predictions
from .files import locked
from .jsonlines import refuse
from .labels import LabelSet, closed_set
from .pairs import check_label, prefer_pairs
from .pairs.files import can_be_written, read_pairs, write_pairs
from .pairs.pictures import Elsewhere
from .predicting import Questioner, answers_of_all, check_mode
from .progress import progress
from .ranking import rank
from .retrieval import Retriever, open_retriever
from .teaching import Taught, usable
from .teaching import teach as train_teacher
from .training import Trainer, beginning, runs
from .training.audit import audit
from .training.batches import token_pairs
from .types import Prediction, PreferencePair, Record, Report

READING: Mapping[str, Any] = MappingProxyType({})
"""How files of cases are read, where nothing is said of it: the options of `read_records`."""


def teach(
    cases: str | Path | Iterable[Record],
    *,
    out: str | Path,
    skipped: list[str] | None = None,
    reading: Mapping[str, Any] = READING,
    **choices: Any,
) -> Taught:
    """Train the fusion encoder on cases that have photo, note and label. `choices` are those of `teaching.teach`."""
    records = records_of(cases, reading, skipped)
    return train_teacher(records if skipped is None else usable(records, skipped), out=out, **choices)


def prefer(
    cases: str | Path | Iterable[Record],
    *,
    teacher: str | Path | Encoder,
    skipped: list[str] | None = None,
    reading: Mapping[str, Any] = READING,
    candidates: Mapping[str, Sequence[str]] | None = None,
    temperature: float | None = None,
    **choices: Any,
) -> Iterator[PreferencePair]:
    """The teacher ranks the classes of each case; its ranking becomes a pair. `choices` are those of `prefer_pairs`.

    `candidates` names, by the id of a case, the classes that it is ranked on; cases that it does not have, on all.
    """
    encoder = load_encoder(teacher) if isinstance(teacher, str | Path) else teacher
    for records, scores in encoder.score_batches(records_of(cases, reading, skipped), skipped):
        for record, row in zip(records, scores, strict=True):
            few = None if candidates is None else [candidates.get(record.id)]
            try:
                check_label(record, encoder.classes)
                ranked = rank([record.id], row[None], encoder.classes, candidates=few, temperature=temperature)
                yield from prefer_pairs(ranked, [record], **choices)
            except RecordError as fault:
                refuse(fault, skipped)


def align(
    settings: AlignSettings | None = None,
    pairs: str | Path | Iterable[PreferencePair] | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    skipped: list[str] | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Pairs (by default the file `settings.pairs`) -> an adapter in `settings.out`; with `dry_run` only the audit of them.

    `choices` are settings by name: `align(model="DIR", pairs="pairs.jsonl", out="runs/first", objective="dpo")`. Pairs
    that come from no file are written into the run, unless their pictures lie in none: so run.json alone repeats it.
    """
    if isinstance(pairs, str | Path):
        choices, pairs = {**choices, "pairs": pairs}, None
    settings = beginning.chosen(settings, choices, resume)
    folder = Path(settings.out)
    if not dry_run:
        settings = beginning.admitted(folder, settings, resume)
    if pairs is None:
        pairs = read_pairs(settings.pairs, image_folders=settings.image_folder, skipped=skipped)
    source = list(pairs)  # before what takes long
    decoder, adapter_config = student.to_train(settings, weights=not (dry_run and settings.spread))
    everything = token_pairs(source, decoder.tokenizer, settings, skipped)
    training, held_out = beginning.parted(everything, settings, skipped)
    if dry_run:
        return audit(decoder, training, settings)
    settings = beginning.resolved(decoder, settings, training)
    beginning.report_cuts(everything)
    if decoder.eyes is not None and settings.cache_gb:
        decoder.eyes.store = FeatureStore(folder / "features", int(settings.cache_gb * 1e9))
    kept, settings = _kept(source, settings)
    _run(Trainer(decoder, settings, folder, training, held_out, adapter_config), kept, resume)
    last = runs.read_metrics(folder / "metrics.jsonl")[-1]
    return {"out": str(folder), "adapter": str(folder / "adapter"), "steps": last["step"], "loss": last["loss"]}


def _kept(
    source: Sequence[PreferencePair], settings: AlignSettings
) -> tuple[list[PreferencePair] | None, AlignSettings]:
    """The pairs that the run has to keep, and the settings that find them and their pictures again; None, where a file has
    them or none can."""
    if settings.pairs or not can_be_written(source):
        return None, settings
    folder = Path(settings.out)
    elsewhere = Elsewhere(folder, settings.image_folder)
    kept = list(elsewhere.passing(source))
    return kept, replace(settings, pairs=str(folder / "pairs.jsonl"), image_folder=tuple(elsewhere.folders))


def _run(trainer: Trainer, kept: Sequence[PreferencePair] | None, resume: bool) -> None:
    """All steps, in a folder that nobody else writes into meanwhile; pairs to be `kept` are written there first."""
    folder, settings, eyes = trainer.folder, trainer.settings, trainer.decoder.eyes
    parallel.barrier()  # every rank has seen the folder as it was
    with locked(folder) if parallel.first() else nullcontext():
        if parallel.first():
            if not resume:
                runs.check_new(folder)  # again, now that no other run can begin here
            if kept is not None:
                write_pairs(settings.pairs, kept)
            facts = {"pairs": len(trainer.pairs), "held_out_pairs": len(trainer.held_out)}
            runs.write_run(folder, settings.as_dict(), facts)
        trainer.run(resume)
        if eyes is not None and eyes.store is not None:
            eyes.store.finish()


def predict(
    cases: str | Path | Iterable[Record],
    *,
    model: str | Path | Decoder,
    adapter: str | Path | None = None,
    labels: str | Path | Sequence[str] | LabelSet | None = None,
    mode: str = "rank",
    modality: str = "note",
    kind: str = "disease",
    template: str | None = None,
    top: int | None = 10,
    normalise: str = "sum",
    opening: str = "",
    alone: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    retrieve: str | Path | Retriever | None = None,
    retriever: str | Path | None = None,
    passages: int = 3,
    done: Collection[str] = (),
    skipped: list[str] | None = None,
    shard: bool = False,
    tensor_parallel: int | None = None,
    reading: Mapping[str, Any] = READING,
    **loading: Any,
) -> Iterator[Prediction]:
    """One modality of each case in, classes best first out.

    `mode`: "rank" is exact over `labels`, "list" the aligned list of `top` of them, "text" free text, with a `temperature`
    above 0 sampled, and the names found in it, those that are no label marked `outside`. `retrieve` is a file or folder of
    documents, of which the best `passages` stand before each case, found by words, or by meaning with the encoder
    `retriever`. Cases whose ids are in `done` are passed over. A decoder, LabelSet or Retriever that is
    given as such is used as it is, so that many calls can share them. `opening` is how an answer begins, for a model
    whose answers are lists: in rank mode a label is then scored as the first name, or with `alone` as the only one. With
    `shard` all ranks hold the decoder together, with `tensor_parallel` so many of them.
    """
    known = closed_set(labels)  # what is small is read before the decoder, so that its faults cost no wait
    check_mode(mode, known, temperature)
    if retriever is not None and retrieve is None:
        raise ConfigError(f"--retriever {retriever}: finds passages in the documents of --retrieve; give them too")
    if isinstance(retrieve, str | Path):
        retrieve = open_retriever(retrieve, retriever, str(loading.get("device", "auto")))
    decoder = model if isinstance(model, Decoder) else student.to_ask(model, adapter, shard, tensor_parallel, **loading)
    questioner = Questioner(
        decoder, known, mode=mode, modality=modality, kind=kind, template=template, top=top, normalise=normalise,
        opening=opening, alone=alone, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        retriever=retrieve, passages=passages,
    )  # fmt: skip
    records = (record for record in records_of(cases, reading, skipped) if record.id not in done)
    answers = answers_of_all(questioner, records, skipped)
    yield from answers if isinstance(cases, list | tuple) else progress(answers, "predicting", unit="case")


def evaluate(
    predictions: str | Path | Iterable[Prediction],
    *,
    truth: str | Path | Iterable[Record],
    labels: str | Path | Sequence[str] | None = None,
    pairs: str | Path | Iterable[PreferencePair] | None = None,
    image_folders: Sequence[str | Path] = (),
    **choices: Any,
) -> Report:
    """Predictions against what is true of the same cases, and with `pairs` also against what a teacher prefers there,
    whose pictures lie beside them or in `image_folders`. `choices` are those of `evaluation.measure`."""
    answers = read_predictions(predictions) if isinstance(predictions, str | Path) else predictions
    known, records = closed_set(labels), list(records_of(truth, READING, None))
    if pairs is not None:
        preferred = read_pairs(pairs, image_folders=image_folders) if isinstance(pairs, str | Path) else pairs
        choices["lists"] = lists_of_pairs(preferred, known or labels_of(records))
    return measure(answers, records, labels=known, **choices)
