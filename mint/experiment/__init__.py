"""The paper's question: base, retrieval, SFT, DPO and MINT on the same cases, over seeds, in one table with intervals.

tasks.py      what is compared on: cases, teacher, ceilings     splits.py, crossfit.py   by publication
arms.py       the systems                                       study.py                 runs them, resumable
figures.py    means, intervals, differences                     variations.py            k, q, sizes, tuning
page.py       text, JSON and HTML of the result               reader.py                a base for a file of cases
"""

from .arms import OBJECTIVES, Bench, check_objectives
from .page import Told, tell
from .study import Plan
from .tasks import builtin_task, file_task

__all__ = ["OBJECTIVES", "Bench", "Plan", "Told", "builtin_task", "check_objectives", "file_task", "tell"]
