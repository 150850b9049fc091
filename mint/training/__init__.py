"""Token pairs -> an adapter: the loop over steps, with accumulation, clipping, schedule, evaluation, checkpoint, resume.

A run that is resumed makes the same numbers, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import AlignSettings
from ..decoders import Decoder, lora
from ..devices import keep_freed_memory, peak_memory
from ..errors import ConfigError, RecordError, WorkError
from ..images import content_key
from ..losses import OBJECTIVES
from ..progress import Progress, progress
from ..schedules import scheduled
from ..weights.adapters import write_adapter
from . import runs
from .batches import CHOSEN, PATHS, REJECTED, Batch, TokenPair, batch, split, step_pairs, steps_per_epoch, total_steps
from .objectives import METRICS, batch_loss, likelihood_tokens, objective_batch


@dataclass
class Trainer:
    """A decoder with an adapter, on its way through the steps of a run."""

    decoder: Decoder
    settings: AlignSettings
    folder: Path
    pairs: Sequence[TokenPair]
    held_out: Sequence[TokenPair] = ()
    adapter_config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    best: float = math.inf
    reference: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # activations are computed again where memory counts more than time: then what is freed goes back
        if self.decoder.device.type == "cpu" and not self.decoder.network.model.recompute:
            keep_freed_memory()
        layers = lora.adapted(self.decoder.network)
        self.weights = {
            f"{name}.{side}": getattr(layer, side) for name, layer in layers.items() for side in ("lora_A", "lora_B")
        }
        on_gpu = self.decoder.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=self.settings.lr, weight_decay=self.settings.weight_decay, fused=on_gpu or None
        )
        self.total = total_steps(len(self.pairs), self.settings)
        self.fingerprint = ""

    def run(self, resume: bool = False) -> None:
        """All steps to the end, from the beginning or from the last checkpoint; leaves the best adapter in adapter/."""
        torch.manual_seed(self.settings.seed)
        self.fingerprint = fingerprint([*self.pairs, *self.held_out])
        state = runs.load_state(self.folder) if resume else None
        if state is not None:
            self.load(*state)
        self.metrics = runs.Metrics(self.folder, self.step)
        self.remember_reference()
        self.decoder.network.train()
        with Progress("training", self.total, "step", self.step) as bar:
            while self.step < self.total:
                row = self.advance()
                self.metrics.add(row)
                bar.advance(1, f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s")
                self.after_step()
        self.decoder.network.eval()

    def advance(self) -> dict[str, Any]:
        """One step of the optimiser; returns its line of metrics."""
        start = time.perf_counter()
        members = step_pairs(self.pairs, self.step, self.settings)
        warmup = math.ceil(self.settings.warmup * self.total)
        rate = self.settings.lr * scheduled(self.step, self.total, self.settings.schedule, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals, tokens = self.accumulate(members)
        norm = torch.nn.utils.clip_grad_norm_(
            self.weights.values(), self.settings.max_grad_norm or math.inf, foreach=self.decoder.device.type == "cuda"
        )
        *values, gradient = torch.cat([totals, norm.detach().reshape(1).to(totals)]).tolist()
        self.refuse_not_finite(values, gradient, members)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        row = dict(zip(METRICS, values, strict=True))
        if not OBJECTIVES[self.settings.objective].preference:
            row.update({name: None for name in METRICS if name not in ("loss", "nll_loss", "logps/chosen")})
        epoch = self.step / steps_per_epoch(len(self.pairs), self.settings.batch_size)
        facts = {"grad_norm": gradient, "learning_rate": rate, "tokens": tokens, "tokens_per_second": tokens / seconds}
        return {
            "step": self.step,
            "epoch": round(epoch, 6),
            **row,
            **facts,
            "step_seconds": seconds,
            "peak_memory_bytes": peak_memory(self.decoder.device),
        }

    def accumulate(self, members: Sequence[TokenPair]) -> tuple[Tensor, int]:
        """Forward and backward over the batches of a step: summed METRICS, and the tokens computed."""
        totals, tokens = torch.zeros(len(METRICS), device=self.decoder.device), 0
        pooled = likelihood_tokens(members, self.settings)
        for group in split(members, self.settings.tokens_per_batch, self.decoder.picture_tokens):
            part = objective_batch(group, self.settings)
            logp = self.decoder.token_logp(part.tree)
            part = Batch(part.pairs, part.tree.to(self.decoder.device), part.apart)
            loss, metrics = batch_loss(logp, part, self.settings, pooled, len(members), self.held(group))
            if loss.requires_grad:
                loss.backward()
            totals, tokens = totals + metrics, tokens + len(part.tree)
        return totals, tokens

    def refuse_not_finite(self, values: Sequence[float], gradient: float, members: Sequence[TokenPair]) -> None:
        """Stop before a step that is not a number gets into the adapter."""
        if math.isfinite(gradient) and all(map(math.isfinite, values[:2])):
            return
        names = ", ".join(repr(pair.id) for pair in members)
        raise WorkError(
            f"step {self.step + 1}: loss {values[0]}, gradient norm {gradient}; pairs of the step: {names}; nothing of it "
            f"was kept and the last checkpoint is intact: start again with a lower --lr, or without these pairs"
        )

    def after_step(self) -> None:
        """Evaluate and save when it is time. The checkpoint comes last, so a run ended before it does all of this again."""
        last = self.step == self.total
        every = self.settings.eval_every or steps_per_epoch(len(self.pairs), self.settings.batch_size)
        if self.held_out and (last or self.step % every == 0):
            self.evaluate()
        if last and self.best == math.inf:
            self.write_adapter()
        if last or (self.settings.save_every and self.step % self.settings.save_every == 0):
            self.save()

    def evaluate(self) -> None:
        """The loss on the held-out pairs; the adapter is written when it is the best so far."""
        self.decoder.network.eval()
        with torch.no_grad():
            totals, _ = self.accumulate(self.held_out)
        self.decoder.network.train()
        values = dict(zip(METRICS, totals.tolist(), strict=True))
        shown = {name: value for name, value in values.items() if math.isfinite(value)}
        runs.add_evaluation(self.folder, {"step": self.step, **shown})
        if values["loss"] < self.best:
            self.best = values["loss"]
            self.write_adapter()

    def write_adapter(self) -> None:
        tensors = lora.tensors(self.decoder.network)
        write_adapter(self.folder / "adapter", self.adapter_config, tensors, self.decoder.checkpoint.name)

    def held(self, group: Sequence[TokenPair]) -> Tensor | None:
        """The reference's log-probabilities of these pairs: (b, 2)."""
        if not OBJECTIVES[self.settings.objective].reference:
            return None
        return torch.stack([self.reference[pair.id] for pair in group]).to(self.decoder.device)

    def remember_reference(self) -> None:
        """Summed log-probabilities of all answers with the adapter off, once for the whole run."""
        if not OBJECTIVES[self.settings.objective].reference or self.reference:
            return
        everything = [*self.pairs, *self.held_out]
        groups = list(split(everything, self.settings.tokens_per_batch, self.decoder.picture_tokens))
        with torch.no_grad(), lora.switched_off(self.decoder.network):
            for group in progress(groups, "reference", len(groups), "group"):
                part = batch(group, with_prompt=False)
                sums = part.tree.path_sums(self.decoder.token_logp(part.tree).cpu()).view(-1, PATHS)
                for pair, row in zip(group, sums[:, [CHOSEN, REJECTED]], strict=True):
                    self.reference[pair.id] = row

    def save(self) -> None:
        """Everything that the rest of the run depends on, in one file."""
        tensors = self.state() | {"random.cpu": torch.get_rng_state()}
        if self.reference:
            tensors["reference"] = torch.stack([self.reference[pair.id] for pair in (*self.pairs, *self.held_out)])
        if self.decoder.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.decoder.device)
        best = self.best if self.best < math.inf else None
        runs.save_state(self.folder, tensors, {"step": self.step, "best": best, "pairs": self.fingerprint})

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up what `save` wrote."""
        if state["pairs"] != self.fingerprint:
            source = self.settings.pairs or "pairs"
            begun = f"{self.folder} was begun with"
            raise ConfigError(f"{source}: not the pairs that {begun}, or an image has changed; start a new run")
        self.step, self.best = state["step"], math.inf if state["best"] is None else state["best"]
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()  # makes the moments; they and the weights are then overwritten
        runs.check_state(self.folder, tensors, self.state())
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(tensors[name])
        if "reference" in tensors:
            names = [pair.id for pair in (*self.pairs, *self.held_out)]
            self.reference = dict(zip(names, tensors["reference"], strict=True))
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.decoder.device)

    def state(self) -> dict[str, Tensor]:
        """The trained weights, and the optimiser's moments and count of steps of each, by name."""
        tensors = dict(self.weights)
        for name, weight in self.weights.items():
            tensors |= {f"{name}.{part}": value for part, value in self.optimizer.state[weight].items()}
        return tensors


def fingerprint(pairs: Sequence[TokenPair]) -> str:
    """A number that tells these pairs and the content of their images from any others."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr((pair.id, pair.chosen_first, pair.rejected_first)).encode())
        digest.update(array("q", [*pair.chosen, -1, *pair.rejected, -1]).tobytes())
    pictured = [pair for pair in pairs if pair.image is not None]
    for pair in progress(pictured, "looking at images", len(pictured), "image") if pictured else ():
        try:
            digest.update(content_key(pair.image))
        except RecordError as fault:
            raise RecordError(f"pair {pair.id!r}: {fault}") from fault
    return digest.hexdigest()
