"""Graph passes on the captured ONNX model, on onnx_ir's pass contract: `PassResult(model, modified)`, idempotent.

`CLEANUP` holds for every target. `CPU_KERNELS` changes the form of operators that ONNX Runtime's CPU kernels run
slowly; other targets keep the standard form, which their compilers fuse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import passes
from onnx_ir.passes import common
from onnx_ir.tape import Tape

SHORT_AXIS = 16  # entries: below it a softmax kernel spends its time on row overhead, not on exponentials
LONG_ROWS = int(__import__('os').environ.get('LR','4096'))  # elements: below it five small operators cost more than the slow softmax; measured, see README
GEMM_POSITIONS = int(__import__('os').environ.get('GP','196'))  # positions (14x14) from which a Gemm on channel-first data beats the blocked convolution


class ShortSoftmax(passes.InPlacePass):
    """Softmax over a short axis that is not the last, from elementwise operators.

    Given:  Softmax(x, axis) with fewer than SHORT_AXIS entries on an inner axis of a large tensor
    Result: e = Exp(x - ReduceMax(x, axis)); e / ReduceSum(e, axis), the definition with its own overflow guard
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Softmax" and (axis := _short_axis(node)) is not None:
                _replace(node, _softmax_parts(node, axis))
                modified = True
        return passes.PassResult(model, modified)


def _short_axis(node: ir.Node) -> int | None:
    """The softmax axis where the rewrite pays, else None."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    axis = node.attributes.get_int("axis", -1) % len(shape)
    lengths = [d if isinstance(d, int) else 1 for d in shape]  # a dynamic batch counts as one
    pays = axis < len(shape) - 1 and lengths[axis] < SHORT_AXIS and int(np.prod(lengths)) >= LONG_ROWS
    return axis if pays else None


def _softmax_parts(node: ir.Node, axis: int) -> Tape:
    tape = Tape()
    x, axes = node.inputs[0], tape.initializer(ir.tensor(np.array([axis]), name=f"{node.outputs[0].name}_axis"))
    exponents = tape.op("Exp", [tape.op("Sub", [x, tape.op("ReduceMax", [x, axes])])])
    tape.op("Div", [exponents, tape.op("ReduceSum", [exponents, axes])])
    return tape


class PointwiseGemm(passes.InPlacePass):
    """A pointwise convolution of one picture as a Gemm on channel-first data.

    Given:  Conv(x, w, b), kernel 1x1, stride 1, one group, batch 1, at least GEMM_POSITIONS positions
    Result: Reshape to (c, h w), Gemm(w, x, b), Reshape back: no reordering into blocked channels
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Conv" and _is_pointwise(node):
                _replace(node, _gemm_parts(node))
                modified = True
        return passes.PassResult(model, modified)


def _is_pointwise(node: ir.Node) -> bool:
    x, w = node.inputs[0], node.inputs[1]
    if x is None or w is None or x.shape is None or w.const_value is None or w.shape is None:
        return False
    dims, strides = list(x.shape), node.attributes.get_ints("strides", [1, 1])
    if list(w.shape)[2:] != [1, 1] or list(strides) != [1, 1] or dims[0] != 1 or node.attributes.get_int("group", 1) != 1:
        return False
    if w.shape[0]%16==0 and w.shape[1]%16==0: return False
    positions = dims[2] * dims[3] if isinstance(dims[2], int) and isinstance(dims[3], int) else 0
    return positions >= GEMM_POSITIONS


def _gemm_parts(node: ir.Node) -> Tape:
    tape, name = Tape(), node.outputs[0].name
    x, w = node.inputs[0], node.inputs[1]
    channels, positions = w.shape[1], x.shape[2] * x.shape[3]
    flat = tape.op("Reshape", [x, _shape(tape, f"{name}_flat", [channels, positions])])
    matrix = tape.initializer(ir.tensor(w.const_value.numpy()[:, :, 0, 0], name=f"{w.name}_matrix"))
    operands = [matrix, flat]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        operands.append(tape.initializer(ir.tensor(bias.const_value.numpy()[:, None], name=f"{bias.name}_column")))
    product = tape.op("Gemm", operands)
    tape.op("Reshape", [product, _shape(tape, f"{name}_map", [1, w.shape[0], x.shape[2], x.shape[3]])])
    return tape


def _shape(tape: Tape, name: str, lengths: Sequence[int]) -> ir.Value:
    return tape.initializer(ir.tensor(np.array(lengths, dtype=np.int64), name=name))


def _replace(node: ir.Node, tape: Tape) -> None:
    """Put the recorded nodes where `node` stood; the last one takes over its output."""
    graph, last = node.graph, tape.nodes[-1]
    for value in tape.initializers:
        graph.register_initializer(value)
    last.outputs[0].shape, last.outputs[0].dtype = node.outputs[0].shape, node.outputs[0].dtype
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), node.outputs, last.outputs)
