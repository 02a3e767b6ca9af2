"""An ONNX graph in an older operator set, so that older TensorRT parsers read it.

Between opset 17 and 20 most operators only gained types. Those whose form changed are rewritten one by one; an operator
that no rewrite covers is refused by name. The set of changes is read from onnx's own schemas, not from a list here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import passes
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from edgevit.errors import ExportError

TYPES_ONLY = frozenset(  # changed between opset 17 and 20, but only in the types or attributes that were added
    ("AveragePool", "Cast", "CastLike", "ConstantOfShape", "Equal", "Identity", "IsInf", "IsNaN", "Pad", "Reshape",
     "Resize", "ScatterElements", "ScatterND", "Shape", "Size")
)  # fmt: skip
REDUCTIONS = frozenset(  # axes became an input in opset 18; ReduceSum's had been one since 13
    ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
     "ReduceSumSquare")
)  # fmt: skip
IR_VERSIONS = {17: 8, 20: 9}  # the file format that onnx released each operator set with; older readers refuse newer
LN_EPSILON = 1e-5  # LayerNormalization's own default


class LowerOpset(passes.InPlacePass):
    """Operators in the form of an older operator set.

    Given:  a graph of opset `target` to 20
    Result: the same function in opset `target`: axes of reductions as attributes, Gelu from Erf, sizes of Split spelled
            out; ExportError for an operator that changed in another way
    """

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        current = model.graph.opset_imports.get("") or 0
        for node in list(model.graph):
            self._lower(node, current)
        modified = current != self.target or model.ir_version != IR_VERSIONS[self.target]
        model.graph.opset_imports[""] = self.target
        model.ir_version = IR_VERSIONS[self.target]
        return passes.PassResult(model, modified)

    def _lower(self, node: ir.Node, current: int) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(f"opset {self.target}: node {node.name} is {node.domain}.{node.op_type}: not ONNX's own")
        if not self._changed(node.op_type, current):
            return
        if (rewrite := REWRITES.get(node.op_type)) is not None:
            rewrite(node)
        elif node.op_type not in TYPES_ONLY or not self._fits(node):
            raise ExportError(
                f"opset {self.target}: node {node.name} is {node.op_type}, whose form changed by opset {current} and "
                "has no rewrite; please report the model and its options"
            )

    def _changed(self, kind: str, current: int) -> bool:
        try:
            new = onnx.defs.get_schema(kind, current).since_version
        except onnx.defs.SchemaError as error:
            raise ExportError(f"opset {current} has no operator {kind}; please report the model") from error
        return bool(new > self.target)

    def _fits(self, node: ir.Node) -> bool:
        """Whether the older schema has all attributes and inputs that the node uses."""
        try:
            old = onnx.defs.get_schema(node.op_type, self.target)
        except onnx.defs.SchemaError:
            return False
        return set(node.attributes) <= set(old.attributes) and len(node.inputs) <= old.max_input


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    node.attributes.pop("noop_with_empty_axes", None)
    if axes is None:
        return
    if axes.const_value is None:
        raise ExportError(f"node {node.name}: {node.op_type} over axes that are computed; please report the model")
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.const_value.numpy()])
    node.resize_inputs(1)


def _spell_split(node: ir.Node) -> None:
    """Opset 18 added `num_outputs`; sizes as an input, or equal parts by default, are what opset 13 has."""
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return
    x = node.inputs[0]
    axis = node.attributes.get_int("axis", 0)
    length = x.shape[axis] if x is not None and x.shape is not None else None
    if not isinstance(length, int):
        raise ExportError(f"node {node.name}: Split of an axis of unknown length; please report the model")
    part = -(-length // len(node.outputs))  # opset 18: equal parts, the last one smaller
    sizes = [min(part, length - i * part) for i in range(len(node.outputs))]
    value = _constant(f"{node.name}/sizes", sizes)
    if node.graph is None or x is None:
        raise ExportError(f"node {node.name} stands in no graph; please report the model")
    node.graph.register_initializer(value)
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def gelu_from_erf(node: ir.Node) -> None:
    """Gelu as 0.5 x (1 + erf(x / sqrt 2)), in the five operators that TensorRT's and ONNX Runtime's fusions know.

    Source: TensorRT documentation, "Types of Fusions", pointwise GELU.
    """
    if node.attributes.get_string("approximate", "none") != "none":
        raise ExportError(f"node {node.name}: Gelu by tanh has no rewrite; please report the model and its options")
    tape, name, x = Tape(), node.outputs[0].name, node.inputs[0]
    root, one, half = (
        tape.initializer(ir.tensor(np.array(number, np.float32), name=f"{name}/{text}"))
        for text, number in (("sqrt2", math.sqrt(2)), ("one", 1), ("half", 0.5))
    )
    erf = tape.op("Erf", [tape.op("Div", [x, root])])
    tape.op("Mul", [tape.op("Mul", [x, tape.op("Add", [erf, one])]), half])
    replace(node, tape)


REWRITES: dict[str, Callable[[ir.Node], None]] = {
    **dict.fromkeys(REDUCTIONS, _axes_to_attribute),
    "Split": _spell_split,
    "Gelu": gelu_from_erf,
}


class DecomposeLayerNorm(passes.InPlacePass):
    """LayerNormalization from the operators that a TensorRT 8.5 parser has.

    Given:  LayerNormalization(x, scale, bias) over the last axes, opset 17
    Result: d = x - mean(x); d / sqrt(mean(d * d) + epsilon) * scale + bias, by Mul and not Pow, which older kernels
            compute through a logarithm; float32 wherever the node was float32
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        found = [node for node in model.graph if node.op_type == "LayerNormalization"]
        for node in found:
            replace(node, _norm_parts(node))
        return passes.PassResult(model, bool(found))


