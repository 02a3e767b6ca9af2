"""QuantizeLinear and DequantizeLinear around operators of a float graph: int8 in ONNX's standard form.

Runtimes recognise the form and compute the operator between in integers. Which operators, and with which zero points
and companions, is each target's own affair: a `Scheme`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from edgevit.errors import ExportError

from .calibrators import Range
from .observe import moved, source_of

WEIGHTED = ("Conv", "Gemm", "MatMul")  # of the shape x * w + b, w a constant
INT8 = 127  # weights are symmetric: -128 has no counterpart
STEPS = 255  # between the smallest and the largest value of 8 bits
INT32_ROOM = 2.0**31 * 0.9  # what a bias may take of an accumulator, which also holds the products


@dataclass(frozen=True)
class Scheme:
    """What a target's int8 kernels take.

    activation, symmetric: the type of activations; symmetric has the zero point in the middle (0 of int8).
    weight_limit: largest magnitude of a weight; 63 leaves a bit for processors that add pairs of products in 16 bits.
    bias: the bias of a Conv or Gemm as int32 in the scale of the products, else it stays float.
    outputs: operator kinds whose result is quantised as well.
    early: quantise ahead of operators that only move values, which then move bytes, in place of behind them.
    """

    activation: Literal["uint8", "int8"]
    symmetric: bool
    weight_limit: int = INT8
    bias: bool = False
    outputs: frozenset[str] = field(default_factory=frozenset)
    early: bool = False


@dataclass(frozen=True)
class _Grid:
    """The numbers that 8 bits stand for: (q - zero) * scale."""

    scale: float
    zero: int
    dtype: type[np.int8] | type[np.uint8]


def insert_qdq(graph: ir.Model, ranges: Mapping[str, Range], scheme: Scheme, chosen: Collection[str]) -> dict[str, int]:
    """Put Q/DQ around the chosen nodes, in place; the number of nodes of each kind that were.

    An input with a range is quantised once for all its readers. A constant operand of a product becomes int8 with a
    scale for each output channel. Nodes and ranges that are not named stay as they are, so that an Add may have one of
    its inputs in int8.

    Args:
        ranges: by tensor; `measured` says which are asked for. chosen: names of nodes.

    Raises:
        ExportError: a chosen node is not in the graph, or a product's input has no range.
    """
    nodes = _nodes(graph, chosen)
    writer = _Writer(graph, ranges, scheme)
    for node in nodes:
        writer.quantize(node)
    return dict(Counter(node.op_type for node in nodes))


def measured(graph: ir.Model, scheme: Scheme, chosen: Collection[str]) -> list[str]:
    """The tensors whose ranges `insert_qdq` needs, in the graph's order."""
    names: dict[str, None] = {}
    for node in _nodes(graph, chosen):
        values = [*activations(node), *(node.outputs if node.op_type in scheme.outputs else ())]
        names |= {value.name or "": None for value in values}
    return list(names)


