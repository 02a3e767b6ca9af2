"""The reference task: pictures of one object each, to be told apart by its shape and its texture.

Every picture is computed from its split and index alone, so that calibration and accuracy can be measured anywhere,
without a download, on pictures that no network here was trained on. The cue of the texture is local, that of the shape
global; place, scale, angle, colours, light, background, clutter, occlusion and noise vary, so that a small network
errs now and then: where nothing is ever wrong, int8 can lose nothing.

>>> CLASSES[label("test", 5)], picture("test", 5).size
('blotched ring', (256, 256))
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevit.errors import UsageError

SIDE = 256  # pixels; the usual crop of 0.875 makes it 224 without resizing
SPLITS = {"train": 8192, "calibration": 1024, "test": 4096}  # pictures; all classes equally often in each
SEED = 20220521  # of the task itself; other pictures would need other weights

TEXTURES = ("striped", "blotched", "checked", "dotted")
SHAPES = ("disc", "ring", "triangle", "cross")
CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)

Plane = NDArray[np.float32]  # (h, w), of the whole picture or of a box in it
Box = tuple[slice, slice]
WHOLE = (slice(None), slice(None))

_ROWS, _COLUMNS = np.meshgrid(*2 * [np.arange(SIDE, dtype=np.float32)], indexing="ij")


class Pose(NamedTuple):
    """Where an object lies: its centre and radius in pixels, and its angle in radians."""

    x: float
    y: float
    radius: float
    angle: float


def label(split: str, index: int) -> int:
    """The class of a picture, as an index of CLASSES; any 16 in succession are one of each.

    Raises:
        UsageError: no such split, or no such picture in it.
    """
    _check(split, index)
    return index % len(CLASSES)


def picture(split: str, index: int) -> Image.Image:
    """A picture of the task, SIDE x SIDE pixels, mode RGB, the same at every call.

    Raises:
        UsageError: no such split, or no such picture in it.
    """
    shape, texture = divmod(label(split, index), len(TEXTURES))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((SEED, list(SPLITS).index(split), index))))
    canvas = _background(rng)  # h w 3
    radius = rng.uniform(50, 92)
    room = max(radius + 4, 64.0)  # pixels from the border, so that the crop of 224 cuts off little
    centre = rng.uniform(room, SIDE - room, 2)
    pose = Pose(centre[0], centre[1], radius, rng.uniform(0, 2 * np.pi))
    for _ in range(rng.integers(1, 4)):  # small plain objects, which are behind it and mean nothing
        small = _small_pose(rng)
        _paint(canvas[_box(small)], _cover(int(rng.integers(len(SHAPES))), small), _colour(rng))
    first = 160 + 95 * rng.random(3, np.float32)  # the object is the brightest thing, its pattern darker
    second = first * np.float32(rng.uniform(0.15, 0.6))
    pattern = _texture(rng, texture, pose)[..., None]  # h w 1
    _paint(canvas[_box(pose)], _cover(shape, pose), first + pattern * (second - first))
    for _ in range(rng.integers(0, 3)):  # bars that hide a part of it
        _paint(canvas, _bar(rng), _colour(rng))
    light = 1 + rng.uniform(0, 0.45) * _ramp(rng.uniform(0, 2 * np.pi))  # from one side
    canvas *= light[..., None]
    canvas += rng.uniform(3, 22) * rng.standard_normal((SIDE, SIDE, 1), np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8), "RGB")


def _check(split: str, index: int) -> None:
    if split not in SPLITS:
        raise UsageError(f"split {split!r} of the reference task: expected one of {', '.join(SPLITS)}")
    if not 0 <= index < SPLITS[split]:
        raise UsageError(f"picture {index} of the reference task: expected 0 to {SPLITS[split] - 1} in {split}")


def _colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A colour (3,) of what is no object: 20 to 140 of 255.

    With objects of any colour on any other, small networks saw nothing but chance in their first 1,000 steps.
    """
    return 20 + 120 * rng.random(3, np.float32)


