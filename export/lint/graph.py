"""What the rules see of an ONNX model: nodes with those of subgraphs and functions, tensors, constants, who reads what.

The model is a stranger's: nothing in it is trusted to be there, to have the right type or to be finite.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgevit.errors import ArtifactError

from .reading import MAX_NODES, check_functions, check_texts, infer, infer_apart, inner_graphs, shown, skeleton

STANDARD_DOMAINS = ("", "ai.onnx")  # two spellings of the same one
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
CONTROL_FLOW = ("If", "Loop", "Scan")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# What does not become a constant because its inputs are: it draws, it decides, or rules look at it where it stands.
NEVER_FOLDED = {*CONTROL_FLOW, QUANTIZE, DEQUANTIZE, "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"}
SHAPE_READERS = ("Shape", "Size")  # constants where the shape is known

Shape = tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class Node:
    """One node; `kind` is "Conv", or with a domain of its own "com.example.Conv"; `name` can be shown to a user."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, onnx.AttributeProto]
    order: int
    scope: int  # which graph it stands in: 0 is the main one, each branch and loop body has its own
    folded: bool  # computed from stored tensors alone: a compiler leaves a constant

    @property
    def kind(self) -> str:
        """The operator, with its domain unless that is ONNX's own."""
        return self.op if self.standard else f"{self.domain}.{self.op}"

    @property
    def standard(self) -> bool:
        """Whether this is an operator of ONNX itself."""
        return self.domain in STANDARD_DOMAINS

    def is_a(self, *ops: str) -> bool:
        """Whether this is one of ONNX's own operators of these names."""
        return self.standard and self.op in ops

    def input(self, index: int) -> str:
        """The name of an input, "" where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    @property
    def output(self) -> str:
        """The name of the first output."""
        return self.outputs[0] if self.outputs else ""

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attributes[name].i) if name in self.attributes else default

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty where it is left out."""
        return tuple(self.attributes[name].ints) if name in self.attributes else ()

    def text(self, name: str, default: str = "") -> str:
        """A text attribute."""
        return self.attributes[name].s.decode("utf-8", "replace") if name in self.attributes else default


