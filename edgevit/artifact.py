"""The artifact directory and its manifest, read and written here only.

    <out>/<model>-<target>-<precision>[-HxW]/
        manifest.json       what it is, where it came from, how it was checked; sha256 of every other file
        model.onnx          or what else the target's runtime loads
        sample/input.npy    sample/output.npy: what the reference computed

It is written beside its final place and renamed, so that an interrupted export leaves nothing half made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.contracts import Built
from edgevit.errors import ArtifactError, OutputError
from edgevit.specs import MAX_BATCH, ExportSpec, ImageSpec, Parity

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # a manifest is kilobytes; a larger file is not one and is not read
CHUNK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest and hashes have been checked."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def model_file(self) -> Path:
        """The file that the target's runtime loads."""
        return self.path / str(self.manifest["model_file"])

    @property
    def name(self) -> str:
        """The directory's name: model, target, precision and, where it is not the default, size."""
        return self.path.name

    @property
    def random_weights(self) -> bool:
        """Whether the weights are seeded random ones; a checkpoint's record names the entry that was read."""
        return "entry" not in self.manifest["weights"]

    @property
    def image_spec(self) -> ImageSpec:
        """How a picture becomes the input of this model."""
        image = self.manifest["image"]
        size, mean, std = (tuple(image[key]) for key in ("size", "mean", "std"))
        return ImageSpec(size, mean, std, float(image["crop"]), image["interpolation"])

    def array(self, name: str) -> NDArray[np.float32]:
        """A float32 array of the artifact, e.g. `sample/input.npy`; nothing that a crafted file holds is executed."""
        try:
            array = np.load(self.path / name, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{self.path / name}: not a NumPy array ({error}); export the model again") from None
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise ArtifactError(f"{self.path / name}: expected a float32 array; export the model again")
        return array


def describe_export(spec: ExportSpec, image: ImageSpec, built: Built, parity: Parity) -> dict[str, Any]:
    """The manifest's account of one export: what was asked for, what was built, how far it is from the reference."""
    return {
        "model": spec.model,
        "target": spec.target,
        "precision": spec.precision,
        "model_file": built.model_file,
        "inputs": [dataclasses.asdict(tensor) for tensor in built.inputs],
        "outputs": [dataclasses.asdict(tensor) for tensor in built.outputs],
        "image": {**dataclasses.asdict(image), "size": spec.image_size},
        "labels": None,
        "batch": spec.batch,
        "features_only": spec.features_only,
        "num_classes": spec.num_classes,
        "options": dict(spec.options),
        "choices": dict(built.choices),
        "parity": parity.record(),
        "certificates": [dataclasses.asdict(certificate) for certificate in built.certificates],
        "calibration": None,
        "seed": spec.seed,
    }


def artifact_name(model: str, target: str, precision: str, size: tuple[int, int], default: tuple[int, int]) -> str:
    """`mobileformer_294m-onnx-fp32`, with `-HxW` where the size (height, width) is not the model's own."""
    suffix = "" if size == default else f"-{size[0]}x{size[1]}"
    return f"{model}-{target}-{precision}{suffix}"


@contextlib.contextmanager
def staged(out: Path, name: str, *, force: bool) -> Iterator[Path]:
    """A fresh directory that becomes `out/name` when the block ends, and vanishes if it does not.

    Raises:
        OutputError: `out/name` exists and `force` is off, or is no artifact; or `out` cannot be written.
    """
    final = out / name
    made, stage = False, None
    try:
        _check_free(final, force=force)
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
        yield stage
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes it private; the artifact gets what mkdir would give
        _check_free(final, force=force)  # again: another export may have taken the name meanwhile
        _swap(stage, final)
    except OSError as error:
        advice = "free space or choose" if error.errno == errno.ENOSPC else "choose"
        raise OutputError(f"output directory {out}: {_reason(error)}; {advice} another with --out") from None
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if nothing was put there


def _check_free(final: Path, *, force: bool) -> None:
    if final.is_symlink():
        raise OutputError(f"{final} exists and is a link; remove it, or give another --out: links are not replaced")
    if not final.exists():
        return
    if not force:
        raise OutputError(f"{final} exists already; give --force to replace it, or another --out")
    if not (final / MANIFEST).is_file():
        raise OutputError(f"{final} exists and is not an artifact (no {MANIFEST}); --force replaces artifacts only")


def _swap(stage: Path, final: Path) -> None:
    """Rename `stage` to `final`; what stood there comes back whatever interrupts the two renames."""
    if not final.exists():
        stage.rename(final)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        final.rename(aside / "old")
        stage.rename(final)
    finally:
        if (aside / "old").exists() and not final.exists():
            (aside / "old").rename(final)
        shutil.rmtree(aside, ignore_errors=True)


def write_manifest(stage: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` with the schema version and the name, size and sha256 of every file in `stage`."""
    files = [
        {"name": path.relative_to(stage).as_posix(), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    ]
    document = {"schema_version": SCHEMA_VERSION, **manifest, "files": files}
    (stage / MANIFEST).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_artifact(path: str | Path) -> Artifact:
    """Read an artifact: schema version first, then size and sha256 of every file.

    Raises:
        ArtifactError: missing, not an artifact, from a newer edgevit, or changed since it was written.
    """
    root = Path(path)
    manifest = _read_manifest(root)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{root / MANIFEST}: schema_version {version!r}, expected a number; export the model again")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{root / MANIFEST}: schema_version {version}, this edgevit reads up to {SCHEMA_VERSION}; update edgevit"
        )
    for key, check in FIELDS.items():
        if key not in manifest or not check(manifest[key]):
            raise _no_manifest(root, f"{key} is missing or of another kind")
    known = [entry["name"] for entry in manifest["files"]]
    if manifest["model_file"] not in known:
        raise _no_manifest(root, "model_file is not among its files")
    for entry in manifest["files"]:
        _check_file(root, entry["name"], entry["bytes"], entry["sha256"])
    return Artifact(root, manifest)


def _no_manifest(root: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{root / MANIFEST}: not an edgevit manifest ({why}); export the model again")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_file_list(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(f, dict) and _is_text(f.get("name")) and _is_count(f.get("bytes")) and _is_text(f.get("sha256"))
        for f in value
    )


def _is_image(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("interpolation") not in ("bilinear", "bicubic"):
        return False
    lengths = {"size": 2, "mean": 3, "std": 3}
    if any(not isinstance(value.get(key), list) or len(value[key]) != n for key, n in lengths.items()):
        return False
    numbers = [*value["mean"], *value["std"], value.get("crop")]
    return all(_is_number(v) for v in numbers) and all(_is_count(v) for v in value["size"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


# What the readers of a manifest rely on. It is untrusted input: each field is checked once, here.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": _is_text,
    "target": _is_text,
    "precision": _is_text,
    "model_file": _is_text,
    "files": _is_file_list,
    "image": _is_image,
    "batch": lambda value: value == "dynamic" or (_is_count(value) and 1 <= value <= MAX_BATCH),
    "seed": _is_count,
    "num_classes": lambda value: value is None or (_is_count(value) and value > 0),
    "features_only": lambda value: isinstance(value, bool),
    "options": lambda value: isinstance(value, dict),
    "weights": lambda value: isinstance(value, dict) and _is_text(value.get("source")),
}


def _read_manifest(root: Path) -> dict[str, Any]:
    place = root / MANIFEST
    try:
        if not root.is_dir():
            what = "not a directory" if root.exists() else "no such directory"
            raise ArtifactError(f"artifact {root}: {what}; expected the directory that `edgevit export` wrote")
        if not place.is_file():
            raise ArtifactError(
                f"artifact {root}: it has no {MANIFEST}; expected the directory that `edgevit export` wrote"
            )
        if place.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{place}: larger than any manifest; export the model again")
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"artifact {root}: {_reason(error)}") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{place}: not JSON; export the model again") from None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{place}: a JSON object was expected; export the model again")
    return manifest


def _check_file(root: Path, name: str, size: int, digest: str) -> None:
    """One file of the manifest, which is untrusted: it must lie inside, be a plain file and be unchanged."""
    parts = PurePosixPath(name).parts
    steps = [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    leaves = not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name
    try:
        if leaves or any(step.is_symlink() for step in steps):
            raise ArtifactError(f"artifact {root}: file name {name!r} leaves the directory; do not trust this artifact")
        if not steps[-1].is_file():
            raise ArtifactError(f"{steps[-1]}: missing, the manifest lists it; export the model again")
        place = steps[-1]
        found = place.stat().st_size
        actual = sha256_of(place) if found == size else None
    except OSError as error:
        raise ArtifactError(f"artifact {root}: file {name!r}: {_reason(error)}; export the model again") from None
    if actual != digest:
        came = (
            f"{found} bytes, expected {size}"
            if actual is None
            else f"sha256 {actual[:12]}..., expected {digest[:12]}..."
        )
        raise ArtifactError(f"{place}: changed since it was exported ({came}); export the model again")


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no space left on the device"
    return error.strerror or str(error)
