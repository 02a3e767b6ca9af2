"""The study of the gate: real extra work that computes the same, an interrupted study that goes on, and its tables."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import api
from edgevit.api import studying
from edgevit.bench.complexity import count_onnx


def test_extra_work_is_more_work_and_the_same_result(exported: Any, tmp_path: Path) -> None:
    slow = studying.slowed(exported.path, tmp_path / "slow", 8)
    image = np.load(exported.path / "sample" / "input.npy")
    results = []
    for path in (exported.path, slow):
        with api.load(path, threads=1) as session:  # checks the hashes of the manifest too
            results.append(session.run({"image": image})["logits"])
    assert np.array_equal(*results)
    more = count_onnx(slow / "model.onnx").macs - count_onnx(exported.path / "model.onnx").macs
    assert more == 8 * 3 * 3 * 3 * 31 * 31


def line(case: str, verdict: str, baseline_ms: float, candidate_ms: float) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    rounds = [[baseline_ms * f, candidate_ms * f] for f in 1 + 0.001 * draw.standard_normal(10)]
    return {"case": case, "verdict": verdict, "spent_s": 20.0, "rounds_ms": rounds}


def test_the_table_counts_alarms_of_each_rule_on_the_same_rounds() -> None:
    lines = [line("same", "pass", 1, 1)] * 3 + [
        line("five", "regression", 1, 1.05),
        line("five", "inconclusive", 1, 1.05),
    ]
    rows = [row.split(" | ") for row in studying.table(lines).splitlines()[2:]]
    assert [row[3] for row in rows] == ["0 of 3"] * 4 + ["1 of 2", "2 of 2", "0 of 2", "2 of 2"]
    assert rows[0][0] == "| +0.00 % [+0.00, +0.00]" and rows[4][0] == "| +5.00 % [+5.00, +5.00]"
    assert (rows[4][5], rows[4][6]) == ("1", "20 s |")


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, asked = tmp_path / "study.jsonl", []
    monkeypatch.setattr(studying, "_artifacts", lambda *_: {"plain": "p", **{case: case for case in studying.CASES}})

    def scripted(_: Any, candidate: str, **more: Any) -> dict[str, Any]:
        asked.append((candidate, more["max_slowdown"], more["seed"]))
        latency = {"verdict": "pass", "worse": 0.0, "low": 0.0, "high": 0.0}
        about = {"rounds": 10, "spent_s": 1.0, "stopped_by": "clear", "smallest_seen": 0.1, "rounds_ms": [[1, 1]]}
        return {"checks": [latency], **about}

    monkeypatch.setattr(studying, "gate", scripted)
    told: list[str] = []
    studying.study(results, {"same": 1, "five": 1, "ten": 0}, told.append)
    lines = studying.study(results, {"same": 2, "five": 1, "ten": 1}, told.append)
    assert asked == [("same", 0.05, 0), ("five", 0.03, 0), ("ten", 0.03, 0), ("same", 0.05, 1)]
    assert [json.loads(each)["case"] for each in results.read_text().splitlines()] == [each["case"] for each in lines]
    assert told[0] == "same 0: pass, 10 rounds, 1 s"


def test_the_coverage_has_a_row_for_each_correlation() -> None:
    rows = studying.coverage(2).splitlines()
    assert len(rows) == 2 + len(studying.PHIS)
    assert all(row.count("%") == 9 for row in rows[2:])


def test_the_bursts_end_with_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    kill = os.kill
    monkeypatch.setattr(studying.os, "kill", lambda number, signal: (seen.append(number), kill(number, signal)))
    with studying.bursts():
        pass
    (number,) = seen
    for _ in range(50):
        place = Path(f"/proc/{number}/stat")
        if not place.exists() or place.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the other process is still there")
