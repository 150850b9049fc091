"""The Triton kernels without a GPU: their values in the interpreter, their code from the ahead-of-time compiler.

Each has a process of its own: the interpreter replaces what `triton.jit` returns, so the two cannot live together.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env=known, capture_output=True, text=True, check=False
    )


def numbers(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def interpreter_runs() -> bool:
    """The interpreter of Triton 3.6 makes numbers of arrays as NumPy allowed up to 2.3."""
    return numbers("triton") >= (3, 7) or numbers("numpy") < (2, 4)


@pytest.mark.skipif(not interpreter_runs(), reason="Triton 3.6 interprets with NumPy up to 2.3")
def test_every_kernel_equals_float64_truth_in_the_interpreter(tmp_path):
    files = "tests/interpreted.py", "tests/interpreted_between.py"
    done = run("-m", "pytest", "-x", "-p", "no:xdist", *files, cache=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 100


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_the_gpu_without_spilling_a_register(tmp_path, capability):
    done = run("tests/aot.py", str(capability), "--json", cache=tmp_path, TRITON_INTERPRET="0")
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr[-4000:]
    allowed = {("backward_keys_kernel", 90): 32} if numbers("triton") >= (3, 9) else {}  # four registers, at d 128
    assert not [row for row in rows if row["spills"] > allowed.get((row["kernel"], capability), 0)]
    assert all(row["shared"] <= (227 if capability == 90 else 163) * 1024 for row in rows)
    names = {row["kernel"] for row in rows}
    assert {"fold_kernel", "finish_kernel", "spread_kernel", "scaled_kernel", "ratio_kernel", "terms_kernel",
            "forward_kernel", "inner_kernel", "backward_queries_kernel", "backward_keys_kernel", "norm_kernel",
            "norm_back_kernel", "gate_kernel", "gate_back_kernel", "turn_kernel", "part_kernel",
            "whole_kernel"} == names  # fmt: skip
    wanted = "wgmma" if capability == 90 else "mma"
    products = [row for row in rows if row["types"] == "bf16" and row["kernel"].startswith(("forward", "backward"))]
    assert products
    assert {row["matrix"] for row in products} == {wanted}


def test_no_kernel_is_tuned_by_trying_it():
    """Several write over what they are given, so that a second try would start from the result of the first."""
    assert not [path.name for path in (HERE.parent / "kernels").glob("*.py") if "autotune" in path.read_text()]


def test_importing_mint_and_running_on_a_processor_needs_no_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, mint.losses, mint.kernels
hidden = torch.randn(3, 4, requires_grad=True)
mint.kernels.token_logprob(hidden, torch.randn(7, 4), torch.tensor([1, 2, 3])).sum().backward()
"""
    done = run("-c", code, cache=tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
