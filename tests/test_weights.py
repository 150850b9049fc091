"""Checkpoints read into models: exactness, strictness, tied weights, views, parts of tensors, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mint.errors import CheckpointError
from mint.weights import SMALL_FILES, Checkpoint, fill, open_checkpoint


class Tiny(nn.Module):
    """Names as in a decoder: an embedding, a block, a norm's buffer, a head that may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def numbers(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (11, 6), "block.weight": (4, 6), "block.bias": (4,), "head.weight": (11, 6)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"steps": torch.tensor(7)}


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "tiny"}))
    return folder


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def on_meta(tied: bool = False) -> Tiny:
    with torch.device("meta"):
        return Tiny(tied)


def load(model: nn.Module, folder: Path | Checkpoint, dtype: torch.dtype = torch.float32, **options: object) -> None:
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    fill(model, checkpoint, device="cpu", dtype=dtype, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("save", [written, sharded])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_meta_holds_the_cast_numbers_of_the_file(tmp_path, save, file_dtype, dtype):
    tensors = numbers(file_dtype)
    model = on_meta()
    model.block.weight.requires_grad_(False)
    load(model, save(tmp_path, tensors), dtype)
    for name, value in model.state_dict().items():
        wanted = tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name]
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted), name
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]


def test_an_opened_checkpoint_says_what_lies_where(tmp_path):
    tensors = numbers(torch.bfloat16)
    checkpoint = open_checkpoint(str(written(tmp_path, tensors, {"vocab_size": 11})))
    assert (checkpoint.name, checkpoint.folder, checkpoint.config) == (str(tmp_path), tmp_path, {"vocab_size": 11})
    assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in tensors.items()
    }
    for name, info in checkpoint.tensors.items():
        body = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert body == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())


def test_other_settings_are_read_and_are_empty_where_there_are_none(tmp_path):
    checkpoint = open_checkpoint(written(tmp_path, numbers()))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert checkpoint.settings("generation_config.json") == {"eos_token_id": [1, 2]}
    assert checkpoint.settings("preprocessor_config.json") == {}
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="a JSON list, wanted an object"):
        checkpoint.settings("preprocessor_config.json")


def test_config_alone_opens_without_tensors(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert open_checkpoint(tmp_path, files=SMALL_FILES).tensors == {}


def test_a_folder_below_the_current_one_may_be_named_without_a_dot(tmp_path, monkeypatch):
    written(tmp_path / "models" / "mine", numbers())
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("models/mine").folder == Path("models/mine")


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "some/where/else"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(name)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a file; give the folder"):
        open_checkpoint(written(tmp_path, numbers()) / "model.safetensors")


# ---- strictness


def test_missing_unexpected_and_misshapen_tensors_are_all_named_in_one_error(tmp_path):
    tensors = numbers()
    del tensors["block.bias"], tensors["steps"]
    tensors |= {"extra.weight": torch.zeros(2, 3), "block.weight": torch.zeros(4, 5)}
    with pytest.raises(CheckpointError) as error:
        load(on_meta(), written(tmp_path, tensors))
    text = str(error.value)
    assert "missing: steps (wanted int64 []), block.bias (wanted float32 [4]); " in text
    assert "unexpected: extra.weight (found float32 [2, 3])" in text
    assert "misshapen: block.weight (found float32 [4, 5], wanted float32 [4, 6])" in text
    assert "\n" not in text


def test_a_model_is_untouched_when_its_tensors_do_not_fit(tmp_path):
    model = Tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="unexpected: extra"):
        load(model, written(tmp_path, numbers() | {"extra": torch.zeros(1)}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("steps", torch.tensor(7.0)), ("block.bias", torch.zeros(4).long())])
def test_whole_numbers_do_not_become_fractions_nor_the_reverse(tmp_path, name, value):
    with pytest.raises(CheckpointError, match=f"misshapen: {name}"):
        load(on_meta(), written(tmp_path, numbers() | {name: value}))


def test_names_to_ignore_and_to_rename_are_left_out_and_renamed(tmp_path):
    tensors = {f"old.{name}": value for name, value in numbers().items()}
    tensors |= {"position_ids": torch.arange(3), "tower.weight": torch.zeros(3)}
    model = on_meta()
    names = {"tower.weight": None}
    load(
        model,
        written(tmp_path, tensors),
        rename=lambda name: names.get(name, name.removeprefix("old.")),
        ignore={"position_ids"},
    )
    assert all(torch.equal(value, numbers()[name]) for name, value in model.state_dict().items())


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path):
    extra = {f"extra.{place:03}": torch.zeros(1) for place in range(90)}
    with pytest.raises(CheckpointError, match=r"extra\.039 \(found float32 \[1\]\) and 50 more"):
        load(on_meta(), written(tmp_path, numbers() | extra))


# ---- tied weights


