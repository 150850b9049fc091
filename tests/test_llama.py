"""The Llama decoder against transformers, on tiny checkpoints: logits, precision, and mutations that must show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_llama
from torch import Tensor

from mint.decoders import Decoder, dtype_of, layers, load_decoder
from mint.decoders.layers import RMSNorm
from mint.errors import ConfigError
from mint.kernels import between, blocks
from mint.weights import open_checkpoint

# Logits

TINY = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "sharded": {"tie_word_embeddings": False, "shards": "300KB"},
    "heads fill the width": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "one head a group": {"num_key_value_heads": 4},
    "eight heads of one": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32},
    "plain rope": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "large eps": {"rms_norm_eps": 0.1},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("llamas")

    def made(kind: str) -> Path:
        place = root / kind.replace(" ", "-")
        return place if place.exists() else write_llama(place, **TINY[kind])

    return made


def oracle(place: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(place, dtype=dtype).eval()


@torch.inference_mode()
def their_logits(place: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return oracle(place, dtype)(input_ids=ids, use_cache=False).logits


def rows(count: int = 2, length: int = 288) -> Tensor:
    return torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(5))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.mark.parametrize("kind", TINY)
def test_logits_are_those_of_transformers(folder: Callable[[str], Path], kind: str) -> None:
    place, ids = folder(kind), rows()
    if kind == "sharded":
        assert len(list(place.glob("model-*.safetensors"))) > 2
    ours = load_decoder(place, device="cpu", dtype="float32").logits(ids)
    assert ours.shape == (2, 288, 320)
    assert relative(ours, their_logits(place, ids)) <= 1e-4


@pytest.mark.parametrize("alias", ["rope_type", "type"])
def test_the_official_config_style_gives_the_same_logits(
    folder: Callable[[str], Path], tmp_path: Path, alias: str
) -> None:
    """rope_theta beside rope_scaling and torch_dtype, in place of rope_parameters and dtype; head_dim left out."""
    place, ids = folder("heads fill the width"), rows(1)
    config = json.loads((place / "config.json").read_text())
    rope = config.pop("rope_parameters")
    assert config.pop("head_dim") == 64
    assert rope["rope_type"] == "llama3"  # what transformers 5 writes
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = {alias if key == "rope_type" else key: value for key, value in rope.items()}
    official = shutil.copytree(place, tmp_path / "official")
    (official / "config.json").write_text(json.dumps(config))
    ours = load_decoder(official, device="cpu", dtype="float32").logits(ids)
    assert torch.equal(ours, load_decoder(place, device="cpu", dtype="float32").logits(ids))


def test_a_row_reads_the_same_whatever_stands_beside_it(folder: Callable[[str], Path]) -> None:
    decoder, ids = load_decoder(folder("tied"), device="cpu", dtype="float32"), rows(3, 150)
    together = decoder.logits(ids)
    for row in range(3):
        assert relative(decoder.logits(ids[row : row + 1]), together[row : row + 1]) < 1e-5
    assert torch.equal(decoder.logits(ids.tolist()), together)


def error(logits: Tensor, truth: Tensor) -> float:
    return float((logits.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("kind", ["tied", "untied", "heads fill the width"])
def test_bfloat16_is_as_exact_as_transformers(tmp_path: Path, kind: str) -> None:
    """Both against the same weights in float64. Three draws, since one error is a matter of luck."""
    ours, theirs = [], []
    for seed in range(3):
        place = write_llama(tmp_path / str(seed), dtype=torch.bfloat16, seed=seed, **TINY[kind])
        ids = rows(1)
        truth = their_logits(place, ids, torch.float64)
        theirs.append(error(their_logits(place, ids, torch.bfloat16), truth))
        ours.append(error(load_decoder(place, device="cpu", dtype="bfloat16").logits(ids), truth))
    assert sum(ours) <= 1.25 * sum(theirs), (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_is_bit_for_bit_that_of_transformers(dtype: torch.dtype) -> None:
    """Normalise in float32, cast, and only then times the weight: another order rounds differently in bfloat16."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x = (3 * torch.randn(200, 96)).to(dtype)
    theirs, ours = LlamaRMSNorm(96, eps=1e-5).to(dtype), RMSNorm(96, 1e-5).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_(1, 0.3))
        assert torch.equal(ours(x), theirs(x))
        if dtype != torch.float32:
            wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
            assert not torch.equal((wide * ours.weight.float()).to(dtype), theirs(x))
    with_gradient = x.clone().requires_grad_()
    assert torch.equal(ours(with_gradient), theirs(x))


