"""What `auto` stands for, and how many threads compute: one where they would only wait for one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from students import trainer_of, write_student
from torch import nn

from mint import devices, showcase, showcase_tissue
from mint.config import AlignSettings
from mint.devices import one_thread, pick_dtype, threads_for
from mint.training import Trainer


@pytest.fixture(autouse=True)
def _three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_small_network_has_one_thread_and_a_larger_one_all() -> None:
    for width, wanted in ((100, 1), (1500, 3)):
        with threads_for(nn.Linear(width, width, device="meta")):
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == 3


def test_an_error_gives_the_threads_back() -> None:
    with pytest.raises(ValueError), one_thread():
        raise ValueError
    assert torch.get_num_threads() == 3


def test_a_tiny_student_is_trained_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Trainer, "walk", lambda _: seen.append(torch.get_num_threads()))
    trainer_of(write_student(tmp_path / "model"), tmp_path / "run").run()
    assert seen == [1]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("story", [showcase, showcase_tissue])
def test_the_whole_of_a_built_in_story_is_told_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Any
) -> None:
    def threads(_: Path) -> None:
        raise LookupError(torch.get_num_threads())

    monkeypatch.setattr(story, "check_new", threads)  # the first thing that it does
    with pytest.raises(LookupError, match="1"):
        story.tell(AlignSettings(out=str(tmp_path)))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("device", "fast", "wanted"), [("cpu", True, torch.bfloat16), ("cpu", False, torch.float32),
                                                        ("cuda", False, torch.bfloat16)])  # fmt: skip
def test_a_half_checkpoint_is_computed_in_bfloat16_where_that_is_not_slower(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, device: str, fast: bool, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(devices, "fast_bfloat16", lambda: fast)
    assert pick_dtype("auto", torch.device(device), stored) == wanted
    assert pick_dtype("auto", torch.device(device), torch.float32) == torch.float32
    assert pick_dtype("bfloat16", torch.device(device), torch.float32) == torch.bfloat16


@pytest.mark.parametrize("faster", [True, False])
def test_whether_bfloat16_is_fast_is_tried_and_not_assumed(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    def timed(work: Callable[[], torch.Tensor]) -> float:
        return 1.0 if (work().dtype == torch.bfloat16) == faster else 2.0

    monkeypatch.setattr(devices, "_timed", timed)
    assert devices.fast_bfloat16.__wrapped__() is faster