def activations(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that depend on the picture."""
    count = 2 if node.op_type in WEIGHTED else len(node.inputs)  # behind the operands stands the bias
    return [
        value for value in node.inputs[:count]
        if value is not None and value.const_value is None and value.dtype == ir.DataType.FLOAT
    ]  # fmt: skip


def weight_axis(node: ir.Node) -> int | None:
    """The axis of output channels of a product's constant right operand; None where it has none that int8 takes."""
    weight = node.inputs[1] if node.op_type in WEIGHTED and len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None or node.inputs[0] is None:
        return None
    if node.op_type == "Conv":
        return 0
    if len(weight.const_value.shape) != 2:
        return None
    return 0 if node.attributes.get_int("transB", 0) else 1


def channel_bias(node: ir.Node) -> NDArray[np.float32] | None:
    """A product's constant bias, one number for each output channel; None where it has none, or another shape."""
    axis, value = weight_axis(node), node.inputs[2] if len(node.inputs) > 2 else None
    weight = node.inputs[1]
    if axis is None or value is None or value.const_value is None or weight is None or weight.const_value is None:
        return None
    bias: NDArray[np.float32] = value.const_value.numpy()
    channels = weight.const_value.numpy().shape[axis]
    return bias.reshape(-1) if bias.shape in ((channels,), (1, channels)) else None


def weight_scales(
    weight: NDArray[np.float32], axis: int, limit: int = INT8, bias: NDArray[np.float32] | None = None,
    input_scale: float = 1.0,
) -> NDArray[np.float32]:  # fmt: skip
    """One scale for each output channel, such that the channel's largest magnitude is `limit`.

    A channel of zeros has scale 1. Where a bias is stored in int32, in units of this scale times the input's, the scale
    is no smaller than the bias needs.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.abs(weight).max(axis=others).astype(np.float64) / limit
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias.astype(np.float64)) / (input_scale * INT32_ROOM))
    scales[scales < np.finfo(np.float32).tiny] = 1.0  # a denormal scale is zero to kernels that flush
    found: NDArray[np.float32] = scales.astype(np.float32)
    return found


def quantized(weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int) -> NDArray[np.int8]:
    """The nearest int8 values for a scale along `axis`."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    whole: NDArray[np.int8] = np.clip(np.rint(weight / scales.reshape(shape)), -INT8, INT8).astype(np.int8)
    return whole


def grid(found: Range, scheme: Scheme) -> _Grid:
    """Scale and zero point for a range; one of zeros has scale 1."""
    dtype = np.uint8 if scheme.activation == "uint8" else np.int8
    lowest = int(np.iinfo(dtype).min)
    if scheme.symmetric:
        return _Grid(_scale(max(-found.low, found.high) / INT8), lowest + 128, dtype)
    scale = _scale((found.high - found.low) / STEPS)
    return _Grid(scale, int(np.clip(round(lowest - found.low / scale), lowest, lowest + STEPS)), dtype)


def _scale(wish: float) -> float:
    """As float32 has it; 1 where it would be denormal, which kernels flush to zero."""
    return float(np.float32(wish)) if wish >= np.finfo(np.float32).tiny else 1.0


def _nodes(graph: ir.Model, chosen: Collection[str]) -> list[ir.Node]:
    wanted = set(chosen)
    nodes = [node for node in graph.graph if node.name in wanted]
    missing = wanted - {node.name for node in nodes}
    if missing:
        raise ExportError(f"int8: the graph has no node {min(missing)!r}; please report the model and its options")
    return nodes


class _Writer:
    """Rewrites nodes one by one and remembers what is quantised already."""

    def __init__(self, graph: ir.Model, ranges: Mapping[str, Range], scheme: Scheme) -> None:
        self.graph, self.ranges, self.scheme = graph.graph, ranges, scheme
        self._grids: dict[_Grid, tuple[ir.Value, ir.Value]] = {}
        self._bytes: dict[str, ir.Value] = {}  # by tensor: its 8 bits
        self._floats: dict[str, ir.Value] = {}  # by tensor: the same, dequantised
        self._weights: dict[tuple[str, int], tuple[ir.Value, NDArray[np.float32]]] = {}

    def quantize(self, node: ir.Node) -> None:
        grids = {}
        for index, value in enumerate(node.inputs):
            name = "" if value is None else value.name or ""
            if value is not None and value in activations(node) and name in self.ranges:
                grids[index] = grid(self.ranges[name], self.scheme)
                node.replace_input_with(index, self._dequantized(value, grids[index]))
        if node.op_type in WEIGHTED:
            self._operand(node, grids.get(0))
        if node.op_type in self.scheme.outputs:
            self._result(node)

    def _operand(self, node: ir.Node, fed: _Grid | None) -> None:
        """Weight and bias of a product."""
        if fed is None:
            raise ExportError(f"int8: node {node.name} has no range for its input; please report the model")
        axis = weight_axis(node)
        if axis is None:
            return
        bias = channel_bias(node) if self.scheme.bias else None
        weight, scales = self._weight(node, axis, bias, fed)
        node.replace_input_with(1, weight)
        if bias is not None:
            node.replace_input_with(2, self._bias(node, bias, scales, fed))

    def _weight(
        self, node: ir.Node, axis: int, bias: NDArray[np.float32] | None, fed: _Grid
    ) -> tuple[ir.Value, NDArray[np.float32]]:
        value = node.inputs[1]
        if value is None or value.const_value is None:
            raise ExportError(f"int8: node {node.name} has no constant weight; please report the model")
        name, array = value.name or "", value.const_value.numpy()
        scales = weight_scales(array, axis, self.scheme.weight_limit, bias, fed.scale)
        key = f"{name}/{axis}"
        held = self._weights.get((key, 0))
        if held is not None and np.array_equal(held[1], scales):
            return held
        suffix = "" if held is None else f"/{node.name}"
        tape = Tape()
        operands = [
            _stored(tape, f"{name}_int8{suffix}", quantized(array, scales, axis)),
            _stored(tape, f"{name}_scale{suffix}", scales),
            _stored(tape, f"{name}_zero{suffix}", np.zeros(scales.shape, np.int8)),
        ]
        result = self._write(tape, tape.op("DequantizeLinear", operands, {"axis": axis}), f"{name}_float{suffix}", node)
        if held is None:
            self._weights[key, 0] = (result, scales)
        return result, scales

    def _bias(self, node: ir.Node, bias: NDArray[np.float32], scales: NDArray[np.float32], fed: _Grid) -> ir.Value:
        """int32 in units of the products: input scale times weight scale."""
        tape, name = Tape(), f"{node.name}/bias"
        units = scales * np.float32(fed.scale)
        whole = np.clip(np.rint(bias.astype(np.float64) / units), -(2**31), 2**31 - 1).astype(np.int32)
        operands = [
            _stored(tape, f"{name}_int32", whole),
            _stored(tape, f"{name}_scale", units),
            _stored(tape, f"{name}_zero", np.zeros(units.shape, np.int32)),
        ]
        return self._write(tape, tape.op("DequantizeLinear", operands, {"axis": 0}), f"{name}_float", node)

    def _result(self, node: ir.Node) -> None:
        """Quantise what a node makes, for all its readers."""
        value = node.outputs[0]
        readers = [(use.node, use.idx) for use in value.uses()]
        name = value.name or ""
        if name not in self.ranges or value.is_graph_output() or not readers:
            return
        floats = self._dequantized(value, grid(self.ranges[name], self.scheme))
        for reader, index in readers:
            reader.replace_input_with(index, floats)

    def _dequantized(self, value: ir.Value, made: _Grid) -> ir.Value:
        """`value` through 8 bits, made once for all readers."""
        name = value.name or ""
        if name not in self._floats:
            tape = Tape()
            stored = self._quantized(value, made)
            after = stored.producer()
            out = tape.op("DequantizeLinear", [stored, *self._constants(made)])
            out.shape, out.dtype = value.shape, ir.DataType.FLOAT
            self._floats[name] = self._write(tape, out, f"{name}_float", after, behind=True)
        return self._floats[name]

    def _quantized(self, value: ir.Value, made: _Grid) -> ir.Value:
        """The 8 bits of a tensor; where the scheme says so, of the tensor that it was moved from, moved in turn."""
        name = value.name or ""
        if name in self._bytes:
            return self._bytes[name]
        node, tape = value.producer(), Tape()
        origin = None if node is None or not self.scheme.early else moved(node)
        if origin is not None and node is not None and origin.const_value is None and self._same(origin, made):
            before = self._quantized(origin, made)
            out = tape.op(node.op_type, [before, *node.inputs[1:]], dict(node.attributes))
        else:
            out = tape.op("QuantizeLinear", [value, *self._constants(made)])
        out.shape, out.dtype = value.shape, ir.DataType.UINT8 if made.dtype is np.uint8 else ir.DataType.INT8
        self._bytes[name] = self._write(tape, out, f"{name}_{self.scheme.activation}", node, behind=True)
        return self._bytes[name]

    def _same(self, origin: ir.Value, made: _Grid) -> bool:
        """Whether a tensor, if quantised already or of a range of its own, has the same grid."""
        names = [value.name or "" for value in (origin, source_of(origin))]
        known = [self.ranges[name] for name in names if name in self.ranges]
        return all(grid(found, self.scheme) == made for found in known)

    def _constants(self, made: _Grid) -> tuple[ir.Value, ir.Value]:
        if made not in self._grids:
            tape, name = Tape(), f"int8/grid_{len(self._grids)}"
            scale = _stored(tape, f"{name}_scale", np.array(made.scale, np.float32))
            zero = _stored(tape, f"{name}_zero", np.array(made.zero, made.dtype))
            self._register(tape.initializers)
            self._grids[made] = scale, zero
        return self._grids[made]

    def _write(self, tape: Tape, value: ir.Value, name: str, at: ir.Node | None, *, behind: bool = False) -> ir.Value:
        """Put the recorded nodes before or behind `at`; at the start of the graph where there is none."""
        value.name = name
        for i, node in enumerate(tape.nodes):
            node.name = f"{name}/{node.op_type}" if len(tape.nodes) == 1 else f"{name}/{node.op_type}_{i}"
        self._register(tape.initializers)
        if at is None:
            self.graph.insert_before(self.graph[0], list(tape.nodes))
        elif behind:
            self.graph.insert_after(at, list(tape.nodes))
        else:
            self.graph.insert_before(at, list(tape.nodes))
        return value

    def _register(self, values: Iterable[ir.Value]) -> None:
        for value in values:
            self.graph.register_initializer(value)


def _stored(tape: Tape, name: str, array: NDArray[Any]) -> ir.Value:
    return tape.initializer(ir.tensor(array, name=name))
