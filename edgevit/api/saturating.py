"""How many pictures per second a machine gets through: `throughput`, with more and more inferences in flight."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevit.artifact import Artifact
from edgevit.contracts import Arrays, ManyAtOnce, Runtime
from edgevit.errors import RuntimeFailure, UsageError
from edgevit.options import option_names

from .calibrating import Progress
from .running import RunOn, timed_session

if TYPE_CHECKING:
    from edgevit.bench.throughput import Clocks, Lanes

STREAMS = "streams"  # the option of a runtime that shares its threads among inferences by itself


def throughput(
    artifact: Artifact,
    on: RunOn,
    duration_s: float = 5.0,
    threads: int | None = None,
    progress: Progress = lambda fraction, text: None,
    *,
    batch: int | None = None,
    seed: int = 0,
    clocks: Clocks | None = None,
) -> dict[str, Any]:
    """Pictures per second of an artifact with 1, 2, 4, ... inferences in flight, until more gain less than 5 %.

    `threads` is how many cores to use in all, by default those of `on`, else all that this process may use. A runtime
    with the option `streams` has as many as are in flight, up to the cores; another is loaded with that share of the
    threads for each inference. `batch` is for an artifact whose batch is dynamic. `duration_s` is for each level in
    each of its two races: with the level below, and with the one above.

    Raises:
        UsageError: no number of threads, a batch that the artifact does not have. RuntimeFailure: the runtime takes one
        inference at a time, runs in another precision, or fails.
    """
    from edgevit.bench.throughput import ThroughputSettings, saturate

    cores = threads if threads is not None else on.threads if on.threads is not None else usable_cores()
    feed = {"image": _pictures(artifact, batch)}
    settings = ThroughputSettings(duration_s, cores, len(feed["image"]), seed)
    described: dict[str, Any] = {}

    @contextlib.contextmanager
    def open_level(in_flight: int) -> Iterator[Lanes]:
        with timed_session(artifact, shared_out(artifact, on, cores, in_flight)) as session:
            runtime = session.runtime
            session.require_precision(artifact.path)
            session.run(feed)  # checked once here; the timed calls go to the runtime itself
            described.update(runtime.describe(), effective_precision=runtime.effective_precision)
            yield _lanes(runtime, feed, in_flight, described)

    _many_at_once(timed_session(artifact, on).runtime)
    document = saturate(open_level, settings, clocks, progress)
    precision = described.pop("effective_precision")
    same = {key: value for key, value in described.items() if key not in ("threads", STREAMS)}  # those are the levels'
    return {**document, "effective_precision": precision, "runtime": same}


def shared_out(artifact: Artifact, on: RunOn, cores: int, in_flight: int) -> RunOn:
    """How a runtime is loaded for so many inferences in flight; streams that were asked for stay as they are."""
    if STREAMS not in option_names(timed_session(artifact, on).runtime.OPTIONS):
        return RunOn(on.runtime, max(1, cores // in_flight), on.options)
    return RunOn(on.runtime, cores, {STREAMS: min(in_flight, cores), **on.options})


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and no more than a container's limit."""
    from edgevit.bench.machine import container_cpu_limit

    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = container_cpu_limit()
    return own if limit is None else max(1, min(own, round(limit)))


def _pictures(artifact: Artifact, batch: int | None) -> NDArray[np.float32]:
    """The sample, repeated to the batch wanted."""
    sample, own = artifact.sample("input"), artifact.manifest["batch"]
    if batch is None or batch == own:
        return sample
    if own != "dynamic" or batch < 1:
        wanted = "a number above 0" if own == "dynamic" else own
        raise UsageError(
            f"{artifact.path}: throughput of batch {batch}, expected {wanted}; export it with --batch for another"
        )
    return np.resize(sample, (batch, *sample.shape[1:]))


def _many_at_once(runtime: Runtime) -> ManyAtOnce:
    if isinstance(runtime, ManyAtOnce):
        return runtime
    raise RuntimeFailure(
        f"runtime {runtime.name}: takes one inference at a time, so that its throughput cannot be measured; "
        "take its latency, or another runtime with --runtime"
    )


def _lanes(runtime: Runtime, feed: Arrays, in_flight: int, described: Mapping[str, Any]) -> Lanes:
    """Callers of a loaded runtime, one for each inference in flight, and what it says of itself."""
    from edgevit.bench.throughput import Lanes

    lanes = [_many_at_once(runtime).lane() for _ in range(in_flight)]
    calls = [lambda lane=lane: lane(feed) for lane in lanes]
    return Lanes(calls, described.get("threads"), described.get(STREAMS))
