"""Each warning names what was seen, its likely cause and the next step; a quiet run gets none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgevit.bench import cautions
from edgevit.specs import LatencyResult

QUIET = [10.0, 10.1, 9.9, 10.2, 9.8] * 20  # milliseconds; median 10, median absolute deviation 0.1


def result(samples_ms: Sequence[float], turn: int = 10) -> LatencyResult:
    rounds = tuple(index // turn for index in range(len(samples_ms)))
    return LatencyResult("net", tuple(samples_ms), rounds, {}, 0, 0)


def test_a_quiet_run_gets_no_warning() -> None:
    assert [*cautions.outliers(result(QUIET)), *cautions.drift(result(QUIET))] == []


def test_many_slow_runs_are_outliers() -> None:
    assert list(cautions.outliers(result([*QUIET[:-6], *[20.0] * 6]))) == [
        "net: 6 of 100 times are far above the median of 10.0 ms (modified Z-score above 3.5). Other programs probably "
        "took the cores now and then. Close them, or use fewer threads than cores, and repeat."
    ]


@pytest.mark.parametrize(
    "samples_ms", [[*QUIET[:-5], *[20.0] * 5], [*QUIET[:-6], *[1.0] * 6], [10.0] * 90 + [20.0] * 9]
)
def test_few_slow_runs_fast_runs_and_a_coarse_clock_are_no_outliers(samples_ms: list[float]) -> None:
    assert list(cautions.outliers(result(samples_ms))) == []


def test_drift_is_told_in_its_direction() -> None:
    slower, faster = [10.0] * 50 + [11.0] * 50, [11.0] * 50 + [10.0] * 50

    assert list(cautions.drift(result(slower))) == [
        "net: 10% slower in the second half of the run (10.0 -> 11.0 ms). The chip probably grew hot and lowered its "
        "clock. Let it cool, or cool it."
    ]
    assert list(cautions.drift(result(faster))) == [
        "net: 9% faster in the second half of the run (11.0 -> 10.0 ms). The clock was probably still rising, or a "
        "program ended. Raise the duration."
    ]


@pytest.mark.parametrize(
    "samples_ms",
    [
        [10.0] * 50 + [10.4] * 50,  # below the threshold
        [10.0] * 20 + [20.0] * 30,  # five rounds are too few
        [0.0] * 50 + [1.0] * 50,  # a clock too coarse for a ratio
    ],
)
def test_small_changes_and_few_rounds_are_no_drift(samples_ms: list[float]) -> None:
    assert list(cautions.drift(result(samples_ms))) == []
