"""Throughput: pictures per second with k inferences in flight, for k = 1, 2, 4, ... until more in flight gain little.

The loop is closed: k callers, each of which starts its next inference when its last one has ended. A level is raced
against the one below it: by turns, in rounds of one window each, in an order drawn anew from the seed, so that whatever
changes the machine's speed hits both. The climb ends where the interval of a gain lies below GAIN as a whole.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgevit.errors import RuntimeFailure, UsageError

from .stats import CONFIDENCE, MIN_ROUNDS, RESAMPLES, bootstrap_ratio, format_ms, latency_percentiles
from .timing import Progress, collector_off, part_of

GAIN = 0.05  # of a level over the one below: less is not worth the latency that it costs
ROUNDS = 20  # windows of a level in a race with another: the interval then holds the truth in 93 % of cases (stats.py)
LOOKS = 3  # times as many windows where undecided; simulated, a gain of GAIN itself is then taken for less in 8 %
MIN_RUNS = 3  # inferences of each caller in a window: what is cut off at its ends is then a share that can be counted
SETTLED = 0.05  # a warm-up window that brings less more than the last is settled, as in a race of latencies
MAX_WARMUP = 10  # windows: half as many as are counted; what rises for longer is told by the interval
MAX_RUNS = 200_000  # of a caller in a window; more than any model does in a minute: the clock stands still
SHARED = 0.9  # a judgement: below that share of the cores, another program had some; Python itself takes less
PERCENTILES = (50,)  # of the latency beside: the tails need a race of their own, with one in flight


@dataclass(frozen=True)
class Lanes:
    """A level that is loaded: one caller for each inference in flight, which may all be called at the same time.

    `threads` is how many the runtime has in all, or for each inference where it has no `streams`; None where unknown.
    """

    calls: Sequence[Callable[[], object]]
    threads: int | None = None
    streams: int | None = None


OpenLevel = Callable[[int], AbstractContextManager[Lanes]]  # from the number in flight


@dataclass(frozen=True)
class ThroughputSettings:
    """How long to measure: `duration_s` is for each level in each race; at most twice as many as `cores` are in flight.

    `batch` is the pictures of an inference. A slow model is measured longer: MIN_ROUNDS windows of MIN_RUNS each.
    """

    duration_s: float = 5.0
    cores: int = 1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.duration_s < math.inf:
            raise UsageError(f"throughput: duration {self.duration_s}: expected a number of seconds above 0")
        if self.cores < 1 or self.batch < 1:
            raise UsageError(f"throughput: {self.cores} cores, batch {self.batch}: each must be above zero")


@dataclass(frozen=True)
class Window:
    """What the callers did while all were busy: inferences per second, cut ones in part; times of those that ended."""

    inferences_per_s: float
    times_ms: tuple[float, ...]
    cores: float  # processor time of this process per second: how many cores it had


@dataclass(frozen=True)
class Gain:
    """What `upper` in flight gain over `lower`: 1.05 = 5 % more pictures per second, with its interval."""

    lower: int
    upper: int
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int

    @property
    def small(self) -> bool:
        """Whether it is shown to be below GAIN."""
        return self.high is not None and self.high < 1 + GAIN

    @property
    def large(self) -> bool:
        """Whether it is shown to be at least GAIN."""
        return self.low is not None and self.low >= 1 + GAIN

    def __str__(self) -> str:
        start = f"{self.upper} in flight against {self.lower}: "
        if self.ratio is None or self.low is None or self.high is None:
            return f"{start}nothing was completed in a window"
        return f"{start}{self.ratio - 1:+.1%} pictures/s [{self.low - 1:+.1%}, {self.high - 1:+.1%}]"


@dataclass
class _Level:
    """A level under way: its callers while they are loaded, and its windows so far."""

    in_flight: int
    lanes: Lanes
    inference_s: float  # as the warm-up showed
    windows: list[Window] = field(default_factory=list)

    def rates(self) -> list[float]:
        return [window.inferences_per_s for window in self.windows]


@dataclass(frozen=True)
class Clocks:
    """Seconds that pass, and seconds of processor time that all threads of this process took."""

    wall: Callable[[], float] = time.perf_counter
    processor: Callable[[], float] = time.process_time


def saturate(
    open_level: OpenLevel,
    settings: ThroughputSettings | None = None,
    clocks: Clocks | None = None,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Climb from one in flight until more gain less than GAIN, or twice the cores are in flight; the levels as JSON.

    `open_level` loads a level and closes it again; two are open at a time. The callers read the clock, each in its
    thread. What an inference raises goes through, as does Ctrl-C; no result is returned then.
    """
    settings, clocks = settings or ThroughputSettings(), clocks or Clocks()
    steps = ladder(settings.cores)
    order = random.Random(settings.seed)
    levels: list[_Level] = []
    gains: list[Gain] = []
    with collector_off(), ExitStack() as below:
        levels.append(_opened(open_level, steps[0], below, settings, clocks, progress))
        for index, in_flight in enumerate(steps[1:]):
            with ExitStack() as above:
                part = part_of(progress, index, len(steps) - 1)
                levels.append(_opened(open_level, in_flight, above, settings, clocks, part))
                gains.append(_race(levels[-2], levels[-1], settings, order, clocks, part))
                below.close()
                if gains[-1].small:
                    break
                below.enter_context(above.pop_all())
    progress(1.0, str(gains[-1]))
    return _document(levels, gains, settings)


