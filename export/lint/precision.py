"""Rules on number formats: what overflows in float16, and types that a target does not compute in."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from .graph import DEQUANTIZE, QUANTIZE, Graph, Node
from .rules import EVERY, Hit, Profile, Rule

HALF_MAX = float(np.finfo(np.float16).max)  # 65504, the largest finite float16
DATA_INPUTS = {"Clip": 1, "Resize": 1, "Pad": 1, QUANTIZE: 1, DEQUANTIZE: 1}  # beyond: bounds, sizes, fills, scales
UNREAD_TYPES = (
    TensorProto.INT16, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64, TensorProto.STRING,
    TensorProto.COMPLEX64, TensorProto.COMPLEX128,
)  # fmt: skip
PARSER_TABLE = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
ACCURACY = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/accuracy-considerations.html"
OVERFLOW = "https://github.com/onnxsim/onnxsim/issues/1742"


def _squares(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """Squares whose mean or sum is taken, and what makes what is squared."""
    for node in graph.named("Pow", "Mul"):
        power = graph.value(node.input(1)) if node.op == "Pow" else None
        square = (power is not None and power.size == 1 and float(power.flat[0]) == 2) if node.op == "Pow" else (
            node.input(0) == node.input(1) != ""
        )  # fmt: skip
        source = graph.producer(node.input(0))
        averaged = any(reader.is_a("ReduceMean", "ReduceSum") for reader in graph.readers.get(node.output, ()))
        if square and averaged and source is not None:
            yield node, source


def half_norm_in_parts(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Squares in float16 inside a norm."""
    for node, _source in _squares(graph):
        if graph.dtypes.get(node.output) == TensorProto.FLOAT16:
            yield Hit(node.name)


