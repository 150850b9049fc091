"""The classes of an encoder: what its files state, and which of them are asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import read_json


def distinct(classes: Iterable[str]) -> tuple[str, ...]:
    """The classes as given, refused if one is named twice or not a word."""
    names = tuple(classes)
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise ConfigError(f"classes: {wrong[0]!r} is no name; give each class a name")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"classes: {named(twice)} named twice; give each class once")
    if not names:
        raise ConfigError("classes: the list is empty; name at least one class")
    return names


def named(names: Sequence[str], most: int = 8) -> str:
    """Names as they stand in a message."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def stated_in_config(config: Mapping[str, Any], rows: int, where: str) -> tuple[str, ...] | None:
    """The classes of `id2label`, in the order of the classifier's `rows`; None if there are none, or placeholders."""
    table = config.get("id2label")
    if table is None or rows == 0:
        return None
    names = _in_order(table, f"{where}: id2label")
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None
    if len(names) != rows:
        raise CheckpointError(f"{where}: id2label has {len(names):,} classes, classifier.3.weight {rows:,} rows")
    return names


def read_disease_dict(path: Path) -> tuple[str, ...]:
    """The classes of GestaltMML's `disease_dict.json`: row number to name, in any order."""
    return _in_order(read_json(path, CheckpointError), str(path))


def _in_order(table: Any, where: str) -> tuple[str, ...]:
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{where}: not a table of row number to class name; fetch it again")
    try:
        by_row = {int(row): name for row, name in table.items()}
    except ValueError as error:
        raise CheckpointError(f"{where}: a key is no row number ({error}); fetch it again") from error
    if sorted(by_row) != list(range(len(table))):
        raise CheckpointError(f"{where}: rows are not numbered 0 to {len(table) - 1}, each once; fetch it again")
    names = tuple(by_row[row] for row in range(len(table)))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CheckpointError(f"{where}: {named(twice)} stands there twice; give each row its own name")
    return names


def select(
    stated: tuple[str, ...] | None, rows: int, asked: Iterable[str] | None, where: str
) -> tuple[tuple[str, ...], list[int] | None]:
    """The classes to score, and their columns of the classifier (None for all of them in order).

    Where the files state names, `asked` picks some of them; where they do not, it names the rows.
    """
    if asked is None:
        if stated is None:
            raise ConfigError(f"{where}: names no classes; name them in the order of the classifier's {rows:,} rows")
        return stated, None
    wanted = distinct(asked)
    if stated is None:
        if len(wanted) != rows:
            raise ConfigError(f"{where}: {len(wanted):,} classes given for a classifier of {rows:,} rows; name each")
        return wanted, None
    lacking = [name for name in wanted if name not in set(stated)]
    if lacking:
        raise ConfigError(f"{where}: the teacher lacks {named(lacking)}; leave them out, or teach it these classes")
    row = {name: number for number, name in enumerate(stated)}
    return wanted, None if wanted == stated else [row[name] for name in wanted]
