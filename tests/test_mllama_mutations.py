"""Each mutation is a mistake that gives the right shapes; under every one of them logits differ from transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_mllama import SIDE, oracle_inputs, picture, write_mllama
from torch import Tensor, nn

from mint import load_decoder
from mint.decoders import Decoder, eyes, mllama
from mint.decoders import sight as seeing
from mint.decoders.layers import RMSNorm

Change = Callable[[Decoder, pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=2)


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[tuple[list[int], list[Any], Tensor]]:
    """Two prompts with their images, and transformers' logits of them."""
    from transformers import MllamaForConditionalGeneration

    oracle = MllamaForConditionalGeneration.from_pretrained(folder).eval()
    token = oracle.config.image_token_index
    words = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    made = []
    for ids, sizes in (
        ([*words[:5], token, *words[5:14]], [(2 * SIDE, SIDE)]),
        ([*words[:4], token, *words[4:9], token, token, *words[9:14]], [(SIDE, SIDE), (SIDE, 3 * SIDE), (SIDE, SIDE)]),
        (words[:12], []),
    ):
        images = [picture(*size, seed=at) for at, size in enumerate(sizes)]
        with torch.no_grad():
            made.append((ids, images, oracle(**oracle_inputs(ids, images, token)).logits[0]))
    return made


def worst(decoder: Decoder, cases: list[tuple[list[int], list[Any], Tensor]]) -> float:
    errors = [
        (decoder.logits([ids], [images])[0] - wanted).abs().max() / wanted.abs().max() for ids, images, wanted in cases
    ]
    return float(torch.stack(errors).max())


def each(kind: type[nn.Module], change: Callable[[Any], None], ends: str = "") -> Change:
    def make(decoder: Decoder, _: pytest.MonkeyPatch) -> None:
        found = [
            part for path, part in decoder.network.named_modules() if isinstance(part, kind) and path.endswith(ends)
        ]
        assert found
        for part in found:
            change(part)

    return make


def patched(target: object, name: str, value: Any) -> Change:
    return lambda _, monkeypatch: monkeypatch.setattr(target, name, value)


def gate(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    def change(block: mllama.CrossBlock) -> None:
        parameter = getattr(block, name)
        parameter.data = value(parameter.data)

    return each(mllama.CrossBlock, change)


def spans_with(change: Callable[[list[seeing.Span]], list[seeing.Span]]) -> Change:
    original = seeing.read_spans
    return patched(eyes, "read_spans", lambda *given: change(original(*given)))


def norm_off(name: str) -> Change:
    return each(mllama.CrossAttention, lambda part: setattr(part, name, nn.Identity()))


def norm_over_all_heads(part: mllama.CrossAttention) -> None:
    """The mean square of all heads together instead of head by head."""
    norm, width = part.q_norm, part.head_width

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.view(-1, 2 * width)
            scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps)
            return (rows * scale).view(-1, width) * norm.weight

    part.q_norm = Whole()


def norm_of_values(part: mllama.CrossAttention) -> None:
    project, norm, width = part.v_proj.forward, part.k_norm, part.head_width
    part.v_proj.forward = lambda x: norm(project(x).reshape(-1, width)).view(len(x), -1)


