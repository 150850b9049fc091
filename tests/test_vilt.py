"""The ViLT network against transformers' ViltForQuestionAnswering, and mutations that each break the parity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mint.encoders import vilt
from mint.encoders.vilt import ViltConfig, ViltForQuestionAnswering, initialise
from mint.errors import CheckpointError

TINY = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 128,
    "patch_size": 32,
    "max_position_embeddings": 40,
}
CLASSES = 7
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny official-layout checkpoint with wide weights (std 0.3)."""
    folder = tmp_path_factory.mktemp("vilt")
    torch.manual_seed(0)
    model = transformers.ViltForQuestionAnswering(transformers.ViltConfig(**TINY, num_labels=CLASSES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(oracle: Path) -> transformers.ViltForQuestionAnswering:
    return transformers.ViltForQuestionAnswering.from_pretrained(oracle).eval()


@pytest.fixture
def ours(oracle: Path, theirs: transformers.ViltForQuestionAnswering) -> ViltForQuestionAnswering:
    model = ViltForQuestionAnswering(ViltConfig.read(json.loads((oracle / "config.json").read_text())), CLASSES)
    model.load_state_dict(theirs.state_dict())  # strict: the names are the checkpoint's
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Unequal pictures (4x6, 6x4, 2x3, 4x4 and 1x1 patches) and unequal notes."""
    torch.manual_seed(1)
    sizes, lengths = [(128, 192), (192, 128), (64, 96), (128, 128), (32, 32)], [9, 23, 3, 14, 40]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels, mask = torch.zeros(5, 3, height, width), torch.zeros(5, height, width, dtype=torch.long)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w], mask[i, :h, :w] = torch.randn(3, h, w) * 0.1, 1
    text_mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 120, (5, 40)) * text_mask, text_mask, pixels, mask


@torch.no_grad()
def reference(model: nn.Module, batch: Batch) -> Tensor:
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
    out: Tensor = model(**dict(zip(names, batch, strict=True))).logits
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def test_logits_equal_transformers_on_unequal_pictures_and_notes(
    ours: ViltForQuestionAnswering, theirs: nn.Module, batch: Batch
) -> None:
    assert error(ours(*batch), reference(theirs, batch)) < 1e-5


@torch.no_grad()
def test_logits_equal_transformers_on_one_full_picture(
    ours: ViltForQuestionAnswering, theirs: nn.Module, batch: Batch
) -> None:
    one: Batch = (batch[0][1:2, :23], batch[1][1:2, :23], batch[2][:1, :, :128, :128], torch.ones(1, 128, 128).long())
    assert error(ours(*one), reference(theirs, one)) < 1e-5


@torch.no_grad()
def test_a_case_scores_alone_as_in_a_batch(ours: ViltForQuestionAnswering, batch: Batch) -> None:
    together = ours(*batch)
    alone = ours(batch[0][2:3, :3], batch[1][2:3, :3], batch[2][2:3, :, :64, :96], batch[3][2:3, :64, :96])
    assert error(alone, together[2:3]) < 1e-5


@torch.no_grad()
def test_patches_come_in_one_order_row_by_row(ours: ViltForQuestionAnswering, batch: Batch) -> None:
    embeddings = ours.vilt.embeddings
    states, valid = embeddings._patches(batch[2], batch[3])
    again, _ = embeddings._patches(batch[2], batch[3])
    assert torch.equal(states, again)
    assert valid.sum(1).tolist() == [24, 24, 6, 16, 1]
    patches = embeddings.patch_embeddings(batch[2])[1].permute(1, 2, 0)[:6, :4]  # the tall picture's own grid
    table = embeddings.position_embeddings[0, 1:].T.view(1, 64, 4, 4)
    grid = F.interpolate(table, size=(6, 4), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(states[1], (patches + grid).flatten(0, 1))


def test_a_tall_and_a_wide_picture_need_no_more_tokens_than_each(ours: ViltForQuestionAnswering, batch: Batch) -> None:
    states, _ = ours.vilt.embeddings._patches(batch[2], batch[3])
    assert states.shape[1] == 24  # the padded grid of the batch has 36


@torch.no_grad()
def test_gradients_equal_transformers(ours: ViltForQuestionAnswering, theirs: nn.Module, batch: Batch) -> None:
    targets = torch.rand(5, CLASSES)
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
    with torch.enable_grad():
        theirs(**dict(zip(names, batch, strict=True)), labels=targets).loss.backward()
        (F.binary_cross_entropy_with_logits(ours(*batch), targets) * CLASSES).backward()
    for (name, mine), (other, wanted) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        if wanted.grad is not None:
            scale = wanted.grad.abs().max().clamp_min(1e-3)
            assert float((mine.grad - wanted.grad).abs().max() / scale) < 1e-3, name
    theirs.zero_grad()


@pytest.mark.parametrize(("old", "new"), [(12, 12), (12, 20), (12, 7), (12, 1), (4, 2), (1, 3)])
def test_stretching_equals_interpolation_with_aligned_corners(old: int, new: int) -> None:
    line = torch.randn(1, 5, old)
    wanted = F.interpolate(line, size=new, mode="linear", align_corners=True)[0]
    torch.testing.assert_close(line[0] @ vilt.stretch(old, new).T, wanted)


def norm_eps(model: ViltForQuestionAnswering, eps: float, which: Callable[[str], bool]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and which(name):
            module.eps = eps


def no_tall_grids(model: ViltForQuestionAnswering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions stretched to the batch's grid instead of each picture's own."""
    true = model.vilt.embeddings._positions
    monkeypatch.setattr(model.vilt.embeddings, "_positions", lambda valid: true(torch.ones_like(valid)))


def corners_not_aligned(_: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpolation between the centres of cells instead of between the outermost points."""

    def centred(old: int, new: int) -> Tensor:
        places = ((torch.arange(new) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        return (1 - (places[:, None] - torch.arange(old)).abs()).clamp_min(0)

    monkeypatch.setattr(vilt, "stretch", centred)


def nearest_positions(_: object, monkeypatch: pytest.MonkeyPatch) -> None:
    true = vilt.stretch
    monkeypatch.setattr(vilt, "stretch", lambda old, new: F.one_hot(true(old, new).argmax(1), old).float())


def blind_mask(_: object, monkeypatch: pytest.MonkeyPatch) -> None:
    true = vilt.attend
    monkeypatch.setattr(vilt, "attend", lambda *args, **_: true(*args[:4]))


def other_heads(model: ViltForQuestionAnswering, _: object) -> None:
    for layer in model.vilt.encoder.layer:
        layer.attention.attention.heads = 2


def swap(model: nn.Module, path: str, first: int, second: int) -> None:
    weight = model.get_parameter(path)
    with torch.no_grad():
        weight[[first, second]] = weight[[second, first]].clone()


def other_activation(model: ViltForQuestionAnswering, _: object) -> None:
    for layer in model.vilt.encoder.layer:
        layer.activation = vilt.ACTIVATIONS["quick_gelu"]


def post_norm_lost(model: ViltForQuestionAnswering, _: object) -> None:
    model.vilt.layernorm = nn.Identity()


def image_norm_added(model: ViltForQuestionAnswering, monkeypatch: pytest.MonkeyPatch) -> None:
    true = model.vilt.embeddings._patches

    def normed(pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states, valid = true(pixels, mask)
        return F.layer_norm(states, states.shape[-1:]), valid

    monkeypatch.setattr(model.vilt.embeddings, "_patches", normed)


def pooled_at_the_picture(model: ViltForQuestionAnswering, monkeypatch: pytest.MonkeyPatch) -> None:
    true = model.vilt.embeddings.forward
    monkeypatch.setattr(
        model.vilt.embeddings, "forward", lambda *batch: tuple(part.roll(-40, 1) for part in true(*batch))
    )


MUTATIONS = {
    "modality types swapped": lambda model, _: swap(model, "vilt.embeddings.token_type_embeddings.weight", 0, 1),
    "text type offset by one": lambda model, _: swap(
        model, "vilt.embeddings.text_embeddings.token_type_embeddings.weight", 0, 1
    ),
    "text positions shifted": lambda model, _: swap(
        model, "vilt.embeddings.text_embeddings.position_embeddings.weight", 0, 1
    ),
    "corners not aligned": corners_not_aligned,
    "nearest positions": nearest_positions,
    "positions of the batch's grid": no_tall_grids,
    "mask ignored": blind_mask,
    "heads": other_heads,
    "quick_gelu": other_activation,
    "final norm lost": post_norm_lost,
    "picture normed like text": image_norm_added,
    "pooled at the picture's class token": pooled_at_the_picture,
    "no tanh in the pooler": lambda _, monkeypatch: monkeypatch.setattr(torch, "tanh", lambda x: x),
}


@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_a_mutation_breaks_the_parity(
    name: str,
    ours: ViltForQuestionAnswering,
    theirs: nn.Module,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = reference(theirs, batch)
    MUTATIONS[name](ours, monkeypatch)
    assert error(ours(*batch), wanted) > 1e-3


@pytest.mark.parametrize(
    ("which", "eps"), [("layernorm_before", 1e-5), ("text_embeddings.LayerNorm", 1e-5), ("classifier.1", 1e-12)]
)
@torch.no_grad()
def test_each_epsilon_is_the_checkpoints(
    which: str, eps: float, oracle: Path, theirs: nn.Module, ours: ViltForQuestionAnswering, batch: Batch
) -> None:
    """Small inputs to the norms make their epsilon show: 1e-12 in the blocks, 1e-5 in the classifier."""
    shrunk = {name: value * (1e-3 if _feeds_a_norm(name) else 1.0) for name, value in theirs.state_dict().items()}
    small = transformers.ViltForQuestionAnswering(transformers.ViltConfig.from_pretrained(oracle)).eval()
    small.load_state_dict(shrunk)
    ours.load_state_dict(shrunk)
    wanted = reference(small, batch)
    assert error(ours(*batch), wanted) < 1e-4
    norm_eps(ours, eps, lambda name: which in name)
    assert error(ours(*batch), wanted) > 1e-3


def _feeds_a_norm(name: str) -> bool:
    return ("embeddings" in name and "LayerNorm" not in name) or "classifier.0" in name


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_act", "swoosh", "hidden_act 'swoosh' is not one of gelu, quick_gelu"),
        ("hidden_size", "64", "hidden_size is '64', int was wanted"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_attention_heads", 5, "not a multiple of num_attention_heads 5"),
        ("image_size", 16, "image_size 16 is below patch_size 32"),
        ("qkv_bias", 1, "qkv_bias is 1, bool was wanted"),
    ],
)
def test_a_config_that_no_network_can_have_is_refused_by_name(key: str, value: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        ViltConfig.read(TINY | {key: value}, "here/config.json")


def test_fresh_weights_repeat_by_seed_and_leave_the_norms_at_one() -> None:
    models = [ViltForQuestionAnswering(ViltConfig.read(TINY), 3) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        initialise(model, 0.02, torch.Generator().manual_seed(seed))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["classifier.3.weight"], other["classifier.3.weight"])
    assert bool((first["vilt.layernorm.weight"] == 1).all())
    assert not first["classifier.3.bias"].any()
    assert 0.015 < float(first["vilt.pooler.dense.weight"].std()) < 0.025
