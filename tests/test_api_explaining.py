"""Limits through real runtimes, and what is said where a runtime, a file or a manifest does not tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgevit.api import explaining
from edgevit.api.running import RunOn, session_of
from edgevit.artifact import Artifact, load_artifact
from edgevit.bench import probes
from edgevit.bench.roofline import Peaks
from edgevit.errors import RuntimeFailure, UsageError
from edgevit.runtimes import Session
from edgevit.runtimes.fake import FakeRuntime
from edgevit.runtimes.ort import OrtRuntime
from edgevit.specs import OperatorTime

PEAKS = Peaks("ort", 1, {"fp32": 100e9, "int8": 400e9}, ((1 << 20, 50e9), (1 << 23, 10e9)))


@pytest.fixture
def artifact(exported: Any) -> Artifact:
    """mobileformer_26m for ONNX at 64x64."""
    return load_artifact(exported.path)


def without_graph(artifact: Artifact, **manifest: Any) -> Artifact:
    """The same artifact as if its model file were no ONNX graph, and with other entries in its manifest."""
    changed = {"model_file": "model.xml", "checked_file": "model.xml", **manifest}
    return replace(artifact, manifest={**artifact.manifest, **changed})


def fake(*profiled: OperatorTime) -> Session:
    """A session that tells these operators, or that it cannot tell any."""
    runtime: Any = FakeRuntime(lambda _: {}, profiled=profiled)
    if not profiled:
        runtime.profile = silent
    return Session(runtime)


def silent(*_: Any) -> tuple[OperatorTime, ...]:
    raise RuntimeFailure("runtime fake: has no profile")


# Peaks


@pytest.mark.parametrize("runtime", ["ort", "ov"])
def test_peaks_of_a_runtime_are_measured_through_it(runtime: str) -> None:
    peaks = explaining.measure_peaks(runtime, 1, ("fp32", "int8", "fp32"), 1 << 21, budget_s=0.0)
    assert set(peaks.flops_per_s) == {"fp32", "int8"} and peaks.absent == {}
    assert min(peaks.flops_per_s.values()) > 1e8  # a processor of 1999 has more
    assert [size for size, _ in peaks.bandwidth] == sorted(
        probes.stream_probe(size).set_bytes for size in (*probes.STREAM_SETS, 1 << 21)
    )
    assert min(speed for _, speed in peaks.bandwidth) > 1e7
    assert peaks.unsteady >= 1 and (peaks.runtime, peaks.threads) == (runtime, 1)


def test_a_precision_that_the_runtime_does_not_have_is_absent_and_never_zero() -> None:
    peaks = explaining.measure_peaks("ort", 1, ("bf16",), budget_s=0.0)
    assert peaks.flops_per_s == {} and peaks.absent == {"bf16": "runtime ort computes it in fp32"}
    assert len(peaks.bandwidth) == len(probes.STREAM_SETS)


def test_products_that_run_in_another_precision_than_they_say_are_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    true = OrtRuntime.profile

    def widened(self: OrtRuntime, inputs: Any, runs: int) -> tuple[OperatorTime, ...]:
        return tuple(replace(operator, precision="fp32") for operator in true(self, inputs, runs))

    monkeypatch.setattr(OrtRuntime, "profile", widened)
    peaks = explaining.measure_peaks("ort", 1, ("int8",), budget_s=0.0)
    assert peaks.flops_per_s == {} and peaks.absent == {"int8": "runtime ort computes it in fp32"}


@pytest.mark.parametrize("runtime", ["trt", "coreml", "torch", "fake", "mil_reference", "no such"])
def test_limits_of_a_runtime_without_onnx_are_refused_in_one_line(runtime: str) -> None:
    with pytest.raises(UsageError, match=f"^roofline: runtime {runtime} runs no ONNX files, .*; name one") as caught:
        explaining.measure_peaks(runtime)
    assert "\n" not in str(caught.value)
    assert explaining.roof_obstacle(runtime) is not None
    assert explaining.roof_obstacle("ort") is explaining.roof_obstacle("ov") is None


def test_an_interpreters_time_is_no_limit() -> None:
    with pytest.raises(UsageError, match="in a time that is no device's"):
        explaining.measure_peaks("typed_ort")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision fp7, expected one of fp32, bf16, fp16, int8"):
        explaining.measure_peaks("ort", precisions=("fp32", "fp7"))


# A network's limit


@pytest.mark.parametrize("runtime", ["ort", "ov"])
def test_the_limit_rests_on_all_products_that_run(artifact: Artifact, runtime: str) -> None:
    with session_of(artifact, RunOn(runtime, 1)) as session:
        roof = explaining.roof_of(session, artifact, PEAKS, 1000.0)
    assert roof["macs"] == artifact.manifest["complexity"]["macs"]
    assert roof["working_set_bytes"] <= artifact.manifest["complexity"]["weight_bytes"]
    assert roof["limit_ms"] >= 2000 * roof["macs"] / 100e9
    assert 0 < roof["share"] == roof["limit_ms"] / 1000 < 1
    assert (roof["counted"], roof["timed"], roof["bound_by"]) == ("executed operators", False, "memory")
    assert roof["intensity_flops_per_byte"] == 2 * roof["macs"] / roof["moved_bytes"]
    assert roof["ridge_flops_per_byte"] == 10.0
    assert {row["time_ms"] for row in roof["by_kind"]} == {None}
    assert roof["warnings"] == []
    json.dumps(roof, allow_nan=False)


@pytest.mark.parametrize("runtime", ["ort", "ov"])
def test_an_explanation_names_at_most_three_losses(artifact: Artifact, runtime: str) -> None:
    with session_of(artifact, RunOn(runtime, 1)) as session:
        told = explaining.explain(session, artifact, PEAKS, 1000.0, runs=2)
    first, *others = told["explanation"]
    assert first.startswith("1000 ms an inference; its products need ")
    assert [sentence.count(" ms lost") for sentence in others[:3]] == [1, 1, 1]
    assert others[3].startswith("The operators add up to ") and len(others) == 4
    lost = [row["lost_ms"] for row in told["by_kind"]]
    assert lost == sorted(lost, reverse=True) and told["timed"]
    json.dumps(told, allow_nan=False)


def test_a_time_below_the_limit_is_told(artifact: Artifact) -> None:
    with session_of(artifact, RunOn("ort", 1)) as session:
        roof = explaining.roof_of(session, artifact, PEAKS, 1e-6)
        still = explaining.roof_of(session, artifact, PEAKS, 0.0)
    assert roof["share"] > 1 and "faster than can be" in roof["warnings"][0]
    assert still["share"] is None  # a clock that stands still


def test_a_dynamic_batch_counts_as_it_was_run(tiny: Any) -> None:
    exported = tiny.export(batch="dynamic")
    one = exported.sample("input")
    for runtime in ("ort", "ov"):
        with session_of(exported, RunOn(runtime, 1)) as session:
            single, triple = (
                explaining.roof_of(session, exported, PEAKS, 1.0, feed={"image": np.repeat(one, n, axis=0)})
                for n in (1, 3)
            )
        assert triple["macs"] == 3 * single["macs"] == 3 * exported.manifest["complexity"]["macs"]
        assert triple["working_set_bytes"] == single["working_set_bytes"]
        assert single["moved_bytes"] < triple["moved_bytes"] < 3 * single["moved_bytes"]


def test_another_file_in_the_artifacts_place_is_counted_itself(artifact: Artifact, tiny: Any) -> None:
    other = tiny.export()
    with session_of(artifact, RunOn("ort", 1), other.model_file) as session:
        feed = {"image": other.sample("input")}
        roof = explaining.roof_of(session, artifact, PEAKS, 1.0, feed=feed, model_file=other.model_file)
    assert roof["macs"] == other.manifest["complexity"]["macs"]


def test_products_that_no_executed_operator_stands_for_count_and_are_told(artifact: Artifact) -> None:
    first = OperatorTime("a", "Gemm", "fp32", 3.0, ("no such node",), 1000)
    roof = explaining.roof_of(fake(), artifact, PEAKS, 1000.0, [first])
    macs = artifact.manifest["complexity"]["macs"]
    assert roof["macs"] == macs and roof["bound_by"] == "memory"  # all weights together, as in the graph
    assert [(row["kind"], row["macs"], row["time_ms"]) for row in roof["by_kind"]] == [
        ("Gemm", 1000, 3.0), ("products not found", macs - 1000, None),
    ]  # fmt: skip
    assert roof["warnings"] == ["100.0% of the products were not found among the executed operators"]


@pytest.mark.parametrize(("bin_bytes", "limit_ms", "bound_by"), [(20_000_000, 2.0, "memory"), (0, 1.0, None)])
def test_without_a_graph_the_weights_must_stream_all_together(
    artifact: Artifact, tmp_path: Path, bin_bytes: int, limit_ms: float, bound_by: str | None
) -> None:
    """What the file holds is a bound as well: a count of weights may be that of the float network."""
    (tmp_path / "model.xml").touch()
    with (tmp_path / "model.bin").open("wb") as file:
        file.truncate(bin_bytes)
    totals = {"macs": 50_000_000, "weight_bytes": 80_000_000, "activation_bytes": 1_000_000}
    bare = replace(without_graph(artifact, complexity=totals), path=tmp_path)
    product = OperatorTime("a", "FullyConnected", "fp32", 3.0, ("n",), 50_000_000)
    roof = explaining.roof_of(fake(), bare, PEAKS, 10.0, [product], {"image": np.zeros((1, 3, 64, 64), np.float32)})
    assert (roof["limit_ms"], roof["bound_by"], roof["counted"]) == (limit_ms, bound_by, "executed operators")
    assert (roof["by_kind"][0]["limit_ms"], roof["by_kind"][0]["weight_bytes"]) == (1.0, None)
    assert roof["moved_bytes"] == bin_bytes + 1_000_000
    assert roof["warnings"] == ["model.xml is no ONNX graph: what each operator moves is not known, only all of them"]


@pytest.mark.parametrize("source", ["graph", "manifest"])
def test_a_runtime_that_cannot_tell_leaves_the_count_of_the_graph_or_the_manifest(
    artifact: Artifact, source: str, tmp_path: Path
) -> None:
    feed = {"image": artifact.sample("input")}
    if source == "manifest":
        (tmp_path / "model.xml").write_bytes(bytes(20_000_000))
        artifact = replace(without_graph(artifact), path=tmp_path)
    told = explaining.explain(fake(), artifact, PEAKS, 10.0, feed=feed)
    macs = artifact.manifest["complexity"]["macs"]
    assert (told["macs"], told["counted"], told["timed"]) == (macs, source, False)
    assert [row["kind"] for row in told["by_kind"]] == ["all products"]
    assert told["limit_ms"] >= 2000 * macs / 100e9 and told["bound_by"] == "memory"
    assert told["warnings"][-1] == "the limit does not rest on executed operators: runtime fake: has no profile"
    first, last = told["explanation"]
    assert first.startswith("10.0 ms an inference; its products need ")
    assert last == "No operator was timed: runtime fake: has no profile"


@pytest.mark.parametrize(
    "complexity",
    [
        None,
        [],
        "many",
        {},
        {"macs": 10**400, "weight_bytes": -1, "activation_bytes": 10**400},
        {"macs": "1", "weight_bytes": 1.5, "activation_bytes": None},
        {"macs": float("nan"), "weight_bytes": float("inf"), "activation_bytes": True},
    ],
)
def test_a_manifest_without_a_sane_count_gives_no_limit(artifact: Artifact, complexity: Any) -> None:
    bare = without_graph(artifact, complexity=complexity)
    told = explaining.explain(fake(), bare, PEAKS, 10.0)
    assert (told["limit_ms"], told["share"], told["macs"], told["moved_bytes"]) == (None, None, 0, None)
    assert told["explanation"][0] == "10.0 ms an inference; no limit is known."
    json.dumps(told, allow_nan=False)


def test_peaks_that_could_not_be_measured_give_no_limit(artifact: Artifact) -> None:
    nothing = Peaks("ort", 1, {}, (), {"fp32": "it broke"})
    with session_of(artifact, RunOn("ort", 1)) as session:
        roof = explaining.roof_of(session, artifact, nothing, 10.0)
    assert (roof["limit_ms"], roof["share"], roof["ridge_flops_per_byte"]) == (None, None, None)
    assert roof["warnings"] == [
        "no peak of fp32: it broke. Its products count with what they move alone, so the limit is too low."
    ]


def test_a_graph_of_unknown_shapes_is_told_and_its_operators_are_still_timed(
    artifact: Artifact, tmp_path: Path
) -> None:
    """Anyone's export may leave the height open: how long the sums are is known, how many of them is not."""
    path = tmp_path / "open.onnx"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("image", [1, "h", 4]), ("y", [1, "h", 4]))
    ]
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    node = helper.make_node("MatMul", ["image", "w"], ["y"], "p")
    made = helper.make_graph([node], "open", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    feed = {"image": np.ones((1, 8, 4), np.float32)}
    with session_of(artifact, RunOn("ort", 1), path) as session:
        told = explaining.explain(session, artifact, PEAKS, 1.0, runs=1, feed=feed, model_file=path)
    assert told["limit_ms"] is None and told["timed"]
    assert any("what each operator moves is not known: MatMul node 'p': the shape of" in w for w in told["warnings"])
