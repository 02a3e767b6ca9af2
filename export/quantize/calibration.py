"""The pictures that int8 ranges are measured on: read, chosen by a seed, and recorded with their hashes.

There is no default and no random data: ranges of the wrong pictures cost accuracy that nobody would look for here.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edgevit.contracts import Calibration
from edgevit.errors import InputError, UsageError
from edgevit.inputs import file_problem
from edgevit.pictures import REFERENCE_TASK, Read, Skipped, find_pictures, none_usable, read_usable
from edgevit.specs import ImageSpec, Size, size_list, size_text

MIN_PICTURES = 128  # below it, ranges still move by more than 10 % when the pictures double
MAX_BYTES = 4 << 30  # of the pictures in memory: 7,000 at 224x224, or 80 at the largest size
CHUNK = 1 << 20  # bytes unpacked at a time
BEYOND = 0.5  # how far normalised values may lie beyond those of black and white, as a share of their distance
EXPECTED = "expected a directory of pictures, an .npz of normalised inputs, or reference-task"
WANTED = "expected one float32 array (n, 3, height, width) of normalised pictures"
HOW = "write it with numpy.savez(FILE, images=array)"
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # the third is for records only


def load_calibration(
    source: str,
    image: ImageSpec,
    sizes: Sequence[Size],
    *,
    allow_few: bool = False,
    count: int = 256,
    seed: int = 0,
) -> Calibration:
    """The calibration pictures of `source`: a directory, an .npz of normalised inputs, or "reference-task" by name.

    `count` of them are taken, or all where there are fewer, in an order that `seed` decides; each is preprocessed for
    every (height, width) of `sizes`. The record names each picture with its hash, and its class where it has one.

    Raises:
        UsageError: `count` below 128 without `allow_few`, or too many pictures to hold in memory. InputError: nothing
        that can be used in `source`, or fewer than 128 different pictures without `allow_few`.
    """
    if count < 1 or (count < MIN_PICTURES and not allow_few):
        least = 1 if allow_few else MIN_PICTURES
        raise UsageError(f"calibration: {count} pictures, expected {least} or more; {_advice(allow_few)}")
    needed = count * sum(3 * height * width * 4 for height, width in sizes)  # bytes of float32
    if needed > MAX_BYTES:
        raise UsageError(
            f"calibration: {count} pictures at {size_list(sizes)} take {needed / 2**30:.1f} GiB, expected at most "
            f"{MAX_BYTES >> 30}; take fewer pictures or sizes"
        )
    read = _from_arrays if source != REFERENCE_TASK and source.lower().endswith(".npz") else _from_pictures
    images, record = read(source, image, sizes, count, seed)
    entries = record["pictures"]
    different = len({entry["sha256"] for entry in entries})
    if different < MIN_PICTURES and not allow_few:
        raise InputError(
            f"{source}: {_different(len(entries), different)} for the calibration{_skipped_text(record['skipped'])}, "
            f"expected {MIN_PICTURES} or more; {_advice(allow_few)}"
        )
    return Calibration(images, record, _notes(source, images, record, different))


def _from_pictures(
    source: str, image: ImageSpec, sizes: Sequence[Size], count: int, seed: int
) -> tuple[dict[Size, NDArray[np.float32]], dict[str, Any]]:
    """Pictures of a directory or of the reference task, and their record; those that cannot be read are passed over."""
    if source != REFERENCE_TASK and Path(source).is_file():
        raise InputError(f"{source}: a file, {EXPECTED}; check the path")
    found = find_pictures(source, "calibration")
    skipped = list(found.skipped)
    room = min(count, len(found.pictures))
    images = {size: np.empty((room, 3, *size), np.float32) for size in sizes}  # n 3 h w
    entries: list[dict[str, Any]] = []
    for read in read_usable(found, found.shuffled(seed), [(image, size) for size in sizes], skipped):
        for size, array in zip(sizes, read.arrays, strict=True):
            images[size][len(entries)] = array
        entries.append({"name": read.picture.name, "sha256": found.sha256(read.picture, read.image), **_label(read)})
        if len(entries) == count:
            break
    if not entries:
        raise none_usable(source, skipped)
    record = _record(found.source, found.kind, seed, entries, skipped)
    return {size: array[: len(entries)] for size, array in images.items()}, {**record, "classes": len(found.classes)}


def _label(read: Read) -> dict[str, int]:
    return {} if read.picture.label is None else {"label": read.picture.label}


def _from_arrays(
    source: str, image: ImageSpec, sizes: Sequence[Size], count: int, seed: int
) -> tuple[dict[Size, NDArray[np.float32]], dict[str, Any]]:
    """Rows of an .npz, and their record."""
    array = _read_npz(Path(source), sizes)
    _check_values(source, array, image)
    chosen = np.random.default_rng(seed).permutation(len(array))[:count]
    rows = array[chosen]  # n 3 h w
    entries = [
        {"name": f"row {index}", "sha256": hashlib.sha256(row.tobytes()).hexdigest()}
        for index, row in zip(chosen.tolist(), rows, strict=True)
    ]
    return {sizes[0]: rows}, {**_record(Path(source).name, "npz", seed, entries, []), "classes": 0}


def _record(
    name: str, kind: str, seed: int, entries: list[dict[str, Any]], skipped: Sequence[Skipped]
) -> dict[str, Any]:
    whole = hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()
    return {
        "source": name,
        "kind": kind,
        "count": len(entries),
        "seed": seed,
        "sha256": whole,
        "pictures": entries,
        "skipped": [asdict(each) for each in skipped],
    }


def _read_npz(path: Path, sizes: Sequence[Size]) -> NDArray[np.float32]:
    """The one array of an .npz, looked at before it is unpacked: the file is untrusted.

    Raises:
        InputError: no .npz, several arrays, or one of another type, shape or size.
    """
    if problem := file_problem(path):
        raise InputError(f"{path}: {problem}, {EXPECTED}; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if len(members) != 1:
                shown = ", ".join(members[:3]) + (", ..." if len(members) > 3 else "")
                raise InputError(f"{path}: {len(members)} arrays ({shown}), {WANTED}; {HOW}")
            with archive.open(members[0]) as stream:
                return _read_array(stream, path, sizes)
    except InputError:
        raise
    except Exception as error:  # zipfile and NumPy's parser of headers raise anything on damaged and crafted files
        why = str(error).strip().splitlines()
        raise InputError(
            f"{path}: not an .npz ({why[0][:120] if why else type(error).__name__}), {WANTED}; {HOW}"
        ) from None


def _read_array(stream: IO[bytes], path: Path, sizes: Sequence[Size]) -> NDArray[np.float32]:
    """One array of an archive; its header says how much there is to unpack, and no more is."""
    version = npy.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"version {version} of NumPy's format")
    shape, fortran, dtype = HEADERS[version](stream, max_header_size=10_000)  # NumPy's own limit
    if dtype != np.float32:
        raise InputError(f"{path}: {_printable(str(dtype))} values, {WANTED}; convert it with array.astype('float32')")
    if len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise InputError(f"{path}: shape {_printable(str(shape))}, {WANTED}; {HOW}")
    if len(sizes) > 1:
        raise InputError(
            f"{path}: pictures of {size_text(shape[2:])}, expected {size_list(sizes)}; calibrate several sizes with a "
            "directory of pictures"
        )
    if tuple(shape[2:]) != tuple(sizes[0]):
        raise InputError(
            f"{path}: pictures of {size_text(shape[2:])}, expected {size_text(sizes[0])} (height x width); preprocess "
            "them for this size, or give --image-size"
        )
    size_bytes = 4 * int(np.prod(shape, dtype=object))
    if size_bytes > MAX_BYTES:
        raise InputError(
            f"{path}: {size_bytes / 2**30:.1f} GiB of pictures, expected at most {MAX_BYTES >> 30}; keep fewer in it"
        )
    flat = np.empty(size_bytes // 4, np.float32)
    view, filled = flat.view(np.uint8), 0
    while part := stream.read(CHUNK):  # in parts: zipfile copies all it has for every 4 KB it unpacks
        if filled + len(part) > size_bytes:
            break
        view[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
        filled += len(part)
    if part or filled < size_bytes:
        raise InputError(f"{path}: more or less data than its header tells, {WANTED}; {HOW}")
    array = flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape)
    return np.ascontiguousarray(array, np.float32)


def _check_values(source: str, array: NDArray[np.float32], image: ImageSpec) -> None:
    """Whether these can be normalised pictures.

    Raises:
        InputError: NaN, infinity, or values far beyond those of black and white.
    """
    black, white = (np.array([(level - m) / s for m, s in zip(image.mean, image.std, strict=True)]) for level in (0, 1))
    for index, row in enumerate(array):
        low, high = float(row.min()), float(row.max())
        if not np.isfinite([low, high]).all():
            raise InputError(f"{source}: NaN or infinity in row {index}, {WANTED}; find out where it comes from")
        slack = BEYOND * float((white - black).max())
        if low < black.min() - slack or high > white.max() + slack:
            raise InputError(
                f"{source}: values from {low:.4g} to {high:.4g} in row {index}, expected normalised pictures, "
                f"{black.min():.4g} to {white.max():.4g}; apply (pixel / 255 - mean) / std"
            )


def _notes(
    source: str, images: dict[Size, NDArray[np.float32]], record: dict[str, Any], different: int
) -> tuple[str, ...]:
    """What the user must be told of the pictures."""
    used, skipped, notes = record["count"], record["skipped"], []
    if skipped:
        notes.append(f"calibration: {len(skipped)} skipped, the first is {skipped[0]['name']}: {skipped[0]['why']}")
    if different < used:
        notes.append(f"calibration: {used - different} of {used} pictures are copies of others")
    if different < MIN_PICTURES:
        notes.append(f"calibration: {different} pictures are few; ranges and accuracy may depend on which they are")
    if record["kind"] == "npz" and min(float(array.min()) for array in images.values()) >= 0:
        notes.append(f"calibration: no value below 0 in {Path(source).name}; are its pictures normalised?")
    return tuple(notes)


def _skipped_text(skipped: Sequence[dict[str, str]]) -> str:
    if not skipped:
        return ""
    return f" ({len(skipped)} skipped, the first is {skipped[0]['name']}: {skipped[0]['why']})"


def _different(used: int, different: int) -> str:
    return f"{used} pictures" if used == different else f"{different} different pictures among {used}"


def _advice(allow_few: bool) -> str:
    return "give more" if allow_few else "give more, or --allow-few if these have to do"


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:60]
