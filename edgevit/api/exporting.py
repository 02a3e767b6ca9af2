"""Model -> artifact: `export_model`."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgevit import __version__, registry
from edgevit.artifact import Artifact, Proven, artifact_name, describe_export, load_artifact, staged, write_manifest
from edgevit.contracts import Exporter
from edgevit.errors import UnknownNameError
from edgevit.manifest import SAMPLE
from edgevit.options import parse_options, split_options
from edgevit.specs import Batch, ExportSpec, ModelCard, Size, check_image_sizes, size_text

from .counting import counter
from .linting import lint_built
from .natural_size import size_notes
from .proving import prove

Progress = Callable[[float, str], None]  # share done, what is being done
TOOLS = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "coremltools", "tensorrt-rtx",
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
    out: str | Path = "dist",
    force: bool = False,
    seed: int = 0,
    command: str | None = None,
    progress: Progress = lambda fraction, text: None,
) -> Artifact:
    """Export a model and prove it equal to the reference on real pictures.

    Args:
        model, target: registered names. weights: a checkpoint; without it seeded random weights.
        image_size: (height, width), default the model's own; a sequence of them makes one static graph for each, in one
            artifact, with common weights. batch: pictures an inference takes, or "dynamic".
        options: what the family and the target take beside, e.g. {"lda_mode": "old", "gpu": ("sm89",)}.
        pointwise: "dense" or "grouped" 1x1 convolutions; "auto" takes what was measured to be faster.
        out: directory in which the artifact's directory is made; an existing artifact is replaced only with `force`.

    Raises:
        UsageError, UnknownNameError, MissingDependencyError: the request. CheckpointError: the weights. OutputError:
        the place. ExportError: a step failed. ParityError: not equal to the reference; nothing is left behind.
    """
    exporter = registry.exporter(target)
    mine, its = split_options(options or {}, (model, registry.family_of(model)[1].OPTIONS), (target, exporter.OPTIONS))
    spec = ExportSpec(
        model, target, precision, None if weights is None else str(weights), num_classes, None, batch, features_only,
        tuple(sorted(mine.items())), pointwise, seed, parse_options(exporter.OPTIONS, target, its),
    )  # fmt: skip
    return _export(spec, exporter, image_size, Path(out), force, command, progress)


def _export(
    spec: ExportSpec,
    exporter: Exporter,
    image_size: Size | Sequence[Size] | None,
    out: Path,
    force: bool,
    command: str | None,
    progress: Progress,
) -> Artifact:
    from edgevit.models import model_card

    card = model_card(spec.model)
    if spec.precision not in exporter.precisions:
        raise UnknownNameError(f"precision for {spec.target}", spec.precision, exporter.precisions)
    sizes = check_image_sizes(image_size, card.image.size, card.size_multiple)
    name = artifact_name(spec.model, spec.target, spec.precision, sizes, card.image.size)
    with staged(out, name, force=force) as stage:
        specs = [dataclasses.replace(spec, image_size=size) for size in sizes]
        record = _write_files(specs, card, exporter, stage, progress)
        write_manifest(stage, {**record, "command": command})
        progress(1.0, "done")
    return load_artifact(out / name)


def _write_files(
    specs: Sequence[ExportSpec], card: ModelCard, exporter: Exporter, stage: Path, progress: Progress
) -> dict[str, Any]:
    """Write every file of the artifact but the manifest, whose content is returned; specs differ in image_size."""
    from edgevit.bench.complexity import count_onnx
    from edgevit.bench.machine import library_versions
    from edgevit.models import load_model

    spec = specs[0]
    progress(0.0, "loading weights")
    loaded = load_model(
        spec.model,
        spec.weights,
        spec.num_classes,
        features_only=spec.features_only,
        options=dict(spec.options),
        seed=spec.seed,
        randomize=True,
    )
    count = counter(spec.model, dict(spec.options), num_classes=loaded.num_classes, features_only=spec.features_only)
    sizes = [each.image_size or card.image.size for each in specs]
    notes = [*loaded.notes, *size_notes(card, sizes, lambda size: count(size).macs)]
    progress(0.1, "exporting")
    built = exporter.export(loaded.module, card, specs, stage)
    linted = lint_built(built, exporter.lint_for(spec.settings))
    progress(0.8, "comparing with the reference on photographs")
    proven: dict[Size, Proven] = {}
    for size, each, files in zip(sizes, specs, built, strict=True):
        sample = f"{SAMPLE}/{size_text(size)}" if proven else SAMPLE
        parity = prove(loaded.module, card.image, each, files, exporter.checker, stage, sample)
        proven[size] = Proven(files, parity, count_onnx(files.graph), sample)
        notes += [note for note in files.notes if note not in notes]
    return {
        **describe_export(spec, card.image, proven),
        "num_classes": loaded.num_classes,
        "runtime": exporter.runtime,
        "lint": linted,
        "weights": dict(loaded.weights),
        "notes": notes,
        "tools": {"edgevit": __version__, "python": platform.python_version(), **library_versions(TOOLS)},
    }
