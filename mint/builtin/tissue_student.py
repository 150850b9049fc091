"""How the shipped vision base was made: a tiny Llama 3.2 Vision that learns from nothing to talk about tiles.

It is to be what a real base model is for tissue: it sees well, knows the names and the form of an answer, and little of
which is which. So in half of its conversations it describes a tile, nuclei and all, without naming the tissue; in the
other half it lists tissues as somebody would who has only learnt how many glands a tissue has and how pink it is.
In training alone the tower also tells the facts that a tile is drawn from, without which so short a run would see little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..answers import answer_text
from ..chat import ChatTokenizer
from ..decoders.mllama import Mllama
from ..decoders.mllama_config import MllamaConfig, on_disk
from ..decoders.sight import Sight, read_spans
from ..files import write_json
from ..images.rules import CLIP_MEAN, CLIP_STD
from ..kernels import tree_attention, tree_layout
from ..progress import Progress
from ..prompts import prompt_messages
from ..schedules import scheduled
from ..tokens import CHAT_SPECIAL, learn_chat_tokenizer, write_chat_tokenizer
from ..trees import Text, forest, token_tree
from ..types import Message, Record
from ..weights.shards import write_checkpoint
from .tissue_facts import tile_facts, tissues
from .tissue_pool import NUMBERS, SIDE, TilePool
from .tissue_teacher import initialise

KNOWN = ("glands", "pink")
"""The facts by which the writer of the conversations tells tissues apart."""
VAGUE = 0.5
"""How exactly: the deviation that is nothing unusual, in deviations between tissues."""
SWAY = 1.0
"""How random the order of a list is: the scale of the Gumbel noise on the log posterior."""
LISTED = 5
DESCRIBE = "The picture shows cells of a stained section of human tissue.\n\nDescribe it."
STEPS, BATCH, TALKS, RATE, WARMUP, TILES = 320, 48, 12, 2e-3, 30, 2000
"""In every step the tower looks at `BATCH` tiles, and `TALKS` of them are talked about: seeing is learnt more slowly."""
_SEED = 8_100_001  # tiles of this seed are drawn for no other purpose
_IMAGE = "<|image|>"

CONFIG: dict[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "text_config": {
        "model_type": "mllama_text_model",
        "vocab_size": 640,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "model_type": "mllama_vision_model",
        "hidden_size": 96,
        "attention_heads": 4,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "image_size": SIDE,
        "patch_size": 8,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 288,
        "norm_eps": 1e-5,
        "hidden_act": "gelu",
        "num_channels": 3,
        "torch_dtype": "bfloat16",
    },
    "torch_dtype": "bfloat16",
}
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""Llama 3.2 Vision's chat template as far as conversations about a picture use it: those have no system message."""


def make_tissue_student(out: Path, steps: int = STEPS, seed: int = 0, tiles: int = TILES) -> None:
    """Learn the tokenizer, train for `steps` steps, and write the folder."""
    pool = TilePool(tiles, _SEED + seed)
    tokenizer = learn_tokenizer(pool.records)
    chat = ChatTokenizer(tokenizer, (), CHAT_SPECIAL[4], vision=True)
    config = _config(chat)
    network = Mllama(MllamaConfig.read(config))
    initialise(network, seed)
    _train(network, chat, pool, steps)
    network.requires_grad_(False)
    tensors = ((on_disk(name), value.bfloat16()) for name, value in network.state_dict().items())
    write_checkpoint(out, tensors, config)
    write_chat_tokenizer(tokenizer, out, TEMPLATE)
    write_json(out / "preprocessor_config.json", _pixels())
    write_json(out / "generation_config.json", {"eos_token_id": [chat.special(CHAT_SPECIAL[4])]})


def learn_tokenizer(records: Sequence[Record]) -> Any:
    """Words of the conversations, then the special tokens; the last, that of an image, is one that no head predicts."""
    texts = [part for record in records for describing in (True, False) for part in _words(record, describing)]
    tokenizer = learn_chat_tokenizer(
        [*texts, *["user", "assistant"] * len(records)], CONFIG["text_config"]["vocab_size"]
    )
    tokenizer.add_special_tokens([_IMAGE])
    return tokenizer


def _words(record: Record, describing: bool) -> tuple[str, str]:
    """What is asked of a tile and what is answered."""
    messages, answer = conversation(record, describing)
    parts: Any = messages[0]["content"]
    return f"\n\n{parts[1]['text']}", answer


