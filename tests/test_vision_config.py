"""The shape of the image tower: the official one by names and counts, and what is not implemented refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from mint.decoders.vision import VisionTower
from mint.decoders.vision_config import read_vision_config
from mint.errors import CheckpointError

SMALL = {"hidden_size": 128, "attention_heads": 2, "intermediate_size": 192, "num_hidden_layers": 5}
SMALL |= {"num_global_layers": 2, "image_size": 84, "patch_size": 14, "intermediate_layers_indices": [0, 2, 3]}
SMALL |= {"vision_output_dim": 512}
OFFICIAL = {"image_size": 560, "vision_output_dim": 7680}  # of 11B and 90B alike; the rest are the library's defaults


def test_names_shapes_and_counts_equal_those_of_the_official_towers() -> None:
    official = MllamaVisionConfig(**OFFICIAL)
    with torch.device("meta"):
        theirs, ours = MllamaVisionModel(official), VisionTower(read_vision_config(official.to_dict(), "config.json"))
    shapes = {name: tuple(part.shape) for name, part in ours.state_dict().items()}
    assert shapes == {name: tuple(part.shape) for name, part in theirs.state_dict().items()}
    assert sum(part.numel() for part in ours.parameters()) == sum(part.numel() for part in theirs.parameters())
    linear = {name for name, part in theirs.named_modules() if isinstance(part, nn.Linear)}
    assert {name for name, part in ours.named_modules() if isinstance(part, nn.Linear)} == linear
    assert len(linear) == 40 * 6
    assert ours.config.output_size == 7680
    assert (ours.config.patches, ours.config.pads) == (1601, 7)


def test_a_config_with_the_keys_of_every_library_version_is_read() -> None:
    general = {"torch_dtype": "bfloat16", "top_k": 50, "pruned_heads": {}, "bad_words_ids": None, "max_length": 20}
    config = read_vision_config(SMALL | general, "config.json")
    assert config == read_vision_config(MllamaVisionConfig(**SMALL).to_dict(), "config.json")
    assert config.intermediate_layers_indices == (0, 2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; wanted 'gelu'"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"vision_output_dim": 500}, "vision_output_dim is 500; wanted 512"),
        ({"supported_aspect_ratios": [[1, 1], [2, 2]]}, "supported_aspect_ratios is"),
        ({"intermediate_layers_indices": [0, 5]}, "wanted a list of layers from 0 to 4"),
        ({"intermediate_layers_indices": "all"}, "intermediate_layers_indices is 'all'"),
        ({"hidden_size": None}, "hidden_size is None; wanted a whole number"),
        ({"hidden_size": 129}, "hidden_size is 129; wanted a multiple of attention_heads 2"),
        ({"image_size": [84, 84]}, r"image_size is \[84, 84\]"),
        ({"image_size": 85}, "image_size is 85; wanted a multiple of patch_size 14"),
        ({"norm_eps": 0}, "norm_eps is 0; wanted a number above 0"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"max_num_tiles": 65}, "max_num_tiles is 65"),
        ({"num_global_layers": True}, "num_global_layers is True"),
        ({"pruned_heads": {"0": [1]}}, "vision_config has pruned_heads, which no tower here implements"),
        ({"attention_bias": True, "rope_theta": 1e4}, "vision_config has attention_bias, rope_theta"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        read_vision_config(SMALL | change, "config.json")
