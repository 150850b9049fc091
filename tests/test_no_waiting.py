"""Nothing of a training step waits for the device: shown on one whose tensors have no content ("meta"), so that whoever
looks at one raises, and where every copy between it and the processor is seen.

What is looked at is what a GPU would do: the kernels are launched into nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_mllama import write_mllama
from students import run_settings, saved, trainer_of, untimed, write_student
from test_mllama_trees import image_pair, pictures
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mint import kernels, load_decoder
from mint.decoders import Decoder, lora
from mint.decoders.sight import Sight
from mint.decoders.vision_cache import FeatureStore
from mint.errors import Stopped, WorkError
from mint.training import Trainer
from mint.training.batches import step_pairs, token_pairs
from mint.training.gradients import Gradients
from mint.training.runs import read_metrics
from mint.types import TokenTree

__all__ = ["pictures"]
FROZEN = ("language_model", "multi_modal_projector")
COPIES = ("aten::_to_copy", "aten::copy_")


class WaitError(AssertionError):
    """The processor stopped for the device."""


class Operations(TorchDispatchMode):
    """Raises at an operation that stops the processor until the device has come to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = {x.device.type for x in given if x.ndim}  # a single number goes along with the launch
        try:
            out = func(*args, **(kwargs or {}))
        except (NotImplementedError, RuntimeError) as fault:
            raise WaitError(f"{func}: {fault}") from fault
        if func._schema.name in COPIES:
            places |= {x.device.type for x in torch.utils._pytree.tree_leaves(out)}
            queued = args[2:3] == (True,) or (kwargs or {}).get("non_blocking")
            if len(places) > 1 and not queued:
                raise WaitError(f"{func}: a copy that is waited for")
        elif len(places) > 1:
            raise WaitError(f"{func}: tensors of the processor and of the device in one operation")
        return out


