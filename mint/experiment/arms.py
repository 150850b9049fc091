"""The systems that an experiment compares. Each learns from the same cases of a seed and answers the same others.

base         the decoder as it is                       rag        the same, shown the nearest training cases
sft          learns the true label                      sft-list   learns the teacher's list, nothing rejected
dpo          DPO on the pairs, from the SFT model       orpo       MINT: ORPO on the pairs
teacher      the encoder, which sees photo and note     bayes-*    naive Bayes over findings or words

Where only some cases are diagnosed, those that need a diagnosis (rag, sft, bayes-*) learn from these alone; the teacher
ranks them all.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import pipeline
from ..answers import answer_text, opening
from ..bayes import NaiveBayes, words
from ..config import AlignSettings
from ..decoders import Decoder, load_decoder
from ..decoders.merging import merge
from ..errors import ConfigError
from ..pairs import PAPER_SIZES
from ..prompts import default_template
from ..retrieval import Bm25, Passage, Retriever, open_retriever
from ..showcase import teacher_predictions
from ..training.runs import holds_run
from ..types import Prediction, PreferencePair, Record
from .tasks import Task
from .tellings import retold

KEPT = 20
"""Names of an answer that are kept: what comes after them counts as not named."""


@dataclass
class Bench:
    """A task with everything that the systems of one comparison share; `own` are settings that --tune found for an arm.

    A decoder is asked for the exact probability of every class, or, `written`, for the list that it writes by itself.
    Of the cases to learn from, `labelled` of each seed have a known diagnosis, all of them unless given. Students learn from
    `tellings` of each case: its note, and parts of it; the teacher has seen the whole case each time.
    """

    task: Task
    settings: AlignSettings
    folder: Path
    choices: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    labelled: int | None = None
    tellings: int = 1
    documents: str | None = None
    passages: int = 3
    dpo_from: str = "sft-list"
    dpo_lr: float | None = None
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    written: bool = False
    _pairs: dict[int, list[PreferencePair]] = field(default_factory=dict)
    _base: list[Decoder] = field(default_factory=list)

    def learnt(self, seed: int) -> list[Record]:
        """The cases of a seed. The labels that are not to be known are taken away here, before any system sees them."""
        cases = self.task.learnt(seed, self.size)
        if self.labelled is None:
            return cases
        kept = set(random.Random(seed).sample(range(len(cases)), min(self.labelled, len(cases))))
        return [case if at in kept else replace(case, label=None, labels=()) for at, case in enumerate(cases)]

    def diagnosed(self, seed: int) -> dict[str, Record]:
        """The cases of a seed whose label is known, by their ids."""
        return {case.id: case for case in self.learnt(seed) if case.label is not None}

    def pairs(self, seed: int) -> list[PreferencePair]:
        """The preference pairs of a seed's cases, telling after telling."""
        if seed not in self._pairs:
            self._pairs = {seed: [pair for number in range(self.tellings) for pair in self._telling(seed, number)]}
        return self._pairs[seed]

    def _telling(self, seed: int, number: int) -> Iterator[PreferencePair]:
        """The pairs of one telling; the first is of the notes as they are."""
        cases, task = self.learnt(seed), self.task
        if number:
            cases = [retold(case, tuple(task.told(case)), f"{seed}:{number}") for case in cases]
        for pair in pipeline.prefer(cases, teacher=task.teacher, kind=task.kind, seed=seed, **self.choices):
            yield replace(pair, id=_as_told(pair.id, number))

    @property
    def base(self) -> Decoder:
        if not self._base:
            self._base.append(load_decoder(self.settings.model, **self.loading))
        return self._base[0]

    @property
    def loading(self) -> dict[str, Any]:
        return {"device": self.settings.device, "dtype": self.settings.dtype, "date": self.settings.date}

    @property
    def k(self) -> int:
        return int(self.choices.get("chosen_k") or PAPER_SIZES[self.task.kind][0])

    @property
    def q(self) -> int:
        return int(self.choices.get("rejected_q") or PAPER_SIZES[self.task.kind][1])

    def ask(self, model: str | Path | Decoder, **more: Any) -> list[Prediction]:
        """What a decoder says of the judged cases, asked in the words of the pairs."""
        asked: dict[str, Any] = {
            "labels": self.task.classes,
            "top": KEPT,
            "kind": self.task.kind,
            "template": default_template("note", self.task.kind).replace("{k}", str(self.k)),
        }
        asked |= {"mode": "text"} if self.written else {"opening": opening(self.task.kind)}
        loading = {} if isinstance(model, Decoder) else self.loading
        return list(pipeline.predict(list(self.task.judged), model=model, **asked, **loading, **more))


@dataclass(frozen=True)
class Arm:
    """One system: what it is called, how it answers, what it draws by the seed, and what the page shows it as."""

    title: str
    answers: Callable[[Bench, int], list[Prediction]]
    trains: bool = False
    uses_cases: bool = False

    def seeds(self, task: Task, seeds: Sequence[int]) -> list[int]:
        """The seeds that make a difference: one is enough where nothing is drawn by it."""
        several = self.trains or (self.uses_cases and task.redrawn)
        return list(seeds if several else seeds[:1])


def _base(bench: Bench, _: int) -> list[Prediction]:
    return bench.ask(bench.base)


