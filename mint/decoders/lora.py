"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x Wᵀ + scale (dropout(x) Aᵀ) Bᵀ with W frozen.

Shapes: N tokens, r rank, A (r, in), B (out, r). A and B are kept in float32, whatever the dtype of the network, because
steps of a small learning rate vanish in bfloat16; the products are made in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import parallel
from ..errors import CheckpointError, ConfigError
from ..weights.adapters import Adapter, Pair
from .layers import Head, Linear, quick_product

ALL_LINEAR = "all-linear"
HEAD = "lm_head"


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside its weight; the weight keeps its name and is shared, not copied."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=torch.float32, device=device))
        self.scale, self.dropout, self.enabled = scale, dropout, True
        self.quick = isinstance(base, Linear)  # the layer that it replaces, so that both give the same bits

    def start(self, generator: torch.Generator) -> None:
        """A uniform in ±1/sqrt(in), as PEFT starts it, and B zero: the network begins as its base."""
        bound = self.in_features**-0.5
        parallel.put(self.lora_A, torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        parallel.put(self.lora_B, torch.zeros(()).expand(self.lora_B.shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.product(x)
        drops = self.training and self.dropout > 0
        rows = x.reshape(-1, x.shape[-1])
        inner = F.dropout(rows, self.dropout) if drops else None
        weight, a, b = (parallel.local(matrix) for matrix in (self.weight, self.lora_A, self.lora_B))
        out: Tensor = _LowRank.apply(rows, inner, weight, self.bias, a, b, self.scale, self.quick)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])

    def product(self, x: Tensor) -> Tensor:
        """What the layer was before it was adapted."""
        weight = parallel.local(self.weight)
        quick = self.quick and not (torch.is_grad_enabled() and x.requires_grad)
        return quick_product(x, weight) if quick else F.linear(x, weight, self.bias)

    def merged(self) -> Tensor:
        """W + scale B A, added in float32 and cast once; of a head in parts this rank's rows of it."""
        weight, a, b = (parallel.own_part(matrix)[0] for matrix in (self.weight, self.lora_A, self.lora_B))
        return parallel.like(self.weight, torch.addmm(weight.float(), b, a, alpha=self.scale).to(weight.dtype))


class LoRAHead(LoRALinear):
    """An adapter on the head, whose rows, and those of B with them, may be spread over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if not parallel.is_part(self.weight):
            return super().forward(x)
        adapter = self.adapter(x) if self.enabled else {}
        return parallel.logits(x, self.weight, **adapter)

    def adapter(self, x: Tensor) -> dict[str, Tensor]:
        """What a product of x (N, D) with the vocabulary takes besides the weight: low = scale dropout(x) Aᵀ (N, r), and
        up = B (V, r)."""
        a = (parallel.head_factor(self.lora_A) * self.scale).to(x.dtype)
        return {"low": F.dropout(x, self.dropout, self.training) @ a.T, "up": parallel.local(self.lora_B).to(x.dtype)}


class _LowRank(torch.autograd.Function):
    """The adapted product; every addition is made inside a matrix product, so no (N, out) tensor is made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        quick: bool,
    ) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        source = x if inner is None else inner
        low = _product(quick)(source, a)
        whole = quick_product(x, weight) if quick else F.linear(x, weight, bias)
        out = whole.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(source, low, weight, a, b)
        ctx.scale, ctx.dropped, ctx.quick = scale, inner is not None, quick
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, low, weight, a, b = ctx.saved_tensors
        grad, product = grads[0], _product(ctx.quick)
        d_low = product(grad, b.T).mul_(ctx.scale)
        d_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        d_inner = d_low @ a if ctx.dropped and ctx.needs_input_grad[1] else None
        if d_x is not None and not ctx.dropped:
            d_x.addmm_(d_low, a)
        d_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        d_a = product(d_low.T, source.T).float() if ctx.needs_input_grad[4] else None
        d_b = product(low.T, grad.T).T.float().mul_(ctx.scale) if ctx.needs_input_grad[5] else None
        return d_x, d_inner, None, d_bias, d_a, d_b, None, None


