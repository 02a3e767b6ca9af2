"""Rules on products: attention that is not fused, channels that do not fill a Tensor Core, products of one row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import TensorProto

from .graph import DEQUANTIZE, QUANTIZE, Graph, Node
from .rules import Hit, Profile, Rule

FUSED_RANK = 4  # batch, heads, tokens, width of a head
LONGEST_PATH = 10  # nodes between the scores and their softmax; the longest of any known export has seven
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Concat")
SCALES = ("Mul", "Div")
STEPS = {"Add", "Sub", "Where", "Cast", "Identity", "Dropout", QUANTIZE, DEQUANTIZE, "Max", "Clip", *MOVES, *SCALES}
HALF_ALIGNMENT, INT8_ALIGNMENT = 8, 16  # channels: 16 bytes, which a Tensor Core loads at once
PICTURE_CHANNELS = 4  # up to here it is the first layer, which no network can widen
FUSION = "https://github.com/NVIDIA/TensorRT/issues/3280"
PRODUCTS = "https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html"


@dataclass(frozen=True)
class Chain:
    """An attention in separate operators: product, what happens to the scores, softmax, what follows, product."""

    scores: Node
    before: tuple[Node, ...]
    softmax: Node
    after: tuple[Node, ...]
    product: Node


def chains(graph: Graph) -> Iterator[Chain]:
    """Every attention that ends in a product of two tensors that are computed from the picture."""
    for softmax in graph.named("Softmax"):
        backward = _path(graph, softmax.input(0))
        forward = _ahead(graph, softmax.output)
        if backward is not None and forward is not None:
            yield Chain(backward[-1], tuple(backward[:-1]), softmax, tuple(forward[:-1]), forward[-1])


def _path(graph: Graph, name: str) -> list[Node] | None:
    """From the softmax back to the product of queries and keys: the shortest way over what leaves scores scores."""
    ways: list[tuple[str, list[Node]]] = [(name, [])]
    seen = set[str]()
    while ways:
        current, way = ways.pop(0)
        node = graph.producer(current)
        if node is None or node.folded or current in seen or len(way) > LONGEST_PATH:
            continue
        seen.add(current)
        if _is_product(graph, node):
            return [*way, node]
        if node.is_a(*STEPS):
            ways += [(source, [*way, node]) for source in node.inputs if source]
    return None


def _ahead(graph: Graph, name: str) -> list[Node] | None:
    """From the softmax on to the product with the values."""
    ways: list[tuple[str, list[Node]]] = [(name, [])]
    seen = set[str]()
    while ways:
        current, way = ways.pop(0)
        if current in seen or len(way) > LONGEST_PATH:
            continue
        seen.add(current)
        for node in graph.readers.get(current, ()):
            if _is_product(graph, node):
                return [*way, node]
            if node.is_a(*STEPS):
                ways.append((node.output, [*way, node]))
    return None


def _is_product(graph: Graph, node: Node) -> bool:
    return node.is_a("MatMul") and len(node.inputs) == 2 and not any(graph.weights(name)[0] for name in node.inputs)


def _hindrances(graph: Graph, chain: Chain) -> Iterator[str]:
    """What keeps a chain from the form that is fused."""
    if any(node.is_a(*SCALES) for node in chain.before):
        yield "the scores are scaled"
    if any(node.is_a(*MOVES) for node in chain.before):
        yield "the scores are reshaped or transposed"
    if sum(node.is_a("Add", "Sub") for node in chain.before) > 1:
        yield "the scores are added to more than once"
    if any(node.is_a("Add", "Sub", "Where", *MOVES, *SCALES) for node in chain.after):
        yield "the weights are changed after the softmax"
    readers = graph.readers.get(chain.softmax.output, ())
    if len(readers) > 1:
        yield "the softmax is read more than once"
    rank = graph.rank(chain.softmax.input(0))
    if rank is not None and rank != FUSED_RANK:
        yield f"rank {rank}, not {FUSED_RANK}"
    if rank is not None and chain.softmax.integer("axis", -1) not in (-1, rank - 1):
        yield "the softmax is not over the last axis"


def never_fused(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Any attention."""
    return (Hit(chain.softmax.name) for chain in chains(graph))


