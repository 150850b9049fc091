"""A file's bytes, never more of them at once than a bound: plain or gzipped, line by line or as one JSON document."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from ..errors import RecordError

LINE_LIMIT = 16 << 20
DOCUMENT_LIMIT = 32 << 20
HEAD = 1 << 16
BOM = b"\xef\xbb\xbf"
READ_FAULTS = (OSError, EOFError, zlib.error)

Located = tuple[str, Any]
"""Where a value was found (`cases.jsonl:17`), and the value; a RecordError in its place where it cannot be read."""


@contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedReader[Any]]:
    """The file's bytes, unpacked where they are gzipped, with at least the start of them in reach of `peek`."""
    try:
        file = io.BufferedReader(io.FileIO(path), HEAD)
    except (OSError, ValueError) as fault:
        raise RecordError(f"{path}: cannot be opened ({fault}); see that it is there and yours to read") from fault
    try:
        with file as raw:
            if raw.peek(2)[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield io.BufferedReader(unpacked, HEAD)
            else:
                yield raw
    except READ_FAULTS as fault:
        raise RecordError(f"{path}: the file breaks off ({fault}); fetch or write it again") from fault


def head(file: io.BufferedReader[Any], path: str | Path) -> bytes:
    """The first bytes (some 64 KiB) without moving on, less a byte order mark; UTF-16 is refused."""
    start = file.peek(HEAD)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RecordError(f"{path}: this is UTF-16, UTF-8 was wanted; save the file again as UTF-8")
    return start.removeprefix(BOM)


def lines(file: IO[bytes], path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its number from 1, line end kept; a line over the limit is refused before it is read whole."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(LINE_LIMIT + 1)
        except READ_FAULTS as fault:
            raise RecordError(f"{path}:{number}: the file breaks off ({fault}); fetch or write it again") from fault
        if not line:
            return
        if len(line) > LINE_LIMIT:
            raise RecordError(
                f"{path}:{number}: a line of more than {LINE_LIMIT:,} bytes, at most that many are read; "
                f"write one record a line"
            )
        yield number, line.removeprefix(BOM) if number == 1 else line


def json_values(file: io.BufferedReader[Any], path: str | Path) -> Iterator[Located]:
    """The values of a JSON lines file one at a time, or those of a whole JSON document (a list's items, or the one)."""
    if _is_document(head(file, path)):
        yield from _document(file, path)
        return
    try:
        for number, line in lines(file, path):
            if not line.isspace():
                where = f"{path}:{number}"
                yield where, parsed(line, where)
    except RecordError as error:
        yield str(path), error


def parsed(data: bytes, where: str) -> Any:
    """The JSON value of `data`, or the RecordError that says why there is none."""
    try:
        return _DECODER.decode(data.decode())
    except json.JSONDecodeError as fault:
        return RecordError(f"{where}: not JSON ({fault.msg} at column {fault.colno}); mend or remove the line")
    except UnicodeDecodeError as fault:
        return RecordError(f"{where}: not UTF-8 (byte {fault.start + 1}); save the file again as UTF-8")
    except (ValueError, RecursionError) as fault:
        return RecordError(f"{where}: not JSON that can be read ({fault}); mend or remove the line")


def _document(file: io.BufferedReader[Any], path: str | Path) -> Iterator[Located]:
    try:
        data = file.read(DOCUMENT_LIMIT + 1)
    except READ_FAULTS as fault:
        yield str(path), RecordError(f"{path}: the file breaks off ({fault}); fetch or write it again")
        return
    if len(data) > DOCUMENT_LIMIT:
        why = f"a JSON document of more than {DOCUMENT_LIMIT:,} bytes; write one JSON object a line instead"
        yield str(path), RecordError(f"{path}: {why}")
        return
    value = parsed(data.removeprefix(BOM), str(path))
    if isinstance(value, list):
        yield from ((f"{path}: item {number}", item) for number, item in enumerate(value, 1))
    else:
        yield str(path), value


def _is_document(start: bytes) -> bool:
    """A list, or an object that goes on over lines; else every line is a value of its own."""
    start = start.lstrip()
    if start[:1] == b"[":
        return True
    first, _, rest = start.partition(b"\n")
    rest = rest.lstrip()
    return bool(rest) and not first.rstrip().endswith(b"}") and not rest.startswith(b"{")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
