"""`predict`: one modality in, ranked classes out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from ..errors import ConfigError
from ..progress import say
from .frame import command, listed


@command("seed", "device", "dtype", "date", "skip_bad", "reading", ranks=True)
@click.argument("cases", required=False)
@click.option("--note", help="The note of one case.")
@click.option("--image", help="The picture of one case, for a vision model; with --note it sees both.")
@click.option(
    "--modality", type=click.Choice(["note", "image", "both"]), help="What of each case is seen [default: note]."
)
@click.option("--kind", type=click.Choice(["disease", "tissue"]), default="disease", show_default=True,
              help="Of classes.")  # fmt: skip
@click.option("--meta-masking", is_flag=True, help="Text before an image sees nothing of it, as in Meta's own code.")
@click.option(
    "--model", help="Folder or hub name of the decoder [default: that of the newest run, or the shipped one]."
)
@click.option("--adapter", help="Adapter folder, ours or PEFT's.")
@click.option("--shard", is_flag=True, help="Spread the decoder over the processes that torchrun started.")
@click.option("--tensor-parallel", type=click.IntRange(2), help="Ranks that hold one copy of the decoder together.")
@click.option("--labels", help="The closed set: a file with one label a line, or CSV or JSON.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Classes to name.")
@click.option("--mode", type=click.Choice(["rank", "list", "text"]), default="rank", show_default=True,
              help="Exact probabilities of all labels, the aligned list of --top of them, or free text.")  # fmt: skip
@click.option("--normalise", type=click.Choice(["sum", "mean", "prior"]), default="sum", show_default=True,
              help="Rank by a label's log-probability, by its mean per token, or less that after an empty case.")  # fmt: skip
@click.option("--first-in-list", is_flag=True,
              help="Rank a label as the first name of a list, for a model aligned on lists.")  # fmt: skip
@click.option("--retrieve", help="File or folder of documents; the passages that fit best stand before the case.")
@click.option("--retriever", help="BERT checkpoint that finds passages by meaning; unless given, by words (BM25).")
@click.option("--passages", type=click.IntRange(1), default=3, show_default=True, help="Passages before a case.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Text mode: at most so many."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Text mode: 0 takes the likeliest token."
)
@click.option("--format", "form", type=click.Choice(["auto", "jsonl", "csv", "table"]), default="auto", show_default=True,
              help="Of the output; auto: a table for one case, else JSON lines.")  # fmt: skip
@click.option("--out", help="JSON-lines (or CSV) file of predictions; a run that was killed is taken up again.")
def predict(cases: str | None, note: str | None, image: str | None, out: str | None, skip_bad: bool, form: str,
            first_in_list: bool, **words: Any) -> Any:  # fmt: skip
    """Predict the classes of a note, of a picture, of every case of a file or folder, or of standard input (-): JSON
    lines, or a note a line.

    \b
    Example:  python cli.py predict --note "Short stature, webbed neck, pulmonic stenosis."
    Example:  python cli.py predict --image tile.png
    Example:  python cli.py predict --model DIR --mode text --note "Long palpebral fissures, short stature."
    """
    if (cases is None) == (note is None and image is None):
        raise ConfigError("wanted either CASES (a file, a folder or -), or --note or --image, and not both")
    _resolve(words, note, image, first_in_list)
    skipped: list[str] | None = [] if skip_bad else None
    source = _cases(cases, note, image, skipped)
    if out is not None:
        return _written(source, words, skipped, out, form, {"cases": cases, "note": note, "image": image})
    as_json = click.get_current_context().params["as_json"]
    for_people = cases is None and form == "auto" and not as_json
    if for_people and words["mode"] == "text" and not (words["retrieve"] or words["shard"] or words["tensor_parallel"]):
        return _stream(source[0], **words)
    form = form if form != "auto" else "table" if for_people else "jsonl"
    return _printed(source, words, skipped, form)


def _resolve(words: dict[str, Any], note: str | None, image: str | None, first_in_list: bool) -> None:
    """What was left open: the model and what belongs to it, how an answer begins, and what of a case is seen."""
    from ..answers import opening

    words["opening"] = opening(words["kind"]) if first_in_list else None
    if words["model"] is None:
        words |= _newest(words, note, image)
    words["opening"] = words["opening"] or ""
    words["modality"] = words["modality"] or ("note" if image is None else "image" if note is None else "both")


def _written(source: Any, words: dict[str, Any], skipped: list[str] | None, out: str, form: str,
             asked: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Every answer into the file `out`, but for those that a run before has left there; `asked` are the cases by name."""
    from .. import parallel, pipeline
    from ..evaluation.outputs import Output

    output = Output(out, {**asked, **words}, form) if parallel.first() else None
    done = frozenset(parallel.from_first(sorted(output.done) if output else None))
    answers = pipeline.predict(source, skipped=skipped, done=done, **words)
    count = output.write(answers) if output else sum(1 for _ in answers)
    listed(skipped)
    return {"out": out, "cases": count}


