"""How each network wants its pixels, read from a checkpoint's own `preprocessor_config.json`, old style or new.

A key that would change pixels in a way that is not implemented is refused by name; without the file the official values
hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import member_object, optional_member

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BILINEAR, BICUBIC = 2, 3


@dataclass(frozen=True, slots=True)
class Colours:
    """From a byte to what the network sees: (byte * rescale - mean) / std, for each of the three channels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float = 1 / 255

    def table(self) -> np.ndarray:
        """What each byte becomes: (3, 256) float32. A byte has 256 values, so looking them up is exact and fast."""
        return _table(self)


@lru_cache(maxsize=64)
def _table(colours: Colours) -> np.ndarray:
    scaled = (np.arange(256, dtype=np.float64) * colours.rescale).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (colours.mean, colours.std))
    table: np.ndarray = (scaled - mean) / std
    table.flags.writeable = False
    return table


@dataclass(frozen=True, slots=True)
class ViltSettings:
    """The shorter side becomes `shortest`, both sides multiples of `divisor`."""

    shortest: int = 384
    divisor: int = 32
    resample: int = BICUBIC
    colours: Colours = Colours(HALF, HALF)


@dataclass(frozen=True, slots=True)
class ClipSettings:
    """The shorter side becomes `shortest`, then the middle is cut out: `crop` = (height, width)."""

    shortest: int = 224
    crop: tuple[int, int] = (224, 224)
    resample: int = BICUBIC
    colours: Colours = Colours(CLIP_MEAN, CLIP_STD)


@dataclass(frozen=True, slots=True)
class MllamaSettings:
    """The picture is laid out on at most `max_tiles` square tiles of `size`."""

    size: int = 560
    max_tiles: int = 4
    resample: int = BILINEAR
    colours: Colours = Colours(CLIP_MEAN, CLIP_STD)


def vilt_settings(folder: str | Path) -> ViltSettings:
    """ViLT's rules as the checkpoint in `folder` states them."""
    rules = _Rules(folder, "Vilt", {"do_resize": True, "do_pad": True, "do_center_crop": False})
    settings = ViltSettings(
        rules.side("size", ("shortest_edge",), 384), rules.count("size_divisor", 32), *rules.finish(BICUBIC, HALF, HALF)
    )
    if settings.divisor > settings.shortest:
        raise CheckpointError(f"{rules.path}: size_divisor {settings.divisor} exceeds size {settings.shortest}")
    return settings


def clip_settings(folder: str | Path) -> ClipSettings:
    """CLIP's rules as the checkpoint in `folder` states them."""
    rules = _Rules(folder, "CLIP", {"do_resize": True, "do_pad": False, "do_center_crop": True})
    shortest, crop = rules.side("size", ("shortest_edge",), 224), rules.pair("crop_size", 224)
    return ClipSettings(shortest, crop, *rules.finish(BICUBIC, CLIP_MEAN, CLIP_STD))


def mllama_settings(folder: str | Path) -> MllamaSettings:
    """Llama 3.2 Vision's rules as the checkpoint in `folder` states them."""
    rules = _Rules(folder, "Mllama", {"do_resize": True, "do_pad": True, "do_center_crop": False})
    height, width = rules.pair("size", 560)
    if height != width:
        raise CheckpointError(f"{rules.path}: size {height} x {width}; tiles are square")
    return MllamaSettings(height, rules.count("max_image_tiles", 4), *rules.finish(BILINEAR, CLIP_MEAN, CLIP_STD))


# These change no pixel, or say what is done here anyway.
_WITHOUT_EFFECT = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "return_tensors",
    "disable_grouping",
    "device",
    "default_to_square",
    "_valid_processor_keys",
}
_CHANNELS_FIRST = {"data_format": "channels_first", "input_data_format": "channels_first"}


