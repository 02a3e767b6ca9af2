"""INT8 for ONNX Runtime's CPU kernels: unsigned activations times signed weights, where integers are faster.

What is in int8 follows from shapes, by what was measured (ONNX Runtime 1.31, one thread, AVX-512 VNNI and AMX): a
Linear over many rows and a convolution with enough products for each value that is moved run between Q/DQ with
calibrated ranges; a Linear of a few rows reads int8 weights and quantises its rows as they come. Everything else
computes in float, its larger weights in int8 in the file.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from edgevit.errors import ExportError
from edgevit.export import passes
from edgevit.specs import Batch

from .observe import Observed, observe
from .qdq import Scheme, channel_bias, insert_qdq, measured, weight_axis
from .recipe import Recipe
from .streamed import insert_dynamic, store_half, store_int8

PRODUCTS = ("Attention", "Conv", "Gemm", "MatMul")
FEW_ROWS = 16  # from here on calibrated ranges are as fast as ones found at run time, 2.2 times float32 either way
STREAMED = 8192  # weights below which a product of few rows gains nothing (294M as a whole: 1.16 against 1.14)
# Products for each value that is quantised, dequantised or requantised on the way. A Linear at 16 took 1.04 to 1.2
# times the time of float32, at 21 the same, at 32 it was 1.15 times as fast; a pointwise convolution at 8 took 1.1
# times, at 16 to 20 it was 1.15 times as fast.
LINEAR_GAIN, CONV_GAIN = 24.0, 16.0
# A convolution of the picture itself gathers its patches in runs of a few bytes: with 16, 48 and 96 channels out it
# took 2.2, 1.7 and 1.3 times the time of float32, with 192 half of it.
PICTURE_CHANNELS, PICTURE_OUT = 4, 128
STORED = 1024  # weights from which int8 in the file is worth two more nodes

SMALL = "too few products for each value that is moved: int8 is slower there"
# Both operands and the probabilities between are quantised for one reader each: heads of 197 positions by 64 took 1.4
# times the time of float32, windows of 49 by 32 took 1.35 to 1.9 times.
TWO_ACTIVATIONS = "product of two activations: int8 is slower, as both are quantised for it alone"
GROUPED = "depthwise or grouped convolution: its int8 kernel is slower"
ASKED = "asked for"
OTHER_FORM = "weight on the left or of more than two axes: no int8 kernel"
# What stays float whatever its shape, by the path of the module.
KEPT = {"*slopes[./]*": "hyper network: its error scales whole channels, and its int8 brought nothing (1.14 for 1.14)"}
# Weights of those that int8 would make too coarse even in the file: with these the logits of 294M lost 6 dB of 34.
HALVED = ("*slopes/*", "*slopes.seconds.*")


@dataclass(frozen=True)
class OnnxRecipe(Recipe):
    """How a network becomes int8 for ONNX Runtime.

    weight_bits: 7 for processors without VNNI, whose 8-bit kernels add pairs of products in 16 bits and saturate.
    stored: weights of products that stay float are int8 in the file; ONNX Runtime makes them float as it loads.
    """

    weight_bits: Literal["8", "7"] = "8"
    stored: bool = True


@dataclass(frozen=True)
class Quantized:
    """What became of the products of a graph: counts by kind, what stayed float and why, the calibration."""

    static: dict[str, int]
    dynamic: dict[str, int]
    kept: tuple[tuple[str, str], ...]
    calibrated: dict[str, Any]

    def choices(self) -> dict[str, Any]:
        """For an artifact's manifest."""
        return {
            "quantized": dict(Counter(self.static) + Counter(self.dynamic)),
            "quantized_as_they_come": self.dynamic,
            "kept_float": [{"node": node, "why": why} for node, why in self.kept],
            "calibrated": self.calibrated,
        }

    def notes(self) -> tuple[str, ...]:
        """What the user must be told: where float32 is left because int8 would be slower."""
        slow = Counter(why for _, why in self.kept if why in (SMALL, GROUPED, TWO_ACTIVATIONS, OTHER_FORM))
        parts = [f"{count} ({why})" for why, count in slow.most_common()]
        return (f"int8: kept in float32 because int8 would be no faster: {'; '.join(parts)}",) if parts else ()


