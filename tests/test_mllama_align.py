"""Alignment on pairs with images: equal to the ordinary way with PEFT, the tower frozen or trained, adapters both ways."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_mllama import oracle_inputs, write_mllama
from safetensors.torch import load_file, save_file
from students import peers, run_settings, stir
from test_mllama_trees import counting, image_pair, pictures
from torch import Tensor

from mint import align, load_decoder
from mint.decoders import Decoder, lora, vision_cache
from mint.decoders.merging import merge
from mint.decoders.mllama_config import on_disk
from mint.decoders.vision import VisionTower
from mint.decoders.vision_cache import FeatureStore
from mint.errors import CheckpointError, WorkError
from mint.images import open_image
from mint.training import Trainer
from mint.training.batches import TokenPair, token_pairs
from mint.transfer import Arriving
from mint.types import PreferencePair
from mint.weights.adapters import write_adapter

__all__ = ["pictures"]
FROZEN = ("language_model", "multi_modal_projector")
TEXT_ALONE = ("language_model",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=2, std=0.1)


def adapted(folder: Path, targets: Any, **loading: Any) -> Decoder:
    decoder = load_decoder(folder, dtype="float32", device="cpu", **loading)
    lora.attach(decoder.network, targets, rank=4, alpha=8.0)
    stir(decoder.network)
    return decoder


def write_of(decoder: Decoder, folder: Path) -> Path:
    tensors = lora.tensors(decoder.network)
    config = {"r": 4, "lora_alpha": 8.0, "target_modules": lora.short_names(decoder.network, list(tensors))}
    write_adapter(folder, config, tensors, decoder.checkpoint.name)
    return folder


def base_of(folder: Path) -> Any:
    with peers():
        from transformers import MllamaForConditionalGeneration

        return MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def peft_of(folder: Path, adapter: Path, trainable: bool = False) -> Any:
    with peers():
        from peft import PeftModel

        return PeftModel.from_pretrained(base_of(folder), adapter, is_trainable=trainable).eval()


def some_pairs(pictures: list[str]) -> list[PreferencePair]:
    a, b, d = (image_pair(name, pictures[at]) for name, at in (("a", 1), ("b", 2), ("d", 0)))
    return [a, b, image_pair("c", None), d]


def prompt_of(decoder: Decoder, pictures: list[str]) -> tuple[list[int], list[Any]]:
    pair = token_pairs([image_pair("a", pictures[1])], decoder.tokenizer, run_settings())[0]
    return pair.chosen, [open_image(pictures[1])]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# ---- the step -----------------------------------------------------------------------------------------------------


def ordinary_orpo(model: Any, pairs: list[TokenPair], token: int, beta: float) -> Tensor:
    """ORPO with every text run by itself and its image encoded each time, by the formulas of the paper."""
    likelihood, tokens, odds = torch.zeros(()), 0, []
    for pair in pairs:
        images = [] if pair.image is None else [open_image(pair.image)]
        means = []
        for ids, first in ((pair.chosen, pair.chosen_first), (pair.rejected, pair.rejected_first)):
            logp = model(**oracle_inputs(ids, images, token)).logits[0].log_softmax(-1)
            each = {at: logp[at - 1, ids[at]] for at in range(1, len(ids)) if ids[at] != token}
            means.append(torch.stack([value for at, value in each.items() if at >= first]).mean())
            if ids is pair.chosen:
                likelihood, tokens = likelihood - torch.stack(list(each.values())).sum(), tokens + len(each)
        log_odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        odds.append(torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1]))
    return likelihood / tokens - beta * torch.stack(odds).mean()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_orpo_equals_the_ordinary_way_with_peft_in_loss_and_gradients(
    folder: Path, tmp_path: Path, pictures: list[str], recompute: bool
) -> None:
    decoder = adapted(folder, "all-linear")
    decoder.network.model.recompute = recompute
    assert decoder.network.model.vision_model.checkpointing is recompute
    settings = run_settings(beta=0.3, tokens_per_batch=120)  # several groups in the step
    pairs = token_pairs(some_pairs(pictures), decoder.tokenizer, settings)
    trainer = Trainer(decoder, settings, tmp_path, pairs)
    totals, _ = trainer.accumulate(pairs)
    peer = peft_of(folder, write_of(decoder, tmp_path / "adapter"), trainable=True)
    loss = ordinary_orpo(peer, pairs, decoder.network.config.image_token, 0.3)
    loss.backward()
    assert abs(float(totals[0]) - float(loss.detach())) < 1e-4
    wanted = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in peer.named_parameters()
        if "lora_" in name
    }
    found = {name: part.grad for name, part in decoder.network.named_parameters() if "lora_" in name}
    assert found.keys() == wanted.keys()
    assert sum("vision_model" in name for name in found) > 20
    largest = max(float(part.abs().max()) for part in wanted.values())
    for name, gradient in found.items():
        assert gradient is not None
        assert float((gradient - wanted[name]).abs().max()) < 2e-4 * largest, name


@pytest.mark.parametrize("objective", ["orpo", "dpo", "sft"])
@pytest.mark.parametrize("targets", ["all-linear", FROZEN])
def test_alignment_on_images_lowers_its_loss(
    folder: Path, tmp_path: Path, pictures: list[str], objective: str, targets: Any
) -> None:
    words = (targets,) if isinstance(targets, str) else targets
    settings = run_settings(
        model=str(folder), out=str(tmp_path / "run"), objective=objective, targets=words, epochs=5, lr=3e-3
    )
    result = align(settings, some_pairs(pictures))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "run" / "features").exists() == (targets == FROZEN)
    ours = load_decoder(folder, adapter=result["adapter"], dtype="float32", device="cpu")
    ids, images = prompt_of(ours, pictures)
    with torch.no_grad():
        peer = peft_of(folder, Path(result["adapter"]))(**oracle_inputs(ids, images, ours.network.config.image_token))
    assert error(ours.logits([ids], [images])[0], peer.logits[0]) < 1e-4


# ---- the frozen tower ---------------------------------------------------------------------------------------------


def runs_of_the_tower(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs, forward = [0], VisionTower.forward

    def counted(self: VisionTower, *given: Tensor) -> Tensor:
        runs[0] += 1
        return forward(self, *given)

    monkeypatch.setattr(VisionTower, "forward", counted)
    return runs


@pytest.mark.parametrize("targets", [FROZEN, TEXT_ALONE])
def test_a_frozen_tower_runs_once_for_a_picture_in_all_epochs_and_after_a_resume(
    folder: Path, tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...]
) -> None:
    settings = run_settings(model=str(folder), targets=targets, batch_size=2, save_every=1, objective="dpo")
    pairs, runs = some_pairs(pictures), runs_of_the_tower(monkeypatch)
    align(replace(settings, out=str(tmp_path / "whole"), epochs=4), pairs)
    assert runs == [3]
    assert len(list((tmp_path / "whole" / "features").iterdir())) == 3
    align(replace(settings, out=str(tmp_path / "again"), epochs=4), pairs)
    assert runs == [6]
    whole, again = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    decoder = load_decoder(folder, dtype="float32", device="cpu")
    decoder.network.requires_grad_(False)
    assert decoder.eyes is not None
    decoder.eyes.store = FeatureStore(tmp_path / "whole" / "features", 10**9)
    lora.attach(decoder.network, targets, rank=4, alpha=8.0)
    ids, images = prompt_of(decoder, pictures)
    decoder.logits([ids], [images])
    assert runs == [6]


def test_without_room_on_disk_the_tower_runs_each_time(
    folder: Path, tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(model=str(folder), out=str(tmp_path / "run"), targets=TEXT_ALONE, epochs=3, cache_gb=0.0)
    runs = runs_of_the_tower(monkeypatch)
    align(settings, some_pairs(pictures))
    assert runs == [9]
    assert not (tmp_path / "run" / "features").exists()


@torch.no_grad()
def test_features_of_another_tower_are_not_taken(folder: Path, tmp_path: Path, pictures: list[str]) -> None:
    decoder = load_decoder(folder, dtype="float32", device="cpu")
    ids, images = prompt_of(decoder, pictures)
    model = decoder.network.model
    assert decoder.eyes is not None
    for expected in (1, 0, 1):
        decoder.eyes.store = FeatureStore(tmp_path, 10**9)
        with counting(model.vision_model) as runs:
            decoder.logits([ids], [images])
        assert runs == [expected]
        if not expected:
            model.vision_model.class_embedding[0] += 0.01
            del decoder.eyes.fingerprint


def test_the_store_keeps_what_it_is_given_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    store, made = FeatureStore(tmp_path, 3 * 4300), []

    def fetch(name: str, size: int = 1000) -> Tensor:
        def make() -> Tensor:
            made.append(name)
            return torch.full((1, 1, size), 1.001)

        return store.fetch(name, make)

    def kept() -> set[str]:
        return {path.stem for path in tmp_path.iterdir()}

    first = fetch("a")
    assert torch.equal(first, torch.full((1, 1, 1000), 1.001))
    assert torch.equal(fetch("a"), first)
    for moment, name in enumerate("abac"):
        fetch(name)
        os.utime(tmp_path / f"{name}.safetensors", ns=(moment, moment))  # clocks of file systems are coarse
    assert made == ["a", "b", "c"]
    fetch("d")
    assert kept() == {"a", "c", "d"}
    fetch("c")  # used now, so the next to go is a
    fetch("e")
    assert kept() == {"c", "d", "e"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= store.limit
    fetch("huge", 4000)
    assert kept() == {"c", "d", "e"}


def test_what_a_gpu_has_made_is_kept_once_it_is_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for again before that, it is what was made, and a later one does not wait for an earlier."""
    store, here, made = FeatureStore(tmp_path, 10**6), {1.0: False, 2.0: False}, []

    def fetch(value: float) -> Tensor:
        return store.fetch(f"{value:.0f}", lambda: (made.append(value), torch.full((1, 1, 5), value))[1])

    monkeypatch.setattr(Arriving, "is_here", lambda coming: here[float(coming.tensor[0, 0, 0])])
    first = fetch(1.0)
    fetch(2.0)
    assert fetch(1.0) is first
    assert not list(tmp_path.iterdir())
    here[2.0] = True
    fetch(1.0)
    assert [path.stem for path in tmp_path.iterdir()] == ["2"]
    monkeypatch.setattr(vision_cache, "AHEAD", 30)
    here[3.0] = False
    fetch(3.0)
    assert [int(float(one.tensor[0, 0, 0])) for one in store.coming.values()] == [3]
    store.finish()
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["1", "2", "3"]
    assert torch.equal(fetch(1.0), first)
    assert fetch(1.0) is not first
    assert made == [1.0, 2.0, 3.0]
    assert not store.coming


