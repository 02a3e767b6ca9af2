"""The artifact directory and its manifest, read and written here only.

    <out>/<model>-<target>-<precision>[-HxW]/
        manifest.json       what it is, where it came from, how it was checked; sha256 of every other file
        model.onnx          or what else the target's runtime loads
        sample/input.npy    sample/output.npy: what the reference computed

With several image sizes the directory ends in -HxW+HxW, there is a model file for each, and `sample/HxW/` holds the
samples of all but the first. The manifest's own fields are the first size's, `resolutions` lists what each size has.

It is written beside its final place and renamed, so that an interrupted export leaves nothing half made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.contracts import Built
from edgevit.errors import ArtifactError, OutputError, UsageError
from edgevit.manifest import (
    BY_SIZE,
    MANIFEST,
    SAMPLE,
    SCHEMA_VERSION,
    accuracy_key,
    are_accuracies,
    os_reason,
    read_manifest,
)
from edgevit.options import as_json
from edgevit.specs import Complexity, ExportSpec, ImageSpec, Parity, Size, as_size, size_list, size_text

CHUNK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest and hashes have been checked, seen at one of its image sizes."""

    path: Path
    manifest: Mapping[str, Any]
    sample_directory: str = SAMPLE

    @property
    def model_file(self) -> Path:
        """The file that the target's runtime loads."""
        return self.path / str(self.manifest["model_file"])

    @property
    def checked_file(self) -> Path:
        """The file that was compared with the reference: the model file, or what it was built from."""
        return self.path / str(self.manifest["checked_file"])

    @property
    def name(self) -> str:
        """The directory's name: model, target, precision and, where it is not the default, size."""
        return self.path.name

    @property
    def image_size(self) -> Size:
        """(height, width) of what the model file takes."""
        height, width = self.manifest["image"]["size"]
        return height, width

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """Every size there is, the first one first."""
        entries = self.manifest.get("resolutions", [{"image_size": self.image_size}])
        return tuple((height, width) for height, width in (entry["image_size"] for entry in entries))

    def at(self, size: Size) -> Artifact:
        """The artifact seen at another of its sizes: the manifest's fields are those of (height, width).

        Raises:
            UsageError: it holds no such size.
        """
        size = as_size(size)
        if size not in self.image_sizes:
            raise UsageError(
                f"{self.path}: image size {size_text(size)}, expected one of {size_list(self.image_sizes)}; "
                "export the model with --image-size for another"
            )
        if "resolutions" not in self.manifest:
            return self
        entry = self.manifest["resolutions"][self.image_sizes.index(size)]
        own = {"image": {**self.manifest["image"], "size": entry["image_size"]}, **{key: entry[key] for key in BY_SIZE}}
        return Artifact(self.path, {**self.manifest, **own}, entry["sample"])

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

    def sample(self, part: str) -> NDArray[np.float32]:
        """The sample's "input", or the "output" that the reference computed for it."""
        return self.array(f"{self.sample_directory}/{part}.npy")

    def array(self, name: str) -> NDArray[np.float32]:
        """A float32 array of the artifact, e.g. `sample/input.npy`; nothing that a crafted file holds is executed."""
        try:
            array = np.load(self.path / name, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{self.path / name}: not a NumPy array ({error}); export the model again") from None
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise ArtifactError(f"{self.path / name}: expected a float32 array; export the model again")
        return array


@dataclass(frozen=True)
class Proven:
    """One image size of an export: what was built, how far it is from the reference, what it costs, its sample."""

    built: Built
    parity: Parity
    complexity: Complexity
    sample: str

    def record(self) -> dict[str, Any]:
        """The manifest's fields that each size has: those of BY_SIZE."""
        return {
            "model_file": self.built.model_file,
            "checked_file": self.built.checked_file,
            "inputs": [dataclasses.asdict(tensor) for tensor in self.built.inputs],
            "outputs": [dataclasses.asdict(tensor) for tensor in self.built.outputs],
            "choices": dict(self.built.choices),
            "parity": self.parity.record(),
            "certificates": [dataclasses.asdict(certificate) for certificate in self.built.certificates],
            "complexity": dataclasses.asdict(self.complexity),
        }


def describe_export(spec: ExportSpec, image: ImageSpec, sizes: Mapping[Size, Proven]) -> dict[str, Any]:
    """The manifest's account of one export: what was asked for, what was built, how far it is from the reference."""
    size, first = next(iter(sizes.items()))
    resolutions = [{"image_size": at, "sample": p.sample, **p.record()} for at, p in sizes.items()]
    return {
        "model": spec.model,
        "target": spec.target,
        "precision": spec.precision,
        **first.record(),
        "image": {**dataclasses.asdict(image), "size": size},
        "labels": None,
        "batch": spec.batch,
        "features_only": spec.features_only,
        "num_classes": spec.num_classes,
        "options": dict(spec.options),
        "settings": as_json(spec.settings),
        "recipe": None if spec.recipe is None else as_json(spec.recipe),
        "calibration": None,
        "seed": spec.seed,
        **({"resolutions": resolutions} if len(sizes) > 1 else {}),
    }


def artifact_name(model: str, target: str, precision: str, sizes: Sequence[Size], default: Size) -> str:
    """`mobileformer_294m-onnx-fp32`, with `-HxW` where the size is not the model's own, `-HxW+HxW` for several."""
    suffix = "" if tuple(sizes) == (default,) else "-" + "+".join(map(size_text, sizes))
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
        raise OutputError(f"output directory {out}: {os_reason(error)}; {advice} another with --out") from None
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


def record_accuracy(artifact: Artifact, record: Mapping[str, Any]) -> None:
    """Put one accuracy into the manifest on disk; an older one of the same size and pictures is replaced.

    Nothing else in the manifest changes, and no other file. Read again first: evaluating takes long.

    Raises:
        ArtifactError: the artifact became another meanwhile. OutputError: it cannot be written, or has no more room.
    """
    manifest = read_manifest(artifact.path)
    place = artifact.path / MANIFEST
    if manifest["files"] != artifact.manifest["files"]:
        raise ArtifactError(f"{place}: exported anew while it was evaluated; evaluate it again")
    others = [old for old in manifest.get("accuracy", []) if accuracy_key(old) != accuracy_key(record)]
    kept = [*others, dict(record)]
    if not are_accuracies(kept):
        raise OutputError(f"{place}: has {len(others)} accuracies, no room for another; export the model again")
    try:
        text = json.dumps({**manifest, "accuracy": kept}, indent=2, allow_nan=False) + "\n"
    except (ValueError, RecursionError):  # a number that JSON lacks, or nesting that can be read and not written
        raise ArtifactError(f"{place}: holds what JSON cannot; export the model again") from None
    replace_file(place, text)


def replace_file(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename: who reads meanwhile gets the old file or the new one, never a half.

    Raises:
        OutputError: the directory cannot be written.
    """
    stage = None
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
        handle, stage = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(handle)  # before the rename: after a crash the name must not stand for an empty file
        Path(stage).chmod(mode)
        Path(stage).replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {os_reason(error)}; make its directory writable, or free space") from None
    finally:
        if stage is not None:
            Path(stage).unlink(missing_ok=True)  # there only where the rename did not happen


def load_artifact(path: str | Path) -> Artifact:
    """Read an artifact: schema version first, then size and sha256 of every file.

    Raises:
        ArtifactError: missing, not an artifact, from a newer edgevit, or changed since it was written.
    """
    root = Path(path)
    manifest = read_manifest(root)
    for entry in manifest["files"]:
        _check_file(root, entry["name"], entry["bytes"], entry["sha256"])
    return Artifact(root, manifest)


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
        raise ArtifactError(f"artifact {root}: file {name!r}: {os_reason(error)}; export the model again") from None
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
