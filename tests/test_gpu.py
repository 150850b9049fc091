"""What only a GPU can show; left out where there is none: `python -m pytest tests/test_gpu.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_llama
from checkpoints_mllama import write_mllama
from students import run_settings, trainer_of, untimed, write_student
from test_mllama_trees import image_pair, pictures
from test_scoring import CASES, LABELS

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import gpu

from mint import kernels, load_decoder
from mint.decoders import lora
from mint.decoders.vision_cache import FeatureStore
from mint.kernels import checks, reference
from mint.scoring import Ranker, layout_of
from mint.training import Trainer
from mint.training.batches import token_pairs
from mint.training.runs import read_metrics

__all__ = ["pictures"]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RATES = {"products": 790e12, "bytes": 4.3e12}


def test_every_kernel_is_right_waits_for_nothing_and_replays() -> None:
    torch.manual_seed(0)
    assert not [line for line in checks.checks() if not line["right"]]


def test_steps_of_a_graph_equal_whole_rows() -> None:
    (line,) = gpu.replayed("gpu", RATES)
    assert line["right"], line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_lie_across_are_taken(dtype: torch.dtype) -> None:
    """hidden and head as the transposes of what is stored."""
    hidden, head = (checks.normal(128, n, dtype=dtype).T for n in (70, 5003))
    labels = torch.randint(5003, (70,), device="cuda")
    one, other = (x.detach().requires_grad_() for x in (hidden, hidden.contiguous()))
    for leaf, weight in ((one, head), (other, head.contiguous())):
        kernels.token_logprob(leaf, weight, labels).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-3)


def test_a_training_run_is_that_of_the_processor(tmp_path: Path) -> None:
    model = write_student(tmp_path / "model")
    rows: list[list[dict[str, Any]]] = []
    for device in ("cpu", "cuda"):
        trainer = trainer_of(model, tmp_path / device, 5, batch_size=2, steps=4, device=device)
        trainer.run()
        rows.append(untimed(read_metrics(tmp_path / device / "metrics.jsonl")))
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.fixture
def alarmed() -> Iterator[Any]:
    """What, called with "error", makes every wait for the device an error."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", ["orpo", "dpo"])
def test_a_step_waits_for_nothing(tmp_path: Path, alarmed: Any, objective: str) -> None:
    changes: dict[str, Any] = {"tokens_per_batch": 40, "objective": objective, "dropout": 0.1, "recompute": True}
    trainer = trainer_of(write_student(tmp_path / "model"), tmp_path / "run", 4, device="cuda", **changes)
    trainer.remember_reference()
    trainer.decoder.network.train()
    trainer.advance()
    alarmed("error")
    launched = [trainer.launch() for _ in range(2)]
    alarmed("default")
    assert all(torch.isfinite(torch.tensor(one.numbers())).all() for one in launched)


def test_a_frozen_towers_first_epoch_waits_for_nothing(tmp_path: Path, pictures: list[str], alarmed: Any) -> None:
    decoder = load_decoder(write_mllama(tmp_path / "model", seed=2, std=0.1), dtype="float32", device="cuda")
    targets = ("language_model", "multi_modal_projector")
    lora.attach(decoder.network, targets, rank=4, alpha=8.0)
    assert decoder.eyes is not None
    settings = run_settings(batch_size=3, targets=targets)
    pairs = token_pairs([image_pair(f"p{n}", one) for n, one in enumerate(pictures)], decoder.tokenizer, settings)
    trainer = Trainer(decoder, settings, tmp_path, pairs)
    decoder.network.train()
    for name in ("before", "now"):
        decoder.eyes.store = FeatureStore(tmp_path / name, 10**9)
        alarmed("error" if name == "now" else "default")
        launched = trainer.launch()
        alarmed("default")
        assert all(torch.isfinite(torch.tensor(launched.numbers())))
        decoder.eyes.store.finish()
        assert len(list((tmp_path / name).iterdir())) == len(pictures)


def test_labels_are_ranked_as_on_the_processor(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    found: list[torch.Tensor] = []
    for device in ("cpu", "cuda"):
        layout_of.cache_clear()
        ranker = Ranker(load_decoder(model, device=device, dtype="float32"), LABELS)
        found.append(ranker.logp([ranker.prompt(messages) for _, messages in CASES]).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_where_its_tensors_lie() -> None:
    x, weight = (checks.normal(*shape, dtype=torch.float32, device="cuda:1") for shape in ((5, 64), (64,)))
    found = kernels.rms_norm(x, weight, 1e-5)
    assert found.device == x.device
    torch.testing.assert_close(found.cpu(), kernels.rms_norm(x.cpu(), weight.cpu(), 1e-5))
    hidden, labels = (
        checks.normal(3, 64, dtype=torch.float32, device="cuda:1"),
        torch.tensor([0, 1, 4], device="cuda:1"),
    )
    torch.testing.assert_close(
        kernels.token_logprob(hidden, x, labels).cpu(), reference.token_logprob(hidden.cpu(), x.cpu(), labels.cpu())
    )
