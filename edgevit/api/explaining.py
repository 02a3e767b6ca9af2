"""Results against what this machine can do: peaks through a runtime, the share of the limit, the biggest losses."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgevit import registry
from edgevit.artifact import Artifact
from edgevit.bench.attestation import COVERED, with_macs
from edgevit.bench.roofline import LEAVES_OUT, VALUE_BITS, Loss, Peaks, Work, limit_ms, losses, works
from edgevit.contracts import Arrays
from edgevit.errors import ArtifactError, ExportError, RuntimeFailure, UsageError
from edgevit.runtimes import Session
from edgevit.specs import OperatorTime

from .running import RunOn, open_runtime

if TYPE_CHECKING:
    from edgevit.bench.complexity import NodeCost
    from edgevit.bench.probes import Probe, Times

PRECISIONS = ("fp32", "bf16", "int8")  # whose peaks are looked for where none are named
BUDGET_S = 1.0  # of repetitions, by all probes together; loading them takes as long again
PROFILED_RUNS = 10  # of an explanation: a median of so many is steady enough for kinds of operators
UNFOUND, EVERYTHING = "products not found", "all products"  # in the place of a kind where operators are not told
MAX_COUNT = 1 << 62  # of operations or bytes: more is no network's


def roof_obstacle(runtime: str) -> str | None:
    """Why a runtime's limits cannot be measured here, or None."""
    row = registry.RUNTIMES.get(runtime)
    if row is None or runtime not in registry.runtimes_for("x.onnx"):
        return f"runtime {runtime} runs no ONNX files, which are what its limits are measured with"
    if row.emulates:
        return f"runtime {runtime} computes what a device would, in a time that is no device's: it has no limits"
    return None


def measure_peaks(
    runtime: str,
    threads: int | None = None,
    precisions: Sequence[str] = PRECISIONS,
    working_set_bytes: int = 0,
    runtime_options: Mapping[str, Any] | None = None,
    budget_s: float = BUDGET_S,
) -> Peaks:
    """This machine's peaks as `runtime` reaches them: matrix products by precision, and bandwidth by working set.

    `working_set_bytes` are a network's weights; what fits usual caches is measured anyway. Probes run by turns and the
    best repetition counts. A precision that the runtime does not have, or only seems to have by its own account of what
    it executed, is in `absent` with the reason.

    Raises:
        UsageError: its limits cannot be measured, or a precision is unknown. MissingDependencyError, RuntimeFailure.
    """
    from edgevit.bench.probes import LAYERS, STREAM_SETS, best_times, product_probe, stream_probe

    if obstacle := roof_obstacle(runtime):
        raise UsageError(f"roofline: {obstacle}; name one of its kind with --runtime, or leave the roofline out")
    if unknown := [name for name in precisions if name not in LAYERS]:
        raise UsageError(f"roofline: precision {unknown[0]}, expected one of {', '.join(LAYERS)}")
    on = RunOn(runtime, threads, runtime_options or {})
    absent = dict[str, str]()
    sizes = sorted({*STREAM_SETS, max(working_set_bytes, min(STREAM_SETS))})
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgevit-roofline-")))
        found: list[tuple[str, Probe, Callable[[], object]]] = []
        for precision in dict.fromkeys(precisions):
            probe = product_probe(precision)
            try:
                found.append((precision, probe, _started(stack, scratch, on, probe, precision)))
            except RuntimeFailure as error:
                absent[precision] = str(error).replace(f"{scratch}/", "")
        for size in sizes:
            probe = stream_probe(size)
            found.append(("", probe, _started(stack, scratch, on, probe, "fp32")))
        times = best_times([run for _, _, run in found], budget_s)
    return _peaks(on, [(name, probe, each) for (name, probe, _), each in zip(found, times, strict=True)], absent)


def _peaks(on: RunOn, timed: Sequence[tuple[str, Probe, Times]], absent: Mapping[str, str]) -> Peaks:
    """What the timed probes come to; the name is the precision of products, "" of streams."""
    return Peaks(
        runtime=on.runtime or "",
        threads=on.threads,
        flops_per_s={name: probe.flops / each.best_s for name, probe, each in timed if name},
        bandwidth=tuple((probe.set_bytes, probe.read_bytes / each.best_s) for name, probe, each in timed if not name),
        absent=absent,
        unsteady=max(each.median_s / each.best_s for _, _, each in timed),
    )


