"""Artifacts and models against each other: `benchmark`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgevit import __version__
from edgevit.artifact import Artifact
from edgevit.errors import UsageError
from edgevit.specs import Size

from .calibrating import Pictures, Progress, Source
from .describing import facts_of, roof
from .peering import Entry, check_peer, compared, peer_of, warn_of
from .running import RunOn
from .saturating import throughput as throughput_of
from .starting import cold_start as cold_start_of
from .sweeping import Entrants, entrants, measure_cells

if TYPE_CHECKING:
    from edgevit.bench.sweep import Cell
    from edgevit.bench.timing import BenchSettings, Race

PERCENTILES = (50.0, 90.0, 99.0)  # told always, where the samples support them


def benchmark(
    items: Sequence[Artifact | str | Path],
    *,
    image_size: Size | None = None,
    threads: int | None = None,
    duration_s: float = 5.0,
    max_duration_s: float = 60.0,
    percentile: float = 90.0,
    loads: int = 3,
    vs: str | Path | None = None,
    runtime: str | None = None,
    runtime_options: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    to: str = "onnx",
    calibration: Source = None,
    throughput: bool = False,
    cold_start: bool = False,
    explain: bool = False,
    roofline: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Time artifacts, or models exported for the occasion, in interleaved rounds.

    Several items race each other, each compared with the first. `vs` is whom each races instead: "naive", the plain
    PyTorch export of its own reference form; an artifact; anyone's .onnx file of the same input. `image_size` is
    (height, width), by default the first. `duration_s` is per contestant, up to `max_duration_s` where `percentile`
    needs more samples; `loads` is how often each is loaded afresh. `runtime` runs them in place of their target's own.
    `sweep` has values of "threads", "batch", "image_size", "precision": each combination is a cell. Models go `to` that
    target, int8 with `calibration` pictures. The document is that of `out`, which gets each cell as it ends and from
    which the same call goes on; without a sweep the one cell's fields stand in the place of `cells`.

    Raises:
        UsageError, UnknownNameError, ArtifactError, InputError, OutputError: also what `out` holds, and its place.
        RuntimeFailure: also where this machine cannot run the target.
    """
    times = (duration_s, max_duration_s, percentile, loads, seed)
    on, beside = RunOn(runtime, threads, runtime_options or {}), Beside(throughput, cold_start, explain, roofline)
    plan = _plan(times, on, vs, beside)
    with tempfile.TemporaryDirectory(prefix="edgevit-bench-") as scratch:
        field = entrants(items, to, calibration, Path(scratch))
        return _measured(plan, field, image_size, sweep, None if out is None else Path(out), progress)


@dataclass(frozen=True)
class Beside:
    """What is measured beside the latency of each artifact.

    `roofline` is the share of this machine's limit, for which its peaks are measured, about two seconds for each
    runtime and number of threads; `explain` adds the biggest losses.
    """

    throughput: bool = False
    cold_start: bool = False
    explain: bool = False
    roofline: bool = True


@dataclass(frozen=True)
class Plan:
    """What is done in every cell; `on.threads` holds where a cell has none of its own."""

    settings: BenchSettings
    on: RunOn
    loads: int
    vs: str | Path | None
    beside: Beside


def _plan(times: tuple[float, float, float, int, int], on: RunOn, vs: str | Path | None, beside: Beside) -> Plan:
    from edgevit.bench.timing import BenchSettings

    duration_s, max_duration_s, percentile, loads, seed = times
    if duration_s <= 0 or loads < 1 or (on.threads is not None and on.threads < 1):
        raise UsageError(f"bench: duration {duration_s}, loads {loads}, threads {on.threads}: each must be above zero")
    if not 0 < percentile < 100:
        raise UsageError(f"bench: percentile {percentile}: expected a number above 0 and below 100, e.g. 99")
    percentiles = tuple(sorted({*PERCENTILES, percentile}))
    settings = BenchSettings(duration_s, max_duration_s, percentiles=percentiles, wanted=percentile, seed=seed)
    return Plan(settings, on, loads, vs, beside)


