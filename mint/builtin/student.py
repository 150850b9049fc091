"""How the shipped base decoder was made: a tiny Llama trained from nothing on made-up conversations about patients.

It is to be what a real base model is for a rare disease: it knows the language, the names and the form of an answer, but
not all of the medicine, and it thinks first of the diseases that are much written about. So the conversations are written
by somebody who knows, of each disease, only a share of its findings, and to whom some diseases are far more familiar than
others (both drawn once). This writer reads the note alone and lists diseases in a somewhat random order of what follows.
No patient occurs twice, and none of them occurs in any task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..answers import answer_text, heading, line_start
from ..chat import ChatTokenizer
from ..decoders.llama import Llama, LlamaConfig
from ..encoders.encoder import in_batches
from ..files import write_json
from ..kernels import tree_attention, tree_layout
from ..progress import Progress
from ..prompts import default_template, prompt_messages
from ..schedules import scheduled
from ..tokens import CHAT_SPECIAL, learn_chat_tokenizer, write_chat_tokenizer
from ..trees import Text, token_tree
from ..types import Message, Record
from ..weights.shards import write_checkpoint
from .face_terms import photo_findings
from .meaning import associations
from .notes import unpunctuated
from .population import Findings, Floats, Population
from .rare_disease import Patient, classes, draw_patients, population, recall
from .syndromes import diseases, labels, wordings

KNOWN = 0.75
"""Share of a disease's findings that the writer of the conversations knows."""
FAME = 3.0
"""How differently familiar the diseases are to the writer: the standard deviation of what is added to the log posterior."""
SWAY = 1.5
"""How random the order of a list is: the scale of the Gumbel noise on the log posterior."""
LISTED = 10
ROUNDS = ((1, 64, 400), (LISTED, 32, 10_000))
"""Names that are asked for at most, conversations of a step, steps: first who it is, then lists of them."""
MEANING = 0.1
"""Standard deviation of what a token's vector says of the diseases at the start."""
RATE, WARMUP, SAMPLE, TOLD, NOTES = 2e-3, 40, 6000, 20_000, 4
_SEED = 8_000_001  # patients of this seed are drawn for no other purpose
DATE = "26 Jul 2024"
FRAME = f"\n\nCutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 3072,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{{- bos_token }}{%- set told = '' %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set told = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n"
    f"Today Date: {DATE}\\n\\n' + told + '<|eot_id|>' }}}}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""Llama 3's chat template with a fixed date, so that the same note is the same prompt on every day."""


def make_student(out: Path, rounds: Sequence[tuple[int, int, int]] = ROUNDS, seed: int = 0, told: int = TOLD) -> None:
    """Learn the tokenizer, train for rounds of new conversations, and write the folder."""
    torch.manual_seed(seed)
    texts = [
        text for messages, answer in conversations(SAMPLE, _SEED + seed) for text in (messages[0]["content"], answer)
    ]
    tokenizer = learn_chat_tokenizer([*texts, *["system", "user", "assistant"] * 50], CONFIG["vocab_size"], phrases())
    chat = ChatTokenizer(tokenizer, (), CHAT_SPECIAL[4], date=DATE)
    config = CONFIG | {"bos_token_id": chat.special(CHAT_SPECIAL[0]), "eos_token_id": chat.special(CHAT_SPECIAL[4])}
    network = new_network(config, seed)
    _give_meaning(network, tokenizer, told, seed)
    for number, (listed, size, steps) in enumerate(rounds):
        train(network, chat, in_batches(conversations(steps * size, _SEED + 1 + seed + number, listed), size), steps)
    write_student(out, network, tokenizer, config)


def write_student(out: Path, network: Llama, tokenizer: Any, config: dict[str, Any]) -> None:
    """The folder of a checkpoint: weights, settings, tokenizer with its chat template."""
    tied = config["tie_word_embeddings"]
    tensors = {n: p.detach() for n, p in network.state_dict().items() if not (tied and n == "lm_head.weight")}
    write_checkpoint(out, tensors.items(), config)
    write_chat_tokenizer(tokenizer, out, TEMPLATE)
    write_json(out / "generation_config.json", {"eos_token_id": [config["eos_token_id"]]})


