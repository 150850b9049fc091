"""Checkpoints written: byte for byte what the format's own writer writes, opened by transformers, never half there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mint.errors import CheckpointError, ConfigError
from mint.weights import open_checkpoint
from mint.weights.shards import write_checkpoint
from mint.weights.tensorfiles import DTYPES


def of_all_kinds() -> dict[str, Tensor]:
    made = {f"t.{code}.é": torch.arange(6).reshape(3, 2).to(dtype) for code, dtype in DTYPES.items()}
    return made | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "bits": torch.tensor([True, False, True])}


def test_a_single_file_has_the_bytes_that_the_formats_own_writer_gives(tmp_path):
    tensors = of_all_kinds()
    write_checkpoint(tmp_path / "ours", reversed(tensors.items()), {})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    write_checkpoint(tmp_path / "new", [("t", base.T), ("v", base[1:, ::2].requires_grad_())], {})
    read = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(read["t"], base.T)
    assert torch.equal(read["v"], base[1:, ::2])


def test_shards_keep_to_their_size_and_the_index_names_them_all(tmp_path):
    tensors = {f"w{place}": torch.full((10,), float(place)) for place in range(7)} | {"big": torch.ones(100)}
    write_checkpoint(tmp_path / "new", tensors.items(), {"a": 1}, shard_bytes=100)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 7 * 40 + 400}
    assert sorted(set(index["weight_map"].values())) == [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    assert set(index["weight_map"]) == set(tensors)
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "new" / shard, "pt") as file:
            assert torch.equal(file.get_tensor(name), tensors[name])
    assert set(open_checkpoint(tmp_path / "new").tensors) == set(tensors)


def test_one_tensor_at_a_time_is_asked_for(tmp_path):
    alive = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal alive
        for place in range(5):
            alive += 1
            assert alive == 1
            yield f"w{place}", torch.zeros(4)
            alive -= 1

    write_checkpoint(tmp_path / "new", tensors(), {}, shard_bytes=40)


def test_an_error_on_the_way_leaves_the_old_folder_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "model", [("a", torch.ones(2))], {"old": True})

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(2)
        raise CheckpointError("the base is broken")

    with pytest.raises(CheckpointError, match="the base is broken"):
        write_checkpoint(tmp_path / "model", failing(), {"old": False})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert open_checkpoint(tmp_path / "model").config == {"old": True}


def test_a_checkpoint_may_be_written_over_the_one_it_is_read_from(tmp_path):
    write_checkpoint(tmp_path / "m", [("a", torch.ones(2)), ("b", torch.ones(3))], {})
    (tmp_path / "m" / "tokenizer.json").write_text("words")
    checkpoint = open_checkpoint(tmp_path / "m")

    def doubled() -> Iterator[tuple[str, Tensor]]:
        for name, info in checkpoint.tensors.items():
            out = torch.empty(info.shape)
            checkpoint.read(name, out)
            yield name, out * 2

    write_checkpoint(tmp_path / "m", doubled(), {}, copy_from=tmp_path / "m")
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["b"], torch.full((3,), 2.0))
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "words"


def test_tokenizer_and_generation_files_are_copied_and_others_are_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    wanted = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "merges.txt"]
    for name in [*wanted, "config.json", "model.safetensors", "run.py", ".env"]:
        (source / name).write_text(name)
    write_checkpoint(tmp_path / "new", [("a", torch.ones(1))], {"a": 1}, copy_from=source)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {*wanted, "config.json", "model.safetensors"}
    assert (tmp_path / "new" / "merges.txt").read_text() == "merges.txt"
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"a": 1}


def test_a_link_out_of_the_source_is_not_copied(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        write_checkpoint(tmp_path / "new", [("a", torch.ones(1))], {}, copy_from=tmp_path / "source")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match=r"exists and holds no config\.json; give a new folder with --out"):
        write_checkpoint(tmp_path, [("a", torch.ones(1))], {})
    with pytest.raises(ConfigError, match="exists and holds no"):
        write_checkpoint(tmp_path / "thesis.tex", [("a", torch.ones(1))], {})
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tensor a is written twice"):
        write_checkpoint(tmp_path / "new", [("a", torch.ones(1))] * 2, {})


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    child = (
        "import resource, signal, sys, torch\n"
        "from mint.errors import WorkError\n"
        "from mint.weights.shards import write_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    write_checkpoint(sys.argv[1], [('a', torch.ones(50_000))], {})\n"
        "except WorkError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", child, str(tmp_path / "new")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "cannot be written (File too large)" in answer.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_what_is_written_with_the_same_logits(tmp_path, shard_bytes, tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    assert ("lm_head.weight" in source.tensors) is not tied
    tensors = {name: model.state_dict()[name] for name in source.tensors}
    write_checkpoint(
        tmp_path / "ours", tensors.items(), source.config, copy_from=source.folder, shard_bytes=shard_bytes
    )
    assert (tmp_path / "ours" / "model.safetensors").exists() is (shard_bytes > 1e6)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(30).reshape(2, 15)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
