"""How many threads compute: one where the network is so small that they would only wait for one another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from students import trainer_of, write_student
from torch import nn

from mint import showcase, showcase_tissue
from mint.config import AlignSettings
from mint.devices import one_thread, threads_for
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
