"""Pair files: ours and TRL's, in and out, and every fault named by file and line."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mint.errors import MintError, RecordError
from mint.pairs import prefer_pairs
from mint.pairs.files import read_pairs, write_pairs
from mint.types import PreferencePair, Ranking, Record

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
EXPLICIT = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
IMPLICIT = {"chosen": [USER, BLUE], "rejected": [USER, GREEN]}
STRINGS = {"prompt": "The sky is", "chosen": " blue. ", "rejected": "  green."}
IMPLICIT_STRINGS = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
SHOWN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def test_messages_with_a_prompt_are_read_as_they_are(file: Path) -> None:
    (pair,) = read_pairs(lines(file, {"id": "p1", **EXPLICIT}))
    assert pair == PreferencePair(id="p1", prompt=[USER], chosen=[BLUE], rejected=[GREEN])


def test_a_prompt_that_the_answers_share_is_taken_out_of_them(file: Path) -> None:
    (pair,) = read_pairs(lines(file, IMPLICIT))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [BLUE], [GREEN])
    assert pair.id == "line-1"
    (beside,) = read_pairs(lines(file, {"prompt": USER["content"], **IMPLICIT}))
    assert beside == pair


def test_plain_strings_stay_strings_with_their_spaces(file: Path) -> None:
    (pair,) = read_pairs(lines(file, STRINGS))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue. ", "  green.")


TRL_ROWS: list[dict[str, Any]] = [
    IMPLICIT,
    EXPLICIT,
    STRINGS,
    IMPLICIT_STRINGS,
    {"chosen": "ab", "rejected": "abc"},
    {"chosen": "abc", "rejected": "ab"},
    {"chosen": "a b", "rejected": "a bc"},
    {"chosen": "x", "rejected": "y"},
    {"chosen": "  x", "rejected": "  y"},
    {"chosen": [USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]},
    {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]},
    {"prompt": "beside", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
]


@pytest.mark.parametrize("row", TRL_ROWS, ids=lambda row: str(sorted(row))[:40])
def test_the_prompt_is_what_trl_takes_for_it(file: Path, row: dict[str, Any]) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    (pair,) = read_pairs(lines(file, row))
    theirs = data_utils.maybe_extract_prompt(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@settings(max_examples=80, deadline=None)
@given(st.text("ab \u00e9", min_size=1, max_size=6), st.text("ab \u00e9", min_size=1, max_size=6))
def test_any_two_strings_are_parted_where_trl_parts_them(
    tmp_path_factory: pytest.TempPathFactory, chosen: str, rejected: str
) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    row = {"chosen": chosen, "rejected": rejected}
    path = lines(tmp_path_factory.getbasetemp() / "two.jsonl", row)
    if chosen == rejected or not chosen.strip() or not rejected.strip():
        with pytest.raises(RecordError):
            list(read_pairs(path))
    elif chosen[0] == rejected[0] or not chosen.endswith(
        " "
    ):  # else TRL reads chosen[-1] as the letter before the first
        (pair,) = read_pairs(path)
        assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == data_utils.extract_prompt(
            row
        )


def made_pairs(folder: Path, modality: str) -> list[PreferencePair]:
    classes = tuple(f"disease {c}" for c in range(30))
    records = [Record(id=f"p{i}", note=f"note {{{i}}} é", image=str(folder / "photos" / f"{i}.png")) for i in range(3)]
    (folder / "photos").mkdir(exist_ok=True)
    for case in records:
        Image.new("RGB", (4, 4), (200, 10, 10)).save(case.image)
    rankings = [Ranking(id=case.id, labels=classes, scores=(0.0,) * 30) for case in records]
    return list(prefer_pairs(rankings, records, modality=modality))


@pytest.mark.parametrize("modality", ["note", "image", "both"])
def test_what_is_written_is_read_back(tmp_path: Path, modality: str) -> None:
    pairs = made_pairs(tmp_path, modality)
    path = tmp_path / "runs" / "a" / "pairs.jsonl"
    assert write_pairs(path, pairs) == 3
    back = list(read_pairs(path, image_folders=[tmp_path / "photos"]))
    assert [(p.id, p.prompt, p.chosen, p.rejected) for p in back] == [
        (p.id, p.prompt, p.chosen, p.rejected) for p in pairs
    ]
    for before, after in zip(pairs, back, strict=True):
        assert (after.image is None) == (modality == "note")
        assert after.image is None or os.path.samefile(after.image, before.image)
    if modality != "note":
        assert json.loads(path.read_text().splitlines()[0])["image"] == "../../photos/0.png"


def test_images_are_found_through_a_link_to_the_folder_and_after_a_move(tmp_path: Path) -> None:
    pairs = made_pairs(tmp_path, "image")
    (tmp_path / "deep" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "real")
    write_pairs(tmp_path / "link" / "pairs.jsonl", pairs)
    assert len(list(read_pairs(tmp_path / "link" / "pairs.jsonl", image_folders=[tmp_path]))) == 3
    moved = tmp_path / "deep"
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "pairs.jsonl").rename(moved / "pairs.jsonl")
    (tmp_path / "photos").rename(moved / "photos")
    assert len(list(read_pairs(moved / "pairs.jsonl"))) == 3


def test_ours_loads_in_trl_as_conversations(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    path = tmp_path / "pairs.jsonl"
    pairs = made_pairs(tmp_path, "note")
    write_pairs(path, pairs)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 3
    for row, pair in zip(loaded, pairs, strict=True):
        assert data_utils.is_conversational(row)
        assert data_utils.maybe_extract_prompt(row) == row
        assert (row["prompt"], row["chosen"], row["rejected"]) == (pair.prompt, pair.chosen, pair.rejected)


def test_ours_with_images_loads_in_trl_with_the_place_of_the_image(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, made_pairs(tmp_path, "both"))
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for row in loaded:
        assert data_utils.is_conversational(row)
        (message,) = data_utils.prepare_multimodal_messages(row["prompt"], images=["picture"])
        assert message["content"][0]["image"] == "picture"
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert (path.parent / row["image"]).is_file()


def test_trl_s_image_columns_are_read_and_the_image_gets_its_place(tmp_path: Path, file: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    for column in ({"image": "a.png"}, {"images": ["a.png"]}):
        (pair,) = read_pairs(lines(file, {**EXPLICIT, **column}))
        assert pair.image == str(tmp_path / "a.png")
        assert pair.prompt == [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER["content"]}]}
        ]
    (with_place,) = read_pairs(lines(file, {**EXPLICIT, "prompt": [SHOWN], "images": ["a.png"]}))
    assert with_place.prompt == [SHOWN]
    filled = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]}
    (null_filled,) = read_pairs(lines(file, {**EXPLICIT, "prompt": [filled], "images": ["a.png"]}))
    assert null_filled.prompt == [SHOWN]
    (without,) = read_pairs(lines(file, {**EXPLICIT, "images": []}))
    assert without.image is None
    (tmp_path / "images.npy").write_bytes(b"x")
    (of_array,) = read_pairs(lines(file, {**EXPLICIT, "image": "images.npy#17"}))
    assert of_array.image == str(tmp_path / "images.npy#17")


def test_null_columns_and_further_columns_are_passed_over(file: Path) -> None:
    row = {**IMPLICIT, "prompt": None, "image": None, "images": None, "id": None, "score_chosen": 4.5}
    row |= {"tools": None, "chosen": [{**USER, "name": None}, {**BLUE, "tool_calls": None}]}
    (pair,) = read_pairs(lines(file, row))
    assert pair == PreferencePair(id="line-1", prompt=[USER], chosen=[BLUE], rejected=[GREEN])


def changed(**more: Any) -> dict[str, Any]:
    return {**EXPLICIT, **more}


def gone(key: str) -> dict[str, Any]:
    return {name: value for name, value in EXPLICIT.items() if name != key}


BAD: dict[str, tuple[Any, str]] = {
    "malformed": ('{"prompt": ', r":2:\d+: not JSON"),
    "two objects": ("{} {}", "not JSON"),
    "no object": ("[1]", "a JSON list"),
    "nan": ('{"id": NaN}', "NaN is no JSON number"),
    "a number of many digits": ('{"id": ' + "9" * 5000 + "}", "not JSON"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "half a surrogate": ('{"chosen": "\\ud83d"}', "surrogate"),
    "no chosen": (gone("chosen"), "no 'chosen'"),
    "no rejected": (gone("rejected"), "no 'rejected'"),
    "null chosen": (changed(chosen=None), "no 'chosen'"),
    "empty answer": (changed(chosen=[{"role": "assistant", "content": " \n"}]), "chosen is empty"),
    "empty parts": (changed(rejected=[{"role": "assistant", "content": []}]), "rejected is empty"),
    "no messages": (changed(chosen=[]), "chosen is empty"),
    "no prompt messages": (changed(prompt=[]), "prompt is empty"),
    "the same answers": (changed(rejected=[BLUE]), "chosen and rejected are the same"),
    "number": (changed(chosen=3), "chosen is a JSON int"),
    "object": (changed(prompt={"a": 1}), "prompt is a JSON dict"),
    "mixed answers": (changed(rejected="It is green."), "chosen is message lists and rejected plain strings"),
    "mixed prompt": (changed(chosen="a", rejected="b"), "prompt is a message list and chosen a plain string"),
    "no role": (changed(prompt=[{"content": "a"}]), "prompt, message 0: the role is None"),
    "odd role": (changed(prompt=[{"role": "oracle", "content": "a"}]), "the role is 'oracle'"),
    "role of no name": (changed(prompt=[{"role": ["user"], "content": "a"}]), "the role is "),
    "no content": (changed(prompt=[{"role": "user"}]), "the content is a JSON NoneType"),
    "odd part": (changed(prompt=[{"role": "user", "content": [{"type": "video"}]}]), "a part that is neither"),
    "string as message": (changed(prompt=["hello"]), "prompt, message 0: the role is a JSON str"),
    "user as answer": (changed(chosen=[{"role": "user", "content": "a"}]), "chosen has a turn of the user"),
    "user ends": (changed(chosen=[BLUE, USER]), "a turn of the user"),
    "prompt twice": ({"prompt": [USER], **IMPLICIT}, "begin with the prompt again"),
    "image is missing": (changed(image="none.png"), "image 'none.png': no such file"),
    "image is a number": (changed(image=3), "the path of a picture"),
    "image with nul": (changed(image="a\x00b"), "the path of a picture"),
    "image of a long name": (changed(image="a" * 5000), "no such file"),
    "image is a folder": (changed(image="."), "no such file"),
    "two images": (changed(images=["a", "b"]), "images has 2 entries"),
    "images is text": (changed(images="a"), "images has a JSON str"),
    "place without image": (changed(prompt=[SHOWN]), "1 places for images, the pair 0"),
    "id is a list": (changed(id=[1]), "id '\\[1\\]'"),
    "id is true": (changed(id=True), "id 'True'"),
    "empty id": (changed(id=""), "id ''"),
    "id again": (changed(id="first"), "the id 'first' is that of line 1 too"),
    "another form": (IMPLICIT, "message lists without a prompt of their own, but line 1 has message lists"),
    "strings": (STRINGS, "plain strings, but line 1 has message lists"),
    "tools": (changed(tools=[{"name": "look_up"}]), "tools: a prompt that offers tools"),
    "tool calls": (changed(chosen=[{**BLUE, "tool_calls": [{"name": "f"}]}]), "chosen, message 0: tool_calls"),
    "not utf-8": (b'{"chosen": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_file_and_line_or_left_out_and_listed(file: Path, name: str) -> None:
    content, words = BAD[name]
    bad = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    good = [json.dumps({**EXPLICIT, "id": key}).encode() for key in ("first", "last")]
    file.write_bytes(b"\n".join([good[0], bad, good[1]]))
    with pytest.raises(RecordError, match=words) as raised:
        list(read_pairs(file))
    assert str(raised.value).startswith(f"{file}:2:")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000
    skipped: list[str] = []
    assert [pair.id for pair in read_pairs(file, skipped=skipped)] == ["first", "last"]
    assert skipped == [str(raised.value)]


def test_implicit_conversations_that_share_nothing_are_refused(file: Path) -> None:
    other = {"role": "user", "content": "And the sea?"}
    with pytest.raises(RecordError, match="share no first message"):
        list(read_pairs(lines(file, {"chosen": [USER, BLUE], "rejected": [other, GREEN]})))


def test_an_answer_holds_no_image(file: Path) -> None:
    answer = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    with pytest.raises(RecordError, match="chosen holds an image"):
        list(read_pairs(lines(file, changed(chosen=[answer]))))


def test_a_missing_file_and_a_folder_are_refused_even_when_skipping(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, Path("a\x00b")):
        with pytest.raises(RecordError, match=r"cannot be read|not the name of a file"):
            list(read_pairs(path, skipped=[]))


def test_an_empty_file_has_no_pairs_and_blank_lines_and_a_byte_order_mark_do_no_harm(file: Path) -> None:
    file.write_bytes(b"")
    assert list(read_pairs(file)) == []
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(EXPLICIT).encode() + b"\r\n\r\n \n")
    assert len(list(read_pairs(file))) == 1


def test_a_line_of_two_gigabytes_is_refused_in_bounded_memory(file: Path) -> None:
    good = json.dumps(EXPLICIT).encode() + b"\n"
    with file.open("wb") as out:
        out.write(good)
        out.truncate(2 << 30)  # a hole of zeros: one line
        out.seek(0, os.SEEK_END)
        out.write(b"\n" + good)
    tracemalloc.start()
    with pytest.raises(RecordError, match=r":2: the line is longer than 16,777,216 bytes"):
        list(read_pairs(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 << 20


def test_after_a_line_that_is_too_long_the_next_is_read(file: Path) -> None:
    with file.open("wb") as out:
        out.write(b"x" * (17 << 20) + b"\n" + json.dumps(EXPLICIT).encode() + b"\n")
    skipped: list[str] = []
    assert [pair.id for pair in read_pairs(file, skipped=skipped)] == ["line-2"]
    assert len(skipped) == 1


def test_pairs_stream_in_and_out_in_bounded_memory(file: Path) -> None:
    count = 8_000

    def pairs() -> Iterator[PreferencePair]:
        for number in range(count):
            yield PreferencePair(
                id=f"p{number}",
                prompt=[{"role": "user", "content": f"{number} " + "x" * 1500}],
                chosen=[BLUE],
                rejected=[GREEN],
            )

    tracemalloc.start()
    assert write_pairs(file, pairs()) == count
    assert file.stat().st_size > 12 << 20
    assert sum(1 for _ in read_pairs(file)) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_failed_writing_leaves_the_old_file(file: Path) -> None:
    file.write_text("old")
    picture = PreferencePair(id="p", prompt=[SHOWN], chosen=[BLUE], rejected=[GREEN], image=object())
    with pytest.raises(RecordError, match="pair 'p': its image is an open object"):
        write_pairs(file, [PreferencePair(id="a", prompt="a", chosen="b", rejected="c"), picture])
    assert file.read_text() == "old"
    with pytest.raises(RecordError, match="cannot be written as JSON"):
        write_pairs(file, [PreferencePair(id="a", prompt="\ud800", chosen="b", rejected="c")])
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_only_named_errors_come_out_of_mutated_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.png").write_bytes(b"x")
    shown = {"id": "s", "prompt": [SHOWN], "chosen": [BLUE], "rejected": [GREEN], "image": "a.png"}
    rows = data.draw(st.sampled_from([[shown, EXPLICIT], [IMPLICIT, IMPLICIT], [STRINGS], [IMPLICIT_STRINGS, STRINGS]]))
    content = bytearray("\n".join(json.dumps(row) for row in rows).encode())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        piece = data.draw(
            st.one_of(
                st.binary(max_size=3), st.sampled_from([b"null", b"[]", b"{}", b"1e999", b"\\ud800", b"\n", b'"'])
            )
        )
        content[at : at + data.draw(st.integers(0, 6))] = piece
    path = folder / "mutated.jsonl"
    path.write_bytes(content)
    skipped: list[str] = []
    kept = list(read_pairs(path, skipped=skipped))
    assert all(message.startswith(str(path)) for message in skipped)
    raised = []
    try:
        assert list(read_pairs(path)) == kept
    except MintError as error:
        raised.append(str(error))
    assert raised == skipped[:1]
    for pair in kept:
        assert pair.chosen != pair.rejected
    write_pairs(folder / "again.jsonl", kept)