@dataclass(frozen=True, eq=False)
class Graph:
    """A model as the rules see it; made by `view`."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, TensorProto]  # initializers and tensors of Constant nodes
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, int]
    opset: int
    ir_version: int
    given: frozenset[str]  # what no node makes: inputs, also those of loop bodies, and stored tensors
    producers: Mapping[str, Node] = field(default_factory=dict)
    readers: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()

    @functools.cached_property
    def live(self) -> tuple[Node, ...]:
        """The nodes that run for every picture."""
        return tuple(node for node in self.nodes if not node.folded)

    @functools.cached_property
    def half(self) -> bool:
        """Whether anything is computed in float16."""
        return any(self.dtypes.get(name) == TensorProto.FLOAT16 for node in self.live for name in node.outputs)

    @functools.cached_property
    def quantized(self) -> bool:
        """Whether anything is quantized or dequantized."""
        return any(node.is_a(QUANTIZE, DEQUANTIZE) for node in self.nodes)

    @functools.cached_property
    def dynamic(self) -> bool:
        """Whether an input has a dimension without a fixed length."""
        return any(isinstance(size, str) for name in self.inputs for size in self.shapes.get(name, ()))

    def named(self, *ops: str) -> Iterator[Node]:
        """The nodes that run for every picture and are of these operators."""
        return (node for node in self.live if node.is_a(*ops))

    def producer(self, name: str) -> Node | None:
        """The node that makes a tensor."""
        return self.producers.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is stored or computed from stored ones."""
        return name in self.constants

    def rank(self, name: str) -> int | None:
        """The number of dimensions, where known."""
        return len(self.shapes[name]) if name in self.shapes else None

    def size(self, name: str, axis: int) -> int | None:
        """The length of one axis, where it is known and fixed."""
        shape = self.shapes.get(name, ())
        value = shape[axis] if -len(shape) <= axis < len(shape) else None
        return value if isinstance(value, int) else None

    def value(self, name: str) -> NDArray[Any] | None:
        """A stored tensor's values; None where there are none, where they lie in another file or are damaged."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError):
            return None

    @functools.cached_property
    def _extremes(self) -> Mapping[str, tuple[float, float]]:
        found = {}
        for name, tensor in self.tensors.items():
            values = self.value(name) if tensor.data_type in FLOATS else None
            if values is not None and values.size:
                wide = values.astype(np.float32) if values.dtype == np.float16 else values  # five times as fast
                found[name] = float(wide.min()), float(wide.max())
        return found

    def extremes(self, name: str) -> tuple[float, float]:
        """Smallest and largest value of a stored floating-point tensor; (0, 0) where unknown, NaN where it has one."""
        return self._extremes.get(name, (0.0, 0.0))

    def weights(self, name: str) -> tuple[str, bool]:
        """The stored tensor that a constant operand comes from, and whether it is dequantized on its way; or ""."""
        quantized = False
        for _ in range(4):  # QuantizeLinear, DequantizeLinear, Cast, Transpose: the longest that any tool writes
            node = self.producer(name)
            if node is None or not node.is_a(QUANTIZE, DEQUANTIZE, "Transpose", "Cast"):
                break
            quantized, name = quantized or node.is_a(QUANTIZE, DEQUANTIZE), node.input(0)
        return (name, quantized) if self.is_constant(name) else ("", False)


def view(model: onnx.ModelProto, *, stranger: bool = False) -> Graph:
    """What the rules see of a model, which stays as it is; native code sees a stranger's in a process of its own.

    Raises:
        ArtifactError: names that are no text, functions that call themselves, more nodes than any network has, or
            shapes over which a stranger's model keeps native code from ending.
    """
    check_texts(model)
    check_functions(model)
    inferred = (infer_apart if stranger else infer)(skeleton(model))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes, dtypes = dict[str, Shape](), dict[str, int]()
    _note(shapes, dtypes, model.graph.output)  # what is declared stands where nothing else is known
    walk = _Walk(tensors, shapes, dtypes)
    raw = list(walk.nodes(inferred.graph))
    if len(raw) > MAX_NODES:
        raise ArtifactError(f"graph {shown(model.graph.name)!r}: more than {MAX_NODES} nodes; expected a network")
    for name, tensor in tensors.items():
        shapes[name], dtypes[name] = tuple(tensor.dims), tensor.data_type
    nodes, constants = _nodes(raw, set(tensors), shapes)
    producers, readers = dict[str, Node](), defaultdict[str, list[Node]](list)
    for node in nodes:
        producers.update((name, node) for name in node.outputs if name)
        for name in {*node.inputs} - {""}:
            readers[name].append(node)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    return Graph(
        nodes=nodes,
        inputs=tuple(value.name for value in model.graph.input if value.name not in tensors),
        outputs=tuple(value.name for value in model.graph.output),
        tensors=tensors,
        shapes=shapes,
        dtypes=dtypes,
        opset=versions.get("", versions.get("ai.onnx", 0)),
        ir_version=model.ir_version,
        given=frozenset({*walk.given, *tensors}),
        producers=producers,
        readers={name: tuple(found) for name, found in readers.items()},
        constants=frozenset(constants),
    )


@dataclass
class _Walk:
    """Collects what a graph and the graphs inside it hold."""

    tensors: dict[str, TensorProto]
    shapes: dict[str, Shape]
    dtypes: dict[str, int]
    given: set[str] = field(default_factory=set)
    scopes: int = 0

    def nodes(self, graph: onnx.GraphProto) -> Iterator[tuple[int, onnx.NodeProto]]:
        """Its nodes, each with the number of the graph that it stands in, noting tensors on the way."""
        scope, self.scopes = self.scopes, self.scopes + 1
        _note(self.shapes, self.dtypes, (*graph.input, *graph.output, *graph.value_info))
        self.given.update(value.name for value in graph.input)
        self.given.update(sparse.values.name for sparse in graph.sparse_initializer)
        if scope:  # those of the main graph are known with their values, here they may be bare
            self.tensors.update((tensor.name, tensor) for tensor in graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value" and attribute.HasField("t") and node.output:
                    self.tensors[node.output[0]] = attribute.t
            yield scope, node
            for inner in inner_graphs(node):
                yield from self.nodes(inner)


def _note(shapes: dict[str, Shape], dtypes: dict[str, int], values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type:
            dtypes[value.name] = kind.elem_type
        if kind.HasField("shape"):
            dims = kind.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


def _nodes(
    raw: Iterable[tuple[int, onnx.NodeProto]], stored: set[str], shapes: Mapping[str, Shape]
) -> tuple[tuple[Node, ...], set[str]]:
    """The nodes as the rules see them, and the names of all constants."""
    nodes, constants = [], set(stored)
    for order, (scope, node) in enumerate(raw):
        folded = _folds(node, constants, shapes)
        if folded:
            constants.update(name for name in node.output if name)
        name = shown(node.name or next((name for name in node.output if name), "") or f"{node.op_type} {order}")
        attributes = {attribute.name: attribute for attribute in node.attribute}
        ends = tuple(node.input), tuple(node.output)
        nodes.append(Node(shown(node.op_type), shown(node.domain), name, *ends, attributes, order, scope, folded))
    return tuple(nodes), constants


def _folds(node: onnx.NodeProto, constants: set[str], shapes: Mapping[str, Shape]) -> bool:
    if node.domain not in STANDARD_DOMAINS or node.op_type in NEVER_FOLDED:
        return False
    if node.op_type in SHAPE_READERS and node.input:
        shape = shapes.get(node.input[0])
        return shape is not None and not any(isinstance(size, str) for size in shape)
    return node.op_type == "Constant" or (bool(node.input) and all(n in constants for n in node.input if n))
