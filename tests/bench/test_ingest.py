"""trtexec's files as results: its text and JSON in the forms of TensorRT 8 to 11."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevit.bench.ingest import Run, precision_of, read_directory, read_run, result_of
from edgevit.bench.trtexec_json import Layers, read_json
from edgevit.bench.trtexec_log import read_log, version_text
from edgevit.errors import InputError, RuntimeFailure

# The lines of NVIDIA/TensorRT issues 3083 and 4177, numbers included.
SUMMARY = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --loadEngine=/home/me/m.engine --useCudaGraph --iterations=10
[10/30/2026-12:00:00] [I] === Device Information ===
[10/30/2026-12:00:00] [I] Selected Device: NVIDIA A100-SXM4-80GB
[10/30/2026-12:00:00] [I] Compute Capability: 8.0
[10/30/2026-12:00:00] [W] [TRT] Using default for use_cuda_graph
[10/30/2026-12:00:01] [I] Warmup completed 54 queries over 200 ms
[10/30/2026-12:00:01] [I] Timing trace has 705 queries over 3.01 s
[10/30/2026-12:00:01] [I]
[10/30/2026-12:00:01] [I] === Trace details ===
[10/30/2026-12:00:01] [I] Trace averages of 10 runs:
[10/30/2026-12:00:01] [I] Average on 10 runs - GPU latency: 4.24171 ms - Host latency: 4.29793 ms (enqueue 1.81771 ms)
[10/30/2026-12:00:01] [I] ... Omitting 65 lines
[10/30/2026-12:00:01] [I] === Performance summary ===
[10/30/2026-12:00:01] [I] Throughput: 234.19 qps
[10/30/2026-12:00:01] [I] Latency: min = 4.27838 ms, max = 5.82495 ms, mean = 4.29966 ms, median = 4.29718 ms, \
percentile(90%) = 4.30725 ms, percentile(95%) = 4.31128 ms, percentile(99%) = 4.32874 ms
[10/30/2026-12:00:01] [I] Enqueue Time: min = 1.8 ms, max = 2.1 ms, mean = 1.9 ms, median = 1.9 ms
[10/30/2026-12:00:01] [I] H2D Latency: min = 0.04 ms, max = 0.06 ms, mean = 0.05 ms, median = 0.05 ms
[10/30/2026-12:00:01] [I] GPU Compute Time: min = 4.2 ms, max = 5.7 ms, mean = 4.2 ms, median = 4.24 ms
[10/30/2026-12:00:01] [I] D2H Latency: min = 0.001 ms, max = 0.01 ms, mean = 0.005 ms, median = 0.005 ms
[10/30/2026-12:00:01] [I] Total Host Walltime: 3.00082 s
[10/30/2026-12:00:01] [I] Total GPU Compute Time: 2.96536 s
[10/30/2026-12:00:01] [W] * GPU compute time is unstable, with coefficient of variance = 3.1%.
[10/30/2026-12:00:01] [W]   If not already in use, locking GPU clock frequency may improve the stability.
[10/30/2026-12:00:01] [I] Explanations of the performance metrics are printed in the verbose logs.
&&&& PASSED TensorRT.trtexec [TensorRT v8601] # trtexec --loadEngine=/home/me/m.engine --useCudaGraph --iterations=10
"""
FP16, FP32, INT8 = "Row major linear FP16 format", "Row major linear FP32", "Thirty-two wide ... row major Int8 format"


def query(latency: float = 2.0, h2d: float = 0.0, start: float = 200.0) -> dict[str, float]:
    compute = latency - h2d
    return {
        "startEnqMs": start, "endEnqMs": start + 0.1, "startH2dMs": start, "endH2dMs": start + h2d,
        "startComputeMs": start + h2d, "endComputeMs": start + latency, "startD2hMs": start + latency,
        "endD2hMs": start + latency, "h2dMs": h2d, "computeMs": compute, "d2hMs": 0.0, "latencyMs": latency,
    }  # fmt: skip


