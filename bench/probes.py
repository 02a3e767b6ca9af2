"""Small ONNX graphs that find a runtime's peaks on this machine, and the search for their best time.

Chains of matrix products find the peak of a precision, chains of matrix-vector products how fast stored weights stream.
They are run by whoever has a runtime.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 20, 10  # what every supported runtime reads
SIDE = 768  # of the products: 512 and 1024 came to the same peak, 256 and below to less
# Products in a chain. int8 and bf16 are several times faster: their chains are longer, so that what goes in and comes
# out in float32 weighs little; float32's is short, so that some of its runs are not interrupted.
LAYERS = {"fp32": 4, "bf16": 8, "fp16": 8, "int8": 8}
ACTIVATION_SCALE, ACTIVATION_ZERO = 0.05, 128  # of int8: 256 steps from -6.4 to 6.35, where normal values lie
INT8_LIMIT = 127  # of weights, which are symmetric
STREAM_SETS = (1 << 18, 1 << 20, 1 << 23)  # bytes: they fit the usual caches of a core, and the shared one
MAX_STREAM = 1 << 26  # bytes: larger ones take seconds to load
STREAMED_BYTES = 1 << 24  # read in one run, so that the call itself weighs little
MAX_STREAMS = 64  # products in such a chain; a graph of more takes longer to load than to run
MIN_ROUNDS = 5  # of a search for the best time; with fewer, one interruption hides a peak


@dataclass(frozen=True)
class Probe:
    """A graph with one input "x" of `shape`, float32, and what one run of it computes or reads."""

    model: onnx.ModelProto
    shape: tuple[int, int]
    flops: int = 0
    read_bytes: int = 0
    set_bytes: int = 0  # what `read_bytes` are read from, again and again


def product_probe(precision: str) -> Probe:
    """A chain of square products, each with stored weights of its own, so that none can be folded or done once.

    bf16 has the graph of fp32: it is a way to run it. fp16 has float16 tensors; int8 is written in
    QuantizeLinear/DequantizeLinear, unsigned activations and signed weights with a scale for each output channel.
    """
    from onnx import TensorProto, helper

    layers = LAYERS[precision]
    weight = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32) / np.float32(math.sqrt(SIDE))
    nodes, stored, value = list[Any](), dict[str, NDArray[Any]](), "x"
    if precision == "fp16":
        nodes.append(helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16))
        value = "half"
    for i in range(layers):
        operands = [value, f"w{i}"]
        if precision == "int8":
            nodes += _int8_operands(i, value, weight, stored)
            operands = [f"x{i}", f"v{i}"]
        else:
            stored[f"w{i}"] = weight.astype(np.float16 if precision == "fp16" else np.float32)
        value = "y" if i == layers - 1 and precision != "fp16" else f"y{i}"
        nodes.append(helper.make_node("MatMul", operands, [value], f"product{i}"))
    if precision == "fp16":
        nodes.append(helper.make_node("Cast", [value], ["y"], to=TensorProto.FLOAT))
    return Probe(_model(nodes, (SIDE, SIDE), stored), (SIDE, SIDE), flops=2 * layers * SIDE**3)


def _int8_operands(i: int, value: str, weight: NDArray[np.float32], stored: dict[str, NDArray[Any]]) -> list[Any]:
    """The nodes that make the `i`-th product's operands, "x<i>" and "v<i>"; what they need goes into `stored`."""
    from onnx import helper

    scale = np.float32(np.abs(weight).max() / INT8_LIMIT)
    stored |= {
        "scale": np.array(ACTIVATION_SCALE, np.float32),
        "zero": np.array(ACTIVATION_ZERO, np.uint8),
        f"w{i}": np.rint(weight / scale).astype(np.int8),
        f"scale{i}": np.full(SIDE, scale, np.float32),
        f"zero{i}": np.zeros(SIDE, np.int8),
    }
    return [
        helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"q{i}"], f"quantize{i}"),
        helper.make_node("DequantizeLinear", [f"q{i}", "scale", "zero"], [f"x{i}"], f"activation{i}"),
        helper.make_node("DequantizeLinear", [f"w{i}", f"scale{i}", f"zero{i}"], [f"v{i}"], f"weight{i}", axis=1),
    ]


def stream_probe(size_bytes: int) -> Probe:
    """A chain of products of a vector with one stored float32 matrix of about `size_bytes`, read again by each."""
    from onnx import helper

    side = max(1, math.isqrt(min(size_bytes, MAX_STREAM) // 4))
    size = 4 * side * side
    repeats = max(1, min(MAX_STREAMS, STREAMED_BYTES // size))
    names = ["x", *(f"y{i}" for i in range(repeats - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [before, "w"], [after], f"product{i}")
        for i, (before, after) in enumerate(itertools.pairwise(names))
    ]
    matrix = np.full((side, side), 1 / side, np.float32)  # keeps a vector of ones as it is
    return Probe(_model(nodes, (1, side), {"w": matrix}), (1, side), read_bytes=repeats * size, set_bytes=size)


def _model(nodes: list[Any], shape: tuple[int, int], stored: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


@dataclass(frozen=True)
class Times:
    """The repetitions of one run, in seconds: the fastest and the median."""

    best_s: float
    median_s: float


def best_times(
    runs: Sequence[Callable[[], object]], budget_s: float, clock: Callable[[], float] = time.perf_counter
) -> list[Times]:
    """Run all by turns until the budget is spent, MIN_ROUNDS times at least; a first round is not counted.

    The fastest counts, because a peak is what nothing disturbed.
    """
    taken = [list[float]() for _ in runs]
    for run in runs:
        run()
    end = clock() + budget_s
    while runs and (len(taken[0]) < MIN_ROUNDS or clock() < end):
        for run, times_s in zip(runs, taken, strict=True):
            start = clock()
            run()
            times_s.append(clock() - start)
    return [Times(min(times_s), statistics.median(times_s)) for times_s in taken]