def quantize(
    graph: ir.Model, recipe: OnnxRecipe, images: NDArray[np.float32], batch: Batch
) -> tuple[ir.Model, Quantized]:
    """The graph with int8 products, and what was done; `graph` is changed.

    Args:
        graph: after `passes.CLEANUP` and `passes.CPU_KERNELS`, nodes named after modules. images: normalised,
            (n, 3, h, w).

    Raises:
        ExportError: the patterns or shapes leave nothing to quantise; the graph cannot be run.
    """
    graph = passes.run(graph, (common.ShapeInferencePass(),))
    products = [node for node in graph.graph if node.op_type in PRODUCTS]
    places = [(node, *place(node, recipe)) for node in products]
    if not any(how in ("static", "dynamic") for _, how, _ in places):
        raise ExportError(
            "int8: no product of the network is left to quantise, by size or by --option only and keep_float; "
            "take fp32, or widen the patterns"
        )
    for node, _, why in places:
        if recipe.stored and why not in ("", ASKED):
            _store(graph, node)
    dynamic = insert_dynamic(graph, [node.name or "" for node, how, _ in places if how == "dynamic"])
    static = [node for node, how, _ in places if how == "static"]
    counts = dict(Counter(node.op_type for node in static))
    chosen = [_plain(node).name or "" for node in static]
    graph = passes.run(graph, (common.ShapeInferencePass(),))
    limit = 127 if recipe.weight_bits == "8" else 63
    scheme = Scheme("uint8", symmetric=False, weight_limit=limit, bias=True, outputs=frozenset(["Conv"]), early=True)
    seen = observe(graph, measured(graph, scheme, chosen), images, batch, recipe.calibrator) if chosen else None
    insert_qdq(graph, seen.ranges if seen else {}, scheme, chosen)
    graph = passes.run(graph, (common.RemoveUnusedNodesPass(), common.DeduplicateInitializersPass()))
    kept = tuple((node.name or "", why) for node, _, why in places if why)
    return graph, Quantized(counts, dynamic, kept, _calibrated(recipe, len(images), seen))


def place(node: ir.Node, recipe: OnnxRecipe) -> tuple[Literal["static", "dynamic", "float"], str]:
    """How a product computes: in int8 with calibrated ranges, with ranges found at run time, or in float and why."""
    name = node.name or ""
    if not recipe.quantizes(name):
        return "float", ASKED
    kept = next((why for pattern, why in KEPT.items() if fnmatch.fnmatchcase(name, pattern)), None)
    if kept is not None:
        return "float", kept
    constants = [v is not None and v.const_value is not None for v in node.inputs[:2]]
    if node.op_type == "Attention" or not any(constants):
        return "float", TWO_ACTIVATIONS
    plain = node.attributes.get_int("transA", 0) == 0 and node.attributes.get_float("beta", 1.0) == 1.0
    if weight_axis(node) is None or not plain:
        return "float", OTHER_FORM
    return _conv_place(node) if node.op_type == "Conv" else _linear_place(node)


def _conv_place(node: ir.Node) -> tuple[Literal["static", "float"], str]:
    out, channels, *kernel = _weight(node).shape  # o c kh kw
    if node.attributes.get_int("group", 1) != 1:
        return "float", GROUPED
    if channels <= PICTURE_CHANNELS and out < PICTURE_OUT:
        return "float", SMALL
    read = channels * math.prod(node.attributes.get_ints("strides", [1] * len(kernel)))
    gain = channels * math.prod(kernel) * out / (read + out)  # for each position of the result
    return ("static", "") if gain >= CONV_GAIN else ("float", SMALL)


def _linear_place(node: ir.Node) -> tuple[Literal["static", "dynamic", "float"], str]:
    rows, (one, other) = _rows(node.outputs[0]), _weight(node).shape
    if rows is not None and rows <= FEW_ROWS:
        return ("dynamic", "") if one * other >= STREAMED else ("float", SMALL)
    return ("static", "") if one * other / (one + other) >= LINEAR_GAIN else ("float", SMALL)


def _rows(value: ir.Value) -> int | None:
    """Rows of a product for one picture; None where the shape does not say."""
    if value.shape is None:
        return None
    rows = 1
    for dimension in list(value.shape)[:-1]:
        count = dimension if isinstance(dimension, int) else _times(str(dimension.value))
        if count is None:
            return None
        rows *= count
    return rows


def _times(expression: str) -> int | None:
    """The number in "49*batch" or "batch"; None of anything else."""
    factors = [factor.strip() for factor in expression.split("*")]
    numbers = [int(factor) for factor in factors if factor.isdecimal()]
    return math.prod(numbers) if len(factors) - len(numbers) == 1 else None


