"""Preference pairs -> token trees -> the batches of every step; and the audit that says what was cut and what was shared.

A step is `batch_size` pairs, drawn in a seeded order. Its pairs go through the network in batches of at most
`tokens_per_batch` tokens; all texts of a batch form one tree, so prompts that begin alike are computed once, across pairs.
What follows a picture depends on it, so pairs share a tree only if they have the same picture, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..chat import ChatTokenizer
from ..config import AlignSettings
from ..errors import RecordError
from ..trees import Text, forest, token_tree, without_label
from ..types import PreferencePair, TokenTree

PROMPT, CHOSEN, REJECTED, PATHS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair as ids: whole texts, and where the answers begin in them."""

    id: str
    chosen: list[int]
    rejected: list[int]
    chosen_first: int
    rejected_first: int
    cut_prompt: int = 0
    cut_answers: int = 0
    image: Any = None
    image_token: int = -1  # the id that stands for the image in the prompt

    def texts(self) -> tuple[Text, Text, Text]:
        """What is scored: the prompt, the chosen answer and the rejected one, in the order PROMPT, CHOSEN, REJECTED."""
        prompt = Text(self.chosen[: self.chosen_first])
        return prompt, Text(self.chosen, self.chosen_first), Text(self.rejected, self.rejected_first)

    @property
    def size(self) -> int:
        """Tokens that the tree of this pair alone would have, at most."""
        return len(self.chosen) + len(self.rejected) - self.rejected_first


def tokenise(pair: PreferencePair, tokenizer: ChatTokenizer) -> TokenPair:
    """A pair as ids: by the chat template if it is a conversation, as plain text in TRL's way if it is made of strings."""
    if isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str):
        prompt = tokenizer.plain_ids(pair.prompt)
        chosen, rejected = (
            [*tokenizer.plain_ids(pair.prompt + answer), tokenizer.end_id()] for answer in (pair.chosen, pair.rejected)
        )
        return TokenPair(pair.id, chosen, rejected, _boundary(prompt, chosen), _boundary(prompt, rejected))
    if isinstance(pair.prompt, str) or isinstance(pair.chosen, str) or isinstance(pair.rejected, str):
        raise RecordError(f"pair {pair.id!r}: texts and message lists are mixed; give all three in one form")
    prompt = tokenizer.chat_ids(pair.prompt, generate=True)
    chosen, rejected = (prompt + tokenizer.answer_ids(answer) for answer in (pair.chosen, pair.rejected))
    return TokenPair(pair.id, chosen, rejected, len(prompt), len(prompt))


def _with_image(made: TokenPair, pair: PreferencePair, tokenizer: ChatTokenizer) -> TokenPair:
    """The ids with the picture that their image token stands for; one without the other is refused."""
    if pair.image is None and not tokenizer.vision:
        return made
    token = tokenizer.image_id() if tokenizer.vision else -1
    places = made.chosen.count(token)
    if places == made.rejected.count(token) == int(pair.image is not None):
        return made if pair.image is None else replace(made, image=pair.image, image_token=token)
    if made.cut_prompt:
        raise RecordError(f"pair {pair.id!r}: its image is cut off with the prompt; raise --max-length or shorten it")
    raise RecordError(
        f"pair {pair.id!r}: {places} places for images in what the model reads, the pair has {int(pair.image is not None)}; "
        f"give message lists with a part {{'type': 'image'}}, an 'image', and a vision model"
    )


def _boundary(prompt: list[int], text: list[int]) -> int:
    """Where the answer begins. The last prompt token may have merged with the answer's first: then it is the answer's."""
    return len(prompt) if text[: len(prompt)] == prompt else max(len(prompt) - 1, 1)


def cut(pair: TokenPair, max_length: int, max_prompt_length: int | None) -> TokenPair:
    """A pair of at most `max_length` tokens a text: the prompt loses its left part (begin-of-text stays), then the
    answers lose their right. The end of the prompt, which opens the answer, is never cut."""
    answers = max(len(pair.chosen) - pair.chosen_first, len(pair.rejected) - pair.rejected_first)
    longest = max(pair.chosen_first, pair.rejected_first)
    if longest + answers <= max_length and longest <= (max_prompt_length or max_length):
        return pair
    keep = min(longest, max_prompt_length or max(max_length - answers, max_length // 2))
    chosen, chosen_first = _cut_one(pair.chosen, pair.chosen_first, keep, max_length)
    rejected, rejected_first = _cut_one(pair.rejected, pair.rejected_first, keep, max_length)
    lost = [len(pair.chosen) - pair.chosen_first - len(chosen) + chosen_first,
            len(pair.rejected) - pair.rejected_first - len(rejected) + rejected_first]  # fmt: skip
    if chosen == rejected or len(chosen) <= chosen_first or len(rejected) <= rejected_first:
        raise RecordError(
            f"pair {pair.id!r}: of {len(pair.chosen):,} and {len(pair.rejected):,} tokens nothing that tells the answers "
            f"apart is left within --max-length {max_length}; raise it or leave the pair out with --skip-bad"
        )
    return TokenPair(pair.id, chosen, rejected, chosen_first, rejected_first, longest - keep, max(lost))


def _cut_one(ids: list[int], first: int, keep: int, max_length: int) -> tuple[list[int], int]:
    keep = min(keep, first)
    prompt = ids[:first] if keep == first else [ids[0], *ids[first - keep + 1 : first]]
    return [*prompt, *ids[first:]][:max_length], keep


def token_pairs(
    pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer, settings: AlignSettings, skipped: list[str] | None = None
) -> list[TokenPair]:
    """All pairs as ids within the limits. One of which nothing useful is left is refused, or named in `skipped`."""
    made = []
    for pair in pairs:
        try:
            ids = cut(tokenise(pair, tokenizer), settings.max_length, settings.max_prompt_length)
            made.append(_with_image(ids, pair, tokenizer))
        except RecordError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return made


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through the network together: pair i has the paths 3i + PROMPT, + CHOSEN, + REJECTED of the tree."""

    pairs: tuple[TokenPair, ...]
    tree: TokenTree
    apart: int  # tokens that the same texts have one by one


def batch(pairs: Sequence[TokenPair], *, with_prompt: bool = True, with_rejected: bool = True) -> Batch:
    """The tree of some pairs. A part that the objective does not look at stays in its place as an empty path."""
    trees = []
    for _, same in groupby(pairs, key=_beginning):
        members = list(same)
        texts = []
        for pair in members:
            prompt, chosen, rejected = pair.texts()
            texts.append(prompt if with_prompt else Text([]))
            texts.append(chosen)
            texts.append(rejected if with_rejected else Text([]))
        image = members[0].image
        tree = token_tree(texts, () if image is None else (image,))
        trees.append(tree if image is None else without_label(tree, members[0].image_token))
    apart = sum(len(pair.chosen) + (len(pair.rejected) if with_rejected else 0) for pair in pairs)
    return Batch(tuple(pairs), trees[0] if len(trees) == 1 else forest(trees), apart)


def _beginning(pair: TokenPair) -> Any:
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
        size = pair.size + (picture if pair.image is not None else 0)
        if group and tokens + size > tokens_per_batch:
            yield group
            group, tokens = [], 0
        group.append(pair)
        tokens += size
    if group:
        yield group


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
    """Steps of the whole run: epochs over the pairs, or `steps` if that ends it earlier."""
    steps = max(round(settings.epochs * steps_per_epoch(count, settings.batch_size)), 1)
    return min(steps, settings.steps) if settings.steps is not None else steps
