"""Has a change made a network slower, larger or worse? `gate`, for a pull request or a desk."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgevit import registry
from edgevit.artifact import Artifact
from edgevit.errors import InputError, UsageError
from edgevit.manifest import MANIFEST
from edgevit.specs import Check, GateReport, Size, size_text

from .calibrating import Progress
from .comparing import (
    SPREAD_RUNS,
    Way,
    doubtful,
    estimate_against,
    later_ms,
    now_ms,
    require_comparable,
    require_machine,
    require_place,
    too_few,
    way_of,
)
from .running import RunOn, load_at
from .working import Job, fresh_pair, job_of

if TYPE_CHECKING:
    from edgevit.bench.budget import Limits
    from edgevit.bench.gate import Decision, Estimate, GateSettings, Judge, Logs
    from edgevit.bench.store import Stored
    from edgevit.bench.watch import Moment

THROUGH = "compared by the ratios to the reference workload, not by the times"
BEGUN = "the first measurement of this artifact on this machine"
NARROWEST = 0.02  # of an interval that begins a store: two loads of one file differ by nearly as much


def gate(
    baseline: str | Path,
    candidate: str | Path,
    *,
    max_slowdown: float = 0.05,
    max_drop_points: float = 0.5,
    max_size: float = 0.01,
    max_parameters: float = 0.0,
    max_macs: float = 0.0,
    budget_s: float = 60.0,
    threads: int | None = None,
    runtime: str | None = None,
    runtime_options: Mapping[str, Any] | None = None,
    image_size: Size | None = None,
    across_machines: bool = False,
    update_baseline: bool = False,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Compare a candidate artifact with a baseline: `verdict` is "pass", "regression" or "inconclusive".

    Each is an artifact or a stored result (.json), the baseline also a store (directory) of these. Two artifacts are
    measured side by side; else both are compared by how much longer they take than the reference workload. What is
    allowed are shares of the baseline's figure (0.05 = 5 %), and points of top-1 that may be lost on pictures that
    `evaluate --record` has noted for both. After `budget_s` seconds an answer that is not clear is inconclusive.
    `across_machines` takes a result of another machine all the same; `update_baseline` adds what passes to the store.

    Returns the fields of `specs.GateReport`; `machine_before` and `machine`; `stored`, the file of the store that the
    measurement was added to; `text`, lines for a terminal; `markdown`, for a pull request.

    Raises:
        UsageError, ArtifactError. InputError: the stored result. RuntimeFailure: this machine cannot time one of them.
    """
    from edgevit.bench.budget import Limits
    from edgevit.bench.gate import GateSettings

    limits = Limits(max_slowdown, max_drop_points, max_size, max_parameters, max_macs)
    settings = GateSettings(max_slowdown, budget_s, seed)
    measuring = _Measuring(settings, limits, RunOn(runtime, threads, runtime_options or {}), progress)
    return measuring.of(Path(baseline), Path(candidate), image_size, across_machines, update_baseline)


def _is_stored(place: Path, update: bool) -> bool:
    """Whether this is a stored result or a store of them; a store may be yet to be made."""
    return (
        place.suffix == ".json"
        or (place.is_dir() and not (place / MANIFEST).exists())
        or (update and not place.exists())
    )


