"""A vision decoder that is spread over ranks: the curve and the answers of one process, whatever is trained of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints_mllama import SIDE, picture, write_mllama
from ranks import on_ranks
from students import run_settings
from test_mllama_trees import image_pair
from test_sharding import assert_alike, assert_holds_its_part

from mint import parallel
from mint.files import write_json
from mint.pipeline import align, predict
from mint.training import runs
from mint.types import PreferencePair, Record

TRAINED: dict[str, dict[str, Any]] = {
    "everything": {"objective": "orpo", "targets": ("all-linear", "lm_head")},
    "text": {"objective": "dpo", "targets": ("language_model",)},
    "projector": {"targets": ("cross_attn", "multi_modal_projector"), "recompute": True},
}
"""The tower is trained; it is frozen and its features kept; the projector is trained on features that are kept."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "shard": (2, {"shard": True}),
    "split": (2, {"tensor_parallel": 2}),
    "both": (4, {"shard": True, "tensor_parallel": 2}),
}
LABELS = ["Breast", "Bile-duct", "Colon and rectum"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=2, std=0.1, text={"num_key_value_heads": 2})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of one, two and four tiles."""
    place = tmp_path_factory.mktemp("pictures")
    for at, size in enumerate([(SIDE, SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE)]):
        picture(*size, seed=at).save(place / f"{at}.png")
    return [str(place / f"{at}.png") for at in range(3)]


def some_pairs(pictures: list[str]) -> list[PreferencePair]:
    """Two share a picture, and two have none."""
    shown = [image_pair(name, pictures[at]) for name, at in (("a", 1), ("b", 2), ("c", 0))]
    others = [image_pair("d", pictures[1], "Which one?", "a thin chin"), image_pair("e", None)]
    return [*shown, *others, image_pair("f", None, "Who?", "a lip")]


def trained(layout: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All of them where ranks take turns alone; else the one that is spread in every part."""
    return {"everything": TRAINED["everything"]} if "tensor_parallel" in layout else TRAINED


def worked(folder: Path, pictures: list[str], out: Path, layout: dict[str, Any]) -> None:
    for name, changes in trained(layout).items():
        settings = run_settings(model=str(folder), out=str(out / name), steps=2, batch_size=4, lr=1e-4, **changes)
        align(run_settings(**{**settings.as_dict(), **layout}), some_pairs(pictures))
    records = [Record(f"case-{n}", note="thin nose " * (n % 3 + 1), image=pictures[n % 3]) for n in range(3)]
    parallel.shared_out = partial(parallel.shared_out, turn=1)  # type: ignore[assignment]
    rows = []
    for mode, modality in (("rank", "image"), ("rank", "note"), ("list", "both"), ("text", "image")):
        found = predict(records, model=folder, adapter=out / "everything/adapter", labels=LABELS, mode=mode, top=3,
                        modality=modality, max_new_tokens=5, device="cpu", dtype="float32", date="26 Jul 2024",
                        **layout)  # fmt: skip
        rows += [[a.id, a.top(3), a.text, [entry.get("logprob", 0.0) for entry in a.ranking]] for a in found]
    if parallel.first():
        write_json(out / "answers.json", rows)


@pytest.fixture(scope="module")
def alone(folder: Path, pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    on_ranks(1, worked, folder, pictures, out, {})
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spread_vision_decoder_learns_and_answers_as_one_process_does(
    folder: Path, pictures: list[str], tmp_path: Path, alone: Path, layout: str
) -> None:
    """In some steps one rank has pictures and the other has none, and pictures that one has seen are new to the other."""
    ranks, changes = LAYOUTS[layout]
    on_ranks(ranks, worked, folder, pictures, tmp_path, changes)
    for name in trained(changes):
        assert_alike(tmp_path / name, alone / name)
        assert len({row["loss"] for row in runs.read_metrics(alone / name / "metrics.jsonl")}) == 2
    found, wanted = (json.loads((place / "answers.json").read_text()) for place in (tmp_path, alone))
    assert len(found) == 12
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[:3] == theirs[:3]
        assert mine[3] == pytest.approx(theirs[3], rel=1e-5)


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (2, 2)])
def test_each_rank_reads_and_holds_its_own_part_alone(folder: Path, tmp_path: Path, data: int, tensor: int) -> None:
    """Of the tower too by FSDP; where products are shared alone, each rank has all of it."""
    assert_holds_its_part(folder, tmp_path, data, tensor)
