"""Files made hostile: bytes changed, values of a form replaced, links that lead out, and small files that unpack to much.

`variant` knows a file's form by its name, so that what is wrong lies behind a header that is right.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PIECES = [b"", b"[", b"{", b'"', b"-1", b"1e999", b"null", b"true", b"9" * 30, b"../", b"NaN", b"\\ud800", b"\xff", b"\x00",
          b"\xff\xff\xff\x7f", b"\n", b"\r", b",", b"'|O'", b"\xff\xfe", b"[" * 2000]  # fmt: skip
NUMBERS = [
    -1,
    0,
    1,
    3,
    60_000,
    2**20,
    2**31 - 1,
    2**31,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    1e308,
    1e-320,
    float("inf"),
    float("nan"),
]
AWAY = [
    "../away/{}",
    "{away}/{}",
    "x/../../away/{}",
    "linked/{}",
    "..",
    ".",
    "/dev/zero",
    "/proc/self/environ",
    "~/{}",
    "\x00",
    "a" * 300,
]
WORDS = [
    "",
    " ",
    "id",
    "note",
    "F32",
    "BF16",
    "rm -rf",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "a\nb",
    "{}",
    "%s",
    "<|image|>",
    "x" * 5000,
]


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes replaced, cut, doubled, or moved; sometimes only the start is kept."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        span = draw.choice([0, 1, 1, 2, 4, 8, 40])
        new = draw.choice([draw.choice(PIECES), draw.randbytes(draw.choice([1, 2, 8])), data[start : start + span] * 2])
        data = data[:start] + new + data[start + span :]
    return data[: draw.randrange(len(data) + 1)] if draw.random() < 0.05 else data


def hostile(draw: random.Random, away: Path) -> Any:
    """A value that nobody wants: a number at an edge, a path that leads out, odd text, or another kind of thing."""
    path = draw.choice(AWAY).format(draw.choice(["model.safetensors", "config.json", "picture.png"]), away=away)
    return draw.choice(
        [draw.choice(NUMBERS), path, draw.choice(WORDS), None, True, [], {}, [[[]]], {"a": 1}, [2**62] * 4]
    )


def value_changed(value: Any, draw: random.Random, away: Path) -> Any:
    """One to three places of a JSON value replaced, swapped with another, renamed, taken away or doubled."""
    for _ in range(draw.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return hostile(draw, away)
        holder, key = draw.choice(places)
        other, there = draw.choice(places)
        match draw.randrange(5):
            case 0 | 1:
                holder[key] = hostile(draw, away)
            case 2:
                holder[key] = json.loads(json.dumps(other[there]))
            case 3:
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[str(hostile(draw, away))] = holder.pop(key)
            case _:
                holder.append(holder[key])
    return value


def _places(value: Any) -> Any:
    """(holder, key) of all that a JSON value holds; of long lists and tables only the first and last few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) < 60 else keys[:20] + keys[-20:]:
        yield value, key
        yield from _places(value[key])


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_variant(data: bytes, draw: random.Random, away: Path) -> bytes:
    return _encoded(value_changed(json.loads(data), draw, away))


def lines_variant(data: bytes, draw: random.Random, away: Path) -> bytes:
    lines = data.splitlines()
    number = draw.randrange(len(lines))
    row = json.loads(lines[number])
    if isinstance(row, dict) and "image" in row and draw.random() < 0.5:
        row["image"] = draw.choice(AWAY).format("picture.png", away=away)
        lines[number] = _encoded(row)
    else:
        lines[number] = json_variant(lines[number], draw, away)
    return b"\n".join(lines) + b"\n"


