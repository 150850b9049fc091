"""Whatever cases a user has, into Records, one at a time; and which side of a split each record is on.

Formats are told apart by what is in the file or folder. A file: JSON lines or a JSON document (MINT's own columns, flat
cases, phenopackets), a CSV or TSV (MINT's own columns, GestaltMML's, those of GMDB), a zip of phenopackets, a picture;
text may be gzipped. A folder: PanNuke folds, tables, pictures in class folders, phenopackets; the first of these that
is there is read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, RecordError
from ..types import Record
from .archives import zip_values
from .folders import contents, document_files, picture_records, suffix
from .hpo import read_hpo
from .notes import compose_note
from .pannuke import ARRAYS, fold_records
from .phenopackets import case_record, is_case, is_phenopacket, phenopacket_record
from .rows import COLUMNS, SPLITS, Reading, Row, images_folder, record_of, refuse_link_out, renamed, shown
from .sources import Located, head, json_values, lines, opened, parsed
from .tables import is_table, table_records

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def read_records(
    path: str | Path,
    *,
    skipped: list[str] | None = None,
    hpo: str | Path | None = None,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    undiagnosed: bool = False,
    compose: Callable[[Record], str] = compose_note,
) -> Iterator[Record]:
    """The records of a file or folder, in its order, each id once.

    The first bad row is a RecordError that names its file and line; with a list for `skipped`, bad rows are left out
    and what is wrong with each is put there. `hpo` names HPO ids, `images` is the folder that image paths start from
    (the table's own by default), `columns` maps our column names to a table's own, `undiagnosed` lets phenopackets
    without a diagnosis pass, and `compose` writes the note of a record that has none.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise RecordError(f"{path}: no such file or folder; give a table, a phenopacket or a folder of cases")
    if unknown := set(columns or ()) - set(COLUMNS):
        raise ConfigError(f"columns: {shown(min(unknown))} is none of ours; wanted {', '.join(COLUMNS)}")
    reading = Reading(
        images=None if images is None else Path(images),
        terms={} if hpo is None else read_hpo(hpo),
        columns=dict(columns or {}),
        undiagnosed=undiagnosed,
        root=path if path.is_dir() else None,
    )
    rows = _folder_rows(path, reading) if path.is_dir() else _file_rows(path, reading)
    return _kept(rows, path, skipped, compose)


def home_of(path: str | Path) -> Path:
    """The folder that cases are read from: the one that was given, or that of the file."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def read_stream(file: IO[bytes], name: str = "standard input", *, skipped: list[str] | None = None) -> Iterator[Record]:
    """The records of a stream, as they come: JSON lines, or a note a line, called line-1, line-2 and so on."""
    return _kept(_stream_rows(file, Path(name)), Path(name), skipped, compose_note)


def _stream_rows(file: IO[bytes], path: Path) -> Iterator[Row]:
    json_lines: bool | None = None
    for number, line in lines(file, path):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        json_lines = line.lstrip().startswith(b"{") if json_lines is None else json_lines
        if json_lines:
            yield from _json_rows(iter([(where, parsed(line, where))]), path, Reading())
            continue
        try:
            yield where, Record(f"line-{number}", note=line.decode().strip())
        except UnicodeDecodeError as fault:
            yield where, RecordError(f"{where}: not UTF-8 (byte {fault.start + 1}); send the text as UTF-8")


def split_of(record: Record, shares: Mapping[str, float] = SHARES, seed: int = 0) -> str:
    """The split of one record: its own where it names one, else by a hash of its group, or of its id without a group.

    The hash is the same on every machine and does not depend on the other records: a record stays where it is when
    others come or go, and a group is never on both sides.
    """
    _check(shares)
    if record.split:
        return SPLITS.get(record.split.lower(), record.split)
    key = f"{seed}\x00{record.group or record.id}".encode("utf-8", "surrogatepass")
    place = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    reached = 0.0
    for name, share in shares.items():
        reached += share
        if place < reached:
            return name
    return [name for name, share in shares.items() if share][-1]


def split_records(
    records: Iterable[Record], shares: Mapping[str, float] = SHARES, seed: int = 0
) -> dict[str, list[Record]]:
    """The records of each split, in their order. A group of which one record names its split lies there whole."""
    records = list(records)
    named: dict[str, Record] = {}
    for record in (record for record in records if record.group and record.split):
        first = named.setdefault(str(record.group), record)
        if split_of(first, shares) != split_of(record, shares):
            raise RecordError(
                f"group {shown(record.group)}: {shown(first.id)} is in the split {shown(first.split)} and "
                f"{shown(record.id)} in {shown(record.split)}; a group lies on one side, mend the column split"
            )
    sides: dict[str, list[Record]] = {name: [] for name in shares}
    for record in records:
        side = split_of(named.get(record.group or "", record), shares, seed)
        sides.setdefault(side, []).append(record)
    return sides


def _check(shares: Mapping[str, float]) -> None:
    total = math.fsum(shares.values())
    if not all(0 <= share <= 1 for share in shares.values()) or abs(total - 1) > 1e-6:
        raise ConfigError(f"shares: {dict(shares)} add up to {total:g}, 1 was wanted; give each split its part of 1")


def _kept(
    rows: Iterator[Row], path: Path, skipped: list[str] | None, compose: Callable[[Record], str]
) -> Iterator[Record]:
    """The good rows, with a note each; ids that came before are refused.

    Of each id only an 8-byte hash is kept, so that a million records take some 100 MB; two different ids of a million
    have the same hash once in 40 million runs.
    """
    seen: set[int] = set()
    empty = True
    for where, record in rows:
        empty = False
        if isinstance(record, Record):
            key = hash(record.id)
            if key not in seen:
                seen.add(key)
                yield record if record.note else replace(record, note=compose(record))
                continue
        error = _doubled(record, where) if isinstance(record, Record) else record
        if skipped is None:
            raise error
        skipped.append(str(error))
    if empty:
        raise RecordError(f"{path}: no records in it; give a file or folder with at least one case")


def _doubled(record: Record, where: str) -> RecordError:
    return RecordError(f"{where}: the id {shown(record.id)} was there before; give each record an id of its own")


def _file_rows(path: Path, reading: Reading) -> Iterator[Row]:
    with opened(path) as file:
        start = head(file, path)
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield from _json_rows(zip_values(path), path, reading)
        elif start.startswith(b"\x93NUMPY"):
            for name in ARRAYS:
                refuse_link_out(path.parent / name, path.parent, "put the array itself there")
            yield from fold_records([path.parent])
        elif start.startswith(_PICTURE_STARTS):
            yield str(path), Record(path.name, image=str(path))
        elif b"\x00" in start:
            raise RecordError(
                f"{path}: neither text, zip nor picture; give a table, a phenopacket or a folder of cases"
            )
        elif start.lstrip()[:1] in (b"{", b"["):
            yield from _json_rows(json_values(file, path), path, reading)
        else:
            yield from table_records(file, path, reading)


_PICTURE_STARTS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*", b"BM", b"RIFF")


def _folder_rows(root: Path, reading: Reading) -> Iterator[Row]:
    found = contents(root)
    tables = _tables(found.tables, reading) or _tables(found.inner_tables, reading)
    if found.folds:
        yield from fold_records(found.folds)
    elif tables:
        for path in tables:
            yield from _in_split(_file_rows(path, reading), path)
    elif found.pictures:
        yield from picture_records(root)
    elif found.documents:
        for path, error in document_files(root):
            yield from [(str(path), error)] if error else _one_document(path, reading)
    else:
        for path in found.tables:  # none of them is a table of cases: the first says what it lacks
            yield from _file_rows(path, reading)


def _tables(paths: list[Path], reading: Reading) -> list[Path]:
    return [path for path in paths if suffix(path.name) in (".jsonl", ".ndjson") or is_table(path, reading)]


def _in_split(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """A table called train, validation or test gives its records this split where they name none."""
    split = SPLITS.get(path.name.split(".")[0].lower())
    for where, row in rows:
        if split and isinstance(row, Record) and not row.split:
            yield where, replace(row, split=split)
        else:
            yield where, row


def _one_document(path: Path, reading: Reading) -> Iterator[Row]:
    """In a folder a file is what a row is in a table: one that cannot be read costs itself alone."""
    try:
        yield from _file_rows(path, reading)
    except RecordError as error:
        yield str(path), error


def _json_rows(values: Iterator[Located], path: Path, reading: Reading) -> Iterator[Row]:
    folder = images_folder(path, reading)
    for where, value in values:
        try:
            yield where, value if isinstance(value, RecordError) else _json_record(value, folder, where, reading)
        except RecordError as error:
            yield where, error


def _json_record(value: Any, folder: str, where: str, reading: Reading) -> Record:
    if not isinstance(value, dict):
        raise RecordError(f'{where}: {shown(value)}, an object with an id was wanted; write {{"id": …, "note": …}}')
    if is_phenopacket(value):
        return phenopacket_record(value, reading, where, Path(where).stem)
    if is_case(value):
        return case_record(value, reading, where)
    return record_of(renamed(value, reading.columns), folder, where)
