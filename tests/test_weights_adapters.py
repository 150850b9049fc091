"""LoRA adapter folders: PEFT's open here, ours open in PEFT, and other mathematics is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mint.errors import CheckpointError, ConfigError, MintError
from mint.weights.adapters import read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # peft speaks of tied weights and embeddings
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def pairs(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = {Q: (32, 32), V: (16, 32)}
    return {
        name: (torch.randn(rank, wide, generator=generator), torch.randn(out, rank, generator=generator))
        for name, (out, wide) in sizes.items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def model_of(base: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(base).eval()


def saved_by_peft(base: Path, folder: Path, **options: Any) -> Any:
    """A PEFT adapter with random B (PEFT starts it at zero), saved to `folder`."""
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    model = peft.get_peft_model(model_of(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "lora_dropout": 0.1},
    {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
    {"target_modules": r".*\.layers\.1\..*_proj"},
    {"target_modules": ["q_proj", "lm_head"]},
    {
        "rank_pattern": {"v_proj": 3, "^model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 9},
    },
    {"layers_to_transform": [1]},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"exclude_modules": r".*layers\.0\..*v_proj"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_adapter_made_by_peft_reads_here_with_equal_tensors_and_scaling(base, tmp_path, options):
    theirs = saved_by_peft(base, tmp_path, **options)
    adapter = read_adapter(tmp_path)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    assert set(adapter.tensors) == set(layers)
    for name, (a, b) in adapter.tensors.items():
        assert torch.equal(a, layers[name].lora_A["default"].weight)
        assert torch.equal(b, layers[name].lora_B["default"].weight)
        assert adapter.rank(name) == layers[name].r["default"]
        assert adapter.scaling(name) == pytest.approx(layers[name].scaling["default"], rel=1e-12)


@pytest.mark.parametrize("options", [*OPTIONS[:3], *OPTIONS[5:6], *OPTIONS[7:8]])
def test_an_adapter_written_here_opens_in_peft_with_equal_logits(base, tmp_path, options):
    theirs = saved_by_peft(base, tmp_path / "theirs", **options)
    adapter = read_adapter(tmp_path / "theirs")
    given = {
        key: value for key, value in adapter.config.items() if key in {*CONFIG, *options} - {"layers_to_transform"}
    }
    write_adapter(tmp_path / "ours", given, adapter.tensors, base)
    ours = peft.PeftModel.from_pretrained(model_of(base), tmp_path / "ours").eval()
    ids = torch.arange(30).reshape(2, 15)
    plain = model_of(base)(ids).logits
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert (ours(ids).logits - plain).abs().max() > 0.1
    weights = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_all_linear_is_written_out_as_the_modules_it_is(base, tmp_path):
    tensors = pairs() | {"lm_head": (torch.randn(2, 32), torch.randn(40, 2))}
    write_adapter(tmp_path / "a", {**CONFIG, "target_modules": "all-linear"}, tensors, base)
    assert read_adapter(tmp_path / "a").config["target_modules"] == sorted(tensors)
    ours = peft.PeftModel.from_pretrained(model_of(base), tmp_path / "a")
    head = ours.get_submodule("base_model.model.lm_head")
    assert torch.equal(head.lora_B["default"].weight, tensors["lm_head"][1])


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    tensors, names = pairs(), ["q_proj", "v_proj"]
    write_adapter(tmp_path / "one", CONFIG, tensors, "me/base")
    shuffled = dict(reversed(CONFIG.items())) | {"target_modules": names[::-1]}
    write_adapter(tmp_path / "two", shuffled, dict(reversed(tensors.items())), "me/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "one")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_replaces_an_adapter_and_nothing_else(tmp_path):
    write_adapter(tmp_path / "a", CONFIG, pairs(), "base")
    write_adapter(tmp_path / "a", {**CONFIG, "lora_alpha": 9}, pairs(), "base")
    assert read_adapter(tmp_path / "a").scaling(Q) == 4.5
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        write_adapter(tmp_path / "b", CONFIG, pairs(), "base")


def test_base_weights_that_came_along_must_be_the_models_own(base, tmp_path):
    saved_by_peft(base, tmp_path, target_modules=["q_proj", "lm_head"])
    adapter, model = read_adapter(tmp_path), model_of(base)
    assert set(adapter.base) == {"lm_head.weight"}
    adapter.check_base(model)
    adapter.check_base(model.bfloat16())  # in the coarser of the two dtypes
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    with pytest.raises(
        CheckpointError, match=r"carries lm_head\.weight \[40, 32\] of its base model and this model has anoth"
    ):
        adapter.check_base(model)
    with pytest.raises(CheckpointError, match="no such weight"):
        adapter.check_base(nn.Linear(1, 1))


# ---- refusals


def test_peft_adapters_of_other_mathematics_are_refused_by_name(base, tmp_path):
    saved_by_peft(base, tmp_path / "dora", use_dora=True)
    saved_by_peft(base, tmp_path / "saved", modules_to_save=["lm_head"])
    saved_by_peft(base, tmp_path / "bias", lora_bias=True)
    saved_by_peft(base, tmp_path / "pissa", init_lora_weights="pissa")
    for folder, name in {
        "dora": "use_dora",
        "saved": "modules_to_save",
        "bias": "lora_bias",
        "pissa": "init_lora",
    }.items():
        with pytest.raises(CheckpointError, match=name):
            read_adapter(tmp_path / folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, wanted 'LORA'"),
        ({"r": 0}, "r is 0, wanted a whole number above 0"),
        ({"r": 2.0}, "r is 2.0, wanted"),
        ({"r": True}, "r is True, wanted"),
        ({"lora_alpha": -1}, "lora_alpha is -1, wanted"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, wanted"),
        ({"lora_alpha": 10**400}, "lora_alpha is '1000"),
        ({"lora_dropout": 1}, "lora_dropout is 1, wanted"),
        ({"use_rslora": "no"}, "use_rslora is no, wanted"),
        ({"bias": "all"}, "bias is all, wanted 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, wanted nothing: it changes the mathematics"),
        ({"use_dora": True}, "use_dora is True, wanted nothing"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1], wanted nothing"),
        ({"something_new": {"a": 1}}, "something_new is a dict of 1, wanted nothing"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True, wanted nothing"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora, wanted a start"),
        ({"target_modules": []}, "target_modules is [], wanted"),
        ({"target_modules": [1]}, "target_modules is [1], wanted"),
        ({"target_modules": ["q_proj"]}, f"{V} is none of the target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "proj"]}, "target proj has no lora_A and lora_B"),
        ({"rank_pattern": {"v_proj": 3}}, f"{V} has lora_A [2, 32] and lora_B [16, 2], wanted [3, in] and [out, 3]"),
        ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern is a dict of 1, wanted at most 10,000 names, no regular"),
        ({"alpha_pattern": {"v_proj": "x"}}, "alpha_pattern is a dict of 1, wanted"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(tmp_path, change, said):
    folder = tmp_path / "a"
    write_adapter(folder, CONFIG, pairs(), "base")
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        write_adapter(tmp_path / "b", {**CONFIG, **change}, pairs(), "base")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_a_config_that_lacks_what_matters_is_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match=f"no {key}, wanted"):
        write_adapter(tmp_path / "a", {name: value for name, value in CONFIG.items() if name != key}, pairs(), "base")


NAMED = f"base_model.model.{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [
        (NAMED, {}, f"{Q} has only one of lora_A and lora_B"),
        (NAMED, {NAMED: torch.zeros(3, 32)}, f"{Q} has lora_A [3, 32]"),
        (NAMED, {NAMED: torch.zeros(2)}, f"{Q} has lora_A [2]"),
        (
            None,
            {"base_model.model.x.lora_magnitude_vector": torch.zeros(2)},
            "lora_magnitude_vector (float32 [2]) is no lora_A",
        ),
        (
            None,
            {"base_model.model.e.lora_embedding_A": torch.zeros(2, 2)},
            "lora_embedding_A (float32 [2, 2]) is no lora_A",
        ),
        (None, {f"{Q}.lora_A.weight": torch.zeros(2, 32)}, f"tensor {Q}.lora_A.weight (float32 [2, 32]) is no lora_A"),
        (None, {"base_model.model.model.norm.weight": torch.zeros(2)}, "norm.weight (float32 [2]) is no lora_A"),
        (NAMED, {NAMED: torch.zeros(2, 32).long()}, "lora_A.weight (int64 [2, 32]) is no lora_A"),
    ],
)
def test_tensors_that_are_no_lora_are_refused_by_name(tmp_path, drop, add, said):
    write_adapter(tmp_path, CONFIG, pairs(), "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(drop, None)
    save_file(tensors | add, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_adapter(tmp_path)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    write_adapter(tmp_path / "a", CONFIG, pairs(), "base")
    shutil.move(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no lora_A and lora_B in it"):
        write_adapter(tmp_path / "b", CONFIG, {}, "base")


PIECES = [b"[", b"{", b'"', b"-1", b"1e999", b"null", b"true", b"9" * 30, b"..", b"NaN", b"\\ud800", b"\xff", b"lora_B"]


@settings(
    max_examples=int(os.environ.get("MINT_FUZZ", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    st.integers(0, 1200),
    st.integers(0, 9),
    st.binary(max_size=4) | st.sampled_from(PIECES),
)
def test_no_change_of_bytes_in_an_adapter_does_more_than_raise_a_minterror(tmp_path, name, place, cut, new):
    write_adapter(tmp_path / "a", CONFIG, pairs(), "base")
    data = (tmp_path / "a" / name).read_bytes()
    start = place % len(data)
    (tmp_path / "a" / name).write_bytes(data[:start] + new + data[start + cut :])
    try:
        adapter = read_adapter(tmp_path / "a")
    except MintError as error:
        said = str(error)
    else:
        said = ""
        assert all(adapter.scaling(module) > 0 for module in adapter.tensors)
    assert said.isprintable()
