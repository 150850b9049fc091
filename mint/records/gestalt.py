"""Rows of the two tables of GestaltMatcher's world into Records: GestaltMML's texts and the metadata of GMDB."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import RecordError
from ..types import Record
from .hpo import hpo_beside
from .notes import age_in_words, demographics
from .rows import Reading, image_path, images_folder, record_of, sex_of

_FOLDERS = 64
Convert = Callable[[dict[str, str], str], Record]


def gestaltmml_rows(path: Path, reading: Reading) -> Convert:
    """Columns image_id, filename, texts; sex, age and ethnicity are read back from the text where they stand in it."""
    pictures = _Pictures(path, reading)

    def convert(row: dict[str, str], where: str) -> Record:
        note = "" if row["texts"].strip() == "*" else row["texts"].strip()
        known = {"label": row.get("label"), "split": row.get("split"), **demographics(note)}
        record = record_of({"id": row["image_id"], "note": note, **known}, "", where)
        return replace(record, image=pictures.path(row["filename"].strip(), where))

    return convert


def gmdb_rows(path: Path, reading: Reading) -> Convert:
    """The metadata of GestaltMatcher's database; the photos are its aligned crops, HPO ids become labels.

    The label is `internal_syndrome_name`, the class of GestaltMML; one patient's photos are one group.
    """
    pictures = _Pictures(path, reading)
    names = reading.terms or hpo_beside(path.parent)

    def convert(row: dict[str, str], where: str) -> Record:
        identity = _whole(row["image_id"])
        columns = {
            "id": identity,
            "label": row.get("internal_syndrome_name") or row.get("disorder_names"),
            "terms": _terms(row["present_features"], names),
            "excluded": _terms(row.get("absent_features", ""), names),
            "sex": sex_of(row.get("gender", "")),
            "age": _age(row.get("age_year", ""), row.get("age_month", "")),
            "ethnicity": _ethnicity(row),
            "split": row.get("split"),
            "group": _whole(row["patient_id"]),
        }
        record = record_of(columns, "", where)
        return replace(record, image=pictures.path(f"{identity}_aligned.jpg", where))

    return convert


class _Pictures:
    """Finds a picture beside the table, in a folder beside it, or in a folder of the folder that was given."""

    def __init__(self, path: Path, reading: Reading) -> None:
        first = images_folder(path, reading)
        places = [] if reading.images else [path.parent, *([reading.root] if reading.root else [])]
        self.folders = [first, *(folder for place in places for folder in _subfolders(place))]

    def path(self, name: str, where: str) -> str | None:
        """The picture of this name where it lies, else where it should; the folder of the last one is asked first."""
        if not name:
            return None
        for at, folder in enumerate(self.folders):
            found = image_path(name, folder, where)
            if os.path.exists(found):
                self.folders.insert(0, self.folders.pop(at))
                return found
        return image_path(name, self.folders[0], where)


def _subfolders(place: Path) -> list[str]:
    try:
        with os.scandir(place) as entries:
            inner = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as fault:
        raise RecordError(
            f"{place}: cannot be read ({fault.strerror}); see that the folder is yours to read"
        ) from fault
    return [os.path.join("" if str(place) == "." else place, name) for name in inner[:_FOLDERS]]


def _terms(text: str, names: Mapping[str, str]) -> list[str]:
    return [names.get(one, one) for one in _ids(text)]


def _ids(text: str) -> Iterator[str]:
    return (part.strip() for part in text.split(";") if part.strip().lower() not in ("", "nan"))


def _whole(text: str) -> str:
    """'12.0' as '12': a column with gaps is written with decimals by some programs."""
    return text.strip().removesuffix(".0")


def _age(year: str, month: str) -> str | None:
    years, months = _whole(year), _whole(month)
    if not _COUNT.fullmatch(years) and not _COUNT.fullmatch(months):
        return None
    counts = [int(text) if _COUNT.fullmatch(text) else 0 for text in (years, months)]
    return age_in_words(f"P{counts[0]}Y{counts[1]}M")


def _ethnicity(row: dict[str, str]) -> str | None:
    """The sub-category where there is one, else the category, as GestaltMML chooses."""
    found = (row.get(name, "").strip() for name in ("ethnicity_sub_category", "ethnicity_category"))
    return next((text for text in found if text.lower() not in ("", "unknown", "nan")), None)


_COUNT = re.compile(r"\d{1,3}")
