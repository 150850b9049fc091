"""Text to ids and back. The one door to `tokenizers`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from .errors import CheckpointError
from .files import member, member_object, optional_member, read_json, write_json, write_text

_LIMIT = 256 << 20


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its `tokenizer.json`."""
    path = optional_member(folder, "tokenizer.json")
    if path is None:
        raise CheckpointError(f"{folder}: no tokenizer.json; copy the tokenizer files of the model into this folder")
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, at most {_LIMIT:,} are read")
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:  # tokenizers raises bare Exception, and a Rust panic is a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{path}: not a tokenizer file ({error}); fetch it again") from error


# ---- what the encoders read: whole texts, cut and padded -----------------------------------------------------------

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Texts:
    """A tokenizer for batches of texts: cut at `longest` tokens with the end token kept, padded to the longest."""

    def __init__(self, tokenizer: Tokenizer, longest: int, pad: str, folder: str | Path = "") -> None:
        pad_id = tokenizer.token_to_id(pad)
        if pad_id is None:
            raise CheckpointError(f"{folder}: the tokenizer has no {pad} token; copy the model's own tokenizer files")
        tokenizer.enable_truncation(longest)
        tokenizer.enable_padding(pad_id=pad_id, pad_token=pad)
        self.tokenizer, self.pad_id = tokenizer, int(pad_id)

    def __len__(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """n texts -> ids (n, T) and mask (n, T), int64."""
        found = self.tokenizer.encode_batch_fast([text.encode("utf-8", "replace").decode() for text in texts])
        ids = torch.tensor([encoding.ids for encoding in found])
        return ids, torch.tensor([encoding.attention_mask for encoding in found])


def open_bert_texts(folder: str | Path, longest: int) -> Texts:
    """BERT's tokenizer of a checkpoint folder, from `tokenizer.json` or from `vocab.txt`."""
    vocabulary = optional_member(folder, "vocab.txt")
    if vocabulary is None or optional_member(folder, "tokenizer.json"):
        return Texts(open_tokenizer(folder), longest, "[PAD]", folder)
    words = _read_lines(vocabulary)
    missing = sorted(set(BERT_SPECIAL) - set(words))
    if missing:
        raise CheckpointError(f"{vocabulary}: no line {', '.join(missing)}; copy the model's own vocab.txt")
    table = {word: row for row, word in enumerate(words)}
    return Texts(_bert(table, member_object(folder, "tokenizer_config.json")), longest, "[PAD]", folder)


def open_clip_texts(folder: str | Path, longest: int) -> Texts:
    """CLIP's tokenizer of a checkpoint folder, from `tokenizer.json` or from `vocab.json` and `merges.txt`.

    Texts are padded with the end token: whichever way the network looks for the end, the first one is found.
    """
    path = optional_member(folder, "vocab.json")
    if path is None or optional_member(folder, "tokenizer.json"):
        return Texts(open_tokenizer(folder), longest, CLIP_END, folder)
    table = read_json(path, CheckpointError)
    if not isinstance(table, dict) or not all(type(row) is int and row >= 0 for row in table.values()):
        raise CheckpointError(f"{path}: not a table of word to number; copy the model's own vocab.json")
    if not {CLIP_START, CLIP_END} <= set(table):
        raise CheckpointError(f"{path}: no {CLIP_START} and {CLIP_END}; copy the model's own vocab.json")
    return Texts(_clip(table, _read_merges(member(folder, "merges.txt"), table)), longest, CLIP_END, folder)


def _read_merges(path: Path, table: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_lines(path), 1):
        if line and not line.startswith("#version"):
            first, _, second = line.partition(" ")
            if not (first in table and second in table and first + second in table):
                raise CheckpointError(f"{path}:{number}: {line!r} is not in vocab.json; fetch both files again")
            merges.append((first, second))
    return merges


def learn_words(texts: Iterable[str], size: int) -> Tokenizer:
    """A BERT tokenizer whose vocabulary is the most frequent words of `texts`, and all letters to spell the others."""
    empty = _bert(dict.fromkeys(BERT_SPECIAL, 0), {})
    counts: Counter[str] = Counter()
    for text in texts:
        normal = empty.normalizer.normalize_str(text)
        counts.update(word for word, _ in empty.pre_tokenizer.pre_tokenize_str(normal))
    letters = sorted(set().union(*counts))
    pieces = [*BERT_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    pieces += [word for word in ranked if len(word) > 1][: max(0, size - len(pieces))]
    return _bert({piece: row for row, piece in enumerate(pieces)}, {})


def write_bert_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """`tokenizer.json`, `vocab.txt` and `tokenizer_config.json`, as a BERT checkpoint has them."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    table = tokenizer.get_vocab()
    write_text(folder / "vocab.txt", "".join(f"{word}\n" for word in sorted(table, key=table.__getitem__)))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {"do_lower_case": True, "model_max_length": longest, "tokenizer_class": "BertTokenizer"}
    write_json(folder / "tokenizer_config.json", settings | dict(zip(names, BERT_SPECIAL, strict=True)))


def _bert(table: dict[str, int], settings: Mapping[str, Any]) -> Tokenizer:
    """Lower case, accents off, Chinese characters apart, words cut greedily into pieces: [CLS] pieces [SEP]."""
    tokenizer = Tokenizer(WordPiece(table, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    ends = [(name, table[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.add_special_tokens(list(BERT_SPECIAL))
    return tokenizer


def learn_clip_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of at most `size` tokens in CLIP's manner, its merges learnt from `texts`; any text can be written."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    bare = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bare.normalizer, bare.pre_tokenizer = _clip_normalizer(), _clip_words()
    trainer = BpeTrainer(  # merges that are equally frequent go by number, and `special_tokens` numbers the alphabet
        vocab_size=size - 2, special_tokens=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bare.train_from_iterator(texts, trainer)
    merges = [(first, second) for first, second in json.loads(bare.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*alphabet, *(first + second for first, second in merges), CLIP_START, CLIP_END])
    return _clip({piece: row for row, piece in enumerate(pieces)}, merges)


def write_clip_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """`tokenizer.json`, `vocab.json`, `merges.txt` and `tokenizer_config.json`, as a CLIP checkpoint has them."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    model = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in model["merges"])]
    write_text(folder / "merges.txt", "".join(f"{line}\n" for line in lines))
    settings = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    more = {"model_max_length": longest, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", settings | more)


def _clip_normalizer() -> Any:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def _clip_words() -> Any:
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _clip(table: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Lower case, spaces collapsed, byte-level merges with `</w>` at word ends: start, pieces, end."""
    tokenizer = Tokenizer(BPE(vocab=table, merges=merges, end_of_word_suffix="</w>", unk_token=CLIP_END))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _clip_normalizer(), _clip_words()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, table[CLIP_END]), (CLIP_START, table[CLIP_START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


def _read_lines(path: Path) -> list[str]:
    """The lines of a vocabulary file, in order."""
    try:
        if path.stat().st_size > _LIMIT:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, at most {_LIMIT:,} are read")
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy the model's own") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error.reason}); fetch it again") from error


# ---- what the decoders read: conversations in the manner of Llama 3 ------------------------------------------------

CHAT_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHAT_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learn_chat_tokenizer(texts: Iterable[str], size: int, phrases: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` tokens in Llama 3's manner, its merges learnt from `texts`.

    Any text can be written with it, for all 256 bytes are tokens. Each of the `phrases` (plain ASCII) is one token wherever
    it stands. The special tokens come last.
    """
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(_CHAT_WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=size - len(CHAT_SPECIAL) - len(phrases), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.add_special_tokens(list(CHAT_SPECIAL))
    begin = CHAT_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def write_chat_tokenizer(tokenizer: Tokenizer, folder: Path, template: str) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as a Llama 3 checkpoint has them; `template` is the chat template."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    settings = {"bos_token": CHAT_SPECIAL[0], "eos_token": CHAT_SPECIAL[4], "clean_up_tokenization_spaces": False}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    write_json(folder / "tokenizer_config.json", settings)