class _Rules:
    """The keys of one preprocessor file, each taken once; `finish` refuses those that nobody took."""

    def __init__(self, folder: str | Path, kind: str, fixed: Mapping[str, object]) -> None:
        self.path, found = _preprocessor(Path(folder))
        self.left = {key: value for key, value in found.items() if value is not None}
        for key in ("image_processor_type", "feature_extractor_type"):
            name = self.left.get(key, kind)
            if not str(name).startswith(kind):
                raise self.refusal(key, name, f"one of {kind}'s")
        for key, wanted in {**fixed, **_CHANNELS_FIRST}.items():
            value = self.left.pop(key, wanted)
            if value != wanted:
                raise self.refusal(key, value, repr(wanted))

    def refusal(self, key: str, found: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is {found!r}; only {wanted} is implemented")

    def count(self, key: str, default: int) -> int:
        return self._whole(key, self.left.pop(key, default))

    def _whole(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8192:
            raise self.refusal(key, value, "a whole number from 1 to 8192")
        return value

    def side(self, key: str, names: tuple[str, ...], default: int) -> int:
        """One length: a number in old files, {name: number} in new ones."""
        return self._sides(key, names, default)[0]

    def pair(self, key: str, default: int) -> tuple[int, int]:
        """(height, width): one number for both in old files, {"height": ..., "width": ...} in new ones."""
        height, width = self._sides(key, ("height", "width"), default)
        return height, width

    def _sides(self, key: str, names: tuple[str, ...], default: int) -> list[int]:
        value = self.left.pop(key, default)
        if not isinstance(value, dict):
            return [self._whole(key, value)] * len(names)
        value = {name: side for name, side in value.items() if side is not None}
        if set(value) != set(names):
            raise self.refusal(key, value, f"a number or {{{', '.join(names)}}}")
        return [self._whole(f"{key}.{name}", value[name]) for name in names]

    def finish(self, resample: int, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[int, Colours]:
        """Resampling and colours, the last keys; then nothing unknown may be left."""
        method = self.left.pop("resample", resample)
        if isinstance(method, bool) or method not in range(6):
            raise self.refusal("resample", method, "0 to 5")
        colours = self._colours(mean, std)
        unknown = sorted(set(self.left) - _WITHOUT_EFFECT)
        if unknown:
            raise CheckpointError(f"{self.path}: {', '.join(unknown)}: not implemented, and it may change the pixels")
        return int(method), colours

    def _colours(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Colours:
        rescale = self._positive("rescale_factor", self.left.pop("rescale_factor", 1 / 255))
        chosen_mean, chosen_std = self._three("image_mean", mean), self._three("image_std", std)
        for value in chosen_std:
            self._positive("image_std", value)
        if not self._switch("do_rescale"):
            rescale = 1.0
        if not self._switch("do_normalize"):
            chosen_mean, chosen_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return Colours(chosen_mean, chosen_std, rescale)

    def _switch(self, key: str) -> bool:
        value = self.left.pop(key, True)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def _three(self, key: str, default: tuple[float, ...]) -> tuple[float, float, float]:
        value = self.left.pop(key, list(default))
        if not isinstance(value, list) or len(value) != 3:
            raise self.refusal(key, value, "a list of three numbers")
        red, green, blue = (self._number(key, part) for part in value)
        return red, green, blue

    def _positive(self, key: str, value: object) -> float:
        number = self._number(key, value)
        if number <= 0:
            raise self.refusal(key, value, "a number above 0")
        return number

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.refusal(key, value, "a finite number")
        return float(value)


def _preprocessor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """`preprocessor_config.json`, or the `image_processor` part of `processor_config.json`, or nothing (defaults)."""
    if optional_member(folder, "preprocessor_config.json") or not optional_member(folder, "processor_config.json"):
        return folder / "preprocessor_config.json", member_object(folder, "preprocessor_config.json", 1 << 20)
    path = folder / "processor_config.json"
    found = member_object(folder, path.name, 1 << 20).get("image_processor", {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a {type(found).__name__} where the image settings should be an object")
    return path, found
