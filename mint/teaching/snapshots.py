"""The state of a training run of a teacher: all that its next step depends on, weights, the optimiser's moments, the
random number generators, by name; and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..weights.states import load_state


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
    """The tensors of the state."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put the saved state into the network, the optimiser and the random number generators."""
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments; they and the weights are then overwritten
    tensors = state_of(network, optimizer, device)
    load_state(folder, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
