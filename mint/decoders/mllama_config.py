"""The shape of Llama 3.2 Vision, read strictly from the nested config.json of a checkpoint; and its two namings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import CheckpointError
from .llama import LlamaConfig
from .vision_config import VisionConfig, read_vision_config

EXTRA_ROWS = 8
"""The embedding has so many more rows than the head: what stands for an image is fed and never predicted."""

_TEXT_DEFAULTS: dict[str, Any] = {
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}
"""What a text_config without these keys means; the first layers that look are those of the model of 11B."""


@dataclass(frozen=True, slots=True)
class MllamaConfig(LlamaConfig):
    """The text decoder's numbers, which of its layers look at the pictures, and the tower's."""

    cross_attention_layers: tuple[int, ...]
    image_token: int
    vision: VisionConfig

    @classmethod
    def read(cls, config: dict[str, Any], where: str = "config.json") -> MllamaConfig:
        """The configuration, strictly: what would change the mathematics and is not implemented is refused by name."""
        text, vision = (_object(config, name, where) for name in ("text_config", "vision_config"))
        text = _TEXT_DEFAULTS | {name: value for name, value in text.items() if value is not None}
        place = f"{where}: text_config"
        for name, found in (("dropout", text.get("dropout")), ("tie_word_embeddings", _tied(config, text))):
            if found:
                raise CheckpointError(f"{place}.{name} is {found!r}; only none is implemented")
        base = LlamaConfig.read(text, place)
        if base.head_dim * base.num_attention_heads != base.hidden_size:
            raise CheckpointError(
                f"{place}.head_dim is {base.head_dim}; wanted {base.hidden_size} / {base.num_attention_heads}"
            )
        numbers = {field.name: getattr(base, field.name) for field in fields(LlamaConfig)}
        return cls(
            **numbers,
            cross_attention_layers=_layers(text["cross_attention_layers"], base.num_hidden_layers, place),
            image_token=_image_token(config, base.vocab_size, where),
            vision=read_vision_config(vision, where),
        )


def _object(config: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    found = config.get(name)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {name} is a {type(found).__name__}; wanted an object with the numbers of it")
    return found


def _tied(config: dict[str, Any], text: dict[str, Any]) -> Any:
    return text.get("tie_word_embeddings") or config.get("tie_word_embeddings")


def _layers(found: Any, count: int, place: str) -> tuple[int, ...]:
    fits = isinstance(found, list) and all(type(layer) is int and 0 <= layer < count for layer in found)
    if not fits or not found or len(set(found)) != len(found):
        raise CheckpointError(
            f"{place}.cross_attention_layers is {found!r}; wanted layers from 0 to {count - 1}, each once"
        )
    return tuple(sorted(found))


def _image_token(config: dict[str, Any], vocabulary: int, where: str) -> int:
    found = config.get("image_token_index", config.get("image_token_id", 128256))
    if type(found) is not int or not 0 <= found < vocabulary + EXTRA_ROWS:
        raise CheckpointError(f"{where}: image_token_index is {found!r}; wanted an id below {vocabulary + EXTRA_ROWS}")
    return found


_NAMINGS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""(in the official files, in memory as transformers has them since and as adapters are named)."""


def in_memory(name: str) -> str:
    """The network's name of a parameter or module, from either naming."""
    return _renamed(name, _NAMINGS)


def on_disk(name: str) -> str:
    """The official files' name of a parameter or module of the network."""
    return _renamed(name, tuple((new, old) for old, new in _NAMINGS))


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if f"{name}.".startswith(old):
            return (new + f"{name}."[len(old) :])[:-1]
    return name
