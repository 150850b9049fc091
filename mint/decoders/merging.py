"""Base and adapter as one plain checkpoint, which needs no LoRA to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import alone
from ..weights.shards import write_checkpoint
from . import load_decoder, lora, stored_dtype


def merge(
    model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str = "auto", **loading: Any
) -> dict[str, Any]:
    """Base and adapter as one plain checkpoint in the official layout, unless told otherwise in the dtypes of the base."""
    with alone(out):
        _merge(model, adapter, out, dtype, **loading)
    return {"out": str(out), "bytes": sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))}


def _merge(model: str | Path, adapter: str | Path, out: str | Path, dtype: str, **loading: Any) -> None:
    decoder = load_decoder(model, adapter=adapter, dtype=dtype, **loading)
    folder, stored = decoder.checkpoint.folder, decoder.checkpoint.tensors
    if Path(out).resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the base model itself; give a new folder")
    usual = stored_dtype(decoder.checkpoint) if dtype == "auto" else decoder.dtype
    config = {**decoder.checkpoint.config, "torch_dtype": str(usual).removeprefix("torch.")}
    config.pop("dtype", None)
    if isinstance(decoder.network.lm_head, lora.LoRALinear):
        config["tie_word_embeddings"] = False
    kinds = {decoder.stored_name(info.name): info.dtype for info in stored.values()} if dtype == "auto" else {}
    merged = ((decoder.stored_name(name), tensor) for name, tensor in lora.merged_tensors(decoder.network))
    tensors = ((name, tensor.to(kinds.get(name, usual))) for name, tensor in merged)
    write_checkpoint(out, tensors, config, copy_from=folder)
