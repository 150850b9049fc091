"""Text to ids and back. The one door to `tokenizers`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from .errors import CheckpointError

_LIMIT = 256 << 20


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its `tokenizer.json`."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json; copy the tokenizer files of the model into this folder")
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, at most {_LIMIT:,} are read")
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:  # tokenizers raises bare Exception, and a Rust panic is a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{path}: not a tokenizer file ({error}); fetch it again") from error
