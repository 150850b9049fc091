"""The student in its two roles: with the adapter that will be trained, or with one that it answers by. Each process has all
of it, or the processes hold it together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import parallel
from ..config import AlignSettings
from ..errors import ConfigError
from . import Decoder, load_decoder, lora, open_adapter
from .spread import load_spread


def to_train(settings: AlignSettings, weights: bool = True) -> tuple[Decoder, dict[str, Any]]:
    """The decoder with the adapter that will be trained, and what PEFT has to know of it; or its shapes without weights."""
    if not settings.model:
        raise ConfigError("--model: no decoder given; wanted a checkpoint folder or a hub name")
    if settings.spread and weights:
        return _spread_to_train(settings)
    parallel.apart()
    decoder = load_decoder(
        settings.model,
        device=settings.device if weights else "meta",
        dtype=settings.dtype,
        date=settings.date,
        meta_masking=settings.meta_masking,
    )
    return decoder, _adapt(decoder.network, settings)[0]


def _spread_to_train(settings: AlignSettings) -> tuple[Decoder, dict[str, Any]]:
    """The same, with each rank holding a part of it."""
    _check_several(settings.shard)
    config: dict[str, Any] = {}

    def adapt(network: Any) -> Callable[[Any], None]:
        made, values = _adapt(network, settings)
        config.update(made)
        return values

    decoder = load_spread(
        settings.model,
        adapt,
        device=settings.device,
        dtype=settings.dtype,
        date=settings.date,
        meta_masking=settings.meta_masking,
        shard=settings.shard,
        tensor=settings.tensor_parallel,
    )
    return decoder, config


def to_ask(model: str | Path, adapter: str | Path | None, shard: bool, tensor: int | None, **loading: Any) -> Decoder:
    """The decoder that is asked, of which each rank holds a part where it is spread."""
    if not shard and tensor is None:
        parallel.apart()
        return load_decoder(model, adapter=adapter, **loading)
    _check_several(shard)

    def adapt(network: Any) -> Callable[[Any], None]:
        if adapter is None:
            return lambda _: None
        stored = open_adapter(network, adapter)
        lora.load(network, stored)
        return lambda network: lora.take_up(network, stored)

    return load_spread(model, adapt, shard=shard, tensor=tensor, **loading)


def _check_several(shard: bool) -> None:
    if parallel.size() == 1:
        option = "--shard" if shard else "--tensor-parallel"
        raise ConfigError(
            f"{option}: spreads the decoder over several processes; start them with torchrun, or leave it out (a run that is "
            f"gone on with by one process takes --no-shard --tensor-parallel 1)"
        )


def _adapt(network: Any, settings: AlignSettings) -> tuple[dict[str, Any], Callable[[Any], None]]:
    """Put the adapter that will be trained on a network: what PEFT has to know of it, and what gives it its values."""
    if settings.adapter is not None:
        adapter = open_adapter(network, settings.adapter)
        lora.load(network, adapter, trainable=True)
        return dict(adapter.config), lambda network: lora.take_up(network, adapter)
    names = lora.attach(
        network,
        settings.targets,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        rslora=settings.rslora,
        seed=settings.seed,
    )
    config: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    config |= {"use_rslora": settings.rslora, "target_modules": lora.short_names(network, names)}
    return config, lambda network: lora.start(network, settings.seed)