def phrases() -> list[str]:
    """What is one token for the student: a finding in any of its wordings, a disease, and the words around them.

    A network of this size cannot spare its few layers for putting words together.
    """
    worded = {way for ways in wordings().values() for way in ways} | {unpunctuated(name) for name in labels().values()}
    findings = {form for way in worded for form in _spellings(way)}
    around = frame(default_template("note", "disease"), heading("disease"))
    return sorted(text for text in {*findings, *classes(), *around} if text.isascii())


def frame(template: str, title: str) -> list[str]:
    """The words around a note and between the names of a list."""
    asked = template.split("{note}")[1].split("{k}")
    lines = [line_start(place).lstrip("\n") for place in range(1, 2 * LISTED + 1)]  # a name ends with its line
    return [FRAME.strip(), *(part.strip() for part in asked), title, *lines]


def conversations(count: int, seed: int, listed: int = LISTED) -> Iterator[tuple[list[Message], str]]:
    """Prompt and answer of new patients, who are asked for one to `listed` names."""
    for patient in draw_patients(count, seed, "train"):
        k = 1 + patient.seed % listed
        yield prompt_messages(patient.record(), "note", k=k), answer_text(partly_known(patient)[:k], "disease")


def partly_known(patient: Patient) -> list[str]:
    """The list of one who has read the note and knows a share of the findings of each disease."""
    score = belief(patient)
    score = score + SWAY * np.random.default_rng([patient.seed, 9]).gumbel(size=len(score))
    return [classes()[row] for row in np.argsort(-score, kind="stable")[:LISTED]]


def belief(patient: Patient) -> Floats:
    """What the writer thinks of each disease after the note: (C,). The noise of a list changes no disease's rank on average."""
    known, found = known_table(), patient.findings
    stated, denied = (frozenset(t for t in terms if t in known.column) for terms in (found.stated, found.denied))
    seen = Findings(found.shown, found.mentioned, stated, denied)
    return known.log_posterior(seen, note=True, image=False) + FAME * fame()


def reading_learnt_whole(cases: Iterable[Record], ks: Sequence[int] = (1, 10)) -> dict[int, float]:
    """k -> top-k accuracy of a decoder of any size that has learnt all that the conversations say: it ranks as the writer
    believes, since names are listed first in proportion to exp(belief / SWAY)."""
    patients = [recall(case.id) for case in cases]
    beliefs = [(belief(patient), patient.disease) for patient in patients]
    places = np.array([(score > score[true]).sum() for score, true in beliefs])
    return {k: float((places < k).mean()) for k in ks}


@cache
def known_table(seed: int = 0) -> Population:
    """The table with a share of each disease's findings; the others happen in it by chance alone."""
    rng = np.random.default_rng([_SEED, seed])
    known = []
    for disease in diseases():
        kept = rng.random(len(disease.findings)) < KNOWN
        findings = {term: share for (term, share), keep in zip(disease.findings.items(), kept, strict=True) if keep}
        known.append(replace(disease, findings=findings))
    clashes = frozenset(frozenset((term, other)) for term, look in photo_findings().items() for other in look.against)
    return Population(known, tuple(photo_findings()), clashes, population().rates)


@cache
def fame(seed: int = 0) -> Floats:
    """How familiar each disease is to the writer, in standard deviations. It says nothing of the diseases themselves."""
    return np.random.default_rng([_SEED, seed, 1]).standard_normal(len(classes()))


def new_network(config: dict[str, Any], seed: int) -> Llama:
    """Weights drawn from `seed`: normal of one width, but norms one, and the maps back to the stream narrower."""
    network = Llama(LlamaConfig.read(config))
    generator = torch.Generator().manual_seed(seed)
    narrow = (2 * config["num_hidden_layers"]) ** -0.5
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                scale = narrow if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * config["initializer_range"] * scale)
    return network


