"""Operations, parameters and bytes, counted on the graph that is deployed or on a PyTorch module.

MACs are those of Attention, Conv, Gemm, MatMul and MatMulInteger. Every other op kind is known to hold no matrix
product (PLAIN) and listed with its output elements, or listed as unknown: a zero is never silent.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its stubs are a package apart
from onnx import inliner, shape_inference

from edgevit.errors import ArtifactError, ExportError
from edgevit.specs import Complexity, ModuleCount

if TYPE_CHECKING:
    from torch import nn

# Op kinds of the standard domain (opset 28) without a matrix product inside. Random, string, sequence and signal kinds
# are left out: no vision network has them, and what is left out is reported as unknown.
_PLAIN_NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd
BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat Constant
ConstantOfShape Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp
Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN
LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool Max MaxPool MaxRoiPool
MaxUnpool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round
Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze
Upsample Where Xor
"""
PLAIN = frozenset(_PLAIN_NAMES.split())
# What lower bounds on moved bytes follow from, by op kind: the output is the input seen otherwise; no more of the first
# input is read than comes out; the output holds no more than the input did; the input need not be kept in full.
IN_PLACE = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
PARTIAL = ("Gather", "GatherElements", "GatherND", "Slice")
WIDENING = (*IN_PLACE, "Cast", "DequantizeLinear", "Expand", "Tile", "Transpose")
NARROWING = ("Cast", "QuantizeLinear")
STANDARD_DOMAINS = ("", "ai.onnx")  # two spellings of the same one


@dataclass(frozen=True)
class _Tensor:
    """Type and shape as far as known; an unknown dimension is its name, or "?"."""

    dtype: onnx_ir.DataType
    shape: tuple[int | str, ...]

    @property
    def elements(self) -> int | None:
        sizes = [size for size in self.shape if isinstance(size, int)]
        return math.prod(sizes) if len(sizes) == len(self.shape) else None

    @property
    def size_bytes(self) -> int | None:
        """Packed size, so two 4-bit elements share a byte; None for an unknown shape or strings, which have no size."""
        if self.elements is None or self.dtype == onnx_ir.DataType.STRING:
            return None
        return math.ceil(self.elements * self.dtype.bitwidth / 8)


@dataclass(frozen=True)
class Moved:
    """A tensor that a node reads or writes, in the smallest form that it has.

    One read through a DequantizeLinear or a Cast is as large as what is behind, a table as the rows gathered from it.
    """

    name: str
    elements: int
    bits: int
    stored: bool

    def size_bytes(self, bits: int) -> float:
        """Its size in a run that keeps values in this many `bits`: those of a float32 file may be moved as 16."""
        return self.elements * min(self.bits, bits) / 8


@dataclass(frozen=True)
class NodeCost:
    """Multiply-accumulates of a node, and the tensors that it cannot do without; those of unknown size are left out.

    A tensor that is another one seen otherwise (a Reshape's) has the other's name.
    """

    macs: int
    reads: tuple[Moved, ...]
    writes: tuple[Moved, ...]


class _Graph:
    """The main graph after shape inference: its tensors by name and which of them are stored in the file."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes, self.outputs = list(graph.node), list(graph.output)
        self.tensors = dict(_typed(*graph.input, *graph.output, *graph.value_info))
        initializers = {t.name: _Tensor(onnx_ir.DataType(t.data_type), tuple(t.dims)) for t in graph.initializer}
        self.tensors.update(initializers)
        constants = (name for node in self.nodes if node.op_type == "Constant" for name in node.output)
        self.stored = [*initializers, *(name for name in constants if name in self.tensors)]

    def elements(self, node: onnx.NodeProto, name: str) -> int:
        """Return the elements of a tensor that a product needs; raise ExportError where its shape is unknown."""
        return math.prod(self.shape(node, name))

    def shape(self, node: onnx.NodeProto, name: str) -> tuple[int, ...]:
        """Return the static shape of a tensor that a product needs, or raise ExportError naming the node."""
        shape = self.tensors[name].shape if name in self.tensors else None
        sizes = tuple(size for size in shape or () if isinstance(size, int))
        if shape is None or len(sizes) < len(shape):
            shown = "unknown" if shape is None else f"({', '.join(map(str, shape))})"
            raise ExportError(
                f"{node.op_type} node {node.name or node.output[0]!r}: the shape of {name!r} is {shown}, "
                "expected fixed numbers; export with a fixed image size to have its operations counted"
            )
        return sizes


def count_onnx(model: str | Path | onnx.ModelProto) -> Complexity:
    """Count one pass through an ONNX file or model, which stays as it is; a dynamic batch counts as 1.

    Nodes that depend on stored tensors alone are left out: a runtime folds them when it loads. So are the bodies of If,
    Loop and Scan, which are listed as unknown. Raises ArtifactError for a file that is not ONNX, ExportError for a
    product of unknown shape or a graph whose shapes contradict each other.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else _load(Path(model)))
    notes = _fix_batch(proto)
    graph = _Graph(_infer(proto))
    macs, not_counted, unknown = Counter[str](), Counter[str](), Counter[str]()
    activation_bytes, unsized = 0, 0
    for node in _live_nodes(graph):
        kind = _kind(node)
        outputs = [graph.tensors.get(name) for name in node.output if name]
        if kind in COUNTERS:
            macs[kind] += COUNTERS[kind](graph, node)
        elif kind in PLAIN:
            not_counted[kind] += sum(tensor.elements or 0 for tensor in outputs if tensor)
        else:
            unknown[kind] += 1
        sizes = [tensor.size_bytes if tensor else None for tensor in outputs]
        activation_bytes += sum(size or 0 for size in sizes)
        unsized += sizes.count(None)
    if unsized:
        notes.append(f"{unsized} tensors of unknown size are in neither activation_bytes nor not_counted")
    return Complexity(
        macs=macs.total(),
        flops=2 * macs.total(),
        macs_by_op=dict(sorted(macs.items())),
        parameters=_parameters(graph),
        weight_bytes=sum(graph.tensors[name].size_bytes or 0 for name in graph.stored),
        activation_bytes=activation_bytes,
        not_counted=dict(sorted(not_counted.items())),
        unknown=dict(sorted(unknown.items())),
        notes=tuple(notes),
    )


