"""What a network loses against its limit, in sentences: what was seen, the likely cause, the next step if known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .roofline import Loss, Peaks
from .stats import format_ms

NAMED = 3  # losses; more would not be acted on
NEAR = 0.7  # of the limit: the best kernels of large networks reach 0.7 to 0.9 of square products
UNSTEADY = 1.25  # median over best of the probes' repetitions: above it even the best may have been disturbed
OVER = 1.02  # a share above it is told: two measurements of one thing differ by a few hundredths
SMALL_MS = 0.05  # of one operator: some five times what a call of it costs
APART = 0.1  # operators' times against an inference's: below it, the difference is that of two measurements
NARROWER = "Next: store the weights narrower (int8, fp16), or take more pictures an inference (--batch)"
HEAVY = 0.5  # of what operators move: with more than this in weights, it is they that stream


@dataclass(frozen=True)
class Rule:
    """Operator kinds by parts of their names in small letters, why they take time, and what to do."""

    parts: tuple[str, ...]
    cause: str
    step: str


# The first that fits; products have rules of their own. Each is told of kinds that this house's networks showed.
RULES = (
    Rule(
        ("quantizelinear", "fakequantize"),
        "values go to int8 and back between products that are in int8 and others that are not",
        "compare with the same network in float32, and widen what stays float with --option keep_float",
    ),
    Rule(
        (
            "transpose",
            "reorder",
            "permute",
            "concat",
            "split",
            "slice",
            "gather",
            "pad",
            "tile",
            "expand",
            "cast",
            "convert",
            "copy",
            "reshape",
        ),
        "they move values and compute nothing: layouts or types differ between neighbours",
        "`edgevit lint` names those that are in the file; the others the runtime added: try another with --runtime",
    ),
    Rule(
        ("softmax", "erf", "gelu", "tanh", "sigmoid", "swish", "exp"),
        "exponentials cost many instructions for each value, which a limit by moved bytes does not count",
        "",
    ),
    Rule(
        ("norm", "mvn", "reduce", "mean"),
        "a few values are made of many in several short passes",
        "",
    ),
    Rule(
        ("add", "mul", "sub", "div", "relu", "max", "min", "clip", "where", "eltwise", "subgraph", "pool"),
        "each reads and writes a whole tensor for one operation a value",
        "another runtime may fuse them with the products before them: try --runtime",
    ),
)


def told(rows: Sequence[Loss], peaks: Peaks, total_ms: float) -> list[str]:
    """The NAMED largest losses among rows that were timed, a sentence or three each; `total_ms` is one inference."""
    lost = [row for row in rows if row.time_ms is not None and row.lost_ms is not None and row.lost_ms > 0]
    used = {row.precision for row in rows if row.macs}
    return [
        _sentence(row, peaks, used, total_ms) for row in sorted(lost, key=lambda row: -(row.lost_ms or 0.0))[:NAMED]
    ]


def summary(limit_ms: float | None, bound_by: str | None, total_ms: float) -> str:
    """One sentence on the whole network: its time beside its limit."""
    if limit_ms is None or total_ms <= 0:
        return f"{format_ms(total_ms)} ms an inference; no limit is known."
    if limit_ms > OVER * total_ms:
        return (
            f"{format_ms(total_ms)} ms an inference is less than the limit of {format_ms(limit_ms)} ms, which was "
            "probably measured under load: nothing can be said of losses in arithmetic."
        )
    by = {"compute": "arithmetic", "memory": "memory"}.get(bound_by or "", "")
    most = f", most of it by {by}" if by else ""
    return (
        f"{format_ms(total_ms)} ms an inference; its products need {format_ms(limit_ms)} ms at this machine's measured "
        f"peaks{most}: {_percent(limit_ms / total_ms)} of the limit is reached."
    )


def between(operators_ms: float, total_ms: float) -> Iterator[str]:
    """Say so where the operators' times do not add up to the inference's."""
    if operators_ms > 0 and abs(total_ms / operators_ms - 1) > APART:
        where = "spent between them: calls, threads that wait"
        if operators_ms > total_ms:
            where = "added by profiling, so that their times are scaled down"
        apart = format_ms(abs(total_ms - operators_ms))
        yield f"The operators add up to {format_ms(operators_ms)} of {format_ms(total_ms)} ms: {apart} ms were {where}."


def _sentence(row: Loss, peaks: Peaks, used: Collection[str], total_ms: float) -> str:
    time_ms, lost_ms = row.time_ms or 0.0, row.lost_ms or 0.0
    operators = f"{row.count} operator{'s' if row.count != 1 else ''}"
    seen = f"{row.kind} in {row.precision}: {operators}, {format_ms(time_ms)} of {format_ms(total_ms)} ms"
    if row.limit_ms is None:
        seen += ", no limit known"
    elif row.limit_ms == 0:
        seen += ", none of it needed for what the network computes"
    else:
        bound = {"compute": " by arithmetic", "memory": " by memory", None: ""}[row.bound_by]
        seen += f" against a limit of {format_ms(row.limit_ms)} ms{bound} ({_percent(row.share or 0.0)})"
    cause, step = _why(row, peaks, used)
    return ". ".join(filter(None, (f"{seen}: {format_ms(lost_ms)} ms lost", cause, step))) + "."


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def _why(row: Loss, peaks: Peaks, used: Collection[str]) -> tuple[str, str]:
    """Likely cause and next step, "" where none is known."""
    if row.macs:
        return _why_product(row, _lower_precision(row, peaks, used))
    name = row.kind.lower()
    rule = next((rule for rule in RULES if any(part in name for part in rule.parts)), None)
    return (f"Likely {rule.cause}", f"Next: {rule.step}" if rule.step else "") if rule else ("", "")


def _why_product(row: Loss, lower: str) -> tuple[str, str]:
    if row.share is not None and row.share >= NEAR:
        return "Little is left to gain in this precision", NARROWER if row.bound_by == "memory" else lower
    if row.time_ms is not None and row.time_ms / row.count < SMALL_MS:
        cause = f"Likely they are too small to reach a limit: {row.macs / row.count:,.0f} multiply-accumulates each"
        return cause, "Next: where latency allows, take more pictures an inference (--batch), which makes them larger"
    if row.bound_by is None or row.weight_bytes is None:
        return "Not all that they move is known, so their limit may be higher", lower
    weights, activations = row.weight_bytes, row.activation_bytes or 0.0
    if row.bound_by == "memory" and weights > HEAVY * (weights + activations):
        return f"Likely {weights / 1e6:.1f} MB of weights stream past for a few rows each", NARROWER
    if row.bound_by == "memory":
        return "Likely few operations for each value moved, as in depthwise convolutions", ""
    return (
        "Likely few channels, rows or groups leave vector units idle",
        lower or "Next: try another runtime with --runtime",
    )


def _lower_precision(row: Loss, peaks: Peaks, used: Collection[str]) -> str:
    """The step to the precision of the highest peak; "" where this one has it, or none is known."""
    own = peaks.flops_per_s.get(row.precision)
    best = max(peaks.flops_per_s, key=lambda name: peaks.flops_per_s[name], default=row.precision)
    if own is None or best == row.precision:
        return ""
    if best in used:
        return f"Next: the manifest says why they are not in {best} as others are (kept_float)"
    return f"Next: {best} has {peaks.flops_per_s[best] / own:.1f} times this peak here: export with --precision {best}"


def warnings(share: float | None, rows: Sequence[Loss], peaks: Peaks) -> Iterator[str]:
    """What a reader of shares must know: limits that were passed, limits that are missing, an unsteady machine."""
    shaky = peaks.unsteady > UNSTEADY
    under = f"; its probes varied {peaks.unsteady:.2f}-fold" if shaky else ""
    if share is not None and share > OVER:
        yield (
            f"{share:.0%} of the limit: faster than can be. The limit was probably measured under load{under}. "
            "Measure again on a quiet machine; this share says nothing."
        )
    elif shaky:
        yield (
            f"the limit's probes varied {peaks.unsteady:.2f}-fold: other programs were probably running, and true "
            "peaks may be higher, so shares are upper bounds. Close the programs and repeat."
        )
    over = [f"{row.kind} in {row.precision} ({row.share:.0%})" for row in rows if row.share and row.share > OVER]
    if over:
        yield (
            f"faster than their limit: {', '.join(over)}. Their values probably stayed in smaller caches than were "
            f"measured, or the limit was measured under load{under}."
        )
    missing = sorted({row.precision for row in rows if row.macs and row.precision not in peaks.flops_per_s})
    for precision in missing:
        why = peaks.absent.get(precision, "it was not asked for")
        yield f"no peak of {precision}: {why}. Its products count with what they move alone, so the limit is too low."
