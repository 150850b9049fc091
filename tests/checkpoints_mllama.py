"""A small Llama 3.2 Vision in the official layout, made with transformers, and what its oracle is given for a prompt.

Weights are drawn wide (std 0.3), gates and norms too, and heads are 64 wide, so that a wrong factor, order or mask shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import LLAMA3_ROPE, SPECIALS, write_tokenizer
from PIL import Image
from torch import Tensor

from mint.images.pixels import mllama_pixels
from mint.images.rules import MllamaSettings

SIDE = 28
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "cross_attention_layers": [1, 3],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE},
    "rms_norm_eps": 1e-2,
}
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "attention_heads": 2,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "image_size": SIDE,
    "patch_size": 14,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 384,
}


def mllama_config(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **ids: Any) -> Any:
    """The transformers config; `<|image|>` is the first row of the embedding that the head has not."""
    from transformers import MllamaConfig

    return MllamaConfig(
        text_config={**TEXT, **ids, **(text or {})},
        vision_config={**VISION, **(vision or {})},
        image_token_index={**TEXT, **ids, **(text or {})}["vocab_size"],
    )


def write_mllama(
    folder: Path,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    seed: int = 0,
    std: float = 0.3,
) -> Path:
    """A folder with weights, config, tokenizer and pixel rules."""
    from transformers import MllamaForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    made = write_tokenizer(folder)
    image = made.token_to_id("<|image|>")
    assert SPECIALS[-1] == "<|image|>"
    assert image + 1 == made.get_vocab_size()
    ids = {"bos_token_id": made.token_to_id("<|begin_of_text|>"), "eos_token_id": made.token_to_id("<|eot_id|>")}
    ids |= {"pad_token_id": made.token_to_id("<|finetune_right_pad_id|>"), "vocab_size": image}
    config = mllama_config(text, vision, **ids)
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gate = "gate" in name and parameter.numel() == 1
            parameter.normal_(1.0, 0.3) if "norm" in name and "bias" not in name else parameter.normal_(0.0, std)
            if gate:
                parameter.uniform_(0.4, 0.9)
    model.save_pretrained(folder)
    side = config.vision_config.image_size
    rules = {"do_resize": True, "do_pad": True, "do_rescale": True, "do_normalize": True, "max_image_tiles": 4}
    rules |= {"size": {"height": side, "width": side}, "resample": 2, "image_processor_type": "MllamaImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(rules))
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of that size."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def oracle_inputs(ids: Sequence[int], images: Sequence[Any], image_token: int, side: int = SIDE) -> dict[str, Tensor]:
    """What transformers' model takes for one row."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    given: dict[str, Tensor] = {
        "input_ids": torch.tensor([list(ids)]),
        "attention_mask": torch.ones(1, len(ids)).long(),
    }
    if not images:
        return given
    made = mllama_pixels([list(images)], MllamaSettings(size=side))
    places = [get_cross_attention_token_mask(list(ids), image_token)]
    dense = convert_sparse_cross_attention_mask_to_dense(places, made.tiles, 4, len(ids))
    given |= {"pixel_values": made.pixels, "aspect_ratio_ids": made.aspect_ratio_ids}
    return given | {"aspect_ratio_mask": made.aspect_ratio_mask, "cross_attention_mask": torch.from_numpy(dense)}


def widen_tokenizer(folder: Path, vocabulary: int) -> None:
    """Fill the tokenizer of a folder with words that no text has, so that `<|image|>` has the id `vocabulary`."""
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    words, added = stored["model"]["vocab"], stored["added_tokens"]
    words |= {f"<{number}>": number for number in range(len(words), vocabulary + 1 - len(added))}
    for number, token in enumerate(added):
        token["id"] = len(words) + number
    begin = stored["post_processor"]["special_tokens"]["<|begin_of_text|>"]
    begin["ids"] = [len(words)]
    path.write_text(json.dumps(stored))
