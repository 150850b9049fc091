"""Llama 3.2 Vision equals transformers' on a tiny official-layout checkpoint: logits, generation, gradients, names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_mllama import SIDE, TEXT, mllama_config, oracle_inputs, picture, write_mllama
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mint import load_decoder
from mint.decoders import Decoder
from mint.decoders.mllama import Mllama
from mint.decoders.mllama_config import MllamaConfig, in_memory, on_disk
from mint.errors import CheckpointError, ConfigError
from mint.trees import sequence

ONE, TWO, FOUR = (SIDE, SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE)  # pictures of one, two and four tiles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=2)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import MllamaForConditionalGeneration

    return MllamaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def image(decoder: Decoder) -> int:
    token: int = decoder.network.config.image_token
    return token


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def theirs(oracle: Any, ids: Sequence[int], images: Sequence[Image.Image], token: int) -> Tensor:
    return oracle(**oracle_inputs(ids, images, token)).logits[0]


def prompt(layout: str, token: int) -> list[int]:
    """`5i7`: five words, an image, seven words."""
    ids: list[int] = []
    for at, part in enumerate(layout.replace("i", " i ").split()):
        ids += [token] if part == "i" else words(int(part), at)
    return ids


LAYOUTS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "text before the image": ("5i20", [TWO]),
    "image first": ("i20", [ONE]),
    "text alone": ("20", []),
    "an image last": ("9i", [ONE]),
    "two images": ("4i8i8", [TWO, FOUR]),
    "two images next to each other": ("4i i8", [TWO, ONE]),
    "a run of two, then one": ("4i i8i6", [ONE, TWO, FOUR]),
    "three, the first by itself": ("i5i i6", [FOUR, ONE, TWO]),
    "tall": ("3i9", [(SIDE, 4 * SIDE)]),
    "wide": ("3i9", [(3 * SIDE + 5, SIDE)]),
    "small": ("3i9", [(9, 7)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_transformers(decoder: Decoder, oracle: Any, image: int, name: str) -> None:
    layout, sizes = LAYOUTS[name]
    ids, images = prompt(layout, image), [picture(*size, seed=at) for at, size in enumerate(sizes)]
    assert error(decoder.logits([ids], [images])[0], theirs(oracle, ids, images, image)) < 1e-5


def test_logits_equal_transformers_for_every_arrangement_of_tiles(decoder: Decoder, oracle: Any, image: int) -> None:
    ids = prompt("4i6", image)
    for high, wide in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)):
        shown = [picture(wide * SIDE - 1, high * SIDE - 1, seed=high * wide)]
        assert error(decoder.logits([ids], [shown])[0], theirs(oracle, ids, shown, image)) < 1e-5


def test_rows_of_a_mixed_batch_equal_transformers_row_by_row(decoder: Decoder, oracle: Any, image: int) -> None:
    """No row knows of the others: neither a text without an image nor one with fewer of them."""
    ids = [prompt(layout, image) for layout in ("5i20", "i25", "26", "4i8i12")]
    images = [[picture(*TWO)], [picture(*ONE, seed=1)], [], [picture(*FOUR, seed=2), picture(*TWO)]]
    found = decoder.logits(ids, images)
    for row, own, logits in zip(ids, images, found, strict=True):
        assert error(logits, theirs(oracle, row, own, image)) < 1e-5


def test_a_padded_batch_of_transformers_is_equal_where_its_attention_is_defined(
    decoder: Decoder, oracle: Any, image: int
) -> None:
    """Rows of two images each, the shorter padded on the right: text from the first image on."""
    rows = [prompt("i8i12", image), prompt("i5i6", image)]
    images = [[picture(*TWO), picture(*ONE)], [picture(*FOUR), picture(*ONE, seed=3)]]
    given = [oracle_inputs(row, own, image) for row, own in zip(rows, images, strict=True)]
    lack = len(rows[0]) - len(rows[1])
    for name, pad in (("input_ids", 0), ("attention_mask", 0), ("cross_attention_mask", 0)):
        blank = torch.full_like(given[1][name][:, :lack], pad)
        given[1][name] = torch.cat([given[1][name], blank], 1)
    with torch.no_grad():
        wanted = oracle(**{name: torch.cat([part[name] for part in given]) for name in given[0]}).logits
    for row, own, logits in zip(rows, images, wanted, strict=True):
        assert error(decoder.logits([row], [own])[0], logits[: len(row)]) < 1e-5


def test_text_before_the_image_sees_nothing_of_it_under_metas_rule(folder: Path, oracle: Any, image: int) -> None:
    """The oracle with the rows of its looking layers shut, which is what Meta's code does."""
    ids, shown = prompt("5i9", image), [picture(*TWO)]
    before = torch.zeros(len(ids), 1)
    before[5:] = 1
    hooks = [
        layer.cross_attn.register_forward_hook(lambda _m, _a, out: (out[0] * before, *out[1:]))
        for layer in oracle.model.language_model.layers
        if hasattr(layer, "cross_attn")
    ]
    wanted = theirs(oracle, ids, shown, image)
    for hook in hooks:
        hook.remove()
    decoder = load_decoder(folder, dtype="float32", device="cpu", meta_masking=True)
    assert error(decoder.logits([ids], [shown])[0], wanted) < 1e-5
    assert error(theirs(oracle, ids, shown, image), wanted) > 1e-2
    first = prompt("i9", image)
    assert error(decoder.logits([first], [shown])[0], theirs(oracle, first, shown, image)) < 1e-5


