"""The README is true: its Python runs, its table names code that exists, its commands and flags are real."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mint.commands import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:mint|kernels|tests)/[\w/]+\.py):(\w+)`", TEXT)))
COMMANDS = sorted(set(re.findall(r"`(python cli\.py [^`]+)`", TEXT)))


def test_its_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert blocks
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["hidden"].grad is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_its_table_names_what_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert name in defined


def test_its_table_names_enough() -> None:
    assert len(NAMED) >= 15
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_have_the_flags_that_it_shows(line: str) -> None:
    words = line.split()[2:]
    shown = CliRunner().invoke(cli, [words[0], "--help"])
    assert shown.exit_code == 0
    for flag in re.findall(r"--[\w-]+", line):
        assert flag in shown.output, f"{words[0]} has no {flag}"
    assert "Example:" in shown.output


def test_every_command_is_in_it() -> None:
    assert all(f"python cli.py {name}" in TEXT for name in cli.commands)


def test_every_path_in_its_picture_exists() -> None:
    picture = TEXT.split("```")[1]
    for name in re.findall(r"[\w]+(?:/|\.py)", picture):
        found = [*ROOT.glob(f"mint/**/{name.rstrip('/')}"), *ROOT.glob(name.rstrip("/"))]
        assert found, name


@pytest.mark.parametrize("mark", ["start", "test"])
def test_its_two_commands_can_be_found_by_a_script(mark: str) -> None:
    inside = re.search(rf"<!-- {mark} -->\n```\n(.+)\n```\n<!-- /{mark} -->", TEXT)
    assert inside is not None
    assert "\n" not in inside[1]
