"""A decoder that is spread over ranks: the numbers of one process, each rank with its own part in memory and from disk."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_ranks import learnt
from ranks import on_ranks
from safetensors.torch import load_file
from students import run_settings, text_pairs, untimed, write_pairs_file, write_student
from test_kernels_triton import interpreter_runs, run

from mint import parallel
from mint.decoders import load_decoder, lora
from mint.decoders.spread import load_spread
from mint.errors import ConfigError
from mint.files import write_json
from mint.pipeline import align, predict
from mint.training import runs
from mint.training.plan import plan, plans
from mint.trees import sequence
from mint.types import Record
from mint.weights import tensorfiles

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether head and embedding are one; 323 rows of a vocabulary divide by no number of ranks."""
    folder = tmp_path_factory.mktemp("students")
    return {tied: write_student(folder / str(tied), tie_word_embeddings=tied, vocab_size=323) for tied in (True, False)}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_pairs(9))


def trained(model: Path, pairs: Path, out: Path, resume: bool = False, **changes: Any) -> None:
    usual: dict[str, Any] = {"steps": 4, "batch_size": 5, "lr": 1e-4, "save_every": 2, "tokens_per_batch": 60}
    usual |= {"model": str(model), "pairs": str(pairs), "out": str(out), "objective": "dpo", "held_out": 0.2}
    align(run_settings(**{**usual, **changes}), resume=resume)


ORPO: dict[str, Any] = {"objective": "orpo", "targets": ("all-linear", "lm_head")}


def spread(models: dict[bool, Path], pairs: Path, out: Path) -> None:
    trained(models[True], pairs, out / "tied", shard=True)
    trained(models[False], pairs, out / "untied", shard=True, recompute=True, **ORPO)
    trained(models[True], pairs, out / "split tied", tensor_parallel=2)
    trained(models[False], pairs, out / "split untied", tensor_parallel=2, recompute=True, **ORPO)
    trained(models[False], pairs, out / "again", shard=True, adapter=str(out / "untied/adapter"), steps=1)
    if parallel.size() == 4:
        trained(models[True], pairs, out / "both tied", shard=True, tensor_parallel=2)
        trained(models[False], pairs, out / "both untied", shard=True, tensor_parallel=2, recompute=True, **ORPO)


def assert_alike(found: Path, wanted: Path) -> None:
    rows = [[(row["loss"], row["grad_norm"]) for row in runs.read_metrics(folder / "metrics.jsonl")]
            for folder in (found, wanted)]  # fmt: skip
    for one, other in zip(*rows, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-6)
        assert one[1] == pytest.approx(other[1], rel=1e-5)
    one, other = (load_file(folder / WEIGHTS) for folder in (found, wanted))
    assert list(one) == list(other)
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_spread_decoder_learns_what_one_process_learns(models: dict[bool, Path], pairs: Path, tmp_path: Path) -> None:
    """On two and four ranks, some of which have no pair in a step; head tied and not, with an adapter of its own and
    without; recomputed; from an adapter; cut by FSDP2, tensor parallel on two ranks or on twice two, or both at once."""
    trained(models[True], pairs, tmp_path / "one/tied")
    trained(models[False], pairs, tmp_path / "one/untied", **ORPO)
    for ranks in (2, 4):
        out = tmp_path / str(ranks)
        on_ranks(ranks, spread, models, pairs, out)
        for name in ("tied", "untied"):
            assert_alike(out / name, tmp_path / "one" / name)
            assert_alike(out / f"split {name}", tmp_path / "one" / name)
            if ranks == 4:
                assert_alike(out / f"both {name}", tmp_path / "one" / name)
        trained(models[False], pairs, tmp_path / f"one/again{ranks}", adapter=str(out / "untied/adapter"), steps=1)
        assert_alike(out / "again", tmp_path / f"one/again{ranks}")


@pytest.mark.skipif(not interpreter_runs(), reason="this interpreter of Triton's does not take this NumPy")
def test_the_kernels_of_a_gpu_learn_the_same_on_two_ranks(tmp_path: Path) -> None:
    """In Triton's interpreter, in a process of its own."""
    done = run("tests/interpreted_ranks.py", str(tmp_path), cache=tmp_path / "cache", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-4000:]
    learnt(tmp_path, "one")
    assert_alike(tmp_path / "two", tmp_path / "one")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "shard": (2, {"shard": True}),
    "both": (4, {"shard": True, "tensor_parallel": 2}),
}


def gone_on(model: Path, pairs: Path, out: Path, resume: bool, changes: dict[str, Any]) -> None:
    trained(model, pairs, out, resume, **changes)


