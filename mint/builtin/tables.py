"""Reading the tables of facts: tab-separated text with a header; lines that begin with # are comments."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import RecordError

HERE = Path(__file__).parent


@cache
def rows(name: str, columns: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    """The rows of a table of this folder, each as column -> cell."""
    return tuple(read_table(HERE / name, columns))


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a tab-separated table that must have exactly these columns, in this order."""
    found: list[dict[str, str]] = []
    header = False
    for number, line in enumerate(_lines(path), 1):
        cells = line.split("\t")
        if line.startswith("#"):
            continue
        if not header:
            if tuple(cells) != columns:
                raise RecordError(
                    f"{path}:{number}: columns {', '.join(cells)}; wanted {', '.join(columns)}, separated by tabs"
                )
            header = True
            continue
        if len(cells) != len(columns):
            raise RecordError(f"{path}:{number}: {len(cells)} cells, wanted {len(columns)}, separated by tabs")
        found.append({"": str(number)} | dict(zip(columns, cells, strict=True)))
    if not header:
        raise RecordError(f"{path}: no header; the first line must be {', '.join(columns)}, separated by tabs")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 text (byte {error.start})") from error
