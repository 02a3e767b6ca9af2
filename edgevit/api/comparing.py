"""When two measurements of different times can be compared at all, and how far one differs from the next."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.errors import OutputError, UsageError
from edgevit.manifest import os_reason

if TYPE_CHECKING:
    from edgevit.bench.gate import Decision, Estimate
    from edgevit.bench.store import Entry, Reference, Stored

SPREAD_RUNS, RECENT_RUNS = 3, 10  # stored measurements from which, and of which, it is told how they differ
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's, of 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class Way:
    """How something was measured; `work` is image size and batch."""

    precision: str
    runtime: str
    threads: int | None
    work: tuple[Any, Any]
    options: Mapping[str, str]
    reference: Reference


def way_of(entry: Entry) -> Way:
    """How a stored measurement was made."""
    image = entry.checks.get("image")
    size = image.get("size") if isinstance(image, dict) else None
    work = (size, entry.checks.get("batch"))
    return Way(entry.precision, entry.runtime, entry.threads, work, entry.options, entry.reference)


def require_comparable(then: Way, now: Way, place: Path) -> None:
    """Raises UsageError where a stored result was taken in another way."""
    names = {
        "precision": "precision", "runtime": "runtime", "threads": "threads", "work": "image size and batch",
        "options": "runtime options", "reference": "reference workload",
    }  # fmt: skip
    for key, name in names.items():
        was, is_now = getattr(then, key), getattr(now, key)
        if was != is_now:
            shown = [getattr(each, "version", each) for each in (was, is_now)]
            raise UsageError(
                f"{place}: measured with {name} {shown[0]}, this gate has {shown[1]}: the two are not comparable; "
                "gate in the same way, or begin another store"
            )


def require_machine(stored: Stored, machine: Mapping[str, Any], place: Path, across: bool) -> None:
    """Raises UsageError where a result is of another machine, and that was not asked for."""
    if stored.machine["id"] != machine["id"] and not across:
        raise UsageError(
            f"{place}: measured on machine {stored.machine['id']} ({stored.machine.get('cpu_model', 'unknown')}), the "
            f"other is {machine['id']}: what one gains the other may lose; measure a baseline here, or compare all the "
            "same with --across-machines"
        )


def require_place(store: Path) -> None:
    """A store that can be written, or OutputError: better now than when everything has been measured."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{store}: {os_reason(error)}; give a store that can be written") from None


def spread_of(stored: Stored) -> float | None:
    """How far two runs may differ though nothing changed: half of a 95 % interval, a logarithm; None of too few.

    It is told from the newest RECENT_RUNS entries. What really changed between them makes it wider, not narrower.
    """
    recent = stored.history[-RECENT_RUNS:]
    if len(recent) < SPREAD_RUNS:
        return None
    deviation = statistics.stdev(statistics.median(each.log_ratios) for each in recent)
    return T95[len(recent) - 2] * math.sqrt(2) * deviation


def estimate_against(stored: Stored) -> Estimate:
    """How much longer than the newest stored measurement other rounds took, and the ends of the interval."""
    from edgevit.bench.gate import shift_interval

    more = spread_of(stored) or 0.0

    def estimate(logs: Sequence[float], risk: float) -> tuple[float, float, float]:
        middle, low, high = shift_interval(stored.latest.log_ratios, logs, risk)
        return middle, middle - math.hypot(middle - low, more), middle + math.hypot(high - middle, more)

    return estimate


def doubtful(decision: Decision, stored: Stored) -> tuple[Decision, list[str]]:
    """A decision by too few stored measurements: a regression is inconclusive then, and a warning says why."""
    if len(stored.history) >= SPREAD_RUNS:
        return decision, []
    warning = (
        f"{len(stored.history)} stored measurement(s): how much one differs from the next is not known before "
        f"there are {SPREAD_RUNS}, so that none is a regression yet; add some with --update-baseline"
    )
    unsure = decision.verdict == "regression"
    return (dataclasses.replace(decision, verdict="inconclusive") if unsure else decision), [warning]


def now_ms(decision: Decision) -> float | None:
    """What a baseline of an earlier time would take now."""
    return decision.candidate_ms / (1 + decision.interval.worse) if decision.interval else None


def later_ms(baseline_ms: float, decision: Decision) -> float | None:
    """What a candidate of an earlier time would take now."""
    return baseline_ms * (1 + decision.interval.worse) if decision.interval else None


def too_few(decision: Decision) -> str:
    """What an interval would need."""
    from edgevit.bench.gate import LEAST_ROUNDS

    count = len(decision.rounds)
    needed_s = math.ceil(LEAST_ROUNDS * decision.spent_s / count)
    return f"an interval needs {LEAST_ROUNDS} rounds, about {needed_s} s here, and the budget had room for {count}"