def test_a_run_saved_by_some_ranks_is_gone_on_with_by_more_or_fewer(
    models: dict[bool, Path], pairs: Path, tmp_path: Path
) -> None:
    """Ended after its second step on one or four ranks; its last two are taken on two or one. MINT_LONG goes from two to
    four as well."""
    on_ranks(1, gone_on, models[True], pairs, tmp_path / "whole", False, {})
    wanted = [row["loss"] for row in runs.read_metrics(tmp_path / "whole/metrics.jsonl")]
    ways = [("one", "shard"), ("both", "one"), *([("shard", "both")] if os.environ.get("MINT_LONG") else [])]
    for begun, ended in ways:
        (ranks, layout), (others, other) = LAYOUTS[begun], LAYOUTS[ended]
        on_ranks(ranks, gone_on, models[True], pairs, tmp_path / begun, False, {**layout, "steps": 2})
        parts = [path.stat().st_size for path in (tmp_path / begun / "checkpoint").glob("rank-*.safetensors")]
        assert len(parts) == ranks
        assert max(parts) < 1.5 * sum(parts) / ranks  # each has written its own
        settings = json.loads((tmp_path / begun / "run.json").read_text())
        settings["settings"]["steps"] = 4
        write_json(tmp_path / begun / "run.json", settings)
        shutil.rmtree(tmp_path / begun / "adapter")
        on_ranks(others, gone_on, models[True], pairs, tmp_path / begun, True, other)
        found = untimed(runs.read_metrics(tmp_path / begun / "metrics.jsonl"))
        assert [row["loss"] for row in found] == pytest.approx(wanted, rel=1e-6), begun
        assert_alike(tmp_path / begun, tmp_path / "whole")


def measured(model: Path, out: Path, data: int, tensor: int) -> None:
    """What a rank reads and holds, and what it makes of a text of its own."""
    read: list[int] = []
    real = tensorfiles.TensorReader._fill

    def counting(self: Any, info: Any, offset: int, place: torch.Tensor) -> None:
        read.append(place.numel() * place.element_size())
        real(self, info, offset, place)

    tensorfiles.TensorReader._fill = counting  # type: ignore[method-assign]
    words: dict[str, Any] = {"device": "cpu", "dtype": "float32", "shard": data > 1, "tensor": tensor}
    decoder = load_spread(model, lambda _: lambda _: None, **words)
    held = sum(parallel.own_part(p)[0].nbytes for p in decoder.network.parameters())
    ids = list(range(3 + parallel.share(), 9 + 5 * parallel.share()))
    logp = decoder.token_logp(sequence(ids)).tolist()
    write_json(out / f"{parallel.rank()}.json", {"read": sum(read), "held": held, "ids": ids, "logp": logp})


def assert_holds_its_part(model: Path, out: Path, data: int, tensor: int) -> None:
    """Each rank reads what it holds, which is what the plan says, and all ranks together read everything; each gets the
    log-probabilities of its own text, of a length of its own, over the whole vocabulary."""
    on_ranks(data * tensor, measured, model, out, data, tensor)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(data * tensor)]
    whole = load_decoder(model, device="cpu", dtype="float32")
    planned = plan(whole, 1, True, data, tensor)["weights_bytes"]
    for one in found:
        assert one["read"] == one["held"] == pytest.approx(planned, rel=0.01)
        assert one["logp"] == pytest.approx(whole.token_logp(sequence(one["ids"])).tolist(), rel=1e-5)


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_each_rank_reads_and_holds_its_own_part_alone(
    models: dict[bool, Path], tmp_path: Path, data: int, tensor: int
) -> None:
    assert_holds_its_part(models[False], tmp_path, data, tensor)


def test_what_cannot_be_spread_is_refused(models: dict[bool, Path], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard: spreads the decoder over several processes; start them with torch"):
        trained(models[True], pairs, tmp_path, shard=True)
    words = "--tensor-parallel: spreads the decoder over several processes; start them with torchrun"
    with pytest.raises(ConfigError, match=words):
        next(predict([Record("a", note="b")], model=models[True], labels=LABELS, tensor_parallel=2))


def test_ranks_that_do_not_divide_the_heads_are_refused(models: dict[bool, Path], pairs: Path, tmp_path: Path) -> None:
    on_ranks(3, heads_refused, models[True], pairs, tmp_path)


def heads_refused(model: Path, pairs: Path, out: Path) -> None:
    with pytest.raises(
        ConfigError, match="--tensor-parallel 3: wanted a divisor of the 3 processes, of the 2 key-value"
    ):
        trained(model, pairs, out, tensor_parallel=3)


def test_a_head_in_parts_gives_the_log_probabilities_of_the_whole() -> None:
    """The parts' walks, put together as the ranks do it, near p = 1 too, against float64."""
    from mint.kernels import part_walk

    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 16), (50, 16)))
    labels = torch.tensor([0, 7, 20, 33, 49, 20])
    hidden[5] = 9 * head[20]
    walks = [part_walk(hidden, head[at : at + 20], labels - at, True) for at in (0, 20, 40)]
    top = torch.stack([walk.level for walk in walks]).amax(0)
    total = sum(walk.total * (walk.level - top).exp() for walk in walks)
    margin = sum(walk.label_logit for walk in walks) - top - total.log()
    wanted = (hidden @ head.T).log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(torch.nn.functional.logsigmoid(margin), wanted)
    assert math.isfinite(float(margin[5]))


