"""What others may rely on: the commands with their options, and the names to import with what they take."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import mint
from mint import kernels, records
from mint.chat import ChatTokenizer
from mint.commands import cli
from mint.decoders import Decoder

ROOT = Path(__file__).resolve().parents[1]

OPTIONS = {
    "align": "model teacher pairs objective beta chosen-k rejected-q nll rank alpha dropout targets epochs steps batch-size "
    "tokens-per-batch lr out resume dry-run adapter modality draw-faces config held-out schedule warmup weight-decay "
    "max-grad-norm date",
    "predict": "note image model adapter labels top mode retrieve out date",
    "teach": "base epochs lr out",
    "prefer": "teacher modality chosen-k rejected-q out",
    "evaluate": "truth labels out",
    "experiment": "seeds objectives out",
    "merge": "model adapter out",
    "bench": "out",
}
EVERYWHERE = "help seed device dtype quiet json traceback"

SIGNATURES: dict[Callable[..., Any], str] = {
    records.read_records: "path",
    records.Record: "id note='' image=None label=None labels=() terms=() excluded=() sex=None age=None ethnicity=None "
    "split=None",
    mint.load_encoder: "folder_or_name *classes=None *templates=None *device='auto' *dtype='auto'",
    mint.load_decoder: "folder_or_name *adapter=None *device='auto' *dtype='auto'",
    ChatTokenizer.chat_ids: "self messages generate=False",
    Decoder.logits: "self ids images=None",
    Decoder.generate: "self ids max_new_tokens temperature=0.0 top_k=None top_p=None seed=None",
    Decoder.hidden: "self tree",
    kernels.token_logprob: "hidden head labels",
    kernels.log_odds_ratio: "chosen_logp rejected_logp",
    mint.orpo_loss: "chosen_logp rejected_logp nll beta",
    mint.dpo_loss: "chosen_logp rejected_logp reference_chosen_logp reference_rejected_logp beta",
    mint.sft_loss: "nll",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_has_its_options_and_an_example(name: str) -> None:
    found = {
        word.lstrip("-") for option in cli.commands[name].params for word in (*option.opts, *option.secondary_opts)
    }
    assert set(f"{OPTIONS[name]} {EVERYWHERE}".split()) - {"help"} <= found
    shown = CliRunner().invoke(cli, [name, "--help"])
    assert shown.exit_code == 0
    assert f"python cli.py {name}" in shown.output
    assert "--help" in shown.output


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_says_what_it_is_in_a_sentence(name: str) -> None:
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert re.fullmatch(r"([A-Z]|auto, ).+[.\])]", option.help or ""), f"--{option.name}: {option.help}"


def test_the_list_of_commands_breaks_no_sentence_off() -> None:
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert set(re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE)) == set(OPTIONS)
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: call.__qualname__)
def test_a_call_takes_what_it_always_took(call: Callable[..., Any]) -> None:
    given = list(inspect.signature(call).parameters.values())
    found = [
        ("*" if one.kind is one.KEYWORD_ONLY else "")
        + (one.name if one.default is one.empty else f"{one.name}={one.default!r}")
        for one in given
    ]
    wanted = SIGNATURES[call].split()
    assert found[: len(wanted)] == wanted
    assert all(one.default is not one.empty for one in given[len(wanted) :]), "what came later is optional"


def test_the_version_is_one_and_needs_no_install(tmp_path: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    hidden = "import importlib.metadata as m, runpy, sys; m.distribution = m.version = None; sys.argv = ['cli.py', '--version']"
    words = [sys.executable, "-c", f"{hidden}; runpy.run_path({str(ROOT / 'cli.py')!r}, run_name='__main__')"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"mint {declared}\n"


def test_what_is_named_by_its_module_needs_no_import_of_its_own() -> None:
    code = "import mint; print(mint.records.read_records.__name__, mint.kernels.token_logprob.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read_records", "token_logprob"]
