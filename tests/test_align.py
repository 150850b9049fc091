"""`align` as it is called from Python: settings by name, a file of pairs by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from students import run_settings, text_pairs, untimed, write_pairs_file, write_student

from mint import align
from mint.commands import cli
from mint.errors import ConfigError
from mint.training.runs import read_metrics

SHORT: dict[str, Any] = {"steps": 2, "rank": 4, "batch_size": 2, "device": "cpu", "dtype": "float32", "lr": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("model"))


def test_settings_may_be_named_one_by_one_or_over_others(model: Path, tmp_path: Path) -> None:
    file = write_pairs_file(tmp_path / "pairs.jsonl", text_pairs(4))
    named = align(model=model, pairs=file, out=tmp_path / "named", date="26 Jul 2024", **SHORT)
    assert named["out"] == str(tmp_path / "named")
    usual = run_settings(model=str(model), pairs=str(file), out=str(tmp_path / "other"), lr=0.5)
    align(usual, schedule="cosine", warmup=0.05, alpha=32.0, **SHORT)
    rows = [untimed(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("named", "other")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2


def test_a_run_is_gone_on_with_by_its_folder_alone(model: Path, tmp_path: Path) -> None:
    done = align(model=model, pairs=text_pairs(4), out=tmp_path / "run", **SHORT)
    assert align(out=tmp_path / "run", resume=True) == done


def test_a_folder_without_a_run_is_named_where_there_is_nothing_to_begin_one_with(tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["align", "--resume", "--out", str(tmp_path)])
    assert said.exit_code == 2
    assert f"--resume: {tmp_path} holds no run" in said.output


@pytest.mark.parametrize(("wrong", "message"), [({"colour": 1}, "align: colour is no setting"),
                                                ({"steps": "two"}, "align: steps is 'two'; wanted int"),
                                                ({"lr": -1.0}, "--lr -1.0: wanted a number")])  # fmt: skip
def test_a_name_or_a_value_that_is_none_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        align(**wrong)
