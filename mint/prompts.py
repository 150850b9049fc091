"""The words of a conversation: what a student is shown of a case, and what it is asked.

The words can be replaced by a template: plain text with the places `{note}`, `{k}` and `{labels}`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .answers import heading
from .errors import ConfigError, RecordError
from .types import Message, Record

MODALITIES = ("note", "image", "both")
"""What of a case the student sees."""

_SHOWN = {
    ("disease", "note"): "{note}\n\n",
    ("disease", "image"): "The photo shows the face of a patient.\n\n",
    ("disease", "both"): "The photo shows the face of this patient.\n\n{note}\n\n",
    ("tissue", "note"): "{note}\n\n",
    ("tissue", "image"): "The picture shows cells of a stained section of human tissue.\n\n",
    ("tissue", "both"): "The picture shows cells of a stained section of human tissue.\n\n{note}\n\n",
}
_ASKED = {
    "disease": "Which rare genetic diseases fit best? Name {{k}}, the most likely first, as a numbered list under {}",
    "tissue": "Which tissues can it come from? Name {{k}}, the most likely first, as a numbered list under {}",
}
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
_PLACES = ("note", "k", "labels")
_LARGEST = 64 << 10


def default_template(modality: str, kind: str) -> str:
    """Our own words for a student that sees a modality ("note", "image", "both") and names a "disease" or "tissue"."""
    if modality not in MODALITIES:
        raise ConfigError(f"modality {modality!r}: one of {', '.join(MODALITIES)} is wanted")
    title = heading(kind)
    return _SHOWN[kind, modality] + _ASKED[kind].format(title)


def read_template(path: str | Path) -> str:
    """The text of a template file, its places checked."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1).decode("utf-8-sig")
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read ({fault.strerror}); check the path") from fault
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path}: not UTF-8 (byte {fault.start}); save the file as UTF-8") from fault
    if len(text.encode()) > _LARGEST:
        raise ConfigError(f"{path}: longer than {_LARGEST:,} bytes; a template is a page of text")
    for number, line in enumerate(text.splitlines(), start=1):
        check_places(line, f"{path}:{number}")
    return text.strip("\n")


def check_places(template: str, source: str = "template") -> None:
    """Refuse a place that nothing fills; braces around anything but a bare name are only braces."""
    unknown = next((name for name in _PLACE.findall(template) if name not in _PLACES), None)
    if unknown is not None:
        raise ConfigError(f"{source}: the place {{{unknown}}} is unknown; {{note}}, {{k}} and {{labels}} can be filled")


def prompt_messages(
    record: Record,
    modality: str = "note",
    *,
    kind: str = "disease",
    k: int = 10,
    template: str | None = None,
    labels: Sequence[str] = (),
    passages: Sequence[str] = (),
) -> list[Message]:
    """The user's turn for one case: its note, its image, or both, and nothing of what the student is not to see.

    An image is a part {"type": "image"} before the text, as Llama 3.2 Vision has it. `passages` (found by retrieval)
    stand before the case; {labels} lists `labels` by alphabet. What fills a place is never read for places again, so
    braces in a note are only braces.
    """
    default = default_template(modality, kind)  # refuses an unknown modality or kind
    words = default if template is None else template
    check_places(words)
    _check_seen(record, modality, words)
    filling = {"note": record.note.strip(), "k": str(k)}
    if "labels" in _PLACE.findall(words):  # there may be a million of them
        filling["labels"] = ", ".join(sorted(labels))
    text = _passages(passages) + _PLACE.sub(lambda match: filling[match[1]], words)
    if modality == "note":
        return [{"role": "user", "content": text}]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def _check_seen(record: Record, modality: str, words: str) -> None:
    """The template and the case must have what the modality shows, and the template no more."""
    places = _PLACE.findall(words)
    if modality == "image" and "note" in places:
        raise ConfigError("template: asks for {note}, but the student is to see the image alone; take {note} out")
    if modality != "image" and "note" not in places:
        raise ConfigError(f"template: has no place {{note}}, but the student is to see the {modality}; put {{note}} in")
    if modality != "image" and not record.note.strip():
        other = "" if record.image is None else ", or show its image (--modality image)"
        raise RecordError(f"case {record.id!r}: the note is empty; give it one, or leave the case out{other}")
    if modality != "note" and record.image is None:
        raise RecordError(f"case {record.id!r}: has no image; give it one, or leave the case out")


def _passages(passages: Sequence[str]) -> str:
    if not passages:
        return ""
    listed = "\n\n".join(f"[{number}] {passage.strip()}" for number, passage in enumerate(passages, start=1))
    return f"From reference works:\n\n{listed}\n\nThe case:\n\n"
