"""A disk that is full at any write of a run: the error names the file, the last checkpoint is whole, the run goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from students import run_settings, saved, text_pairs, untimed, write_pairs_file, write_student

from mint.errors import WorkError
from mint.pipeline import align, predict
from mint.training import runs
from mint.types import Record

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pairs = write_pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_pairs(8))
    usual = {"model": str(model), "pairs": str(pairs), "steps": 3, "save_every": 1, "eval_every": 1, "held_out": 0.3}
    return {**usual, "rank": 1, "targets": ("q_proj",)}


@pytest.fixture(scope="session")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    align(run_settings(**settings, out=str(folder)))
    return outcome(folder)


def outcome(folder: Path) -> tuple[Any, bytes]:
    return untimed(runs.read_metrics(folder / "metrics.jsonl")), (folder / WEIGHTS).read_bytes()


def steps_saved(folder: Path) -> int:
    """The step of the checkpoint, which must be whole if it is there."""
    return 0 if runs.read_state(folder) is None else int(saved(folder)[1]["step"])


@pytest.mark.parametrize("write", range(1, 14, 2))
def test_a_write_that_fails_is_named_and_the_run_goes_on_from_its_checkpoint(
    settings: dict[str, Any], whole: tuple[Any, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """The n-th file that is to be made safe on the disk finds it full."""
    count, real = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WorkError, match=r"cannot be written \(No space left on device\); free some space"):
            align(run_settings(**settings, out=str(tmp_path)))
    before = steps_saved(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    align(run_settings(**settings, out=str(tmp_path)), resume=True)
    assert outcome(tmp_path) == whole
    assert before < 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, in memory, if this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk in memory")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def grown(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def test_a_disk_that_fills_up_stops_a_run_and_room_lets_it_go_on(
    settings: dict[str, Any], whole: tuple[Any, bytes], small_disk: Path
) -> None:
    """A disk that grows by a page whenever the run has found it full: in the end most writes have been refused."""
    out, said = small_disk / "run", set()
    for kilobytes in range(4, 400, 4):
        grown(small_disk, kilobytes)
        before = steps_saved(out) if out.exists() else 0
        try:
            align(run_settings(**settings, out=str(out)), resume=True)
            break
        except WorkError as error:
            found = str(error)
        said.add(Path(found.partition(": ")[0]).name)
        assert "cannot be written (No space left on device); free some space" in found
        assert steps_saved(out) >= before
    assert outcome(out) == whole
    assert len(said) >= 3, said
    assert {"checkpoint", "adapter"} <= said


def test_predictions_that_find_the_disk_full_are_kept_and_continued(model: Path, small_disk: Path) -> None:
    from mint.evaluation.outputs import Output

    records = [Record(f"case-{n}", note="thin nose " * 5) for n in range(60)]
    asked: dict[str, Any] = {"model": model, "labels": ["red", "blue"], "device": "cpu", "dtype": "float32"}
    grown(small_disk, 8)
    with pytest.raises(
        WorkError, match=r"p\.jsonl\.part: cannot be written \(No space left on device\); free some space"
    ):
        Output(small_disk / "p.jsonl", {}).write(predict(records, **asked))
    grown(small_disk, 400)
    output = Output(small_disk / "p.jsonl", {})
    assert 0 < len(output.done) < 60
    assert output.write(predict(records, **asked, done=output.done)) == 60
    assert (small_disk / "p.jsonl").read_text().count("\n") == 60
