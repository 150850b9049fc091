"""Preference pairs -> ids within the limits -> token trees -> the batches of every step.

A step is `batch_size` pairs, drawn in a seeded order. Its pairs go through the network in batches of at most
`tokens_per_batch` tokens; all texts of a batch form one tree, so prompts that begin alike are computed once, across pairs.
What follows a picture depends on it, so pairs share a tree only if they have the same picture, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..answers import first_part
from ..chat import ChatTokenizer
from ..config import AlignSettings
from ..errors import MintError, RecordError
from ..images import open_image
from ..jsonlines import refuse
from ..trees import Text, forest, shared, token_tree, without_label
from ..types import Message, PreferencePair, TokenTree

IMAGE_WORD = "<|image|>"
PROMPT, CHOSEN, REJECTED, FIRST, PATHS = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair as ids: whole texts, where the answers begin in them, and how many tokens before that open the answer."""

    id: str
    chosen: list[int]
    rejected: list[int]
    chosen_first: int
    rejected_first: int
    opening: int = 1
    cut_prompt: int = 0
    cut_answers: int = 0
    image: Any = None
    image_token: int = -1  # the id that stands for the image in the prompt
    first_end: int = 0  # just past the first name of the chosen answer; 0: past the whole answer

    def texts(self) -> tuple[Text, Text, Text, Text]:
        """What is scored, in the order PROMPT, CHOSEN, REJECTED, FIRST; the last is the chosen answer up to its first name."""
        prompt, first = Text(self.chosen[: self.chosen_first]), Text(self.chosen[: self.first_stop], self.chosen_first)
        return prompt, Text(self.chosen, self.chosen_first), Text(self.rejected, self.rejected_first), first

    @property
    def first_stop(self) -> int:
        return min(self.first_end or len(self.chosen), len(self.chosen))

    @property
    def size(self) -> int:
        """Tokens that the tree of this pair alone would have, at most."""
        return len(self.chosen) + len(self.rejected) - self.rejected_first


def tokenise(pair: PreferencePair, tokenizer: ChatTokenizer) -> TokenPair:
    """A pair as ids: by the chat template if it is a conversation, as plain text in TRL's way if it is made of strings."""
    if isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str):
        made = _plain(pair.id, pair.prompt, pair.chosen, pair.rejected, tokenizer)
    elif isinstance(pair.prompt, str) or isinstance(pair.chosen, str) or isinstance(pair.rejected, str):
        raise RecordError("texts and message lists are mixed; give all three in one form")
    else:
        prompt = tokenizer.chat_ids(pair.prompt, generate=True)
        opening = prompt[::-1].index(tokenizer.special("<|start_header_id|>")) + 1
        chosen, rejected = (prompt + tokenizer.answer_ids(answer) for answer in (pair.chosen, pair.rejected))
        head = prompt + tokenizer.answer_ids(_first_name(pair.chosen))
        made = TokenPair(
            pair.id, chosen, rejected, len(prompt), len(prompt), opening, first_end=_boundary(head, chosen)
        )
    if made.chosen == made.rejected:
        raise RecordError("chosen and rejected are the same tokens; a preference needs two answers")
    return made


def _plain(name: str, prompt: str, chosen: str, rejected: str, tokenizer: ChatTokenizer) -> TokenPair:
    """Begin-of-text, prompt and answer as one text, end of turn."""
    start, end = tokenizer.plain_ids(prompt), tokenizer.end_id()
    one, other, head = (
        [*tokenizer.plain_ids(prompt + answer), end] for answer in (chosen, rejected, first_part(chosen))
    )
    return TokenPair(name, one, other, _boundary(start, one), _boundary(start, other), first_end=_boundary(head, one))


def _first_name(messages: Sequence[Message]) -> list[Message]:
    """The answer as it is, but its last message ends with the first name that it lists."""
    last = messages[-1]
    if not isinstance(last["content"], str):
        return list(messages)
    return [*messages[:-1], {**last, "content": first_part(last["content"])}]


