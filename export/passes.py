"""Graph passes on the captured ONNX model, on onnx_ir's contract: in place, idempotent, `PassResult(model, modified)`.

`CLEANUP` holds for every target. `CPU_KERNELS` changes the form of operators that ONNX Runtime's CPU kernels run
slowly; other targets keep the standard form, which their compilers fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import passes
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from edgevit.errors import ExportError

SHORT_AXIS = 16  # entries: below it a softmax kernel spends its time on row overhead, not on exponentials
LARGE_SOFTMAX = 4096  # elements from which five small operators beat the slow softmax (35 against 172 us at 37,632)
BLOCK = 16  # channels in a block of ONNX Runtime's convolutions on a 512-bit machine; fewer leave lanes idle
MANY_POSITIONS = 196  # 14x14, where a Gemm and the blocked convolution are even; at 7x7 the convolution wins


class GemmTranspose(passes.InPlacePass):
    """Fold a transposed left operand into the Gemm that reads it.

    Given:  Gemm(Transpose(a), b, c)
    Result: Gemm(a, b, c, transA=1)
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        modified = False
        for node in model.graph:
            while (source := _transposed_operand(node)) is not None:
                node.replace_input_with(0, source)
                node.attributes["transA"] = ir.AttrInt64("transA", 1 - node.attributes.get_int("transA", 0))
                modified = True
        return passes.PassResult(model, modified)


def _transposed_operand(node: ir.Node) -> ir.Value | None:
    """What a Gemm's left operand is the transpose of, if it is one."""
    operand = node.inputs[0] if node.op_type == "Gemm" else None
    source = None if operand is None else operand.producer()
    if source is None or source.op_type != "Transpose" or list(source.attributes.get_ints("perm", [])) != [1, 0]:
        return None
    return source.inputs[0]


class ShortSoftmax(passes.InPlacePass):
    """Softmax over a short axis that is not the last, from elementwise operators.

    Given:  Softmax(x, axis) with fewer than SHORT_AXIS entries on an inner axis of a large tensor
    Result: e = Exp(x - ReduceMax(x, axis)); e / ReduceSum(e, axis): the definition, with its guard against overflow
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        found = [(node, axis) for node in model.graph if (axis := _short_axis(node)) is not None]
        for node, axis in found:
            _replace(node, _softmax_parts(node, axis))
        return passes.PassResult(model, bool(found))


def _short_axis(node: ir.Node) -> int | None:
    """The axis of a softmax for which the rewrite pays, else None."""
    x = node.inputs[0] if node.op_type == "Softmax" else None
    if x is None or x.shape is None:
        return None
    axis = node.attributes.get_int("axis", -1) % len(x.shape)
    lengths = [d if isinstance(d, int) else 1 for d in x.shape]  # a dynamic batch counts as one
    short = isinstance(x.shape[axis], int) and lengths[axis] < SHORT_AXIS and axis < len(lengths) - 1
    return axis if short and int(np.prod(lengths)) >= LARGE_SOFTMAX else None


def _softmax_parts(node: ir.Node, axis: int) -> Tape:
    tape, x = Tape(), node.inputs[0]
    axes = _constant(tape, f"{node.outputs[0].name}_axis", [axis])
    exponents = tape.op("Exp", [tape.op("Sub", [x, tape.op("ReduceMax", [x, axes])])])
    tape.op("Div", [exponents, tape.op("ReduceSum", [exponents, axes])])
    return tape


class PointwiseGemm(passes.InPlacePass):
    """A pointwise convolution of one picture as a Gemm on channel-first data, where its channels do not fill a block.

    Given:  Conv(x, w, b), kernel 1x1, stride 1, one group, batch 1, fewer than BLOCK channels in or out
    Result: Reshape to (c, h w), Gemm(w, x, b), Reshape back
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        found = [node for node in model.graph if _is_narrow_pointwise(node)]
        for node in found:
            _replace(node, _gemm_parts(node))
        return passes.PassResult(model, bool(found))


