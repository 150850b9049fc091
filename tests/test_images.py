"""Opening pictures: every format and mode gives the same upright RGB, every bad one is refused by name."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from mint.errors import RecordError
from mint.images import FORMATS, MAX_PIXELS, open_image


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    """A picture without noise, so that lossy formats keep it, and without symmetry, so that a turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 7, y * 9, (x + y) * 4], -1).clip(0, 255).astype(np.uint8)


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def array(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_opens_as_rgb_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "picture.dat", Image.fromarray(smooth()), format=kind)
    difference = np.abs(array(open_image(path)) - smooth())
    assert difference.mean() < (20 if kind == "GIF" else 6)
    assert (difference.max() == 0) == (kind in ("PNG", "BMP", "TIFF"))


def test_a_name_may_hold_a_hash(tmp_path: Path) -> None:
    path = saved(tmp_path / "case#7.png", Image.fromarray(smooth()))
    assert (array(open_image(str(path))) == smooth()).all()


def test_postscript_inside_a_png_name_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "innocent.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(RecordError, match=r"innocent\.png: not a picture that is read here"):
        open_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_rotated_photo_stands_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = {  # what a camera stores so that the tag's turn gives the upright picture
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](smooth())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "photo", Image.fromarray(np.ascontiguousarray(stored)), format=kind, exif=exif)
    upright = array(open_image(path))
    assert upright.shape == (24, 32, 3)
    assert np.abs(upright - smooth()).mean() < 6
    assert np.abs(array(open_image(Image.open(path))) - upright).max() == 0


