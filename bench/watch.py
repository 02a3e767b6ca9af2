"""Whether the machine stayed the same during a run, and what differs between the machines of two runs.

`look` is taken before the first round and after each; `changes` turns the looks into reasons to doubt the run. Another
load is the busy time of the cores less this process's own and its descendants', so that a run which uses every core is
no load on itself. What cannot be read gives no reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Literal

from .machine import (
    ROOT,
    allowed_cores,
    control_groups,
    core_folders,
    cpu_temperature_c,
    cpu_ticks,
    frequencies_mhz,
    read,
    temperature_files,
)

WINDOW_S = 1.0  # rounds are judged by the second: 100 ticks of a core, of which rounding and sampling take a few
LOAD_SHARE = 0.05  # of the cores' time over the run: a twentieth is what `drift` takes for a difference
LOAD_BURST = 0.10  # of a second: daemons that wake up now and then stay below it, a compiler does not
MIN_LOAD_TICKS = 10  # a tick is 10 ms; the kernel samples who runs at ticks, and is wrong by several of them
STEAL_SHARE = 0.01  # one sample in a hundred hit is enough to move p99
STEAL_BURST = 0.05  # of a second: 1 % is usual on shared hosts
MIN_STEAL_TICKS = 5  # fewer are the rounding of the counters
THROTTLED_SHARE = 0.01  # as for steal: what is held back is held back for most of a period of 100 ms
THROTTLED_BURST = 0.05  # one period in ten stopped for half of it
CLOCK_FALL = 0.10  # processors step by 100 MHz, two or three steps up and down are usual
CLOCK_ROUNDS = 5  # readings whose median stands for a stretch: it survives two taken at an idle moment
HEAT_C = 5.0  # a rise that is no noise: sensors tell whole degrees and swing by two or three
MAX_FREQUENCY_FILES = 32  # each takes some 10 us, and all of a look shall stay below 1 ms
TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01  # 100 a second on every Linux in use

Kind = Literal["steal", "load", "frequency", "temperature", "throttling", "governor"]
Window = tuple[int, int]  # the moments at its ends: the rounds first + 1 to last, counted from 1


@dataclass(frozen=True)
class Moment:
    """Counters of one moment; None where unreadable.

    Ticks are those since boot of `cores`, the cores this process may run on. `own_s` is the CPU time of this process
    and its descendants, waited for or not; `throttled_s` how long the CPU limit of the control groups held some thread
    back, summed over cores; `frequency_mhz` that of the fastest core, which is the one at work.
    """

    at_s: float
    cores: tuple[int, ...] = ()
    ticks: int | None = None
    busy_ticks: int | None = None
    steal_ticks: int | None = None
    own_s: float | None = None
    throttled_s: float | None = None
    frequency_mhz: float | None = None
    temperature_c: float | None = None
    governor: str | None = None


@dataclass(frozen=True)
class Change:
    """One reason to doubt a run: `text` says what was seen and when, the likely cause and the next step."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class _Places:
    """Where this machine keeps what changes: found once, read in each look."""

    frequency: tuple[Path, ...]
    governor: Path | None
    temperature: tuple[Path, ...]
    cpu_stat: tuple[Path, ...]


def look(root: Path = ROOT, clock: Callable[[], float] = time.monotonic) -> Moment:
    """Return the counters of now. Takes a fraction of a millisecond, so that it can be called in each round."""
    at_s, cores = clock(), allowed_cores(root)
    ticks, places = cpu_ticks(root, cores), _places(root)
    return Moment(
        at_s=at_s,
        cores=cores,
        ticks=ticks.total if ticks else None,
        busy_ticks=ticks.busy if ticks else None,
        steal_ticks=ticks.steal if ticks else None,
        own_s=_own_s(root),
        throttled_s=_throttled_s(places.cpu_stat),
        frequency_mhz=max(frequencies_mhz(places.frequency), default=None),
        temperature_c=cpu_temperature_c(places.temperature),
        governor=read(places.governor) if places.governor else None,
    )


def changes(moments: Sequence[Moment]) -> tuple[Change, ...]:
    """Return what changed or was wrong while `moments` were taken: before the first round and after each.

    Rounds are judged in stretches of a second, and all of them together: what was there throughout is a reason too.
    """
    if len(moments) < 2:
        return ()
    return tuple(
        change
        for check in (_steal, _load, _throttling, _clock, _governor)
        for change in check(moments, _windows(moments, 1))
    )


