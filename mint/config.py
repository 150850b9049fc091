"""Settings of a training run: one table of names, defaults, meanings and limits, which the command line is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import ConfigError

OBJECTIVES = ("orpo", "dpo", "sft", "simpo", "ipo")
SCOPES = ("prompt+chosen", "chosen")
SCHEDULES = ("cosine", "linear", "constant")


def _of(default: Any, meaning: str, fits: Callable[[Any], bool] = lambda _: True, wanted: str = "") -> Any:
    """A setting: its default, what it means, which values fit and how to say that."""
    return field(default=default, metadata={"help": meaning, "fits": fits, "wanted": wanted})


def _one_of(default: str | None, meaning: str, names: tuple[str, ...]) -> Any:
    return _of(
        default, f"{meaning}: {', '.join(names)}.", lambda v: v is None or v in names, f"one of {', '.join(names)}"
    )


def _within(default: Any, meaning: str, low: float, high: float = float("inf")) -> Any:
    limits = f"a number of at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
    return _of(default, meaning, lambda v: v is None or low <= v <= high, limits)


@dataclass(frozen=True, slots=True)
class AlignSettings:
    """Every setting of a training run. The defaults are the paper's where it names one."""

    model: str = _of("", "Folder or hub name of the base decoder.")
    pairs: str = _of("", "Preference pairs, JSON lines, ours or TRL's.")
    image_folder: tuple[str, ...] = _of(
        (), "Folder in which pictures of --pairs may lie besides that of the file; may be given several times."
    )
    out: str = _of("runs/align", "Folder of the run.")
    adapter: str | None = _of(None, "Adapter folder to start from.")
    objective: str = _one_of("orpo", "What is minimised", OBJECTIVES)
    beta: float = _within(0.1, "Weight of the odds ratio (ORPO), or of the margin (DPO, IPO, SimPO).", 1e-9, 1e6)
    nll: str | None = _one_of(
        None, "Tokens of the likelihood (ORPO's unless given: prompt+chosen, SFT's: chosen)", SCOPES
    )
    first_weight: float = _within(
        1.0,
        "How many times the chosen answer counts in the likelihood up to its first name; 1: once, as in the paper.",
        1e-6,
        1e6,
    )
    rank: int = _within(16, "Rank of the adapter.", 1, 65536)
    alpha: float = _within(32.0, "Scale of the adapter, over its rank.", 1e-9, 1e6)
    dropout: float = _within(0.0, "Share of the adapter's inputs that is dropped.", 0, 0.999)
    rslora: bool = _of(False, "Scale by the square root of the rank.")
    targets: tuple[str, ...] = _of(
        ("all-linear",), "Layers to adapt, by name, comma between; all-linear: all but lm_head."
    )
    epochs: float = _within(3.0, "Passes over the pairs.", 1e-9, 1e6)
    steps: int | None = _within(None, "Steps of the run, in place of --epochs.", 1)
    batch_size: int = _within(8, "Pairs of a step, over all ranks.", 1)
    tokens_per_batch: int = _within(8192, "Tokens that go through the network together; the rest accumulates.", 1)
    max_length: int = _within(2048, "Tokens of a prompt with its answer.", 2)
    max_prompt_length: int | None = _within(None, "Tokens of a prompt.", 1)
    lr: float = _within(1e-4, "Learning rate at its highest.", 0, 1e3)
    weight_decay: float = _within(0.0, "Weight decay of AdamW.", 0, 1e3)
    max_grad_norm: float = _within(1.0, "Gradients are clipped to this norm; 0: never.", 0)
    schedule: str = _one_of("cosine", "Shape of the learning rate", SCHEDULES)
    warmup: float = _within(0.05, "Share of the steps over which the learning rate rises.", 0, 1)
    recompute: bool | None = _of(
        None, "Keep only each layer's input for backward; unless given: when memory asks for it."
    )
    shard: bool = _of(
        False, "Spread the decoder over the ranks that torchrun started, each with pairs of its own (FSDP2)."
    )
    tensor_parallel: int | None = _within(
        None, "Ranks that hold one copy of the decoder together and share each product; 1: none.", 1
    )
    cache_gb: float = _within(20.0, "GB on disk for what a frozen image tower makes of the pictures; 0: not kept.", 0)
    meta_masking: bool = _of(
        False, "Text before an image sees nothing of it, as in Meta's code, not as in transformers."
    )
    held_out: float = _within(0.0, "Share of the pairs kept for evaluation.", 0, 0.9)
    eval_every: int = _within(0, "Steps between evaluations; 0: after each epoch.", 0)
    save_every: int = _within(100, "Steps between checkpoints; 0: only at the end.", 0)
    seed: int = _within(0, "Seed of everything random.", 0, 2**31)
    device: str = _of("auto", "auto, cpu or cuda.")
    dtype: str = _of("auto", "auto, float32 or bfloat16.")
    date: str | None = _of(None, "The date in the chat template, like '26 Jul 2024'; today's unless given.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not setting.metadata["fits"](value):
                raise ConfigError(f"--{setting.name.replace('_', '-')} {value}: wanted {setting.metadata['wanted']}")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            limits = f"--max-prompt-length {self.max_prompt_length}, --max-length {self.max_length}"
            raise ConfigError(f"{limits}: the prompt must leave room for an answer")

    @property
    def scope(self) -> str:
        """The tokens that the likelihood is pooled over: ORPO takes the prompt in, as its official code does."""
        return self.nll or ("prompt+chosen" if self.objective == "orpo" else "chosen")

    @property
    def spread(self) -> bool:
        """Whether each rank holds a part of the decoder alone."""
        return self.shard or (self.tensor_parallel or 1) > 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "run.json") -> AlignSettings:
        """The settings of a run.json; a name that is no setting, or a value of another kind, is refused."""
        known = {setting.name: setting for setting in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"{where}: {name} is no setting; wanted some of {', '.join(known)}")
            if not _same_kind(value, str(known[name].type)):
                raise ConfigError(f"{where}: {name} is {value!r}; wanted {known[name].type}")
        settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**settings)


def _same_kind(value: Any, annotation: str) -> bool:
    """Whether a JSON value is of the kind that a setting's annotation names."""
    kind, _, optional = annotation.partition(" | ")
    if value is None:
        return optional == "None"
    if kind == "tuple[str, ...]":
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
    return isinstance(value, kinds[kind])