def ladder(cores: int) -> list[int]:
    """The numbers in flight: doubled from 1, with a stop at `cores`, up to twice the cores.

    >>> ladder(1), ladder(2), ladder(6)
    ([1, 2], [1, 2, 4], [1, 2, 4, 6, 12])
    """
    found = [1]
    while found[-1] < 2 * cores:
        double = 2 * found[-1]
        found.append(cores if found[-1] < cores < double else min(double, 2 * cores))
    return found


def _opened(
    open_level: OpenLevel,
    in_flight: int,
    stack: ExitStack,
    settings: ThroughputSettings,
    clocks: Clocks,
    progress: Progress,
) -> _Level:
    """A level loaded and warmed up: windows, until one brings no more than the last."""
    progress(0.0, f"{in_flight} in flight: warming up")
    lanes = stack.enter_context(open_level(in_flight))
    before = 0.0
    for _ in range(MAX_WARMUP):
        window = run_window(lanes.calls, settings.duration_s / ROUNDS, clocks)
        if window.inferences_per_s <= (1 + SETTLED) * before:
            break
        before = window.inferences_per_s
    rate = window.inferences_per_s
    return _Level(in_flight, lanes, in_flight / rate if rate > 0 else 0.0)  # in a closed loop: Little's law


def _race(
    lower: _Level,
    upper: _Level,
    settings: ThroughputSettings,
    order: random.Random,
    clocks: Clocks,
    progress: Progress,
) -> Gain:
    """Windows of two levels by turns, until it is decided whether the upper one gains GAIN; at most LOOKS times."""
    window_s = max(settings.duration_s / ROUNDS, MIN_RUNS * max(lower.inference_s, upper.inference_s))
    rounds = min(max(MIN_ROUNDS, int(settings.duration_s / window_s + 1e-9)), ROUNDS)  # 1e-9: 5 / (5 / 20) is 20
    told = f"{upper.in_flight} in flight against {lower.in_flight}"
    gain = Gain(lower.in_flight, upper.in_flight, None, None, None, 0)
    while gain.rounds < LOOKS * rounds and not gain.small and not gain.large:
        for index in range(gain.rounds, gain.rounds + rounds):
            progress(index / (LOOKS * rounds), f"{told}: round {index + 1}")
            for level in order.sample([lower, upper], 2):
                level.windows.append(run_window(level.lanes.calls, window_s, clocks))
        done = gain.rounds + rounds
        pair = upper.rates()[-done:], lower.rates()[-done:]
        gain = Gain(lower.in_flight, upper.in_flight, *bootstrap_ratio(*pair, settings.seed), done)
    return gain


def run_window(calls: Sequence[Callable[[], object]], window_s: float, clocks: Clocks) -> Window:
    """Let every caller infer again and again in a thread of its own, and look at `window_s` during which all are busy.

    That begins when each has ended its first inference, which finds cold caches, and ends before any of them stops. Of
    an inference that reaches beyond an end, the share of its time counts that lies inside: so a window need not be long
    against an inference.
    """
    crew = _Crew(len(calls), window_s, clocks.wall)
    threads = [threading.Thread(target=crew.work, args=each, daemon=True) for each in enumerate(calls)]
    before_s = clocks.processor()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C, or a thread that could not be started: nobody is left behind who still uses the model
        crew.stop.set()
        crew.gate.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if crew.errors:
        raise crew.errors[0]
    return crew.window(clocks.processor() - before_s)


class _Crew:
    """The callers of one window: when each inference began and ended, in seconds."""

    def __init__(self, count: int, window_s: float, clock: Callable[[], float]) -> None:
        self.window_s = window_s
        self.clock = clock
        self.spans: list[list[tuple[float, float]]] = [[] for _ in range(count)]
        self.gate = threading.Barrier(count)
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self._opened_s: float | None = None

    def work(self, index: int, call: Callable[[], object]) -> None:
        """One caller's life; what `call` raises ends all of them."""
        try:
            self.gate.wait()
            spans = self.spans[index]
            while not self.stop.is_set() and len(spans) < MAX_RUNS:
                begun = self.clock()
                call()
                spans.append((begun, self.clock()))
                if self._over(spans[-1][1]):
                    return
            if not self.stop.is_set():
                raise RuntimeFailure(
                    f"throughput: {MAX_RUNS} inferences of one caller did not fill a window of {self.window_s:g} s, "
                    "expected fewer; check that the clock moves, or shorten the duration"
                )
        except threading.BrokenBarrierError:
            return
        except BaseException as error:  # whatever it is: it is raised again where the window was asked for
            self.errors.append(error)
            self.stop.set()

    def _over(self, now_s: float) -> bool:
        """Whether the window is past; it opens when the last caller has ended its first inference."""
        if self._opened_s is None and all(self.spans):
            self._opened_s = max(spans[0][1] for spans in self.spans)
        return self._opened_s is not None and now_s >= self._opened_s + self.window_s

    def window(self, processor_s: float) -> Window:
        """The window as it was; every caller went on until after it."""
        opened_s = max(spans[0][1] for spans in self.spans)
        closed_s = opened_s + self.window_s
        all_spans = [span for spans in self.spans for span in spans]
        inferences = sum(_inside(span, opened_s, closed_s) for span in all_spans)
        times_ms = tuple(1000 * (end - begun) for begun, end in all_spans if opened_s < end <= closed_s)
        whole_s = max(end for _, end in all_spans) - min(begun for begun, _ in all_spans)
        return Window(inferences / self.window_s, times_ms, processor_s / whole_s)


