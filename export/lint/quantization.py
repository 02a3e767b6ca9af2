"""Rules on Q/DQ pairs: what TensorRT turns into INT8 arithmetic, and what it refuses or reads as something else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from .graph import DEQUANTIZE, QUANTIZE, Graph, Node
from .rules import EVERY, Hit, Profile, Rule

PARSER_TABLE = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
EXPLICIT = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html"
QUANTIZE_LAYER = "https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/Quantize.html"
DEQUANTIZE_OP = "https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html"
QUANTIZE_OP = "https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html"
INT8_BYTES = {TensorProto.INT8, TensorProto.UINT8}
# Quantized types that a release reads beside INT8.
LATER_TYPES = (
    (TensorProto.FLOAT8E4M3FN, (9, 0)),
    (TensorProto.INT4, (10, 0)),
    (TensorProto.FLOAT4E2M1, (10, 8)),
)
PASSES_ON = {  # values stay what they are
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MAX_INT8_SEQUENCE = 512  # tokens up to which TensorRT has a fused INT8 attention
MIN_CHANNELS = 16  # below it an INT8 product costs more in conversions than it gains


def _pairs(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if node.is_a(QUANTIZE, DEQUANTIZE))


def _type(graph: Graph, node: Node) -> int:
    """The quantized type of a QuantizeLinear or DequantizeLinear; 0 where nothing says it."""
    if node.op == DEQUANTIZE and (kind := graph.dtypes.get(node.input(0), 0)):
        return kind
    if node.input(2):
        return graph.dtypes.get(node.input(2), 0)
    return node.integer("output_dtype", 0)


def _type_name(kind: int) -> str:
    return TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else f"type {kind}"


def shifted(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Zero points that are not zero, or not constants."""
    for node in _pairs(graph):
        zero = graph.value(node.input(2)) if node.input(2) else None
        if zero is not None and zero.size and zero.astype(np.float32).any():
            yield Hit(node.name)
        elif node.input(2) and not graph.is_constant(node.input(2)):
            yield Hit(node.name, "computed")