@lru_cache(maxsize=4)  # one machine, and the trees of tests
def _places(root: Path) -> _Places:
    folders = [folder / "cpufreq" for folder in core_folders(root, allowed_cores(root))]
    shown = [folder for folder in folders if (folder / "scaling_cur_freq").exists()]
    step = -(-len(shown) // MAX_FREQUENCY_FILES) or 1
    return _Places(
        frequency=tuple(folder / "scaling_cur_freq" for folder in shown[::step]),
        governor=shown[0] / "scaling_governor" if shown else None,
        temperature=tuple(temperature_files(root)),
        cpu_stat=tuple(p for folder in control_groups(root, "cpu") if (p := folder / "cpu.stat").exists()),
    )


def _own_s(root: Path) -> float:
    """Return the CPU time of this process, of its children that were waited for, and of all that still live."""
    times = os.times()
    own = time.process_time() + times.children_user + times.children_system
    newest = (read(root / "proc/loadavg") or "").rpartition(" ")[2]
    family = _descendants(root, os.getpid(), int(newest)) if newest.isdecimal() else ()
    stats = (_stat(root, pid) for pid in family)
    return own + TICK_S * sum(sum(map(int, stat[11:15])) for stat in stats if stat)  # utime stime cutime cstime


@lru_cache(maxsize=4)  # one machine, and the trees of tests
def _descendants(root: Path, own: int, newest: int) -> tuple[int, ...]:
    """Return the children of process `own` and theirs, as of when `newest` was the last process started.

    As long as it is the last, nobody has got a child. Only processes younger than this one are read; where the numbers
    started anew since, all are.
    """
    numbers = sorted(int(path) for path in _listed(root / "proc") if path.isdecimal())
    parents = {pid: int(stat[1]) for pid in numbers if (pid > own or newest < own) and (stat := _stat(root, pid))}
    family, found = {own}, 0
    while len(family) > found:
        found = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return tuple(sorted(family - {own}))


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  # the names are enough, and Path.iterdir takes longer
    except OSError:
        return []


def _stat(root: Path, pid: int) -> list[str] | None:
    """Return the words of /proc/PID/stat after the name, which may hold blanks and brackets; None once it is gone."""
    words = (read(root / "proc" / str(pid) / "stat") or "").rpartition(")")[2].split()
    return words if len(words) > 14 and all(word.isdecimal() for word in (words[1], *words[11:15])) else None


def _throttled_s(files: Iterable[Path]) -> float | None:
    """Return the time that the CPU limits of all groups held threads back: microseconds in version 2, else nano-."""
    found = []
    for file in files:
        for line in (read(file) or "").splitlines():
            name, _, value = line.partition(" ")
            if name in ("throttled_usec", "throttled_time") and value.isdecimal():
                found.append(int(value) / (1e6 if name == "throttled_usec" else 1e9))
    return sum(found) if found else None


def _windows(moments: Sequence[Moment], rounds: int) -> list[Window]:
    """Cut the rounds into stretches of WINDOW_S and `rounds` at least; what is left goes to the last."""
    windows: list[Window] = []
    first = 0
    for last in range(1, len(moments)):
        if last - first >= rounds and moments[last].at_s - moments[first].at_s >= WINDOW_S:
            windows.append((first, last))
            first = last
    kept, start = windows[:-1], windows[-1][0] if windows else 0
    return [*kept, (start, len(moments) - 1)]


def _when(hit: Sequence[Window], rounds: int) -> str:
    """Say in which rounds: "throughout the run", "in rounds 3-4 and 9 of 50"."""
    joined: list[list[int]] = []
    for first, last in hit:
        if joined and joined[-1][1] == first:
            joined[-1][1] = last
        else:
            joined.append([first, last])
    if joined == [[0, rounds]]:
        return "throughout the run"
    spans = [f"{first + 1}-{last}" if last - first > 1 else f"{last}" for first, last in joined]
    if len(spans) > 3:  # more are no longer read
        count = sum(last - first for first, last in joined)
        return f"in {count} of {rounds} rounds, from {joined[0][0] + 1} to {joined[-1][1]}"
    word = "round" if spans == [f"{joined[0][1]}"] else "rounds"
    return f"in {word} {' and '.join(spans)} of {rounds}"


@dataclass(frozen=True)
class _Rule:
    """`amount` of two moments is a part and what it is a part of, or None. Below `least` a part is noise."""

    amount: Callable[[Moment, Moment], tuple[float, float] | None]
    share: float
    burst: float
    least: float

    def broken(self, moments: Sequence[Moment], windows: Sequence[Window]) -> tuple[float, float, str] | None:
        """Return the part, what it is a part of, and when: in windows over `burst`, else in all if over `share`."""
        parts = [(w, part) for w in windows if (part := self.amount(moments[w[0]], moments[w[1]]))]
        hit = [(w, part) for w, part in parts if part[0] >= self.least and part[0] > self.burst * part[1]]
        if hit:
            rounds = len(moments) - 1
            return sum(p[0] for _, p in hit), sum(p[1] for _, p in hit), _when([w for w, _ in hit], rounds)
        whole = self.amount(moments[0], moments[-1])
        if whole and whole[0] >= self.least and whole[0] > self.share * whole[1]:
            return *whole, "over the whole run"
        return None


def _stolen(a: Moment, b: Moment) -> tuple[float, float] | None:
    if a.ticks is None or b.ticks is None or a.steal_ticks is None or b.steal_ticks is None or a.cores != b.cores:
        return None
    return b.steal_ticks - a.steal_ticks, b.ticks - a.ticks


def _others(a: Moment, b: Moment) -> tuple[float, float] | None:
    """Ticks of other programs: the busy time of the cores, less the own.

    Busy time is known in two ways, and the smaller one is taken. Most kernels ask at ticks who runs, which errs by far
    where threads wake in step with them; what was not idle is exact, but holds the time that a suspended or paused
    machine slept. Where own time got lost (a child that nobody waited for), nothing is known.
    """
    if a.busy_ticks is None or b.busy_ticks is None or a.ticks is None or b.ticks is None or a.cores != b.cores:
        return None
    if a.own_s is None or b.own_s is None or b.own_s < a.own_s:
        return None
    passed, busy = b.ticks - a.ticks, float(b.busy_ticks - a.busy_ticks)
    if a.cores:
        busy = min(busy, len(a.cores) * (b.at_s - a.at_s) / TICK_S - (passed - busy))
    return busy - (b.own_s - a.own_s) / TICK_S, passed


def _held_back(a: Moment, b: Moment) -> tuple[float, float] | None:
    return None if a.throttled_s is None or b.throttled_s is None else (b.throttled_s - a.throttled_s, b.at_s - a.at_s)


STEAL = _Rule(_stolen, STEAL_SHARE, STEAL_BURST, MIN_STEAL_TICKS)
LOAD = _Rule(_others, LOAD_SHARE, LOAD_BURST, MIN_LOAD_TICKS)
THROTTLING = _Rule(_held_back, THROTTLED_SHARE, THROTTLED_BURST, 0)


def _steal(moments: Sequence[Moment], windows: Sequence[Window]) -> Iterator[Change]:
    if broken := STEAL.broken(moments, windows):
        stolen, passed, when = broken
        yield Change(
            "steal",
            f"{stolen / passed:.1%} of the CPU time was taken away by the hypervisor (steal) {when}. Another virtual "
            "machine on the same host is probably busy. Repeat later; trust ratios more than times.",
        )


def _load(moments: Sequence[Moment], windows: Sequence[Window]) -> Iterator[Change]:
    if broken := LOAD.broken(moments, windows):
        others, passed, when = broken
        count = len(moments[0].cores)
        cores = f" of {count} core{'s' if count > 1 else ''}" if count else ""
        yield Change(
            "load",
            f"other programs used {others / passed:.0%} of the CPU time{cores} {when}. Another job is probably running "
            "on this machine. Close it and repeat; trust ratios more than times.",
        )


def _throttling(moments: Sequence[Moment], windows: Sequence[Window]) -> Iterator[Change]:
    if broken := THROTTLING.broken(moments, windows):
        held_s, _, when = broken
        yield Change(
            "throttling",
            f"the CPU limit of the container held threads back for {held_s:.2f} s, summed over cores, {when}. More "
            "threads probably ran than it allows cores. Use fewer threads, or raise the limit.",
        )


def _clock(moments: Sequence[Moment], _: Sequence[Window]) -> Iterator[Change]:
    """The fastest core's clock was lower in some stretches than in others; with heat it is the heat."""
    if len(moments) <= CLOCK_ROUNDS or any(moment.frequency_mhz is None for moment in moments):
        return
    rated: list[tuple[Window, float, float | None]] = []
    for first, last in _windows(moments, CLOCK_ROUNDS):
        part = moments[first + 1 : last + 1]
        heat = [m.temperature_c for m in part if m.temperature_c is not None]
        mhz = median(m.frequency_mhz for m in part if m.frequency_mhz is not None)
        rated.append(((first, last), mhz, median(heat) if heat else None))
    best = max(rated, key=lambda each: each[1])
    slow = [each for each in rated if each[1] < (1 - CLOCK_FALL) * best[1]]
    if not slow:
        return
    worst = min(slow, key=lambda each: each[1])
    when = _when([window for window, _, _ in slow], len(moments) - 1)
    seen = f"the clock was at {worst[1]:.0f} MHz {when}, at {best[1]:.0f} MHz at its best"
    cool, hot = best[2], worst[2]
    if cool is not None and hot is not None and hot - cool >= HEAT_C:
        yield Change(
            "temperature",
            f"{seen}, and the chip at {hot:.0f} degrees Celsius instead of {cool:.0f}. It probably lowers its clock "
            "to cool down. Let it cool, or cool it, and repeat.",
        )
    elif slow[-1][0][1] <= best[0][0]:
        yield Change(
            "frequency",
            f"{seen}. It was probably still rising. Set the governor to performance, or raise the "
            "duration, and repeat.",
        )
    else:
        yield Change(
            "frequency",
            f"{seen}. A power limit or the governor probably lowered it. Set the governor to performance, check the "
            "power supply, and repeat.",
        )


def _governor(moments: Sequence[Moment], _: Sequence[Window]) -> Iterator[Change]:
    for index in range(1, len(moments)):
        before, after = moments[index - 1].governor, moments[index].governor
        if before is not None and after is not None and before != after:
            yield Change(
                "governor",
                f"the frequency governor went from {before} to {after} in round {index} of {len(moments) - 1}. A power "
                "daemon or another user probably set it. Set it back and repeat.",
            )
            return
