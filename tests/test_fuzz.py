"""Hostile versions of every kind of file, a few of each; `python tests/fuzz.py --inputs 100000` is the long run."""

from __future__ import annotations

import os
import random
from pathlib import Path

import fuzz
import pytest

COUNT = int(os.environ.get("MINT_FUZZ", "20"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz.make(tmp_path_factory.mktemp("fuzz") / "made")


@pytest.fixture(scope="module")
def watch(made: Path) -> fuzz.Watch:
    return fuzz.Watch(str(made))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_hostile_files_raise_nothing_but_our_own_errors(made: Path, watch: fuzz.Watch, name: str) -> None:
    found = fuzz.attack(made, name, COUNT, random.Random(name), watch)
    assert not found.faults
    assert found.counts["refused"] or name.startswith("records/")  # where bad rows are left out


def test_the_watch_sees_what_is_opened_outside_and_what_is_written(made: Path, watch: fuzz.Watch) -> None:
    """The oracle is able to see: a reader that follows a link, or writes, is found out."""
    outside = made.parent / "outside"
    outside.write_text("x")
    link = made / "link"
    link.symlink_to(outside)
    for reader in (outside.read_bytes, link.read_bytes, lambda: (made / "new").write_text("")):
        with watch.looking():
            reader()
        assert watch.seen
    with watch.looking():
        (made / "labels.csv").read_bytes()
    assert not watch.seen
