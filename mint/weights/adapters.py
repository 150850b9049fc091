"""LoRA adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors, read strictly and written.

An adapter adds `scaling * B A` to the weight of each module it names: A (r, in), B (out, r). Shapes: r rank.
Whatever a config asks for that would add something else is refused by its name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_json, refuse_to_replace, replacing_folder, write_json
from . import hub
from .tensorfiles import TensorInfo, TensorReader, read_header, said, shown, write_tensors

Pair = tuple[Tensor, Tensor]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What PEFT writes into a config that leaves `scaling * B A` as it is, whatever its value.
_HARMLESS = {
    *("peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "peft_type"),
}
_DEFAULTS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# Starts that leave the base model's weights as they are; others subtract the start of B A from them.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_PREFIX = "base_model.model."
_KEY = re.compile(r"\^?[\w.-]+")
_LORA = re.compile(r"base_model\.model\.([\w.-]{1,300})\.lora_([AB])\.weight")
_BASE = re.compile(r"base_model\.model\.((?:[\w-]+\.)*(?:lm_head|embed_tokens))(?:\.base_layer)?\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter: its checked config, (A (r, in), B (out, r)) of each module, and the base weights that came along.

    PEFT stores the base model's own matrix beside a LoRA on the head; `base` says where, `check_base` that it is ours.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Pair]
    base: dict[str, TensorInfo]

    def rank(self, module: str) -> int:
        return int(_patterned(self.config, "rank_pattern", "r", module))

    def scaling(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha, rank = float(_patterned(self.config, "alpha_pattern", "lora_alpha", module)), self.rank(module)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def renamed(self, name: Callable[[str], str]) -> Adapter:
        """The same adapter under other names of its modules."""
        config, targets = dict(self.config), self.config["target_modules"]
        config["target_modules"] = [name(x) for x in (self.tensors if isinstance(targets, str) else targets)]
        for key in ("rank_pattern", "alpha_pattern"):
            given = config.get(key) or {}
            config[key] = {f"^{name(k[1:])}" if k.startswith("^") else name(k): value for k, value in given.items()}
        tensors = {name(module): pair for module, pair in self.tensors.items()}
        base = {name(module): info for module, info in self.base.items()}
        return Adapter(self.folder, config, tensors, base)

    def check_base(self, model: nn.Module) -> None:
        """Refuse an adapter that carries other base weights than the model has: its vocabulary was changed."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, info in self.base.items():
            weight = parameters.get(name)
            if weight is None or tuple(weight.shape) != info.shape or not _same(info, weight.detach()):
                found = "no such weight" if weight is None else f"another weight {list(weight.shape)}"
                what = f"it carries {name} {list(info.shape)} of its base model and this model has {found}"
                raise CheckpointError(f"{info.file}: {what}; give the base model that the adapter was trained on")


def _same(info: TensorInfo, weight: Tensor, rows: int = 4096) -> bool:
    """Whether a weight equals the one in the file, in the coarser of the two dtypes."""
    coarser = min(info.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    with TensorReader() as reader:
        for start in range(0, info.shape[0], rows):
            ours = weight[start : start + rows].to("cpu", coarser)
            theirs = torch.empty_like(ours, memory_format=torch.contiguous_format)
            reader.read(info, theirs, slice(start, start + rows))
            if not torch.equal(ours, theirs):
                return False
    return True


def read_adapter(name: str | Path) -> Adapter:
    """Read the adapter in a folder, or of a hub name, onto the CPU in the dtype of the file."""
    folder = hub.find_folder(name, (CONFIG, WEIGHTS))
    for file in (CONFIG, WEIGHTS):
        if not hub.has(folder, file):
            raise CheckpointError(
                f"{folder}: no {file}; give an adapter folder: RUN/adapter of a run, or what PEFT's save_pretrained wrote"
            )
    config = read_json(hub.member(folder, CONFIG), CheckpointError)
    _check_config(folder / CONFIG, config)
    pairs, base = _sort(read_header(hub.member(folder, WEIGHTS)), folder / WEIGHTS)
    shapes = {module: (a.shape, b.shape) for module, (a, b) in pairs.items()}
    _check_modules(folder, config, shapes)
    with TensorReader() as reader:
        tensors = {module: (_load(reader, a), _load(reader, b)) for module, (a, b) in pairs.items()}
    return Adapter(folder, config, tensors, base)


def write_adapter(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Pair], base_name: str | Path
) -> None:
    """Write an adapter folder that PEFT opens; the same arguments give the same bytes.

    `tensors` are (A (r, in), B (out, r)) by module name; `all-linear` targets are written out as the modules they are.
    """
    written = {**_DEFAULTS, **config, "base_model_name_or_path": str(base_name)}
    targets = written.get("target_modules")
    if targets == "all-linear":
        written["target_modules"] = sorted(tensors)
    elif targets is not None and not isinstance(targets, str):
        written["target_modules"] = sorted(targets)
    _check_config(Path(folder), written)
    shapes = {module: (tuple(a.shape), tuple(b.shape)) for module, (a, b) in tensors.items()}
    _check_modules(Path(folder), written, shapes)
    named = {
        f"{_PREFIX}{module}.lora_{side}.weight": tensor
        for module, pair in tensors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    refuse_to_replace(folder, CONFIG)
    with replacing_folder(folder) as beside:
        write_json(beside / CONFIG, dict(sorted(written.items())))
        with (beside / WEIGHTS).open("wb") as file:
            write_tensors(file, named)
            file.flush()
            os.fsync(file.fileno())


def _load(reader: TensorReader, info: TensorInfo) -> Tensor:
    tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
    reader.read(info, tensor)
    return tensor


def _sort(
    tensors: Mapping[str, TensorInfo], path: Path
) -> tuple[dict[str, tuple[TensorInfo, TensorInfo]], dict[str, TensorInfo]]:
    """The file's tensors as (A, B) by module and base weights by name; anything else is refused."""
    sides: dict[str, dict[str, TensorInfo]] = {"A": {}, "B": {}}
    base = {}
    for name, info in tensors.items():
        if (lora := _LORA.fullmatch(name)) and info.dtype.is_floating_point:
            sides[lora[2]][lora[1]] = info
        elif own := _BASE.fullmatch(name):
            base[f"{own[1]}.weight"] = info
        else:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} ({info}) is no lora_A or lora_B of a linear layer; use plain LoRA"
            )
    lonely = sorted(sides["A"].keys() ^ sides["B"].keys())
    if lonely:
        raise CheckpointError(f"{path}: {lonely[0]} has only one of lora_A and lora_B; save the adapter again")
    return {module: (a, sides["B"][module]) for module, a in sides["A"].items()}, base


