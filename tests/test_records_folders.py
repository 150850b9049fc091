"""PanNuke folds, folders of class folders and pictures alone."""

import os
from pathlib import Path

import numpy as np
import pytest

from mint.errors import RecordError
from mint.images.arrays import map_array
from mint.records import read_records
from mint.records.pannuke import TISSUES, tissue
from mint.types import Record

PNG = b"\x89PNG\r\n\x1a\n"


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)


def fold(folder: Path, names: list[str], dtype: str = "uint8", kind: str = "U") -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", np.zeros((len(names), 8, 8, 3), dtype))
    np.save(folder / "types.npy", np.array(names).astype(kind))
    return folder


@pytest.mark.parametrize("nesting", ["fold{}", "Fold {0}/images/fold{0}"])
@pytest.mark.parametrize(("dtype", "kind"), [("uint8", "U"), ("float64", "U"), ("float32", "S"), (">i2", ">U20")])
def test_the_folds_of_pannuke_are_read_in_either_nesting_and_any_type(tmp_path, nesting, dtype, kind):
    first = fold(tmp_path / nesting.format(1), ["Breast", "Bile-duct"], dtype, kind)
    second = fold(tmp_path / nesting.format(2), ["HeadNeck"], dtype, kind)
    np.save(first / "masks.npy", np.zeros((2, 8, 8, 6)))
    assert list(read_records(tmp_path)) == [
        Record("fold1/0", image=f"{first / 'images.npy'}#0", label="Breast"),
        Record("fold1/1", image=f"{first / 'images.npy'}#1", label="Bile-duct"),
        Record("fold2/0", image=f"{second / 'images.npy'}#0", label="HeadNeck"),
    ]
    assert list(read_records(first)) == list(read_records(first / "images.npy"))
    assert next(read_records(first)).id == "fold1/0"


def test_folds_of_one_name_are_told_apart_by_their_path(tmp_path):
    fold(tmp_path / "a" / "fold", ["Breast"])
    fold(tmp_path / "b" / "fold", ["Colon"])
    assert [record.id for record in read_records(tmp_path)] == [f"{tmp_path}/a/fold/0", f"{tmp_path}/b/fold/0"]


def test_tissues_are_matched_on_their_letters_only():
    assert len(TISSUES) == 19
    assert [tissue(name) for name in TISSUES] == list(TISSUES)
    assert tissue("Adrenal gland") == "Adrenal_gland"
    assert tissue("bile_duct ") == "Bile-duct"
    assert tissue("Head & Neck") == "HeadNeck"
    assert tissue("Head and neck") == "HeadNeck"
    assert tissue("Brain") is None
    assert tissue("") is None


def test_the_images_of_a_fold_are_never_read(tmp_path):
    folder = tmp_path / "fold1"
    folder.mkdir()
    pictures = np.lib.format.open_memmap(folder / "images.npy", "w+", np.float64, (2722, 256, 256, 3))
    del pictures  # 4 GB of holes on disk
    np.save(folder / "types.npy", np.array(["Breast"] * 2722))
    assert sum(1 for _ in read_records(folder)) == 2722


