"""Conversations to ids and back, in the words of the Llama 3 chat templates.

A template is a few special tokens around texts. The special tokens are put in as ids and the texts are encoded by
themselves, so what a user writes can never become a special token.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError
from .files import read_json
from .tokens import open_tokenizer
from .types import Message

_TOGETHER = 4096
_ROLES = ("system", "user", "assistant")
_FIXED_DATE = "26 Jul 2024"  # Llama 3.1's template has this date where those of 3.2 have today's


def today() -> str:
    """Today as the templates write it, with English months whatever the locale: '05 Mar 2026'."""
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    now = datetime.date.today()
    return f"{now.day:02} {months[now.month - 1]} {now.year}"


@dataclass(frozen=True)
class ChatTokenizer:
    """A Llama 3 tokenizer with its chat template: 3.1 and 3.2 text, or 3.2 Vision when `vision`."""

    tokenizer: Any  # tokenizers.Tokenizer
    stop_ids: tuple[int, ...]
    end_of_text: str
    vision: bool = False
    date: str = field(default_factory=today)
    where: str = "tokenizer.json"

    def __post_init__(self) -> None:
        # Special tokens written in a text are encoded as the characters they are written with.
        self.tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with nothing added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of each text in turn; of a million, only a few thousand are at work at a time."""
        rest = iter(texts)
        while part := list(islice(rest, _TOGETHER)):
            for encoding in self.tokenizer.encode_batch_fast(part, add_special_tokens=False):
                yield encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def special(self, name: str) -> int:
        """The id of a special token."""
        found: int | None = self.tokenizer.token_to_id(name)
        if found is None:
            raise CheckpointError(f"{self.where}: no token {name}; the chat template of Llama 3 needs it")
        return found

    def chat_ids(self, messages: Sequence[Message], generate: bool = False) -> list[int]:
        """A conversation as ids, once begin-of-text; with `generate` it ends in an open assistant turn."""
        turns = [(_role(message), _parts(message)) for message in messages]
        system = ""
        if turns and turns[0][0] == "system":
            system = _only_text(turns.pop(0)[1]).strip()
        ids = [self.special("<|begin_of_text|>")]
        if any(part is None for _, parts in turns for part in parts):
            self._check_images(system)
        else:
            dates = f"Cutting Knowledge Date: December 2023\nToday Date: {self.date}\n\n"
            ids += self._turn("system", [dates + system])
        for role, parts in turns:
            ids += self._turn(role, parts if self.vision else [_only_text(parts).strip()])
        return ids + (self._header("assistant") + self.encode("\n\n") if generate else [])

    def answer_ids(self, messages: Sequence[Message]) -> list[int]:
        """What follows an open assistant turn: the answer's text and the end of its turn."""
        texts = [_only_text(_parts(message)) for message in messages]
        if len(texts) != 1 or _role(messages[0]) != "assistant":
            roles = ", ".join(_role(message) for message in messages) or "nothing"
            raise ConfigError(f"an answer is one assistant message; found {roles}")
        return [*self.encode(texts[0] if self.vision else texts[0].strip()), self.special("<|eot_id|>")]

    def plain_ids(self, text: str) -> list[int]:
        """A text without a conversation: begin-of-text and the text as it is."""
        return [self.special("<|begin_of_text|>"), *self.encode(text)]

    def end_id(self) -> int:
        """The token that ends a text without a conversation."""
        return self.special(self.end_of_text)

    def image_id(self) -> int:
        """The token that stands for an image."""
        return self.special("<|image|>")

    def _header(self, role: str) -> list[int]:
        return [self.special("<|start_header_id|>"), *self.encode(role), self.special("<|end_header_id|>")]

    def _turn(self, role: str, parts: Sequence[str | None]) -> list[int]:
        """Header, contents, end of turn; a text is encoded together with the line breaks before it, as in the template."""
        ids, text = self._header(role), "\n\n"
        for part in parts:
            if part is None:
                ids, text = [*ids, *self.encode(text), self.image_id()], ""
            else:
                text += part
        return [*ids, *self.encode(text), self.special("<|eot_id|>")]

    def _check_images(self, system: str) -> None:
        if not self.vision:
            raise ConfigError(
                f"{self.where}: an image for a model that reads text alone; give a vision model or a note"
            )
        if system:
            raise ConfigError("a system message beside an image: Llama 3.2 Vision takes no system message with images")


def _role(message: Message) -> str:
    if not isinstance(message, dict):
        raise ConfigError(f"a message is {message!r}; wanted {{'role': …, 'content': …}}")
    role = message.get("role")
    if role not in _ROLES:
        raise ConfigError(f"a message has role {role!r}; wanted one of {', '.join(_ROLES)}")
    return str(role)


def _parts(message: Message) -> list[str | None]:
    """The content of a message: texts, and None for each image."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise ConfigError(f"a message has content {content!r}; wanted a text or a list of parts")
    return [_part(part) for part in content]


def _part(part: Any) -> str | None:
    if isinstance(part, dict) and part.get("type") == "image":
        return None
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ConfigError(f"a message has the part {part!r}; wanted {{'type': 'image'}} or {{'type': 'text', 'text': …}}")


def _only_text(parts: Sequence[str | None]) -> str:
    if any(part is None for part in parts):
        raise ConfigError("an image in a system or assistant message, or for a model that reads text alone")
    return "".join(part for part in parts if part is not None)


def chat_tokenizer(folder: str | Path, config: dict[str, Any], *, date: str | None = None) -> ChatTokenizer:
    """The chat tokenizer of a Llama checkpoint folder; `config` is its config.json."""
    folder = Path(folder)
    tokenizer, settings = open_tokenizer(folder), _optional(folder / "tokenizer_config.json")
    named = settings.get("eos_token", "<|eot_id|>")
    end = named.get("content", "<|eot_id|>") if isinstance(named, dict) else named
    return ChatTokenizer(
        tokenizer=tokenizer,
        stop_ids=_stop_ids(folder, config, tokenizer),
        end_of_text=str(end) if tokenizer.token_to_id(str(end)) is not None else "<|eot_id|>",
        vision=config.get("model_type") == "mllama",
        date=date or _template_date(folder, settings),
        where=str(folder / "tokenizer.json"),
    )


def _optional(path: Path) -> dict[str, Any]:
    value = read_json(path, CheckpointError) if path.is_file() else {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}; wanted an object")
    return value


def _template_date(folder: Path, settings: dict[str, Any]) -> str:
    """The date the folder's own template would write: today, unless it has a fixed one and no clock, as Llama 3.1's has."""
    path = folder / "chat_template.jinja"
    text = path.read_text(errors="replace") if path.is_file() else str(settings.get("chat_template", ""))
    return _FIXED_DATE if _FIXED_DATE in text and "strftime_now" not in text else today()


def _stop_ids(folder: Path, config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a generation: those of generation_config.json, else those of config.json, and the end of a turn."""
    settings = _optional(folder / "generation_config.json")
    text = config.get("text_config")
    inner = text.get("eos_token_id") if isinstance(text, dict) else None
    found: Any = next(
        (x for x in (settings.get("eos_token_id"), config.get("eos_token_id"), inner) if x is not None), []
    )
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(x, int) for x in ids):
        raise CheckpointError(f"{folder}: eos_token_id is {found!r}; wanted a number or a list of numbers")
    turn = tokenizer.token_to_id("<|eot_id|>")
    return tuple(sorted({*ids, *([] if turn is None else [turn])}))
