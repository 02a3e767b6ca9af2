"""The one place where the folders meet: each verb of the command line is one function here, with the same errors."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgevit import __version__, inputs, registry
from edgevit.artifact import Artifact, artifact_name, describe_export, load_artifact, staged, write_manifest
from edgevit.contracts import Built
from edgevit.errors import ParityError, RuntimeFailure, UnknownNameError, UsageError
from edgevit.predictions import top_classes
from edgevit.runtimes import Session
from edgevit.specs import Batch, BenchReport, ExportSpec, ModelCard, Parity, check_image_size

Progress = Callable[[float, str], None]  # share done, what is being done
TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "pillow")


def list_models(pattern: str = "*", family: str | None = None) -> list[str]:
    """Names of the registered models that match a shell pattern, of one family or of all.

    Raises:
        UnknownNameError: no such family.
    """
    if family is not None and family not in registry.FAMILIES:
        raise UnknownNameError("family", family, registry.FAMILIES)
    of_family = None if family is None else registry.FAMILIES[family][1]
    return [name for name in registry.model_names(pattern) if of_family is None or name in of_family]


def info(
    model: str, image_size: tuple[int, int] | None = None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What is known of a model: exact parameters, MACs and FLOPs at a size, the paper's figures, its options.

    Raises:
        UnknownNameError: no such model or option. UsageError: the size.
    """
    import torch

    from edgevit.bench.complexity import count_module
    from edgevit.models import model_card, parse_options

    card = model_card(model)
    size = check_image_size(image_size or card.image.size, card.size_multiple)
    module = registry.family_of(model)[1]
    chosen = parse_options(module.OPTIONS, model, options or {})
    with torch.device("meta"):
        count = count_module(module.build(model, chosen, num_classes=1000, features_only=False).eval(), size)
    return {
        "model": card.name,
        "family": card.family,
        "title": card.title,
        "url": card.url,
        "origin": card.origin,
        "image_size": list(size),
        "parameters": count.parameters,
        "macs": count.macs,
        "flops": count.flops,
        "paper": dict(card.paper),
        "options": {f.name: f.default for f in dataclasses.fields(module.OPTIONS)},
        "targets": list(registry.TARGETS),
        "notes": list(card.notes),
    }


