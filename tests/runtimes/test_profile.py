"""What ONNX Runtime and OpenVINO tell of the operators that they executed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevit.bench.attestation import with_macs
from edgevit.bench.complexity import count_onnx, macs_by_node
from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.ov import OvRuntime
from edgevit.specs import OperatorTime

RUNTIMES = [OrtRuntime, OvRuntime]


def attention_block(batch: int | str) -> onnx.ModelProto:
    """Two convolutions and a residual; tokens; a Linear; attention of the tokens with themselves; a product."""
    draw = np.random.default_rng(0)
    stored = {"kernel": (24, 3, 3, 3), "grouped": (24, 6, 1, 1), "inner": (24, 32), "outer": (32, 10), "shift": (32,)}
    weights = [numpy_helper.from_array(draw.standard_normal(s).astype(np.float32) / 4, n) for n, s in stored.items()]
    weights.append(numpy_helper.from_array(np.array([0, 24, 64]), "shape"))
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["stem"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["stem"], ["bent"], "relu"),
        helper.make_node("Conv", ["bent", "grouped"], ["mixed"], "mix", group=4),
        helper.make_node("Add", ["mixed", "bent"], ["sum"], "residual"),
        helper.make_node("Reshape", ["sum", "shape"], ["flat"], "flatten"),
        helper.make_node("Transpose", ["flat"], ["tokens"], "tokens", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "inner"], ["wide"], "inner"),
        helper.make_node("Add", ["wide", "shift"], ["keys"], "shift"),
        helper.make_node("Transpose", ["keys"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["keys", "turned"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], "softmax"),
        helper.make_node("MatMul", ["weights", "keys"], ["mean"], "mean"),
        helper.make_node("MatMul", ["mean", "outer"], ["logits"], "outer"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 64, 10])
    graph = helper.make_graph(nodes, "block", [image], [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


PRODUCTS = {
    "stem": 24 * 64 * 27,
    "mix": 24 * 64 * 6,
    "inner": 64 * 24 * 32,
    "scores": 64 * 32 * 64,
    "mean": 64 * 64 * 32,
    "outer": 64 * 32 * 10,
}


@pytest.fixture(params=[1, 2, "batch"])
def block(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """The file, and how many pictures it is fed."""
    onnx.save(attention_block(request.param), tmp_path / "block.onnx")
    return tmp_path / "block.onnx", 1 if request.param == "batch" else request.param


def profiled(runtime: Any, file: tuple[Path, int], runs: int, *arguments: Any) -> tuple[OperatorTime, ...]:
    path, pictures = file
    image = np.random.default_rng(1).standard_normal((pictures, 3, 8, 8)).astype(np.float32)
    with Session(runtime(path, 1, *arguments)) as session:
        operators: tuple[OperatorTime, ...] = session.runtime.profile({"image": image}, runs)
    return operators


def test_the_products_of_each_node_are_known(block: tuple[Path, int]) -> None:
    path, pictures = block
    assert macs_by_node(path) == {name: macs * pictures for name, macs in PRODUCTS.items()}
    assert count_onnx(path).macs == sum(PRODUCTS.values()) * pictures


@pytest.mark.parametrize("runs", [0, 3])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_product_is_found_once_among_what_ran(block: tuple[Path, int], runtime: Any, runs: int) -> None:
    path, pictures = block
    operators = profiled(runtime, block, runs)
    if any(operator.macs is None for operator in operators):
        operators = with_macs(operators, macs_by_node(path))
    assert sum(o.macs or 0 for o in operators) == sum(PRODUCTS.values()) * pictures
    assert {o.precision for o in operators if o.macs} == {"fp32"}
    named = {origin for o in operators for origin in o.origins}
    assert {"stem", "scores", "mean"} <= named  # the others may run under the name of the addition or output after them


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_times_are_positive_where_runs_were_asked_for(block: tuple[Path, int], runtime: Any) -> None:
    timed = profiled(runtime, block, 4)
    assert sum(o.time_ms for o in timed) > 0
    assert all(math.isfinite(o.time_ms) and o.time_ms >= 0 for o in timed)
    assert all(o.time_ms == 0 for o in profiled(runtime, block, 0))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_profile_leaves_nothing_behind(
    block: tuple[Path, int], runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "here"
    where.mkdir()
    monkeypatch.chdir(where)
    monkeypatch.setenv("TMPDIR", str(where))
    monkeypatch.setattr("tempfile.tempdir", None)
    beside = sorted(os.listdir(block[0].parent))
    profiled(runtime, block, 1)
    assert os.listdir(where) == []
    assert sorted(os.listdir(block[0].parent)) == beside


def test_bfloat16_is_seen_where_it_runs(block: tuple[Path, int]) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    operators = profiled(OvRuntime, block, 1, "bf16")
    total = sum(o.macs or 0 for o in operators)
    assert sum(o.macs or 0 for o in operators if o.precision == "bf16") > 0.5 * total
    assert sum(o.macs or 0 for o in profiled(OvRuntime, block, 1) if o.precision == "bf16") == 0


def test_float16_weights_alone_do_not_make_a_product_float16(block: tuple[Path, int], tmp_path: Path) -> None:
    ov.save_model(ov.convert_model(block[0]), tmp_path / "half.xml", compress_to_fp16=True)
    operators = profiled(OvRuntime, (tmp_path / "half.xml", block[1]), 0)
    assert {o.precision for o in operators if o.macs} == {"fp32"}


def test_onnx_runtime_computes_a_float16_file_in_what_it_says(tmp_path: Path) -> None:
    """Its CPU kernels for float16 are few: most graphs are cast to float32, and a profile must not say otherwise."""
    weight = numpy_helper.from_array(np.ones((3, 4), np.float16), "weight")
    node = helper.make_node("MatMul", ["image", "weight"], ["logits"], "product")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [2, d]) for n, d in (("image", 3), ("logits", 4))]
    graph = helper.make_graph([node], "half", ends[:1], ends[1:], [weight])
    path = tmp_path / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with Session(OrtRuntime(path, 1, "fp16")) as session:
        operators = session.runtime.profile({"image": np.ones((2, 3), np.float16)}, 1)
        assert session.runtime.effective_precision == "fp16"  # as it is stored
    kinds = {o.kind for o in operators}
    product = next(o for o in operators if "MatMul" in o.kind or "Gemm" in o.kind)
    assert product.precision == ("fp32" if "Cast" in kinds else "fp16")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_not_loaded_has_no_profile(tmp_path: Path, runtime: Any) -> None:
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime(tmp_path / "model.onnx").profile({}, 1)
