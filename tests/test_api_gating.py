"""`edgevit gate` on scripted times: what is compared, what is refused, what is stored, and the exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import api
from edgevit.api import gating
from edgevit.api.working import fresh_pair
from edgevit.errors import ArtifactError, InputError, OutputError, RuntimeFailure, UsageError


class Scripted:
    """Stands for fresh processes: a job takes the ms that are set for its path, times the luck of each load."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.spread = 0.005
        self.draw = np.random.default_rng(0)
        self.jobs: list[Any] = []

    def lane(self, job: Any) -> Any:
        ms = next((ms for part, ms in self.ms.items() if part in str(job.path)), 10.0)
        ms *= math.exp(self.spread * self.draw.standard_normal())

        class Lane:
            def turn(self, runs: int) -> list[float]:
                return [ms] * runs

        return Lane()

    @contextlib.contextmanager
    def pair(self, first: Any, second: Any, order: Any) -> Iterator[Any]:  # noqa: ARG002  # the signature of what it stands for
        jobs = (first, second)
        self.jobs.append(jobs)
        yield tuple(self.lane(job) for job in jobs)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted()
    monkeypatch.setattr(gating, "fresh_pair", script.pair)
    return script


@pytest.fixture
def two(tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    """An artifact and a copy of it."""
    path = tiny.export().path
    return path, Path(shutil.copytree(path, tmp_path / "changed" / path.name))


def edited(artifact: Path, **fields: Any) -> Path:
    """The artifact with fields of its manifest replaced."""
    place = artifact / "manifest.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))
    return artifact


# ---- side by side


def test_the_same_artifact_passes(scripted: Scripted, two: tuple[Path, Path]) -> None:
    report = api.gate(*two)
    assert report["verdict"] == "pass"
    assert report["compared"] == "side by side"
    assert [check["what"] for check in report["checks"]] == ["latency", "accuracy", "size", "parameters", "macs"]
    assert [check["verdict"] for check in report["checks"]] == ["pass", "not gated", "pass", "pass", "pass"]
    assert len(report["rounds_ms"]) == len(report["log_ratios"]) == report["rounds"] == len(scripted.jobs) == 10
    json.dumps(report, allow_nan=False)


def test_a_slower_candidate_is_a_regression(scripted: Scripted, two: tuple[Path, Path]) -> None:
    scripted.ms["changed"] = 11.0
    report = api.gate(*two, max_slowdown=0.05)
    latency = report["checks"][0]
    assert report["verdict"] == latency["verdict"] == "regression"
    assert latency["worse"] == pytest.approx(0.10, abs=0.02)
    assert latency["low"] > 0.05
    assert report["text"][0].startswith("regression: ")
    assert "edgevit gate: regression" in report["markdown"]


def test_noise_beyond_the_limit_is_inconclusive(scripted: Scripted, two: tuple[Path, Path]) -> None:
    scripted.spread, scripted.ms["changed"] = 1.0, 10.5
    report = api.gate(*two)
    assert report["verdict"] == "inconclusive"
    assert report["smallest_seen"] > 0.05


def test_more_parameters_are_a_regression_though_it_is_no_slower(scripted: Scripted, two: tuple[Path, Path]) -> None:  # noqa: ARG001  # for its effect
    counts = json.loads((two[1] / "manifest.json").read_text())["complexity"]
    edited(two[1], complexity={**counts, "parameters": counts["parameters"] + 1})
    assert api.gate(*two)["verdict"] == "regression"
    assert api.gate(*two, max_parameters=0.5)["verdict"] == "pass"


def test_lost_accuracy_is_a_regression_though_the_time_is_not_clear(scripted: Scripted, two: tuple[Path, Path]) -> None:
    scripted.spread, scripted.ms["changed"] = 1.0, 10.5
    counts = json.loads((two[1] / "manifest.json").read_text())["complexity"]
    edited(two[1], complexity={**counts, "macs": counts["macs"] * 2})
    assert api.gate(*two)["verdict"] == "regression"


def test_the_threads_and_the_runtime_reach_the_processes(scripted: Scripted, two: tuple[Path, Path]) -> None:
    api.gate(*two, threads=3, runtime="ort")
    assert {(job.threads, job.runtime, job.precision) for jobs in scripted.jobs for job in jobs} == {(3, "ort", "fp32")}


def test_other_work_is_refused(scripted: Scripted, tiny: Any, two: tuple[Path, Path]) -> None:
    other = tiny.export(image_size=(32, 32)).path
    with pytest.raises(UsageError, match=r"image size 32x32, expected one of 64x64"):
        api.gate(two[0], other)
    assert scripted.jobs == []


def test_a_damaged_artifact_is_refused_before_anything_runs(scripted: Scripted, two: tuple[Path, Path]) -> None:
    (two[1] / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"model.onnx"):
        api.gate(*two)
    assert scripted.jobs == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"max_slowdown": -1}, "max_slowdown -1: expected a number from 0 to 1"),
        ({"max_drop_points": 101}, "max_drop_points 101"),
        ({"budget_s": 0}, "budget 0: expected a number of seconds above 0"),
        ({"threads": 0}, "gate: threads 0, expected a number above 0"),
        ({"update_baseline": True}, "an artifact; --update-baseline needs a store"),
    ],
)
def test_a_wrong_request_is_refused(
    scripted: Scripted, two: tuple[Path, Path], request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        api.gate(*two, **request_)
    assert scripted.jobs == []


# ---- through a store


def begin(store: Path, artifact: Path, times: int = 1) -> Path:
    for _ in range(times):
        report = api.gate(store, artifact, update_baseline=True)
        assert report["verdict"] == "pass"
    return Path(report["stored"])


def test_a_store_begins_with_the_first_measurement(scripted: Scripted, two: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: ARG001  # for its effect
    store = tmp_path / "store"
    report = api.gate(store, two[0], update_baseline=True)
    assert report["checks"][0]["detail"] == "the first measurement of this artifact on this machine"
    place = Path(report["stored"])
    assert place.parent.parent == store
    history = json.loads(place.read_text())["history"]
    assert len(history) == 1
    assert history[0]["log_ratios"] == list(report["log_ratios"])


def test_a_first_measurement_too_noisy_to_compare_with_is_not_kept(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    scripted.spread = 0.8
    report = api.gate(tmp_path / "store", two[0], update_baseline=True)
    assert (report["verdict"], report["stored"]) == ("inconclusive", None)
    assert re.fullmatch(
        r"too noisy to begin with: the interval is [0-9.]+% wide, 5.0% is needed; it was not kept",
        report["checks"][0]["detail"],
    )
    assert report["smallest_seen"] is None
    assert list((tmp_path / "store").iterdir()) == []


def test_a_stored_result_gates_what_comes_later(scripted: Scripted, two: tuple[Path, Path], tmp_path: Path) -> None:
    place = begin(tmp_path / "store", two[0])
    for baseline in (tmp_path / "store", place):
        report = api.gate(baseline, two[1])
        assert (report["verdict"], report["compared"], report["stored"]) == ("pass", "reference workload", None)
        assert report["checks"][0]["baseline"] == pytest.approx(10, rel=0.02)
        assert "1 stored measurement(s): how much one differs" in report["warnings"][0]
    begin(tmp_path / "store", two[0], 2)
    scripted.ms["changed"] = 12.0
    report = api.gate(place, two[1])
    assert (report["verdict"], report["warnings"]) == ("regression", ())
    assert report["checks"][0]["worse"] == pytest.approx(0.2, abs=0.03)


def test_too_few_stored_measurements_show_no_regression_but_are_added_to(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    begin(store, two[0])
    scripted.ms["changed"] = 12.0
    assert api.gate(store, two[1])["verdict"] == "inconclusive"
    report = api.gate(store, two[1], update_baseline=True)
    assert report["verdict"] == "inconclusive"
    assert len(json.loads(Path(report["stored"]).read_text())["history"]) == 2


def test_a_machine_that_is_slower_as_a_whole_is_no_regression(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    begin(tmp_path / "store", two[0])
    scripted.ms |= {"conv-attention": 30.0, "changed": 30.0}
    assert api.gate(tmp_path / "store", two[1])["verdict"] == "pass"


def test_a_regression_is_not_added_to_the_store(scripted: Scripted, two: tuple[Path, Path], tmp_path: Path) -> None:
    place = begin(tmp_path / "store", two[0], 3)
    scripted.ms["changed"] = 12.0
    report = api.gate(tmp_path / "store", two[1], update_baseline=True)
    assert (report["verdict"], report["stored"]) == ("regression", None)
    assert len(json.loads(place.read_text())["history"]) == 3


def test_how_stored_measurements_differ_widens_the_interval(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    for ms in (10.0, 10.3, 9.7):
        scripted.ms["out"] = ms
        api.gate(store, two[0], update_baseline=True, max_slowdown=0.5)
    report = api.gate(store, two[1], max_slowdown=0.5)
    assert report["warnings"] == ()
    latency = report["checks"][0]
    assert latency["high"] - latency["low"] > 0.3  # 4.3 * 1.4 standard deviations of 3 % on either side


def test_another_machine_is_refused_unless_it_is_wanted(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    place = begin(tmp_path / "store", two[0])
    document = json.loads(place.read_text())
    document["machine"] |= {"id": "0" * 12, "cpu_model": "Another"}
    place.write_text(json.dumps(document))
    before = len(scripted.jobs)
    with pytest.raises(UsageError, match=r"measured on machine 000000000000 \(Another\), the other is [0-9a-f]{12}"):
        api.gate(place, two[1])
    assert len(scripted.jobs) == before
    report = api.gate(place, two[1], across_machines=True)
    assert "the baseline is of another machine" in report["warnings"][1]


def test_a_store_without_this_artifact_says_how_to_begin(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(InputError, match=r"no baseline of .*; measure one with --update-baseline"):
        api.gate(tmp_path / "store", two[0])
    assert scripted.jobs == []


def test_what_was_measured_in_another_way_is_not_compared(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    begin(tmp_path / "store", two[0])
    before = len(scripted.jobs)
    with pytest.raises(UsageError, match=r"measured with threads None, this gate has 1: the two are not comparable"):
        api.gate(tmp_path / "store", two[1], threads=1)
    assert len(scripted.jobs) == before


def test_two_stored_results_are_compared_without_measuring(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    first = begin(tmp_path / "first", two[0], 3)
    same = begin(tmp_path / "same", two[1])
    scripted.ms["changed"] = 12.0
    slow = begin(tmp_path / "slow", two[1])
    before = len(scripted.jobs)
    assert api.gate(first, same)["verdict"] == api.gate(tmp_path / "first", same)["verdict"] == "pass"
    report = api.gate(first, slow)
    assert (report["verdict"], report["rounds"]) == ("regression", 0)
    assert report["checks"][0]["worse"] == pytest.approx(0.2, abs=0.03)
    assert len(scripted.jobs) == before
    with pytest.raises(UsageError, match="stored already; --update-baseline adds"):
        api.gate(first, slow, update_baseline=True)


def test_a_stored_result_is_gated_against_an_artifact(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    scripted.ms["changed"] = 12.0
    slow = begin(tmp_path / "slow", two[1], 3)
    report = api.gate(two[0], slow)
    assert report["verdict"] == "regression"
    assert [check["verdict"] for check in report["checks"][1:]] == ["not gated", "pass", "pass", "pass"]
    assert report["checks"][0]["baseline"] == pytest.approx(10, rel=0.02)


def test_another_size_is_other_work(scripted: Scripted, tiny: Any, tmp_path: Path) -> None:
    place = begin(tmp_path / "store", tiny.export().path)
    before = len(scripted.jobs)
    with pytest.raises(UsageError, match=r"measured with image size and batch \(\[64, 64\], 1\), this gate has"):
        api.gate(place, tiny.export(image_size=(32, 32)).path)
    assert len(scripted.jobs) == before


def test_options_of_the_runtime_must_be_the_same(scripted: Scripted, two: tuple[Path, Path], tmp_path: Path) -> None:
    store, on = tmp_path / "store", {"runtime": "ov", "threads": 1}
    api.gate(store, two[0], update_baseline=True, runtime_options={"streams": "1"}, **on)
    before = len(scripted.jobs)
    with pytest.raises(UsageError, match=r"measured with runtime options \{'streams': '1'\}, this gate has \{\}"):
        api.gate(store, two[1], **on)
    with pytest.raises(UsageError, match="option of runtime ov"):
        api.gate(store, two[1], runtime_options={"x": "1"}, **on)
    assert len(scripted.jobs) == before


def test_a_store_is_of_runtimes_that_read_onnx(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating.registry, "runtimes_for", lambda name: [] if name.startswith("conv-") else ["ort"])
    with pytest.raises(
        UsageError, match="runtime ort runs no ONNX files, and the reference workload of stored results"
    ):
        api.gate(tmp_path / "store", two[0], update_baseline=True)
    assert scripted.jobs == []


def test_a_store_that_cannot_be_made_is_told_before_measuring(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="give a store that can be written"):
        api.gate(tmp_path / "file" / "store", two[0], update_baseline=True)
    with pytest.raises(InputError, match="no such artifact, stored result or store; begin a store with"):
        api.gate(tmp_path / "none", two[0])
    assert scripted.jobs == []


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1}', '{"schema_version": 99}', "NaN"])
def test_a_damaged_stored_result_is_refused(
    scripted: Scripted, two: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    place = tmp_path / "result.json"
    place.write_text(text)
    with pytest.raises(InputError, match=r"result.json"):
        api.gate(place, two[0])
    assert scripted.jobs == []


# ---- the command line


@pytest.mark.parametrize(("ms", "code"), [(10.0, 0), (12.0, 4)])
def test_the_exit_code_is_the_verdict(
    scripted: Scripted, two: tuple[Path, Path], cli: Callable[..., Any], tmp_path: Path, ms: float, code: int
) -> None:
    scripted.ms["changed"] = ms
    outcome = cli("gate", *two, "--markdown", tmp_path / "summary.md", "--out", tmp_path / "gate.json", "--json")
    assert outcome.code == code
    assert outcome.document == json.loads((tmp_path / "gate.json").read_text())
    assert (tmp_path / "summary.md").read_text() == outcome.document["markdown"]


def test_inconclusive_is_five(scripted: Scripted, two: tuple[Path, Path], cli: Callable[..., Any]) -> None:
    scripted.spread = 1.0
    assert cli("gate", *two).code == 5


def test_the_text_for_a_person(scripted: Scripted, two: tuple[Path, Path], cli: Callable[..., Any]) -> None:
    scripted.spread, scripted.ms["changed"] = 0.0, 12.0
    lines = cli("gate", *two, "--max-slowdown", "5%").out.splitlines()
    assert lines[0].startswith("regression: ")
    latency = next(line for line in lines if line.startswith("latency "))
    assert " ".join(latency.split()[1:]) == "10.000 ms 12.000 ms +20.0 % [+20.0, +20.0] +5 % regression"


@pytest.mark.parametrize("share", ["5", "-1%", "x", "", "101%", "1e3", "nan", "5 %%"])
def test_a_share_that_could_be_misread_is_refused(two: tuple[Path, Path], cli: Callable[..., Any], share: str) -> None:
    outcome = cli("gate", *two, f"--max-slowdown={share}")
    assert outcome.code == 2
    assert f"--max-slowdown {share!r}: expected a share of at most 1, e.g. 5% or 0.05" in outcome.message


def test_a_summary_is_appended(
    scripted: Scripted,  # noqa: ARG001  # for its effect
    two: tuple[Path, Path],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:  # as $GITHUB_STEP_SUMMARY wants it
    place = tmp_path / "summary.md"
    place.write_text("before\n")
    assert cli("gate", *two, "--markdown", place).code == 0
    assert place.read_text().startswith("before\n### edgevit gate: pass")


@pytest.mark.parametrize("flag", ["--markdown", "--out"])
def test_a_place_that_cannot_be_written_is_an_error_of_one_line(
    scripted: Scripted,  # noqa: ARG001  # for its effect
    two: tuple[Path, Path],
    cli: Callable[..., Any],
    tmp_path: Path,
    flag: str,
) -> None:
    outcome = cli("gate", *two, flag, tmp_path / "no" / "such" / "place")
    assert outcome.code == 1
    assert outcome.message.startswith("edgevit: ")
    assert "place" in outcome.message


# ---- real processes


def test_a_real_gate_of_an_artifact_against_itself(exported: Any, copied: Callable[..., Path]) -> None:
    report = api.gate(exported.path, copied(exported.path), threads=1, max_slowdown=1.0, budget_s=300)
    assert report["verdict"] == "pass"
    assert report["rounds"] >= 10
    assert report["checks"][0]["candidate"] > 0


def test_a_model_that_does_not_load_is_one_sentence(tmp_path: Path) -> None:
    from edgevit.api.working import Job, Worker

    broken, feed = tmp_path / "broken.onnx", tmp_path / "in.npz"
    broken.write_bytes(b"not a model")
    np.savez(feed, image=np.zeros((1, 3, 64, 64), np.float32))
    worker = Worker(Job("ort", broken, "fp32", feed))
    with pytest.raises(RuntimeFailure, match=r"broken.onnx: ONNX Runtime cannot load it"), worker:
        pass
    worker.close()  # again
    with pytest.raises(RuntimeFailure, match="its process is not running"):
        worker.turn(1)


@pytest.fixture
def job(exported: Any, tmp_path: Path) -> Any:
    from edgevit.api.running import RunOn
    from edgevit.api.working import job_of
    from edgevit.artifact import load_artifact

    return job_of(load_artifact(exported.path), RunOn(threads=1), tmp_path)


def test_a_worker_tells_times_memory_and_precision(job: Any) -> None:
    from edgevit.api.working import Worker

    with Worker(job) as worker:
        started = worker.started
        assert started.effective_precision == started.asked_precision == "fp32"
        assert min(started.import_ms, started.load_ms, started.first_ms) > 0
        assert len(worker.turn(3)) == 3
        assert min(worker.turn(4)) > 0
        if sys.platform == "linux":
            assert started.before_load_bytes < started.loaded_bytes <= started.peak_bytes <= worker.peak_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity of threads to cores")
def test_both_of_a_pair_are_kept_on_the_same_core(job: Any) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core: nothing to choose from")
    drawn = set()
    for seed in range(4):
        with fresh_pair(job, job, random.Random(seed)) as pair:
            kept = [
                {frozenset(os.sched_getaffinity(int(thread.name))) for thread in Path(f"/proc/{number}/task").iterdir()}
                for number in (lane._process.pid for lane in pair)  # type: ignore[attr-defined]  # a lane is a worker here
            ]
            assert kept[0] == kept[1]
            assert [len(each) for each in kept[0]] == [1]
            assert min(pair[0].turn(2)) > 0
            drawn |= kept[0]
    assert len(drawn) > 1


def test_a_process_that_dies_is_told_with_its_last_words(job: Any) -> None:
    from edgevit.api.working import Worker

    with Worker(job) as worker:
        assert worker._process is not None
        worker._process.kill()
        with pytest.raises(
            RuntimeFailure, match=r"model.onnx: the process that ran it ended by itself \(signal SIGKILL\)"
        ):
            worker.turn(1)


def test_a_worker_ends_with_the_program_that_asked(started: Callable[..., Any], job: Any, tmp_path: Path) -> None:
    """Killed, so that nothing could be closed."""
    import time

    code = (
        "import sys, time, pathlib; from edgevit.api.working import Job, Worker\n"
        f"w = Worker(Job({job.runtime!r}, pathlib.Path({str(job.path)!r}), 'fp32', pathlib.Path({str(job.feed)!r})))\n"
        "w.__enter__(); print(w._process.pid, flush=True); time.sleep(300)"
    )
    process = started("-c", code, cwd=tmp_path)
    number = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close(), process.stderr.close()
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # ended; whoever adopted it has not looked yet
        time.sleep(0.1)
    pytest.fail("the worker is still there")
