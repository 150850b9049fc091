"""How the shipped teacher was made: a small ViLT that sees the simulated photo and the note of patients.

Notes are new in every step and photos come from a pool, each moved and mirrored at random: given the disease, photo and
note are all but independent, so any photo of a disease goes with any note of it. What is learnt is the exact posterior of
the simulation, of which a label is one draw: it says the same with less noise. In training alone the network also says
which findings the photo shows, so that it learns to look. Words begin as what they tell of the diseases (counts in
notes), without which so small a run would not find out where to read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoders import FusionEncoder
from ..encoders.encoder import in_batches
from ..encoders.teachers import new_encoder, write_teacher
from ..images.pixels import vilt_pixels
from ..progress import Progress, progress
from ..schedules import scheduled
from ..types import Record
from .face_terms import photo_findings
from .meaning import associations
from .rare_disease import classes, draw_cases, population, recall

SIDE = 64
"""Pixels of a side of the photos that the shipped teacher was made on."""

NETWORK = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "image_size": SIDE,
    "patch_size": 16,
    "vocab_size": 1600,
    "max_position_embeddings": 112,
    "initializer_range": 0.09,
}
STEPS, BATCH, RATE, WARMUP, PHOTOS, TOLD = 8000, 32, 1e-3, 60, 6000, 10000
_SEED = 7_000_001  # patients of this seed are drawn for no other purpose


def make_teacher(out: Path, steps: int = STEPS, seed: int = 0, photos: int = PHOTOS) -> None:
    """Train for `steps` steps and write the folder that `load_encoder` opens."""
    torch.manual_seed(seed)
    looks = tuple(photo_findings())
    told = list(draw_cases(TOLD, _SEED + seed, "train"))
    encoder = new_encoder((record.note for record in told), (*classes(), *looks), NETWORK, torch.device("cpu"), seed)
    _give_meaning(encoder, told)
    _train(encoder, Pool(encoder, looks, photos, _SEED + 1 + seed), steps, seed)
    last: Any = encoder.network.classifier[3]  # the rows of the diseases stay, those of the looks have done their work
    last.weight = torch.nn.Parameter(last.weight.detach()[: len(classes())].clone())
    last.bias = torch.nn.Parameter(last.bias.detach()[: len(classes())].clone())
    encoder.classes = classes()
    write_teacher(encoder, out)


@torch.no_grad()
def _give_meaning(encoder: FusionEncoder, told: list[Record]) -> None:
    """Half of each word's vector: its association with the diseases, log p(word, disease) / p(word) p(disease)."""
    embeddings = encoder.network.vilt.embeddings.text_embeddings
    words = embeddings.word_embeddings.weight
    counts = torch.full((len(words), len(classes())), 0.5)  # half a note of each, so that rare words say little
    rows = {name: row for row, name in enumerate(classes())}
    for record in told:
        ids = encoder.texts([record.note])[0].unique()
        counts[ids, rows[str(record.label)]] += 1
    left, strength, _ = associations(counts)
    half = min(words.shape[1] // 2, len(strength))
    found = left[:, :half] * strength[:half]
    words[:, :half] = found / found.std() * 0.2
    embeddings.position_embeddings.weight.mul_(0.2)


class Pool:
    """Photos, drawn once: pixels (N, 3, S, S), what each shows, and the rows of each disease."""

    def __init__(self, encoder: FusionEncoder, looks: tuple[str, ...], count: int, seed: int) -> None:
        patients = list(draw_cases(count, seed, "train", SIDE))
        drawn = [vilt_pixels([p.image], encoder.settings)[0] for p in progress(patients, "photos", count, "photo")]
        self.pixels = torch.cat(drawn)
        self.shown = [frozenset(p.image.terms) for p in patients]
        self.looks = torch.tensor([[float(look in terms) for look in looks] for terms in self.shown])
        self.rows = {name: [row for row, p in enumerate(patients) if p.label == name] for name in classes()}
        self.random = np.random.default_rng(seed)

    def draw(self, records: list[Record]) -> list[int]:
        """The row of a photo of each record's disease."""
        rows = [self.rows[str(record.label)] for record in records]
        return [own[int(self.random.integers(len(own)))] for own in rows]

    def moved(self, row: int) -> Tensor:
        """A photo moved by up to two pixels, and mirrored in half of the cases."""
        mirrored, down, right = self.random.integers(0, (2, 5, 5))
        wide = F.pad(self.pixels[row][None], (2, 2, 2, 2), mode="replicate")[0]
        part = wide[:, down : down + SIDE, right : right + SIDE]
        return part.flip(2) if mirrored else part


def _train(encoder: FusionEncoder, pool: Pool, steps: int, seed: int) -> None:
    network = encoder.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02)
    patients = draw_cases(steps * BATCH, _SEED + 2 + seed, "train")
    mask = torch.ones(BATCH, SIDE, SIDE, dtype=torch.int64)
    with Progress("teacher", steps, "step") as bar:
        for step, batch in enumerate(in_batches(patients, BATCH)):
            for group in optimizer.param_groups:
                group["lr"] = RATE * scheduled(step, steps, "cosine", WARMUP)
            optimizer.zero_grad(set_to_none=True)
            photos = pool.draw(batch)
            notes = ["*" if row % 4 == 0 else record.note for row, record in enumerate(batch)]
            pixels = torch.stack([pool.moved(row) for row in photos])
            logits = network(*encoder.texts(notes), pixels, mask)
            truth = _posteriors(batch, [pool.shown[row] for row in photos])
            disease = F.cross_entropy(logits[:, : len(classes())], truth)
            look = F.binary_cross_entropy_with_logits(logits[:, len(classes()) :], pool.looks[photos])
            (disease + look * pool.looks.shape[1] / 10).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            bar.advance(1, f"disease {disease:.3f}  looks {look * pool.looks.shape[1] / 10:.3f}")
    network.eval()


def _posteriors(records: list[Record], shown: list[frozenset[str]]) -> Tensor:
    """p(disease | photo and note), (B, C); every fourth without its note, as the network is shown them."""
    found = []
    for row, (record, terms) in enumerate(zip(records, shown, strict=True)):
        findings = replace(recall(record.id).findings, shown=terms)
        found.append(population().log_posterior(findings, note=row % 4 != 0, image=True))
    return torch.from_numpy(np.exp(np.array(found))).float()
