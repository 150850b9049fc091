"""A random Llama 3.2 Vision without files: its steps of training on image pairs, and the operations that they need.

Shapes: T tokens of a pair, E scored ones, S patches of a picture's tiles, L tokens of the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints_mllama import picture
from mint.kernels.checks import DEVICE, DTYPE
from models import Words

from mint.bench import our_trainer
from mint.decoders import Decoder, lora
from mint.decoders.eyes import Eyes
from mint.decoders.mllama import Mllama
from mint.decoders.mllama_config import MllamaConfig
from mint.decoders.vision_cache import FeatureStore
from mint.images.rules import MllamaSettings
from mint.training.batches import TokenPair

RANK, CACHE = 16, 20 * 10**9
SEEING = ("language_model", "multi_modal_projector")
"""What is adapted when the tower is frozen."""


@dataclass(frozen=True, slots=True)
class VisionSize:
    """A model, and pairs of so many tokens of prompt, chosen and rejected answer, each with a picture of all tiles."""

    text: dict[str, Any]
    tower: dict[str, Any]
    lengths: tuple[int, int, int]
    pairs: int
    rounds: int = 3


def _size(
    text: tuple[int, ...], looking: list[int], tower: tuple[int, ...], chosen: list[int], *rest: Any
) -> VisionSize:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    kinds = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_global_layers",
        "attention_heads",
        "image_size",
    )
    return VisionSize(
        {**dict(zip(names, text, strict=True)), "cross_attention_layers": looking},
        {**dict(zip(kinds, tower, strict=True)), "patch_size": 14, "intermediate_layers_indices": chosen},
        *rest,
    )


SIZES = {
    "gpu": _size((4096, 14336, 40, 32, 8, 128256), [3, 8, 13, 18, 23, 28, 33, 38],
                 (1280, 5120, 32, 8, 16, 560), [3, 7, 15, 23, 30], (128, 64, 64), 8),
    "cpu": _size((256, 768, 4, 4, 2, 4000), [1, 3], (128, 512, 3, 1, 2, 56), [0, 2], (32, 16, 16), 2, 2),
    "tiny": _size((32, 48, 3, 2, 1, 300), [1], (32, 48, 2, 1, 2, 28), [0], (9, 4, 3), 2, 1),
}  # fmt: skip
"""Llama 3.2 Vision 11B; what a processor does in seconds; whether every line runs."""


def seeing_decoder(size: VisionSize, folder: Path, trained: bool) -> Decoder:
    """The decoder with fresh adapters, on its tower too if that is trained; features of a frozen one are kept in `folder`."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = {"text_config": size.text, "vision_config": size.tower, "image_token_index": size.text["vocab_size"]}
        network = Mllama(MllamaConfig.read(config)).to(DTYPE).eval().requires_grad_(False)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(0.0 if name.endswith("bias") else 1.0)
    eyes = Eyes(network, MllamaSettings(size.tower["image_size"]), store=FeatureStore(folder, CACHE))
    lora.attach(network, "all-linear" if trained else SEEING, rank=RANK, alpha=2 * RANK)
    network.model.recompute = trained and DEVICE == "cuda"
    decoder = Decoder(network, None, torch.device(DEVICE), DTYPE, eyes=eyes)  # type: ignore[arg-type]
    vars(decoder)["tokenizer"] = Words(size.text["vocab_size"])
    return decoder


def seeing_step(decoder: Decoder, size: VisionSize) -> Callable[[], float]:
    """One ORPO step; each pair has a picture of its own that fills all tiles."""
    drawn, (prompt, *answers) = torch.Generator().manual_seed(0), size.lengths
    token, side = size.text["vocab_size"], 2 * size.tower["image_size"]
    pairs = []
    for at in range(size.pairs):
        ids = torch.randint(2, token, (prompt + sum(answers),), generator=drawn).tolist()
        start, chosen, rejected = [ids[0], token, *ids[2:prompt]], *torch.tensor(ids[prompt:]).split(answers)
        both = (start + answer.tolist() for answer in (chosen, rejected))
        image = picture(side, side, seed=at)
        pairs.append(TokenPair(str(at), *both, prompt, prompt, image=image, image_token=token))
    trainer = our_trainer(decoder, pairs, tokens_per_batch=1 << 15)
    return lambda: float(trainer.advance()["loss"])


def seeing_operations(decoder: Decoder, size: VisionSize, trained: bool) -> float:
    """What the mathematics of a step needs: two operations a weight and token, two more where a gradient goes through,
    six an adapter's; seven products of attention. A frozen tower's features are there already."""
    network, vision = decoder.network, decoder.network.config.vision
    tiles, (prompt, *answers) = vision.max_num_tiles, size.lengths
    patches, tower = tiles * vision.patches, tiles * (vision.patches + vision.pads)
    computed = prompt + sum(answers) - 2  # nothing follows an answer's last token; and an image is not predicted
    total = 0.0
    for name, layer in network.named_modules():
        if not isinstance(layer, torch.nn.Linear) or (not trained and "vision_model" in name):
            continue
        looks = name.endswith(("cross_attn.k_proj", "cross_attn.v_proj", "multi_modal_projector"))
        tokens = tower if "vision_model" in name else patches if looks else computed
        ways = 2 if name.endswith("multi_modal_projector") and not trained else 4
        adapter = 6 * RANK * sum(layer.weight.shape) if isinstance(layer, lora.LoRALinear) else 0
        total += tokens * (ways * layer.weight.numel() + adapter)
    text = network.config
    width, looking = text.num_attention_heads * text.head_dim, len(text.cross_attention_layers)
    seen = prompt * prompt / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
    total += 14 * width * ((text.num_hidden_layers - looking) * seen + looking * computed * patches)
    if trained:
        total += 14 * vision.hidden_size * (vision.num_hidden_layers + vision.num_global_layers) * tower**2
    return size.pairs * total
