"""A decoder spread over the ranks: every matrix is cut, and no rank ever holds, or reads from disk, more than its part.

`shard` cuts by FSDP2: each rank has tokens of its own, and a block's parts come together for as long as it computes.
`split` cuts each product (tensor parallel): ranks have the same tokens, and only what comes out of a block is added up.
The vocabulary is in parts either way (`vocabulary`). Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..errors import ConfigError
from . import Part, size, together


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> tuple[Tensor, Part]:
    """What this rank holds of a tensor, and which rows (and columns) of the whole that is; (): all of them."""
    if not isinstance(tensor, DTensor):
        return tensor, ()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor._local_tensor, tuple(slice(at, at + count) for at, count in zip(offset, shape, strict=True))


# ---- cutting --------------------------------------------------------------------------------------------------------


def shard(network: Any, device: torch.device) -> None:
    """Cut a decoder on the meta device into parts: each block by FSDP2, the vocabulary by rows; then make room for them.

    Gradients of the adapters are added up, not averaged: a loss is pooled over all ranks already.
    """
    mesh = init_device_mesh(device.type, (size(),))
    cut = _cut_vocabulary(network, mesh)
    for block in (*network.model.layers, network.model):
        made: Any = fully_shard(block, mesh=mesh, ignored_params=cut)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    _make_room(network, device)


def _make_room(network: Any, device: torch.device) -> None:
    """Memory for what this rank holds; head and embeddings stay one where they are."""
    tied = network.lm_head.weight is network.model.embed_tokens.weight
    network.to_empty(device=device)
    if tied:
        network.lm_head.weight = network.model.embed_tokens.weight


def _cut_vocabulary(network: Any, mesh: DeviceMesh) -> set[nn.Parameter]:
    tables = (network.lm_head, network.model.embed_tokens)
    cut = {id(table.weight): cut_rows(table.weight, mesh) for table in tables}
    for table in tables:
        table.weight = cut[id(table.weight)]
    return set(cut.values())


def cut_rows(table: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A table (V, D) on the meta device as this rank's rows of it."""
    rows = table.shape[0]
    share = -(-rows // mesh.size())
    own = max(0, min(share, rows - share * mesh.get_local_rank()))
    local = table.new_empty(own, *table.shape[1:])
    spread = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=table.shape, stride=table.stride())
    return nn.Parameter(spread, requires_grad=False)


# ---- tensor parallel ------------------------------------------------------------------------------------------------

TENSOR = "tensor"


def split(network: Any, device: torch.device, ranks: int) -> Any:
    """Cut every product of a decoder on the meta device over so many neighbouring ranks, then make room for the parts.

    Returns the group of the ranks that hold the same part and have other tokens.
    """
    kv_heads = network.config.num_key_value_heads
    if size() % ranks or kv_heads % ranks or network.config.intermediate_size % ranks:
        raise ConfigError(
            f"--tensor-parallel {ranks}: wanted a divisor of the {size()} processes, of the {kv_heads} key-value heads and "
            f"of the feed-forward width {network.config.intermediate_size}"
        )
    mesh = init_device_mesh(device.type, (size() // ranks, ranks), mesh_dim_names=("data", TENSOR))
    _cut_vocabulary(network, mesh[TENSOR])
    for block in network.model.layers:
        styles: dict[str, ParallelStyle] = {"self_attn.o_proj": Rows(), "mlp.down_proj": Rows()}
        styles |= {f"self_attn.{name}_proj": Columns() for name in "qkv"}
        styles |= {f"mlp.{name}_proj": Columns() for name in ("gate", "up")}
        parallelize_module(block, mesh[TENSOR], styles)
    _make_room(network, device)
    return mesh["data"].get_group()


def settle(network: Any) -> None:
    """Frozen matrices of blocks become plain tensors, this rank's part: nobody asks for the whole of them again."""
    for module in network.model.layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor) and not parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter._local_tensor, requires_grad=False))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a trained matrix, to compute with. Of one that all ranks hold each finds a part of the gradient."""
    if not isinstance(tensor, DTensor):
        return tensor
    ways = [Partial() if isinstance(place, Replicate) else place for place in tensor.placements]
    return tensor.to_local(grad_placements=ways)


def complete(weight: Tensor) -> None:
    """Add up the gradient of a matrix that all ranks hold."""
    if isinstance(weight, DTensor) and isinstance(weight.grad, DTensor):
        weight.grad = weight.grad.redistribute(placements=weight.placements)


class Columns(ParallelStyle):
    """y = x Wᵀ with some rows of W: x is whole, y this rank's columns. Gradients of x are added up on the way back."""

    places: dict[str, Placement] = {"weight": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}  # noqa: RUF012

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, cut_matrix(parameter, device_mesh, self.places[name]))
        group = device_mesh.get_group()
        module.register_forward_pre_hook(lambda _, given: (_Enter.apply(given[0], group), *given[1:]))
        return module


class Rows(Columns):
    """y = x Wᵀ with some columns of W: x is this rank's columns, y is added up."""

    places = {"weight": Shard(1), "lora_A": Shard(1), "lora_B": Replicate()}  # noqa: RUF012

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, cut_matrix(parameter, device_mesh, self.places[name]))
        group = device_mesh.get_group()
        module.register_forward_hook(lambda _, __, out: _Leave.apply(out, group))
        return module


def cut_matrix(matrix: Tensor, mesh: DeviceMesh, place: Placement) -> nn.Parameter:
    """A matrix on the meta device as this rank's part of it: even parts, the sizes divide."""
    shape = list(matrix.shape)
    if isinstance(place, Shard):
        shape[place.dim] //= mesh.size()
    part = DTensor.from_local(matrix.new_empty(shape), mesh, [place], run_check=False, shape=matrix.shape,
                              stride=matrix.stride())  # fmt: skip
    return nn.Parameter(part, requires_grad=matrix.requires_grad)


class _Enter(torch.autograd.Function):
    """x, as it is; its gradients on all ranks are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        with together():
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Leave(torch.autograd.Function):
    """The sum of x over the ranks; the gradient, which all have, as it is."""

    @staticmethod
    def forward(_: Any, x: Tensor, group: Any) -> Tensor:
        out = x.contiguous().clone()
        with together():
            dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
