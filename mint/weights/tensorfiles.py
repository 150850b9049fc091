"""The safetensors format: what lies where in a file (read strictly), bytes into memory that exists, and files written.

A file is 8 bytes of header length N (little-endian), N bytes of JSON, and the tensors' bytes without gap or overlap.
Files are never mapped into memory: mapped pages count as resident, and a model would be there twice while it loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from ..errors import CheckpointError

# Ordered as the format's own writer orders tensors: by this list, then by name, so that every tensor lies aligned.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}

HEADER_LIMIT = 100_000_000
_CHUNK = 2 << 20  # bytes staged at a time where a tensor cannot be read straight into its place
_PIECE = 64 << 20  # bytes asked of the system in one read


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: row-major from byte `offset` of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, rows: slice | None) -> TensorInfo:
        """The part of this tensor whose first index lies in `rows` (step 1)."""
        if rows is None:
            return self
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows of {self.name} are read in order, not in steps of {step}")
        stop = max(start, stop)
        offset = self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=offset)

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def shown(name: str) -> str:
    """A name out of a file as it may stand in a one-line message."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def said(value: Any) -> str:
    """A value out of a file as it may stand in a one-line message; what is nested is only named."""
    if isinstance(value, dict) or (isinstance(value, list) and not all(type(item) is int for item in value)):
        return f"a {type(value).__name__} of {len(value)}"
    return shown(str(value))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, in the order of its bytes; a file that breaks the format anywhere is refused."""
    return read_described(path)[0]


def read_described(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The same, and the file's table of strings about itself."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                _refuse(path, f"a header of {length:,} bytes in a file of {size:,}: cut off or not safetensors")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    entries = _parse(path, header)
    metadata: dict[str, str] = entries.pop("__metadata__", {})
    infos = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, infos, 8 + length, size)
    return {info.name: info for info in infos}, metadata


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}; download or save the file again")


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands there twice")
        return found

    try:
        entries = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"the header is not valid JSON ({shown(str(error))})")
    if not header.startswith(b"{") or not isinstance(entries, dict):
        _refuse(path, "the header is not a JSON object")
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ is not a table of strings")
    return entries


def _entry(path: Path, name: str, entry: Any, body: int) -> TensorInfo:
    """One line of the header, checked: `body` is where the tensors' bytes begin."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {shown(name)} is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        _refuse(path, f"tensor {shown(name)} has the dtype {said(code)}, known are {' '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 16:
        _refuse(path, f"tensor {shown(name)} has the shape {said(shape)}, wanted at most 16 sizes of 0 or more")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"tensor {shown(name)} has the data_offsets {said(offsets)}, wanted a begin and an end")
    info = TensorInfo(name, tuple(shape), DTYPES[code], path, body + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        _refuse(path, f"tensor {shown(name)} ({info}) needs {info.nbytes} bytes, has {offsets[1] - offsets[0]}")
    return info


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_coverage(path: Path, infos: list[TensorInfo], body: int, size: int) -> None:
    """The tensors follow one another without gap or overlap and end where the file ends."""
    end = body
    for info in infos:
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            _refuse(path, f"tensor {shown(info.name)} {fault}")
        end = info.offset + info.nbytes
    if end != size:
        _refuse(path, f"the header describes {end:,} bytes and the file has {size:,}: cut off or overwritten")


class TensorReader:
    """Reads tensors from files into memory that exists already; holds one open file and one small buffer."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, info: TensorInfo, out: Tensor, rows: slice | None = None, columns: slice | None = None) -> None:
        """Fill `out` (its device, its dtype) with the tensor, or with those rows and columns of it."""
        info, out = info.rows(rows), out.detach()
        columns = slice(None) if columns is None or columns == slice(0, info.shape[1]) else columns
        wanted = (info.shape[0], len(range(*columns.indices(info.shape[1])))) if columns != slice(None) else info.shape
        if tuple(out.shape) != wanted:
            raise CheckpointError(f"{info.file}: tensor {shown(info.name)} is {list(wanted)}, wanted {list(out.shape)}")
        if columns == slice(None) and out.is_contiguous():
            info, out = replace(info, shape=(out.numel(),)), out.view(-1)
            if out.dtype == info.dtype and out.device.type == "cpu":
                self._fill(info, info.offset, out)
                return
        self._through_buffer(info, out, columns)

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors hold the same numbers, the other in the dtype of the one."""
        count = math.prod(one.shape)
        one, other = replace(one, shape=(count,)), replace(other, shape=(count,))
        for start in range(0, count, _CHUNK):
            rows = slice(start, min(start + _CHUNK, count))
            values = torch.empty(2, rows.stop - start, dtype=one.dtype, device="cpu")
            self.read(one, values[0], rows)
            self.read(other, values[1], rows)
            if raw(values[0]) != raw(values[1]):
                return False
        return True

    def _through_buffer(self, info: TensorInfo, out: Tensor, columns: slice) -> None:
        """Some rows at a time: read, moved to the device, cast, put in place; before and after the columns nothing is read."""
        if not out.numel():
            return
        whole, item = info.nbytes // info.shape[0], info.dtype.itemsize
        skip, row = 0, whole
        if columns != slice(None):
            first, last, stride = columns.indices(info.shape[1])
            skip, row, columns = first * item, (last - first) * item, slice(None, None, stride)
        step = max(1, _CHUNK // row)
        for start in range(0, info.shape[0], step):
            part = info.rows(slice(start, start + step))
            chunk = self._staging(max(row, _CHUNK), out.is_cuda)[: part.shape[0] * row]
            self._fill_rows(part, skip, chunk.view(part.shape[0], row))
            values = chunk.view(info.dtype).view(part.shape[0], -1) if len(info.shape) > 1 else chunk.view(info.dtype)
            if columns != slice(None):
                values = values[:, columns]
            out[start : start + step].copy_(values.reshape(out[start : start + step].shape).to(out.device))

    def _fill_rows(self, info: TensorInfo, skip: int, out: Tensor) -> None:
        """Some bytes of each row, after the first `skip`: out (rows, bytes). Whole rows are read together."""
        whole = info.nbytes // info.shape[0]
        if out.shape[1] == whole:
            self._fill(info, info.offset, out.view(-1))
            return
        for at, place in enumerate(out):
            self._fill(info, info.offset + at * whole + skip, place)

    def _staging(self, size: int, pinned: bool) -> Tensor:
        if self._buffer.numel() < size or self._buffer.is_pinned() != pinned:
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        return self._buffer

    def _fill(self, info: TensorInfo, offset: int, out: Tensor) -> None:
        """Read as many bytes as `out` (1-D, contiguous, on the CPU) has."""
        place = out.view(torch.uint8).numpy().data
        try:
            file = self._open(info.file)
            file.seek(offset)
            while len(place):
                count = file.readinto(place[:_PIECE])  # type: ignore[attr-defined]
                if not count:
                    _refuse(info.file, f"it ends inside tensor {shown(info.name)}: cut off while it was read")
                place = place[count:]
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: tensor {shown(info.name)} cannot be read ({error.strerror})"
            ) from error

    def _open(self, path: Path) -> IO[bytes]:
        if self._file is None or self._path != path:
            if self._file is not None:
                self._file.close()
            self._file, self._path = path.open("rb", buffering=0), path
        return self._file


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies so on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def lay_out(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The head of a file that will hold these tensors, and the order in which their bytes must follow it."""
    names = sorted(shapes, key=lambda name: (_ORDER[shapes[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of these tensors, with strings about them; the same tensors give the same bytes."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    head, names = lay_out(shapes, metadata)
    file.write(head)
    for name in names:
        file.write(raw(tensors[name]))