def _norm_parts(node: ir.Node) -> Tape:
    tape, name, x = Tape(), node.outputs[0].name, node.inputs[0]
    if x is None or x.shape is None or len(node.outputs) > 1:
        raise ExportError(f"node {node.name}: LayerNormalization of unknown rank; please report the model")
    rank = len(x.shape)
    first = node.attributes.get_int("axis", -1) % rank
    axes: dict[str, int | list[int]] = {"axes": list(range(first, rank)), "keepdims": 1}
    epsilon = np.array(node.attributes.get_float("epsilon", LN_EPSILON), np.float32)
    if x.dtype is not None and x.dtype != ir.DataType.FLOAT:
        raise ExportError(f"node {node.name}: LayerNormalization in {x.dtype.name}, expected FLOAT; please report it")
    centred = tape.op("Sub", [x, tape.op("ReduceMean", [x], axes)])
    variance = tape.op("ReduceMean", [tape.op("Mul", [centred, centred])], axes)
    spread = tape.op("Sqrt", [tape.op("Add", [variance, tape.initializer(ir.tensor(epsilon, name=f"{name}/epsilon"))])])
    scaled = tape.op("Mul", [tape.op("Div", [centred, spread]), node.inputs[1]])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        tape.op("Add", [scaled, node.inputs[2]])
    return tape


class DecomposeHardSwish(passes.InPlacePass):
    """HardSwish from HardSigmoid, which older parsers have.

    Given:  HardSwish(x)
    Result: x * HardSigmoid(x, alpha=1/6, beta=1/2): its definition
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        found = [node for node in model.graph if node.op_type == "HardSwish"]
        for node in found:
            tape = Tape()
            gate = tape.op("HardSigmoid", [node.inputs[0]], {"alpha": 1 / 6, "beta": 0.5})
            tape.op("Mul", [node.inputs[0], gate])
            replace(node, tape)
        return passes.PassResult(model, bool(found))


def replace(node: ir.Node, tape: Tape) -> None:
    """Put the recorded nodes where `node` stood, named after it by "/"; the last one takes over its output."""
    graph, last = node.graph, tape.nodes[-1].outputs[0]
    if graph is None:
        raise ExportError("graph passes: a node stands in no graph; please report the model")
    for value in tape.initializers:
        graph.register_initializer(value)
    for number, part in enumerate(tape.nodes):
        part.name = f"{node.name or node.outputs[0].name}/{part.op_type}_{number}"
        if part.outputs[0] is not last:
            part.outputs[0].name = f"{node.outputs[0].name}/{part.op_type}_{number}"
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(tape.nodes), node.outputs, [last])


def _constant(name: str, values: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
    return ir.Value(
        name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def lowering(opset: int) -> tuple[ir.passes.PassBase, ...]:
    """The passes to `opset`, and what tidies up behind them."""
    return (LowerOpset(opset), common.DeduplicateInitializersPass(), common.RemoveUnusedNodesPass())
