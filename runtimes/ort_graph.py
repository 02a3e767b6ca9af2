"""What an ONNX file itself tells beside a session: types of weights, and the nodes behind executed ones.

Apart from `ort`, so that a process that only runs a model never imports onnx: start-up and memory are the runtime's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from edgevit.errors import RuntimeFailure, first_line

PRODUCTS = ("Attention", "Conv", "Gemm", "MatMul")  # part of the kinds that have them, also of FusedConv, MatMulInteger
REORDERED = "_nchwc"  # what ONNX Runtime puts behind names of nodes in its own layout
UNCAST = "InsertedPrecisionFreeCast_"  # what it puts before names where a float32 kernel computes a float16 node


def weights_precision(path: Path) -> str:
    """fp32 where every floating weight is float32, else the types found.

    Raises:
        RuntimeFailure: the file is no ONNX model.
    """
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16",
             onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "int8"}  # fmt: skip
    found = {names[t.data_type] for t in _graph(path).initializer if t.data_type in names}
    return "+".join(sorted(found)) or "fp32"


def kinds(path: Path) -> set[str]:
    """The kinds of the nodes of a graph."""
    return {node.op_type for node in _graph(path).node}


def origins(source: Path, executed: Path) -> dict[str, tuple[str, ...]]:
    """The nodes of the file that each executed node computes, as far as its name and tensors tell.

    An optimised node writes the tensor that the last of the nodes wrote that it stands for, or is named after it. From
    there back through nodes of whose tensors one is written by no other executed node.
    """
    nodes = _graph(source).node
    makers = {output: node for node in nodes for output in node.output}
    sources = {node.name: node for node in nodes if node.name}
    written = {node.name: _tensors(node, makers, sources) for node in _graph(executed).node}
    own = Counter(tensor for tensors in written.values() for tensor in tensors)
    return {name: tuple(_back(tensors, makers, own)) for name, tensors in written.items()}


def _graph(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # onnx raises protobuf's, its own and the file system's
        raise RuntimeFailure(f"{path}: not a readable ONNX model: {first_line(error)}") from error


def _tensors(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], sources: dict[str, onnx.NodeProto]) -> list[str]:
    """The file's tensors that an executed node writes by their own names, or by its name ("x_nchwc", "node/Fusion")."""
    if node.op_type == "Cast":  # those around float32 kernels of float16 nodes bear the names of the nodes' tensors
        return []
    name = node.name.removeprefix(UNCAST)
    part_of = sources.get(name.rstrip("/").rpartition("/")[0])
    named = [name.removesuffix(REORDERED)] if name.endswith(REORDERED) else []
    fused = list(part_of.output) if part_of is not None else []
    outputs = [output.removeprefix(UNCAST) for output in node.output]
    return [tensor for tensor in [*outputs, *named, *fused] if tensor in makers]


def _back(tensors: Sequence[str], makers: dict[str, onnx.NodeProto], own: Counter[str]) -> Iterator[str]:
    """From a tensor through what no other executed node writes, to the products; scales have branches of their own."""
    left, seen = list(tensors[:1]), set(tensors[:1])
    while left:
        node = makers[left.pop(0)]
        yield node.name or node.output[0]
        if not node.op_type.startswith(PRODUCTS):
            inner = [name for name in node.input if name in makers and not own[name] and name not in seen]
            left += inner
            seen.update(inner)
