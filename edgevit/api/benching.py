"""Artifacts and models against each other: `benchmark`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgevit import registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.errors import RuntimeFailure, UnknownNameError, UsageError
from edgevit.runtimes import Session
from edgevit.specs import BenchReport, ExportSpec, Size, size_text

from .calibrating import Progress
from .exporting import export_model
from .profiling import attest
from .proving import reference_of
from .running import RunOn, load_at, obstacle_of, session_of

Entry = tuple[str, Artifact, Path | None]  # what it is called, what it is, a model file in place of its own


def benchmark(
    items: Sequence[Artifact | str | Path],
    *,
    image_size: Size | None = None,
    threads: int | None = None,
    duration_s: float = 5.0,
    loads: int = 3,
    vs: Literal["naive"] | None = None,
    runtime: str | None = None,
    runtime_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Time artifacts, or models exported for the occasion, in interleaved rounds.

    Several items race each other, each compared with the first; with `vs="naive"` each races the plain PyTorch export
    of its own reference form. `duration_s` is per contestant; `loads` is how often each is loaded afresh. `image_size`
    is (height, width): the size of models, and which one of several sizes of artifacts; by default the first. `runtime`
    runs them in place of their target's own, e.g. "ov" an ONNX artifact; `runtime_options` is what it takes beside.

    Raises:
        UsageError, UnknownNameError, ArtifactError. RuntimeFailure: also where this machine cannot run the target.
    """
    from edgevit.bench.machine import machine_record
    from edgevit.bench.timing import BenchSettings, document, part_of

    if not items:
        raise UsageError("bench: nothing to measure; give artifacts or model names")
    if duration_s <= 0 or loads < 1 or (threads is not None and threads < 1):
        raise UsageError(f"bench: duration {duration_s}, loads {loads}, threads {threads}: each must be above zero")
    settings = BenchSettings(duration_s=duration_s, seed=seed)
    on = RunOn(runtime, threads, runtime_options or {})
    before = machine_record()
    with tempfile.TemporaryDirectory(prefix="edgevit-bench-") as scratch:
        artifacts = [_artifact_of(item, image_size, Path(scratch), progress) for item in items]
        races = [artifacts] if vs is None else [[artifact] for artifact in artifacts]
        reports = []
        for i, race in enumerate(races):
            entries: list[Entry] = [(label, a, None) for label, a in zip(_labels(race, runtime), race, strict=True)]
            if vs == "naive":
                entries.insert(0, (f"{entries[0][0]} (naive)", race[0], _naive(race[0], Path(scratch))))
            reports.append(_race(entries, settings, on, loads, part_of(progress, i, len(races))))
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


def _labels(race: Sequence[Artifact], runtime: str | None) -> list[str]:
    """What contestants are called: by directory, the size of several, the runtime if one is named."""
    names = [a.name for a in race]
    plain = [str(a.path) if names.count(a.name) > 1 else a.name for a in race]  # two of one name: by their paths
    sizes = ["" if len(a.image_sizes) == 1 else f" at {size_text(a.image_size)}" for a in race]
    return [name + size + (f" on {runtime}" if runtime else "") for name, size in zip(plain, sizes, strict=True)]


def _session(artifact: Artifact, on: RunOn, model_file: Path | None) -> Session:
    """What is timed; nothing stands in for the target's own runtime unless it was named."""
    own = registry.exporter(artifact.manifest["target"]).runtime
    if on.runtime is None and (obstacle := obstacle_of(own)):
        raise RuntimeFailure(
            f"{artifact.path}: {obstacle}; it is timed on its device, or name what to time here with --runtime"
        )
    session = session_of(artifact, on, model_file)
    if registry.RUNTIMES[session.runtime.name].emulates:
        raise UsageError(
            f"bench: runtime {session.runtime.name} computes what a device would compute, in a time that is no "
            f"device's: name another with --runtime, or time {artifact.path} there"
        )
    return session


def _naive(artifact: Artifact, scratch: Path) -> Path:
    manifest = artifact.manifest
    module, card = reference_of({**manifest, "seed": 0}, None)
    exporter = registry.exporter(manifest["target"])
    spec = ExportSpec(
        manifest["model"],
        manifest["target"],
        image_size=artifact.image_size,
        batch=manifest["batch"],
        settings=exporter.OPTIONS(),
    )
    path = scratch / f"{artifact.name}-naive{exporter.naive_suffix}"
    exporter.export_naive(module, card, spec, path)
    return path


def _race(
    entries: Sequence[Entry],
    settings: Any,
    on: RunOn,
    loads: int,
    progress: Progress,
) -> BenchReport:
    """Race `entries` in one interleaved run."""
    from edgevit.bench.timing import Contestant, measure_loads

    precisions: dict[str, str] = {}
    attested: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def load_all() -> Iterator[list[Contestant]]:
        with contextlib.ExitStack() as stack:
            contestants = []
            for name, artifact, path in entries:
                session = stack.enter_context(_session(artifact, on, path))
                session.require_precision(path or artifact.path)
                precisions[name] = session.runtime.effective_precision
                feed = {"image": artifact.sample("input")}
                session.run(feed)  # checked once here; the timed calls go to the runtime itself
                if name not in attested:
                    attested[name] = attest(session, artifact, feed, path)
                contestants.append(Contestant(name, lambda r=session.runtime, feed=feed: r.run(feed)))  # type: ignore[misc]  # bound now
            yield contestants

    report = measure_loads(load_all, loads, settings, progress=progress)
    unsure = [f"{name}: {told['verdict']}" for name, told in attested.items() if told["as_asked"] is None]
    results = tuple(
        dataclasses.replace(r, effective_precision=precisions[r.name], attestation=attested[r.name])
        for r in report.results
    )
    return dataclasses.replace(report, results=results, warnings=(*report.warnings, *unsure))
