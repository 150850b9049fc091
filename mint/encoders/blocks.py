"""What the encoders share: attention over heads, activations by name, and the strict reading of a config.json section.

Shapes: B batch, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError

S = TypeVar("S")
_LARGEST, _LAYERS = 1 << 24, 1000


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of query (B, Q, D) over key and value (B, T, D) -> (B, Q, D); `mask` (B, T) is True at keys seen."""

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # (B, H, T, d)

    seen = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(split(query), split(key), split(value), seen, dropout, causal)
    return out.transpose(1, 2).flatten(2)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def read_section(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """A settings dataclass from a section of config.json: absent keys take the defaults, others must have their type,
    sizes must be positive, heads divide the width, and the activation be one of ours."""
    known: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        wanted = type(field.default)
        found = values.get(field.name)
        if found is None:
            continue
        if wanted is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(min(max(found, -_LARGEST), _LARGEST))
        if type(found) is not wanted:
            raise CheckpointError(f"{where}: {field.name} is {found!r}, {wanted.__name__} was wanted; fetch it again")
        known[field.name] = found
    section = kind(**known)
    _check(section, where)
    return section


def _check(section: Any, where: str) -> None:
    for field in fields(section):
        size = getattr(section, field.name)
        if type(size) is int and not field.name.endswith("_id"):
            most = _LAYERS if field.name == "num_hidden_layers" else _LARGEST
            if not 1 <= size <= most:
                raise CheckpointError(f"{where}: {field.name} is {size}, 1 to {most:,} was wanted; fetch it again")
        if type(size) is float and not 0 <= size <= (1 if "dropout" in field.name else _LARGEST):
            raise CheckpointError(f"{where}: {field.name} is {size}, which is out of range; fetch it again")
    width, heads, activation = section.hidden_size, section.num_attention_heads, section.hidden_act
    if width % heads:
        raise CheckpointError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if hasattr(section, "patch_size") and section.image_size < section.patch_size:
        raise CheckpointError(f"{where}: image_size {section.image_size} is below patch_size {section.patch_size}")
