"""What trtexec prints, as numbers: the summary of a timing, warnings, whether it passed, version and device.

The lines are those of TensorRT 8.2 to 11.1 (`samples/common/sampleReporting.cpp`). A log is a stranger's text: nothing
in it is trusted to be a number, to be finite or to be there once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgevit.errors import InputError

MAX_MS = 3.6e6  # an hour: no query takes longer, and a number beyond it is damage
MAX_TEXT = 4000  # characters; names of fused layers list what was fused and reach thousands
MAX_MESSAGES = 20  # warnings and errors that are kept: a log may repeat one for every layer
LINE = re.compile(r"(?:\[[0-9/:-]{1,40}\] )?\[([IWEV])\] ?(.*)")
TAG = re.compile(r"\[TensorRT v([0-9]{1,6}|[0-9]{1,3}(?:\.[0-9]{1,6}){1,3})\]")
NUMBER = r"([-+0-9.einfa]{1,30})"  # whatever looks like one, NaN and infinity too: they are to be refused, not missed
STATISTIC = re.compile(r"(min|max|mean|median|percentile\(([0-9.]{1,8})%\)) = " + NUMBER + " ms", re.IGNORECASE)
QUERIES = re.compile(r"Timing trace has ([0-9]{1,12}) queries")
WARMUP = re.compile(r"Warmup completed ([0-9]{1,12}) queries")
THROUGHPUT = re.compile(r"Throughput: " + NUMBER + " qps")
SUMMARY = "=== Performance summary ==="
GRAPH_IGNORED = "launched without using CUDA graph launch"
SECTIONS = {  # the summary's lines, and what they are called here
    "Latency": "latency_ms",
    "Enqueue Time": "enqueue_ms",
    "H2D Latency": "h2d_ms",
    "GPU Compute Time": "compute_ms",
    "D2H Latency": "d2h_ms",
}
PATHS = ("--onnx", "--saveEngine", "--loadEngine", "--timingCacheFile", "--export", "--loadInputs", "--plugins")


@dataclass
class Log:
    """One log: what was found of each, None or empty where it was not. Times are milliseconds.

    `statistics` maps "latency_ms", "compute_ms", ... to {"min", "max", "mean", "median", "p90", ...}. `passed` is None
    where the log ends without a verdict. `flags` are those of the command that name no file; `graph_ignored` tells that
    the engine could not be captured in a CUDA graph, whatever they say.
    """

    version: str | None = None
    passed: bool | None = None
    timed: bool = False
    device: str | None = None
    compute_capability: str | None = None
    queries: int | None = None
    warmup_queries: int | None = None
    queries_per_s: float | None = None
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    flags: tuple[str, ...] | None = None
    graph_ignored: bool = False


def is_log(text: str) -> bool:
    """Tell whether `text` is something that trtexec printed."""
    return "TensorRT.trtexec" in text or SUMMARY in text


def read_log(place: str, text: str) -> Log:
    """Read a log; `place` is its name in messages.

    Raises:
        InputError: a number that is none, or more than one run.
    """
    if text.count(SUMMARY) > 1:
        raise InputError(f"{place}: {text.count(SUMMARY)} performance summaries; give one log for each run")
    log = Log(timed=SUMMARY in text)
    for line in text.splitlines():
        if line.startswith("&&&& "):
            _banner(log, line)
            continue
        found = LINE.fullmatch(line)
        if found is not None:
            _line(place, log, found[1], clean(found[2]))
    return log


def _banner(log: Log, line: str) -> None:
    verdict, _, command = line.removeprefix("&&&& ").partition(" TensorRT.trtexec")
    tag = TAG.search(line)
    if tag is not None:
        log.version = version_text(tag[1])
    if verdict in ("PASSED", "FAILED"):
        log.passed = verdict == "PASSED"
    elif verdict == "RUNNING":
        words = command.partition("# ")[2].split()
        log.flags = tuple(clean(word) for word in words if word.startswith("--") and not word.startswith(PATHS))


def _line(place: str, log: Log, level: str, text: str) -> None:
    if level == "E" and len(log.errors) < MAX_MESSAGES:
        log.errors.append(text)
    elif level == "W" and GRAPH_IGNORED in text:
        log.graph_ignored = True
    elif level == "W" and text.startswith("* ") and len(log.warnings) < MAX_MESSAGES:
        log.warnings.append(text[2:])
    elif level == "I":
        _information(place, log, text)


def _information(place: str, log: Log, text: str) -> None:
    key, _, rest = text.partition(": ")
    if key in SECTIONS:
        log.statistics[SECTIONS[key]] = {
            f"p{float(q):g}" if q else name: number(place, key, value) for name, q, value in STATISTIC.findall(rest)
        }
    elif key == "Throughput" and (found := THROUGHPUT.match(text)):
        log.queries_per_s = number(place, key, found[1], math.inf)
    elif key == "Selected Device":
        log.device = rest
    elif key == "Compute Capability":
        log.compute_capability = rest
    elif key == "TensorRT version" and log.version is None:
        log.version = rest
    elif found := QUERIES.match(text):
        log.queries = int(found[1])
    elif found := WARMUP.match(text):
        log.warmup_queries = int(found[1])


def version_text(tag: str) -> str:
    """The version of a banner's tag: 8602 is 8.6.2, 100300 is 10.3.0; one with dots stays.

    >>> version_text("8502"), version_text("101303"), version_text("8.6.1")
    ('8.5.2', '10.13.3', '8.6.1')
    """
    if "." in tag or len(tag) not in (4, 6):
        return tag
    minor = 1 if len(tag) == 4 else 2  # digits of the minor version
    return f"{int(tag[: -minor - 2])}.{int(tag[-minor - 2 : -2])}.{int(tag[-2:])}"


def number(place: str, what: str, value: object, limit: float = MAX_MS) -> float:
    """`value` as a finite number from 0 to `limit`, from a text or a JSON value.

    Raises:
        InputError: it is none.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        result = float(value)
    except (ValueError, OverflowError):
        raise InputError(f"{place}: {what} is {short(value)}, expected a number") from None
    if not 0 <= result <= limit or result == math.inf:
        raise InputError(f"{place}: {what} is {short(value)}, expected a number from 0 to {limit:g}")
    return result


def clean(text: str) -> str:
    """A stranger's text without what steers a terminal, cut to a length that a table can bear."""
    text = text[:MAX_TEXT]
    return (text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)).strip()


def short(value: object) -> str:
    """A value for a message of one line; what is nested is counted, not shown."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return clean(repr(value[:60] if isinstance(value, str) else value)[:60])


def percentiles_of(statistics: Mapping[str, float]) -> dict[str, float]:
    """The percentiles of a summary line; its median is p50."""
    found = {key: value for key, value in statistics.items() if key.startswith("p")}
    return ({"p50": statistics["median"]} if "median" in statistics else {}) | found
