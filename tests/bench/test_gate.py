"""The gate's decision on scripted lanes and a scripted clock: what stops it, what it says, how often it is wrong."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from edgevit.bench.gate import (
    FIRST_RISK,
    LEAST_ROUNDS,
    LOOK_RISK,
    LOOKS,
    Decision,
    GateSettings,
    decide,
    paired_interval,
    risk_at,
    shift_interval,
    signed_rank_quantile,
    take_round,
)
from edgevit.errors import UsageError

LOADING_S = 0.5  # scripted


class Lane:
    """Takes `ms` for an inference, moves the clock by it, and notes who asked when."""

    def __init__(self, machine: Machine, name: str, ms: Callable[[], float]) -> None:
        self.machine, self.name, self.ms = machine, name, ms

    def turn(self, runs: int) -> list[float]:
        self.machine.log.append((self.name, runs))
        times = [self.ms() for _ in range(runs + 1)]
        self.machine.now_s += sum(times) / 1000
        return times[1:]


class Machine:
    """A clock, and pairs of lanes; `slower` gives the factor of each fresh pair."""

    def __init__(self, slower: Callable[[], float], ms: float = 10.0) -> None:
        self.now_s, self.slower, self.ms = 0.0, slower, ms
        self.log: list[tuple[str, int]] = []
        self.opened = self.closed = 0

    def clock(self) -> float:
        return self.now_s

    @contextmanager
    def pair(self) -> Iterator[tuple[Lane, Lane]]:
        self.opened += 1
        self.now_s += LOADING_S
        factor = self.slower()
        try:
            yield (
                Lane(self, "baseline", lambda: self.ms),
                Lane(self, "candidate", lambda: self.ms * factor),
            )
        finally:
            self.closed += 1

    def gate(self, **settings: Any) -> Decision:
        more = {key: settings.pop(key) for key in ("judge", "estimate", "progress", "after_round") if key in settings}
        return decide(self.pair, GateSettings(**settings), clock=self.clock, **more)


def around(factor: float, spread: float, seed: int = 0) -> Callable[[], float]:
    """Factors of loads: `factor` on average, log-normal."""
    draw = np.random.default_rng(seed)
    return lambda: factor * math.exp(spread * draw.standard_normal())


# ---- what stops it


def test_the_same_model_passes_at_the_first_look() -> None:
    machine = Machine(around(1.0, 0.01))
    decision = machine.gate(max_slowdown=0.05)
    assert (decision.verdict, decision.stopped_by, len(decision.rounds)) == ("pass", "clear", LOOKS[0])
    assert machine.opened == machine.closed == LOOKS[0]


def test_a_slowdown_beyond_the_limit_is_a_regression() -> None:
    decision = Machine(around(1.10, 0.01)).gate(max_slowdown=0.03)
    assert decision.verdict == "regression"
    assert decision.interval is not None
    assert decision.interval.low > 0.03
    assert decision.interval.worse == pytest.approx(0.10, abs=0.02)


def test_a_speed_up_passes() -> None:
    decision = Machine(around(0.5, 0.01)).gate()
    assert decision.verdict == "pass"
    assert decision.interval is not None
    assert decision.interval.worse == pytest.approx(-0.5, abs=0.01)


def test_what_is_not_clear_is_looked_at_again_until_the_budget_is_spent() -> None:
    machine = Machine(around(1.05, 0.05))
    decision = machine.gate(max_slowdown=0.05, budget_s=60)
    assert (decision.verdict, decision.stopped_by) == ("inconclusive", "budget")
    assert 50 < decision.spent_s <= 60  # no round is begun that would not fit
    assert decision.smallest_seen is not None
    assert decision.smallest_seen > 0.05


def test_a_budget_too_small_for_six_rounds_ends_at_once() -> None:
    decision = Machine(around(2.0, 0.01)).gate(budget_s=5)
    assert (decision.verdict, len(decision.rounds)) == ("inconclusive", 1)
    assert (decision.interval, decision.smallest_seen) == (None, None)


def test_a_clock_that_stands_still_ends_at_the_last_look() -> None:
    machine = Machine(around(1.05, 0.2))
    decision = decide(machine.pair, GateSettings(max_slowdown=0.05), clock=lambda: 0.0)
    assert len(decision.rounds) <= LOOKS[-1]


def test_a_wild_round_decides_nothing() -> None:
    """A burst that hits one lane of a whole round."""
    factors = itertools.chain([1.0] * 4, [30.0], itertools.repeat(1.0))
    assert Machine(lambda: next(factors)).gate().verdict == "pass"


def test_the_judge_and_the_hook_of_each_round_are_called() -> None:
    seen = []
    decision = Machine(around(1.0, 0.001)).gate(
        judge=lambda found: "pass" if found[2] - found[1] < 1 else "inconclusive", after_round=lambda: seen.append(1)
    )
    assert decision.verdict == "pass"
    assert len(seen) == len(decision.rounds)


def test_progress_tells_the_rounds() -> None:
    told: list[tuple[float, str]] = []
    Machine(around(1.0, 0.001)).gate(progress=lambda fraction, text: told.append((fraction, text)))
    assert [text for _, text in told] == [f"round {n}" for n in range(1, 11)]
    assert all(0 < fraction <= 1 for fraction, _ in told)


def test_a_failure_closes_the_pair_and_goes_through() -> None:
    def fail() -> float:
        raise RuntimeError("scripted")

    machine = Machine(lambda: 1.0)

    @contextmanager
    def pair() -> Iterator[tuple[Lane, Lane]]:
        with machine.pair() as (first, second):
            first.ms = fail
            yield first, second

    with pytest.raises(RuntimeError, match="scripted"):
        decide(pair, GateSettings(), clock=machine.clock)
    assert machine.opened == machine.closed == 1


@pytest.mark.parametrize("value", [-0.01, math.inf, math.nan])
def test_an_impossible_limit_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"max slowdown .*: expected a share of 0 or more, e.g. 0.05 or 5%"):
        GateSettings(max_slowdown=value)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_an_impossible_budget_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"budget .*: expected a number of seconds above 0"):
        GateSettings(budget_s=value)


# ---- a round


def one_round(machine: Machine, seed: int = 0) -> Any:
    with machine.pair() as pair:
        return take_round(pair, random.Random(seed))


def test_a_round_takes_turns_of_equal_length_in_random_order() -> None:
    machine = Machine(lambda: 1.1, ms=5.0)
    found = one_round(machine)
    assert found.log_ratio == pytest.approx(math.log(1.1))
    assert (found.baseline_ms, found.candidate_ms) == pytest.approx((5, 5.5))
    turns = machine.log[-2 * 23 :]  # 1000 ms of pairs of 2 * 4 * 5.5 ms, after the warm-up
    assert {runs for _, runs in turns} == {3}
    pairs = [{turns[i][0], turns[i + 1][0]} for i in range(0, len(turns), 2)]
    assert all(names == {"baseline", "candidate"} for names in pairs)
    assert len({turns[i][0] for i in range(0, len(turns), 2)}) == 2  # each is first in some


def test_each_is_warmed_up_first_in_some_rounds() -> None:
    machine = Machine(lambda: 1.0)
    for seed in range(20):
        one_round(machine, seed)
        machine.log.append(("", 0))
    starts = {machine.log[0][0], *(after for (name, _), (after, _) in itertools.pairwise(machine.log) if not name)}
    assert starts == {"baseline", "candidate"}


def test_a_burst_that_hits_a_third_of_the_turns_moves_a_round_little() -> None:
    machine, draw = Machine(lambda: 1.1, ms=5.0), random.Random(0)
    with machine.pair() as (first, second):
        for lane in (first, second):
            lane.ms = lambda ms=lane.ms: ms() * (3.0 if draw.random() < 1 / 9 else 1.0) * draw.uniform(0.99, 1.01)  # type: ignore[misc]  # bound now
        assert take_round((first, second), random.Random(0)).log_ratio == pytest.approx(math.log(1.1), abs=0.01)


def test_a_slow_model_is_run_less_often_in_a_round() -> None:
    machine = Machine(lambda: 1.0, ms=2000)
    one_round(machine)
    assert [runs for _, runs in machine.log] == [1] * (2 * 2 + 2 * 3)  # two warm-up runs each, three pairs of turns


@pytest.mark.parametrize(("ms", "verdict"), [(90.0, "regression"), (150.0, "regression"), (5000.0, "inconclusive")])
def test_a_minute_is_enough_for_a_doubling_of_slow_models_but_not_of_any(ms: float, verdict: str) -> None:
    decision = Machine(around(2.0, 0.02), ms=ms).gate()
    assert decision.verdict == verdict
    if verdict == "inconclusive":
        assert (len(decision.rounds), decision.interval) == (1, None)  # more rounds would not become enough


def test_warming_up_goes_on_while_it_gets_faster() -> None:
    machine = Machine(lambda: 1.0)
    with machine.pair() as (first, second):
        times = itertools.chain([100, 80, 60, 40, 20, 15, 12, 11], itertools.repeat(10.0))
        first.ms = lambda: float(next(times))
        take_round((first, second), random.Random(0))
    warm = machine.log[: -2 * 25]  # 1000 ms of pairs of 2 * 2 * 10 ms
    assert sum(name == "baseline" for name, _ in warm) > sum(name == "candidate" for name, _ in warm)


# ---- intervals


def exact_quantile(n: int, tail: float) -> int:
    """By listing every pattern of signs."""
    sums = [sum(rank for rank, sign in enumerate(signs, 1) if sign) for signs in itertools.product((0, 1), repeat=n)]
    k = 0
    while sum(each < k + 1 for each in sums) / len(sums) <= tail:
        k += 1
    return k


@pytest.mark.parametrize("n", [5, 8, 10, 12])
@pytest.mark.parametrize("tail", [0.025, 0.005, 0.02])
def test_the_quantile_is_the_one_of_all_sign_patterns(n: int, tail: float) -> None:
    assert signed_rank_quantile(n, tail) == exact_quantile(n, tail)


def test_the_paired_interval_of_ten_rounds_by_hand() -> None:
    """Of 55 means, 8 lie outside each end at 95 %: tables have 8 as the critical value of ten pairs."""
    logs = [0.01 * i for i in range(10)]
    means = sorted((logs[i] + logs[j]) / 2 for i in range(10) for j in range(i, 10))
    assert paired_interval(logs, 0.05) == pytest.approx((0.045, means[8], means[-9]))


@pytest.mark.parametrize("spread", ["even", "bursts"])
def test_the_paired_interval_holds_the_truth_as_often_as_it_says(spread: str) -> None:
    draw, hits, tries = np.random.default_rng(1), 0, 2000
    for _ in range(tries):
        scale = 0.02 if spread == "even" else np.where(draw.random(20) < 0.3, 0.3, 0.02)
        _, low, high = paired_interval(0.05 + scale * draw.standard_normal(20), 0.05)
        hits += low <= 0.05 <= high
    assert hits / tries == pytest.approx(0.955, abs=0.015)


def test_the_shift_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw, hits, tries = np.random.default_rng(2), 0, 2000
    for _ in range(tries):
        first, second = 0.02 * draw.standard_normal(14), 0.05 + 0.02 * draw.standard_normal(10)
        _, low, high = shift_interval(first.tolist(), second.tolist(), 0.05)
        hits += low <= 0.05 <= high
    assert hits / tries == pytest.approx(0.95, abs=0.015)


def test_looking_often_is_paid_for() -> None:
    assert risk_at(LOOKS[0]) == FIRST_RISK
    assert risk_at(LEAST_ROUNDS) == FIRST_RISK
    assert {risk_at(n) for n in (*LOOKS[1:], 33)} == {LOOK_RISK}


class Correlated:
    """Noise of the machine that goes on from one inference to the next, whoever runs."""

    def __init__(self, phi: float, seed: int) -> None:
        self.phi, self.draw = phi, np.random.default_rng(seed)
        self.value = float(self.draw.standard_normal())

    def factor(self) -> float:
        self.value = self.phi * self.value + math.sqrt(1 - self.phi**2) * float(self.draw.standard_normal())
        return math.exp(0.05 * self.value)


@pytest.mark.parametrize("phi", [0.2, 0.98])
def test_correlated_times_neither_cry_wolf_nor_hide_a_slowdown(phi: float) -> None:
    """docs/gate.md has the counts; here forty gates of each kind, of which one may go wrong."""
    for slower, allowed, expected in ((1.0, 0.05, "pass"), (1.08, 0.03, "regression")):
        found = []
        for seed in range(40):
            noise, machine = Correlated(phi, seed), Machine(around(slower, 0.01, seed))

            @contextmanager
            def pair(noise: Correlated = noise, machine: Machine = machine) -> Iterator[tuple[Lane, Lane]]:
                with machine.pair() as lanes:
                    for lane in lanes:
                        lane.ms = lambda ms=lane.ms: ms() * noise.factor()  # type: ignore[misc]  # bound now
                    yield lanes

            settings = GateSettings(max_slowdown=allowed, seed=seed)
            found.append(decide(pair, settings, clock=machine.clock).verdict)
        assert found.count(expected) >= 39
