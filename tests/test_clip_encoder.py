"""CLIP teachers from their files: zero-shot scores as transformers gives them, prompts, cached features, bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from mint.encoders import ClipEncoder, load_encoder
from mint.errors import CheckpointError, ConfigError, RecordError
from mint.tokens import CLIP_END, CLIP_START, open_clip_texts
from mint.types import Record

CLASSES = ("Colon", "Adrenal_gland", "Lung")
TEMPLATES = ("a photo of {} tissue.", "an H&E slide: {}", "{}")
MERGES = [("l", "u"), ("lu", "n"), ("lun", "g</w>"), ("t", "i"), ("p", "h"), ("o", "f</w>"), ("s", "l")]


def vocabulary() -> dict[str, int]:
    """Every byte, every byte at a word's end, the merges, start and end: CLIP's own order."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    return {word: row for row, word in enumerate([*words, CLIP_START, CLIP_END])}


def write_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))


def write_checkpoint(folder: Path, eos: int | None, activation: str) -> None:
    size = len(vocabulary())
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": activation}
    config = transformers.CLIPConfig(
        text_config=shape
        | {"vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": eos or size - 1},
        vision_config=shape | {"hidden_size": 48, "intermediate_size": 64, "image_size": 64, "patch_size": 32},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if name != "logit_scale" else torch.tensor(2.0))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "CLIPFeatureExtractor", "size": 64, "crop_size": 64, "resample": 3})
    )


def opened(path: Any) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A modern CLIP: safetensors, gelu, its end token named."""
    folder = tmp_path_factory.mktemp("clip")
    write_checkpoint(folder, None, "gelu")
    return folder


@pytest.fixture(scope="module")
def plip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PLIP's layout: only pytorch_model.bin, buffers of positions in it, end token id 2, quick_gelu, plain sizes."""
    folder = tmp_path_factory.mktemp("plip")
    write_checkpoint(folder, 2, "quick_gelu")
    state = transformers.CLIPModel.from_pretrained(folder).state_dict()
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    made = []
    for row, size in enumerate([(64, 64), (100, 80), (70, 130), (64, 90), (40, 40)]):
        path = folder / f"{row}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        made.append(Record(f"tile-{row}", note="never read", image=str(path)))
    return made


