"""`edgevit bench` as a user meets it: axes, the file that goes on, and its exact text on a clock of a script's."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from edgevit.bench.sweep import read
from edgevit.cli import benching
from edgevit.errors import UsageError
from edgevit.specs import NoOptions, OperatorTime, TensorSpec

NAME = "tiny-onnx-fp32"
QUICK = ("--duration", "0.02", "--loads", "1", "--no-roofline")


# ---- axes


@pytest.mark.parametrize(
    ("items", "sweep", "expected"),
    [
        (["a"], None, (["a"], {})),
        (["a", "b"], ["threads=1,2"], (["a", "b"], {"threads": [1, 2]})),
        (["a", "batch=1,8"], ["threads=1,2"], (["a"], {"threads": [1, 2], "batch": [1, 8]})),
        (["a"], ["image-size=64x64,96x64"], (["a"], {"image_size": [(64, 64), (96, 64)]})),
        (["a"], ["precision=fp32, int8"], (["a"], {"precision": ["fp32", "int8"]})),
        (["x=1"], ["threads=1"], (["x=1"], {"threads": [1]})),  # a directory may be called so
    ],
)
def test_axes_stand_after_sweep_or_among_the_items(items: list[str], sweep: Any, expected: Any) -> None:
    assert benching.split_axes(items, sweep) == expected


@pytest.mark.parametrize(
    ("items", "sweep", "text"),
    [
        (["a", "batch=1,8"], None, "'batch=1,8': neither an artifact nor a model; put --sweep before it"),
        (["a"], ["cores=1"], "--sweep 'cores=1': expected AXIS=VALUE,VALUE, an axis being threads, batch, image-size,"),
        (["a"], ["threads"], "--sweep 'threads': expected AXIS=VALUE,VALUE"),
        (
            ["a", "threads=4"],
            ["threads=1"],
            "--sweep 'threads=4': threads is given twice; give its values as threads=A,B",
        ),
        (["a"], ["threads=1,,2"], "--sweep threads=: expected whole numbers, e.g. threads=1,2"),
        (["a"], ["threads=-1"], "--sweep threads=-1: expected whole numbers"),
        (["a"], ["threads=1e3"], "--sweep threads=1e3: expected whole numbers"),
        (["a"], ["batch=²"], "--sweep batch=²: expected whole numbers"),
        (["a"], ["batch=" + "9" * 5000], "expected whole numbers"),
        (["a"], ["image-size=64"], "'64': expected HEIGHTxWIDTH in pixels"),
    ],
)
def test_axes_that_cannot_be_read_are_refused(items: list[str], sweep: Any, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        benching.split_axes(items, sweep)
    assert text in str(caught.value)


def test_a_directory_called_like_an_axis_is_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch=1").mkdir()
    assert benching.split_axes(["batch=1"], ["threads=1"]) == (["batch=1"], {"threads": [1]})


# ---- the file


def test_a_sweep_is_written_and_the_same_command_measures_nothing_anew(cli: Any, tiny: Any, tmp_path: Path) -> None:
    path, place = tiny.export().path, tmp_path / "sweep.json"
    command = ("bench", path, "--sweep", "threads=1,2", "batch=1", "--out", place, *QUICK)
    told = cli(*command)
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert [line for line in lines if line.startswith("threads=")] == ["threads=1 batch=1", "threads=2 batch=1"]
    assert lines[-1] == f"{place}: 2 cells"
    before = place.read_bytes()
    again = cli(*command)
    assert (again.code, again.out.splitlines()[-1]) == (0, f"{place}: 2 cells, 2 of them measured before")
    assert again.out.splitlines()[:-1] == lines[:-1]
    assert place.read_bytes() == before
    assert "threads=1 batch=1: measured before" in again.err


def test_json_of_a_sweep_is_the_file(cli: Any, tiny: Any, tmp_path: Path) -> None:
    place = tmp_path / "sweep.json"
    told = cli("bench", tiny.export().path, "--sweep", "threads=1", "--out", place, *QUICK, "--json")
    assert {key: value for key, value in told.document.items() if key != "resumed"} == read(place)


def test_an_interrupted_sweep_says_how_to_go_on(
    cli: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgevit.api import benching as verb

    path, place, real = tiny.export().path, tmp_path / "sweep.json", verb._measure

    def interrupting(plan: Any, cell: Any, *rest: Any) -> Any:
        if cell.threads == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(plan, cell, *rest)

    command = ("bench", path, "--sweep", "threads=1,2", "--out", place, *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_measure", interrupting)
        told = cli(*command)
    assert told.code == 130
    assert told.err.splitlines()[-2:] == [
        f"{place} has the cells that ended; the same command goes on from there",
        "edgevit: interrupted; nothing half written was left behind",
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name != "out") == ["sweep.json"]
    assert cli(*command).out.splitlines()[-1] == f"{place}: 2 cells, 1 of them measured before"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"kind": "bench"', b"[" * 100_000, b"\x80"])
def test_a_place_with_something_else_is_one_line_and_left_alone(
    cli: Any, tiny: Any, tmp_path: Path, data: bytes
) -> None:
    place = tmp_path / "sweep.json"
    place.write_bytes(data)
    told = cli("bench", tiny.export().path, "--out", place, *QUICK)
    assert told.code == 1 and told.out == ""
    assert told.message.startswith(f"edgevit: {place}: not ")
    assert place.read_bytes() == data


@pytest.mark.parametrize(
    "damage",
    [
        {"roofline": "much"},
        {"roofline": {"share": "half"}},
        {"throughput": {"levels": 3}},
        {"cold_start": {"starts": 1}},
        {"name": "\x1b[31m[red]"},
    ],
    ids=str,
)
def test_a_crafted_cell_of_the_right_request_is_no_traceback(
    cli: Any, tiny: Any, tmp_path: Path, damage: dict[str, Any]
) -> None:
    path, place = tiny.export().path, tmp_path / "sweep.json"
    command = ("bench", path, "--out", place, *QUICK)
    assert cli(*command).code == 0
    document = json.loads(place.read_text())
    document["cells"][0]["results"][0].update(damage)
    place.write_text(json.dumps(document))
    told = cli(*command)
    assert "internal error" not in told.err and "\x1b" not in told.out + told.err
    if "name" not in damage:
        assert told.code == 1
        assert told.message.startswith(f"edgevit: {place}: a cell holds what cannot be shown")


def test_anyones_file_is_a_peer(cli: Any, tiny: Any) -> None:
    artifact = tiny.export()
    told = cli("bench", artifact.path, "--vs", artifact.model_file, *QUICK)
    assert told.code == 0, told.err
    assert f"{NAME} against model.onnx: " in told.out


# ---- the exact text


class Scripted:
    """A runtime whose inferences take what the script says, on the clock that they move."""

    name = "ort"
    OPTIONS = NoOptions
    now_s = 0.0
    speeds_ms: ClassVar[dict[str, float]] = {}  # by the name of the artifact's directory

    def __init__(self, path: Path, threads: int | None = None, precision: str = "fp32", options: Any = None) -> None:
        self.path, self.threads, self.options = path, threads, options
        self.asked_precision = self.effective_precision = precision
        self.inputs = (TensorSpec("image", (1, 3, 64, 64)),)
        self.outputs = (TensorSpec("logits", (1, 10)),)

    @classmethod
    def obstacle(cls) -> str | None:
        return None

    def load(self) -> None: ...

    def close(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"runtime": "scripted", "threads": self.threads}

    def profile(self, inputs: Any, runs: int) -> Any:  # noqa: ARG002  # the contract's signature
        return (
            OperatorTime("stem", "Conv", "fp32", 0.0, ("stem",), 49_152),
            OperatorTime("head", "Gemm", "fp32", 0.0, ("logits",), 40),
        )

    def run(self, inputs: Any) -> dict[str, Any]:  # noqa: ARG002  # the contract's signature
        Scripted.now_s += self.speeds_ms[self.path.parent.name] / 1000 / (self.threads or 1)
        return {"logits": np.zeros((1, 10), np.float32)}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Put the script in ONNX Runtime's place, its clock in the clock's, and a machine that tells nothing in this one's.

    Called with milliseconds by artifact, once they are exported: an export is proven on the real one.
    """
    from edgevit import registry
    from edgevit.bench import timing
    from edgevit.bench.watch import Moment

    def install(speeds_ms: dict[str, float]) -> None:
        monkeypatch.setattr(registry, "runtime_class", lambda name: Scripted)  # one runtime for all names
        monkeypatch.setattr(Scripted, "speeds_ms", speeds_ms)
        monkeypatch.setattr(Scripted, "now_s", 0.0)
        race = partial(timing.measure_loads, clock=lambda: Scripted.now_s, watch=lambda: Moment(0.0))
        monkeypatch.setattr(timing, "measure_loads", race)

    return install


