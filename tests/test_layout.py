"""The shape of the house: floors, doors, sizes, public names, what is packed, and who else may be called `kernels`."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("mint/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "cli.py"])

FLOORS = [
    "transfer",
    "types errors progress schedules kernels signals",
    "parallel",
    "files config devices trees tries losses ranking",
    "jsonlines weights tokens images",
    "records labels chat encoders",
    "answers decoders teaching report bayes",
    "prompts evaluation search listing retrieval training",
    "scoring pairs builtin",
    "predicting bench",
    "pipeline",
    "showcase",
    "showcase_tissue",
    "experiment",
    "commands",
    "__main__",
    "cli",
]
"""Rooms from the ground up; a room is a file of mint/, or a folder of it. A room imports from lower floors alone."""

DOORS = {
    "PIL": {"mint/images", "mint/builtin"},  # builtin draws its pictures and opens none
    "tokenizers": {"mint/tokens.py"},
    "safetensors": {"mint/weights"},
    "huggingface_hub": {"mint/weights"},
    "click": {"mint/commands"},
    "triton": {"kernels"},
}
RUNTIME = {*DOORS, "torch", "numpy"}


def _module(path: Path) -> str:
    """mint/a/b.py -> mint.a.b; kernels/a.py -> mint.kernels.a."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["mint", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in FILES}


def _imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, absolute; those of ours as deep as they name a module."""
    me = _module(path)
    package = me if path.name == "__init__.py" else me.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            found = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield f"{found}.{alias.name}" if f"{found}.{alias.name}" in MODULES else found


def _room(module: str) -> str:
    return module.split(".")[1] if module.startswith("mint.") else module


def test_every_room_has_a_floor() -> None:
    rooms = {_room(module) for module in MODULES if module != "mint"}
    assert rooms == set(" ".join(FLOORS).split())


def test_a_room_imports_from_lower_floors_alone() -> None:
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}
    wrong = [
        f"{module} -> {target}"
        for module, path in MODULES.items()
        if module != "mint"
        for target in _imports(path)
        if target in MODULES and target != "mint" and _room(target) != _room(module)
        if floor[_room(target)] >= floor[_room(module)]
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = {
        m: {t for t in _imports(p) if t in MODULES and t not in (m, "mint")} for m, p in MODULES.items() if m != "mint"
    }
    done: set[str] = set()

    def visit(module: str, line: tuple[str, ...]) -> None:
        assert module not in line, " -> ".join((*line, module))
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*line, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_each_third_party_package_has_one_door() -> None:
    ours = {"mint", "kernels", *sys.stdlib_module_names}
    for path in FILES:
        place = path.relative_to(ROOT).as_posix()
        for name in {target.split(".")[0] for target in _imports(path)} - ours:
            assert name in RUNTIME, f"{place} imports {name}, which is no runtime package"
            doors = DOORS.get(name, {""})
            assert any(place.startswith(door) for door in doors), f"{place} imports {name}; its door is {doors}"


def test_parallel_is_the_one_door_to_torch_distributed() -> None:
    through = {p.parent for p in FILES if any(t.startswith("torch.distributed") for t in _imports(p))}
    assert through == {ROOT / "mint" / "parallel"}


def test_a_file_is_one_idea_of_at_most_400_lines() -> None:
    tests = [*ROOT.glob("tests/**/*.py")]
    assert not [f"{p.relative_to(ROOT)}: {n}" for p in [*FILES, *tests] if (n := len(p.read_text().splitlines())) > 400]


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_top_level_is_the_agreed_one() -> None:
    agreed = "pyproject.toml mint kernels cli.py tests README.md .ci constraints.txt LICENSE .gitignore"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # an unpacked archive: nothing to list
        return
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= set(agreed.split())


def test_the_public_names_are_these() -> None:
    import mint
    import mint.kernels

    assert sorted(mint.__all__) == [
        "Prediction", "PreferencePair", "Ranking", "Record", "Report", "TokenTree", "align", "dpo_loss", "evaluate",
        "load_decoder", "load_encoder", "orpo_loss", "predict", "prefer", "sft_loss", "teach",
    ]  # fmt: skip
    assert all(getattr(mint, name) is not None for name in mint.__all__)
    assert {"token_logprob", "log_odds_ratio"} <= set(mint.kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mint.nothing  # noqa: B018


def test_help_does_not_wait_for_torch() -> None:
    words = "import sys; sys.argv = ['mint', '--help']; import mint.__main__ as m"
    code = f"{words}\ntry:\n    m.main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built without a network."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "source"
    tracked = [
        p
        for p in ROOT.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
    ]
    for path in tracked:
        if (
            path.relative_to(ROOT).parts[0] in ("mint", "kernels", "pyproject.toml", "README.md", "LICENSE")
            and "__pycache__" not in path.parts
        ):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(place),
        str(copy),
    ]
    subprocess.run(words, check=True, capture_output=True)
    return next(place.glob("*.whl"))


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mint"}
    assert {"mint/py.typed", "mint/kernels.py", "mint/kernels/reference.py", "mint/kernels/logprob.py"} <= set(names)
    assert "mint/kernels/__init__.py" not in names
    assert any(name.startswith("mint/builtin/") and name.endswith(".tsv") for name in names)


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_package_called_kernels_works_beside_ours(wheel: Path, tmp_path: Path, order: str) -> None:
    other = tmp_path / "site" / "kernels"
    steps = {"before": (_install_other, _install_ours), "after": (_install_ours, _install_other)}[order]
    for step in steps:
        step(wheel, other)
    code = (
        "import kernels, mint.kernels as k; print(kernels.WHOSE, k.reference.__file__); import mint.kernels.reference"
    )
    words = [sys.executable, "-c", code]
    out = subprocess.run(
        words, cwd=tmp_path, env=_path(other.parent), capture_output=True, text=True, check=True
    ).stdout
    assert out.split()[0] == "theirs"
    assert out.split()[1].startswith(str(other.parent / "mint" / "kernels"))


def test_a_checkout_beside_another_package_called_kernels_uses_its_own(tmp_path: Path) -> None:
    other = tmp_path / "site" / "kernels"
    _install_other(tmp_path, other)
    code = f"import sys; sys.path.append({str(ROOT)!r}); import kernels, mint.kernels as k"
    code += "; print(kernels.WHOSE, k.reference.__file__)"
    words = [sys.executable, "-c", code]
    out = subprocess.run(
        words, cwd=tmp_path, env=_path(other.parent), capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["theirs", str(ROOT / "kernels" / "reference.py")]


def _install_ours(wheel: Path, other: Path) -> None:
    zipfile.ZipFile(wheel).extractall(other.parent)


def _install_other(_: Path, other: Path) -> None:
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("WHOSE = 'theirs'\n")


def _path(site: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
