"""The table of trtexec's flags against what its releases say, and what build.sh is told to pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevit.errors import UsageError
from edgevit.export.build_script import TABLE, timing_flags, trtexec_flags

STANDIN = Path(__file__).resolve().parent.parent / "standins" / "trtexec"
PRECISIONS = ("fp32", "fp16", "int8")
VERSIONS = ("8.5", "8.5.3", "8.6", "8.6.1", "10.0", "10.3.0", "10.12", "10.13.3", "10.16", "11.0", "11.1.0", "11.4.1")


def words(text: str) -> list[str]:
    return text.split()


# From the releases' own lists, written down apart from the table.
REMOVED_IN_10 = words("""
--batch --maxBatch --buildOnly --deploy --model --output --uff --explicitBatch --explicitPrecision
--heuristic --minTiming --nativeInstanceNorm --nvtxMode --workspace""")
REMOVED_IN_11 = words("""
--best --bf16 --calib --calibProfile --fp16 --fp8 --int4 --int8 --layerOutputTypes --layerPrecisions
--maxShapesCalib --minShapesCalib --optShapesCalib --precisionConstraints --restricted --weightless""")
ADDED_IN_11 = words("--includeDataTransfers --noCudaGraph --noSpinWait")
DEPRECATED_IN_11 = words("--useSpinWait --useCudaGraph --noDataTransfers --separateProfileRun")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))[:2]


def passed(version: str, precision: str) -> list[str]:
    """Every flag, without its value, that build.sh passes to this version."""
    return [flag.partition("=")[0] for flag in (*trtexec_flags(version, precision), *timing_flags(version))]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_no_flag_is_passed_to_a_version_that_removed_it_or_has_it_not_yet(version: str, precision: str) -> None:
    flags = set(passed(version, precision))
    gone = set(REMOVED_IN_11 + REMOVED_IN_10 if number(version) >= (11, 0) else REMOVED_IN_10)

    assert not flags & gone or number(version) < (10, 0)
    assert number(version) >= (11, 0) or not flags & set(ADDED_IN_11)
    assert number(version) >= (10, 0) or "--stronglyTyped" not in flags
    assert number(version) >= (8, 6) or "--skipInference" not in flags


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_says_itself_that_each_flag_passed_exists_in_that_version(
    data: dict[str, Any], version: str, precision: str
) -> None:
    for flag in [*passed(version, precision), "--onnx", "--saveEngine", "--loadEngine", "--timingCacheFile"]:
        row = data["flags"][flag]
        assert number(row["since"]) <= number(version), flag
        assert number(version) < number(row.get("removed", "99.0")), flag


@pytest.mark.parametrize(("release", "facts"), [("10.0", REMOVED_IN_10), ("11.0", REMOVED_IN_11)])
def test_what_a_release_removed_is_exactly_what_the_table_says(
    data: dict[str, Any], release: str, facts: list[str]
) -> None:
    assert sorted(flag for flag, row in data["flags"].items() if row.get("removed") == release) == sorted(facts)


def test_what_11_added_and_deprecated_is_what_the_table_says(data: dict[str, Any]) -> None:
    assert [flag for flag, row in data["flags"].items() if row["since"] == "11.0"] == ADDED_IN_11
    assert {data["flags"][flag]["deprecated"] for flag in DEPRECATED_IN_11} == {"11.0"}


def test_the_table_holds_each_fact_in_order(data: dict[str, Any]) -> None:
    for flag, row in data["flags"].items():
        ages = [number(row[key]) for key in ("since", "deprecated", "removed") if key in row]
        assert ages == sorted(ages), flag
        assert set(row) <= {"since", "deprecated", "removed"}, flag


@pytest.mark.parametrize(
    ("version", "fp32", "fp16", "int8"),
    [
        ("8.5", ["--noTF32"], ["--fp16"], ["--int8", "--fp16"]),
        ("8.6", ["--noTF32"], ["--fp16"], ["--int8", "--fp16"]),
        ("10.3", ["--stronglyTyped", "--noTF32"], ["--stronglyTyped"], ["--stronglyTyped"]),
        ("11.1", ["--noTF32"], [], []),
    ],
)
def test_the_precision_is_asked_for_as_each_version_wants_it(
    version: str, fp32: list[str], fp16: list[str], int8: list[str]
) -> None:
    common = ["--buildOnly" if version == "8.5" else "--skipInference", "--profilingVerbosity=detailed"]

    for precision, flags in zip(PRECISIONS, (fp32, fp16, int8), strict=True):
        assert list(trtexec_flags(version, precision)) == common + flags


def test_older_versions_are_told_what_11_does_by_itself() -> None:
    old, new = timing_flags("10.3"), timing_flags("11.0")

    assert set(old) - set(new) == set(DEPRECATED_IN_11)
    assert timing_flags("8.6") == old
    assert set(new) < set(old)


@pytest.mark.parametrize(
    "version",
    ["7.2", "8.4", "8.7", "9.3", "12.0", "10", "", "x.y", "10.x", "10.3; rm", "-1.0", "\uff11\uff10.3", "10..3"],
)
def test_an_unknown_version_is_refused_by_name(version: str) -> None:
    for ask in (lambda: trtexec_flags(version, "fp32"), lambda: timing_flags(version)):
        with pytest.raises(UsageError, match=r"^TensorRT version ") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"precision 'bf16' for TensorRT: expected one of fp32, fp16, int8"):
        trtexec_flags("10.3", "bf16")


@pytest.mark.parametrize(
    ("version", "flag", "known"),
    [
        ("8.5.2", "--skipInference", False), ("8.6.1", "--skipInference", True), ("8.6.1", "--stronglyTyped", False),
        ("10.0.1", "--stronglyTyped", True), ("10.3.0", "--buildOnly", False), ("10.3.0", "--fp16", True),
        ("11.1.0", "--fp16", False), ("11.1.0", "--noCudaGraph", True), ("10.3.0", "--noCudaGraph", False),
    ],
)  # fmt: skip
def test_the_stand_in_takes_the_flags_of_its_version_only(version: str, flag: str, known: bool) -> None:
    environment = {**os.environ, "STANDIN_VERSION": version}

    done = subprocess.run([sys.executable, STANDIN, flag, "--help"], env=environment, capture_output=True, text=True)

    assert done.returncode == (0 if known else 1)
    assert (f"[E] Unknown option: {flag}" in done.stdout) is not known
    assert ("&&&& FAILED TensorRT.trtexec [TensorRT v" in done.stdout) is not known
