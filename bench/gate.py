"""Is one model slower than another by more than is allowed? Rounds in fresh processes until the answer is clear.

A round loads both models afresh, lets them take short turns in random order, and gives one number: the logarithm of how
much longer the candidate took. Rounds are what is counted; within them, times are correlated. After certain numbers of
rounds the interval of the slowdown is looked at: wholly above the limit is a regression, wholly below a pass, and
anything else goes on until the budget is spent, then it is inconclusive.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgevit.errors import UsageError

from .stats import median

LOOKS = (10, 14, 20, 28, 40, 64, 128, 256)  # each 1.4 to 2 times the one before: looking more often costs
# Of the interval at the first look, where most gates end, and at each later one. docs/gate.md has how often the
# interval at which a gate stops then holds the truth.
FIRST_RISK, LOOK_RISK = 0.05, 0.01
SETTLED_RISK = 0.05  # where there is one look, at rounds that were measured before
LEAST_ROUNDS = 6  # the fewest whose signed ranks have an interval of 95 %
SLICE_MS = 25.0  # a turn of more than one inference takes no longer, so that a burst of other work hits both alike
SLICE_RUNS = 3  # of faster ones: the fewest with a median; longer turns were noisier, measured under bursts of load
ROUND_MS = 1000.0  # what both take together in a round, about as long as loading them
MIN_SLICES, MAX_SLICES = 3, 60  # pairs of turns in a round: fewer have no median, more bring less than another round
WARM_MS = 50.0  # of inferences at least: fast models take dozens until memory and caches have settled
WARM_BATCHES = 40  # at most, of what does not settle
WARM_GAIN = 0.05  # a batch that is faster than the last by less is settled
POWER = 0.8  # of the smallest slowdown that would have been seen: the habitual one

Progress = Callable[[float, str], None]


class Lane(Protocol):
    """A loaded model in a process of its own."""

    def turn(self, runs: int) -> Sequence[float]:
        """Run once more than `runs`, and tell the times of all but the first in ms."""


Verdict = Literal["pass", "regression", "inconclusive"]  # of what was measured; a check may also be "not gated"
Pair = tuple[Lane, Lane]  # baseline, candidate


@dataclass(frozen=True)
class GateSettings:
    """What is allowed and how long to measure. `max_slowdown` is relative: 0.05 allows 5 % more time."""

    max_slowdown: float = 0.05
    budget_s: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_slowdown < math.inf:
            raise UsageError(f"max slowdown {self.max_slowdown}: expected a share of 0 or more, e.g. 0.05 or 5%")
        if not 0 < self.budget_s < math.inf:
            raise UsageError(f"budget {self.budget_s}: expected a number of seconds above 0")


@dataclass(frozen=True)
class Interval:
    """How much longer the candidate takes, relative (0.05 = 5 %), and what bounds it."""

    worse: float
    low: float
    high: float


@dataclass(frozen=True)
class Round:
    """One round: the logarithm of candidate / baseline, and what each took in ms."""

    log_ratio: float
    baseline_ms: float
    candidate_ms: float


@dataclass(frozen=True)
class Decision:
    """What the rounds came to. `interval` is None below LEAST_ROUNDS rounds.

    `smallest_seen` is the smallest slowdown that this many rounds of this noise find in POWER of all gates.
    """

    verdict: Verdict
    interval: Interval | None
    smallest_seen: float | None
    rounds: tuple[Round, ...]
    spent_s: float
    stopped_by: Literal["clear", "budget"]

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """One number for each round."""
        return tuple(each.log_ratio for each in self.rounds)

    @property
    def baseline_ms(self) -> float:
        """The median over the rounds."""
        return median([each.baseline_ms for each in self.rounds])

    @property
    def candidate_ms(self) -> float:
        """The median over the rounds."""
        return median([each.candidate_ms for each in self.rounds])


# Rounds and the risk that the interval misses the truth -> slowdown, low, high, as logarithms.
Logs = tuple[float, float, float]
Estimate = Callable[[Sequence[float], float], Logs]
Judge = Callable[[Logs], Verdict]


def decide(
    open_pair: Callable[[], AbstractContextManager[Pair]],
    settings: GateSettings,
    *,
    estimate: Estimate | None = None,
    judge: Judge | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda fraction, text: None,
    after_round: Callable[[], object] = lambda: None,
) -> Decision:
    """Measure rounds of freshly opened pairs until the slowdown is clear or the budget spent.

    `estimate` makes an interval of the rounds, by default the one of paired rounds, and `judge` a verdict of it, by
    default where it lies from the limit; `after_round` is called after each, e.g. to look at the machine. What a lane
    raises goes through, as does Ctrl-C.
    """
    estimate = estimate or paired_interval
    order = random.Random(settings.seed)
    limit = math.log1p(settings.max_slowdown)
    rounds: list[Round] = []
    found: Logs | None = None
    verdict: Verdict = "inconclusive"
    start = clock()
    while True:
        with open_pair() as pair:
            rounds.append(take_round(pair, order))
        after_round()
        count, spent_s = len(rounds), clock() - start
        progress(min(1.0, spent_s / settings.budget_s), f"round {count}")
        needed_s = spent_s * max(count + 1, LEAST_ROUNDS) / count  # for another round, and for enough of them
        last = needed_s > settings.budget_s or count == LOOKS[-1]
        if (last or count in LOOKS) and count >= LEAST_ROUNDS:
            found = estimate([r.log_ratio for r in rounds], risk_at(count))
            verdict = judge(found) if judge else _verdict(found, limit)
        if last or verdict != "inconclusive":
            break
    return Decision(
        verdict=verdict,
        interval=None if found is None else Interval(*(math.expm1(value) for value in found)),
        smallest_seen=None if found is None else _smallest_seen(found, limit, risk_at(count)),
        rounds=tuple(rounds),
        spent_s=spent_s,
        stopped_by="budget" if verdict == "inconclusive" else "clear",
    )


def settled(found: Logs, settings: GateSettings) -> Decision:
    """What an interval says that was made of rounds measured before; nothing is measured."""
    limit = math.log1p(settings.max_slowdown)
    return Decision(
        verdict=_verdict(found, limit),
        interval=Interval(*(math.expm1(value) for value in found)),
        smallest_seen=_smallest_seen(found, limit, SETTLED_RISK),
        rounds=(),
        spent_s=0.0,
        stopped_by="clear",
    )


def take_round(pair: Pair, order: random.Random) -> Round:
    """Warm both up, then let them take turns; each pair of turns gives a ratio, the centre of these is the round's."""
    warm_ms = {index: _warm_up(pair[index]) for index in order.sample((0, 1), 2)}
    slowest_ms = max(warm_ms.values())
    runs = SLICE_RUNS if SLICE_RUNS * slowest_ms <= SLICE_MS else 1
    slices = min(max(round(ROUND_MS / (2 * (runs + 1) * slowest_ms)), MIN_SLICES), MAX_SLICES)
    turns: list[tuple[float, float]] = []
    for _ in range(slices):
        first = order.randrange(2)
        taken = {index: median(pair[index].turn(runs)) for index in (first, 1 - first)}
        turns.append((taken[0], taken[1]))
    return Round(
        log_ratio=centre([math.log(b / a) for a, b in turns]),
        baseline_ms=median([a for a, _ in turns]),
        candidate_ms=median([b for _, b in turns]),
    )


