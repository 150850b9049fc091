"""What config.json of a Llama makes: the official names, shapes and counts, rotary frequencies, and refusals by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA3_ROPE

from mint.decoders import load_decoder
from mint.decoders.layers import inverse_frequencies
from mint.errors import CheckpointError

FULL_ROPE = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
# width, inner width, layers, heads, key-value heads, head width, rope factor, tied, parameters
OFFICIAL = {
    "3.2-1B": (2048, 8192, 16, 32, 8, 64, 32.0, True, 1_235_814_400),
    "3.2-3B": (3072, 8192, 28, 24, 8, 128, 32.0, True, 3_212_749_824),
    "3.1-8B": (4096, 14336, 32, 32, 8, 128, 8.0, False, 8_030_261_248),
    "3.1-70B": (8192, 28672, 80, 64, 8, 128, 8.0, False, 70_553_706_496),
    "3.1-405B": (16384, 53248, 126, 128, 8, 128, 8.0, False, 405_853_388_800),
}


def official_config(size: str) -> dict[str, Any]:
    """config.json as the official folder has it."""
    width, inner, count, heads, kv_heads, head_width, factor, tied, _ = OFFICIAL[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": head_width,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": count,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**FULL_ROPE, "factor": factor},
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    }


@pytest.mark.parametrize("size", OFFICIAL)
def test_names_shapes_and_counts_are_the_official_ones(tmp_path: Path, size: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(official_config(size)))
    decoder = load_decoder(tmp_path, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in decoder.network.state_dict().items()}
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**official_config(size)))
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in decoder.network.parameters()) == OFFICIAL[size][-1]
    assert {parameter.dtype for parameter in decoder.network.parameters()} == {torch.bfloat16}


def test_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for size in OFFICIAL:
        theirs = LlamaRotaryEmbedding(LlamaConfig(**official_config(size))).inv_freq
        ours = inverse_frequencies(
            OFFICIAL[size][5],
            500000.0,
            {**FULL_ROPE, "factor": OFFICIAL[size][6]},  # type: ignore[arg-type]
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_frequencies_by_hand() -> None:
    """Factor 8, original 64, bounds 1 and 4: wavelengths up to 16 stay, past 64 take 8 times as long."""
    theta = (2 * math.pi / 100) ** -2  # width 4: wavelengths 2 pi and 2 pi sqrt(theta) = 100... of 64 positions
    short, long = inverse_frequencies(4, theta, {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"})
    assert float(short) == 1.0
    assert math.isclose(2 * math.pi / float(long), 8 * 100, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_type is None"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": {**FULL_ROPE, "low_freq_factor": 4.0}}, "low_freq_factor is not below"),
        ({"rope_scaling": {**FULL_ROPE, "factor": -8.0}}, "factor is -8.0"),
        ({"rope_scaling": [8.0]}, r"rope_scaling is \[8.0\]"),
        ({"rope_theta": "many"}, "rope_theta is 'many'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": 20.5}, "hidden_size is 20.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 1 << 30}, "num_hidden_layers is 1073741824"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5.*divisor of the 32"),
        ({"head_dim": 65}, "head_dim is 65.*even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**official_config("3.2-1B"), **changes}))
    with pytest.raises(CheckpointError, match=words) as refused:
        load_decoder(tmp_path, device="meta")
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)
