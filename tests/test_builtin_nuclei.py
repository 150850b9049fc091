"""The drawn tile shows its tissue, its description says what is drawn, and neither names the tissue."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from mint.builtin import nuclei
from mint.builtin.nuclei import draw_tile, draw_tissue_cases
from mint.builtin.tissue_facts import tile_facts, tissues
from mint.builtin.tissue_text import describe
from mint.errors import ConfigError

PANNUKE = [
    "Adrenal_gland",
    "Bile-duct",
    "Bladder",
    "Breast",
    "Cervix",
    "Colon",
    "Esophagus",
    "HeadNeck",
    "Kidney",
    "Liver",
    "Lung",
    "Ovarian",
    "Pancreatic",
    "Prostate",
    "Skin",
    "Stomach",
    "Testis",
    "Thyroid",
    "Uterus",
]


def features(tile: Image.Image) -> np.ndarray:
    """Coarse numbers that stain alone cannot fix: how much is dark, pale or in between, and how fine the texture is."""
    pixels = np.asarray(tile, dtype=float)
    grey = pixels.mean(axis=2)
    level = (grey - grey.mean()) / grey.std()
    edges = [np.abs(np.diff(grey, axis=axis)).mean() / grey.std() for axis in (0, 1)]
    coarse = [
        np.asarray(tile.resize((s, s), Image.Resampling.BOX), dtype=float).mean(axis=2).std() / grey.std()
        for s in (4, 8, 16, 32)
    ]
    shares = np.histogram(level, bins=[-9, -1.6, -1.1, -0.6, 0, 0.6, 1.1, 1.6, 9])[0] / level.size
    return np.concatenate([shares * 3, coarse, edges, [(pixels[..., 0] - pixels[..., 1]).mean() / 40]])


def test_the_tissues_are_those_of_pannuke():
    assert list(tissues()) == PANNUKE


def test_the_same_arguments_give_the_same_bytes_and_another_seed_another_tile():
    assert draw_tile("Colon", 4).tobytes() == draw_tile("Colon", 4).tobytes()
    assert draw_tile("Colon", 4).tobytes() != draw_tile("Colon", 5).tobytes()


@pytest.mark.parametrize("size", [32, 64, 200])
def test_size_is_an_argument(size):
    tile = draw_tile("Liver", 1, size)
    assert tile.size == (size, size)
    assert tile.mode == "RGB"


def test_an_unknown_tissue_is_refused_by_name():
    with pytest.raises(ConfigError, match="'Spleen' is not in the table; wanted one of Adrenal_gland"):
        draw_tile("Spleen", 0)


def test_tissues_look_different_to_the_simplest_classifier():
    """Nearest mean of a few coarse numbers, 8 tiles a tissue to learn from and 4 others to tell: chance is 1 in 19."""
    learnt = {name: np.mean([features(draw_tile(name, seed, 64)) for seed in range(8)], axis=0) for name in tissues()}
    means = np.array(list(learnt.values()))
    told = [
        [np.linalg.norm(means - features(draw_tile(name, seed, 64)), axis=1).argmin() for seed in range(100, 104)]
        for name in tissues()
    ]  # (19, 4)
    assert (np.array(told) == np.arange(19)[:, None]).mean() > 0.35


def test_tiles_of_one_tissue_vary_in_stain_and_light():
    means = np.array([np.asarray(draw_tile("Kidney", seed, 48), dtype=float).mean(axis=(0, 1)) for seed in range(12)])
    assert (means.std(axis=0) > 3).all()


def test_the_description_is_worded_from_the_facts_of_the_tile():
    rng = np.random.default_rng(0)
    texts = [describe(tile_facts("Thyroid", seed), rng) for seed in range(40)]
    assert sum("colloid" in text for text in texts) > 25
    assert not any("keratin" in text or "mucin" in text for text in texts)
    assert len(set(texts)) > 30


def test_no_description_names_a_tissue():
    stems = [re.sub("[^a-z]", "", name.lower())[:6] for name in PANNUKE]
    for record in draw_tissue_cases(200, 5):
        plain = re.sub("[^a-z]", "", record.note.lower())
        assert not [stem for stem in stems if stem in plain and stem != "bileduct"]


def test_cases_repeat_and_splits_differ():
    first, again, other = (list(draw_tissue_cases(30, 1, split)) for split in ("train", "train", "test"))
    assert first == again
    assert not {record.id for record in first} & {record.id for record in other}
    assert [record.image for record in first] != [record.image for record in other]
    assert {record.split for record in other} == {"test"}
    assert first[3].image.draw().tobytes() == draw_tile(first[3].label, first[3].image.seed).tobytes()
    longer = list(draw_tissue_cases(60, 1, "train"))
    assert longer[:30] == first


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split 'dev'; wanted one of train, validation, test"):
        list(draw_tissue_cases(1, 0, "dev"))


def test_all_tissues_come_about_equally_often():
    counts = np.unique([record.label for record in draw_tissue_cases(1900, 3)], return_counts=True)[1]
    assert len(counts) == 19
    assert counts.min() > 60
    assert counts.max() < 145


def test_the_sheet_is_written_as_one_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nuclei", "--sheet", str(tmp_path / "tiles.png"), "--size", "24", "--tiles", "2"])
    nuclei.main()
    with Image.open(tmp_path / "tiles.png") as sheet:
        assert sheet.format == "PNG"
