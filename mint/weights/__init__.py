"""Checkpoints in the official layout, read: config.json, model*.safetensors and its index.

`open_checkpoint` finds the files and checks every header; `fill` streams the tensors into a model, casting on the way,
in no more memory than the model itself. A checkpoint's names are the model's names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..errors import CheckpointError
from ..files import read_json
from ..progress import progress
from . import hub
from .hub import FILES, INDEX, SINGLE, SMALL_FILES
from .tensorfiles import TensorInfo, TensorReader, describe, read_header, shown

__all__ = ["FILES", "SMALL_FILES", "Checkpoint", "TensorInfo", "fill", "open_checkpoint"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_READERS = 4
_LISTED = 40  # names of one kind in an error


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: the name it was opened by, its folder, its config.json, and where each tensor lies."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, out: Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """Fill `out` with a tensor, or with some rows and columns of it, in the dtype and on the device of `out`."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor {name}; it is another model's checkpoint")
        with TensorReader() as reader:
            reader.read(self.tensors[name], out, rows, columns)

    def settings(self, name: str) -> dict[str, Any]:
        """Another JSON file of the folder, like generation_config.json; empty where the checkpoint has none."""
        return _object(self.folder, name) if hub.has(self.folder, name) else {}


def open_checkpoint(name: str | Path, *, files: Sequence[str] = FILES) -> Checkpoint:
    """Open a folder or a hub name, fetching only `files`; with `files=SMALL_FILES` it is opened without tensors."""
    folder = hub.find_folder(name, files)
    if not hub.has(folder, "config.json"):
        raise CheckpointError(f"{folder}: no config.json; give the folder of a whole checkpoint as it was published")
    config = _object(folder, "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder}: config.json has a quantization_config; give the checkpoint before quantisation"
        )
    wanted = any(fnmatchcase(SINGLE, pattern) for pattern in files)
    return Checkpoint(str(name), folder, config, _find_tensors(folder) if wanted else {})


def _object(folder: Path, name: str) -> dict[str, Any]:
    value = read_json(hub.member(folder, name), CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: a JSON {type(value).__name__}, wanted an object; fetch the file again")
    return value


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    if hub.has(folder, SINGLE):
        return read_header(hub.member(folder, SINGLE))
    if hub.has(folder, INDEX):
        return _read_shards(folder, _object(folder, INDEX).get("weight_map"))
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_PICKLES))
    found = f"only {pickles[0]}, a pickle, which can run any code" if pickles else "nothing of the kind"
    raise CheckpointError(
        f"{folder}: wanted {SINGLE} or {INDEX}, found {found}; convert a checkpoint that you trust with "
        f"transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
    )


def _read_shards(folder: Path, weight_map: Any) -> dict[str, TensorInfo]:
    """The tensors of all shards, which must be those that the index names, each in the shard that it names."""
    index = folder / INDEX
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of tensor name to file; fetch the file again")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(hub.member(folder, shard)).items():
            if weight_map.get(name) != shard:
                elsewhere = shown(weight_map.get(name, "nowhere"))
                what = f"tensor {shown(name)} lies in {shown(shard)}, the index says {elsewhere}"
                raise CheckpointError(f"{index}: {what}; fetch the checkpoint again")
            tensors[name] = info
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        what = f"tensor {shown(lost[0])} is not in {shown(weight_map[lost[0]])}, where the index says it is"
        raise CheckpointError(f"{index}: {what}; fetch the checkpoint again")
    return tensors


@dataclass(slots=True)
class _Place:
    """One tensor of a model and every (module, attribute) that holds it: more than one where weights are tied."""

    tensor: Tensor
    names: list[str]
    holders: list[tuple[nn.Module, str]]

    def __str__(self) -> str:
        return describe(self.tensor.dtype, tuple(self.tensor.shape))


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rename: Callable[[str], str | None] | None = None,
    ignore: Collection[str] = (),
    lacking: Collection[str] = (),
) -> None:
    """Read every parameter and persistent buffer of `model` from the checkpoint, tensor by tensor.

    Those on the meta device are made on `device`, floating ones in `dtype`; the others are written where they are, so
    they may be views of a fused weight; of one that is spread over several processes only this one's part is read.
    `rename` turns a file's name into the model's, or None where it is not wanted; `ignore` are names of the file that are
    left out, `lacking` those of the model that no file has. Of tied weights either name, or both if equal, may be there.
    """
    places = {name: place for name, place in _places(model).items() if name not in lacking}
    sources = _match(checkpoint, places, rename or str, ignore)
    _read_all(sorted(sources, key=lambda item: (str(item[0].file), item[0].offset)), device, dtype)


