"""Rules on shapes: ranks, dynamic dimensions, shape arithmetic left in the graph, and the graph's own order."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from onnx import TensorProto

from .graph import SHAPE_READERS, Graph, Node
from .rules import EVERY, Hit, Profile, Rule

MAX_RANK = {"tensorrt": 8, "coreml": 5}  # dimensions of a tensor
SPATIAL = (2, 3)  # axes of height and width of a picture n c h w
DATA_DEPENDENT = ("NonZero", "Unique", "Compress")  # their output is as long as the values make it
SHAPE_MAKERS = (*SHAPE_READERS, "Range")
DYNAMIC_SHAPES = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html"
FLEXIBLE = "https://apple.github.io/coremltools/docs-guides/source/flexible-inputs.html"
OPENVINO_SHAPES = (
    "https://docs.openvino.ai/2025/openvino-workflow/running-inference/model-input-output/dynamic-shapes.html"
)
RESHAPE = "https://onnx.ai/onnx/operators/onnx__Reshape.html"
ONNX_IR = "https://github.com/onnx/onnx/blob/main/docs/IR.md"


def too_many_dimensions(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Tensors of a higher rank than a target has."""
    limit = MAX_RANK[profile.target]
    for node in graph.live:
        ranks = [graph.rank(name) or 0 for name in (*node.inputs, *node.outputs)]
        if ranks and max(ranks) > limit:
            yield Hit(node.name, f"rank {max(ranks)}, at most {limit}")


def _inputs(graph: Graph, axes: tuple[int, ...] | None) -> Iterator[Hit]:
    """Inputs with a dynamic dimension: on these axes, or on any other."""
    for name in graph.inputs:
        dynamic = [axis for axis, size in enumerate(graph.shapes.get(name, ())) if isinstance(size, str)]
        chosen = [axis for axis in dynamic if axes is None or axis in axes]
        if chosen:
            yield Hit(name, "dynamic " + ", ".join(_axis_name(axis) for axis in chosen))


def _axis_name(axis: int) -> str:
    return {0: "batch", 2: "height", 3: "width"}.get(axis, f"axis {axis}")


