"""The CLIP network against transformers' CLIPModel, and mutations that each break the parity."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mint.encoders import clip
from mint.encoders.clip import ClipConfig, ClipModel
from mint.errors import CheckpointError

TEXT = {
    "vocab_size": 130,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 32,
}
END = 129
Inputs = tuple[Tensor, Tensor]


def settings(eos: int = END, activation: str = "quick_gelu") -> dict[str, Any]:
    return {
        "text_config": TEXT | {"eos_token_id": eos, "hidden_act": activation},
        "vision_config": VISION | {"hidden_act": activation},
        "projection_dim": 24,
    }


@cache
def oracle(eos: int = END, activation: str = "quick_gelu") -> nn.Module:
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**settings(eos, activation))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if name != "logit_scale" else torch.tensor(2.0))
    return model


def twin(model: nn.Module, eos: int = END, activation: str = "quick_gelu") -> ClipModel:
    ours = ClipModel(ClipConfig.read(settings(eos, activation)))
    ours.load_state_dict(model.state_dict())  # strict: the names are the checkpoint's
    return ours.eval()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Pictures, and texts of unequal length padded with the end token, as CLIP's tokenizer pads them."""
    torch.manual_seed(1)
    ids = torch.randint(3, END, (6, 20))
    for row, length in enumerate((4, 20, 9, 2, 15, 7)):
        ids[row, length - 1 :] = END
    return ids, torch.randn(4, 3, 96, 96) * 0.1


@torch.no_grad()
def reference(model: nn.Module, inputs: Inputs) -> Tensor:
    ids, pixels = inputs
    first_end = (ids == END).int().argmax(1, keepdim=True)
    mask = (torch.arange(ids.shape[1]) <= first_end).long()
    out: Tensor = model(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits_per_image
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("eos", [2, END])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_logits_equal_transformers(eos: int, activation: str, inputs: Inputs) -> None:
    theirs = oracle(eos, activation)
    assert error(twin(theirs, eos, activation)(*inputs), reference(theirs, inputs)) < 1e-5


@torch.no_grad()
def test_the_old_end_rule_takes_the_largest_id_and_the_new_one_the_named_id(inputs: Inputs) -> None:
    ids, pixels = inputs[0].clone(), inputs[1]
    ids[:, 1] = 50  # an end token that is not the largest id tells the rules apart
    for eos in (2, 50):
        theirs = oracle(eos)
        wanted = theirs(input_ids=ids, pixel_values=pixels).logits_per_image
        assert error(twin(theirs, eos)(ids, pixels), wanted) < 1e-5
        assert error(twin(theirs, 52 - eos)(ids, pixels), wanted) > 1e-3


@torch.no_grad()
def test_a_text_means_the_same_alone_and_padded(inputs: Inputs) -> None:
    model = twin(oracle())
    torch.testing.assert_close(model.text_features(inputs[0][3:4, :2]), model.text_features(inputs[0])[3:4])


def test_sections_named_dict_win_over_the_others_as_in_transformers() -> None:
    values = settings(eos=2)
    values["text_config_dict"] = {key: value for key, value in values["text_config"].items() if key != "eos_token_id"}
    values["vision_config_dict"] = dict(values["vision_config"], num_attention_heads=2)
    config = ClipConfig.read(values)
    wanted = transformers.CLIPConfig(**values)
    assert config.text.eos_token_id == wanted.text_config.eos_token_id == 49407
    assert config.vision.num_attention_heads == wanted.vision_config.num_attention_heads == 2


def towers(model: ClipModel) -> list[nn.Module]:
    return [*model.text_model.encoder.layers, *model.vision_model.encoder.layers]


def epsilons(model: ClipModel, _: object) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2


def other_activation(model: ClipModel, _: object) -> None:
    for layer in towers(model):
        layer.mlp.activation = F.gelu


def other_heads(model: ClipModel, _: object) -> None:
    for layer in towers(model):
        layer.self_attn.heads = 2


def not_causal(_: object, monkeypatch: pytest.MonkeyPatch) -> None:
    true = clip.attend
    monkeypatch.setattr(clip, "attend", lambda *args, **_: true(*args))


def without(path: str) -> Callable[[ClipModel, object], None]:
    def mutate(model: ClipModel, _: object) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())

    return mutate


def pooled_elsewhere(model: ClipModel, _: object) -> None:
    """The picture pooled at its first patch instead of its class token."""
    vision = model.vision_model
    vision.forward = lambda pixels: vision.post_layernorm(  # type: ignore[method-assign]
        vision.encoder(vision.pre_layrnorm(vision.embeddings(pixels)), torch.ones(len(pixels), dtype=torch.long))
    )


def last_end(model: ClipModel, _: object) -> None:
    text = model.text_model
    text.forward = lambda ids: text.final_layer_norm(  # type: ignore[method-assign]
        text.encoder(text.embeddings(ids), torch.full((len(ids),), ids.shape[1] - 1), causal=True)
    )


def swapped_grid(model: ClipModel, _: object) -> None:
    weight = model.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        weight[1:] = weight[1:].view(3, 3, -1).transpose(0, 1).flatten(0, 1).clone()


MUTATIONS: dict[str, Callable[[ClipModel, Any], None]] = {
    "epsilon": epsilons,
    "gelu for quick_gelu": other_activation,
    "heads": other_heads,
    "text not causal": not_causal,
    "pre_layrnorm lost": without("vision_model.pre_layrnorm"),
    "post_layernorm lost": without("vision_model.post_layernorm"),
    "final_layer_norm lost": without("text_model.final_layer_norm"),
    "pooled at the first patch": pooled_elsewhere,
    "positions column by column": swapped_grid,
    "pooled at the last end token": last_end,
    "not normalised": lambda _, monkeypatch: monkeypatch.setattr(F, "normalize", lambda x, **_: x),
    "scale not exponentiated": lambda model, _: model.logit_scale.data.log_(),
}


@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_a_mutation_breaks_the_parity(name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = oracle()
    ours = twin(theirs)
    MUTATIONS[name](ours, monkeypatch)
    assert error(ours(*inputs), reference(theirs, inputs)) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projection_dim": "wide"}, "projection_dim is 'wide'"),
        ({"text_config": []}, "text_config is list, an object was wanted"),
        ({"vision_config": VISION | {"hidden_act": "swish"}}, "vision_config: hidden_act 'swish'"),
        ({"text_config": TEXT | {"eos_token_id": [1, 2]}}, r"text_config: eos_token_id is \[1, 2\]"),
    ],
)
def test_a_config_that_no_network_can_have_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        ClipConfig.read(settings() | change)
