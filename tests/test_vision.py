"""The image tower equals transformers' on a tiny checkpoint with wide weights, and each of its rules matters there."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from mint.decoders import vision
from mint.decoders.vision import VisionTower
from mint.decoders.vision_config import VisionConfig, read_vision_config
from mint.errors import RecordError
from mint.images.pixels import arrangements

Batch = tuple[Tensor, Tensor, Tensor]
TINY = {"hidden_size": 128, "attention_heads": 2, "intermediate_size": 192, "num_hidden_layers": 5}
TINY |= {"num_global_layers": 2, "image_size": 84, "patch_size": 14, "intermediate_layers_indices": [0, 2, 3]}
TINY |= {"vision_output_dim": 512, "norm_eps": 1.0}


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Mllama in the official layout; every weight, gates and norms too, drawn with deviation 0.3."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "cross_attention_layers": [1]}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    config = MllamaConfig(vision_config=TINY, text_config=text, image_token_index=40)
    model = MllamaForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("mllama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(checkpoint_folder: Path) -> MllamaVisionModel:
    model = MllamaForConditionalGeneration.from_pretrained(checkpoint_folder, attn_implementation="eager")
    return model.model.vision_model.eval()


@pytest.fixture
def tower(checkpoint_folder: Path) -> VisionTower:
    """Our tower, from the same folder, by the names on disk."""
    config = json.loads((checkpoint_folder / "config.json").read_text())["vision_config"]
    built = VisionTower(read_vision_config(config, checkpoint_folder / "config.json"))
    on_disk = load_file(checkpoint_folder / "model.safetensors")
    prefix = "vision_model."
    built.load_state_dict({name[len(prefix) :]: part for name, part in on_disk.items() if name.startswith(prefix)})
    return built.eval()


def batch(*ids: int) -> Batch:
    """Pictures by their aspect ratio id, absent tiles zero; id 0 is a slot without a picture."""
    generator = torch.Generator().manual_seed(sum(ids) + len(ids))
    counts = [math.prod(arrangements(4)[i - 1]) if i else 1 for i in ids]
    mask = torch.tensor([[1] * count + [0] * (4 - count) for count in counts])
    pixels = torch.randn(len(ids), 4, 3, 84, 84, generator=generator) * mask[:, :, None, None, None]
    pixels[torch.tensor(ids) == 0] = 0
    return pixels, torch.tensor(ids), mask


@torch.no_grad()
def features(oracle: MllamaVisionModel, given: Batch) -> Tensor:
    return oracle(*(part[:, None] for part in given)).last_hidden_state[:, 0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def worst(found: Tensor, wanted: Tensor) -> float:
    """The larger error of the last state and of the layers in between, which have other scales."""
    return max(error(found[..., :128], wanted[..., :128]), error(found[..., 128:], wanted[..., 128:]))


@pytest.mark.parametrize(
    "ids", [(1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (6, 6), (2, 5), (1, 4, 2, 0, 7, 1), (0, 6)]
)
def test_features_equal_transformers_for_every_arrangement_and_mixed_batches(
    oracle: MllamaVisionModel, tower: VisionTower, ids: tuple[int, ...]
) -> None:
    given = batch(*ids)
    with torch.no_grad():
        found = tower(*given)
    assert found.shape == (len(ids), 4, 37, 512)
    assert error(found, features(oracle, given)) < 1e-5


def test_features_equal_transformers_with_its_fused_attention(checkpoint_folder: Path, tower: VisionTower) -> None:
    fused = MllamaForConditionalGeneration.from_pretrained(checkpoint_folder, attn_implementation="sdpa")
    given = batch(6, 2)
    with torch.no_grad():
        assert error(tower(*given), features(fused.model.vision_model, given)) < 1e-5


def test_every_gradient_equals_transformers(oracle: MllamaVisionModel, tower: VisionTower) -> None:
    """In float64, where rounding cannot hide a fault."""
    given = batch(6, 5, 1)
    weights = torch.randn(3, 4, 37, 512, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(oracle).double()
    exact.set_attn_implementation("sdpa")  # eager attention rounds to float32
    (exact(*(part[:, None] for part in given)).last_hidden_state[:, 0] * weights).sum().backward()
    (tower.double()(*given) * weights).sum().backward()
    wanted = {name: parameter.grad for name, parameter in exact.named_parameters()}
    for name, parameter in tower.named_parameters():
        gradient = wanted[name]
        assert parameter.grad is not None
        assert gradient is not None
        assert error(parameter.grad, gradient) < 1e-9, name


def test_pixels_of_an_absent_tile_reach_the_real_ones(oracle: MllamaVisionModel, tower: VisionTower) -> None:
    pixels, ids, mask = batch(2)
    other = pixels.clone()
    other[:, 3] = torch.randn(3, 84, 84, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        moved = tower(other, ids, mask)
        assert error(moved[:, :2], tower(pixels, ids, mask)[:, :2]) > 1e-2
    assert error(moved, features(oracle, (other, ids, mask))) < 1e-5


def test_a_mixed_batch_equals_its_pictures_one_by_one(tower: VisionTower) -> None:
    given = batch(4, 1, 2, 6, 1)
    with torch.no_grad():
        together = tower(*given)
        for row in range(5):
            alone = tower(*(part[row : row + 1] for part in given))
            assert error(together[row], alone[0]) < 1e-5


def test_bfloat16_is_no_worse_than_transformers(oracle: MllamaVisionModel, tower: VisionTower) -> None:
    given = batch(6, 2)
    with torch.no_grad():
        truth = tower.double()(given[0].double(), *given[1:])
        ours = tower.bfloat16()(*given).double()
        theirs = features(copy.deepcopy(oracle).bfloat16(), given).double()
    assert (ours - truth).square().mean() <= 1.2 * (theirs - truth).square().mean()


def counted(tower: VisionTower) -> list[int]:
    """How often any attention and any perceptron runs, from now on."""
    runs = [0, 0]

    def count(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[index] += 1

        return hook

    for name, part in tower.named_modules():
        if name.endswith(("q_proj", "fc1")):
            part.register_forward_hook(count(int(name.endswith("fc1"))))
    return runs


def test_checkpointing_computes_again_and_changes_nothing(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    given, attentions = batch(6, 1), [0]
    attend = F.scaled_dot_product_attention

    def gradients() -> tuple[Tensor, list[Tensor]]:
        tower.zero_grad()
        out = tower(*given)
        out.square().mean().backward()
        return out.detach(), [part.grad.clone() for part in tower.parameters() if part.grad is not None]

    def attended(*args: Tensor) -> Tensor:
        attentions[0] += 1
        return attend(*args)

    runs = counted(tower)
    plain, plain_gradients = gradients()
    once = list(runs)
    tower.checkpointing = True
    again, again_gradients = gradients()
    assert [total - first for total, first in zip(runs, once, strict=True)] == [2 * first for first in once]
    assert torch.equal(plain, again)
    assert all(torch.equal(*pair) for pair in zip(plain_gradients, again_gradients, strict=True))
    monkeypatch.setattr(vision.F, "scaled_dot_product_attention", attended)
    with torch.no_grad():
        tower(*given)
    assert attentions == [2 * 2 * 7]  # two kinds of picture, two calls a layer, none with a mask


def test_checkpointing_holds_less_for_the_backward_pass(tower: VisionTower) -> None:
    def alive() -> list[Tensor]:
        return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]

    def held() -> int:
        """Bytes that autograd saved or that a kept attention holds, each once, without the weights."""
        saved: list[Tensor] = []
        before = {tensor.untyped_storage().data_ptr() for tensor in alive()}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
            out = tower(*batch(6))
        found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved + alive()}
        assert out.requires_grad
        return sum(size for place, size in found.items() if place not in before)

    plain = held()
    tower.checkpointing = True

    assert held() < plain / 2


# Each mutation is a mistake that gives the right shapes; `agrees` must be false under every one of them.


def set_gate(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[VisionTower, pytest.MonkeyPatch], None]:
    def change(tower: VisionTower, _: pytest.MonkeyPatch) -> None:
        found = [part for path, part in tower.named_parameters() if path.endswith(name)]
        assert found
        for gate in found:
            gate.data = value(gate.data)

    return change


def patched(target: object, name: str, value: Any) -> Callable[[VisionTower, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setattr(target, name, value)


def hooked(module: str, hook: Callable[..., Any], before: bool = False) -> Callable[..., None]:
    def change(tower: VisionTower, _: pytest.MonkeyPatch) -> None:
        part = tower.get_submodule(module)
        if before:
            part.register_forward_pre_hook(hook)
        else:
            part.register_forward_hook(hook)

    return change


def attention_with(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The layer's attention under another rule of who sees whom: rule(query is real, key is real) -> allowed."""

    def forward(self: Any, x: Tensor, real: int) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        is_real = torch.arange(x.shape[1]) < real
        allowed = rule(is_real[:, None], is_real[None, :])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    return forward


