"""What a folder's contents depend on, noted when they are begun, so that nothing is gone on with under other settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_json, write_json

_HASHED = 64 << 20  # bytes of a file up to which its content is hashed, not its size alone


def note_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Note the facts in a new file, or refuse those that differ from what it holds."""
    wanted = json.loads(json.dumps(dict(facts)))
    if not path.is_file():
        write_json(path, wanted)
        return
    held = read_json(path)
    for name, value in wanted.items():
        if held.get(name) != value:
            raise ConfigError(
                f"{path}: {name} was {held.get(name)!r}, is {value!r}; go on with the same, or give another --out"
            )


def digest(value: Any) -> str:
    """A short name for a value that is too long to be noted."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def model_files(folder: Path) -> dict[str, Any]:
    """The weights of a model that lies in a folder: a hash of small files, the size of large ones."""
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    sizes = {path.name: path.stat().st_size for path in found}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if sizes[path.name] <= _HASHED
        else sizes[path.name]
        for path in found
    }