def _started(
    stack: contextlib.ExitStack, scratch: Path, on: RunOn, probe: Probe, precision: str
) -> Callable[[], object]:
    """A probe loaded into a runtime until `stack` closes.

    Raises:
        RuntimeFailure: it cannot be loaded, or its products run in another precision.
    """
    import onnx

    path = scratch / f"probe-{len(list(scratch.iterdir()))}.onnx"
    onnx.save(probe.model, path)
    session = Session(open_runtime(on.runtime or "", path, precision, on))
    stack.callback(session.close)
    session.__enter__()
    told = session.runtime.effective_precision
    if told != precision:
        raise RuntimeFailure(f"runtime {on.runtime} computes it in {told}")
    feed = {"x": np.ones(probe.shape, np.float32)}
    session.run(feed)  # checks the input, which goes to the runtime itself then
    if not probe.flops:
        return lambda: session.runtime.run(feed)
    ran = {operator.precision for operator in session.runtime.profile(feed, 0) if _is_product(operator)}
    if ran != {precision}:
        raise RuntimeFailure(f"runtime {on.runtime} computes it in {', '.join(sorted(ran)) or 'nothing that it tells'}")
    return lambda: session.runtime.run(feed)


def _is_product(operator: OperatorTime) -> bool:
    """Whether it computes one of a probe's products, by its name or by what it stands for."""
    names = (operator.name, *operator.origins) if operator.macs is None else operator.origins
    return operator.macs != 0 and any(name.startswith("product") for name in names)


def explain(
    session: Session,
    artifact: Artifact,
    peaks: Peaks,
    p50_ms: float,
    runs: int = PROFILED_RUNS,
    feed: Arrays | None = None,
    model_file: Path | None = None,
) -> dict[str, Any]:
    """The record of `roof_of` with a time for each kind of operator, and `explanation`: sentences for a reader.

    The first sentence is the whole network's, then come its three biggest losses, each with its likely cause and the
    next step where one is known. Of a runtime that cannot profile the reason stands in their place.
    """
    from edgevit.bench import advice

    feed = {"image": artifact.sample("input")} if feed is None else feed
    operators, problem, profiled_ms = None, "", 0.0
    try:
        operators = session.runtime.profile(feed, runs)
        profiled_ms = sum(operator.time_ms for operator in operators)
        if profiled_ms > p50_ms:  # profiling costs time itself: what counts is each operator's share of the inference
            operators = tuple(replace(each, time_ms=each.time_ms * p50_ms / profiled_ms) for each in operators)
    except RuntimeFailure as error:
        problem = f"No operator was timed: {error}"
    roof = roof_of(session, artifact, peaks, p50_ms, operators, feed, model_file)
    rows = [Loss(**row) for row in roof["by_kind"]]
    sentences = [advice.summary(roof["limit_ms"], roof["bound_by"], p50_ms), *advice.told(rows, peaks, p50_ms)]
    if roof["timed"]:
        sentences += advice.between(profiled_ms, p50_ms)
    return {**roof, "explanation": [*sentences, *filter(None, [problem])]}


def roof_of(
    session: Session,
    artifact: Artifact,
    peaks: Peaks,
    p50_ms: float,
    operators: Sequence[OperatorTime] | None = None,
    feed: Arrays | None = None,
    model_file: Path | None = None,
) -> dict[str, Any]:
    """How near a loaded network comes to its limit: the record that a result keeps.

    `p50_ms` is the time of one inference on `feed`, by default the artifact's sample. `operators` is a timed profile;
    without one the runtime tells its operators untimed, so that the limit rests on what really runs, and only the
    kinds have no time. `model_file` is what runs where it is not the artifact's own. What cannot be told is None, and
    `warnings` says why.
    """
    from edgevit.bench import advice

    feed = {"image": artifact.sample("input")} if feed is None else feed
    counted = _counted(session, artifact, feed, model_file, operators)
    weights = counted.weight_bytes or 0.0
    rows = losses(counted.works, peaks, weights)
    least_ms, bound_by = limit_ms(counted.works, peaks, weights)
    speed = peaks.bandwidth_at(weights)
    streamed_ms = 1000 * weights / speed if speed else 0.0
    if counted.total_only and streamed_ms > (least_ms or 0.0):  # what each product moves is not known, only their sum
        least_ms, bound_by = streamed_ms, "memory"
    share = least_ms / p50_ms if least_ms is not None and p50_ms > 0 else None
    macs, peak = sum(work.macs for work in counted.works), peaks.flops_per_s.get(session.runtime.asked_precision)
    return {
        "limit_ms": least_ms,
        "share": share,
        "bound_by": bound_by,
        "macs": macs,
        "moved_bytes": counted.moved_bytes,
        "working_set_bytes": counted.weight_bytes,
        "intensity_flops_per_byte": 2 * macs / counted.moved_bytes if counted.moved_bytes else None,
        "ridge_flops_per_byte": peak / speed if peak and speed else None,
        "counted": counted.source,
        "timed": _is_timed(operators),
        "by_kind": [asdict(row) for row in rows],
        "leaves_out": LEAVES_OUT,
        "warnings": [*counted.notes, *advice.warnings(share, rows, peaks)],
        "peaks": peaks.record(),
    }


