"""A tiny base decoder for a file of cases: `python -m mint.experiment.reader CASES --out DIR`.

It is to be for these cases what a real base model is: it knows their words and the form of an answer, and what findings
go together, but no diagnosis. A phrase of the notes is one token, and so is the name of a class. It learns from the
notes of the training part alone, their findings in ever new order:

    a note is read aloud
    a part of a patient's findings is told; asked for others of this patient, it lists the rest
    a note is told; asked for diseases, it lists names drawn at random

Its layers average the vectors of what stands before a token, which say what findings go together; some heads look only
at the list that an answer has begun, so that no name and no number comes twice. Reading teaches the last product alone. So what
goes with which disease is left to alignment, and equally to every objective.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..answers import answer_text, heading, line_start
from ..builtin.portraits import told
from ..builtin.student import CONFIG, DATE, LISTED, MEANING, frame, new_network, train, write_student
from ..chat import ChatTokenizer
from ..decoders.llama import Llama
from ..encoders.encoder import in_batches
from ..prompts import default_template, prompt_messages
from ..records.hpo import marked_terms
from ..records.notes import composed
from ..tokens import CHAT_SPECIAL, learn_chat_tokenizer
from ..types import Message, Record
from .tasks import file_cases

SIZES = {"hidden_size": 480, "num_attention_heads": 15, "num_key_value_heads": 15, "intermediate_size": 32}
"""Where its network differs from the shipped student's: wider, since a file has more findings than the simulation."""
OWN, LISTING = slice(256, 320), slice(320, 480)
"""The numbers of a vector before OWN say what a finding goes with; OWN are the token's own; LISTING say which name or which
number of a list it is, and later in an answer which of them are on its list."""
EVER, IS_LISTED = -2, -1
"""Two numbers of LISTING: what all tokens have alike, and what names and numbers of a list alone have."""
HEAD_WIDTH = CONFIG["head_dim"]
APART = {"tie_word_embeddings": False}
"""The head has a table of its own: it learns, and what a token says when it is read stays as it is."""
STEPS, BATCH = 400, 32
FAINT = 0.3
"""How small a token's own numbers are where it has a meaning."""
SILENT = 0.1
"""How small all but the meaning is in what is copied from token to token: most tokens of a prompt are no findings."""
LOOK, TWICE = 0.8, 12.0
"""How sharply the heads of LISTING look at a list, yet at all of it alike, and how unlikely what they find becomes."""
MERGES = 256
"""Tokens for what is no phrase, such as ages, beside the 256 bytes."""
TITLE = "FINDINGS:"
LISTS = (heading("disease"), TITLE)
ASKED = (
    f"{{note}}\n\nWhich other findings fit best? Name {{k}}, the most likely first, as a numbered list under {TITLE}"
)

Conversation = tuple[list[Message], str]


@dataclass(frozen=True)
class Read:
    """A note as it is read: what stands before its findings, and the findings."""

    record: Record
    findings: tuple[str, ...]

    def note(self, findings: Sequence[str]) -> Record:
        """The case with a note of some of its findings, in this order."""
        return replace(self.record, note=composed(self.record, findings))


def make_reader(out: Path, notes: Sequence[Read], names: Sequence[str], steps: int = STEPS, seed: int = 0) -> None:
    """Learn the tokenizer, read the notes for `steps` batches, and write the folder."""
    torch.manual_seed(seed)
    texts = [read.record.note for read in notes] + [*["system", "user", "assistant", "Diagnosis:"] * 50]
    known = phrases(notes, names)
    tokenizer = learn_chat_tokenizer(texts, len(CHAT_SPECIAL) + 256 + MERGES + len(known), known)
    chat = ChatTokenizer(tokenizer, (), CHAT_SPECIAL[4], date=DATE)
    config = CONFIG | SIZES | APART | {"vocab_size": tokenizer.get_vocab_size()}
    config |= {"bos_token_id": chat.special(CHAT_SPECIAL[0]), "eos_token_id": chat.special(CHAT_SPECIAL[4])}
    network = new_network(config, seed)
    named, numbered, headed = (
        [at for word in words if (at := tokenizer.token_to_id(word)) is not None]
        for words in (names, [line_start(place).lstrip("\n") for place in range(1, 2 * LISTED + 1)], LISTS)
    )
    _only_average(network)
    _give_meaning(network, tokenizer, notes)
    _teach_the_head_alone(network, named)
    _list_each_once(network, named, numbered, headed)
    _look_at_the_list(network)
    train(network, chat, in_batches(conversations(notes, names, steps * BATCH, seed), BATCH), steps)
    write_student(out, network, tokenizer, config)


