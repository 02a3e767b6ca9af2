"""A strongly typed ONNX graph computed in the types that it names, on any processor.

ONNX Runtime's CPU kernels compute float16 graphs in float32 and drop the rounding between operators: 700 * 700 stays
490,000, which float16 does not hold. What a GPU would make of the graph is therefore not seen by running it there. Here
every float16 tensor is rounded to float16 after the operator that makes it, sums inside an operator being kept in
float32, as tensor cores do; what overflows becomes infinite, and the tensor where that begins is named. Products of
int8 operands are computed in whole numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure, first_line
from edgevit.specs import NoOptions, OperatorTime

from .int8_products import Share, share, with_integer_products
from .ort import OrtRuntime

PRECISIONS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MAKERS = ("Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform")  # they name their own type
MAX_BYTES = 2**31 - 1  # of a serialised graph; protobuf's limit


class TypedOrtRuntime(OrtRuntime):
    """Runs `path` with every float16 tensor rounded, `threads` threads inside an operator (None: all cores)."""

    name = "typed_ort"

    def __init__(
        self, path: Path, threads: int | None = None, precision: str = "fp32", options: NoOptions | None = None
    ) -> None:
        super().__init__(path, threads, precision, options)
        self._graph: onnx.ModelProto | None = None
        self._int8 = Share(0, 0, 0.0)

    def load(self) -> None:
        """Read the graph, put the rounding into it, and create the session."""
        try:
            model = onnx.load(self.path)
            if model.ByteSize() > MAX_BYTES:
                raise RuntimeFailure(f"{self.path}: larger than 2 GB, which cannot be checked; export a smaller model")
            model = shape_inference.infer_shapes(model)
        except RuntimeFailure:
            raise
        except Exception as error:  # onnx raises protobuf's, its own and the file system's
            raise RuntimeFailure(f"{self.path}: not a readable ONNX model: {first_line(error)}") from error
        self._int8 = share(model)
        self._precision = "int8" if self._int8.products else _products_precision(model)
        self._graph = rounded(model, str(self.path))
        self._session = self._create(self._graph)

    @property
    def effective_precision(self) -> str:
        """int8 where products have int8 operands, of which `describe` tells the share; else the type of most products.

        Nodes kept in another type are the exporter's affair.
        """
        return self._precision

    def describe(self) -> dict[str, Any]:
        """Version, provider and threads, what is emulated, and how much is int8."""
        if not self._int8.products:
            return {**super().describe(), "runtime": "onnxruntime, float16 emulated"}
        return {
            **super().describe(),
            "runtime": "onnxruntime, int8 and float16 emulated",
            "int8_products": self._int8.products,
            "products": self._int8.of,
            "int8_macs_share": self._int8.macs_share,
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name.

        Raises:
            RuntimeFailure: the runtime failed, or a tensor left float16, which is named.
        """
        outputs = super().run(inputs)
        if all(np.isfinite(array).all() for array in outputs.values()):
            return outputs
        raise RuntimeFailure(f"{self.path}: {self._first_problem(inputs)}")

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:  # noqa: ARG002  # the contract's signature
        """Nothing: the times of an emulation say nothing about a device."""
        raise RuntimeFailure(f"{self.path}: an emulation has no profile; take the runtime ort, or trt on a GPU")

    def close(self) -> None:
        """Drop the session."""
        super().close()
        self._graph = None

    def _create(self, graph: onnx.ModelProto) -> ort.InferenceSession:
        options = self._options()
        nodes = graph.graph.node  # optimisers may remove pairs of Casts, fold scales into weights, and fuse Q/DQ
        if any(node.name.endswith("//up") or node.op_type == "QuantizeLinear" for node in nodes):
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._start(options, graph.SerializeToString())

    def _first_problem(self, inputs: Arrays) -> str:
        """The first tensor, in the graph's order, that is not finite: one more run that looks at all of them."""
        if self._graph is None or not all(np.isfinite(array).all() for array in inputs.values()):
            return "the input is not finite, expected numbers; check the pictures"
        probe, tensors = _probe(self._graph)
        sums = self._infer(self._create(probe), inputs) if tensors else []
        for (tensor, node), total in zip(tensors, sums, strict=True):
            if not np.isfinite(total):
                return f"tensor {tensor} of {node} is beyond float16 on this input; export it with precision fp32"
        return "an output is not finite, and no float16 tensor is the cause; check the weights"


