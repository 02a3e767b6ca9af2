"""`api.saturating` and `api.starting`: real artifacts on real runtimes, and processes that answer from a script."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from edgevit.api import saturating, starting
from edgevit.api.running import RunOn
from edgevit.api.working import Job, Started
from edgevit.artifact import Artifact, load_artifact
from edgevit.bench.machine import container_cpu_limit
from edgevit.errors import RuntimeFailure, UnknownNameError, UsageError
from edgevit.runtimes import Session
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.ov import OvRuntime
from edgevit.runtimes.torch_eager import TorchRuntime

SHORT = 0.2  # seconds: ten milliseconds a window, some runs of the tiny network


@pytest.fixture
def artifact(tiny: Any) -> Artifact:
    """The tiny network for ONNX, batch 1."""
    return load_artifact(tiny.export().path)


# ---- throughput


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [("ort", [(1, 2, None), (2, 1, None), (4, 1, None)]), ("ov", [(1, 2, 1), (2, 2, 2), (4, 2, 2)])],
)
def test_cores_are_shared_out_as_the_runtime_can(runtime: str, expected: list[Any], artifact: Artifact) -> None:
    document = saturating.throughput(artifact, RunOn(runtime), SHORT, 2)

    got = [(level["in_flight"], level["threads"], level["streams"]) for level in document["levels"]]
    assert got == expected[: len(got)] and len(got) >= 2
    assert all(level["pictures_per_s"] > 0 and level["inferences"] > 0 for level in document["levels"])
    assert all(level["low"] <= level["pictures_per_s"] <= level["high"] for level in document["levels"])
    assert document["best"] in document["levels"]
    assert document["effective_precision"] == "fp32"
    assert document["runtime"]["runtime"] in ("onnxruntime", "openvino")
    assert (document["cores"], document["batch"]) == (2, 1)
    json.dumps(document, allow_nan=False)


def test_streams_that_were_asked_for_stay(artifact: Artifact) -> None:
    on = RunOn("ov", options={"streams": 1})
    assert saturating.shared_out(artifact, on, 4, 2) == RunOn("ov", 4, {"streams": 1})
    assert saturating.shared_out(artifact, RunOn("ov"), 4, 8) == RunOn("ov", 4, {"streams": 4})
    assert saturating.shared_out(artifact, RunOn("ort"), 6, 4) == RunOn("ort", 1, {})


def test_an_artifact_of_any_batch_is_fed_as_many_pictures_as_wanted(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true, fed = OrtRuntime.run, set[int]()

    def watched(self: OrtRuntime, inputs: Any) -> Any:
        fed.add(len(inputs["image"]))
        return true(self, inputs)

    dynamic = load_artifact(tiny.export(batch="dynamic").path)
    monkeypatch.setattr(OrtRuntime, "run", watched)
    document = saturating.throughput(dynamic, RunOn("ort"), SHORT, 1, batch=8)

    assert fed == {8}
    assert (document["batch"], document["levels"][0]["batch"]) == (8, 8)


@pytest.mark.parametrize("batch", [2, 0, -1])
def test_a_batch_that_an_artifact_does_not_have_is_refused(batch: int, artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=f"throughput of batch {batch}, expected 1; export it with --batch"):
        saturating.throughput(artifact, RunOn("ort"), SHORT, 1, batch=batch)


def test_an_empty_batch_is_refused_where_any_other_will_do(tiny: Any) -> None:
    dynamic = load_artifact(tiny.export(batch="dynamic").path)
    with pytest.raises(UsageError, match="throughput of batch 0, expected a number above 0"):
        saturating.throughput(dynamic, RunOn("ort"), SHORT, 1, batch=0)


@pytest.mark.parametrize(("duration_s", "threads"), [(0.0, 1), (float("nan"), 1), (1.0, 0), (1.0, -2)])
def test_senseless_settings_are_refused_before_anything_is_loaded(
    duration_s: float, threads: int, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtRuntime, "load", lambda self: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"^throughput: "):
        saturating.throughput(artifact, RunOn("ort"), duration_s, threads)


def test_a_runtime_that_takes_one_at_a_time_says_so(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Session(TorchRuntime(nn.Identity(), (64, 64)))
    monkeypatch.setattr(saturating, "timed_session", lambda *_: alone)
    with pytest.raises(RuntimeFailure) as caught:
        saturating.throughput(artifact, RunOn("ort"), SHORT, 1)
    assert str(caught.value) == (
        "runtime torch: takes one inference at a time, so that its throughput cannot be measured; take its latency, or "
        "another runtime with --runtime"
    )


def test_another_precision_than_the_one_asked_for_is_not_measured(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OvRuntime, "effective_precision", "bf16")
    with pytest.raises(RuntimeFailure, match="runs in bf16, expected fp32"):
        saturating.throughput(artifact, RunOn("ov"), SHORT, 1)


def test_what_emulates_is_neither_timed_nor_started(artifact: Artifact) -> None:
    for measure in (saturating.throughput, starting.cold_start):
        with pytest.raises(UsageError, match="runtime typed_ort computes what a device would compute"):
            measure(artifact, RunOn("typed_ort"))
        with pytest.raises(UnknownNameError):
            measure(artifact, RunOn("coreml"))


def test_a_failure_under_way_is_one_line(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = OrtRuntime.run, list[int]()

    def fail(self: OrtRuntime, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) > 50:
            raise RuntimeFailure("model.onnx: ONNX Runtime failed: out of memory")
        return true(self, inputs)

    monkeypatch.setattr(OrtRuntime, "run", fail)
    with pytest.raises(RuntimeFailure, match="out of memory"):
        saturating.throughput(artifact, RunOn("ort"), SHORT, 2)


def test_the_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = container_cpu_limit()
    own = len(os.sched_getaffinity(0))
    assert saturating.usable_cores() == (own if limit is None else max(1, min(own, round(limit))))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for told, expected in ((0.3, 1), (2.0, 2), (2.6, 3), (64.0, 8), (None, 8)):
        monkeypatch.setattr("edgevit.bench.machine.container_cpu_limit", lambda told=told: told)
        assert saturating.usable_cores() == expected


# ---- cold starts


class Scripted:
    """Stands for a process: its n-th start takes n ms more of everything."""

    jobs: list[Job]

    def __init__(self, job: Job) -> None:
        self.jobs.append(job)
        assert np.load(job.feed)["image"].dtype == np.float32
        n = len(self.jobs) - 2  # the first is not counted
        mb = 1 << 20
        self.started = Started(100.0 + n, 50.0 + n, 20.0 + n, 40 * mb, 60 * mb, (70 + n) * mb, "fp32", "fp32", {})

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def turn(self, runs: int) -> list[float]:
        return [2.0] * runs


@pytest.fixture
def scripted() -> Any:
    Scripted.jobs = []
    return Scripted


def test_the_record_of_eleven_starts(artifact: Artifact, scripted: Any) -> None:
    told: list[str] = []
    document = starting.cold_start(
        artifact, RunOn("ort", 1), progress=lambda _, text: told.append(text), worker=scripted
    )

    cold, memory = document["cold_start"], document["memory"]
    assert cold["starts"] == 11 and len(scripted.jobs) == 12
    assert cold["import_ms"]["text"] == "105 ms [101, 109]"
    assert cold["load_ms"]["text"] == "55.0 ms [51.0, 59.0]"
    assert cold["first_ms"]["text"] == "25.0 ms [21.0, 29.0]"
    assert cold["steady_ms"]["text"] == "2.00 ms [2.00, 2.00]"
    assert (cold["load_ms"]["p50"], cold["load_ms"]["p90"]) == (55.0, None)
    assert memory == {
        "before_load_bytes": 40 << 20, "loaded_bytes": 60 << 20, "peak_bytes": 75 << 20, "model_bytes": 35 << 20,
    }  # fmt: skip
    assert told[:2] == ["a first start, not counted", "start 1 of 11"] and told[-1] == "11 starts"
    assert {(job.runtime, job.path, job.precision, job.threads) for job in scripted.jobs} == {
        ("ort", artifact.model_file, "fp32", 1)
    }
    assert not scripted.jobs[0].feed.exists()  # nothing is left behind
    json.dumps(document, allow_nan=False)


def test_too_few_starts_support_no_median(artifact: Artifact, scripted: Any) -> None:
    cold = starting.cold_start(artifact, RunOn("ort"), 3, worker=scripted)["cold_start"]

    assert cold["load_ms"] == {
        "p50": None, "p90": None, "low": None, "high": None, "samples_ms": [50.0, 51.0, 52.0], "text": "n/a (needs 11)",
    }  # fmt: skip


def test_memory_that_the_system_does_not_tell_is_unknown(artifact: Artifact) -> None:
    class Silent(Scripted):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self.started = Started(1.0, 1.0, 1.0, None, 2 << 20 if len(self.jobs) > 2 else None, 1 << 20, "", "", {})

    Silent.jobs = []
    memory = starting.cold_start(artifact, RunOn("ort"), 4, worker=Silent)["memory"]  # type: ignore[arg-type]  # in a Worker's place
    assert memory == {
        "before_load_bytes": None, "loaded_bytes": None, "peak_bytes": 1 << 20, "model_bytes": None,
    }  # fmt: skip


@pytest.mark.parametrize("starts", [0, -1, 10_001])
def test_starts_are_bounded(starts: int, artifact: Artifact, scripted: Any) -> None:
    with pytest.raises(UsageError, match=f"cold start: {starts} starts, expected a number from 1 to 10000"):
        starting.cold_start(artifact, RunOn("ort"), starts, worker=scripted)
    assert scripted.jobs == []


def test_one_start_that_found_its_files_in_memory_makes_all_warm(
    artifact: Artifact, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dropped, expected in (
        ([False, True, True, True], "model files dropped"),
        ([True, True, False, True], "warm"),
        ([False] * 4, "warm"),
    ):
        answers = iter(dropped)
        monkeypatch.setattr(starting, "drop_from_cache", lambda _, answers=answers: next(answers))
        assert starting.cold_start(artifact, RunOn(), 3, worker=scripted)["cold_start"]["page_cache"] == expected


@pytest.mark.parametrize("runtime", ["ort", "ov"])
def test_a_real_artifact_is_started(runtime: str, artifact: Artifact) -> None:
    document = starting.cold_start(artifact, RunOn(runtime, 1), 2)

    cold, memory = document["cold_start"], document["memory"]
    assert all(min(cold[key]["samples_ms"]) > 0 for key in ("import_ms", "load_ms", "first_ms", "steady_ms"))
    assert min(cold["import_ms"]["samples_ms"]) > 10  # an interpreter and its libraries take longer than that
    assert cold["effective_precision"] == "fp32"
    assert cold["runtime"]["threads"] == 1
    assert 0 < memory["before_load_bytes"] < memory["loaded_bytes"] <= memory["peak_bytes"]
    assert memory["model_bytes"] == pytest.approx(memory["peak_bytes"] - memory["before_load_bytes"], rel=0.2)


def test_a_model_that_cannot_be_loaded_is_one_line(artifact: Artifact) -> None:
    artifact.model_file.write_bytes(b"no model")
    with pytest.raises(RuntimeFailure, match="cannot load it") as caught:
        starting.cold_start(artifact, RunOn("ort"), 2)
    assert "\n" not in str(caught.value)


# ---- the page cache


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(1 << 20))
    if not starting.drop_from_cache([file]):
        pytest.skip("this file system keeps its files in memory, or the system does not tell")
    assert not starting._cached(file)
    file.read_bytes()
    assert starting._cached(file)
    assert starting.drop_from_cache([file])


def test_what_is_not_there_or_cannot_be_dropped_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert starting.drop_from_cache([tmp_path / "gone"]) is False
    file = tmp_path / "file"
    file.write_bytes(b"x")
    (tmp_path / "empty").touch()
    assert starting.drop_from_cache([tmp_path / "empty"]) is True  # nothing of it to forget
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # a system that accepts and does nothing
    assert starting.drop_from_cache([file]) is False
    monkeypatch.delattr(os, "posix_fadvise")
    assert starting.drop_from_cache([file]) is False


# ---- the bounds of a median


@pytest.mark.parametrize(("count", "ranks"), [(5, None), (6, (0, 5)), (11, (1, 9)), (20, (5, 14)), (64, (23, 40))])
def test_the_bounds_of_a_median_are_those_of_the_sign_test(count: int, ranks: tuple[int, int] | None) -> None:
    samples = [float(value) for value in np.random.default_rng(count).permutation(count)]
    assert starting.median_bounds(samples) == (ranks or (None, None))


@pytest.mark.parametrize("count", [6, 11, 25])
def test_they_hold_the_median_of_a_skewed_distribution_as_often_as_they_say(count: int) -> None:
    draw = np.random.default_rng(7)
    held = 0
    for _ in range(2000):
        low, high = starting.median_bounds(list(draw.exponential(size=count)))
        assert low is not None and high is not None
        held += low <= np.log(2) <= high
    assert held / 2000 >= 0.94


def test_callers_get_what_they_type(artifact: Artifact) -> None:
    """The names and the order of what the benchmark verb passes on."""
    told: list[float] = []
    progress: Callable[[float, str], None] = lambda fraction, _: told.append(fraction)  # noqa: E731  # a line
    saturating.throughput(artifact, RunOn(), duration_s=SHORT, threads=1, progress=progress)
    assert told[0] == 0.0 and told[-1] == 1.0 and all(0 <= fraction <= 1 for fraction in told)
