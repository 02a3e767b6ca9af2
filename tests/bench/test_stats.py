"""Percentiles, intervals and their texts; the interval's promise is tested by simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgevit.bench import stats
from edgevit.specs import Comparison, LatencyResult


def result(name: str, rounds_ms: Sequence[Sequence[float]]) -> LatencyResult:
    samples = tuple(sample for turn in rounds_ms for sample in turn)
    rounds = tuple(index for index, turn in enumerate(rounds_ms) for _ in turn)
    return LatencyResult(name, samples, rounds, {}, 0, 0)


@pytest.mark.parametrize(("q", "needed"), [(50, 11), (90, 64), (99, 662), (10, 64)])
def test_a_percentile_needs_so_many_samples_and_not_one_less(q: float, needed: int) -> None:
    assert stats.needed_samples(q) == needed
    assert stats.supported(q, needed)
    assert not stats.supported(q, needed - 1)


@pytest.mark.parametrize("q", [0, 100, -1, 101])
def test_a_percentile_without_samples_beyond_it_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=rf"^percentile {q}: expected a number above 0 and below 100$"):
        stats.needed_samples(q)


def test_percentiles_are_interpolated_and_p50_is_the_median() -> None:
    assert stats.percentile([4, 1, 3, 2], 50) == 2.5 == stats.median([4, 1, 3, 2])
    assert stats.percentile([1, 2], 90) == pytest.approx(1.9)
    assert stats.median([7]) == 7
    with pytest.raises(ValueError, match=r"^percentile of no samples$"):
        stats.percentile([], 50)


def test_latency_percentiles_are_none_where_the_samples_are_too_few() -> None:
    assert stats.latency_percentiles([2.0] * 64, (50, 90, 99)) == {"p50": 2.0, "p90": 2.0, "p99": None}


def test_round_medians_shrug_off_one_interrupted_run() -> None:
    assert stats.round_medians(result("a", [[1, 1, 90], [2, 2, 3, 3]])) == [1, 2.5]


@pytest.mark.parametrize(
    ("value_ms", "text"),
    [
        (1.234, "1.23"),
        (45.67, "45.7"),
        (123.4, "123"),
        (1234.5, "1234"),
        (0.05123, "0.0512"),
        (9.999, "10.0"),
        (0.0, "0.00"),
    ],
)
def test_times_are_printed_with_three_digits(value_ms: float, text: str) -> None:
    assert stats.format_ms(value_ms) == text
    assert stats.format_percentile(value_ms, 50) == text


def test_an_unsupported_percentile_says_what_it_needs() -> None:
    assert stats.format_percentile(None, 99) == "n/a (needs 662)"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "text"),
    [
        (1.31, 1.29, 1.33, "1.31x faster [1.29, 1.33]"),
        (0.5, 0.4, 0.625, "2.00x slower [1.60, 2.50]"),
        (1.004, 1.002, 1.006, "1.0040x faster [1.0020, 1.0060]"),
        (1.01, 0.98, 1.03, "no difference shown [0.98, 1.03]"),
        (1.31, None, None, "1.31x faster (no interval: 4 rounds, needs 10)"),
        (0.5, None, None, "2.00x slower (no interval: 4 rounds, needs 10)"),
        (None, None, None, "n/a (a round measured 0 ms: the clock is too coarse or stands still)"),
    ],
)
def test_comparisons_are_told_in_words(ratio: float | None, low: float | None, high: float | None, text: str) -> None:
    assert stats.describe_comparison(Comparison("a", "b", ratio, low, high, rounds=4)) == text


def test_the_ratio_is_baseline_time_over_candidate_time() -> None:
    comparison = stats.compare(result("slow", [[20, 20]] * 12), result("fast", [[10]] * 12))

    assert (comparison.baseline, comparison.candidate, comparison.rounds) == ("slow", "fast", 12)
    assert (comparison.ratio, comparison.low, comparison.high) == pytest.approx((2, 2, 2))


def test_rounds_of_different_races_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^paired rounds expected, got 12 and 11$"):
        stats.bootstrap_ratio([1] * 12, [1] * 11, seed=0)


@pytest.mark.parametrize(("rounds", "given"), [(9, False), (10, True)])
def test_no_interval_from_fewer_rounds_than_it_needs(rounds: int, given: bool) -> None:
    ratio, low, high = stats.bootstrap_ratio([3.0] * rounds, [2.0] * rounds, seed=0)

    assert ratio == pytest.approx(1.5)
    assert (low is not None, high is not None) == (given, given)


@pytest.mark.parametrize("rounds_ms", [[], [1.0] * 11 + [0.0]])
def test_no_ratio_without_rounds_or_with_a_time_of_zero(rounds_ms: list[float]) -> None:
    assert stats.bootstrap_ratio(rounds_ms, rounds_ms, seed=0) == (None, None, None)


def test_the_same_seed_gives_the_same_interval() -> None:
    first = list(np.random.default_rng(1).uniform(9, 11, 20))

    assert stats.bootstrap_ratio(first, [10.0] * 20, 5) == stats.bootstrap_ratio(first, [10.0] * 20, 5)
    assert stats.bootstrap_ratio(first, [10.0] * 20, 5) != stats.bootstrap_ratio(first, [10.0] * 20, 6)


def test_what_slows_a_whole_round_cancels_but_a_slow_round_of_one_contestant_widens_the_interval() -> None:
    baseline = list(np.random.default_rng(1).uniform(9.9, 10.1, 20))
    both_slow, one_slow = [*baseline[:-1], 30.0], [*baseline[:-1], 30.0]

    _, low, high = stats.bootstrap_ratio(both_slow, both_slow, seed=0)
    assert (low, high) == (1, 1)
    _, low, high = stats.bootstrap_ratio(one_slow, baseline, seed=0)
    assert low is not None and high is not None
    assert high - low > 0.1


SIMULATIONS = 300  # enough to tell 90 % from 95 %: the share found wanders by 1.3 %
ROUNDS, TURN = 50, 10  # what a 10 ms model gets in 5 s


def simulate(slow_down: float, seed: int) -> list[tuple[float, float]]:
    """Intervals of simulated races under AR(1) noise: 3 % per sample, correlated 0.9 with the sample before it."""
    rng = np.random.default_rng(seed)
    noise = np.zeros((SIMULATIONS, ROUNDS * 2 * TURN))
    for step in range(1, noise.shape[1]):
        noise[:, step] = 0.9 * noise[:, step - 1] + rng.normal(0, 0.03, SIMULATIONS)
    medians = np.median(10 * np.exp(noise).reshape(SIMULATIONS, ROUNDS, 2, TURN), axis=3)
    swapped = rng.random((SIMULATIONS, ROUNDS)) < 0.5
    baseline = np.where(swapped, medians[..., 1], medians[..., 0])
    candidate = np.where(swapped, medians[..., 0], medians[..., 1]) * slow_down
    intervals = [stats.bootstrap_ratio(list(b), list(c), seed=0)[1:] for b, c in zip(baseline, candidate, strict=True)]
    return [(low, high) for low, high in intervals if low is not None and high is not None]


def test_a_contestant_against_itself_shows_no_difference_in_at_least_nine_of_ten_races() -> None:
    intervals = simulate(slow_down=1.0, seed=1)

    assert len(intervals) == SIMULATIONS
    assert sum(low <= 1 <= high for low, high in intervals) >= 0.90 * SIMULATIONS


def test_a_slow_down_of_ten_per_cent_is_found_and_lies_in_the_interval() -> None:
    intervals = simulate(slow_down=1.1, seed=2)

    assert sum(high < 1 for _, high in intervals) >= 0.95 * SIMULATIONS
    assert sum(low <= 1 / 1.1 <= high for low, high in intervals) >= 0.90 * SIMULATIONS
