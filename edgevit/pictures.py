"""Pictures to calibrate and to evaluate on: a directory, with a folder for each class or none, or the reference task.

Found first, read one by one later: a directory may hold a million. What cannot be read is left out and named, because
one damaged file among many says nothing of the rest. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevit.artifact import sha256_of
from edgevit.errors import InputError
from edgevit.inputs import preprocess, read_image
from edgevit.manifest import os_reason
from edgevit.specs import ImageSpec, Size

REFERENCE_TASK = "reference-task"  # a directory of this name is given as ./reference-task
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
MAX_PICTURES = 5_000_000  # ImageNet-1k has 1.3 million; more is a whole disk, given by mistake
EXPECTED = "expected a directory of pictures, a directory with a folder of pictures for each class, or reference-task"


@dataclass(frozen=True)
class Picture:
    """One picture, not read yet: its name below the directory, its class where it has one, and where it is.

    `path` is None in the reference task, of which it is number `index`.
    """

    name: str
    label: int | None
    path: Path | None = None
    index: int = 0


@dataclass(frozen=True)
class Skipped:
    """A picture or folder that was left out, and why; `why` names no other place of the machine."""

    name: str
    why: str


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a source, sorted by name.

    `source` is the last part of its path; `classes` is empty where the pictures have none; `split` is that of the
    reference task; `skipped` has the folders that cannot be opened.
    """

    source: str
    kind: Literal["class folders", "folder", "reference-task"]
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...] = ()
    split: str = ""
    skipped: tuple[Skipped, ...] = ()

    def shuffled(self, seed: int) -> list[Picture]:
        """The pictures in an order that `seed` decides."""
        return [self.pictures[i] for i in np.random.default_rng(seed).permutation(len(self.pictures))]

    def read(self, picture: Picture) -> Image.Image:
        """The picture, mode RGB.

        Raises:
            InputError: it cannot be read.
        """
        if picture.path is not None:
            return read_image(picture.path)
        from edgevit.reference import task

        return task.picture(self.split, picture.index)

    def sha256(self, picture: Picture, image: Image.Image) -> str:
        """sha256 of the picture's file, or of its pixels where it has none, as hexadecimal text.

        Raises:
            InputError: the file went away.
        """
        if picture.path is None:
            return hashlib.sha256(image.tobytes()).hexdigest()
        try:
            return sha256_of(picture.path)
        except OSError as error:
            raise InputError(f"{picture.path}: {os_reason(error)}") from None


@dataclass(frozen=True)
class Read:
    """A picture that could be read: float32 (3, height, width), normalised, for each of the shapes asked for."""

    picture: Picture
    image: Image.Image
    arrays: tuple[NDArray[np.float32], ...]


def find_pictures(source: str | Path, split: Literal["train", "calibration", "test"]) -> PictureSet:
    """The pictures of a directory, or those of the reference task's `split` if its name is given.

    Folders in the directory are classes, in the order of their names, and hold pictures at any depth, as torchvision's
    ImageFolder has it; pictures beside them have no class. Hidden entries and files that are not named like a picture
    are passed over. Links are followed, no folder is visited twice in a class.

    Raises:
        InputError: no directory, or no picture in it.
    """
    if str(source) == REFERENCE_TASK:
        return _reference_task(split)
    root = Path(source)
    try:
        entries = _visible(root)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{source}: {_directory_problem(error)}, {EXPECTED}; check the path") from None
    folders = [entry for entry in entries if _is_folder(entry)]
    skipped: list[Skipped] = []
    pictures = [Picture(e.name, None, Path(e)) for e in entries if e not in folders and _is_picture(e.name)]
    for label, folder in enumerate(folders):
        for path in _pictures_below(Path(folder), root, skipped):
            pictures.append(Picture(path.relative_to(root).as_posix(), label, path))
            if len(pictures) > MAX_PICTURES:
                raise InputError(f"{source}: more than {MAX_PICTURES:,} pictures, {EXPECTED}; give a smaller one")
    if not pictures:
        why = f" ({skipped[0].name}: {skipped[0].why})" if skipped else ""
        raise InputError(f"{source}: no pictures in it{why}, {EXPECTED}; check the path")
    name = root.resolve().name
    classes = tuple(folder.name for folder in folders)
    kind: Literal["class folders", "folder"] = "class folders" if classes else "folder"
    return PictureSet(name, kind, tuple(pictures), classes, skipped=tuple(skipped))


def read_usable(
    found: PictureSet, sequence: Iterable[Picture], shapes: Sequence[tuple[ImageSpec, Size]], skipped: list[Skipped]
) -> Iterator[Read]:
    """Read pictures one by one and preprocess each for every (spec, (height, width)); `skipped` gets what cannot be.

    Raises:
        UsageError: an impossible shape.
    """
    for picture in sequence:
        try:
            image = found.read(picture)
            arrays = tuple(preprocess(image, spec, size) for spec, size in shapes)
        except InputError as error:
            skipped.append(Skipped(picture.name, str(error).removeprefix(f"{picture.path}: ")))
        else:
            yield Read(picture, image, arrays)


def none_usable(source: str | Path, skipped: Sequence[Skipped]) -> InputError:
    """What to raise where not one picture could be read."""
    first = skipped[0]
    return InputError(
        f"{source}: none of its {len(skipped)} pictures can be read, the first is {first.name}: {first.why}; "
        "give other pictures"
    )


def _reference_task(split: str) -> PictureSet:
    from edgevit.reference import task

    count = task.SPLITS[split]
    pictures = tuple(Picture(f"{split}/{i}", task.label(split, i), index=i) for i in range(count))
    return PictureSet(REFERENCE_TASK, "reference-task", pictures, tuple(task.CLASSES), split)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder but hidden ones, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _pictures_below(folder: Path, root: Path, skipped: list[Skipped]) -> list[Path]:
    """The pictures in a class's folder, at any depth, sorted; without recursion: folders may nest deeper than calls."""
    waiting, seen, found = [folder], set[Any](), list[Path]()
    while waiting and len(found) <= MAX_PICTURES:
        here = waiting.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link back, or a second link to the same folder
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = _visible(here)
        except OSError as error:
            skipped.append(Skipped(here.relative_to(root).as_posix(), f"cannot be opened ({os_reason(error)})"))
            continue
        folders = [entry for entry in entries if _is_folder(entry)]
        waiting += [Path(entry) for entry in reversed(folders)]  # the first one is visited next
        found += [Path(entry) for entry in entries if entry not in folders and _is_picture(entry.name)]
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _directory_problem(error: Exception) -> str:
    """Why a path is no directory that can be listed."""
    if isinstance(error, FileNotFoundError):
        return "no such directory"
    if isinstance(error, NotADirectoryError):
        return "not a directory"
    reason = os_reason(error) if isinstance(error, OSError) else str(error)
    return f"cannot be opened ({reason})"