@dataclass
class _Measuring:
    """One gate under way. `scratch` and `machine` are there while it measures."""

    settings: GateSettings
    limits: Limits
    on: RunOn
    progress: Progress
    scratch: Path = Path()
    machine: Mapping[str, Any] = field(default_factory=dict)

    def of(self, place: Path, result: Path, size: Size | None, across: bool, update: bool) -> dict[str, Any]:
        """The document of a gate, by what the candidate is."""
        if result.suffix == ".json":
            if update:
                raise UsageError(f"{result}: stored already; --update-baseline adds what is measured of an artifact")
            return self.documented(lambda: (self.of_result(place, result, across), None), [])
        artifact = load_at(result, size)
        options = ["--image-size", size_text(artifact.image_size)] if len(artifact.image_sizes) > 1 else []
        return self.documented(lambda: self.of_artifact(place, artifact, across, update), options)

    def documented(
        self, measure: Callable[[], tuple[GateReport, Path | None]], options: Sequence[str]
    ) -> dict[str, Any]:
        """The report, the machine before and after, and what a person reads of it."""
        from edgevit.bench import summary
        from edgevit.bench.machine import machine_record

        if self.on.threads is not None and self.on.threads < 1:
            raise UsageError(f"gate: threads {self.on.threads}, expected a number above 0")
        self.machine = machine_record()
        with tempfile.TemporaryDirectory(prefix="edgevit-gate-") as scratch:
            self.scratch = Path(scratch)
            report, stored = measure()
        after = machine_record()
        return {
            **asdict(report),
            "seed": self.settings.seed,
            "threads": self.on.threads,
            "runtime": self.on.runtime,
            "stored": None if stored is None else str(stored),
            "machine_before": self.machine,
            "machine": after,
            "text": summary.text(report),
            "markdown": summary.markdown(report, after, [*options, *self._options()]),
        }

    def _options(self) -> list[str]:
        """What a command line needs to repeat this, beside the limits."""
        given = {
            "--threads": self.on.threads,
            "--runtime": self.on.runtime,
            "--budget": f"{self.settings.budget_s:g}",
        }
        words = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        return words + [w for key, value in self.on.options.items() for w in ("--runtime-option", f"{key}={value}")]

    def of_artifact(
        self, place: Path, candidate: Artifact, across: bool, update: bool
    ) -> tuple[GateReport, Path | None]:
        """An artifact against another, or against what is stored."""
        if _is_stored(place, update):
            return self.with_stored(place, candidate, across, update)
        if not place.exists():
            raise InputError(f"{place}: no such artifact, stored result or store; begin a store with --update-baseline")
        if update:
            raise UsageError(f"{place}: an artifact; --update-baseline needs a store, a directory of its own")
        return self.side_by_side(load_at(place, candidate.image_size), candidate), None

    def of_result(self, place: Path, result: Path, across: bool) -> GateReport:
        """A stored result as the candidate: against another nothing is measured, against an artifact that is."""
        from edgevit.bench import store
        from edgevit.bench.budget import check_manifests
        from edgevit.bench.gate import SETTLED_RISK, settled
        from edgevit.bench.machine import fingerprint

        stored = store.read(result)
        latest = stored.latest
        causes: tuple[str, ...] = ()
        baseline_ms: float | None
        if _is_stored(place, update=False):
            known = self._stored(place, stored.machine, stored.artifact, across)
            require_comparable(way_of(known.latest), way_of(latest), place)
            found = estimate_against(known)(latest.log_ratios, SETTLED_RISK)
            decision, warnings = doubtful(settled(found, self.settings), known)
            baseline_ms, before = None, known.latest.checks
        else:
            require_machine(stored, fingerprint(self.machine), result, across)
            baseline = load_at(place, None)
            workload, job, way = self._beside(baseline)
            require_comparable(way_of(latest), way, result)
            turned = estimate_against(stored)

            def estimate(logs: Sequence[float], risk: float) -> Logs:
                middle, low, high = turned(logs, risk)
                return -middle, -high, -low

            decision, causes = self._decide(workload, job, estimate=estimate)
            decision, warnings = doubtful(decision, stored)
            baseline_ms, before = decision.candidate_ms, baseline.manifest
        candidate_ms = None if baseline_ms is None else later_ms(baseline_ms, decision)
        check = _latency(decision, self.limits.max_slowdown, baseline_ms, candidate_ms, THROUGH)
        checks = (check, *check_manifests(before, latest.checks, self.limits))
        return _report(decision, checks, str(place), str(result), "reference workload", causes, warnings)

    def side_by_side(self, baseline: Artifact, candidate: Artifact) -> GateReport:
        """Both measured here, in turns."""
        from edgevit.bench.budget import check_manifests

        batches = [each.manifest["batch"] for each in (baseline, candidate)]
        if batches[0] != batches[1]:
            raise UsageError(
                f"gate: {baseline.path} takes batch {batches[0]}, {candidate.path} takes {batches[1]}: expected the "
                "same work; export both alike"
            )
        jobs = [job_of(each, self.on, self.scratch) for each in (baseline, candidate)]
        decision, causes = self._decide(jobs[0], jobs[1])
        latency = _latency(decision, self.limits.max_slowdown, decision.baseline_ms, decision.candidate_ms)
        checks = (latency, *check_manifests(baseline.manifest, candidate.manifest, self.limits))
        return _report(decision, checks, str(baseline.path), str(candidate.path), "side by side", causes)

    def with_stored(
        self, place: Path, candidate: Artifact, across: bool, update: bool
    ) -> tuple[GateReport, Path | None]:
        """The candidate measured beside the reference workload, as the baseline was."""
        from edgevit.bench import store
        from edgevit.bench.machine import fingerprint

        here = fingerprint(self.machine)
        if update and place.suffix == ".json":
            raise UsageError(f"{place}: --update-baseline adds to a store; give the directory that holds it")
        if update:
            require_place(place)
        begun = not update or store.find(place, str(here["id"]), candidate.name) is not None
        stored = self._stored(place, here, candidate.name, across) if begun else None
        workload, job, way = self._beside(candidate)
        if stored is None:
            report = self._first(workload, job, place, candidate)
        else:
            require_comparable(way_of(stored.latest), way, place)
            report = self._against(stored, workload, job, place, candidate, here)
        few = stored is not None and len(stored.history) < SPREAD_RUNS and report.verdict == "inconclusive"
        if not update or (report.verdict != "pass" and not (few and report.smallest_seen is not None)):
            return report, None
        entry = store.new_entry(
            candidate.manifest,
            runtime=job.runtime,
            threads=job.threads,
            options=job.options,
            log_ratios=report.log_ratios,
            reference=way.reference,
            p50_ms=report.checks[0].candidate,
            machine=self.machine,
        )
        return report, store.append(place, here, candidate.name, entry)

    def _stored(self, place: Path, machine: Mapping[str, Any], name: str, across: bool) -> Stored:
        """What a file, or a store, has of the artifact `name` on a machine."""
        from edgevit.bench import store

        if place.suffix != ".json":
            found = store.find(place, str(machine["id"]), name)
            if found is None:
                raise store.missing(place, str(machine["id"]), name)
            return found
        stored = store.read(place)
        require_machine(stored, machine, place, across)
        return stored

    def _beside(self, artifact: Artifact) -> tuple[Job, Job, Way]:
        """The reference workload, the artifact, and what another measurement must share to be comparable."""
        from edgevit.bench.store import Reference
        from edgevit.bench.workload import NAME, VERSION, write_workload

        path, feed, digest = write_workload(self.scratch)
        job = job_of(artifact, self.on, self.scratch)
        if job.runtime not in registry.runtimes_for(path.name):
            raise UsageError(
                f"gate: runtime {job.runtime} runs no ONNX files, and the reference workload of stored results is one; "
                "gate two artifacts side by side"
            )
        workload = Job(job.runtime, path, "fp32", feed, job.threads, job.options)
        work = (list(artifact.image_size), artifact.manifest["batch"])
        options = {key: str(value) for key, value in job.options.items()}
        reference = Reference(NAME, VERSION, digest)
        return workload, job, Way(job.precision, job.runtime, job.threads, work, options, reference)

    def _first(self, workload: Job, job: Job, place: Path, candidate: Artifact) -> GateReport:
        """A measurement that begins a history: there is nothing to compare it with, but it has to be narrow enough."""
        wide = max(self.limits.max_slowdown, NARROWEST)

        def narrow(found: Logs) -> Literal["pass", "inconclusive"]:
            _, low, high = found
            return "pass" if high - low <= wide else "inconclusive"

        decision, causes = self._decide(workload, job, judge=narrow)
        found, detail = decision.interval, BEGUN
        if found is None:
            detail = too_few(decision)
        elif decision.verdict != "pass":
            width = math.log1p(found.high) - math.log1p(found.low)
            detail = f"too noisy to begin with: the interval is {width:.1%} wide, {wide:.1%} is needed; it was not kept"
        check = Check(
            what="latency",
            verdict="not gated" if decision.verdict == "pass" else "inconclusive",
            unit="ms",
            baseline=None,
            candidate=decision.candidate_ms,
            worse=None,
            limit=self.limits.max_slowdown,
            detail=detail,
        )
        decision = replace(decision, smallest_seen=None)  # there was nothing to be slower than
        return _report(decision, (check,), str(place), str(candidate.path), "reference workload", causes)

    def _against(
        self, stored: Stored, workload: Job, job: Job, place: Path, candidate: Artifact, here: Mapping[str, Any]
    ) -> GateReport:
        """The candidate's rounds against those of the newest stored result."""
        from edgevit.bench.budget import check_manifests
        from edgevit.bench.diagnosis import diagnose

        latest = stored.latest
        decision, causes = self._decide(workload, job, estimate=estimate_against(stored))
        decision, warnings = doubtful(decision, stored)
        checks = (
            _latency(decision, self.limits.max_slowdown, now_ms(decision), decision.candidate_ms, THROUGH),
            *check_manifests(latest.checks, candidate.manifest, self.limits),
        )
        if stored.machine["id"] != here["id"]:
            warnings.append("the baseline is of another machine: what one gains the other may lose")
        causes = (*causes, *diagnose(latest.machine, self.machine))
        return _report(decision, checks, str(place), str(candidate.path), "reference workload", causes, warnings)

    def _decide(
        self, first: Job, second: Job, *, estimate: Estimate | None = None, judge: Judge | None = None
    ) -> tuple[Decision, tuple[str, ...]]:
        """Rounds of fresh processes, and what changed on the machine meanwhile."""
        from edgevit.bench.gate import decide
        from edgevit.bench.watch import changes, look

        moments: list[Moment] = [look()]
        order = random.Random(self.settings.seed)
        decision = decide(
            lambda: fresh_pair(first, second, order),
            self.settings,
            estimate=estimate,
            judge=judge,
            progress=self.progress,
            after_round=lambda: moments.append(look()),
        )
        return decision, tuple(change.text for change in changes(moments))


