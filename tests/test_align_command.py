"""`align` and `merge` at the command line: what they print, what they write, how they refuse, what they never touch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from students import ids_of, run_cli, text_pairs, transformers_of, write_pairs_file, write_student

from mint.commands import cli
from mint.config import AlignSettings
from mint.decoders import load_decoder
from mint.training.runs import read_metrics

Align = Callable[..., Result]
WEIGHTS = "adapter/adapter_model.safetensors"
QUICK = ("--rank", "4", "--steps", "3", "--batch-size", "3", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_pairs(8))


@pytest.fixture
def align(model: Path, pairs: Path, tmp_path: Path) -> Align:
    """`mint align` with a model, pairs and a run folder, which words given later replace."""

    def run(*words: str) -> Result:
        usual = ["align", "--model", str(model), "--pairs", str(pairs), "--out", str(tmp_path / "run"), *QUICK]
        return CliRunner().invoke(cli, [*usual, *words])

    return run


def said(result: Result) -> str:
    """The error of a command: one line on stderr, and nothing on stdout."""
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("mint: ")]
    assert len(lines) == 1 == len(result.stderr.strip().splitlines()[-1:]), result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.stderr
    return lines[0]


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_align_makes_an_adapter_in_a_process_of_its_own(model: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_cli("align", "--model", str(model), "--pairs", str(pairs), "--out", str(out), *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = read_metrics(out / "metrics.jsonl")
    assert result == {"out": str(out), "adapter": str(out / "adapter"), "steps": 3, "loss": rows[-1]["loss"]}
    assert "training 3/3 steps" in done.stderr
    assert "tokens/s" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "adapter", "checkpoint", "metrics.jsonl", "run.json"
    ]  # fmt: skip
    base, adapted = (load_decoder(model, adapter=a, device="cpu", dtype="float32") for a in (None, out / "adapter"))
    assert not torch.equal(base.logits(ids_of(1, 8)), adapted.logits(ids_of(1, 8)))


def test_quiet_says_nothing_and_the_result_is_lines_of_name_and_value(align: Align, tmp_path: Path) -> None:
    result = align("--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    names = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    assert names == ["out", "adapter", "steps", "loss"]
    assert f"out: {tmp_path / 'run'}" in result.stdout


def test_run_json_holds_every_setting_as_it_was_decided(align: Align, tmp_path: Path) -> None:
    assert align("--dtype", "auto", "--device", "auto", "--targets", "q_proj, v_proj").exit_code == 0
    written = json.loads((tmp_path / "run/run.json").read_text())
    settings = written["settings"]
    assert settings["targets"] == ["q_proj", "v_proj"]
    assert (settings["dtype"], settings["nll"], settings["recompute"]) == ("float32", "prompt+chosen", False)
    assert settings["device"] in ("cpu", "cuda")
    assert len(settings["date"].split()) == 3
    assert written["versions"]["torch"] == torch.__version__
    assert (written["pairs"], written["held_out_pairs"]) == (8, 0)


def test_a_dry_run_prints_the_audit_and_writes_nothing(align: Align, tmp_path: Path) -> None:
    result = align("--dry-run", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["pairs"], found["steps"], found["begin_of_text_doubled"]) == (8, 3, 0)
    assert 0 < found["tokens_computed"] < found["tokens_one_by_one"]
    assert found["weights_bytes"] > 0 < found["activation_bytes"]
    assert list(tmp_path.iterdir()) == []
    lines = align("--dry-run").stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(found)


def test_a_run_is_repeated_from_its_run_json_to_the_same_bytes(align: Align, tmp_path: Path) -> None:
    words = (
        "--dropout",
        "0.2",
        "--objective",
        "dpo",
        "--seed",
        "5",
        "--schedule",
        "linear",
        "--targets",
        "q_proj,lm_head",
    )
    assert align(*words).exit_code == 0
    again = ["align", "--config", str(tmp_path / "run/run.json"), "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(cli, again).exit_code == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()
    other = ["align", "--config", str(tmp_path / "run"), "--out", str(tmp_path / "other"), "--seed", "6"]
    assert CliRunner().invoke(cli, other).exit_code == 0
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (tmp_path / "run" / WEIGHTS).read_bytes()
    first, changed = (json.loads((tmp_path / run / "run.json").read_text())["settings"] for run in ("run", "other"))
    assert {name for name in first if first[name] != changed[name]} == {"seed", "out"}


def test_resume_needs_no_more_than_the_folder(align: Align, tmp_path: Path) -> None:
    assert align().exit_code == 0
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    result = CliRunner().invoke(cli, ["align", "--out", str(tmp_path / "run"), "--resume", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 3
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_an_adapter_is_a_place_to_start_from(align: Align, model: Path, pairs: Path, tmp_path: Path) -> None:
    assert align().exit_code == 0
    words = ["align", "--model", str(model), "--pairs", str(pairs), "--out", str(tmp_path / "more"), *QUICK]
    assert CliRunner().invoke(cli, [*words, "--adapter", str(tmp_path / "run/adapter"), "--seed", "0"]).exit_code == 0
    first, more = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("run", "more"))
    assert more[0]["loss"] < first[0]["loss"]


def test_a_held_out_share_is_evaluated(align: Align, tmp_path: Path) -> None:
    assert align("--held-out", "0.4", "--eval-every", "2").exit_code == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run/evaluations.jsonl")] == [2, 3]
    written = json.loads((tmp_path / "run/run.json").read_text())
    assert written["pairs"] + written["held_out_pairs"] == 8
    assert written["held_out_pairs"] > 0


def test_help_has_an_example_and_every_setting() -> None:
    result = CliRunner().invoke(cli, ["align", "--help"])
    assert result.exit_code == 0
    assert "Example:  python cli.py align --model" in result.stdout
    for name in [*(setting.name for setting in fields(AlignSettings)), "resume", "dry-run", "config", "skip-bad"]:
        assert f"--{name.replace('_', '-')}" in result.stdout


FORMS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "thin", "chosen": " red lip", "rejected": " blue"},
    "strings without a prompt": {"chosen": "thin red lip", "rejected": "thin blue"},
    "conversations": {
        "prompt": [{"role": "user", "content": "thin"}],
        "chosen": [{"role": "assistant", "content": "red lip"}],
        "rejected": [{"role": "assistant", "content": "blue"}],
    },
    "conversations without a prompt": {
        "chosen": [{"role": "user", "content": "thin"}, {"role": "assistant", "content": "red lip"}],
        "rejected": [{"role": "user", "content": "thin"}, {"role": "assistant", "content": "blue"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_trl_knows_trains_as_it_is(align: Align, tmp_path: Path, form: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(FORMS[form]) + "\n")
    result = align("--pairs", str(file), "--steps", "1", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""


def test_a_run_whose_pairs_a_teacher_made_is_repeated_by_its_settings_alone(model: Path, tmp_path: Path) -> None:
    cases, scores, first, second = (tmp_path / name for name in ("cases.jsonl", "scores.jsonl", "first", "second"))
    cases.write_text("".join(json.dumps({"id": f"c{i}", "note": f"Note {i}.", "label": "A"}) + "\n" for i in range(6)))
    rows = ({"id": f"c{i}", "scores": {name: (7 * i + 3 * n) % 5 for n, name in enumerate("ABCDEF")}} for i in range(6))
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = ("--teacher", str(scores), "--chosen-k", "2", "--rejected-q", "2")
    result = CliRunner().invoke(cli, ["align", str(cases), *ranked, "--model", str(model), "--out", str(first), *QUICK])
    assert result.exit_code == 0, result.output
    assert len((first / "pairs.jsonl").read_text().splitlines()) == 6
    scores.unlink()
    result = CliRunner().invoke(cli, ["align", "--config", str(first), "--out", str(second)])
    assert result.exit_code == 0, result.output
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert not (second / "pairs.jsonl").exists()
    resumed = CliRunner().invoke(cli, ["align", "--resume", "--out", str(first)])
    assert resumed.exit_code == 0, resumed.output


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = json.dumps({"id": "good", "prompt": "thin", "chosen": " red", "rejected": " blue"})
CHAT = json.dumps({"id": "chat", **FORMS["conversations"]})


def row(**changes: Any) -> str:
    return json.dumps({"id": "bad", "prompt": "thin", "chosen": " red", "rejected": " blue", **changes})


BAD = {
    "malformed": (row()[:-3], r"bad.jsonl:2:\d+: not JSON"),
    "no rejected": (json.dumps({"id": "bad", "prompt": "a", "chosen": "b"}), "bad.jsonl:2: no 'rejected'"),
    "empty answer": (row(chosen=" "), "bad.jsonl:2: chosen is empty; an answer needs words"),
    "same answers": (row(chosen=" blue"), "bad.jsonl:2: chosen and rejected are the same"),
    "mixed forms": (CHAT, "bad.jsonl:2: message lists, but line 1 has plain strings; keep one form to a file"),
    "no image": (row(image="absent.png"), "bad.jsonl:2: image 'absent.png': no such file"),
    "id twice": (row(id="good"), "bad.jsonl:2: the id 'good' is that of line 1 too"),
    "too long": (row(prompt="thin " * 40, chosen="x" * 300 + "1", rejected="x" * 300 + "2"),
                 r"bad.jsonl:2: pair 'bad': .* tokens of prompt .* within --max-length 64"),
    "long line": ('"' + "x" * (17 << 20) + '"', "bad.jsonl:2: the line is longer than 16,777,216 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_is_written(align: Align, tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    (tmp_path / "bad.jsonl").write_text(f"{GOOD}\n{line}\n")
    result = align("--pairs", str(tmp_path / "bad.jsonl"), "--max-length", "64")
    assert result.exit_code == 2
    assert re.search(message, said(result)), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_bad_lines_are_left_out_counted_and_listed_when_asked(align: Align, tmp_path: Path) -> None:
    lines = [GOOD, *(line for line, _ in BAD.values()), row(id="last")]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    result = align("--pairs", str(tmp_path / "bad.jsonl"), "--max-length", "64", "--skip-bad")
    assert result.exit_code == 0, result.stderr
    listed = [line for line in result.stderr.splitlines() if line.startswith("left out: ")]
    assert len(listed) == len(BAD)
    assert f"left out {len(BAD)} in all" in result.stderr
    assert sorted(int(line.split("bad.jsonl:")[1].split(":")[0]) for line in listed) == list(range(2, len(BAD) + 2))
    assert json.loads((tmp_path / "run/run.json").read_text())["pairs"] == 2


@pytest.mark.parametrize("text", ["", "\n\n", "{}\n"])
def test_a_file_without_a_usable_pair_is_refused(align: Align, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    result = align("--pairs", str(tmp_path / "bad.jsonl"), "--skip-bad")
    assert result.exit_code == 2
    assert "bad.jsonl: no pair to train on" in result.stderr
    assert ("left out: " in result.stderr) == bool(text.strip())
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


USAGE = {
    "no such pairs": (("--pairs", "absent.jsonl"), "absent.jsonl: cannot be read (No such file or directory)"),
    "no such model": (("--model", "./absent"), "absent"),
    "objective": (("--objective", "orpoo"), "--objective orpoo: wanted one of orpo, dpo, sft, simpo, ipo"),
    "beta": (("--beta", "0"), "--beta 0.0: wanted a number from 1e-09 to 1e+06"),
    "rate": (("--lr", "-1"), "--lr -1.0: wanted a number from 0 to 1000"),
    "not a number": (("--lr", "nan"), "--lr nan: wanted a number from 0 to 1000"),
    "steps": (("--steps", "0"), "--steps 0: wanted a number of at least 1"),
    "limits": (("--max-length", "8", "--max-prompt-length", "8"), "the prompt must leave room for an answer"),
    "targets": (("--targets", "q_proj,query"), "--targets query: no such linear layer; there are"),
    "adapter": (("--adapter", "./absent"), "absent"),
    "device": (("--device", "tpu9"), "--device tpu9: no such device; wanted auto, cpu or cuda"),
    "pairs made and given": (("--chosen-k", "2"), "--chosen-k: says how a --teacher makes pairs of CASES; give both"),
    "a device of torch alone": (("--device", "mps"), "--device mps: no such device; wanted auto, cpu or cuda"),
    "dtype": (("--dtype", "int4"), "--dtype int4: wanted auto, float32"),
    "config": (("--config", "absent.json"), "absent.json: no such file"),
    "held out": (("--held-out", "0.95"), "--held-out 0.95: wanted a number from 0 to 0.9"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_wrong_setting_is_refused_in_one_line_and_nothing_is_written(align: Align, tmp_path: Path, name: str) -> None:
    words, message = USAGE[name]
    result = align(*words)
    assert result.exit_code == 2
    assert message in said(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1}, "run.json: learning_rate is no setting; wanted some of model, "),
        ({"rank": "8"}, "run.json: rank is '8'; wanted int"),
        ([], "run.json: wanted an object with 'settings'"),
    ],
)
def test_a_wrong_config_is_refused_by_its_name(align: Align, tmp_path: Path, settings: Any, message: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    result = align("--config", str(tmp_path / "run.json"))
    assert result.exit_code == 2
    assert message in said(result)


def test_pairs_are_asked_for(model: Path) -> None:
    result = CliRunner().invoke(cli, ["align", "--model", str(model)])
    assert result.exit_code == 2
    assert "wanted --pairs FILE, or CASES with --teacher" in said(result)


def test_a_run_in_the_folder_is_refused_and_stays(align: Align, tmp_path: Path) -> None:
    assert align().exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = align("--lr", "0.1")
    assert again.exit_code == 2
    assert "holds a run already; give --resume to continue it, or another --out" in said(again)
    other = align("--lr", "0.1", "--resume")
    assert other.exit_code == 2
    assert "--lr is 0.1, the run was begun with 0.0001; resume with the same settings" in said(other)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_traceback_comes_only_when_asked(align: Align) -> None:
    result = align("--lr", "-1", "--traceback")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ConfigError"


# ---- work that fails ------------------------------------------------------------------------------------------------


def test_a_step_that_is_no_number_ends_with_1_and_the_names_of_its_pairs(pairs: Path, tmp_path: Path) -> None:
    broken = write_student(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    words = ["align", "--model", str(broken), "--pairs", str(pairs), "--out", str(tmp_path / "run"), *QUICK]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "step 1: loss nan" in said(result)
    assert said(result).count("'pair-") == 3
    assert not (tmp_path / "run/adapter").exists()


def test_a_place_that_cannot_be_written_ends_with_1(align: Align, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = align("--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 1
    assert "file/run: cannot be written (Not a directory); give another --out" in said(result)
    assert (tmp_path / "file").read_text() == "mine"


# ---- merge ----------------------------------------------------------------------------------------------------------


def test_merge_makes_a_plain_checkpoint_of_a_run(align: Align, model: Path, tmp_path: Path) -> None:
    assert align("--targets", "all-linear,lm_head").exit_code == 0
    words = [
        "merge",
        "--model",
        str(model),
        "--adapter",
        str(tmp_path / "run/adapter"),
        "--out",
        str(tmp_path / "merged"),
    ]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["out"] == str(tmp_path / "merged")
    adapted = load_decoder(model, adapter=tmp_path / "run/adapter", device="cpu", dtype="float32")
    with torch.no_grad():
        merged = transformers_of(tmp_path / "merged")(input_ids=ids_of(2, 9)).logits
    torch.testing.assert_close(merged, adapted.logits(ids_of(2, 9)), rtol=1e-4, atol=1e-5)


def test_merge_refuses_a_folder_that_is_something_else(align: Align, model: Path, tmp_path: Path) -> None:
    assert align().exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    words = [
        "merge",
        "--model",
        str(model),
        "--adapter",
        str(tmp_path / "run/adapter"),
        "--out",
        str(tmp_path / "mine"),
    ]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "mine: exists and holds no config.json; give a new folder" in said(result)
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