def other_type(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Quantized types that a release does not read; INT32 has a rule of its own."""
    read = {0, TensorProto.INT8, TensorProto.INT32, *(kind for kind, since in LATER_TYPES if profile.version >= since)}
    for node in _pairs(graph):
        kind = _type(graph, node)
        if kind not in read:
            yield Hit(node.name, _type_name(kind))


def integer_bias(graph: Graph, _: Profile) -> Iterator[Hit]:
    """DequantizeLinear of INT32."""
    for node in graph.nodes:
        if node.is_a(DEQUANTIZE) and _type(graph, node) == TensorProto.INT32:
            yield Hit(node.name)


def never_dequantized(graph: Graph, _: Profile) -> Iterator[Hit]:
    """A QuantizeLinear from which some way leads to no DequantizeLinear."""
    for node in graph.nodes:
        if node.is_a(QUANTIZE) and not _all_dequantized(graph, node.output):
            yield Hit(node.name)


def _all_dequantized(graph: Graph, name: str) -> bool:
    seen, open_ends = set[str](), [name]
    while open_ends:
        current = open_ends.pop()
        if current in seen:
            continue
        seen.add(current)
        readers = graph.readers.get(current, ())
        if current in graph.outputs or not readers:
            return False
        for reader in readers:
            if reader.is_a(*PASSES_ON):
                open_ends += [output for output in reader.outputs if output]
            elif not reader.is_a(DEQUANTIZE):
                return False
    return True


def stored_and_read_raw(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Stored INT8 tensors that something else than a DequantizeLinear reads, and single numbers."""
    for name in graph.tensors:
        if graph.dtypes.get(name) not in INT8_BYTES:
            continue
        for node in graph.readers.get(name, ()):
            if node.is_a(QUANTIZE, DEQUANTIZE) and name == node.input(2):  # a zero point
                continue
            if node.is_a(DEQUANTIZE) and graph.rank(name) == 0:
                yield Hit(node.name, "a single number, which the builder takes out of its pair")
            elif not node.is_a(DEQUANTIZE, *PASSES_ON):
                yield Hit(node.name, f"{node.op} reads it")


def many_activation_scales(graph: Graph, _: Profile) -> Iterator[Hit]:
    """More than one scale for a tensor that is computed from the picture."""
    for node in _pairs(graph):
        shape = graph.shapes.get(node.input(1), ())
        if not graph.weights(node.input(0))[0] and any(size != 1 for size in shape):
            yield Hit(node.name)


def wrong_axis(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Scales of weights along another axis than that of the outputs."""
    for node in graph.named(*WEIGHTED):
        dequantize = graph.producer(node.input(1))
        if dequantize is None or not dequantize.is_a(DEQUANTIZE) or dequantize.integer("block_size", 0):
            continue
        rank = graph.rank(dequantize.input(0))
        scales = graph.shapes.get(dequantize.input(1), ())
        if rank is None or len(scales) != 1 or scales[0] == 1:
            continue
        outputs = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}.get(
            node.op, 0 if node.integer("transB", 0) else 1
        )
        axis = dequantize.integer("axis", 1)
        if (axis + rank if axis < 0 else axis) != outputs:
            yield Hit(dequantize.name, f"axis {axis} of a {node.op}'s weights, its outputs are axis {outputs}")


def casts_around(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Casts from the float32 that scales had before opset 19 to float16, between a DQ and what it feeds.

    One in front of a Q parts nothing that is fused: TensorRT for RTX 1.7 makes the same INT8 layers with and without.
    """
    if graph.opset >= 19:
        return
    for node in _pairs(graph):
        after = graph.readers.get(node.output, ()) if node.op == DEQUANTIZE else ()
        if any(cast.is_a("Cast") and cast.integer("to", 0) == TensorProto.FLOAT16 for cast in after):
            yield Hit(node.name)


def computed_scale(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Scales that depend on the picture."""
    for node in _pairs(graph):
        if node.input(1) and not graph.is_constant(node.input(1)):
            yield Hit(node.name)


def impossible_scale(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Scales that are zero, negative, infinite or no number."""
    for node in _pairs(graph):
        low, high = graph.extremes(node.input(1))
        stored = graph.value(node.input(1)) is not None and graph.dtypes.get(node.input(1)) in (
            TensorProto.FLOAT,
            TensorProto.FLOAT16,
        )
        if stored and not (low > 0 and high < np.inf):
            yield Hit(node.name)


def untyped(graph: Graph, _: Profile) -> Iterator[Hit]:
    """QuantizeLinear without a zero point, which names the type."""
    for node in graph.nodes:
        if node.is_a(QUANTIZE) and not node.input(2) and not node.integer("output_dtype", 0):
            yield Hit(node.name)


def float_residual(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Additions of a quantized product and a tensor that is not quantized."""
    for node in graph.named("Add"):
        sides = [graph.producer(name) for name in node.inputs[:2]]
        if len(sides) < 2 or any(graph.is_constant(name) for name in node.inputs[:2]):
            continue
        product = [side is not None and _is_quantized_product(graph, side) for side in sides]
        if any(product) and not all(side is not None and side.is_a(DEQUANTIZE) for side in sides):
            other = sides[1 - product.index(True)]
            if other is None or not other.is_a(DEQUANTIZE):
                yield Hit(node.name)


def _is_quantized_product(graph: Graph, node: Node) -> bool:
    ends = [graph.producer(name) for name in node.inputs[:2]]
    return node.is_a(*WEIGHTED) and len(ends) == 2 and all(end is not None and end.is_a(DEQUANTIZE) for end in ends)


def long_integer_attention(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Quantized attention over more tokens than there is an INT8 kernel for."""
    for node in graph.named("MatMul"):
        if not _is_quantized_product(graph, node) or any(graph.weights(name)[0] for name in node.inputs[:2]):
            continue
        sizes = [graph.size(node.output, axis) for axis in (-2, -1)]
        longest = max((size for size in sizes if size is not None), default=0)
        if longest > MAX_INT8_SEQUENCE and any(
            reader.is_a("Softmax", "Add") for reader in graph.readers.get(node.output, ())
        ):
            yield Hit(node.name, f"{longest} tokens")


def too_small(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Quantized products with a single row, or with few channels."""
    for node in graph.named(*WEIGHTED):
        if not _is_quantized_product(graph, node):
            continue
        shape = graph.shapes.get(node.input(1), ())
        sizes = [size for size in (shape[:2] if node.op.startswith("Conv") else shape[-2:]) if isinstance(size, int)]
        rows = graph.size(node.output, -2) if node.op in ("MatMul", "Gemm") else None
        grouped = node.integer("group", 1) > 1
        if rows == 1 or (sizes and min(sizes) < MIN_CHANNELS and not grouped and 3 not in sizes):
            yield Hit(node.name, "one row" if rows == 1 else f"{min(sizes)} channels")


def float_half(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Q/DQ pairs in a graph whose other tensors are all float32."""
    if graph.quantized and not graph.half:
        yield Hit("graph")


RULES = (
    Rule(
        "TRT-QDQ-001", "error", ("tensorrt",), "zero point is not zero",
        "TensorRT quantizes symmetrically, its parser refuses any other zero point",
        "calibrate with symmetric activations and weights",
        EXPLICIT, shifted,
    ),
    Rule(
        "TRT-QDQ-002", "error", ("tensorrt",), "quantized type not supported",
        "every release reads INT8; UINT8 is refused, or with zero points of 0 taken for INT8, which cuts off above 127",
        "quantize to INT8, weights and activations",
        PARSER_TABLE, other_type,
    ),
    Rule(
        "TRT-QDQ-003", "error", ("tensorrt",), "INT32 bias with DequantizeLinear",
        "TensorRT dequantizes no INT32, it keeps biases in floating point",
        "leave biases unquantized (QuantizeBias=False in onnxruntime's extra_options)",
        PARSER_TABLE, integer_bias,
    ),
    Rule(
        "TRT-QDQ-004", "warning", ("tensorrt",), "Q without DQ",
        "only a Q/DQ pair becomes INT8 arithmetic; what reads the integers themselves is refused by some releases",
        "put a DequantizeLinear behind each QuantizeLinear",
        EXPLICIT, never_dequantized,
    ),
    Rule(
        "TRT-QDQ-005", "error", ("tensorrt",), "quantized constant without DQ",
        "no engine can be built from an INT8 constant that is not dequantized at once",
        "put a DequantizeLinear behind it, or store it in floating point",
        EXPLICIT, stored_and_read_raw,
    ),
    Rule(
        "TRT-QDQ-006", "warning", ("tensorrt",), "activation with a scale per channel",
        "no INT8 kernel takes it: the product stays in floating point, with the conversions on top",
        "calibrate activations per tensor, weights per channel",
        EXPLICIT, many_activation_scales,
    ),
    Rule(
        "TRT-QDQ-007", "warning", ("tensorrt",), "scales of weights along the wrong axis",
        "INT8 kernels take one scale for each output, any other axis keeps the product in floating point",
        "quantize weights per output: axis 0 of a Conv, the last axis of a MatMul",
        EXPLICIT, wrong_axis,
    ),
    Rule(
        "TRT-QDQ-008", "warning", ("tensorrt",), "Cast behind DQ",
        "before opset 19 scales are float32; a Cast to float16 between a DequantizeLinear and a product hinders fusion",
        "use opset 19 or newer with float16 scales, or cast behind the product",
        QUANTIZE_OP, casts_around,
    ),
    Rule(
        "TRT-QDQ-009", "error", ("tensorrt",), "scale is computed",
        "before TensorRT 11 a scale must be a constant when the engine is built",
        "calibrate beforehand and store the scale",
        QUANTIZE_LAYER, computed_scale, before=(11, 0),
    ),
    Rule(
        "GEN-QDQ-001", "error", EVERY, "impossible scale",
        "a scale must be positive and finite",
        "calibrate again; a layer whose values are all zero needs a small positive scale",
        DEQUANTIZE_OP, impossible_scale,
    ),
    Rule(
        "TRT-QDQ-010", "warning", ("tensorrt",), "Q without a zero point",
        "ONNX then means UINT8 and TensorRT reads INT8: values above 127 steps are cut off there",
        "give a zero point of type INT8 with value 0",
        QUANTIZE_OP, untyped,
    ),
    Rule(
        "TRT-QDQ-011", "advice", ("tensorrt",), "residual input not quantized",
        "the sum and the product before it run in floating point; quantizing it made NVIDIA's sample 1.6 times faster",
        "put a Q/DQ pair on the other input of the Add",
        "https://github.com/NVIDIA/TensorRT/tree/main/tools/experimental/trt-engine-explorer", float_residual,
    ),
    Rule(
        "TRT-QDQ-012", "advice", ("tensorrt",), "quantized attention over many tokens",
        f"INT8 attention is fused up to {MAX_INT8_SEQUENCE} tokens only",
        "leave the two products of this attention in float16",
        "https://github.com/NVIDIA/TensorRT/issues/3724", long_integer_attention,
    ),
    Rule(
        "TRT-QDQ-013", "advice", ("tensorrt",), "quantized product too small",
        "the conversions cost more than INT8 gains",
        "leave it in float16",
        "https://github.com/NVIDIA/Model-Optimizer", too_small,
    ),
    Rule(
        "TRT-QDQ-014", "advice", ("tensorrt",), "Q/DQ in a float32 graph",
        "types are taken as they stand: all that is not quantized runs in float32",
        "convert the rest to float16 before Q/DQ pairs are inserted",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Builder.html",
        float_half, since=(11, 0),
    ),
)  # fmt: skip
