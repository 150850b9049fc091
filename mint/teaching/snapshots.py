"""The state of a training run on disk: tensors as safetensors, numbers as JSON, in one folder that is replaced whole.

What is saved is all that the next step depends on: weights, the optimiser's moments, the random number generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_json, replacing, replacing_folder, write_json
from ..weights.tensorfiles import TensorReader, read_header, write_tensors

TENSORS, FACTS = "state.safetensors", "state.json"


def save_snapshot(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, facts: Mapping[str, Any]
) -> None:
    """Write the state; a run that is stopped while it writes leaves the one before."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    with replacing_folder(folder) as beside:
        with replacing(beside / TENSORS) as file:
            write_tensors(file, tensors)
        write_json(beside / FACTS, dict(facts))


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The numbers of the state in `folder`, or None where there is no state."""
    if not (folder / FACTS).is_file():
        return None
    found = read_json(folder / FACTS, CheckpointError)
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / FACTS}: a {type(found).__name__}, an object was wanted; start anew")
    return found


def restore_snapshot(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put the saved state into the network, the optimiser and the random number generators."""
    tensors = _read_tensors(folder / TENSORS)
    wanted = network.state_dict()
    saved = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    odd = [name for name in wanted.keys() | saved.keys() if name not in saved or name not in wanted]
    odd += [name for name in wanted.keys() & saved.keys() if wanted[name].shape != saved[name].shape]
    if odd:
        raise CheckpointError(f"{folder / TENSORS}: {min(odd)} does not fit this network; start anew without --resume")
    network.load_state_dict(saved)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with TensorReader() as reader:
        for name, info in read_header(path).items():
            found[name] = torch.empty(info.shape, dtype=info.dtype)
            reader.read(info, found[name])
    if "random.cpu" not in found:
        raise CheckpointError(f"{path}: no random.cpu; it is not the state of a training run")
    return found
