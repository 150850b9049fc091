"""Pixels of ViLT, CLIP and Llama 3.2 Vision: bit for bit the official processors', over a grid of sizes and modes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from mint.errors import CheckpointError, RecordError
from mint.images import pixels
from mint.images.pixels import clip_pixels, mllama_pixels, vilt_pixels
from mint.images.rules import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    ClipSettings,
    Colours,
    MllamaSettings,
    ViltSettings,
    clip_settings,
    mllama_settings,
    vilt_settings,
)

REAL = Path(os.environ.get("MINT_REAL", Path(__file__).parents[1] / "../shared/real"))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def mllama_processor(size: int, **options: Any) -> MllamaImageProcessorPil:
    colours = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    return MllamaImageProcessorPil(size={"height": size, "width": size}, **(colours | options))


def grid() -> Iterator[tuple[int, int]]:
    """1,225 sizes around tiles of 28: every near side with every other, so all arrangements, ties and edges occur."""
    sides = sorted({2, 3, 5, 9, 14, 20, 700} | {27, 28, 29, 41, 42, 43, 55, 56, 57, 60, 70, 83, 84, 85, 90, 100})
    sides += [101, 105, 111, 112, 113, 120, 140, 168, 196, 224, 280, 336]
    assert len(sides) == 35
    return ((height, width) for height in sides for width in sides)


def agrees_on(images: list[list[Image.Image]], settings: MllamaSettings, processor: MllamaImageProcessorPil) -> bool:
    wanted, found = processor(images, return_tensors="pt"), mllama_pixels(images, settings)
    return (
        torch.equal(wanted["pixel_values"], found.pixels)
        and torch.equal(wanted["aspect_ratio_ids"], found.aspect_ratio_ids)
        and torch.equal(wanted["aspect_ratio_mask"], found.aspect_ratio_mask)
        and wanted["num_tiles"] == found.tiles
    )


def test_tiles_equal_the_official_processor_on_more_than_a_thousand_sizes() -> None:
    settings, processor = MllamaSettings(size=28), mllama_processor(28)
    sizes = list(grid())
    assert len(sizes) > 1000
    seen = set()
    for height, width in sizes:
        assert agrees_on([[picture(height, width)]], settings, processor), (height, width)
        seen.add(pixels.best_arrangement(height, width, 28, 4))
    assert seen == set(pixels.arrangements(4))


@pytest.mark.parametrize("size", [(560, 560), (100, 80), (1200, 500), (561, 1121), (30, 2000)])
def test_tiles_of_the_official_size_equal_the_official_processor(size: tuple[int, int]) -> None:
    assert agrees_on([[picture(*size)]], MllamaSettings(), mllama_processor(560))


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 6])
def test_other_numbers_of_tiles_equal_the_official_processor(max_tiles: int) -> None:
    settings, processor = MllamaSettings(14, max_tiles), mllama_processor(14, max_image_tiles=max_tiles)
    for height, width in list(grid())[::9]:
        assert agrees_on([[picture(height, width)]], settings, processor), (height, width)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_mode_equals_the_official_processors(mode: str) -> None:
    image = picture(50, 70)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70), dtype=np.uint8)))
    image = image.convert(mode)
    assert image.mode == mode
    assert agrees_on([[image]], MllamaSettings(size=28), mllama_processor(28))
    white = Image.new("RGBA", image.size, "white")  # what CLIP's own processor began to do after transformers 5.17
    laid = Image.alpha_composite(white, image.convert("RGBA")) if mode in ("LA", "RGBA") else image
    wanted = CLIPImageProcessorPil()([laid.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(wanted, clip_pixels([image], ClipSettings()))


def test_a_ragged_batch_of_tiles_equals_the_official_processor() -> None:
    rows = [[picture(60, 30), picture(20, 90)], [picture(100, 100)], [picture(28, 28), picture(50, 50), picture(3, 80)]]
    assert agrees_on(rows, MllamaSettings(size=28), mllama_processor(28))
    found = mllama_pixels(rows, MllamaSettings(size=28))
    assert found.aspect_ratio_ids.tolist() == [[5, 4, 0], [6, 0, 0], [1, 6, 3]]
    assert found.tiles == [[2, 4], [4], [1, 4, 3]]
    assert found.aspect_ratio_mask[1, 2].tolist() == [1, 0, 0, 0]
    assert not found.pixels[1, 1:].any()
    assert all(type(count) is int for row in found.tiles for count in row)


def test_ids_read_tiles_high_before_tiles_wide_and_padding_is_black_before_normalising() -> None:
    found = mllama_pixels([[Image.new("RGB", (56, 28), "white")]], MllamaSettings(size=28))
    assert found.aspect_ratio_ids.tolist() == [[2]]
    assert found.tiles == [[2]]
    found = mllama_pixels([[Image.new("RGB", (28, 14), "white")]], MllamaSettings(size=28))
    black = torch.tensor([(0 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)])
    torch.testing.assert_close(found.pixels[0, 0, 0, :, 20, 20], black)
    assert not found.pixels[0, 0, 1:].any()  # tiles that are not there are 0


def test_a_batch_without_pictures_has_no_slots() -> None:
    found = mllama_pixels([[], []], MllamaSettings(size=28))
    assert found.pixels.shape == (2, 0, 4, 3, 28, 28)
    assert found.tiles == [[], []]


def clip_sizes() -> Iterator[tuple[int, int]]:
    randomly = np.random.default_rng(0)
    yield from ((224, 224), (2, 300), (300, 2), (225, 224), (224, 225), (223, 500))
    yield from ((int(h), int(w)) for h, w in randomly.integers(8, 420, (60, 2)))


def test_clip_squares_equal_the_official_processor() -> None:
    processor = CLIPImageProcessorPil()
    for height, width in clip_sizes():
        wanted = processor([picture(height, width)], return_tensors="pt")["pixel_values"]
        assert torch.equal(wanted, clip_pixels([picture(height, width)], ClipSettings())), (height, width)


def test_a_crop_beyond_the_picture_equals_the_official_processor() -> None:
    for shortest, crop in ((20, (33, 26)), (21, (26, 33)), (30, (31, 12))):
        options = {"size": {"shortest_edge": shortest}, "crop_size": {"height": crop[0], "width": crop[1]}}
        processor, settings = CLIPImageProcessorPil(**options), ClipSettings(shortest, crop)
        for size in ((40, 40), (40, 55), (71, 40)):
            wanted = processor([picture(*size)], return_tensors="pt")["pixel_values"]
            assert torch.equal(wanted, clip_pixels([picture(*size)], settings)), (shortest, crop, size)


def test_vilt_batches_equal_the_official_processor() -> None:
    processor, settings = ViltImageProcessorPil(size={"shortest_edge": 96}), ViltSettings(shortest=96)
    randomly = np.random.default_rng(0)
    for trial in range(60):
        batch = [picture(int(h), int(w)) for h, w in randomly.integers(40, 200, (1 + trial % 4, 2))]
        wanted, (found, mask) = processor(batch, return_tensors="pt"), vilt_pixels(batch, settings)
        assert torch.equal(wanted["pixel_values"], found)
        assert torch.equal(wanted["pixel_mask"], mask)
        assert mask.dtype == torch.int64


@pytest.mark.parametrize("size", [(384, 384), (224, 224), (200, 900), (900, 200), (300, 401), (801, 1333)])
def test_vilt_pixels_of_the_official_size_equal_the_official_processor(size: tuple[int, int]) -> None:
    wanted, (found, mask) = (
        ViltImageProcessorPil()([picture(*size)], return_tensors="pt"),
        vilt_pixels([picture(*size)], ViltSettings()),
    )
    assert torch.equal(wanted["pixel_values"], found)
    assert torch.equal(wanted["pixel_mask"], mask)


def test_vilt_takes_grey_clear_and_palette_pictures_that_the_official_processor_refuses() -> None:
    for mode in ("L", "P", "RGBA"):
        image = picture(64, 64).convert(mode)
        found, _ = vilt_pixels([image], ViltSettings(shortest=64))
        assert torch.equal(found, vilt_pixels([image.convert("RGB")], ViltSettings(shortest=64))[0])


def test_pictures_too_narrow_for_a_network_are_refused_by_name(tmp_path: Path) -> None:
    picture(500, 2).save(tmp_path / "thin.png")
    with pytest.raises(RecordError, match=r"thin\.png: 2 x 500 pixels, too narrow"):
        vilt_pixels([tmp_path / "thin.png"], ViltSettings())
    with pytest.raises(RecordError, match="picture: 500 x 2 pixels, too narrow"):
        vilt_pixels([picture(2, 500)], ViltSettings())
    with pytest.raises(RecordError, match="picture: 3000 x 2 pixels, too narrow"):
        clip_pixels([picture(2, 3000)], ClipSettings())
    with pytest.raises(RecordError, match="at least one"):
        vilt_pixels([], ViltSettings())


def test_threads_change_nothing() -> None:
    batch = [picture(40 + i, 60) for i in range(9)]
    alone = vilt_pixels(batch, ViltSettings(shortest=64))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = vilt_pixels(batch, ViltSettings(shortest=64))
        with pytest.raises(RecordError, match="no such picture file"):
            clip_pixels([*batch, "absent.png"], ClipSettings())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


def mutated(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    monkeypatch.setattr(pixels, name, change(getattr(pixels, name)))


MUTATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "height and width of an arrangement swapped": (
        "best_arrangement",
        lambda f: lambda h, w, s, n: f(h, w, s, n)[::-1],
    ),
    "the largest canvas taken": ("best_arrangement", lambda _: lambda *_: (2, 2)),
    "always enlarged to the canvas": (
        "fitted_size",
        lambda f: lambda h, w, *canvas: f(h, w, *canvas[:2], min(canvas[:2])),
    ),
    "rounded instead of cut": ("fitted_size", lambda f: lambda h, w, *rest: tuple(x + 1 for x in f(h, w, *rest))),
    "arrangements in another order": ("arrangements", lambda f: lambda n: tuple(sorted(f(n), key=lambda t: t[::-1]))),
    "channels reversed": ("_fill", lambda f: lambda out, picture, table: f(out[::-1], picture, table)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_of_the_tiling_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    images = [[picture(40, 70)], [picture(90, 30)], [picture(30, 40)]]
    assert agrees_on(images, MllamaSettings(size=28), mllama_processor(28))
    mutated(monkeypatch, *MUTATIONS[name])
    assert not agrees_on(images, MllamaSettings(size=28), mllama_processor(28))


def test_each_rule_of_vilt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    image, settings = picture(100, 300), ViltSettings(shortest=96)
    wanted = ViltImageProcessorPil(size={"shortest_edge": 96})([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(vilt_pixels([image], settings)[0], wanted)
    for change in ({"divisor": 16}, {"resample": 2}, {"shortest": 128}, {"colours": Colours(CLIP_MEAN, CLIP_STD)}):
        assert not torch.equal(vilt_pixels([image], replace(settings, **change))[0], wanted), change
    monkeypatch.setattr(pixels, "VILT_LONGEST", 2.0)
    assert not torch.equal(vilt_pixels([image], settings)[0], wanted)


@pytest.mark.parametrize(
    "change",
    [{"size": 27}, {"max_tiles": 3}, {"resample": 3}, {"colours": Colours(HALF, HALF)}],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_of_the_tiling_is_seen(change: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        assert agrees_on([[picture(60, 60)]], replace(MllamaSettings(size=28), **change), mllama_processor(28))


OLD = {  # as the first published files have them
    "vilt": {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViltFeatureExtractor"}
    | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": 384, "size_divisor": 32},
    "clip": {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    | {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    | {"size": 224},
}
READERS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "vilt": (vilt_settings, ViltSettings()),
    "clip": (clip_settings, ClipSettings()),
    "mllama": (mllama_settings, MllamaSettings()),
}


def written(folder: Path, config: object, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("network", READERS)
def test_without_a_file_the_official_values_hold(tmp_path: Path, network: str) -> None:
    read, official = READERS[network]
    assert read(tmp_path) == official


@pytest.mark.parametrize("network", OLD)
def test_old_files_are_read(tmp_path: Path, network: str) -> None:
    read, official = READERS[network]
    assert read(written(tmp_path, OLD[network])) == official


def test_files_that_the_official_processors_write_are_read(tmp_path: Path) -> None:
    for name, processor in {
        "vilt": ViltImageProcessorPil(),
        "clip": CLIPImageProcessorPil(),
        "mllama": mllama_processor(560),
    }.items():
        read, official = READERS[name]
        processor.save_pretrained(tmp_path)
        assert read(tmp_path) == official
        written(tmp_path, {"image_processor": processor.to_dict()}, "processor_config.json")
        (tmp_path / "preprocessor_config.json").unlink()
        assert read(tmp_path) == official


def test_settings_other_than_the_official_reach_the_pixels(tmp_path: Path) -> None:
    options = {"size": {"shortest_edge": 40}, "crop_size": {"height": 30, "width": 36}, "resample": 2}
    options |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.01}
    for extra in ({}, {"do_normalize": False}, {"do_rescale": False}):
        processor = CLIPImageProcessorPil(**options, **extra)
        processor.save_pretrained(tmp_path)
        wanted = processor([picture(50, 61)], return_tensors="pt")["pixel_values"]
        found = clip_pixels([picture(50, 61)], clip_settings(tmp_path))
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "change", "words"),
    [
        ("vilt", {"do_pad": False}, "do_pad is False; only True"),
        ("vilt", {"do_resize": False}, "do_resize is False"),
        ("vilt", {"do_center_crop": True}, "do_center_crop is True"),
        ("vilt", {"size": {"height": 384, "width": 384}}, "size is .*height"),
        ("vilt", {"size": 0}, "size is 0"),
        ("vilt", {"size": True}, "size is True"),
        ("vilt", {"size_divisor": 512}, "size_divisor 512 exceeds"),
        ("vilt", {"crop_size": 224}, "crop_size: not implemented"),
        ("vilt", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'"),
        ("clip", {"do_center_crop": False}, "do_center_crop is False"),
        ("clip", {"size": {"shortest_edge": 224, "longest_edge": 300}}, "longest_edge"),
        ("clip", {"resample": 9}, "resample is 9"),
        ("clip", {"image_std": [1, 1, 0]}, "image_std is 0"),
        ("clip", {"image_mean": [0.5, 0.5]}, "image_mean is .*three numbers"),
        ("clip", {"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ("clip", {"do_normalize": 1}, "do_normalize is 1"),
        ("clip", {"input_data_format": "channels_last"}, "input_data_format"),
        ("clip", {"sharpen": 2}, "sharpen: not implemented, and it may change the pixels"),
        ("mllama", {"size": {"height": 560, "width": 448}}, "560 x 448; tiles are square"),
        ("mllama", {"max_image_tiles": 0}, "max_image_tiles is 0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, network: str, change: dict[str, Any], words: str
) -> None:
    read, _ = READERS[network]
    config = OLD.get(network, {}) | change
    if "image_processor_type" in change:
        config.pop("feature_extractor_type")
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: .*{words}"):
        read(written(tmp_path, config))


def test_keys_without_effect_and_empty_keys_are_passed_over(tmp_path: Path) -> None:
    config = OLD["clip"] | {
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "pad_size": None,
        "device": None,
    }
    assert clip_settings(written(tmp_path, config)) == ClipSettings()
    with pytest.raises(CheckpointError, match="wanted an object"):
        clip_settings(written(tmp_path, [1]))


@pytest.mark.skipif(not (REAL / "images").is_dir(), reason="the real pictures are not here")
def test_real_pictures_equal_the_official_processors() -> None:
    paths = sorted(path for path in (REAL / "images").rglob("*.*") if path.suffix in (".jpg", ".jpeg", ".png"))[::20]
    assert len(paths) > 5
    opened = [Image.open(path).convert("RGB") for path in paths]
    assert torch.equal(
        CLIPImageProcessorPil()(opened, return_tensors="pt")["pixel_values"], clip_pixels(paths, ClipSettings())
    )
    wanted = ViltImageProcessorPil()(opened[:3], return_tensors="pt")["pixel_values"]
    assert torch.equal(wanted, vilt_pixels(paths[:3], ViltSettings())[0])
    assert agrees_on([opened[:2]], MllamaSettings(), mllama_processor(560))