def _is_narrow_pointwise(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
        return False
    x, *weights = node.inputs
    if x is None or x.shape is None or any(value is None or value.const_value is None for value in weights):
        return False
    c_out, c_in, *kernel = _array(weights[0]).shape
    strides = list(node.attributes.get_ints("strides", [1, 1]))
    height, width = _positions(x)
    plain = strides == [1, 1] and not any(node.attributes.get_ints("pads", [0]))
    fits = x.shape[0] == 1 and kernel == [1, 1] and plain and height * width >= MANY_POSITIONS
    return fits and min(c_in, c_out) < BLOCK


def _gemm_parts(node: ir.Node) -> Tape:
    tape, name, x = Tape(), node.outputs[0].name, node.inputs[0]
    height, width = _positions(x)
    w, *bias = (_array(value) for value in node.inputs[1:])
    matrix = w[:, :, 0, 0]  # out in 1 1 -> out in
    flat = tape.op("Reshape", [x, _constant(tape, f"{name}_flat_shape", [matrix.shape[1], height * width])])
    columns = [b[:, None] for b in bias]  # out -> out 1, so that it spreads over the positions
    stored = [tape.initializer(ir.tensor(a, name=f"{name}_operand{i}")) for i, a in enumerate([matrix, *columns])]
    product = tape.op("Gemm", [stored[0], flat, *stored[1:]])
    tape.op("Reshape", [product, _constant(tape, f"{name}_shape", [1, matrix.shape[0], height, width])])
    return tape


def _array(value: ir.Value | None) -> NDArray[Any]:
    """A constant's values; the passes ask only where they have seen that it is one."""
    if value is None or value.const_value is None:
        raise ExportError("graph passes: a convolution's weights are not constants; please report the model")
    return value.const_value.numpy()


def _positions(value: ir.Value | None) -> tuple[int, int]:
    """Height and width of a feature map, (0, 0) where they are not static."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return 0, 0
    height, width = value.shape[2], value.shape[3]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else (0, 0)


def _constant(tape: Tape, name: str, values: Sequence[int]) -> ir.Value:
    return tape.initializer(ir.tensor(np.array(values, dtype=np.int64), name=name))


def _replace(node: ir.Node, tape: Tape) -> None:
    """Put the recorded nodes where `node` stood; the last one takes over its output."""
    graph, last = node.graph, tape.nodes[-1].outputs[0]
    if graph is None:
        raise ExportError("graph passes: a node stands in no graph; please report the model")
    for value in tape.initializers:
        graph.register_initializer(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), node.outputs, [last])


CLEANUP: tuple[ir.passes.PassBase, ...] = (
    common.IdentityEliminationPass(),
    common.CommonSubexpressionEliminationPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    GemmTranspose(),
    common.DeduplicateInitializersPass(),  # after lifting: shape constants become equal initializers
    common.RemoveUnusedNodesPass(),
)

CPU_KERNELS: tuple[ir.passes.PassBase, ...] = (
    ShortSoftmax(),
    PointwiseGemm(),
    common.DeduplicateInitializersPass(),
    common.RemoveUnusedNodesPass(),
)

FINISH: tuple[ir.passes.PassBase, ...] = (
    common.ClearMetadataAndDocStringPass(),  # the exporter leaves stack traces: paths of the exporting machine
    common.ShapeInferencePass(),
    common.CheckerPass(),
)


def run(model: ir.Model, sequence: Sequence[ir.passes.PassBase]) -> ir.Model:
    """Apply the passes once, in order.

    Raises:
        ExportError: a pass failed; a bug or an unsupported graph.
    """
    outputs = [value.name for value in model.graph.outputs]
    try:
        result: ir.Model = ir.passes.Sequential(*sequence)(model).model
    except ir.passes.PassError as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [""])[0]
        raise ExportError(
            f"graph passes: {type(cause).__name__}: {reason}; please report the model and its options"
        ) from error
    if [value.name for value in result.graph.outputs] != outputs:
        raise ExportError(
            f"graph passes: the outputs {outputs} lost their names; please report the model and its options"
        )
    return result