RACE = """\
 name            precision  p50 ms  p90 ms           p99 ms  runs
 tiny-onnx-fp32  fp32         10.0    10.0  n/a (needs 662)    84
 faster          fp32         8.00    8.00  n/a (needs 662)    84
faster against tiny-onnx-fp32: 1.25x faster [1.25, 1.25]
"""


def stripped(text: str) -> str:
    """Without the blanks at the ends of a table's lines."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_a_race_in_full(cli: Any, tiny: Any, copied: Callable[..., Path], scripted: Any) -> None:
    path = tiny.export().path
    other = copied(path, "faster")
    scripted({NAME: 10.0, "faster": 8.0})
    told = cli("bench", path, other, "--threads", "1", "--duration", "1", "--loads", "1", "--no-roofline")
    assert told.code == 0, told.err
    assert stripped(told.out) == RACE


SWEPT = """\
threads=1
 name            precision  p50 ms  p90 ms  p99 ms  runs  of limit
 tiny-onnx-fp32  fp32         10.0    10.0    10.0   663       25%
tiny-onnx-fp32: what it loses
  a sentence of what was lost
  and what to mind
tiny-onnx-fp32: throughput
  1 in flight  100 pictures/s, p50 10.0 ms
  2 in flight  150 pictures/s, p50 13.3 ms, best
  saturated
