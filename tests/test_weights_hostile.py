"""Broken and hostile checkpoint folders: each fault is a CheckpointError in one line, whatever the bytes are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mint.errors import CheckpointError, MintError
from mint.weights import fill, open_checkpoint

# MINT_FUZZ=100000 is the long run.
BUDGET = settings(
    max_examples=int(os.environ.get("MINT_FUZZ", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BYTE = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}


def with_header(
    folder: Path, header: bytes | dict[str, Any], body: bytes = bytes(8), length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + body)
    return folder


def two_shards(folder: Path, weight_map: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    text = str(error.value)
    assert "\n" not in text
    assert str(folder) in text
    assert len(text) < 700
    return text


def test_a_well_made_header_is_read(tmp_path):
    whole = {
        "__metadata__": {"format": "pt"},
        "a": F32,
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]},
    }
    assert open_checkpoint(with_header(tmp_path, whole)).tensors["none"].shape == (0, 4)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[]", "not a JSON object"),
        (b" {}", "not a JSON object"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": \xff}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (json.dumps({"a": F32}).encode()[:-1] + b"," + json.dumps({"a": F32}).encode()[1:], "stands there twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "stands there twice"),
        ({"a": 3}, "tensor a is not described by"),
        ({"a": {**F32, "more": 1}}, "tensor a is not described by"),
        ({"a": {**F32, "dtype": "F31"}}, "tensor a has the dtype F31"),
        ({"a": {**F32, "dtype": ["F32"]}}, "tensor a has the dtype a list of 1"),
        ({"a": {**F32, "shape": 2}}, "tensor a has the shape 2"),
        ({"a": {**F32, "shape": [2.0]}}, "tensor a has the shape"),
        ({"a": {**F32, "shape": [True, 2]}}, "tensor a has the shape"),
        ({"a": {**F32, "shape": [-1, -2]}}, r"tensor a has the shape [-1, -2]"),
        ({"a": {**F32, "shape": [1] * 17 + [2]}}, "at most 16 sizes"),
        ({"a": {**F32, "shape": [1 << 63, 0]}}, "tensor a has the shape"),
        ({"a": {**F32, "shape": [1 << 33, 1 << 31, 2]}}, "needs 147573952589676412928 bytes, has 8"),
        ({"a": {**F32, "shape": [1 << 32, 1 << 30, 2]}}, "needs 36893488147419103232 bytes, has 8"),
        ({"a": {**F32, "shape": [3]}}, "tensor a (float32 [3]) needs 12 bytes, has 8"),
        ({"a": {**F32, "data_offsets": [0]}}, "tensor a has the data_offsets [0]"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "tensor a has the data_offsets [8, 0]"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, "tensor a has the data_offsets [-8, 0]"),
        ({"a": {**F32, "data_offsets": [0, 1 << 70]}}, "tensor a has the data_offsets"),
        ({"a": {**F32, "data_offsets": [1, 9]}}, "tensor a leaves a gap"),
        ({"a": F32, "b": F32}, "tensor b overlaps"),
        ({"a": BYTE, "b": {**BYTE, "shape": [4], "data_offsets": [2, 6]}}, "tensor b overlaps"),
        ({"a": {**F32, "shape": [1], "data_offsets": [0, 4]}}, "cut off or overwritten"),
        ({"a": {**F32, "shape": [4], "data_offsets": [0, 16]}}, "cut off or overwritten"),
        ({"__metadata__": {"format": 1}, "a": F32}, "__metadata__ is not a table of strings"),
        ({"__metadata__": "pt", "a": F32}, "__metadata__ is not a table of strings"),
        ({"a\nb": {**F32, "dtype": "?"}}, r"tensor 'a\nb' has the dtype"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused(tmp_path, header, said):
    assert said in refused(with_header(tmp_path, header))


@pytest.mark.parametrize("length", [0, 1, 1000, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_of_a_false_length_is_refused(tmp_path, length):
    assert "model.safetensors: " in refused(with_header(tmp_path, {"a": F32}, length=length))


def test_a_header_above_the_limit_is_not_even_read(tmp_path):
    path = with_header(tmp_path, b"", length=100_000_001) / "model.safetensors"
    os.truncate(path, 1 << 34)  # a sparse file that is long enough for it
    assert "a header of 100,000,001 bytes" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 8, 20, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = with_header(tmp_path, {"a": F32}) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors" in refused(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    assert "cut off or overwritten" in refused(with_header(tmp_path, {"a": F32}, body=bytes(9)))


# ---- the folder


def test_a_folder_without_config_is_refused(tmp_path):
    (with_header(tmp_path, {"a": F32}) / "config.json").unlink()
    assert "no config.json" in refused(tmp_path)


@pytest.mark.parametrize(
    "config", ["", "[]", "{", '{"a": ' + "1" * 5000 + "}", "[" * 100_000, '{"quantization_config": {"bits": 4}}']
)
def test_a_config_that_is_not_one_is_refused(tmp_path, config):
    (with_header(tmp_path, {"a": F32}) / "config.json").write_text(config)
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_a_pickle_is_never_opened_and_the_error_says_how_to_convert_it(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    mark = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(mark),)

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    said = refused(tmp_path)
    assert f"only {name}, a pickle" in said
    assert "save_pretrained(NEW)" in said
    assert not mark.exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "found nothing of the kind" in refused(tmp_path)


def test_a_directory_or_a_pipe_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert "not a file" in refused(tmp_path)
    (tmp_path / "config.json").rmdir()
    os.mkfifo(tmp_path / "config.json")
    assert "not a file" in refused(tmp_path)


# ---- the index


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ([], "weight_map is not a table"),
        ({"a": 1}, "weight_map is not a table"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "leads out of its folder"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "leads out of its folder"),
        ({"a": "one.safetensors", "b": ""}, "leads out of its folder"),
        ({"a": "one.safetensors", "b": "two\0.safetensors"}, "leads out of its folder"),
        ({"a": "one.safetensors", "b": "\ud800"}, "half of a surrogate pair"),
        ({"a": "one.safetensors", "b": "x" * 5000}, "cannot be read"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "'three.safetensors' cannot be read (No such file"),
        ({"a": "one.safetensors", "b": "."}, "not a file"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor b is not in one.safetensors"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "tensor a lies in one.safetensors, the index says two"),
        ({"b": "one.safetensors"}, "tensor a lies in one.safetensors, the index says nowhere"),
        ({"a": "config.json"}, "not safetensors"),
    ],
)
def test_an_index_that_lies_or_leads_away_is_refused(tmp_path, weight_map, said):
    assert said in refused(two_shards(tmp_path, weight_map))


def test_an_index_without_a_weight_map_is_refused(tmp_path):
    (two_shards(tmp_path) / "model.safetensors.index.json").write_text("{}")
    assert "weight_map is not a table" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "one.safetensors", "model.safetensors.index.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    folder = two_shards(tmp_path / "inside")
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(f"../{name}")
    assert "a link that leads out of its folder" in refused(folder)


def test_links_that_stay_inside_or_go_nowhere_are_told_apart(tmp_path):
    folder = two_shards(tmp_path)
    (folder / "real").mkdir()
    shutil.move(folder / "one.safetensors", folder / "real" / "weights")
    (folder / "one.safetensors").symlink_to("real/weights")
    assert set(open_checkpoint(folder).tensors) == {"a", "b"}
    (folder / "real" / "weights").unlink()
    assert "cannot be read (No such file" in refused(folder)
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("one.safetensors")
    assert "one.safetensors" in refused(folder)


def test_a_folder_that_is_itself_a_link_is_opened(tmp_path):
    two_shards(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert set(open_checkpoint(tmp_path / "link").tensors) == {"a", "b"}


def in_the_cache(root: Path) -> tuple[Path, Path]:
    """The hub's layout: snapshots/REVISION holds links to blobs."""
    model = root / "models--owner--name"
    snapshot, blobs = model / "snapshots" / "0123abcd", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    two_shards(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    return snapshot, blobs


def test_links_to_the_blobs_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, _ = in_the_cache(tmp_path)
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b"}


def test_links_from_the_hubs_cache_to_another_model_or_beyond_are_refused(tmp_path):
    snapshot, blobs = in_the_cache(tmp_path)
    other, _ = in_the_cache(tmp_path / "elsewhere")
    shard = snapshot / "one.safetensors"
    shard.unlink()
    shard.symlink_to(other / "one.safetensors")
    assert "leads out of its folder" in refused(snapshot)
    shard.unlink()
    shard.symlink_to(blobs / "secret")
    (blobs / "secret").symlink_to("/etc/hostname")
    assert "leads out of its folder" in refused(snapshot)


# ---- mutations: only MintError may come out


def mutate(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, cut, new in edits:
        start = place % (len(data) + 1)
        data = data[:start] + new + data[start + cut :]
    return data


PIECES = [b"[", b"{", b'"', b"-1", b"1e9", b"null", b"9" * 30, b"..", b"F64", b"\\ud800", b"\xff", b"[[", b"NaN", b"/"]
EDITS = st.lists(
    st.tuples(st.integers(0, 4000), st.integers(0, 9), st.binary(max_size=4) | st.sampled_from(PIECES)),
    min_size=1,
    max_size=4,
)


def try_to_load(folder: Path) -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    said = ""
    try:
        fill(model, open_checkpoint(folder), device="cpu", dtype=torch.float32)
    except MintError as error:
        said = str(error)
    assert said.isprintable()


@BUDGET
@given(EDITS)
def test_no_change_of_bytes_in_a_safetensors_file_does_more_than_raise_a_minterror(tmp_path, edits):
    folder = with_header(tmp_path, {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, bytes(16))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(mutate(whole, edits))
    try_to_load(folder)


@BUDGET
@given(EDITS)
def test_no_change_inside_the_header_text_does_more_than_raise_a_minterror(tmp_path, edits):
    text = json.dumps({"a": F32, "b": {**F32, "data_offsets": [8, 16]}}).encode()
    try_to_load(with_header(tmp_path, mutate(text, edits), bytes(16)))


@BUDGET
@given(st.sampled_from(["config.json", "model.safetensors.index.json"]), EDITS)
def test_no_change_of_bytes_in_the_json_files_does_more_than_raise_a_minterror(tmp_path, name, edits):
    folder = two_shards(tmp_path)
    (folder / name).write_bytes(mutate((folder / name).read_bytes(), edits))
    try_to_load(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3"]) | JSON,
        "shape": st.lists(st.integers(-2, 5) | st.sampled_from([1 << 31, 1 << 61, 1 << 64]), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-8, 24), min_size=2, max_size=2) | JSON,
    }
)


@BUDGET
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3), ENTRY | JSON, max_size=4))
def test_no_well_formed_json_in_a_header_does_more_than_raise_a_minterror(tmp_path, header):
    try_to_load(with_header(tmp_path, header, bytes(16)))
