"""Whole-number products against numpy's own integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevit.runtimes import Session
from edgevit.runtimes.int8_products import share
from edgevit.runtimes.typed_ort import TypedOrtRuntime

DRAW = np.random.default_rng(7)
STEP = np.float32(0.037)


def write(folder: Path, kind: str, *, per_tensor: bool = False, zero: int = 0, axis: int | None = None) -> Path:
    """QuantizeLinear of `image`, a product with int8 weights, and a bias; the weights are initializers."""
    shapes = {"Conv": ((1, 4, 6, 6), (8, 4, 3, 3), (1, 8, 4, 4)), "Gemm": ((5, 12), (8, 12), (5, 8)),
              "MatMul": ((5, 12), (12, 8), (5, 8))}  # fmt: skip
    image, weight, out = shapes[kind]
    outputs = {"Conv": 0, "Gemm": 0, "MatMul": 1}[kind] if axis is None else axis
    scales = np.float32(0.02) if per_tensor else DRAW.uniform(0.01, 0.1, weight[outputs]).astype(np.float32)
    held = {
        "w": DRAW.integers(-127, 128, weight).astype(np.int8), "t": np.asarray(scales, np.float32),
        "tz": np.zeros(np.shape(scales), np.int8), "s": np.asarray(STEP), "z": np.asarray(zero, np.int8),
        "b": DRAW.standard_normal(8).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "t", "tz"], ["v"], "weights", axis=outputs),
        helper.make_node(kind, ["x", "v"] + (["b"] if kind != "MatMul" else []), ["logits"], "product",
                         **({"transB": 1} if kind == "Gemm" else {})),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("image", image), ("logits", out))]
    graph = helper.make_graph(
        nodes, "net", ends[:1], ends[1:], [numpy_helper.from_array(value, name) for name, value in held.items()]
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def expected(path: Path, image: np.ndarray) -> np.ndarray:
    """Sums in int64, scales and bias after."""
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    zero = int(held["z"])
    q = np.clip(np.rint(image / held["s"]) + zero, -128, 127).astype(np.int64) - zero
    w = held["w"].astype(np.int64)
    scale = (np.float64(held["s"]) * held["t"].astype(np.float64)).astype(np.float32)
    if w.ndim == 4:
        windows = np.lib.stride_tricks.sliding_window_view(q, (3, 3), (2, 3))  # n c h w k k
        sums = np.einsum("nchwij,ocij->nohw", windows, w)
        spread = (1, -1, 1, 1)
        scaled = sums.astype(np.float32) * scale.reshape(spread if scale.ndim else ())
        return (scaled + held["b"].reshape(spread)).astype(np.float32)
    gemm = "Gemm" in {node.op_type for node in onnx.load(path).graph.node}
    sums = q @ (w.T if gemm else w)
    return (sums.astype(np.float32) * scale + (held["b"] if gemm else 0)).astype(np.float32)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("zero", [0, -5])
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_a_product_is_that_of_the_integers(tmp_path: Path, kind: str, zero: int, per_tensor: bool) -> None:
    path = write(tmp_path, kind, per_tensor=per_tensor, zero=zero)
    with Session(TypedOrtRuntime(path, 1, "int8")) as session:
        image = (2 * DRAW.standard_normal(session.runtime.inputs[0].shape)).astype(np.float32)
        found = session.run({"image": image})["logits"]
    np.testing.assert_array_equal(found, expected(path, image))


def test_scales_along_another_axis_are_left_to_the_graph(tmp_path: Path) -> None:
    path = write(tmp_path, "MatMul", axis=0)
    with Session(TypedOrtRuntime(path, 1, "int8")) as session:
        image = DRAW.standard_normal((5, 12)).astype(np.float32)
        found = session.run({"image": image})["logits"]
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    values = np.clip(np.rint(image / STEP), -128, 127) * STEP
    np.testing.assert_allclose(found, values @ (held["w"] * held["t"][:, None]), rtol=1e-4, atol=1e-3)


def test_the_share_counts_multiply_accumulates(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path, "Conv"))
    found = share(onnx.shape_inference.infer_shapes(model))
    assert (found.products, found.of, found.macs_share) == (1, 1, 1.0)
    model.graph.node[3].input[1] = "float"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((8, 4, 3, 3), np.float32), "float"))
    found = share(onnx.shape_inference.infer_shapes(model))
    assert (found.products, found.of, found.macs_share) == (0, 1, 0.0)
