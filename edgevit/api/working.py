"""A model in a process of its own: `Worker`, this end of `edgevit.runtimes.worker`.

What is loaded afresh in a fresh process lies in memory anew, so that a race over several workers does not measure how
lucky one load was; and memory and start-up can be told of the model alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgevit import registry
from edgevit.artifact import Artifact
from edgevit.errors import RuntimeFailure, last_line
from edgevit.options import parse_options

from .running import RunOn, timed

if TYPE_CHECKING:
    from edgevit.bench.gate import Pair

MODULE = "edgevit.runtimes.worker"
ANSWER_S = 600.0  # for one answer: what has not loaded a model in ten minutes hangs
END_S = 5.0  # for a process to end by itself, once it is asked nothing more
READ = 1 << 16  # bytes of an answer read at a time
LONGEST = 64 << 20  # bytes of an answer: a turn of a million runs has 20 MB


@dataclass(frozen=True)
class Job:
    """What a worker loads: a registered runtime, a model file, and the inputs by name in a .npz file."""

    runtime: str
    path: Path
    precision: str
    feed: Path
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """What it took a worker to get ready; bytes are None where the system does not tell.

    `import_ms` is from the start of the process until the runtime's libraries were imported, `load_ms` the loading of
    the model, `first_ms` the first inference. `before_load_bytes` and `loaded_bytes` are resident memory before and
    after loading, `peak_bytes` the most until after the first inference.
    """

    import_ms: float
    load_ms: float
    first_ms: float
    before_load_bytes: int | None
    loaded_bytes: int | None
    peak_bytes: int | None
    asked_precision: str
    effective_precision: str
    described: Mapping[str, Any]


def job_of(artifact: Artifact, on: RunOn, scratch: Path, model_file: Path | None = None) -> Job:
    """What times an artifact, or in its place another `model_file`, on the artifact's sample; written into `scratch`.

    Raises:
        RuntimeFailure: this machine cannot run the target. UsageError: a runtime whose time is no device's.
    """
    name, path = timed(artifact, on, model_file)
    parse_options(registry.runtime_class(name).OPTIONS, f"runtime {name}", on.options)  # before any process starts
    sample = artifact.sample("input")
    feed = scratch / f"{hashlib.sha256(sample.tobytes()).hexdigest()}.npz"
    np.savez(feed, image=sample)
    return Job(name, path.resolve(), artifact.manifest["precision"], feed.resolve(), on.threads, on.options)


class Worker:
    """A process that has loaded `job`: `with Worker(job) as worker: worker.turn(5)`.

    Raises:
        RuntimeFailure: it cannot load or run the model, runs it in another precision than asked for, ends by itself, or
        does not answer.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._started: Started | None = None
        self._peak_bytes: int | None = None

    def __enter__(self) -> Worker:
        self.start()
        try:
            self.started  # noqa: B018  # waits until it is ready
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the process without waiting for it: several can load at the same time."""
        started_s = time.monotonic()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, with fixed arguments
            [sys.executable, "-P", "-m", MODULE],  # -P: nothing that lies in the current directory is imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is this process's affair, which then ends the other
        )
        job = self.job
        self._ask(
            {
                "runtime": job.runtime,
                "path": str(job.path),
                "precision": job.precision,
                "threads": job.threads,
                "options": dict(job.options),
                "feed": str(job.feed),
                "started_s": started_s,
            }
        )

    @property
    def started(self) -> Started:
        """What it took to get ready; waits until the model is loaded and has run once."""
        if self._started is None:
            self._started = Started(**self._answer())
            self._peak_bytes = self._started.peak_bytes
            asked, ran = self._started.asked_precision, self._started.effective_precision
            if ran != asked:
                raise RuntimeFailure(
                    f"{self.job.path}: runs in {ran}, expected {asked}; its numbers would be another model's"
                )
        return self._started

    def turn(self, runs: int) -> list[float]:
        """The times of `runs` inferences in ms; one more comes before them and is dropped."""
        self._ask({"runs": runs})
        answer = self._answer()
        self._peak_bytes = answer["peak_bytes"]
        times_ms: list[float] = answer["times_ms"]
        return times_ms

    def pin(self, cores: Collection[int]) -> None:
        """Keep all threads of the process on these cores, as far as the system lets it."""
        with contextlib.suppress(OSError, AttributeError):  # outside Linux there is neither /proc nor the call
            for thread in Path(f"/proc/{self._running().pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)

    def peak_bytes(self) -> int | None:
        """The most memory that the process has had in use up to its last answer."""
        return self._peak_bytes

    def close(self) -> None:
        """End the process; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin:
                process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            if process.stdout:
                process.stdout.close()
            if self._said:
                self._said.close()

    def _ask(self, message: Mapping[str, Any]) -> None:
        process = self._running()
        try:
            if process.stdin:
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _answer(self) -> dict[str, Any]:
        """The next line that the process writes."""
        stdout = self._running().stdout
        if stdout is None:
            raise self._ended()
        line, until_s = bytearray(), time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, until_s - time.monotonic())):
                    raise RuntimeFailure(
                        f"{self.job.path}: no answer from the process that runs it in {ANSWER_S:.0f} s"
                    )
                part = os.read(stdout.fileno(), READ)
                if not part or len(line) > LONGEST:
                    raise self._ended()
                line += part
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeFailure(answer["error"])
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeFailure(f"{self.job.path}: its process is not running")
        return self._process

    def _ended(self) -> RuntimeFailure:
        """Why the process is no more."""
        process, said = self._running(), ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        if self._said:
            self._said.seek(0)
            said = self._said.read(READ).decode(errors="replace").strip()
        code = process.returncode
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        why = f": {last_line(RuntimeError(said))}" if said else "; perhaps there was too little memory"
        return RuntimeFailure(f"{self.job.path}: the process that ran it ended by itself ({how}){why}")


@contextlib.contextmanager
def fresh_pair(first: Job, second: Job, order: random.Random) -> Iterator[Pair]:
    """Both loaded in fresh processes, which start at the same time, one or the other a little before.

    Where they use fewer threads than there are cores, both are kept on the same cores, drawn anew: what else runs on a
    core, here or on the same host, then slows both alike. Left to the system each stays where it is, one beside it.
    """
    workers = [Worker(first), Worker(second)]
    with contextlib.ExitStack() as stack:
        for worker in order.sample(workers, 2):
            stack.callback(worker.close)
            worker.start()
        for worker in workers:
            worker.started  # noqa: B018  # waits until it is ready
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if first.threads is not None and first.threads < len(cores):
            drawn = order.sample(cores, first.threads)
            for worker in workers:
                worker.pin(drawn)
        yield workers[0], workers[1]
