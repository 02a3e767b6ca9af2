"""Model -> artifact: `export_model`."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from edgevit import __version__, registry
from edgevit.artifact import Artifact, Proven, artifact_name, describe_export, load_artifact, staged, write_manifest
from edgevit.contracts import Built, Exporter
from edgevit.manifest import SAMPLE
from edgevit.specs import Batch, ExportSpec, ModelCard, Size, check_image_sizes, size_text

from .calibrating import Pictures, Progress, Source, calibrate, pictures_for
from .counting import counter
from .linting import lint_built
from .natural_size import size_notes
from .proving import prove
from .quantizing import Trials, load_reference, specify, within_drop

TOOLS = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "nncf", "coremltools", "tensorrt-rtx",
    "numpy", "pillow",
)  # fmt: skip


def export_model(
    model: str,
    target: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    precision: str = "fp32",
    image_size: Size | Sequence[Size] | None = None,
    batch: Batch = 1,
    features_only: bool = False,
    options: Mapping[str, Any] | None = None,
    pointwise: Literal["auto", "dense", "grouped"] = "auto",
    calibration: Source = None,
    max_drop: float | None = None,
    out: str | Path = "dist",
    force: bool = False,
    seed: int = 0,
    command: str | None = None,
    progress: Progress = lambda fraction, text: None,
) -> Artifact:
    """Export a model and prove it equal to the reference on real pictures.

    Args:
        model, target: registered names. weights: a checkpoint, or the name of weights that ship with edgevit; without
            it seeded random weights. image_size: (height, width), default the model's own; a sequence of them makes one
            static graph for each, in one artifact. batch: pictures an inference takes, or "dynamic".
        options: what the family, the target and, with int8, its recipe take beside, e.g. {"lda_mode": "old", "gpu":
            ("sm89",), "calibrator": "mse"}. pointwise: "auto" takes what was measured to be faster.
        calibration: what int8 ranges are measured on: a directory of pictures, an .npz of normalised inputs,
            "reference-task", or `Pictures` of one of them. max_drop: blocks go back to float until int8 loses no more
            on them, in points of top-1 where they have the network's classes, else of agreement with float32.
        out: directory in which the artifact's directory is made; an existing artifact is replaced only with `force`.

    Raises:
        UsageError, UnknownNameError, MissingDependencyError: the request. CheckpointError: the weights. InputError: the
        calibration. OutputError: the place. ExportError: a step failed. ParityError: not equal to the reference.
    """
    exporter = registry.exporter(target)
    spec = specify(model, exporter, precision, options or {}, seed)
    spec = dataclasses.replace(
        spec, weights=None if weights is None else str(weights), num_classes=num_classes, batch=batch,
        features_only=features_only, pointwise=pointwise,
    )  # fmt: skip
    pictures = pictures_for(spec, calibration, max_drop)
    return _export(spec, exporter, image_size, (pictures, max_drop), Path(out), force, command, progress)


def _export(
    spec: ExportSpec,
    exporter: Exporter,
    image_size: Size | Sequence[Size] | None,
    pictures: tuple[Pictures, float | None],
    out: Path,
    force: bool,
    command: str | None,
    progress: Progress,
) -> Artifact:
    from edgevit.models import model_card

    card = model_card(spec.model)
    sizes = check_image_sizes(image_size, card.image.size, card.size_multiple)
    name = artifact_name(spec.model, spec.target, spec.precision, sizes, card.image.size)
    with staged(out, name, force=force) as stage:
        specs = [dataclasses.replace(spec, image_size=size) for size in sizes]
        record = _write_files(specs, card, exporter, pictures, stage, progress)
        write_manifest(stage, {**record, "command": command})
        progress(1.0, "done")
    return load_artifact(out / name)


def _within(progress: Progress, start: float, end: float, fraction: float, text: str) -> None:
    """Progress of a part as progress of the whole, of which it goes from `start` to `end`."""
    progress(start + (end - start) * fraction, text)


def _write_files(
    specs: Sequence[ExportSpec],
    card: ModelCard,
    exporter: Exporter,
    pictures: tuple[Pictures, float | None],
    stage: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write every file of the artifact but the manifest, whose content is returned; specs differ in image_size."""
    from edgevit.bench.machine import library_versions

    spec = specs[0]
    progress(0.0, "loading weights")
    loaded = load_reference(spec)
    count = counter(spec.model, dict(spec.options), num_classes=loaded.num_classes, features_only=spec.features_only)
    sizes = [each.image_size or card.image.size for each in specs]
    notes = [*loaded.notes, *size_notes(card, sizes, lambda size: count(size).macs)]
    calibration = calibrate(spec, sizes, card.image, pictures[0])
    if pictures[1] is not None and calibration is not None:
        trials = Trials(loaded, spec, exporter, calibration)
        recipe, told = within_drop(trials, pictures[1], partial(_within, progress, 0.1, 0.6))
        specs = [dataclasses.replace(each, recipe=recipe) for each in specs]
        calibration = dataclasses.replace(calibration, record={**calibration.record, "max_drop": told.record()})
        notes += told.notes
    progress(0.6, "exporting")
    built = exporter.export(loaded.module, card, specs, stage, calibration)
    linted = lint_built(built, exporter.lint_for(spec.settings))
    progress(0.8, "comparing with the reference on photographs")
    proven = _prove_all(loaded.module, card, list(zip(sizes, specs, built, strict=True)), exporter.checker, stage)
    notes += [note for files in built for note in files.notes] + list(calibration.notes if calibration else ())
    return {
        **describe_export(specs[0], card.image, proven),
        "num_classes": loaded.num_classes,
        "runtime": exporter.runtime,
        "lint": linted,
        "weights": dict(loaded.weights),
        "calibration": None if calibration is None else dict(calibration.record),
        "notes": list(dict.fromkeys(notes)),
        "tools": {"edgevit": __version__, "python": platform.python_version(), **library_versions(TOOLS)},
    }


def _prove_all(
    module: Any, card: ModelCard, made: Sequence[tuple[Size, ExportSpec, Built]], checker: str, stage: Path
) -> dict[Size, Proven]:
    """Compare what was built for each size with the reference, count what it costs, leave its sample in `stage`."""
    from edgevit.bench.complexity import count_onnx

    proven: dict[Size, Proven] = {}
    for size, spec, files in made:
        sample = f"{SAMPLE}/{size_text(size)}" if proven else SAMPLE
        parity = prove(module, card.image, spec, files, checker, stage, sample)
        proven[size] = Proven(files, parity, count_onnx(files.graph), sample)
    return proven