def _with_image(made: TokenPair, pair: PreferencePair, tokenizer: ChatTokenizer) -> TokenPair:
    """The ids with the picture that their image token stands for; one without the other is refused."""
    if pair.image is None and not tokenizer.vision:
        return made
    if tokenizer.vision and IMAGE_WORD in f"{pair.prompt} {pair.chosen} {pair.rejected}":
        raise RecordError(f"a text holds {IMAGE_WORD}, which is no image there; take it out, or give an image part")
    token = tokenizer.image_id() if tokenizer.vision else -1
    places = made.chosen.count(token)
    if places == made.rejected.count(token) == int(pair.image is not None):
        if pair.image is None:
            return made
        open_image(pair.image)  # a damaged one is to be known before the first step
        return replace(made, image=pair.image, image_token=token)
    if made.cut_prompt:
        raise RecordError(
            "its image is cut off with the start of the prompt; raise --max-length, or shorten the prompt"
        )
    raise RecordError(
        f"{places} places for images in what the model reads, the pair has {int(pair.image is not None)}; "
        f"give message lists with a part {{'type': 'image'}}, an 'image', and a vision model"
    )


def _boundary(prompt: list[int], text: list[int]) -> int:
    """Where the answer begins: with the first token that the prompt alone has not. A token in which the end of the
    prompt and the start of the answer have merged is the answer's."""
    return max(shared(prompt, text), 1)


