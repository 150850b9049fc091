"""The built-in tasks by name: `builtin:rare-disease` and `builtin:tissue` stand wherever a file of cases may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
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
