"""How often the gate is wrong: the figures of docs/gate.md. `make gate-study` runs it.

Gates of an artifact against itself and against copies with real extra work, while another process takes a core in
bursts; each line of the results is a gate, so that an interrupted study goes on where it was. Other tools' rules are
applied to the same samples. Then the interval's coverage on simulated times, correlated from one to the next.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.artifact import load_artifact, sha256_of
from edgevit.bench.gate import GateSettings, decide, paired_interval, take_round
from edgevit.manifest import MANIFEST
from edgevit.shares import wilson

from .exporting import export_model
from .gating import gate
from .running import RunOn
from .working import fresh_pair, job_of

MODEL, SIZE = "mobileformer_26m", (64, 64)  # about a millisecond: what is measured is the gate, not the patience
BUDGET_S = 60.0
CASES = {"same": (0.0, 0.05), "five": (0.05, 0.03), "ten": (0.10, 0.03)}  # extra time, and what is allowed
PHIS = (0.2, 0.5, 0.8, 0.9, 0.95, 0.98)  # of the simulated times: correlation from each to the next
NOISE, LOAD_NOISE = 0.05, 0.01  # simulated: standard deviation of times, and of how lucky a load is
SETTLED_ROUNDS = 60  # rounds by which the extra work is set: 0.3 % to tell 5 from 6 %
ALERT = 2.0  # github-action-benchmark's default: 200 %
MANN_WHITNEY_RISK = 0.002  # asv's

# A process that works in bursts for as long as the study runs: up to two seconds of a core, then up to two of rest.
BURSTS = (
    "import os, random, sys, time\n"
    "draw, study = random.Random(0), int(sys.argv[1])\n"
    "while True:\n"
    "    until = time.monotonic() + draw.uniform(0.2, 2.0)\n"
    "    while time.monotonic() < until: sum(range(10000))\n"
    "    time.sleep(draw.uniform(0.2, 2.0))\n"
    "    os.kill(study, 0)\n"  # raises, and so ends, where there is no study any more
)


def study(results: Path, wanted: Mapping[str, int], told: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure what is not in `results` yet, `wanted` gates of each of CASES, and return its lines.

    `told` gets a line of text for each gate.
    """
    lines = _read(results)
    if any(sum(line["case"] == case for line in lines) < count for case, count in wanted.items()):
        with tempfile.TemporaryDirectory(prefix="edgevit-gate-study-") as scratch, bursts():
            _gates(_artifacts(Path(scratch), results, lines), wanted, results, told)
    return _read(results)


