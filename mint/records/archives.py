"""The JSON files of a zip, one at a time in memory and none on disk, so that no member can name a place outside."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ..errors import RecordError
from ..files import inside
from .sources import Located, parsed

MEMBER_LIMIT = 16 << 20
TOTAL_LIMIT = 4 << 30
DIRECTORY_LIMIT = 32 << 20
_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, ValueError, OverflowError)
# RuntimeError: encrypted; NotImplementedError, a RuntimeError: an unknown method; ValueError: a name that is no text.


def zip_values(path: Path) -> Iterator[Located]:
    """The value of each .json member; a member that is too large, linked, broken or leads out is an error."""
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            left = TOTAL_LIMIT
            for member in archive.infolist():
                if not _wanted(member.filename):
                    continue
                where = f"{path}!{' '.join(member.filename.split())}"
                data = _contents(archive, member, path, where)
                left -= MEMBER_LIMIT if isinstance(data, RecordError) else len(data)
                if left < 0:
                    raise RecordError(f"{path}: unpacks to more than {TOTAL_LIMIT:,} bytes; split it into smaller ones")
                yield where, data if isinstance(data, RecordError) else parsed(data, where)
    except _FAULTS as fault:
        raise RecordError(f"{path}: not a zip that can be read ({fault}); pack or fetch it again") from fault


def _contents(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, where: str) -> bytes | RecordError:
    try:
        inside(path, member.filename, RecordError)
        if stat.S_ISLNK(member.external_attr >> 16):
            return RecordError(f"{where}: a link, a file was wanted; pack the file itself")
        with archive.open(member) as file:
            data = file.read(MEMBER_LIMIT + 1)
    except RecordError as error:
        return error
    except _FAULTS as fault:
        return RecordError(f"{where}: cannot be unpacked ({fault}); pack or fetch it again")
    if len(data) > MEMBER_LIMIT:
        return RecordError(f"{where}: more than {MEMBER_LIMIT:,} bytes, at most that many are read of a phenopacket")
    return data


def _wanted(name: str) -> bool:
    """A JSON file, and none of the shadow files that macOS packs beside every file."""
    last = name.rsplit("/", 1)[-1]
    return last.lower().endswith(".json") and not last.startswith(".") and not name.startswith("__MACOSX/")


class _BoundedFile(FileIO):
    """A file of which no single read is larger than a zip's directory may be: a false size in it takes no memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_LIMIT:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes, at most {DIRECTORY_LIMIT:,} are read")
        return super().read(DIRECTORY_LIMIT if size is None or size < 0 else size) or b""
