"""Percentiles that the samples support, and the interval of a speed-up from a bootstrap over rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from edgevit.specs import Comparison, LatencyResult

CONFIDENCE = 0.95  # of the interval of a ratio: the habitual one, so that a reader need not look it up
RESAMPLES = 5000  # the interval's ends then wander by 1 % of its width from seed to seed (simulated)
MIN_ROUNDS = 10  # simulated, the interval holds the truth in 86 % of cases at 6 rounds, 90 at 10, 93 at 20, 95 at 50
TAIL_RISK = 0.01  # chance that the second-largest sample lies below the true percentile; MLPerf's early-stopping rule


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the `q`-th percentile (0..100) by linear interpolation between the two nearest samples, in their unit.

    Linear rather than nearest-rank: p50 is then the median that the rounds are summarised by, for even counts too, and
    a reader gets the same number from the stored samples with numpy's default. Raises ValueError on no samples.
    """
    if not samples:
        raise ValueError("percentile of no samples")
    return float(np.percentile(samples, q))


def median(samples: Sequence[float]) -> float:
    """Return the middle of `samples`, in their unit; the mean of the two middle ones where the count is even."""
    return percentile(samples, 50)


@lru_cache
def needed_samples(q: float) -> int:
    """Return how many samples the `q`-th percentile (above 0, below 100) needs: p50 11, p90 64, p99 662.

    The smallest n at which the second-largest sample bounds the percentile with 99 % confidence: at most one of n
    samples lies beyond it with a chance of at most 1 %. Source: the early-stopping rule of MLPerf Inference,
    https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc. Low percentiles mirror high ones.
    """
    if not 0 < q < 100:
        raise ValueError(f"percentile {q:g}: expected a number above 0 and below 100")
    tail = min(q, 100 - q) / 100
    n = 2
    while (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1) > TAIL_RISK:
        n += 1
    return n


def supported(q: float, n: int) -> bool:
    """Tell whether `n` samples are enough to print the `q`-th percentile."""
    return n >= needed_samples(q)


def latency_percentiles(samples_ms: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Return {"p50": milliseconds, ...}; None where `samples_ms` are too few for the percentile."""
    n = len(samples_ms)
    return {f"p{q:g}": percentile(samples_ms, q) if supported(q, n) else None for q in percentiles}


def round_medians(result: LatencyResult) -> list[float]:
    """Return one number per round, in order: the median of its samples in milliseconds.

    A median, because one interrupted run must not decide a round.
    """
    by_round: dict[int, list[float]] = {}
    for index, sample in zip(result.rounds, result.samples_ms, strict=True):
        by_round.setdefault(index, []).append(sample)
    return [median(by_round[index]) for index in sorted(by_round)]


def bootstrap_ratio(
    baseline_ms: Sequence[float], candidate_ms: Sequence[float], seed: int
) -> tuple[float | None, float | None, float | None]:
    """Return (ratio, low, high) of baseline time / candidate time, from one number per contestant and round.

    `ratio` is the geometric mean of the rounds' ratios; a mean, so that an odd round shows as a wide interval. A round
    is resampled as a whole, both contestants together: what slows a round slows both, and cancels. Rounds, not samples,
    because neighbouring times are correlated (clock, temperature, co-tenants; lag-1 correlations of 0.2 to 0.98 were
    seen on real traces): an interval that takes them for independent is several times too narrow. The interval is the
    percentile one; it does not see what holds for the whole run, such as how one instance happens to lie in memory.
    `low` and `high` are None below MIN_ROUNDS rounds, all three where a time is not above 0. Same seed, same interval.
    """
    if len(baseline_ms) != len(candidate_ms):
        raise ValueError(f"paired rounds expected, got {len(baseline_ms)} and {len(candidate_ms)}")
    rounds = len(baseline_ms)
    if rounds == 0 or min(*baseline_ms, *candidate_ms) <= 0:
        return None, None, None
    logs = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    ratio = math.exp(logs.mean())
    if rounds < MIN_ROUNDS:
        return ratio, None, None
    picks = np.random.default_rng(seed).integers(rounds, size=(RESAMPLES, rounds))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.exp(np.percentile(logs[picks].mean(axis=1), [tail, 100 - tail]))
    return ratio, float(low), float(high)


def compare(baseline: LatencyResult, candidate: LatencyResult, seed: int = 0) -> Comparison:
    """Compare two contestants of one race. Raises ValueError where their rounds differ: those are not of one race."""
    first, second = round_medians(baseline), round_medians(candidate)
    ratio, low, high = bootstrap_ratio(first, second, seed)
    return Comparison(baseline.name, candidate.name, ratio, low, high, len(first))


def format_ms(value_ms: float) -> str:
    """Return `value_ms` with three digits that mean something: 0.0512, 1.23, 45.6, 1234."""
    exponent = int(f"{value_ms:.2e}".partition("e")[2])  # of the rounded value: 9.999 is 10.0, not 10.00
    return f"{value_ms:.{max(0, 2 - exponent)}f}"


def format_percentile(value_ms: float | None, q: float) -> str:
    """Return "1.23", or "n/a (needs 662)" where the samples do not support the `q`-th percentile."""
    return f"n/a (needs {needed_samples(q)})" if value_ms is None else format_ms(value_ms)


def describe_comparison(comparison: Comparison) -> str:
    """Return "1.31x faster [1.29, 1.33]" of the candidate; "slower" is told by the inverse, so above 1 as well."""
    ratio, low, high = comparison.ratio, comparison.low, comparison.high
    if ratio is None:
        return "n/a (a round measured 0 ms: the clock is too coarse or stands still)"
    if low is None or high is None:
        factor, word = (ratio, "faster") if ratio >= 1 else (1 / ratio, "slower")
        return f"{factor:.2f}x {word} (no interval: {comparison.rounds} rounds, needs {MIN_ROUNDS})"
    if low <= 1 <= high:
        return f"no difference shown [{low:.2f}, {high:.2f}]"
    word = "faster"
    if high < 1:
        ratio, low, high, word = 1 / ratio, 1 / high, 1 / low, "slower"
    digits = 2 if low >= 1.005 else 4  # two digits would print 1.00, which reads as no difference
    return f"{ratio:.{digits}f}x {word} [{low:.{digits}f}, {high:.{digits}f}]"
