"""`bench`: the training step's two ways are one computation, a fault in either is seen, and the command tells what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from mint import bench
from mint.commands import cli
from mint.losses import orpo_loss

RATES = {"products": 1e12, "bytes": 1e11}


def lines() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return list(bench.training_step("tiny", RATES))


def test_our_step_and_the_plain_one_have_the_same_loss_and_both_are_timed() -> None:
    check, ours, plain = lines()
    assert check["right"]
    assert check["error"] < 1e-6
    assert (ours["side"], plain["side"]) == ("ours", "plain PyTorch")
    assert ours["to_ours"] == 1
    assert plain["ms"] > 0


FAULTS = {
    "no rotation": ("turned", lambda x, *_: x),
    "half of the adapter": ("adapted", lambda layer, x: F.linear(x, layer.weight)),
    "another loss": ("orpo_loss", lambda *given, **more: orpo_loss(*given, **more) * 1.0001),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_of_them_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, *FAULTS[name])
    assert not lines()[0]["right"]


def test_both_ways_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    size = bench.SIZES["tiny"]
    decoder, pairs = bench.random_decoder(size), bench.random_pairs(size)
    trained = {name: weight for name, weight in decoder.network.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    grads = torch.autograd.grad(bench.plain_loss(decoder.network, pairs), list(trained.values()))
    bench.our_step(decoder, pairs)()
    lr = bench.AlignSettings().lr
    for (name, weight), grad in zip(trained.items(), grads, strict=True):
        clear = grad.abs() > 1e-4 * grad.abs().max()  # Adam's first step is one rate against the sign of the gradient
        moved = (weight.detach() - before[name])[clear]
        torch.testing.assert_close(moved, -lr * grad[clear].sign(), atol=2e-6, rtol=2e-2, msg=name)


def test_the_command_measures_every_part_and_writes_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    report: dict[str, Any] = {
        "device": "a machine", "torch": "2", "rates": None, "checks": [], "lines": [], "failed": {},
    }  # fmt: skip
    monkeypatch.setattr(bench._kernels, "run", lambda *words, **_: asked.append(words) or report)
    done = CliRunner().invoke(cli, ["bench", "--out", str(tmp_path / "bench.json"), "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "bench.json").read_text())["device"] == "a machine"
    assert done.stdout.splitlines()[0] == "a machine, torch 2"
    assert json.loads(CliRunner().invoke(cli, ["bench", "--json"]).stdout) == report
    assert asked[0][1] == list(bench.PARTS)
    assert {"step", "token_logprob"} < bench.PARTS.keys()
    assert asked[0][3] == ["-m", "mint.bench", "--seed", "3"]
    report["failed"] = {"odds": "no memory"}
    done = CliRunner().invoke(cli, ["bench"])
    assert done.exit_code == 1
    assert "odds: no memory" in done.output


def test_what_it_does_not_measure_here_is_refused_by_name() -> None:
    there = "cpu" if bench.GPU else "cuda"
    done = CliRunner().invoke(cli, ["bench", "--device", there])
    assert done.exit_code == 2
    assert f"--device {there}: bench measures {bench.DEVICE} on this machine" in done.stderr
    done = CliRunner().invoke(cli, ["bench", "--dtype", "bfloat16" if not bench.GPU else "float32"])
    assert done.exit_code == 2
    assert "leave --dtype out" in done.stderr


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_takes_a_seed_a_device_and_a_dtype(name: str) -> None:
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    for option in ("--seed", "--device", "--dtype", "--quiet", "--json", "--traceback", "Example:"):
        assert option in shown, option
