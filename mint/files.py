"""Writing without loss: everything is written beside its place and renamed, so a reader sees the old file or the new one.

Also JSON reading that names the file and the line of a fault, and the check that a name stays inside its folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import ConfigError, MintError, WorkError

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a new file beside `path`; on success it takes the place of `path`, on any error it is gone."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except OSError as error:
        raise WorkError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another place"
        ) from error
    finally:
        Path(beside).unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside `path`; on success it takes the place of `path`, on any error `path` is as it was."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from error
    old = beside.with_suffix(".old")
    try:
        yield beside
        os.chmod(beside, 0o777 & ~_umask())
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
    except OSError as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise WorkError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another place"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse_to_replace(folder: str | Path, mark: str) -> None:
    """Stop before a folder is replaced that is neither empty nor of the kind to be written, which holds a file `mark`."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / mark).exists() or not any(folder.iterdir()))):
        raise ConfigError(f"{folder}: exists and holds no {mark}; give a new folder with --out")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, error: Callable[[str], MintError] = ConfigError, limit: int = 64 << 20) -> Any:
    """The value of a JSON file of at most `limit` bytes; any fault is raised as `error`, named by file, line and column."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path}: {size:,} bytes, at most {limit:,} are read from a JSON file of this kind")
        text = path.read_bytes()
        value = json.loads(text)
        if _HALF.search(text):  # half of a surrogate pair is no character and cannot be written anywhere
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror})") from fault
    except json.JSONDecodeError as fault:
        raise error(f"{path}:{fault.lineno}:{fault.colno}: not JSON ({fault.msg})") from fault
    except UnicodeEncodeError:
        raise error(f"{path}: holds half of a surrogate pair, which is no character; write whole ones") from None
    except (ValueError, RecursionError) as fault:  # not UTF-8, a number of thousands of digits, nested too deeply
        raise error(f"{path}: not JSON ({type(fault).__name__})") from fault


def held(path: str | Path) -> int:
    """Open a file for this process alone, and keep it so until the handle is closed; another's is refused."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held, or renamed by the one who held it
    os.close(handle)
    raise ConfigError(f"{path}: another run is writing here; wait for it or give another --out")


def inside(folder: str | Path, name: str, error: Callable[[str], MintError] = ConfigError) -> Path:
    """The path of `name` in `folder`; a name that leads out of it (absolute, `..`) is refused."""
    folder = Path(folder)
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\x00" in name:
        raise error(f"{folder}: the name {name!r} leads out of its folder; only files inside it are read")
    return folder / name