@pytest.mark.parametrize("kept", [{"embed.weight"}, {"head.weight"}, {"embed.weight", "head.weight"}])
def test_a_tied_weight_may_be_in_the_file_under_either_name_or_both(tmp_path, kept):
    tensors = numbers()
    tensors["head.weight"] = tensors["embed.weight"].clone()
    for name in {"embed.weight", "head.weight"} - kept:
        del tensors[name]
    model = on_meta(tied=True)
    load(model, written(tmp_path, tensors))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, numbers()["embed.weight"])


def test_a_tied_weight_under_neither_name_is_missing_once(tmp_path):
    tensors = numbers()
    del tensors["embed.weight"], tensors["head.weight"]
    with pytest.raises(CheckpointError, match=r"missing: embed\.weight \(wanted float32 \[11, 6\]\); give"):
        load(on_meta(tied=True), written(tmp_path, tensors))


def test_two_different_tensors_for_one_tied_weight_are_refused(tmp_path):
    tensors = numbers()
    tensors["head.weight"] = tensors["embed.weight"].clone()
    tensors["head.weight"][10, 5] += 1e-6
    with pytest.raises(CheckpointError, match=r"embed\.weight and head\.weight differ but are one weight"):
        load(on_meta(tied=True), written(tmp_path, tensors))


# ---- memory that is there already


def test_views_of_a_fused_weight_are_filled_in_place(tmp_path):
    model = nn.Module()
    fused = torch.full((7, 5), -1.0)
    model.q, model.k = nn.Parameter(fused[:4]), nn.Parameter(fused[4:], requires_grad=False)
    model.left = nn.Parameter(torch.zeros(6, 4)[:, 1:3])  # not contiguous
    tensors = {"q": torch.randn(4, 5), "k": torch.randn(3, 5), "left": torch.randn(6, 2).bfloat16()}
    load(model, written(tmp_path, tensors), torch.bfloat16)
    assert torch.equal(fused, torch.cat([tensors["q"], tensors["k"]]))
    assert torch.equal(model.left, tensors["left"].float())
    assert model.q.dtype == torch.float32
    assert (model.q.requires_grad, model.k.requires_grad) == (True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_of_a_tensor_are_read_alone(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("mint.weights.tensorfiles._CHUNK", 48)  # two rows of 6 float32 at a time
    checkpoint = open_checkpoint(written(tmp_path, numbers()))
    whole = numbers()["embed.weight"].to(dtype)
    for rows in (None, slice(0, 4), slice(3, 11), slice(5, 5), slice(-2, None)):
        for columns in (None, slice(0, 3), slice(2, 6), slice(None, None, 2)):
            wanted = whole[rows or slice(None), columns or slice(None)]
            out = torch.full(wanted.shape, 9.0, dtype=dtype)
            checkpoint.read("embed.weight", out, rows=rows, columns=columns)
            assert torch.equal(out, wanted), (rows, columns)


def test_a_tensor_is_not_read_into_a_place_of_another_shape(tmp_path):
    checkpoint = open_checkpoint(written(tmp_path, numbers()))
    with pytest.raises(CheckpointError, match=r"block\.weight is \[4, 6\], wanted \[6, 4\]"):
        checkpoint.read("block.weight", torch.zeros(6, 4))
    with pytest.raises(CheckpointError, match="no tensor absent"):
        checkpoint.read("absent", torch.zeros(1))


def test_a_file_that_shrinks_while_it_is_open_is_refused_by_name(tmp_path):
    checkpoint = open_checkpoint(written(tmp_path, numbers()))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.tensors["head.weight"].offset + 5)
    with pytest.raises(CheckpointError, match=r"ends inside tensor head\.weight"):
        load(on_meta(), checkpoint)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_is_filled_on_the_gpu(tmp_path):
    model = on_meta(tied=False)
    fill(model, open_checkpoint(written(tmp_path, numbers())), device="cuda", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        wanted = numbers()[name]
        assert value.is_cuda
        assert torch.equal(value.cpu(), wanted.bfloat16() if wanted.is_floating_point() else wanted)


# ---- peak memory, in a process of its own

_CHILD = """
import sys, torch
from pathlib import Path
from torch import nn
from mint.weights import fill, open_checkpoint
def resident(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
torch.zeros(8).bfloat16().float().numpy()
checkpoint = open_checkpoint(sys.argv[1])
model = nn.ParameterDict({name: nn.Parameter(torch.empty(info.shape, device="meta"))
                          for name, info in checkpoint.tensors.items()})
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
fill(model, checkpoint, device="cpu", dtype=getattr(torch, sys.argv[2]))
print((resident("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own count of resident memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_at_most_a_tenth_more_memory_than_the_model(tmp_path, dtype):
    size = 1 if dtype == "float32" else 2
    tensors = {f"w{place}": torch.ones(size * 2048, 2048, dtype=torch.bfloat16) for place in range(13)}
    folder = written(tmp_path, tensors)
    command = [sys.executable, "-c", _CHILD, str(folder), dtype]
    peak = float(
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    )
    assert 0.9 < peak <= 1.1
