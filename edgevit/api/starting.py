"""What it takes to start: `cold_start`, a model loaded again and again in fresh processes, and the memory it needs."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevit.artifact import Artifact
from edgevit.errors import UsageError

from .calibrating import Progress
from .running import RunOn
from .working import Job, Started, Worker, job_of

STARTS = 11  # as many as the median needs
MAX_STARTS = 10_000  # each takes a second or so
STEADY_RUNS = 11  # of each start, once it is warm: as many as the median needs
PERCENTILES = (50, 90)  # the 99th would need 662 starts
RISK = 0.025  # at each end of an interval of 95 %


def cold_start(
    artifact: Artifact,
    on: RunOn,
    starts: int = STARTS,
    progress: Progress = lambda fraction, text: None,
    worker: Callable[[Job], Worker] = Worker,
) -> dict[str, Any]:
    """Start an artifact in `starts` fresh processes, one after the other: what it takes until it runs, and its memory.

    `import_ms` is from the start of the process until the runtime's libraries are imported, `load_ms` the loading of
    the model, `first_ms` the first inference, `steady_ms` a later one. One start more comes before them and is not
    counted: it finds the libraries on the disk. The model's own files are dropped from the page cache before each start
    where the system can do it; `page_cache` says whether it did. Memory is resident: `model_bytes` is the peak until
    after the first inference less what the process had before loading, libraries that only load with a model included.

    Raises:
        UsageError: no number of starts, or a runtime that only emulates. RuntimeFailure: it cannot be loaded or run.
    """
    if not 1 <= starts <= MAX_STARTS:
        raise UsageError(f"cold start: {starts} starts, expected a number from 1 to {MAX_STARTS}")
    files = [file for file in artifact.path.rglob("*") if file.is_file()]
    told: list[Started] = []
    steady_ms: list[float] = []
    cold = True
    with tempfile.TemporaryDirectory(prefix="edgevit-start-") as scratch:
        job = job_of(artifact, on, Path(scratch))
        for index in range(starts + 1):
            progress(index / (starts + 1), f"start {index} of {starts}" if index else "a first start, not counted")
            dropped = drop_from_cache(files)
            with worker(job) as process:
                if index:
                    cold = cold and dropped
                    told.append(process.started)
                    steady_ms.append(float(np.median(process.turn(STEADY_RUNS))))
    progress(1.0, f"{starts} starts")
    return {"cold_start": _times(told, steady_ms, cold), "memory": _memory(told)}


def drop_from_cache(files: Sequence[Path]) -> bool:
    """Ask the system to forget what it keeps of `files` in memory, and tell whether it did, as far as it can be seen.

    What is not yet on the disk is written there first: only then can it be forgotten. A file system in memory, or a
    system without such a request, keeps all.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(handle)
    return not any(_cached(file) for file in files)


def _cached(file: Path) -> bool:
    """Whether a page of a file is in memory, by mincore(2); where the system does not tell, it is taken to be."""
    size = file.stat().st_size
    if size == 0:
        return False
    pages = (ctypes.c_ubyte * math.ceil(size / mmap.PAGESIZE))()
    with contextlib.suppress(OSError, AttributeError), file.open("rb") as stream:
        with mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            told: int = ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages)
            del view  # which keeps the mapping open
        return told != 0 or any(page & 1 for page in pages)
    return True


def _times(told: Sequence[Started], steady_ms: Sequence[float], cold: bool) -> dict[str, Any]:
    """The record of the times: percentiles, and the bounds of the median."""
    return {
        "starts": len(told),
        "import_ms": _figures([each.import_ms for each in told]),
        "load_ms": _figures([each.load_ms for each in told]),
        "first_ms": _figures([each.first_ms for each in told]),
        "steady_ms": _figures(steady_ms),
        "page_cache": "model files dropped" if cold else "warm",
        "effective_precision": told[0].effective_precision,
        "runtime": dict(told[0].described),
    }


def _figures(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Percentiles as far as the starts support them, bounds of the median with 95 % confidence, and all times."""
    from edgevit.bench.stats import format_ms, format_percentile, latency_percentiles

    found = latency_percentiles(samples_ms, PERCENTILES)
    low, high = median_bounds(samples_ms)
    text = format_percentile(found["p50"], 50)
    if found["p50"] is not None and low is not None and high is not None:
        text += f" ms [{format_ms(low)}, {format_ms(high)}]"
    return {**found, "low": low, "high": high, "samples_ms": list(samples_ms), "text": text}


def median_bounds(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """Two of the samples between which the median lies with at least 95 %, whatever its distribution; None below 6.

    Starts in fresh processes are taken for independent. By the sign test: each sample is as likely above as below.

    >>> median_bounds(range(11)), median_bounds(range(5))
    ((1, 9), (None, None))
    """
    n, beyond, below = len(samples), 0, 0.0
    while (below := below + math.comb(n, beyond) / 2**n) <= RISK:
        beyond += 1
    ordered = sorted(samples)
    return (ordered[beyond - 1], ordered[n - beyond]) if beyond else (None, None)


def _memory(told: Sequence[Started]) -> dict[str, Any]:
    """The record of the memory in bytes: medians over the starts; None where the system does not tell."""
    before = [each.before_load_bytes for each in told]
    peak = [each.peak_bytes for each in told]
    both = [None if b is None or p is None else p - b for b, p in zip(before, peak, strict=True)]
    return {
        "before_load_bytes": _middle(before),
        "loaded_bytes": _middle([each.loaded_bytes for each in told]),
        "peak_bytes": _middle(peak),
        "model_bytes": _middle(both),
    }


def _middle(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(np.median(known)) if len(known) == len(values) else None