def phrases(notes: Sequence[Read], names: Sequence[str]) -> list[str]:
    """What is one token: a finding as it stands in a note and on a list, the name of a class, the words around them."""
    findings = {form for read in notes for finding in read.findings for form in _forms(finding)}
    around = frame(default_template("note", "disease"), heading("disease")) + frame(ASKED, TITLE)
    return sorted(text for text in {*findings, *names, *around} if text.isascii() and text.strip())


def _forms(finding: str) -> tuple[str, str]:
    return f" {finding}", finding


def conversations(notes: Sequence[Read], names: Sequence[str], count: int, seed: int) -> Iterator[Conversation]:
    """By turns a patient's other findings, and names drawn at random; a case without findings gets names alone."""
    rng = random.Random(f"reader {seed}")
    for number in range(count):
        read = rng.choice(notes)
        findings = rng.sample(read.findings, len(read.findings))
        if number % 2 and len(findings) > 1:
            cut = rng.randint(1, len(findings) - 1)
            yield _other_findings(read.note(findings[:cut]), findings[cut:][:LISTED])
        else:
            record = read.note(findings) if findings else read.record
            listed = rng.sample(list(names), rng.randint(1, min(LISTED, len(names))))
            yield prompt_messages(record, k=len(listed)), answer_text(listed, "disease")


def _other_findings(record: Record, others: Sequence[str]) -> Conversation:
    answer = TITLE + "".join(line_start(place) + finding for place, finding in enumerate(others, start=1))
    return prompt_messages(record, k=len(others), template=ASKED), answer


@torch.no_grad()
def _only_average(network: Llama) -> None:
    """Each layer adds the mean of what stands before a token, and nothing else: so an answer that begins after a note knows
    all of its findings alike. Whatever else a layer might add would drown the few tokens that are findings."""
    blocks: Any = network.model.layers
    for block in blocks:
        for copying in (block.self_attn.v_proj, block.self_attn.o_proj):
            copying.weight.copy_(torch.eye(len(copying.weight)))
        for silent in (block.self_attn.q_proj, block.mlp.down_proj):
            silent.weight.zero_()
        block.input_layernorm.weight[OWN.start :] = SILENT