BROKEN = {
    "objects": (
        lambda f: np.save(f / "types.npy", np.array(["Breast", None], object)),
        "Python objects in dtype",
    ),
    "too few names": (lambda f: np.save(f / "types.npy", np.array(["Breast"])), "2 names were wanted"),
    "numbers as names": (lambda f: np.save(f / "types.npy", np.arange(2)), "2 names were wanted"),
    "nothing": (lambda f: (f / "types.npy").write_bytes(b""), "not an .npy file"),
    "no types": (lambda f: (f / "types.npy").unlink(), "No such file"),
    "flat images": (lambda f: np.save(f / "images.npy", np.zeros((2, 8, 8))), r"shape \(N, H, W, 3\) were wanted"),
    "words as images": (lambda f: np.save(f / "images.npy", np.full((2, 8, 8, 3), "x")), "numbers of shape"),
    "no images": (lambda f: np.save(f / "images.npy", np.zeros((0, 8, 8, 3))), "is empty"),
    "a zip": (
        lambda f: (np.savez(f / "x.npz", x=np.ones(3)), (f / "x.npz").rename(f / "images.npy")),
        "not an .npy file",
    ),
    "cut short": (lambda f: os.truncate(f / "images.npy", 300), "not an array that can be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_fold_is_refused_by_name(tmp_path, case):
    spoil, message = BROKEN[case]
    spoil(fold(tmp_path / "fold1", ["Breast", "Colon"]))
    with pytest.raises(RecordError, match=message) as refused:
        list(read_records(tmp_path))
    assert str(tmp_path / "fold1") in str(refused.value)


def test_an_unknown_tissue_is_named_or_left_out(tmp_path):
    fold(tmp_path / "fold1", ["Breast", "Brain", "Colon"])
    skipped: list[str] = []
    assert [record.id for record in read_records(tmp_path, skipped=skipped)] == ["fold1/0", "fold1/2"]
    assert "types.npy: item 1: none of PanNuke's 19 tissues" in skipped[0]


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header(b"{'descr': '<U13', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + b"cos\nsystem\n",
        header(b"{'descr': '<U13', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(52),
        header(b"{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        header(b"{'descr': '<u1', 'fortran_order': False, 'shape': (2, 9223372036854775807), }\n") + bytes(9),
        header(b"(" * 9000 + b"\n"),
        header(b"{'descr': [('a', '<u1', (3, 1e9))], 'fortran_order': False, 'shape': (1,), }\n"),
        header(b"__import__('os').system('x')"),
        header(b"1" * 60000),
        header(b"{'descr': '<u1', 'fortran_order': False, 'shape': (1L,), }\n"),
        b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
    ],
)
def test_a_hostile_array_header_is_refused(tmp_path, content):
    path = tmp_path / "types.npy"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"types\.npy: .* numpy\.save|is empty"):
        map_array(path)


def test_class_folders_give_the_class_and_only_pictures_are_read(tmp_path):
    touch(tmp_path / "lung_n" / "2.jpeg", tmp_path / "lung_n" / "1.PNG", tmp_path / "colon_aca" / "3.tif")
    touch(tmp_path / "lung_n" / "notes.txt", tmp_path / "lung_n" / ".hidden.png", tmp_path / "Thumbs.db")
    assert list(read_records(tmp_path)) == [
        Record("colon_aca/3.tif", image=str(tmp_path / "colon_aca/3.tif"), label="colon_aca"),
        Record("lung_n/1.PNG", image=str(tmp_path / "lung_n/1.PNG"), label="lung_n"),
        Record("lung_n/2.jpeg", image=str(tmp_path / "lung_n/2.jpeg"), label="lung_n"),
    ]


def test_the_class_is_the_folder_nearest_to_the_picture_and_splits_are_no_classes(tmp_path):
    touch(tmp_path / "lung_colon_image_set" / "colon_image_sets" / "colon_n" / "1.jpeg")
    touch(tmp_path / "train" / "ADI" / "2.png", tmp_path / "Val" / "ADI" / "3.png", tmp_path / "test" / "4.png")
    found = {Path(record.id).name: (record.label, record.split) for record in read_records(tmp_path)}
    assert found == {
        "1.jpeg": ("colon_n", None),
        "2.png": ("ADI", "train"),
        "3.png": ("ADI", "validation"),
        "4.png": (None, "test"),
    }


def test_pictures_alone_are_records_without_a_class(tmp_path):
    touch(tmp_path / "b.png", tmp_path / "a.jpg")
    records = list(read_records(tmp_path))
    assert [(record.id, record.label, record.note) for record in records] == [("a.jpg", None, ""), ("b.png", None, "")]
    assert list(read_records(tmp_path / "b.png")) == [Record("b.png", image=str(tmp_path / "b.png"))]


def test_a_table_in_a_folder_of_pictures_comes_first(tmp_path):
    touch(tmp_path / "photos" / "a.png")
    (tmp_path / "cases.csv").write_text("id,image,label\na,photos/a.png,x\n")
    assert list(read_records(tmp_path)) == [Record("a", image=str(tmp_path / "photos/a.png"), label="x")]


def test_links_that_lead_out_are_named_and_links_inside_are_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root / "a" / "1.png", outside / "2.png")
    (root / "a" / "inner.png").symlink_to(root / "a" / "1.png")
    (root / "a" / "out.png").symlink_to(outside / "2.png")
    (root / "a" / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "loop").symlink_to(root)
    skipped: list[str] = []
    assert [record.id for record in read_records(root, skipped=skipped)] == ["a/1.png", "a/inner.png"]
    assert [name in message for name, message in zip(("gone", "out", "loop"), skipped, strict=True)] == [True] * 3
    (root / "cases.csv").symlink_to(outside / "cases.csv")
    with pytest.raises(RecordError, match=r"cases\.csv: a link"):
        list(read_records(root))


@pytest.mark.parametrize("image", ["out.png", "out/2.png", "out.npy#0"])
def test_a_table_may_not_name_a_link_that_leads_out(tmp_path, image):
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root / "1.png", outside / "2.png", outside / "images.npy")
    for name, aim in (("in.png", "1.png"), ("out.png", "../outside/2.png"), ("out", "../outside"),
                      ("out.npy", "../outside/images.npy")):  # fmt: skip
        (root / name).symlink_to(aim)
    (root / "cases.csv").write_text(f"id,image,label\na,in.png,x\nb,{image},x\nc,none.png,x\n")
    (root / "cases.jsonl").write_text(f'{{"id": "a", "image": "in.png"}}\n{{"id": "b", "image": "{image}"}}\n')
    skipped: list[str] = []
    assert [record.id for record in read_records(root / "cases.csv", skipped=skipped)] == ["a", "c"]
    with pytest.raises(
        RecordError, match=r"cases.csv:3: image .*: a link that leads out of .*--image-folder"
    ) as raised:
        list(read_records(root / "cases.csv"))
    assert skipped == [str(raised.value)]
    with pytest.raises(RecordError, match=r"cases.jsonl:2: image .*: a link that leads out"):
        list(read_records(root / "cases.jsonl"))
    (outside / "cases.csv").write_text("id,image\nb,2.png\n")
    (tmp_path / "short").symlink_to(outside)
    (found,) = read_records(outside / "cases.csv", images=tmp_path / "short")
    assert found.image == str(tmp_path / "short" / "2.png")


def test_what_lies_beside_a_file_that_was_given_is_no_link_that_leads_out(tmp_path):
    folder = fold(tmp_path / "fold1", ["Breast", "Colon"])
    (folder / "images.npy").rename(tmp_path / "pictures.npy")
    (folder / "images.npy").symlink_to("../pictures.npy")
    with pytest.raises(RecordError, match=r"fold1/images.npy: a link that leads out"):
        list(read_records(folder / "types.npy"))
    assert len(list(read_records(tmp_path))) == 2


def test_a_name_that_is_no_text_and_a_folder_too_deep_are_refused(tmp_path):
    touch(tmp_path / "a" / "1.png")
    with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb"):
        pass
    skipped: list[str] = []
    assert [record.id for record in read_records(tmp_path, skipped=skipped)] == ["a/1.png"]
    assert "the name is not UTF-8" in skipped[0]
    skipped[0].encode()
    touch(tmp_path.joinpath(*["d"] * 40) / "1.png")
    with pytest.raises(RecordError, match="more than 32 folders deep"):
        list(read_records(tmp_path))


def test_a_folder_of_nothing_is_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(RecordError, match="no records in it"):
        list(read_records(tmp_path))