def _check_modules(place: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[Any, Any]]) -> None:
    """Every module is a target of the right rank, and every target has a module."""
    if not shapes:
        raise CheckpointError(f"{place}: no lora_A and lora_B in it; give an adapter that was trained")
    targets = set(config["target_modules"]) if isinstance(config["target_modules"], list) else None
    for module, (a, b) in shapes.items():
        rank = int(_patterned(config, "rank_pattern", "r", module))
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            found = f"lora_A {list(a)} and lora_B {list(b)}, wanted [{rank}, in] and [out, {rank}]"
            raise CheckpointError(f"{place}: {module} has {found}; correct r or rank_pattern in {CONFIG}")
        if targets is not None and targets.isdisjoint(_ends(module)):
            raise CheckpointError(f"{place}: {module} is none of the target_modules; correct {CONFIG}")
    idle = (targets or set()).difference(*map(_ends, shapes))
    if idle and not config.get("exclude_modules"):  # PEFT leaves what it excludes among the targets
        raise CheckpointError(f"{place}: target {shown(min(idle))} has no lora_A and lora_B; correct target_modules")


# What a config may ask for, and how a refusal says it. A regular expression from a file could run for ever, so the keys
# of the patterns must be names: a whole one after ^, or the end of one.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and 0 < value < 1 << 20, "a whole number above 0"),
    "lora_alpha": (lambda value: _number(value) and value > 0, "a number above 0"),
    "lora_dropout": (lambda value: _number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "target_modules": (
        lambda value: _names(value) or (isinstance(value, str) and value != ""),
        "a list of names or a regular expression",
    ),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "bias": (lambda value: value == "none", "'none'"),
    "init_lora_weights": (lambda value: value in _PLAIN_STARTS, "a start that leaves the base as it is"),
    "rank_pattern": (
        lambda value: _pattern(value, "r"),
        "at most 10,000 names, no regular expressions, each with its rank",
    ),
    "alpha_pattern": (
        lambda value: _pattern(value, "lora_alpha"),
        "at most 10,000 names, no regular expressions, each with its alpha",
    ),
}


def _check_config(path: Path, config: Any) -> None:
    """Refuse, by its name, whatever is malformed or asks for more than `scaling * B A`."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{path}: peft_type is {said(found)}, wanted 'LORA'; only LoRA adapters are read")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            raise CheckpointError(f"{path}: no {key}, wanted {_RULES[key][1]}; save the adapter again")
    for key, value in config.items():
        fits, wanted = _RULES.get(key, (_nothing, "nothing: it changes the mathematics and is not implemented"))
        if key not in _HARMLESS and not fits(value):
            raise CheckpointError(f"{path}: {shown(key)} is {said(value)}, wanted {wanted}; save it as a plain LoRA")


def _nothing(value: Any) -> bool:
    return value in (None, False, "", [], {})


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) and name for name in value)


def _pattern(value: Any, key: str) -> bool:
    if not isinstance(value, dict):
        return value is None
    fits, _ = _RULES[key]
    return len(value) <= 10_000 and all(_KEY.fullmatch(name) and fits(given) for name, given in value.items())


def _patterned(config: Mapping[str, Any], pattern: str, key: str, module: str) -> Any:
    """The value of the first pattern that fits a module, as PEFT chooses it, or the value that holds for all others."""
    given = config.get(pattern) or {}
    fitting = {f"^{module}", *_ends(module)} & given.keys()
    return given[next(name for name in given if name in fitting)] if fitting else config[key]


def _ends(module: str) -> list[str]:
    """model.layers.0.mlp -> model.layers.0.mlp, layers.0.mlp, 0.mlp, mlp: by what a module can be named."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
