"""A float32 graph as one strongly typed float16 graph: every tensor has the type that it is computed in.

Inputs and outputs stay float32. What float16 cannot hold stays float32 between Casts: operators that square or
exponentiate inside, tensors that were measured to be too large or too small, weights that would overflow or vanish.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import passes
from onnx_ir.passes import common

from edgevit.errors import ExportError

from .ranges import LARGEST, PRODUCTS, Ranges, as_json

Why = Literal["operator", "range", "sum", "weight"]

# They square, exponentiate or normalise inside, which no look at their outputs shows.
ALWAYS_FLOAT32 = frozenset(
    ("BatchNormalization", "Cast", "CastLike", "ConstantOfShape", "Exp", "GroupNormalization", "InstanceNormalization",
     "LayerNormalization", "LogSoftmax", "LpNormalization", "Pow", "Range", "Reciprocal", "ReduceL2", "ReduceLogSum",
     "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare", "Softmax")
)  # fmt: skip
# They move numbers and compute nothing: between two float32 operators they are cheaper in float32 than two Casts are.
MOVERS = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
     "Unsqueeze")
)  # fmt: skip
BIAS = 2  # the operand of Conv and Gemm that is added: its rounding error is absolute, at most 2**-25
LOSSY = 2.0**-10  # relative error of a tensor of weights; rounding a normal number costs at most 2**-11
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT


@dataclass(frozen=True)
class Kept:
    """A node that stays float32: why, and the tensor that made it so with its largest magnitude."""

    node: str
    operator: str
    why: Why
    tensor: str = ""
    max_abs: float = 0.0

    def record(self) -> dict[str, Any]:
        """The fields, for a manifest."""
        fields = {"node": self.node, "operator": self.operator, "why": self.why}
        return fields | ({"tensor": self.tensor, "max_abs": as_json(self.max_abs)} if self.tensor else {})


class ToHalf(passes.InPlacePass):
    """float32 -> strongly typed float16.

    Given:  a float32 graph with inferred types, weights as initializers, no graph inside a node
    Result: the same inputs and outputs; in between float16, but for the nodes listed in `kept`; one Cast for each
            tensor that is read in both types, none on a constant. A graph that has float16 already is left alone.
    """

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self.ranges = ranges
        self.kept: tuple[Kept, ...] = ()

    def call(self, model: ir.Model) -> passes.PassResult:
        """Apply the pass to the main graph."""
        graph = model.graph
        if any(value.dtype == HALF for node in graph for value in node.outputs):
            return passes.PassResult(model, False)
        _check(graph)
        opset = graph.opset_imports.get("") or 0
        kept = {node: why for node in graph if (why := _why_kept(node, self.ranges, opset)) is not None}
        self.kept = tuple(kept.values())
        full = _with_movers(graph, _with_partners(graph, set(kept)))
        _convert(graph, full, opset)
        return passes.PassResult(model, True)

    @property
    def operators(self) -> dict[str, int]:
        """How many nodes of each operator stay float32 because of what they are."""
        return dict(sorted(Counter(k.operator for k in self.kept if k.why == "operator").items()))

    @property
    def named(self) -> tuple[Kept, ...]:
        """The nodes that stay float32 because of what was measured in this network."""
        return tuple(k for k in self.kept if k.why != "operator")


def _check(graph: ir.Graph) -> None:
    for node in graph:
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            raise ExportError(f"float16: node {node.name} ({node.op_type}) holds a graph, which has no float16 form")
        untyped = next((value.name for value in node.outputs if value.dtype is None), None)
        if untyped is not None:
            raise ExportError(
                f"float16: tensor {untyped} of node {node.name} has no known type; please report the model"
            )


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == FULL


def _constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.producer() is None


def _why_kept(node: ir.Node, ranges: Ranges, opset: int) -> Kept | None:
    """Why a node with float tensors stays float32, or None."""
    floats = [value for value in (*node.inputs, *node.outputs) if value is not None and _is_float(value)]
    if not floats:
        return None
    name, kind = node.name or "", node.op_type
    if kind in ALWAYS_FLOAT32 or not _takes_half(kind, opset):
        return Kept(name, kind, "operator")
    measured = ranges.wide | ranges.narrow
    for tensor in (value.name or "" for value in floats):
        if tensor in measured:
            return Kept(name, kind, "range", tensor, measured[tensor])
    if name in ranges.wide_sums and not partners(node):  # int8 products are summed in 32 bits
        return Kept(name, kind, "sum", node.outputs[0].name or "", ranges.wide_sums[name])
    for index, value in enumerate(node.inputs):
        if value is not None and _is_float(value) and _constant(value):
            added = index == BIAS and kind in ("Conv", "Gemm")
            if (largest := _unfit(value, check_loss=not added)) is not None:
                return Kept(name, kind, "weight", value.name or "", largest)
    return None


def _unfit(value: ir.Value, *, check_loss: bool) -> float | None:
    """The largest magnitude of a constant that float16 cannot hold or would round too coarsely, else None."""
    tensor = value.const_value
    array = np.zeros(0, np.float32) if tensor is None else tensor.numpy()
    finite = array[np.isfinite(array)]  # infinities exist in float16 too
    largest = float(np.abs(finite).max(initial=0))
    if largest > LARGEST:
        return largest
    if not check_loss or largest == 0:
        return None
    error = np.linalg.norm(finite.astype(np.float16).astype(np.float64) - finite)
    return largest if error > LOSSY * np.linalg.norm(finite.astype(np.float64)) else None


def _takes_half(kind: str, opset: int) -> bool:
    """Whether ONNX lets an operator compute in float16."""
    schema = onnx.defs.get_schema(kind, opset)
    return any({"tensor(float)", "tensor(float16)"} <= set(c.allowed_type_strs) for c in schema.type_constraints)


def _follows(kind: str, index: int, opset: int, *, output: bool = False) -> bool:
    """Whether one operand has the type that the operator computes in, or always float32 (the scales of a Resize)."""
    schema = onnx.defs.get_schema(kind, opset)
    formals = schema.outputs if output else schema.inputs
    text = formals[min(index, len(formals) - 1)].type_str
    return not text.startswith("tensor(")


def partners(node: ir.Node) -> list[ir.Node]:
    """What an int8 kernel computes together with a product: the DequantizeLinear of both operands."""
    ends = [None if value is None else value.producer() for value in node.inputs[:2]]
    found = [end for end in ends if end is not None and end.op_type == DEQUANTIZE]
    return found if node.op_type in PRODUCTS and len(found) == 2 else []


def _with_partners(graph: ir.Graph, full: set[ir.Node]) -> set[ir.Node]:
    """`full` and what has to have the same type: a Cast between a product and its DequantizeLinear parts the two.

    Before opset 19 scales, and so all of these, are float32.
    """
    bonds = [(node, *partners(node)) for node in graph if partners(node)]
    bonds += [(node, source) for node in graph if node.op_type == DEQUANTIZE and (source := _quantizer(node))]
    bonds += [(node, source) for node in graph for source in _residuals(node)]
    found, size = set(full), -1
    while len(found) != size:
        size = len(found)
        found |= {node for bond in bonds if any(node in found for node in bond) for node in bond}
    return found


def _residuals(node: ir.Node) -> list[ir.Node]:
    """The DequantizeLinear that an addition reads."""
    ends = [None if value is None else value.producer() for value in node.inputs]
    return [end for end in ends if node.op_type == "Add" and end is not None and end.op_type == DEQUANTIZE]


def _quantizer(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear whose result a DequantizeLinear reads, which has its scale."""
    source = None if node.inputs[0] is None else node.inputs[0].producer()
    return source if source is not None and source.op_type == QUANTIZE else None


