"""A picture, from a file, an item of an array or memory, as an upright RGB image. The one door to `PIL`.

Pictures are untrusted: only the formats of `FORMATS` are tried (by content, whatever the name says), the number of
pixels is bounded before any is decoded, and whatever is wrong with a file becomes one `RecordError` that names it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import RecordError
from .arrays import map_array

Picture = Image.Image

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
"""More pixels than this are refused: a small file can unpack to any size."""

KEY_BYTES = 16

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What the decoders raise on damaged bytes."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: Any, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture at `source`, decoded, upright, in RGB, transparency laid on white, the first frame of several.

    `source` is a path, an item of an array on disk (`fold1/images.npy#17`, only that item is read), an open picture,
    an array (H, W, 3) or (H, W) of values in 0..255, or what draws itself (`source.draw()`, the built-in tasks').
    """
    if hasattr(source, "draw"):
        source = source.draw()
    if isinstance(source, Image.Image):
        return _finished(source, str(getattr(source, "filename", "") or "picture"), max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array", max_pixels)
    if not isinstance(source, (str, Path)):
        raise RecordError(f"{type(source).__name__}: not a picture; give a path, an open picture or an array")
    file, item = parted(source)
    return _from_file(file, max_pixels) if item is None else _from_item(file, item, max_pixels)


def parted(source: str | Path) -> tuple[str, str | None]:
    """The file that a picture's path leads to, and which item of it is meant: `fold1/images.npy`, `17`; None for all."""
    path, _, item = str(source).rpartition("#")
    return (path, item) if path.lower().endswith(".npy") else (str(source), None)


def nothing_to_see() -> Picture:
    """A plain grey square: the picture of a case of which nothing is known."""
    return Image.new("RGB", (224, 224), (128, 128, 128))


def content_key(source: Any) -> bytes:
    """The hash of a picture file's bytes; of the size and pixels of what is no file of its own."""
    hashed = hashlib.blake2b(digest_size=KEY_BYTES)
    if isinstance(source, str | Path) and parted(source)[1] is None and os.path.isfile(source):
        try:
            with Path(source).open("rb") as file:
                while piece := file.read(1 << 20):
                    hashed.update(piece)
        except OSError as error:
            raise RecordError(f"{source}: cannot be read ({error.strerror}); correct the path") from error
    else:
        picture = open_image(source)
        hashed.update(repr(picture.size).encode())
        hashed.update(picture.tobytes())
    return hashed.digest()


def _from_file(name: str, max_pixels: int) -> Picture:
    if not os.path.isfile(name):
        raise RecordError(f"{name}: no such picture file; correct the path")
    if name.lower().endswith(".npy"):
        raise RecordError(f"{name}: an array of pictures; name one of them by its number, {name}#0")
    try:
        with _quietly(), Image.open(name, formats=FORMATS) as picture:
            return _finished(picture, name, max_pixels)
    except UnidentifiedImageError as error:
        raise RecordError(f"{name}: not a picture that is read here; wanted one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise RecordError(f"{name}: more than {max_pixels:,} pixels ({error}); make it smaller") from error
    except _DAMAGE as error:
        raise RecordError(f"{name}: cannot be opened as a picture ({_why(error)}); save it again") from error


def _finished(picture: Picture, name: str, max_pixels: int) -> Picture:
    """Decode within bounds, then turn upright and to RGB."""
    _check_size(*picture.size, name, max_pixels)
    with _quietly():
        try:
            picture.load()
        except _DAMAGE as error:
            raise RecordError(f"{name}: truncated or damaged ({_why(error)}); save or fetch it again") from error
        turn = _UPRIGHT.get(_orientation(picture))
        picture = picture if turn is None else picture.transpose(turn)
        try:
            return _in_rgb(picture, name)
        except ValueError as error:
            raise RecordError(
                f"{name}: colour mode {picture.mode} cannot be turned into RGB; save it as RGB"
            ) from error


def _orientation(picture: Picture) -> Any:
    """The EXIF orientation 1..8; metadata that cannot be read says nothing, and the pixels are good without it."""
    try:
        return picture.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1


def _in_rgb(picture: Picture, name: str) -> Picture:
    if picture.mode == "F":
        return Image.fromarray(_as_bytes(np.asarray(picture), name)).convert("RGB")
    if picture.mode.startswith("I"):
        return Image.fromarray(_top_byte(np.asarray(picture), name)).convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _top_byte(values: np.ndarray, name: str) -> np.ndarray:
    """Grey values of 16 bits in 8: 0..65535 to 0..255, rounded."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise RecordError(
            f"{name}: grey values from {low} to {high}; wanted 16 bits, 0..65535: scale them and save again"
        )
    scaled: np.ndarray = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return scaled


def _from_item(path: str, item: str, max_pixels: int) -> Picture:
    """One picture of an array (N, H, W, 3) or (N, H, W) on disk; the rest of the array is never read."""
    name = f"{path}#{item}"
    if not os.path.isfile(path):
        raise RecordError(f"{path}: no such file; correct the path")
    try:
        array = map_array(path)
    except RecordError as error:
        raise RecordError(f"{path}: not an array of numbers that can be mapped ({error})") from error
    if array.ndim not in (3, 4):
        raise RecordError(f"{path}: an array of shape {array.shape}; wanted pictures, (N, H, W, 3) or (N, H, W)")
    if not (item.isascii() and item.isdecimal() and len(item) < 19 and int(item) < len(array)):
        raise RecordError(f"{name}: no such item; the array holds {len(array):,} pictures, numbered from 0")
    return _from_array(array[int(item)], name, max_pixels)


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Picture:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise RecordError(f"{name}: an array of shape {array.shape}; wanted a picture, (H, W, 3) or (H, W)")
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    return Image.fromarray(_as_bytes(array, name)).convert("RGB")


def _as_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """Values 0..255 of any number type as bytes; fractions are rounded, other ranges refused."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "iuf":
        raise RecordError(f"{name}: values of type {array.dtype}; wanted numbers in 0..255")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # also where one is NaN
        raise RecordError(f"{name}: values from {low} to {high}; wanted 0..255: scale them first")
    if array.dtype.kind == "f" and 0 < high <= 1 and bool((array != np.rint(array)).any()):
        raise RecordError(
            f"{name}: fractions of at most {high}, as of a picture in 0..1; wanted 0..255: multiply by 255"
        )
    return np.asarray(np.rint(array), np.uint8)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if min(width, height) < 2:
        raise RecordError(f"{name}: {width} x {height} pixels; a picture needs at least 2 in each direction")
    if width * height > max_pixels:
        raise RecordError(f"{name}: {width} x {height} pixels, more than {max_pixels:,}; make it smaller")


def _why(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


_lock = threading.Lock()
_silence: list[warnings.catch_warnings[None]] = []
_inside = 0


@contextmanager
def _quietly() -> Iterator[None]:
    """No warnings from the decoders; threads share one silence, since the filters belong to the whole process."""
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _silence.append(warnings.catch_warnings())
            _silence[-1].__enter__()
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _silence.pop().__exit__(None, None, None)