def times(count: int = 700, **query_fields: float) -> list[dict[str, float]]:
    return [query(2.0 + 0.001 * (i % 100), start=200.0 + 3 * i, **query_fields) for i in range(count)]


def layer(name: str, kind: str = "CaskConvolution", into: str = FP16, out: str = FP16, **more: Any) -> dict[str, Any]:
    tensor = {"Location": "Device", "Dimensions": [1, 8, 8, 8]}
    return {
        "Name": name, "LayerType": kind, "Inputs": [{"Name": "i", **tensor, "Format/Datatype": into}],
        "Outputs": [{"Name": "o", **tensor, "Format/Datatype": out}], **more,
    }  # fmt: skip


def split(row: dict[str, Any]) -> dict[str, Any]:
    """A layer in the form of TensorRT 11."""
    words = {FP16: "Half", FP32: "Float", INT8: "Int8"}

    def tensor(old: dict[str, Any]) -> dict[str, Any]:
        text = old.pop("Format/Datatype")
        return {**old, "Format": "Row major linear", "DataType": words[text]}

    return {**row, "Inputs": [tensor(t) for t in row["Inputs"]], "Outputs": [tensor(t) for t in row["Outputs"]]}


def profile(**layers_ms: float) -> list[dict[str, Any]]:
    rows = [{"name": n, "timeMs": 10 * t, "averageMs": t, "medianMs": t, "percentage": 1} for n, t in layers_ms.items()]
    return [{"count": 10}, *rows]


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a text, or a value as JSON: `save("times.json", times())`."""

    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write


def run_of(*paths: Path) -> Run:
    return read_run(paths, "here", strict=True)


def layers_of(*rows: Any) -> Run:
    found = read_json("layers.json", json.dumps({"Layers": list(rows), "Bindings": ["a"]}))
    assert isinstance(found, Layers)
    return Run("here", layers=found)


def test_a_log_alone_gives_its_own_percentiles_and_says_so(save: Save) -> None:
    result, warnings = result_of(run_of(save("log.txt", SUMMARY)), "net", 4)

    assert result["latency_ms"] == {"p50": 4.29718, "p90": 4.30725, "p99": 4.32874}
    assert result["latency_text"] == {"p50": "4.30", "p90": "4.31", "p99": "4.33"}
    assert (result["samples_ms"], result["warmup_runs"], result["version"]) == ((), 54, "8.6.1")
    assert result["device"] == {"name": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0"}
    assert result["throughput"] == {"queries_per_s": 234.19, "pictures_per_s": 4 * 234.19}
    assert result["flags"] == ["--useCudaGraph", "--iterations=10"]
    assert result["conditions"] == {"cuda_graph": True, "spin_wait": False, "no_data_transfers": False}
    assert result["printed_ms"]["h2d_ms"]["median"] == 0.05
    assert result["effective_precision"] is None
    assert warnings == [
        "net: trtexec: GPU compute time is unstable, with coefficient of variance = 3.1%.",
        "net: only the log is given: percentiles are trtexec's own, and there are no samples",
        "net: the precision that really ran is unknown: no layer information is given (--exportLayerInfo); "
        "build.sh keeps what is needed",
        "net: timed without spin wait, no data transfers: compare it only with times taken the same way",
    ]


def test_too_few_queries_support_no_high_percentile_of_a_log_either(save: Save) -> None:
    result, _ = result_of(run_of(save("log.txt", SUMMARY.replace("has 705 queries", "has 70 queries"))), "net", 1)

    assert result["latency_text"] == {"p50": "4.30", "p90": "4.31", "p99": "n/a (needs 662)"}


def test_times_give_percentiles_by_the_rule_of_our_own_races(save: Save) -> None:
    result, _ = result_of(run_of(save("t.json", times())), "net", 2)

    assert len(result["samples_ms"]) == len(result["rounds"]) == 700
    assert result["latency_ms"]["p50"] == pytest.approx(2.0495)
    assert result["latency_ms"]["p99"] == pytest.approx(2.09801, abs=1e-3)
    assert result["throughput"]["pictures_per_s"] == pytest.approx(2 * 1000 * 700 / (699 * 3 + 2.099))
    assert result["conditions"] == {"cuda_graph": None, "spin_wait": None, "no_data_transfers": True}


def test_times_with_transfers_are_told_from_those_without(save: Save) -> None:
    moved, _ = result_of(run_of(save("t.json", times(h2d=0.05))), "net", 1)

    assert moved["conditions"]["no_data_transfers"] is False


def test_few_times_support_few_percentiles(save: Save) -> None:
    result, _ = result_of(run_of(save("t.json", times(70))), "net", 1)

    assert (result["latency_ms"]["p90"] is None, result["latency_text"]["p99"]) == (False, "n/a (needs 662)")


def test_the_times_are_taken_before_the_log_and_must_be_of_the_same_run(save: Save) -> None:
    close = SUMMARY.replace("4.29718", "2.0500")
    log, other = save("log.txt", close), save("other.txt", SUMMARY)
    path = save("t.json", times())

    result, _ = result_of(run_of(path, log), "net", 1)
    assert result["latency_ms"]["p50"] == pytest.approx(2.0495)
    with pytest.raises(InputError, match=r"^here: the times have a median of 2\.05 ms, the log of 4\.30 ms: they are"):
        result_of(run_of(path, other), "net", 1)


def test_a_chip_that_grows_hot_is_seen(save: Save) -> None:
    slow = [query(2.0 if i < 350 else 2.4) for i in range(700)]

    _, warnings = result_of(run_of(save("t.json", slow)), "net", 1)

    assert warnings[0].startswith("net: 20% slower in the second half of the run (2.00 -> 2.40 ms).")


@pytest.mark.parametrize("form", [lambda row: row, split])
def test_operators_are_joined_with_their_layers_in_both_forms(save: Save, form: Callable[[Any], Any]) -> None:
    rows = [
        layer("in", "Reformat", FP32),
        layer("conv", Metadata="[ONNX Layer: /a/Conv]\x1e[ONNX Layer: /a/Relu]"),
        layer("norm", "kgen", FP32, FP32),
        layer("_gemm_mha_v2_0", "kgen"),
    ]
    files = [
        save("t.json", times()),
        save("p.json", profile(**{"in": 0.1, "conv": 0.6, "norm": 0.1, "_gemm_mha_v2_0": 0.2, "gone": 0.0})),
        save("l.json", {"Layers": [form(row) for row in rows], "I/O Tensors": [{"Name": "image"}]}),
    ]

    result, warnings = result_of(run_of(*files), "net", 1)

    found = [(o["name"], o["kind"], o["precision"], o["time_ms"]) for o in result["operators"]]
    assert found == [
        ("in", "Reformat", "fp32", 0.1), ("conv", "CaskConvolution", "fp16", 0.6), ("norm", "kgen", "fp32", 0.1),
        ("_gemm_mha_v2_0", "kgen", "fp16", 0.2), ("gone", "", "unknown", 0.0),
    ]  # fmt: skip
    assert result["operators"][1]["origins"] == ("/a/Conv", "/a/Relu")
    assert result["effective_precision"] == "fp16"
    assert result["precision_share"]["time"] == pytest.approx({"fp16": 0.8, "fp32": 0.2})
    assert result["precision_share"]["layers"] == {"fp32": 0.5, "fp16": 0.5}
    assert result["precision_share"]["products"] == {"fp16": 1.0}
    assert result["fused_attention"] == 1
    assert warnings == []


def test_keys_are_read_in_any_case() -> None:
    row = {key.upper(): value for key, value in layer("conv").items()}
    row["INPUTS"] = [{key.lower(): value for key, value in tensor.items()} for tensor in row["INPUTS"]]
    found = read_json("l.json", json.dumps({"LAYERS": [row]}))

    assert isinstance(found, Layers)
    assert (found.layers[0].name, found.layers[0].precision, found.detailed) == ("conv", "fp16", True)


def test_names_alone_tell_no_precision(save: Save) -> None:
    names = save("l.json", {"Layers": ["conv", "fc"], "Bindings": ["image", "logits"]})

    result, warnings = result_of(run_of(save("t.json", times()), names), "net", 1)

    assert result["effective_precision"] is None
    assert "holds names only, the engine was built without --profilingVerbosity=detailed" in warnings[0]


@pytest.mark.parametrize(
    ("rows", "precision"),
    [
        ([layer("a"), layer("b")], "fp16"),
        ([layer("a"), layer("b", into=FP32)], "fp16+fp32"),
        ([layer("a", into=INT8), layer("b", into=INT8, out=FP16)], "int8"),
        ([layer("a", into=FP32, TacticName="sm80_xmma_tf32f32_nhwc")], "tf32"),
        ([layer("a", into=FP32, TacticName="sm80_xmma_f32f32_nhwc")], "fp32"),
        ([layer("norm", "kgen", FP32, FP32), layer("a")], "fp16"),
        ([layer("a", "Reformat", FP32)], None),
        ([layer("{ForeignNode[a...b]}", "Myelin", FP32, FP32)], None),
        ([layer("{ForeignNode[a...b]}", "Myelin", FP32, FP32), layer("a")], None),
        ([layer("a", into="N/A due to dynamic shapes", out="N/A due to dynamic shapes")], None),
        ([layer("convert", "Cast", FP32)], None),
        ([layer("/conv/Add_to_norm", "kgen", FP32), layer("a")], "fp16"),
        ([layer("x", "Convert", FP32), layer("y", "PointWiseV2", FP32), layer("a")], "fp16"),
        ([layer("__myl_matmul_0", "kgen", FP32), layer("a")], "fp16+fp32"),
        ([layer("fc", "CaskGemmMatrixMultiply", FP32), layer("a", "Other", ParameterType="Convolution")], "fp16+fp32"),
        ([layer("/attn/MatMul", "gemm", FP32), *(layer(f"c{i}") for i in range(40))], "fp16"),
        ([], None),
    ],
)
def test_the_precision_is_that_of_the_products(rows: list[Any], precision: str | None) -> None:
    assert precision_of(layers_of(*rows)) == precision


def test_time_decides_where_there_is_a_profile() -> None:
    run = layers_of(layer("big", into=FP32), *(layer(f"c{i}") for i in range(40)))
    assert precision_of(run) == "fp16"

    run.profile = (("big", 5.0), *((f"c{i}", 0.1) for i in range(40)))

    assert precision_of(run) == "fp16+fp32"


def test_what_was_kept_in_float32_on_purpose_is_left_out() -> None:
    run = layers_of(layer("a"), layer("b", into=FP32, Metadata="[ONNX Layer: /wide/MatMul]"))

    assert precision_of(run) == "fp16+fp32"
    assert precision_of(run, {"/wide/MatMul"}) == "fp16"
    assert precision_of(run, {"/other"}) == "fp16+fp32"


def test_a_profile_without_averages_is_divided_by_its_count(save: Save) -> None:
    rows = [{"count": 4}, {"name": "a", "timeMs": 8.0, "percentage": 100}]

    result, _ = result_of(run_of(save("t.json", times()), save("p.json", rows)), "net", 1)

    assert [(o["name"], o["time_ms"]) for o in result["operators"]] == [("a", 2.0)]


def test_a_profile_of_another_engine_is_noticed(save: Save) -> None:
    files = save("t.json", times()), save("p.json", profile(x=1.0, y=1.0)), save("l.json", {"Layers": [layer("a")]})

    _, warnings = result_of(run_of(*files), "net", 1)

    assert any("2 of 2 profiled layers are not in the layer information" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("tag", "text"),
    [("8502", "8.5.2"), ("8601", "8.6.1"), ("100300", "10.3.0"), ("101303", "10.13.3"), ("110401", "11.4.1"),
     ("8.6.1", "8.6.1"), ("123", "123"), ("12345", "12345")],
)  # fmt: skip
def test_a_version_tag_is_read(tag: str, text: str) -> None:
    assert version_text(tag) == text


@pytest.mark.parametrize(
    ("version", "flags", "expected"),
    [
        ("v100300", "--useCudaGraph --useSpinWait --noDataTransfers", (True, True, True)),
        ("v100300", "", (False, False, False)),
        ("v110100", "", (True, True, True)),
        ("v110100", "--noCudaGraph --includeDataTransfers", (False, True, False)),
    ],
)
def test_conditions_follow_the_defaults_of_each_version(
    save: Save, version: str, flags: str, expected: tuple[bool, ...]
) -> None:
    text = SUMMARY.replace("v8601", version).replace("--useCudaGraph --iterations=10", flags)

    result, warnings = result_of(run_of(save("log.txt", text)), "net", 1)

    assert tuple(result["conditions"].values()) == expected
    assert any("timed without" in warning for warning in warnings) is (False in expected)


def test_a_cuda_graph_that_could_not_be_captured_is_told_whatever_the_flags_say(save: Save) -> None:
    line = (
        "[10/30/2026-12:00:00] [W] The specified --useCudaGraph flag has been ignored. The inference will be launched "
        "without using CUDA graph launch.\n"
    )

    result, warnings = result_of(run_of(save("log.txt", SUMMARY + line)), "net", 1)

    assert result["conditions"]["cuda_graph"] is False
    assert "net: timed without cuda graph, spin wait, no data transfers: compare it only with" in warnings[-1]


def test_a_control_character_in_a_name_does_not_spoil_a_profile(save: Save) -> None:
    text = '[{"count": 1}, {"name": "a\x1e\tb", "averageMs": 1.0}]'

    result, _ = result_of(run_of(save("t.json", times()), save("p.json", text)), "net", 1)

    assert result["operators"][0]["name"] == "a  b"


def test_a_failed_run_is_no_result(save: Save) -> None:
    text = SUMMARY.replace("&&&& PASSED", "[10/30/2026-12:00:02] [E] Cuda failure: \x1b[31mout of memory\n&&&& FAILED")

    with pytest.raises(RuntimeFailure) as caught:
        result_of(run_of(save("log.txt", text)), "net", 1)
    assert str(caught.value) == "here: trtexec failed: Cuda failure:  [31mout of memory; there is nothing to read"


def test_a_log_that_is_cut_off_is_told(save: Save) -> None:
    _, warnings = result_of(run_of(save("log.txt", SUMMARY.partition("&&&& PASSED")[0])), "net", 1)

    assert any("the log ends without PASSED" in warning for warning in warnings)


def test_a_build_log_gives_the_version_and_no_times(save: Save) -> None:
    build = "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --onnx=m.onnx\n&&&& PASSED TensorRT.trtexec\n"

    result, _ = result_of(run_of(save("t.json", times()), save("b.log", build)), "net", 1)
    assert result["version"] == "10.3.0"
    with pytest.raises(InputError, match="no times; expected a log with a performance summary"):
        result_of(run_of(save("b.log", build)), "net", 1)


def test_a_directory_is_read_and_what_is_strange_in_it_passed_over(save: Save, tmp_path: Path) -> None:
    save("run/times.json", times())
    save("run/manifest.json", {"schema_version": 1})
    save("run/notes.txt", "what I did")
    save("run/.hidden.json", "{")
    save("run/model.engine", "\x00")
    (tmp_path / "run" / "folder.json").mkdir()

    assert read_directory(tmp_path / "run").times is not None
    with pytest.raises(InputError, match="no such file"):
        run_of(tmp_path / "absent.json")
    with pytest.raises(InputError, match="not a file"):
        run_of(tmp_path / "run")


def test_numbers_are_kept_as_they_are_printed() -> None:
    log = read_log("log", SUMMARY)

    assert log.statistics["latency_ms"] == {
        "min": 4.27838, "max": 5.82495, "mean": 4.29966, "median": 4.29718, "p90": 4.30725, "p95": 4.31128,
        "p99": 4.32874,
    }  # fmt: skip
    assert (log.queries, log.passed, log.errors) == (705, True, [])
