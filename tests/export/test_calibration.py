"""Calibration pictures: from directories, arrays and the reference task, with every bad input of them refused."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from edgevit.contracts import Calibration
from edgevit.errors import InputError, UsageError
from edgevit.export.quantize import calibration as module
from edgevit.export.quantize.calibration import load_calibration
from edgevit.inputs import load_images
from edgevit.specs import ImageSpec

SMALL = (16, 24)  # height, width: not square, so that a swapped pair shows
SPEC = ImageSpec()
WANTED = "expected one float32 array (n, 3, height, width) of normalised pictures"
SOURCES = "expected a directory of pictures, an .npz of normalised inputs, or reference-task"
CONVERT = "convert it with array.astype('float32')"
HOW = "write it with numpy.savez(FILE, images=array)"


def few(source: Path, sizes: list[tuple[int, int]] | None = None, **more: Any) -> Calibration:
    return load_calibration(str(source), SPEC, sizes or [SMALL], **{"allow_few": True, **more})


def message(source: Path | str, error: type[Exception] = InputError, **more: Any) -> str:
    with pytest.raises(error) as caught:
        load_calibration(str(source), SPEC, more.pop("sizes", [SMALL]), **more)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(source), "DATA")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    """Write pictures 0.png, 1.png, ... that all differ: `folder(200)`."""

    def write(count: int) -> Path:
        place = tmp_path / "data"
        place.mkdir()
        rng = np.random.default_rng(0)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(place / f"{i}.png")
        return place

    return write


@pytest.fixture
def arrays(tmp_path: Path) -> Callable[..., Path]:
    """Write an .npz of an array: `arrays(array)`, or of several by name."""

    def write(array: NDArray[Any] | None = None, **several: NDArray[Any]) -> Path:
        place = tmp_path / "data.npz"
        np.savez(place, **(several if array is None else {"images": array}))
        return place

    return write


def inputs(count: int = 130, size: tuple[int, int] = SMALL) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, 3, *size)).clip(-2, 2).astype(np.float32)


# ---- directories


def test_pictures_are_preprocessed_for_every_size_and_recorded(folder: Callable[[int], Path]) -> None:
    place = folder(140)
    found = load_calibration(str(place), SPEC, [SMALL, (32, 32)], count=130, seed=3)
    names = [entry["name"] for entry in found.record["pictures"]]
    assert len(set(names)) == 130 and names != sorted(names)
    for size in (SMALL, (32, 32)):
        expected = load_images([place / name for name in names], SPEC, size)
        assert found.images[size].dtype == np.float32
        assert np.array_equal(found.images[size], expected)
    hashes = [hashlib.sha256((place / name).read_bytes()).hexdigest() for name in names]
    assert [entry["sha256"] for entry in found.record["pictures"]] == hashes
    rest = {key: value for key, value in found.record.items() if key not in ("pictures", "sha256")}
    assert rest == {"source": "data", "kind": "folder", "count": 130, "seed": 3, "skipped": [], "classes": 0}
    assert json.dumps(found.record, allow_nan=False)
    assert found.notes == () and found.watch is None


def test_same_seed_takes_the_same_pictures_and_another_seed_others(folder: Callable[[int], Path]) -> None:
    place = folder(20)
    first, again, other = (few(place, count=5, seed=seed).record for seed in (1, 1, 2))
    assert first == again
    assert first["sha256"] != other["sha256"]


def test_pictures_in_folders_keep_their_class_in_the_record(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / name / "x.png")
    record = few(tmp_path).record
    assert {(entry["name"], entry["label"]) for entry in record["pictures"]} == {("a/x.png", 0), ("b/x.png", 1)}
    assert record["kind"] == "class folders" and record["classes"] == 2


def test_one_corrupt_picture_among_many_is_named_and_replaced_by_another(folder: Callable[[int], Path]) -> None:
    place = folder(131)
    (place / "7.png").write_bytes((place / "7.png").read_bytes()[:60])
    (place / "8.png").write_bytes(b"")
    found = load_calibration(str(place), SPEC, [SMALL], count=256)
    assert found.record["count"] == 129 and found.images[SMALL].shape == (129, 3, *SMALL)
    assert {entry["name"] for entry in found.record["skipped"]} == {"7.png", "8.png"}
    assert not any(str(place) in entry["why"] for entry in found.record["skipped"])
    assert found.notes[0].startswith("calibration: 2 skipped, the first is ")


def test_too_few_usable_pictures_are_refused_with_what_was_skipped(folder: Callable[[int], Path]) -> None:
    place = folder(128)
    (place / "7.png").write_bytes(b"no picture")
    assert message(place) == (
        "DATA: 127 pictures for the calibration (1 skipped, the first is 7.png: not a picture that can be read, "
        "expected a JPEG, PNG, WebP, TIFF, GIF, BMP or PPM picture; convert it first), expected 128 or more; "
        "give more, or --allow-few if these have to do"
    )


def test_few_pictures_are_taken_where_allowed_and_said_to_be_few(folder: Callable[[int], Path]) -> None:
    found = few(folder(3))
    assert found.images[SMALL].shape == (3, 3, *SMALL)
    assert found.notes == ("calibration: 3 pictures are few; ranges and accuracy may depend on which they are",)


def test_copies_of_one_picture_are_no_128_pictures(folder: Callable[[int], Path]) -> None:
    place = folder(2)
    for i in range(2, 140):
        (place / f"{i}.png").write_bytes((place / "0.png").read_bytes())
    assert message(place) == (
        "DATA: 2 different pictures among 140 for the calibration, expected 128 or more; "
        "give more, or --allow-few if these have to do"
    )
    assert "calibration: 138 of 140 pictures are copies of others" in few(place).notes


def test_all_corrupt_is_an_error_that_names_the_first(folder: Callable[[int], Path]) -> None:
    place = folder(3)
    for path in place.iterdir():
        path.write_bytes(b"no picture")
    text = message(place, allow_few=True)
    assert text.startswith("DATA: none of its 3 pictures can be read, the first is ")
    assert text.endswith("not a picture that can be read, expected a JPEG, PNG, WebP, TIFF, GIF, BMP or PPM picture; "
                         "convert it first; give other pictures")  # fmt: skip


@pytest.mark.parametrize("allow_few", [True, False])
def test_empty_directory_is_refused(tmp_path: Path, allow_few: bool) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert message(tmp_path, allow_few=allow_few) == (
        "DATA: no pictures in it, expected a directory of pictures, a directory with a folder of pictures for each "
        "class, or reference-task; check the path"
    )


def test_missing_directory_and_a_single_picture_are_refused(folder: Callable[[int], Path], tmp_path: Path) -> None:
    assert message(tmp_path / "nowhere").startswith("DATA: no such directory, expected a directory of pictures, ")
    assert message(folder(1) / "0.png") == f"DATA: a file, {SOURCES}; check the path"
    assert message("\0").startswith("DATA: cannot be opened (")


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            {"count": 127},
            "calibration: 127 pictures, expected 128 or more; give more, or --allow-few if these have to do",
        ),
        ({"count": 0, "allow_few": True}, "calibration: 0 pictures, expected 1 or more; give more"),
        (
            {"count": 30_000, "sizes": [(224, 224)]},
            "calibration: 30000 pictures at 224x224 take 16.8 GiB, expected at most 4; take fewer pictures or sizes",
        ),
    ],
)
def test_impossible_counts_are_refused_before_anything_is_read(request_: dict[str, Any], text: str) -> None:
    assert message("nowhere", UsageError, **request_) == text


# ---- the reference task


def test_reference_task_is_taken_by_name_from_its_own_split() -> None:
    from edgevit.reference import task

    found = load_calibration("reference-task", SPEC, [(32, 32)], count=4, allow_few=True)
    assert found.images[(32, 32)].shape == (4, 3, 32, 32)
    assert found.record["source"] == found.record["kind"] == "reference-task"
    for entry in found.record["pictures"]:
        split, index = entry["name"].split("/")
        image = task.picture(split, int(index))
        assert split == "calibration" and entry["label"] == task.label(split, int(index))
        assert entry["sha256"] == hashlib.sha256(image.tobytes()).hexdigest()


# ---- arrays


def test_rows_of_an_npz_are_taken_in_seeded_order(arrays: Callable[..., Path]) -> None:
    values = inputs(300)
    found = load_calibration(str(arrays(values)), SPEC, [SMALL], count=128, seed=5)
    rows = [int(entry["name"].removeprefix("row ")) for entry in found.record["pictures"]]
    assert len(set(rows)) == 128 and rows != sorted(rows)
    assert np.array_equal(found.images[SMALL], values[rows])
    assert found.record["source"] == "data.npz" and found.record["kind"] == "npz"
    assert found.record["pictures"][0]["sha256"] == hashlib.sha256(values[rows[0]].tobytes()).hexdigest()


def test_npz_may_be_compressed_and_in_fortran_order(tmp_path: Path) -> None:
    values = inputs()
    np.savez_compressed(tmp_path / "data.npz", np.asfortranarray(values))
    (tmp_path / "data.npz").rename(tmp_path / "DATA.NPZ")
    found = load_calibration(str(tmp_path / "DATA.NPZ"), SPEC, [SMALL])
    assert sorted(row.tobytes() for row in found.images[SMALL]) == sorted(row.tobytes() for row in values)


def test_npz_of_few_rows_is_refused_unless_allowed(arrays: Callable[..., Path]) -> None:
    place = arrays(inputs(127))
    assert message(place).startswith("DATA: 127 pictures for the calibration, expected 128 or more")
    assert few(place).record["count"] == 127


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((130, *SMALL, 3), np.float32), f"DATA: shape (130, 16, 24, 3), {WANTED}; {HOW}"),
        (np.zeros((3, *SMALL), np.float32), f"DATA: shape (3, 16, 24), {WANTED}; {HOW}"),
        (np.zeros((0, 3, *SMALL), np.float32), f"DATA: shape (0, 3, 16, 24), {WANTED}; {HOW}"),
        (np.float32(1), f"DATA: shape (), {WANTED}; {HOW}"),
        (np.zeros((130, 3, *SMALL)), f"DATA: float64 values, {WANTED}; {CONVERT}"),
        (np.zeros((130, 3, *SMALL), np.uint8), f"DATA: uint8 values, {WANTED}; {CONVERT}"),
        (np.zeros((9, 3, *SMALL), ">f4"), f"DATA: >f4 values, {WANTED}; {CONVERT}"),
        (
            np.zeros((130, 3, 24, 16), np.float32),
            "DATA: pictures of 24x16, expected 16x24 (height x width); preprocess them for this size, or give "
            "--image-size",
        ),
    ],
)  # fmt: skip
def test_npz_of_another_shape_or_type_is_refused(arrays: Callable[..., Path], array: Any, text: str) -> None:
    assert message(arrays(array)) == text


def test_npz_cannot_serve_several_sizes(arrays: Callable[..., Path]) -> None:
    assert message(arrays(inputs()), sizes=[SMALL, (32, 32)]) == (
        "DATA: pictures of 16x24, expected 16x24,32x32; calibrate several sizes with a directory of pictures"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_npz_with_a_value_that_is_not_finite_is_refused_by_row(arrays: Callable[..., Path], value: float) -> None:
    values = inputs()
    values[77, 1, 2, 3] = value
    assert message(arrays(values)) == f"DATA: NaN or infinity in row 77, {WANTED}; find out where it comes from"


def test_npz_of_pixels_is_refused_and_one_without_negative_values_doubted(arrays: Callable[..., Path]) -> None:
    pixels = (np.arange(130 * 3 * 16 * 24) % 256).reshape(130, 3, *SMALL).astype(np.float32)
    assert message(arrays(pixels)) == (
        "DATA: values from 0 to 255 in row 0, expected normalised pictures, -2.118 to 2.64; "
        "apply (pixel / 255 - mean) / std"
    )
    found = load_calibration(str(arrays(abs(inputs()))), SPEC, [SMALL])
    assert found.notes == ("calibration: no value below 0 in data.npz; are its pictures normalised?",)


def test_several_arrays_are_refused(arrays: Callable[..., Path]) -> None:
    assert message(arrays(a=inputs(), b=inputs())) == f"DATA: 2 arrays (a.npy, b.npy), {WANTED}; {HOW}"


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    np.savez(tmp_path / "data.npz", np.array([Evil()], object))
    assert message(tmp_path / "data.npz").startswith("DATA: object values, ")
    assert not ran.exists()


def header(text: str) -> bytes:
    """The start of an .npy of version 1.0 with this header."""
    padded = text.encode("latin1") + b"\n"
    return npy.magic(1, 0) + len(padded).to_bytes(2, "little") + padded


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not npy at all",
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (130, 3, 16, 24), }")[:40],
        header("__import__('os').system('exit 1')"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-130, 3, 16, 24), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ", 3, 16, 24), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': ((1, 2), 3, 16, 24), }"),
        header("(" * 500),
        header("[" * 9000),
        npy.magic(9, 0) + bytes(100),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (130, 3, 16, 24), }") + bytes(100),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, 16, 24), }") + bytes(10_000),
    ],
)
def test_crafted_array_inside_an_npz_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("images.npy", content)
    text = message(tmp_path / "data.npz", allow_few=True)
    assert text.startswith("DATA: ") and text.endswith(f"{WANTED}; {HOW}") and len(text) < 400


def test_zip_bomb_is_refused_by_its_header_and_never_unpacked(tmp_path: Path) -> None:
    start = header("{'descr': '<f4', 'fortran_order': False, 'shape': (2000000, 3, 16, 24), }")
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", start + bytes(1 << 20))
    assert message(tmp_path / "data.npz") == "DATA: 8.6 GiB of pictures, expected at most 4; keep fewer in it"


def test_array_longer_than_its_header_tells_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = header("{'descr': '<f4', 'fortran_order': False, 'shape': (130, 3, 16, 24), }")
    with zipfile.ZipFile(tmp_path / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", start + bytes(64 << 20))
    asked: list[int] = []
    read = zipfile.ZipExtFile.read

    def spy(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        part = read(self, n)
        asked.append(len(part))
        return part

    monkeypatch.setattr(zipfile.ZipExtFile, "read", spy)
    assert "more or less data than its header tells" in message(tmp_path / "data.npz")
    assert sum(asked) < 4 * module.CHUNK


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\0" * 1000])
def test_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    text = message(tmp_path / "data.npz")
    assert text.startswith(("DATA: an empty file, ", "DATA: not an .npz (")) and len(text) < 300


def test_damaged_and_encrypted_npz_are_refused(arrays: Callable[..., Path]) -> None:
    place = arrays(inputs())
    content = bytearray(place.read_bytes())
    content[5000] ^= 1
    place.write_bytes(content)
    assert "DATA: not an .npz (Bad CRC-32" in message(place)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", b"x")
    encrypted = bytearray(buffer.getvalue())
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    place.write_bytes(encrypted)
    assert "encrypted" in message(place)


def test_missing_npz_and_a_directory_of_that_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.npz").mkdir()
    assert message(tmp_path / "data.npz") == f"DATA: a directory, {SOURCES}; check the path"
    assert message(tmp_path / "none.npz") == f"DATA: no such file, {SOURCES}; check the path"