def risk_at(rounds: int) -> float:
    """The chance that the interval looked at after so many rounds misses the truth."""
    return FIRST_RISK if rounds <= LOOKS[0] else LOOK_RISK


def paired_interval(logs: Sequence[float], risk: float) -> tuple[float, float, float]:
    """The centre of the rounds and the ends of its interval, by inverting the sign-flip test on ranks.

    The estimate of Hodges and Lehmann, with Wilcoxon's signed ranks: under "equally fast" each round is as likely to
    favour one as the other, whatever its spread, so that rounds of very unequal noise do no harm, and one wild round
    moves little. Source: Hollander, Wolfe, Chicken, "Nonparametric Statistical Methods", 2014, sections 3.1 to 3.3.
    """
    means = _means(logs)
    end = max(0, signed_rank_quantile(len(logs), risk / 2) - 1)
    return float(np.median(means)), float(means[end]), float(means[-1 - end])


def centre(values: Sequence[float]) -> float:
    """The estimate of Hodges and Lehmann, the median of the means of all pairs: bursts move it little."""
    return float(np.median(_means(values)))


def _means(values: Sequence[float]) -> NDArray[np.float64]:
    """The means of all pairs of values, each with itself too, in order."""
    array = np.asarray(values, np.float64)
    first, second = np.triu_indices(len(array))
    return np.sort((array[first] + array[second]) / 2)


def shift_interval(baseline: Sequence[float], candidate: Sequence[float], risk: float) -> tuple[float, float, float]:
    """How much `candidate` lies above `baseline`, two samples of rounds of different runs, and the interval's ends.

    The estimate of Hodges and Lehmann with the ranks of Mann and Whitney, in the normal approximation, which is within
    a rank from ten rounds on. Source as above, section 4.2.
    """
    differences = np.sort(np.subtract.outer(np.asarray(candidate), np.asarray(baseline)).ravel())
    m, n = len(baseline), len(candidate)
    spread = math.sqrt(m * n * (m + n + 1) / 12)
    end = max(0, math.floor(m * n / 2 - _z(risk) * spread) - 1)
    return float(np.median(differences)), float(differences[end]), float(differences[-1 - end])


@lru_cache
def signed_rank_quantile(n: int, tail: float) -> int:
    """The largest k with P(sum of the ranks of one sign < k) <= `tail`: the k-th of the ordered means is an end."""
    ways = np.zeros(n * (n + 1) // 2 + 1)  # of each sum of ranks, as shares of all sign patterns
    ways[0] = 1.0
    for rank in range(1, n + 1):
        ways[rank:] = (ways[rank:] + ways[: len(ways) - rank]) / 2
        ways[:rank] /= 2
    return int(np.searchsorted(np.cumsum(ways), tail, side="right"))


def _verdict(found: Logs, limit: float) -> Verdict:
    _, low, high = found
    return "regression" if low > limit else "pass" if high <= limit else "inconclusive"


def _smallest_seen(found: Logs, limit: float, risk: float) -> float:
    """What lies so far above the limit that an interval of this width is wholly above it with POWER."""
    _, low, high = found
    half = (high - low) / 2
    return math.expm1(limit + half * (1 + statistics.NormalDist().inv_cdf(POWER) / _z(risk)))


def _z(risk: float) -> float:
    """The quantile of the normal distribution that both tails together leave `risk` beyond."""
    return statistics.NormalDist().inv_cdf(1 - risk / 2)


def _warm_up(lane: Lane) -> float:
    """What an inference takes in ms once it no longer gets faster."""
    before_ms, spent_ms, runs = math.inf, 0.0, 1
    for _ in range(WARM_BATCHES):
        times_ms = lane.turn(runs)
        batch_ms, spent_ms = median(times_ms), spent_ms + sum(times_ms)
        if batch_ms >= (1 - WARM_GAIN) * before_ms and spent_ms >= WARM_MS:
            break
        before_ms, runs = batch_ms, SLICE_RUNS if SLICE_RUNS * batch_ms <= SLICE_MS else 1
    return min(batch_ms, before_ms)
