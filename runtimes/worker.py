"""A model in a process of its own: `python -m edgevit.runtimes.worker`, the other end of `edgevit.api.Worker`.

A line of JSON comes in on stdin, a line goes out on stdout. The first says what to load, each later one asks for runs:

    {"runtime": "ort", "path": ..., "precision": ..., "threads": ..., "options": {}, "feed": "in.npz", "started_s": ...}
    {"runs": 5}

A line {"error": ...} answers what failed, after which the process ends; so does the end of stdin, whoever asks no more.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgevit import registry
from edgevit.errors import EdgevitError
from edgevit.options import parse_options

from .session import Session


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native libraries print goes to stderr: stdout carries answers alone
    lines = iter(sys.stdin)
    try:
        _serve(json.loads(next(lines)), lines, answers)
    except EdgevitError as error:
        _answer(answers, {"error": str(error)})


def _serve(job: dict[str, Any], lines: Any, answers: IO[str]) -> None:
    """Load what `job` says and take turns."""
    cls = registry.runtime_class(job["runtime"])
    if obstacle := cls.obstacle():
        _answer(answers, {"error": f"{job['path']}: {obstacle}"})
        return
    options = parse_options(cls.OPTIONS, f"runtime {job['runtime']}", job["options"])
    imported_s = time.monotonic()  # the clock of the whole machine: the other end read it when it started this process
    before_load_bytes = _resident("VmRSS")
    with np.load(job["feed"], allow_pickle=False) as stored:
        feed = {name: stored[name] for name in stored.files}
    runtime = cls(Path(job["path"]), job["threads"], job["precision"], options)
    loading_s = time.monotonic()
    with Session(runtime) as session:
        loaded_s, loaded_bytes = time.monotonic(), _resident("VmRSS")
        session.run(feed)  # checks the input, once: turns go to the runtime itself
        first_s = time.monotonic()
        started = {
            "import_ms": 1000 * (imported_s - job["started_s"]),
            "load_ms": 1000 * (loaded_s - loading_s),
            "first_ms": 1000 * (first_s - loaded_s),
            "before_load_bytes": before_load_bytes,
            "loaded_bytes": loaded_bytes,
            "peak_bytes": peak_bytes(),
            "asked_precision": runtime.asked_precision,
            "effective_precision": runtime.effective_precision,
            "described": runtime.describe(),
        }
        _answer(answers, started)
        gc.collect()
        gc.disable()  # the collector is no part of an inference
        for line in lines:
            runtime.run(feed)  # dropped: it finds the caches full of what ran in between
            times_ms = []
            for _ in range(json.loads(line)["runs"]):
                start = time.perf_counter()
                runtime.run(feed)
                times_ms.append((time.perf_counter() - start) * 1000)
            _answer(answers, {"times_ms": times_ms, "peak_bytes": peak_bytes()})
        os._exit(0)  # nothing is left to write; taking the libraries down would take a quarter of a second


def peak_bytes() -> int | None:
    """The most memory that this process has had in use so far."""
    own = _resident("VmHWM")
    if own is not None:
        return own
    unit = 1 if sys.platform == "darwin" else 1024  # macOS tells bytes, the others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident(key: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _answer(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