def test_greedy_generation_equals_transformers(decoder: Decoder, oracle: Any, image: int) -> None:
    varied = 0
    for layout in ("5i9", "i12", "14", "4i3i6", "3i i7", "6i3", "i i4"):
        ids, sizes = prompt(layout, image), (TWO, ONE)[: layout.count("i")]
        images = [picture(*size) for size in sizes]
        found = decoder.generate([ids], 10, images=[images])[0]
        with torch.no_grad():
            all_ids = oracle.generate(**oracle_inputs(ids, images, image), max_new_tokens=10, do_sample=False)
        assert found == all_ids[0, len(ids) :].tolist(), layout
        varied += len(set(found)) > 1
    assert varied >= 4


def test_prompts_of_unequal_length_generate_together_as_alone(decoder: Decoder, image: int) -> None:
    ids = [prompt(layout, image) for layout in ("5i9", "i4", "14", "4i3i6")]
    images = [[picture(*TWO)], [picture(*ONE)], [], [picture(*FOUR), picture(*ONE)]]
    alone = [decoder.generate([row], 8, images=[own])[0] for row, own in zip(ids, images, strict=True)]
    assert decoder.generate(ids, 8, images=images) == alone


def test_every_gradient_equals_transformers(folder: Path, image: int) -> None:
    """In float64, where rounding cannot hide a fault; with and without activation checkpointing."""
    from transformers import MllamaForConditionalGeneration

    ids, shown = prompt("4i5i6", image), [picture(*TWO), picture(*ONE)]
    exact = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    given = oracle_inputs(ids, shown, image)
    logits = exact(**{name: part.double() if part.is_floating_point() else part for name, part in given.items()}).logits
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (logits * weights).sum().backward()
    wanted = {name: parameter.grad for name, parameter in exact.named_parameters()}
    ours = load_decoder(folder, dtype=torch.float64, device="cpu")
    ours.network.requires_grad_(True)
    for recompute in (False, True):
        ours.network.model.recompute = recompute
        ours.network.zero_grad()
        out = ours.network.lm_head(ours.hidden(replace(sequence(ids), images=tuple(shown))))
        (out * weights[0]).sum().backward()
        found = {name: parameter.grad for name, parameter in ours.network.named_parameters()}
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert gradient is not None
            assert error(gradient, wanted[name]) < 1e-5, name  # their norms round to float32


def test_bfloat16_is_no_worse_than_transformers(folder: Path, decoder: Decoder, image: int) -> None:
    from transformers import MllamaForConditionalGeneration

    ids, shown = prompt("5i20", image), [picture(*TWO)]
    truth = decoder.logits([ids], [shown])[0]
    low = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    given = {n: p.bfloat16() if p.is_floating_point() else p for n, p in oracle_inputs(ids, shown, image).items()}
    with torch.no_grad():
        peer = low(**given).logits[0].float()
    own = load_decoder(folder, dtype="bfloat16", device="cpu").logits([ids], [shown])[0].float()
    assert (own - truth).square().mean() <= 1.2 * (peer - truth).square().mean()


# ---- names --------------------------------------------------------------------------------------------------------