def cut(pair: TokenPair, max_length: int, max_prompt_length: int | None) -> TokenPair:
    """A pair of at most `max_length` tokens a text: the prompt loses its left part (begin-of-text stays), then the
    answers lose their right. The end of the prompt, which opens the answer, is never cut."""
    answers = max(len(pair.chosen) - pair.chosen_first, len(pair.rejected) - pair.rejected_first)
    longest, shortest = max(pair.chosen_first, pair.rejected_first), min(pair.chosen_first, pair.rejected_first)
    if longest + answers <= max_length and longest <= (max_prompt_length or max_length):
        return pair
    keep = min(longest, max_prompt_length or max(max_length - answers, max_length // 2, 1 + pair.opening))
    drop = min(longest - keep, shortest - 1)
    chosen, rejected = ([ids[0], *ids[1 + drop :]][:max_length] for ids in (pair.chosen, pair.rejected))
    first = pair.chosen_first - drop, pair.rejected_first - drop
    if (
        drop > max(shortest - 1 - pair.opening, 0)
        or chosen == rejected
        or len(chosen) <= first[0]
        or len(rejected) <= first[1]
    ):
        limits = f"--max-length {max_length}" + (f", --max-prompt-length {max_prompt_length}" * bool(max_prompt_length))
        raise RecordError(
            f"{longest:,} tokens of prompt and {answers:,} of an answer: nothing that tells the answers apart is left "
            f"within {limits}; raise it, or leave the pair out with --skip-bad"
        )
    lost = max(len(pair.chosen) - len(chosen), len(pair.rejected) - len(rejected)) - drop
    return TokenPair(
        pair.id, chosen, rejected, *first, pair.opening, drop, lost, first_end=max(pair.first_end - drop, 0)
    )


def token_pairs(
    pairs: Iterable[PreferencePair], tokenizer: ChatTokenizer, settings: AlignSettings, skipped: list[str] | None = None
) -> list[TokenPair]:
    """All pairs as ids within the limits. One of which nothing useful is left is refused, or named in `skipped`."""
    made: dict[str, TokenPair] = {}
    for pair in pairs:
        try:
            if pair.id in made:
                raise RecordError("another pair has this id; give each its own")
            ids = cut(tokenise(pair, tokenizer), settings.max_length, settings.max_prompt_length)
            made[pair.id] = _with_image(ids, pair, tokenizer)
        except MintError as error:
            refuse(RecordError(f"{pair.where}: ".lstrip(": ") + f"pair {pair.id!r}: {error}"), skipped)
    return list(made.values())


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through the network together: pair i has the paths 4i + PROMPT, + CHOSEN, + REJECTED, + FIRST of the tree."""

    pairs: tuple[TokenPair, ...]
    tree: TokenTree
    apart: int  # tokens that the same texts have one by one


def batch(
    pairs: Sequence[TokenPair], *, with_prompt: bool = True, with_rejected: bool = True, with_first: bool = False
) -> Batch:
    """The tree of some pairs. A part that the objective does not look at stays in its place as an empty path."""
    trees = []
    for _, same in groupby(pairs, key=beginning):
        members = list(same)
        texts = []
        for pair in members:
            wanted = (with_prompt, True, with_rejected, with_first)
            texts += [text if asked else Text([]) for text, asked in zip(pair.texts(), wanted, strict=True)]
        image = members[0].image
        tree = token_tree(texts, () if image is None else (image,))
        trees.append(tree if image is None else without_label(tree, members[0].image_token))
    apart = sum(len(pair.chosen) + (len(pair.rejected) if with_rejected else 0) for pair in pairs)
    return Batch(tuple(pairs), trees[0] if len(trees) == 1 else forest(trees), apart)


def beginning(pair: TokenPair) -> Any:
    """What pairs of one tree have in common: no image, or the same one after the same tokens."""
    if pair.image is None:
        return None
    source = str(pair.image) if isinstance(pair.image, str | Path) else id(pair.image)
    return source, tuple(pair.chosen[: pair.chosen.index(pair.image_token) + 1])


def split(pairs: Sequence[TokenPair], tokens_per_batch: int, picture: int = 0) -> Iterator[list[TokenPair]]:
    """The pairs of a step in groups of at most so many tokens, longest first; a longer pair goes alone.

    A picture counts as so many tokens as the tower makes of it.
    """
    group: list[TokenPair] = []
    tokens = 0
    for pair in sorted(pairs, key=lambda p: -p.size):
        size = _size(pair, picture)
        if group and tokens + size > tokens_per_batch:
            yield group
            group, tokens = [], 0
        group.append(pair)
        tokens += size
    if group:
        yield group


def dealt(pairs: Sequence[TokenPair], ranks: int, picture: int = 0) -> list[list[TokenPair]]:
    """The pairs of a step for each rank, longest first, each to the rank with the fewest tokens so far; some get none."""
    if ranks == 1:
        return [list(pairs)]
    hands: list[list[TokenPair]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for pair in sorted(pairs, key=lambda p: -_size(p, picture)):
        least = tokens.index(min(tokens))
        hands[least].append(pair)
        tokens[least] += _size(pair, picture)
    return hands


def _size(pair: TokenPair, picture: int) -> int:
    """Tokens of a pair, its picture counted as so many as the tower makes of it."""
    return pair.size + (picture if pair.image is not None else 0)


def order(count: int, epoch: int, seed: int) -> list[int]:
    """The order of an epoch: a permutation that (seed, epoch) alone decides."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def step_pairs(pairs: Sequence[TokenPair], step: int, settings: AlignSettings) -> list[TokenPair]:
    """The pairs of a step, counted from 0 over all epochs; the last step of an epoch may hold fewer."""
    epoch, within = divmod(step, steps_per_epoch(len(pairs), settings.batch_size))
    chosen = order(len(pairs), epoch, settings.seed)[within * settings.batch_size : (within + 1) * settings.batch_size]
    return [pairs[at] for at in chosen]


def steps_per_epoch(count: int, batch_size: int) -> int:
    return -(-count // batch_size)


def total_steps(count: int, settings: AlignSettings) -> int:
    """Steps of the whole run: `steps` if they are given, else the epochs over the pairs."""
    return settings.steps or max(round(settings.epochs * steps_per_epoch(count, settings.batch_size)), 1)
