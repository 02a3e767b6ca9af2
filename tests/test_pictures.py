"""Directories of pictures as users have them: classes, links, hidden entries, damaged files."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevit import pictures
from edgevit.errors import InputError
from edgevit.inputs import preprocess, read_image
from edgevit.pictures import Skipped, find_pictures, none_usable, read_usable
from edgevit.specs import ImageSpec

ROOT = Path(__file__).resolve().parent.parent
SPEC = ImageSpec((16, 24))
EXPECTED = (
    "expected a directory of pictures, a directory with a folder of pictures for each class, or reference-task; "
    "check the path"
)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Write pictures at these places below one directory, each of another colour."""

    def write(*names: str) -> Path:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with (root / name).open("wb") as stream:
                Image.new("RGB", (30, 20), (i, 0, 0)).save(stream, "PNG")
        return root

    return write


def labels(root: Path) -> dict[str, int | None]:
    return {picture.name: picture.label for picture in find_pictures(root, "test").pictures}


def failure(root: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        find_pictures(root, "test")
    return str(caught.value).replace(str(root), "DATA")


def test_import_needs_no_torch() -> None:
    code = "import sys, edgevit.pictures; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_folders_are_classes_in_the_order_of_their_names(tree: Callable[..., Path]) -> None:
    found = find_pictures(tree("b/2.png", "b/10.png", "a/deep/er/x.PNG", "Z/q.jpeg"), "test")
    assert (found.source, found.kind, found.classes) == ("data", "class folders", ("Z", "a", "b"))
    names = [(picture.name, picture.label) for picture in found.pictures]
    assert names == [("Z/q.jpeg", 0), ("a/deep/er/x.PNG", 1), ("b/10.png", 2), ("b/2.png", 2)]


def test_directory_without_folders_has_no_classes(tree: Callable[..., Path]) -> None:
    found = find_pictures(tree("b.png", "a.png"), "test")
    assert (found.kind, found.classes) == ("folder", ())
    assert [(picture.name, picture.label) for picture in found.pictures] == [("a.png", None), ("b.png", None)]


def test_pictures_beside_the_folders_have_no_class_and_an_empty_folder_keeps_its_number(
    tree: Callable[..., Path],
) -> None:
    root = tree("a/x.png", "c/x.png", "loose.png")
    (root / "b").mkdir()
    assert labels(root) == {"loose.png": None, "a/x.png": 0, "c/x.png": 2}
    assert find_pictures(root, "test").classes == ("a", "b", "c")


def test_hidden_entries_and_other_files_are_passed_over(tree: Callable[..., Path]) -> None:
    root = tree("a/x.png", "a/.thumb.png", ".git/x.png", "a/.cache/y.png")
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "README").write_text("no picture")
    assert labels(root) == {"a/x.png": 0}


def test_links_are_followed_and_circles_end(tree: Callable[..., Path], tmp_path: Path) -> None:
    root = tree("a/x.png", "b/y.png")
    (root / "a" / "back").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to("self")
    (root / "c").symlink_to(root / "b")
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "b" / "circle.png").symlink_to("circle.png")
    found = labels(root)
    assert {name: label for name, label in found.items() if label == 2} == {
        "c/y.png": 2,
        "c/gone.png": 2,
        "c/circle.png": 2,
    }
    assert "a/x.png" in found and "a/up/b/y.png" in found and "a/back/x.png" not in found
    assert len(found) < 20


def test_links_that_multiply_are_not_walked_again_and_again(tree: Callable[..., Path]) -> None:
    root = tree("a/0/x.png")
    for depth in range(40):  # two ways down at each of 40 depths: 2^40 paths
        here = root / "steps" / str(depth)
        here.mkdir(parents=True)
        for way in ("left", "right"):
            (here / way).symlink_to(root / "steps" / str(depth + 1))
    (root / "steps" / "40").mkdir()
    assert len(labels(root)) == 1


def test_folders_may_be_nested_deeper_than_calls(tree: Callable[..., Path]) -> None:
    root, calls = tree("a/" + "d/" * 300 + "x.png"), sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)  # and not 1000 folders, which pytest could not remove
    try:
        found = find_pictures(root, "test")
    finally:
        sys.setrecursionlimit(calls)
    assert len(found.pictures) == 1 and found.pictures[0].label == 0


