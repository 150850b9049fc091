"""Prediction from a picture: exact ranks and free text equal transformers', every source of pictures, bad input named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_llama
from checkpoints_mllama import SIDE, oracle_inputs, picture, write_mllama
from click.testing import CliRunner, Result
from test_mllama_trees import counting, image_pair

from mint import Record, load_decoder, predict
from mint.commands import cli
from mint.decoders import Decoder
from mint.errors import RecordError
from mint.images import nothing_to_see, open_image
from mint.pairs.files import write_pairs
from mint.predicting import NOTHING_KNOWN
from mint.prompts import prompt_messages
from mint.scoring import Ranker

LABELS = ["Breast", "Bile-duct", "Brain", "Colon", "Colon and rectum"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=2, std=0.15)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import MllamaForConditionalGeneration

    return MllamaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, dtype="float32", device="cpu")


@pytest.fixture
def tile(tmp_path: Path) -> str:
    picture(2 * SIDE, SIDE).save(tmp_path / "tile.png")
    return str(tmp_path / "tile.png")


def prompt_ids(decoder: Decoder, record: Record, modality: str, labels: list[str] | None = None) -> list[int]:
    messages = prompt_messages(record, modality, kind="tissue", k=10, labels=labels or ())
    return decoder.tokenizer.chat_ids(messages, generate=True)


@pytest.mark.parametrize("modality", ["image", "both", "note"])
def test_ranks_equal_every_label_run_by_itself_in_transformers(
    decoder: Decoder, oracle: Any, tile: str, modality: str
) -> None:
    record = Record("one", note="Tissue with a gland.", image=tile)
    token = decoder.network.config.image_token
    with counting(decoder.network.model.vision_model) as runs:
        found = next(predict([record], model=decoder, labels=LABELS, modality=modality, kind="tissue"))
    assert runs == [int(modality != "note")]
    ids, images = prompt_ids(decoder, record, modality, LABELS), [open_image(tile)] * (modality != "note")
    wanted = {}
    for label in LABELS:
        whole = [*ids, *decoder.tokenizer.encode(label), decoder.tokenizer.special("<|eot_id|>")]
        with torch.no_grad():
            logp = oracle(**oracle_inputs(whole, images, token)).logits[0].log_softmax(-1)
        wanted[label] = float(sum(logp[at - 1, whole[at]] for at in range(len(ids), len(whole))))
    assert [entry["label"] for entry in found.ranking] == sorted(wanted, key=lambda label: -wanted[label])
    for entry in found.ranking:
        assert entry["logprob"] == pytest.approx(wanted[entry["label"]], rel=1e-4)


def test_text_equals_transformers_greedy_one(decoder: Decoder, oracle: Any, tile: str) -> None:
    record = Record("one", image=tile)
    answer = next(predict([record], model=decoder, mode="text", modality="image", kind="tissue", max_new_tokens=12))
    ids = prompt_ids(decoder, record, "image")
    given = oracle_inputs(ids, [open_image(tile)], decoder.network.config.image_token)
    with torch.no_grad():
        wanted = oracle.generate(**given, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert answer.text == decoder.tokenizer.decode(wanted)


def test_cases_with_and_without_pictures_go_through_together(decoder: Decoder, tile: str, tmp_path: Path) -> None:
    """One pass over several cases, one of them without a picture, gives each what it has alone; so does the search."""
    picture(SIDE, SIDE, seed=7).save(tmp_path / "other.png")
    shown, ranker = [(tile,), (str(tmp_path / "other.png"),), ()], Ranker(decoder, LABELS)
    records = [Record("one", note="A gland.", image=images[0] if images else None) for images in shown]
    asked = [
        prompt_messages(record, "both" if images else "note", kind="tissue", k=3)
        for record, images in zip(records, shown, strict=True)
    ]
    prompts = [ranker.prompt(messages) for messages in asked]
    together = ranker.logp(prompts, shown)
    for row, prompt, messages, images in zip(together, prompts, asked, shown, strict=True):
        torch.testing.assert_close(row, ranker.logp([prompt], [images])[0], rtol=1e-4, atol=1e-4)
        best = ranker.best("one", messages, 2, images).ranking
        assert [entry["logprob"] for entry in best] == pytest.approx(
            row.sort(descending=True).values[:2].tolist(), rel=1e-4
        )
    assert not torch.allclose(ranker.logp([prompts[0]], [shown[1]])[0], together[0], rtol=1e-3)


def test_a_list_of_a_picture_scores_as_its_text_run_by_itself(decoder: Decoder, tile: str) -> None:
    record = Record("one", note="A gland.", image=tile)
    words: dict[str, Any] = {"model": decoder, "labels": LABELS, "modality": "both", "kind": "tissue"}
    answer = next(predict([record], mode="list", top=10, **words))
    ids = prompt_ids(decoder, record, "both", LABELS)
    assert answer.text is not None
    whole = [*ids, *decoder.tokenizer.encode(answer.text), decoder.tokenizer.special("<|eot_id|>")]
    steps = decoder.logits([whole], [[tile]])[0].log_softmax(-1)
    last = len(whole) - 1 - len(decoder.tokenizer.encode(f" {answer.ranking[-1]['label']}"))
    wanted = sum(float(steps[at - 1, whole[at]]) for at in range(last, len(whole)))
    assert answer.ranking[-1]["logprob"] == pytest.approx(wanted, rel=1e-3)


def test_folders_of_classes_and_folds_of_arrays_are_predicted(decoder: Decoder, tmp_path: Path) -> None:
    for label in ("breast", "colon"):
        (tmp_path / "classes" / label).mkdir(parents=True)
        picture(SIDE, SIDE, seed=len(label)).save(tmp_path / "classes" / label / "1.png")
    (tmp_path / "fold1").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.float64)
    np.save(tmp_path / "fold1" / "images.npy", values)
    np.save(tmp_path / "fold1" / "types.npy", np.array(["Breast", "Colon"]))
    for source in (tmp_path / "classes", tmp_path / "fold1"):
        found = list(predict(source, model=decoder, labels=LABELS, modality="image", kind="tissue"))
        assert len(found) == 2
        assert all(len(answer.ranking) == len(LABELS) for answer in found)
        assert found[0].ranking[0]["logprob"] != found[1].ranking[0]["logprob"]


def test_a_case_without_what_is_to_be_seen_is_named(decoder: Decoder, tile: str) -> None:
    with pytest.raises(RecordError, match="case 'one': has no image"):
        next(predict([Record("one", note="x")], model=decoder, labels=LABELS, modality="image"))
    with pytest.raises(RecordError, match=r"case 'one': the note holds <\|image\|>"):
        next(predict([Record("one", note="an <|image|>", image=tile)], model=decoder, labels=LABELS, modality="both"))


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["image", "both"])
def test_prior_takes_the_answer_to_a_grey_picture_off(decoder: Decoder, tile: str, modality: str) -> None:
    words: dict[str, Any] = {"model": decoder, "labels": LABELS, "modality": modality, "normalise": "prior"}
    (empty,) = predict([Record("a", note=NOTHING_KNOWN, image=nothing_to_see())], **words)
    assert [entry["probability"] for entry in empty.ranking] == pytest.approx([1 / len(LABELS)] * len(LABELS), abs=1e-4)
    (shown,) = predict([Record("a", note=NOTHING_KNOWN, image=tile)], **words)
    assert max(entry["probability"] for entry in shown.ranking) > 1.1 / len(LABELS)


def test_a_picture_that_cannot_be_opened_costs_its_case_alone(decoder: Decoder, tile: str, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(Path(tile).read_bytes()[:200])
    records = [Record("cut", image=str(tmp_path / "cut.png")), Record("whole", image=tile)]
    words: dict[str, Any] = {"model": decoder, "labels": LABELS, "modality": "image"}
    with pytest.raises(RecordError, match=r"case 'cut': .*cut\.png: truncated or damaged"):
        list(predict(records, **words))
    skipped: list[str] = []
    assert [answer.id for answer in predict(records, skipped=skipped, **words)] == ["whole"]
    assert len(skipped) == 1


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--quiet"])


@pytest.fixture
def labels(tmp_path: Path) -> str:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return str(tmp_path / "labels.txt")


def test_the_command_ranks_the_tissues_of_a_picture(folder: Path, tile: str, labels: str) -> None:
    words = ["predict", "--image", tile, "--model", str(folder), "--dtype", "float32", "--kind", "tissue"]
    ranked = run(*words, "--labels", labels)
    assert ranked.exit_code == 0
    assert sorted(line.split(maxsplit=2)[2] for line in ranked.stdout.splitlines()) == sorted(LABELS)
    assert run(*words, "--labels", labels, "--meta-masking").stdout != ranked.stdout
    text = run(*words, "--mode", "text", "--max-new-tokens", "4")
    assert text.exit_code == 0


def test_the_command_aligns_on_a_file_of_pairs_with_images(folder: Path, tmp_path: Path, tile: str) -> None:
    write_pairs(tmp_path / "pairs.jsonl", [image_pair("a", tile), image_pair("b", tile, "Which?")])
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["image"] == "tile.png"
    words = ["align", "--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(folder), "--dtype", "float32"]
    words += ["--targets", "language_model", "--epochs", "2", "--out", str(tmp_path / "run"), "--cache-gb", "0.001"]
    dry = run(*words, "--dry-run", "--json")
    assert json.loads(dry.stdout)["pictures"] == 2
    done = run(*words)
    assert done.exit_code == 0
    assert len(list((tmp_path / "run" / "features").iterdir())) == 1
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert stored["cache_gb"] == 0.001
    assert stored["meta_masking"] is False


def test_a_run_on_pictures_elsewhere_is_repeated_and_resumed_by_its_folder_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(LABELS[:3]):
        (tmp_path / "tiles" / name).mkdir(parents=True)
        picture(SIDE, SIDE, seed=number).save(tmp_path / "tiles" / name / "1.png")
    scores = [{"id": f"{name}/1.png", "scores": {label: at for at, label in enumerate(LABELS)}} for name in LABELS[:3]]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    words = ["align", "tiles", "--teacher", "scores.jsonl", "--modality", "image", "--kind", "tissue", "--steps", "2"]
    words += ["--chosen-k", "2", "--rejected-q", "2", "--model", str(folder), "--dtype", "float32", "--batch-size", "2"]
    monkeypatch.chdir(tmp_path)
    first = run(*words, "--out", str(tmp_path / "run"))
    assert first.exit_code == 0, first.stderr
    stored = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert stored["image_folder"] == [str(tmp_path / "tiles")]
    refused = run(*words, "--out", "other", "--image-folder", "tiles")
    assert (refused.exit_code, "--image-folder: is for the pictures of --pairs" in refused.stderr) == (2, True)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    again = run("align", "--config", str(tmp_path / "run/run.json"), "--out", "again")
    assert again.exit_code == 0, again.stderr
    weights = "adapter/adapter_model.safetensors"
    assert Path("again", weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()
    resumed = run("align", "--resume", "--out", str(tmp_path / "run"))
    assert resumed.exit_code == 0, resumed.stderr
    usual = ["align", "--model", str(folder), "--pairs", str(tmp_path / "run/pairs.jsonl"), "--dry-run"]
    refused = run(*usual)
    assert (refused.exit_code, "run/pairs.jsonl:1: image '../tiles/" in refused.stderr) == (2, True)
    given = [word for name in LABELS[:3] for word in ("--image-folder", str(tmp_path / "tiles" / name))]
    assert run(*usual, *given).exit_code == 0


def test_bad_input_is_one_line_that_names_it(folder: Path, tmp_path: Path, tile: str, labels: str) -> None:
    text = str(write_llama(tmp_path / "llama"))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    model = ["--model", str(folder), "--labels", labels]
    for words, named in (
        (["--image", tile, "--model", text, "--labels", labels], "an image for a model that reads text alone"),
        (["--note", "x", "--modality", "image", *model], "case 'case': has no image"),
        (["--note", "an <|image|> here", *model], "the note holds <|image|>"),
        (["--image", str(tmp_path / "none.png"), *model], "none.png: no such picture file"),
        (["--image", str(tmp_path / "broken.png"), *model], "broken.png: "),
        (["cases.csv", "--image", tile, *model], "wanted either CASES"),
    ):
        found = run("predict", *words)
        assert found.exit_code == 2, named
        assert named in found.stderr
        assert found.stderr.count("\n") == 1
