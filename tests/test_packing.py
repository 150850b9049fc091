"""Packed weights of generation: the same products, tokens as transformers writes them, and nothing of it left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_llama
from mint.kernels.products import has_onednn

from mint.decoders import Decoder, load_decoder, lora, packing
from mint.decoders.generation import Sampling, generate, steps
from mint.decoders.layers import quick_product
from mint.decoders.packing import packed

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="this processor has no products in bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("packing") / "llama", eos_token_id=None)


def held(decoder: Decoder) -> set[str]:
    """Names of what holds blocks: weights, and modules whose layers stand together."""
    modules = {name for name, module in decoder.network.named_modules() if "packed" in vars(module)}
    return modules | {name for name, weight in decoder.network.named_parameters() if hasattr(weight, "packed")}


def prompts(rows: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(rows)
    return torch.randint(0, 320, (rows, 30), generator=drawn).tolist()


def held_while_writing(decoder: Decoder, rows: int, count: int) -> set[str]:
    with torch.inference_mode():
        made = steps(decoder.network, prompts(rows), count, lambda logits: logits.argmax(-1), CPU)
        next(made)
        return held(decoder)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_a_packed_product_is_as_exact_as_a_plain_one(rows: int, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 200, generator=drawn).to(dtype) for n in (rows, 333))
    truth, plain = x.double() @ weight.double().T, F.linear(x, weight)
    vars(weight)["packed"] = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    found = quick_product(x, weight)
    assert found.dtype == dtype
    error, budget = ((y - truth).norm() / truth.norm() for y in (found, plain))
    assert error <= max(1.1 * budget, 1e-6)  # in float32 the order of additions differs


def test_five_rows_are_written_packed_as_transformers_writes_them(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    decoder = load_decoder(folder, device="cpu", dtype="float32")
    oracle: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = torch.tensor(prompts(5))
    theirs = oracle.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=24, do_sample=False)
    assert held_while_writing(decoder, 5, 24)
    assert generate(decoder.network, asked.tolist(), 24, Sampling(), (), CPU) == theirs[:, 30:].tolist()


@needs_bfloat16
def test_every_weight_is_packed_once_and_given_back_adapted_or_not(folder: Path) -> None:
    decoder = load_decoder(folder, device="cpu", dtype="bfloat16")
    matrices = {n for n, p in decoder.network.named_parameters() if p.ndim == 2}  # a tied head is the embedding
    beside = {n for n in matrices if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    attentions = {n.removesuffix(".q_proj.weight") for n in beside if "q_proj" in n}
    feeds = {n.removesuffix(".up_proj.weight") for n in beside if "up_proj" in n}
    assert attentions
    assert held_while_writing(decoder, 1, 24) == (matrices - beside) | attentions | feeds
    lora.attach(decoder.network, "q_proj", rank=2, alpha=4)  # what stands beside an adapter is packed by itself
    alone = {n for n in beside if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj")}
    assert held_while_writing(decoder, 1, 24) == (matrices - beside) | alone | feeds
    assert not held(decoder)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_products_of_one_input_are_the_same_as_one(folder: Path, dtype: torch.dtype) -> None:
    network = load_decoder(folder, device="cpu", dtype=dtype).network
    block = network.model.layers[0]
    x = torch.randn(5, network.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        for several in (block.self_attn, block.mlp):
            each = several.products(x)
            with packed(network, 5, packing.STEPS, CPU):
                as_one = several.products(x)
                assert len({y.untyped_storage().data_ptr() for y in as_one}) == 1
            for found, wanted in zip(as_one, each, strict=True):
                torch.testing.assert_close(found, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_while_a_text_is_written_gradients_flow_as_ever(folder: Path) -> None:
    network = load_decoder(folder, device="cpu", dtype="float32").network
    x = torch.randn(5, network.config.hidden_size, requires_grad=True)
    with packed(network, 5, packing.STEPS, CPU):
        assert all(y.requires_grad for y in network.model.layers[0].mlp.products(x))


def test_an_adapter_counts_in_a_packed_text(folder: Path, monkeypatch: Any) -> None:
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    lora.attach(decoder.network, ["v_proj", "up_proj"], rank=2, alpha=64)
    for layer in lora.adapted(decoder.network).values():
        torch.nn.init.normal_(layer.lora_B.detach(), generator=torch.Generator().manual_seed(1))

    def written() -> list[list[int]]:
        return generate(decoder.network, prompts(5), 24, Sampling(), (), CPU)

    adapted = written()
    with lora.switched_off(decoder.network):
        assert written() != adapted
    monkeypatch.setattr(packing, "STEPS", 25)
    assert written() == adapted


def test_a_short_text_and_a_full_memory_leave_weights_as_they_lie(folder: Path, monkeypatch: Any) -> None:
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    assert not held_while_writing(decoder, 5, packing.STEPS - 1)
    assert not held_while_writing(decoder, packing.FLOAT32_ROWS - 1, 24)
    monkeypatch.setattr(packing, "free_memory", lambda _: 1000)
    assert not held_while_writing(decoder, 5, 24)


GPU = torch.device("cuda")


def laid(folder: Path) -> Decoder:
    """The decoder after a text as a GPU writes it, here on the processor."""
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    with packed(decoder.network, 1, packing.STEPS, GPU):
        assert held(decoder) == {
            name for name, module in decoder.network.named_modules() if hasattr(module, "products")
        }
    assert not held(decoder)
    return decoder


def test_weights_of_one_input_are_laid_together_once_and_stay_what_they_were(folder: Path) -> None:
    plain, decoder = load_decoder(folder, device="cpu", dtype="float32"), laid(folder)
    found, wanted = decoder.network.state_dict(), plain.network.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    attention = decoder.network.model.layers[0].self_attn
    weights = [layer.weight for layer in attention.layers()]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    before = [weight.data_ptr() for weight in decoder.network.parameters()]
    with packed(decoder.network, 1, packing.STEPS, GPU), torch.inference_mode():
        assert before == [weight.data_ptr() for weight in decoder.network.parameters()]
        assert attention.packed.data_ptr() == weights[0].data_ptr()
        assert torch.equal(attention.packed, torch.cat(weights))
        weights[1].zero_()  # the view shows it
        assert not attention.packed[len(weights[0]) :][: len(weights[1])].any()


@pytest.mark.parametrize("laid_in_inference", [False, True])
def test_weights_that_lie_together_are_trained_beside_and_on_like_any(folder: Path, laid_in_inference: bool) -> None:
    with torch.inference_mode(laid_in_inference):
        decoder = laid(folder)
    network = decoder.network
    lora.attach(network, ["v_proj", "up_proj"], rank=2, alpha=4)
    network.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    x = torch.randn(5, network.config.hidden_size, requires_grad=True)
    sum(y.sum() for y in network.model.layers[0].self_attn.products(x)).backward()
    assert x.grad is not None
    assert network.model.layers[0].self_attn.q_proj.weight.grad is not None
    with packed(network, 1, packing.STEPS, GPU):
        assert not held(decoder)  # an adapter stands in each group


def test_a_sum_is_made_by_the_last_product_where_weights_lie_together(folder: Path) -> None:
    network = load_decoder(folder, device="cpu", dtype="float32").network
    mlp, drawn = network.model.layers[0].mlp, torch.Generator().manual_seed(0)
    total, x = torch.randn(2, 3, network.config.hidden_size, generator=drawn)
    with torch.inference_mode():
        wanted = total + mlp(x)
        with packed(network, 3, packing.STEPS, GPU):
            torch.testing.assert_close(mlp.added_to(total.clone(), x), wanted, rtol=1e-4, atol=1e-4)
            lora.attach(network, "down_proj", rank=2, alpha=4)
            assert mlp.added_to(total, x) is not total
            torch.testing.assert_close(mlp.added_to(total, x), wanted, rtol=1e-4, atol=1e-4)


def test_a_decoder_in_parts_is_left_as_it_lies(folder: Path, monkeypatch: Any) -> None:
    """Its last products are added up over the ranks by what stands around them."""
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    lora.attach(decoder.network, "lm_head", rank=2, alpha=4)
    monkeypatch.setattr(packing.parallel, "is_part", lambda weight: weight is decoder.network.lm_head.lora_B)
    with packed(decoder.network, 1, packing.STEPS, GPU):
        assert not held(decoder)