def _read_all(sources: list[tuple[TensorInfo, _Place]], device: torch.device | str, dtype: torch.dtype) -> None:
    """A few readers share the tensors, in the files' order: while one waits for the disk another casts."""
    own = threading.local()
    with ExitStack() as readers, ThreadPoolExecutor(_READERS) as pool:

        def read(source: tuple[TensorInfo, _Place]) -> None:
            info, place = source
            if not hasattr(own, "reader"):
                own.reader = readers.enter_context(TensorReader())
            _materialise(place, device, dtype)
            out, part = parallel.own_part(place.tensor)
            own.reader.read(info, out, *part[:2])

        for _ in progress(pool.map(read, sources), "loading weights", len(sources), "tensor"):
            pass


def _places(model: nn.Module) -> dict[str, _Place]:
    """Every name of a parameter or persistent buffer to its place; tied names share one."""
    by_id: dict[int, _Place] = {}
    by_name: dict[str, _Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is None:
                continue
            name = f"{path}.{key}" if path else key
            place = by_id.setdefault(id(tensor), _Place(tensor, [], []))
            place.names.append(name)
            place.holders.append((module, key))
            by_name[name] = place
    return by_name


def _match(
    checkpoint: Checkpoint, places: Mapping[str, _Place], rename: Callable[[str], str | None], ignore: Collection[str]
) -> list[tuple[TensorInfo, _Place]]:
    """Each place with the tensor it is read from; raises one error that lists all that does not fit."""
    names = {info.name: rename(info.name) for info in checkpoint.tensors.values() if info.name not in ignore}
    stated = {name for name in names.values() if name is not None}
    unexpected, misshapen, sources = [], [], []
    for info in checkpoint.tensors.values():
        name = names.get(info.name)
        place = places.get(name) if name is not None else None
        if place is not None and _fits(info, place.tensor):
            sources.append((info, place))
        elif place is not None:
            misshapen.append(f"{shown(info.name)} (found {info}, wanted {place})")
        elif name is not None:
            unexpected.append(f"{shown(info.name)} (found {info})")
    unique = {id(place): place for place in places.values()}.values()
    missing = [f"{place.names[0]} (wanted {place})" for place in unique if not stated.intersection(place.names)]
    _complain(checkpoint.folder, missing=missing, unexpected=unexpected, misshapen=misshapen)
    return _once(sources)


def _fits(info: TensorInfo, tensor: Tensor) -> bool:
    same_kind = info.dtype == tensor.dtype or (info.dtype.is_floating_point and tensor.dtype.is_floating_point)
    return info.shape == tuple(tensor.shape) and same_kind


def _once(sources: list[tuple[TensorInfo, _Place]]) -> list[tuple[TensorInfo, _Place]]:
    """One source for each place: where the file holds a tied weight under both its names, both must be the same."""
    chosen: dict[int, tuple[TensorInfo, _Place]] = {}
    with TensorReader() as reader:
        for info, place in sources:
            first, _ = chosen.setdefault(id(place), (info, place))
            if first is not info and not reader.same(first, info):
                raise CheckpointError(
                    f"{info.file}: {shown(first.name)} and {shown(info.name)} differ but are one weight in the model; "
                    f"correct tie_word_embeddings in config.json or give a checkpoint that holds it once"
                )
    return list(chosen.values())


def _complain(folder: Path, **faults: list[str]) -> None:
    parts = []
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
            parts.append(f"{kind}: {', '.join(names[:_LISTED])}{more}")
    if parts:
        raise CheckpointError(
            f"{folder}: not this model's weights: {'; '.join(parts)}; give the model's own checkpoint"
        )


def _materialise(place: _Place, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a place on the meta device memory of its own, and hand it to every module that holds it."""
    old = place.tensor
    if not old.is_meta:
        return
    new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=device)
    for module, key in place.holders:
        if isinstance(old, nn.Parameter):
            new = new if isinstance(new, nn.Parameter) else nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[key] = new
        else:
            module._buffers[key] = new
    place.tensor = new
