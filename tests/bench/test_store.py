"""The store of baselines: it only grows, several may write at once, and nothing in it is believed unchecked."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import edgevit
from edgevit.bench import store
from edgevit.bench.budget import Limits, check_manifests
from edgevit.bench.store import Entry, Reference, Stored, append, find, machines, missing, new_entry, place_of, read
from edgevit.errors import InputError, OutputError, UsageError

ROOT = Path(__file__).resolve().parents[2]
HERE = {"id": "0123456789ab", "cpu_model": "Some CPU", "affinity_cores": 2}
ELSEWHERE = {"id": "ba9876543210", "cpu_model": "Another\nCPU " + "x" * 99}
NAME = "net-onnx-fp32"
COMMIT = "c0ffee" * 6 + "abcd"
MANIFEST = {
    "precision": "fp32",
    "files": [{"name": "model.onnx", "bytes": 10, "sha256": "ab" * 32}],
    "complexity": {"parameters": 5, "macs": 7, "unknown": {}, "notes": []},
    "image": {"size": [64, 64]},
    "batch": 1,
    "command": "edgevit export",
}
NOW = datetime(2026, 11, 20, 23, 30, 5, tzinfo=timezone(timedelta(hours=1)))


def entry(**other: Any) -> Entry:
    made = new_entry(
        MANIFEST,
        runtime="ort",
        threads=1,
        options={},
        log_ratios=[0.1, -0.2, 0.30000000000000004],
        reference=Reference("matmul", "1", "cd" * 32),
        p50_ms=4.5,
        machine={"cpu_model": "Some CPU", "libraries": {"onnxruntime": "1.31.1"}},
        clock=lambda: NOW,
        environment={"GITHUB_SHA": COMMIT},
    )
    return dataclasses.replace(made, **other)


def document(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- what is written


def test_an_entry_knows_its_time_commit_and_figures() -> None:
    made = entry()
    assert (made.taken_at, made.commit, made.edgevit) == ("2026-11-20T22:30:05Z", COMMIT, edgevit.__version__)
    assert made.precision == "fp32" and "command" not in made.checks
    assert [check.verdict for check in check_manifests(made.checks, MANIFEST, Limits())] == [
        "not gated",  # accuracy, which nobody recorded
        *["pass"] * 3,
    ]


@pytest.mark.parametrize("value", ["", "main", "C0FFEE1", "c0ffee", "c0ffee1; rm -rf /", "a" * 65])
def test_what_is_no_commit_is_left_out(value: str) -> None:
    facts: dict[str, Any] = {
        "runtime": "ort",
        "threads": 1,
        "log_ratios": [0.0],
        "p50_ms": None,
        "machine": {},
        "options": {},
    }
    reference = Reference("matmul", "1", "cd" * 32)
    made = new_entry(MANIFEST, reference=reference, clock=lambda: NOW, environment={"GITHUB_SHA": value}, **facts)
    assert made.commit is None


def test_what_was_appended_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    path = append(tmp_path / "new" / "store", HERE, NAME, entry())
    assert path == tmp_path / "new" / "store" / "0123456789ab" / f"{NAME}.json"
    assert read(path) == Stored(HERE, NAME, (entry(),))
    assert find(tmp_path / "new" / "store", HERE["id"], NAME) == read(path)


def test_the_file_is_readable_json_of_the_documented_form(tmp_path: Path) -> None:
    written = document(append(tmp_path, HERE, NAME, entry()))
    assert list(written) == ["schema_version", "machine", "artifact", "history"]
    assert list(written["history"][0]) == [field.name for field in dataclasses.fields(Entry)]
    assert written["history"][0]["reference"] == {"name": "matmul", "version": "1", "sha256": "cd" * 32}


def test_the_history_only_grows_and_the_last_is_the_baseline(tmp_path: Path) -> None:
    texts = []
    for i in range(4):
        texts.append(append(tmp_path, HERE, NAME, entry(p50_ms=float(i + 1))).read_text().rstrip("\n ]}"))
        assert texts[-1].startswith(texts[i - 1] if i else "")  # what stood there still stands there, byte for byte
    found = find(tmp_path, HERE["id"], NAME)
    assert found is not None and [each.p50_ms for each in found.history] == [1.0, 2.0, 3.0, 4.0]
    assert found.latest.p50_ms == 4.0


def test_what_a_newer_edgevit_added_to_an_entry_is_kept(tmp_path: Path) -> None:
    path = append(tmp_path, HERE, NAME, entry())
    known = document(path)
    known["history"][0]["energy_j"] = {"mean": 1.5}
    known["comment"] = "ours"
    path.write_text(json.dumps(known))
    again = document(append(tmp_path, HERE, NAME, entry()))
    assert again["history"][0]["energy_j"] == {"mean": 1.5} and again["comment"] == "ours"


def test_nothing_is_left_beside_and_the_mode_stays(tmp_path: Path) -> None:
    path = append(tmp_path, HERE, NAME, entry())
    path.chmod(0o640)
    append(tmp_path, HERE, NAME, entry())
    assert sorted(os.listdir(path.parent)) == [".lock", f"{NAME}.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


APPENDING = """
import sys, dataclasses
from pathlib import Path
from edgevit.bench.store import Reference, append, new_entry
manifest = {"precision": "fp32", "files": [{"name": "m", "bytes": 1, "sha256": "a"}]}
for i in range(8):
    made = new_entry(manifest, runtime=sys.argv[2], threads=1, options={}, log_ratios=[float(i)] * 50, p50_ms=1.0,
                     machine={}, reference=Reference("matmul", "1", "cd" * 32))
    append(Path(sys.argv[1]), {"id": "0123456789ab"}, "net", made)