def _product(quick: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """x Wᵀ: (N, in), (out, in) -> (N, out)."""
    return quick_product if quick else F.linear


def targets_of(network: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linear layers that target names stand for: a last part (`q_proj`), a whole name, a part that holds several
    (`language_model`, `vision_model`, `cross_attn`), or `all-linear`, which is every linear layer but the head; the head
    comes in by its own name."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for target in wanted:
        hits = {n for n in linear if _hits(n, target)}
        if not hits:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(f"--targets {target}: no such linear layer; there are {', '.join(ends)} and {ALL_LINEAR}")
        found |= hits
    return [name for name in linear if name in found]


def _hits(name: str, target: str) -> bool:
    if target == ALL_LINEAR:
        return name.rpartition(".")[2] != HEAD
    return f".{target}." in f".{name}."


def attach(
    network: nn.Module,
    targets: str | Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze the network and put a fresh adapter on each target; returns the names of the adapted layers."""
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ConfigError(
            f"rank {rank}, alpha {alpha}, dropout {dropout}: wanted rank >= 1, alpha > 0, 0 <= dropout < 1"
        )
    names = targets_of(network, targets)
    network.requires_grad_(False)
    for name in names:
        _replace(network, name, rank, alpha / math.sqrt(rank) if rslora else alpha / rank, dropout)
    start(network, seed)
    return names


def start(network: nn.Module, seed: int) -> None:
    """Give every adapter the values that it begins with; one on the meta device gets them when it has room for them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted(network).values():
        if not layer.weight.is_meta:
            layer.start(generator)


def load(network: nn.Module, adapter: Adapter, *, trainable: bool = False) -> None:
    """Freeze the network and put a stored adapter on it, which is frozen too unless `trainable`.

    A layer that the network lacks, or one of another shape, is refused by name.
    """
    network.requires_grad_(False)
    adapter.check_base(network)
    modules = dict(network.named_modules())
    for name, (a, b) in adapter.tensors.items():
        base = modules.get(name)
        if not isinstance(base, nn.Linear):
            raise CheckpointError(f"{adapter.folder}: adapts {name}, which this model has not; give its own base model")
        wanted = (a.shape[0], base.in_features), (base.out_features, a.shape[0])
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            found = f"A {list(a.shape)}, B {list(b.shape)}"
            raise CheckpointError(
                f"{adapter.folder}: {name} has {found}; wanted A {list(wanted[0])}, B {list(wanted[1])}; "
                f"give the base model that the adapter was trained on"
            )
        layer = _replace(
            network, name, a.shape[0], adapter.scaling(name), float(adapter.config.get("lora_dropout", 0.0))
        )
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)
    take_up(network, adapter)


def take_up(network: nn.Module, adapter: Adapter) -> None:
    """Give the adapters of a network the values that are stored."""
    layers = adapted(network)
    for name, (a, b) in adapter.tensors.items():
        parallel.put(layers[name].lora_A, a)
        parallel.put(layers[name].lora_B, b)


def _replace(network: nn.Module, name: str, rank: int, scale: float, dropout: float) -> LoRALinear:
    parent, _, last = name.rpartition(".")
    holder = network.get_submodule(parent)
    base = getattr(holder, last)
    if isinstance(base, LoRALinear):
        raise ConfigError(f"{name} has an adapter already; merge it first, or start from it with --adapter")
    kind = LoRAHead if isinstance(base, Head) else LoRALinear
    layer = kind(base, rank, scale, dropout).train(network.training)
    setattr(holder, last, layer)
    return layer


def short_names(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Adapted layers as an adapter's config names them: by their last part, where that names no other layer."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    return ends if set(targets_of(network, ends)) == set(names) else sorted(names)


def adapted(network: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALinear)}


def tensors(network: nn.Module) -> dict[str, Pair]:
    """(A, B) of each adapted layer, by name; whole on every rank where they are spread over several."""
    return {
        name: (parallel.whole(layer.lora_A.detach()), parallel.whole(layer.lora_B.detach()))
        for name, layer in adapted(network).items()
    }


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """The network as its base, for as long as the block lasts: DPO's reference."""
    layers = list(adapted(network).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merged_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain checkpoint that equals network + adapter, one by one. A head that is tied to the
    embedding and adapted is written under its own name, since the two then differ."""
    layers = adapted(network)
    held = {id(p): n for n, p in network.named_parameters() if not _end(n).startswith("lora_")}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if last.startswith("lora_"):
            continue
        if owner in layers and last == "weight":
            yield name, layers[owner].merged()
        elif held[id(parameter)] == name:
            yield name, parameter.detach()


def _end(name: str) -> str:
    return name.rpartition(".")[2]