def test_folder_that_cannot_be_opened_is_named_and_the_rest_is_read(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("a/x.png", "b/y.png")
    visible = pictures._visible

    def refuse(folder: Path) -> object:
        if folder.name == "b":
            raise PermissionError(13, "Permission denied")
        return visible(folder)

    monkeypatch.setattr(pictures, "_visible", refuse)
    found = find_pictures(root, "test")
    assert found.skipped == (Skipped("b", "cannot be opened (Permission denied)"),)
    assert [picture.name for picture in found.pictures] == ["a/x.png"] and found.classes == ("a", "b")


def test_empty_missing_and_odd_directories_are_refused(tmp_path: Path) -> None:
    assert failure(tmp_path) == f"DATA: no pictures in it, {EXPECTED}"
    assert failure(tmp_path / "nowhere") == f"DATA: no such directory, {EXPECTED}"
    (tmp_path / "file").write_text("x")
    assert failure(tmp_path / "file") == f"DATA: not a directory, {EXPECTED}"
    (tmp_path / "circle").symlink_to("circle")
    assert failure(tmp_path / "circle").startswith("DATA: cannot be opened (Too many levels")
    assert failure("a\0b").startswith("DATA: cannot be opened (")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    assert failure(tmp_path / "classes") == f"DATA: no pictures in it, {EXPECTED}"


def test_too_many_pictures_are_refused(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURES", 2)
    assert len(labels(tree("a/1.png", "a/2.png"))) == 2
    assert failure(tree("a/1.png", "a/2.png", "b/3.png")).startswith("DATA: more than 2 pictures, ")


def test_source_is_the_last_part_of_the_path_however_it_is_written(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("a/x.png")
    monkeypatch.chdir(root)
    assert find_pictures(".", "test").source == find_pictures(f"{root}/", "test").source == "data"


def test_usable_pictures_are_preprocessed_for_every_shape_and_others_named(tree: Callable[..., Path]) -> None:
    root = tree("1.png", "2.png", "3.png", "4.png")
    (root / "2.png").write_bytes(b"no picture")
    (root / "3.png").unlink()
    os.mkfifo(root / "3.png")
    Image.new("RGB", (90_000, 1)).save(root / "4.png")
    found, skipped = find_pictures(root, "test"), list[Skipped]()
    reads = list(read_usable(found, found.pictures, [(SPEC, (16, 24)), (SPEC, (32, 32))], skipped))
    assert [read.picture.name for read in reads] == ["1.png"]
    expected = [preprocess(read_image(root / "1.png"), SPEC, size) for size in ((16, 24), (32, 32))]
    assert all(np.array_equal(a, b) for a, b in zip(reads[0].arrays, expected, strict=True))
    assert [each.name for each in skipped] == ["2.png", "3.png", "4.png"]
    assert skipped[1].why.startswith("not a regular file, expected") and "too long and thin" in skipped[2].why
    assert not any(str(root) in each.why for each in skipped)
    assert str(none_usable("data", skipped)).startswith(
        "data: none of its 3 pictures can be read, the first is 2.png: not a picture that can be read, "
    )


def test_order_follows_the_seed_and_holds_every_picture_once(tree: Callable[..., Path]) -> None:
    found = find_pictures(tree(*(f"{i}.png" for i in range(20))), "test")
    first, again, other = (found.shuffled(seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(picture.name for picture in first) == sorted(picture.name for picture in found.pictures)


def test_reference_task_goes_by_name_and_a_directory_of_that_name_by_path(
    tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevit.reference import task

    found = find_pictures("reference-task", "test")
    assert (found.source, found.kind, found.split) == ("reference-task", "reference-task", "test")
    assert found.classes == tuple(task.CLASSES) and len(found.pictures) == task.SPLITS["test"]
    picture = found.pictures[17]
    assert (picture.name, picture.label) == ("test/17", task.label("test", 17))
    image = found.read(picture)
    assert image.tobytes() == task.picture("test", 17).tobytes()
    assert found.sha256(picture, image) != found.sha256(found.pictures[18], found.read(found.pictures[18]))
    root = tree("x.png")
    root.rename(root.parent / "reference-task")
    monkeypatch.chdir(root.parent)
    assert find_pictures("./reference-task", "test").kind == "folder"
