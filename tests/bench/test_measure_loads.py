"""Several loads of the same contestants: their rounds are pooled into one race."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from edgevit.bench.stats import round_medians
from edgevit.bench.timing import BenchSettings, Contestant, measure, measure_loads
from edgevit.specs import BenchReport

Times = list[tuple[float, float]]  # of each load: milliseconds of the contestants a and b


class Garage:
    """Loads contestants afresh, each load with its own speed, and notes what happens to them."""

    def __init__(self, stage: Any, speeds_ms: Times) -> None:
        self.stage = stage
        self.speeds_ms = iter(speeds_ms)
        self.events: list[str] = []
        self.starts: list[int] = []  # how many runs there had been when each load was opened

    @contextmanager
    def load(self) -> Iterator[list[Contestant]]:
        self.events.append("open")
        self.starts.append(len(self.stage.log))
        try:
            a, b = next(self.speeds_ms)
            yield [self.stage.contestant("a", a), self.stage.contestant("b", b)]
        finally:
            self.events.append("close")

    def race(self, loads: int, progress: Callable[[float, str], None] | None = None, **settings: Any) -> BenchReport:
        chosen = BenchSettings(**settings)
        if progress is None:
            return measure_loads(self.load, loads, chosen, self.stage.clock)
        return measure_loads(self.load, loads, chosen, self.stage.clock, progress)


def test_each_load_is_closed_before_the_next_is_opened(stage: Any) -> None:
    garage = Garage(stage, [(10, 5)] * 3)
    garage.race(3)
    assert garage.events == ["open", "close"] * 3


def test_the_rounds_of_all_loads_are_pooled_and_counted_on(stage: Any) -> None:
    report = Garage(stage, [(10, 5), (11, 5), (12, 5)]).race(3)
    for result in report.results:
        seen = sorted(set(result.rounds))
        assert seen == list(range(report.rounds))
        assert list(result.rounds) == sorted(result.rounds)
        assert len(result.rounds) == len(result.samples_ms)
    medians = round_medians(report.results[0])
    assert len(medians) == report.rounds
    assert sorted({round(m) for m in medians}) == [10, 11, 12]
    assert [round(m) for m in medians] == sorted(round(m) for m in medians)  # the first load's rounds come first


def test_percentiles_are_of_all_samples(stage: Any) -> None:
    report = Garage(stage, [(10, 5), (20, 5), (30, 5)]).race(3, duration_s=3.0)
    a, _ = report.results
    shares = {speed: sum(round(t) == speed for t in a.samples_ms) / len(a.samples_ms) for speed in (10, 20, 30)}
    assert min(shares.values()) > 0.1  # each load has its say, the slow ones with fewer runs
    assert a.latency_ms["p50"] == pytest.approx(sorted(a.samples_ms)[len(a.samples_ms) // 2], abs=10)
    assert a.latency_ms["p90"] == pytest.approx(30)


def test_samples_of_several_loads_together_support_a_percentile(stage: Any, make_stage: Callable[[], Any]) -> None:
    alone = measure([stage.contestant("a", 10), stage.contestant("b", 5)], BenchSettings(duration_s=2.5), stage.clock)
    assert alone.results[0].latency_ms["p99"] is None  # needs 662 samples
    pooled = Garage(make_stage(), [(10, 5)] * 4).race(4, duration_s=10.0)
    assert len(pooled.results[0].samples_ms) >= 662
    assert pooled.results[0].latency_ms["p99"] == pytest.approx(10)


def test_one_comparison_spans_all_loads(stage: Any) -> None:
    report = Garage(stage, [(10, 5), (5, 10)]).race(2)  # b is twice as fast in one load, half as fast in the other
    (comparison,) = report.comparisons
    assert (comparison.baseline, comparison.candidate, comparison.rounds) == ("a", "b", report.rounds)
    assert comparison.low is not None and comparison.high is not None
    assert comparison.low < 1 < comparison.high


def test_a_steady_ratio_is_found_whatever_the_speed_of_the_load(stage: Any) -> None:
    (comparison,) = Garage(stage, [(10, 5), (20, 10), (14, 7)]).race(3).comparisons
    assert comparison.ratio == pytest.approx(2.0)
    assert comparison.low == pytest.approx(2.0) and comparison.high == pytest.approx(2.0)


def test_the_loads_share_the_duration(make_stage: Callable[[], Any]) -> None:
    taken_s = []
    for loads in (1, 4):
        stage = make_stage()
        report = Garage(stage, [(10, 5)] * loads).race(loads, duration_s=8.0)
        taken_s.append(sum(sum(r.samples_ms) for r in report.results) / 1000)
    assert taken_s == [pytest.approx(16, rel=0.15)] * 2  # two contestants of 8 s, less the discarded runs


def test_each_load_draws_another_order_and_the_seed_decides_them_all(make_stage: Callable[[], Any]) -> None:
    def race(seed: int) -> tuple[list[str], BenchReport]:
        stage = make_stage()
        garage = Garage(stage, [(7, 7)] * 2)  # no divisor of a duration: the loads differ in nothing but the order
        report = garage.race(2, seed=seed, duration_s=1.0)
        first, second = garage.starts
        return ["".join(stage.log[first:second]), "".join(stage.log[second:])], report

    orders, report = race(3)
    again, same = race(3)
    assert (orders, report.results, report.comparisons) == (again, same.results, same.comparisons)
    assert orders != race(4)[0]
    length = min(map(len, orders))
    assert orders[0][:length] != orders[1][:length]


def test_warm_up_and_discarded_runs_add_up(stage: Any) -> None:
    report = Garage(stage, [(10, 5)] * 3).race(3)
    runs = sum(r.warmup_runs + r.discarded_runs + len(r.samples_ms) for r in report.results)
    assert runs == len(stage.log)


def test_one_load_gives_what_measure_gives(stage: Any, make_stage: Callable[[], Any]) -> None:
    pooled = Garage(stage, [(10, 5)]).race(1, seed=2)
    other = make_stage()
    alone = measure(
        [other.contestant("a", 10), other.contestant("b", 5)], BenchSettings(seed=2), other.clock
    )  # fmt: skip
    assert pooled.results == alone.results
    assert pooled.comparisons == alone.comparisons
    assert (pooled.rounds, pooled.seed, pooled.stopped_by) == (alone.rounds, alone.seed, alone.stopped_by)


def test_progress_rises_from_0_to_1_over_all_loads(stage: Any) -> None:
    seen: list[float] = []
    Garage(stage, [(10, 5)] * 3).race(3, lambda fraction, text: seen.append(fraction))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert all(before <= after for before, after in pairwise(seen))


def test_a_warning_of_every_load_is_given_once(stage: Any) -> None:
    report = Garage(stage, [(0, 0)] * 3).race(3, max_samples=150)  # a clock that stands still
    about_the_limit = [w for w in report.warnings if "sample" in w]
    assert len(about_the_limit) == 1
    assert report.stopped_by == "sample limit"


@pytest.mark.parametrize("failing", [0, 1])
def test_what_a_run_raises_goes_through_and_the_load_is_closed(stage: Any, failing: int) -> None:
    garage = Garage(stage, [(10, 5)] * 3)
    ended: list[int] = []

    def break_down() -> None:
        raise KeyError("broken")

    @contextmanager
    def load() -> Iterator[list[Contestant]]:
        with garage.load() as contestants:
            if len(ended) == failing:
                contestants[1] = Contestant("b", break_down)
            yield contestants
        ended.append(1)

    with pytest.raises(KeyError, match="broken"):
        measure_loads(load, 3, BenchSettings(), stage.clock)
    assert garage.events == ["open", "close"] * (failing + 1)


def test_ctrl_c_closes_the_load(stage: Any) -> None:
    garage = Garage(stage, [(10, 5)] * 2)

    def interrupt(fraction: float, text: str) -> None:  # noqa: ARG001  # the signature of progress
        if fraction > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        garage.race(2, interrupt)
    assert garage.events == ["open", "close"] * 2


def test_a_load_that_fails_is_no_result(stage: Any) -> None:
    garage = Garage(stage, [(10, 5)])  # the second load finds nothing
    with pytest.raises((StopIteration, RuntimeError)):
        garage.race(2)
    assert garage.events == ["open", "close"] * 2
