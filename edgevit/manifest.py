"""What a manifest says, read and checked: it is untrusted input, no reader meets a field that was not checked here."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from edgevit.errors import ArtifactError
from edgevit.specs import MAX_BATCH, MAX_SIDE, MAX_SIZES

SCHEMA_VERSION = 2  # 2: checked_file, settings
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # a manifest is kilobytes; a larger file is not one and is not read
SAMPLE = "sample"  # the folder of the first size's sample
MAX_ACCURACIES = 64  # data sets times image sizes; more would be measurements, not a description of the artifact
MAX_PICTURES = 5_000_000  # of one accuracy: ImageNet-1k has 1.3 million; their bits would fill the manifest
_DIGEST = re.compile(r"[0-9a-f]{64}")  # sha256 as hexadecimal text
BY_SIZE = {  # the fields that each image size has, and their types
    "model_file": str, "checked_file": str, "inputs": list, "outputs": list, "choices": dict,
    "parity": dict, "certificates": list, "complexity": dict | None,
}  # fmt: skip


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the artifact at `root`: schema version first, then every field that a reader relies on.

    The files it names are not looked at; that they lie inside and are unchanged is `load_artifact`'s affair.

    Raises:
        ArtifactError: missing, not a manifest, from a newer edgevit, or a field of another kind.
    """
    manifest = _read_json(root)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{root / MANIFEST}: schema_version {version!r}, expected a number; export the model again")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{root / MANIFEST}: schema_version {version}, this edgevit reads {SCHEMA_VERSION}; update edgevit"
        )
    if version < SCHEMA_VERSION:
        raise ArtifactError(
            f"{root / MANIFEST}: schema_version {version}, this edgevit reads {SCHEMA_VERSION}; export the model again"
        )
    for key, check in FIELDS.items():
        if key not in manifest or not check(manifest[key]):
            raise _no_manifest(root, f"{key} is missing or of another kind")
    known = {entry["name"] for entry in manifest["files"]}
    if any(not _is_listed(manifest[key], known) for key in ("model_file", "checked_file")):
        raise _no_manifest(root, "model_file or checked_file is not among its files")
    if "resolutions" in manifest and not _are_resolutions(manifest["resolutions"], manifest, known):
        raise _no_manifest(root, "resolutions is of another kind, or names files that are not listed")
    if not are_accuracies(manifest.get("accuracy", [])):
        raise _no_manifest(root, "accuracy is of another kind")
    return manifest


def _read_json(root: Path) -> dict[str, Any]:
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
        raise ArtifactError(f"artifact {root}: {os_reason(error)}") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{place}: not JSON; export the model again") from None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{place}: a JSON object was expected; export the model again")
    return manifest


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


def _is_input(value: Any) -> bool:
    return isinstance(value, dict) and value.get("name") == "image" and value.get("values") in ("normalised", "pixels")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_listed(name: str, known: Set[str]) -> bool:
    """Whether this is a listed file, or a package: a directory of listed files beside the samples."""
    return name in known or (name != SAMPLE and any(file.startswith(f"{name}/") for file in known))


def _are_resolutions(value: Any, manifest: Mapping[str, Any], known: Set[str]) -> bool:
    """One entry for each of several sizes, no size twice, the first of them what the manifest's own fields describe."""
    if not isinstance(value, list) or not 1 < len(value) <= MAX_SIZES or not all(map(_is_resolution, value)):
        return False
    samples = [f"{entry['sample']}/{part}.npy" for entry in value for part in ("input", "output")]
    models = [entry[key] for entry in value for key in ("model_file", "checked_file")]
    if any(not _is_listed(name, known) for name in (*samples, *models)):
        return False
    sizes = [tuple(entry["image_size"]) for entry in value]
    first = (manifest["image"]["size"], manifest["model_file"], SAMPLE)
    return (
        len(set(sizes)) == len(sizes)
        and tuple(value[0][key] for key in ("image_size", "model_file", "sample")) == first
    )


