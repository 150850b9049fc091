"""`teach` and `prefer`: a teacher from cases, and preference pairs from a teacher."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .frame import command, listed
from .options import pair_options


@command("seed", "device", "dtype", "skip_bad", "reading")
@click.argument("cases")
@click.option("--base", default="none", show_default=True, help="ViLT checkpoint to start from, or none.")
@click.option(
    "--classes", help="All that it is to know, a file like --labels [default: the base's own, or the cases']."
)
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Passes over the cases.")
@click.option("--lr", type=float, default=0.0, help="Learning rate; 5e-5 on a checkpoint, 5e-4 from nothing.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Cases of a step.")
@click.option(
    "--loss", type=click.Choice(["bce", "cross_entropy"]), default="bce", show_default=True, help="Of the classes."
)
@click.option("--class-weights", type=click.Choice(["none", "balanced", "root"]), default="none", show_default=True,
              help="How much more rare classes count.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the training in --out.")
@click.option("--out", required=True, help="Folder of the teacher.")
def teach(cases: str, base: str, classes: str | None, out: str, skip_bad: bool, **choices: Any) -> dict[str, Any]:
    """Train the fusion encoder on cases with photo, note and label.

    \b
    Example:  python cli.py teach cases.csv --base dandelin/vilt-b32-mlm --out teacher/
    """
    from .. import pipeline
    from ..labels import read_labels

    skipped: list[str] | None = [] if skip_bad else None
    choices["classes"] = None if classes is None else read_labels(classes).labels
    taught = pipeline.teach(cases, out=out, base=None if base == "none" else base, skipped=skipped, **choices)
    listed(skipped)
    scores = {"validation_top_1": taught.top1, "validation_top_10": taught.top10}
    return {"out": str(taught.folder), "classes": len(taught.classes), "steps": taught.steps, **scores}


@command("device", "dtype", "skip_bad", "reading", ranks=True)
@click.argument("cases")
@click.option("--teacher", required=True, help="ViLT or CLIP checkpoint, GestaltMML's .pt, or a file of scores.")
@click.option("--classes", help="What a CLIP teacher looks for, a file like --labels; of another, those to rank.")
@click.option("--sentences", help="A text file with CLIP's sentences about a class, one a line, {} in its place.")
@click.option("--cache", help="Folder where CLIP's vectors of images are kept by their content, for the next time.")
@click.option("--candidates", help='JSON lines {"id": …, "candidates": […]}: the classes that a case is ranked on.')
@click.option("--modality", type=click.Choice(["note", "image", "both"]), default="note", show_default=True,
              help="What of a case the student will see.")  # fmt: skip
@click.option(
    "--kind", type=click.Choice(["disease", "tissue"]), default="disease", show_default=True, help="Of classes."
)
@pair_options
@click.option("--template", help="A text file with the words of the prompt: {note}, {k}, {labels}.")
@click.option("--temperature", type=float, help="Of the teacher's scores, where they are kept.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random negatives.")
@click.option("--out", required=True, help="JSON-lines file of pairs.")
def prefer(cases: str, out: str, teacher: str, classes: str | None, sentences: str | None, candidates: str | None,
           cache: str | None, device: str, dtype: str, skip_bad: bool, template: str | None,
           **choices: Any) -> dict[str, Any]:  # fmt: skip
    """Rank the classes of each case with a teacher and write the preference pairs.

    \b
    Example:  python cli.py prefer cases.csv --teacher teacher/ --out pairs.jsonl
    Example:  python cli.py prefer tiles/ --teacher vinid/plip --classes names.txt --modality image --out p.jsonl
    """
    from .. import parallel, pipeline
    from ..encoders import load_encoder
    from ..encoders.zeroshot import read_sentences
    from ..labels import read_labels
    from ..pairs.files import read_candidates, write_pairs
    from ..pairs.pictures import Elsewhere
    from ..progress import say
    from ..prompts import read_template
    from ..records import home_of

    encoder = load_encoder(
        teacher,
        classes=None if classes is None else read_labels(classes).labels,
        templates=None if sentences is None else read_sentences(sentences),
        device=device, dtype=dtype, cache=cache,
    )  # fmt: skip
    choices["template"] = None if template is None else read_template(template)
    choices["candidates"] = None if candidates is None else read_candidates(candidates)
    skipped: list[str] | None = [] if skip_bad else None
    images = choices["reading"].get("images")
    elsewhere = Elsewhere(Path(out).parent, [home_of(cases), *([images] if images else [])])
    pairs = elsewhere.passing(pipeline.prefer(cases, teacher=encoder, skipped=skipped, **choices))
    count = write_pairs(out, pairs) if parallel.first() else sum(1 for _ in pairs)
    listed(skipped)
    if elsewhere.folders:
        folders = [word for folder in elsewhere.folders for word in ("--image-folder", folder)]
        words = shlex.join(["align", "--pairs", out, *folders])
        say(f"the pictures do not lie in the folder of the pairs; to align on them: {words}")
    return {"out": out, "pairs": count}
