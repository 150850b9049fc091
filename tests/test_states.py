"""The state of a run on disk: parts that ranks write each on its own, put together for any number of them, read strictly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from students import ROOT, tensors_of, write_state_of_two
from torch import Tensor

from mint import parallel
from mint.errors import CheckpointError, WorkError
from mint.files import locked, replacing_folder
from mint.weights import states
from mint.weights.states import load_state, read_facts, read_shapes, save_state
from mint.weights.tensorfiles import read_header

# ---- whole again ----------------------------------------------------------------------------------------------------


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def on_a_grid() -> dict[str, Tensor]:
    """What ranks hold in halves one way, both ways, all of them, and each alone; a part of three rows some have not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    size = parallel.size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    rows, few, both = numbered(8, 6), numbered(3, 2), numbered(4, 4).bfloat16()
    return {
        "rows": distribute_tensor(rows, mesh, [Shard(0), Replicate()]),
        "few": distribute_tensor(few, mesh["data"], [Shard(0)]),
        "both": distribute_tensor(both, mesh, [Shard(0), Shard(1)]),
        "again": distribute_tensor(both, mesh, [Shard(1), Shard(1)]),
        "alike": torch.tensor(7.0, dtype=torch.float64),
        f"own.{parallel.rank()}": torch.tensor([parallel.rank()]),
    }


def saved_from_a_grid(folder: Path) -> None:
    save_state(folder, on_a_grid(), {"step": 4})


def loaded_on_a_grid(folder: Path) -> None:
    wanted = on_a_grid()
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    load_state(folder, found)
    for name, tensor in wanted.items():
        assert torch.equal(parallel.own_part(found[name])[0], parallel.own_part(tensor)[0]), name


def test_what_some_ranks_saved_others_load(tmp_path: Path) -> None:
    """Four ranks save; one has the whole, and two have their parts of it. Each number is on the disk once."""
    on_ranks(4, saved_from_a_grid, tmp_path / "four")
    found = tensors_of(tmp_path / "four")
    assert torch.equal(found["rows"], numbered(8, 6))
    assert torch.equal(found["few"], numbered(3, 2))
    assert torch.equal(found["both"], numbered(4, 4).bfloat16())
    assert torch.equal(found["both"], found["again"])
    assert [int(found[f"own.{rank}"]) for rank in range(4)] == [0, 1, 2, 3]
    assert found["alike"] == 7
    assert read_facts(tmp_path / "four") == {"step": 4, "ranks": 4}
    held = [read_header(tmp_path / f"four/rank-{rank}.safetensors").values() for rank in range(4)]
    assert sum(info.nbytes for infos in held for info in infos) == sum(tensor.nbytes for tensor in found.values())
    assert all(any(info.name == "both" and info.shape == (2, 2) for info in infos) for infos in held)
    on_ranks(2, loaded_on_a_grid, tmp_path / "four")


def test_one_process_saves_the_same_bytes_each_time(tmp_path: Path) -> None:
    tensors = {f"{n}.weight": numbered(n, 3) for n in range(1, 9)}
    for name in ("one", "other"):
        save_state(tmp_path / name, tensors, {"step": 1})
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("one", "other"))
    assert [path.name for path in one] == ["rank-0.safetensors", "state.json"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_tensors_are_filled_where_they_are(tmp_path: Path) -> None:
    wanted = write_state_of_two(tmp_path / "state")
    found = {"columns": torch.nn.Parameter(torch.zeros(2, 4)), "own": torch.zeros(4, dtype=torch.int64)}
    load_state(tmp_path / "state", found)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_nothing_of_it_is_imported_before_a_state_is_saved() -> None:
    code = "import sys, mint.pipeline; print('torch.distributed.checkpoint' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False"]


# ---- disks ----------------------------------------------------------------------------------------------------------


def one_has_no_room(folder: Path) -> None:
    """The disk of rank 1 is full when it saves again."""
    save_state(folder, {"a": torch.ones(2)}, {"step": 1})
    real = os.fsync

    def full(handle: int) -> None:
        if parallel.rank() == 1:
            raise OSError(28, os.strerror(28))
        real(handle)

    os.fsync = full
    with pytest.raises(WorkError, match=r"state: cannot be written \(No space left on device\); free some space"):
        save_state(folder, {"a": torch.zeros(2)}, {"step": 2})


def one_sees_another_disk(folder: Path) -> None:
    if parallel.rank() == 1:
        told = parallel.from_first
        parallel.from_first = lambda value: f"{told(value)}-elsewhere"  # type: ignore[assignment]
    words = r"state: process 1 does not see it, and each writes a part of a checkpoint; give an --out on a disk that"
    with pytest.raises(WorkError, match=words):
        save_state(folder, {"a": torch.zeros(2)}, {"step": 2})