def export_model(
    model: str,
    target: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    precision: str = "fp32",
    image_size: tuple[int, int] | None = None,
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
        image_size: (height, width), default the model's own. batch: pictures an inference takes, or "dynamic".
        pointwise: "dense" or "grouped" 1x1 convolutions; "auto" takes what was measured to be faster.
        out: directory in which the artifact's directory is made; an existing artifact is replaced only with `force`.

    Raises:
        UsageError, UnknownNameError: the request. CheckpointError: the weights. OutputError: the place.
        ExportError: a step failed. ParityError: the result is not equal to the reference; nothing is left behind.
    """
    spec = ExportSpec(
        model=model,
        target=target,
        precision=precision,
        weights=None if weights is None else str(weights),
        num_classes=num_classes,
        image_size=image_size,
        batch=batch,
        features_only=features_only,
        options=tuple(sorted((options or {}).items())),
        pointwise=pointwise,
        seed=seed,
    )
    return _export(spec, Path(out), force, command, progress)


def _export(spec: ExportSpec, out: Path, force: bool, command: str | None, progress: Progress) -> Artifact:
    from edgevit.bench.machine import library_versions
    from edgevit.models import load_model, model_card

    card = model_card(spec.model)
    exporter = registry.exporter(spec.target)
    if spec.precision not in exporter.precisions:
        raise UnknownNameError(f"precision for {spec.target}", spec.precision, exporter.precisions)
    size = check_image_size(spec.image_size or card.image.size, card.size_multiple)
    spec = dataclasses.replace(spec, image_size=size)
    name = artifact_name(spec.model, spec.target, spec.precision, size, card.image.size)
    with staged(out, name, force=force) as stage:
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
        progress(0.1, "exporting")
        built = exporter.export(loaded.module, card, spec, stage)
        progress(0.8, "comparing with the reference on photographs")
        parity = _prove(loaded.module, card, spec, built, stage, exporter.runtime)
        tools = {"edgevit": __version__, "python": platform.python_version(), **library_versions(TOOLS)}
        record = describe_export(spec, card.image, built, parity)
        record |= {
            "num_classes": loaded.num_classes,
            "weights": dict(loaded.weights),
            "notes": list(loaded.notes),
            "command": command,
        }
        write_manifest(stage, record | {"complexity": _complexity(stage, built), "tools": tools})
        progress(1.0, "done")
    return load_artifact(out / name)


def _complexity(stage: Path, built: Built) -> dict[str, Any] | None:
    if built.onnx_file is None:
        return None
    from edgevit.bench.complexity import count_onnx

    return dataclasses.asdict(count_onnx(stage / built.onnx_file))


def _prove(module: Any, card: ModelCard, spec: ExportSpec, built: Built, stage: Path, runtime: str) -> Parity:
    """Compare on the shipped photographs and leave the first batch as `sample/`; a failure raises."""
    images = inputs.load_images(inputs.photographs(), card.image, spec.image_size)
    if isinstance(spec.batch, int) and spec.batch > len(images):
        images = images[np.arange(spec.batch) % len(images)]
    expected, parity = _compare(module, images, spec.batch, spec.precision, stage / built.model_file, runtime)
    if not parity.passed:
        raise ParityError(
            f"{spec.model} on {runtime}: not equal to the reference: max abs {parity.max_abs:.2e} "
            f"(limit {parity.max_abs_limit:.0e}), cosine {parity.cosine:.6f} (limit {parity.cosine_limit}), "
            f"top-1 agreement {parity.top1_agreement}; nothing was written; please report the model and its options"
        )
    sample = stage / "sample"
    sample.mkdir()
    count = 1 if spec.batch == "dynamic" else spec.batch
    np.save(sample / "input.npy", images[:count])
    np.save(sample / "output.npy", next(iter(expected.values()))[:count])
    return parity


def _compare(
    module: Any, images: NDArray[np.float32], batch: Batch, precision: str, path: Path, runtime: str
) -> tuple[dict[str, NDArray[Any]], Parity]:
    """The reference's outputs for `images` (n, 3, h, w), and how far the runtime's lie from them."""
    from edgevit.export.verify import compare_outputs

    with Session(registry.runtime_class("torch")(module, images.shape[2:])) as reference:  # type: ignore[call-arg]  # a runtime's own arguments
        expected = reference.run_all(images, 1)
    with Session(registry.runtime_class(runtime)(path)) as session:  # type: ignore[call-arg]  # a runtime's own arguments
        session.require_precision(precision, path)
        actual = session.run_all(images, batch)
    return expected, compare_outputs(expected, actual, precision, runtime)


def load(path: str | Path, threads: int | None = None) -> Session:
    """An artifact as a runtime: `with edgevit.load(path) as runtime: runtime.run({"image": array})["logits"]`.

    Raises:
        ArtifactError: missing, changed or of a newer schema.
    """
    return _session(load_artifact(path), threads)


def _session(artifact: Artifact, threads: int | None) -> Session:
    runtime = registry.exporter(artifact.manifest["target"]).runtime
    return Session(registry.runtime_class(runtime)(artifact.model_file, threads))  # type: ignore[call-arg]  # a runtime's own arguments


def verify(path: str | Path, weights: str | Path | None = None) -> dict[str, Any]:
    """Check an artifact: its hashes, then its outputs.

    With the weights (given, or random ones rebuilt from their seed) against the reference on the photographs,
    otherwise against `sample/`, which the reference computed when the artifact was made.

    Raises:
        ArtifactError, CheckpointError, RuntimeFailure. ParityError: not equal.
    """
    from edgevit.export.verify import compare_outputs

    artifact = load_artifact(path)
    manifest = artifact.manifest
    with _session(artifact, None) as session:
        names = [spec.name for spec in session.runtime.outputs]
        session.require_precision(manifest["precision"], artifact.path)
        sample, stored = (artifact.array(f"sample/{part}.npy") for part in ("input", "output"))
        actual = session.run({"image": sample})
    first = {names[0]: stored}
    parity = compare_outputs(first, {names[0]: actual[names[0]]}, manifest["precision"], session.runtime.name)
    against = "sample"
    if parity.passed and (weights is not None or artifact.random_weights):
        module, card = _reference(manifest, weights)
        size = tuple(manifest["image"]["size"])
        images = inputs.load_images(inputs.photographs(), card.image, (size[0], size[1]))
        _, parity = _compare(
            module, images, manifest["batch"], manifest["precision"], artifact.model_file, session.runtime.name
        )
        against = "reference"
    if not parity.passed:
        raise ParityError(
            f"{path}: not equal to its {against}: max abs {parity.max_abs:.2e} (limit {parity.max_abs_limit:.0e}), "
            f"cosine {parity.cosine:.6f}, top-1 agreement {parity.top1_agreement}; export the model again"
        )
    return {"artifact": str(path), "against": against, "parity": parity.record()}


def _reference(manifest: Mapping[str, Any], weights: str | Path | None) -> tuple[Any, ModelCard]:
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


def predict(
    path: str | Path, images: Sequence[str | Path], labels: str | Path | None = None, top: int = 5
) -> dict[str, Any]:
    """The `top` classes of each picture, with probabilities from a softmax in float64.

    Raises:
        ArtifactError, RuntimeFailure: the artifact. InputError: a picture or the labels. UsageError: not a classifier.
    """
    artifact = load_artifact(path)
    manifest = artifact.manifest
    batch = inputs.load_images([Path(image) for image in images], artifact.image_spec)
    with _session(artifact, None) as session:
        outputs = session.run_all(batch, manifest["batch"])
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


def benchmark(
    items: Sequence[Artifact | str | Path],
    *,
    threads: int | None = None,
    duration_s: float = 5.0,
    loads: int = 3,
    vs: Literal["naive"] | None = None,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Time artifacts, or models exported for the occasion, in interleaved rounds.

    Several items race each other, each compared with the first; with `vs="naive"` each races the plain PyTorch export
    of its own reference form. `duration_s` is per contestant; `loads` is how often each is loaded afresh.

    Raises:
        UsageError, UnknownNameError, ArtifactError, RuntimeFailure.
    """
    from edgevit.bench.machine import machine_record
    from edgevit.bench.timing import BenchSettings, document, part_of

    if not items:
        raise UsageError("bench: nothing to measure; give artifacts or model names")
    if duration_s <= 0 or loads < 1 or (threads is not None and threads < 1):
        raise UsageError(f"bench: duration {duration_s}, loads {loads}, threads {threads}: each must be above zero")
    settings = BenchSettings(duration_s=duration_s, seed=seed)
    before = machine_record()
    with tempfile.TemporaryDirectory(prefix="edgevit-bench-") as scratch:
        artifacts = [_artifact_of(item, Path(scratch), progress) for item in items]
        races = [artifacts] if vs is None else [[artifact] for artifact in artifacts]
        reports = []
        for i, race in enumerate(races):
            names = [a.name for a in race]  # two of one name are told apart by their paths
            entries = [(a.name if names.count(a.name) == 1 else str(a.path), a, a.model_file) for a in race]
            if vs == "naive":
                entries.insert(0, (f"{race[0].name} (naive)", race[0], _naive(race[0], Path(scratch))))
            reports.append(_race(entries, settings, threads, loads, part_of(progress, i, len(races))))
    return document(reports, settings, threads, loads, {"before": before, "after": machine_record()})


def _artifact_of(item: Artifact | str | Path, scratch: Path, progress: Progress) -> Artifact:
    """An artifact as it is, or a registered model exported into `scratch`."""
    if isinstance(item, Artifact):
        return load_artifact(item.path)
    if Path(item).exists():
        return load_artifact(item)
    names = registry.model_names()
    if str(item) not in names:
        raise UnknownNameError("artifact directory or model", str(item), names)
    progress(0.0, f"exporting {item}")
    return export_model(str(item), "onnx", out=scratch, force=True)


def _naive(artifact: Artifact, scratch: Path) -> Path:
    manifest = artifact.manifest
    module, card = _reference({**manifest, "seed": 0}, None)
    spec = ExportSpec(
        manifest["model"], manifest["target"], image_size=tuple(manifest["image"]["size"]), batch=manifest["batch"]
    )
    path = scratch / f"{artifact.name}-naive.onnx"
    registry.exporter(manifest["target"]).export_naive(module, card, spec, path)
    return path


def _race(
    entries: Sequence[tuple[str, Artifact, Path]], settings: Any, threads: int | None, loads: int, progress: Progress
) -> BenchReport:
    from edgevit.bench.timing import Contestant, measure_loads

    precisions: dict[str, str] = {}

    @contextlib.contextmanager
    def load_all() -> Iterator[list[Contestant]]:
        with contextlib.ExitStack() as stack:
            contestants = []
            for name, artifact, path in entries:
                runtime = registry.runtime_class(registry.exporter(artifact.manifest["target"]).runtime)
                session = stack.enter_context(Session(runtime(path, threads)))  # type: ignore[call-arg]  # a runtime's own arguments
                session.require_precision(artifact.manifest["precision"], path)
                precisions[name] = session.runtime.effective_precision
                feed = {"image": artifact.array("sample/input.npy")}
                session.run(feed)  # checked once here; the timed calls go to the runtime itself
                contestants.append(Contestant(name, lambda r=session.runtime, feed=feed: r.run(feed)))  # type: ignore[misc]  # bound now
            yield contestants

    report = measure_loads(load_all, loads, settings, progress=progress)
    results = tuple(dataclasses.replace(r, effective_precision=precisions[r.name]) for r in report.results)
    return dataclasses.replace(report, results=results)


def doctor() -> dict[str, Any]:
    """What of edgevit works on this machine: versions, targets and runtimes with what they lack, the processor."""
    from edgevit.bench.machine import machine_record

    checks = registry.check_all()
    return {
        "edgevit": __version__,
        "python": platform.python_version(),
        "ok": all(check["ok"] for check in checks),
        "checks": checks,
        "machine": machine_record(),
    }