class Made(TorchFunctionMode):
    """Raises where a tensor on the device is made of numbers of Python, which is a copy that is waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("tensor", "as_tensor", "new_tensor") and out.is_meta:
            raise WaitError(f"{func.__name__}: made of numbers of Python on the device")
        return out


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors without content go the way of a GPU's; the names of the kernels that were launched."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    real = kernels._backend

    def door(tensor: Tensor, name: str, *plain: Any) -> Any:
        return import_module(f"mint.kernels.{name}") if tensor.is_meta else real(tensor, name, *plain)

    monkeypatch.setattr(kernels, "_backend", door)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: names.append(kernel.__name__))
    logprob, reference = (import_module(f"mint.kernels.{name}") for name in ("logprob", "reference"))
    for name in ("over", "again"):  # what the operators do inside, which for such tensors they leave out
        monkeypatch.setattr(logprob.KernelWalk, name, classmethod(getattr(reference.Walk, name).__func__))
    return names


class Coming:
    """Features on their way to the processor, which does not see them come."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_meta
        self.tensor = tensor

    def is_here(self) -> bool:
        return False


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Watch what runs within; how many numbers are sent to the processor, to be read later."""
    sent: list[int] = []

    def arriving(numbers: Tensor) -> Callable[[], list[float]]:
        sent.append(len(numbers))
        return lambda: [1.0] * len(numbers)

    monkeypatch.setattr("mint.training.arriving", arriving)
    monkeypatch.setattr("mint.decoders.vision_cache.Arriving", Coming)
    with ExitStack() as stack:
        for mode in (Made(), Operations()):
            stack.enter_context(mode)
        yield sent


def on_meta(decoder: Decoder) -> Decoder:
    """The decoder without content. Its trainer lags a step behind, as on a GPU."""
    decoder.network.to("meta")
    decoder.device = torch.device("meta")
    return decoder


def trainer_on_meta(model: Path, out: Path, **changes: Any) -> Trainer:
    made = trainer_of(model, out, 4, **changes)
    trainer = Trainer(on_meta(made.decoder), made.settings, out, made.pairs)
    trainer.behind = 1
    trainer.reference = torch.zeros(len(trainer.pairs), 2)
    trainer.decoder.network.train()
    return trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize("changes", [
    {}, {"objective": "dpo", "dropout": 0.1, "recompute": True}, {"objective": "sft", "targets": ("all-linear", "lm_head")}
])  # fmt: skip
def test_a_step_on_text_waits_for_nothing(
    model: Path, tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    trainer = trainer_on_meta(model, tmp_path, tokens_per_batch=40, **changes)
    assert len(list(trainer.rounds(trainer.pairs))) > 1
    with watched(monkeypatch) as sent:
        trainer.launch()
        trainer.launch()
    assert sent == [11, 11]
    assert {"_fold_kernel", "_forward_kernel", "_backward_keys_kernel", "_ratio_kernel"} <= {*launched}
    assert {"_norm_kernel", "_norm_back_kernel", "_turn_kernel", "_gate_kernel", "_gate_back_kernel"} <= {*launched}


def trainer_on_pictures(tmp_path: Path, pictures: list[str], targets: Any, epoch: int) -> Trainer:
    """On the device, with all that is read once in a run known, and on disk what the epochs before have left there."""
    decoder = load_decoder(write_mllama(tmp_path, seed=2, std=0.1), dtype="float32", device="cpu")
    lora.attach(decoder.network, targets, rank=4, alpha=8.0)
    assert decoder.eyes is not None
    settings = run_settings(batch_size=3, targets=targets)
    pairs = token_pairs([image_pair(f"p{n}", one) for n, one in enumerate(pictures)], decoder.tokenizer, settings)
    decoder.eyes.store = FeatureStore(tmp_path, 10**9)
    assert decoder.eyes.fingerprint
    if epoch:
        Trainer(decoder, settings, tmp_path, pairs).launch()
    trainer = Trainer(on_meta(decoder), settings, tmp_path, pairs)
    decoder.network.train()
    return trainer


@pytest.mark.parametrize(("targets", "epoch"), [(FROZEN, 0), (FROZEN, 1), ("all-linear", 0)])
def test_a_step_on_pictures_waits_for_nothing(
    tmp_path: Path, pictures: list[str], launched: list[str], monkeypatch: pytest.MonkeyPatch, targets: Any, epoch: int
) -> None:
    """The tower trained, or frozen, in the first epoch and where its features are on disk."""
    trainer = trainer_on_pictures(tmp_path, pictures, targets, epoch)
    with watched(monkeypatch) as sent:
        trainer.launch()
        trainer.launch()
    assert sent == [11, 11]
    assert "_fold_kernel" in launched
    made = targets == FROZEN and not epoch
    assert len(trainer.decoder.eyes.store.coming) == made * len(pictures)


@pytest.mark.usefixtures("launched")
def test_features_that_are_waited_for_would_show(
    tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on_pictures(tmp_path, pictures, FROZEN, 0)
    monkeypatch.setattr(FeatureStore, "_made", lambda _self, _path, make: make().cpu())
    with watched(monkeypatch), pytest.raises(WaitError):
        trainer.launch()


def waited_for(tree: TokenTree, device: torch.device) -> TokenTree:
    return replace(tree, **{name: getattr(tree, name).to(device) for name in TREE_TENSORS})


TREE_TENSORS = ("ids", "end", "position", "sources", "labels", "member_edges", "member_paths")
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a number is read": (Gradients, "take", lambda g: [float(w.grad.norm()) for w in g.weights]),
    "a copy is waited for": (TokenTree, "to", waited_for),
    "numbers of Python": (TokenTree, "path_lengths", lambda t: torch.tensor([1.0] * t.paths, device=t.ids.device)),
    "a count of what is there": (TokenTree, "path_lengths", lambda t: torch.bincount(t.member_paths)),
    "what a mask leaves": (TokenTree, "path_sums", lambda t, logp: logp[logp < 0].sum().expand(t.paths)),
    "an index of the processor's": (
        TokenTree, "path_sums", lambda t, logp: logp[torch.zeros(1, dtype=torch.int64)].expand(t.paths)
    ),
}  # fmt: skip


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_waits_would_show(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    trainer, (owner, name, change) = trainer_on_meta(model, tmp_path), FAULTS[fault]
    monkeypatch.setattr(owner, name, change)
    with watched(monkeypatch), pytest.raises(WaitError):
        trainer.launch()


# ---- a step behind --------------------------------------------------------------------------------------------------


def ran(model: Path, out: Path, behind: int, **changes: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = trainer_of(model, out, 5, batch_size=2, steps=7, **changes)
    trainer.behind = behind
    trainer.run()
    return trainer, untimed(read_metrics(out / "metrics.jsonl"))


def test_reading_a_step_behind_changes_nothing(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.2, "held_out": 2, "eval_every": 2, "save_every": 3}
    (one, rows), (two, again) = (ran(model, tmp_path / str(behind), behind, **settings) for behind in (0, 1))
    assert rows == again
    assert len(rows) == 7
    texts = {(tmp_path / str(behind) / "evaluations.jsonl").read_text() for behind in (0, 1)}
    assert len(texts) == 1
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)


def test_a_launch_comes_before_the_numbers_of_the_step_before_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (order.append(name), real(*given))[1]

    for name in ("launch", "read", "save"):
        monkeypatch.setattr(Trainer, name, noting(name, getattr(Trainer, name)))
    ran(model, tmp_path, 1, save_every=3)
    turn = ["launch", "launch", "read", "launch", "read", "read", "save"]
    assert order == [*turn, *turn, "launch", "read", "save"]


def test_a_step_that_is_no_number_is_refused_before_anything_is_saved(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, 6, batch_size=2, epochs=1.0, save_every=1)
    trainer.behind = 1
    bad = step_pairs(trainer.pairs, 2, trainer.settings)[0]
    poisoned = replace(bad, chosen=[*bad.chosen[:-1], 250, bad.chosen[-1]])
    trainer.pairs = [poisoned if pair.id == bad.id else pair for pair in trainer.pairs]
    with torch.no_grad():
        table = trainer.decoder.network.model.embed_tokens
        table.weight = torch.nn.Parameter(table.weight.clone(), requires_grad=False)
        table.weight[250] = float("nan")
    with pytest.raises(WorkError, match=r"^step 3: loss nan"):
        trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    tensors, numbers = saved(tmp_path)
    assert numbers["step"] == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_asked_to_stop_the_steps_under_way_are_read_and_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(model, tmp_path, 6, batch_size=2, steps=9)
    trainer.behind = 1

    @contextmanager
    def asking() -> Iterator[Callable[[], bool]]:
        yield lambda: trainer.step >= 4

    monkeypatch.setattr("mint.training.asked_to_stop", asking)
    with pytest.raises(Stopped, match="stopped after step 4 of 9"):
        trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    numbers = saved(tmp_path)[1]
    assert numbers["step"] == 4


def test_the_marks_of_the_tokens_after_a_picture_are_those_of_its_spans() -> None:
    from mint.decoders.sight import Span

    spans = [Span(0, 2, (0,), before=True), Span(2, 5, (0,), ends=True), Span(5, 6, (), ends=True)]
    sight = Sight(torch.zeros(1, 1), [slice(0, 1)], [slice(0, 1)], spans)
    assert sight.after_image(torch.zeros(6, 1)).flatten().tolist() == [0, 0, 1, 1, 1, 0]
    assert sight.following(4).after_image(torch.zeros(4, 1)).flatten().tolist() == [1, 1, 0, 0]
