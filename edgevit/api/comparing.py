"""When two measurements of different times can be compared at all, and how far one differs from the next."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.errors import UsageError

if TYPE_CHECKING:
    from edgevit.bench.store import Entry, Reference, Stored

SPREAD_RUNS = 3  # stored measurements of one artifact from which it is told how much one differs from the next


@dataclass(frozen=True)
class Way:
    """How something was measured; `work` is image size and batch."""

    precision: str
    runtime: str
    threads: int | None
    work: tuple[Any, Any]
    reference: Reference


def way_of(entry: Entry) -> Way:
    """How a stored measurement was made."""
    image = entry.checks.get("image")
    size = image.get("size") if isinstance(image, dict) else None
    return Way(entry.precision, entry.runtime, entry.threads, (size, entry.checks.get("batch")), entry.reference)


def require_comparable(then: Way, now: Way, place: Path) -> None:
    """Raises UsageError where a stored result was taken in another way."""
    names = {"precision": "precision", "runtime": "runtime", "threads": "threads", "work": "image size and batch",
             "reference": "reference workload"}  # fmt: skip
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


def spread_of(stored: Stored) -> float | None:
    """How far measurements of the newest artifact lie apart, as a standard deviation of logarithms; None of too few."""
    same = [each for each in stored.history if each.artifact_sha256 == stored.latest.artifact_sha256]
    if len(same) < SPREAD_RUNS:
        return None
    return statistics.stdev(statistics.median(each.log_ratios) for each in same)