def macs_by_node(model: str | Path | onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of each node that has some, by its name, or its first output's where it has none.

    Their sum is `count_onnx(model).macs`. Raises what `count_onnx` raises.
    """
    return {name: cost.macs for name, cost in costs_by_node(model).items() if cost.macs}


def costs_by_node(model: str | Path | onnx.ModelProto, batch: int = 1) -> dict[str, NodeCost]:
    """What each node computes and moves, by its name, or its first output's where it has none.

    Nodes that depend on stored tensors alone are left out, as in `count_onnx`; what they make counts as stored. A
    dynamic batch counts as `batch`. Raises what `count_onnx` raises.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else _load(Path(model)))
    _fix_batch(proto, batch)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.ClearField("raw_data")  # shapes do not depend on weights, and inferring them copies all of it
    graph = _Graph(_infer(proto))
    live = list(_live_nodes(graph))
    alive = {name for node in live for name in node.output}
    stored = {name for node in graph.nodes for name in node.output if name not in alive}.union(graph.stored)
    smallest, seen_as = _smallest(graph), dict[str, str]()
    costs = dict[str, NodeCost]()
    for node in live:
        kind, reads, writes = _kind(node), list[Moved](), list[Moved]()
        if kind in IN_PLACE:
            seen_as[node.output[0]] = seen_as.get(node.input[0], node.input[0])
        elif kind != "Shape":  # which looks at no values
            sized = [name for name in node.input if name in smallest]
            reads = [Moved(seen_as.get(name, name), *smallest[name], name in stored) for name in sized]
            writes = [Moved(name, *smallest[name], stored=False) for name in node.output if name in smallest]
        if kind in PARTIAL and reads and writes:
            reads[0] = replace(reads[0], elements=min(reads[0].elements, writes[0].elements))
        macs = COUNTERS[kind](graph, node) if kind in COUNTERS else 0
        key = node.name or node.output[0]
        same = costs.get(key, NodeCost(0, (), ()))  # two nodes of one name count together
        costs[key] = NodeCost(same.macs + macs, (*same.reads, *reads), (*same.writes, *writes))
    return costs


def _smallest(graph: _Graph) -> dict[str, tuple[int, int]]:
    """(elements, bits) of each tensor of known size, those of what it is widened from or narrowed to where smaller."""
    found = {
        name: (tensor.elements, tensor.dtype.bitwidth)
        for name, tensor in graph.tensors.items()
        if tensor.elements is not None and tensor.size_bytes is not None
    }
    readers = Counter(name for node in graph.nodes for name in node.input)
    readers.update(value.name for value in graph.outputs)

    def smaller(name: str, other: str) -> None:
        if name in found and other in found:
            found[name] = min(found[name], found[other], key=math.prod)

    for node in graph.nodes:  # in the order of computation: what widens takes the form of what it widens
        if node.op_type in WIDENING and node.input and node.output:
            smaller(node.output[0], node.input[0])
    for node in reversed(graph.nodes):  # what is read by one that narrows it, and by no other, is never needed wide
        if node.op_type in NARROWING and node.input and node.output and readers[node.input[0]] == 1:
            smaller(node.input[0], node.output[0])
    return found


