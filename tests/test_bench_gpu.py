"""The measurements that wait for a GPU: every line of them runs, on tiny sizes, and they measure what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import gpu
import models
import models_vision

from mint.decoders.cache import Cache
from mint.kernels import products, timing

RATES = {"products": 1e12, "bytes": 1e11}
TINY = models.SIZES["tiny"]


@pytest.mark.parametrize("name", [name for name in gpu.MODEL_PARTS if name != "replayed"])
def test_every_part_runs_on_tiny_sizes(name):
    lines = list(gpu.MODEL_PARTS[name].lines("tiny", RATES))
    assert not [line for line in lines if "failed" in line]
    assert all(line["per_second"] > 0 for line in lines)
    assert "ours" in {line["side"] for line in lines}


def test_the_check_of_generation_passes_and_sees_a_fault(monkeypatch):
    (line,) = gpu.replayed("tiny", RATES)
    assert line["right"]
    monkeypatch.setattr(Cache, "position", property(lambda self: self.lengths - 1))
    (line,) = gpu.replayed("tiny", RATES)
    assert not line["right"]


def test_both_sides_train_and_write_with_one_network():
    """With the same weights, ours and transformers' give the same logits, and the first losses agree."""
    ours, other = models.decoder_of(TINY), models.theirs(TINY)
    other.load_state_dict(ours.network.state_dict())
    prompt = gpu.prompts_of(TINY, 1, 9)
    with torch.no_grad():
        wanted = other(torch.tensor(prompt, device=other.device)).logits.float()
    torch.testing.assert_close(ours.logits(prompt).float(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    pairs = models.pairs_of(TINY, TINY.lengths[0])
    step = models.our_step(models.attach(ours, 2), pairs)
    found = [step() for _ in range(3)]
    assert abs(found[0] - models.trl_step(other, pairs, 2)()) < 1e-2 * found[0]
    assert found[2] < found[0]


def test_what_is_counted_is_what_the_network_has():
    network = models.attach(models.decoder_of(TINY), 2).network
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m is not network.lm_head]
    assert TINY.weights == sum(m.weight.numel() for m in linear)
    assert TINY.adapters(2) == sum(m.lora_A.numel() + m.lora_B.numel() for m in linear)
    assert 2.8e9 < models.SIZES["gpu"].weights < 2.83e9


def test_liger_takes_the_place_of_norms_swiglu_and_rotation_for_its_own_side_alone():
    from transformers.models.llama import modeling_llama

    plain, seen, before = modeling_llama.apply_rotary_pos_emb, [], dict(vars(modeling_llama))
    layer = models.with_liger(models.theirs(TINY)).model.layers[0]
    assert all("Liger" in repr(part) or "liger" in str(part.forward) for part in (layer.input_layernorm, layer.mlp))
    models.turning_with_liger(lambda: seen.append(modeling_llama.apply_rotary_pos_emb))()
    assert "liger" in seen[0].__name__
    assert modeling_llama.apply_rotary_pos_emb is plain
    assert vars(modeling_llama) == before
    other = models.theirs(TINY)
    assert not [part for part in other.modules() if "iger" in str(part.forward) or "Liger" in repr(part)]
    assert "iger" not in str(type(other).forward)


@pytest.mark.parametrize("trained", [False, True])
def test_what_a_step_on_pictures_needs_is_near_what_torch_counts(tmp_path, monkeypatch, trained):
    """Torch counts neither SDPA on a processor nor oneDNN's own products; the first layer hands no gradient on."""
    monkeypatch.setattr(products, "_onednn", None)
    size = models_vision.SIZES["cpu"]
    decoder = models_vision.seeing_decoder(size, tmp_path, trained)
    step = models_vision.seeing_step(decoder, size)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    assert 0.95 < models_vision.seeing_operations(decoder, size, trained) / counter.get_total_flops() < 1.15


def test_a_side_that_cannot_be_made_fails_alone():
    def broken():
        raise ImportError("no such package")

    lines = list(timing.compared("b", "c", {"ours": lambda: 0, "peer": gpu.later(broken)}, rounds=1))
    assert [line.get("failed") for line in lines] == [None, "ImportError: no such package"]