def _gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def test_the_gradients_written_by_hand_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(7, 12).double(), torch.randn(7, 12).double(), torch.randn(12).double()
    heads = torch.randn(7, 3, 8).double()
    angles = torch.rand(7, 1, 4).double()
    whole = torch.cat([angles, angles], dim=-1)

    def turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * whole.cos() + torch.cat([-right, left], dim=-1) * whole.sin()

    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (
            lambda x, w: between.Normalise.apply(x, w, 1e-5),
            lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
            (x, weight),
        ),
        (between.SwiGLU.apply, lambda a, b: F.silu(a) * b, (x, y)),
        (lambda x: between.Rotation.apply(x, angles.cos(), angles.sin()), turned, (heads,)),
    ]
    for ours, plain, inputs in pairs:
        for one, other in zip(_gradients(ours, *inputs), _gradients(plain, *inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 64, 200])
def test_a_product_is_the_same_with_and_without_a_gradient(count: int) -> None:
    """Two libraries make it; both must be float32 throughout."""
    torch.manual_seed(0)
    linear, x = layers.Linear(96, 130), torch.randn(count, 96)
    recorded = linear(x)
    with torch.inference_mode():
        plain = linear(x)
    torch.testing.assert_close(plain, recorded.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded.double(), x.double() @ linear.weight.double().T, rtol=1e-5, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients(folder: Callable[[str], Path]) -> None:
    from mint.trees import sequence

    decoder, found = load_decoder(folder("tied"), device="cpu", dtype="float32"), []
    weight = decoder.network.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    for recompute in (False, True):
        decoder.network.model.recompute = recompute
        found.append(torch.autograd.grad(decoder.token_logp(sequence(rows(1, 90)[0])).sum(), weight)[0])
    assert torch.equal(*found)


# What the oracle must be able to see: each change breaks the parity.


def _rope(**changes: float) -> Callable[[Decoder], None]:
    """Rotary frequencies of another theta or scaling."""

    def change(decoder: Decoder) -> None:
        config = decoder.network.config
        theta = changes.get("theta", config.rope_theta)
        scaling = {**config.rope_scaling, **{k: v for k, v in changes.items() if k != "theta"}}
        decoder.network.model.rope = layers.Rope(config.head_dim, theta, scaling)

    return change


def _no_scaling(decoder: Decoder) -> None:
    decoder.network.model.rope = layers.Rope(64, decoder.network.config.rope_theta, None)


def _eps(decoder: Decoder) -> None:
    for module in decoder.network.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-2


def _head_order(decoder: Decoder) -> None:
    """Query heads in reverse: each meets another key-value head, or another part of the output weight."""
    for layer in decoder.network.model.layers:
        weight = layer.self_attn.q_proj.weight
        weight.copy_(weight.unflatten(0, (-1, 64)).flip(0).flatten(0, 1))


def _swapped_norms(decoder: Decoder) -> None:
    for layer in decoder.network.model.layers:
        one, other = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        both = one.clone(), other.clone()
        one.copy_(both[1])
        other.copy_(both[0])


def _swapped_gate(decoder: Decoder) -> None:
    for layer in decoder.network.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def _layer_order(decoder: Decoder) -> None:
    network = decoder.network.model
    network.layers = torch.nn.ModuleList(reversed(network.layers))


def _no_final_norm(decoder: Decoder) -> None:
    decoder.network.model.norm = torch.nn.Identity()


WEIGHTS_AND_NUMBERS = {
    "rope factor": _rope(factor=4.0),
    "rope theta": _rope(theta=10000.0),
    "low frequency bound": _rope(low_freq_factor=2.0),
    "high frequency bound": _rope(high_freq_factor=8.0),
    "original length": _rope(original_max_position_embeddings=128),
    "no rope scaling": _no_scaling,
    "eps": _eps,
    "order of heads": _head_order,
    "norms swapped": _swapped_norms,
    "gate and up swapped": _swapped_gate,
    "order of layers": _layer_order,
    "no final norm": _no_final_norm,
}


def _backwards(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    return _REAL_ROTATE(x, cos, sin, -way)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    return torch.stack(_REAL_ROTATE(halves, cos, sin, way).chunk(2, dim=-1), dim=-1).flatten(-2)


def _grouping(x: Tensor, group: int) -> Tensor:
    """Head h to key-value head h % K, in place of h // G."""
    return _REAL_SPLIT(x.unflatten(1, (group, -1)).transpose(1, 2).flatten(1, 2), group)


def _seen_once_more(end: Tensor, runs: tuple[slice, ...], first: int, stop: int) -> Tensor:
    """A mask that hides from each token itself, except from the first."""
    mask = _REAL_MASK(end, runs, first, stop).clone()
    keys = torch.cat([torch.arange(run.start, run.stop) for run in runs])[-mask.shape[1] :]
    itself = (keys == torch.arange(first, stop)[:, None]) & (keys > 0)
    return mask.masked_fill_(itself, float("-inf"))


def _unscaled(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    return _REAL_WEIGHTS(queries * 64**0.5 / 96**0.5, keys, mask)


def _row_sees_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=True)[0].transpose(0, 1)


_REAL_ROTATE, _REAL_SPLIT, _REAL_MASK, _REAL_WEIGHTS = between.turn, blocks._split, blocks._mask, blocks._weights

CODE: dict[str, tuple[Any, str, Any]] = {
    "rotation backwards": (between, "turn", _backwards),
    "rotation interleaved": (between, "turn", _interleaved),
    "no rotation": (between, "turn", lambda x, *_: x),
    "heads of a group": (blocks, "_split", _grouping),
    "mask off by one": (blocks, "_mask", _seen_once_more),
    "scale of the scores": (blocks, "_weights", _unscaled),
    "a row without its mask": (blocks, "_row_attention", _row_sees_all),
    "gelu for silu": (between.F, "silu", F.gelu),
}


@pytest.mark.parametrize("name", WEIGHTS_AND_NUMBERS)
def test_a_wrong_weight_or_number_is_seen(folder: Callable[[str], Path], name: str) -> None:
    decoder, ids = load_decoder(folder("tied"), device="cpu", dtype="float32"), rows(1)
    with torch.no_grad():
        WEIGHTS_AND_NUMBERS[name](decoder)
    assert relative(decoder.logits(ids), their_logits(folder("tied"), ids)) > 1e-3


@pytest.mark.parametrize("name", CODE)
def test_wrong_code_is_seen(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    decoder, ids = load_decoder(folder("tied"), device="cpu", dtype="float32"), rows(1)
    theirs = their_logits(folder("tied"), ids)
    module, attribute, wrong = CODE[name]
    in_blocks = attribute in ("_split", "_mask", "_weights")  # which plain rows of float32 do without
    monkeypatch.setattr(blocks.Rows, "suit_torch", lambda *_: not in_blocks)
    assert relative(decoder.logits(ids), theirs) <= 1e-4
    monkeypatch.setattr(module, attribute, wrong)
    assert relative(decoder.logits(ids), theirs) > 1e-3


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1, 320]], "320.*0..319"),
        ([[-1, 2]], "-1"),
        ([[1, 2], [3]], "unequal|length"),
        ([1, 2], r"\(B, T\)"),
        ([[0.5, 1.0]], "whole"),
    ],
)
def test_ids_that_are_none_are_refused(folder: Callable[[str], Path], ids: Any, words: str) -> None:
    decoder = load_decoder(folder("tied"), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=words):
        decoder.logits(ids)


def test_an_image_for_a_text_decoder_is_refused(folder: Callable[[str], Path]) -> None:
    decoder = load_decoder(folder("tied"), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="reads text alone"):
        decoder.logits([[1, 2]], images=[["picture"]])
    assert decoder.logits([[1, 2]], images=[[]]).shape == (1, 2, 320)


def test_float64_is_for_a_processor(folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(folder(next(iter(TINY))))
    assert dtype_of("float64", torch.device("cpu"), checkpoint) == torch.float64
    with pytest.raises(ConfigError, match=r"--dtype float64: .* give float32, or --device cpu"):
        dtype_of("float64", torch.device("cuda"), checkpoint)
    assert dtype_of("float32", torch.device("cuda"), checkpoint) == torch.float32