def norm_in_parts(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Layer norms from separate operators, in float32."""
    for node, source in _squares(graph):
        mean = graph.producer(source.input(1)) if source.is_a("Sub") else None
        centred = mean is not None and mean.is_a("ReduceMean") and mean.input(0) == source.input(0)
        if centred and graph.dtypes.get(node.output) != TensorProto.FLOAT16:
            yield Hit(node.name)


def half_norm(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Norms that read float16."""
    for node in graph.named("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"):
        if graph.dtypes.get(node.input(0)) == TensorProto.FLOAT16:
            yield Hit(node.name, node.op)


def _data_readers(graph: Graph, name: str) -> list[Node]:
    """The running nodes to which a constant is data, not a bound, a size or a scale."""
    readers = [node for node in graph.readers.get(name, ()) if not node.folded]
    return [node for node in readers if name in node.inputs[: DATA_INPUTS.get(node.op, len(node.inputs))]]


def beyond_half(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Constants that are infinite in float16, in a graph that computes in it."""
    for name in graph.tensors:
        low, high = graph.extremes(name)
        largest = max(-low, high)
        if not largest > HALF_MAX:
            continue
        for node in _data_readers(graph, name):
            narrowed = node.is_a("Cast") and node.integer("to", 0) == TensorProto.FLOAT16
            if graph.dtypes.get(name) == TensorProto.FLOAT16 or narrowed:
                yield Hit(node.name, _large(low, high))


def beyond_half_later(graph: Graph, _: Profile) -> Iterator[Hit]:
    """The same in a float32 graph, which the target may convert."""
    if graph.half:
        return
    for name in graph.tensors:
        low, high = graph.extremes(name)
        if max(-low, high) > HALF_MAX:
            for node in _data_readers(graph, name):
                yield Hit(node.name, _large(low, high))


def _large(low: float, high: float) -> str:
    value = low if -low > high else high
    return f"a constant of {value:.3g}"


def no_number(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Constants with NaN."""
    for name in graph.tensors:
        if any(math.isnan(value) for value in graph.extremes(name)):
            yield from (Hit(node.name) for node in graph.readers.get(name, ())[:1])


def double(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Float64 tensors."""
    for node in graph.live:
        if any(graph.dtypes.get(name) == TensorProto.DOUBLE for name in node.outputs):
            yield Hit(node.name)


def wide_integers_outside(graph: Graph, _: Profile) -> Iterator[Hit]:
    """INT64 inputs and outputs."""
    for name in (*graph.inputs, *graph.outputs):
        if graph.dtypes.get(name) == TensorProto.INT64:
            yield Hit(name)


def unread_type(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Types that TensorRT has no tensor of."""
    for node in graph.live:
        if node.is_a(QUANTIZE, DEQUANTIZE):  # their types have a rule of their own
            continue
        kinds = [graph.dtypes.get(name, 0) for name in (*node.inputs, *node.outputs)]
        found = next((kind for kind in kinds if kind in UNREAD_TYPES), None)
        if found is not None:
            yield Hit(node.name, TensorProto.DataType.Name(found))


RULES = (
    Rule(
        "GEN-FP16-001", "error", EVERY, "norm from separate operators in float16",
        "the square of what exceeds 255 overflows: a ViT-B fell to 19 % top-1 on a Jetson this way",
        "export LayerNormalization as one operator (opset 17), or compute the norm in float32 between Casts",
        OVERFLOW, half_norm_in_parts,
    ),
    Rule(
        "TRT-FP16-001", "advice", ("tensorrt",), "norm from separate operators",
        "its square overflows once the graph is converted to float16, and one operator has a kernel of its own",
        "export LayerNormalization as one operator (opset 17)",
        OVERFLOW, norm_in_parts, since=(8, 6),
    ),
    Rule(
        "TRT-FP16-002", "warning", ("tensorrt",), "norm on float16",
        "mean and variance of large activations lose their digits or overflow, depending on the release",
        "keep norms in float32, with a Cast before and after",
        ACCURACY, half_norm,
    ),
    Rule(
        "GEN-FP16-002", "error", EVERY, "constant beyond float16",
        f"beyond {HALF_MAX:.0f} it is infinite, and the sum or product with it infinite or no number",
        "use -1e4 in masks, or keep what reads it in float32",
        "https://onnx.ai/onnx/operators/onnx__Cast.html", beyond_half,
    ),
    Rule(
        "GEN-FP16-003", "warning", ("coreml", "openvino"), "constant beyond float16 in a float32 graph",
        f"beyond {HALF_MAX:.0f} it is infinite once it runs in float16, as CoreML and OpenVINO's GPU do by themselves",
        "use -1e4 in masks, or keep what reads it in float32",
        "https://apple.github.io/coremltools/docs-guides/source/typed-execution.html", beyond_half_later,
    ),
    Rule(
        "TRT-FP16-003", "warning", ("tensorrt",), "constant beyond float16 in a float32 graph",
        f"before TensorRT 11 a builder told --fp16 may run it in float16, where beyond {HALF_MAX:.0f} all is infinite",
        "use -1e4 in masks, or build without --fp16",
        ACCURACY, beyond_half_later, before=(11, 0),
    ),
    Rule(
        "GEN-NAN-001", "error", EVERY, "constant that is no number",
        "NaN spreads to every output",
        "check the checkpoint: the weights themselves hold NaN",
        "https://onnx.ai/onnx/intro/concepts.html", no_number,
    ),
    Rule(
        "TRT-TYPE-001", "warning", ("tensorrt",), "float64",
        "the parser casts it to float32 and cuts off what does not fit",
        "compute in float32",
        PARSER_TABLE, double,
    ),
    Rule(
        "TRT-TYPE-002", "advice", ("tensorrt",), "INT64 input or output",
        "before TensorRT 9 the engine's binding is INT32: a buffer of INT64 is read wrong",
        "use INT32, or cast at the border",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md", wide_integers_outside, before=(9, 0),
    ),
    Rule(
        "TRT-TYPE-003", "error", ("tensorrt",), "type not supported",
        "TensorRT has no tensor of this type",
        "cast to INT32, INT64 or a floating-point type",
        PARSER_TABLE, unread_type,
    ),
)  # fmt: skip
