"""LoRA against PEFT: the same adapter gives the same logits and gradients in both, whoever wrote the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from students import ids_of, peers, peft_of, stir, transformers_of, write_student
from torch import nn

from mint.decoders import Decoder, load_decoder, lora
from mint.decoders.merging import merge
from mint.errors import CheckpointError, ConfigError
from mint.trees import Text, token_tree
from mint.weights.adapters import read_adapter, write_adapter

IDS = ids_of(2, 23)
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False, seed=3)


def student(folder: Path, targets: Any = lora.ALL_LINEAR, **choices: Any) -> tuple[Decoder, dict[str, Any]]:
    """A decoder with a stirred adapter, and the config that PEFT reads it by."""
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    settings: dict[str, Any] = {"rank": 5, "alpha": 7.0, **choices}
    names = lora.attach(decoder.network, targets, **settings)
    stir(decoder.network)
    config = {
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "use_rslora": settings.get("rslora", False),
        "target_modules": lora.short_names(decoder.network, names),
    }
    return decoder, config


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ---- which layers ---------------------------------------------------------------------------------------------------


def test_targets_are_last_names_whole_names_or_all_linear(tied: Path) -> None:
    network = load_decoder(tied, device="meta").network
    assert lora.targets_of(network, "q_proj") == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert lora.targets_of(network, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert lora.targets_of(network, "mlp.up_proj") == [f"model.layers.{n}.mlp.up_proj" for n in range(2)]
    everything = lora.targets_of(network, "all-linear")
    assert len(everything) == 14
    assert "lm_head" not in everything
    assert lora.targets_of(network, ["all-linear", "lm_head"]) == [*everything, "lm_head"]


def test_a_target_that_does_not_exist_is_refused_with_the_names_there_are(tied: Path) -> None:
    network = load_decoder(tied, device="meta").network
    with pytest.raises(
        ConfigError, match=r"--targets query: no such linear layer; there are down_proj, .*lm_head.*all-l"
    ):
        lora.targets_of(network, ["q_proj", "query"])
    with pytest.raises(ConfigError, match="_proj: no such"):
        lora.targets_of(network, "_proj")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_sizes_that_make_no_adapter_are_refused(tied: Path, wrong: dict[str, Any]) -> None:
    network = load_decoder(tied, device="meta").network
    with pytest.raises(ConfigError, match="wanted rank >= 1, alpha > 0, 0 <= dropout < 1"):
        lora.attach(network, "q_proj", **{"rank": 4, "alpha": 8.0, **wrong})


def test_a_layer_is_adapted_once(tied: Path) -> None:
    decoder, _ = student(tied, "q_proj")
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has an adapter already; merge it first"):
        lora.attach(decoder.network, "q_proj", rank=4, alpha=8.0)


def test_only_the_adapter_is_trained(tied: Path) -> None:
    decoder, _ = student(tied, ["all-linear", "lm_head"])
    trained = {name for name, p in decoder.network.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{side}" for n in lora.adapted(decoder.network) for side in ("lora_A", "lora_B")}


# ---- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_leaves_the_network_as_it_is_bit_for_bit(tied: Path, dtype: str) -> None:
    decoder = load_decoder(tied, device="cpu", dtype=dtype)
    before = decoder.logits(IDS)
    lora.attach(decoder.network, ["all-linear", "lm_head"], rank=5, alpha=7.0)
    assert torch.equal(decoder.logits(IDS), before)


def test_the_seed_alone_decides_the_start(tied: Path) -> None:
    def start(seed: int) -> dict[str, Any]:
        network = load_decoder(tied, device="cpu", dtype="float32").network
        lora.attach(network, "q_proj", rank=4, alpha=8.0, seed=seed)
        return {name: a for name, (a, _) in lora.tensors(network).items()}

    torch.manual_seed(5)
    first = start(1)
    torch.manual_seed(6)
    again, other = start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    bound = 128**-0.5
    assert all(0.9 * bound < a.abs().max() <= bound for a in first.values())


# ---- PEFT reads ours, we read PEFT's --------------------------------------------------------------------------------

OURS = [
    pytest.param("all-linear", {}, id="all-linear"),
    pytest.param(["q_proj", "v_proj"], {"rslora": True}, id="rslora"),
    pytest.param(["model.layers.1.mlp.down_proj"], {}, id="one-layer"),
    pytest.param(["all-linear", "lm_head"], {}, id="with-head"),
]


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize(("targets", "choices"), OURS)
def test_our_adapter_opens_in_peft_with_equal_logits(
    base: str, targets: Any, choices: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    decoder, config = student(folder, targets, **choices)
    write_adapter(tmp_path / "adapter", config, lora.tensors(decoder.network), folder)
    with peers():
        from peft import PeftModel

        model = PeftModel.from_pretrained(transformers_of(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(decoder.logits(IDS), logits_of(model), rtol=1e-5, atol=1e-5)
    with lora.switched_off(decoder.network):
        assert (decoder.logits(IDS) - logits_of(model)).abs().max() > 1e-2  # the oracle can see the adapter


PEFTS = [
    pytest.param({"r": 5, "lora_alpha": 7, "target_modules": "all-linear"}, id="all-linear"),
    pytest.param({"r": 6, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}, id="rslora"),
    pytest.param({"r": 3, "lora_alpha": 9, "target_modules": [*EVERY, "lm_head"]}, id="with-head"),
    pytest.param(
        {
            "r": 5,
            "lora_alpha": 7,
            "target_modules": EVERY,
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"down_proj": 21},
        },
        id="patterns",
    ),
]


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("config", PEFTS)
def test_an_adapter_of_peft_opens_here_with_equal_logits(
    base: str, config: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    model = peft_of(folder, **config)
    with peers():
        model.save_pretrained(tmp_path)
    ours = load_decoder(folder, adapter=tmp_path, device="cpu", dtype="float32")
    torch.testing.assert_close(ours.logits(IDS), logits_of(model), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in ours.network.parameters())


def test_the_parity_would_see_a_wrong_scale(untied: Path, tmp_path: Path) -> None:
    model = peft_of(untied, r=6, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "up_proj"])
    with peers():
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": False}))
    ours = load_decoder(untied, adapter=tmp_path, device="cpu", dtype="float32")
    assert (ours.logits(IDS) - logits_of(model)).abs().max() > 1e-3


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_of_a_and_b_equal_those_of_peft(
    base: str, head: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    model = peft_of(folder, r=5, lora_alpha=7, target_modules=[*EVERY, "lm_head"] if head else EVERY)
    with peers():
        model.save_pretrained(tmp_path)
    ours = load_decoder(folder, device="cpu", dtype="float32")
    lora.load(ours.network, read_adapter(tmp_path), trainable=True)
    weights = torch.linspace(0.5, 1.5, 22)

    logp = model(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    (logp * weights).sum().backward()
    tree = token_tree([Text(row) for row in IDS.tolist()])
    found = ours.token_logp(tree)[tree.member_edges].view(2, 22)
    torch.testing.assert_close(found, logp.detach(), rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()

    theirs = dict(model.named_parameters())
    for name, layer in lora.adapted(ours.network).items():
        for side in ("lora_A", "lora_B"):
            wanted = theirs[f"base_model.model.{name}.{side}.default.weight"].grad
            error = (getattr(layer, side).grad - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5, f"{name}.{side}: {error:.1e}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_fused_layer_has_the_gradients_of_the_plain_formula(bias: bool, dropped: bool) -> None:
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(12, 9, bias=bias), rank=3, scale=1.7, dropout=0.3 if dropped else 0.0)
    stir(layer, std=1.0)
    x = torch.randn(7, 12, requires_grad=True)
    torch.manual_seed(4)
    layer.train()(x).square().sum().backward()
    parts = [x, layer.lora_A, layer.lora_B, *([layer.bias] if bias else [])]
    found = [part.grad for part in parts]
    torch.manual_seed(4)
    inner = F.dropout(x, 0.3) if dropped else x
    plain = F.linear(x, layer.weight, layer.bias) + 1.7 * inner @ layer.lora_A.T @ layer.lora_B.T
    wanted = torch.autograd.grad(plain.square().sum(), parts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_a_bfloat16_network_has_an_adapter_and_gradients_in_float32(tied: Path) -> None:
    decoder = load_decoder(tied, device="cpu", dtype="bfloat16")
    lora.attach(decoder.network, ["all-linear", "lm_head"], rank=5, alpha=7.0)
    stir(decoder.network)
    decoder.token_logp(token_tree([Text(IDS[0].tolist())])).sum().backward()
    for layer in lora.adapted(decoder.network).values():
        assert layer.weight.dtype == torch.bfloat16
        for side in (layer.lora_A, layer.lora_B):
            assert side.dtype == side.grad.dtype == torch.float32
            assert side.grad.abs().max() > 0


# ---- dropout --------------------------------------------------------------------------------------------------------


def identity(width: int, dropout: float) -> lora.LoRAHead:
    """A layer whose output is its dropped input: no weight, A and B the identity."""
    base = nn.Linear(width, width, bias=False)
    nn.init.zeros_(base.weight)
    layer = lora.LoRAHead(base, rank=width, scale=1.0, dropout=dropout)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(width))
        layer.lora_B.copy_(torch.eye(width))
    return layer


@pytest.mark.parametrize("way", ["forward", "low"])
def test_dropout_drops_its_share_of_the_inputs_and_keeps_the_mean(way: str) -> None:
    torch.manual_seed(0)
    layer = identity(50, 0.3).train()
    x = torch.ones(2000, 50)
    out = layer(x) if way == "forward" else layer.adapter(x)["low"]
    dropped = (out == 0).float().mean().item()
    assert abs(dropped - 0.3) < 4 * (0.3 * 0.7 / 100_000) ** 0.5
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([1 / 0.7]))
    assert not torch.equal(out[0] == 0, out[1] == 0)


def test_dropout_is_off_in_evaluation() -> None:
    x = torch.randn(5, 8)
    torch.testing.assert_close(identity(8, 0.9).eval()(x), x)


# ---- adapters that do not fit, adapters off -------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused_by_the_name_of_the_layer(tied: Path, tmp_path: Path) -> None:
    wide = write_student(tmp_path / "wide", intermediate_size=192)
    deep = write_student(tmp_path / "deep", num_hidden_layers=3)
    for other, place in ((wide, "up_proj"), (deep, "layers.2")):
        decoder, config = student(other)
        write_adapter(tmp_path / "adapter", config, lora.tensors(decoder.network), other)
        wanted = r"adapter: model\..*(up|down|gate)_proj has A \[5, \d+\], B \[\d+, 5\]; wanted A"
        match = wanted if place == "up_proj" else r"adapts model\.layers\.2\.\S+, which this model has not"
        with pytest.raises(CheckpointError, match=match):
            load_decoder(tied, adapter=tmp_path / "adapter", device="cpu", dtype="float32")


def test_switched_off_is_the_base_and_back_again_even_after_an_error(tied: Path) -> None:
    base = load_decoder(tied, device="cpu", dtype="float32").logits(IDS)
    decoder, _ = student(tied, ["all-linear", "lm_head"])
    adapted = decoder.logits(IDS)
    with lora.switched_off(decoder.network):
        assert torch.equal(decoder.logits(IDS), base)
    assert torch.equal(decoder.logits(IDS), adapted)
    with pytest.raises(KeyError), lora.switched_off(decoder.network):
        raise KeyError
    assert torch.equal(decoder.logits(IDS), adapted)
    assert not torch.equal(adapted, base)


def test_switched_off_holds_for_the_log_probabilities_of_an_adapted_head(tied: Path) -> None:
    tree = token_tree([Text(IDS[0].tolist())])
    base = load_decoder(tied, device="cpu", dtype="float32").token_logp(tree)
    decoder, _ = student(tied, ["lm_head"])
    with torch.no_grad(), lora.switched_off(decoder.network):
        assert torch.equal(decoder.token_logp(tree), base)


# ---- merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("targets", [["all-linear"], ["all-linear", "lm_head"]])
def test_merge_writes_a_plain_checkpoint_that_transformers_opens_with_equal_logits(
    base: str, targets: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    decoder, config = student(folder, targets)
    write_adapter(tmp_path / "adapter", config, lora.tensors(decoder.network), folder)
    found = merge(folder, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    wanted = decoder.logits(IDS)
    assert found["bytes"] == (tmp_path / "merged" / "model.safetensors").stat().st_size
    torch.testing.assert_close(logits_of(transformers_of(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-5)
    ours = load_decoder(tmp_path / "merged", device="cpu", dtype="float32")
    torch.testing.assert_close(ours.logits(IDS), wanted, rtol=1e-4, atol=1e-5)
    assert not lora.adapted(ours.network)
    assert ours.tokenizer.encode("the thin chin") == decoder.tokenizer.encode("the thin chin")


def test_merge_keeps_the_dtype_of_the_base_and_rounds_once(tmp_path: Path) -> None:
    folder = write_student(tmp_path / "base", dtype=torch.bfloat16)
    decoder, config = student(folder, ["q_proj"])
    write_adapter(tmp_path / "adapter", config, lora.tensors(decoder.network), folder)
    merge(folder, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert (tmp_path / "merged/model.safetensors").stat().st_size < 1.01 * (folder / "model.safetensors").stat().st_size
    written = load_decoder(tmp_path / "merged", device="cpu", dtype="bfloat16")
    for name, layer in lora.adapted(decoder.network).items():
        exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        assert torch.equal(written.network.get_submodule(name).weight, exact.float().bfloat16())


def test_merge_does_not_write_over_its_own_base(tied: Path, tmp_path: Path) -> None:
    decoder, config = student(tied, ["q_proj"])
    write_adapter(tmp_path / "adapter", config, lora.tensors(decoder.network), tied)
    before = (tied / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is the base model itself; give a new folder"):
        merge(tied, tmp_path / "adapter", tied, device="cpu")
    assert (tied / "model.safetensors").read_bytes() == before
