"""The name of a checkpoint or an adapter to the folder that holds it: a folder itself, or a hub name through its cache.

The one door to `huggingface_hub`. Only files that were asked for are fetched; an interrupted download goes on where it
stopped. The token (HF_TOKEN, or a login), the cache (HF_HOME) and offline mode (HF_HUB_OFFLINE) are the hub's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..files import member
from ..progress import is_quiet

__all__ = ["FILES", "INDEX", "SINGLE", "SMALL_FILES", "find_folder", "has", "member"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
TEXT_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
SMALL_FILES = SETTINGS + TEXT_FILES
FILES = (*SMALL_FILES, "model*.safetensors", INDEX)


def find_folder(name: str | Path, files: Sequence[str]) -> Path:
    """The folder of `name`, which for a hub name gets the files that match the shell patterns `files`.

    A folder is what exists, is a `Path`, begins with `.`, `/` or `~`, or has several `/`; a hub name is `owner/model`.
    """
    path = Path(name).expanduser()
    if not _is_path(name):
        return _download(str(name), files)
    if not path.is_dir():
        found = "a file" if path.is_file() else "no such folder"
        raise CheckpointError(f"{path}: {found}; give the folder that holds its files, or a hub name like owner/model")
    return path


def _is_path(name: str | Path) -> bool:
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)


def _download(name: str, files: Sequence[str]) -> Path:
    # Imported here: a folder on disk needs nothing of it, and it takes longer to import than such a folder to open.
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if is_quiet():
        disable_progress_bars()
    # The base classes of its own HTTP error are those of whichever HTTP client it is built on.
    faults: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except errors.HFValidationError:
        mend = "neither a folder nor a hub name; give a folder that exists or owner/model"
    except errors.GatedRepoError:
        mend = f"access is gated; ask for it on the model's page, then set HF_TOKEN (page: {_page(name)})"
    except errors.RepositoryNotFoundError:
        mend = "no such folder and, for this token, no such model on the hub; check the spelling, or set HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        mend = _absent(huggingface_hub.constants.HF_HUB_OFFLINE)
    except faults as error:
        first = (str(error).splitlines() or [""])[0]
        mend = f"the download failed ({type(error).__name__}: {first[:200]}); type the same again to go on with it"
    raise CheckpointError(f"{name if name.isprintable() else ascii(name)}: {mend}")


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _absent(offline: bool) -> str:
    if offline:
        return "not a folder, and not complete in the hub's cache; unset HF_HUB_OFFLINE once, or give a folder"
    return "not a folder, and the hub cannot be reached; check the network, or give a folder that exists"


def has(folder: Path, name: str) -> bool:
    """Whether the folder has an entry of this name, even a link that leads nowhere."""
    return os.path.lexists(folder / name)
