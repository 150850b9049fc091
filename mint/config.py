"""Settings of a run, checked against each other, and what `auto` stands for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch

from .errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device by name; `auto` is the first GPU where there is one."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device}: no such device; wanted auto, cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no CUDA device that torch can use; give cpu or auto")
    return found


def pick_dtype(dtype: str | torch.dtype, device: torch.device, stored: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype by name. `auto` is that of the checkpoint, but bfloat16 only where products in it are not slower."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}: wanted auto, float32 or bfloat16")
        return DTYPES[dtype]
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    return torch.bfloat16 if device.type in ("cuda", "meta") or fast_bfloat16() else torch.float32


@cache
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones: tried once, in some milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        return min(_timed(lambda: x @ x) for _ in range(4))

    return seconds(torch.bfloat16) < seconds(torch.float32)


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class AlignSettings:
    """Every setting of a training run. The defaults are the paper's where it names one."""

    model: str = ""
    pairs: str = ""
    out: str = "runs/align"
    adapter: str | None = None  # start from this adapter
    objective: str = "orpo"
    beta: float = 0.1  # weight of the odds ratio (ORPO), temperature of the margin (DPO, IPO, SimPO)
    nll: str | None = None  # tokens of the likelihood: prompt+chosen (ORPO's official code) or chosen (None for SFT)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    epochs: float = 3.0
    steps: int | None = None  # ends the run earlier
    batch_size: int = 8  # pairs of a step, over all ranks
    tokens_per_batch: int = 8192  # tokens that go through the network together; more accumulate
    max_length: int = 2048  # tokens of prompt and answer
    max_prompt_length: int | None = None
    lr: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps
    recompute: bool | None = None  # activation checkpointing; None: when memory asks for it
    held_out: float = 0.0  # share of the pairs kept for evaluation
    eval_every: int = 0  # steps between evaluations; 0: at the end of each epoch
    save_every: int = 100  # steps between checkpoints
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    date: str | None = None

    def __post_init__(self) -> None:
        for name, (fits, wanted) in _WANTED.items():
            value = getattr(self, name)
            if not fits(value):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: wanted {wanted}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            limits = f"--max-prompt-length {self.max_prompt_length}, --max-length {self.max_length}"
            raise ConfigError(f"{limits}: the prompt must leave room for an answer")

    @property
    def scope(self) -> str:
        """The tokens that the likelihood is pooled over, resolved: ORPO takes the prompt in, SFT the answer alone."""
        return self.nll or ("prompt+chosen" if self.objective == "orpo" else "chosen")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "run.json") -> AlignSettings:
        """The settings of a run.json; a name that is no setting is refused."""
        known = {field.name: field for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"{where}: {name} is no setting; wanted some of {', '.join(known)}")
            if not _same_kind(value, known[name].default):
                raise ConfigError(f"{where}: {name} is {value!r}; wanted a value like {known[name].default!r}")
        settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**settings)


def _same_kind(value: Any, default: Any) -> bool:
    if default is None or value is None:
        return value is None or isinstance(value, str | int | float | bool)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, type(default))


def _within(low: float, high: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: value is None or low <= value <= high


_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "objective": (lambda v: v in ("orpo", "dpo", "sft", "simpo", "ipo"), "orpo, dpo, sft, simpo or ipo"),
    "beta": (_within(1e-9, 1e6), "a positive number"),
    "nll": (lambda v: v in (None, "prompt+chosen", "chosen"), "prompt+chosen or chosen"),
    "rank": (_within(1, 65536), "a whole number of at least 1"),
    "alpha": (_within(1e-9, 1e6), "a positive number"),
    "dropout": (lambda v: 0 <= v < 1, "a share below 1"),
    "epochs": (_within(1e-9, 1e6), "a positive number"),
    "steps": (_within(1), "at least 1"),
    "batch_size": (_within(1), "at least 1"),
    "tokens_per_batch": (_within(1), "at least 1"),
    "max_length": (_within(2), "at least 2"),
    "lr": (_within(0, 1e3), "a number from 0 up"),
    "weight_decay": (_within(0, 1e3), "a number from 0 up"),
    "max_grad_norm": (_within(0), "a positive number, or 0 for no clipping"),
    "schedule": (lambda v: v in ("cosine", "linear", "constant"), "cosine, linear or constant"),
    "warmup": (_within(0, 1), "a share of the steps"),
    "held_out": (lambda v: 0 <= v < 1, "a share below 1"),
    "eval_every": (_within(0), "at least 0"),
    "save_every": (_within(0), "at least 0"),
}
