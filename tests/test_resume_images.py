"""A run on images that was stopped ends as one that was not, and only if its images are still what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints_mllama import write_mllama
from PIL import Image
from students import run_settings
from test_mllama_align import FROZEN, some_pairs
from test_mllama_trees import pictures
from test_resume import Stopped, outcome, stop_after

from mint.config import AlignSettings
from mint.errors import ConfigError, RecordError
from mint.pipeline import align
from mint.types import PreferencePair

__all__ = ["pictures"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=3, std=0.1)


@pytest.fixture
def pairs(pictures: list[str]) -> list[PreferencePair]:
    """Four pairs, three with an image of their own, which may be spoilt."""
    return some_pairs(pictures)


def settings_of(model: Path, out: Path, targets: tuple[str, ...], cache_gb: float = 1.0) -> AlignSettings:
    """Four steps, two to an epoch, a checkpoint after each, with dropout."""
    return run_settings(
        model=str(model), out=str(out), targets=targets, cache_gb=cache_gb, batch_size=2, steps=4, save_every=1,
        dropout=0.2, objective="dpo",
    )  # fmt: skip


def broken(settings: AlignSettings, pairs: list[PreferencePair], monkeypatch: pytest.MonkeyPatch) -> AlignSettings:
    """The run, ended within its third step."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            align(settings, pairs)
    return settings


@pytest.mark.parametrize("targets", [FROZEN, ("all-linear",)])
@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_resumed_run_on_images_is_the_uninterrupted_one_bit_for_bit(
    model: Path,
    pairs: list[PreferencePair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    cache_gb: float,
) -> None:
    align(settings_of(model, tmp_path / "whole", targets), pairs)  # always with its features kept
    second = broken(settings_of(model, tmp_path / "broken", targets, cache_gb), pairs, monkeypatch)
    align(second, pairs, resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert (tmp_path / "broken" / "features").exists() == (targets == FROZEN and cache_gb > 0)


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_run_is_not_resumed_on_other_images(
    model: Path, pairs: list[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_gb: float
) -> None:
    settings = broken(settings_of(model, tmp_path / "run", FROZEN, cache_gb), pairs, monkeypatch)
    path = Path(str(pairs[0].image))
    held = path.read_bytes()
    Image.new("RGB", (90, 40), (200, 10, 10)).save(path)
    with pytest.raises(ConfigError, match=r"run was begun with, or an image has changed"):
        align(settings, pairs, resume=True)
    path.unlink()
    with pytest.raises(RecordError, match=r"pair 'a': .*no such picture file"):
        align(settings, pairs, resume=True)
    path.write_bytes(held)
    assert align(settings, pairs, resume=True)["steps"] == 4


def test_a_damaged_image_is_known_before_the_first_step_and_costs_its_pair_alone(
    model: Path, pairs: list[PreferencePair], tmp_path: Path
) -> None:
    path = Path(str(pairs[0].image))
    path.write_bytes(path.read_bytes()[:100])
    settings = settings_of(model, tmp_path / "run", FROZEN)
    with pytest.raises(RecordError, match=r"pair 'a': .*truncated or damaged"):
        align(settings, pairs)
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(ConfigError, match=r"no pair to train on \(left out: pair 'a': .*truncated"):
        align(settings, pairs[:1], skipped=[])
    skipped: list[str] = []
    assert align(settings, pairs, skipped=skipped)["steps"] == 4
    assert len(skipped) == 1
