"""Products of few rows, whose time is that of reading the weights: int8 weights, activations quantised as they come.

A token or two against a large matrix: there int8 pays because a quarter of the bytes is read, and finding the range of
the rows at run time costs nothing beside it. So nothing is calibrated and nothing can be out of range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from edgevit.errors import ExportError

from .qdq import INT8, quantized, weight_axis, weight_scales

FLOAT = int(ir.DataType.FLOAT)
LARGEST_HALF = 65504.0  # the largest finite float16


def insert_dynamic(graph: ir.Model, chosen: Collection[str]) -> dict[str, int]:
    """Compute the chosen Gemms and MatMuls in integers, in place; the number of nodes of each kind that were.

    Given:  Gemm(x, w, c) or MatMul(x, w), w a constant matrix
    Result: q, s, z = DynamicQuantizeLinear(x), once for all readers of x; Cast(MatMulInteger(q, w int8, z)) times
            s and the scales of w's columns; plus c

    Raises:
        ExportError: a chosen node is no such product.
    """
    quantized_inputs: dict[str, list[ir.Value]] = {}
    nodes = [node for node in graph.graph if node.name in set(chosen)]
    for node in nodes:
        x, weight = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        axis = weight_axis(node)
        if x is None or weight is None or weight.const_value is None or axis is None or node.op_type == "Conv":
            raise ExportError(f"int8: node {node.name} is no product with a constant matrix; please report the model")
        matrix = weight.const_value.numpy() * np.float32(node.attributes.get_float("alpha", 1.0))
        matrix = np.ascontiguousarray(matrix.T) if axis == 0 else matrix  # -> in out
        if (x.name or "") not in quantized_inputs:
            quantized_inputs[x.name or ""] = _quantize(graph.graph, x, node)
        _replace(graph.graph, node, quantized_inputs[x.name or ""], matrix, weight.name or "")
    return dict(Counter(node.op_type for node in nodes))


def store_int8(graph: ir.Model, node: ir.Node, index: int) -> None:
    """Store a constant operand of a product that stays float as int8, in place; runtimes make it float as they load.

    Given:  a constant with at least two axes
    Result: Cast(int8) times a scale for each sum that the product makes of it
    """
    value, array = _constant(node, index)
    axes = _summed(node, index, array.ndim)
    scales = np.abs(array).max(axis=axes, keepdims=True) / np.float32(INT8)
    scales[scales < np.finfo(np.float32).tiny] = 1.0  # a slice of zeros
    tape, name = Tape(), value.name or ""
    whole = np.rint(array / scales).astype(np.int8)
    cast = tape.op("Cast", [_stored(tape, f"{name}_int8", whole)], {"to": FLOAT})
    result = tape.op("Mul", [cast, _stored(tape, f"{name}_scale", scales)])
    _replace_constant(graph.graph, tape, node, value, result)


def store_half(graph: ir.Model, node: ir.Node, index: int) -> None:
    """Store a constant operand of a product that stays float as float16, in place, if float16 holds it.

    Given:  a constant
    Result: Cast(float16)
    """
    value, array = _constant(node, index)
    if np.abs(array).max() > LARGEST_HALF:
        return
    tape = Tape()
    result = tape.op("Cast", [_stored(tape, f"{value.name}_half", array.astype(np.float16))], {"to": FLOAT})
    _replace_constant(graph.graph, tape, node, value, result)


def _constant(node: ir.Node, index: int) -> tuple[ir.Value, NDArray[Any]]:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ExportError(f"int8: node {node.name} has no constant weight; please report the model")
    return value, value.const_value.numpy()


def _replace_constant(graph: ir.Graph, tape: Tape, node: ir.Node, value: ir.Value, result: ir.Value) -> None:
    """Let every reader of a constant read what is made of its stored form; `node` is the first of them."""
    uses = list(value.uses())
    _write(graph, tape, node, f"{value.name}_float")
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _summed(node: ir.Node, index: int, rank: int) -> tuple[int, ...]:
    """The axes of a product's constant operand along which it sums."""
    if node.op_type == "Conv":
        return tuple(range(1, rank))  # o c kh kw
    turned = node.attributes.get_int("transA" if index == 0 else "transB", 0)
    return (rank - 1,) if (index == 0) != bool(turned) else (rank - 2,)


def _quantize(graph: ir.Graph, x: ir.Value, before: ir.Node) -> list[ir.Value]:
    tape = Tape()
    made = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
    for value, part in zip(made, ("uint8", "scale", "zero"), strict=True):
        value.name = f"{x.name}_{part}"
    _write(graph, tape, before, f"{x.name}_uint8", named=False)
    return list(made)


def _replace(graph: ir.Graph, node: ir.Node, x: list[ir.Value], matrix: NDArray[np.float32], name: str) -> None:
    tape, out = Tape(), node.outputs[0]
    scales = weight_scales(matrix, 1)
    weight = _stored(tape, f"{name}_int8/{node.name}", quantized(matrix, scales, 1))
    units = tape.op("Mul", [x[1], _stored(tape, f"{name}_scale/{node.name}", scales)])
    turned = node.attributes.get_int("transA", 0)
    rows = tape.op("Transpose", [x[0]], {"perm": [1, 0]}) if turned else x[0]  # in rows -> rows in
    summed = tape.op("MatMulInteger", [rows, weight, x[2]])
    result = tape.op("Mul", [tape.op("Cast", [summed], {"to": FLOAT}), units])
    added = node.inputs[2] if len(node.inputs) > 2 else None
    if added is not None:
        result = tape.op("Add", [result, added])
    for i, each in enumerate(tape.nodes):
        each.name = node.name if each.op_type == "MatMulInteger" else f"{node.name}:{each.op_type}_{i}"
        each.outputs[0].name = f"{node.name}:{each.op_type}_{i}"
    for value in tape.initializers:
        graph.register_initializer(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), [out], [result])


def _write(graph: ir.Graph, tape: Tape, before: ir.Node, name: str, *, named: bool = True) -> None:
    for i, each in enumerate(tape.nodes):
        each.name = f"{name}:{each.op_type}"
        if named:
            each.outputs[0].name = name if i == len(tape.nodes) - 1 else f"{name}:{each.op_type}"
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.insert_before(before, list(tape.nodes))


def _stored(tape: Tape, name: str, array: NDArray[Any]) -> ir.Value:
    return tape.initializer(ir.tensor(array, name=name))