def _measured(
    plan: Plan,
    field: Entrants,
    image_size: Size | None,
    sweep: Mapping[str, Sequence[Any]] | None,
    out: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Every cell, measured now or before."""
    from edgevit.bench.sweep import Cell, CellFile, grid, record

    cells = grid(Cell(threads=plan.on.threads, image_size=image_size), sweep or {})
    field.check(cells)
    kept = CellFile(
        out, {**_request(plan, field), "axes": {name: list(values) for name, values in (sweep or {}).items()}}
    )

    def measure(cell: Cell, told: Progress) -> dict[str, Any]:
        return _measure(plan, cell, field, told)

    there = measure_cells(cells, kept, field.names, measure, progress)
    document = {**kept.document(), "resumed": there}
    if sweep:
        return document
    return {**{k: v for k, v in document.items() if k != "cells"}, **(kept.get(record(cells[0], field.names)) or {})}


def _request(plan: Plan, field: Entrants) -> dict[str, Any]:
    """What two runs must have in common for their cells to stand in one file."""
    from edgevit.bench.machine import fingerprint, library_versions, machine_record

    vs, given = plan.vs, field.calibration
    pictures = given if isinstance(given, Pictures) else Pictures(given)
    return {
        "items": field.identities(),
        "vs": vs if vs is None or vs == "naive" else check_peer(vs),
        "to": field.target,
        "calibration": None
        if pictures.source is None
        else {"source": Path(pictures.source).name, "count": pictures.count},
        "runtime": plan.on.runtime,
        "runtime_options": {key: str(value) for key, value in plan.on.options.items()},
        "settings": {**dataclasses.asdict(plan.settings), "loads": plan.loads},
        "beside": dataclasses.asdict(plan.beside),
        "machine": fingerprint(machine_record()),
        "versions": {"edgevit": __version__, **library_versions()},
    }


def _measure(plan: Plan, cell: Cell, field: Entrants, progress: Progress) -> dict[str, Any]:
    """One cell: its races, and what stands beside their times."""
    from edgevit.bench.machine import machine_record
    from edgevit.bench.stats import median
    from edgevit.bench.timing import document, part_of

    more = plan.beside != Beside(roofline=False)
    racing, beside = (part_of(progress, i, 2) for i in (0, 1)) if more else (progress, progress)

    on = dataclasses.replace(plan.on, threads=cell.threads)
    before = machine_record()
    own = field.entries(cell, on.runtime, progress)
    races = [own]
    if plan.vs is not None:
        races = [[peer_of(entry, plan.vs, field.scratch, alone=len(own) == 1), entry] for entry in own]
    reports: list[Race] = []
    facts, peers = dict[str, dict[str, Any]](), list[dict[str, Any]]()
    for i, race in enumerate(races):
        report, about, outputs = _race(race, plan, on, part_of(racing, i, len(races)))
        reports.append(report)
        facts |= about
        if plan.vs not in (None, "naive"):
            peers.append(
                compared(race[1], race[0], outputs, {e.name: about[e.name]["effective_precision"] for e in race})
            )
    middles_ms = {result.name: median(result.samples_ms) for report in reports for result in report.results}
    entries = [entry for race in races for entry in race]
    for i, entry in enumerate(entries):
        told = part_of(beside, i, len(entries))
        facts[entry.name] |= _found_beside(
            entry, plan.beside, on, middles_ms[entry.name], plan.settings.duration_s, told
        )
    machine = {"before": before, "after": machine_record()}
    body = document(reports, plan.settings, cell.threads, plan.loads, machine)
    body["results"] = [{**result, **facts[result["name"]]} for result in body["results"]]
    body["warnings"] += [text for told in peers for text in warn_of(told)]
    return {**body, "peers": peers}


def _found_beside(
    entry: Entry, asked: Beside, on: RunOn, p50_ms: float, duration_s: float, progress: Progress
) -> dict[str, Any]:
    """What was asked for beside one latency; of a peer no more than its roof."""
    found: dict[str, Any] = {}
    if asked.roofline or asked.explain:
        progress(0.0, f"limits of this machine for {entry.name}")
        found["roofline"] = roof(entry, on, p50_ms, explained=asked.explain)
    if asked.throughput and entry.kind == "own":
        batch = entry.batch if entry.artifact.manifest["batch"] == "dynamic" else None
        found["throughput"] = throughput_of(entry.artifact, on, duration_s, None, progress, batch=batch)
    if asked.cold_start and entry.kind == "own":
        found |= cold_start_of(entry.artifact, on, progress=progress)
    return found


def _race(
    race: Sequence[Entry], plan: Plan, on: RunOn, progress: Progress
) -> tuple[Race, dict[str, dict[str, Any]], dict[str, dict[str, NDArray[Any]]]]:
    """Race entries in one interleaved run; with it what is known of each, and what it put out for the sample."""
    from edgevit.bench.timing import Contestant, measure_loads

    facts: dict[str, dict[str, Any]] = {}
    outputs: dict[str, dict[str, NDArray[Any]]] = {}

    @contextlib.contextmanager
    def load_all() -> Iterator[list[Contestant]]:
        with contextlib.ExitStack() as stack:
            contestants = []
            for entry in race:
                session = stack.enter_context(entry.session(on))
                if entry.kind != "foreign":
                    session.require_precision(entry.file or entry.artifact.path)
                feed = entry.feed(session)
                outputs[entry.name] = session.run(feed)  # checked once here; the timed calls go to the runtime itself
                if entry.name not in facts:
                    facts[entry.name] = facts_of(entry, session, feed)
                contestants.append(Contestant(entry.name, lambda r=session.runtime, feed=feed: r.run(feed)))  # type: ignore[misc]  # bound now
            yield contestants

    report = measure_loads(load_all, plan.loads, plan.settings, progress=progress)
    told = {name: about["attestation"] for name, about in facts.items()}
    unsure = [f"{name}: {about['verdict']}" for name, about in told.items() if about["as_asked"] is None]
    return dataclasses.replace(report, warnings=(*report.warnings, *unsure)), facts, outputs
