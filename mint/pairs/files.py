"""Preference pairs in files: JSON lines, ours and TRL's, read as they are, streamed, each fault named by file and line.

Four forms, one to a file: message lists or plain strings, each with a `prompt` or with the prompt as the shared
beginning of `chosen` and `rejected`. An image is a path in `image`, or a list of one in `images`, relative to the file,
and lies in its folder or in one that the user gave.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RecordError
from ..jsonlines import read_json_lines, refuse, write_json_lines
from ..types import Message, PreferencePair
from .pictures import homes_of, picture_of

_ROLES = ("system", "user", "assistant")
_Answer = TypeVar("_Answer", str, list[Message])


def read_pairs(
    path: str | Path, *, image_folders: Sequence[str | Path] = (), skipped: list[str] | None = None
) -> Iterator[PreferencePair]:
    """The pairs of a JSON-lines file. With `skipped` a list, bad lines are left out and their faults appended to it.

    A line without an id is named `line-N`. Plain strings stay strings, spaces and all. A picture must lie, links
    resolved, in the folder of the file or in one of `image_folders`.
    """
    homes = homes_of(path, image_folders)
    form: tuple[str, int] | None = None
    lines_of_ids: dict[str, int] = {}
    for number, row in read_json_lines(path, skipped=skipped):
        try:
            found = _form(row)
            if form is not None and found != form[0]:
                raise RecordError(f"{found}, but line {form[1]} has {form[0]}; keep one form to a file")
            pair = _pair(row, number, Path(path), homes)
            if pair.id in lines_of_ids:
                raise RecordError(
                    f"the id {pair.id!r} is that of line {lines_of_ids[pair.id]} too; give each pair its own"
                )
        except RecordError as fault:
            refuse(RecordError(f"{path}:{number}: {fault}"), skipped)
            continue
        form = form or (found, number)
        lines_of_ids[pair.id] = number
        yield pair


def write_pairs(path: str | Path, pairs: Iterable[PreferencePair]) -> int:
    """Write pairs as JSON lines that this module and TRL read; returns how many.

    Image paths become relative to the file.
    """
    folder = os.path.realpath(Path(path).parent)
    return write_json_lines(path, (_row(pair, folder) for pair in pairs))


def can_be_written(pairs: Iterable[PreferencePair]) -> bool:
    """Whether all pictures of the pairs lie in files, so that lines can name them."""
    return all(isinstance(pair.image, str | os.PathLike | None) for pair in pairs)


def read_candidates(path: str | Path) -> dict[str, list[str]]:
    """The classes that stand for election in each case, from JSON lines {"id": …, "candidates": [names]}."""
    found: dict[str, list[str]] = {}
    for number, row in read_json_lines(path):
        name, names = row.get("id"), row.get("candidates")
        good = isinstance(names, list) and names and all(isinstance(one, str) for one in names)
        if not isinstance(name, str | int) or not isinstance(names, list) or not good:
            raise RecordError(f'{path}:{number}: wanted {{"id": …, "candidates": [names]}}; mend the line')
        if str(name) in found:
            raise RecordError(f"{path}:{number}: the id {str(name)!r} was there before; give each case one line")
        found[str(name)] = names
    return found


def _row(pair: PreferencePair, folder: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": pair.id, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if pair.image is None:
        return row
    if not can_be_written([pair]):
        kind = type(pair.image).__name__
        raise RecordError(f"pair {pair.id!r}: its image is an open {kind}; save it to a file and give the path")
    return row | {"image": os.path.relpath(os.path.abspath(os.fspath(pair.image)), folder)}


def _form(row: Mapping[str, Any]) -> str:
    """Which of the four forms a line has, in words."""
    if row.get("tools"):
        raise RecordError("tools: a prompt that offers tools is not implemented; take 'tools' out of the line")
    missing = next((key for key in ("chosen", "rejected") if row.get(key) is None), None)
    if missing is not None:
        raise RecordError(f"no {missing!r} (found: {', '.join(sorted(row)[:8]) or 'nothing'}); both answers are wanted")
    kinds = {key: _kind(key, row[key]) for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    if kinds["chosen"] != kinds["rejected"]:
        raise RecordError(f"chosen is {kinds['chosen']} and rejected {kinds['rejected']}; both must be of one form")
    prompt = kinds.get("prompt")
    if prompt == "message lists" and kinds["chosen"] == "plain strings":
        raise RecordError("prompt is a message list and chosen a plain string; both must be of one form")
    # TRL leaves a string beside conversations aside: there the prompt is what the conversations share.
    return kinds["chosen"] if prompt == kinds["chosen"] else f"{kinds['chosen']} without a prompt of their own"


def _kind(key: str, value: Any) -> str:
    if isinstance(value, str):
        return "plain strings"
    if isinstance(value, list):
        return "message lists"
    raise RecordError(f"{key} is a JSON {type(value).__name__}; a message list or a string is wanted")


def _pair(row: Mapping[str, Any], number: int, path: Path, homes: Sequence[str]) -> PreferencePair:
    name = f"line-{number}" if row.get("id") is None else row["id"]
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise RecordError(f"id {str(name)[:80]!r}: a name (or a whole number) is wanted")
    prompt, chosen, rejected = _strings(row) if isinstance(row["chosen"], str) else _conversations(row)
    image = picture_of(row, path, homes)
    if not isinstance(prompt, str):
        prompt = _with_place(prompt, image)
    return PreferencePair(str(name), prompt, chosen, rejected, image, where=f"{path}:{number}")


def _strings(row: Mapping[str, Any]) -> tuple[str, str, str]:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    _refuse_useless(chosen, rejected, empty=(not chosen.strip(), not rejected.strip()))
    if prompt is not None:
        return prompt, chosen, rejected
    shared = _shared(chosen, rejected)
    if shared and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1  # the space before the answer belongs to the answer
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _conversations(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    chosen, rejected = _messages("chosen", row["chosen"]), _messages("rejected", row["rejected"])
    if isinstance(row.get("prompt"), list):
        prompt = _messages("prompt", row["prompt"])
        if chosen[: len(prompt)] == prompt or rejected[: len(prompt)] == prompt:
            raise RecordError(
                "the answers begin with the prompt again; take it out of them, or leave the key 'prompt' out"
            )
    else:
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt and chosen != rejected:
            raise RecordError("no prompt, and chosen and rejected share no first message; give one or the other")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            wrong = next(m["role"] for m in (answer[0], answer[-1]) if m["role"] != "assistant")
            raise RecordError(f"{key} has a turn of the {wrong} where one of the assistant is wanted, first and last")
        if any(map(_places, answer)):
            raise RecordError(f"{key} holds an image; an answer is text")
    _refuse_useless(chosen, rejected, empty=(_is_empty(chosen), _is_empty(rejected)))
    return prompt, chosen, rejected


def _shared(chosen: _Answer, rejected: _Answer) -> int:
    """How much of their beginning two answers share, but always leaving something of each (as TRL does)."""
    same = sum(1 for _ in takewhile(lambda sides: sides[0] == sides[1], zip(chosen, rejected, strict=False)))
    return min(same, len(chosen) - 1, len(rejected) - 1)


def _refuse_useless(chosen: str | list[Message], rejected: str | list[Message], empty: tuple[bool, bool]) -> None:
    if any(empty):
        raise RecordError(f"{'chosen' if empty[0] else 'rejected'} is empty; an answer needs words")
    if chosen == rejected:
        raise RecordError("chosen and rejected are the same; a preference needs two answers")


def _messages(key: str, value: list[Any]) -> list[Message]:
    """Message lists with only what is read: the role and the content."""
    if not value:
        raise RecordError(f"{key} is empty; at least one message is wanted")
    return [_message(f"{key}, message {index}", message) for index, message in enumerate(value)]


def _message(where: str, message: Any) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        found = repr(role) if isinstance(message, dict) else f"a JSON {type(message).__name__}"
        raise RecordError(f"{where}: the role is {found[:80]}; one of {', '.join(_ROLES)} is wanted")
    if message.get("tool_calls"):
        raise RecordError(f"{where}: tool_calls are not implemented; write what the turn says as its content")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise RecordError(f"{where}: the content is a JSON {type(content).__name__}; text or a list of parts is wanted")
    return {"role": role, "content": [_part(where, part) for part in content]}


def _part(where: str, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise RecordError(f'{where}: a part that is neither {{"type": "text", "text": words}} nor {{"type": "image"}}')


def _is_empty(answer: list[Message]) -> bool:
    return not any(_text(message).strip() for message in answer if message["role"] == "assistant")


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _with_place(prompt: list[Message], image: str | None) -> list[Message]:
    """The prompt with a place for its image: its own, else before the first words of the user (as TRL does)."""
    places = sum(map(_places, prompt))
    if places > 1 or (places and image is None):
        raise RecordError(
            f"the prompt has {places} places for images, the pair {int(image is not None)}; each needs one"
        )
    user = next((index for index, message in enumerate(prompt) if message["role"] == "user"), None)
    if image is None or places:
        return prompt
    if user is None:
        raise RecordError("an image, but no turn of the user to show it in")
    content = prompt[user]["content"]
    words = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown: Message = {"role": "user", "content": [{"type": "image"}, *words]}
    return [*prompt[:user], shown, *prompt[user + 1 :]]


def _places(message: Message) -> int:
    """How many images a message has a place for."""
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
