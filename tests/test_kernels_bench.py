"""The bench: every line of it runs, what fails is named and nothing else is lost, and the chart is drawn from its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mint.kernels import bench, measures, timing

ROOT = Path(__file__).resolve().parents[1]
RATES = {"products": 1e12, "bytes": 1e11}
NUMBERS = {"ms", "to_ours", "floor_ms", "fraction", "mib"}


@pytest.mark.parametrize("name", measures.PARTS)
def test_every_part_runs_on_tiny_sizes(name, monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 1)
    lines = list(measures.PARTS[name].lines("tiny", RATES))
    assert lines
    assert not [line for line in lines if "failed" in line]
    assert all(line.keys() > NUMBERS and line["ms"] > 0 for line in lines)
    assert all(line["to_ours"] == 1 for line in lines if line["side"] == "ours")


def test_a_side_that_fails_is_a_line_and_the_others_stay():
    def broken():
        raise RuntimeError("no\n  such kernel")

    lines = list(timing.compared("b", "c", {"ours": lambda: None, "peer": broken}, 1.0, rounds=1, count=(3, "pairs")))
    assert [line["side"] for line in lines] == ["ours", "peer"]
    assert lines[0]["per_second"] > 0
    assert lines[1] == {"bench": "b", "case": "c", "side": "peer", "failed": "RuntimeError: no such kernel"}
    assert "FAILED  RuntimeError: no such kernel" in bench._row(lines[1])


def test_a_faster_side_is_told_as_faster():
    lines = timing.compared("b", "c", {"ours": lambda: time.sleep(0.02), "peer": lambda: time.sleep(0.06)}, rounds=1)
    assert 2 < [line["to_ours"] for line in lines][1] < 6


def a_process(tmp_path, ends: dict[str, str]):
    """A program that plays the bench's part in the process of a part."""
    program = tmp_path / "program.py"
    line = {"bench": "b", "case": "c", "side": "ours", "ms": 1.0, "to_ours": 1.0, "floor_ms": None, "fraction": None,
            "mib": None}  # fmt: skip
    first = {"rates": RATES, "device": "a machine"}
    program.write_text(
        f"import sys, time, os\npart = sys.argv[sys.argv.index('--part') + 1]\nends = {ends!r}\n"
        f"print('words of a library')\n"
        f"print({json.dumps(first)!r} if part == 'rates' else {json.dumps(line)!r}, flush=True)\n"
        f"exec(ends.get(part, ''))\n"
    )
    return [str(program)]


def test_a_part_that_fails_or_hangs_is_named_and_keeps_its_lines(tmp_path):
    command = a_process(tmp_path, {"one": "raise ValueError('wrong')", "two": "time.sleep(60)", "three": "os.abort()"})
    chosen = {name: timing.Part(measures.ratios, 2) for name in ("one", "two", "three", "four")}
    started = time.monotonic()
    report = bench.run(chosen, list(chosen), "tiny", command)
    assert time.monotonic() - started < 20
    assert report["device"] == "a machine"
    assert [line["part"] for line in report["lines"]] == ["checks", *chosen]
    assert set(report["failed"]) == {"one", "two", "three"}
    assert "ValueError: wrong" in report["failed"]["one"]
    assert report["failed"]["two"] == "longer than its 2 s"
    assert "exit code -6" in report["failed"]["three"]
    assert any(fault.startswith("two: ") for fault in bench.faults(report))
    assert all(f"FAILED  {name}: " in bench.table(report) for name in report["failed"])


def test_a_run_ends_in_its_time_and_says_what_it_left_out(tmp_path):
    command = a_process(tmp_path, {"one": "time.sleep(60)"})
    chosen = {name: timing.Part(measures.ratios, 60) for name in ("one", "two")}
    report = bench.run(chosen, list(chosen), "tiny", command, total=4)
    assert "longer than its" in report["failed"]["one"]
    assert report["failed"]["two"] == "not started: the 4 s of the whole run were over"


def test_a_part_may_load_while_the_one_before_it_is_measured(tmp_path):
    """The second says that it was there before the first had ended."""
    log = tmp_path / "log"
    command = a_process(tmp_path, {"one": f"time.sleep(2); open({str(log)!r}, 'a').write('end ')"})
    program = Path(command[0])
    program.write_text(f"open({str(log)!r}, 'a').write('begin ')\n" + program.read_text())
    chosen = {name: timing.Part(measures.ratios, 60) for name in ("one", "two")}
    assert bench.run(chosen, list(chosen), "tiny", command, ahead=True)["failed"] == {}
    assert log.read_text().split() == [*4 * ["begin"], "end"]


def test_nothing_is_measured_on_a_machine_whose_rates_are_unknown(tmp_path):
    command = a_process(tmp_path, {"rates": "raise ValueError('no device')"})
    Path(command[0]).write_text("raise ValueError('no device')")
    report = bench.run({"odds": timing.Part(measures.ratios, 60)}, ["odds"], "tiny", command)
    assert "no device" in report["failed"]["rates"]
    assert "not started" in report["failed"]["odds"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The JSON of the real program, on the smallest part."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    words = [
        sys.executable,
        "-m",
        "mint.kernels.bench",
        "--size",
        "tiny",
        "--only",
        "odds",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads(out.read_text())
    return out


def test_the_program_checks_measures_and_writes(written):
    report = json.loads(written.read_text())
    assert report["rates"]["products"] > 0
    assert {"token_logprob torch.float32", "log_odds_ratio"} <= {one["check"] for one in report["checks"]}
    assert [(line["bench"], line["side"]) for line in report["lines"]] == [
        ("preference_terms", "ours"), ("preference_terms", "plain"), ("log_odds_ratio", "ours"), ("log_odds_ratio", "plain"),
    ]  # fmt: skip
    assert report["failed"] == {}
    assert "right  log_odds_ratio" in bench.table(report)
    if not torch.cuda.is_available():
        assert report["device"] == "processor"
        assert "processor" in bench.table(report).splitlines()[0]


def test_the_chart_is_a_picture_whose_bars_are_the_numbers(written, tmp_path):
    from PIL import Image

    report = json.loads(written.read_text())
    line = report["lines"][0] | {"to_ours": 1.0, "fraction": None}
    report["lines"] = [line, line | {"side": "peer", "to_ours": 2.0}, line | {"side": "gone", "failed": "no memory"}]
    given, out = tmp_path / "bench.json", tmp_path / "chart.png"
    given.write_text(json.dumps(report))
    words = [sys.executable, "tests/bench/chart.py", str(given), str(out)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    picture = Image.open(out)
    pixels = list(picture.get_flattened_data()) if hasattr(picture, "get_flattened_data") else list(picture.getdata())
    ours, theirs = (pixels.count(tuple(bytes.fromhex(colour))) for colour in ("2f6fb2", "a9b4c0"))
    assert theirs > 1000
    assert 1.9 < ours / theirs < 2.1
