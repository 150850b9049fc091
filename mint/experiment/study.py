"""Running an experiment: every system and seed once, its answers in a file, so that a stopped one goes on where it was.

out/predictions/ARM-SEED.jsonl    rankings           out/runs/ARM-SEED/     adapters
out/written/ARM-SEED.jsonl        lists as written   out/vary/, train-sizes/, tune/    the same for what was varied
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.predictions import read_predictions, write_predictions
from ..files import read_json, write_json
from ..progress import say
from ..types import Prediction
from .arms import ARMS, YARDSTICKS, Bench, has_findings
from .facts import digest, model_files, note_facts
from .figures import Runs, Table, table
from .variations import grid, parse_vary, sized, tried, varied

PLAN = "study.json"


@dataclass(frozen=True)
class Plan:
    """What is compared: systems, seeds, and the variations with the systems that they are run for."""

    objectives: Sequence[str]
    seeds: Sequence[int]
    vary: Sequence[str] = ()
    train_sizes: Sequence[int] = ()
    vary_objectives: Sequence[str] = ("orpo",)
    tune: bool = False
    tune_lr: Sequence[float] = ()
    tune_epochs: Sequence[float] = ()


@dataclass(frozen=True)
class Outcomes:
    """What came of a plan; `answers` are those of the main comparison, `tuned` says what --tune tried and took.

    `table` judges the rankings of a closed set, `written` the lists that the decoders write by themselves.
    """

    table: Table
    answers: Mapping[str, Runs]
    written: Table
    varied: Mapping[str, Sequence[tuple[Any, Table]]] = field(default_factory=dict)
    curve: Sequence[tuple[int, Table]] = ()
    tuned: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def run(bench: Bench, plan: Plan) -> Outcomes:
    """The main comparison, then what is varied."""
    variations = [parse_vary(text) for text in plan.vary]
    note_facts(bench.folder / PLAN, _facts(bench, plan))
    yardsticks = [name for name in YARDSTICKS if name not in ("bayes", "bayes-all") or has_findings(bench.task)]
    if len(yardsticks) < len(YARDSTICKS):
        say("the cases name no findings: naive Bayes counts the words of their notes alone")
    tuned = _tuned(bench, plan) if plan.tune else {}
    bench.own = {**bench.own, **{name: found["taken"] for name, found in tuned.items()}}
    answers = all_answers(bench, [*plan.objectives, *yardsticks], plan.seeds)
    others = [name for name in plan.vary_objectives if name in plan.objectives]
    if (plan.vary or plan.train_sizes) and not others:
        raise ConfigError(f"--vary-objectives: none of {', '.join(plan.vary_objectives)} is among --objectives")
    return Outcomes(
        table(bench.task, answers, plan.seeds),
        answers,
        _table(replace(bench, written=True), plan.objectives, plan),
        {name: [(value, _table(varied(bench, name, value), others, plan)) for value in values] for name, values in variations},
        [(size, _table(sized(bench, size), others, plan)) for size in plan.train_sizes],
        tuned,
        _seconds(bench.folder),
    )  # fmt: skip


def _table(bench: Bench, names: Sequence[str], plan: Plan) -> Table:
    return table(bench.task, all_answers(bench, names, plan.seeds), plan.seeds)


def all_answers(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Runs]:
    """The answers of each system for each of its seeds; seed by seed, so that a seed's pairs are made once."""
    found: dict[str, dict[int, Sequence[Prediction]]] = {name: {} for name in names}
    for seed in seeds:
        for name in names:
            if seed in ARMS[name].seeds(bench.task, seeds):
                found[name][seed] = _answers(bench, name, seed)
    return dict(found)


def _answers(bench: Bench, name: str, seed: int) -> list[Prediction]:
    """The answers of one system and seed, from their file where it is there."""
    kind = "written" if bench.written else "predictions"
    path = bench.folder / kind / f"{name}-{seed}.jsonl"
    if not path.is_file():
        say(f"{ARMS[name].title}, seed {seed}: {path}")
        begun = time.monotonic()
        answers = ARMS[name].answers(bench, seed)
        _note_seconds(bench.folder, f"{kind}/{path.stem}", time.monotonic() - begun)
        write_predictions(path, answers)
    return list(read_predictions(path))


def _tuned(bench: Bench, plan: Plan) -> dict[str, Any]:
    """For each system that is trained: the grid, what each point of it reached on the validation part, and the best."""
    found: dict[str, Any] = {}
    order = sorted(plan.objectives, key=lambda name: name == "dpo")  # it starts from the tuned SFT model
    for name in (name for name in order if ARMS[name].trains):
        points = [
            {"lr": lr, "epochs": epochs, **_reached(tried(bench, name, lr, epochs), name, plan.seeds[:1])}
            for lr, epochs in grid(bench.settings, plan.tune_lr, plan.tune_epochs)
        ]
        best = max(points, key=lambda point: point["top_1"] + point["top_10"])
        found[name] = {"tried": points, "taken": {key: best[key] for key in ("lr", "epochs")}}
        bench.own = {**bench.own, name: found[name]["taken"]}
    return found


def _reached(bench: Bench, name: str, seeds: Sequence[int]) -> dict[str, float]:
    row = table(bench.task, all_answers(bench, [name], seeds), seeds).rows[name]
    return {key: row[key]["value"] for key in ("top_1", "top_10")}


def _note_seconds(folder: Path, name: str, seconds: float) -> None:
    write_json(folder / "seconds.json", {**_seconds(folder), name: round(seconds, 1)})


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    return dict(read_json(path)) if path.is_file() else {}


def _facts(bench: Bench, plan: Plan) -> dict[str, Any]:
    """What the answers depend on."""
    task, left = bench.task, ("out", "objective", "pairs", "seed", "adapter")
    settings = {name: value for name, value in bench.settings.as_dict().items() if name not in left}
    cases = digest([(case.id, case.note) for case in task.judged])
    facts = {"task": task.name, "classes": digest(task.classes), "cases": cases, **task.facts, **settings}
    names = ("choices", "size", "labelled", "tellings", "documents", "passages", "dpo_from", "dpo_lr")
    facts |= {name: getattr(bench, name) for name in names} | {"model_files": model_files(Path(bench.settings.model))}
    return facts | {"tune": [list(plan.tune_lr), list(plan.tune_epochs)] if plan.tune else None}
