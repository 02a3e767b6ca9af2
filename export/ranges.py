"""How large a graph's numbers get on real pictures: what float16 may hold, and what has to stay float32.

Every float tensor is measured, and what happens inside an operator before its result is rounded: a sum of products, or
the sum of a mean, is bounded by the same sum over magnitudes, in whichever order a kernel adds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from edgevit.errors import ExportError, first_line
from edgevit.inputs import load_images, photographs
from edgevit.specs import Batch, ImageSpec

LARGEST = 65504.0  # the largest finite float16
SMALLEST_NORMAL = 2.0**-14  # of float16; below it a number loses bits
# The pictures seen are four. An input of twice the contrast doubles what is linear in it and quadruples a product of
# two such tensors, so a quarter of the largest number is the room that unseen pictures get.
LIMIT = LARGEST / 4
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SUMS = ("ReduceMean", "ReduceSum")
FATAL_ONLY = 4  # ONNX Runtime's log level: failures are raised, and its own lines would repeat them
SHOWN = 8  # tensors that a report names; the count says how many there are


@dataclass(frozen=True)
class Ranges:
    """Largest magnitude of every float tensor (`tensors`, by name) and of the sums inside a node (`sums`, by node)."""

    tensors: Mapping[str, float]
    sums: Mapping[str, float]
    pictures: int

    @property
    def wide(self) -> dict[str, float]:
        """Tensors that could leave float16; a NaN is among them."""
        return {name: value for name, value in self.tensors.items() if not value <= LIMIT}

    @property
    def narrow(self) -> dict[str, float]:
        """Tensors that lie wholly where float16 loses bits; exact zeros lose none."""
        return {name: value for name, value in self.tensors.items() if 0 < value < SMALLEST_NORMAL}

    @property
    def wide_sums(self) -> dict[str, float]:
        """Nodes whose sums could leave float16 in a kernel that adds in float16."""
        return {name: value for name, value in self.sums.items() if not value <= LIMIT}

    def record(self) -> dict[str, Any]:
        """The analysis for a manifest: how much was seen, and the largest values."""
        return {
            "pictures": self.pictures,
            "limit": LIMIT,
            "tensors": len(self.tensors),
            "over_limit": len(self.wide),
            "largest": _top(self.tensors),
            "largest_sums": _top(self.sums),
        }


def _top(values: Mapping[str, float]) -> list[dict[str, Any]]:
    ordered = sorted(values.items(), key=lambda item: (np.isnan(item[1]), item[1]), reverse=True)
    return [{"name": name, "max_abs": as_json(value)} for name, value in ordered[:SHOWN]]


def as_json(value: float) -> float | str:
    """A magnitude as JSON has it, which knows no infinity."""
    return value if np.isfinite(value) else str(value)


def measure_ranges(model: ir.Model, image: ImageSpec, size: tuple[int, int], batch: Batch) -> Ranges:
    """Run a float32 graph with input `image` on the shipped photographs, one thread, no graph optimisation.

    Args:
        model: the graph, not changed. image, size: how a picture becomes its input, (height, width).
        batch: pictures that the graph takes at once; a dynamic one gets them one by one.

    Raises:
        ExportError: the graph cannot be run, or gives NaN or infinity in float32 already.
    """
    images = load_images(photographs(), image, size)  # n 3 h w
    return measure(model, images, batch)


def measure(model: ir.Model, images: NDArray[np.float32], batch: Batch) -> Ranges:
    """`measure_ranges` on pictures (n, 3, h, w) of one's own."""
    probe, tensors, sums = _probe(model)
    count = 1 if batch == "dynamic" else batch
    largest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        ir.save(probe, path, external_data="probe.data")  # beside the graph: protobuf stops at 2 GB
        session = _session(path)
        names = [value.name for value in session.get_outputs()]
        for start in range(0, len(images), count):
            chunk = np.resize(images[start : start + count], (count, *images.shape[1:]))
            try:
                found = session.run(None, {"image": chunk})
            except Exception as error:  # its exceptions share no base below Exception
                raise ExportError(f"range analysis: ONNX Runtime failed: {first_line(error)}") from error
            for name, value in zip(names, found, strict=True):
                largest[name] = float(np.maximum(largest.get(name, 0.0), value))  # NaN stays NaN
    ranges = Ranges(
        {tensor: largest[name] for tensor, name in tensors.items()},
        {node: largest[name] for node, name in sums.items()},
        len(images),
    )
    bad = next((name for name, value in ranges.tensors.items() if not np.isfinite(value)), None)
    if bad is not None:
        raise ExportError(
            f"range analysis: tensor {bad} is {ranges.tensors[bad]} in float32 already; check the weights"
        )
    return ranges


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # tensors as the graph names them
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base below Exception
        raise ExportError(f"range analysis: ONNX Runtime cannot load the graph: {first_line(error)}") from error