@torch.no_grad()
def reference(folder: Path, records: Sequence[Record], templates: Sequence[str]) -> Tensor:
    """Zero-shot as it is usually written: unit vectors of the sentences, averaged, made unit again."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = images([opened(record.image) for record in records], return_tensors="pt").pixel_values
    prototypes = []
    for name in CLASSES:
        sentences = [template.format(name.replace("_", " ")) for template in templates]
        words = tokenizer(sentences, padding=True, truncation=True, max_length=77, return_tensors="pt")
        vectors = F.normalize(model.get_text_features(**words).pooler_output, dim=-1)
        prototypes.append(F.normalize(vectors.mean(0), dim=-1))
    vectors = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    return model.logit_scale.exp() * vectors @ torch.stack(prototypes).T


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("layout", ["clip", "plip"])
def test_scores_equal_transformers_from_files_to_logits(
    layout: str, records: list[Record], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    encoder = load_encoder(folder, classes=CLASSES, templates=TEMPLATES)
    assert encoder.classes == CLASSES
    found = encoder.scores(records)
    assert error(found, reference(folder, records, TEMPLATES)) < 1e-5
    encoder.batch_size = 2
    assert error(encoder.scores(iter(records)), found) < 1e-5


@torch.no_grad()
def test_one_sentence_gives_clips_own_logits(clip: Path, records: list[Record]) -> None:
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(clip), transformers.CLIPTokenizer.from_pretrained(clip)
    )
    pictures = [opened(record.image) for record in records]
    inputs = processor(
        text=[f"{c} tissue" for c in ("colon", "lung")], images=pictures, padding=True, return_tensors="pt"
    )
    found = load_encoder(clip, classes=["colon", "lung"], templates=["{} tissue"]).scores(records)
    assert error(found, model(**inputs).logits_per_image) < 1e-4


def test_averaging_before_normalising_is_something_else(clip: Path, records: list[Record]) -> None:
    encoder = load_encoder(clip, classes=CLASSES, templates=TEMPLATES)
    assert isinstance(encoder, ClipEncoder)
    wanted = encoder.scores(records)
    sentences = [t.replace("{}", name.replace("_", " ")) for name in CLASSES for t in TEMPLATES]
    with torch.no_grad():
        raw = encoder.network.text_projection(encoder.network.text_model(encoder.texts(sentences)[0]))
    encoder.prototypes = F.normalize(raw.view(3, 3, -1).mean(1), dim=-1)
    assert error(encoder.scores(records), wanted) > 1e-4


def test_default_sentences_speak_of_tissue(clip: Path, records: list[Record]) -> None:
    encoder = load_encoder(clip, classes=CLASSES)
    assert isinstance(encoder, ClipEncoder)
    assert len(encoder.templates) > 1
    assert error(encoder.scores(records), reference(clip, records, encoder.templates)) < 1e-4


def count_images(encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    true = encoder.network.image_features

    def counted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return true(pixels)

    monkeypatch.setattr(encoder.network, "image_features", counted)
    return seen


def test_cached_features_are_computed_once_and_score_the_same(
    clip: Path, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_encoder(clip, classes=CLASSES).scores(records)
    copied = tmp_path / "same-picture.png"
    shutil.copy(records[0].image, copied)
    again = [*records, Record("copy", image=copied), Record("open", image=opened(records[1].image))]
    for run, wanted in ((0, 6), (1, 0)):
        encoder = load_encoder(clip, classes=CLASSES, cache=tmp_path / "cache")
        assert isinstance(encoder, ClipEncoder)
        encoder.batch_size = 3
        seen = count_images(encoder, monkeypatch)
        found = encoder.scores(again)
        assert sum(seen) == wanted, run
        torch.testing.assert_close(found[:5], plain)
        assert torch.equal(found[5], found[0])
    more = load_encoder(clip, classes=CLASSES[:2], cache=tmp_path / "cache")  # other classes, same pictures
    assert isinstance(more, ClipEncoder)
    assert count_images(more, monkeypatch) == []
    torch.testing.assert_close(more.scores(records), plain[:, :2])


def test_another_network_or_other_pixels_do_not_share_a_cache(
    clip: Path, plip: Path, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_encoder(clip, classes=CLASSES, cache=tmp_path / "cache").scores(records)
    other = tmp_path / "other"
    shutil.copytree(clip, other)
    (other / "preprocessor_config.json").write_text(json.dumps({"size": 80, "crop_size": 64, "resample": 3}))
    for folder in (plip, other):
        encoder = load_encoder(folder, classes=CLASSES, cache=tmp_path / "cache")
        assert isinstance(encoder, ClipEncoder)
        seen = count_images(encoder, monkeypatch)
        encoder.scores(records)
        assert sum(seen) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_broken_cache_file_is_named(clip: Path, records: list[Record], tmp_path: Path) -> None:
    load_encoder(clip, classes=CLASSES, cache=tmp_path).scores(records)
    path = next(tmp_path.glob("*/*.npy"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=path.name):
        load_encoder(clip, classes=CLASSES, cache=tmp_path)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ConfigError, match=path.name):
        load_encoder(clip, classes=CLASSES, cache=tmp_path)


def test_bad_requests_are_named(clip: Path, records: list[Record]) -> None:
    with pytest.raises(ConfigError, match="has no classes of its own; name them, as in `prefer --classes FILE`"):
        load_encoder(clip)
    with pytest.raises(ConfigError, match="'Lung' named twice"):
        load_encoder(clip, classes=["Lung", "Lung"])
    with pytest.raises(ConfigError, match=r"'a photo' has no \{\}"):
        load_encoder(clip, classes=CLASSES, templates=["a photo"])
    with pytest.raises(ConfigError, match="templates: the list is empty"):
        load_encoder(clip, classes=CLASSES, templates=[])
    with pytest.raises(RecordError, match="record note-only: no image"):
        load_encoder(clip, classes=CLASSES).scores([records[0], Record("note-only", note="x")])


@pytest.mark.parametrize("missing", ["model.safetensors", "merges.txt", "vocab.json", "config.json"])
def test_a_missing_file_is_named(missing: str, clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json" if missing == "vocab.json" else missing):
        load_encoder(tmp_path, classes=CLASSES)


def test_a_tokenizer_of_another_model_is_refused(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    values = json.loads((clip / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="ends texts with id 7, the tokenizer with"):
        load_encoder(tmp_path, classes=CLASSES)
    values["text_config"]["vocab_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="words, the network 100"):
        load_encoder(tmp_path, classes=CLASSES)


def test_another_kind_of_model_is_refused(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type 'llama', a teacher is vilt or clip"):
        load_encoder(tmp_path, classes=CLASSES)


TEXTS: list[Any] = [
    "A Photo of LUNG tissue.",
    "éclair naïve Ångström ﬁ",
    "it's   spaced\tout\n\n12 345",
    "中文 😀",
    f"{CLIP_END} lung {CLIP_START}",
    "",
    "slide phlung " * 40,
]


@pytest.mark.parametrize("merged", [True, False])
def test_texts_equal_clips_tokenizer(tmp_path: Path, merged: bool) -> None:
    """From vocab.json and merges.txt, and from tokenizer.json; a long text keeps its end token."""
    write_tokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    if not merged:
        theirs.save_pretrained(tmp_path)
    wanted = theirs(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    ids, mask = open_clip_texts(tmp_path, 77)(TEXTS)
    assert torch.equal(ids, wanted.input_ids)
    assert torch.equal(mask, wanted.attention_mask)
    assert ids.shape[1] == 77
    assert bool((ids[:, -1] == vocabulary()[CLIP_END]).all())


def test_merges_that_do_not_fit_the_vocabulary_are_named_by_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("zz qq\n")
    with pytest.raises(CheckpointError, match=r"merges.txt:9: 'zz qq' is not in vocab.json"):
        open_clip_texts(tmp_path, 77)


REAL = Path(os.environ.get("MINT_REAL", Path(__file__).parents[2] / "shared" / "real"))


@pytest.mark.skipif(not (REAL / "images").is_dir(), reason="real tiles are not here")
def test_real_tiles_are_scored_end_to_end(clip: Path, tmp_path: Path) -> None:
    files = sorted(path for path in (REAL / "images").rglob("*") if path.suffix in (".jpeg", ".jpg", ".png", ".tif"))
    records = [Record(str(number), image=str(path)) for number, path in enumerate(files[:60])]
    encoder = load_encoder(clip, classes=CLASSES, cache=tmp_path)
    scores = encoder.scores(records)
    assert scores.shape == (len(records), 3)
    assert bool(scores.isfinite().all())
    torch.testing.assert_close(load_encoder(clip, classes=CLASSES, cache=tmp_path).scores(records), scores)
