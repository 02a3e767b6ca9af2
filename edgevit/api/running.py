"""Artifacts as runtimes: `load`, `predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevit import inputs, registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.errors import RuntimeFailure, UnknownNameError, UsageError
from edgevit.predictions import top_classes
from edgevit.runtimes import Session
from edgevit.specs import Size


def load(path: str | Path, threads: int | None = None, image_size: Size | None = None) -> Session:
    """An artifact as a runtime: `with edgevit.load(path) as runtime: runtime.run({"image": array})["logits"]`.

    `image_size` is (height, width), by default the artifact's first.

    Raises:
        ArtifactError: missing, changed or of a newer schema. UsageError: a size that it does not hold.
    """
    return session_of(load_at(path, image_size), threads)


def load_at(path: str | Path, image_size: Size | None) -> Artifact:
    """An artifact seen at one of its sizes, by default the first."""
    artifact = load_artifact(path)
    return artifact if image_size is None else artifact.at(image_size)


def session_of(
    artifact: Artifact, threads: int | None, model_file: Path | None = None, runtime: str | None = None
) -> Session:
    """What runs an artifact, or in its place another `model_file` of the same target; not loaded yet.

    `runtime` is that of the target unless another is named.

    Raises:
        UnknownNameError: no runtime of this name takes such a file.
    """
    path = model_file or artifact.model_file
    if runtime is None:
        runtime = registry.exporter(artifact.manifest["target"]).runtime
    elif runtime not in registry.runtimes_for(path.name):
        raise UnknownNameError(f"runtime for {path.name}", runtime, registry.runtimes_for(path.name))
    return Session(registry.runtime_class(runtime)(path, threads))  # type: ignore[call-arg]  # a runtime's own arguments


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    labels: str | Path | None = None,
    top: int = 5,
    image_size: Size | None = None,
) -> dict[str, Any]:
    """The `top` classes of each picture, with probabilities from a softmax in float64.

    Raises:
        ArtifactError, RuntimeFailure: the artifact. InputError: a picture or the labels. UsageError: not a classifier,
        or a size that the artifact does not hold.
    """
    artifact = load_at(path, image_size)
    batch = inputs.load_images([Path(image) for image in images], artifact.image_spec)
    with session_of(artifact, None) as session:
        outputs = session.run_all(batch, artifact.manifest["batch"])
    if "logits" not in outputs:
        raise UsageError(f"{path}: has no logits (outputs {', '.join(outputs)}); run needs a classifier")
    logits = outputs["logits"]
    if not np.isfinite(logits).all():
        raise RuntimeFailure(f"{path}: logits are not finite (NaN or infinite); verify the artifact, or its weights")
    names = None if labels is None else inputs.read_labels(Path(labels), logits.shape[1])
    return {
        "artifact": str(path),
        "random_weights": artifact.random_weights,
        "predictions": [
            {"image": str(image), "top": top_classes(row, names, top)}
            for image, row in zip(images, logits, strict=True)
        ],
    }
