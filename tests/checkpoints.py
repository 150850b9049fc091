"""Small checkpoints in the official layout, made with transformers, for the oracles of the tests.

Weights are drawn wide (std 0.3) and heads are 64 wide, so that a wrong factor, order or mask shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|finetune_right_pad_id|>",
    "<|image|>",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [
    "t h",
    "th e",
    "i n",
    "e r",
    "a n",
    "Ġ a",
    "Ġ t",
    "o n",
    "Ċ Ċ",
    "Ġ s",
    "u s",
    "us er",
    "a s",
    "s i",
    "Ġ the",
    "Ġt h",
]


def tokenizer() -> Tokenizer:
    """Byte-level BPE as Llama 3's: the same splitting rule, ignore_merges, and its special tokens."""
    letters = sorted(ByteLevel.alphabet())
    merges = [tuple(merge.split()) for merge in MERGES]
    words = letters + ["".join(merge) for merge in merges]
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))

    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[begin]
    )
    return made


def write_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json and tokenizer_config.json, as they lie in an official folder."""
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


def llama_config(**changes: Any) -> Any:
    """The transformers config of a tiny Llama 3.2: grouped heads of 64, stretched positions."""
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaConfig(**{**settings, **changes})


def write_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.3,
    shards: str = "5GB",
    **changes: Any,
) -> Path:
    """A Llama folder: weights, config, tokenizer; every matrix of that std, norms not all one."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    made = write_tokenizer(folder)
    ids = {"bos_token_id": made.token_to_id("<|begin_of_text|>"), "eos_token_id": made.token_to_id("<|eot_id|>")}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**{**ids, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.3) if "norm" in name else parameter.normal_(0.0, std)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder
