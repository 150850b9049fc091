"""Several ranks: the same numbers as one, files by the first alone, and an end for all when one fails, stops or dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks, start_ranks
from students import ROOT, run_settings, saved, text_pairs, trainer_of, untimed, write_pairs_file, write_student

from mint import parallel
from mint.errors import Stopped
from mint.files import write_json
from mint.losses import OBJECTIVES
from mint.parallel import group
from mint.pipeline import align, predict, prefer
from mint.training import Trainer, runs
from mint.training.batches import dealt
from mint.training.launched import Launched
from mint.types import Record

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


def objectives(model: Path, pairs: Path, out: Path, names: tuple[str, ...] = tuple(OBJECTIVES)) -> None:
    for objective in names:
        align(settings_of(model, pairs, out / objective, objective=objective, tokens_per_batch=1, held_out=0.2))


def test_many_ranks_have_the_loss_curve_of_one(model: Path, pairs: Path, tmp_path: Path) -> None:
    """Every objective on two ranks, a reference's and a pooled one on four: five pairs a step, or the few that are left of an
    epoch, so shares are unequal and some ranks have none."""
    objectives(model, pairs, tmp_path / "1")
    on_ranks(2, objectives, model, pairs, tmp_path / "2")
    on_ranks(4, objectives, model, pairs, tmp_path / "4", ("orpo", "dpo", "ipo"))
    for objective in OBJECTIVES:
        one, two, four = (losses(tmp_path / count / objective) for count in ("1", "2", "4"))
        assert len(set(one)) == 4
        assert two == pytest.approx(one, rel=1e-6), objective
        assert not four or four == pytest.approx(one, rel=1e-6), objective
        held = [runs.read_metrics(tmp_path / count / objective / "evaluations.jsonl") for count in ("1", "2")]
        assert held[1][-1]["loss"] == pytest.approx(held[0][-1]["loss"], rel=1e-6)


def packed(model: Path, out: Path, names: tuple[str, ...], exact: bool) -> None:
    """Many pairs to a batch, others on another number of ranks; `exact`: the network in float64."""
    for objective in names:
        words: dict[str, Any] = {"objective": objective, "batch_size": 6, "steps": 4, "lr": 1e-4}
        trainer = trainer_of(model, out / objective, 12, **words)
        if exact:
            trainer.decoder.network.double()
        trainer.run()


def test_what_is_left_between_one_rank_and_two_is_the_rounding_of_the_network(model: Path, tmp_path: Path) -> None:
    """With a network in float64 next to nothing is left; in float32 less than 1e-6 of any loss."""
    far: dict[tuple[str, bool], float] = {}
    for exact, names in ((True, ("ipo", "orpo")), (False, tuple(OBJECTIVES))):
        one, two = tmp_path / f"{exact}-1", tmp_path / f"{exact}-2"
        packed(model, one, names, exact)
        on_ranks(2, packed, model, two, names, exact)
        for name in names:
            pairs = zip(losses(one / name), losses(two / name), strict=True)
            far[name, exact] = max(abs(a - b) / abs(a) for a, b in pairs)
    assert max(far["ipo", True], far["orpo", True]) < 1e-9, far
    assert 1e-9 < max(far[name, False] for name in OBJECTIVES) < 1e-6, far


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
    real = Launched.refuse_not_finite

    def breaking(self: Launched) -> None:
        if self.step == 6:
            os._exit(0)
        real(self)

    Launched.refuse_not_finite = breaking  # type: ignore[method-assign]
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


# ---- records shared out ---------------------------------------------------------------------------------------------


def answers(model: Path, out: Path) -> None:
    records = [Record(f"case-{n}", note=f"thin {'tall ' * (n % 5)}nose") for n in range(70)]
    lines = [
        json.dumps({"id": record.id, "scores": {"a": n % 7, "b": n % 3, "c": 1}}) for n, record in enumerate(records)
    ]
    out.mkdir(exist_ok=True)
    (scores := out / f"scores-{parallel.rank()}.jsonl").write_text("\n".join([*lines[:9], *lines[10:]]))
    skipped: list[str] = []
    found = predict(records, model=model, labels=["red", "blue eyes", "thin lip"], device="cpu", date="26 Jul 2024")
    taught = list(prefer(records, teacher=scores, skipped=skipped, chosen_k=1, rejected_q=1))
    rows = [[row.id, row.top(3), [entry["logprob"] for entry in row.ranking]] for row in found]
    result = {
        "rows": rows,
        "pairs": [[pair.id, pair.chosen, pair.rejected] for pair in taught],
        "skipped": len(skipped),
    }
    write_json(out / f"{parallel.rank()}.json", result)


def test_records_are_shared_out_and_answered_in_order(model: Path, tmp_path: Path) -> None:
    """Seventy records are two rounds on two ranks, the second one cut short; every rank has all answers."""
    answers(model, tmp_path / "one")
    on_ranks(2, answers, model, tmp_path / "two")
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("one/0.json", "two/0.json", "two/1.json"))
    assert two[0] == two[1]
    assert [row[0] for row in one["rows"]] == [f"case-{n}" for n in range(70)]
    assert [row[:2] for row in two[0]["rows"]] == [row[:2] for row in one["rows"]]
    for mine, theirs in zip(two[0]["rows"], one["rows"], strict=True):
        assert mine[2] == pytest.approx(theirs[2], rel=1e-5)
    assert two[0]["pairs"] == one["pairs"]
    assert len(one["pairs"]) == 69
    assert one["skipped"] == two[0]["skipped"] == 1


# ---- stopped, failed, killed ----------------------------------------------------------------------------------------

SLOW = {"steps": 400, "save_every": 3, "objective": "sft", "held_out": 0.3}


def stoppable(model: Path, pairs: Path, out: Path, resume: bool = False, steps: int = 400) -> None:
    """A run that leaves with 7 where it was stopped, so that the test can tell."""
    try:
        align(settings_of(model, pairs, out, **{**SLOW, "steps": steps}), resume=resume)
    except Stopped as stop:
        write_json(out / f"stopped-{parallel.rank()}.json", str(stop))


def wait_for_step(folder: Path, step: int, processes: list[BaseProcess]) -> None:
    while len(runs.read_metrics(folder / "metrics.jsonl")) < step:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


def joined_within(processes: list[BaseProcess], seconds: float) -> list[int | None]:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_on_all_ranks_after_the_same_step(
    model: Path, pairs: Path, tmp_path: Path, number: signal.Signals, ranks: int
) -> None:
    processes = start_ranks(ranks, stoppable, model, pairs, tmp_path)
    wait_for_step(tmp_path, 4, processes)
    os.kill(processes[-1].pid or 0, number)  # one of them alone is asked
    assert joined_within(processes, 60) == [0] * ranks
    said = [json.loads((tmp_path / f"stopped-{rank}.json").read_text()) for rank in range(ranks)]
    last = len(losses(tmp_path))
    assert set(said) == {f"stopped after step {last} of 400, which is saved"}
    assert saved(tmp_path)[1]["step"] == last


def slowly(model: Path, pairs: Path, out: Path) -> None:
    """A run whose steps take long, so that a signal waits for the end of one."""
    real = Trainer.accumulate

    def slow(self: Trainer, members: Any) -> Any:
        if self.step == 2:
            (out / "within").touch()
            time.sleep(60)
        return real(self, members)

    Trainer.accumulate = slow  # type: ignore[method-assign]
    stoppable(model, pairs, out)


def test_a_second_signal_stops_at_once(model: Path, pairs: Path, tmp_path: Path) -> None:
    (process,) = start_ranks(1, slowly, model, pairs, tmp_path)
    while not (tmp_path / "within").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGTERM)
    assert joined_within([process], 5) == [-signal.SIGTERM]


def test_a_killed_rank_ends_the_others_and_the_run_resumes(model: Path, pairs: Path, tmp_path: Path) -> None:
    """kill -9 of one of two ranks at random moments; MINT_LONG kills twenty times."""
    kills, steps = (20, 200) if os.environ.get("MINT_LONG") else (2, 40)
    on_ranks(2, stoppable, model, pairs, tmp_path / "whole", False, steps)
    draw, broken, waits = random.Random(3), tmp_path / "broken", []
    for kill in range(kills):
        processes = start_ranks(2, stoppable, model, pairs, broken, True, steps)
        while len(runs.read_metrics(broken / "metrics.jsonl")) <= kill * steps // kills:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        victim = draw.randrange(2)
        processes[victim].kill()
        start = time.monotonic()
        codes = joined_within(processes, 60)
        waits.append(time.monotonic() - start)
        assert codes[victim] == -signal.SIGKILL or codes == [0, 0], codes
        assert codes[1 - victim] in (0, 1), codes  # 0: the run was over
    on_ranks(2, stoppable, model, pairs, broken, True, steps)
    assert outcome(broken) == outcome(tmp_path / "whole")
    assert max(waits) < 60
    print(f"{kills} kills; the other rank ended after at most {max(waits):.1f} s")


def silent() -> None:
    """Rank 1 stands still for good, as if its machine were gone; rank 0 waits for it. Half a minute becomes one second."""
    group.BEAT = 0.05
    parallel.barrier()
    if parallel.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    parallel.barrier()


def test_a_rank_that_stands_still_is_given_up() -> None:
    processes = start_ranks(2, silent)
    assert joined_within(processes[:1], 60) == [1]
    processes[1].kill()
    processes[1].join()


def test_torchrun_starts_the_command_line_as_it_stands(model: Path, pairs: Path, tmp_path: Path) -> None:
    """Once to a good end, and once with a disk that is full: one message of one rank, and the run as it was."""
    words = ["align", "--model", str(model), "--pairs", str(pairs), "--device", "cpu", "--rank", "2", "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "cli.py", *words]
    done = subprocess.run([*launch, "--steps", "2", "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert done.stderr.count("training 2/2 steps") == 1
    (tmp_path / "file").touch()
    failed = subprocess.run([*launch, "--out", str(tmp_path / "file/run")], cwd=ROOT, capture_output=True,
                            text=True, timeout=300, check=False)  # fmt: skip
    assert failed.returncode == 1
    assert [line for line in failed.stderr.splitlines() if line.startswith("mint: ")] == [
        f"mint: {tmp_path}/file/run: cannot be written (Not a directory); give another --out"
    ]
