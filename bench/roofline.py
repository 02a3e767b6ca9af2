"""How far a network is from what this machine can do: limits from measured peaks, and what is lost against them.

Pure arithmetic, after Williams, Waterman and Patterson, "Roofline", 2009 (https://doi.org/10.1145/1498765.1498785).
The graphs that find the peaks are in `probes`, the sentences about what is lost in `advice`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edgevit.specs import OperatorTime

if TYPE_CHECKING:
    from .complexity import NodeCost

VALUE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}  # of the values that a kernel of this precision moves
Bound = Literal["compute", "memory"]
LEAVES_OUT = (
    "the limit is the sum, over the matrix products, of the longer of their arithmetic at the measured peak and of "
    "moving their operands at the measured bandwidth; it leaves out every other operator, the calls between them, and "
    "whatever caches smaller than the smallest measured working set would save"
)


@dataclass(frozen=True)
class Peaks:
    """What a runtime reached on this machine with so many threads; None: its own choice of them.

    `flops_per_s` is by precision, a multiplication and an addition counted as two; `absent` says why one has no peak.
    `bandwidth` has (bytes of the working set, bytes per second) by size. `unsteady` is the median repetition over the
    best one, of the worst measurement: near 1 on a quiet machine.
    """

    runtime: str
    threads: int | None
    flops_per_s: Mapping[str, float]
    bandwidth: tuple[tuple[int, float], ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    unsteady: float = 1.0

    def bandwidth_at(self, size_bytes: float) -> float | None:
        """Bytes per second of a working set; that of the next smaller one measured, as a bound must not be too slow.

        What a larger set reached, a smaller one does too.
        """
        below = [size for size, _ in self.bandwidth if size <= size_bytes]
        least = max(below, default=0)
        return max((speed for size, speed in self.bandwidth if size >= least), default=None)

    def merged(self, other: Peaks) -> Peaks:
        """The higher of two measurements of the same runtime and threads: a peak is a maximum.

        Raises:
            ValueError: they are not of the same.
        """
        if (self.runtime, self.threads) != (other.runtime, other.threads):
            raise ValueError(f"peaks of {self.runtime}, {self.threads} threads; of {other.runtime}, {other.threads}")
        flops, speeds = dict(self.flops_per_s), dict(self.bandwidth)
        for precision, value in other.flops_per_s.items():
            flops[precision] = max(value, flops.get(precision, 0.0))
        for size, speed in other.bandwidth:
            speeds[size] = max(speed, speeds.get(size, 0.0))
        absent = {name: why for name, why in {**self.absent, **other.absent}.items() if name not in flops}
        return Peaks(
            self.runtime, self.threads, flops, tuple(sorted(speeds.items())), absent, min(self.unsteady, other.unsteady)
        )

    def record(self) -> dict[str, Any]:
        """What a measurement keeps of it."""
        sets = [{"working_set_bytes": size, "bytes_per_s": speed} for size, speed in self.bandwidth]
        return {
            "runtime": self.runtime,
            "threads": self.threads,
            "flops_per_s": dict(self.flops_per_s),
            "bandwidth": sets,
            "absent": dict(self.absent),
            "unsteady": self.unsteady,
        }


@dataclass(frozen=True)
class Work:
    """One executed operator: its multiply-accumulates and what it must move, None where no graph tells.

    Weights are read once for each inference, from among all weights; activations were written just before. `time_ms` is
    None where nothing was timed.
    """

    kind: str
    precision: str
    macs: int
    weight_bytes: float | None
    activation_bytes: float | None
    time_ms: float | None = None


@dataclass(frozen=True)
class Limit:
    """The least time for some work, by its arithmetic and by what it moves; None where there is no peak to tell by."""

    compute_ms: float | None
    memory_ms: float | None

    @property
    def ms(self) -> float | None:
        """The longer of the two: arithmetic and moving may overlap."""
        return max((known for known in (self.compute_ms, self.memory_ms) if known is not None), default=None)

    @property
    def bound_by(self) -> Bound | None:
        """The longer of the two, "compute" or "memory"; None where that is not known."""
        if self.compute_ms is None or self.memory_ms is None or self.ms == 0:
            return None
        return "compute" if self.compute_ms >= self.memory_ms else "memory"


def works(operators: Iterable[OperatorTime], costs: Mapping[str, NodeCost] | None, timed: bool) -> list[Work]:
    """What each executed operator computes and has to move, from the graph nodes that it stands for.

    What only nodes of the same operator read is not moved. `costs` is None where the nodes are not known.
    """
    readers = Counter(read.name for cost in (costs or {}).values() for read in cost.reads)
    return [_work(operator, costs, readers, timed) for operator in operators]


def _work(operator: OperatorTime, costs: Mapping[str, NodeCost] | None, readers: Counter[str], timed: bool) -> Work:
    time_ms = operator.time_ms if timed else None
    if costs is None:
        return Work(operator.kind, operator.precision, operator.macs or 0, None, None, time_ms)
    nodes = [costs[name] for name in dict.fromkeys(operator.origins) if name in costs]
    if operator.origins and not nodes:  # it stands for something that has another name in the file
        return Work(operator.kind, operator.precision, operator.macs or 0, None, None, time_ms)
    reads = {read.name: read for node in nodes for read in node.reads}
    own_reads = Counter(read.name for node in nodes for read in node.reads)
    writes = {write.name: write for node in nodes for write in node.writes}
    bits = VALUE_BITS.get(operator.precision, max(VALUE_BITS.values()))
    weights = sum(read.size_bytes(bits) for read in reads.values() if read.stored)
    moved = [read for name, read in reads.items() if not read.stored and name not in writes]
    moved += [write for name, write in writes.items() if not own_reads[name] or readers[name] > own_reads[name]]
    activations = sum(tensor.size_bytes(bits) for tensor in moved)
    return Work(operator.kind, operator.precision, operator.macs or 0, weights, activations, time_ms)


def limit_of(work: Work, peaks: Peaks, working_set_bytes: float) -> Limit:
    """The least time that some work can take.

    Weights stream at the bandwidth of the network's working set, activations at that of their own size: they may be in
    a cache still.
    """
    peak = peaks.flops_per_s.get(work.precision) if work.macs else math.inf
    compute_ms = None if peak is None else 2000 * work.macs / peak
    slow, fast = peaks.bandwidth_at(working_set_bytes), peaks.bandwidth_at(work.activation_bytes or 0)
    if work.weight_bytes is None or work.activation_bytes is None or slow is None or fast is None:
        return Limit(compute_ms or None, None)
    return Limit(compute_ms, 1000 * (work.weight_bytes / slow + work.activation_bytes / fast))


def limit_ms(found: Iterable[Work], peaks: Peaks, working_set_bytes: float) -> tuple[float | None, Bound | None]:
    """The least time for a network, the sum over its products, and whether arithmetic or moving decides most of it.

    A product whose precision has no peak counts with what it moves alone. None where no product has a limit. See
    LEAVES_OUT.
    """
    limits = [limit_of(work, peaks, working_set_bytes) for work in found if work.macs]
    known = [limit.ms for limit in limits if limit.ms is not None]
    return (sum(known) if known else None), _mostly(limits)


def _mostly(limits: Iterable[Limit]) -> Bound | None:
    """What decides most of the time of several limits, None where none of them tells."""
    by: dict[Bound, float] = {}
    for limit in limits:
        if limit.bound_by is not None:
            by[limit.bound_by] = by.get(limit.bound_by, 0.0) + (limit.ms or 0.0)
    return max(by, key=lambda bound: by[bound], default=None)


@dataclass(frozen=True)
class Loss:
    """The operators of one kind and precision: their time, the least it could be, and the difference.

    `time_ms`, `share` (limit over time) and `lost_ms` are None where nothing was timed, `limit_ms` where no peak tells.
    """

    kind: str
    precision: str
    count: int
    macs: int
    weight_bytes: float | None
    activation_bytes: float | None
    time_ms: float | None
    limit_ms: float | None
    share: float | None
    lost_ms: float | None
    bound_by: Bound | None


def losses(found: Sequence[Work], peaks: Peaks, working_set_bytes: float) -> list[Loss]:
    """What each kind of operator loses against its limit, the largest loss first."""
    groups = defaultdict[tuple[str, str], list[Work]](list)
    for work in found:
        groups[work.kind, work.precision].append(work)
    rows = [_loss(kind, precision, group, peaks, working_set_bytes) for (kind, precision), group in groups.items()]
    return sorted(rows, key=lambda row: (-(row.lost_ms or 0.0), -(row.limit_ms or 0.0), row.kind, row.precision))


def _loss(kind: str, precision: str, group: Sequence[Work], peaks: Peaks, working_set_bytes: float) -> Loss:
    limits = [limit_of(work, peaks, working_set_bytes) for work in group]
    least, time_ms = _sum(limit.ms for limit in limits), _sum(work.time_ms for work in group)
    return Loss(
        kind=kind,
        precision=precision,
        count=len(group),
        macs=sum(work.macs for work in group),
        weight_bytes=_sum(work.weight_bytes for work in group),
        activation_bytes=_sum(work.activation_bytes for work in group),
        time_ms=time_ms,
        limit_ms=least,
        share=least / time_ms if least is not None and time_ms else None,
        lost_ms=None if time_ms is None else time_ms - (least or 0.0),
        bound_by=_mostly(limits),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum, None where one of them is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None
