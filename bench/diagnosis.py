"""What differs between the machines of two runs and could explain a shift, to be looked at before the model is blamed.

The records are those of `machine.machine_record`, possibly read from a file: what is not of the expected type is passed
over. "was" is the former run, "is" the later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .machine import known_flags, plain
from .watch import CLOCK_FALL, STEAL_SHARE

WARMER_C = 10.0  # a record shows one moment, before or after a load of seconds
LOAD_PER_CORE = 0.5  # with half the cores taken, a run that uses all of them must share
NAMES_SHOWN = 64  # variables or libraries compared: a stranger's record may list any number

_SAME_MACHINE = "Times of different processors do not compare; measure both on one."
_LIMITS = "Threads beyond the limit wait for each other. Give both runs the same limits, or set the threads to it."
_CLOCK = "The clock follows it. Set both alike and repeat."
FACTS = (  # key, what it is called, what it means and what to do; in the order of how much they explain
    ("cpu_model", "the processor", _SAME_MACHINE),
    ("architecture", "the architecture", _SAME_MACHINE),
    ("board", "the board", _SAME_MACHINE),
    ("logical_cores", "the number of cores", _SAME_MACHINE),
    ("affinity_cores", "the number of cores allowed", _LIMITS),
    ("container_cpu_limit", "the container's CPU limit", _LIMITS),
    ("container_memory_limit_bytes", "the container's memory limit", "Less memory means more reading. Set both alike."),
    ("cpu_governor", "the frequency governor", _CLOCK),
    ("turbo", "turbo", _CLOCK),
    ("cpu_frequency_max_mhz", "the highest clock allowed", _CLOCK),
    ("smt", "simultaneous multithreading", "Two threads then share a core. Set both alike and repeat."),
)
LIMITS = ("container_cpu_limit", "container_memory_limit_bytes")  # absent means none; of the others, unknown
_KERNEL = "Scheduling and mitigations differ between kernels. Repeat the former run on this one."


def diagnose(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what differs between two runs and could explain a shift of their times, with the next step of each.

    `before` and `after` are each a machine record, or the pair {"before": record, "after": record} that is stored with
    a result; steal is told of pairs alone, since a single record has no time span. Of load, frequency and temperature
    only differences that matter are told, in either direction. Nothing told means that nothing known differs.
    """
    (then, then_end), (now, now_end) = _ends(before), _ends(after)
    if not then or not now:
        return ()
    return (
        *_facts(then, now),
        *_instructions(then, now),
        *_each(then, now, "thread_settings", "unset", "It decides how threads compute. Set both alike and repeat."),
        *_each(then, now, "libraries", None, "Kernels change between releases. Repeat with the former one."),
        *_differs("the kernel", _text(then, "kernel"), _text(now, "kernel"), _KERNEL),
        *_clock(then_end, now_end),
        *_temperature(then_end, now_end),
        *_load(then, now),
        *_steal(_steal_share(then, then_end), _steal_share(now, now_end)),
    )


def _ends(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the records at the start and the end of a run; of a single record that one, twice."""
    start, end = (record.get(key) for key in ("before", "after"))
    if isinstance(start, Mapping) or isinstance(end, Mapping):
        start, end = (each if isinstance(each, Mapping) else {} for each in (start, end))
        return start or end, end or start
    return record, record


def _facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key, label, meaning in FACTS:
        was, now_is = _text(then, key), _text(now, key)
        if key in LIMITS:
            was, now_is = was or "none", now_is or "none"
        yield from _differs(label, was, now_is, meaning)


def _differs(label: str, was: str | None, now_is: str | None, meaning: str) -> Iterator[str]:
    if was is not None and now_is is not None and was != now_is:
        yield f"{label} was {was}, is {now_is}. {meaning}"


def _instructions(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Tell which instruction sets are seen in one record only."""
    was, now_is = (_flags(record) for record in (then, now))
    if was is None or now_is is None or was == now_is:
        return
    lost, gained = " ".join(sorted(was - now_is)), " ".join(sorted(now_is - was))
    seen = "; ".join(text for text in (lost and f"without {lost}", gained and f"with {gained}") if text)
    yield f"the processor's instruction sets are other ones: now {seen}. Kernels are chosen by them. {_SAME_MACHINE}"


def _each(then: Mapping[str, Any], now: Mapping[str, Any], key: str, absent: str | None, meaning: str) -> Iterator[str]:
    """Tell of each name of a table in a record; what one of them lacks is `absent`, or passed over if that is None."""
    was, now_is = then.get(key), now.get(key)
    if not isinstance(was, Mapping) or not isinstance(now_is, Mapping):
        return
    for name in list(dict.fromkeys([*was, *now_is]))[:NAMES_SHOWN]:
        yield from _differs(str(plain(str(name))), _text(was, name) or absent, _text(now_is, name) or absent, meaning)


def _clock(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    was, now_is = (_number(record, "cpu_frequency_highest_mhz") for record in (then, now))
    if was and now_is and abs(now_is / was - 1) > CLOCK_FALL:
        yield (
            f"the clock of the fastest core was {was:.0f} MHz, is {now_is:.0f} MHz. Heat, a power limit or the "
            "governor probably holds the slower one down. Bring both to the same clock and repeat."
        )


def _temperature(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    was, now_is = (_number(record, "cpu_temperature_c") for record in (then, now))
    if was is not None and now_is is not None and abs(now_is - was) >= WARMER_C:
        yield (
            f"the chip was at {was:.0f} degrees Celsius, is at {now_is:.0f}. A hot chip lowers its clock. Let it cool, "
            "or cool it, and repeat."
        )


def _load(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    was, now_is = (_number(record, "load_average_1min") for record in (then, now))
    cores_were, cores = (_number(record, "logical_cores") for record in (then, now))
    if was is None or now_is is None or not cores_were or not cores:
        return
    if abs(now_is / cores - was / cores_were) > LOAD_PER_CORE:
        yield (
            f"the load average before the run was {was:.2f} on {cores_were:.0f} cores, is {now_is:.2f} on {cores:.0f}. "
            "Other programs probably ran beside the busier run. Close them and repeat."
        )


def _steal(was: float | None, now_is: float | None) -> Iterator[str]:
    if was is not None and now_is is not None and abs(now_is - was) > STEAL_SHARE:
        yield (
            f"the hypervisor took away {was:.1%} of the CPU time then and {now_is:.1%} now (steal). Another virtual "
            "machine on the same host is probably busy. Repeat later; trust ratios more than times."
        )


def _steal_share(start: Mapping[str, Any], end: Mapping[str, Any]) -> float | None:
    """Return what share of the CPU time was stolen between two records; None if no time passed, or a restart."""
    stolen, stolen_end = (_number(record, "steal_ticks") for record in (start, end))
    ticks, ticks_end = (_number(record, "cpu_ticks") for record in (start, end))
    if stolen is None or stolen_end is None or ticks is None or ticks_end is None or ticks_end <= ticks:
        return None
    return (stolen_end - stolen) / (ticks_end - ticks) if stolen_end >= stolen else None


def _flags(record: Mapping[str, Any]) -> set[str] | None:
    flags = known_flags(record)
    return None if flags is None else set(flags)


def _text(record: Mapping[str, Any], key: str) -> str | None:
    """Return a value as it is printed; None where it is absent or no text, number or switch."""
    value = record.get(key)
    if isinstance(value, bool):
        return "on" if value else "off"
    short = plain(value)
    return None if short is None else f"{short:g}" if isinstance(short, float) else str(short)


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = plain(record.get(key))
    return None if value is None or isinstance(value, str) or value < 0 else float(value)
