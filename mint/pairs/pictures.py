"""Where the pictures of pairs lie: in the folder of their file, or in one that the user gave; no other is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RecordError
from ..files import lies_in
from ..images import parted
from ..types import PreferencePair


def homes_of(path: str | Path, image_folders: Sequence[str | Path]) -> list[str]:
    """The folders, links resolved, in which the pictures of the pairs file at `path` may lie."""
    for folder in image_folders:
        if not os.path.isdir(folder):
            raise ConfigError(f"--image-folder {str(folder)!a}: no such folder; give one with the pictures of {path}")
    return [os.path.realpath(folder) for folder in (Path(path).parent, *image_folders)]


def picture_of(row: Mapping[str, Any], path: Path, homes: Sequence[str]) -> str | None:
    """The path of the picture that a line of the file at `path` names; it must exist, and lie in one of `homes`."""
    image = _named(row)
    if image is None:
        return None
    if not isinstance(image, str) or not image or "\x00" in image:
        raise RecordError(f"image {str(image)[:80]!r}: the path of a picture is wanted")
    found = path.parent / image
    file, _ = parted(found)
    if not lies_in(file, homes):
        raise RecordError(
            f"image {image[:200]!r}: leads out of the folder of the pairs ({str(path.parent)[:300]}), only pictures "
            f"inside it are read; put the pairs file beside its pictures, or give their folder with --image-folder"
        )
    if not os.path.isfile(file):
        raise RecordError(
            f"image {image[:200]!r}: no such file ({str(found)[:300]}); paths are relative to the pairs file"
        )
    return str(found)


def _named(row: Mapping[str, Any]) -> Any:
    """What stands in `image`, or in the list of one in `images`."""
    image, images = row.get("image"), row.get("images")
    if image is not None or images is None:
        return image
    if not isinstance(images, list) or len(images) > 1:
        found = f"{len(images)} entries" if isinstance(images, list) else f"a JSON {type(images).__name__}"
        raise RecordError(f"images has {found}; a list of one path is wanted, a pair has one image")
    return images[0] if images else None


class Elsewhere:
    """The folders of the pictures that do not lie in `home`: those of `given` that hold them, else each picture's own."""

    def __init__(self, home: str | Path, given: Iterable[str | Path] = ()) -> None:
        self.home, self.given = os.path.realpath(home), [os.path.realpath(folder) for folder in given]
        self.folders: list[str] = []

    def passing(self, pairs: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
        """The pairs as they come; what is to be known of them is known when all have passed."""
        found: dict[str, None] = {}
        for pair in pairs:
            if isinstance(pair.image, str | os.PathLike):
                file, _ = parted(Path(pair.image))
                if not lies_in(file, [self.home]):
                    own = os.path.dirname(os.path.realpath(file))
                    found[next((folder for folder in self.given if lies_in(file, [folder])), own)] = None
            yield pair
        self.folders = list(found)
