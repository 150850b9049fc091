"""The state of a training run of a teacher on disk: all that its next step depends on, weights, the optimiser's moments,
the random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.states import load_state, random_states, read_facts, save_state, take_up_random_states


def save_snapshot(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, facts: Mapping[str, Any]
) -> None:
    """Write the state; a run that is stopped while it writes leaves the one before."""
    save_state(folder, _tensors(network, optimizer) | random_states(device), facts)


def read_snapshot(folder: Path) -> dict[str, Any] | None:
    """The numbers of the state in `folder`, or None where there is no state."""
    facts = read_facts(folder)
    wanted = {"step": int, "best": dict, "run": dict}
    if facts is not None and [type(facts.get(name)) for name in wanted] != list(wanted.values()):
        raise CheckpointError(f"{folder}: not the state of a teacher's training; start anew without --resume")
    return facts


def restore_snapshot(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put the saved state into the network, the optimiser and the random number generators."""
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments; they and the weights are then overwritten
    random = random_states(device)
    load_state(folder, _tensors(network, optimizer) | random)
    take_up_random_states(random, device, folder)


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments, where they are."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    return tensors