@torch.no_grad()
def _give_meaning(network: Llama, tokenizer: Any, told: int, seed: int) -> None:
    """What the words mean, put into the tokens' vectors; all wordings of a finding mean the same.

    One half says how a word goes with the diseases that the writer names for a note that has it. The names have the
    diseases' own vectors, so that a note's mean vector already points to them; without this a network reads ten times as
    many conversations before it finds out where to look. The other half of a finding is a random vector of its own.
    """
    vectors, rows = network.model.embed_tokens.weight, {name: row for row, name in enumerate(classes())}
    counts = torch.full((len(vectors), len(rows)), 0.5)  # half a note of each, so that rare tokens say little
    for patient in draw_patients(told, _SEED + 77 + seed, "train"):
        ids = torch.tensor(tokenizer.encode(patient.record().note, add_special_tokens=False).ids).unique()
        for place, name in enumerate(partly_known(patient)[:3]):
            counts[ids, rows[name]] += 0.6**place
    alike = [torch.tensor(ids) for ids in _wordings_of_each(tokenizer)]
    for ids in alike:
        counts[ids] = counts[ids].sum(0)
    words, strengths, names = associations(counts)
    half = min(vectors.shape[1] // 2, len(strengths))
    for at, found in ((slice(None), words), ([tokenizer.token_to_id(name) for name in rows], names)):
        own = found[:, :half] * strengths[:half].sqrt()
        vectors[at, :half] = own / own.std() * MEANING
    for ids in alike:
        vectors[ids, half:] = vectors[ids[0], half:]


def _wordings_of_each(tokenizer: Any) -> list[list[int]]:
    """The tokens of each finding: its label and its wordings, within a sentence and at its start."""
    named = labels()
    groups = ({unpunctuated(named[term]), *ways} for term, ways in wordings().items())
    written = ([form for way in sorted(group) for form in _spellings(way)] for group in groups)
    found = [[tokenizer.token_to_id(form) for form in forms] for forms in written]
    return [known for ids in found if (known := [each for each in ids if each is not None])]


def _spellings(way: str) -> tuple[str, str]:
    return f" {way}", f" {way[0].upper()}{way[1:]}"


def train(network: Llama, chat: ChatTokenizer, batches: Iterable[list[Any]], steps: int) -> None:
    """Every token of the answers is predicted, and of some prompts."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02, betas=(0.9, 0.98))
    with Progress("student", steps, "step") as bar:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = RATE * scheduled(step, steps, "cosine", WARMUP)
            optimizer.zero_grad(set_to_none=True)
            note, answer = _losses(network, chat, batch)
            (0.3 * note + answer).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            bar.advance(1, f"notes {note:.3f}  answers {answer:.3f}")


def _losses(
    network: Llama, chat: ChatTokenizer, batch: list[tuple[list[Message], str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of the tokens of a part of the prompts, and of the answers'.

    The vocabulary is most of the work, so one prompt in NOTES is read aloud. What all prompts share counts once.
    """
    prompts = [chat.chat_ids(messages, generate=True) for messages, _ in batch]
    answers = [chat.answer_ids([{"role": "assistant", "content": answer}]) for _, answer in batch]
    both = [Text([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    read = [Text(prompt) for prompt in prompts[::NOTES]]
    tree = token_tree([*read, *both])
    layout = tree_layout(tree.end)
    hidden = network(tree.ids, tree.position, lambda _, q, k, v: tree_attention(q, k, v, layout))
    logits = network.lm_head(hidden[tree.sources])
    each = F.cross_entropy(logits.float(), tree.labels, reduction="none")
    of_answer = torch.zeros(len(tree.labels), dtype=torch.bool)
    of_answer[tree.member_edges[tree.member_paths >= len(read)]] = True
    return each[~of_answer].mean(), each[of_answer].mean()
