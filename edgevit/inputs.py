"""Picture -> tensor, the same for parity, calibration, accuracy and run; and the label file of a classifier.

The steps are those of the papers' evaluation code: resize the short side with an antialiasing filter, crop the centre,
scale to [0, 1], normalise. Sizes and crop offsets round as torchvision's do, so published accuracies can be reproduced.

Nothing here imports torch: an artifact can be run on a machine without it.
"""

from __future__ import annotations

import json
import logging
import math
import stat
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgevit.errors import InputError, UsageError
from edgevit.specs import ImageSpec

MAX_PIXELS = 100_000_000  # 300 MB as RGB: above any camera, below what would exhaust a small device
MAX_LABEL_BYTES = 4_000_000  # ImageNet-21k with synonyms is 1 MB; more is not a label file
WHITE_16 = 65535.0  # the brightest 16-bit sample
ORIENTATION = 0x0112  # EXIF tag: how to turn the stored pixels upright

# Only formats that Pillow decodes by itself: for some others (EPS) it would start another program on the user's file.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
EXPECTED = "expected a JPEG, PNG, WebP, TIFF, GIF, BMP or PPM picture"

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# Pillow's ImageOps.exif_transpose does the same, but also rewrites the EXIF block and fails where that is damaged.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else logging prints Pillow's remarks to stderr


def read_image(path: Path) -> Image.Image:
    """Return the picture at `path`, upright by its EXIF orientation, in mode RGB; of an animation, the first frame.

    Transparency is dropped, not composited, because torchvision's and timm's loaders do so (`convert("RGB")`) and the
    published accuracies were measured that way. Greyscale of 16 bits (modes I;16*, and I, where Pillow puts 16-bit PGM
    and 32-bit TIFF) is scaled from 0..65535 to 0..255; mode F from 0..1. Values outside these ranges are refused.
    Turning by EXIF is the one step those loaders leave out; a phone's picture would lie on its side without it.

    Raises InputError: no regular file, not a picture, damaged, or more than 100 million pixels.
    """
    if problem := file_problem(path):
        raise InputError(f"{path}: {problem}, {EXPECTED}; check the path")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # Pillow warns of bad EXIF, transparency and large pictures
            path.open("rb") as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            turn = UPRIGHT.get(_orientation(image))  # after load(), which turns a TIFF and drops its tag by itself
            upright = _to_rgb(image)
            return upright if turn is None else upright.transpose(turn)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: more than {MAX_PIXELS // 1_000_000} million pixels, expected a photograph; make it smaller first"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture that can be read, {EXPECTED}; convert it first") from None
    except Exception as error:  # decoders of damaged files raise anything: OSError, SyntaxError, struct.error, ...
        raise InputError(
            f"{path}: damaged or cut short ({_one_line(error)}), {EXPECTED}; copy or download it again"
        ) from error


def preprocess(image: Image.Image, spec: ImageSpec, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """Return `image` as the network's input, float32 (3, height, width), C-contiguous, normalised.

    `size` is (height, width) in pixels, by default `spec.size`. The picture is resized, keeping its shape, until it
    just covers floor(height / crop) x floor(width / crop); for a square this is the usual resize of the short side.

    Raises UsageError: an impossible size, crop or interpolation. InputError: a picture too long and thin to resize.
    """
    height, width = size or spec.size
    if min(height, width) < 1 or not 0 < spec.crop <= 1 or spec.interpolation not in RESAMPLING:
        raise UsageError(
            f"image size {height}x{width}, crop {spec.crop}, interpolation {spec.interpolation!r}: expected sides of "
            f"1 or more, a crop above 0 and up to 1, and one of {', '.join(RESAMPLING)}; correct the image settings"
        )
    cover = math.floor(height / spec.crop), math.floor(width / spec.crop)
    rows, columns = _covering_size((image.height, image.width), cover)
    if rows * columns > MAX_PIXELS:
        raise InputError(
            f"picture of {image.height}x{image.width}: too long and thin, resizing it to cover {cover[0]}x{cover[1]} "
            f"would take more than {MAX_PIXELS // 1_000_000} million pixels; cut it first"
        )
    resized = _to_rgb(image).resize((columns, rows), RESAMPLING[spec.interpolation])
    top, left = round((rows - height) / 2), round((columns - width) / 2)  # halves go to even, as in torchvision
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32)  # h w 3
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    normalised = (pixels / np.float32(255) - mean) / std  # h w 3
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))  # h w 3 -> 3 h w


