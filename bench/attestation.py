"""In which precision a model's products really ran, by the runtime's own account of what it executed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgevit.specs import OperatorTime

TOLERANCE = 0.01  # of the products: OpenVINO leaves 0.4 % of Mobile-Former-294M in float32 when bf16 is asked for
COVERED = 0.99  # of the graph's products found in the profile; below it the rest could run in anything
NAMED = 8  # operators named in a message; more would not be read


@dataclass(frozen=True)
class Share:
    """What one precision has of a model: operators, multiply-accumulates and time; None where none were counted."""

    precision: str
    operators: int
    macs: int
    macs_share: float | None
    time_ms: float
    time_share: float | None


@dataclass(frozen=True)
class KindShare:
    """The operators of one kind and precision."""

    kind: str
    precision: str
    count: int
    macs: int
    macs_share: float | None
    time_ms: float
    time_share: float | None


@dataclass(frozen=True)
class Attestation:
    """Which share of the products ran in which precision, and whether that is what was asked for.

    `coverage` is the share of the graph's multiply-accumulates that the executed operators account for, None where the
    graph's are not known. `others` names products that ran in another precision and were not declared to, the costliest
    first, and `others_share` is what they have of all products. `as_asked` is None where too little is covered to tell.
    """

    asked: str
    coverage: float | None
    by_precision: tuple[Share, ...]
    by_kind: tuple[KindShare, ...]
    others: tuple[OperatorTime, ...]
    others_share: float
    as_asked: bool | None

    @property
    def verdict(self) -> str:
        """One sentence for a reader."""
        shares = ", ".join(f"{s.macs_share:.1%} in {s.precision}" for s in self.by_precision if s.macs_share)
        if self.as_asked is None:
            found = "none" if not self.coverage else f"{self.coverage:.1%}"
            return f"not attested: {found} of the products found among the executed operators, {COVERED:.0%} are needed"
        names = ", ".join(f"{o.name} in {o.precision}" for o in self.others[:NAMED])
        more = f" and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        beside = f"; beside: {names}{more}" if names else ""
        return f"products ran {shares}; asked for {self.asked}{beside}"

    def record(self) -> dict[str, Any]:
        """What a measurement keeps of it."""
        return {
            "asked": self.asked,
            "coverage": self.coverage,
            "by_precision": [asdict(share) for share in self.by_precision],
            "as_asked": self.as_asked,
            "verdict": self.verdict,
        }


def attest(
    operators: Sequence[OperatorTime], asked: str, total_macs: int | None, declared: Collection[str] = ()
) -> Attestation:
    """Judge a profile whose operators know their multiply-accumulates.

    `total_macs` are those of the whole graph, `declared` the names of nodes that were meant to run in float32: of int8,
    those that the recipe keeps. int8 in which nothing of the products ran is not int8, whatever was declared.
    """
    found = sum(operator.macs or 0 for operator in operators)
    whole = found if total_macs is None else total_macs
    coverage = found / whole if whole else None
    others = [o for o in operators if o.macs and o.precision != asked and not _meant(o, asked, declared)]
    others_share = sum(o.macs or 0 for o in others) / found if found else 0.0
    ran = sum(o.macs or 0 for o in operators if o.precision == asked)
    known = coverage is not None and COVERED <= coverage <= 2 - COVERED
    return Attestation(
        asked=asked,
        coverage=coverage if total_macs is not None else None,
        by_precision=tuple(_shares(operators, found)),
        by_kind=tuple(_kind_shares(operators, found)),
        others=tuple(sorted(others, key=lambda o: -(o.macs or 0))),
        others_share=others_share,
        as_asked=others_share <= TOLERANCE and (asked != "int8" or ran > 0) if known else None,
    )


def with_macs(operators: Iterable[OperatorTime], macs_by_node: Mapping[str, int]) -> tuple[OperatorTime, ...]:
    """The operators with the multiply-accumulates of the graph nodes that they come from, each node's counted once."""
    left = dict(macs_by_node)
    return tuple(replace(o, macs=sum(left.pop(name, 0) for name in o.origins)) for o in operators)


def _meant(operator: OperatorTime, asked: str, declared: Collection[str]) -> bool:
    """Whether it was declared to stay float32, or with int8 in any float type."""
    kept = operator.precision.startswith(("fp", "bf") if asked == "int8" else "fp32")
    return kept and any(origin in declared for origin in (operator.name, *operator.origins))


def _shares(operators: Sequence[OperatorTime], macs: int) -> list[Share]:
    groups = defaultdict[str, list[OperatorTime]](list)
    for operator in operators:
        groups[operator.precision].append(operator)
    shares = [Share(key, len(group), *_sums(group, operators, macs)) for key, group in groups.items()]
    return sorted(shares, key=lambda share: (-share.macs, -share.time_ms, share.precision))


def _kind_shares(operators: Sequence[OperatorTime], macs: int) -> list[KindShare]:
    groups = defaultdict[tuple[str, str], list[OperatorTime]](list)
    for operator in operators:
        groups[operator.kind, operator.precision].append(operator)
    shares = [
        KindShare(kind, precision, len(group), *_sums(group, operators, macs))
        for (kind, precision), group in groups.items()
    ]
    return sorted(shares, key=lambda share: (-share.time_ms, -share.macs, share.kind, share.precision))


def _sums(
    group: Sequence[OperatorTime], operators: Sequence[OperatorTime], macs: int
) -> tuple[int, float | None, float, float | None]:
    """A group's multiply-accumulates and their share, its time in ms and its share."""
    own, time_ms, all_ms = (
        sum(o.macs or 0 for o in group),
        sum(o.time_ms for o in group),
        sum(o.time_ms for o in operators),
    )
    return own, own / macs if macs else None, time_ms, time_ms / all_ms if all_ms else None