def _teach_the_head_alone(network: Llama, names: list[int]) -> None:
    """The head begins without a word on findings. Names are drawn at random, so which of them goes with what is never
    learnt, not even by chance."""

    def apart(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[names, : OWN.start] = 0
        return kept

    network.requires_grad_(False)
    head = network.lm_head.weight
    head[:, : OWN.start] = 0
    head.requires_grad_(True).register_hook(apart)


@torch.no_grad()
def _list_each_once(network: Llama, names: list[int], numbers: list[int], headings: list[int]) -> None:
    """The last product takes the names and numbers that a list has so far from what may come next; a number makes the one
    after it likely, a heading its kind of list. Their vectors stand at right angles as far as there is room."""
    listed, room = [*numbers, *names, *headings], LISTING.stop - LISTING.start + EVER
    codes = torch.nn.init.orthogonal_(torch.empty(len(listed), room))
    codes /= codes.norm(dim=1, keepdim=True)
    vectors, head = network.model.embed_tokens.weight, network.lm_head.weight
    vectors[:, LISTING], vectors[:, EVER] = 0, FAINT
    vectors[listed, LISTING.start : EVER], vectors[listed, IS_LISTED] = codes, 1
    head[:, LISTING] = 0
    head[listed, LISTING.start : EVER] = -TWICE * codes
    head[numbers, LISTING] *= 2
    head[headings, LISTING] = 0
    head[names, LISTING.start : EVER] += TWICE * (codes[-2] - codes[-1])  # on a list of diseases, not of findings
    head[numbers[1:], LISTING.start : EVER] += TWICE / 2 * codes[: len(numbers) - 1]


@torch.no_grad()
def _look_at_the_list(network: Llama) -> None:
    """The heads of LISTING average over what is on a list, where there is any. The first layer alone copies it: if each did,
    what came first would weigh most. They look by the number of a head that turns least with distance."""
    slow = range(LISTING.start + HEAD_WIDTH - 1, LISTING.stop, HEAD_WIDTH)
    blocks: Any = network.model.layers
    for number, block in enumerate(blocks):
        attention = block.self_attn
        block.input_layernorm.weight[EVER:] = 1
        attention.v_proj.weight[EVER:] = 0
        if number:
            attention.v_proj.weight[LISTING] = 0
        attention.k_proj.weight[LISTING] = 0
        attention.q_proj.weight[slow, EVER] = attention.k_proj.weight[slow, IS_LISTED] = LOOK


@torch.no_grad()
def _give_meaning(network: Llama, tokenizer: Any, notes: Sequence[Read]) -> None:
    """The vector of a finding says which others stand in notes with it; that of any other token says nothing there.
    OWN are the token's own. Both forms of a finding have the same."""
    row = {finding: at for at, finding in enumerate(dict.fromkeys(f for read in notes for f in read.findings))}
    vectors = network.model.embed_tokens.weight
    vectors[:, : OWN.start] = 0
    vectors[:, OWN] *= 2
    meant = _together([[row[finding] for finding in read.findings] for read in notes], len(row), OWN.start)
    for finding, at in row.items():
        ids = [known for form in _forms(finding) if (known := tokenizer.token_to_id(form)) is not None]
        for known in ids:
            vectors[known] = vectors[ids[0]] * FAINT
            vectors[known, : meant.shape[1]] = meant[at]


def _together(notes: Sequence[Sequence[int]], count: int, width: int) -> Tensor:
    """Vectors (F, W) of F findings whose products are nearest to log p(f, g) / p(f) p(g), where that is above 0."""
    there = torch.zeros(len(notes), count)
    for number, findings in enumerate(notes):
        there[number, list(findings)] = 1
    often = there.sum(0)
    more = (there.T @ there * len(notes) / (often[:, None] * often)).clamp(min=1).log()
    words, strengths, _ = torch.linalg.svd(more, full_matrices=False)
    found: Tensor = words[:, :width] * strengths[:width].sqrt()
    return found * (MEANING / found.std().clamp(min=1e-6))


def notes_of(records: Sequence[Record], findings: Callable[[Record], Sequence[str]]) -> list[Read]:
    """The notes of some cases without their diagnoses. One that was written, not composed of findings, is read as it is."""
    bare = [replace(record, label=None, labels=(), image=None) for record in records]
    found = [Read(one, tuple(findings(record))) for one, record in zip(bare, records, strict=True)]
    return [read if read.note(read.findings).note == read.record.note else replace(read, findings=()) for read in found]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mint.experiment.reader", description=__doc__.split("\n")[0])
    parser.add_argument("cases", help="the file that `experiment` takes")
    parser.add_argument("--out", type=Path, required=True, help="the new folder, for `experiment --model`")
    parser.add_argument("--draw-faces", action="store_true", help="as in `experiment`, and so are the next three")
    parser.add_argument("--photo-terms")
    parser.add_argument("--labels")
    parser.add_argument("--min-cases", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums are then in one order whatever the machine's number of cores
    terms = marked_terms(options.photo_terms, "is_photo") if options.photo_terms else frozenset()
    names, learnt, _ = file_cases(options.cases, options.labels, options.min_cases, options.draw_faces, terms)
    notes = notes_of(learnt, lambda record: told(record, terms))
    make_reader(options.out, notes, names, options.steps, options.seed)


if __name__ == "__main__":
    main()