# ---- answers --------------------------------------------------------------------------------------------------------

LABELS = ["red eyes", "red ears", "blue", "thin lip", "tall"]


def asked(model: Path, adapter: Path, out: Path, spread: dict[str, Any]) -> None:
    """Cases of unequal length, two to a process in turn, so that one process has more of them than another."""
    records = [Record(f"case-{n}", note="thin nose " * (n % 3 + 1)) for n in range(5)]
    parallel.shared_out = partial(parallel.shared_out, turn=2)  # type: ignore[assignment]
    rows = []
    for mode in ("rank", "list", "text"):
        found = predict(records, model=model, adapter=adapter, labels=LABELS, mode=mode, top=3, max_new_tokens=17,
                        device="cpu", dtype="float32", date="26 Jul 2024", **spread)  # fmt: skip
        rows += [
            [mode, answer.id, answer.top(3), answer.text, [e.get("logprob", 0.0) for e in answer.ranking]]
            for answer in found
        ]
    if parallel.first():
        write_json(out, rows)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_that_ranks_hold_together_answers_as_one(
    models: dict[bool, Path], pairs: Path, tmp_path: Path, tied: bool
) -> None:
    """In every mode: exact ranks, lists and free text, with an adapter, of the head too; tensor parallel on twice two ranks,
    by FSDP2 with cases of their own, of which some have more than others, and both ways at once."""
    parallel_of = {
        "split": (4, {"tensor_parallel": 2}),
        "shard": (3, {"shard": True}),
        "both": (4, {"shard": True, "tensor_parallel": 2}),
    }
    trained(models[tied], pairs, tmp_path / "run", lr=0.02, targets=("all-linear", "lm_head"))
    words = models[tied], tmp_path / "run/adapter"
    on_ranks(1, asked, *words, tmp_path / "one.json", {})
    one = json.loads((tmp_path / "one.json").read_text())
    assert len(one) == 15
    for name, (ranks, spread) in parallel_of.items():
        on_ranks(ranks, asked, *words, tmp_path / f"{name}.json", spread)
        for mine, theirs in zip(json.loads((tmp_path / f"{name}.json").read_text()), one, strict=True):
            assert mine[:4] == theirs[:4]
            assert mine[4] == pytest.approx(theirs[4], rel=1e-5)


# ---- plans ----------------------------------------------------------------------------------------------------------

LARGE = {
    "70B": ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
            70_553_706_496),
    "405B": ({"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
             405_853_388_800),
}  # fmt: skip
"""Llama 3.1's shapes, and how many parameters are published for them."""


@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_is_planned_without_its_weights(name: str, tmp_path: Path) -> None:
    shape, parameters = LARGE[name]
    config = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "torch_dtype": "bfloat16", **shape}
    write_json(tmp_path / "config.json", config)
    decoder = load_decoder(tmp_path, device="meta")
    lora.attach(decoder.network, "all-linear", rank=16, alpha=32)
    adapter = sum(p.numel() for n, p in decoder.network.named_parameters() if ".lora_" in n)
    found = plans(decoder, 8192, None)
    for ranks in (8, 16):
        row = found[f"on_{ranks}_gpus"]
        assert row["weights_bytes"] == 2 * parameters // ranks
        assert row["adapter_bytes"] + row["gradient_and_optimiser_bytes"] == pytest.approx(
            16 * adapter / ranks, rel=1e-6
        )
        assert row["total_bytes"] == sum(value for key, value in row.items() if key != "total_bytes")
    fits = {"70B": ("on_8_gpus", 80e9), "405B": ("on_16_gpus", 141e9)}[name]
    assert found[fits[0]]["total_bytes"] < fits[1]
    together = plans(decoder, 8192, None, 8)["on_each_of_8_gpus"]
    assert together["weights_bytes"] == pytest.approx(2 * parameters / 8, rel=1e-3)
    assert adapter * 4 / 8 < together["adapter_bytes"] < adapter * 4
    both = plans(decoder, 8192, None, 8, shard=True)
    assert list(both) == ["on_16_gpus", "on_32_gpus", "on_64_gpus"]
    assert 2 * parameters / 16 < both["on_16_gpus"]["weights_bytes"] < together["weights_bytes"] * 0.54


def test_a_dry_run_prints_the_plan_from_the_shapes_alone(models: dict[bool, Path], pairs: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models[True] / name, tmp_path / name)
    settings = run_settings(model=str(tmp_path), pairs=str(pairs), out=str(tmp_path / "run"), shard=True)
    found = align(settings, dry_run=True)
    assert found["on_2_gpus"]["weights_bytes"] == pytest.approx(found["weights_bytes"] / 2, abs=1)
    together = align(replace(settings, shard=False, tensor_parallel=2), dry_run=True)["on_each_of_2_gpus"]
    assert found["weights_bytes"] / 2 < together["weights_bytes"] < found["weights_bytes"] * 0.51
    assert not (tmp_path / "run").exists()
