"""MINT: moves what a multimodal model knows into a decoder that sees one modality. The public names, and nothing else.

A name is imported when it is first used, so that `python cli.py --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoders import load_decoder
    from .encoders import load_encoder
    from .losses import dpo_loss, orpo_loss, sft_loss
    from .pipeline import align, evaluate, predict, prefer, teach
    from .types import Prediction, PreferencePair, Ranking, Record, Report, TokenTree

__version__ = "0.1.0"
__all__ = [
    "Prediction",
    "PreferencePair",
    "Ranking",
    "Record",
    "Report",
    "TokenTree",
    "align",
    "dpo_loss",
    "evaluate",
    "load_decoder",
    "load_encoder",
    "orpo_loss",
    "predict",
    "prefer",
    "sft_loss",
    "teach",
]
_HOMES = {
    "decoders": ("load_decoder",),
    "encoders": ("load_encoder",),
    "losses": ("dpo_loss", "orpo_loss", "sft_loss"),
    "pipeline": ("align", "evaluate", "predict", "prefer", "teach"),
    "types": ("Prediction", "PreferencePair", "Ranking", "Record", "Report", "TokenTree"),
}


_ROOMS = ("kernels", "records")
"""Modules with public names of their own, which `import mint` alone is enough for."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
