"""A ViLT teacher: photo and note of each record in, scores of the classes out (the paper's GestaltMML).

It is trained on three views of a patient: photo and note, photo and "*", note and somebody else's photo. So a record
without a note is given "*". A record without a photo is given one blank patch: no face, and as little of it as can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, RecordError
from ..files import read_json
from ..images.pixels import vilt_pixels
from ..images.rules import ViltSettings, vilt_settings
from ..tokens import Texts, open_bert_texts
from ..types import Record
from ..weights import Checkpoint, fill, hub
from .classes import distinct, read_disease_dict, select, stated_in_config
from .encoder import Encoder, with_pictures
from .legacy import fill_from_pickle, read_pickle
from .vilt import ViltConfig, ViltForQuestionAnswering, initialise

NO_NOTE = "*"
DISEASES, PICKLES = "disease_dict.json", (".pt", ".pth")
_ROWS = "classifier.3.weight"

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class FusionEncoder(Encoder):
    """A ViLT network with the text and image processing that belong to it."""

    def __init__(
        self,
        network: ViltForQuestionAnswering,
        config: ViltConfig,
        texts: Texts,
        settings: ViltSettings,
        classes: tuple[str, ...],
        folder: Path | None = None,
        columns: list[int] | None = None,
    ) -> None:
        self.network, self.config, self.texts, self.settings = network.eval(), config, texts, settings
        self.classes, self.columns, self.folder = classes, columns, folder

    @torch.inference_mode()
    def score_batch(self, records: Sequence[Record]) -> Tensor:
        logits: Tensor = self.network(*self.inputs(records)).float().cpu()
        return logits if self.columns is None else logits[:, self.columns]

    def inputs(self, records: Sequence[Record]) -> Inputs:
        """What the network takes: ids (B, L), text mask (B, L), pixels (B, 3, H, W), pixel mask (B, H, W)."""
        parameter = next(self.network.parameters())
        ids, text_mask = self.texts([_note(record) for record in records])
        pixels, pixel_mask = self._pixels(records)
        device = parameter.device
        return ids.to(device), text_mask.to(device), pixels.to(device, parameter.dtype), pixel_mask.to(device)

    def _pixels(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        pictured = [row for row, record in enumerate(records) if record.image is not None]
        found, found_mask = torch.zeros(0, 3, 0, 0), torch.zeros(0, 0, 0, dtype=torch.int64)
        if pictured:
            some = [records[row] for row in pictured]
            found, found_mask = with_pictures(some, lambda pictures: vilt_pixels(pictures, self.settings))
        if len(pictured) == len(records):
            return found, found_mask
        side = self.config.patch_size
        height, width = max(side, found.shape[2]), max(side, found.shape[3])
        pixels = torch.zeros(len(records), 3, height, width)
        mask = torch.zeros(len(records), height, width, dtype=torch.int64)
        mask[:, :side, :side] = 1
        pixels[pictured, :, : found.shape[2], : found.shape[3]] = found
        mask[pictured, : found.shape[2], : found.shape[3]] = found_mask
        return pixels, mask


def _note(record: Record) -> str:
    if record.note.strip():
        return record.note
    if record.image is None:
        raise RecordError(f"record {record.id}: neither a note nor an image; give it one of them, or leave it out")
    return NO_NOTE


def open_fusion(
    checkpoint: Checkpoint,
    *,
    classes: Iterable[str] | None,
    device: torch.device,
    dtype: torch.dtype,
    fresh: bool = False,
    seed: int = 0,
) -> FusionEncoder:
    """A teacher from safetensors. With `fresh`, or where the checkpoint has no classifier (the masked-language
    pretraining), a new one for `classes` is drawn from `seed`."""
    where = str(checkpoint.folder / "config.json")
    config = ViltConfig.read(checkpoint.config, where)
    rows = own_rows(checkpoint)
    fresh = fresh or not rows
    if not fresh:
        chosen, columns = select(stated_in_config(checkpoint.config, rows, where), rows, classes, where)
    elif classes is None:
        raise ConfigError(f"{checkpoint.folder}: no classifier of its own; name the classes, or teach it some")
    else:
        chosen, columns = distinct(classes), None
        rows = len(chosen)
    with torch.device("meta"):
        network = ViltForQuestionAnswering(config, rows)
    if fresh:
        fill(network.vilt, checkpoint, device=device, dtype=dtype, rename=_body)
        network.classifier = new_classifier(config, rows, seed).to(device, dtype)
    else:
        fill(network, checkpoint, device=device, dtype=dtype, rename=_needed)
    return _assembled(network, config, checkpoint.folder, chosen, columns)


def own_rows(checkpoint: Checkpoint) -> int:
    """The rows of a checkpoint's own classifier; 0 where it has none."""
    return checkpoint.tensors[_ROWS].shape[0] if _ROWS in checkpoint.tensors else 0


