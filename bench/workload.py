"""The reference workload: one small fixed graph that is timed beside an artifact whose baseline was measured before.

A time of last week says little today: the machine is hotter, busier, or clocked otherwise. How much longer an artifact
takes than this graph, in turns with it, says more; it is what a baseline store keeps.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

NAME = "conv-attention-mlp"
VERSION = "1"  # of the graph below: results of two versions are not comparable
CHANNELS, SIDE = 64, 28  # of the map that comes in
HIDDEN = 256  # of the two products after the attention
SCALE = 1 / 4096  # of the weights, which are whole numbers up to 127: results neither vanish nor grow


def write_workload(directory: Path) -> tuple[Path, Path, str]:
    """Write the graph and its input into `directory`: the ONNX file, the .npz of the feed, the graph's sha256.

    A convolution of 3x3, attention over its pixels, an MLP: 147 M MACs in float32, in the kinds of operators that
    these networks are made of. Weights come from whole numbers, so that they are the same with any version of NumPy.
    """
    model = _graph()
    data = model.SerializeToString(deterministic=True)
    path, feed = directory / f"{NAME}-{VERSION}.onnx", directory / f"{NAME}-{VERSION}.npz"
    path.write_bytes(data)
    np.savez(feed, image=_numbers((1, CHANNELS, SIDE, SIDE), 0) / np.float32(127))
    return path, feed, hashlib.sha256(data).hexdigest()


def _numbers(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Whole numbers from -127 to 127 of a linear congruential sequence (Numerical Recipes' constants)."""
    state, values = seed + 1, np.empty(int(np.prod(shape)), np.float32)
    for index in range(values.size):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        values[index] = (state >> 16) % 255 - 127
    return values.reshape(shape)


def _graph() -> onnx.ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    tokens, width = SIDE * SIDE, CHANNELS
    shapes = {
        "kernel": (width, width, 3, 3), "query": (width, width), "key": (width, width), "value": (width, width),
        "up": (width, HIDDEN), "down": (HIDDEN, width),
    }  # fmt: skip
    stored = [
        numpy_helper.from_array(_numbers(shape, seed) * np.float32(SCALE), name)
        for seed, (name, shape) in enumerate(shapes.items(), start=1)
    ]
    stored.append(numpy_helper.from_array(np.array([1, width, tokens], np.int64), "flat"))
    stored += [
        numpy_helper.from_array(np.full(width, each, np.float32), name) for name, each in (("one", 1), ("none", 0))
    ]
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["map"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["map"], ["active"]),
        helper.make_node("Reshape", ["active", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["tokens", "one", "none"], ["normed"]),
        *(helper.make_node("MatMul", ["normed", name], [name[0]]) for name in ("query", "key", "value")),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "up"], ["wide"]),
        helper.make_node("Erf", ["wide"], ["bent"]),
        helper.make_node("MatMul", ["bent", "down"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, width, SIDE, SIDE])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, tokens, width])
    graph = helper.make_graph(nodes, NAME, [image], [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
