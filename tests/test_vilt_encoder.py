"""ViLT teachers from their files: classes, texts and pictures as transformers has them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mint.encoders import load_encoder
from mint.encoders.fusion import FusionEncoder
from mint.errors import CheckpointError, ConfigError, RecordError
from mint.tokens import learn_words, open_bert_texts
from mint.types import Record

DISEASES = ("Noonan", "Kabuki", "Cornelia de Lange", "Angelman", "KMT2D")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"0123456789.,;*-", "long", "eye", "中"]
WORDS += [f"##{letter}" for letter in LETTERS] + ["short", "stature", "male"]
SIZES = [(200, 150), (90, 130), (64, 64), (150, 300)]


def network(config: transformers.ViltConfig, kind: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    assert isinstance(model, nn.Module)
    return model


def config(**more: Any) -> transformers.ViltConfig:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return transformers.ViltConfig(vocab_size=len(WORDS), image_size=64, patch_size=32, **small, **more)


def write_processor(folder: Path, vocab_only: bool = True) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "ViltFeatureExtractor", "size": 64, "size_divisor": 32, "resample": 3})
    )
    if not vocab_only:
        transformers.BertTokenizer.from_pretrained(folder, model_max_length=40).save_pretrained(folder)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViltForQuestionAnswering in the official layout."""
    folder = tmp_path_factory.mktemp("vqa")
    names = dict(enumerate(DISEASES))
    network(config(id2label=names), transformers.ViltForQuestionAnswering).save_pretrained(folder)
    write_processor(folder)
    return folder


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViltForMaskedLM as old files have it: with the buffer of positions and the head's bias beside the decoder's."""
    folder = tmp_path_factory.mktemp("mlm")
    model = network(config(), transformers.ViltForMaskedLM)
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["vilt.embeddings.text_embeddings.position_ids"] = torch.arange(40)[None]
    tensors["mlm_score.bias"] = tensors["mlm_score.decoder.bias"].clone()
    save_file(tensors, folder / "model.safetensors")
    write_processor(folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    notes = ["Male. Long eyes", "short stature; " * 30, "Éyes, LONG 中male", ""]
    made = []
    for row, (size, note) in enumerate(zip(SIZES, notes, strict=True)):
        path = folder / f"{row}.png"
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
        made.append(Record(f"case-{row}", note=note, image=str(path)))
    return made


def opened(path: Any) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


@torch.no_grad()
def reference(folder: Path, records: Sequence[Record]) -> Tensor:
    model = transformers.ViltForQuestionAnswering.from_pretrained(folder).eval()
    images = transformers.ViltImageProcessorPil.from_pretrained(folder)
    texts = transformers.BertTokenizer.from_pretrained(folder)
    pictures = [opened(record.image) for record in records]
    notes = [record.note or "*" for record in records]
    words = texts(notes, padding=True, truncation=True, max_length=40, return_tensors="pt")
    out: Tensor = model(**words, **images(pictures, return_tensors="pt")).logits
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_scores_equal_transformers_from_files_to_logits(vqa: Path, records: list[Record]) -> None:
    encoder = load_encoder(vqa)
    assert encoder.classes == DISEASES
    assert error(encoder.scores(records), reference(vqa, records)) < 1e-4


def test_scores_do_not_depend_on_the_batch(vqa: Path, records: list[Record]) -> None:
    encoder = load_encoder(vqa)
    together = encoder.scores(records)
    encoder.batch_size = 3
    assert error(encoder.scores(iter(records)), together) < 1e-5
    assert encoder.scores([]).shape == (0, 5)


def test_no_more_than_a_batch_of_records_is_held(vqa: Path, records: list[Record]) -> None:
    encoder = load_encoder(vqa)
    encoder.batch_size = 2
    taken: list[str] = []

    def stream() -> Any:
        for record in records * 3:
            taken.append(record.id)
            yield record

    for number, (batch, scores) in enumerate(encoder.score_batches(stream()), 1):
        assert len(taken) == 2 * number
        assert scores.shape == (len(batch), 5)


def test_classes_asked_for_are_picked_in_their_order(vqa: Path, records: list[Record]) -> None:
    some = load_encoder(vqa, classes=("KMT2D", "Noonan"))
    assert some.classes == ("KMT2D", "Noonan")
    assert torch.equal(some.scores(records), load_encoder(vqa).scores(records)[:, [4, 0]])


def test_a_class_that_the_teacher_lacks_is_named(vqa: Path) -> None:
    with pytest.raises(ConfigError, match="the teacher lacks 'Rett'"):
        load_encoder(vqa, classes=("Noonan", "Rett"))


def test_a_pretrained_network_gets_a_new_classifier_that_repeats_by_seed(mlm: Path, records: list[Record]) -> None:
    first = load_encoder(mlm, classes=("a", "b", "c"), seed=1).scores(records)
    assert first.shape == (4, 3)
    assert torch.equal(first, load_encoder(mlm, classes=("a", "b", "c"), seed=1).scores(records))
    assert not torch.equal(first, load_encoder(mlm, classes=("a", "b", "c"), seed=2).scores(records))
    with pytest.raises(ConfigError, match="no classifier of its own; name the classes"):
        load_encoder(mlm)


def test_a_pretrained_body_is_the_files_own(mlm: Path, records: list[Record]) -> None:
    encoder = load_encoder(mlm, classes=("a", "b"))
    assert isinstance(encoder, FusionEncoder)
    body = transformers.ViltForMaskedLM.from_pretrained(mlm).vilt.eval()
    inputs = encoder.inputs(records)
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
    with torch.no_grad():
        wanted = body(**dict(zip(names, inputs, strict=True))).pooler_output
        assert error(encoder.network.vilt(*inputs), wanted) < 1e-4


def test_placeholder_names_are_no_names(tmp_path: Path, vqa: Path) -> None:
    shutil.copytree(vqa, tmp_path, dirs_exist_ok=True)
    values = json.loads((vqa / "config.json").read_text())
    values["id2label"] = {str(row): f"LABEL_{row}" for row in range(5)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_encoder(tmp_path, classes=DISEASES).classes == DISEASES
    with pytest.raises(ConfigError, match="names no classes; name them in the order of the classifier's 5 rows"):
        load_encoder(tmp_path)
    with pytest.raises(ConfigError, match="2 classes given for a classifier of 5 rows"):
        load_encoder(tmp_path, classes=("x", "y"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"0": "a", "1": "b"}, "id2label has 2 classes, classifier.3.weight 5 rows"),
        ({"0": "a", "2": "b"}, "rows are not numbered 0 to 1"),
        ({"0": "a", "1": "a"}, "'a' stands there twice"),
        ({"x": "a"}, "a key is no row number"),
        ([], "not a table of row number to class name"),
    ],
)
def test_a_table_of_classes_that_does_not_fit_is_named(tmp_path: Path, vqa: Path, names: Any, words: str) -> None:
    shutil.copytree(vqa, tmp_path, dirs_exist_ok=True)
    values = json.loads((vqa / "config.json").read_text()) | {"id2label": names}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        load_encoder(tmp_path)


@pytest.fixture
def released(tmp_path: Path, vqa: Path) -> Path:
    """GestaltMML's release: a plain state dict with `module.` names, and the dictionary in no order."""
    model = transformers.ViltForQuestionAnswering.from_pretrained(vqa)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.vilt.embeddings.text_embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, tmp_path / "GestaltMML.pt")
    shuffled = {str(row): DISEASES[row] for row in (3, 0, 4, 2, 1)}
    (tmp_path / "disease_dict.json").write_text(json.dumps(shuffled))
    shutil.copy(vqa / "config.json", tmp_path)
    write_processor(tmp_path)
    return tmp_path


