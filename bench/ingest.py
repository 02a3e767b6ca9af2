"""What a device without Python measured, as a result like any other: trtexec's files of one run become one record.

Samples, where the times were exported, give the percentiles by the same rules as our own races; the text's percentiles
stand beside them. With the text alone, its percentiles are all there is, and the record says so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgevit.engine_layers import BITS, EngineLayer
from edgevit.errors import InputError, RuntimeFailure
from edgevit.specs import LatencyResult, OperatorTime

from . import cautions
from .stats import format_ms, format_percentile, latency_percentiles, median, supported
from .trtexec_json import Layers, Profile, Times, read_json
from .trtexec_log import Log, is_log, percentiles_of, read_log

MAX_BYTES = 64 << 20  # of a file: a day of queries of 4 ms is 5 GB, but ten seconds of them are one MB
PARTS = 20  # of a run that are compared with each other for drift: trtexec has no rounds
MAX_FILES = 64  # in a directory: build.sh leaves ten
SUFFIXES = (".json", ".log", ".txt")  # what is looked into in a directory: an engine is a large file of no use here
PERCENTILES = (50, 90, 99)  # those of our own races
SAME = 0.02  # relative difference of the medians of one run in two files: six digits are printed, and float32 is summed
MINOR = 0.05  # of the time in products: TensorRT 8 may choose a float32 kernel for a small layer by itself
MOVED = 0.01  # of the computing time; two events with nothing between them are microseconds apart
COMPARABLE = {"--useCudaGraph": "cuda_graph", "--useSpinWait": "spin_wait", "--noDataTransfers": "no_data_transfers"}
UNDONE = {"--noCudaGraph": "cuda_graph", "--noSpinWait": "spin_wait", "--includeDataTransfers": "no_data_transfers"}


@dataclass
class Run:
    """The files of one run, each with the name it is called by in messages."""

    place: str
    times: Times | None = None
    profile: Profile | None = None
    layers: Layers | None = None
    log: Log | None = None
    build_log: Log | None = None
    record: dict[str, Any] | None = None
    build_record: dict[str, Any] | None = None

    def add(self, kind: str, found: Any, place: str) -> None:
        """Take a part; raises InputError where the run has it already."""
        if getattr(self, kind) is not None:
            what = kind.replace("_", " ")
            raise InputError(f"{place}: a second {what} of the same run; give the files of one run, or directories")
        setattr(self, kind, found)


def read_run(paths: Sequence[Path], place: str, *, strict: bool) -> Run:
    """Read the files of one run, each told by what it holds; where not `strict`, others are passed over.

    Raises:
        InputError: unreadable, damaged, none of trtexec's, too large, or two of one kind.
    """
    run = Run(place)
    for path in paths:
        text = _text(path)
        found: Times | Profile | Layers | Log | dict[str, Any] | None
        if text.lstrip()[:1] in ("[", "{") and not is_log(text):
            found = read_json(str(path), text)
        else:
            found = read_log(str(path), text) if is_log(text) else None
        if found is not None:
            run.add(_kind(found), found, str(path))
        elif strict:
            raise InputError(
                f"{path}: not a file of trtexec's; expected a log, or what --exportTimes, --exportProfile or "
                "--exportLayerInfo wrote"
            )
    return run


def _kind(found: Times | Profile | Layers | Log | dict[str, Any]) -> str:
    """The field of a run that a part belongs to."""
    if isinstance(found, dict):
        return "build_record" if found["step"] == "build" else "record"
    if isinstance(found, Log):
        return "log" if found.timed or found.passed is False else "build_log"
    return "times" if isinstance(found, Times) else "layers" if isinstance(found, Layers) else "profile"


def read_directory(directory: Path) -> Run:
    """Read what build.sh left in a directory.

    Raises:
        InputError: as `read_run`, or nothing of a timing is in it.
    """
    try:
        paths = sorted(p for p in directory.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror or error}") from None
    if len(paths) > MAX_FILES:
        raise InputError(f"{directory}: {len(paths)} logs and JSON files; give a directory that build.sh wrote")
    return read_run([path for path in paths if path.is_file()], str(directory), strict=False)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give files of trtexec's")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MB; time fewer queries (--duration)")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give what trtexec wrote, unchanged") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def result_of(run: Run, name: str, batch: int) -> tuple[dict[str, Any], list[str]]:
    """One record of a bench document's `results`, and what its reader must be warned of.

    Raises:
        InputError: no times in it, or times of another run. RuntimeFailure: trtexec failed.
    """
    _require_success(run)
    log, times = run.log or Log(), run.times
    statistics = log.statistics.get("latency_ms", {})
    if times is None and "median" not in statistics:
        raise InputError(f"{run.place}: no times; expected a log with a performance summary, or an --exportTimes file")
    warnings = [f"{name}: trtexec: {text}" for text in log.warnings]
    samples = times.latency_ms if times is not None else ()
    latency = latency_percentiles(samples, PERCENTILES) if times is not None else _printed(log)
    if times is not None and statistics:
        _require_same(run.place, median(samples), statistics.get("median"))
    if times is None:
        warnings.append(f"{name}: only the log is given: percentiles are trtexec's own, and there are no samples")
    result = LatencyResult(
        name=name,
        samples_ms=samples,
        rounds=(0,) * len(samples),
        latency_ms=latency,
        warmup_runs=log.warmup_queries or 0,
        discarded_runs=0,
        effective_precision=precision_of(run),
    )
    conditions, flags = _conditions(run), _flags(run)
    record = {
        **asdict(result),
        "latency_text": {q: format_percentile(value, float(q[1:])) for q, value in latency.items()},
        "runtime": "trtexec",
        "version": _version(run),
        "device": _device(run),
        "flags": None if flags is None else list(flags),
        "conditions": conditions,
        "batch": batch,
        "throughput": _throughput(run, batch),
        "printed_ms": log.statistics,
        **_operators(run),
    }
    parts = tuple(i * PARTS // len(samples) for i in range(len(samples)))
    drift = cautions.drift(replace(result, rounds=parts)) if samples else ()
    return record, [*warnings, *drift, *_warnings(run, name, conditions)]


def _require_success(run: Run) -> None:
    for log in filter(None, (run.log, run.build_log)):
        if log.passed is False:
            why = "; ".join(log.errors[-2:]) or "no error is printed"
            raise RuntimeFailure(f"{run.place}: trtexec failed: {why}; there is nothing to read")


def _require_same(place: str, sampled: float, printed: float | None) -> None:
    if printed is not None and abs(sampled - printed) > SAME * max(sampled, printed):
        raise InputError(
            f"{place}: the times have a median of {format_ms(sampled)} ms, the log of {format_ms(printed)} ms: "
            "they are of different runs; give the files of one"
        )


def _printed(log: Log) -> dict[str, float | None]:
    """The log's percentiles where its queries support them; a log that does not tell how many is believed."""
    found = percentiles_of(log.statistics["latency_ms"])
    enough = {q: log.queries is None or supported(q, log.queries) for q in PERCENTILES}
    return {f"p{q}": found.get(f"p{q}") if enough[q] else None for q in PERCENTILES}


