"""`api.profile` and `attest`: a real artifact on real runtimes, and precisions that are not what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgevit import api
from edgevit.api import profiling
from edgevit.api.running import RunOn, session_of
from edgevit.artifact import load_artifact
from edgevit.errors import RuntimeFailure, UnknownNameError, UsageError
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.ov import OvRuntime
from edgevit.specs import OperatorTime


@pytest.fixture
def path(exported: Any) -> Path:
    """The artifact of mobileformer_26m for ONNX at 64x64."""
    return Path(exported.path)


@pytest.mark.parametrize("runtime", ["ort", "ov"])
def test_all_products_of_a_float32_artifact_run_in_float32(path: Path, runtime: str) -> None:
    document = profiling.profile(path, threads=1, runtime=runtime, runs=2)
    assert document["coverage"] == 1.0
    assert document["asked_precision"] == document["effective_precision"] == "fp32"
    assert document["by_precision"][0]["precision"] == "fp32"
    assert document["by_precision"][0]["macs_share"] == 1.0
    assert document["verdict"] == "products ran 100.0% in fp32; asked for fp32"
    assert document["image_size"] == [64, 64]
    assert sum(row["time_ms"] for row in document["by_kind"]) == pytest.approx(
        sum(operator["time_ms"] for operator in document["operators"])
    )
    json.dumps(document, allow_nan=False)


def test_a_session_that_hides_its_precision_is_caught_by_its_products(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO's own default would be, were the setting believed and not the executed graph."""
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic, which is what OpenVINO would take by itself")
    true = ov.Core.compile_model

    def careless(self: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        return true(self, model, device, {k: v for k, v in settings.items() if k != "INFERENCE_PRECISION_HINT"})

    monkeypatch.setattr(ov.Core, "compile_model", careless)
    monkeypatch.setattr(OvRuntime, "effective_precision", "fp32")
    with pytest.raises(RuntimeFailure, match=r"products ran 9\d\.\d% in bf16, .*; asked for fp32; beside: .*in bf16"):
        profiling.profile(path, runtime="ov", runs=1)
    artifact = load_artifact(path)
    with session_of(artifact, RunOn("ov", 1)) as session, pytest.raises(RuntimeFailure, match="asked for fp32"):
        profiling.attest(session, artifact, {"image": artifact.sample("input")})


def test_a_setting_that_is_read_back_wrong_is_caught_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OvRuntime, "effective_precision", "bf16")
    with pytest.raises(RuntimeFailure, match="runs in bf16, expected fp32"):
        profiling.profile(path, runtime="ov", runs=1)


@pytest.mark.parametrize("runtime", ["ort", "ov"])
def test_a_measurement_keeps_the_shares_without_timing(path: Path, runtime: str) -> None:
    artifact = load_artifact(path)
    with session_of(artifact, RunOn(runtime, 1)) as session:
        record = profiling.attest(session, artifact, {"image": artifact.sample("input")})
    assert record["as_asked"] is True
    assert record["coverage"] == 1.0
    assert [(s["precision"], s["macs_share"], s["time_ms"]) for s in record["by_precision"][:1]] == [("fp32", 1.0, 0.0)]


def test_another_file_in_the_artifacts_place_is_judged_by_its_own_products(path: Path, tiny: Any) -> None:
    other = Path(tiny.export().model_file)
    artifact = load_artifact(path)
    with session_of(artifact, RunOn("ov", 1), other) as session:  # which names what has no name in the file
        shape = [int(side) for side in session.runtime.inputs[0].shape]
        record = profiling.attest(session, artifact, {"image": np.zeros(shape, np.float32)}, other)
    assert (record["as_asked"], record["coverage"]) == (True, None)  # no count of this file to hold it against


def test_a_runtime_that_cannot_tell_is_no_failure_of_a_measurement(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any) -> tuple[OperatorTime, ...]:
        raise RuntimeFailure("runtime ort: has no profile")

    monkeypatch.setattr(OrtRuntime, "profile", silent)
    artifact = load_artifact(path)
    with session_of(artifact, RunOn()) as session:
        record = profiling.attest(session, artifact, {"image": artifact.sample("input")})
    assert (record["as_asked"], record["verdict"]) == (None, "runtime ort: has no profile")
    with pytest.raises(RuntimeFailure, match="has no profile"):
        profiling.profile(path, runs=1)


@pytest.mark.parametrize("runs", [0, -1, 10_001])
def test_runs_are_bounded(path: Path, runs: int) -> None:
    with pytest.raises(UsageError, match=f"profile: {runs} runs"):
        profiling.profile(path, runs=runs)


def test_wrong_runtimes_and_options_are_refused(path: Path) -> None:
    with pytest.raises(UnknownNameError):
        profiling.profile(path, runtime="coreml")
    with pytest.raises(UsageError):
        profiling.profile(path, runtime="ov", runtime_options={"streams": "many"})
    with pytest.raises(UsageError):
        profiling.profile(path, image_size=(96, 96))


@pytest.mark.parametrize(
    ("choices", "nodes"),
    [
        ({}, set()),
        ({"kept_fp32": 3}, set()),
        ({"kept_fp32": {"node": 1}}, set()),
        ({"kept_fp32": ["x", None, {}, [], {"node": 1}, {"node": "y"}]}, {"x", "y"}),
    ],
)
def test_a_strangers_choices_do_no_harm(choices: dict[str, Any], nodes: set[str]) -> None:
    assert profiling.declared_fp32(choices) == nodes


def test_an_ir_runs_in_its_own_precision(tmp_path: Path) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    artifact = api.export_model("mobileformer_26m", "openvino", precision="bf16", image_size=(64, 64), out=tmp_path)
    document = profiling.profile(artifact.path, threads=1, runs=2)
    assert document["coverage"] == 1.0
    assert document["by_precision"][0]["precision"] == "bf16"
    assert document["by_precision"][0]["macs_share"] > 0.99
    assert any("former" in origin for operator in document["operators"] for origin in operator["origins"])
