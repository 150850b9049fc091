"""One training run of a fusion encoder: steps, the judging after each epoch, and the state it is resumed from.

Each epoch shows every patient in three views (views.py). After it the held-out cases are ranked, and the best teacher
so far is in the folder. A run that was stopped goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import threads_for
from ..encoders.encoder import in_batches
from ..encoders.fusion import FusionEncoder
from ..encoders.teachers import write_teacher
from ..errors import ConfigError, Stopped, WorkError
from ..files import add_text, write_json, write_text
from ..jsonlines import read_metrics
from ..progress import Progress, say
from ..schedules import scheduled
from ..signals import asked_to_stop
from ..types import Record
from .snapshots import read_snapshot, restore_snapshot, save_snapshot
from .targets import class_weights, labels_of, losses, ranks
from .views import Views

STATE, METRICS, RUN = "checkpoint", "metrics.jsonl", "run.json"


@dataclass(frozen=True, slots=True)
class TeachSettings:
    """How to train. `lr` of 0 means 5e-5 on a checkpoint and 5e-4 from nothing."""

    epochs: int = 10
    lr: float = 0.0
    batch_size: int = 32
    seed: int = 0
    loss: str = "bce"  # or cross_entropy
    class_weights: str = "none"  # balanced: rare classes count as much as common ones; root: half way there
    schedule: str = "linear"  # or cosine, constant
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dtype: str = "auto"  # bfloat16: mixed precision; auto: on a GPU only
    held_out: float = 0.1  # share of the cases that the teacher is judged by, where they do not say
    save_every: int = 500  # steps between two states to resume from; each epoch ends with one
    log_every: int = 10

    def __post_init__(self) -> None:
        choices = {
            "loss": ("bce", "cross_entropy"),
            "class_weights": ("none", "balanced", "root"),
            "schedule": ("linear", "cosine", "constant"),
            "dtype": ("auto", "float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: {getattr(self, name)!r}, one of {', '.join(allowed)} was wanted")
        for name in ("epochs", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}, at least 1 was wanted")
        for name in ("lr", "warmup", "weight_decay", "max_grad_norm", "held_out"):
            if not 0 <= getattr(self, name) < (1 if name in ("warmup", "held_out") else float("inf")):
                raise ConfigError(f"{name}: {getattr(self, name)} is out of range")


class Lessons:
    """One training run: the network, its optimiser, and where it stands."""

    def __init__(
        self,
        folder: Path,
        encoder: FusionEncoder,
        train: list[Record],
        judged: list[Record],
        settings: TeachSettings,
        base: str,
    ) -> None:
        self.folder, self.encoder, self.settings, self.train, self.judged = folder, encoder, settings, train, judged
        self.views = Views(train, settings.seed)
        self.device = next(encoder.network.parameters()).device
        self.lr = settings.lr or (5e-4 if base == "nothing" else 5e-5)
        self.optimizer = _optimizer(encoder.network, self.lr, settings.weight_decay)
        self.row = {name: number for number, name in enumerate(encoder.classes)}
        self.weights = torch.tensor(class_weights(train, encoder.classes, settings.class_weights))
        self.steps_each = -(-len(self.views) // settings.batch_size)
        self.step = 0
        self.asked: Callable[[], bool] = lambda: False
        self.best: dict[str, float] = {}
        self.facts: dict[str, Any] = {"base": base, "classes": list(encoder.classes), "cases": _fingerprint(train)}
        self.facts |= asdict(settings) | {"lr": self.lr, "network": asdict(encoder.config)}

    def run(self, resume: bool) -> None:
        """All epochs. A run that is asked to stop ends its step, saves and raises `Stopped`."""
        with (
            asked_to_stop() as self.asked,
            threads_for(self.encoder.network),
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
        ):
            torch.manual_seed(self.settings.seed)
            total = self.settings.epochs * self.steps_each
            self._start(resume)
            with Progress("teaching", total - self.step, "step") as bar:
                while self.step < total:
                    self._epoch(bar)
                    if self.asked() and self.step < total:
                        self._stop(total)

    def _start(self, resume: bool) -> None:
        """Begin anew, or go on from the state on disk if it is of the same run."""
        state = self.folder / STATE
        found = read_snapshot(state) if resume else None
        if found is None:
            if resume:
                say(f"{state}: nothing to resume; starting anew")
            shutil.rmtree(state, ignore_errors=True)
            write_json(self.folder / RUN, self.facts)
            write_text(self.folder / METRICS, "")
            return
        changed = [name for name, value in self.facts.items() if found["run"].get(name) != value]
        if changed:
            name = changed[0]
            what = f"was {found['run'].get(name)!r}, is {self.facts[name]!r}"
            raise ConfigError(f"{name}: {what}; resume with the same, or start anew")
        restore_snapshot(state, self.encoder.network, self.optimizer, self.device)
        self.step, self.best = found["step"], found["best"]
        self._cut_metrics()

    def _cut_metrics(self) -> None:
        """Leave out what was logged after the state was saved: those steps are done again."""
        kept = [row for row in read_metrics(self.folder / METRICS) if row["step"] <= self.step]
        write_text(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    def _epoch(self, bar: Progress) -> None:
        """The rest of the epoch that the run stands in."""
        epoch, done = divmod(self.step, self.steps_each)
        pending: list[tuple[int, float, Tensor, Tensor]] = []
        views = self.views.epoch(epoch, done * self.settings.batch_size)
        self.encoder.network.train()
        for batch in in_batches(views, self.settings.batch_size):
            begun = time.monotonic()
            loss, norm = self._learn(batch)
            self.step += 1
            pending.append((self.step, time.monotonic() - begun, loss, norm))
            stop = self.asked() and self.step % self.steps_each > 0  # at its end an epoch is judged first
            save = stop or self.step % self.settings.save_every == 0
            if save or self.step % self.settings.log_every == 0:
                bar.advance(len(pending), f"loss {self._log(pending, epoch):.4f}")
                pending = []
            if save:
                self._save()
            if stop:
                self._stop(self.settings.epochs * self.steps_each)
        if pending:
            bar.advance(len(pending), f"loss {self._log(pending, epoch):.4f}")
        self._judge(epoch)
        self._save()

    def _stop(self, total: int) -> None:
        raise Stopped(f"stopped after step {self.step} of {total}, which is saved", str(self.folder))

    def _learn(self, batch: list[Record]) -> tuple[Tensor, Tensor]:
        """One step on a batch of views: loss and gradient norm, left on the device."""
        inputs = self.encoder.inputs(batch)
        targets = self._targets(batch)
        weights = (targets * self.weights).sum(1) / targets.sum(1)
        with self._precision():
            logits = self.encoder.network(*inputs)
        each = losses(logits.float(), targets.to(self.device), self.settings.loss)
        loss = (weights.to(self.device) * each).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.encoder.network.parameters(), self.settings.max_grad_norm or 1e30)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self._share(self.step)
        self.optimizer.step()
        return loss.detach(), norm.detach()

    def _share(self, step: int) -> float:
        total = self.settings.epochs * self.steps_each
        return scheduled(step, total, self.settings.schedule, int(self.settings.warmup * total))

    def _precision(self) -> Any:
        half = self.settings.dtype == "bfloat16" or (self.settings.dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if half else nullcontext()

    def _targets(self, records: Sequence[Record]) -> Tensor:
        """(B, C), 1 at each record's labels."""
        targets = torch.zeros(len(records), len(self.row))
        for place, record in enumerate(records):
            targets[place, [self.row[label] for label in labels_of(record)]] = 1.0
        return targets

    def _log(self, pending: list[tuple[int, float, Tensor, Tensor]], epoch: int) -> float:
        """Read the collected numbers off the device at once, and write a line for each step."""
        values = torch.stack([torch.stack([loss, norm]) for _, _, loss, norm in pending]).tolist()
        lines = []
        for (step, seconds, _, _), (loss, norm) in zip(pending, values, strict=True):
            if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
                raise WorkError(f"step {step}: the loss is {loss} and its gradient {norm}; take a lower --lr")
            rate = self.settings.batch_size / max(seconds, 1e-9)
            line = {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "grad_norm": norm,
                "lr": self.lr * self._share(step - 1),
            }
            lines.append(line | {"step_seconds": round(seconds, 6), "records_per_second": round(rate, 3)})
        self._write(lines)
        return float(values[-1][0])

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        add_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))

    def _judge(self, epoch: int) -> None:
        """Rank the held-out cases; a teacher that ranks them better than any before is written to the folder."""
        self.encoder.network.eval()
        if not self.judged:
            write_teacher(self.encoder, self.folder)
            return
        found = self._measured()
        self._write([{"step": self.step, "epoch": epoch} | {f"validation_{k}": v for k, v in found.items()}])
        say(f"epoch {epoch + 1}: top-1 {found['top1']:.1%}, top-10 {found['top10']:.1%} of {len(self.judged):,} cases")
        if not self.best or _goodness(found) > _goodness(self.best):
            self.best = found
            write_teacher(self.encoder, self.folder)

    def _measured(self) -> dict[str, float]:
        """How the held-out cases are ranked: shares with the label first and among the first ten, and the loss."""
        loss, places = 0.0, []
        for batch in in_batches(self.judged, self.settings.batch_size):
            rows = [[self.row[label] for label in labels_of(record)] for record in batch]
            with self._precision():
                scores = self.encoder.score_batch(batch)
            loss += float(losses(scores, self._targets(batch), self.settings.loss).sum())
            places.append(ranks(scores, rows))
        place = torch.cat(places)
        shares = {f"top{k}": float((place < k).float().mean()) for k in (1, 10)}
        return shares | {"loss": loss / len(place)}

    def _save(self) -> None:
        facts = {"step": self.step, "best": self.best, "run": self.facts}
        save_snapshot(self.folder / STATE, self.encoder.network, self.optimizer, self.device, facts)


def _goodness(found: dict[str, float]) -> tuple[float, ...]:
    """What the best teacher has most of: cases ranked first, then among the first ten, then a low loss."""
    return found["top1"], found["top10"], -found["loss"]


def _optimizer(network: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; norms, biases and single vectors do not decay."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def _fingerprint(records: Sequence[Record]) -> str:
    """Names the cases of a run, so that it is not resumed on others."""
    hashed = hashlib.sha256()
    for record in records:
        hashed.update(json.dumps([record.id, record.note, str(record.image), labels_of(record)]).encode())
    return hashed.hexdigest()
