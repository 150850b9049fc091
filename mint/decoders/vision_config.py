"""The shape of the image tower, read strictly from `vision_config` of a checkpoint's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..images.pixels import arrangements

_MULTIPLE = 8
"""Each tile's tokens are padded with zeros to a multiple of this; the pads take part in attention."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes of the tower; fields are named as in the file. A tile has `patches` tokens, its class token among them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    image_size: int
    patch_size: int
    intermediate_layers_indices: tuple[int, ...]
    max_num_tiles: int = 4
    norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def pads(self) -> int:
        """Never 0: no square is 7 modulo 8."""
        return -self.patches % _MULTIPLE

    @property
    def aspect_ratios(self) -> int:
        return len(arrangements(self.max_num_tiles))

    @property
    def output_size(self) -> int:
        """Features of a patch: its last state and those of the chosen layers."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


_GENERAL = """
    _name_or_path _attn_implementation_autoset add_cross_attention architectures bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
"""
_WITHOUT_EFFECT = frozenset(_GENERAL.split())
"""What any config.json of transformers may carry and no tower depends on."""

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_global_layers",
    "attention_heads",
    "image_size",
    "patch_size",
)


def read_vision_config(found: Mapping[str, Any], where: str | Path) -> VisionConfig:
    """The config of the tower from the `vision_config` object of the file `where`; nothing unknown is passed over."""
    left = {key: value for key, value in found.items() if key not in _WITHOUT_EFFECT and value not in (None, {})}
    counts = {key: _whole(left.pop(key, None), key, where, 1000 if "layers" in key else 1 << 20) for key in _COUNTS}
    tiles = _whole(left.pop("max_num_tiles", 4), "max_num_tiles", where, most=64)
    chosen = _chosen_layers(left.pop("intermediate_layers_indices", None), counts["num_hidden_layers"], where)
    eps = left.pop("norm_eps", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not (math.isfinite(eps) and eps > 0):
        raise _refusal(where, "norm_eps", eps, "a number above 0")
    config = VisionConfig(**counts, intermediate_layers_indices=chosen, max_num_tiles=tiles, norm_eps=float(eps))
    _check_divisions(config, where)
    wanted = {
        "hidden_act": "gelu",
        "num_channels": 3,
        "vision_output_dim": config.output_size,
        "supported_aspect_ratios": [list(pair) for pair in arrangements(tiles)],
    }
    for key, value in wanted.items():
        if left.setdefault(key, value) != value:
            raise _refusal(where, key, left[key], repr(value))
    unknown = sorted(set(left) - set(wanted))
    if unknown:
        raise CheckpointError(f"{where}: vision_config has {', '.join(unknown)}, which no tower here implements")
    return config


def _refusal(where: str | Path, key: str, found: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{where}: vision_config.{key} is {found!r}; wanted {wanted}")


def _whole(value: object, key: str, where: str | Path, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _refusal(where, key, value, f"a whole number from 1 to {most}")
    return value


def _chosen_layers(value: object, layers: int, where: str | Path) -> tuple[int, ...]:
    fits = isinstance(value, list) and value and all(type(i) is int and 0 <= i < layers for i in value)
    if not isinstance(value, list) or not fits:
        raise _refusal(where, "intermediate_layers_indices", value, f"a list of layers from 0 to {layers - 1}")
    return tuple(value)


def _check_divisions(config: VisionConfig, where: str | Path) -> None:
    for key, by in (("hidden_size", "attention_heads"), ("image_size", "patch_size")):
        value, divisor = getattr(config, key), getattr(config, by)
        if value % divisor:
            raise _refusal(where, key, value, f"a multiple of {by} {divisor}")
