"""Files that strangers' devices send: damaged, huge, deep, or made to be misread. One line, no traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgevit.bench import ingest
from edgevit.bench.ingest import read_directory, read_run, result_of
from edgevit.errors import InputError

GOOD = {"h2dMs": 0.0, "computeMs": 2.0, "d2hMs": 0.0, "latencyMs": 2.0, "startH2dMs": 1.0, "endD2hMs": 3.0}
LINE = "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec\n[I] === Performance summary ===\n[I] "


def refused(path: Path, content: str | bytes) -> str:
    """The message with which a single file is refused, or its run."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        result_of(read_run([path], str(path), strict=True), "net", 1)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 600
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "-1",
        "1e400",
        "1e9",
        pytest.param("9" * 400, id="long"),
        '"2.0"',
        "true",
        "null",
        "[]",
        '"x\\u001b"',
    ],
)
@pytest.mark.parametrize("key", ["latencyMs", "computeMs", "h2dMs"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, key: str, value: str) -> None:
    text = json.dumps([GOOD, {**GOOD, key: "HERE"}]).replace('"HERE"', value)
    if value == '"2.0"':  # a number as text is still one
        path = tmp_path / "t.json"
        path.write_text(text)
        assert read_run([path], "t", strict=True).times is not None
        return

    message = refused(tmp_path / "t.json", text)

    assert "expected a number" in message or "is no number" in message


def test_a_query_of_no_time_is_refused(tmp_path: Path) -> None:
    assert "a query took 0 ms" in refused(tmp_path / "t.json", json.dumps([{**GOOD, "latencyMs": 0}]))


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "not json", "[", "{", "[1, 2]", "{}", "[]", "null", "3", '"text"', "[{}]", '[{"a": 1}]', "[[[]]]",
        '{"Layers": 3}', '{"Layers": [3]}', '{"Layers": [null]}', '{"Layers": [{"Name": 3}]}', '{"Layers": [{}]}',
        '{"Layers": [{"Name": "a", "Inputs": "x"}]}', '{"Layers": [{"Name": "a", "Outputs": [1]}]}',
        '[{"count": 0}, {"name": "a", "timeMs": 1}]', '[{"count": "x"}, {"name": "a", "timeMs": 1}]',
        '[{"count": 1}, {"name": 7, "averageMs": 1}]', '[{"count": 1}, {"name": "a", "averageMs": -1}]',
        '[{"count": 1}, {"name": "a", "averageMs": 1, "percentage": NaN}]', '{"Layers": ["a"], "x": -Infinity}',
        '{"tool": "edgevit build.sh"}', '{"tool": "edgevit build.sh", "batch": true, "flags": [], "step": "time"}',
        '{"tool": "edgevit build.sh", "batch": 1, "flags": [1], "step": "time"}',
        '{"tool": "edgevit build.sh", "batch": 1, "flags": [], "step": ["time"]}',
        pytest.param("[" * 100_000, id="deep list"), pytest.param('{"Layers":' * 50_000, id="deep object"),
        pytest.param('{"a": ' + "9" * 10_000 + "}", id="long number"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_trtexec_is_refused(tmp_path: Path, text: str) -> None:
    refused(tmp_path / "x.json", text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[\xff]", "[I] summary".encode("utf-16"), bytes(range(256))])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    assert "not UTF-8 text" in refused(tmp_path / "x.log", content)


@pytest.mark.parametrize(
    "line",
    [
        "Latency: min = nan ms, median = nan ms", "Latency: median = inf ms", "Latency: median = -1 ms",
        "Latency: median = 1e999 ms", "Latency: median = 4e9 ms", "Latency: median = 1.2.3 ms",
        "Latency: median = e ms",
        "Latency: none", "Throughput: nan qps\n[I] Latency: median = 1 ms", "Throughput: -3 qps", "nothing",
    ],
)  # fmt: skip
def test_a_summary_without_numbers_is_refused(tmp_path: Path, line: str) -> None:
    refused(tmp_path / "x.log", LINE + line + "\n")


def test_a_log_of_two_runs_is_refused(tmp_path: Path) -> None:
    assert "2 performance summaries" in refused(tmp_path / "x.log", (LINE + "Latency: median = 1 ms\n") * 2)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as stream:
        stream.truncate(ingest.MAX_BYTES + 1)  # a hole: no disk is used

    with pytest.raises(InputError, match="larger than 64 MB"):
        read_run([path], "x", strict=True)
    monkeypatch.setattr(ingest, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="larger than 0 MB"):
        read_run([path], "x", strict=True)


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")

    with pytest.raises(InputError, match="not a file"):
        read_run([tmp_path / "fifo.json"], "x", strict=True)
    assert read_directory(tmp_path).times is None


def test_a_folder_of_very_many_files_is_refused(tmp_path: Path) -> None:
    for i in range(ingest.MAX_FILES + 1):
        (tmp_path / f"{i}.json").touch()

    with pytest.raises(InputError, match="65 logs and JSON files; give a directory that build"):
        read_directory(tmp_path)


@pytest.mark.parametrize("kind", ["times", "profile", "layers", "log", "record"])
def test_two_files_of_one_kind_are_refused(tmp_path: Path, kind: str) -> None:
    text = {
        "times": json.dumps([GOOD]),
        "profile": '[{"count": 1}, {"name": "a", "averageMs": 1}]',
        "layers": '{"Layers": ["a"]}',
        "log": LINE + "Latency: median = 1 ms\n",
        "record": '{"tool": "edgevit build.sh", "batch": 1, "flags": [], "step": "time"}',
    }[kind]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(text)

    with pytest.raises(InputError, match=f"b.json: a second {kind} of the same run; give the files of one run"):
        read_run(paths, "x", strict=True)


def test_names_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    name = "conv\x1b[2J\x07\u202e\n" + "x" * 10_000
    layer: dict[str, Any] = {
        "Name": name,
        "LayerType": "\x1b[31m",
        "Metadata": "[ONNX Layer: \x1b[2Ja]",
        "Inputs": None,
    }
    files = {
        "t.json": [GOOD],
        "p.json": [{"count": 1}, {"name": name, "averageMs": 1.0}],
        "l.json": {"Layers": [layer]},
        "r.json": {
            "tool": "edgevit build.sh",
            "batch": 1,
            "flags": ["--\x1b[2J"],
            "step": "time",
            "board": "\x1b]0;a\x07",
        },
    }
    for file, value in files.items():
        (tmp_path / file).write_text(json.dumps(value))
    (tmp_path / "x.log").write_text(
        LINE + "Latency: median = 2 ms\n[I] Selected Device: \x1b[2JOrin\n[W] * \x1b[31mhot\n"
    )

    result, warnings = result_of(read_directory(tmp_path), "net", 1)

    assert all(text.isprintable() for text in (*texts(result), *warnings))
    assert len(result["operators"][0]["name"]) < 5000


def texts(value: Any) -> list[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, dict):
        return [text for key, part in value.items() for text in (key, *texts(part))]
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts(part)]
    return [value] if isinstance(value, str) else []


def test_a_long_log_is_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    lines = "[11/20/2026-12:00:00] [I] " + "min = " * 2000 + "\n[" * 2000 + "\n" + "[W] * again\n" * 5000
    path.write_text(LINE + "Latency: median = 1 ms\n" + lines * 10)

    result, warnings = result_of(read_run([path], "x", strict=True), "net", 1)

    assert result["latency_ms"]["p50"] == 1.0
    assert len(warnings) < 30