def _version(run: Run) -> str | None:
    logs = (log.version for log in (run.log, run.build_log) if log is not None)
    records = (record.get("tensorrt") for record in (run.record, run.build_record) if record is not None)
    return next(filter(None, (*logs, *records)), None)


def _device(run: Run) -> dict[str, str]:
    """What is known of the device: its name and compute capability from the log, the rest from build.sh's record."""
    log, record = run.log or run.build_log or Log(), run.record or run.build_record or {}
    known = {"name": log.device, "compute_capability": log.compute_capability}
    known |= {key: record.get(key) for key in ("board", "gpu", "l4t", "power_mode", "system", "time_utc")}
    return {key: value for key, value in known.items() if value}


def _flags(run: Run) -> Sequence[str] | None:
    if run.record is not None:
        flags: list[str] = run.record["flags"]
        return flags
    return None if run.log is None else run.log.flags


def _conditions(run: Run) -> dict[str, bool | None]:
    """Which of the settings that times depend on were on; None where neither flags nor version tell.

    From version 11 they are the default and are undone, before it they are asked for.
    """
    flags, version = _flags(run), (_version(run) or "").partition(".")[0]
    if flags is None or not version.isdigit():
        known: dict[str, bool | None] = dict.fromkeys(COMPARABLE.values())
    elif int(version) >= 11:
        known = {name: flag not in flags for flag, name in UNDONE.items()}
    else:
        known = {name: flag in flags for flag, name in COMPARABLE.items()}
    if known["no_data_transfers"] is None and run.times is not None:
        known["no_data_transfers"] = median(run.times.transfer_ms) <= MOVED * median(run.times.compute_ms)
    if run.log is not None and run.log.graph_ignored:
        known["cuda_graph"] = False
    return known


