"""The race: who runs when, what is kept, what ends it, what passes through."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest

from edgevit.bench.stats import describe_comparison, format_percentile
from edgevit.bench.timing import BenchSettings, Contestant, document, measure, measure_loads
from edgevit.bench.watch import Moment
from edgevit.errors import UsageError
from edgevit.specs import BenchReport, LatencyResult


def still() -> Moment:
    """A machine on which nothing can be read."""
    return Moment(0.0)


def race(stage: Any, *contestants: Contestant, **settings: Any) -> BenchReport:
    return measure(contestants, BenchSettings(**settings), stage.clock, watch=still)


def printed(result: LatencyResult) -> list[str]:
    return [format_percentile(result.latency_ms[f"p{q}"], q) for q in (50, 90, 99)]


def turns(log: list[str]) -> list[str]:
    """The log without repetitions."""
    return [name for index, name in enumerate(log) if index == 0 or log[index - 1] != name]


def test_two_contestants_are_timed_and_compared(stage: Any) -> None:
    report = race(stage, stage.contestant("slow", 10), stage.contestant("fast", 5))
    slow, fast = report.results

    assert report.stopped_by == "duration"
    assert report.warnings == ()
    assert printed(slow) == ["10.0", "10.0", "n/a (needs 662)"]
    assert printed(fast) == ["5.00", "5.00", "n/a (needs 662)"]
    assert [describe_comparison(c) for c in report.comparisons] == ["2.00x faster [2.00, 2.00]"]
    assert sum(slow.samples_ms + fast.samples_ms) == pytest.approx(10_000, rel=0.15)  # 5 s each, less the discarded


def test_each_round_gives_each_contestant_one_turn_in_a_random_order(stage: Any) -> None:
    names = ("a", "b", "c")
    report = race(stage, *(stage.contestant(name, 10) for name in names))
    length = len(report.results[0].samples_ms) // report.rounds + 1
    log = stage.log[sum(r.warmup_runs for r in report.results) :]
    orders = [tuple(log[start : start + 3 * length : length]) for start in range(0, len(log), 3 * length)]

    assert len(orders) == report.rounds
    assert all(sorted(order) == list(names) for order in orders)
    assert len(set(orders)) == 6  # all there are
    for result in report.results:
        assert [result.rounds.count(index) for index in range(report.rounds)] == [length - 1] * report.rounds
        assert result.discarded_runs == report.rounds


def test_turns_are_of_equal_length_whatever_the_warm_up_showed(stage: Any) -> None:
    report = race(stage, stage.contestant("a", [30.0] * 20 + [10.0] * 10_000), stage.contestant("b", 10))

    assert report.results[0].rounds == report.results[1].rounds


def test_the_seed_alone_decides_the_order(make_stage: Callable[[], Any]) -> None:
    logs = []
    for seed in (3, 3, 4):
        stage = make_stage()
        race(stage, stage.contestant("a", 10), stage.contestant("b", 10), seed=seed)
        logs.append(turns(stage.log))

    assert logs[0] == logs[1] != logs[2]


def test_the_first_run_of_a_turn_is_not_counted(stage: Any) -> None:
    def cold_then_warm() -> None:
        stage.now_s += 0.01 if stage.log[-1:] == ["a"] else 0.9
        stage.log.append("a")

    report = race(stage, Contestant("a", cold_then_warm), stage.contestant("b", 10))

    assert max(report.results[0].samples_ms) == pytest.approx(10)


def test_warming_up_goes_on_until_two_batches_are_alike(stage: Any) -> None:
    falling = [100.0] * 5 + [50.0] * 5 + [30.0] * 5 + [29.0] * 5 + [10.0] * 10_000
    report = race(stage, stage.contestant("a", falling))

    assert report.results[0].warmup_runs == 20
    assert max(report.results[0].samples_ms) == pytest.approx(10)


def test_warming_up_lasts_a_tenth_of_the_duration_and_never_longer_than_it(make_stage: Callable[[], Any]) -> None:
    steady, slow, falling = make_stage(), make_stage(), make_stage()

    assert race(steady, steady.contestant("a", 1)).results[0].warmup_runs == 500
    assert race(slow, slow.contestant("a", 1200)).results[0].warmup_runs == 5
    forever = (1000 * 0.98**index for index in range(10_000))
    assert race(falling, falling.contestant("a", forever)).results[0].warmup_runs == 10


def test_a_slow_model_is_measured_past_the_duration_until_p90_is_supported(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 200))

    assert report.stopped_by == "duration"
    assert 64 <= len(report.results[0].samples_ms) <= 66
    assert report.results[0].latency_ms == {"p50": pytest.approx(200), "p90": pytest.approx(200), "p99": None}


def test_a_race_has_the_rounds_that_an_interval_needs(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 1000), stage.contestant("b", 1000), percentiles=(50.0,))

    assert (report.stopped_by, report.rounds, len(report.results[0].samples_ms)) == ("duration", 10, 30)
    assert report.comparisons[0].low == pytest.approx(1)


def test_p99_prolongs_a_race_where_it_is_wanted(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 50), wanted=99)

    assert report.stopped_by == "duration"
    assert 662 <= len(report.results[0].samples_ms) < 670
    assert report.results[0].latency_ms["p99"] == pytest.approx(50)


def test_p50_alone_takes_the_rounds_of_an_interval_and_no_more(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 1000), wanted=50)

    assert (report.stopped_by, report.rounds) == ("duration", 10)
    assert report.results[0].latency_ms == {"p50": pytest.approx(1000), "p90": None, "p99": None}


def test_the_parts_of_a_race_have_its_samples_together() -> None:
    assert [BenchSettings(wanted=99, parts=parts).needed for parts in (1, 2, 3)] == [662, 331, 221]


def test_p99_alone_does_not_prolong_a_race(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 50), percentiles=(99.0,))

    assert len(report.results[0].samples_ms) < 100
    assert report.results[0].latency_ms == {"p99": None}


def test_the_time_limit_ends_a_race_and_says_what_is_missing(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 4000), stage.contestant("b", 4000))

    assert report.stopped_by == "time limit"
    assert report.warnings == (
        "the limit of 60 s per contestant ended the run at 4 rounds and 12 samples; 64 samples and 10 rounds are "
        "needed. An inference is probably too slow for this limit. Raise max_duration_s.",
    )
    assert describe_comparison(report.comparisons[0]) == "1.00x faster (no interval: 4 rounds, needs 10)"


def test_a_clock_that_stands_still_ends_at_the_sample_limit(stage: Any) -> None:
    report = race(stage, stage.contestant("a", 0), stage.contestant("b", 0), max_samples=500)

    assert report.stopped_by == "sample limit"
    assert [len(result.samples_ms) for result in report.results] == [500, 500]
    assert report.warnings == (
        "the limit of 500 samples ended the run before 5 s per contestant had passed. A contestant is very fast, or "
        "the clock stands still. Raise max_samples, or check the clock.",
    )
    assert describe_comparison(report.comparisons[0]).startswith("n/a (a round measured 0 ms")


def test_a_clock_that_runs_backwards_ends_too(stage: Any) -> None:
    assert race(stage, stage.contestant("a", -1), max_samples=500).stopped_by == "sample limit"


def test_a_single_contestant_is_compared_with_nothing(stage: Any) -> None:
    assert race(stage, stage.contestant("a", 10)).comparisons == ()


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("runs", [0, 200])  # during the warm-up, during the race
def test_what_a_contestant_raises_goes_through(stage: Any, error: BaseException, runs: int) -> None:
    inner = stage.contestant("a", 10)

    def failing() -> None:
        if len(stage.log) == runs:
            raise error
        inner.run()

    with pytest.raises(type(error)) as caught:
        race(stage, Contestant("a", failing))
    assert caught.value is error
    assert gc.isenabled()


def test_the_garbage_collector_rests_during_the_race_only(stage: Any) -> None:
    seen = set()

    def run() -> None:
        seen.add(gc.isenabled())
        stage.now_s += 0.01

    race(stage, Contestant("a", run))
    assert (seen, gc.isenabled()) == ({False}, True)


def test_progress_rises_from_nought_to_one(stage: Any) -> None:
    told: list[tuple[float, str]] = []
    contestants = [stage.contestant("a", 10), stage.contestant("b", 20)]
    measure(contestants, clock=stage.clock, watch=still, progress=lambda *line: told.append(line))
    fractions = [fraction for fraction, _ in told]

    assert told[:3] == [(0.0, "warming up a"), (0.0, "warming up b"), (0.0, "round 1, 0 samples each")]
    assert fractions == sorted(fractions)
    assert told[-1][0] == 1.0 and told[-1][1].endswith(" rounds")


def test_the_machine_is_looked_at_before_the_first_round_and_after_each(stage: Any) -> None:
    seen: list[int] = []

    def watch() -> Moment:
        seen.append(len(stage.log))
        return Moment(stage.now_s, (0,), ticks=int(100 * stage.now_s), busy_ticks=0, own_s=0.0)

    report = measure([stage.contestant("a", 10)], clock=stage.clock, watch=watch)
    warmed = report.results[0].warmup_runs

    assert seen[0] == warmed
    assert len(report.moments) == len(seen) == report.rounds + 1
    assert [b - a for a, b in pairwise(seen)] == [(len(stage.log) - warmed) // report.rounds] * report.rounds
    assert report.changes == ()


def test_a_machine_that_changed_is_told_with_the_reason(stage: Any) -> None:
    def watch() -> Moment:  # one core, of which another program takes the half from the third second on
        other = max(0.0, stage.now_s - 3.0) / 2
        return Moment(stage.now_s, (0,), int(100 * stage.now_s), int(100 * other), 0, own_s=0.0)

    report = measure([stage.contestant("a", 10)], clock=stage.clock, watch=watch)

    assert [change.kind for change in report.changes] == ["load"]


def test_what_changed_stands_in_the_document_and_marks_the_results_of_its_race_alone(make_stage: Any) -> None:
    reports = []
    for name, load in (("a", 0.0), ("b", 0.5)):
        stage = make_stage()

        def watch(stage: Any = stage, load: float = load) -> Moment:
            return Moment(stage.now_s, (0,), int(100 * stage.now_s), int(100 * load * stage.now_s), 0, own_s=0.0)

        reports.append(measure([stage.contestant(name, 10)], clock=stage.clock, watch=watch))
    told = document(reports, BenchSettings(), 1, 1, {})

    assert [result["machine_changed"] for result in told["results"]] == [[], ["load"]]
    assert [set(change) for change in told["changes"]] == [{"kind", "text"}]


def test_several_loads_have_a_moment_for_each_round_and_the_samples_together(stage: Any) -> None:
    def watch() -> Moment:
        return Moment(stage.now_s)

    def load() -> Any:
        return nullcontext([stage.contestant("a", 50)])

    report = measure_loads(load, 3, BenchSettings(wanted=99), stage.clock, watch=watch)

    assert len(report.moments) == report.rounds + 1
    assert [moment.at_s for moment in report.moments] == sorted({moment.at_s for moment in report.moments})
    assert 662 <= len(report.results[0].samples_ms) < 680
    assert report.results[0].latency_ms["p99"] == pytest.approx(50)


def test_a_machine_that_slows_down_leaves_the_ratio_alone(stage: Any) -> None:
    """The machine slows by half for good in mid-run; the race still finds the true 20 %."""
    noise = random.Random(0)

    def contestant(name: str, base_ms: float) -> Contestant:
        def run() -> None:
            factor = 1.5 if stage.now_s > 6 else 1.0
            stage.now_s += base_ms / 1000 * factor * noise.uniform(0.98, 1.02)

        return Contestant(name, run)

    comparison = race(stage, contestant("a", 12), contestant("b", 10)).comparisons[0]

    assert comparison.low is not None and comparison.high is not None
    assert comparison.low <= 1.2 <= comparison.high
    assert comparison.high - comparison.low < 0.05  # wide by the one round in which it slowed


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "nothing to measure: expected at least one contestant"),
        (["a", "b", "a"], "contestants of equal name: a; give each its own"),
    ],
)
def test_contestants_are_told_apart_by_name(stage: Any, names: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        race(stage, *(stage.contestant(name, 10) for name in names))
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"duration_s": 0}, "duration_s 0: expected a number of seconds above 0"),
        ({"duration_s": float("nan")}, "duration_s nan: expected a number of seconds above 0"),
        ({"max_duration_s": float("inf")}, "max_duration_s inf: expected a number of seconds above 0"),
        ({"max_samples": 149}, "max_samples 149: expected at least 150"),
        ({"percentiles": (50, 100)}, "percentiles (50, 100): expected numbers above 0 and below 100"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        BenchSettings(**settings)
    assert str(caught.value) == text
