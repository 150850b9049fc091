"""How the shipped tissue teacher was made: a small CLIP that learns which caption belongs to which tile, from nothing.

A caption is a sentence that names the tissue, the description of the tile, or both, as captions of published pictures
are. Each is compared with each tile of the batch; a sentence alone fits every tile of its tissue. Used as a teacher it
sees the tile alone and compares it with a few sentences about each tissue (`encoders.zeroshot`). In training alone the
image tower also tells the facts that a tile is drawn from, so that it learns to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders.clip import ClipConfig, ClipModel
from ..encoders.zeroshot import TEMPLATES, spoken
from ..files import replacing, write_json
from ..images.rules import CLIP_MEAN, CLIP_STD
from ..progress import Progress
from ..schedules import scheduled
from ..tokens import CLIP_END, CLIP_START, Texts, learn_clip_tokenizer, write_clip_tokenizer
from ..types import Record
from ..weights import hub
from ..weights.tensorfiles import write_tensors
from .tissue_facts import tissues
from .tissue_pool import NUMBERS, SIDE, TilePool

LONGEST = 77
CONFIG: dict[str, Any] = {
    "projection_dim": 64,
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LONGEST,
        "vocab_size": 1024,
    },
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    },
}
STEPS, BATCH, RATE, WARMUP, TILES = 450, 64, 1.5e-3, 40, 2000
_SEED = 7_100_001  # tiles of this seed are drawn for no other purpose
_SHARPEST = 100.0  # times the cosine


def make_tissue_teacher(out: Path, steps: int = STEPS, seed: int = 0, tiles: int = TILES) -> None:
    """Train for `steps` steps and write the folder that `load_encoder` opens."""
    pool = TilePool(tiles, _SEED + seed)
    sentences = [sentence(name, number) for name in tissues() for number in range(len(TEMPLATES))]
    tokenizer = learn_clip_tokenizer(
        [*sentences * 8, *(record.note for record in pool.records)], CONFIG["text_config"]["vocab_size"]
    )
    texts = Texts(tokenizer, LONGEST, CLIP_END)
    config = ClipConfig.read(_config(texts))
    network = ClipModel(config)
    initialise(network, seed)
    _train(network, texts, pool, steps)
    network.requires_grad_(False)
    write_clip_tokenizer(tokenizer, out, LONGEST)
    write_json(out / "preprocessor_config.json", _pixels())
    with replacing(out / hub.SINGLE) as file:
        write_tensors(file, {name: value.bfloat16() for name, value in network.state_dict().items()})
    write_json(out / "config.json", _config(texts))


def _config(texts: Texts) -> dict[str, Any]:
    """config.json: the default values of CLIP are written out, so that the file says all."""
    ends = {"bos_token_id": texts.tokenizer.token_to_id(CLIP_START), "eos_token_id": texts.pad_id}
    text = CONFIG["text_config"] | ends | {"vocab_size": len(texts), "pad_token_id": texts.pad_id}
    whole = asdict(ClipConfig.read(CONFIG | {"text_config": text}))
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": whole["projection_dim"],
        "text_config": text | whole["text"],
        "vision_config": whole["vision"],
        "torch_dtype": "bfloat16",
    }


def _pixels() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


@torch.no_grad()
def initialise(network: nn.Module, seed: int, width: float = 0.06) -> None:
    """Weights drawn from `seed`: normal, but norms one, biases zero, places narrow, and gates half open."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if "gate" in name.rpartition(".")[2]:
            weight.fill_(0.5)
        elif name.endswith("bias"):
            weight.zero_()
        elif "norm" in name or "layrnorm" in name:
            weight.fill_(1.0)
        elif weight.ndim == 0:
            continue  # the scale of the cosine, as CLIP begins with it
        else:
            narrow = 0.02 if "position" in name or "tile_embedding" in name else width
            weight.copy_(torch.randn(weight.shape, generator=generator) * narrow)


def sentence(tissue: str, number: int) -> str:
    """One of the sentences that name a tissue."""
    return TEMPLATES[number].replace("{}", spoken(tissue))


def caption(record: Record, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption of the tile, and whether it would fit any tile of the tissue."""
    kind, named = rng.random(), sentence(str(record.label), int(rng.integers(len(TEMPLATES))))
    if kind < 0.5:
        return named, True
    return (f"{named} {record.note}", False) if kind < 0.75 else (record.note, False)


def _train(network: ClipModel, texts: Texts, pool: TilePool, steps: int) -> None:
    """Captions and tiles find each other in a batch; the pooled state of a tile also tells its facts."""
    torch.manual_seed(0)
    telling = nn.Linear(network.config.vision.hidden_size, len(NUMBERS))
    optimizer = torch.optim.AdamW([*network.parameters(), *telling.parameters()], lr=RATE, weight_decay=0.05)
    with Progress("tissue teacher", steps, "step") as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * scheduled(step, steps, "cosine", WARMUP)
            optimizer.zero_grad(set_to_none=True)
            rows = pool.draw(BATCH)
            pooled = network.vision_model(pool.seen(rows))
            matched = _contrast(network, texts, pool, rows, pooled)
            told = F.mse_loss(telling(pooled), pool.facts[rows])
            (matched + told).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            bar.advance(1, f"captions {matched:.3f}  facts {told:.3f}")


def _contrast(network: ClipModel, texts: Texts, pool: TilePool, rows: Tensor, pooled: Tensor) -> Tensor:
    """Mean cross-entropy of captions given tiles and of tiles given captions."""
    records = [pool.records[row] for row in rows.tolist()]
    said = [caption(record, pool.random) for record in records]
    written = network.text_features(texts([words for words, _ in said])[0])
    pictured = F.normalize(network.visual_projection(pooled), dim=-1)
    scores = network.logit_scale.exp().clamp(max=_SHARPEST) * pictured @ written.T
    fits = fitting(records, [general for _, general in said])
    by_row, by_column = fits / fits.sum(1, keepdim=True), fits / fits.sum(0, keepdim=True)
    return (F.cross_entropy(scores, by_row) + F.cross_entropy(scores.T, by_column.T)) / 2


def fitting(records: Sequence[Record], general: Sequence[bool]) -> Tensor:
    """Which caption (column) fits which tile (row), (B, B): its own, and a general one every tile of its tissue."""
    labels = np.array([record.label for record in records])
    same = torch.from_numpy(labels[:, None] == labels[None, :]) & torch.tensor(list(general))[None, :]
    return (same | torch.eye(len(records), dtype=torch.bool)).float()