def interleaved_heads(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature f of a projection belongs to head f % H instead of f // d."""
    for path, part in tower.named_modules():
        if path.endswith(("q_proj", "k_proj")):
            project = part.forward
            mixed = lambda x, project=project: project(x).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # noqa: E731
            monkeypatch.setattr(part, "forward", mixed)


def eps(value: float, *names: str) -> Callable[[VisionTower, pytest.MonkeyPatch], None]:
    def change(tower: VisionTower, _: pytest.MonkeyPatch) -> None:
        for path, part in tower.named_modules():
            if isinstance(part, nn.LayerNorm) and path.endswith(names):
                part.eps = value

    return change


def shifted_layers(tower: VisionTower, _: pytest.MonkeyPatch) -> None:
    """The input of each chosen layer instead of its output."""
    tower.transformer.register_forward_hook(lambda _m, args, states: [args[0], *states[:-2], states[-1]])


def embedding_before_norm(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second tile embedding added before layernorm_post instead of after it."""
    norm, place = tower.layernorm_post.forward, tower.post_tile_positional_embedding.forward
    last: list[Tensor] = []
    monkeypatch.setattr(tower.layernorm_post, "forward", lambda x: last.append(x) or torch.zeros_like(x))
    arrange = vision.TokenOrder.arrange

    def arranged(self: vision.TokenOrder, x: Tensor) -> Tensor:
        return norm(last.pop() + arrange(self, x)) if last else arrange(self, x)

    assert place is not None
    monkeypatch.setattr(vision.TokenOrder, "arrange", arranged)


def no_embedding_on_pads(_: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    arrange, calls = vision.TokenOrder.arrange, [0]

    def arranged(self: vision.TokenOrder, x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] % 2 == 0:
            x = torch.cat([x[:, :, : self.patches], torch.zeros_like(x[:, :, self.patches :])], 2)
        return arrange(self, x)

    monkeypatch.setattr(vision.TokenOrder, "arrange", arranged)


def pads_before_norm(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads made before layernorm_pre, so that they hold its bias and not zeros."""
    patches = VisionTower._patches
    pad = F.pad
    bias = tower.layernorm_pre.bias
    monkeypatch.setattr(VisionTower, "_patches", lambda self, *args: patches(self, *args) - bias)
    monkeypatch.setattr(vision.F, "pad", lambda x, sizes: pad(x, sizes) + bias)


def class_token_last(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tower.gated_positional_embedding.forward
    monkeypatch.setattr(
        tower.gated_positional_embedding,
        "forward",
        lambda x, ids: whole(x.roll(-1, 2), ids).roll(1, 2),
    )


def tiles_reversed(tower: VisionTower, _: pytest.MonkeyPatch) -> None:
    tower.register_forward_pre_hook(lambda _m, args: (args[0].flip(1), *args[1:]))
    tower.register_forward_hook(lambda _m, _a, out: out.flip(1))


original_stack, exact_gelu = torch.stack, F.gelu

MUTATIONS: dict[str, Callable[[VisionTower, pytest.MonkeyPatch], None]] = {
    "layers side by side and not interleaved": patched(
        vision.torch, "stack", lambda parts, _: original_stack(parts, -2)
    ),
    "layers taken one earlier": shifted_layers,
    "gate of positions shut": set_gate("gated_positional_embedding.gate", torch.zeros_like),
    "gate of the first tile embedding shut": set_gate("pre_tile_positional_embedding.gate", torch.zeros_like),
    "gate of the second tile embedding shut": set_gate("post_tile_positional_embedding.gate", torch.zeros_like),
    "gate of attention shut": set_gate("gate_attn", torch.zeros_like),
    "gate of the perceptron shut": set_gate("gate_ffn", torch.zeros_like),
    "gates without tanh": set_gate("gate_attn", lambda gate: torch.atanh(gate.clamp(-0.9, 0.9))),
    "absent tiles and pads not seen by real tokens": patched(
        vision.VisionAttention, "forward", attention_with(lambda query, key: key | (query & False))
    ),
    "pads see pads": patched(vision.VisionAttention, "forward", attention_with(lambda query, key: query | key | True)),
    "pads see only pads": patched(vision.VisionAttention, "forward", attention_with(lambda query, key: query | ~key)),
    "no pads": patched(VisionConfig, "pads", 0),
    "pads made before the first norm": pads_before_norm,
    "aspect ratio id off by one": lambda tower, _: (
        tower.register_forward_pre_hook(lambda _m, args: (args[0], (args[1] + 1) % 9, args[2])) and None
    ),
    "all tiles taken as there": patched(vision, "_tile_counts", lambda mask: [4] * len(mask)),
    "tiles in reverse": tiles_reversed,
    "class token behind the patches' places": class_token_last,
    "first tile embedding on the class token too": lambda tower, monkeypatch: monkeypatch.setattr(
        tower.gated_positional_embedding,
        "forward",
        lambda x, ids, whole=tower.gated_positional_embedding.forward: whole(
            torch.cat([x[:, :, :1] + tower.pre_tile_positional_embedding(ids), x[:, :, 1:]], 2), ids
        ),
    ),
    "second tile embedding before the norm": embedding_before_norm,
    "second tile embedding not on pads": no_embedding_on_pads,
    "no first norm": hooked("layernorm_pre", lambda _m, args, _o: args[0]),
    "no last norm": hooked("layernorm_post", lambda _m, args, _o: args[0]),
    "eps of the layers in the first norm": eps(1.0, "layernorm_pre"),
    "eps of the layers in the last norm": eps(1.0, "layernorm_post"),
    "default eps in the layers": eps(1e-5, "input_layernorm", "post_attention_layernorm"),
    "quick gelu": patched(vision.F, "gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "tanh gelu": patched(vision.F, "gelu", lambda x: exact_gelu(x, approximate="tanh")),
    "heads interleaved": interleaved_heads,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_of_the_tower_is_seen(
    oracle: MllamaVisionModel, tower: VisionTower, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given = batch(6, 2)
    wanted = features(oracle, given)
    with torch.no_grad():
        assert error(tower(*given), wanted) < 1e-5
        MUTATIONS[name](tower, monkeypatch)
        assert worst(tower(*given), wanted) > 1e-4


@pytest.mark.parametrize("rows", [[[0, 1, 0, 0]], [[1, 0, 1, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]])
def test_masks_that_do_not_begin_with_ones_are_refused(tower: VisionTower, rows: list[list[int]]) -> None:
    pixels, ids = torch.zeros(len(rows), 4, 3, 84, 84), torch.ones(len(rows), dtype=torch.int64)
    with pytest.raises(RecordError, match=f"picture {len(rows) - 1} of the batch: aspect_ratio_mask"):
        tower(pixels, ids, torch.tensor(rows))
