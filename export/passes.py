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

from edgevit.errors import ExportError, first_line

SHORT_AXIS = 16  # entries: below it a softmax kernel spends its time on row overhead, not on exponentials
LARGE_SOFTMAX = 4096  # elements from which five small operators beat the slow softmax (35 against 172 us at 37,632)
BLOCK = 16  # channels in a block of ONNX Runtime's convolutions on a 512-bit machine; fewer leave lanes idle
ATTENTION_OPSET, ATTENTION_IR = 23, 11  # the first with the operator Attention, and the file format it came with
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


class ReshapeChain(passes.InPlacePass):
    """Reshapes that only undo or repeat each other.

    Given:  Reshape(Reshape(x, s), t) with static shapes
    Result: Reshape(x, t), or x itself where it has that shape
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        modified = False
        outputs = set(model.graph.outputs)
        for node in model.graph:
            if (source := _before_reshapes(node)) is None:
                continue
            result = node.outputs[0]
            if source.shape == result.shape and result not in outputs:
                modified |= bool(result.uses())
                ir.convenience.replace_all_uses_with(result, source)
            elif source is not node.inputs[0]:
                node.replace_input_with(0, source)
                modified = True
        return passes.PassResult(model, modified)


def _before_reshapes(node: ir.Node) -> ir.Value | None:
    """What a chain of Reshapes with static results starts from, at `node`'s end of it."""
    if node.op_type != "Reshape" or not _is_static(node.outputs[0]):
        return None
    shape = None if node.inputs[1] is None else node.inputs[1].const_value
    if shape is None or 0 in shape.numpy():  # a zero stands for a length of the input, which would be another one
        return None
    source = node.inputs[0]
    while source is not None and (producer := source.producer()) is not None and producer.op_type == "Reshape":
        source = producer.inputs[0]
    return source if _is_static(source) else None


def _is_static(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.is_static()


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


class FuseAttention(passes.InPlacePass):
    """Attention in groups as ONNX's own operator, which ONNX Runtime's CPU runs as one kernel, heads in place.

    Its session optimiser does not find attention in separate operators. Against those, Swin-T's first attention took
    2.93 ms instead of 3.25 with its four Linears, and the graph has seven nodes less for each block.

    Given:  q, k, v each Reshape (g, n, h, d) and Transpose to heads; MatMul, perhaps Add of a constant, Softmax over
            the last axis, MatMul, Transpose back, Reshape; nothing of it read elsewhere
    Result: q, k, v each Reshape (g, n, h*d); Attention (opset 23, scale 1); the same Reshape
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        found = [(node, parts) for node in model.graph if (parts := _attention_parts(node)) is not None]
        for node, (sources, bias) in found:
            _replace(node, _attention(node, sources, bias))
        if found:
            version = model.graph.opset_imports.get("") or 0
            model.graph.opset_imports[""] = max(version, ATTENTION_OPSET)  # 21 to 23 gave old operators only new types
            model.ir_version = max(model.ir_version, ATTENTION_IR)
        return passes.PassResult(model, bool(found))


TO_HEADS, TO_HEADS_TRANSPOSED = [0, 2, 1, 3], [0, 2, 3, 1]


def _attention_parts(node: ir.Node) -> tuple[list[ir.Node], ir.Value | None] | None:
    """Of the Reshape that ends an attention: the Reshapes that q, k and v start from, and the constant bias."""
    joined = _only(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    weighted = _only(joined.inputs[0], "MatMul") if joined is not None and _permutes(joined, TO_HEADS) else None
    softmax = weighted and _only(weighted.inputs[0], "Softmax")
    if weighted is None or softmax is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    biased = _only(softmax.inputs[0], "Add")
    logits = _only(biased.inputs[0] if biased else softmax.inputs[0], "MatMul")
    bias = biased.inputs[1] if biased else None
    if logits is None or (bias is not None and (bias.const_value is None or len(bias.const_value.shape) != 4)):
        return None
    ends = ((logits.inputs[0], TO_HEADS), (logits.inputs[1], TO_HEADS_TRANSPOSED), (weighted.inputs[1], TO_HEADS))
    heads = [_only(value, "Transpose") for value, _ in ends]
    if any(t is None or not _permutes(t, perm) for t, (_, perm) in zip(heads, ends, strict=True)):
        return None
    sources = [_only(t.inputs[0], "Reshape") for t in heads if t is not None]
    known = [(r, shape) for r in sources if r is not None and (shape := _head_shape(r)) is not None]
    if len(known) != 3:
        return None
    pairs = known[0][1][1], known[1][1][1]  # a bias must name each query and key, which ONNX Runtime does not spread
    spreads = bias is not None and bias.const_value is not None and tuple(bias.const_value.shape)[2:] != pairs
    return None if spreads else ([r for r, _ in known], bias)


def _attention(node: ir.Node, sources: Sequence[ir.Node], bias: ir.Value | None) -> Tape:
    tape, name = Tape(), node.outputs[0].name
    rows = []
    for part, source in zip("qkv", sources, strict=True):
        groups, members, heads, width = _head_shape(source) or (0, 0, 0, 0)
        shape = _constant(tape, f"{name}_{part}_shape", [groups, members, heads * width])
        rows.append(tape.op("Reshape", [source.inputs[0], shape]))
    count = (_head_shape(sources[0]) or (0, 0, 0, 0))[2]
    attributes = {"q_num_heads": count, "kv_num_heads": count, "scale": 1.0}
    attended = tape.op("Attention", [*rows, *([] if bias is None else [bias])], attributes)
    tape.op("Reshape", [attended, node.inputs[1]])
    return tape


def _only(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes `value`, if it is of this kind and nothing else reads it."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != kind or len(list(value.uses())) != 1:
        return None
    return None if value.is_graph_output() else producer


def _permutes(node: ir.Node, perm: list[int]) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == perm


def _head_shape(node: ir.Node) -> list[int] | None:
    """The shape (g, n, h, d) that a Reshape gives, g perhaps -1."""
    shape = node.inputs[1].const_value if node.inputs[1] is not None else None
    values = [] if shape is None else [int(v) for v in shape.numpy()]
    return values if len(values) == 4 and min(values[1:]) > 0 else None


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
    ReshapeChain(),
    common.DeduplicateInitializersPass(),  # after lifting: shape constants become equal initializers
    common.RemoveUnusedNodesPass(),
)

CPU_KERNELS: tuple[ir.passes.PassBase, ...] = (
    FuseAttention(),
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
        raise ExportError(
            f"graph passes: {type(cause).__name__}: {first_line(cause)}; please report the model and its options"
        ) from error
    if [value.name for value in result.graph.outputs] != outputs:
        raise ExportError(
            f"graph passes: the outputs {outputs} lost their names; please report the model and its options"
        )
    return result
