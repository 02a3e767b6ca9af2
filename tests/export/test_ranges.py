"""The range analysis against numpy: every tensor's largest magnitude, and the sums that a result does not show."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from edgevit.errors import ExportError
from edgevit.export import passes
from edgevit.export.ranges import LARGEST, LIMIT, SMALLEST_NORMAL, Ranges, measure, measure_ranges
from edgevit.specs import ImageSpec

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 4, 4)).astype(np.float32)


def graph(body: str, shape: str = "1,3,4,4", result: str = "", held: str = "", opset: int = 17) -> ir.Model:
    text = (
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[{shape}] image) => (float[{result or shape}] logits) '
        f"{f'<{held}>' if held else ''} {{ {body} }}"
    )
    model = parser.parse_model(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    return passes.run(ir.from_proto(model), passes.FINISH)


def test_each_tensor_is_measured_over_all_pictures() -> None:
    ranges = measure(graph("x = Mul(image, image) logits = Neg(x)"), IMAGES, 1)
    assert ranges.pictures == 4
    assert ranges.tensors == pytest.approx(
        {"image": np.abs(IMAGES).max(), "x": (IMAGES**2).max(), "logits": (IMAGES**2).max()}
    )


@pytest.mark.parametrize(("batch", "shape"), [(1, "1,3,4,4"), (3, "3,3,4,4"), (7, "7,3,4,4"), ("dynamic", "N,3,4,4")])
def test_any_batch_sees_every_picture(batch: int | str, shape: str) -> None:
    images = IMAGES.copy()
    images[3] *= 50  # a static batch of 3 has it in its second, filled one
    ranges = measure(graph("logits = Abs(image)", shape), images, batch)  # type: ignore[arg-type]  # "dynamic" is one
    assert ranges.tensors["logits"] == pytest.approx(np.abs(images).max())


def test_sums_that_cancel_are_seen_inside_a_product() -> None:
    """1e5 - 1e5 is zero outside; a kernel that adds in float16 gives infinity - infinity."""
    body = "x = Concat<axis=1>(image, image) logits = Conv(x, w, b)"
    weights = ",".join(["1e5"] * 3 + ["-1e5"] * 3)
    ranges = measure(
        graph(body, result="1,1,4,4", held=f"float[1,6,1,1] w = {{{weights}}}, float[1] b = {{-7}}"), IMAGES, 1
    )
    assert ranges.tensors["logits"] < 10  # the bias, and what cancels up to rounding
    assert ranges.sums["node_1"] == pytest.approx(2e5 * np.abs(IMAGES).sum(1).max() + 7, rel=1e-5)
    assert set(ranges.wide_sums) == {"node_1"} and not ranges.wide


@pytest.mark.parametrize(
    ("body", "held", "opset"),
    [
        ("logits = ReduceMean<axes=[2,3], keepdims=1>(image)", "", 17),
        ("logits = ReduceMean<keepdims=1>(image, axes)", "int64[2] axes = {2, -1}", 20),
        ("logits = ReduceSum<keepdims=1>(image, axes)", "int64[2] axes = {2, 3}", 17),
    ],
)
def test_a_mean_is_bounded_by_its_sum_of_magnitudes(body: str, held: str, opset: int) -> None:
    ranges = measure(graph(body, result="1,3,1,1", held=held, opset=opset), IMAGES, 1)
    assert ranges.sums == {"node_0": pytest.approx(np.abs(IMAGES).sum((2, 3)).max(), rel=1e-5)}


def test_a_gemm_with_transposes_is_bounded() -> None:
    body = "r = Reshape(image, s) logits = Gemm<transA=1, transB=1, alpha=1.0>(r, w, c)"
    held = "int64[2] s = {3, 16}, float[2,3] w = {1,-2,3,-4,5,-6}, float[2] c = {-1, 1}"
    ranges = measure(graph(body, result="16,2", held=held), IMAGES, 1)
    rows = np.abs(IMAGES.reshape(4, 3, 16))
    expected = max((r.T @ np.abs(np.array([[1, -2, 3], [-4, 5, -6]])).T + 1).max() for r in rows)
    assert ranges.sums["node_1"] == pytest.approx(expected, rel=1e-5)


def test_integers_are_no_ranges() -> None:
    ranges = measure(graph("s = Shape(image) c = Cast<to=1>(s) logits = Mul(c, c)", result="4"), IMAGES, 1)
    assert set(ranges.tensors) == {"image", "c", "logits"}


@pytest.mark.parametrize(
    ("body", "name"),
    [("x = Log(image) logits = Neg(x)", "x"), ("x = Exp(image) y = Mul(x, k) logits = Exp(y)", "logits")],
)
@pytest.mark.parametrize("place", [(2, 0, 0, 0), (0, 1, 2, 3), (3, 2, 3, 3)])
@pytest.mark.parametrize(("value", "what"), [(0, "inf"), (-1, "nan")])  # whose logarithms are these
def test_what_fails_in_float32_already_is_named(
    body: str, name: str, place: tuple[int, ...], value: float, what: str
) -> None:
    images = np.abs(IMAGES) + np.float32(0.1)
    images[place] = value
    with pytest.raises(ExportError, match=f"tensor {name} is {what if name == 'x' else 'inf'} in float32 already"):
        measure(graph(body, held="float k = {1e4}"), images, 1)


def test_the_graph_itself_is_not_changed() -> None:
    model = graph("x = Exp(image) logits = Softmax(x)")
    before = ir.to_proto(model).SerializeToString()
    measure(model, IMAGES, 1)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_graph_that_does_not_run_is_an_error_of_one_line() -> None:
    with pytest.raises(ExportError, match="range analysis: ONNX Runtime") as caught:
        measure(graph("logits = Reshape(image, s)", result="a, b", held="int64[2] s = {5, -1}"), IMAGES, 1)
    assert "\n" not in str(caught.value)


def test_limits_leave_room_and_take_in_nan() -> None:
    assert 2 * LIMIT < LARGEST == float(np.finfo(np.float16).max)
    assert float(np.finfo(np.float16).tiny) == SMALLEST_NORMAL
    ranges = Ranges({"a": LIMIT, "b": LIMIT * 1.01, "c": math.nan, "d": 0.0, "e": 1e-6}, {"n": math.inf}, 4)
    assert set(ranges.wide) == {"b", "c"} and set(ranges.narrow) == {"e"} and set(ranges.wide_sums) == {"n"}


def test_the_record_is_json_and_names_the_largest_first() -> None:
    ranges = Ranges({f"t{i}": float(i) for i in range(20)} | {"bad": math.nan}, {"n": 3.0}, 4)
    record = json.loads(json.dumps(ranges.record(), allow_nan=False))
    assert [row["name"] for row in record["largest"][:2]] == ["bad", "t19"]
    assert record["tensors"] == 21 and record["over_limit"] == 1 and record["pictures"] == 4


def test_the_shipped_photographs_are_what_is_looked_at() -> None:
    model = graph("logits = Identity(image)", "1,3,32,64")
    ranges = measure_ranges(model, ImageSpec(), (32, 64), 1)
    assert ranges.pictures == 4
    assert 1.5 < ranges.tensors["image"] < 3  # normalised by mean and deviation
    assert isinstance(ir.to_proto(model), onnx.ModelProto)
