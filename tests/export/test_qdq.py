"""Ranges on pictures, and Q/DQ in a graph: what is measured once, rounded how, shared by whom, refused when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgevit.errors import ExportError
from edgevit.export import passes
from edgevit.export.quantize.calibrators import Range
from edgevit.export.quantize.observe import known_range, observe
from edgevit.export.quantize.qdq import (
    Scheme,
    grid,
    insert_qdq,
    measured,
    quantized,
    weight_axis,
    weight_scales,
)

UNSIGNED = Scheme("uint8", symmetric=False, bias=True, early=True)
SIGNED = Scheme("int8", symmetric=True)
Node = tuple[str, list[str], str, dict[str, Any]]  # kind, inputs, name of the node and its output, attributes


def graph(
    nodes: list[Node], constants: dict[str, NDArray[Any]], shape: list[int | str], output: str | None = None
) -> ir.Model:
    made = [helper.make_node(kind, inputs, [name], name=name, **attributes) for kind, inputs, name, attributes in nodes]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info(output or nodes[-1][2], onnx.TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    proto = helper.make_model(
        helper.make_graph(made, "g", [image], [out], stored),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def attention_like(shape: tuple[int | str, ...] = (2, 6, 16)) -> ir.Model:
    """Reshape and Transpose of an input, read by three Gemms, one with its weight turned."""
    rng = np.random.default_rng(1)
    weights = {f"w{part}": rng.standard_normal((16, 24)).astype(np.float32) for part in "qk"}
    weights["wv"] = rng.standard_normal((24, 16)).astype(np.float32)
    biases = {f"b{part}": rng.standard_normal(24).astype(np.float32) for part in "qkv"}
    nodes: list[Node] = [
        ("Transpose", ["image"], "moved", {"perm": [1, 0, 2]}),
        ("Reshape", ["moved", "flat"], "rows", {}),
        *(("Gemm", ["rows", f"w{p}", f"b{p}"], p, {"transB": int(p == "v")}) for p in "qkv"),
        ("Add", ["q", "k"], "qk", {}),
        ("Add", ["qk", "v"], "sum", {}),
    ]
    return graph(nodes, {**weights, **biases, "flat": np.array([-1, 16])}, list(shape))


def pictures(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model: ir.Model, image: NDArray[np.float32]) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(passes.run(model, passes.FINISH)).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"image": image})[0]
    return found


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def decibels(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected - actual).sum()))


@pytest.mark.parametrize("scheme", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_a_graph_with_int8_products_computes_what_the_float_one_does(scheme: Scheme) -> None:
    images = pictures(8, 6, 16)
    expected = run(attention_like(), images[:2])
    model = attention_like()
    seen = observe(model, measured(model, scheme, "qkv"), images, 2, "minmax")
    assert insert_qdq(model, seen.ranges, scheme, "qkv") == {"Gemm": 3}
    assert 30 < decibels(expected, run(model, images[:2])) < 60  # 8 bits, not exact


@pytest.mark.parametrize(("scheme", "before"), [(UNSIGNED, "image"), (SIGNED, "rows")], ids=["early", "late"])
def test_one_quantizer_serves_all_readers_ahead_of_moves_where_asked(scheme: Scheme, before: str) -> None:
    model = attention_like()
    insert_qdq(model, {"rows": Range(-3.0, 3.0)}, scheme, "qkv")
    (quantizer,) = (node for node in model.graph if node.op_type == "QuantizeLinear")
    assert quantizer.inputs[0] is not None
    assert quantizer.inputs[0].name == before
    assert kinds(model)["DequantizeLinear"] == 1 + 3 + 3 * scheme.bias


def test_symmetric_grids_have_their_zero_in_the_middle_and_others_hold_zero_exactly() -> None:
    assert grid(Range(-1.0, 2.0), SIGNED).zero == 0
    assert grid(Range(-1.0, 2.0), SIGNED).scale == pytest.approx(2.0 / 127)
    for low, high in [(-1.0, 2.0), (0.0, 6.0), (-6.0, 0.0), (-1e-3, 5e4)]:
        made = grid(Range(low, high), UNSIGNED)
        ends = ((0 - made.zero) * made.scale, (255 - made.zero) * made.scale)
        assert 0 <= made.zero <= 255
        assert ends[0] == pytest.approx(low, abs=made.scale)
        assert ends[1] == pytest.approx(high, abs=made.scale)


@pytest.mark.parametrize("scheme", [UNSIGNED, SIGNED])
@pytest.mark.parametrize("end", [0.0, 1e-44])
def test_a_range_of_nothing_has_scale_one(scheme: Scheme, end: float) -> None:
    assert grid(Range(0.0, end), scheme).scale == 1.0


def test_weights_have_a_scale_for_each_channel_and_zeros_stay_zeros() -> None:
    weight = pictures(5, 7) * np.array([[1e-4], [1], [100], [0], [3]], np.float32)
    scales = weight_scales(weight, 0)
    whole = quantized(weight, scales, 0)
    assert (np.abs(whole * scales[:, None] - weight) <= scales[:, None] * 0.5001).all()
    assert not whole[3].any()
    assert np.abs(whole).max() == 127
    assert np.abs(quantized(weight, weight_scales(weight, 0, 63), 0)).max() == 63


def test_a_bias_too_large_for_its_channel_widens_the_scale() -> None:
    weight = np.full((1, 4), 1e-6, np.float32)
    scales = weight_scales(weight, 0, bias=np.array([1e4], np.float32), input_scale=1e-3)
    assert np.abs(1e4 / (scales * 1e-3)).max() < 2**31


def test_nodes_that_are_not_chosen_are_left_alone() -> None:
    model = attention_like()
    insert_qdq(model, {"rows": Range(-3.0, 3.0)}, UNSIGNED, ["q"])
    assert kinds(model) == {**kinds(attention_like()), "QuantizeLinear": 1, "Transpose": 2, "Reshape": 2,
                            "DequantizeLinear": 3}  # fmt: skip


def test_an_addition_may_have_one_of_its_inputs_in_int8() -> None:
    model = attention_like()
    assert insert_qdq(model, {"k": Range(-9.0, 9.0)}, SIGNED, ["qk"]) == {"Add": 1}
    made = next(node for node in model.graph if node.name == "qk")
    assert [value.producer().op_type for value in made.inputs if value is not None] == ["Gemm", "DequantizeLinear"]


def test_weights_that_two_nodes_share_are_stored_once_if_their_scales_agree() -> None:
    weight = {"w": pictures(16, 24), "b": np.full(24, 1e9, np.float32), "flat": np.array([-1, 16])}
    nodes: list[Node] = [
        ("Gemm", ["image", "w"], "one", {}),
        ("Gemm", ["image", "w"], "two", {}),
        ("Gemm", ["image", "w", "b"], "three", {}),
        ("Sum", ["one", "two", "three"], "sum", {}),
    ]
    model = graph(nodes, weight, [4, 16])
    insert_qdq(model, {"image": Range(-1e-3, 1e-3)}, UNSIGNED, ["one", "two", "three"])
    stored = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert sum(value.const_value is not None and value.const_value.size == 16 * 24 for value in stored) == 2


@pytest.mark.parametrize(
    ("chosen", "ranges", "says"),
    [
        (["nowhere"], {}, "no node 'nowhere'"),
        (["q"], {}, "node q has no range for its input"),
    ],
)
def test_what_cannot_be_quantised_is_named(chosen: list[str], ranges: dict[str, Range], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        insert_qdq(attention_like(), ranges, UNSIGNED, chosen)


def test_the_axis_of_output_channels_follows_the_operator() -> None:
    axes = {node.name: weight_axis(node) for node in attention_like().graph}
    assert axes == {"moved": None, "rows": None, "q": 1, "k": 1, "v": 0, "qk": None, "sum": None}


def test_ranges_are_those_of_the_values_whatever_the_batch() -> None:
    images = pictures(7, 6, 16)
    images[6, 0, 0] = 40.0
    found = observe(attention_like(), ["rows", "q"], images, 2, "minmax")  # the last one is filled up
    assert found.ranges["rows"] == Range(float(images.min()), 40.0)
    assert set(found.unstable) == {"rows", "q"}  # of the first half, the largest was a tenth
    dynamic = observe(attention_like(("batch", 6, 16)), ["rows"], images, "dynamic", "minmax")
    assert dynamic.ranges["rows"] == found.ranges["rows"]


@pytest.mark.parametrize(
    ("kind", "constants", "expected"),
    [
        ("Softmax", [], Range(0.0, 1.0)),
        ("Sigmoid", [], Range(0.0, 1.0)),
        ("Clip", [-3.0, 3.0], Range(-3.0, 3.0)),
        ("Clip", [1.0, 3.0], Range(0.0, 3.0)),
        ("Clip", [1.0], None),
        ("Relu", [], None),
    ],
)
def test_what_holds_by_definition_is_not_measured(kind: str, constants: list[float], expected: Range | None) -> None:
    stored = {f"c{i}": np.array(value, np.float32) for i, value in enumerate(constants)}
    nodes: list[Node] = [
        (kind, ["image", *stored], "made", {}),
        ("Reshape", ["made", "shape"], "moved", {}),
        ("Neg", ["moved"], "end", {}),
    ]
    model = graph(nodes, {**stored, "shape": np.array([-1])}, [2, 3])
    moved = next(node for node in model.graph if node.name == "moved").outputs[0]
    assert known_range(moved) == expected
    seen = observe(model, ["moved"], 0.1 * pictures(4, 3), 2, "minmax").ranges["moved"]
    assert (seen == expected) == (expected is not None)


def _nan(images: NDArray[np.float32]) -> NDArray[np.float32]:
    images[3, 2, 1] = np.nan
    return images


@pytest.mark.parametrize(
    ("names", "change", "says"),
    [
        (["nowhere"], lambda images: images, "no tensor 'nowhere'"),
        (["q"], lambda images: images[:0], "no pictures"),
        (["q"], _nan, "tensor q"),
        (["q"], lambda images: images[:, :5], "ONNX Runtime failed"),
    ],
)
def test_calibration_that_says_nothing_is_refused(
    names: list[str], change: Callable[[NDArray[np.float32]], NDArray[np.float32]], says: str
) -> None:
    with pytest.raises(ExportError, match=says):
        observe(attention_like(), names, change(pictures(4, 6, 16)), 2, "minmax")
