"""A CLIP teacher (the paper's PLIP): the image of each record against a few sentences about each class, untrained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, ConfigError, RecordError
from ..images.pixels import clip_pixels
from ..images.rules import ClipSettings, clip_settings
from ..jsonlines import text_lines
from ..tokens import CLIP_END, Texts, open_clip_texts
from ..types import Record
from ..weights import SMALL_FILES, Checkpoint, fill, hub, open_checkpoint
from .classes import distinct
from .clip import LEGACY_EOS, ClipConfig, ClipModel
from .encoder import Encoder, in_batches, with_pictures
from .features import FeatureCache
from .legacy import PICKLE, fill_from_pickle, read_pickle

TEMPLATES = (
    "an H&E image of {} tissue.",
    "a histopathology image of {} tissue.",
    "an H&E stained slide of the {}.",
    "{} tissue under the microscope.",
)


class ClipEncoder(Encoder):
    """A CLIP network, the sentences of its classes as vectors (C, E), and maybe a cache of image vectors."""

    def __init__(
        self,
        network: ClipModel,
        texts: Texts,
        settings: ClipSettings,
        classes: Iterable[str],
        templates: Iterable[str] | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.network, self.texts, self.settings = network.eval(), texts, settings
        self.classes = distinct(classes)
        self.templates = _checked(TEMPLATES if templates is None else templates)
        self.prototypes = self._prototypes()
        self.cache = None if cache is None else FeatureCache(cache, network, settings)

    def score_batches(
        self, records: Iterable[Record], skipped: list[str] | None = None
    ) -> Iterator[tuple[list[Record], Tensor]]:
        try:
            yield from super().score_batches(records, skipped)
        finally:
            if self.cache is not None:
                self.cache.flush()

    @torch.inference_mode()
    def score_batch(self, records: Sequence[Record]) -> Tensor:
        for record in records:
            if record.image is None:
                raise RecordError(f"record {record.id}: no image, and CLIP sees nothing else; add one or leave it out")
        features = self.cache.features(records, self._features) if self.cache else self._features(records)
        return self.network.match(features.to(self.prototypes), self.prototypes).float().cpu()

    def _features(self, records: Sequence[Record]) -> Tensor:
        """Unit vectors (n, E) of the records' images."""
        pixels = with_pictures(records, lambda pictures: clip_pixels(pictures, self.settings))
        parameter = next(self.network.parameters())
        return self.network.image_features(pixels.to(parameter.device, parameter.dtype))

    @torch.inference_mode()
    def _prototypes(self) -> Tensor:
        """For each class the mean of its sentences' unit vectors, made a unit vector again: (C, E)."""
        sentences = [template.replace("{}", spoken(name)) for name in self.classes for template in self.templates]
        device = next(self.network.parameters()).device
        parts = [self.network.text_features(self.texts(batch)[0].to(device)) for batch in in_batches(sentences, 64)]
        by_class = torch.cat(parts).view(len(self.classes), len(self.templates), -1)
        return F.normalize(by_class.mean(1), dim=-1)


def spoken(name: str) -> str:
    """A class name as it is said: `Adrenal_gland` is two words."""
    return name.replace("_", " ")


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a text file, one a line."""
    return [line for _, line in text_lines(path, ConfigError) if line.strip()]


def _checked(templates: Iterable[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        templates = (templates,)
    found = tuple(templates)
    if not found:
        raise ConfigError("templates: the list is empty; give at least one sentence with {} in the class's place")
    for template in found:
        if "{}" not in template:
            raise ConfigError(f"templates: {template!r} has no {{}}, the class's place; put it in")
    return found


def open_clip(
    name: str | Path,
    small: Checkpoint,
    *,
    classes: Iterable[str] | None,
    templates: Iterable[str] | None,
    cache: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> ClipEncoder:
    """A teacher from a CLIP checkpoint; `small` is the same one opened without tensors."""
    if classes is None:
        raise ConfigError(f"{name}: a CLIP encoder has no classes of its own; name them, as in `prefer --classes FILE`")
    config = ClipConfig.read(small.config, str(small.folder / "config.json"))
    texts = open_clip_texts(small.folder, config.text.max_position_embeddings)
    _check_texts(texts, config, small.folder)
    with torch.device("meta"):
        network = ClipModel(config)
    _fill(network, name, device, dtype)
    return ClipEncoder(network, texts, clip_settings(small.folder), classes, templates, cache)


def _fill(network: ClipModel, name: str | Path, device: torch.device, dtype: torch.dtype) -> None:
    """From safetensors, or from the pickle where the checkpoint has nothing else, as PLIP's."""
    folder = hub.find_folder(name, hub.FILES)
    if hub.has(folder, hub.SINGLE) or hub.has(folder, hub.INDEX):
        fill(network, open_checkpoint(name), device=device, dtype=dtype, rename=_needed)
        return
    path = hub.find_folder(name, (*SMALL_FILES, PICKLE)) / PICKLE
    if not path.is_file():
        raise CheckpointError(f"{folder}: neither {hub.SINGLE} nor {PICKLE}; fetch the checkpoint's weights")
    fill_from_pickle(network, path, read_pickle(path), device=device, dtype=dtype, rename=_needed)


def _needed(name: str) -> str | None:
    """Old files carry the position numbers as buffers."""
    return None if name.endswith("position_ids") else name


def _check_texts(texts: Texts, config: ClipConfig, folder: Path) -> None:
    """The end token that the network looks for must be the one that the tokenizer writes."""
    if len(texts) > config.text.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(texts):,} words, the network {config.text.vocab_size:,}"
        )
    if config.text.eos_token_id not in (LEGACY_EOS, texts.pad_id):
        raise CheckpointError(
            f"{folder}: config.json ends texts with id {config.text.eos_token_id}, the tokenizer with {texts.pad_id} "
            f"({CLIP_END}); take both from one checkpoint"
        )