def _rag(bench: Bench, seed: int) -> list[Prediction]:
    return bench.ask(bench.base, retrieve=_retriever(bench, seed), passages=bench.passages)


def _retriever(bench: Bench, seed: int) -> Retriever:
    """The documents given, else the notes of the diagnosed training cases with their diagnoses."""
    if bench.documents is not None:
        return open_retriever(bench.documents)
    return Bm25(
        [Passage(case.id, f"{case.note.strip()} Diagnosis: {case.label}") for case in bench.diagnosed(seed).values()]
    )


def _sft(bench: Bench, seed: int) -> list[Prediction]:
    return bench.ask(bench.settings.model, adapter=_trained(bench, "sft", seed) / "adapter", alone=True)


def _of_pairs(name: str) -> Callable[[Bench, int], list[Prediction]]:
    """An arm that is trained on the preference pairs from the base."""

    def answers(bench: Bench, seed: int) -> list[Prediction]:
        return bench.ask(bench.settings.model, adapter=_trained(bench, name, seed) / "adapter")

    return answers


def _dpo(bench: Bench, seed: int) -> list[Prediction]:
    """SFT first; its adapter is merged, so that the SFT model is what DPO starts from and what it is held against."""
    merged = bench.folder / "runs" / f"merged-{seed}"
    merge(bench.settings.model, _trained(bench, bench.dpo_from, seed) / "adapter", merged, **bench.loading)
    try:
        return bench.ask(merged, adapter=_trained(bench, "dpo", seed, str(merged)) / "adapter")
    finally:
        shutil.rmtree(merged)


def _trained(bench: Bench, name: str, seed: int, model: str | None = None) -> Path:
    """The folder of a run, trained or taken up where it was stopped."""
    folder = bench.folder / "runs" / f"{name}-{seed}"
    objective = name.partition("-")[0]
    pairs = _labelled(bench, seed) if name == "sft" else bench.pairs(seed)
    own: dict[str, Any] = {
        "objective": objective,
        "out": str(folder),
        "seed": seed,
        "model": model or bench.settings.model,
        "lr": (bench.dpo_lr if name == "dpo" else None) or bench.settings.lr,
    }
    settings = replace(bench.settings, **{**own, **bench.own.get(name, {})})
    pipeline.align(settings, pairs, resume=holds_run(folder))
    return folder


def _labelled(bench: Bench, seed: int) -> list[PreferencePair]:
    """The same prompts, answered with the true label alone; those without a known one are left out."""
    known = {_as_told(i, number): c for i, c in bench.diagnosed(seed).items() for number in range(bench.tellings)}

    def answer(case: Record) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": answer_text([case.label or ""], bench.task.kind)}]

    return [replace(pair, chosen=answer(known[pair.id])) for pair in bench.pairs(seed) if pair.id in known]


def _as_told(case: str, number: int) -> str:
    """The name of a case's pair in one of its tellings."""
    return f"{case}, telling {number + 1}" if number else case


def _teacher(bench: Bench, _: int) -> list[Prediction]:
    found = teacher_predictions(bench.task.teacher, bench.task.judged)
    return [replace(prediction, ranking=prediction.ranking[:KEPT]) for prediction in found]


def _bayes(items: Callable[[Task, Record], Any]) -> Callable[[Bench, int], list[Prediction]]:
    """Naive Bayes over what `items` finds in a case."""

    def answers(bench: Bench, seed: int) -> list[Prediction]:
        task = bench.task
        counted = ((items(task, case), case.label or "") for case in bench.diagnosed(seed).values())
        model = NaiveBayes(counted, task.classes)
        found = (model.predict(case.id, items(task, case)) for case in task.judged)
        return [replace(prediction, ranking=prediction.ranking[:KEPT]) for prediction in found]

    return answers


ARMS: Mapping[str, Arm] = {
    "base": Arm("base", _base),
    "rag": Arm("RAG: base with the nearest cases", _rag, uses_cases=True),
    "sft": Arm("SFT on the true label", _sft, trains=True),
    "sft-list": Arm("SFT on the teacher's list", _of_pairs("sft-list"), trains=True),
    "dpo": Arm("DPO from the SFT model", _dpo, trains=True),
    "orpo": Arm("MINT: ORPO", _of_pairs("orpo"), trains=True),
    "bayes-words": Arm("naive Bayes, words of the note", _bayes(lambda _, case: words(case.note)), uses_cases=True),
    "bayes": Arm("naive Bayes, findings of the note", _bayes(lambda t, case: t.told(case)), uses_cases=True),
    "bayes-all": Arm("naive Bayes, all findings", _bayes(lambda t, case: t.all_findings(case)), uses_cases=True),
    "teacher": Arm("teacher, photo and note", _teacher),
}
YARDSTICKS = ("bayes-words", "bayes", "bayes-all", "teacher")
"""Systems that are in every table; the others are the objectives that are asked for."""
OBJECTIVES = tuple(name for name in ARMS if name not in YARDSTICKS)


def check_objectives(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in OBJECTIVES]
    if unknown or not names:
        found = f"{unknown[0]!r} is none" if unknown else "none given"
        raise ConfigError(f"--objectives: {found}; wanted some of {', '.join(OBJECTIVES)}")


def has_findings(task: Task) -> bool:
    """Whether the cases name findings that naive Bayes could count."""
    return any(task.told(record) for record in task.judged)