def test_the_released_state_dict_scores_as_the_checkpoint(released: Path, vqa: Path, records: list[Record]) -> None:
    wanted = load_encoder(vqa).scores(records)
    for name in (released, released / "GestaltMML.pt"):
        encoder = load_encoder(name)
        assert encoder.classes == DISEASES
        assert torch.equal(encoder.scores(records), wanted)


def test_a_dictionary_of_another_length_is_refused(released: Path) -> None:
    (released / "disease_dict.json").write_text(json.dumps({"0": "a", "1": "b"}))
    with pytest.raises(CheckpointError, match=r"classifier.3.weight has 5 rows, disease_dict.json 2 classes"):
        load_encoder(released)


def test_a_state_dict_of_another_network_is_refused_by_tensor(released: Path) -> None:
    state = torch.load(released / "GestaltMML.pt", weights_only=True)
    state["module.extra"] = state.pop("module.vilt.layernorm.weight")
    state["module.vilt.layernorm.bias"] = torch.zeros(3)
    torch.save(state, released / "GestaltMML.pt")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(released)
    assert "missing vilt.layernorm.weight" in str(caught.value)
    assert "unexpected extra" in str(caught.value)
    assert "vilt.layernorm.bias is torch.float32 [3], wanted [64]" in str(caught.value)


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [Harmful(), {"module.x": Harmful()}, [1, 2], {"x": 3}])
def test_a_pickle_that_is_no_table_of_tensors_is_refused(
    released: Path, content: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, released / "GestaltMML.pt")
    with pytest.raises(CheckpointError, match=r"GestaltMML.pt: not a plain table of tensors"):
        load_encoder(released)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("size", [0, 10, 3000])
def test_a_truncated_state_dict_is_refused_by_name(released: Path, size: int) -> None:
    path = released / "GestaltMML.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"GestaltMML.pt: not a plain table of tensors"):
        load_encoder(released)