def load_images(paths: Sequence[Path], spec: ImageSpec, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """Return the pictures at `paths`, read and preprocessed, float32 (n, 3, height, width).

    Raises InputError: no path at all, or a picture that cannot be used. UsageError: see `preprocess`.
    """
    if not paths:
        raise InputError("no pictures given, expected at least one path; name a picture")
    return np.stack([preprocess(read_image(path), spec, size) for path in paths])  # n times 3 h w -> n 3 h w


def as_values(images: NDArray[np.float32], spec: ImageSpec, values: str) -> NDArray[np.float32]:
    """Normalised pictures (n, 3, height, width) as a model's input takes them.

    `values` is "normalised", which they are, or "pixels": RGB from 0 to 255, exactly those they were made from.
    """
    if values == "normalised":
        return images
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (spec.mean, spec.std))  # 3 1 1
    pixels: NDArray[np.float32] = np.rint((images * std + mean) * np.float32(255))
    return pixels


def photographs() -> list[Path]:
    """Return the four photographs that edgevit ships for parity checks, sorted by name.

    Raises InputError: the package was installed without them.
    """
    folder = Path(__file__).parent / "photos"
    found = sorted(folder.glob("*.jpg"))
    if not found:
        raise InputError(f"{folder}: no photographs, expected those that edgevit ships; install edgevit again")
    return found


def read_labels(path: Path, classes: int) -> list[str]:
    """Return the `classes` names in a label file: class 0 first.

    The file is UTF-8: one name a line; or a JSON list of names; or a JSON object from "0", "1", ... to a name or to a
    list whose last entry is the name (["n01440764", "tench"]). Control characters are removed, so that a name can be
    printed on a terminal.

    Raises InputError: no regular file, not UTF-8, not these layouts, an empty name, or another number of names.
    """
    wanted = f"expected {classes} class names, one a line or as JSON"
    if problem := file_problem(path):
        raise InputError(f"{path}: {problem}, {wanted}; check the path")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_LABEL_BYTES + 1)
        if len(content) > MAX_LABEL_BYTES:
            raise InputError(f"{path}: more than {MAX_LABEL_BYTES // 1_000_000} MB, {wanted}; check the path")
        names = _parse_labels(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text, {wanted}; save it as UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: JSON nested without end
        raise InputError(f"{path}: {_one_line(error)}, {wanted}; correct the file") from None
    if len(names) != classes:
        raise InputError(f"{path}: {len(names)} names, {wanted}; use the label file of this network's data set")
    labels = [_printable(name) for name in names]
    if "" in labels:
        raise InputError(f"{path}: the name of class {labels.index('')} is empty, {wanted}; correct the file")
    return labels


def file_problem(path: Path) -> str | None:
    """Return why `path` is no regular file with something in it ("a directory", ...), or None where it is one.

    Links are followed. Pipes and devices are refused, because reading them may never end.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return "a link to a missing file" if path.is_symlink() else "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return f"cannot be opened ({_one_line(error)})"
    if stat.S_ISDIR(status.st_mode):
        return "a directory"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return None if status.st_size else "an empty file"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; 1, upright, where there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged block makes the parser raise anything, and the pixels are still good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB; Pillow's own conversion would clip deep greyscale instead of scaling it."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    white = 1.0 if image.mode == "F" else WHITE_16
    values = np.asarray(image).astype(np.float64)  # h w
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN fails too: every comparison with it is false
        raise InputError(
            f"greyscale values from {low:g} to {high:g}, expected 0 to {white:g}; save it with 8 or 16 bits a sample"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert("RGB")


def _covering_size(picture: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) of the picture's shape that covers `cover`.

    The longer side is truncated as in torchvision's `Resize`; whole-number division keeps it from falling short.
    """
    rows, columns = picture
    if cover[0] * columns >= cover[1] * rows:
        return cover[0], columns * cover[0] // rows
    return rows * cover[1] // columns, cover[1]


def _parse_labels(text: str) -> list[str]:
    """Return the names in the text; ValueError says what is wrong with it."""
    if not text.lstrip().startswith(("[", "{")):
        return text.replace("\r\n", "\n").rstrip("\n").split("\n")
    data: Any = json.loads(text)
    if isinstance(data, dict):
        missing = next((i for i in range(len(data)) if str(i) not in data), None)
        if missing is not None:
            raise ValueError(f'{len(data)} entries but none for class "{missing}"')
        data = [data[str(i)] for i in range(len(data))]
    names = [entry[-1] if isinstance(entry, list) and entry else entry for entry in data]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("an entry that is no name")
    return names


def _printable(text: str) -> str:
    """Return `text`, stripped, without control, formatting and line-breaking characters (Unicode C*, Zl, Zp)."""
    return "".join(c for c in text if not unicodedata.category(c).startswith(("C", "Zl", "Zp"))).strip()


def _one_line(error: BaseException) -> str:
    """Return the error in a few printable words: file contents may have found their way into it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _printable(text.strip().split("\n")[0])[:120] or type(error).__name__  # 120: one line on a terminal
