"""Equal to the reference or not: what `export_model` asks of every new artifact, and `verify` of one that exists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit import inputs, registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.contracts import Built, Runtime
from edgevit.errors import ParityError
from edgevit.runtimes import Session
from edgevit.specs import Batch, ExportSpec, ImageSpec, ModelCard, Parity, size_text

from .running import RunOn, as_fed, open_runtime, session_of


def prove(module: Any, image: ImageSpec, spec: ExportSpec, built: Built, checker: str, stage: Path, at: str) -> Parity:
    """Compare what was built in `stage` with the reference on the shipped photographs; the first batch is left in `at`.

    Raises:
        ParityError: they differ.
    """
    images = inputs.load_images(inputs.photographs(), image, spec.image_size)
    if isinstance(spec.batch, int) and spec.batch > len(images):
        images = images[np.arange(spec.batch) % len(images)]
    fed = inputs.as_values(images, image, built.inputs[0].values)
    runtime = open_runtime(checker, stage / built.checked_file, spec.precision, RunOn())
    expected, parity, problem = _compare(module, (images, fed), spec.batch, spec.precision, runtime)
    if not parity.passed:
        raise ParityError(
            f"{spec.model} at {size_text(images.shape[2:])} on {checker}: not equal to the reference: "
            f"max abs {parity.max_abs:.2e} (limit {parity.max_abs_limit:.2g}), cosine {parity.cosine:.6f} "
            f"(limit {parity.cosine_limit}), top-1 agreement {parity.top1_agreement}; nothing was written; "
            + (problem or "please report the model and its options")
        )
    sample = stage / at
    sample.mkdir(parents=True, exist_ok=True)
    count = 1 if spec.batch == "dynamic" else spec.batch
    np.save(sample / "input.npy", fed[:count])
    np.save(sample / "output.npy", next(iter(expected.values()))[:count])
    return parity


def _compare(
    module: Any, pictures: tuple[NDArray[Any], NDArray[Any]], batch: Batch, precision: str, runtime: Runtime
) -> tuple[dict[str, NDArray[Any]], Parity, str]:
    """The reference's outputs for pictures (n, 3, h, w), normalised and as `runtime` takes them; how far it is off.

    Last comes what an interpreter saw go wrong first inside, if it did.
    """
    from edgevit.export.verify import compare_outputs

    images, fed = pictures
    with Session(registry.runtime_class("torch")(module, images.shape[2:])) as reference:  # type: ignore[arg-type]  # it takes a module
        expected = reference.run_all(images, 1)
    with Session(runtime) as session:
        session.require_precision(Path(runtime.name))
        actual = session.run_all(fed, batch)
        problem = getattr(runtime, "first_problem", None)
    return expected, compare_outputs(expected, actual, precision, runtime.name), str(problem or "")


def verify(path: str | Path, weights: str | Path | None = None) -> dict[str, Any]:
    """Check an artifact: its hashes, then its outputs, at every image size it holds.

    With the weights (given, or random ones rebuilt from their seed) against the reference on the photographs,
    otherwise against `sample/`, which the reference computed when the artifact was made.

    Raises:
        ArtifactError, CheckpointError, RuntimeFailure. ParityError: not equal.
    """
    artifact = load_artifact(path)
    views = [artifact.at(size) for size in artifact.image_sizes]
    where = [str(path)] if len(views) == 1 else [f"{path} at {size_text(view.image_size)}" for view in views]
    parities = [_against_sample(view, place) for view, place in zip(views, where, strict=True)]
    against = "sample"
    if weights is not None or artifact.random_weights:
        against = "reference"
        module, card = reference_of(artifact.manifest, weights)
        parities = [_against_reference(view, module, card, at) for view, at in zip(views, where, strict=True)]
    records = [{"image_size": list(v.image_size), "parity": p.record()} for v, p in zip(views, parities, strict=True)]
    document = {"artifact": str(path), "against": against, "parity": records[0]["parity"]}
    return document | ({"resolutions": records} if len(records) > 1 else {})


def _against_sample(artifact: Artifact, where: str) -> Parity:
    from edgevit.export.verify import compare_outputs

    with session_of(artifact, RunOn()) as session:
        name = session.runtime.outputs[0].name
        session.require_precision(artifact.path)
        stored = artifact.sample("output")
        actual = session.run({"image": artifact.sample("input")})
    parity = compare_outputs({name: stored}, {name: actual[name]}, artifact.manifest["precision"], session.runtime.name)
    return _passed(parity, where, "sample")


def _against_reference(artifact: Artifact, module: Any, card: ModelCard, where: str) -> Parity:
    manifest = artifact.manifest
    images = inputs.load_images(inputs.photographs(), card.image, artifact.image_size)
    runtime = session_of(artifact, RunOn()).runtime
    pictures = images, as_fed(artifact, images)
    _, parity, _ = _compare(module, pictures, manifest["batch"], manifest["precision"], runtime)
    return _passed(parity, where, "reference")


def _passed(parity: Parity, where: str, against: str) -> Parity:
    if not parity.passed:
        raise ParityError(
            f"{where}: not equal to its {against}: max abs {parity.max_abs:.2e} (limit {parity.max_abs_limit:.2g}), "
            f"cosine {parity.cosine:.6f}, top-1 agreement {parity.top1_agreement}; export the model again"
        )
    return parity


def reference_of(manifest: Mapping[str, Any], weights: str | Path | None) -> tuple[Any, ModelCard]:
    """The reference module that an artifact was made from, and its card; without weights, random ones of its seed."""
    from edgevit.models import load_model

    loaded = load_model(
        manifest["model"],
        weights,
        manifest["num_classes"],
        features_only=manifest["features_only"],
        options=manifest["options"],
        seed=manifest["seed"],
        randomize=True,
    )
    return loaded.module, loaded.card
