"""Artifacts and models against each other: `benchmark`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from edgevit import registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.errors import UnknownNameError, UsageError
from edgevit.specs import BenchReport, ExportSpec, Size, size_text

from .exporting import Progress, export_model
from .proving import reference_of
from .running import load_at, session_of


def benchmark(
    items: Sequence[Artifact | str | Path],
    *,
    image_size: Size | None = None,
    threads: int | None = None,
    duration_s: float = 5.0,
    loads: int = 3,
    vs: Literal["naive"] | None = None,
    runtime: str | None = None,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Time artifacts, or models exported for the occasion, in interleaved rounds.

    Several items race each other, each compared with the first; with `vs="naive"` each races the plain PyTorch export
    of its own reference form. `duration_s` is per contestant; `loads` is how often each is loaded afresh. `image_size`
    is (height, width): the size of models, and which one of several sizes of artifacts; by default the first. `runtime`
    runs them in place of their target's own, e.g. "ov" an ONNX artifact.

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
        artifacts = [_artifact_of(item, image_size, Path(scratch), progress) for item in items]
        races = [artifacts] if vs is None else [[artifact] for artifact in artifacts]
        reports = []
        for i, race in enumerate(races):
            names = [a.name for a in race]  # two of one name are told apart by their paths
            suffix = "" if runtime is None else f" on {runtime}"
            entries = [
                (_label(a, str(a.path) if names.count(a.name) > 1 else a.name) + suffix, a, a.model_file) for a in race
            ]
            if vs == "naive":
                entries.insert(0, (f"{entries[0][0]} (naive)", race[0], _naive(race[0], Path(scratch))))
            reports.append(_race(entries, settings, (threads, runtime), loads, part_of(progress, i, len(races))))
    return document(reports, settings, threads, loads, {"before": before, "after": machine_record()})


def _artifact_of(item: Artifact | str | Path, image_size: Size | None, scratch: Path, progress: Progress) -> Artifact:
    """An artifact at the size wanted, or a registered model exported into `scratch`."""
    if isinstance(item, Artifact):
        return load_artifact(item.path).at(image_size or item.image_size)
    if Path(item).exists():
        return load_at(item, image_size)
    names = registry.model_names()
    if str(item) not in names:
        raise UnknownNameError("artifact directory or model", str(item), names)
    progress(0.0, f"exporting {item}")
    return export_model(str(item), "onnx", image_size=image_size, out=scratch, force=True)


def _label(artifact: Artifact, name: str) -> str:
    """What a contestant is called: its directory, and of several sizes the one that runs."""
    return name if len(artifact.image_sizes) == 1 else f"{name} at {size_text(artifact.image_size)}"


def _naive(artifact: Artifact, scratch: Path) -> Path:
    manifest = artifact.manifest
    module, card = reference_of({**manifest, "seed": 0}, None)
    spec = ExportSpec(manifest["model"], manifest["target"], image_size=artifact.image_size, batch=manifest["batch"])
    path = scratch / f"{artifact.name}-naive.onnx"
    registry.exporter(manifest["target"]).export_naive(module, card, spec, path)
    return path


def _race(
    entries: Sequence[tuple[str, Artifact, Path]],
    settings: Any,
    place: tuple[int | None, str | None],
    loads: int,
    progress: Progress,
) -> BenchReport:
    """Race (name, artifact, model file); `place` is the number of threads and the runtime, None for their defaults."""
    from edgevit.bench.timing import Contestant, measure_loads

    threads, runtime = place

    precisions: dict[str, str] = {}

    @contextlib.contextmanager
    def load_all() -> Iterator[list[Contestant]]:
        with contextlib.ExitStack() as stack:
            contestants = []
            for name, artifact, path in entries:
                session = stack.enter_context(session_of(artifact, threads, path, runtime))
                session.require_precision(artifact.manifest["precision"], path)
                precisions[name] = session.runtime.effective_precision
                feed = {"image": artifact.sample("input")}
                session.run(feed)  # checked once here; the timed calls go to the runtime itself
                contestants.append(Contestant(name, lambda r=session.runtime, feed=feed: r.run(feed)))  # type: ignore[misc]  # bound now
            yield contestants

    report = measure_loads(load_all, loads, settings, progress=progress)
    results = tuple(dataclasses.replace(r, effective_precision=precisions[r.name]) for r in report.results)
    return dataclasses.replace(report, results=results)
