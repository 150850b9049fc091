"""Every command that writes, on a disk that is full, asked to stop, or beside another run: one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from students import ROOT, trainer_of, write_student

from mint.commands import cli
from mint.files import alone, locked


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: a model and an adapter, cases with photos, scores of a teacher, predictions."""
    folder = tmp_path_factory.mktemp("given")
    write_student(folder / "model")
    trainer_of(folder / "model", folder / "run", 4, steps=1, rank=1, targets=("q_proj",)).run()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "face.png")
    names = ["red", "blue"]
    cases = [{"id": f"{n}", "note": "thin nose", "label": names[n % 2], "image": "face.png"} for n in range(40)]
    ranking = [{"label": name, "logprob": -0.7, "probability": 0.5} for name in names]
    rows = {
        "cases.jsonl": cases,
        "few.jsonl": cases[:16],
        "scores.jsonl": [{"id": case["id"], "scores": {"red": 1, "blue": 2}} for case in cases],
        "predictions.jsonl": [{"id": case["id"], "ranking": ranking} for case in cases],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "labels.txt").write_text("red\nblue\n")
    return folder


def words(given: Path, name: str, out: Path) -> list[str]:
    """A command of each kind, and where it writes."""
    cases, model = str(given / "cases.jsonl"), ["--model", str(given / "model"), "--device", "cpu"]
    asked = {
        "predict": [cases, *model, "--labels", str(given / "labels.txt")],
        "prefer": [cases, "--teacher", str(given / "scores.jsonl"), "--chosen-k", "1", "--rejected-q", "1"],
        "evaluate": [str(given / "predictions.jsonl"), "--truth", cases],
        "merge": [*model, "--adapter", str(given / "run/adapter")],
        "teach": [str(given / "few.jsonl"), "--epochs", "1", "--batch-size", "16", "--device", "cpu"],
        "experiment": [cases, "--objectives", "base", "--seeds", "1", *model, "--teacher", str(given / "scores.jsonl"),
                       "--min-cases", "2"],
    }  # fmt: skip
    return [name, *asked[name], "--out", str(out), "--quiet"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of its own, in memory, of as many kilobytes as are asked for, if this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk in memory")

    def sized(kilobytes: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
        return disk

    yield sized
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("name", "out", "sizes"),
    [
        ("predict", "p.jsonl", (4, 8)),
        ("predict", "p.csv", (8, 12)),
        ("prefer", "pairs.jsonl", (4, 16)),
        ("evaluate", "report.html", (4, 16)),
        ("merge", "merged", (4, 64, 400)),
        ("teach", "teacher", (4, 4000, 30_000)),
        ("experiment", "experiment", (4, 12, 20)),
    ],
)
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    given: Path, small_disk: Callable[[int], Path], name: str, out: str, sizes: tuple[int, ...]
) -> None:
    target = small_disk(4) / out
    if target.suffix:
        target.write_text("old\n")
    before = set(target.parent.iterdir())
    for kilobytes in sizes:
        done = CliRunner().invoke(cli, words(given, name, small_disk(kilobytes) / out))
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert done.stderr.startswith("mint: /")
        assert "cannot be written (No space left on device); free some space" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not target.suffix or target.read_text() == "old\n"
        assert name != "merge" or not target.exists()
        assert not [p for p in target.parent.rglob(".*.part") if name != "predict"]
        if name not in ("predict", "teach", "experiment"):  # those go on from what they have
            assert set(target.parent.iterdir()) == before
    resume = ["--resume"] if name == "teach" else []
    done = CliRunner().invoke(cli, [*words(given, name, small_disk(400_000) / out), *resume])
    assert done.exit_code == 0, done.output
    assert target.is_dir() or target.read_text() != "old\n"


@pytest.mark.parametrize("name", ["teach", "experiment", "merge"])
def test_a_second_run_into_one_folder_is_refused(given: Path, tmp_path: Path, name: str) -> None:
    with alone(tmp_path / "out") if name == "merge" else locked(tmp_path / "out"):
        done = CliRunner().invoke(cli, words(given, name, tmp_path / "out"))
    assert done.exit_code == 2
    assert "another run is writing here; wait for it or give another --out" in done.stderr
    done = CliRunner().invoke(cli, words(given, name, tmp_path / "out"))
    assert done.exit_code == 0, done.output


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background deaf to it
from mint.teaching.lessons import Lessons
from mint.predicting import Questioner
from mint.encoders.scorefile import ScoreFile
from mint.commands import main

def late(kind, name):
    first = getattr(kind, name)
    def slow(*given, **more):
        print("at work", file=sys.stderr, flush=True)
        time.sleep(0.5)
        return first(*given, **more)
    setattr(kind, name, slow)

late(Lessons, "_learn"), late(Questioner, "put"), late(ScoreFile, "score_batch")
sys.argv = ["cli.py", *sys.argv[1:]]
main()
"""


def disturbed(arguments: list[str], number: signal.Signals) -> tuple[int, str, str]:
    """Run a command whose steps take long, and send it a signal at its first step."""
    command = [sys.executable, "-c", SLOW, *arguments]
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=known)
    assert process.stderr is not None
    said = ""
    while "at work" not in said and process.poll() is None:
        said += process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, said + error


@pytest.mark.parametrize(
    ("name", "number"), [("teach", signal.SIGTERM), ("predict", signal.SIGINT), ("predict", signal.SIGTERM)]
)
def test_what_can_be_gone_on_with_is_saved_and_says_how(
    given: Path, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    asked = words(given, name, tmp_path / "out")
    code, out, error = disturbed(asked, number)
    assert code == 0, error
    again = out.rpartition("; to go on: python cli.py ")[2].strip()
    assert out.startswith("stopped after ")
    assert again == " ".join(asked) + (" --resume" if name == "teach" else "")
    assert not (tmp_path / "out").is_file()
    done = CliRunner().invoke(cli, again.split())
    assert done.exit_code == 0, done.output
    assert name == "teach" or (tmp_path / "out").read_text().count("\n") == 40
    left = [path.name for path in tmp_path.rglob("*") if ".part" in path.name]
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_cannot_be_gone_on_with_leaves_nothing_half_written(
    given: Path, tmp_path: Path, number: signal.Signals
) -> None:
    code, out, error = disturbed(words(given, "prefer", tmp_path / "pairs.jsonl"), number)
    assert (code, out) == (1, "")
    assert error.splitlines()[-1].startswith("mint: stopped before the end")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
