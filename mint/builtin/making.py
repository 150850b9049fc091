"""Makes the shipped models again: `python -m mint.builtin.making WHICH --out DIR`.

Everything is drawn from the seed, so the same kind of machine makes the same bytes (on one thread: OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import student, teacher, tissue_student, tissue_teacher


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mint.builtin.making", description="Make a shipped model again.")
    parser.add_argument(
        "which",
        choices=["student", "teacher", "tissue-student", "tissue-teacher"],
        help="the base decoder or the fusion teacher of the rare-disease task, the base or the teacher of the tissues",
    )
    parser.add_argument("--out", type=Path, required=True, help="its new folder")
    parser.add_argument("--steps", type=int, help="steps, to try it out; unless given, those of the shipped one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums are then in one order whatever the machine's number of cores
    if options.which == "student":
        student.make_student(options.out, _rounds(options.steps), options.seed)
    elif options.which == "teacher":
        teacher.make_teacher(options.out, options.steps or teacher.STEPS, options.seed)
    elif options.which == "tissue-student":
        tissue_student.make_tissue_student(options.out, options.steps or tissue_student.STEPS, options.seed)
    else:
        tissue_teacher.make_tissue_teacher(options.out, options.steps or tissue_teacher.STEPS, options.seed)


def _rounds(steps: int | None) -> list[tuple[int, int, int]]:
    return [(names, size, steps or usual) for names, size, usual in student.ROUNDS]


if __name__ == "__main__":
    main()