def _inside(span: tuple[float, float], opened_s: float, closed_s: float) -> float:
    """The share of an inference that lies in the window."""
    begun, end = span
    if end <= begun:
        return float(opened_s < end <= closed_s)
    return max(0.0, min(end, closed_s) - max(begun, opened_s)) / (end - begun)


def _document(levels: Sequence[_Level], gains: Sequence[Gain], settings: ThroughputSettings) -> dict[str, Any]:
    """What was found, as JSON. The best is the first level that no later one was shown to be better than."""
    best, ahead = 0, 0.0  # the gains since are multiplied: they are paired, the levels' own figures of other times
    for index, gain in enumerate(gains):
        ahead += math.log(gain.ratio) if gain.ratio else -math.inf
        if gain.low is not None and gain.low > 1 and ahead > 0 and not gain.small:
            best, ahead = index + 1, 0.0
    records = [_record(level, settings) for level in levels]
    warnings = list(_shared(records, settings))
    return {
        "levels": records,
        "gains": [{**asdict(gain), "text": str(gain)} for gain in gains],
        "best": records[best],
        "saturated": gains[-1].small,
        "reason": _reason(gains[-1], settings, shared=bool(warnings)),
        "warnings": warnings,
        "cores": settings.cores,
        "batch": settings.batch,
        "settings": asdict(settings),
    }


def _record(level: _Level, settings: ThroughputSettings) -> dict[str, Any]:
    """A level's figures, with them as they are printed."""
    rates = [settings.batch * rate for rate in level.rates()]
    low, high = _interval(rates, settings.seed)
    times_ms = [time_ms for window in level.windows for time_ms in window.times_ms]
    latency_ms = latency_percentiles(times_ms, PERCENTILES)
    pictures_per_s = float(np.mean(rates))
    bounds = "" if low is None or high is None else f" [{format_ms(low)}, {format_ms(high)}]"
    p50 = latency_ms["p50"]
    return {
        "in_flight": level.in_flight,
        "threads": level.lanes.threads,
        "streams": level.lanes.streams,
        "batch": settings.batch,
        "pictures_per_s": pictures_per_s,
        "low": low,
        "high": high,
        "latency_ms": latency_ms,
        "cores": float(np.mean([window.cores for window in level.windows])),
        "inferences": len(times_ms),
        "windows_per_s": rates,
        "text": f"{format_ms(pictures_per_s)} pictures/s{bounds}, p50 {'n/a' if p50 is None else format_ms(p50)} ms",
    }


def _interval(rates: Sequence[float], seed: int) -> tuple[float | None, float | None]:
    """Bounds of the mean rate, from a bootstrap over windows; None for fewer than MIN_ROUNDS."""
    if len(rates) < MIN_ROUNDS:
        return None, None
    picks = np.random.default_rng(seed).integers(len(rates), size=(RESAMPLES, len(rates)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.asarray(rates)[picks].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def _reason(last: Gain, settings: ThroughputSettings, *, shared: bool) -> str:
    """Why the climb ended, and what that means."""
    if last.small:
        return f"{last}: less than {GAIN:.0%} more, saturated"
    if shared:
        return f"{last}: not decided, the cores were shared with something else; close it and repeat"
    if last.large:
        cores = "the core" if settings.cores == 1 else f"the {settings.cores} cores"
        return f"{last}: not saturated; no more than twice {cores} are tried, a batch may bring more"
    return f"{last}: whether that is {GAIN:.0%} more is not decided; raise the duration"


def _shared(records: Sequence[dict[str, Any]], settings: ThroughputSettings) -> Iterator[str]:
    """Warn where as many callers as cores did not have the cores: then more callers gain by taking more of them."""
    full = [record for record in records if record["in_flight"] >= settings.cores]
    found = next((record for record in full if record["cores"] < SHARED * settings.cores), None)
    if found is not None:
        yield (
            f"{found['in_flight']} in flight had {found['cores']:.2f} of {settings.cores} core(s). Another program or "
            "virtual machine was probably running, and more in flight then gain by taking a larger share from it. "
            "Close it and repeat."
        )
