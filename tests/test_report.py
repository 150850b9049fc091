"""The report page: self-contained, well-formed, everything escaped, its numbers, and charts that draw any data."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mint.errors import ConfigError
from mint.evaluation import OUTSIDE, measure
from mint.labels import LabelSet
from mint.report import report_page, write_report
from mint.report.cases import photo_bytes, shown_cases
from mint.report.charts import ForestRow, confusion_matrix, forest, line_chart, number, reliability, scale, thinned
from mint.types import Prediction, Record, Report

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'&\u202e\x00\ud800{{}}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects the tags, attributes and words of a page, and refuses a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


LABELS = LabelSet(["Kabuki", "Noonan", "Williams"])
TRUTH = [Record(id=f"case {i}", note=f"note {i}", label=LABELS.labels[i % 3]) for i in range(12)]


def answers(right: int) -> list[Prediction]:
    """The first `right` cases right, the others one label off."""
    made = []
    for i, record in enumerate(TRUTH):
        first = LABELS.labels[(i + (i >= right)) % 3]
        ranking = [{"label": first, "probability": 0.8}] + [{"label": name} for name in LABELS if name != first]
        made.append(Prediction(id=record.id, ranking=tuple(ranking)))
    return made


def made_report(right: int, **more: Any) -> Report:
    return replace(measure(answers(right), TRUTH, labels=LABELS, tops=(1, 2), resamples=50), **more)


CURVE = [
    {"step": i, "loss": 2 / i, "nll_loss": 1 / i, "log_odds_chosen": i / 50 - 1, "tokens_per_second": 900.0}
    for i in range(1, 101)
]


def full_page(**changes: Any) -> str:
    reports = {"teacher": made_report(12), "base": made_report(3), "student": made_report(9)}
    photo = photo_bytes(Image.new("RGB", (40, 30), (10, 90, 200)))
    case = {"id": "case 1", "note": "a note", "photo": photo, "truth": ["Noonan"]}
    case["answers"] = {
        "base": {"names": [], "text": "I cannot tell"},
        "student": {"names": [("noonan", 0.8), ("Kabuki", None)]},
    }
    reports["student"] = replace(reports["student"], cases=[case])
    parts: dict[str, Any] = {"title": "Rare diseases", "student": "student", "base": "base", "teacher": "teacher"}
    parts |= {"ceilings": {"note alone": {"top_1": 0.9, "top_2": 1.0}}, "goal": "note alone", "curve": CURVE}
    return report_page(reports, **(parts | {"about": {"seed": 0}, "remark": "Photos are simulated."} | changes))


def test_the_page_is_well_formed_and_shows_the_result_in_words_and_numbers() -> None:
    page = Page(full_page())
    # 9 of 12 right, from 3 of 12, with a ceiling of .9: (.75 - .25) / (.9 - .25) = 77 %
    assert "student: the right label is named first in 75.0 %" in page.words
    assert "base: in 25.0 %" in page.words
    assert "gone 77 % of the way" in page.words
    for words in (
        "Results",
        "Training",
        "Calibration",
        "Confusions",
        "Classes",
        "Cases",
        "simulated",
        "seed",
        "I cannot tell",
    ):
        assert words in page.words
    hits = [
        index for index, (tag, attributes) in enumerate(page.tags) if tag == "li" and attributes.get("class") == "hit"
    ]
    assert len(hits) == 1


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    html = full_page()
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in {"href", "srcset", "xlink:href"} for name in attributes)
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/")
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_every_word_of_a_user_is_escaped() -> None:
    bad = made_report(9)
    bad = replace(
        bad,
        per_class=[{**row, "label": HOSTILE} for row in bad.per_class],
        confusion=[(HOSTILE, HOSTILE + "x", 3), ("a", HOSTILE, 1)],
        cases=[
            {"id": HOSTILE, "note": HOSTILE, "photo": HOSTILE.encode("utf-8", "replace"), "truth": [HOSTILE],
             "answers": {HOSTILE: {"names": [(HOSTILE, 0.5)]}, "other": {"names": [], "text": HOSTILE}}}
        ],
    )  # fmt: skip
    curve = [{"step": HOSTILE, "loss": HOSTILE}, {"step": 1, "loss": 2.0, HOSTILE: 1}]
    html = report_page(
        {HOSTILE: bad, "b": bad}, title=HOSTILE, student=HOSTILE, base="b", ceilings={HOSTILE: {"top_1": 0.99}},
        goal=HOSTILE, curve=curve, about={HOSTILE: HOSTILE}, remark=HOSTILE,
    )  # fmt: skip
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert html.count("&lt;script&gt;") >= 14
    html.encode()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_name_keeps_the_page_well_formed(name: str) -> None:
    report = replace(
        made_report(3),
        cases=[{"id": name, "note": name, "truth": [name], "answers": {name: {"names": [(name, None)]}}}],
    )
    page = Page(report_page({name: report}, title=name, student=name, about={name: name}))
    assert not any(tag in {"script", "img"} for tag, _ in page.tags)


def test_a_page_of_one_system_without_anything_else_is_made() -> None:
    report = Report(metrics={"top_1": 0.5, "cases": 2.0})
    page = Page(report_page({"only": report}, title="t", student="only"))
    assert "50.0 %" in page.words
    for absent in ("Training", "Calibration", "Confusions", "Cases"):
        assert f"<h2>{absent}</h2>" not in report_page({"only": report}, title="t", student="only")


def test_a_student_that_is_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="'missing'"):
        report_page({"a": made_report(3)}, title="t", student="missing")
    with pytest.raises(ConfigError, match="must be among a"):
        report_page({"a": made_report(3)}, title="t", student="a", base="b")


def test_the_table_holds_values_intervals_and_ceilings() -> None:
    html = full_page()
    report = made_report(9)
    low, high = report.intervals["top_1"]
    assert f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}" in html
    table = Page(html[html.index("<table") : html.index("</table>") + 8])
    assert "note alone" in table.words
    assert "90.0" in table.words


def test_the_page_is_the_same_every_time_and_is_written_beside_and_renamed(tmp_path: Path) -> None:
    assert full_page() == full_page()
    write_report(tmp_path / "runs" / "report.html", {"a": made_report(3)}, title="é", student="a")
    assert (tmp_path / "runs" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["report.html"]


def test_a_photo_comes_in_small_and_without_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "exifsecret"
    noise = np.random.default_rng(0).integers(0, 255, (1200, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, exif=exif, comment=b"commentsecret")
    small = photo_bytes(str(path))
    assert b"secret" in path.read_bytes()
    assert b"secret" not in small
    assert len(small) < 150_000
    assert max(Image.open(BytesIO(small)).size) == 320


def test_an_open_picture_of_the_user_is_left_as_it_is() -> None:
    picture = Image.new("RGB", (900, 700))
    picture.info["comment"] = b"mine"
    photo_bytes(picture)
    assert picture.size == (900, 700)
    assert picture.info["comment"] == b"mine"


def test_the_photo_in_the_page_is_the_photo_of_the_case() -> None:
    (source,) = re.findall(r'<img [^>]*src="data:image/jpeg;base64,([^"]+)"', full_page())
    assert Image.open(BytesIO(b64decode(source))).size == (40, 30)


def test_cases_are_drawn_at_random_with_what_each_system_said() -> None:
    records = [replace(record, image=Image.new("RGB", (4, 4))) for record in TRUTH]
    said = {"base": [Prediction(id=p.id, text="1. X") for p in answers(0)], "student": answers(12)[1:]}
    cases = shown_cases(records, said, count=10, top=2, seed=1)
    assert len(cases) == 10
    assert [case["id"] for case in cases] != [record.id for record in records[:10]]
    assert cases == shown_cases(records, said, count=10, top=2, seed=1)
    assert len(shown_cases(records[:3], said)) == 3
    for case in shown_cases(records, said, count=12, top=2):
        assert case["answers"]["base"] == {"names": [], "text": "1. X"}
        names = [name for name, _ in case["answers"]["student"]["names"]]
        assert names[:1] == (case["truth"] if case["id"] != "case 0" else [])
        assert len(names) in (0, 2)


# ---- charts ----


def drawing(fragment: str) -> ElementTree.Element:
    return ElementTree.fromstring(fragment[fragment.index("<svg") :])


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
@example(5e-324, 5e-324)
def test_a_scale_encloses_its_values_with_a_few_round_steps(first: float, second: float) -> None:
    low, high = sorted((first, second))
    ticks = scale(low, high)
    size = max(abs(low), abs(high), 1e-300)
    assert ticks[0] <= low + 1e-9 * size
    assert ticks[-1] >= high - 1e-9 * size
    assert 2 <= len(ticks) <= 8
    assert all(a < b for a, b in pairwise(ticks))


def test_scales_by_hand() -> None:
    assert scale(0, 100) == [0, 50, 100]
    assert scale(0, 4) == [0, 1, 2, 3, 4]
    assert scale(0.12, 0.48) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [number(value) for value in (0, 0.25, 1234, 30_000, 2_500_000, 1e10)] == [
        "0",
        "0.25",
        "1,234",
        "30k",
        "2.5M",
        "10G",
    ]


def test_a_line_goes_through_its_points() -> None:
    root = drawing(line_chart({"loss": [(0, 0), (100, 4)]}, "step"))
    (path,) = [element for element in root.iter("path") if "line" in (element.get("class") or "")]
    start, end = (tuple(map(float, place.split())) for place in (path.get("d") or "")[1:].split("L"))
    assert start[0] < end[0]
    assert start[1] > end[1]
    levels = {round(float(line.get("y1") or 0)) for line in root.iter("line")}
    assert round(start[1]) == max(levels)
    assert round(end[1]) == min(levels)


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 5.0)],
        [(1, 2), (2, 2)],
        [(1, 0), (2, 0)],
        [(i, math.sin(i)) for i in range(100_000)],
        [(1, 1e-300), (2, 2e-300)],
        [(1, -1e15), (2, 1e15)],
    ],
)
def test_any_curve_is_drawn_in_finite_numbers_and_a_few_hundred_points(points: list[tuple[float, float]]) -> None:
    chart = line_chart({"loss": points}, "step", zero=True)
    drawing(chart)
    assert "nan" not in chart
    assert "inf" not in chart
    assert len(chart) < 12_000


def test_thinning_keeps_the_mean_of_every_stretch() -> None:
    points = [(float(i), float(i % 7)) for i in range(24_000)]
    few = thinned(points)
    assert len(few) == 240
    assert few[0] == (49.5, sum(i % 7 for i in range(100)) / 100)
    assert thinned(points[:5]) == points[:5]


def test_numbers_that_are_none_do_not_reach_the_curve() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": None},
        {"loss": 3},
        {"step": 3, "loss": True},
    ]
    assert "Training" not in report_page({"a": made_report(3)}, title="t", student="a", curve=rows)
    html = report_page({"a": made_report(3)}, title="t", student="a", curve=[*rows, {"step": 4, "loss": 1.5}])
    assert "Training" in html
    assert not re.search(r"\bnan\b", html.split("<main>")[1])


def test_a_reliability_diagram_has_a_dot_for_each_bin_at_its_place() -> None:
    rows = [
        {"low": 0.0, "high": 0.1, "count": 3.0, "confidence": 0.0, "accuracy": 0.0},
        {"low": 0.9, "high": 1.0, "count": 12.0, "confidence": 1.0, "accuracy": 1.0},
    ]
    first, second = drawing(reliability(rows)).iter("circle")
    assert float(first.get("cx") or 0) < float(second.get("cx") or 0)
    assert float(first.get("cy") or 0) > float(second.get("cy") or 0)
    assert float(second.get("r") or 0) == 10
    assert float(first.get("r") or 0) == 3 + 7 / 2


def test_a_forest_plot_puts_dots_whiskers_and_ceilings_at_their_shares() -> None:
    html = forest([ForestRow("a<b", 0.5, (0.25, 0.75), "student"), ForestRow("c", 1.2)], {"best": 0.9})
    assert 'class="dot" style="left:50.00%"' in html
    assert 'class="whisker" style="left:25.00%;width:50.00%"' in html
    assert html.count('class="ceiling c0" style="left:90.00%"') == 2
    assert 'class="dot" style="left:100.00%"' in html
    assert "a&lt;b" in html


def test_a_confusion_matrix_shows_the_labels_confused_most_and_their_shares() -> None:
    counts = [("A", "A", 6), ("A", "B", 2), ("B", "B", 5), ("C", "C", 9), ("D", OUTSIDE, 1)]
    html = confusion_matrix(counts, most=3)
    assert "A named B: 2 of 8" in html
    assert "--share:0.250" in html
    assert ">C<" not in html
    many = [(f"class {i}", f"class {(i * 7) % 500}", 1 + i % 3) for i in range(500)]
    assert len(Page(confusion_matrix(many)).tags) < 12 * 12 * 3 + 100
    assert "Kabuki" in confusion_matrix([("Kabuki", "Kabuki", 4)])
