"""The story of `align builtin:tissue`: its files, its figures, and what `predict` finds afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mint import showcase_tissue as story
from mint.builtin.nuclei import draw_tissue_cases
from mint.builtin.tissue_facts import tissues
from mint.commands import cli
from mint.commands.align import _showcase
from mint.config import AlignSettings
from mint.errors import ConfigError
from mint.images import open_image


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> story.Told:
    """A very short story: it is whole, but the student learns next to nothing."""
    out = tmp_path_factory.mktemp("runs") / "tissue" / "1"
    settings = AlignSettings(**{**story.SETTINGS, "out": str(out), "epochs": 1.0, "device": "cpu"})
    return story.tell(settings, train=16, test=12, split="validation")


def test_the_story_leaves_a_whole_run(told: story.Told) -> None:
    for name in ("run.json", "pairs.jsonl", "metrics.jsonl", "labels.txt", "adapter/adapter_model.safetensors"):
        assert (told.folder / name).is_file(), name
    rows = [json.loads(line) for line in (told.folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert all(sorted(entry["label"] for entry in row["ranking"]) == sorted(tissues()) for row in rows)
    assert len(list((told.folder / "tiles").glob("*.png"))) == 28


def test_its_tower_is_frozen_and_its_features_are_kept(told: story.Told) -> None:
    config = json.loads((told.folder / "adapter" / "adapter_config.json").read_text())
    assert not any("vision_model" in name for name in config["target_modules"])
    assert len(list((told.folder / "features").glob("tower-*.safetensors"))) == 16


def test_its_table_has_every_system_with_intervals(told: story.Told) -> None:
    shown = str(told).splitlines()
    for name, row in zip((story.BASE, story.ALIGNED, story.TAUGHT), shown[1:4], strict=True):
        assert row.startswith(name)
        assert row.count(" to ") == 3
    assert all(words in shown[0] for words in ("top-1, %", "top-5, %", "outside the set, %"))
    assert shown[-1].startswith("next:        python cli.py predict --image ")
    assert told.reports[story.TAUGHT].metrics["outside_set"] == 0
    assert json.loads(json.dumps(told.as_dict()))["systems"][story.BASE].keys() == {"top_1", "top_5", "outside_set"}


def test_its_report_shows_the_same_figures_and_says_that_tiles_are_simulated(told: story.Told) -> None:
    page = (told.folder / "report.html").read_text()
    assert "simulated" in page
    assert f"{100 * told.reports[story.ALIGNED].metrics['top_5']:.1f}" in page
    assert page.count("<img ") >= 10


def test_the_student_is_never_shown_the_description_nor_the_label(told: story.Told) -> None:
    records = {record.id: record for record in draw_tissue_cases(16, 0, "train")}
    for line in (told.folder / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        asked = str(pair["prompt"])
        assert records[pair["id"]].note not in asked
        assert not any(name in asked + pair["image"] for name in tissues())
        assert (told.folder / pair["image"]).is_file()


def test_stored_tiles_are_the_drawn_ones(told: story.Told) -> None:
    for record in draw_tissue_cases(2, 0, "train", story.SIDE):
        stored = open_image(str(told.folder / "tiles" / f"{record.id}.png"))
        assert stored.tobytes() == open_image(record.image).tobytes()


def test_a_folder_that_holds_a_run_is_left_alone(told: story.Told) -> None:
    settings = AlignSettings(**{**story.SETTINGS, "out": str(told.folder)})
    with pytest.raises(ConfigError, match="holds a run already"):
        story.tell(settings, train=1, test=1)


def test_the_newest_run_answers_for_a_picture(told: story.Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(told.folder.parents[2])
    (told.folder.parents[2] / "runs").symlink_to(told.folder.parents[1])
    found = story.newest()
    assert Path(found["adapter"]).samefile(told.folder / "adapter")
    assert story.new_folder() == Path("runs/tissue/2")
    tile = told.next.split()[-1]
    said = CliRunner().invoke(cli, ["predict", "--image", tile, "--format", "jsonl", "--top", "19"])
    assert said.exit_code == 0, said.output
    row = json.loads(said.output.splitlines()[-1])
    first = json.loads((told.folder / "predictions.jsonl").read_text().splitlines()[0])
    assert {entry["label"] for entry in row["ranking"]} == set(tissues())
    assert row["ranking"][0]["probability"] == pytest.approx(first["ranking"][0]["probability"], abs=0.05)


def test_without_a_run_the_shipped_base_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (record,) = draw_tissue_cases(1, 5, "validation")
    open_image(record.image).save("tile.png")
    said = CliRunner().invoke(cli, ["predict", "--image", "tile.png", "--top", "3"])
    assert said.exit_code == 0, said.output
    assert sum(name in said.output for name in tissues()) >= 3
    assert "not aligned" in said.output


def test_the_command_tells_the_story_of_the_task_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "tell", lambda settings, teacher: (settings, teacher))
    settings, teacher = _showcase("builtin:tissue", {"rank": 4, "lr": None}, None, {})
    assert (settings.rank, settings.lr, teacher) == (4, story.SETTINGS["lr"], None)
    assert settings.out.startswith("runs/tissue/")
