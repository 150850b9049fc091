"""A ViLT teacher before and after its training: opened from a checkpoint or made from nothing, and written as a folder.

The folder is the official layout: transformers' ViltForQuestionAnswering opens it, and so does load_encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files import replacing, write_json
from ..images.rules import ViltSettings
from ..progress import say
from ..tokens import Texts, learn_words, write_bert_tokenizer
from ..weights import hub, open_checkpoint
from ..weights.tensorfiles import write_tensors
from .classes import distinct, named, stated_in_config
from .fusion import FusionEncoder, new_classifier, open_fusion, open_gestalt, own_rows, released_gestalt
from .vilt import ViltConfig, ViltForQuestionAnswering, initialise

SCRATCH = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "image_size": 96,
    "patch_size": 16,
    "vocab_size": 8192,
    "initializer_range": 0.05,
}
"""A network that a laptop trains in minutes; any key of ViLT's config.json may be given instead."""

_PIXEL_FILES = ("preprocessor_config.json", "processor_config.json")


def choose_classes(
    own: tuple[str, ...] | None, asked: Iterable[str] | None, labels: Collection[str], where: str
) -> tuple[str, ...]:
    """The classes to teach: those asked for, else the base's own, else those of the cases; each label must be one."""
    chosen = distinct(asked) if asked is not None else own or distinct(sorted(labels))
    lacking = sorted(set(labels) - set(chosen))
    if lacking:
        raise ConfigError(f"{where}: the teacher lacks {named(lacking)}, of which there are cases; name all classes")
    idle = [name for name in chosen if name not in labels]
    if idle and asked is not None:
        raise ConfigError(f"{where}: no case of {named(idle)} to learn from; leave the class out, or add cases")
    if idle:
        say(f"{where}: {len(idle):,} classes of the base have no case: {named(idle)}")
    return chosen


def open_base(
    base: str | Path, asked: Iterable[str] | None, labels: Collection[str], device: torch.device, seed: int
) -> FusionEncoder:
    """A checkpoint to train on. For classes other than its own it gets a new classifier, drawn from `seed`."""
    path, where = released_gestalt(Path(base)), str(base)
    if path is not None:
        encoder = open_gestalt(path, classes=None, device=device, dtype=torch.float32)
        chosen = choose_classes(encoder.classes, asked, labels, where)
        if chosen != encoder.classes:
            encoder.network.classifier = new_classifier(encoder.config, len(chosen), seed).to(device)
            encoder.classes = chosen
        return encoder
    checkpoint = open_checkpoint(base)
    kind = checkpoint.config.get("model_type")
    if kind != "vilt":
        raise CheckpointError(f"{base}: config.json has model_type {kind!r}; a ViLT checkpoint was wanted, or none")
    own = stated_in_config(checkpoint.config, own_rows(checkpoint), f"{base}: config.json")
    chosen = choose_classes(own, asked, labels, where)
    return open_fusion(checkpoint, classes=chosen, device=device, dtype=torch.float32, fresh=chosen != own, seed=seed)


def new_encoder(
    notes: Iterable[str], classes: tuple[str, ...], network: Mapping[str, Any], device: torch.device, seed: int
) -> FusionEncoder:
    """A network from nothing: its words learnt from `notes`, its weights drawn from `seed`."""
    values = SCRATCH | dict(network)
    tokenizer = learn_words(notes, ViltConfig.read(values, "network").vocab_size)
    config = ViltConfig.read(values | {"vocab_size": tokenizer.get_vocab_size()}, "network")
    with torch.device("meta"):
        model = ViltForQuestionAnswering(config, len(classes))
    model = model.to_empty(device="cpu")
    initialise(model, config.initializer_range, torch.Generator().manual_seed(seed))
    texts = Texts(tokenizer, config.max_position_embeddings, "[PAD]")
    pixels = ViltSettings(shortest=config.image_size, divisor=config.patch_size)
    return FusionEncoder(model.to(device), config, texts, pixels, classes)


def _pixels(side: int, divisor: int) -> dict[str, Any]:
    return {
        "image_processor_type": "ViltImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "size_divisor": divisor,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }


def write_teacher(encoder: FusionEncoder, folder: Path) -> None:
    """The teacher in the official layout: tokenizer and pixel settings as it was opened with, weights, config.json."""
    if encoder.folder is None:
        write_bert_tokenizer(encoder.texts.tokenizer, folder, encoder.config.max_position_embeddings)
    else:
        _copy_small_files(encoder.folder, folder)
    if not any((folder / name).is_file() for name in _PIXEL_FILES):
        write_json(folder / _PIXEL_FILES[0], _pixels(encoder.settings.shortest, encoder.settings.divisor))
    with replacing(folder / hub.SINGLE) as file:
        write_tensors(file, encoder.network.state_dict())
    write_json(folder / "config.json", _config(encoder))


def _copy_small_files(source: Path, folder: Path) -> None:
    for entry in sorted(source.iterdir()):
        if any(fnmatchcase(entry.name, pattern) for pattern in (*hub.TEXT_FILES, *_PIXEL_FILES)):
            with replacing(folder / entry.name) as file:
                file.write(hub.member(source, entry.name).read_bytes())


def _config(encoder: FusionEncoder) -> dict[str, Any]:
    names = dict(enumerate(encoder.classes))
    return asdict(encoder.config) | {
        "architectures": ["ViltForQuestionAnswering"],
        "model_type": "vilt",
        "max_image_length": -1,
        "torch_dtype": "float32",
        "id2label": {str(row): name for row, name in names.items()},
        "label2id": {name: row for row, name in names.items()},
    }
