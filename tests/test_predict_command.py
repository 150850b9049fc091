"""`predict` as a user types it: what goes in, what comes out, and a run that is killed and taken up again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_llama
from click.testing import CliRunner, Result

import mint
from mint.commands import cli
from mint.decoders import Decoder, load_decoder
from mint.errors import ConfigError, RecordError, WorkError
from mint.evaluation.outputs import Output
from mint.evaluation.predictions import read_predictions
from mint.labels import LabelSet
from mint.pipeline import predict
from mint.progress import set_quiet
from mint.scoring import Ranker
from mint.types import Prediction, Record

NAMES = ["Kabuki syndrome", "Noonan syndrome", "Noonan syndrome 2", "Ünïcode disease"]
NOTES = {"a": "Arched eyebrows.", "b": "Short stature, ptosis.", "c": 'Tall; "quoted", and more.', "d": "Webbed neck."}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "llama"
    return write_llama(folder, num_hidden_layers=1, max_position_embeddings=700)


@pytest.fixture(scope="session")
def decoder(model: Path) -> Decoder:
    return load_decoder(model, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    yield
    set_quiet(False)


@pytest.fixture
def words(tmp_path: Path, model: Path) -> list[str]:
    """The options that every call here has."""
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps({"id": i, "note": n}) + "\n" for i, n in NOTES.items()))
    return ["--model", str(model), "--labels", str(tmp_path / "labels.txt"), "--device", "cpu", "--date", "26 Jul 2024"]


def run(*given: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["predict", *given], input=stdin)


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_one_note_gives_a_table_for_people(words: list[str]) -> None:
    result = run("--note", "Arched eyebrows.", *words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert sorted(line.split(maxsplit=2)[2] for line in lines) == sorted(NAMES)
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(1.0, abs=1e-3)
    assert "probability among the labels" in result.stderr
    assert "not for diagnosis" in result.stderr


def test_a_table_of_answers_is_for_others_and_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "answers.csv").write_text("id,place,label\n1,1,Kabuki syndrome\n")
    with pytest.raises(RecordError, match=r"answers.csv: a table; JSON lines are wanted"):
        list(read_predictions(tmp_path / "answers.csv"))


def test_labels_that_the_model_would_hardly_answer_are_told_once(words: list[str], tmp_path: Path) -> None:
    told = "a model that was aligned on lists is asked with --first-in-list"
    asked = run(str(tmp_path / "cases.jsonl"), *words)
    assert asked.stderr.count(told) == 1
    assert "case 'a': of all that the model could answer" in asked.stderr
    assert told not in run(str(tmp_path / "cases.jsonl"), *words, "--first-in-list").stderr
    assert told not in run(str(tmp_path / "cases.jsonl"), *words, "--quiet").stderr


def test_nothing_is_told_of_a_model_that_answers_with_labels(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder, capsys: pytest.CaptureFixture[str]
) -> None:
    likely = Prediction("a", ({"label": NAMES[0], "logprob": -1.0, "probability": 0.9},))
    monkeypatch.setattr(Ranker, "rank_all", lambda _, cases, __: (likely for _ in cases))
    assert len(list(predict([Record("a", note="Tall.")], model=decoder, labels=NAMES))) == 1
    assert "--first-in-list" not in capsys.readouterr().err


def test_a_label_is_ranked_as_the_first_of_a_list_if_asked(words: list[str], decoder: Decoder) -> None:
    found = rows(run("--note", "Tall.", *words, "--first-in-list", "--format", "jsonl", "--dtype", "float32").stdout)
    case, shared = [Record("case", note="Tall.")], {"labels": NAMES, "top": 10}
    for opening, same in (("POTENTIAL_DISEASES:\n1. ", True), ("", False)):
        dated = load_decoder(decoder.checkpoint.folder, device="cpu", dtype="float32", date="26 Jul 2024")
        (wanted,) = predict(case, model=dated, opening=opening, **shared)
        assert (
            [row["logprob"] for row in found[0]["ranking"]] == pytest.approx([row["logprob"] for row in wanted.ranking])
        ) == same


@pytest.mark.parametrize("mode", ["rank", "list", "text"])
def test_every_mode_answers_every_case(words: list[str], tmp_path: Path, mode: str) -> None:
    result = run(str(tmp_path / "cases.jsonl"), *words, "--mode", mode, "--top", "3", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    assert [row["id"] for row in found] == list(NOTES)
    for row in found:
        labels = [entry["label"] for entry in row["ranking"]]
        assert len(set(labels)) == len(labels)
        assert mode == "text" or len(labels) == 3
        assert {entry["label"] for entry in row["ranking"] if not entry.get("outside")} <= set(NAMES)
        assert ("text" in row) == (mode != "rank")


def test_standard_input_takes_json_lines_and_plain_notes(words: list[str], tmp_path: Path) -> None:
    from_file = run(str(tmp_path / "cases.jsonl"), *words).stdout
    assert run("-", *words, stdin=(tmp_path / "cases.jsonl").read_text()).stdout == from_file
    plain = rows(run("-", *words, stdin="Arched eyebrows.\n\nShort stature, ptosis.\n").stdout)
    assert [row["id"] for row in plain] == ["line-1", "line-3"]
    assert [row["ranking"][0]["label"] for row in plain] == [row["ranking"][0]["label"] for row in rows(from_file)[:2]]


def test_what_skip_bad_leaves_out_is_listed_after_what_is_printed(words: list[str]) -> None:
    result = run("-", *words, "--skip-bad", stdin='{"id": "q", "note": "Short."}\n{oops\n')
    assert [row["id"] for row in rows(result.stdout)] == ["q"]
    assert "left out: standard input:2: not JSON" in result.stderr


def test_csv_holds_the_same_as_json_lines(words: list[str], tmp_path: Path) -> None:
    cases = str(tmp_path / "cases.jsonl")
    found = rows(run(cases, *words).stdout)
    wanted = [
        (row["id"], str(place), e["label"], e["logprob"]) for row in found for place, e in enumerate(row["ranking"], 1)
    ]
    assert run(cases, *words, "--out", str(tmp_path / "p.csv")).exit_code == 0
    for text in (run(cases, *words, "--format", "csv").stdout, (tmp_path / "p.csv").read_text()):
        table = csv.DictReader(io.StringIO(text))
        assert [(r["id"], r["place"], r["label"], pytest.approx(float(r["logprob"]))) for r in table] == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases.jsonl", "labels.txt", "p.csv"]


def test_a_killed_run_is_taken_up_without_loss_or_repeats(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mint import predicting, scoring

    monkeypatch.setattr(scoring, "PIECE", 1)  # case by case
    cases, out = str(tmp_path / "cases.jsonl"), tmp_path / "out.jsonl"
    assert run(cases, *words, "--out", str(tmp_path / "whole.jsonl")).exit_code == 0
    put, asked = predicting.Questioner.put, []

    def killed(self: Any, record: Record) -> Any:
        if record.id == "d" and len(asked) < 4:
            asked.append(record.id)
            raise KeyboardInterrupt
        asked.append(record.id)
        return put(self, record)

    monkeypatch.setattr(predicting.Questioner, "put", killed)
    assert run(cases, *words, "--out", str(out)).exit_code != 0
    part = tmp_path / "out.jsonl.part"
    assert not out.exists()
    assert len(part.read_bytes().splitlines()) == 2  # c waits for its group when d ends the run
    with part.open("ab") as file:
        file.write(b'{"id": "c", "rank')  # the line that was being written
    asked.append("taken up")
    result = run(cases, *words, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert asked[asked.index("taken up") + 1 :] == ["c", "d"]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_a_part_of_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    answer = Prediction("a", ({"label": "x", "logprob": -1.0, "probability": 1.0},))

    def broken() -> Iterator[Prediction]:
        yield answer
        raise WorkError("stop")

    with pytest.raises(WorkError):
        Output(tmp_path / "o.jsonl", {"mode": "rank"}).write(broken())
    with pytest.raises(ConfigError, match="other settings"):
        Output(tmp_path / "o.jsonl", {"mode": "list"})
    taken_up = Output(tmp_path / "o.jsonl", {"mode": "rank"})
    assert taken_up.done == {"a"}
    assert taken_up.write([]) == 1
    assert list(read_predictions(tmp_path / "o.jsonl")) == [answer]
    with pytest.raises(ConfigError, match="for people"):
        Output(tmp_path / "o.jsonl", {}, "table")


def test_passages_stand_before_the_case_and_in_the_prediction(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "omim.txt").write_text("Noonan: webbed neck, short stature.")
    (tmp_path / "book" / "other.md").write_text("Kabuki: arched eyebrows.")
    plain = rows(run(str(tmp_path / "cases.jsonl"), *words).stdout)
    found = rows(
        run(str(tmp_path / "cases.jsonl"), *words, "--retrieve", str(tmp_path / "book"), "--passages", "1").stdout
    )
    assert found[0]["passages"] == ["other.md#1: Kabuki: arched eyebrows."]
    assert found[3]["passages"] == ["omim.txt#1: Noonan: webbed neck, short stature."]
    assert found[0]["ranking"][0]["logprob"] != pytest.approx(plain[0]["ranking"][0]["logprob"], abs=1e-3)
    assert "passages" not in plain[0]
    one = run(
        "--note", next(iter(NOTES.values())), *words, "--retrieve", str(tmp_path / "book"), "--passages", "1"
    ).stdout
    assert one.splitlines()[-1] == "after other.md#1: Kabuki: arched eyebrows."


def test_a_wrong_set_is_refused_before_the_model_is_loaded(words: list[str], tmp_path: Path) -> None:
    result = run("--note", "Short.", *words, "--labels", str(tmp_path / "nothere.txt"))
    assert result.exit_code == 2
    assert "loading" not in result.output


@pytest.mark.parametrize("mode", ["rank", "list", "text"])
def test_a_note_longer_than_the_context_is_cut_and_said_to_be(
    decoder: Decoder, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    from mint.predicting import Questioner

    note = " ".join(f"word{n}é" for n in range(400))
    questioner = Questioner(decoder, LabelSet(NAMES), mode, max_new_tokens=8)
    (answer,) = questioner.answers([Record("long", note=note)])
    said = capsys.readouterr().err
    assert answer.id == "long"
    assert "'long': the note is longer than the context" in said
    asked = questioner.put(Record("long", note=note)).messages
    room, used = questioner.room, len(decoder.tokenizer.chat_ids(asked, generate=True))
    assert room - 8 < used <= room < 700
    kept = asked[0]["content"].split("\n\n")[0]
    assert note.startswith(kept)
    lost = note[len(kept) :].split()
    assert f"({len(lost):,} words from {' '.join(lost[:6])!r} on)" in said
    tokens = [len(decoder.tokenizer.encode(text)) for text in (note, kept)]
    assert f"last {tokens[0] - tokens[1]:,} of {tokens[0]:,} tokens" in said


def test_passages_go_before_the_note_does(decoder: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.txt").write_text("ptosis " + "long text here " * 100)
    (answer,) = predict([Record("a", note="ptosis")], model=decoder, labels=NAMES, retrieve=tmp_path, passages=2)
    assert len(answer.passages) < 2
    assert "no room for the passage d.txt#" in capsys.readouterr().err


def test_a_template_longer_than_the_context_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="no room for the prompt without its note"):
        list(predict([Record("a", note="x")], model=decoder, labels=NAMES, template="word " * 500 + "{note}"))


def test_empty_notes_are_refused_by_name_or_left_out(decoder: Decoder) -> None:
    cases = [Record("a", note="x"), Record("b", note="  "), Record("c", note="y")]
    with pytest.raises(RecordError, match="case 'b': the note is empty"):
        list(predict(cases, model=decoder, labels=NAMES))
    skipped: list[str] = []
    assert [p.id for p in predict(cases, model=decoder, labels=NAMES, skipped=skipped)] == ["a", "c"]
    assert len(skipped) == 1


def test_an_embedder_calls_it_per_case_from_threads(decoder: Decoder) -> None:
    known = LabelSet(NAMES)
    cases = [Record(name, note=note) for name, note in NOTES.items()] * 2

    def one(record: Record) -> Prediction:
        return next(mint.predict([record], model=decoder, labels=known))

    wanted = [one(record) for record in cases]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, cases)) == wanted


def test_prior_takes_the_answer_to_an_empty_case_off(decoder: Decoder) -> None:
    from mint.predicting import NOTHING_KNOWN

    (answer,) = predict([Record("a", note=NOTHING_KNOWN)], model=decoder, labels=NAMES, normalise="prior")
    assert [entry["probability"] for entry in answer.ranking] == pytest.approx([0.25] * 4, abs=1e-4)


def test_a_second_run_into_the_same_file_is_refused(tmp_path: Path) -> None:
    first = Output(tmp_path / "new" / "o.jsonl", {})

    def writing() -> Iterator[Prediction]:
        yield Prediction("a", text="one")
        with pytest.raises(ConfigError, match=r"o\.jsonl\.part: another run is writing here; wait for it or give"):
            Output(tmp_path / "new" / "o.jsonl", {})
        yield Prediction("b", text="two")

    assert first.write(writing()) == 2
    assert [row.id for row in read_predictions(tmp_path / "new" / "o.jsonl")] == ["a", "b"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["o.jsonl"]
    Output(tmp_path / "new" / "o.jsonl", {}).write([])  # free again


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "rank"}, "needs the closed set"),
        ({"mode": "list"}, "needs the closed set"),
        ({"mode": "guess", "labels": NAMES}, "--mode guess"),
        ({"labels": NAMES, "modality": "image"}, "case 'a': has no image"),
        ({"labels": ["a", "A"]}, "is there twice"),
        ({"labels": NAMES, "temperature": 0.5}, "--temperature 0.5: rank mode draws nothing"),
        ({"labels": NAMES, "retriever": "bert"}, "--retriever bert: finds passages in the documents of --retrieve"),
        ({"mode": "text", "reading": {"columns": {}}}, "columns: say how a file is read, and what was given is none"),
    ],
)
def test_what_cannot_be_asked_is_refused(decoder: Decoder, given: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, RecordError), match=words):
        list(predict([Record("a", note="x")], model=decoder, **given))


def test_texts_are_drawn_alike_alone_and_together_from_a_file_and_as_they_come(
    words: list[str], tmp_path: Path
) -> None:
    how = [*words, "--mode", "text", "--max-new-tokens", "8", "--temperature", "0.9", "--seed"]
    texts = {
        seed: [row["text"] for row in rows(run(str(tmp_path / "cases.jsonl"), *how, seed).stdout)] for seed in "34"
    }
    assert texts["3"] != texts["4"]
    alone = [json.loads(run("--note", note, *how, "3", "--json").stdout)["rows"][0]["text"] for note in NOTES.values()]
    assert alone == texts["3"]
    assert run("--note", NOTES["a"], *how, "3").stdout.rstrip("\n\N{REPLACEMENT CHARACTER}") in alone[0]


def test_text_mode_names_what_is_outside_the_set(
    decoder: Decoder, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"1. {NAMES[1].upper()}\n2. Borgia disease\n3. {NAMES[0]}\n4. {NAMES[1]}"
    monkeypatch.setattr(Decoder, "generate", lambda _, ids, *__, **___: [decoder.tokenizer.encode(text)] * len(ids))
    result = run(str(tmp_path / "cases.jsonl"), *words, "--mode", "text")
    wanted = [{"label": NAMES[1]}, {"label": "Borgia disease", "outside": True}, {"label": NAMES[0]}]
    assert [row["ranking"] for row in rows(result.stdout)] == [wanted] * len(NOTES)
    table = run(str(tmp_path / "cases.jsonl"), *words, "--mode", "text", "--format", "table").stdout
    assert table.count("outside the set: Borgia disease") == len(NOTES)


def test_how_many_are_shown_changes_no_probability(words: list[str]) -> None:
    few, many = (run("--note", "Short.", *words, "--top", top, "--format", "jsonl").stdout for top in ("1", "3"))
    assert rows(few)[0]["ranking"] == rows(many)[0]["ranking"][:1]


def test_one_json_object_holds_the_predictions_themselves(words: list[str]) -> None:
    plain = rows(run("--note", "Short.", *words, "--format", "jsonl").stdout)
    assert json.loads(run("--note", "Short.", *words, "--json").stdout) == {"rows": plain}
    text = json.loads(run("--note", "Short.", *words, "--mode", "text", "--max-new-tokens", "4", "--json").stdout)
    assert text["rows"][0]["text"]
