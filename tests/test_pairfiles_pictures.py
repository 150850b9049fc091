"""Which pictures a pairs file may name: those of its own folder and of the folders that were given, links resolved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pairfiles import EXPLICIT, lines

from mint.errors import ConfigError, RecordError
from mint.images import open_image
from mint.pairs.files import read_pairs
from mint.pairs.pictures import Elsewhere
from mint.types import PreferencePair


@pytest.fixture
def laid_out(tmp_path: Path) -> Path:
    """The folder of a pairs file with pictures in it, and links that lead to others in the folders `away` and `home-2`."""
    home, away, near = (tmp_path / name for name in ("home", "away", "home-2"))
    for folder in (home, away, near, home / "inner"):
        folder.mkdir()
        Image.new("RGB", (4, 4), (200, 10, 10)).save(folder / "a.png")
        np.save(folder / "images.npy", np.full((3, 4, 4, 3), 10, np.uint8))
    for name, aim in (("link.png", "../away/a.png"), ("linked", "../away"), ("linked.npy", "../away/images.npy"),
                      ("own.png", "inner/a.png")):  # fmt: skip
        (home / name).symlink_to(aim)
    (home / "linked.npy#1").write_bytes((home / "a.png").read_bytes())  # a file of that very name is not what is opened
    return home


OUTSIDE = ("../away/a.png", "{}/away/a.png", "inner/../../away/a.png", "link.png", "linked/a.png", "linked/../away/a.png",
           "../away/images.npy#1", "linked.npy#1", "linked/images.npy#2")  # fmt: skip
NOWHERE = ("../home-2/a.png", "../away/none.png", "linked/none.png", "..", "/proc/self/environ", "/dev/zero")
INSIDE = ("a.png", "{}/home/a.png", "inner/../a.png", "inner/a.png", "own.png", "images.npy#1", "../home/a.png")


def shown_by(path: Path, image: str, column: str) -> Path:
    image = image.format(path.parents[1])
    return lines(path, EXPLICIT, {**EXPLICIT, column: [image] if column == "images" else image})


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("image", [*OUTSIDE, *NOWHERE])
def test_a_picture_outside_the_folder_of_the_pairs_is_refused(laid_out: Path, image: str, column: str) -> None:
    path = shown_by(laid_out / "pairs.jsonl", image, column)
    with pytest.raises(RecordError, match=r"put the pairs file beside its pictures, or .* --image-folder") as raised:
        list(read_pairs(path))
    assert str(raised.value).startswith(f"{path}:2: image '{image.format(laid_out.parent)}'")
    skipped: list[str] = []
    assert [pair.id for pair in read_pairs(path, skipped=skipped)] == ["line-1"]
    assert skipped == [str(raised.value)]


@pytest.mark.parametrize("image", OUTSIDE)
def test_a_picture_in_a_folder_that_was_given_is_read(laid_out: Path, image: str) -> None:
    path = shown_by(laid_out / "pairs.jsonl", image, "image")
    (laid_out.parent / "short").symlink_to(laid_out.parent / "away")
    for folders in (["away"], ["short"], ["home-2", "away"]):
        pair = list(read_pairs(path, image_folders=[laid_out.parent / folder for folder in folders]))[1]
        assert open_image(pair.image).size == (4, 4)
    with pytest.raises(RecordError, match="--image-folder"):
        list(read_pairs(path, image_folders=[laid_out.parent / "home-2"]))


@pytest.mark.parametrize("image", INSIDE)
def test_a_picture_inside_is_read_however_it_is_named(
    laid_out: Path, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_by(laid_out / "pairs.jsonl", image, "image")
    monkeypatch.chdir(laid_out)
    for path in (laid_out / "pairs.jsonl", Path("pairs.jsonl"), Path("inner/../pairs.jsonl")):
        assert open_image(list(read_pairs(path))[1].image).size == (4, 4)


def test_a_folder_of_pictures_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    for folder in ("nowhere", "a\x00b", str(file)):
        with pytest.raises(ConfigError, match=r"--image-folder '.*': no such folder"):
            list(read_pairs(lines(file, EXPLICIT), image_folders=[folder]))


def test_the_folders_of_pictures_elsewhere_are_found_as_pairs_pass(laid_out: Path) -> None:
    top = laid_out.parent
    images = [laid_out / "a.png", top / "away/a.png", str(laid_out / "linked.npy#1"), top / "home-2/a.png", object()]
    pairs = [PreferencePair(str(at), "a", "b", "c", image) for at, image in enumerate([*images, None])]
    for places, found in (((), ["away", "home-2"]), ((top / "home-2", laid_out / "linked"), ["away", "home-2"])):
        elsewhere = Elsewhere(laid_out, places)
        assert list(elsewhere.passing(pairs)) == pairs
        assert elsewhere.folders == [str(top / name) for name in found]
    elsewhere = Elsewhere(laid_out, [top])
    assert len(list(elsewhere.passing(pairs))) == 6
    assert elsewhere.folders == [str(top)]