def _is_resolution(value: Any) -> bool:
    kinds = {"image_size": list, "sample": str, **BY_SIZE}
    if not isinstance(value, dict) or any(k not in value or not isinstance(value[k], kinds[k]) for k in kinds):
        return False
    if len(value["inputs"]) != 1 or not _is_input(value["inputs"][0]):
        return False
    return _is_size(value["image_size"])


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(_is_count(side) and 0 < side <= MAX_SIDE for side in value)
    )


def are_accuracies(value: Any) -> bool:
    """What `evaluate --record` wrote: figures that agree with the bits, each size and set of pictures once."""
    if not isinstance(value, list) or len(value) > MAX_ACCURACIES or not all(map(_is_accuracy, value)):
        return False
    return len({accuracy_key(record) for record in value}) == len(value)


def accuracy_key(record: Mapping[str, Any]) -> tuple[int, int, str]:
    """What tells the accuracies of one artifact apart: height, width and the sha256 of the pictures."""
    height, width = record["image_size"]
    return height, width, record["data"]["sha256"]


def _is_accuracy(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_size(value.get("image_size")) or not _is_data(value.get("data")):
        return False
    pictures: int = value["data"]["pictures"]
    words = (value.get("runtime"), value.get("edgevit"))
    top1, top5 = value.get("top1"), value.get("top5")
    if not all(map(_is_text, words)) or not _is_hits(top1, pictures):
        return False
    return (top5 is None or _is_hits(top5, pictures)) and _are_bits(value.get("hits"), value["top1"]["hits"], pictures)


def _is_data(value: Any) -> bool:
    """Which pictures an accuracy is of."""
    if not isinstance(value, dict) or not all(map(_is_text, (value.get("source"), value.get("kind")))):
        return False
    pictures, chosen = value.get("pictures"), (value.get("limit"), value.get("seed"))
    if not _is_count(pictures) or not 0 < value["pictures"] <= MAX_PICTURES or not _is_digest(value.get("sha256")):
        return False
    return all(each is None or _is_count(each) for each in chosen)


def _is_digest(value: Any) -> bool:
    return _is_text(value) and _DIGEST.fullmatch(value) is not None


def _is_hits(value: Any, pictures: int) -> bool:
    counts = isinstance(value, dict) and _is_count(value.get("hits")) and _is_count(value.get("total"))
    return counts and value["hits"] <= pictures == value["total"]


def _are_bits(value: Any, hits: int, pictures: int) -> bool:
    """Hexadecimal text of one bit for each picture, the first one highest, then zeros to a whole byte."""
    size = -(-pictures // 8)
    if not _is_text(value) or len(value) != 2 * size or not re.fullmatch(r"[0-9a-f]+", value):
        return False
    bits = int(value, 16)
    return bits.bit_count() == hits and bits % (1 << (8 * size - pictures)) == 0


# What the readers of a manifest rely on. It is untrusted input: each field is checked once, here.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": _is_text,
    "target": _is_text,
    "precision": _is_text,
    "model_file": _is_text,
    "checked_file": _is_text,
    "inputs": lambda value: isinstance(value, list) and len(value) == 1 and _is_input(value[0]),
    "settings": lambda value: isinstance(value, dict),
    "files": _is_file_list,
    "image": _is_image,
    "batch": lambda value: value == "dynamic" or (_is_count(value) and 1 <= value <= MAX_BATCH),
    "seed": _is_count,
    "num_classes": lambda value: value is None or (_is_count(value) and value > 0),
    "features_only": lambda value: isinstance(value, bool),
    "options": lambda value: isinstance(value, dict),
    "weights": lambda value: isinstance(value, dict) and _is_text(value.get("source")),
}


def os_reason(error: OSError) -> str:
    """What the system says went wrong, in its own few words."""
    if error.errno == errno.ENOSPC:
        return "no space left on the device"
    return error.strerror or str(error)