def tensors_variant(data: bytes, draw: random.Random, away: Path) -> bytes:
    """The header of a safetensors file changed and its length put right, so that shapes, offsets and names are looked at."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    match draw.randrange(6):
        case 0:  # one lies upon the other
            header[one]["data_offsets"] = list(header[other]["data_offsets"])
        case 1:
            header[one]["shape"] = [
                draw.choice([0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64]) for _ in range(draw.randint(0, 20))
            ]
        case 2:
            header[one]["data_offsets"] = [draw.choice([0, -8, 2**62, 2**64, len(body)]) for _ in range(2)]
        case 3:
            header[str(hostile(draw, away))] = header.pop(one)
        case 4 if "DCP_SHARDING_INFO" in header["__metadata__"]:  # where the parts of a state begin
            told = header["__metadata__"]
            told["DCP_SHARDING_INFO"] = json.dumps(value_changed(json.loads(told["DCP_SHARDING_INFO"]), draw, away))
        case _:
            header = value_changed(header, draw, away)
    text = _encoded(header)
    return len(text).to_bytes(8, "little") + text + body


def array_variant(data: bytes, draw: random.Random, _: Path) -> bytes:
    """Another header before the bytes of an array: objects to unpickle, shapes without end, types of all kinds."""
    kinds = ["|O", "<f4", "<f8", "|V16", "<U99999999", "|S0", "<m8[s]", "[('a','|O')]", "<c16", ">i8", "nothing"]
    shapes = [
        "(2**62,)",
        "(4611686018427387904, 4)",
        "(-1, 3)",
        "(4, 3)",
        "()",
        "(0,)",
        "(1,)*40",
        "(4, 3",
        "x",
        "10" * 200,
    ]
    kind = draw.choice(kinds)
    described = kind if kind.startswith("[") else repr(kind)
    order = draw.choice(["False", "True", "None", "__import__('os').getcwd()"])
    text = f"{{'descr': {described}, 'fortran_order': {order}, 'shape': {draw.choice(shapes)}, }}\n".encode()
    length = draw.choice([len(text)] * 4 + [0, 65535])
    return data[:6] + bytes([draw.choice([1, 1, 1, 2, 3, 9]), 0]) + struct.pack("<H", length) + text + data[128:]


def table_variant(data: bytes, draw: random.Random, away: Path) -> bytes:
    text = data.decode("utf-8-sig")
    mark = "\t" if "\t" in text else ","
    rows = list(csv.reader(io.StringIO(text), delimiter=mark))
    row = draw.choice([row for row in rows if row])
    row[draw.randrange(len(row))] = str(hostile(draw, away))
    if draw.random() < 0.3:
        row.extend(["x"] * draw.choice([1, 40, 3000]))
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def png_variant(data: bytes, draw: random.Random, _: Path) -> bytes:
    """Another size in the header, or a chunk that unpacks to much, with checksums that are right."""
    sides = [draw.choice([0, 1, 24, 8000, 65535, 2**31 - 1, 2**32 - 1]) for _ in range(2)]
    depth, colour = draw.choice([1, 8, 16, 3]), draw.choice([0, 2, 3, 4, 6, 9])
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", *sides, depth, colour, 0, 0, draw.choice([0, 1])))
    packed = _chunk(draw.choice([b"zTXt", b"iCCP", b"IDAT"]), b"a\x00\x00" + _packed_zeros(draw.choice([9, 1 << 24])))
    return data[:8] + draw.choice([head, head + packed, data[8:33] + packed]) + data[33:]


@cache
def _packed_zeros(count: int) -> bytes:
    return zlib.compress(bytes(count))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zip_variant(_: bytes, draw: random.Random, away: Path) -> bytes:
    """Members whose names lead out or come twice, links, and ones that unpack to much more than they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(draw.randint(1, 4)):
            name = draw.choice([f"{hostile(draw, away)}.json", "a.json", f"{number}/c.json"]).replace("\ud800", "")
            member = zipfile.ZipInfo(name.replace("\x00", "") or "a.json")
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = draw.choice([0, 0, 0o120777 << 16])
            if member.filename not in archive.namelist():
                data = draw.choice([b"{}", b"[" * 9000, bytes(20 << 20), str(away).encode()])
                archive.writestr(member, data, compresslevel=1)
    return file.getvalue()


def gzip_variant(data: bytes, draw: random.Random, away: Path) -> bytes:
    """Changed lines, packed; or packed blanks, or brackets, without end."""
    if draw.random() < 0.02:  # seldom: MINT reads megabytes of it, as it must
        return _packed_without_end(draw.choice([b" ", b"[", b"a,", b'{"id": "', b"\n"]), draw.choice([1, 8]) << 20)
    return gzip.compress(lines_variant(gzip.decompress(data), draw, away), 1)


@cache
def _packed_without_end(piece: bytes, count: int) -> bytes:
    return gzip.compress(piece * count, 1)


_FORMS: dict[str, Callable[[bytes, random.Random, Path], bytes]] = {
    ".json": json_variant,
    ".jsonl": lines_variant,
    ".safetensors": tensors_variant,
    ".npy": array_variant,
    ".csv": table_variant,
    ".tsv": table_variant,
    ".png": png_variant,
    ".zip": zip_variant,
    ".gz": gzip_variant,
}


def variant(name: str, data: bytes, draw: random.Random, away: Path) -> bytes:
    """A hostile version of a file that was good; `away` is the folder that nobody may reach."""
    form = _FORMS.get(Path(name).suffix)
    return bytes_changed(data, draw) if form is None or draw.random() < 0.5 else form(data, draw, away)


def link_instead(path: Path, draw: random.Random, away: Path) -> None:
    """Something else in the place of a file: a link out, to itself, to a device or a folder; a folder; a pipe."""
    (away / path.name).write_bytes(path.read_bytes())
    path.unlink()
    match draw.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case _:
            aims = [
                away / path.name,
                path,
                "/dev/zero",
                "/proc/self/mem",
                away,
                Path("..") / ".." / "away" / path.name,
                "nowhere",
            ]
            path.symlink_to(draw.choice(aims))


def put_back(path: Path, data: bytes) -> None:
    """The file as it was, whatever stands there now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)
