"""Pictures of every mode become the same RGB; preprocessing matches numbers computed here by hand or by formula."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevit.errors import InputError, UsageError
from edgevit.inputs import file_problem, load_images, photographs, preprocess, read_image, read_labels
from edgevit.specs import ImageSpec

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # leaves levels / 255, easy to read


def ramp(rows: int = 48, columns: int = 64) -> NDArray[np.uint8]:
    """A smooth colour picture (rows, columns, 3) without symmetry, so that any wrong turn or channel order shows."""
    y, x = np.mgrid[:rows, :columns]
    return np.stack([3 * x % 256, 5 * y % 256, (x + y) * 2 % 256], axis=2).astype(np.uint8)


def grey() -> NDArray[np.uint8]:
    return ramp()[:, :, 1]


def pixels(path: Path) -> NDArray[np.int64]:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int64)


def png(width: int, height: int, depth: int = 8, rows: bytes = b"\0" * 64) -> bytes:
    """A colour PNG made by hand: Pillow writes neither 16-bit colour nor a size that its rows do not fill."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_import_needs_no_torch() -> None:
    code = "import sys, edgevit.inputs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ---- formats and modes


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "ppm", "jpg", "mpo", "webp", "cmyk.jpg", "cmyk.tif"])
def test_colour_formats(tmp_path: Path, suffix: str) -> None:
    path, mode = tmp_path / f"picture.{suffix}", "CMYK" if "cmyk" in suffix else "RGB"
    smooth = ramp() // 4 + 64  # gentle slopes: lossy formats blur the jumps of the full ramp
    Image.fromarray(smooth).convert(mode).save(path, quality=95)
    with Image.open(path) as stored:
        assert stored.mode == mode
    tolerance = 16 if suffix.endswith(("jpg", "mpo", "webp")) else 0  # levels; an inverted picture is 100 off
    assert np.abs(pixels(path) - smooth).max() <= tolerance
    assert suffix != "cmyk.jpg" or b"Adobe" in path.read_bytes()  # of the kind whose inks are stored inverted


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_modes_and_that_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    path, picture = tmp_path / "picture.png", Image.fromarray(ramp()).convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    if mode.endswith("A"):
        picture.putalpha(Image.fromarray(grey()))  # compositing on any colour would show
    picture.save(path)
    assert np.array_equal(pixels(path), expected)


def test_palette_with_transparency_is_read_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "picture.png", Image.fromarray(ramp()).convert("P")
    picture.save(path, transparency=bytes(range(256)))
    with warnings.catch_warnings(action="error"):
        assert np.array_equal(pixels(path), np.asarray(picture.convert("RGB")))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_deep_grey_equals_8_bits_within_a_level(tmp_path: Path, suffix: str) -> None:
    deep = (grey().astype(np.uint16) << 8) + 77  # any low byte: at most 0.7 of a level
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(deep).save(path)
    assert np.abs(pixels(path) - grey()[:, :, None].astype(int)).max() <= 1