"""


def test_of_several_processes_at_once_none_loses_an_entry(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    jobs = [
        subprocess.Popen([sys.executable, "-c", APPENDING, str(tmp_path), f"job{i}"], env=environment) for i in range(4)
    ]
    assert [job.wait(timeout=300) for job in jobs] == [0] * 4
    found = find(tmp_path, HERE["id"], "net")
    assert found is not None and len(found.history) == 32
    for i in range(4):
        assert [e.log_ratios[0] for e in found.history if e.runtime == f"job{i}"] == [float(n) for n in range(8)]


def test_a_writer_waits_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(store.fcntl, "flock", lambda handle, how: asked.append(how))
    append(tmp_path, HERE, NAME, entry())
    assert asked == [store.fcntl.LOCK_EX]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"log_ratios": (float("nan"),)},
        {"log_ratios": ()},
        {"log_ratios": (1e9,)},
        {"p50_ms": float("inf")},
        {"p50_ms": 0.0},
        {"threads": 0},
        {"machine": {"a": float("nan")}},
        {"checks": {"a": object()}},
        {"artifact_sha256": "x"},
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    path = append(tmp_path, HERE, NAME, entry())
    before = path.read_bytes()
    with pytest.raises((OutputError, InputError)):
        append(tmp_path, HERE, NAME, entry(**spoilt))
    assert path.read_bytes() == before


def test_a_full_file_is_not_made_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = append(tmp_path, HERE, NAME, entry())
    monkeypatch.setattr(store, "MAX_BYTES", path.stat().st_size + 10)
    with pytest.raises(OutputError) as caught:
        append(tmp_path, HERE, NAME, entry())
    assert str(caught.value) == f"{path}: full with 1 entries; begin another store"
    assert len(read(path).history) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = append(tmp_path, HERE, NAME, entry())

    def interrupted(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path, HERE, NAME, entry())
    assert len(read(path).history) == 1
    assert sorted(os.listdir(path.parent)) == [".lock", f"{NAME}.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/0123456789ab/net-onnx-fp32\.json: .*; give a store that can be writ"):
        append(tmp_path / "file", HERE, NAME, entry())


# ---- what is found


def test_an_empty_store_has_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    assert find(tmp_path / "none", HERE["id"], NAME) is None
    assert str(missing(tmp_path / "none", HERE["id"], NAME)) == (
        f"{tmp_path / 'none'}: no baseline of {NAME}; measure one with --update-baseline"
    )


def test_a_machine_that_is_missing_is_told_which_ones_there_are(tmp_path: Path) -> None:
    append(tmp_path, ELSEWHERE, NAME, entry())
    append(tmp_path, ELSEWHERE | {"id": "c" * 12}, "other", entry())
    place_of(tmp_path, "d" * 12, NAME).parent.mkdir()
    place_of(tmp_path, "d" * 12, NAME).write_text("{")
    assert find(tmp_path, HERE["id"], NAME) is None
    assert str(missing(tmp_path, HERE["id"], NAME)) == (
        f"{tmp_path}: no baseline of {NAME} on this machine (0123456789ab), it has those of ba9876543210 (Another CPU "
        f"{'x' * 48}), dddddddddddd (damaged file); measure one here with --update-baseline, or give the file of "
        "another machine with --across-machines"
    )


def test_a_long_list_of_machines_is_cut(tmp_path: Path) -> None:
    for i in range(8):
        append(tmp_path, HERE | {"id": f"{i:012x}"}, NAME, entry())
    assert "000000000004 (Some CPU) and 3 more; measure" in str(missing(tmp_path, "f" * 12, NAME))
    assert len(machines(tmp_path, NAME)) == 8


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\n", "x" * 201, "é"]
)
def test_a_name_that_leaves_the_store_is_refused(tmp_path: Path, name: str) -> None:
    for call in (lambda: find(tmp_path, HERE["id"], name), lambda: append(tmp_path, HERE, name, entry())):
        with pytest.raises(UsageError, match=r"artifact name .* expected up to 200 letters"):
            call()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("identity", ["", "..", "0123456789AB", "0123456789abc", "../../etc/pa", None, 3])
def test_a_fingerprint_that_is_none_is_refused(tmp_path: Path, identity: Any) -> None:
    with pytest.raises(UsageError, match="expected 12 hexadecimal digits"):
        append(tmp_path, {"id": identity}, NAME, entry())


def test_a_file_that_was_moved_to_another_machine_is_refused(tmp_path: Path) -> None:
    path = append(tmp_path, ELSEWHERE, NAME, entry())
    moved = place_of(tmp_path, HERE["id"], NAME)
    moved.parent.mkdir()
    path.rename(moved)
    for call in (lambda: find(tmp_path, HERE["id"], NAME), lambda: append(tmp_path, HERE, NAME, entry())):
        with pytest.raises(InputError, match="it is of net-onnx-fp32 on machine ba9876543210; expected what its place"):
            call()


# ---- what is not believed


def spoilt(change: Callable[[Any], object]) -> Callable[[str], str]:
    """A change of the document, as a change of the text."""

    def apply(text: str) -> str:
        known = json.loads(text)
        change(known)
        return json.dumps(known)

    return apply


def of_entry(key: str, value: Any) -> Callable[[str], str]:
    return spoilt(lambda known: known["history"][0].update({key: value}))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "not JSON"),
    "cut off": (lambda text: text[:-40], "not JSON"),
    "deep": (lambda text: "[" * 200_000, "not JSON"),
    "huge number": (lambda text: text.replace("4.5", "9" * 5000), "not JSON"),
    "NaN": (lambda text: text.replace("4.5", "NaN"), "not JSON"),
    "infinity": (lambda text: text.replace("4.5", "-Infinity"), "not JSON"),
    "overflow": (lambda text: text.replace("4.5", "1e999"), "nested too deeply"),
    "list": (lambda text: "[]", "no object"),
    "no schema": (spoilt(lambda known: known.pop("schema_version")), "expected a file of a store"),
    "schema true": (spoilt(lambda known: known.update(schema_version=True)), "schema_version True"),
    "newer": (spoilt(lambda known: known.update(schema_version=2)), "schema_version 2, this edgevit reads 1; update"),
    "no machine": (spoilt(lambda known: known.pop("machine")), "machine is missing"),
    "machine id": (spoilt(lambda known: known["machine"].update(id="../../x")), "machine is missing or of another"),
    "name": (spoilt(lambda known: known.update(artifact="../x")), "artifact or history is missing"),
    "no history": (spoilt(lambda known: known.update(history=[])), "artifact or history is missing"),
    "history": (spoilt(lambda known: known.update(history={"0": 1})), "artifact or history is missing"),
    "entry": (spoilt(lambda known: known["history"].append(3)), "taken_at of entry 2 is missing"),
    "entry's depth": (of_entry("checks", {"a": nested(20)}), "nested too deeply"),
    "unknown field's depth": (of_entry("x", nested(500)), "nested too deeply"),
    "time": (of_entry("taken_at", "yesterday"), "taken_at of entry 1"),
    "digest": (of_entry("artifact_sha256", "AB" * 32), "artifact_sha256 of entry 1"),
    "precision": (of_entry("precision", ["fp32"]), "precision of entry 1"),
    "long word": (of_entry("runtime", "x" * 1001), "runtime of entry 1"),
    "threads": (of_entry("threads", 1.5), "threads of entry 1"),
    "many threads": (of_entry("threads", 10**400), "threads of entry 1"),
    "no rounds": (of_entry("log_ratios", []), "log_ratios of entry 1"),
    "text for a round": (of_entry("log_ratios", ["0.1"]), "log_ratios of entry 1"),
    "true for a round": (of_entry("log_ratios", [True]), "log_ratios of entry 1"),
    "huge round": (of_entry("log_ratios", [10**400]), "log_ratios of entry 1"),
    "far round": (of_entry("log_ratios", [51]), "log_ratios of entry 1"),
    "many rounds": (of_entry("log_ratios", [0] * 100_001), "log_ratios of entry 1"),
    "reference": (of_entry("reference", {"name": "matmul", "version": "1"}), "reference of entry 1"),
    "p50": (of_entry("p50_ms", -4), "p50_ms of entry 1"),
    "machine of entry": (of_entry("machine", []), "machine of entry 1"),
    "checks": (of_entry("checks", None), "checks of entry 1"),
    "commit": (of_entry("commit", "HEAD"), "commit of entry 1"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_file_is_named_and_neither_read_nor_overwritten(tmp_path: Path, kind: str) -> None:
    path = append(tmp_path, HERE, NAME, entry())
    spoil, why = HOSTILE[kind]
    path.write_text(spoil(path.read_text()))
    before = path.read_bytes()
    for call in (lambda: read(path), lambda: append(tmp_path, HERE, NAME, entry())):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: ") and why in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stored.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not JSON, a stored result was expected"):
        read(path)


def test_what_is_no_file_or_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(store.MAX_BYTES + 1)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read"))
    for name, why in (("pipe", "not a file"), ("none", "no such file"), ("large", "larger than 64 MB"), (".", "not a")):
        with pytest.raises(InputError, match=why):
            read(tmp_path / name)


def test_taken_at_is_of_this_moment_where_no_clock_is_given() -> None:
    facts: dict[str, Any] = {
        "runtime": "ort",
        "threads": None,
        "log_ratios": [0.0],
        "p50_ms": None,
        "machine": {},
        "options": {},
    }
    made = new_entry(MANIFEST, reference=Reference("matmul", "1", "cd" * 32), environment={}, **facts)
    taken = datetime.strptime(made.taken_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - taken) < timedelta(minutes=5)