def _probe(model: ir.Model) -> tuple[ir.Model, dict[str, str], dict[str, str]]:
    """A copy whose outputs are maxima: the graph, tensor -> output, node -> output."""
    probe = model.clone()
    graph, tape = probe.graph, Tape()
    magnitudes: dict[str, ir.Value] = {}

    def magnitude(value: ir.Value) -> ir.Value:
        name = value.name or ""
        if name not in magnitudes:
            magnitudes[name] = tape.op("Abs", [value])
        return magnitudes[name]

    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    floats = [value for value in values if value.dtype == ir.DataType.FLOAT and value.name]
    nodes = [node for node in graph if node.op_type in (*PRODUCTS, *SUMS) and node.outputs[0] in floats]
    tensors = {
        value.name or "": _maximum(tape, magnitude(value), f"range/tensor/{i}") for i, value in enumerate(floats)
    }
    sums = {}
    for i, node in enumerate(nodes):
        operands = [None if value is None else magnitude(value) for value in _summed(node)]
        kind = "ReduceSum" if node.op_type == "ReduceMean" else node.op_type
        attributes = {key: attr for key, attr in node.attributes.items() if key not in ("alpha", "beta")}
        total = _sum_over(tape, node, operands[0]) if kind in SUMS else tape.op(kind, operands, attributes)
        sums[node.name or ""] = _maximum(tape, total, f"range/sum/{i}")
    graph.outputs.clear()
    graph.extend(tape.nodes)
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.outputs.extend([*tensors.values(), *sums.values()])
    return (
        probe,
        {tensor: value.name or "" for tensor, value in tensors.items()},
        {node: value.name or "" for node, value in sums.items()},
    )


def _summed(node: ir.Node) -> list[ir.Value | None]:
    """The operands that are summed: all of a product, the first of a reduction."""
    return list(node.inputs) if node.op_type in PRODUCTS else list(node.inputs[:1])


def _sum_over(tape: Tape, node: ir.Node, x: ir.Value | None) -> ir.Value:
    """The sum of magnitudes over a reduction's axes, which are an attribute or an input."""
    axes = node.attributes.get_ints("axes", None)
    if axes is not None:
        stored = tape.initializer(ir.tensor(np.array(axes, np.int64), name=f"range/axes/{node.name}"))
        return tape.op("ReduceSum", [x, stored])
    return tape.op("ReduceSum", [x, *node.inputs[1:]])


def _maximum(tape: Tape, magnitude: ir.Value, name: str) -> ir.Value:
    """The largest element; NaN where there is one, which ReduceMax passes over and a sum does not."""
    scalar = {"keepdims": 0}
    largest, total = tape.op("ReduceMax", [magnitude], scalar), tape.op("ReduceSum", [magnitude], scalar)
    result = tape.op("Where", [tape.op("IsNaN", [total]), total, largest])
    result.name, result.shape, result.type = name, ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
    return result