def test_missing_files_are_named(released: Path) -> None:
    (released / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json"):
        load_encoder(released)
    (released / "GestaltMML.pt").unlink()
    with pytest.raises(CheckpointError, match=r"wants one .pt beside it, found none"):
        load_encoder(released)


def test_templates_are_refused_where_they_mean_nothing(vqa: Path) -> None:
    with pytest.raises(ConfigError, match=r"templates: .* is no CLIP encoder"):
        load_encoder(vqa, templates=["a photo of {}"])


def test_a_record_without_a_photo_is_scored_on_its_note(vqa: Path, records: list[Record]) -> None:
    encoder = load_encoder(vqa)
    assert isinstance(encoder, FusionEncoder)
    note_only = Record("n", note="long eyes")
    other_note = Record("o", note="short stature")
    mixed = encoder.scores([records[0], note_only, other_note, records[3]])
    assert error(mixed[1:3], encoder.scores([note_only, other_note])) < 1e-5
    assert error(mixed[::3], encoder.scores([records[0], records[3]])) < 1e-5
    assert error(mixed[1], mixed[2]) > 1e-2
    _, _, pixels, mask = encoder.inputs([note_only])
    assert pixels.shape == (1, 3, 32, 32)
    assert not pixels.any()
    assert bool(mask.all())


def test_a_record_without_a_note_is_given_a_star(vqa: Path, records: list[Record]) -> None:
    encoder = load_encoder(vqa)
    starred = Record("s", note="*", image=records[3].image)
    assert torch.equal(encoder.scores([records[3]]), encoder.scores([starred]))


def test_a_record_with_nothing_and_a_picture_that_is_none_are_named(vqa: Path, records: list[Record]) -> None:
    encoder = load_encoder(vqa)
    with pytest.raises(RecordError, match="record empty: neither a note nor an image"):
        encoder.scores([records[0], Record("empty")])
    with pytest.raises(RecordError, match=r"record lost: .*gone.png"):
        encoder.scores([records[0], Record("lost", image="gone.png"), records[1]])


def test_a_device_and_a_dtype_that_are_none_are_refused(vqa: Path) -> None:
    with pytest.raises(ConfigError, match="--device gpu"):
        load_encoder(vqa, device="gpu")
    with pytest.raises(ConfigError, match="--dtype int8"):
        load_encoder(vqa, dtype=torch.int8)


def test_bfloat16_scores_are_near(vqa: Path, records: list[Record]) -> None:
    wanted = load_encoder(vqa).scores(records)
    for dtype in ("bfloat16", torch.bfloat16):
        found = load_encoder(vqa, dtype=dtype, device="cpu").scores(records)
        assert found.dtype == torch.float32
        assert 0 < error(found, wanted) < 0.1


TEXTS = [
    "Male, 3 years; LONG eyes.",
    "Éyes naïve Ångström ﬁ",
    "中文 male東",
    "a\u00adb\u200b c\x00d\tshort\r\n",
    "[SEP] [CLS] long [MASK]",
    "",
    "x" * 120,
    "stature's 12.5-cm 😀",
]


@pytest.mark.parametrize("vocab_only", [True, False])
def test_texts_equal_berts_tokenizer(tmp_path: Path, vocab_only: bool) -> None:
    write_processor(tmp_path, vocab_only)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    wanted = theirs(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    ids, mask = open_bert_texts(tmp_path, 40)(TEXTS)
    assert torch.equal(ids, wanted.input_ids)
    assert torch.equal(mask, wanted.attention_mask)


def test_texts_follow_the_tokenizers_own_settings(tmp_path: Path) -> None:
    write_processor(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "É", "##É"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "strip_accents": False}))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    ids, _ = open_bert_texts(tmp_path, 40)(TEXTS[1:2])
    assert ids.tolist() == [theirs(TEXTS[1]).input_ids]
    assert len(WORDS) in ids.tolist()[0] or 1 in ids.tolist()[0]


def test_a_vocabulary_without_the_special_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n[PAD]\n")
    with pytest.raises(CheckpointError, match=r"no line \[CLS\], \[MASK\], \[SEP\], \[UNK\]"):
        open_bert_texts(tmp_path, 40)


def test_learned_words_are_the_frequent_ones_and_spell_the_others() -> None:
    texts = ["Long eyes, long face", "Short face", "long"]
    tokenizer = learn_words(texts, 60)
    assert tokenizer.get_vocab() == learn_words(iter(texts), 60).get_vocab()
    assert tokenizer.encode("LONG face").tokens == ["[CLS]", "long", "face", "[SEP]"]
    assert tokenizer.encode("tall").tokens == ["[CLS]", "t", "##a", "##l", "##l", "[SEP]"]
    assert set(learn_words(texts, 10).get_vocab()) >= {"l", "##l", "[UNK]"}
    assert "long" not in learn_words(texts, 10).get_vocab()