@dataclass(frozen=True)
class _Counted:
    """A network's operators, with what they move where a graph tells; with `total_only` only the sum is known."""

    works: list[Work]
    weight_bytes: float | None
    moved_bytes: float | None
    total_only: bool
    source: Literal["executed operators", "graph", "manifest"]
    notes: list[str]


def _counted(
    session: Session, artifact: Artifact, feed: Arrays, model_file: Path | None, timed: Sequence[OperatorTime] | None
) -> _Counted:
    """What a network computes and moves: by its executed operators, else its graph, else as its manifest has it."""
    own = model_file in (None, artifact.model_file)
    batch, notes = len(next(iter(feed.values()))), list[str]()
    costs = _costs(
        [artifact.model_file, artifact.checked_file] if own or not model_file else [model_file], batch, notes
    )
    found = works(_operators(session, feed, timed, costs, notes), costs, _is_timed(timed))
    asked, some = session.runtime.asked_precision, any(work.macs for work in found)
    bits = VALUE_BITS.get(asked, max(VALUE_BITS.values()))
    if costs is not None:
        stored = {read.name: read.size_bytes(bits) for cost in costs.values() for read in cost.reads if read.stored}
        moved = sum((work.weight_bytes or 0.0) + (work.activation_bytes or 0.0) for work in found) if some else None
        total = sum(cost.macs for cost in costs.values())
        rest = max(0, total - sum(work.macs for work in found))
        if rest:
            found.append(Work(UNFOUND if some else EVERYTHING, asked, rest, None, None))
        lacking = rest > (1 - COVERED) * total
        if lacking and some:
            notes.append(f"{rest / total:.1%} of the products were not found among the executed operators")
        return _Counted(found, sum(stored.values()), moved, lacking, "executed operators" if some else "graph", notes)
    totals = artifact.manifest["complexity"] if own else None
    macs, weights, activations = (_whole(totals, key) for key in ("macs", "weight_bytes", "activation_bytes"))
    batch = batch if artifact.manifest["batch"] == "dynamic" else 1  # the manifest counts a dynamic one as 1
    weight_bytes = None if weights is None else min(weights * bits / 32, _size_of(artifact.model_file))
    moved_bytes = (
        None if weight_bytes is None or activations is None else weight_bytes + batch * activations * bits / 32
    )
    if some:
        return _Counted(found, weight_bytes, moved_bytes, True, "executed operators", notes)
    whole = [] if macs is None else [Work(EVERYTHING, asked, batch * macs, None, None)]
    return _Counted(whole, weight_bytes, moved_bytes, True, "manifest", notes)


def _is_timed(operators: Sequence[OperatorTime] | None) -> bool:
    return operators is not None and any(operator.time_ms > 0 for operator in operators)


def _operators(
    session: Session,
    feed: Arrays,
    timed: Sequence[OperatorTime] | None,
    costs: Mapping[str, NodeCost] | None,
    notes: list[str],
) -> Sequence[OperatorTime]:
    """The operators that were timed, else untimed ones, with their multiply-accumulates; none where none is told."""
    try:
        operators = session.runtime.profile(feed, 0) if timed is None else timed
    except RuntimeFailure as error:
        notes.append(f"the limit does not rest on executed operators: {error}")
        return ()
    if costs is not None and any(operator.macs is None for operator in operators):
        return with_macs(operators, {name: cost.macs for name, cost in costs.items()})
    return operators


def _costs(files: Sequence[Path], batch: int, notes: list[str]) -> dict[str, NodeCost] | None:
    """What the nodes of the first ONNX file cost; None without one, or where its shapes are not known."""
    from edgevit.bench.complexity import costs_by_node

    graph = next((file for file in files if file.suffix == ".onnx"), None)
    if graph is None:
        notes.append(f"{files[0].name} is no ONNX graph: what each operator moves is not known, only all of them")
        return None
    try:
        return costs_by_node(graph, batch)
    except (ArtifactError, ExportError) as error:
        notes.append(f"what each operator moves is not known: {error}")
        return None


def _whole(totals: Any, key: str) -> int | None:
    """A count of a manifest, None where there is none that a network could have."""
    value = totals.get(key) if isinstance(totals, Mapping) else None
    return value if isinstance(value, int) and 0 <= value < MAX_COUNT else None


def _size_of(model_file: Path) -> int:
    """Bytes of a model file, of all in it where it is a directory, and of the weights beside an OpenVINO file."""
    files = [*model_file.rglob("*")] if model_file.is_dir() else [model_file, model_file.with_suffix(".bin")]
    return sum(file.stat().st_size for file in files if file.is_file())
