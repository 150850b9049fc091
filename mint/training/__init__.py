"""Token pairs -> an adapter: the loop over steps, with accumulation, clipping, schedule, evaluation, checkpoint, resume.

A run that is resumed makes the same numbers, bit for bit, as one that was never interrupted.

Nothing of a step waits for a GPU: it is launched whole, and its numbers are read when the next one has been launched, so
the GPU always has work. What is to outlive the process (a checkpoint, an evaluation) is made of steps that were read.

On several ranks each has the whole adapter and takes its share of a step's pairs; sums and gradients are added up before
the optimiser moves, so all ranks stay equal. The first one alone writes.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from .. import parallel
from ..config import AlignSettings
from ..decoders import Decoder, lora
from ..devices import keep_freed_memory, peak_memory, threads_for
from ..errors import ConfigError, RecordError, Stopped
from ..images import content_key
from ..losses import OBJECTIVES
from ..progress import Progress, progress
from ..schedules import scheduled
from ..signals import asked_to_stop
from ..transfer import arriving, sent
from ..weights.adapters import write_adapter
from ..weights.states import load_state, random_states, save_state, take_up_random_states
from . import runs
from .batches import (
    CHOSEN,
    PATHS,
    REJECTED,
    Batch,
    TokenPair,
    batch,
    step_pairs,
    steps_per_epoch,
    total_steps,
)
from .gradients import Gradients
from .launched import Launched
from .objectives import METRICS, batch_loss, likelihood_tokens, objective_batch
from .rounds import rounds


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
    reference: Tensor | None = None  # (pairs, 2), the reference's log-probabilities; rows as in `place`
    asked: Callable[[], bool] = lambda: False  # whether this process was asked to stop
    stopping: bool = False  # whether any rank was
    read_at: float = 0.0  # when the numbers of a step were last read

    def __post_init__(self) -> None:
        if self.decoder.device.type == "cpu":  # activations are computed again where memory counts more than time
            keep_freed_memory(not self.decoder.network.model.recompute)
        layers = lora.adapted(self.decoder.network)
        self.weights = {
            f"{name}.{side}": getattr(layer, side) for name, layer in layers.items() for side in ("lora_A", "lora_B")
        }
        on_gpu = self.decoder.device.type == "cuda"
        self.behind = int(on_gpu)  # steps that may be under way when the next one is launched
        groups = [{"params": alike} for alike in parallel.kinds(list(self.weights.values()))]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.settings.lr, weight_decay=self.settings.weight_decay, fused=on_gpu or None
        )
        self.place = {pair.id: at for at, pair in enumerate((*self.pairs, *self.held_out))}
        self.total = total_steps(len(self.pairs), self.settings)
        self.fingerprint = ""

    def run(self, resume: bool = False) -> None:
        """All steps to the end, from the beginning or from the last checkpoint; leaves the best adapter in adapter/.

        A run that is asked to stop ends its step, saves and raises `Stopped`, on all ranks after the same step.
        """
        torch.manual_seed(self.settings.seed + _APART * parallel.share())
        self.fingerprint = fingerprint([*self.pairs, *self.held_out])
        state = parallel.from_first(runs.read_state(self.folder) if resume and parallel.first() else None)
        if state is not None:
            self.load(state)
        if parallel.first():
            self.metrics = runs.Metrics(self.folder, self.step)
        with asked_to_stop() as self.asked, threads_for(self.decoder.network):
            self.remember_reference()
            self.decoder.network.train()
            self.walk()
        self.decoder.network.eval()
        parallel.barrier()

    def walk(self) -> None:
        """The steps that are left."""
        under_way: deque[Launched] = deque()
        with Progress("training", self.total, "step", self.step) as bar:
            while self.step < self.total:
                under_way.append(self.launch())
                while len(under_way) > (0 if self.stopping or self.evaluates() or self.saves() else self.behind):
                    row = self.read(under_way.popleft())
                    if parallel.first():
                        self.metrics.add(row)
                    bar.advance(1, f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s")
                if not under_way:
                    self.after_step()
                if self.stopping and self.step < self.total:
                    raise Stopped(f"stopped after step {self.step} of {self.total}, which is saved", str(self.folder))

    def advance(self) -> dict[str, Any]:
        """One step of the optimiser, to its end; returns its line of metrics."""
        return self.read(self.launch())

    def launch(self) -> Launched:
        """One step of the optimiser, which nothing waits for."""
        start = time.perf_counter()
        members = step_pairs(self.pairs, self.step, self.settings)
        warmup = math.ceil(self.settings.warmup * self.total)
        rate = self.settings.lr * scheduled(self.step, self.total, self.settings.schedule, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals, tokens = self.accumulate(members)
        numbers = arriving(torch.cat([totals, self.clip().reshape(1).to(totals)]))
        launched = Launched(self.step + 1, members, rate, tokens, start, numbers)
        if not self.behind:  # the numbers are here: what is none gets not even into this process's adapter
            launched.refuse_not_finite()
        self.optimizer.step()
        self.step += 1
        return launched

    def read(self, launched: Launched) -> dict[str, Any]:
        """Wait for the numbers of a step; returns its line of metrics."""
        launched.refuse_not_finite()
        before, self.read_at = max(launched.start, self.read_at), time.perf_counter()
        asked, peak = parallel.highest(self.asked(), peak_memory(self.decoder.device))
        self.stopping = bool(asked)
        epoch = launched.step / steps_per_epoch(len(self.pairs), self.settings.batch_size)
        return launched.metrics(self.settings, epoch, self.read_at - before, int(peak))

    def accumulate(self, members: Sequence[TokenPair]) -> tuple[Tensor, int]:
        """Forward and backward over the batches of a step: METRICS and the tokens computed, summed over all ranks,
        as the gradients are."""
        totals, tokens = torch.zeros(len(METRICS), dtype=torch.float64, device=self.decoder.device), 0
        pooled = likelihood_tokens(members, self.settings)
        groups = self.rounds(members)
        gradients = Gradients(list(self.weights.values()), len(groups))
        for group, counted in groups:
            if not group:
                continue
            part = objective_batch(group, self.settings)
            logp = self.decoder.token_logp(part.tree)
            part = Batch(part.pairs, part.tree.to(self.decoder.device), part.apart)
            loss, metrics = batch_loss(logp, part, self.settings, pooled, len(members), self.held(group))
            if loss.requires_grad:
                (loss if counted else loss * 0.0).backward()
                gradients.take()
            if counted:
                totals, tokens = totals + metrics, tokens + len(part.tree)
        computed = torch.tensor([tokens])
        parallel.add_up([totals, computed])
        if torch.is_grad_enabled():
            gradients.finish()
        return totals, int(computed)

    def rounds(self, pairs: Sequence[TokenPair]) -> list[tuple[list[TokenPair], bool]]:
        """This rank's batches of some pairs, and whether they count."""
        return rounds(pairs, self.settings, self.decoder.picture_tokens)

    def clip(self) -> Tensor:
        """Shorten the gradients to the longest norm that is allowed; returns the norm before."""
        weights, longest = list(self.weights.values()), self.settings.max_grad_norm or math.inf
        norm = parallel.total_norm([weight.grad for weight in weights if weight.grad is not None])
        for alike in parallel.kinds(weights):
            clip_grads_with_norm_(alike, longest, norm)
        return norm

    def after_step(self) -> None:
        """Evaluate and save when it is time. The checkpoint comes last, so a run ended before it does all of this again."""
        if self.evaluates():
            self.evaluate()
        if self.step == self.total and self.best == math.inf:
            self.write_adapter()
        if self.stopping or self.saves():
            self.save()

    def evaluates(self) -> bool:
        """Whether an evaluation follows the last step that was launched."""
        every = self.settings.eval_every or steps_per_epoch(len(self.pairs), self.settings.batch_size)
        return bool(self.held_out) and (self.step == self.total or self.step % every == 0)

    def saves(self) -> bool:
        """Whether a checkpoint does."""
        every = self.settings.save_every
        return self.step == self.total or bool(every and self.step % every == 0)

    def evaluate(self) -> None:
        """The loss on the held-out pairs; the adapter is written when it is the best so far."""
        self.decoder.network.eval()
        with torch.no_grad():
            totals, _ = self.accumulate(self.held_out)
        self.decoder.network.train()
        values = dict(zip(METRICS, totals.tolist(), strict=True))
        shown = {name: value for name, value in values.items() if math.isfinite(value)}
        if parallel.first():
            runs.add_evaluation(self.folder, {"step": self.step, **shown})
        if values["loss"] < self.best:
            self.best = values["loss"]
            self.write_adapter()

    def write_adapter(self) -> None:
        tensors = lora.tensors(self.decoder.network)
        if parallel.first():
            write_adapter(self.folder / "adapter", self.adapter_config, tensors, self.decoder.checkpoint.name)

    def held(self, group: Sequence[TokenPair]) -> Tensor | None:
        """The reference's log-probabilities of these pairs: (b, 2)."""
        if self.reference is None:
            return None
        return sent(self.reference[[self.place[pair.id] for pair in group]], self.decoder.device)

    def remember_reference(self) -> None:
        """Summed log-probabilities of all answers with the adapter off, once for the whole run."""
        if not OBJECTIVES[self.settings.objective].reference or self.reference is not None:
            return
        found = torch.zeros(len(self.place), 2, dtype=torch.float64)
        groups = self.rounds([*self.pairs, *self.held_out])
        with torch.no_grad(), lora.switched_off(self.decoder.network):
            for group, counted in progress(groups, "reference", len(groups), "group"):
                sums = self.answer_sums(group) if group else torch.zeros(0, 2)
                if counted:
                    found[[self.place[pair.id] for pair in group]] = sums
                if parallel.highest(self.asked())[0]:
                    raise Stopped("stopped before the first step; nothing is lost", str(self.folder))
        parallel.add_up([found])
        self.reference = found

    def answer_sums(self, group: Sequence[TokenPair]) -> Tensor:
        """Summed log-probabilities of the chosen and the rejected answer of each pair: (b, 2) on the processor."""
        part = batch(group, with_prompt=False)
        sums = part.tree.path_sums(self.decoder.token_logp(part.tree).cpu().double()).view(-1, PATHS)
        return sums[:, [CHOSEN, REJECTED]]

    def save(self) -> None:
        """Everything that the rest of the run depends on; each rank writes what it alone has."""
        best = self.best if self.best < math.inf else None
        facts = {"step": self.step, "best": best, "pairs": self.fingerprint}
        save_state(self.folder / runs.CHECKPOINT, self.state() | random_states(self.decoder.device), facts)

    def load(self, facts: Mapping[str, Any]) -> None:
        """Take up what `save` wrote, on however many ranks."""
        if facts["pairs"] != self.fingerprint:
            source = self.settings.pairs or "pairs"
            begun = f"{self.folder} was begun with"
            raise ConfigError(f"{source}: not the pairs that {begun}, or an image has changed; start a new run")
        self.step, self.best = facts["step"], math.inf if facts["best"] is None else facts["best"]
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()  # makes the moments; they and the weights are then overwritten
        if OBJECTIVES[self.settings.objective].reference:
            self.reference = torch.zeros(len(self.place), 2, dtype=torch.float64)
        torch.manual_seed(self.settings.seed + _APART * parallel.share() + self.step)  # for a rank that was not there
        random = random_states(self.decoder.device) if parallel.rank() < facts["ranks"] else {}
        load_state(self.folder / runs.CHECKPOINT, self.state() | random)
        take_up_random_states(random, self.decoder.device, self.folder / runs.CHECKPOINT)

    def state(self) -> dict[str, Tensor]:
        """The trained weights, the optimiser's moments and count of steps of each, and the reference; where they are."""
        tensors = dict(self.weights)
        for name, weight in self.weights.items():
            tensors |= {f"{name}.{part}": value for part, value in self.optimizer.state[weight].items()}
        return tensors if self.reference is None else {**tensors, "reference": self.reference}


_APART = 1_000_003
"""Between the seeds of two ranks, whose dropout must differ."""


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