def count_module(model: nn.Module, image_size: tuple[int, int]) -> ModuleCount:
    """Count a module that takes images (1, 3, h, w), `image_size` being (h, w), by running a copy of it in eval mode.

    The run is on the module's own device: a module on the meta device is counted without computing anything, one on the
    CPU may read values on its way. Attention is forced into plain matmuls: PyTorch's counter gives its fused CPU
    kernels no operations at all.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    copied = copy.deepcopy(model).eval().requires_grad_(False)  # the counter's tracking of modules fails on gradients
    parameter = next(copied.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, *image_size, dtype=parameter.dtype, device=parameter.device)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # another fused kernel without a count
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            copied(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    flops = counter.get_total_flops()
    return ModuleCount(sum(p.numel() for p in copied.parameters()), flops // 2, flops)


def _conv_macs(graph: _Graph, node: onnx.NodeProto) -> int:
    """Output elements times the kernel of one output channel; the weight (m, c/groups, k...) knows the groups."""
    return graph.elements(node, node.output[0]) * math.prod(graph.shape(node, node.input[1])[1:])


def _gemm_macs(graph: _Graph, node: onnx.NodeProto) -> int:
    """Output elements times the length of the sums: the columns of A, or its rows if A is transposed."""
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return graph.elements(node, node.output[0]) * graph.shape(node, node.input[0])[0 if transposed else 1]


def _matmul_macs(graph: _Graph, node: onnx.NodeProto) -> int:
    """Output elements, batched or broadcast as they may be, times the length of the sums."""
    return graph.elements(node, node.output[0]) * graph.shape(node, node.input[0])[-1]


def _attention_macs(graph: _Graph, node: onnx.NodeProto) -> int:
    """Two products for each query and key: of width d for the logits, of v's width for the output."""
    query, keys = graph.shape(node, node.input[0]), graph.shape(node, node.input[1])[-2]
    return (math.prod(query) + graph.elements(node, node.output[0])) * keys


COUNTERS: dict[str, Callable[[_Graph, onnx.NodeProto], int]] = {
    "Attention": _attention_macs,
    "Conv": _conv_macs,
    "Gemm": _gemm_macs,
    "MatMul": _matmul_macs,
    "MatMulInteger": _matmul_macs,
}


def _kind(node: onnx.NodeProto) -> str:
    """Return "Conv", or with its domain "com.example.Conv"."""
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def _live_nodes(graph: _Graph) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that depend on an input, and those of unknown kind, which may make up values of their own."""
    constant = set(graph.stored)
    for node in graph.nodes:
        known = _kind(node) in PLAIN or _kind(node) in COUNTERS
        if known and all(name in constant for name in node.input if name):
            constant.update(node.output)
        else:
            yield node


def _parameters(graph: _Graph) -> int:
    """Count stored floating-point elements, and 8-bit or 32-bit ones that stand for them."""
    quantizers = [node for node in graph.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {name for node in quantizers for name in node.input[1:]}
    weights = {node.input[0] for node in quantizers if node.op_type == "DequantizeLinear"}
    weights |= {node.input[1] for node in graph.nodes if node.op_type == "MatMulInteger"}
    weights |= {node.input[0] for node in graph.nodes if node.op_type == "Cast"}
    return sum(
        graph.tensors[name].elements or 0
        for name in graph.stored
        if name in weights or (graph.tensors[name].dtype.is_floating_point() and name not in scales)
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise ArtifactError(f"{path}: expected a readable ONNX file ({error})") from error
    if not model.graph.node:  # an empty file is read without complaint
        raise ArtifactError(f"{path}: expected a readable ONNX file (it holds no graph)")
    return model


def _fix_batch(model: onnx.ModelProto, batch: int = 1) -> list[str]:
    """Set the unknown first dimension of every input to `batch` in place, forget shapes that used it, and say so."""
    stored = {tensor.name for tensor in model.graph.initializer}
    notes = []
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in stored and len(dims) and not dims[0].HasField("dim_value"):
            notes.append(f"dynamic batch {dims[0].dim_param or '?'!r} of input {value.name!r} counted as {batch}")
            dims[0].dim_value = batch
    if notes:
        fixed = [value for value in model.graph.value_info if _is_static(value)]
        del model.graph.value_info[:]
        model.graph.value_info.extend(fixed)
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")
    return notes


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inline the model's own functions and fill in the shapes; raise ExportError where they contradict each other."""
    try:
        inlined = inliner.inline_local_functions(model) if model.functions else model
        return shape_inference.infer_shapes(inlined, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"graph {model.graph.name!r}: shape inference failed: {error}") from error


def _typed(*values: onnx.ValueInfoProto) -> Iterator[tuple[str, _Tensor]]:
    """Yield name and tensor of each value that is a tensor of known type and rank."""
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type and kind.HasField("shape"):
            dims = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim)
            yield value.name, _Tensor(onnx_ir.DataType(kind.elem_type), tuple(dims))


def _is_static(value: onnx.ValueInfoProto) -> bool:
    return all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
