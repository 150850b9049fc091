"""Pictures to what a decoder sees of them: every picture goes through the tower once, or never if that is remembered.

Shapes: M tiles of a picture, P patches of a tile, W features of a patch, D width of the decoder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..errors import ConfigError
from ..images import open_image
from ..images.pixels import best_arrangement, mllama_pixels
from ..images.rules import MllamaSettings
from ..transfer import sent
from ..types import TokenTree
from .mllama import Mllama
from .sight import Sight, read_spans
from .vision_cache import FeatureStore


@dataclass
class Eyes:
    """The tower and projector of a network, with the rules for its pixels and, in training, a store of features.

    `meta_masking`: text before its first image sees nothing, as in Meta's own code, and not as in transformers.
    """

    network: Mllama
    settings: MllamaSettings
    meta_masking: bool = False
    store: FeatureStore | None = None

    def look(self, tree: TokenTree) -> Sight | None:
        """What the tokens of a tree see of `tree.images`, which stand in the order of their tokens; None: no image.

        The tree is read here, so it lies on the processor where nothing is to wait.
        """
        marks = int((tree.ids == self.network.config.image_token).sum())
        if marks != len(tree.images):
            raise ConfigError(f"{len(tree.images)} images for {marks} image tokens; each token needs its own image")
        if not marks:
            return None
        spans = read_spans(tree.ids, tree.end, tree.position, self.network.config.image_token, self.meta_masking)
        wide = {number for span in spans if span.before for number in span.pictures}
        pictures = [open_image(image) for image in tree.images]
        names = [_digest(picture) for picture in pictures]
        wide_names = {names[number] for number in wide}
        states, real, whole, at = [], {}, {}, 0
        for name, picture in dict(zip(names, pictures, strict=True)).items():
            features, tiles = self.features(name, picture)
            part = (features if name in wide_names else features[:tiles]).flatten(0, 1)
            real[name] = slice(at, at + tiles * features.shape[1])
            whole[name] = slice(at, at + len(part))
            states.append(part)
            at += len(part)
        return Sight(torch.cat(states), [real[name] for name in names], [whole[name] for name in names], spans)

    def features(self, name: str, picture: Any) -> tuple[Tensor, int]:
        """The projected features of a picture (M, P, D), and how many tiles it has; what is trained runs each time."""
        tower, projector = self.network.model.vision_model, self.network.model.multi_modal_projector

        def project(x: Tensor) -> Tensor:
            out: Tensor = projector(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return out

        tiles = math.prod(best_arrangement(picture.height, picture.width, self.settings.size, self.settings.max_tiles))
        if _trained(tower):
            return project(self._tower(picture)), tiles
        if _trained(projector):
            return project(self._remembered(f"tower-{name}", lambda: self._tower(picture))), tiles
        return self._remembered(f"projected-{name}", lambda: project(self._tower(picture))), tiles

    def _tower(self, picture: Any) -> Tensor:
        """(M, P, W)."""
        made = mllama_pixels([[picture]], self.settings)
        features: Tensor = self.network.model.vision_model(
            made.pixels[:, 0], made.aspect_ratio_ids[:, 0], made.aspect_ratio_mask[:, 0]
        )
        return features[0]

    def _remembered(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What no training changes: from the store if there is one."""
        with torch.no_grad():
            if self.store is None:
                return make()
            device = self.network.model.multi_modal_projector.weight.device
            return sent(self.store.fetch(f"{name}-{self.fingerprint}", make), device)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that features depend on besides the picture: rules for pixels, shapes, weights and their dtype."""
        model = self.network.model
        parts = [repr(self.settings), repr(self.network.config.vision)]
        for module in (model.vision_model, model.multi_modal_projector):
            for key, weight in module.state_dict().items():
                if "lora_" not in key:
                    sums = torch.stack([weight.double().sum(), weight.double().square().sum()])
                    parts.append(f"{key} {weight.dtype} {tuple(weight.shape)} {parallel.whole(sums).tolist()}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _digest(picture: Any) -> str:
    """The name of a picture: a hash of its size and its pixels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]


def check_counts(ids: Sequence[Sequence[int]], images: Sequence[Sequence[Any]], image_token: int) -> None:
    """Every row must have as many images as image tokens."""
    if len(ids) != len(images):
        raise ConfigError(f"images for {len(images)} rows, but there are {len(ids)} rows of ids; give a list for each")
    for number, (row, own) in enumerate(zip(ids, images, strict=True)):
        marks = sum(token == image_token for token in row)
        if marks != len(own):
            raise ConfigError(
                f"row {number} has {len(own)} images and {marks} image tokens; each image token needs its own image"
            )