def dynamic_inputs(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Any dynamic dimension."""
    return _inputs(graph, None)


def dynamic_pictures(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Dynamic height or width."""
    return _inputs(graph, SPATIAL)


def fixed_batch(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Reshapes of a tensor of any length to a shape of one length."""
    for node in graph.named("Reshape"):
        target = graph.value(node.input(1))
        source = graph.shapes.get(node.input(0), (1,))
        if target is not None and target.size and any(isinstance(size, str) for size in source) and (target > 0).all():
            yield Hit(node.name, f"to {'x'.join(map(str, target.flatten()[:10]))}")


def merged_batch(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Reshapes that put all pictures of a batch into one."""
    for node in graph.named("Reshape"):
        target, source = graph.value(node.input(1)), graph.shapes.get(node.input(0), ())
        batched = bool(source) and isinstance(source[0], str) and len(source) > 1
        if target is not None and batched and target.size > 1 and target.flat[0] == 1 and (target == -1).any():
            yield Hit(node.name, f"to {'x'.join(map(str, target.flatten()[:10]))}")


def data_dependent(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Tensors whose length depends on the picture."""
    for node in graph.named(*DATA_DEPENDENT):
        yield Hit(node.name, node.op)


def shape_arithmetic(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Shapes computed although they are fixed."""
    if not graph.dynamic:
        for node in graph.nodes:
            if node.is_a(*SHAPE_MAKERS):
                yield Hit(node.name, node.op)


def index_arithmetic(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Mod of integers: the indices of windows and rolls."""
    for node in graph.nodes:
        whole = graph.dtypes.get(node.output) in (TensorProto.INT64, TensorProto.INT32)
        if node.is_a("Mod") and whole:
            yield Hit(node.name)


def _waits_for(graph: Graph, node: Node) -> list[Node]:
    """The nodes of the same graph that make what a node reads; branches may use the names of other graphs again."""
    makers = [graph.producers[name] for name in node.inputs if name in graph.producers]
    return [maker for maker in makers if maker.scope == node.scope]


def undefined(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Tensors that nothing makes, tensors made twice, and circles."""
    made = dict[tuple[int, str], int]()
    for node in graph.nodes:
        if any(name and name not in graph.given and name not in graph.producers for name in node.inputs):
            yield Hit(node.name, "an input that nothing makes")
        if any(made.setdefault((node.scope, name), node.order) != node.order for name in node.outputs if name):
            yield Hit(node.name, "an output that another node makes too")
    if any(name not in graph.given and name not in graph.producers for name in graph.outputs):
        yield Hit("outputs", "an output that nothing makes")
    try:
        TopologicalSorter({n.order: [maker.order for maker in _waits_for(graph, n)] for n in graph.nodes}).prepare()
    except CycleError as error:
        yield Hit(graph.nodes[error.args[1][0]].name, "a circle of nodes that wait for each other")


def out_of_order(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Nodes that stand before what they read."""
    for node in graph.nodes:
        if any(maker.order > node.order for maker in _waits_for(graph, node)):
            yield Hit(node.name)


def external(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Weights in another file."""
    count = sum(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.tensors.values())
    if count:
        yield Hit("weights", f"{count} tensors lie in another file")


RULES = (
    Rule(
        "TRT-RANK-001", "error", ("tensorrt",), "too many dimensions",
        "TensorRT refuses tensors of a higher rank",
        "merge dimensions before the operator",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/c-api/classnvinfer1_1_1_dims64.html",
        too_many_dimensions,
    ),
    Rule(
        "CML-RANK-001", "error", ("coreml",), "too many dimensions",
        "CoreML refuses tensors of a higher rank; this graph stands for the network that it is built from",
        "merge dimensions before the operator, as edgevit's window partition does",
        "https://github.com/apple/coremltools/issues/1723", too_many_dimensions,
    ),
    Rule(
        "TRT-DYN-001", "advice", ("tensorrt",), "dynamic shape",
        "an engine is tuned for the optimum of a profile that must be given when it is built, other shapes are slower",
        "give --minShapes, --optShapes and --maxShapes to trtexec, or export with a fixed batch and size",
        DYNAMIC_SHAPES, dynamic_inputs,
    ),
    Rule(
        "TRT-DYN-002", "warning", ("tensorrt",), "dynamic height or width",
        "masks, biases and windows that were computed for one size do not follow; kernels are chosen for one size",
        "export each size on its own (--image-size 224x224,256x256)",
        DYNAMIC_SHAPES, dynamic_pictures,
    ),
    Rule(
        "CML-DYN-001", "warning", ("coreml",), "dynamic shape",
        "the Neural Engine runs fixed shapes, or a list of them; a range of shapes runs elsewhere",
        "export with a fixed batch and size",
        FLEXIBLE, dynamic_inputs,
    ),
    Rule(
        "OV-DYN-001", "advice", ("openvino",), "dynamic height or width",
        "kernels are prepared anew for each new size, and the NPU takes fixed shapes only",
        "export each size on its own, or reshape the model before it is compiled",
        OPENVINO_SHAPES, dynamic_pictures,
    ),
    Rule(
        "GEN-BATCH-001", "error", EVERY, "Reshape to one batch size in a graph for any",
        "the length of what comes in varies and what goes out is fixed: all batch sizes but one fail",
        "export with a fixed batch, or put -1 in the place of the batch",
        RESHAPE, fixed_batch,
    ),
    Rule(
        "GEN-BATCH-002", "warning", EVERY, "Reshape puts all pictures of a batch into one",
        "the batch is dynamic but the result has one entry for all of it",
        "put -1 or 0 in the place of the batch, if pictures are to stay apart",
        RESHAPE, merged_batch,
    ),
    Rule(
        "GEN-SHAPE-001", "warning", EVERY, "shape depends on values",
        "how long the result is comes out only when it runs: no memory plan, no fusion, refused on some devices",
        "use a mask or a constant index instead",
        DYNAMIC_SHAPES, data_dependent,
    ),
    Rule(
        "GEN-SHAPE-002", "advice", EVERY, "shape arithmetic in a graph of fixed shapes",
        "constants are computed by nodes, which some compilers keep",
        "fold constants, or export from the captured program with fixed shapes",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/faq.md", shape_arithmetic,
    ),
    Rule(
        "GEN-SHAPE-003", "advice", EVERY, "index arithmetic with Mod",
        "indices of windows or rolls are computed in the graph; older TensorRT releases have no Mod",
        "fold the indices, or roll with Slice and Concat",
        "https://github.com/open-mmlab/mmdeploy/issues/2516", index_arithmetic,
    ),
    Rule(
        "GEN-GRAPH-001", "error", EVERY, "broken graph",
        "no runtime can order the nodes",
        "export the model again; check the file with onnx.checker",
        ONNX_IR, undefined,
    ),
    Rule(
        "GEN-GRAPH-002", "warning", EVERY, "nodes out of order",
        "ONNX wants each node after what it reads; some runtimes sort, others refuse",
        "sort the nodes (onnx_ir's TopologicalSortPass) and save again",
        ONNX_IR, out_of_order,
    ),
    Rule(
        "GEN-EXT-001", "advice", EVERY, "weights in another file",
        "the graph is useless without that file, and rules on values did not look at these tensors",
        "keep the files together; store the weights inside to have their values checked",
        "https://github.com/onnx/onnx/blob/main/docs/ExternalData.md", external,
    ),
)  # fmt: skip
