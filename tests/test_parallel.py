"""Several ranks: the same numbers as one, files by the first alone, and an end for all when one fails, stops or dies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from students import run_settings, text_pairs, trainer_of, untimed, write_pairs_file, write_student

from mint.losses import OBJECTIVES
from mint.pipeline import align
from mint.training import Trainer, runs
from mint.training.batches import dealt

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_pairs(14))


def settings_of(model: Path, pairs: Path, out: Path, **changes: Any) -> Any:
    usual = {"model": str(model), "pairs": str(pairs), "out": str(out), "steps": 4, "batch_size": 5, "lr": 1e-4}
    return run_settings(**{**usual, **changes})


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in runs.read_metrics(folder / "metrics.jsonl")]


# ---- the same numbers -----------------------------------------------------------------------------------------------


def every_objective(model: Path, pairs: Path, out: Path) -> None:
    for objective in OBJECTIVES:
        align(settings_of(model, pairs, out / objective, objective=objective, tokens_per_batch=1, held_out=0.2))


def test_many_ranks_have_the_loss_curve_of_one(model: Path, pairs: Path, tmp_path: Path) -> None:
    """Five pairs a step on four ranks, or the one that is left of an epoch: unequal shares, and ranks without any."""
    every_objective(model, pairs, tmp_path / "1")
    for count in (2, 4):
        on_ranks(count, every_objective, model, pairs, tmp_path / str(count))
    for objective in OBJECTIVES:
        one, two, four = (losses(tmp_path / count / objective) for count in ("1", "2", "4"))
        assert len(set(one)) == 4
        close = 1e-5 if objective == "ipo" else 1e-6  # it squares the difference of large sums
        assert two == pytest.approx(one, rel=close), objective
        assert four == pytest.approx(one, rel=close), objective
        held = [runs.read_metrics(tmp_path / count / objective / "evaluations.jsonl") for count in ("1", "2")]
        assert held[1][-1]["loss"] == pytest.approx(held[0][-1]["loss"], rel=close)


def test_shares_are_of_like_size_and_complete(model: Path) -> None:
    pairs = trainer_of(model, Path("unused"), 9).pairs
    hands = dealt(pairs, 4)
    assert sorted(pair.id for hand in hands for pair in hand) == sorted(pair.id for pair in pairs)
    tokens = [sum(pair.size for pair in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= max(pair.size for pair in pairs)
    assert dealt(pairs[:1], 3)[1:] == [[], []]
    assert dealt(pairs, 1) == [list(pairs)]


# ---- checkpoints ----------------------------------------------------------------------------------------------------

LONG = {"steps": 8, "save_every": 2, "dropout": 0.2, "objective": "dpo", "schedule": "cosine"}


def begin_and_break(model: Path, pairs: Path, out: Path) -> None:
    """A run that ends within its sixth step, as if it were killed there."""
    real = Trainer.refuse_not_finite

    def breaking(self: Trainer, *rest: Any) -> None:
        if self.step == 5:
            os._exit(0)
        real(self, *rest)

    Trainer.refuse_not_finite = breaking  # type: ignore[method-assign]
    align(settings_of(model, pairs, out, **LONG))


def whole(model: Path, pairs: Path, out: Path, resume: bool = False) -> None:
    align(settings_of(model, pairs, out, **LONG), resume=resume)


def outcome(folder: Path) -> tuple[Any, bytes]:
    return untimed(runs.read_metrics(folder / "metrics.jsonl")), (folder / WEIGHTS).read_bytes()


def test_a_run_on_two_ranks_resumes_bit_for_bit_and_on_another_number_too(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    on_ranks(2, whole, model, pairs, tmp_path / "whole")
    on_ranks(2, begin_and_break, model, pairs, tmp_path / "broken")
    shutil.copytree(tmp_path / "broken", tmp_path / "fewer")
    shutil.copytree(tmp_path / "broken", tmp_path / "more")
    on_ranks(2, whole, model, pairs, tmp_path / "broken", True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    whole(model, pairs, tmp_path / "fewer", True)
    on_ranks(3, whole, model, pairs, tmp_path / "more", True)
    for name in ("fewer", "more"):
        found, wanted = losses(tmp_path / name), losses(tmp_path / "whole")
        assert found[:4] == wanted[:4]
        assert found == pytest.approx(wanted, rel=1e-2)  # other numbers are dropped out