def not_fused(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Attention in a form that is not fused."""
    for chain in chains(graph):
        reasons = list(_hindrances(graph, chain))
        if reasons:
            yield Hit(chain.softmax.name, ", ".join(reasons))


def wide_attention(graph: Graph, _: Profile) -> Iterator[Hit]:
    """The operator Attention on float32."""
    for node in graph.named("Attention"):
        if graph.dtypes.get(node.input(0)) == TensorProto.FLOAT:
            yield Hit(node.name)


def misaligned(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Products with stored weights whose channels are no multiple of what a Tensor Core takes."""
    for node in graph.named("Conv", "Gemm", "MatMul"):
        source, quantized = graph.weights(node.input(1))
        shape = graph.shapes.get(source, ()) if source else ()
        if node.integer("group", 1) > 1 or len(shape) < 2 or not all(isinstance(size, int) for size in shape):
            continue
        sizes = [int(size) for size in (shape[:2] if node.op == "Conv" else shape[-2:])]
        multiple = INT8_ALIGNMENT if quantized else HALF_ALIGNMENT
        if (node.op == "Conv" and sizes[1] <= PICTURE_CHANNELS) or not any(size % multiple for size in sizes):
            continue
        yield Hit(
            node.name,
            f"{node.op} with {' and '.join(str(s) for s in sizes if s % multiple)}, no multiple of {multiple}",
        )


def single_row(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Products of one row with stored weights, but for the network's last one; a dynamic batch counts as one."""
    batches = {graph.shapes[name][0] for name in graph.inputs if graph.shapes.get(name)}
    for node in graph.named("Gemm", "MatMul"):
        shape = graph.shapes.get(node.output, ())
        rows = [1 if isinstance(size, str) and size in batches else size for size in shape[:-1]]
        stored = graph.weights(node.input(1))[0]
        if stored and shape and all(size == 1 for size in rows) and node.output not in graph.outputs:
            yield Hit(node.name)


RULES = (
    Rule(
        "TRT-ATT-001", "advice", ("tensorrt",), "attention in separate kernels",
        "releases before 8.6 have no fused attention for ONNX graphs",
        "use TensorRT 8.6 or newer where the device has it",
        FUSION, never_fused, before=(8, 6),
    ),
    Rule(
        "TRT-ATT-002", "advice", ("tensorrt",), "attention in a form that is not fused",
        "fused attention is found as MatMul, at most one addition, Softmax, MatMul on (batch, heads, tokens, width)",
        "scale the queries before the product, merge bias and mask into one constant, keep transposes outside",
        FUSION, not_fused, since=(8, 6),
    ),
    Rule(
        "TRT-ATT-003", "warning", ("tensorrt",), "operator Attention on float32",
        "its kernels take float16 and bfloat16: TensorRT for RTX 1.7 built no engine of Swin-T or DeiT from it",
        "convert to float16, or export attention as MatMul, Softmax, MatMul (`edgevit export --to tensorrt`)",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-with-transformers.html",
        wide_attention, since=(10, 14),
    ),
    Rule(
        "TRT-GEMM-001", "advice", ("tensorrt",), "channels do not fill a Tensor Core",
        "the product is padded, or runs without Tensor Cores",
        "choose a width that is a multiple of 8 (float16) or 16 (INT8), where the network can still be changed",
        PRODUCTS, misaligned,
    ),
    Rule(
        "TRT-GEMM-002", "advice", ("tensorrt",), "product of one row",
        "it reads all its weights for one row: memory limits it, and neither Tensor Cores nor INT8 arithmetic help",
        "merge products that share their input, or run a larger batch",
        PRODUCTS, single_row,
    ),
)  # fmt: skip