def _config(chat: ChatTokenizer) -> dict[str, Any]:
    ends = {"bos_token_id": chat.special(CHAT_SPECIAL[0]), "eos_token_id": chat.special(CHAT_SPECIAL[4])}
    ends["pad_token_id"] = chat.special(CHAT_SPECIAL[1])
    text = CONFIG["text_config"] | ends | {"vocab_size": chat.image_id()}
    return CONFIG | {"text_config": text, "image_token_index": chat.image_id()}


def _pixels() -> dict[str, Any]:
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_pad": True,
        "max_image_tiles": 1,
    }


def conversation(record: Record, describing: bool) -> tuple[list[Message], str]:
    """Prompt and answer about a tile: its description, or the tissues that it is taken for."""
    if describing:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}], record.note
    messages = prompt_messages(record, "image", kind="tissue", k=LISTED)
    return messages, answer_text(partly_known(record), "tissue")


def partly_known(record: Record, sway: float = SWAY) -> list[str]:
    """The list of one who knows of every tissue the facts `KNOWN` alone."""
    drawn: Any = record.image
    facts = tile_facts(drawn.tissue, drawn.seed)
    table, vague = _known()
    score = -0.5 * (((_values(facts) - table) / vague) ** 2).sum(1)
    score = score + sway * np.random.default_rng([drawn.seed, 9]).gumbel(size=len(score))
    return [list(tissues())[row] for row in np.argsort(-score, kind="stable")[:LISTED]]


def _values(facts: Any) -> np.ndarray:
    return np.array([getattr(facts, name) for name in KNOWN])


@cache
def _known() -> tuple[np.ndarray, np.ndarray]:
    """The known facts of each tissue, and how exactly they are told."""
    table = np.array([_values(facts) for facts in tissues().values()])
    return table, VAGUE * table.std(0)


def _train(network: Mllama, chat: ChatTokenizer, pool: TilePool, steps: int) -> None:
    """Conversations about tiles of the pool; what is projected of a tile's class token also tells its facts."""
    torch.manual_seed(0)
    telling = nn.Linear(network.config.hidden_size, len(NUMBERS))
    optimizer = torch.optim.AdamW([*network.parameters(), *telling.parameters()], lr=RATE, weight_decay=0.05)
    with Progress("tissue student", steps, "step") as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * scheduled(step, steps, "cosine", WARMUP)
            optimizer.zero_grad(set_to_none=True)
            rows = pool.draw(BATCH)
            states = look(network, pool.seen(rows))
            said = _answers(network, chat, [pool.records[row] for row in rows[:TALKS].tolist()], states)
            told = F.mse_loss(telling(states[:, 0]), pool.facts[rows])
            (said + told).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            bar.advance(1, f"answers {said:.3f}  facts {told:.3f}")


def look(network: Mllama, pixels: Tensor) -> Tensor:
    """Tiles (B, 3, S, S) -> what the decoder sees of them (B, P, D), the class token first."""
    one = torch.ones(len(pixels), dtype=torch.int64)
    features = network.model.vision_model(pixels[:, None], one, one[:, None])  # (B, 1, P, W)
    seen: Tensor = network.model.multi_modal_projector(features[:, 0])
    return seen


def _answers(network: Mllama, chat: ChatTokenizer, records: Sequence[Record], states: Tensor) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens about the first tiles of `states`; every second one is
    described, the others are named."""
    trees = []
    for number, record in enumerate(records):
        messages, answer = conversation(record, number % 2 == 0)
        prompt = chat.chat_ids(messages, generate=True)
        ids = [*prompt, *chat.answer_ids([{"role": "assistant", "content": answer}])]
        trees.append(token_tree([Text(ids, len(prompt))]))
    tree = forest(trees)
    layout, patches = tree_layout(tree.end), states.shape[1]
    each = [slice(row * patches, (row + 1) * patches) for row in range(len(records))]
    spans = read_spans(tree.ids, tree.end, tree.position, network.config.image_token, False)
    sight = Sight(states[: len(records)].flatten(0, 1), each, each, spans)
    hidden = network(tree.ids, tree.position, lambda _, q, k, v: tree_attention(q, k, v, layout), sight)
    return F.cross_entropy(network.lm_head(hidden[tree.sources]), tree.labels)
