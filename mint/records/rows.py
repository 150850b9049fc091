"""One row of a table or one JSON object, in the columns of MINT's own format, into a Record.

Columns: id, note, image, label, labels, split, sex, age, ethnicity, terms, excluded, group. Others are left alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..files import inside, lies_in
from ..images import parted
from ..types import Record

COLUMNS = ("id", "note", "image", "label", "labels", "split", "sex", "age", "ethnicity", "terms", "excluded", "group")
CONTENT = frozenset(COLUMNS) - {"id", "split", "group"}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""How data sets spell the three usual splits; any other name is a split of its own."""

Row = tuple[str, Record | RecordError]
"""Where a record stands (`cases.csv:17`), and the record, or the error that says why there is none."""


@dataclass(frozen=True)
class Reading:
    """How to read: the folder of images, names of HPO ids, columns under other names, and what may be absent.

    `root` is the folder that was given to read, if one was.
    """

    images: Path | None = None
    terms: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    undiagnosed: bool = False
    root: Path | None = None


def record_of(row: Mapping[str, Any], folder: str, where: str) -> Record:
    """The record of one row; its image is looked for in `folder` and nowhere else."""
    identity = plain(row.get("id"), "id", where).strip()
    if not identity:
        raise RecordError(f"{where}: no id, every record needs one of its own; found {shown(list(row))}")
    image = plain(row.get("image"), "image", where).strip()
    record = Record(
        identity,
        plain(row.get("note"), "note", where),
        image_path(image, folder, where) if image else None,
        plain(row.get("label"), "label", where).strip() or None,
        listed(row.get("labels"), "labels", where),
        listed(row.get("terms"), "terms", where),
        listed(row.get("excluded"), "excluded", where),
        sex_of(plain(row.get("sex"), "sex", where)),
        plain(row.get("age"), "age", where).strip() or None,
        plain(row.get("ethnicity"), "ethnicity", where).strip() or None,
        plain(row.get("split"), "split", where).strip() or None,
        plain(row.get("group"), "group", where).strip() or None,
    )
    if not (record.note or image or record.label or record.terms or CONTENT.intersection(row)):
        raise RecordError(f"{where}: found {shown(list(row))}, wanted id and one of {', '.join(sorted(CONTENT))}")
    return record


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with `columns` (ours: theirs) under our names beside its own."""
    return row if not columns else {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


def plain(value: Any, column: str, where: str) -> str:
    """A text or a number as text; nothing as the empty text."""
    if isinstance(value, str):
        if not value.isascii():
            _well_formed(value, column, where)
        return value
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(f"{where}: {column} is {shown(value)}, a text was wanted; put it in quotes or leave it out")
    return str(value)


def listed(value: Any, column: str, where: str) -> tuple[str, ...]:
    """A list of texts; a single text is a list with ';' between its items, as in a table."""
    if value is None or value == "":
        return ()
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise RecordError(f'{where}: {column} is {shown(value)}, a list of texts was wanted; write it as ["…", "…"]')
    texts = (plain(part, column, where).strip() for part in parts)
    return tuple(text for text in texts if text)


def sex_of(text: str) -> str | None:
    """'male', 'female', what else the source says in its own words, or None where it says that it is not known."""
    text = text.strip()
    return _SEXES.get(text.lower(), text)


_SEXES = {
    **dict.fromkeys(("", "u", "unknown", "unknown_sex", "not known", "na", "n/a", "none"), None),
    **dict.fromkeys(("m", "male"), "male"),
    **dict.fromkeys(("f", "female"), "female"),
    **dict.fromkeys(("other", "other_sex"), "other"),
}


def image_path(name: str, folder: str, where: str) -> str:
    """The path of an image named in a row; a name or a link that leads out of `folder` is refused."""
    if name.startswith("/"):
        try:
            name = str(Path(name).relative_to(os.path.abspath(folder)))
        except ValueError:
            raise RecordError(
                f"{where}: image {shown(name)} leads out of {folder or '.'}, only images inside it are read; "
                f"move the image, or give the folder of the images (--image-folder)"
            ) from None
    if ".." in name or "\x00" in name:
        inside(
            folder, name, lambda why: RecordError(f"{where}: {why}; or give the folder of the images (--image-folder)")
        )
    path = os.path.join(folder, name)
    try:
        refuse_link_out(parted(path)[0], folder, "put the image in its place, or give its own folder (--image-folder)")
    except RecordError as error:
        raise RecordError(f"{where}: image {error}") from None
    return path


def refuse_link_out(path: str | Path, folder: str | Path, mend: str) -> None:
    """Refuse a file that a table names, or that was looked for beside it, where a link leads to one out of the folder."""
    if os.path.exists(path) and not lies_in(path, [os.path.realpath(folder)]):
        raise RecordError(f"{path}: a link that leads out of {folder or '.'}, only files inside it are read; {mend}")


def images_folder(path: Path, reading: Reading) -> str:
    """The folder that the images of the table at `path` are relative to; '' for the current one."""
    folder = str(reading.images or path.parent)
    return "" if folder == "." else folder


def shown(value: Any) -> str:
    """A value in an error message: short, quoted, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …"


def _well_formed(value: str, column: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        raise RecordError(
            f"{where}: {column} holds half a character (surrogate at {fault.start + 1}), whole text was wanted; "
            f"write the text again as UTF-8"
        ) from None
