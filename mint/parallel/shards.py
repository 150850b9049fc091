"""A decoder spread over the ranks: every matrix is cut, and no rank ever holds, or reads from disk, more than its part.

The ranks are a table: those of a row (`TENSOR`) have the same tokens and share each product, so that only what comes out
of a block is added up; those of a column (`DATA`) have tokens of their own, and with FSDP2 a part of what the others of
the column hold too: a block's parts come together for as long as it computes. The vocabulary is in parts either way
(`vocabulary`). Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from .parts import Part
from .ranks import size, together


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; every rank must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    places = list(tensor.placements)
    for way in range(len(places)):  # over the ranks that have other tokens first: they share a part of a product
        places[way] = Replicate()
        tensor = tensor.redistribute(placements=places)
    return tensor.to_local()


def own_part(tensor: Tensor) -> tuple[Tensor, Part]:
    """What this rank holds of a tensor, and which rows (and columns) of the whole that is; (): all of them."""
    if not isinstance(tensor, DTensor):
        return tensor, ()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor._local_tensor, tuple(slice(at, at + count) for at, count in zip(offset, shape, strict=True))


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor of which this rank holds `own` where it holds a part of `tensor`."""
    return _spread(own, tensor, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else own


def _spread(own: Tensor, whole: Tensor, mesh: DeviceMesh, places: Sequence[Placement]) -> Tensor:
    made: Tensor = DTensor.from_local(own, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())
    return made


# ---- cutting --------------------------------------------------------------------------------------------------------

DATA, TENSOR = "data", "tensor"


def spread(network: Any, device: torch.device, *, shard: bool, tensor: int) -> Any:
    """Cut a decoder on the meta device into parts, each product over so many neighbouring ranks, and with `shard` what is
    left over the others by FSDP2; then make room for the parts.

    Returns the group of the ranks that have other tokens.
    """
    check_sizes(network, tensor)
    mesh = init_device_mesh(device.type, (size() // tensor, tensor), mesh_dim_names=(DATA, TENSOR))
    tied = network.lm_head.weight is network.text.embed_tokens.weight
    cut = _cut_vocabulary(network, mesh[TENSOR] if tensor > 1 else mesh[DATA])
    if tensor > 1:
        _cut_products(network, mesh[TENSOR])
    if shard:
        _shard(network, mesh[DATA], cut)
    network.to_empty(device=device)
    if tied:
        network.lm_head.weight = network.text.embed_tokens.weight
    return mesh[DATA].get_group()


def check_sizes(network: Any, ranks: int) -> None:
    """Refuse to cut products into parts that are not even."""
    kv_heads = network.config.num_key_value_heads
    if size() % ranks or kv_heads % ranks or network.config.intermediate_size % ranks:
        raise ConfigError(
            f"--tensor-parallel {ranks}: wanted a divisor of the {size()} processes, of the {kv_heads} key-value heads and "
            f"of the feed-forward width {network.config.intermediate_size}"
        )


def _cut_vocabulary(network: Any, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Embeddings and head by rows, and with the head its adapter, of which A is small and on every rank."""
    head, tables = network.lm_head, (network.lm_head, network.text.embed_tokens)
    cut = {id(table.weight): cut_rows(table.weight, mesh) for table in tables}
    for table in tables:
        table.weight = cut[id(table.weight)]
    if hasattr(head, "lora_B"):
        head.lora_A, head.lora_B = cut_matrix(head.lora_A, mesh, Replicate()), cut_rows(head.lora_B, mesh)
        return {*cut.values(), head.lora_A, head.lora_B}
    return set(cut.values())


def cut_rows(table: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A table (V, D) on the meta device as this rank's rows of it."""
    rows = table.shape[0]
    share = -(-rows // mesh.size())
    own = max(0, min(share, rows - share * mesh.get_local_rank()))
    part = _spread(table.new_empty(own, *table.shape[1:]), table, mesh, [Shard(0)])
    return nn.Parameter(part, requires_grad=table.requires_grad)


def _shard(network: Any, mesh: DeviceMesh, cut: set[nn.Parameter]) -> None:
    """Each unit of the network by FSDP2. Gradients of the adapters are added up, not averaged: a loss is pooled over all
    ranks already. Norms of a few numbers that are used outside of their unit stay whole."""
    small = {parameter for name, parameter in network.named_parameters() if name.endswith("k_norm.weight")}
    for unit in network.units():
        made: Any = fully_shard(unit, mesh=mesh, ignored_params=cut | small, reshard_after_forward=True)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)


# ---- tensor parallel ------------------------------------------------------------------------------------------------


def _cut_products(network: Any, mesh: DeviceMesh) -> None:
    """Every product of the text's blocks in parts. The tower of a vision model is whole on every rank, and each finds a
    part of the gradients of what is trained of it: only its own heads look at the pictures."""
    for block in network.text.layers:
        looks = hasattr(block, "cross_attn")
        attention = "cross_attn" if looks else "self_attn"
        styles: dict[str, ParallelStyle] = {f"{attention}.{name}_proj": Columns() for name in "qkv"}
        if looks:
            styles |= {f"{attention}.{name}_proj": Columns(enter=False) for name in "kv"}
        styles |= {f"mlp.{name}_proj": Columns() for name in ("gate", "up")}
        styles |= {f"{attention}.o_proj": Rows(), "mlp.down_proj": Rows()}
        parallelize_module(block, mesh, styles)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                setattr(module, name, cut_matrix(parameter, mesh, Replicate()))


def settle(network: Any) -> None:
    """Frozen matrices of blocks become plain tensors, this rank's part: nobody asks for the whole of them again."""
    for module in network.text.layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor) and not parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter._local_tensor, requires_grad=False))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a trained matrix, to compute with. Of one that all ranks hold each finds a part of the gradient."""
    if not isinstance(tensor, DTensor):
        return tensor
    ways = [Partial() if isinstance(place, Replicate) else place for place in tensor.placements]
    return tensor.to_local(grad_placements=ways)


def complete(weight: Tensor, total: Tensor) -> None:
    """Add up this rank's sum of the gradients of a matrix, where those that have the same tokens found a part of it each."""
    grad = weight.grad
    if isinstance(grad, DTensor) and _names(grad) == (TENSOR,) and any(place.is_partial() for place in grad.placements):
        with together():
            dist.all_reduce(total, group=grad.device_mesh.get_group())


def is_pooled(tensor: Tensor) -> bool:
    """Whether a tensor is cut over the ranks that have other tokens, and its gradient so is added up over them."""
    cut = [not isinstance(place, Replicate) for place in tensor.placements] if isinstance(tensor, DTensor) else []
    return any(here and name == DATA for here, name in zip(cut, _names(tensor), strict=True))


def _names(tensor: Tensor) -> tuple[str, ...]:
    return (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()


def kinds(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors, those together that are spread over the same mesh: no operation takes others together."""
    meshes = [tensor.device_mesh if isinstance(tensor, DTensor) else None for tensor in tensors]
    return [
        [tensor for tensor, own in zip(tensors, meshes, strict=True) if own == mesh] for mesh in dict.fromkeys(meshes)
    ]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, the same bits on all ranks: each part counts once, however many have it."""
    squares = [own_part(tensor)[0].double().square().sum() * _parts(tensor) / size() for tensor in tensors]
    total = torch.stack(squares).sum()
    with together():
        dist.all_reduce(total)
    return total.sqrt().float()


def _parts(tensor: Tensor) -> int:
    """In how many parts the tensor is."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(way) for way, place in enumerate(tensor.placements) if not isinstance(place, Replicate))


class Columns(ParallelStyle):
    """y = x Wᵀ with some rows of W: x is whole, y this rank's columns. Gradients of x are added up on the way back, unless
    not `enter`: then each rank goes on with its part of them."""

    places: dict[str, Placement] = {"weight": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}  # noqa: RUF012

    def __init__(self, enter: bool = True) -> None:
        self.enter = enter

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, cut_matrix(parameter, device_mesh, self.places[name]))
        self._hook(module, device_mesh.get_group())
        return module

    def _hook(self, module: nn.Module, group: Any) -> None:
        if self.enter:
            module.register_forward_pre_hook(lambda _, given: (_Enter.apply(given[0], group), *given[1:]))


class Rows(Columns):
    """y = x Wᵀ with some columns of W: x is this rank's columns, y is added up."""

    places = {"weight": Shard(1), "lora_A": Shard(1), "lora_B": Replicate()}  # noqa: RUF012

    def _hook(self, module: nn.Module, group: Any) -> None:
        module.register_forward_hook(lambda _, __, out: _Leave.apply(out, group))


def cut_matrix(matrix: Tensor, mesh: DeviceMesh, place: Placement) -> nn.Parameter:
    """A matrix on the meta device as this rank's part of it: even parts, the sizes divide."""
    shape = list(matrix.shape)
    if isinstance(place, Shard):
        shape[place.dim] //= mesh.size()
    return nn.Parameter(_spread(matrix.new_empty(shape), matrix, mesh, [place]), requires_grad=matrix.requires_grad)


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
