"""Cases put to a decoder and answered: the prompt with its passages, made to fit the context, and one of three modes.

"rank": exact probabilities of a closed set. "list": the aligned list, k names of the set. "text": free text.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from . import parallel
from .answers import parse_answer
from .decoders import Decoder
from .encoders.encoder import in_batches
from .errors import ConfigError, RecordError
from .images import nothing_to_see, open_image
from .jsonlines import refuse
from .labels import LabelSet
from .listing import Lister
from .progress import say
from .prompts import prompt_messages
from .retrieval import Passage, Retriever
from .scoring import Case, Ranker
from .training.batches import IMAGE_WORD
from .types import Message, Prediction, Record

MODES = ("rank", "list", "text")
LISTED = 10
"""Names that a prompt asks for, unless told otherwise."""
TEXTS = 16
"""Cases whose texts are written side by side."""
UNLIKELY = 1e-3
"""Below this share of all possible answers, a model was hardly made for such labels."""
NOTHING_KNOWN = "Nothing is known of this case."
"""The note of the empty case, after which the prior of a label is taken; its image is plain grey."""


@dataclass(frozen=True)
class Put:
    """One case as the decoder is asked it."""

    id: str
    messages: list[Message]
    passages: tuple[Passage, ...]
    images: tuple[Any, ...]  # that the messages show, in their order


@dataclass(frozen=True)
class Questioner:
    """A decoder and how it is asked; made once, called for case after case, by several threads if need be."""

    decoder: Decoder
    known: LabelSet | None = None
    mode: str = "rank"
    modality: str = "note"
    kind: str = "disease"
    template: str | None = None
    top: int | None = 10
    normalise: str = "sum"
    opening: str = ""
    alone: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    retriever: Retriever | None = None
    passages: int = 3
    looked_at: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_mode(self.mode, self.known, self.temperature)
        if self.retriever is not None and self.passages < 1:
            raise ConfigError(f"--passages {self.passages}: wanted at least 1")

    def answers(self, records: Iterable[Record], skipped: list[str] | None = None) -> Iterator[Prediction]:
        """The answer to each case, as it comes; with `skipped` a list, cases that cannot be asked are named there."""
        cases = self._put_all(records, skipped)
        if self.mode == "text":
            for group in in_batches(cases, TEXTS):
                yield from self._texts(group)
            return
        if self.mode == "list":
            yield from (replace(self._list(case), passages=_shown(case.passages)) for case in cases)
            return
        shown: deque[tuple[str, ...]] = deque()

        def asked() -> Iterator[Case]:
            for case in cases:
                shown.append(_shown(case.passages))
                yield case.id, case.messages, case.images

        for answer in self.ranker.rank_all(asked(), self.top):
            self._say_if_unlikely(answer)
            yield replace(answer, passages=shown.popleft())

    def _say_if_unlikely(self, answer: Prediction) -> None:
        """A remark, once, where the labels are no answers that the model would give: their order is then worth little."""
        if self.looked_at or self.opening or self.normalise != "sum":
            return
        self.looked_at.append(answer.id)
        together = answer.ranking[0]["logprob"] - math.log(answer.ranking[0]["probability"])
        if together < math.log(UNLIKELY):
            say(f"case {answer.id!r}: of all that the model could answer, the labels together have a probability of "
                f"{math.exp(together):.0e}, so their order tells little; a model that was aligned on lists is asked with "
                "--first-in-list, or --mode list")  # fmt: skip

    @cached_property
    def ranker(self) -> Ranker:
        seen = self.modality != "note"
        empty = Record("empty", note=NOTHING_KNOWN, image=nothing_to_see() if seen else None)
        asked = ("empty", self._messages(empty, ()), (empty.image,) if seen else ())
        prior = asked if self.normalise == "prior" else None
        return Ranker(self.decoder, self._names(), self.normalise, self.opening, prior, self.alone)

    @property
    def asked(self) -> int:
        """How many names the prompt asks for. In rank mode `top` is only how many are shown, and changes no probability."""
        return LISTED if self.mode == "rank" else self.top or LISTED

    def _names(self) -> tuple[str, ...]:
        return () if self.known is None else self.known.labels

    def _list(self, case: Put) -> Prediction:
        assert self.known is not None  # the mode needs the closed set
        return Lister(self.decoder, self.known, self.kind).write(case.id, case.messages, self.asked, case.images)

    def _texts(self, cases: Sequence[Put]) -> Iterator[Prediction]:
        """Free text for some cases, written side by side."""
        prompts = [self.decoder.tokenizer.chat_ids(case.messages, generate=True) for case in cases]
        answers = self.decoder.generate(
            prompts, self.max_new_tokens, self.temperature, seed=self.seed, images=[case.images for case in cases]
        )
        for case, ids in zip(cases, answers, strict=True):
            text = self.decoder.tokenizer.decode(ids)
            yield Prediction(case.id, self.named(text), text, _shown(case.passages))

    def named(self, text: str) -> tuple[dict[str, Any], ...]:
        """The names of a free text, each once; with a closed set alone can they be told, and told from what is outside."""
        if self.known is None:
            return ()
        found = {entry.label or entry.text: entry.label for entry in parse_answer(text, self.known)}
        return tuple({"label": name} if label else {"label": name, "outside": True} for name, label in found.items())

    def _put_all(self, records: Iterable[Record], skipped: list[str] | None) -> Iterator[Put]:
        for record in records:
            try:
                case = self.put(record)
            except RecordError as fault:
                refuse(fault, skipped)
                continue
            yield case

    def put(self, record: Record) -> Put:
        """The conversation for a case, with passages if there is a retriever, and no longer than the context."""
        if self.decoder.eyes is not None and IMAGE_WORD in record.note:
            raise RecordError(f"case {record.id!r}: the note holds {IMAGE_WORD}, which is no image there; take it out")
        images = () if self.modality == "note" else (_opened(record),)
        passages: tuple[Passage, ...] = ()
        if self.retriever is not None and record.note.strip():
            passages = tuple(self.retriever.top(record.note, self.passages))
        messages, room = self._messages(record, passages), self.room
        while passages and self._tokens(messages) > room:
            say(f"case {record.id!r}: the context has no room for the passage {passages[-1].name}; it was left out")
            passages = passages[:-1]
            messages = self._messages(record, passages)
        if self._tokens(messages) > room:
            messages = self._cut(record, room)
        return Put(record.id, messages, passages, images)

    def _messages(self, record: Record, passages: Sequence[Passage]) -> list[Message]:
        return prompt_messages(
            record,
            self.modality,
            kind=self.kind,
            k=self.asked,
            template=self.template,
            labels=self._names(),
            passages=[passage.text for passage in passages],
        )

    def _tokens(self, messages: Sequence[Message]) -> int:
        return len(self.decoder.tokenizer.chat_ids(messages, generate=True))

    def _cut(self, record: Record, room: int) -> list[Message]:
        """The conversation with as much of the note, from its start, as the context has room for."""
        tokenizer = self.decoder.tokenizer
        ids = tokenizer.encode(record.note.strip())
        keep = len(ids) - (self._tokens(self._messages(record, ())) - room)
        while keep > 0:
            note = tokenizer.decode(ids[:keep]).rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
            messages = self._messages(replace(record, note=note or "-"), ())
            if (over := self._tokens(messages) - room) <= 0:
                lost = record.note.strip()[len(note) :].split()
                words = f"{len(lost):,} words from {' '.join(lost[:6])!r} on"
                say(f"case {record.id!r}: the note is longer than the context; its last {len(ids) - keep:,} of "
                    f"{len(ids):,} tokens were cut ({words})")  # fmt: skip
                return messages
            keep -= over
        raise ConfigError(
            f"case {record.id!r}: the context of {self.context:,} tokens has no room for the prompt without its note; "
            f"shorten the template or the list of labels in it"
        )

    @cached_property
    def context(self) -> int:
        """Tokens that the decoder can read."""
        config = self.decoder.checkpoint.config
        inner = config.get("text_config")
        return int({**config, **(inner if isinstance(inner, dict) else {})}.get("max_position_embeddings", 2048))

    @cached_property
    def room(self) -> int:
        """Tokens left to the prompt when the longest answer is taken off."""
        if self.mode == "text":
            return self.context - self.max_new_tokens
        if self.mode == "rank":
            return self.context - len(self.ranker.layout.opening) - int(self.ranker.layout.lengths.max())
        lengths = sorted(map(len, self.decoder.tokenizer.encode_all(self._names())), reverse=True)
        return self.context - sum(length + 6 for length in lengths[: self.asked]) - 16


def check_mode(mode: str, known: LabelSet | None, temperature: float) -> None:
    """Refuse what a mode cannot do; it costs nothing, so it can be asked before a decoder is loaded."""
    if mode not in MODES:
        raise ConfigError(f"--mode {mode}: wanted one of {', '.join(MODES)}")
    if mode != "text" and known is None:
        raise ConfigError(
            f"--labels: {mode} mode needs the closed set; give a file with one label a line, or --mode text"
        )
    if mode != "text" and temperature:
        raise ConfigError(f"--temperature {temperature}: {mode} mode draws nothing; leave it out, or give --mode text")


def _opened(record: Record) -> Any:
    if record.image is None:
        raise RecordError(f"case {record.id!r}: has no image; give it one, or leave the case out")
    try:
        return open_image(record.image)
    except RecordError as fault:
        raise RecordError(f"case {record.id!r}: {fault}") from fault


def _shown(passages: Sequence[Passage]) -> tuple[str, ...]:
    """Passages as a prediction names them."""
    return tuple(f"{passage.name}: {passage.text}" for passage in passages)


def answers_of_all(
    questioner: Questioner, records: Iterable[Record], skipped: list[str] | None
) -> Iterator[Prediction]:
    """The answer to each case; several ranks share the work, and each has it all."""
    if parallel.size() == 1:
        yield from questioner.answers(records, skipped)
        return

    def answered(turn: list[Record], left_out: list[str] | None) -> list[dict[str, Any]]:
        made = [asdict(answer) for answer in questioner.answers(turn, left_out)]
        parallel.in_turn().finish()
        return made

    for row in parallel.shared_out(records, answered, skipped):
        yield Prediction(row["id"], tuple(row["ranking"]), row["text"], tuple(row["passages"]))
