"""The built-in tasks by name: `builtin:rare-disease` and `builtin:tissue` stand wherever a file of cases may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..records import read_records
from ..types import Record
from .nuclei import draw_tissue_cases
from .rare_disease import draw_cases
from .tables import HERE

PREFIX = "builtin:"
TASKS = {"rare-disease": draw_cases, "tissue": draw_tissue_cases}
STUDENT, TEACHER = HERE / "models" / "student", HERE / "models" / "teacher"
"""The shipped models of the rare-disease task, in the official layout; student.py and teacher.py say how they came about."""
TISSUE_STUDENT, TISSUE_TEACHER = HERE / "models" / "tissue-student", HERE / "models" / "tissue-teacher"
"""Those of the tissues: a Llama 3.2 Vision and a CLIP; see tissue_student.py and tissue_teacher.py."""


def is_builtin(cases: object) -> bool:
    """Whether this is the name of a built-in task (of any: an unknown one is refused by `cases`)."""
    return isinstance(cases, str | Path) and str(cases).startswith(PREFIX)


def cases(name: str | Path, split: str = "train", n: int = 1000, seed: int = 0) -> Iterator[Record]:
    """n cases of a task, whose pictures draw themselves when they are looked at."""
    draw = TASKS.get(str(name).removeprefix(PREFIX))
    if draw is None:
        raise ConfigError(f"{name}: no such built-in task; wanted one of {', '.join(PREFIX + task for task in TASKS)}")
    return draw(n, seed, split)


def records_of(
    source: str | Path | Iterable[Record], reading: Mapping[str, Any], skipped: list[str] | None
) -> Iterable[Record]:
    """The cases of a file or folder, read as `reading` says (the options of `read_records`), of a task, or as given."""
    if isinstance(source, str | Path) and not is_builtin(source):
        return read_records(source, undiagnosed=True, skipped=skipped, **reading)
    if reading:
        given = source if isinstance(source, str | Path) else "what was given"
        raise ConfigError(f"{', '.join(reading)}: say how a file is read, and {given} is none; leave it out")
    return cases(source) if isinstance(source, str | Path) else source