tiny-onnx-fp32: 11 starts, the model from the disk
  runtime imported 300 ms
  model loaded     40.0 ms
  first inference  12.0 ms
  later ones       10.0 ms
  memory           80 MiB at the most, 30 of them for the model

threads=2
 name            precision  p50 ms  p90 ms  p99 ms  runs  of limit
 tiny-onnx-fp32  fp32         5.00    5.00    5.00   664       25%
"""


def test_a_sweep_in_full(cli: Any, tiny: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.api import benching as verb

    def beside(entry: Any, asked: Any, on: Any, *rest: Any) -> dict[str, Any]:  # noqa: ARG001  # the signature of what it stands for
        if on.threads == 2:
            return {"roofline": {"share": 0.25}}
        levels = [
            {"in_flight": 1, "text": "100 pictures/s, p50 10.0 ms"},
            {"in_flight": 2, "text": "150 pictures/s, p50 13.3 ms"},
        ]
        times = {"import_ms": "300 ms", "load_ms": "40.0 ms", "first_ms": "12.0 ms", "steady_ms": "10.0 ms"}
        return {
            "roofline": {
                "share": 0.25,
                "explanation": ["a sentence of what was lost"],
                "warnings": ["and what to mind"],
            },
            "throughput": {"levels": levels, "best": levels[1], "reason": "saturated", "warnings": []},
            "cold_start": {
                "starts": 11,
                "page_cache": "model files dropped",
                **{k: {"text": v} for k, v in times.items()},
            },
            "memory": {"peak_bytes": 80 << 20, "model_bytes": 30 << 20},
        }

    monkeypatch.setattr(verb, "_found_beside", beside)
    path = tiny.export().path
    scripted({NAME: 10.0})
    told = cli("bench", path, "--sweep", "threads=1,2", "--duration", "1", "--loads", "1", "--percentile", "99")
    assert told.code == 0, told.err
    assert stripped(told.out) == SWEPT


def test_a_machine_that_changed_is_said(cli: Any, tiny: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.bench import timing
    from edgevit.bench.watch import Change

    monkeypatch.setattr(timing, "changes", lambda moments: (Change("steal", "5 % was taken away."),))
    path = tiny.export().path
    scripted({NAME: 10.0})
    told = cli("bench", path, "--duration", "1", "--loads", "1", "--no-roofline")
    assert "the machine changed: 5 % was taken away." in told.err.splitlines()
