"""The BERT retriever against transformers' BertModel on a tiny checkpoint, and mutations that each break the parity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mint.encoders import bert
from mint.encoders.bert import QUESTION, TextEncoder, open_text_encoder
from mint.errors import CheckpointError
from mint.tokens import learn_words, write_bert_tokenizer

NOTES = ["Long palpebral fissures, short stature", "ptosis", "Arched eyebrows; cleft palate. " * 4, "Heart", ""]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny official-layout checkpoint with wide weights, its pooler included."""
    place = tmp_path_factory.mktemp("bert")
    tokenizer = learn_words(NOTES, 120)
    write_bert_tokenizer(tokenizer, place, 32)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=3,
                                     num_attention_heads=4, intermediate_size=96, max_position_embeddings=32)  # fmt: skip
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(place)
    return place


@pytest.fixture
def ours(folder: Path) -> TextEncoder:
    return open_text_encoder(folder, "cpu")


@torch.no_grad()
def theirs(folder: Path, texts: list[str]) -> Tensor:
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    return F.normalize(model(**batch).last_hidden_state[:, 0], dim=-1)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def test_vectors_are_those_of_transformers(ours: TextEncoder, folder: Path) -> None:
    vectors = ours.vectors(NOTES)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert error(vectors, theirs(folder, NOTES)) < 1e-5
    assert error(ours.vectors(NOTES[:1]), theirs(folder, NOTES[:1])) < 1e-5  # nothing is padded
    assert error(ours.question("ptosis")[None], theirs(folder, [QUESTION + "ptosis"])) < 1e-5


def _swapped_types(encoder: TextEncoder, _: pytest.MonkeyPatch) -> None:
    weight = encoder.network.embeddings.token_type_embeddings.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))


def _eps(encoder: TextEncoder, _: pytest.MonkeyPatch) -> None:
    for module in encoder.network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-1


def _blind(_: TextEncoder, patch: pytest.MonkeyPatch) -> None:
    real = bert.attend
    patch.setattr(bert, "attend", lambda *given: real(*given[:4]))


def _heads(encoder: TextEncoder, _: pytest.MonkeyPatch) -> None:
    for layer in encoder.network.encoder.layer:
        layer.attention["self"].heads = 2


def _mean(_: TextEncoder, patch: pytest.MonkeyPatch) -> None:
    real = bert.Encoder.forward
    patch.setattr(bert.Encoder, "forward", lambda self, x, mask: real(self, x, mask) + x.mean(1, keepdim=True))


def _positions(encoder: TextEncoder, _: pytest.MonkeyPatch) -> None:
    weight = encoder.network.embeddings.position_embeddings.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))


def _gelu(encoder: TextEncoder, _: pytest.MonkeyPatch) -> None:
    for layer in encoder.network.encoder.layer:
        layer.activation = F.relu


def _pre_norm(_: TextEncoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bert.Output, "forward", lambda self, y, x: self.LayerNorm(self.dense(y)) + x)


MUTATIONS: dict[str, Callable[[TextEncoder, pytest.MonkeyPatch], None]] = {
    "types swapped": _swapped_types,
    "eps": _eps,
    "mask ignored": _blind,
    "heads": _heads,
    "mean instead of [CLS]": _mean,
    "positions shifted": _positions,
    "relu": _gelu,
    "norm before the sum": _pre_norm,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_the_parity(
    name: str, ours: TextEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[name](ours, monkeypatch)
    assert error(ours.vectors(NOTES), theirs(folder, NOTES)) > 1e-3


def test_a_masked_language_checkpoint_opens_without_its_head(folder: Path, tmp_path: Path, ours: TextEncoder) -> None:
    """Names with `bert.` before them, and tensors that stand on top."""
    shutil.copytree(folder, tmp_path / "mlm")
    model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(folder))
    model.bert.load_state_dict(transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict())
    model.save_pretrained(tmp_path / "mlm")
    assert torch.equal(open_text_encoder(tmp_path / "mlm", "cpu").vectors(NOTES), ours.vectors(NOTES))


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("config.json", {"model_type": "roberta"}, "'roberta'.*'bert'"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}, "pooling_mode_cls_token"),
    ],
)
def test_another_kind_of_encoder_is_refused(
    folder: Path, tmp_path: Path, file: str, value: dict[str, object], words: str
) -> None:
    place = shutil.copytree(folder, tmp_path / "other")
    (place / "1_Pooling").mkdir()
    before = json.loads((place / file).read_text()) if (place / file).exists() else {}
    (place / file).write_text(json.dumps({**before, **value}))
    with pytest.raises(CheckpointError, match=words):
        open_text_encoder(place, "cpu")
