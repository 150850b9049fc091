"""Encoders against transformers on this machine: forward passes, and photo + note preprocessing in records per second.

    python tests/bench/encoders.py [--repeat 9] [--batch 4] [--count 32] [--threads 1] [--only forward|preprocess]
                                   [--like clip]

Networks of the official size (ViLT-B/32, CLIP ViT-B/32) with random weights, the same on both sides. One JSON line per
comparison: both sides run in turns, each first every other time; a ratio is the median of those of the turns, theirs to
ours, and lowest and highest are the quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import transformers

from mint.encoders.clip import ClipConfig, ClipModel
from mint.encoders.vilt import ViltConfig, ViltForQuestionAnswering
from mint.images.pixels import clip_pixels, vilt_pixels
from mint.images.rules import clip_settings, vilt_settings
from mint.tokens import CLIP_END, CLIP_START, learn_words, open_bert_texts, open_clip_texts, write_bert_tokenizer

Side = Callable[[], Any]
NOTE = "Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure Short stature Ptosis Hearing loss {}"


def in_turns(theirs: Side, ours: Side, repeat: int) -> np.ndarray:
    """Seconds and computing seconds of both sides in each turn, (repeat, 2 sides, 2), after one run to warm up.

    Computing seconds are those that this process spent, whatever else the machine was busy with.
    """
    spent = np.zeros((repeat, 2, 2))
    theirs(), ours()
    for turn in range(repeat):
        for number in (0, 1) if turn % 2 else (1, 0):
            start, computing = time.perf_counter(), time.process_time()
            (theirs, ours)[number]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[turn, number] = time.perf_counter() - start, time.process_time() - computing
    return spent


def vilt_batch(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Pictures of these sizes padded to one batch, and notes of unequal length."""
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width).long()
    for row, (h, w) in enumerate(sizes):
        pixels[row, :, :h, :w], mask[row, :h, :w] = torch.randn(3, h, w), 1
    words = (torch.arange(40) < torch.linspace(20, 40, len(sizes)).long()[:, None]).long()
    ids = torch.randint(999, 20000, words.shape) * words
    return {"input_ids": ids, "attention_mask": words, "pixel_values": pixels, "pixel_mask": mask}


def forwards(batch: int) -> Iterator[tuple[str, Side, Side]]:
    """Name, their forward and ours, of each network on one batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vilt = transformers.ViltForQuestionAnswering(transformers.ViltConfig(num_labels=528)).eval().to(device)
    ours = ViltForQuestionAnswering(ViltConfig(), 528).eval().to(device)
    ours.load_state_dict(vilt.state_dict())
    shapes = {"squares": [(384, 384)], "tall and wide": [(384, 512), (512, 384), (384, 384)]}
    for name, sizes in shapes.items():
        inputs = {key: value.to(device) for key, value in vilt_batch((sizes * batch)[:batch]).items()}
        yield f"vilt {name}", lambda i=inputs: vilt(**i).logits, lambda i=inputs: ours(*i.values())  # type: ignore[misc]
    clip = transformers.CLIPModel(transformers.CLIPConfig()).eval().to(device)
    twin = ClipModel(ClipConfig()).eval().to(device)
    twin.load_state_dict(clip.state_dict())
    pixels, ids = (
        torch.randn(4 * batch, 3, 224, 224, device=device),
        torch.randint(1, 49000, (4 * batch, 16), device=device),
    )
    ids[:, -1] = 49407
    unit = torch.nn.functional.normalize
    yield (
        "clip images",
        lambda: unit(clip.get_image_features(pixels).pooler_output, dim=-1),
        lambda: twin.image_features(pixels),
    )
    yield (
        "clip texts",
        lambda: unit(clip.get_text_features(ids).pooler_output, dim=-1),
        lambda: twin.text_features(ids),
    )


def drawn(folder: Path, count: int) -> list[Path]:
    """JPEG files of 224 x 224: smooth pictures with some grain."""
    randomly = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(randomly.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((224, 224))
        grain = randomly.integers(-12, 13, (224, 224, 3))
        picture = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:04}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def opened(files: list[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def preprocessing(folder: Path, count: int) -> Iterator[tuple[str, Side, Side]]:
    """Name, their processor and ours, from the same files and notes to the networks' inputs."""
    files, notes = drawn(folder, count), [NOTE.format(f"case {number}") for number in range(count)]
    bert, clip = folder / "bert", folder / "clip"
    for place in (bert, clip):
        place.mkdir()
    write_bert_tokenizer(learn_words(notes, 30522), bert, 40)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), CLIP_START, CLIP_END]
    (clip / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(words)}))
    (clip / "merges.txt").write_text("#version: 0.2\n")
    cut: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
    theirs = transformers.ViltProcessor(
        transformers.ViltImageProcessorPil(), transformers.BertTokenizer.from_pretrained(bert)
    )
    texts, rules = open_bert_texts(bert, 40), vilt_settings(bert)
    yield (
        "vilt",
        lambda: theirs(images=opened(files), text=notes, max_length=40, **cut)["pixel_values"],
        lambda: (texts(notes), vilt_pixels(files, rules)[0])[1],
    )
    other = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(), transformers.CLIPTokenizer.from_pretrained(clip)
    )
    sentences, settings = open_clip_texts(clip, 77), clip_settings(clip)
    yield (
        "clip",
        lambda: other(images=opened(files), text=notes, max_length=77, **cut)["pixel_values"],
        lambda: (sentences(notes), clip_pixels(files, settings))[1],
    )


@torch.inference_mode()
def report(bench: str, theirs: Side, ours: Side, repeat: int) -> None:
    spent = in_turns(theirs, ours, repeat)
    official, mint = np.median(spent[..., 0], axis=0).tolist()
    (low, middle, high), (_, computing, _) = np.percentile(spent[:, 0] / spent[:, 1], (25, 50, 75), axis=0).T.tolist()
    wanted, found = theirs(), ours()
    line = {
        "bench": f"encoders/{bench}",
        "records": len(found),
        "threads": torch.get_num_threads(),
        "official_records_per_second": round(len(found) / official, 1),
        "mint_records_per_second": round(len(found) / mint, 1),
        "ratio": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "computing_ratio": round(computing, 2),
        "largest_difference": float((wanted - found).abs().max()),
        "largest_value": float(wanted.abs().max()),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("forward", "preprocess"))
    parser.add_argument("--like", default="", help="only comparisons with this in their name")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.only != "forward":
        with tempfile.TemporaryDirectory() as folder:
            for name, theirs, ours in preprocessing(Path(folder), options.count):
                if options.like in name:
                    report(f"preprocess {name}", theirs, ours, options.repeat)
    if options.only != "preprocess":
        for name, theirs, ours in forwards(options.batch):
            if options.like in name:
                report(f"forward {name}", theirs, ours, options.repeat)


if __name__ == "__main__":
    main()
