"""Artifacts as runtimes: `load`, `predict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit import inputs, registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.contracts import Runtime
from edgevit.errors import MissingDependencyError, RuntimeFailure, UnknownNameError, UsageError
from edgevit.options import parse_options
from edgevit.predictions import top_classes
from edgevit.runtimes import Session
from edgevit.specs import Size


@dataclass(frozen=True)
class RunOn:
    """What runs an artifact: a registered runtime (None: the target's own), its threads and its options."""

    runtime: str | None = None
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def load(
    path: str | Path,
    threads: int | None = None,
    image_size: Size | None = None,
    runtime: str | None = None,
    runtime_options: Mapping[str, Any] | None = None,
) -> Session:
    """An artifact as a runtime: `with edgevit.load(path) as runtime: runtime.run({"image": array})["logits"]`.

    `image_size` is (height, width), by default the artifact's first. Where this machine cannot run the target, what
    checked the export stands in: `.runtime.name` says which it is.

    Raises:
        ArtifactError: missing, changed or of another schema. UsageError: a size that it does not hold, a runtime that
        does not take its files, or an option that the runtime does not have.
    """
    return session_of(load_at(path, image_size), RunOn(runtime, threads, runtime_options or {}))


def load_at(path: str | Path, image_size: Size | None) -> Artifact:
    """An artifact seen at one of its sizes, by default the first."""
    artifact = load_artifact(path)
    return artifact if image_size is None else artifact.at(image_size)


def session_of(artifact: Artifact, on: RunOn, model_file: Path | None = None) -> Session:
    """What runs an artifact, or in its place another `model_file`; not loaded yet.

    Raises:
        UnknownNameError: no runtime of this name takes its files.
    """
    return Session(open_runtime(*chosen(artifact, on, model_file), artifact.manifest["precision"], on))


def chosen(artifact: Artifact, on: RunOn, model_file: Path | None = None) -> tuple[str, Path]:
    """The name of what runs an artifact, and the file that it loads.

    Raises:
        UnknownNameError: no runtime of this name takes its files.
    """
    name, path = (on.runtime, None) if on.runtime else _own_runtime(artifact)
    files = [file for file in (model_file, path) if file] or [artifact.model_file, artifact.checked_file]
    path = next((file for file in files if name in registry.runtimes_for(file.name)), None)
    if path is None:
        known = {runtime for file in files for runtime in registry.runtimes_for(file.name)}
        raise UnknownNameError(f"runtime for {files[0].name}", name, known)
    return name, path


def timed(artifact: Artifact, on: RunOn, model_file: Path | None = None) -> tuple[str, Path]:
    """As `chosen`, of what is timed: nothing stands in for the target's own runtime unless it was named.

    Raises:
        RuntimeFailure: this machine cannot run the target. UsageError: a runtime whose time is no device's.
    """
    own = registry.exporter(artifact.manifest["target"]).runtime
    if on.runtime is None and (obstacle := obstacle_of(own)):
        raise RuntimeFailure(
            f"{artifact.path}: {obstacle}; it is timed on its device, or name what to time here with --runtime"
        )
    name, path = chosen(artifact, on, model_file)
    if registry.RUNTIMES[name].emulates:
        raise UsageError(
            f"runtime {name} computes what a device would compute, in a time that is no device's: "
            f"name another with --runtime, or time {artifact.path} there"
        )
    return name, path


def timed_session(artifact: Artifact, on: RunOn, model_file: Path | None = None) -> Session:
    """What is timed, in this process and not loaded yet.

    Raises:
        RuntimeFailure: this machine cannot run the target. UsageError: a runtime whose time is no device's.
    """
    name, path = timed(artifact, on, model_file)
    return Session(open_runtime(name, path, artifact.manifest["precision"], on))


def open_runtime(name: str, path: Path, precision: str, on: RunOn) -> Runtime:
    """A registered runtime on a model file; not loaded yet.

    Raises:
        UnknownNameError, UsageError: an option that it does not have, or a value of the wrong kind.
    """
    cls = registry.runtime_class(name)
    return cls(path, on.threads, precision, parse_options(cls.OPTIONS, f"runtime {name}", on.options))


def _own_runtime(artifact: Artifact) -> tuple[str, Path]:
    """The target's runtime and the file it takes; where it cannot run here, what checked the export."""
    exporter = registry.exporter(artifact.manifest["target"])
    path = artifact.model_file
    if exporter.runtime in registry.runtimes_for(path.name) and obstacle_of(exporter.runtime) is None:
        return exporter.runtime, path
    return exporter.checker, artifact.checked_file


def obstacle_of(runtime: str) -> str | None:
    """Why a registered runtime cannot run anything on this machine and what to do, or None."""
    try:
        return registry.runtime_class(runtime).obstacle()
    except MissingDependencyError as error:
        return str(error)


def as_fed(artifact: Artifact, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalised pictures (n, 3, h, w) as an artifact's input takes them: as they are, or as pixels."""
    return inputs.as_values(images, artifact.image_spec, artifact.manifest["inputs"][0]["values"])


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    labels: str | Path | None = None,
    top: int = 5,
    image_size: Size | None = None,
    runtime: str | None = None,
    runtime_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `top` classes of each picture, with probabilities from a softmax in float64.

    Raises:
        ArtifactError, RuntimeFailure: the artifact. InputError: a picture or the labels. UsageError: not a classifier,
        or a size that the artifact does not hold.
    """
    artifact = load_at(path, image_size)
    batch = inputs.load_images([Path(image) for image in images], artifact.image_spec)
    with session_of(artifact, RunOn(runtime, options=runtime_options or {})) as session:
        outputs = session.run_all(as_fed(artifact, batch), artifact.manifest["batch"])
    if "logits" not in outputs:
        raise UsageError(f"{path}: has no logits (outputs {', '.join(outputs)}); run needs a classifier")
    logits = outputs["logits"]
    if not np.isfinite(logits).all():
        raise RuntimeFailure(f"{path}: logits are not finite (NaN or infinite); verify the artifact, or its weights")
    names = None if labels is None else inputs.read_labels(Path(labels), logits.shape[1])
    return {
        "artifact": str(path),
        "runtime": session.runtime.name,
        "target_runtime": registry.exporter(artifact.manifest["target"]).runtime,
        "random_weights": artifact.random_weights,
        "predictions": [
            {"image": str(image), "top": top_classes(row, names, top)}
            for image, row in zip(images, logits, strict=True)
        ],
    }