def _with_movers(graph: ir.Graph, full: set[ir.Node]) -> set[ir.Node]:
    """`full` and the movers, whole chains of them, that stand between float32 on all sides."""
    movers = {node for node in graph if node.op_type in MOVERS and node not in full}
    while exposed := {node for node in movers if not _surrounded(node, full | movers)}:
        movers -= exposed
    return full | movers


def _surrounded(node: ir.Node, full: set[ir.Node]) -> bool:
    sources = [value for value in node.inputs if value is not None and _is_float(value) and not _constant(value)]
    results = [value for value in node.outputs if _is_float(value)]
    fed = all(value.producer() is None or value.producer() in full for value in sources)
    read = all(user in full for value in results for user, _ in value.uses())
    return bool(sources) and bool(results) and fed and read


def _convert(graph: ir.Graph, full: set[ir.Node], opset: int) -> None:
    """Give every tensor its type, then cast where a reader wants the other one."""
    wanted: dict[ir.Value, list[tuple[ir.Node, int, ir.DataType]]] = {}
    for node in graph:
        own = FULL if node in full else HALF
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value):
                kind = own if _follows(node.op_type, index, opset) else FULL
                wanted.setdefault(value, []).append((node, index, kind))
    for node in graph:
        for index, value in enumerate(node.outputs):
            if _is_float(value) and node not in full and _follows(node.op_type, index, opset, output=True):
                value.type = ir.TensorType(HALF)  # a new one: a copy of the graph may share the old
    casts = _Casts(graph)
    for value, readers in wanted.items():
        other = [(node, index, kind) for node, index, kind in readers if kind != value.dtype]
        if other:
            source = _half_constant(graph, value, len(other) == len(readers)) if _constant(value) else casts.of(value)
            for node, index, _ in other:
                node.replace_input_with(index, source)
    casts.restore_outputs()


def _half_constant(graph: ir.Graph, value: ir.Value, alone: bool) -> ir.Value:
    """A float32 constant in float16, under its own name where nothing reads it in float32."""
    if value.const_value is None or value.name is None:
        raise ExportError("float16: a constant without name or values; please report the model")
    name = value.name if alone else f"{value.name}/fp16"
    tensor = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)
    made = ir.Value(name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(HALF), const_value=tensor)
    if alone:
        del graph.initializers[value.name]
    graph.register_initializer(made)
    return made


class _Casts:
    """Makes at most one Cast for each tensor, behind the node that makes it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        if value not in self.made:
            kind, text = (FULL, "fp32") if value.dtype == HALF else (HALF, "fp16")
            self.made[value] = self._cast(value, kind, f"{value.name}/{text}")
        return self.made[value]

    def restore_outputs(self) -> None:
        """A graph output that became float16: its float32 form takes over the name."""
        for index, value in enumerate(self.graph.outputs):
            if value.dtype == HALF:
                name, full = value.name, self.of(value)
                value.name = f"{name}/fp16"
                full.name = name
                self.graph.outputs[index] = full

    def _cast(self, value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}/cast")
        made = node.outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(kind)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return made


TIDY: tuple[ir.passes.PassBase, ...] = (  # what belongs behind `ToHalf`: constants that became equal are stored once
    common.DeduplicateInitializersPass(),
    common.RemoveUnusedNodesPass(),
)