@contextlib.contextmanager
def bursts() -> Iterator[None]:
    """Another process that takes a core now and then; no descendant of this one, whose own work it would count as."""
    start = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).pid, flush=True)"
    command = [sys.executable, "-c", start, BURSTS, str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  # fixed code
        number = int(process.stdout.readline()) if process.stdout else 0
    try:
        yield
    finally:
        os.kill(number, signal.SIGKILL)


def _artifacts(scratch: Path, results: Path, lines: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """The artifact, a copy, and two that take about 5 and 10 % longer: how much exactly, the gates' rounds tell."""
    plain = export_model(MODEL, "onnx", image_size=SIZE, out=scratch).path
    same = Path(shutil.copytree(plain, scratch / "same"))
    artifacts = {"plain": plain, "same": same}
    units = next((line["units"] for line in lines if line["case"] == "calibration"), None)
    if units is None:
        probe = slowed(plain, scratch / "probe", 64)
        cost = _measured(plain, probe)[0] / 64  # of one channel
        units = {case: max(1, round(math.log1p(extra) / cost)) for case, (extra, _) in CASES.items() if extra}
        _append(results, {"case": "calibration", "units": units})
    for case, count in units.items():
        artifacts[case] = slowed(plain, scratch / case, count)
    return artifacts


def slowed(artifact: Path, out: Path, channels: int) -> Path:
    """A copy of an artifact whose graph has a convolution of 3x3 to `channels` more, added to the logits times 0.

    No runtime leaves it out: what is multiplied by 0 may be infinite.
    """
    import onnx
    from onnx import helper, numpy_helper

    copy = Path(shutil.copytree(artifact, out))
    path = load_artifact(copy).model_file
    model = onnx.load(path)
    graph, (output,) = model.graph, model.graph.output
    draw = np.random.default_rng(0)
    stored: dict[str, NDArray[Any]] = {
        "extra.kernel": draw.standard_normal((channels, 3, 3, 3)).astype(np.float32),
        "extra.zero": np.zeros(1, np.float32),
        "extra.axes": np.array([1, 2, 3], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    last = next(node for node in graph.node if output.name in node.output)
    last.output[list(last.output).index(output.name)] = "plain.logits"
    graph.node.extend(
        [
            helper.make_node("Conv", ["image", "extra.kernel"], ["extra.map"], strides=[2, 2], name="extra.conv"),
            helper.make_node("ReduceMean", ["extra.map", "extra.axes"], ["extra.mean"], keepdims=0, name="extra.pool"),
            helper.make_node("Mul", ["extra.mean", "extra.zero"], ["extra.none"], name="extra.mul"),
            helper.make_node("Add", ["plain.logits", "extra.none"], [output.name], name="extra.add"),
        ]
    )
    onnx.save(model, path)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    own = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["files"] = [own if each["name"] == path.name else each for each in manifest["files"]]
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def _measured(first: Path, second: Path) -> tuple[float, float, float]:
    """How much longer the second takes, as a logarithm with its 95 % interval, from SETTLED_ROUNDS rounds."""
    order, logs = random.Random(1), []
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [job_of(load_artifact(path), RunOn(threads=1), Path(scratch)) for path in (first, second)]
        for _ in range(SETTLED_ROUNDS):
            with fresh_pair(jobs[0], jobs[1], order) as pair:
                logs.append(take_round(pair, order).log_ratio)
    return paired_interval(logs, 0.05)


def _gates(artifacts: dict[str, Path], wanted: Mapping[str, int], results: Path, told: Callable[[str], None]) -> None:
    """The gates that are not in the file yet, the cases by turns."""
    for index in range(max(wanted.values())):
        for case, (_, allowed) in CASES.items():
            done = sum(line["case"] == case for line in _read(results))
            if index >= wanted[case] or done > index:
                continue
            report = gate(
                artifacts["plain"], artifacts[case], max_slowdown=allowed, max_size=1.0, max_parameters=1.0,
                max_macs=1.0, budget_s=BUDGET_S, threads=1, seed=index,
            )  # fmt: skip
            latency = report["checks"][0]
            kept = {key: report[key] for key in ("rounds", "spent_s", "stopped_by", "smallest_seen", "rounds_ms")}
            _append(
                results, {"case": case, **{key: latency[key] for key in ("verdict", "worse", "low", "high")}, **kept}
            )
            told(f"{case} {index}: {latency['verdict']}, {report['rounds']} rounds, {report['spent_s']:.0f} s")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """What the gate and two other rules said of the same rounds."""
    rows = ["| slowdown, of all rounds | allowed | rule | alarms | share, 95 % interval | not clear | median time |",
            "|---|---:|---|---:|---|---:|---:|"]  # fmt: skip
    for case, (_, allowed) in CASES.items():
        of_case = [line for line in lines if line["case"] == case]
        if not of_case:
            continue
        logs = [math.log(after / before) for line in of_case for before, after in line["rounds_ms"]]
        worse = [100 * math.expm1(value) for value in paired_interval(logs, 0.05)]
        true = f"{worse[0]:+.2f} % [{worse[1]:+.2f}, {worse[2]:+.2f}]"
        spent = f"{np.median([line['spent_s'] for line in of_case]):.0f} s"
        unclear = sum(line["verdict"] == "inconclusive" for line in of_case)
        own = [line["verdict"] == "regression" for line in of_case]
        found = {
            "edgevit gate": (own, str(unclear), spent),
            "Mann-Whitney p < 0.002 and the ratio": ([_mann_whitney(line, allowed) for line in of_case], "", ""),
            "one run against one, 200 %": ([_one_run(line, ALERT - 1) for line in of_case], "", ""),
            f"one run against one, {1 + allowed:.0%}": ([_one_run(line, allowed) for line in of_case], "", ""),
        }
        for rule, (alarms, left, time_text) in found.items():
            share = wilson(sum(alarms), len(alarms))
            interval = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
            cells = (true, f"{allowed:.0%}", rule, f"{sum(alarms)} of {len(alarms)}", interval, left, time_text)
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _mann_whitney(line: dict[str, Any], allowed: float) -> bool:
    """asv's rule: the two samples differ (normal approximation), and so do their medians by the factor."""
    first, second = (np.asarray(column) for column in zip(*line["rounds_ms"], strict=True))
    ranks = np.argsort(np.argsort(np.concatenate([first, second]))) + 1.0
    m, n = len(first), len(second)
    beyond = ranks[m:].sum() - n * (m + n + 1) / 2
    z = abs(beyond) / math.sqrt(m * n * (m + n + 1) / 12)
    risk = math.erfc(z / math.sqrt(2))
    return bool(risk < MANN_WHITNEY_RISK and np.median(second) > (1 + allowed) * np.median(first))


def _one_run(line: dict[str, Any], allowed: float) -> bool:
    """github-action-benchmark's rule: this run's value against the last one's, each taken at its own time."""
    return bool(line["rounds_ms"][-1][1] > (1 + allowed) * line["rounds_ms"][0][0])


class _Machine:
    """Simulated: a clock, and noise that is correlated from one inference to the next whoever runs."""

    def __init__(self, phi: float, draw: np.random.Generator) -> None:
        self.phi, self.draw, self.noise, self.now_s = phi, draw, float(draw.standard_normal()), 0.0

    def step(self) -> float:
        """The noise of the next inference, of variance 1."""
        fresh = float(self.draw.standard_normal())
        self.noise = self.phi * self.noise + math.sqrt(1 - self.phi**2) * fresh
        return self.noise


class _Simulated:
    """A lane whose inferences take about 10 ms."""

    def __init__(self, machine: _Machine, slower: float) -> None:
        self.machine, self.log_ms = (
            machine,
            math.log(10.0) + slower + LOAD_NOISE * float(machine.draw.standard_normal()),
        )

    def turn(self, runs: int) -> list[float]:
        times = [math.exp(self.log_ms + NOISE * self.machine.step()) for _ in range(runs + 1)]
        self.machine.now_s += sum(times) / 1000
        return times[1:]


def coverage(gates: int) -> str:
    """How often the interval holds the truth: after ten rounds, and where a gate stops."""
    rows = ["| correlation | 10 rounds, 95 % | where a gate stops, 5 % slower, 3 % allowed | 3 % slower, 3 % allowed |",
            "|---:|---|---|---|"]  # fmt: skip
    for phi in PHIS:
        cells = [_covered(phi, gates, *case) for case in ((0.0, None), (0.05, 0.03), (0.03, 0.03))]
        rows.append(f"| {phi:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _covered(phi: float, gates: int, slower: float, allowed: float | None) -> str:
    """The share of simulated gates whose interval holds the truth; without `allowed` each has ten rounds."""
    truth, hits = math.log1p(slower), 0
    for index in range(gates):
        machine = _Machine(phi, np.random.default_rng(index))

        @contextlib.contextmanager
        def pair(machine: _Machine = machine) -> Iterator[tuple[_Simulated, _Simulated]]:
            machine.now_s += 0.5  # what loading takes
            yield _Simulated(machine, 0.0), _Simulated(machine, truth)

        if allowed is None:
            decision = decide(pair, GateSettings(1.0, 1e9, index), clock=lambda m=machine: m.now_s)  # type: ignore[misc]  # bound now
            _, low, high = paired_interval(decision.log_ratios[:10], 0.05)
        else:
            decision = decide(pair, GateSettings(allowed, BUDGET_S, index), clock=lambda m=machine: m.now_s)  # type: ignore[misc]  # bound now
            if decision.interval is None:
                continue
            low, high = math.log1p(decision.interval.low), math.log1p(decision.interval.high)
        hits += low <= truth <= high
    share = wilson(hits, gates)
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
