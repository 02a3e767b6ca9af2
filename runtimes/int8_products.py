"""Products of int8 operands in a Q/DQ graph as an integer kernel computes them: whole numbers first, scales after.

A device multiplies the stored integers, sums them exactly, and applies both scales to the sum. Run as it stands, a
DequantizeLinear would be rounded to float16 before the product, which no kernel does. Whole numbers in float32 are
exact up to 2**24, more than the sums of these networks reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

PRODUCTS = ("Conv", "Gemm", "MatMul")
DEQUANTIZE = "DequantizeLinear"
INT8 = (TensorProto.INT8, TensorProto.UINT8)


@dataclass(frozen=True)
class Share:
    """How many of a graph's products have int8 operands, and their share of its multiply-accumulates."""

    products: int
    of: int
    macs_share: float


@dataclass(frozen=True)
class _Side:
    """One dequantised operand: the tensor of integers, its scale and zero point, and the axis of several scales."""

    integers: str
    scale: NDArray[np.float64]
    zero: NDArray[np.float32]
    axis: int


def share(model: onnx.ModelProto) -> Share:
    """Of a graph with inferred shapes; a dynamic dimension counts as one."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    shapes = {
        v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim]
        for v in (*graph.value_info, *graph.input, *graph.output)
    } | {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in (*PRODUCTS, "ConvTranspose")]
    macs = [_macs(node, shapes) for node in products]
    whole = [all(_reads_int8(makers.get(name)) for name in node.input[:2]) for node in products]
    mine = sum(count for count, is_int8 in zip(macs, whole, strict=True) if is_int8)
    return Share(sum(whole), len(products), mine / sum(macs) if sum(macs) else 0.0)


def _reads_int8(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == DEQUANTIZE


def _macs(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    out, left, right = (shapes.get(name, [0]) for name in (node.output[0], node.input[0], node.input[1]))
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    transposed = node.op_type == "Gemm" and _integer(node, "transA", 0)
    return math.prod(out) * left[-2 if transposed and len(left) > 1 else -1]


def with_integer_products(model: onnx.ModelProto, types: dict[str, int]) -> None:
    """Rewrite each product of two int8 operands, in place; the types of new tensors are added to `types`.

    Given:  y = Conv | Gemm | MatMul(DequantizeLinear(a, s), DequantizeLinear(w, t), b), w and b stored, s one number, t
            one for each output or one
    Result: y = (Conv | Gemm | MatMul)(a - its zero point, w - its zero point) * (s * t) + b, in float32
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    held = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        sides = [_side(makers.get(name), held, types) for name in node.input[:2]] if node.op_type in PRODUCTS else []
        if len(sides) == 2 and sides[0] and sides[1] and (scale := _joint(node, sides[0], sides[1], held)) is not None:
            nodes += _rewritten(graph, node, (sides[0], sides[1]), scale, held, types)
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.op_type != DEQUANTIZE or node.output[0] in read)


def _side(node: onnx.NodeProto | None, held: Mapping[str, TensorProto], types: Mapping[str, int]) -> _Side | None:
    """What a DequantizeLinear reads, where scale and zero point are constants."""
    if node is None or node.op_type != DEQUANTIZE or _integer(node, "block_size", 0):
        return None
    constants = node.input[1:]
    kind = held[node.input[0]].data_type if node.input[0] in held else types.get(node.input[0], 0)
    if kind not in INT8 or any(name not in held for name in constants if name):
        return None
    scale = numpy_helper.to_array(held[node.input[1]]).astype(np.float64)
    zero = numpy_helper.to_array(held[node.input[2]]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    zero = zero if zero.any() else np.zeros(())  # one for each output spreads along another axis than the scales
    return _Side(node.input[0], scale, zero.astype(np.float32), _integer(node, "axis", 1))


def _joint(
    node: onnx.NodeProto, left: _Side, right: _Side, held: Mapping[str, TensorProto]
) -> NDArray[np.float32] | None:
    """Both scales as one, shaped to spread over the output; None where they do not factor out."""
    plain = all(attr.f == 1 for attr in node.attribute if attr.name in ("alpha", "beta"))
    stored = right.integers in held and all(name in held for name in node.input[2:3])
    if left.scale.size != 1 or not plain or not stored:
        return None
    if right.scale.size == 1 and right.zero.size == 1:
        return np.asarray(left.scale.item() * right.scale.item(), np.float32)
    rank = len(held[right.integers].dims)
    outputs = {"Conv": 0, "MatMul": rank - 1}.get(node.op_type, 0 if _integer(node, "transB", 0) else 1)
    if right.axis % rank != outputs or right.zero.ndim:
        return None
    spread = [1, -1] + [1] * (rank - 2) if node.op_type == "Conv" else [-1]
    return (left.scale.item() * right.scale.reshape(spread)).astype(np.float32)


def _rewritten(
    graph: onnx.GraphProto, node: onnx.NodeProto, sides: tuple[_Side, _Side], scale: NDArray[np.float32],
    held: Mapping[str, TensorProto], types: dict[str, int],
) -> Iterator[onnx.NodeProto]:  # fmt: skip
    out = node.output[0]

    def stored(name: str, values: NDArray[np.float32]) -> str:
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    operands = []
    for index, side in enumerate(sides):
        name = f"{out}//whole{index}"
        types[name] = TensorProto.FLOAT
        if side.integers in held:
            stored(name, numpy_helper.to_array(held[side.integers]).astype(np.float32) - side.zero)
        else:
            types[f"{name}/raw"] = TensorProto.FLOAT
            yield helper.make_node("Cast", [side.integers], [f"{name}/raw"], f"{name}/cast", to=TensorProto.FLOAT)
            yield helper.make_node("Sub", [f"{name}/raw", stored(f"{name}/zero", side.zero)], [name], f"{name}/sub")
        operands.append(name)
    bias = list(node.input[2:3])
    sums, scaled = f"{out}//sums", f"{out}//scaled" if bias else out
    types.update({sums: TensorProto.FLOAT, f"{out}//scaled": TensorProto.FLOAT})
    product = helper.make_node(node.op_type, operands, [sums], f"{out}//product")
    product.attribute.extend(node.attribute)
    yield product
    yield helper.make_node("Mul", [sums, stored(f"{out}//scale", scale)], [scaled], node.name if not bias else sums)
    if bias:
        values = numpy_helper.to_array(held[bias[0]]).astype(np.float32)
        spread = (1, -1, *[1] * (len(held[sides[1].integers].dims) - 2)) if node.op_type == "Conv" else values.shape
        yield helper.make_node("Add", [scaled, stored(f"{out}//bias", values.reshape(spread))], [out], node.name)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attr.i) for attr in node.attribute if attr.name == name), default)
