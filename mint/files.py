"""Writing without loss: everything is written beside its place and renamed, so a reader sees the old file or the new one.

Also JSON reading that names the file and the line of a fault, and the checks that a file belongs to its folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import CheckpointError, ConfigError, MintError, WorkError

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
    if not folder.exists() or (folder / mark).exists():
        return
    if not folder.is_dir() or any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ConfigError(f"{folder}: exists and holds no {mark}; give a new folder with --out")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def add_text(path: str | Path, text: str) -> None:
    """Add lines to the end of a file: the one kind of writing that a full disk can leave half done."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise WorkError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another --out"
        ) from error


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


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process: a second run into it is refused. What a killed one left half done is put right."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = held(folder / ".lock")
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    try:
        _put_right(folder)
        yield
    finally:
        os.close(handle)


def _put_right(folder: Path) -> None:
    """Take away what a killed process left half written, and put back a folder that it was about to replace."""
    for old in folder.glob(".*.old"):
        place = folder / old.name[1:].rsplit(".", 2)[0]
        if not os.path.lexists(place):
            os.replace(old, place)
    for left in (*folder.glob(".*.part"), *folder.glob(".*.old")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Hold the name of a folder that will be replaced whole, so that a second run is refused before its work."""
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = held(lock)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror}); give another --out") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def inside(folder: str | Path, name: str, error: Callable[[str], MintError] = ConfigError) -> Path:
    """The path of `name` in `folder`; a name that leads out of it (absolute, `..`) is refused."""
    folder = Path(folder)
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\x00" in name:
        raise error(f"{folder}: the name {name!r} leads out of its folder; only files inside it are read")
    return folder / name


def lies_in(path: str | Path, homes: Iterable[str]) -> bool:
    """Whether a path, wherever its links lead, lies in one of the folders, whose own links are resolved."""
    real = os.path.join(os.path.realpath(path), "")
    return any(real.startswith(os.path.join(home, "")) for home in homes)


def member(folder: str | Path, name: str) -> Path:
    """The path of the file `name` of a checkpoint folder, made sure to be a regular file that belongs to the folder.

    Links may stay inside the folder or, in the hub's cache, lead from models--X/snapshots/REVISION to models--X/blobs.
    """
    path = inside(folder, name, CheckpointError)
    try:
        home = Path(os.path.realpath(folder))
        cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
        homes = (home, home.parent.parent / "blobs") if cached else (home,)
        if not lies_in(path, map(str, homes)):
            raise CheckpointError(f"{path}: a link that leads out of its folder; put the file itself there")
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        what = f"{name[:200]!a} cannot be read ({reason})"
        raise CheckpointError(f"{folder}: {what}; fetch the folder again") from error
    if not regular:
        raise CheckpointError(f"{path}: not a file; fetch the folder again")
    return path


def optional_member(folder: str | Path, name: str) -> Path | None:
    """The same, or None where the folder has nothing of that name."""
    return member(folder, name) if os.path.lexists(Path(folder) / name) else None


def member_object(folder: str | Path, name: str, limit: int = 64 << 20) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint folder; empty where the folder has no such file."""
    path = optional_member(folder, name)
    found = {} if path is None else read_json(path, CheckpointError, limit)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}; wanted an object, fetch the file again")
    return found
