"""The artifact directory: whole or not there at all, and nothing in it believed before it is checked."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgevit import artifact
from edgevit.artifact import Proven, artifact_name, describe_export, load_artifact, sha256_of, staged, write_manifest
from edgevit.contracts import Built
from edgevit.errors import ArtifactError, OutputError, UsageError
from edgevit.manifest import BY_SIZE, MANIFEST, MAX_MANIFEST_BYTES, SCHEMA_VERSION
from edgevit.specs import MAX_SIZES, Complexity, ExportSpec, ImageSpec, Parity, TensorSpec

NAME = "net-onnx-fp32"
FILES = {"model_file": "model.onnx", "checked_file": "model.onnx"}
WORDS = {"model": "net", "target": "onnx", "precision": "fp32", **FILES}
IMAGE = {"name": "image", "values": "normalised"}
REST = {
    "image": {"size": [32, 32], "mean": [0, 0, 0], "std": [1, 1, 1], "crop": 1, "interpolation": "bilinear"},
    "batch": 1,
    "seed": 0,
    "num_classes": None,
    "features_only": False,
    "options": {},
    "settings": {},
    "inputs": [IMAGE],
    "weights": {"source": "random"},
}
COUNTED = Complexity(1, 2, {"Conv": 1}, 3, 4, 5, {}, {})
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes, FIPS 180-4


def fill(stage: Path, content: bytes = b"graph") -> None:
    """What an export leaves in the staging directory."""
    (stage / "model.onnx").write_bytes(content)
    (stage / "sample").mkdir()
    np.save(stage / "sample" / "input.npy", np.zeros((1, 3), np.float32))
    write_manifest(stage, WORDS | REST)


def made(
    out: Path, content: bytes = b"graph", *, force: bool = False, then: Callable[[], object] = lambda: None
) -> Path:
    """An artifact; `then` runs while its files are written and not yet in place."""
    with staged(out, NAME, force=force) as stage:
        fill(stage, content)
        then()
    return out / NAME


def raising(error: BaseException) -> None:
    raise error


def manifest_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return document


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    document = manifest_of(path)
    change(document)
    (path / MANIFEST).write_text(json.dumps(document))
    return path


def refusal(path: Path) -> str:
    """Why an artifact is not read: one line."""
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return made(tmp_path)


# ---- written and read


def test_what_was_written_is_read_back(whole: Path) -> None:
    read = load_artifact(whole)
    assert read.name == NAME
    assert read.model_file == whole / "model.onnx"
    assert read.manifest["schema_version"] == SCHEMA_VERSION
    assert {key: read.manifest[key] for key in WORDS} == WORDS
    assert load_artifact(str(whole)) == read


def test_the_manifest_lists_every_other_file_with_size_and_sha256(whole: Path) -> None:
    files = manifest_of(whole)["files"]
    assert [entry["name"] for entry in files] == ["model.onnx", "sample/input.npy"]
    for entry in files:
        path = whole / entry["name"]
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == sha256_of(path)


def test_sha256_is_of_the_bytes_whatever_their_number(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "file"
    path.write_bytes(b"")
    assert sha256_of(path) == EMPTY
    content = os.urandom(artifact.CHUNK + 1)
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_a_manifest_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        write_manifest(tmp_path, {"parity": float("nan")})


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ([(224, 224)], "m-onnx-fp32"),
        ([(256, 320)], "m-onnx-fp32-256x320"),
        ([(224, 256)], "m-onnx-fp32-224x256"),
        ([(224, 224), (256, 320)], "m-onnx-fp32-224x224+256x320"),
        ([(256, 320), (224, 224)], "m-onnx-fp32-256x320+224x224"),
    ],
)
def test_the_name_gives_sizes_that_are_not_the_model_s_own(sizes: list[tuple[int, int]], name: str) -> None:
    assert artifact_name("m", "onnx", "fp32", sizes, (224, 224)) == name


def proven(height: int, width: int, sample: str = "sample") -> Proven:
    signature = (TensorSpec("image", ("batch", 3, height, width), layout="NCHW"),)
    name = f"model-{height}x{width}.onnx"
    built = Built(
        name, name, onnx.ModelProto(), signature, (TensorSpec("logits", ("batch", 5)),), (), {"pointwise": "dense"}
    )
    return Proven(built, Parity(4, height * 1e-8, 1e-3, 1.0, 0.99999, 1.0, "reference", "ort"), COUNTED, sample)


def described(*sizes: Proven) -> dict[str, Any]:
    """The account of an export at these sizes, as JSON has it."""
    spec = ExportSpec("net", "onnx", batch="dynamic", options=(("spatial", True),))
    by_size = {(int(p.built.inputs[0].shape[2]), int(p.built.inputs[0].shape[3])): p for p in sizes}
    document: dict[str, Any] = json.loads(json.dumps(describe_export(spec, ImageSpec(), by_size), allow_nan=False))
    return document


def test_an_export_is_described_in_json() -> None:
    record = described(proven(64, 96))
    assert record["image"]["size"] == [64, 96]
    assert record["batch"] == "dynamic"
    assert record["options"] == {"spatial": True}
    assert record["inputs"] == [{**IMAGE, "shape": ["batch", 3, 64, 96], "dtype": "float32", "layout": "NCHW"}]
    assert record["parity"]["passed"] is True
    assert "resolutions" not in record


def test_several_sizes_are_described_each_and_the_first_where_one_would_be() -> None:
    one, two = proven(64, 96), proven(32, 32, "sample/32x32")
    record, alone = described(one, two), described(one)
    assert {key: record[key] for key in alone} == alone
    first, second = record["resolutions"]
    assert first == {"image_size": [64, 96], "sample": "sample", **{key: alone[key] for key in BY_SIZE}}
    assert (second["image_size"], second["sample"]) == ([32, 32], "sample/32x32")
    assert {key: second[key] for key in BY_SIZE} == {key: described(two)[key] for key in BY_SIZE}


def test_the_image_spec_survives(whole: Path) -> None:
    image = ImageSpec((64, 96), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, "bicubic")
    rewritten(whole, lambda m: m.update(image=dataclasses.asdict(image)))
    assert load_artifact(whole).image_spec == image


@pytest.mark.parametrize(
    "image",
    [None, 5, {}, {"size": [64]}, {"size": "ab", "mean": [0], "std": [1], "crop": 1, "interpolation": "bilinear"}],
)
def test_an_incomplete_image_spec_is_refused(whole: Path, image: Any) -> None:
    rewritten(whole, lambda m: m.update(image=image))
    assert "not an edgevit manifest (image is missing" in refusal(whole)


def test_an_artifact_without_image_spec_is_refused(whole: Path) -> None:
    rewritten(whole, lambda m: m.pop("image"))
    assert "not an edgevit manifest (image is missing" in refusal(whole)


def test_a_checkpoint_named_random_is_not_random(whole: Path) -> None:
    assert load_artifact(whole).random_weights
    rewritten(whole, lambda m: m.update(weights={"source": "random", "sha256": EMPTY, "entry": "state_dict"}))
    assert not load_artifact(whole).random_weights


# ---- arrays


def test_an_array_is_read(whole: Path) -> None:
    assert load_artifact(whole).array("sample/input.npy").shape == (1, 3)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"text"])
def test_what_is_no_array_is_refused(whole: Path, content: bytes) -> None:
    read = load_artifact(whole)
    (whole / "sample" / "input.npy").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"input\.npy: not a NumPy array .*export the model again"):
        read.array("sample/input.npy")


def test_an_array_that_is_a_pickle_is_not_executed(whole: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    read = load_artifact(whole)
    np.save(whole / "sample" / "input.npy", np.array([Trap()], dtype=object))
    with pytest.raises(ArtifactError, match="not a NumPy array"):
        read.array("sample/input.npy")
    assert not ran.exists()


@pytest.mark.parametrize("dtype", ["float64", "int32", "complex64"])
def test_an_array_of_another_type_is_refused(whole: Path, dtype: str) -> None:
    read = load_artifact(whole)
    np.save(whole / "sample" / "input.npy", np.zeros(3, dtype))
    with pytest.raises(ArtifactError, match="expected a float32 array"):
        read.array("sample/input.npy")


def test_an_array_that_is_not_there_is_named(whole: Path) -> None:
    with pytest.raises(ArtifactError, match=r"output\.npy"):
        load_artifact(whole).array("sample/output.npy")


# ---- what was changed is not believed


def test_a_changed_byte_is_found(whole: Path) -> None:
    path = whole / "model.onnx"
    path.write_bytes(b"grapg")
    message = refusal(whole)
    assert message.startswith(f"{path}: changed since it was exported (sha256 {sha256_of(path)[:12]}..., expected ")
    assert message.endswith("; export the model again")


def test_a_truncated_file_is_told_by_its_size(whole: Path) -> None:
    (whole / "model.onnx").write_bytes(b"gra")
    assert "changed since it was exported (3 bytes, expected 5); export the model again" in refusal(whole)


def test_a_missing_file_is_named(whole: Path) -> None:
    (whole / "sample" / "input.npy").unlink()
    assert refusal(whole) == (
        f"{whole / 'sample' / 'input.npy'}: missing, the manifest lists it; export the model again"
    )


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_plain_file_is_not_read(whole: Path, kind: str) -> None:
    (whole / "model.onnx").unlink()
    (Path.mkdir if kind == "directory" else os.mkfifo)(whole / "model.onnx")  # reading a pipe would never end
    assert "missing, the manifest lists it" in refusal(whole)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sample/../../secret", "", ".", "..", "..\\secret"])
def test_a_name_that_leaves_the_directory_is_refused(whole: Path, name: str) -> None:
    secret = whole.parent / "secret"
    secret.write_bytes(b"")
    rewritten(whole, lambda m: m["files"].append({"name": name, "bytes": 0, "sha256": EMPTY}))
    assert refusal(whole) == (f"artifact {whole}: file name {name!r} leaves the directory; do not trust this artifact")


def test_a_link_is_not_followed_even_to_the_same_bytes(whole: Path) -> None:
    elsewhere = whole.parent / "elsewhere.onnx"
    (whole / "model.onnx").rename(elsewhere)
    (whole / "model.onnx").symlink_to(elsewhere)
    assert "file name 'model.onnx' leaves the directory" in refusal(whole)


def test_a_linked_folder_is_not_followed_either(whole: Path) -> None:
    (whole / "sample").rename(whole.parent / "sample")
    (whole / "sample").symlink_to(whole.parent / "sample", target_is_directory=True)
    assert "file name 'sample/input.npy' leaves the directory" in refusal(whole)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"], ids=["too long", "null", "no unicode"])
def test_a_name_that_no_file_can_have_is_refused(whole: Path, name: str) -> None:
    rewritten(whole, lambda m: m["files"].append({"name": name, "bytes": 0, "sha256": EMPTY}))
    refusal(whole)


# ---- the manifest


def test_a_missing_directory_is_told_from_one_that_is_no_artifact(tmp_path: Path, whole: Path) -> None:
    expected = "expected the directory that `edgevit export` wrote"
    assert refusal(tmp_path / "no") == f"artifact {tmp_path / 'no'}: no such directory; {expected}"
    assert refusal(whole / MANIFEST) == f"artifact {whole / MANIFEST}: not a directory; {expected}"
    assert refusal(tmp_path) == f"artifact {tmp_path}: it has no {MANIFEST}; {expected}"


def test_a_name_too_long_for_the_system_is_no_artifact() -> None:
    refusal(Path("x" * 300))


def test_a_directory_that_may_not_be_searched_is_no_artifact(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)  # root may search any directory, so the tests cannot make one
    assert "ermission denied" in refusal(whole)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        ("no JSON", "not JSON"),
        ('{"schema_version": 1', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),  # Python refuses to read numbers of so many digits
        ("[]", "a JSON object was expected"),
        ("null", "a JSON object was expected"),
        ('"text"', "a JSON object was expected"),
    ],
    ids=["empty", "text", "cut", "deep", "long number", "list", "null", "string"],
)
def test_a_manifest_that_is_no_json_object_is_refused(whole: Path, text: str, problem: str) -> None:
    (whole / MANIFEST).write_text(text)
    assert refusal(whole) == f"{whole / MANIFEST}: {problem}; export the model again"


def test_a_manifest_that_is_not_utf_8_is_refused(whole: Path) -> None:
    (whole / MANIFEST).write_bytes(b'{"schema_version": 1, "model": "\xff"}')
    assert "not JSON" in refusal(whole)


def test_a_manifest_larger_than_any_is_not_read(whole: Path) -> None:
    os.truncate(whole / MANIFEST, MAX_MANIFEST_BYTES + 1)  # a hole: no space is taken
    assert "larger than any manifest" in refusal(whole)


def test_a_newer_schema_says_to_update_before_anything_else_is_checked(whole: Path) -> None:
    rewritten(whole, lambda m: m.update(schema_version=SCHEMA_VERSION + 1, files="another layout"))
    assert refusal(whole) == (
        f"{whole / MANIFEST}: schema_version {SCHEMA_VERSION + 1}, this edgevit reads {SCHEMA_VERSION}; update edgevit"
    )


@pytest.mark.parametrize("version", [None, "1", 1.0, True, 0, -1, [1]])
def test_a_schema_version_that_is_no_number_is_refused(whole: Path, version: Any) -> None:
    rewritten(whole, lambda m: m.update(schema_version=version))
    assert f"schema_version {version!r}, expected a number" in refusal(whole)


def test_a_missing_schema_version_is_refused(whole: Path) -> None:
    rewritten(whole, lambda m: m.pop("schema_version"))
    assert "schema_version None" in refusal(whole)


@pytest.mark.parametrize("key", ["files", *WORDS])
@pytest.mark.parametrize("value", [None, 5, True, [], {}, [5], ["x"]], ids=repr)
def test_a_manifest_with_a_nonsense_value_is_refused(whole: Path, key: str, value: Any) -> None:
    rewritten(whole, lambda m: m.update({key: value}))
    assert refusal(whole).startswith(f"{whole / MANIFEST}: not an edgevit manifest (")


@pytest.mark.parametrize("name", ["x", "", "manifest.json", "sample"])
def test_a_model_file_that_is_not_listed_is_refused(whole: Path, name: str) -> None:
    rewritten(whole, lambda m: m.update(model_file=name))
    assert "not an edgevit manifest" in refusal(whole)


@pytest.mark.parametrize("key", ["files", *WORDS])
def test_a_manifest_without_a_key_is_refused(whole: Path, key: str) -> None:
    rewritten(whole, lambda m: m.pop(key))
    assert "not an edgevit manifest" in refusal(whole)


@pytest.mark.parametrize("key", ["name", "bytes", "sha256"])
@pytest.mark.parametrize("value", [None, {}, [], "x", -1, float("nan"), float("inf")], ids=repr)
def test_a_file_entry_of_nonsense_is_refused(whole: Path, key: str, value: Any) -> None:
    rewritten(whole, lambda m: m["files"][0].update({key: value}))
    refusal(whole)


# ---- several sizes


def resolution(height: int, width: int, model_file: str, sample: str) -> dict[str, Any]:
    kinds = {
        "inputs": [IMAGE],
        "outputs": [],
        "choices": {},
        "parity": {},
        "certificates": [height],
        "complexity": None,
    }
    return {
        "image_size": [height, width],
        "model_file": model_file,
        "checked_file": model_file,
        "sample": sample,
        **kinds,
    }


@pytest.fixture
def double(tmp_path: Path) -> Path:
    """An artifact of two sizes, 32x32 and 64x96."""
    with staged(tmp_path, NAME, force=False) as stage:
        (stage / "sample" / "64x96").mkdir(parents=True)
        for i, folder in enumerate(("sample", "sample/64x96")):
            (stage / f"{i}.onnx").write_bytes(b"graph")
            np.save(stage / folder / "input.npy", np.full((1, 3), i, np.float32))
            np.save(stage / folder / "output.npy", np.full((1, 3), -i, np.float32))
        sizes = [resolution(32, 32, "0.onnx", "sample"), resolution(64, 96, "1.onnx", "sample/64x96")]
        write_manifest(stage, WORDS | REST | {"model_file": "0.onnx", "checked_file": "0.onnx", "resolutions": sizes})
    return tmp_path / NAME


def test_an_artifact_is_seen_at_each_of_its_sizes(double: Path) -> None:
    first = load_artifact(double)
    assert first.image_sizes == ((32, 32), (64, 96))
    assert (first.image_size, first.model_file.name, first.sample("input")[0, 0]) == ((32, 32), "0.onnx", 0)
    second = first.at((64, 96))
    assert (second.image_size, second.model_file.name, second.sample("input")[0, 0]) == ((64, 96), "1.onnx", 1)
    assert second.sample("output")[0, 0] == -1
    assert second.image_spec == dataclasses.replace(first.image_spec, size=(64, 96))
    assert (second.path, second.name, second.image_sizes) == (first.path, first.name, first.image_sizes)
    assert second.manifest["certificates"] == [64]
    assert second.at((32, 32)).model_file == first.model_file


def test_a_size_that_is_not_there_says_which_are(double: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_artifact(double).at((96, 64))
    assert str(caught.value) == (
        f"{double}: image size 96x64, expected one of 32x32,64x96; export the model with --image-size for another"
    )


@pytest.mark.parametrize("size", ["32x32", 32, (32,), None])
def test_what_is_no_size_is_refused(double: Path, size: Any) -> None:
    with pytest.raises(UsageError, match=r"^image size .*: expected \(height, width\) in whole pixels"):
        load_artifact(double).at(size)


def test_an_artifact_of_one_size_is_seen_at_that_one(whole: Path) -> None:
    read = load_artifact(whole)
    assert read.image_sizes == ((32, 32),)
    assert read.at((32, 32)) == read
    with pytest.raises(UsageError, match="image size 64x64, expected one of 32x32; export"):
        read.at((64, 64))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_size", (None, 5, "32x32", [], [32], [32, 32, 32], [32, "32"], [1, True], [0, 1], [1, 9e9], [1, 8192])),
        *((key, (None, 5, "", "x", "../secret", "/etc/passwd", "manifest.json", "sample")) for key in FILES),
        ("sample", (None, 5, "", ".", "..", "../sample", "/etc", "sample/", "other")),
        *((key, (None, 5, "x")) for key in ("inputs", "outputs", "choices", "parity", "certificates")),
        ("complexity", (5, "x", [])),
    ],
)  # fmt: skip
def test_nonsense_in_a_resolution_is_refused(double: Path, place: int, key: str, values: tuple[Any, ...]) -> None:
    whole = (double / MANIFEST).read_text()
    for value in (*values, "missing"):
        document = json.loads(whole)
        entry = document["resolutions"][place]
        entry.pop(key) if value == "missing" else entry.update({key: value})
        (double / MANIFEST).write_text(json.dumps(document))
        assert "not an edgevit manifest (resolutions is of another kind, or names files" in refusal(double), value


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(resolutions=None),
        lambda m: m.update(resolutions={}),
        lambda m: m.update(resolutions=[]),
        lambda m: m.update(resolutions="x"),
        lambda m: m["resolutions"].append(None),
        lambda m: m["resolutions"].pop(),  # one size alone has no list
        lambda m: m["resolutions"].reverse(),  # the first is not what the manifest's own fields say
        lambda m: m["resolutions"].append(m["resolutions"][1]),  # one size twice
        lambda m: m["resolutions"][0].update(sample="sample/64x96"),
        lambda m: m.update(
            resolutions=[m["resolutions"][0] | {"image_size": [32, 32 + i]} for i in range(MAX_SIZES + 1)]
        ),
    ],
)
def test_a_list_of_resolutions_that_makes_no_sense_is_refused(double: Path, change: Callable[[Any], Any]) -> None:
    rewritten(double, change)
    assert "not an edgevit manifest (resolutions" in refusal(double)


# ---- staging


def test_the_artifact_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged(out, NAME, force=False) as stage:
        fill(stage)
        assert not (out / NAME).exists()
        assert stage.parent == out  # one file system, so that a rename is one step
    assert os.listdir(out) == [NAME]
    load_artifact(out / NAME)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_it_gets_the_permissions_that_mkdir_would_give(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = made(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
def test_a_failing_block_leaves_nothing_and_its_error_goes_through(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        made(tmp_path, then=lambda: raising(error))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        made(tmp_path, then=lambda: Path("/dev/full").write_bytes(b"0"))
    assert str(caught.value) == (
        f"output directory {tmp_path}: no space left on the device; free space or choose another with --out"
    )
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine")
    for out in (in_the_way, in_the_way / "below"):
        with pytest.raises(
            OutputError, match=f"^output directory {re.escape(str(out))}: .+; choose another with --out$"
        ):
            made(out)
    assert in_the_way.read_text() == "mine"


def test_a_read_only_directory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # root may write anywhere
    with pytest.raises(OutputError, match="Read-only file system; choose another with --out"):
        made(tmp_path)


def test_an_output_directory_that_may_not_be_searched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(OutputError, match=r"ermission denied.*--out"):
        made(tmp_path / "private")


def test_an_output_name_too_long_for_the_system_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"):
        made(tmp_path / ("x" * 300))


# ---- what stands there already


def test_an_artifact_is_not_replaced_without_force(whole: Path, tmp_path: Path) -> None:
    before = manifest_of(whole)
    with pytest.raises(OutputError) as caught:
        made(tmp_path, b"other")
    assert str(caught.value) == f"{whole} exists already; give --force to replace it, or another --out"
    assert manifest_of(whole) == before
    assert os.listdir(tmp_path) == [NAME]


def test_force_replaces_an_artifact_and_keeps_none_of_its_files(whole: Path, tmp_path: Path) -> None:
    (whole / "left over").write_text("old")
    made(tmp_path, b"other", force=True)
    assert (whole / "model.onnx").read_bytes() == b"other"
    assert not (whole / "left over").exists()
    assert os.listdir(tmp_path) == [NAME]
    load_artifact(whole)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "link to an artifact", "dangling link"])
def test_what_is_no_artifact_is_never_deleted(tmp_path: Path, kind: str, force: bool) -> None:
    place, elsewhere = tmp_path / "out" / NAME, tmp_path / "elsewhere"
    place.parent.mkdir()
    if kind.endswith("directory"):
        place.mkdir()
        if kind == "directory":
            (place / "thesis.tex").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        target = made(elsewhere) if kind == "link to an artifact" else elsewhere
        place.symlink_to(target, target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="exists"):
        made(place.parent, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_artifact_that_appears_meanwhile_is_not_replaced_without_force(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        made(tmp_path, b"slow", then=lambda: made(tmp_path, b"quick"))  # another export of the same name, done first
    assert (tmp_path / NAME / "model.onnx").read_bytes() == b"quick"
    assert os.listdir(tmp_path) == [NAME]


def test_a_failing_replacement_leaves_the_old_artifact(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, b"new", force=True, then=lambda: raising(KeyboardInterrupt()))
    assert (load_artifact(whole).path / "model.onnx").read_bytes() == b"graph"
    assert os.listdir(tmp_path) == [NAME]


def test_a_failing_rename_puts_the_old_artifact_back(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if target == whole and (self / "model.onnx").read_bytes() == b"new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OutputError, match="Input/output error"):
        made(tmp_path, b"new", force=True)
    assert (load_artifact(whole).path / "model.onnx").read_bytes() == b"graph"
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupt_at_any_step_of_a_replacement_leaves_a_whole_artifact(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, moment: str
) -> None:
    rename, steps = os.rename, iter(range(10))

    def interrupted(*arguments: Any, **options: Any) -> None:
        now = next(steps) == step
        if now and moment == "before":
            raise KeyboardInterrupt
        rename(*arguments, **options)
        if now:
            raise KeyboardInterrupt  # as a signal that arrives while the system call runs

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, b"new", force=True)
    assert (load_artifact(whole).path / "model.onnx").read_bytes() in (b"graph", b"new")
    assert os.listdir(tmp_path) == [NAME]


def test_an_artifact_can_be_moved_and_copied(whole: Path, tmp_path: Path) -> None:
    load_artifact(shutil.copytree(whole, tmp_path / "copy"))
    load_artifact(whole.rename(tmp_path / "moved"))
