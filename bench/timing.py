"""A race: contestants run by turns in short rounds, so that whatever changes the machine's speed hits all of them.

The procedure: each contestant warms up; then every round gives every contestant one turn, in an order drawn anew from
the seed, until the duration has passed and the samples suffice. Times are kept raw, with the round they belong to.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from edgevit.errors import UsageError
from edgevit.specs import BenchReport, LatencyResult

from . import cautions
from .stats import (
    MIN_ROUNDS,
    compare,
    describe_comparison,
    format_percentile,
    latency_percentiles,
    median,
    needed_samples,
)
from .watch import Change, Moment, changes, look

ROUNDS = 50  # a round is a fiftieth of the race (0.1 s per contestant of 5 s): short against drift, long to switching
MIN_TURN = 3  # samples: the fewest whose median survives one interrupted run
WARMUP_BATCH = 5  # runs: the fewest whose median survives two interrupted runs
WARMUP_GAIN = 0.05  # a batch faster than the last by less is settled: five runs cannot tell less from noise
WARMUP_SHARE = 0.1  # of the duration at least: clocks take tenths of a second to rise, very fast models less to settle
WANTED = 90.0  # a percentile above it is taken if the time allows: p99 of a slow model would take minutes

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Contestant:
    """What is timed: `run` is one inference, bound to its runtime and inputs by the caller; its result is dropped.

    It is this loaded instance that races: two loads of one file have been seen to differ by 1.6 % for as long as they
    lived. To claim less of two models, race several loads of each.
    """

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class BenchSettings:
    """How long to measure and what is wanted. Durations are seconds per contestant on average, without the warm-up.

    A slow model is measured past `duration_s` until the percentiles up to `wanted` are supported, but not past
    `max_duration_s` (or `duration_s`, if that is longer) by more than a round. `max_samples` ends a race whose clock
    stands still. Of a race in `parts` these are the settings of one part: together they have the samples.
    """

    duration_s: float = 5.0
    max_duration_s: float = 60.0
    max_samples: int = 200_000
    percentiles: tuple[float, ...] = (50, 90, 99)
    wanted: float = WANTED
    seed: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        for name in ("duration_s", "max_duration_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} {getattr(self, name)}: expected a number of seconds above 0")
        if self.max_samples < MIN_TURN * ROUNDS:
            raise UsageError(f"max_samples {self.max_samples}: expected at least {MIN_TURN * ROUNDS}")
        if not all(0 < q < 100 for q in self.percentiles):
            raise UsageError(f"percentiles {self.percentiles}: expected numbers above 0 and below 100")

    @property
    def needed(self) -> int:
        """Samples per contestant without which the race goes on past its duration."""
        wanted = max((needed_samples(q) for q in self.percentiles if q <= self.wanted), default=1)
        return math.ceil(wanted / self.parts)


@dataclass(frozen=True)
class Race(BenchReport):
    """A race and the machine meanwhile: `moments` were taken before the first round and after each."""

    moments: tuple[Moment, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        """What changed on the machine while the rounds were run."""
        return changes(self.moments)


def measure(
    contestants: Sequence[Contestant],
    settings: BenchSettings | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda fraction, text: None,
    watch: Callable[[], Moment] = look,
) -> Race:
    """Race `contestants` and return their times; the first is the baseline that each later one is compared with.

    `clock` gives seconds, `progress` receives a fraction from 0 to 1 and a line of text between turns, `watch` looks
    at the machine before the first round and after each. Raises UsageError on no contestants or equal names. What `run`
    raises goes through, as does Ctrl-C; no result is returned then.
    """
    settings = settings or BenchSettings()
    _check_names([contestant.name for contestant in contestants])
    with collector_off():
        lanes = [_warm_up(contestant, settings, clock, progress) for contestant in contestants]
        moments, stopped_by = _race(lanes, settings, clock, progress, watch)
    rounds = len(moments) - 1
    results = tuple(lane.result(settings.percentiles) for lane in lanes)
    seen = any(change.kind in ("load", "steal") for change in changes(moments))  # what the cautions could but guess at
    guesses = () if seen else (cautions.outliers, cautions.drift)
    warnings = [text for result in results for check in guesses for text in check(result)]
    warnings += _cut_short(stopped_by, rounds, len(results[0].samples_ms), settings)
    progress(1.0, f"{rounds} rounds")
    return Race(
        results=results,
        comparisons=tuple(compare(results[0], other, settings.seed) for other in results[1:]),
        warnings=tuple(warnings),
        rounds=rounds,
        seed=settings.seed,
        stopped_by=stopped_by,
        moments=tuple(moments),
    )


@dataclass
class _Lane:
    """One contestant under way: what warming it up showed, and its times so far."""

    contestant: Contestant
    warmup_runs: int
    run_ms: float
    samples_ms: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    discarded_runs: int = 0

    def take_turn(self, index: int, runs: int, clock: Callable[[], float]) -> None:
        """Run one turn of `runs` samples. Its first run is dropped: it finds the caches full of another's data.

        In turns of ten runs, such cold ones would be the slowest tenth: p90 would measure the switching.
        A contestant alone is treated the same, so that its numbers mean the same.
        """
        self.contestant.run()
        self.discarded_runs += 1
        self.samples_ms += _times_ms(self.contestant.run, runs, clock)
        self.rounds += [index] * runs

    def result(self, percentiles: Sequence[float]) -> LatencyResult:
        return LatencyResult(
            name=self.contestant.name,
            samples_ms=tuple(self.samples_ms),
            rounds=tuple(self.rounds),
            latency_ms=latency_percentiles(self.samples_ms, percentiles),
            warmup_runs=self.warmup_runs,
            discarded_runs=self.discarded_runs,
        )


def _warm_up(contestant: Contestant, settings: BenchSettings, clock: Callable[[], float], progress: Progress) -> _Lane:
    """Run batches until two in a row are alike and a tenth of the duration has passed; at most the whole duration.

    A still clock cannot prolong it: the runs are limited to a tenth of `max_samples`.
    """
    progress(0.0, f"warming up {contestant.name}")
    start, runs, before_ms = clock(), 0, math.inf
    while True:
        batch_ms = median(_times_ms(contestant.run, WARMUP_BATCH, clock))
        runs += WARMUP_BATCH
        elapsed_s = clock() - start
        settled = runs > WARMUP_BATCH and batch_ms >= (1 - WARMUP_GAIN) * before_ms
        enough = settled and elapsed_s >= WARMUP_SHARE * settings.duration_s
        if enough or elapsed_s >= settings.duration_s or runs >= settings.max_samples // 10:
            break
        before_ms = batch_ms
    return _Lane(contestant, runs, batch_ms)


def _turn_runs(lanes: Sequence[_Lane], settings: BenchSettings) -> int:
    """Return the samples of a turn, the same for all contestants.

    Turns of unequal length would not be alike: where noise is skewed or correlated, the median of more samples is
    another. Measured on a busy machine, one model in turns 1:4 differed from itself by 1.2 % (standard error 0.4 %) and
    14 % of the intervals missed 1; in equal turns 4 % did, where 5 % are expected.
    """
    most = settings.max_samples // ROUNDS
    round_ms = sum(lane.run_ms for lane in lanes)
    wanted_ms = 1000 * settings.duration_s / ROUNDS * len(lanes)
    return most if round_ms <= 0 else min(max(math.ceil(wanted_ms / round_ms), MIN_TURN), most)


def _race(
    lanes: Sequence[_Lane],
    settings: BenchSettings,
    clock: Callable[[], float],
    progress: Progress,
    watch: Callable[[], Moment],
) -> tuple[list[Moment], Literal["duration", "time limit", "sample limit"]]:
    """Run rounds until one of the three ends; every round is complete, since rounds are what is compared."""
    order = random.Random(settings.seed)
    turn_runs = _turn_runs(lanes, settings)
    longest_s = max(settings.duration_s, settings.max_duration_s)
    moments = [watch()]
    start = clock()
    while True:
        index = len(moments) - 1
        elapsed_s = (clock() - start) / len(lanes)
        samples = index * turn_runs
        done = min(elapsed_s / settings.duration_s, samples / settings.needed, index / MIN_ROUNDS)
        if done >= 1:
            return moments, "duration"
        if elapsed_s >= longest_s:
            return moments, "time limit"
        if samples >= settings.max_samples:
            return moments, "sample limit"
        fraction = max(done, elapsed_s / longest_s, samples / settings.max_samples)
        progress(fraction, f"round {index + 1}, {samples} samples each")
        for lane in order.sample(lanes, len(lanes)):  # a random order: a rotation could beat in time with the machine
            lane.take_turn(index, turn_runs, clock)
        moments.append(watch())


def _times_ms(run: Callable[[], object], count: int, clock: Callable[[], float]) -> list[float]:
    """Run `count` times and return each duration in milliseconds."""
    times_ms = []
    for _ in range(count):
        start = clock()
        run()
        times_ms.append((clock() - start) * 1000)
    return times_ms


def _cut_short(stopped_by: str, rounds: int, samples: int, settings: BenchSettings) -> Iterator[str]:
    """Warn of a race that a limit ended before its samples were enough or its duration had passed."""
    if stopped_by == "time limit":
        yield (
            f"the limit of {max(settings.duration_s, settings.max_duration_s):g} s per contestant ended the run at "
            f"{rounds} rounds and {samples} samples; {settings.needed} samples and {MIN_ROUNDS} rounds are needed. "
            "An inference is probably too slow for this limit. Raise max_duration_s."
        )
    if stopped_by == "sample limit":
        yield (
            f"the limit of {settings.max_samples} samples ended the run before {settings.duration_s:g} s per "
            "contestant had passed. A contestant is very fast, or the clock stands still. Raise max_samples, or check "
            "the clock."
        )


def _check_names(names: Sequence[str]) -> None:
    """Results are told apart by name."""
    if not names:
        raise UsageError("nothing to measure: expected at least one contestant")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"contestants of equal name: {', '.join(twice)}; give each its own")


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep Python's cyclic garbage collector out of the times, as timeit does; it is no part of an inference."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure_loads(
    load: Callable[[], AbstractContextManager[Sequence[Contestant]]],
    loads: int,
    settings: BenchSettings | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda fraction, text: None,
    watch: Callable[[], Moment] = look,
) -> Race:
    """`loads` races, each with freshly loaded contestants that share the duration; their rounds are pooled.

    One load of a model may be a percent faster than the next for as long as it lives; pooling several makes that part
    of the result instead of a bias. The interval still takes the pooled rounds for independent: it is too narrow to say
    where the next load will lie.
    """
    settings = settings or BenchSettings()
    share = replace(
        settings,
        duration_s=settings.duration_s / loads,
        max_duration_s=settings.max_duration_s / loads,
        parts=loads,
    )
    reports = []
    for i in range(loads):
        with load() as contestants:
            part = replace(share, seed=settings.seed + i)
            reports.append(measure(contestants, part, clock, part_of(progress, i, loads), watch))
    results = tuple(_pooled(parts, settings) for parts in zip(*(r.results for r in reports), strict=True))
    warnings = tuple(dict.fromkeys(w for r in reports for w in r.warnings))
    comparisons = tuple(compare(results[0], other, settings.seed) for other in results[1:])
    return Race(
        results, comparisons, warnings, sum(r.rounds for r in reports), settings.seed, reports[-1].stopped_by,
        # A load's first moment is left out: its loading then counts to its first round, and rounds keep their numbers.
        moments=(reports[0].moments[0], *(moment for r in reports for moment in r.moments[1:])),
    )  # fmt: skip


def document(
    reports: Sequence[Race], settings: BenchSettings, threads: int | None, loads: int, machine: dict[str, Any]
) -> dict[str, Any]:
    """Races as one JSON document; `comparison` is the first of `comparisons`, or None where nothing raced.

    `changes` says what changed on the machine meanwhile, `machine_changed` of a result names the kinds of its race.
    """
    changed = [report.changes for report in reports]
    comparisons = [{**asdict(c), "verdict": describe_comparison(c)} for report in reports for c in report.comparisons]
    return {
        "results": [
            {**_result_record(result), "machine_changed": [change.kind for change in seen]}
            for report, seen in zip(reports, changed, strict=True)
            for result in report.results
        ],
        "comparison": comparisons[0] if comparisons else None,
        "comparisons": comparisons,
        "warnings": list(dict.fromkeys(warning for report in reports for warning in report.warnings)),
        "changes": [asdict(change) for change in dict.fromkeys(change for seen in changed for change in seen)],
        "settings": {**asdict(settings), "threads": threads, "loads": loads},
        "machine": machine,
    }


def _result_record(result: LatencyResult) -> dict[str, Any]:
    """The result with its percentiles as they are printed beside the raw ones."""
    shown = {q: format_percentile(value, float(q.removeprefix("p"))) for q, value in result.latency_ms.items()}
    return {**asdict(result), "latency_text": shown}


def part_of(progress: Progress, index: int, count: int) -> Progress:
    """Progress of one of `count` equal parts as progress of the whole."""
    return lambda fraction, text: progress((index + fraction) / count, text)


def _pooled(parts: Sequence[LatencyResult], settings: BenchSettings) -> LatencyResult:
    """One contestant's results from several loads; rounds keep counting from load to load."""
    samples: list[float] = []
    rounds: list[int] = []
    offset = 0
    for part in parts:
        samples += part.samples_ms
        rounds += [r + offset for r in part.rounds]
        offset += max(part.rounds, default=-1) + 1
    return replace(
        parts[0],
        samples_ms=tuple(samples),
        rounds=tuple(rounds),
        latency_ms=latency_percentiles(samples, settings.percentiles),
        warmup_runs=sum(p.warmup_runs for p in parts),
        discarded_runs=sum(p.discarded_runs for p in parts),
    )