def rounded(model: onnx.ModelProto, where: str = "model") -> onnx.ModelProto:
    """A float32 graph that rounds where `model`, whose types are inferred, has float16 tensors or int8 products.

    Raises:
        RuntimeFailure: float16 inputs or outputs, a node that holds a graph, or makes float16 from nothing.
    """
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    if TensorProto.FLOAT16 in {types[v.name] for v in (*graph.input, *graph.output)}:
        raise RuntimeFailure(f"{where}: inputs or outputs in float16, expected float32; export it with edgevit")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    with_integer_products(made, types)
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = [part for node in made.graph.node for part in _rounded_node(node, types, where)]
    for repeated in (made.graph.node, made.graph.value_info):
        del repeated[:]
    made.graph.node.extend(nodes)
    return made


def _rounded_node(node: onnx.NodeProto, types: dict[str, int], where: str) -> Iterator[onnx.NodeProto]:
    """The node in float32, then a pair of Casts for each of its float16 outputs."""
    kind = f"{where}: node {node.name} ({node.op_type})"
    if any(attr.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attr in node.attribute):
        raise RuntimeFailure(f"{kind} holds a graph, which cannot be emulated; export it with edgevit")
    missing = next((name for name in node.output if name and name not in types), None)
    if missing is not None:
        raise RuntimeFailure(f"{kind}: the type of {missing} cannot be inferred; export it with edgevit")
    half = [index for index, name in enumerate(node.output) if types.get(name) == TensorProto.FLOAT16]
    if half and node.op_type in MAKERS:
        raise RuntimeFailure(f"{kind} makes float16 by itself, expected an initializer; export it with edgevit")
    if node.op_type == "Cast":
        for attr in (attr for attr in node.attribute if attr.name == "to" and attr.i == TensorProto.FLOAT16):
            attr.i = TensorProto.FLOAT
    names = [node.output[index] for index in half]
    for index in half:
        node.output[index] += "//exact"
    yield node
    for name in names:
        yield helper.make_node("Cast", [f"{name}//exact"], [f"{name}//half"], f"{name}//down", to=TensorProto.FLOAT16)
        yield helper.make_node("Cast", [f"{name}//half"], [name], f"{name}//up", to=TensorProto.FLOAT)


def _probe(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """The rounded graph with the sum of each rounded tensor's magnitudes as outputs; (tensor, node that makes it)."""
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    makers = {name: f"node {node.name} ({node.op_type})" for node in graph.graph.node for name in node.output}
    tensors = [node.output[0] for node in graph.graph.node if node.name.endswith("//up")]
    del probe.graph.output[:]
    for tensor in tensors:
        probe.graph.node.append(helper.make_node("Abs", [tensor], [f"{tensor}//abs"]))
        probe.graph.node.append(helper.make_node("ReduceSum", [f"{tensor}//abs"], [f"{tensor}//sum"], keepdims=0))
        probe.graph.output.append(helper.make_tensor_value_info(f"{tensor}//sum", TensorProto.FLOAT, []))
    return probe, [(tensor, makers[f"{tensor}//exact"]) for tensor in tensors]


def _products_precision(model: onnx.ModelProto) -> str:
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    kinds = Counter(types.get(node.input[0], 0) for node in graph.node if node.op_type in PRODUCTS)
    most = max(kinds, key=lambda kind: kinds[kind], default=TensorProto.FLOAT)
    return PRECISIONS.get(most, str(TensorProto.DataType.Name(most)).lower())
