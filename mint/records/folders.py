"""A folder of pictures into Records: the class of a picture is the name of the folder that it lies in.

colon_aca/1.jpeg                                  class colon_aca
lung_colon_image_set/colon_image_sets/colon_n/2   class colon_n: the folder nearest to the picture
train/colon_n/2.jpeg                              class colon_n of the split train
3.png                                             no class
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import RecordError
from ..files import lies_in
from ..types import Record
from .pannuke import ARRAYS
from .rows import SPLITS, Row

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"))
TABLES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson"))
_DEPTH = 32
Found = tuple[str, os.DirEntry[str]]


@dataclass
class Contents:
    """What lies in a folder: folds of arrays, tables (at the top, and one folder down), pictures, JSON documents."""

    folds: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    inner_tables: list[Path] = field(default_factory=list)
    pictures: bool = False
    documents: bool = False


def contents(root: Path) -> Contents:
    """Looks once through all of a folder and its folders."""
    found = Contents()
    for name, entry in _walk(root):
        kind = suffix(entry.name)
        if kind in TABLES or entry.name in ARRAYS:
            _refuse_outside(root, entry)
        if kind in TABLES and name.count("/") < 2:
            (found.inner_tables if "/" in name else found.tables).append(root / name)
        elif entry.name == "images.npy":
            found.folds.append((root / name).parent)
        found.pictures |= kind in PICTURES
        found.documents |= kind == ".json"
    return found


def picture_records(root: Path) -> Iterator[Row]:
    """Every picture below `root`, in the order of names; its id is its path."""
    for name, entry in _walk(root):
        if suffix(entry.name) in PICTURES or _is_linked_folder(entry):
            path = os.path.join(root, name)
            yield path, _outside(root, entry) or _picture(name, path)


def document_files(root: Path) -> Iterator[tuple[Path, RecordError | None]]:
    """Every JSON file below `root`, in the order of names, with what forbids to read it."""
    for name, entry in _walk(root):
        if suffix(entry.name) == ".json" or _is_linked_folder(entry):
            yield root / name, _outside(root, entry)


def suffix(name: str) -> str:
    """'.csv' for both cases.csv and cases.csv.gz."""
    stem = name.lower().removesuffix(".gz")
    return stem[stem.rfind(".") :] if "." in stem[1:] else ""


def _picture(name: str, path: str) -> Record | RecordError:
    try:
        name.encode()
    except UnicodeEncodeError:
        return RecordError(f"{path!a}: the name is not UTF-8; rename the file")
    folders = PurePosixPath(name).parts[:-1]
    split = SPLITS.get(folders[0].lower()) if folders else None
    classes = folders[1:] if split else folders
    return Record(name, image=path, label=classes[-1] if classes else None, split=split)


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and os.path.isdir(entry.path)


def _refuse_outside(root: Path, entry: os.DirEntry[str]) -> None:
    if error := _outside(root, entry):
        raise error


def _outside(root: Path, entry: os.DirEntry[str]) -> RecordError | None:
    """A link may stand for a file of the same folder, and for nothing else; what is neither file nor link is refused."""
    if entry.is_file(follow_symlinks=False):
        return None
    if not entry.is_symlink():
        return RecordError(f"{entry.path}: a pipe or device, only files are read; take it out of the folder")
    if os.path.isfile(entry.path) and lies_in(entry.path, [os.path.realpath(root)]):
        return None
    why = f"a link to a folder or out of {root}, only files inside it are read"
    return RecordError(f"{entry.path}: {why}; put what it leads to in its place")


def _walk(root: Path) -> Iterator[Found]:
    """Files and links below `root` as (path from it, entry), in the order of names; hidden ones are passed over."""
    stack = [("", iter(_entries(str(root))))]
    while stack:
        above, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
        elif entry.is_dir(follow_symlinks=False):
            if len(stack) > _DEPTH:
                raise RecordError(f"{entry.path}: more than {_DEPTH} folders deep; give a folder nearer to the cases")
            stack.append((f"{above}{entry.name}/", iter(_entries(entry.path))))
        else:
            yield above + entry.name, entry


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if entry.name[0] != "." and entry.name != "__MACOSX"]
    except OSError as fault:
        raise RecordError(
            f"{folder}: cannot be read ({fault.strerror}); see that the folder is yours to read"
        ) from fault
    return sorted(seen, key=lambda entry: entry.name)