def _noise(rng: np.random.Generator, cells: int) -> Plane:
    """Smooth noise, most of it within 0 to 1, `cells` blobs to a side."""
    coarse = rng.random((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """(h, w, 3): two colours mixed by noise of a scale between blobs and grain."""
    first = _colour(rng)
    second = first + np.float32(rng.uniform(10, 60)) * (rng.random(3, np.float32) - 0.5)
    mix = _noise(rng, int(rng.integers(3, 33)))[..., None]  # h w 1
    return np.asarray(first + mix * (second - first), np.float32)  # h w 3


def _box(pose: Pose) -> Box:
    """The part of the picture where the object is."""
    reach = 1.1 * pose.radius + 1  # a cross reaches 1.05 radii
    spans = ((int(max(at - reach, 0)), int(max(at + reach, 0)) + 1) for at in (pose.y, pose.x))
    return tuple(slice(*span) for span in spans)  # type: ignore[return-value]  # two of them


def _turned(pose: Pose, box: Box) -> tuple[Plane, Plane]:
    """The coordinates of the box's pixels in the object's frame, in pixels."""
    x, y = _COLUMNS[box] - np.float32(pose.x), _ROWS[box] - np.float32(pose.y)
    cos, sin = np.float32(np.cos(pose.angle)), np.float32(np.sin(pose.angle))
    return cos * x + sin * y, cos * y - sin * x


def _ramp(angle: float) -> Plane:
    """-1 to 1 across the picture, about."""
    return _turned(Pose(SIDE / 2, SIDE / 2, 1, angle), WHOLE)[0] / np.float32(SIDE / 2)


def _cover(shape: int, pose: Pose) -> Plane:
    """How much of each pixel of its box the shape covers, 0 to 1, from its distance to the outline."""
    u, v = _turned(pose, _box(pose))
    r = np.float32(pose.radius)
    if SHAPES[shape] == "disc":
        outside = np.sqrt(u * u + v * v) - 0.9 * r
    elif SHAPES[shape] == "ring":
        outside = np.abs(np.sqrt(u * u + v * v) - 0.75 * r) - 0.25 * r
    elif SHAPES[shape] == "triangle":
        slant = np.float32(3**0.5 / 2)  # of the two other sides, of an equilateral triangle
        outside = np.maximum(v, slant * np.abs(u) - v / 2) - 0.55 * r
    else:  # cross
        u, v = np.abs(u), np.abs(v)
        outside = np.minimum(np.maximum(u - r, v - 0.32 * r), np.maximum(v - r, u - 0.32 * r))
    covered: Plane = np.clip(0.5 - outside, 0, 1)
    return covered


def _texture(rng: np.random.Generator, texture: int, pose: Pose) -> Plane:
    """The pattern in the box of an object, 0 to 1, turned and spaced at random."""
    period, box = rng.uniform(16, 30), _box(pose)  # pixels
    if TEXTURES[texture] == "blotched":
        return np.asarray(np.clip(3 * _noise(rng, round(2 * SIDE / period))[box] - 1, 0, 1))
    u, v = _turned(pose._replace(angle=rng.uniform(0, 2 * np.pi)), box)
    wave = np.float32(2 * np.pi / period)
    if TEXTURES[texture] == "striped":
        pattern = np.sin(wave * u)
    elif TEXTURES[texture] == "checked":
        pattern = 1.5 * np.sin(wave / 2 * u) * np.sin(wave / 2 * v)
    else:  # dotted
        pattern = np.cos(wave * u) + np.cos(wave * v) - 1
    return np.asarray(np.clip(0.5 + 1.5 * pattern, 0, 1), np.float32)


def _small_pose(rng: np.random.Generator) -> Pose:
    x, y = rng.uniform(0, SIDE, 2)
    return Pose(x, y, rng.uniform(8, 30), rng.uniform(0, 2 * np.pi))


def _bar(rng: np.random.Generator) -> Plane:
    """A straight bar across the picture."""
    x, y = rng.uniform(0.2 * SIDE, 0.8 * SIDE, 2)
    _, v = _turned(Pose(x, y, 1, rng.uniform(0, 2 * np.pi)), WHOLE)
    covered: Plane = np.clip(np.float32(rng.uniform(3, 11)) - np.abs(v), 0, 1)
    return covered


def _paint(canvas: NDArray[np.float32], cover: Plane, colour: NDArray[np.float32]) -> None:
    """Lay a colour (3,) or a picture (h, w, 3) over the canvas (h, w, 3) as far as `cover` says."""
    canvas += cover[..., None] * (colour - canvas)