def _latency(
    decision: Decision, limit: float, baseline_ms: float | None, candidate_ms: float | None, detail: str = ""
) -> Check:
    """The slowdown as a check."""
    found = decision.interval
    if found is None:
        detail = f"{too_few(decision)}: raise --budget"
    return Check(
        what="latency",
        verdict=decision.verdict,
        unit="ms",
        baseline=baseline_ms,
        candidate=candidate_ms,
        worse=found.worse if found else None,
        limit=limit,
        low=found.low if found else None,
        high=found.high if found else None,
        detail=detail,
    )


def _report(
    decision: Decision,
    checks: Sequence[Check],
    baseline: str,
    candidate: str,
    compared: Any,
    causes: Sequence[str],
    warnings: Sequence[str] = (),
) -> GateReport:
    """The worst of the checks decides."""
    verdicts = {check.verdict for check in checks}
    verdict = next((each for each in ("regression", "inconclusive") if each in verdicts), "pass")
    return GateReport(
        verdict=verdict,  # type: ignore[arg-type]  # one of the three
        baseline=baseline,
        candidate=candidate,
        checks=tuple(checks),
        compared=compared,
        rounds=len(decision.log_ratios),
        spent_s=decision.spent_s,
        stopped_by=decision.stopped_by,
        smallest_seen=decision.smallest_seen,
        log_ratios=decision.log_ratios,
        rounds_ms=tuple((each.baseline_ms, each.candidate_ms) for each in decision.rounds),
        causes=tuple(causes),
        warnings=tuple(warnings),
    )