def test_transparency_is_laid_on_white_in_every_mode_that_has_it(tmp_path: Path) -> None:
    colours = smooth()
    alpha = np.full(colours.shape[:2], 255, np.uint8)
    alpha[:, :16] = 0
    clear = Image.fromarray(np.dstack([colours, alpha]))
    grey = Image.fromarray(np.dstack([colours[..., 0], alpha]), mode=None)
    keyed = Image.new("RGB", (8, 8), (10, 20, 30))
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([value for i in range(256) for value in (i, 100, 100)])
    files = {
        "rgba": saved(tmp_path / "rgba.png", clear),
        "la": saved(tmp_path / "la.png", grey),
        "webp": saved(tmp_path / "rgba.webp", clear, lossless=True),
        "key": saved(tmp_path / "key.png", keyed, transparency=(10, 20, 30)),
        "palette": saved(tmp_path / "palette.png", palette, transparency=bytes([255, 255, 255, 0])),
        "gif": saved(tmp_path / "palette.gif", palette, transparency=3),
    }
    assert grey.mode == "LA"
    for name, path in files.items():
        assert (array(open_image(path))[:, :8] == 255).all(), name
    assert (array(open_image(files["rgba"]))[:, 16:] == colours[:, 16:]).all()
    half = np.dstack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 128, np.uint8)])
    assert (array(open_image(Image.fromarray(half))) == 127).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    wanted = np.rint(values / 257).astype(int)
    for name in ("grey.png", "grey.tiff"):
        picture = array(open_image(saved(tmp_path / name, Image.fromarray(values))))
        assert (picture == wanted[..., None]).all(), name
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert (array(open_image(wide)) == wanted[..., None]).all()
    with pytest.raises(RecordError, match="grey values from 0 to 130944; wanted 16 bits"):
        open_image(Image.fromarray(values.astype(np.int32) * 2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(smooth()).convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    opened = array(open_image(saved(tmp_path / "picture", picture, format=kind)))
    wanted = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(opened - wanted).mean() < 6


def test_a_mode_without_a_way_to_rgb_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match="colour mode La"):
        open_image(Image.new("La", (4, 4)))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for name in ("moving.gif", "moving.webp", "moving.png", "moving.tiff"):
        path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        red, green, blue = array(open_image(path))[8, 8]
        assert red > 230, name
        assert green < 20, name
        assert blue < 20, name


def test_an_item_of_an_array_on_disk_is_read_alone(tmp_path: Path) -> None:
    pictures = np.stack([np.roll(smooth(), shift, 1) for shift in range(5)])
    for dtype in (np.uint8, np.float64, np.float32, np.int32, np.uint16):
        np.save(tmp_path / "images.npy", pictures.astype(dtype))
        for item in (0, 4):
            assert (array(open_image(f"{tmp_path}/images.npy#{item}")) == pictures[item]).all(), dtype
    for item in ("5", "-1", "", "1.5", "x", "9" * 40):
        with pytest.raises(RecordError, match=r"images\.npy#.*no such item; the array holds 5 pictures"):
            open_image(f"{tmp_path}/images.npy#{item}")
    with pytest.raises(RecordError, match=r"an array of pictures; name one of them"):
        open_image(tmp_path / "images.npy")


def test_an_array_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    items = np.lib.format.open_memmap(path, "w+", np.float64, (400_000, 256, 256, 3))  # 629 GB, sparse
    items[399_999, :, :, 1] = 200
    items.flush()
    assert (array(open_image(f"{path}#399999"))[0, 0] == (0, 200, 0)).all()


def test_broken_arrays_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    np.save(tmp_path / "channels.npy", np.zeros((2, 4, 4, 7)))
    np.save(tmp_path / "whole.npy", np.zeros((2, 8, 8, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:300])
    (tmp_path / "noise.npy").write_bytes(b"not an array at all")
    for name, words in {
        "objects": "cannot be mapped|not an array of numbers",
        "flat": "shape \\(4, 4\\)",
        "channels": "shape \\(4, 4, 7\\)",
        "cut": "not an array of numbers",
        "noise": "not an array of numbers",
        "absent": "no such file",
    }.items():
        with pytest.raises(RecordError, match=f"{name}.npy.*({words})"):
            open_image(f"{tmp_path}/{name}.npy#0")


def test_arrays_in_memory_are_pictures_of_values_up_to_255() -> None:
    assert (array(open_image(smooth().astype(np.float64) * 0.999)) == np.rint(smooth() * 0.999)).all()
    assert (array(open_image(smooth()[..., 0])) == smooth()[..., :1]).all()
    assert (array(open_image(np.zeros((4, 4, 3)))) == 0).all()
    for bad, words in (
        (smooth() / 255, "fractions of at most"),
        (smooth() * 2.0, "wanted 0..255"),
        (smooth() - 1.0, "wanted 0..255"),
        (np.full((4, 4, 3), np.nan), "wanted 0..255"),
        (np.zeros((4, 4, 3), bool), "type bool"),
        (np.zeros((4, 4, 3), complex), "type complex128"),
        (np.zeros((4, 4, 4), np.uint8), "shape"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 pixels"),
        (np.zeros((0, 9, 3), np.uint8), "9 x 0 pixels"),
    ):
        with pytest.raises(RecordError, match=words):
            open_image(bad)
    with pytest.raises(RecordError, match="int: not a picture"):
        open_image(7)


def png_header(width: int, height: int) -> bytes:
    """A PNG of zeros that claims to be of any size: a few bytes that unpack to many."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 10_000, 30_000])
def test_a_decompression_bomb_is_refused_before_it_unpacks(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(RecordError, match=r"bomb\.png: .*more than 64,000,000"):
        open_image(path)
    assert MAX_PIXELS == 64_000_000


def test_the_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    path = saved(tmp_path / "small.png", Image.fromarray(smooth()))
    with pytest.raises(RecordError, match="32 x 24 pixels, more than 767"):
        open_image(path, max_pixels=767)
    assert open_image(path, max_pixels=768).size == (32, 24)


def test_pictures_of_one_pixel_files_that_are_none_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "dot.png", Image.new("RGB", (1, 1)))
    saved(tmp_path / "line.png", Image.new("RGB", (500, 1)))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name, words in {
        "dot.png": "1 x 1 pixels",
        "line.png": "500 x 1 pixels",
        "empty.png": "not a picture",
        "text.jpg": "not a picture",
        "folder.png": "no such picture file",
        "absent.png": "no such picture file",
        "nul\0.png": "no such picture file",
        "long" * 999 + ".png": "no such picture file",
    }.items():
        with pytest.raises(RecordError, match=words) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name).replace("\0", r"\x00") in str(caught.value)


def complaint(path: Path) -> str:
    """The refusal of a file, or nothing where it opens."""
    try:
        assert open_image(path).mode == "RGB"
    except RecordError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_damaged_files_raise_nothing_but_a_record_error(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(64, 64)).save(buffer, format=kind)
    whole, path, refused = buffer.getvalue(), tmp_path / "damaged", 0
    randomly = random.Random(0)
    for trial in range(120):
        damaged = bytearray(whole)
        if trial < 40:
            damaged = damaged[: randomly.randrange(len(damaged) * 3 // 4)]
        else:
            for _ in range(randomly.randrange(1, 20)):
                damaged[randomly.randrange(min(len(damaged), 400))] = randomly.randrange(256)
        path.write_bytes(damaged)
        message = complaint(path)
        assert message == "" or (message.startswith(str(path)) and "\n" not in message)
        refused += bool(message)
    assert refused >= 40  # every truncation, and what else cannot be read


def test_a_lazily_opened_picture_that_is_cut_is_refused_by_its_file_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "cut.jpg", Image.fromarray(smooth(200, 200)))
    path.write_bytes(path.read_bytes()[:1200])
    with Image.open(path) as lazy, pytest.raises(RecordError, match=r"cut\.jpg: truncated"):
        open_image(lazy)


def test_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    path = saved(tmp_path / "small.jpg", Image.fromarray(smooth()))
    before = list(warnings.filters)
    threads = [Thread(target=lambda: [open_image(path) for _ in range(40)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