def turned(part: mllama.CrossAttention) -> None:
    """Queries at positions, as in the other layers: here halves of a head turned by the token's place."""
    norm = part.q_norm
    width, heads = part.head_width, 2

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = norm(x)
            angle = (torch.arange(len(x)) // heads)[:, None] * 0.3
            left, right = x.split(width // 2, -1)
            return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)

    part.q_norm = Turned()


def tiles_reversed(_: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harmless among themselves, since no layer knows a patch's place; so here the absent ones come first."""
    features = eyes.Eyes.features
    monkeypatch.setattr(eyes.Eyes, "features", lambda self, *given: ((f := features(self, *given))[0].flip(0), f[1]))


def cross_layers_at_work_without_an_image(_: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = mllama.MllamaText.forward

    def working(self: Any, ids: Tensor, position: Tensor, attend: Any, given: Any = None) -> Tensor:
        blank = seeing.Sight(
            torch.zeros(1, 128), [slice(0, 1)], [slice(0, 1)], [seeing.Span(0, len(ids), (0,), ends=True)]
        )
        return forward(self, ids, position, attend, given or blank)

    monkeypatch.setattr(mllama.MllamaText, "forward", working)


def before_is_nothing(spans: list[seeing.Span]) -> list[seeing.Span]:
    return [replace(span, pictures=() if span.before else span.pictures) for span in spans]


def text_before_thinks(_: seeing.Sight, x: Tensor) -> Tensor:
    return torch.ones(len(x), 1)


def before_sees_real_tiles(self: seeing.Sight, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    own = replace(self, whole=self.real)
    return ATTEND(own, q, keys, values)


def all_tiles(self: seeing.Sight, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return ATTEND(replace(self, real=self.whole), q, keys, values)


def groups_interleaved(self: seeing.Sight, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return ATTEND(self, q.flip(1), keys, values).flip(1)


ATTEND = seeing.Sight.attend

MUTATIONS: dict[str, Change] = {
    "gate of attention shut": gate("cross_attn_attn_gate", torch.zeros_like),
    "gate of attention without tanh": gate("cross_attn_attn_gate", torch.atanh),
    "gate of the perceptron shut": gate("cross_attn_mlp_gate", torch.zeros_like),
    "gate of the perceptron without tanh": gate("cross_attn_mlp_gate", torch.atanh),
    "queries not normalised": norm_off("q_norm"),
    "keys not normalised": norm_off("k_norm"),
    "queries normalised over all heads": each(mllama.CrossAttention, norm_over_all_heads),
    "values normalised": each(mllama.CrossAttention, norm_of_values),
    "queries at positions": each(mllama.CrossAttention, turned),
    "another eps": each(RMSNorm, lambda norm: setattr(norm, "eps", 1e-6), "_norm"),
    "another eps in the blocks": each(RMSNorm, lambda norm: setattr(norm, "eps", 1e-6), "layernorm"),
    "the perceptron works on text before the image": patched(seeing.Sight, "after_image", text_before_thinks),
    "text before the image sees nothing": spans_with(before_is_nothing),
    "text before the image sees the real tiles alone": patched(seeing.Sight, "attend", before_sees_real_tiles),
    "absent tiles are seen by all": patched(seeing.Sight, "attend", all_tiles),
    "absent tiles before the real ones": tiles_reversed,
    "only the first image is seen": spans_with(
        lambda spans: [s if s.before else replace(s, pictures=(0,) * len(s.pictures)) for s in spans]
    ),
    "images before the last are seen too": spans_with(
        lambda spans: [s if s.before else replace(s, pictures=tuple(range(s.pictures[-1] + 1))) for s in spans]
    ),
    "of a run of images the last alone": spans_with(
        lambda spans: [s if s.before else replace(s, pictures=s.pictures[-1:]) for s in spans]
    ),
    "an image is seen from the token after its own": spans_with(
        lambda spans: [
            replace(s, first=s.first + (at > 0), stop=s.stop + (at + 1 < len(spans))) for at, s in enumerate(spans)
        ]
    ),
    "looking layers at work without an image": cross_layers_at_work_without_an_image,
    "positions that skip the image": patched(
        mllama.MllamaText, "forward", lambda self, ids, position, attend, given=None, forward=mllama.MllamaText.forward:
        forward(self, ids, position - (ids >= 279).cumsum(0), attend, given),
    ),
    "layers that look in another place": lambda decoder, _: decoder.network.model.language_model.layers.insert(
        0, decoder.network.model.language_model.layers.pop(1)
    ),
    "no bias of the projector": each(nn.Linear, lambda part: nn.init.zeros_(part.bias), "multi_modal_projector"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_seen(
    folder: Path, cases: list[tuple[list[int], list[Any], Tensor]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    decoder = load_decoder(folder, dtype="float32", device="cpu")
    assert worst(decoder, cases) < 1e-5
    MUTATIONS[name](decoder, monkeypatch)
    assert worst(decoder, cases) > 1e-4
