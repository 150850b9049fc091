"""A run that was interrupted, by a request or by a kill, ends in the same numbers and bytes as one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from students import run_settings, saved, text_pairs, trainer_of, untimed, write_pairs_file, write_student

from mint.config import AlignSettings
from mint.errors import CheckpointError, ConfigError, WorkError
from mint.files import locked
from mint.pipeline import align
from mint.progress import set_quiet
from mint.training import Trainer, runs
from mint.training.launched import Launched
from mint.weights import states
from mint.weights.states import save_state

WEIGHTS = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
STATE = ("checkpoint/rank-0.safetensors", "checkpoint/state.json")
STEPS = 40


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_pairs(10))


class Stopped(Exception):  # noqa: N818 - stands for a kill
    """What ends a run from outside."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From here on a run ends within the step after `step`, with its gradients made and its weights not moved."""
    real = Launched.refuse_not_finite

    def stopping(self: Launched) -> None:
        if self.step == step + 1:
            raise Stopped
        real(self)

    monkeypatch.setattr(Launched, "refuse_not_finite", stopping)


def outcome(folder: Path) -> tuple[Any, ...]:
    """All that must be the same: metrics and evaluations but for timings, and the adapter's bytes."""
    rows = [untimed(runs.read_metrics(folder / name)) for name in ("metrics.jsonl", "evaluations.jsonl")]
    return *rows, (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes()


@pytest.mark.parametrize("held_out", [0, 3])
@pytest.mark.parametrize("objective", ["orpo", "dpo"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    model: Path, tmp_path: Path, objective: str, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps to an epoch, a checkpoint after every second, stopped within the sixth: mid-epoch, with dropout."""
    settings: dict[str, Any] = {
        "objective": objective, "steps": 8, "save_every": 2, "eval_every": 3, "dropout": 0.2, "schedule": "cosine",
        "warmup": 0.2, "tokens_per_batch": 60, "weight_decay": 0.1,
    }  # fmt: skip
    trainer_of(model, tmp_path / "whole", 10, held_out=held_out, **settings).run()
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            trainer_of(model, tmp_path / "broken", 10, held_out=held_out, **settings).run()
    assert [row["step"] for row in runs.read_metrics(tmp_path / "broken/metrics.jsonl")] == [1, 2, 3, 4, 5]
    second = trainer_of(model, tmp_path / "broken", 10, held_out=held_out, **settings)
    second.run(resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert len(runs.read_metrics(tmp_path / "broken/metrics.jsonl")) == 8


def test_a_resumed_run_takes_up_its_checkpoint_and_not_the_beginning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 6, "save_every": 2, "objective": "dpo"}
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            trainer_of(model, tmp_path, 10, **settings).run()
    seen: list[int] = []
    real = Trainer.launch
    monkeypatch.setattr(Trainer, "launch", lambda self: seen.append(self.step) or real(self))
    monkeypatch.setattr("mint.training.progress", lambda *_: pytest.fail("the reference was computed again"))
    trainer_of(model, tmp_path, 10, **settings).run(resume=True)
    assert seen == [4, 5]


def test_a_resumed_run_that_forgot_something_would_be_seen(model: Path, tmp_path: Path) -> None:
    """The moments, the random state and the step each matter to the outcome."""
    settings: dict[str, Any] = {"steps": 4, "save_every": 2, "dropout": 0.3, "schedule": "linear"}
    trainer_of(model, tmp_path / "whole", 6, **settings).run()
    for name in ("random.cpu.0", "model.layers.0.mlp.up_proj.lora_A.exp_avg", "step"):
        out = tmp_path / name
        first = trainer_of(model, out, 6, **settings)
        first.total = 2
        first.run()
        tensors, state = saved(out)
        if name == "step":
            state["step"] = 1
        else:
            other = torch.Generator().manual_seed(9).get_state()
            tensors[name] = other if name == "random.cpu.0" else tensors[name].roll(1, 0)
        save_state(out / runs.CHECKPOINT, tensors, state)
        trainer_of(model, out, 6, **settings).run(resume=True)
        assert (out / WEIGHTS).read_bytes() != (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_finished_run_that_is_resumed_stays_as_it_is(model: Path, pairs: Path, tmp_path: Path) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(tmp_path / "run"), steps=3)
    first = align(settings)
    before = outcome(tmp_path / "run")
    assert align(settings, resume=True) == first
    assert outcome(tmp_path / "run") == before


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_again(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(tmp_path / "run"), steps=3)
    align(replace(settings, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            align(settings)
    align(settings, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    align(replace(settings, out=str(tmp_path / "none")), resume=True)  # ended before it wrote anything
    assert outcome(tmp_path / "none") == outcome(tmp_path / "whole")


def test_what_a_kill_left_half_written_is_cleared_away(model: Path, pairs: Path, tmp_path: Path) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(tmp_path), steps=2)
    align(settings)
    (tmp_path / ".checkpoint.x.part").mkdir()
    (tmp_path / ".checkpoint.x.part/rank-0.safetensors").write_bytes(b"half")
    (tmp_path / ".adapter.x.part").mkdir()
    (tmp_path / ".adapter.x.old").mkdir()
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text() + '{"step": 3, "lo')
    align(settings, resume=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [
        ".lock", CONFIG, WEIGHTS, *STATE, "metrics.jsonl", "run.json"
    ]  # fmt: skip
    assert len(runs.read_metrics(tmp_path / "metrics.jsonl")) == 2


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    align(run_settings(model=str(model), pairs=str(pairs), out=str(out), steps=2, targets=("q_proj",)))
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, r"--lr is 0\.5, the run was begun with 0\.001; resume with the same settings"),
        ({"rank": 8}, r"--rank is 8, the run was begun with 4"),
        ({"objective": "dpo"}, "--objective is dpo, the run was begun with orpo"),
        ({"steps": 3}, "--steps is 3, the run was begun with 2"),
        ({"targets": ("v_proj",)}, "--targets is .*v_proj.*, the run was begun with .*q_proj"),
        ({"dtype": "bfloat16"}, "--dtype is bfloat16, the run was begun with float32"),
        ({"date": "01 Jan 2020"}, "--date is 01 Jan 2020, the run was begun with 26 Jul 2024"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    model: Path, pairs: Path, finished: Path, change: dict[str, Any], message: str
) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(finished), steps=2, targets=("q_proj",))
    before = outcome(finished)
    with pytest.raises(ConfigError, match=message):
        align(replace(settings, **change), resume=True)
    assert outcome(finished) == before


def test_what_is_left_open_is_taken_from_the_run(model: Path, pairs: Path, finished: Path) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(finished), steps=2, targets=("q_proj",))
    align(replace(settings, date=None, dtype="auto", device="auto", recompute=None, nll=None), resume=True)
    assert runs.read_run(finished)["date"] == "26 Jul 2024"


def test_resuming_with_other_pairs_is_refused_and_the_same_elsewhere_are_taken(
    model: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(finished), steps=2, targets=("q_proj",))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(pairs.read_bytes())
    align(replace(settings, pairs=str(moved)), resume=True)
    write_pairs_file(moved, text_pairs(10, seed=1))
    with pytest.raises(ConfigError, match=r"moved\.jsonl: not the pairs that .*run was begun with"):
        align(replace(settings, pairs=str(moved)), resume=True)


def test_a_checkpoint_of_another_adapter_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    trainer_of(model, tmp_path, 4, steps=1).run()
    with pytest.raises(
        CheckpointError, match=r"checkpoint: \S+lora_A is float32 \[4, 128\], wanted float32 \[2, 128\]"
    ):
        trainer_of(model, tmp_path, 4, steps=2, rank=2).run(resume=True)
    with pytest.raises(CheckpointError, match=r"checkpoint: lm_head\.lora_A is missing, wanted float32 \[4, 128\]"):
        trainer_of(model, tmp_path, 4, steps=2, targets=("lm_head",)).run(resume=True)


def test_a_broken_checkpoint_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    trainer_of(model, tmp_path, 4, steps=1).run()
    state = tmp_path / STATE[0]
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors"):
        trainer_of(model, tmp_path, 4, steps=1).run(resume=True)


def test_numbers_or_generators_that_are_none_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    trainer_of(model, tmp_path, 4, steps=1).run()
    tensors, numbers = saved(tmp_path)
    changes: tuple[dict[str, Any], ...] = ({"step": "1"}, {"step": -1}, {"best": True}, {"best": "low"}, {"pairs": 1})
    for change in changes:
        save_state(tmp_path / runs.CHECKPOINT, tensors, {**numbers, **change})
        with pytest.raises(
            CheckpointError, match="checkpoint: not a checkpoint of a run; give the folder that a run wr"
        ):
            trainer_of(model, tmp_path, 4, steps=1).run(resume=True)
    save_state(tmp_path / runs.CHECKPOINT, {**tensors, "random.cpu.0": tensors["random.cpu.0"] * 0}, numbers)
    with pytest.raises(CheckpointError, match=r"checkpoint: random\.cpu\.0 is no state of a generator \("):
        trainer_of(model, tmp_path, 4, steps=1).run(resume=True)


def test_a_folder_that_holds_a_run_is_refused_without_resume(model: Path, pairs: Path, finished: Path) -> None:
    before = outcome(finished)
    with pytest.raises(ConfigError, match="holds a run already; give --resume to continue it, or another --out"):
        align(run_settings(model=str(model), pairs=str(pairs), out=str(finished)))
    assert outcome(finished) == before


def test_a_second_run_into_one_folder_is_refused(model: Path, pairs: Path, tmp_path: Path) -> None:
    settings = run_settings(model=str(model), pairs=str(pairs), out=str(tmp_path), steps=2)
    with locked(tmp_path), pytest.raises(ConfigError, match="another run is writing here; wait for it or give"):
        align(settings)
    assert not (tmp_path / "run.json").exists()
    align(settings)


def test_a_full_disk_leaves_the_last_checkpoint(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"steps": 4, "save_every": 1}
    trainer_of(model, tmp_path / "whole", 4, **settings).run()
    real = states.write_tensors

    def full(file: Any, tensors: Any, metadata: Any) -> None:
        if len(runs.read_metrics(tmp_path / "full/metrics.jsonl")) == 3:
            file.write(b"some of it")
            raise OSError(28, "No space left on device")
        real(file, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(states, "write_tensors", full)
        with pytest.raises(WorkError, match=r"full/checkpoint: cannot be written \(No space left on device\)"):
            trainer_of(model, tmp_path / "full", 4, **settings).run()
    trainer_of(model, tmp_path / "full", 4, **settings).run(resume=True)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


# ---- kill -9 --------------------------------------------------------------------------------------------------------


def run_of(settings: AlignSettings) -> BaseProcess:
    """A run in a process of its own, forked from one that has done nothing but import, so that many can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mint.pipeline", "torch.distributed.checkpoint", "students"])
    process = context.Process(target=resume_quietly, args=(settings,))
    process.start()
    return process


def resume_quietly(settings: AlignSettings) -> None:
    set_quiet(True)
    align(settings, resume=True)


def wait_for_step(process: BaseProcess, folder: Path, step: int) -> None:
    """Until the run has written the line of this step; 0 waits for nothing."""
    metrics = folder / "metrics.jsonl"
    while process.is_alive() and step and (not metrics.exists() or metrics.read_text().count("\n") < step):
        time.sleep(0.002)


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(model: Path, pairs: Path, tmp_path: Path) -> None:
    """Killed again and again, a run that is resumed each time ends as one that nobody touched; more kills with MINT_LONG."""
    kills = 20 if os.environ.get("MINT_LONG") else 4
    settings = run_settings(
        model=str(model), pairs=str(pairs), out=str(tmp_path / "whole"), objective="dpo", dropout=0.2, steps=STEPS,
        save_every=1, eval_every=3, held_out=0.3, batch_size=3,
    )  # fmt: skip
    run_of(settings).join()  # the first one waits for the imports
    draw, broken, reached = random.Random(7), replace(settings, out=str(tmp_path / "broken")), []
    for kill in range(kills):
        process = run_of(broken)
        wait_for_step(process, tmp_path / "broken", kill * STEPS // kills)
        time.sleep(
            draw.uniform(0, 0.2)
        )  # some steps, each with a line, a checkpoint, often an evaluation and an adapter
        process.kill()
        process.join()
        reached.append(len(runs.read_metrics(tmp_path / "broken/metrics.jsonl")))
    last = run_of(broken)
    last.join()
    assert last.exitcode == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert any(0 < step < STEPS for step in reached), reached
    assert runs.read_metrics(tmp_path / "broken/evaluations.jsonl")