def test_names_shapes_and_counts_equal_those_of_the_official_models() -> None:
    from transformers import MllamaForConditionalGeneration

    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 100, "num_attention_heads": 64}
    large |= {"cross_attention_layers": list(range(3, 100, 5))}
    small = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32}
    small |= {"cross_attention_layers": list(range(3, 40, 5))}
    for text, count in ((small, 10_670_220_835), (large, None)):
        text |= {"num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5}
        tower = {"hidden_size": 1280, "attention_heads": 16, "intermediate_size": 5120, "num_hidden_layers": 32}
        tower |= {"num_global_layers": 8, "image_size": 560, "intermediate_layers_indices": [3, 7, 15, 23, 30]}
        official = mllama_config(text, {**tower, "vision_output_dim": 7680})
        with torch.device("meta"):
            peer, ours = MllamaForConditionalGeneration(official), Mllama(MllamaConfig.read(official.to_dict()))
        shapes = {name: tuple(part.shape) for name, part in ours.state_dict().items()}
        assert shapes == {name: tuple(part.shape) for name, part in peer.state_dict().items()}
        found = sum(part.numel() for part in ours.parameters())
        assert found == sum(part.numel() for part in peer.parameters())
        assert count in (None, found)
        linear = {name for name, part in peer.named_modules() if isinstance(part, nn.Linear)}
        assert {name for name, part in ours.named_modules() if isinstance(part, nn.Linear)} == linear


def test_the_names_on_disk_are_the_official_ones_and_turn_into_each_other(folder: Path, decoder: Decoder) -> None:
    stored = set(load_file(folder / "model.safetensors"))
    assert {name.split(".")[0] for name in stored} == {"language_model", "vision_model", "multi_modal_projector"}
    assert {on_disk(name) for name in decoder.network.state_dict()} == stored
    assert {in_memory(name) for name in stored} == set(decoder.network.state_dict())
    assert in_memory("language_model.lm_head") == "lm_head"


def test_a_checkpoint_under_the_newer_names_is_read_too(
    folder: Path, tmp_path: Path, decoder: Decoder, image: int
) -> None:
    shutil.copytree(folder, tmp_path / "new")
    stored = load_file(folder / "model.safetensors")
    save_file({in_memory(name): part for name, part in stored.items()}, tmp_path / "new" / "model.safetensors")
    again = load_decoder(tmp_path / "new", dtype="float32", device="cpu")
    ids, shown = prompt("4i6", image), [picture(*TWO)]
    assert torch.equal(again.logits([ids], [shown]), decoder.logits([ids], [shown]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": {**TEXT, "vocab_size": 40, "cross_attention_layers": [9]}}, "cross_attention_layers is"),
        ({"text_config": {**TEXT, "vocab_size": 40, "cross_attention_layers": [1, 1]}}, "cross_attention_layers is"),
        ({"text_config": {**TEXT, "vocab_size": 40, "dropout": 0.1}}, "text_config.dropout is 0.1"),
        ({"text_config": {**TEXT, "vocab_size": 40, "tie_word_embeddings": True}}, "tie_word_embeddings is True"),
        ({"text_config": {**TEXT, "vocab_size": 40, "head_dim": 32}}, "head_dim is 32"),
        ({"text_config": {**TEXT, "vocab_size": 40, "hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ({"text_config": None}, "text_config is a NoneType"),
        ({"vision_config": []}, "vision_config is a list"),
        ({"image_token_index": 5000}, "image_token_index is 5000"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name(folder: Path, change: dict[str, Any], named: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=named):
        MllamaConfig.read(config | change, "config.json")


# ---- what is given ------------------------------------------------------------------------------------------------


def test_images_and_their_tokens_must_agree(decoder: Decoder, image: int) -> None:
    ids, shown = prompt("4i6", image), picture(*ONE)
    with pytest.raises(ConfigError, match="row 0 has 0 images and 1 image tokens"):
        decoder.logits([ids])
    with pytest.raises(ConfigError, match="row 0 has 2 images and 1 image tokens"):
        decoder.generate([ids], 3, images=[[shown, shown]])
    for flat in ([shown], shown):
        with pytest.raises(ConfigError, match="a list of pictures for each row"):
            decoder.logits([ids], flat)
    with pytest.raises(ConfigError, match="row 1 has 1 images and 0 image tokens"):
        decoder.logits([ids, words(len(ids))], [[shown], [shown]])
    with pytest.raises(ConfigError, match="images for 1 rows, but there are 2"):
        decoder.logits([ids, ids], [[shown]])


def test_a_tower_of_another_size_than_the_rules_for_pixels_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    rules["size"] = {"height": 2 * SIDE, "width": 2 * SIDE}
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(rules))
    with pytest.raises(CheckpointError, match=r"size is 56; the tower of config\.json takes 28"):
        load_decoder(tmp_path / "other", device="cpu")


def test_a_tokenizer_with_another_image_token_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] -= 1
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="but image_token_index in"):
        load_decoder(tmp_path / "other", device="cpu")
