"""What a result says beside its times: what was run, in which precision, how large it is and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgevit.errors import EdgevitError
from edgevit.runtimes import Session

from .explaining import PRECISIONS, explain, measure_peaks, roof_obstacle, roof_of
from .peering import Entry, external_files
from .profiling import attest
from .running import RunOn

if TYPE_CHECKING:
    from edgevit.bench.roofline import Peaks

COUNTS = ("macs", "flops", "parameters", "weight_bytes", "activation_bytes")  # of a manifest's complexity
MOST = 1 << 60  # operations or bytes: beyond any network
PEAKS: dict[tuple[Any, ...], Peaks] = {}  # of this process: a peak is a maximum, so that one measurement serves all


def facts_of(entry: Entry, session: Session, feed: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What a result says beside its times."""
    manifest, own = entry.artifact.manifest, entry.kind == "own"
    foreign = entry.kind == "foreign"
    described = session.runtime.describe()
    return {
        "kind": entry.kind,
        "model": None if foreign else manifest["model"],
        "target": None if foreign else manifest["target"],
        "precision": manifest["precision"] if own else None,
        "effective_precision": session.runtime.effective_precision,
        "attestation": _attested(entry, session, feed),
        "runtime": described,
        "threads": session_threads(session, described),
        "batch": entry.batch,
        "image_size": list(entry.sample().shape[2:]),
        "size_bytes": sum(file.stat().st_size for file in model_files(entry.path)),
        "complexity": _complexity(entry, session),
    }


def session_threads(session: Session, described: Mapping[str, Any]) -> int | None:
    """The threads that really run, where the runtime tells; else those asked for, None for its own choice."""
    told = described.get("threads", getattr(session.runtime, "threads", None))
    return told if isinstance(told, int) else None


def _attested(entry: Entry, session: Session, feed: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """In which precision it ran; of anyone's file no precision was asked for, so that none can be wrong."""
    if entry.kind != "foreign":
        return attest(session, entry.artifact, feed, entry.file)
    try:
        return attest(session, entry.artifact, feed, entry.file)
    except EdgevitError as error:
        return {"asked": None, "coverage": None, "by_precision": [], "as_asked": None, "verdict": str(error)}


def _complexity(entry: Entry, session: Session) -> dict[str, Any] | None:
    """What one inference costs, counted on the graph, a dynamic batch as 1; None where nothing can count it."""
    from edgevit.bench.complexity import count_onnx

    if entry.kind == "own":
        counted = entry.artifact.manifest.get("complexity")
    elif entry.path.suffix == ".onnx":
        try:
            counted = dataclasses.asdict(count_onnx(entry.path))
        except EdgevitError:
            return None  # a shape that is not fixed: told by nobody rather than wrongly
    else:
        return None
    shape = session.runtime.inputs[0].shape
    return _per_inference(counted, entry.batch if shape and isinstance(shape[0], str) else 1)


def _per_inference(counted: Any, times: int) -> dict[str, Any] | None:
    """A count for `times` pictures instead of one; None where a manifest, which may be anyone's, has no such.

    `arithmetic_intensity` is operations per byte of weights and activations, each read or written once.
    """
    if not isinstance(counted, dict) or any(not _is_count(counted.get(key)) for key in COUNTS):
        return None
    kinds = {
        key: kind for key in ("macs_by_op", "not_counted", "unknown") if isinstance(kind := counted.get(key), dict)
    }
    if len(kinds) < 3 or not all(_is_count(count) for kind in kinds.values() for count in kind.values()):
        return None
    once = ("parameters", "weight_bytes")
    scaled = {key: counted[key] * (1 if key in once else times) for key in COUNTS}
    moved = scaled["activation_bytes"] + scaled["weight_bytes"]
    by_kind = {
        name: {kind: times * count for kind, count in kinds[name].items()} for name in ("macs_by_op", "not_counted")
    }
    return {
        **scaled,
        "arithmetic_intensity": scaled["flops"] / moved if moved else None,
        **by_kind,
        "unknown": kinds["unknown"],
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def model_files(path: Path) -> list[Path]:
    """The files that a runtime loads for a model file: a package's all, the weights beside an IR or an ONNX graph."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    if path.suffix == ".onnx":
        beside = [path.parent / name for name in external_files(path)]
    return [path, *(file for file in beside if file.is_file())]


def roof(entry: Entry, on: RunOn, p50_ms: float, *, explained: bool) -> dict[str, Any]:
    """What share of this machine's limit a result reached; with `explained` each kind of operator is timed for it.

    Where the machine's limits cannot be measured the share is None, and `warnings` says why. A share above 1 means that
    the peaks were measured while something else ran: they are measured once more, and the higher ones count.
    """
    try:
        with entry.session(on) as session:
            if obstacle := roof_obstacle(session.runtime.name):
                return _no_roof(obstacle)
            feed = entry.feed(session)
            session.run(feed)  # checked once here; what profiles it goes to the runtime itself
            told = explain if explained else roof_of
            peaks = _peaks(entry, session, on, explained=explained)
            found = told(session, entry.artifact, peaks, p50_ms, feed=feed, model_file=entry.file)
            if (found["share"] or 0) > 1:
                peaks = _peaks(entry, session, on, explained=explained, again=True)
                found = told(session, entry.artifact, peaks, p50_ms, feed=feed, model_file=entry.file)
    except EdgevitError as error:
        return _no_roof(str(error))
    return found


def _no_roof(why: str) -> dict[str, Any]:
    return {"limit_ms": None, "share": None, "bound_by": None, "warnings": [f"no limit is known: {why}"]}


def _peaks(entry: Entry, session: Session, on: RunOn, *, explained: bool, again: bool = False) -> Peaks:
    """The peaks of a runtime with these threads, options and size of weights; measured where not known, or `again`.

    Where losses are explained every precision is measured: what another one would bring is part of the explanation.
    """
    weights = sum(file.stat().st_size for file in model_files(entry.path))
    working_set = 1 << max(0, weights - 1).bit_length()  # the next power of two: networks of a size share a measurement
    options = sorted((name, str(value)) for name, value in on.options.items())
    key = (session.runtime.name, on.threads, working_set, *options)
    known = PEAKS.get(key)
    wanted = [name for name in PRECISIONS if explained or name in ("fp32", session.runtime.asked_precision)]
    missing = [name for name in wanted if known is None or name not in {*known.flops_per_s, *known.absent}]
    if known is None or missing or again:
        found = measure_peaks(
            session.runtime.name,
            on.threads,
            wanted if again else missing,
            working_set_bytes=working_set,
            runtime_options=on.options,
        )
        PEAKS[key] = found if known is None else known.merged(found)
    return PEAKS[key]