def _throughput(run: Run, batch: int) -> dict[str, float | None]:
    """Queries and pictures per second: as printed, else from the first start to the last end."""
    queries_per_s = None if run.log is None else run.log.queries_per_s
    if queries_per_s is None and run.times is not None and run.times.span_ms:
        queries_per_s = 1000 * len(run.times.latency_ms) / run.times.span_ms
    return {
        "queries_per_s": queries_per_s,
        "pictures_per_s": None if queries_per_s is None else batch * queries_per_s,
    }


def _timed(run: Run) -> list[tuple[EngineLayer, float]]:
    """Each layer with its time per query in ms, the sum where the profile names it twice; empty without a profile."""
    layers = run.layers.layers if run.layers is not None else ()
    times: dict[str, float] = {}
    for name, time_ms in run.profile or ():
        times[name] = times.get(name, 0.0) + time_ms
    timed = [(layer, times.pop(layer.name, 0.0)) for layer in layers]
    return timed if any(time_ms for _, time_ms in timed) else []


def _counted(run: Run) -> list[tuple[EngineLayer, float]]:
    """Each layer with weight 1."""
    return [(layer, 1.0) for layer in (run.layers.layers if run.layers is not None else ())]


def _operators(run: Run) -> dict[str, Any]:
    """The profile's operators with what the layer information knows of each, and shares by precision."""
    by_name = {layer.name: layer for layer in (run.layers.layers if run.layers is not None else ())}
    operators = []
    for name, time_ms in run.profile or ():
        layer = by_name.get(name, EngineLayer(name))
        operators.append(OperatorTime(name, layer.kind, layer.precision or "unknown", time_ms, layer.origins))
    timed, counted = _timed(run), _counted(run)
    return {
        "operators": [asdict(operator) for operator in operators],
        "precision_share": {
            "layers": _shares(counted),
            "time": _shares(timed),
            "products": _shares([(layer, weight) for layer, weight in timed or counted if layer.product]),
        },
        "fused_attention": sum(layer.attention for layer in by_name.values()) if by_name else None,
    }


def _shares(weighted: Sequence[tuple[EngineLayer, float]]) -> dict[str, float]:
    """The share of each precision, the largest first."""
    sums: dict[str, float] = {}
    for layer, weight in weighted:
        key = layer.precision or "unknown"
        sums[key] = sums.get(key, 0.0) + weight
    total = sum(sums.values())
    return {key: part / total for key, part in sorted(sums.items(), key=lambda item: -item[1]) if total > 0}


def precision_of(run: Run, islands: Collection[str] = ()) -> str | None:
    """The precision that the products of a run were computed in, or "fp16+fp32" where none has nearly all of the time.

    `islands` are graph nodes that were kept in float32 on purpose. None where the layers do not tell, opaque ones too.
    """
    products = [
        (layer, weight)
        for layer, weight in _timed(run) or _counted(run)
        if layer.product and not (layer.origins and set(layer.origins) <= set(islands))
    ]
    major = [precision for precision, share in _shares(products).items() if share >= MINOR]
    return None if "unknown" in major else "+".join(sorted(major, key=BITS.__getitem__)) or None


def _warnings(run: Run, name: str, conditions: dict[str, bool | None]) -> list[str]:
    warnings = []
    if precision_of(run) is None:
        if run.layers is None:
            why = "no layer information is given (--exportLayerInfo)"
        elif not run.layers.detailed:
            why = "the layer information holds names only, the engine was built without --profilingVerbosity=detailed"
        else:
            why = "the layer information tells no types of its products"
        warnings.append(f"{name}: the precision that really ran is unknown: {why}; build.sh keeps what is needed")
    off = [key.replace("_", " ") for key, value in conditions.items() if value is False]
    if off:
        warnings.append(f"{name}: timed without {', '.join(off)}: compare it only with times taken the same way")
    if run.log is not None and run.log.passed is None:
        warnings.append(f"{name}: the log ends without PASSED: it is cut off, or the run was; time it again")
    if run.profile and run.layers is not None and run.layers.detailed:
        known = {layer.name for layer in run.layers.layers}
        strange = sum(layer not in known for layer, _ in run.profile)
        if strange > len(run.profile) / 2:
            warnings.append(
                f"{name}: {strange} of {len(run.profile)} profiled layers are not in the layer information: the two "
                "are probably of different engines; export both in one run"
            )
    return warnings