def test_a_damaged_file_of_the_store_is_named(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 10**6)
    store.fetch("a", lambda: torch.ones(1, 1, 5))
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        store.fetch("a", lambda: torch.ones(1, 1, 5))
    save_file({"features": torch.ones(5)}, tmp_path / "a.safetensors")
    with pytest.raises(WorkError, match=r"a\.safetensors: not features of a picture; delete the file"):
        store.fetch("a", lambda: torch.ones(1, 1, 5))


# ---- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["cross_attn"], ["multi_modal_projector"], ["vision_model"], ["language_model"], ["q_proj", "fc1"],
     ["lm_head", "cross_attn.k_proj"]],
)  # fmt: skip
def test_an_adapter_of_ours_opens_in_peft_with_equal_logits(
    folder: Path, tmp_path: Path, pictures: list[str], targets: Any
) -> None:
    decoder = adapted(folder, targets)
    ids, images = prompt_of(decoder, pictures)
    peer = peft_of(folder, write_of(decoder, tmp_path / "adapter"))
    token = decoder.network.config.image_token
    with torch.no_grad():
        wanted = peer(**oracle_inputs(ids, images, token)).logits[0]
        base = base_of(folder)(**oracle_inputs(ids, images, token)).logits[0]
    assert error(decoder.logits([ids], [images])[0], wanted) < 1e-5
    assert error(base, wanted) > 1e-3