def test_a_rank_that_cannot_write_fails_all_and_leaves_the_state_before(tmp_path: Path) -> None:
    on_ranks(2, one_has_no_room, tmp_path / "state")
    on_ranks(2, one_sees_another_disk, tmp_path / "state")
    assert torch.equal(tensors_of(tmp_path / "state")["a"], torch.ones(2))
    assert read_facts(tmp_path / "state") == {"step": 1, "ranks": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_that_was_about_to_be_replaced_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames: the new one is not yet in the place that the old one has left."""
    save_state(tmp_path / "state", {"a": torch.ones(2)}, {"step": 1})
    child = os.fork()
    if not child:
        moved, real = 0, os.replace

        def killed(source: Any, target: Any) -> None:
            nonlocal moved
            moved += str(tmp_path / "state") in (str(source), str(target))
            os._exit(9) if moved == 2 else real(source, target)

        os.replace = killed
        with replacing_folder(tmp_path / "state"):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert read_facts(tmp_path / "state") is None
    with locked(tmp_path):
        assert read_facts(tmp_path / "state") == {"step": 1, "ranks": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "state"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def retold(folder: Path, change: Callable[[Any], Any], rank: int = 1) -> None:
    """Change what a file says of where its parts begin."""
    path = folder / f"rank-{rank}.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = change(json.loads(header["__metadata__"]["DCP_SHARDING_INFO"]))
    header["__metadata__"]["DCP_SHARDING_INFO"] = told if isinstance(told, str) else json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "rank-1.safetensors: tensor own (int64 [4]) does not say what part of the whole it is; copy the file"),
        ("[" * 100_000, "does not say what part"),
        ([], "does not say what part"),
        ({}, "does not say what part"),
        ({"rows": [3, 0]}, "tensor rows (float32 [2, 3]) does not say what part"),
        ({"rows": {"saved_offsets": [3]}}, "tensor rows (float32 [2, 3]) does not say what part"),
        ({"rows": {"saved_offsets": [3, -1]}}, "tensor rows (float32 [2, 3]) does not say what part"),
        ({"rows": {"saved_offsets": [3, 0.0]}}, "tensor rows (float32 [2, 3]) does not say what part"),
        ({"rows": {"saved_offsets": [2**62, 0]}}, "tensor rows (float32 [2, 3]) does not say what part"),
        ({"rows": {"saved_offsets": [2, 0]}}, "the parts of rows leave a gap or overlap"),
        ({"rows": {"saved_offsets": [0, 0]}}, "the parts of rows leave a gap or overlap"),
        ({"rows": {"saved_offsets": [4, 0]}}, "the parts of rows leave a gap or overlap"),
        ({"rows": {"saved_offsets": [3, 3]}}, "the parts of rows leave a gap or overlap"),
        ({"columns": {"saved_offsets": [2, 2]}}, "the parts of columns leave a gap or overlap"),
        ({"own": {"saved_offsets": [2**61]}}, "the parts of own leave a gap or overlap"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(tmp_path: Path, told: Any, said: str) -> None:
    write_state_of_two(tmp_path / "state")
    retold(tmp_path / "state", lambda old: {**old, **told} if isinstance(told, dict) and told else told)
    with pytest.raises(CheckpointError) as refused:
        read_shapes(tmp_path / "state")
    assert said in str(refused.value)


def copied(folder: Path) -> None:
    (folder / "rank-1.safetensors").write_bytes((folder / "rank-0.safetensors").read_bytes())


def linked_away(folder: Path) -> None:
    (folder / "rank-1.safetensors").rename(folder.parent / "away")
    (folder / "rank-1.safetensors").symlink_to("../away")


def facts_of(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / "state.json").write_text(json.dumps({"step": 3, "ranks": 2, **changes}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: (folder / "rank-1.safetensors").unlink(),
            "rank-1.safetensors is missing, saved were 2 files of tensors; copy",
        ),
        (
            lambda folder: (folder / "rank-0.safetensors").unlink(),
            "rank-0.safetensors is missing, saved were 2 files",
        ),
        (
            lambda folder: (folder / "x.safetensors").touch(),
            "x.safetensors does not belong there, saved were 2",
        ),
        (facts_of(ranks=3), "rank-2.safetensors is missing, saved were 3 files"),
        (facts_of(ranks=10**30), "rank-2.safetensors is missing, saved were 1000000"),
        (facts_of(ranks=True), "not the state of a run, state.json is missing or broken"),
        (facts_of(ranks=0), "not the state of a run, state.json is missing or broken"),
        (lambda folder: (folder / "state.json").unlink(), "not the state of a run, state.json is missing or broken"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json:1:2: not JSON"),
        (copied, "leave a gap or overlap; copy the folder again, or start a new run"),
        (linked_away, "rank-1.safetensors: a link that leads out of its folder"),
    ],
)
def test_a_folder_that_is_not_what_was_saved_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], said: str
) -> None:
    write_state_of_two(tmp_path / "state")
    change(tmp_path / "state")
    with pytest.raises(CheckpointError) as refused:
        read_shapes(tmp_path / "state")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"rows": torch.zeros(5, 4)}, "rows is float32 [5, 3], wanted float32 [5, 4]; resume with the same settings"),
        ({"rows": torch.zeros(5, 3).double()}, "rows is float32 [5, 3], wanted float64 [5, 3]"),
        ({"other": torch.zeros(5, 3)}, "other is missing, wanted float32 [5, 3]"),
    ],
)
def test_tensors_of_another_kind_are_refused_and_left_alone(
    tmp_path: Path, wanted: dict[str, Tensor], said: str
) -> None:
    write_state_of_two(tmp_path / "state")
    step = torch.tensor(0.0)
    with pytest.raises(CheckpointError) as refused:
        load_state(tmp_path / "state", {"step": step, **wanted})
    assert said in str(refused.value)
    assert step == 0


def test_a_check_that_is_left_out_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it torch takes parts that overlap as they come."""
    write_state_of_two(tmp_path / "state")
    retold(tmp_path / "state", lambda told: {**told, "rows": {"saved_offsets": [2, 0]}})
    monkeypatch.setattr(states, "_whole", lambda *_: (torch.float32, (4, 3)))
    load_state(tmp_path / "state", {"rows": torch.zeros(4, 3)})