def _weight(node: ir.Node) -> NDArray[Any]:
    value = node.inputs[1]
    if value is None or value.const_value is None:
        raise ExportError(f"int8: node {node.name} has no constant weight; please report the model")
    return value.const_value.numpy()


def _plain(node: ir.Node) -> ir.Node:
    """The product in the form that ONNX Runtime's integer kernels take, in place.

    Given:  Gemm(x, w, c), c no bias of channels | Conv(x, w, b), pointwise, of twice the channels in than out or more
    Result: Add(Gemm(x, w), c) | Gemm on rows of channels last, whose result is not rounded to 8 bits: as fast there
    """
    if node.op_type == "Gemm" and len(node.inputs) > 2 and channel_bias(node) is None:
        tape = Tape()
        tape.op("Add", [tape.op("Gemm", list(node.inputs[:2]), dict(node.attributes)), node.inputs[2]])
        return _put(node, tape, "Gemm")
    if node.op_type == "Conv" and _narrows(node):
        return _put(node, _rows_of_pixels(node), "Gemm")
    return node


def _narrows(node: ir.Node) -> bool:
    out, channels, *kernel = _weight(node).shape
    plain = not any(node.attributes.get_ints("pads", [])) and set(node.attributes.get_ints("strides", [1])) == {1}
    static = node.outputs[0].shape is not None and all(isinstance(d, int) for d in list(node.outputs[0].shape)[1:])
    return bool(set(kernel) == {1} and plain and static and channels >= 2 * out)


def _rows_of_pixels(node: ir.Node) -> Tape:
    tape, name, shape = Tape(), node.outputs[0].name, node.outputs[0].shape
    matrix = _weight(node)[:, :, 0, 0]  # o c 1 1 -> o c
    _, out, height, width = list(shape) if shape is not None else [0, 0, 0, 0]
    last = tape.op("Transpose", [node.inputs[0]], {"perm": [0, 2, 3, 1]})  # n c h w -> n h w c
    flat = tape.op("Reshape", [last, _shape(tape, f"{name}_rows", [-1, matrix.shape[1]])])  # -> n*h*w c
    stored = tape.initializer(ir.tensor(np.ascontiguousarray(matrix.T), name=f"{name}_matrix"))
    product = tape.op("Gemm", [flat, stored, *node.inputs[2:]])  # -> n*h*w o
    shape_back = _shape(tape, f"{name}_pixels", [-1, int(str(height)), int(str(width)), int(str(out))])
    tape.op("Transpose", [tape.op("Reshape", [product, shape_back])], {"perm": [0, 3, 1, 2]})
    return tape


def _shape(tape: Tape, name: str, values: Sequence[int]) -> ir.Value:
    return tape.initializer(ir.tensor(np.array(values, dtype=np.int64), name=name))


def _put(node: ir.Node, tape: Tape, kind: str) -> ir.Node:
    """Put the recorded nodes where `node` stood; the one of this kind takes over its name and is returned."""
    graph, name = node.graph, node.name or ""
    if graph is None:
        raise ExportError(f"int8: node {name} stands in no graph; please report the model")
    for value in tape.initializers:
        graph.register_initializer(value)
    for i, each in enumerate(tape.nodes):
        each.name = name if each.op_type == kind else f"{name}:{each.op_type}_{i}"
        each.outputs[0].name = f"{name}:{each.op_type}_{i}"
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], list(tape.nodes), node.outputs, [tape.nodes[-1].outputs[0]]
    )
    return next(each for each in tape.nodes if each.op_type == kind)


def _store(graph: ir.Model, node: ir.Node) -> None:
    """Weights of a float product as int8 or float16 in the file, where they are large enough."""
    store = store_half if any(fnmatch.fnmatchcase(node.name or "", pattern) for pattern in HALVED) else store_int8
    for index, value in enumerate(node.inputs[:2]):
        alone = value is not None and len(list(value.uses())) == 1  # others that read it may be in int8
        if alone and value is not None and value.const_value is not None and value.const_value.size >= STORED:
            store(graph, node, index)


def _calibrated(recipe: OnnxRecipe, pictures: int, seen: Observed | None) -> dict[str, Any]:
    return {
        "calibrator": recipe.calibrator,
        "pictures": pictures,
        "unstable": [] if seen is None else list(seen.unstable),
    }
