"""CSV and TSV: rows into Records, whatever the delimiter, with MINT's own columns, GestaltMML's or those of GMDB."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..types import Record
from .gestalt import gestaltmml_rows, gmdb_rows
from .rows import COLUMNS, CONTENT, Reading, Row, images_folder, record_of, renamed, shown
from .sources import LINE_LIMIT, lines, opened

_REREAD_LIMIT = 64 << 20
Convert = Callable[[dict[str, str], str], Record]


def table_records(file: io.BufferedReader[Any], path: Path, reading: Reading) -> Iterator[Row]:
    """One row of the file after the other; a header without the wanted columns is refused."""
    source = _Lines(file, path)
    delimiter, names = header(source.header())
    convert = _conversion(names, path, reading)
    rows = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        number = source.start_row()
        try:
            cells = next(rows, None)
            if cells is None:
                return
            if cells:
                where = f"{path}:{number}"
                yield where, convert(_cells(names, cells, where), where)
        except csv.Error as fault:
            source.reread()
            yield str(path), RecordError(f"{path}:{number}: not a row of a table ({_why(fault)})")
        except RecordError as error:
            yield str(path), error
            if source.broken:
                return


def header(line: str) -> tuple[str, list[str]]:
    """Delimiter and lower-case column names of a header line: the delimiter that finds most known columns."""
    splits = [(mark, [_name(cell) for cell in line.strip("\r\n").split(mark)]) for mark in ",;\t|"]
    return max(splits, key=lambda split: (len(_KNOWN.intersection(split[1])), len(split[1])))


def layout(names: list[str]) -> str | None:
    """Which of the known tables has these columns: 'gmdb', 'gestaltmml', 'records' or none."""
    found = set(names)
    if {"image_id", "patient_id", "present_features"} <= found:
        return "gmdb"
    if {"image_id", "filename", "texts"} <= found:
        return "gestaltmml"
    return "records" if "id" in found and len(found.intersection(COLUMNS)) > 1 else None


def is_table(path: Path, reading: Reading) -> bool:
    """Whether the file's first line is the header of a table of cases: more than ids and labels, as a glossary has."""
    with opened(path) as file:
        first = file.peek(1 << 16).partition(b"\n")[0].decode("utf-8-sig", "replace")
    names = header(first)[1]
    named = {ours for ours, theirs in reading.columns.items() if theirs.strip().lower() in names}
    kind = layout([*names, *named])
    return kind is not None and (kind != "records" or bool((CONTENT - {"label", "labels"}) & {*names, *named}))


def _conversion(names: list[str], path: Path, reading: Reading) -> Convert:
    doubled = {name for name, count in Counter(names).items() if name and count > 1}
    if doubled & _KNOWN:
        raise RecordError(f"{path}:1: the column {min(doubled)} is there twice; remove or rename one of them")
    columns = {ours: theirs.strip().lower() for ours, theirs in reading.columns.items()}
    kind = layout([*names, *columns] if set(columns.values()) <= set(names) else names)
    if kind == "gmdb":
        return gmdb_rows(path, reading)
    if kind == "gestaltmml":
        return gestaltmml_rows(path, reading)
    if kind is None:
        raise RecordError(
            f"{path}:1: the columns are {shown(names)}; wanted id and one of {', '.join(COLUMNS[1:])}, "
            f"or those of GestaltMML or GMDB; name them so, or say which is which, like --columns label=…"
        )
    folder = images_folder(path, reading)
    return lambda row, where: record_of(renamed(row, columns), folder, where)


def _cells(names: list[str], cells: list[str], where: str) -> dict[str, str]:
    extra = cells[len(names) :]
    if len(cells) < len(names) or any(extra):
        raise RecordError(
            f"{where}: {len(cells)} fields, the header has {len(names)}; quote fields that hold the delimiter"
        )
    return dict(zip(names, cells, strict=False))


def _name(cell: str) -> str:
    return cell.strip().strip('"').strip().lower()


def _why(fault: csv.Error) -> str:
    text = str(fault)
    if "end of data" in text or "field limit" in text:
        return "a quote that opens in it never closes; close it, or double the quotes inside a field"
    return f"{text}; double the quotes inside a field"


class _Lines:
    """The lines of a table for `csv.reader`, kept until their row is whole: a broken row costs only its first line."""

    def __init__(self, file: io.BufferedReader[Any], path: Path) -> None:
        self.path = path
        self.source = lines(file, path)
        self.row: list[tuple[int, str]] = []
        self.again: list[tuple[int, str]] = []
        self.number = self.size = self.reread_size = 0
        self.broken = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, text = self.again.pop() if self.again else self._fresh()
        self.number, self.size = number, self.size + len(text)
        if self.size > LINE_LIMIT:
            raise csv.Error("field limit")
        self.row.append((number, text))
        return text

    def header(self) -> str:
        """The first line that is not blank."""
        text = next((text for text in self if not text.isspace()), None)
        if text is None:
            raise RecordError(f"{self.path}: an empty file; a header line and a row for each case were wanted")
        if "\r" in text.rstrip("\r\n"):
            raise RecordError(
                f"{self.path}: its lines end in a bare carriage return; save it with LF or CRLF line ends"
            )
        return text

    def start_row(self) -> int:
        """Forget the row before; the number of the next line."""
        self.row, self.size = [], 0
        return self.again[-1][0] if self.again else self.number + 1

    def reread(self) -> None:
        """Give the lines of this row out again but for its first; a file that asks for that too often is given up."""
        self.again += reversed(self.row[1:])
        self.reread_size += self.size
        if self.reread_size > _REREAD_LIMIT:
            raise RecordError(f"{self.path}:{self.number}: too many broken rows before it, the rest is not read")

    def _fresh(self) -> tuple[int, str]:
        try:
            number, line = next(self.source)
        except RecordError:
            self.broken = True
            raise
        try:
            return number, line.decode()
        except UnicodeDecodeError as fault:
            self.number = number
            raise RecordError(f"{self.path}:{number}: not UTF-8; save the file again as UTF-8") from fault


_KNOWN = frozenset(
    (*COLUMNS, "image_id", "filename", "texts", "patient_id", "present_features", "age_year", "age_month", "gender")
)