_COLUMNS = {
    "rank": "place, probability among the labels (a class that is none of them cannot be named), label",
    "list": "place, probability of the name at its place of the list, label",
}
"""What a table shows."""


def _printed(source: Any, words: dict[str, Any], skipped: list[str] | None, form: str) -> Iterator[Any]:
    """Every answer as it comes; then on stderr what the columns of a table are, and which cases were left out."""
    from .. import pipeline
    from ..evaluation.outputs import printed

    yield from printed(pipeline.predict(source, skipped=skipped, **words), form)
    if form == "table" and words["mode"] in _COLUMNS:
        say(f"{_COLUMNS[words['mode']]}; a research tool, not for diagnosis")
    listed(skipped)


def _cases(cases: str | None, note: str | None, image: str | None, skipped: list[str] | None) -> Any:
    """What `pipeline.predict` takes: a path, or the records of --note and --image or of standard input."""
    from .. import parallel
    from ..records import read_stream
    from ..types import Record

    if cases is None:
        return [Record("case", note=note or "", image=image)]
    if cases == "-" and parallel.size() > 1:
        raise ConfigError("standard input can be read by one process; give several of them a file")
    return read_stream(sys.stdin.buffer, skipped=skipped) if cases == "-" else cases


def _newest(words: dict[str, Any], note: str | None, image: str | None) -> dict[str, Any]:
    """What the newest run says of a model, its adapter and its closed set, but for what is given."""
    from .. import showcase, showcase_tissue

    pictures = words["kind"] == "tissue" or words["modality"] == "image" or (image is not None and note is None)
    if pictures:
        words["kind"] = "tissue"
    found = showcase_tissue.newest() if pictures else showcase.newest()
    return {name: value for name, value in found.items() if words.get(name) is None}


def _stream(one: Any, *, model: str, labels: Any, max_new_tokens: int, temperature: float, seed: int, top: int,
            modality: str, kind: str, **words: Any) -> dict[str, Any]:  # fmt: skip
    """Print the answer to one case as it is generated."""
    from ..decoders import load_decoder
    from ..evaluation.outputs import outside
    from ..labels import closed_set
    from ..predicting import Questioner

    loading = {name: words[name] for name in ("adapter", "device", "dtype", "date", "meta_masking")}
    decoder = load_decoder(model, **loading)
    known = closed_set(labels)
    questioner = Questioner(
        decoder, known, mode="text", modality=modality, kind=kind, top=top, max_new_tokens=max_new_tokens
    )
    asked = questioner.put(one)
    ids, said, shown = decoder.tokenizer.chat_ids(asked.messages, generate=True), [], ""

    def hear(_: int, token: int) -> None:
        nonlocal shown
        said.append(token)
        text = decoder.tokenizer.decode(said)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a letter: wait for the rest
            click.echo(text[len(shown) :], nl=False)
            shown = text

    decoder.generate([ids], max_new_tokens, temperature, seed=seed, images=[asked.images], on_token=hear)
    click.echo()
    for line in outside(questioner.named(decoder.tokenizer.decode(said))):
        say(line)
    return {}
