"""One system looked at closely, as sections of the report: calibration, confusions, classes, and single cases."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from ..labels import spelling
from ..types import Report
from .charts import confusion_matrix, reliability
from .markup import attribute, card, percent, section, text

_MOST_CASES = 10
_MOST_CLASSES = 1000
_MOST_CONFUSIONS = 10
_LARGEST_PHOTO = 1 << 20
_PHOTOS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


def calibration_section(report: Report) -> str:
    """Does a stated probability mean what it says?"""
    if not report.calibration:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{percent(row["low"], 0)} to {percent(row["high"], 0)}</th><td>{row["count"]:,.0f}</td>'
        f"<td>{percent(row['confidence'])}</td><td>{percent(row['accuracy'])}</td></tr>"
        for row in report.calibration
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Stated, %", "Cases", "Mean stated", "Right"))
    table = f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    error = report.metrics.get("calibration_error", 0.0)
    chart = card(f"Calibration error {error:.3f}", reliability(report.calibration))
    intro = "The probability stated for the first name against how often it is right; on the dashed line it is honest."
    return section("Calibration", f'<div class="grid two">{chart}{card("By stated probability", table)}</div>', intro)


def confusion_section(report: Report) -> str:
    """Which labels are taken for which: a matrix of those confused most, and the most frequent confusions."""
    if not report.confusion:
        return ""
    wrong = [entry for entry in report.confusion if entry[0] != entry[1]]
    rows = "".join(
        f'<tr><th scope="row">{text(true)}</th><td class="name">{text(first)}</td><td>{times}</td></tr>'
        for true, first, times in sorted(wrong, key=lambda entry: -entry[2])[:_MOST_CONFUSIONS]
    )
    head = '<th scope="col">True</th><th scope="col" class="name">Named first</th><th scope="col">Cases</th>'
    table = (
        f'<div class="scroll"><table class="plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    matrix = f'<div class="scroll">{confusion_matrix(report.confusion)}</div>'
    intro = (
        "True labels down, first names across, for the labels that are confused most. Colour is the share of the row."
    )
    return section("Confusions", f'<div class="beside">{matrix}{table if rows else ""}</div>', intro)


def classes_section(report: Report) -> str:
    """Every class with its figures, folded away."""
    if not report.per_class:
        return ""
    tops = sorted((key for key in report.per_class[0] if key.startswith("top_")), key=lambda key: int(key[4:]))
    names = ["Cases", *(f"Top-{int(top[4:])}, %" for top in tops), "Named first", "Of these right, %"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(_class_row(row, tops) for row in report.per_class[:_MOST_CLASSES])
    table = (
        f'<table class="plain"><thead><tr><th scope="col">Class</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )
    more = len(report.per_class) - _MOST_CLASSES
    cut = f'<p class="soft">{more:,} classes with fewer cases are left out.</p>' if more > 0 else ""
    summary = f"<summary>Figures of all {len(report.per_class):,} classes</summary>"
    return section("Classes", f'<details>{summary}<div class="scroll">{table}</div>{cut}</details>')


def _class_row(row: Mapping[str, Any], tops: Sequence[str]) -> str:
    figures = "".join(f"<td>{percent(row[top])}</td>" for top in tops)
    precision = "\N{EN DASH}" if row["precision"] is None else percent(row["precision"])
    counts = f"<td>{row['named_first']:,}</td><td>{precision}</td>"
    return f'<tr><th scope="row">{text(row["label"])}</th><td>{row["cases"]:,}</td>{figures}{counts}</tr>'


def cases_section(report: Report, kinds: Mapping[str, str]) -> str:
    """Photo, note and truth of a few cases beside what each system answered."""
    cases = "".join(_case(case, kinds) for case in report.cases[:_MOST_CASES])
    intro = "Drawn at random, not picked. A tick marks the right label; numbers are stated probabilities in percent."
    return section("Cases", cases, intro)


def _case(case: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    photo = _photo(case.get("photo"))
    true = [str(name) for name in case.get("truth", ())]
    answers = "".join(
        f'<div class="{attribute(kinds.get(name, "other"))}"><h4>{text(name)}</h4>{_answer(answer, true)}</div>'
        for name, answer in case.get("answers", {}).items()
    )
    note = f'<p class="note">{text(case["note"])}</p>' if case.get("note") else ""
    truth = f'<p class="truth">True: <b>{text("; ".join(true))}</b></p>' if true else ""
    words = f'<div><h3>{text(case["id"])}</h3>{note}{truth}<div class="answers">{answers}</div></div>'
    return f'<article class="card case{"" if photo else " bare"}">{photo}{words}</article>'


def _answer(answer: Mapping[str, Any], true: Sequence[str]) -> str:
    """A list of names with their probabilities, or the text of an answer, or that there is none."""
    if answer.get("names"):
        return f"<ol>{''.join(_named(str(name), share, true) for name, share in answer['names'])}</ol>"
    return f"<p>{text(answer['text'])}</p>" if answer.get("text") else '<p class="soft">no answer</p>'


def _named(name: str, share: float | None, true: Sequence[str]) -> str:
    stated = "" if share is None else f"<small>{percent(share)}</small>"
    hit = spelling(name) in map(spelling, true)
    return f"<li{' class=hit' if hit else ''}>{text(name)}{stated}</li>"


def _photo(photo: bytes | None) -> str:
    """The picture inside the page; only the bytes of a small JPEG or PNG are let in."""
    kind = next((kind for start, kind in _PHOTOS.items() if photo is not None and photo.startswith(start)), None)
    if photo is None or kind is None or len(photo) > _LARGEST_PHOTO:
        return ""
    return f'<div><img alt="photo of the case" src="data:{kind};base64,{b64encode(photo).decode()}"></div>'
