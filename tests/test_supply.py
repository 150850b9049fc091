"""What is installed and what is loaded: bounds and pins that say all, and a quick start."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from oldest import ROOT, oldest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ORACLES = {"transformers", "peft", "trl", "datasets", "liger_kernel", "accelerate", "pytest", "hypothesis", "pandas"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(rows), "constraints.txt: a line that is not name==version"
    return {canonicalize_name(row[1]): row[2] for row in rows if row}


def needed(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    """All that an installed package needs, by what it says itself: name and extras of each."""
    known = seen.get(name, frozenset())
    if name in seen and extras <= known:
        return
    seen[name] = known | extras
    for text in metadata.requires(name) or []:
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *seen[name])):
            needed(canonicalize_name(wanted.name), frozenset(wanted.extras), seen)


def test_each_dependency_has_a_lower_bound_that_what_is_installed_meets() -> None:
    bounds = oldest()
    assert {"torch", "triton", "click", "transformers"} <= bounds.keys()
    for name, bound in bounds.items():
        assert Version(metadata.version(name)) >= Version(bound), name


def test_the_pins_are_within_the_bounds_and_pin_all_that_is_needed() -> None:
    pinned, bounds = pins(), {canonicalize_name(name): bound for name, bound in oldest().items()}
    assert bounds.keys() <= pinned.keys()
    assert all(Version(pinned[name]) >= Version(bound) for name, bound in bounds.items())
    if any(Version(metadata.version(name)).base_version != pinned[name] for name in bounds):
        pytest.skip("other versions than those of constraints.txt are installed, which may need other packages")
    seen: dict[str, frozenset[str]] = {}
    for name in bounds:
        needed(name, frozenset(), seen)
    of_the_gpu = {name for name in seen if name.startswith(("nvidia-", "cuda-"))}
    assert sorted(seen.keys() - pinned.keys() - of_the_gpu) == []
    assert len(seen) > 40


def loaded(code: str) -> tuple[set[str], list[float]]:
    """The top-level modules that are loaded in the end, and the numbers that the code prints."""
    words = f"import sys, time\n{code}\nprint('|', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True)
    numbers, _, names = done.stdout.rpartition("|")
    return set(names.split()), [float(number) for number in numbers.split()]


def test_importing_mint_loads_nothing_that_it_does_not_need() -> None:
    names, _ = loaded("import mint")
    assert not names & {"torch", "numpy", "PIL", "triton", "click", "huggingface_hub", *ORACLES}
    names, _ = loaded("import mint; [getattr(mint, name) for name in mint.__all__]")
    assert not names & {"triton", "click", "huggingface_hub", *ORACLES}


def test_importing_mint_takes_a_fifth_of_a_second_beyond_torch() -> None:
    """Computing time, and the best of a few tries: what else the machine does is not counted."""
    code = "import torch; start = time.process_time(); import mint; print(time.process_time() - start)"
    assert any(loaded(code)[1][0] < 0.2 for _ in range(3))


def test_help_takes_half_a_second_and_no_torch() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-X", "importtime", "cli.py", "--help"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if times[-1] < 0.5:
            break
    names = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in names
    assert not names & {"torch", "numpy", *ORACLES}
    assert min(times) < 0.5


def test_the_script_of_the_oldest_versions_is_there() -> None:
    script = Path(ROOT / ".ci" / "oldest")
    if script.parent.is_dir():  # an unpacked archive has none
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        assert "tests/oldest.py" in script.read_text()