@pytest.mark.parametrize("older", [False, True])
def test_an_adapter_of_peft_opens_here_with_equal_logits(
    folder: Path, tmp_path: Path, pictures: list[str], older: bool
) -> None:
    """`older`: under the names of the official files, as transformers had them in memory before."""
    with peers():
        from peft import LoraConfig, get_peft_model

        peer = get_peft_model(base_of(folder), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
        stir(peer)
        peer.save_pretrained(tmp_path / "adapter")
    if older:
        path, start = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model."
        stored = {start + on_disk(name.removeprefix(start)): part for name, part in load_file(path).items()}
        assert any(name.startswith(f"{start}language_model.model.layers.1.cross_attn") for name in stored)
        save_file(stored, path)
    decoder = load_decoder(folder, adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    ids, images = prompt_of(decoder, pictures)
    with torch.no_grad():
        wanted = peer(**oracle_inputs(ids, images, decoder.network.config.image_token)).logits[0]
    assert error(decoder.logits([ids], [images])[0], wanted) < 1e-5
    fresh = adapted(folder, "all-linear")
    assert lora.adapted(fresh.network).keys() == lora.adapted(decoder.network).keys()


def test_a_merged_checkpoint_opens_in_transformers_with_equal_logits(
    folder: Path, tmp_path: Path, pictures: list[str]
) -> None:
    decoder = adapted(folder, ["cross_attn", "multi_modal_projector", "fc2", "lm_head"])
    adapter = write_of(decoder, tmp_path / "adapter")
    merge(folder, adapter, tmp_path / "merged", dtype="float32", device="cpu")
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load_file(folder / "model.safetensors"))
    ids, images = prompt_of(decoder, pictures)
    given = oracle_inputs(ids, images, decoder.network.config.image_token)
    with torch.no_grad():
        wanted = base_of(tmp_path / "merged")(**given).logits[0]
    assert error(decoder.logits([ids], [images])[0], wanted) < 1e-5
    again = load_decoder(tmp_path / "merged", dtype="float32", device="cpu")
    assert error(again.logits([ids], [images])[0], wanted) < 1e-5
