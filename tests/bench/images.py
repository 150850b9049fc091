"""Image preprocessing, records per second, against the image part of the official processors on the same files.

    python tests/bench/images.py [FOLDER] [--count 32] [--repeat 7]

Without a folder the pictures are drawn: JPEG files of 224 x 224, as tissue tiles are. One JSON line per comparison;
both sides open the files, run interleaved, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from mint.images.pixels import clip_pixels, mllama_pixels, vilt_pixels
from mint.images.rules import CLIP_MEAN, CLIP_STD, ClipSettings, MllamaSettings, ViltSettings

Side = Callable[[], torch.Tensor]


def drawn(folder: Path, count: int) -> list[Path]:
    """Smooth pictures with some grain, which JPEG packs as it packs photographs."""
    randomly = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(randomly.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((224, 224))
        grain = randomly.integers(-12, 13, (224, 224, 3))
        picture = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def sides(files: list[Path]) -> dict[str, tuple[Side, Side]]:
    """For each network: the official processor on opened files, and ours on their paths."""
    vilt, clip = ViltImageProcessorPil(), CLIPImageProcessorPil()
    size, colours = {"height": 560, "width": 560}, {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    mllama = MllamaImageProcessorPil(size=size, **colours)

    def opened() -> list[Image.Image]:
        return [Image.open(file).convert("RGB") for file in files]

    return {
        "vilt": (
            lambda: vilt(opened(), return_tensors="pt")["pixel_values"],
            lambda: vilt_pixels(files, ViltSettings())[0],
        ),
        "clip": (
            lambda: clip(opened(), return_tensors="pt")["pixel_values"],
            lambda: clip_pixels(files, ClipSettings()),
        ),
        "mllama": (
            lambda: mllama([[picture] for picture in opened()[:8]], return_tensors="pt")["pixel_values"],
            lambda: mllama_pixels([[file] for file in files[:8]], MllamaSettings()).pixels,
        ),
    }


def interleaved(theirs: Side, ours: Side, repeat: int) -> tuple[float, float]:
    """Median seconds of both, taken in turns after one run to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    theirs(), ours()
    for _ in range(repeat):
        for side, spent in zip((theirs, ours), seconds, strict=True):
            start = time.perf_counter()
            side()
            spent.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = options.folder or Path(folder)
        files = sorted(path for path in found.rglob("*.*") if path.suffix in (".jpg", ".jpeg", ".png"))
        files = files[: options.count] or drawn(found, options.count)
        for network, (theirs, ours) in sides(files).items():
            official, mint = interleaved(theirs, ours, options.repeat)
            pixels = ours()
            line = {
                "bench": f"images/{network}",
                "records": len(pixels),
                "threads": torch.get_num_threads(),
                "official_records_per_second": round(len(pixels) / official, 1),
                "mint_records_per_second": round(len(pixels) / mint, 1),
                "ratio": round(official / mint, 2),
                "largest_difference": float((theirs() - pixels).abs().max()),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