def test_deep_grey_in_big_endian_and_32_bits(tmp_path: Path) -> None:
    deep = grey().astype(np.uint16) * 257  # 255 -> 65535
    Image.frombytes("I;16B", (64, 48), deep.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(grey().astype(np.float32) / 255).save(tmp_path / "f.tif")
    for name in ("b.tif", "i.tif", "f.tif"):
        assert np.array_equal(pixels(tmp_path / name), np.repeat(grey()[:, :, None], 3, axis=2)), name


@pytest.mark.parametrize("values", [np.int32(-1), np.int32(65536), np.float32(2), np.float32("nan")])
def test_deep_grey_out_of_range_is_refused(tmp_path: Path, values: np.generic) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(np.full((4, 4), values)).save(path)
    with pytest.raises(InputError, match=r"deep\.tif: greyscale values from .* expected 0 to .*; save it with 8 or 16"):
        read_image(path)


def test_16_bit_colour_png_equals_8_bits_within_a_level(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in ramp())
    (tmp_path / "deep.png").write_bytes(png(64, 48, 16, rows))
    assert np.abs(pixels(tmp_path / "deep.png") - ramp()).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(pixels(path), np.asarray(first))


# ---- orientation


STORED = {  # how a camera lays the upright picture u (rows, columns, 3) down, from the EXIF standard's table
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.swapaxes(0, 1),
    6: lambda u: np.rot90(u),
    7: lambda u: u[::-1, ::-1].swapaxes(0, 1),
    8: lambda u: np.rot90(u, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_rotated_by_exif_equals_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](ramp()))).save(path, exif=exif)
    assert np.array_equal(pixels(path), ramp())


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0garbage" * 9,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # the orientation is the word "abc"
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # the orientation is 99
    ],
)
def test_damaged_exif_leaves_the_picture_as_it_is(
    tmp_path: Path, exif: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "picture.jpg"
    Image.fromarray(ramp()).save(path, exif=exif)
    with warnings.catch_warnings(action="error"):
        assert read_image(path).size == (64, 48)
    assert capfd.readouterr() == ("", "")


# ---- what is refused


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_short(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=rf"cut\.{suffix}: .*expected a JPEG, PNG, .*; (copy|convert)"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"hello, I am no picture\n", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture that can be read"),
        (png(11_000, 10_000), "more than 100 million pixels"),
        (png(60_000, 60_000), "more than 100 million pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes would make unreadable names
)
def test_files_that_are_no_usable_picture(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with warnings.catch_warnings(action="error"), pytest.raises(InputError, match=rf"bad\.png: {found}, expected a"):
        read_image(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path, found in [
        (tmp_path, "a directory"),
        (tmp_path / "missing.jpg", "no such file"),
        (tmp_path / "link", "a link to a missing file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / ("long" * 99), "cannot be opened"),
        (tmp_path / "null\0", "cannot be opened"),
    ]:
        with pytest.raises(InputError, match=rf"{found}.*, expected a JPEG, .*; check the path"):
            read_image(path)
        with pytest.raises(InputError, match=rf"{found}.*, expected 10 class names, .*; check the path"):
            read_labels(path, 10)
    (tmp_path / "link.jpg").symlink_to(photographs()[0])
    assert file_problem(tmp_path / "link.jpg") is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files the Linux way")
def test_no_file_stays_open(tmp_path: Path) -> None:
    good, cut, text = photographs()[0], tmp_path / "cut.png", tmp_path / "text.png"
    Image.fromarray(ramp()).save(cut)
    cut.write_bytes(cut.read_bytes()[:99])
    text.write_text("no picture")
    errors = []
    before = os.listdir("/proc/self/fd")
    for path in (good, cut, text):
        try:
            read_image(path)
        except InputError as error:
            errors.append(error)  # kept alive: its traceback would keep a forgotten file open
    assert len(errors) == 2
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---- preprocessing


def test_one_colour_by_hand() -> None:
    out = preprocess(Image.new("RGB", (300, 260), (255, 0, 128)), ImageSpec())
    assert out.shape == (3, 224, 224)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    by_hand = [2.2489083, -2.0357143, 0.4264924]  # (1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225
    for channel, value in zip(out, by_hand, strict=True):
        assert np.abs(channel - value).max() < 1e-6  # a few float32 steps


@pytest.mark.parametrize("scale", [1, 2])
def test_gradient_by_hand(scale: int) -> None:
    """Level = column, or each level twice: halved by a symmetric filter that is the same picture; then 16 are cut."""
    levels = np.tile(np.repeat(np.arange(256), scale), (256 * scale, 1)).astype(np.uint8)
    out = preprocess(Image.fromarray(np.stack([levels] * 3, axis=2)), PLAIN)
    assert np.allclose(out, np.arange(16, 240) / 255, atol=1e-7)  # atol: one float32 step
    normalised = preprocess(Image.fromarray(np.stack([levels] * 3, axis=2)), ImageSpec())
    assert abs(normalised[0, 0, 0] - -1.8439079) < 1e-6  # (16 / 255 - 0.485) / 0.229


@pytest.mark.parametrize(("columns", "left"), [(256, 16), (300, 38), (301, 38), (302, 39), (303, 40)])
def test_crop_offsets_round_halves_to_even(columns: int, left: int) -> None:
    picture = np.zeros((256, columns, 3), np.uint8)
    picture[:, :, 0] = np.arange(columns) // 2
    out = preprocess(Image.fromarray(picture), PLAIN)
    assert np.allclose(out[0, 0] * 255, (np.arange(224) + left) // 2, atol=1e-4)  # atol: float32 at 150


def triangle(length: int, target: int) -> NDArray[np.float64]:
    """The antialiasing bilinear filter from its definition: (target, length), rows add up to 1."""
    scale = length / target
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights: NDArray[np.float64] = np.clip(1 - distance, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


@pytest.mark.parametrize(
    ("picture", "size", "crop", "resized"),
    [
        ((333, 500), (224, 224), 0.875, (256, 384)),  # 256 * 500 / 333 = 384.4
        ((500, 333), (224, 224), 0.875, (384, 256)),
        ((300, 451), (224, 224), 1.0, (224, 336)),  # 224 * 451 / 300 = 336.7, truncated
        ((100, 120), (224, 224), 0.9, (248, 297)),  # enlarged; 224 / 0.9 = 248.9, truncated
        ((300, 400), (192, 320), 1.0, (240, 320)),  # a wide target: the width decides
        ((300, 900), (192, 320), 0.8, (240, 720)),  # a wide target: the height decides
        ((300, 400), (320, 192), 1.0, (320, 426)),  # a tall target
    ],
)
def test_against_the_filter_formula(
    picture: tuple[int, int], size: tuple[int, int], crop: float, resized: tuple[int, int]
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*picture, 3), dtype=np.uint8)
    out = preprocess(Image.fromarray(noise), ImageSpec(mean=PLAIN.mean, std=PLAIN.std, crop=crop), size)
    full = np.einsum("ab,bcd->acd", triangle(picture[0], resized[0]), noise)
    full = np.einsum("ab,cbd->cad", triangle(picture[1], resized[1]), full)
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    expected = full[top : top + size[0], left : left + size[1]].transpose(2, 0, 1)
    assert out.shape == (3, *size)
    assert np.abs(out * 255 - expected).max() < 1.02  # Pillow rounds to whole levels after each of its two passes


def test_bicubic_differs_and_keeps_one_colour() -> None:
    spec = ImageSpec(interpolation="bicubic")
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (99, 99, 3), dtype=np.uint8))
    assert not np.allclose(preprocess(noise, spec), preprocess(noise, ImageSpec()))
    plain = Image.new("RGB", (99, 77), (9, 99, 199))
    assert np.array_equal(preprocess(plain, spec), preprocess(plain, ImageSpec()))


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (ImageSpec(), (0, 224)),
        (ImageSpec(crop=0.0), None),
        (ImageSpec(crop=1.5), None),
        (ImageSpec(crop=float("nan")), None),
        (ImageSpec(interpolation="nearest"), None),  # type: ignore[arg-type]  # what a hand-edited manifest could hold
    ],
)
def test_impossible_settings(spec: ImageSpec, size: tuple[int, int] | None) -> None:
    with pytest.raises(UsageError, match=r"image size .*, crop .*, interpolation .*: expected .*; correct the image"):
        preprocess(Image.new("RGB", (8, 8)), spec, size)


def test_a_thread_of_a_picture_does_not_fill_the_memory() -> None:
    with pytest.raises(InputError, match=r"picture of 1x100000: too long and thin, .*; cut it first"):
        preprocess(Image.new("RGB", (100_000, 1)), ImageSpec())


def test_photographs_ship_with_their_licences() -> None:
    paths = photographs()
    assert [path.name for path in paths] == ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"]
    assert sum(path.stat().st_size for path in paths) < 300_000  # bytes; every wheel carries them
    licence = (paths[0].parent / "LICENSE.md").read_text(encoding="utf-8")
    for path in paths:
        assert max(read_image(path).size) <= 480
        assert f"`{path.name}`" in licence


def test_load_images_keeps_the_order() -> None:
    paths = photographs()[::-1]
    batch = load_images(paths, ImageSpec(), (64, 96))
    assert batch.shape == (4, 3, 64, 96)
    assert batch.dtype == np.float32
    for row, path in zip(batch, paths, strict=True):
        assert np.array_equal(row, preprocess(read_image(path), ImageSpec(size=(64, 96))))
    with pytest.raises(InputError, match="no pictures given"):
        load_images([], ImageSpec())


# ---- labels


@pytest.mark.parametrize(
    "content",
    [
        "tench\ngoldfish, Carassius\nshark",
        "tench\r\ngoldfish, Carassius\r\nshark\r\n\r\n",
        "\ufefftench\n  goldfish, Carassius\nshark\n\n",
        "te\x1bnch\x07\ngold\u202efish, Carassius\nsh\u2028ark\x00\n",
        json.dumps(["tench", "goldfish, Carassius", "shark"]),
        json.dumps({"2": "shark", "0": "tench", "1": "goldfish, Carassius"}),
        json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish, Carassius"], "2": ["", "shark"]}),
        json.dumps([["n01440764", "tench"], ["n01443537", "goldfish, Carassius"], ["n01484850", "shark"]]),
    ],
)
def test_label_layouts(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content.encode())
    assert read_labels(path, 3) == ["tench", "goldfish, Carassius", "shark"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"a\nb\nc\n", "3 names"),
        (b"a\n", "1 names"),
        (b"a\n\nb", "3 names"),
        (b"a\n\x1b\n\n", "the name of class 1 is empty"),
        (b"\xff\xfea\0\n\0b\0", "not UTF-8 text"),
        (b'["a", 7]', "an entry that is no name"),
        (b'["a", []]', "an entry that is no name"),
        (b'{"0": "a", "2": "b"}', '2 entries but none for class "1"'),
        (b"{0: 'a', 1: 'b'}", "Expecting property name"),
        (b"[" * 99_999, "maximum recursion"),
        (b"a\n" * 2_000_001, "more than 4 MB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes would make unreadable names
)
def test_labels_that_are_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"labels\.txt: {found}.*expected 2 class names.*; "):
        read_labels(path, 2)
