"""Lines of a text or JSON-lines file, streamed in bounded memory; every fault is named by file and line.

A line is never held beyond `LINE_LIMIT` bytes, so a broken file of any size costs no more than a good one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import CheckpointError, MintError, RecordError
from .files import replacing

LINE_LIMIT = 16 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Fault = Callable[[str], MintError]


def refuse(fault: MintError, skipped: list[str] | None) -> None:
    """Raise `fault`, or write it down where the caller asked to leave bad lines out."""
    if skipped is None:
        raise fault
    skipped.append(str(fault))


def text_lines(
    path: str | Path, error: Fault = RecordError, skipped: list[str] | None = None, limit: int = LINE_LIMIT
) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, without line ends and without a byte order mark."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_byte_lines(file, limit), start=1):
                where = f"{path}:{number}"
                if line is None:
                    refuse(
                        error(f"{where}: the line is longer than {limit:,} bytes; break it up or leave it out"), skipped
                    )
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as fault:
                    wrong = line[fault.start : fault.start + 1].hex()
                    refuse(
                        error(f"{where}: not UTF-8 (byte 0x{wrong} at {fault.start}); save the file as UTF-8"), skipped
                    )
                    continue
                yield number, text.rstrip("\r\n")
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror or fault}); check the path") from fault
    except ValueError as fault:  # a path with a NUL or a lone surrogate
        raise error(f"{str(path)!r}: not the name of a file ({fault})") from fault


def _byte_lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Each line, or None for one that is longer than `limit`, of which the rest is passed over in pieces."""
    while line := file.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        yield None
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)


def read_json_lines(
    path: str | Path, error: Fault = RecordError, skipped: list[str] | None = None, limit: int = LINE_LIMIT
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; blank lines are passed over.

    With `skipped` a list, a bad line is left out and its fault appended there instead of being raised.
    """
    for number, line in text_lines(path, error, skipped, limit):
        if not line or line.isspace():
            continue
        try:
            row = json_value(line)
        except ValueError as fault:
            column = f":{fault.colno}" if isinstance(fault, json.JSONDecodeError) else ""
            reason = fault.msg if isinstance(fault, json.JSONDecodeError) else fault
            refuse(error(f"{path}:{number}{column}: not JSON ({reason}); one JSON object a line is wanted"), skipped)
            continue
        if not isinstance(row, dict):
            found = type(row).__name__
            refuse(error(f"{path}:{number}: a JSON {found}; one JSON object a line is wanted"), skipped)
            continue
        yield number, row


def json_value(text: str) -> Any:
    """The value of strict JSON: no NaN, no half of a surrogate pair; any fault is a ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is no character") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, beside and renamed; returns how many."""
    number = 0
    with replacing(path) as file:
        for number, row in enumerate(rows, start=1):
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, TypeError) as fault:
                raise RecordError(f"{path}:{number}: cannot be written as JSON ({fault})") from fault
            file.write(line + b"\n")
    return number


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill or a full disk cut short is left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json_value(line.decode())
        except ValueError:
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise CheckpointError(f"{path}:{number}: not a line of metrics; mend it, or delete the file")
        rows.append(row)
    return rows