def open_gestalt(
    path: Path, *, classes: Iterable[str] | None, device: torch.device, dtype: torch.dtype
) -> FusionEncoder:
    """GestaltMML as it was released: a `.pt` state dict, its classes in `disease_dict.json` beside it, and ViLT's own
    tokenizer files. Without a config.json it is ViLT-B/32."""
    folder = path.parent
    stated = read_disease_dict(folder / DISEASES)
    values: Any = read_json(folder / "config.json", CheckpointError) if hub.has(folder, "config.json") else {}
    config = ViltConfig.read(values, str(folder / "config.json"))
    tensors = read_pickle(path)
    rows = len(tensors[_ROWS]) if _ROWS in tensors else 0
    if rows != len(stated):
        raise CheckpointError(
            f"{path}: {_ROWS} has {rows:,} rows, {DISEASES} {len(stated):,} classes; fetch both again"
        )
    chosen, columns = select(stated, rows, classes, str(folder / DISEASES))
    with torch.device("meta"):
        network = ViltForQuestionAnswering(config, rows)
    fill_from_pickle(network, path, tensors, device=device, dtype=dtype, rename=_needed)
    return _assembled(network, config, folder, chosen, columns)


def released_gestalt(path: Path) -> Path | None:
    """GestaltMML's state dict: the file itself, or the only one of a folder that has the dictionary of its classes."""
    if path.is_file():
        return path
    if not (path / DISEASES).is_file() or (path / "model.safetensors").is_file():
        return None
    found = sorted(entry for entry in path.iterdir() if entry.suffix in PICKLES)
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise CheckpointError(f"{path}: {DISEASES} wants one .pt beside it, found {names}; name the file itself")
    return found[0]


def _assembled(
    network: ViltForQuestionAnswering,
    config: ViltConfig,
    folder: Path,
    classes: tuple[str, ...],
    columns: list[int] | None,
) -> FusionEncoder:
    texts = open_bert_texts(folder, config.max_position_embeddings)
    if len(texts) > config.vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {len(texts):,} words, the network {config.vocab_size:,}")
    return FusionEncoder(network, config, texts, vilt_settings(folder), classes, folder, columns)


def new_classifier(config: ViltConfig, classes: int, seed: int) -> nn.Sequential:
    """A classifier for `classes` classes with weights drawn from `seed`."""
    with torch.device("meta"):
        classifier = ViltForQuestionAnswering(config, classes).classifier
    classifier = classifier.to_empty(device="cpu")
    initialise(classifier, config.initializer_range, torch.Generator().manual_seed(seed))
    return classifier


def _needed(name: str) -> str | None:
    """Old files carry the position numbers as a buffer."""
    return None if name.endswith("position_ids") else name


def _body(name: str) -> str | None:
    """The network below its head: `vilt.*` without the prefix; whatever head is there is left out."""
    return None if not name.startswith("vilt.") else _needed(name.removeprefix("vilt."))
