"""A stranger's ONNX file, read so that no rule has to be afraid of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its stubs are a package apart
from onnx import TensorProto, inliner, shape_inference

import edgevit
from edgevit.errors import ArtifactError

MAX_FILE_BYTES = 2 << 30  # protobuf reads no larger message
MAX_NODES = 100_000  # the largest published vision networks have a few thousand; functions may multiply without end
SMALL_BYTES = 1 << 16  # of an initializer that may be a shape, whose values shape inference needs
INFER_SECONDS = 60  # the largest network takes one; a file that takes longer was made to
NAME_LENGTH = 200  # characters of a name that are shown


def read_onnx(path: Path) -> onnx.ModelProto:
    """An ONNX file without what it keeps in other files: those are not opened.

    Raises:
        ArtifactError: missing, too large, damaged, or not ONNX.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ArtifactError(f"{path}: not a file; expected an ONNX file")
        if size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path}: {size} bytes, an ONNX file has at most {MAX_FILE_BYTES}")
        model = onnx.ModelProto()
        model.ParseFromString(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "a name that no file can have"
        raise ArtifactError(f"{path}: {reason}; expected an ONNX file") from None
    except DecodeError:
        raise ArtifactError(f"{path}: not an ONNX file, or a damaged one; export the model again") from None
    if not model.graph.node:  # an empty or foreign file may be read without complaint
        raise ArtifactError(f"{path}: it holds no graph; expected an ONNX file")
    return model


def check_texts(model: onnx.ModelProto) -> None:
    """Refuse names that are no UTF-8: protobuf hands them out as bytes, which nothing else expects."""
    graph = model.graph
    texts: list[Any] = [graph.name, *(entry.domain for entry in model.opset_import)]
    for function in model.functions:
        texts += [function.name, function.domain, *function.input, *function.output, *function.attribute]
    for inner in (graph, *_graphs_below(graph.node), *(g for f in model.functions for g in _graphs_below(f.node))):
        values = (*inner.input, *inner.output, *inner.value_info)
        texts += [value.name for value in values] + [tensor.name for tensor in inner.initializer]
        texts += [dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim]
        texts += [sparse.values.name for sparse in inner.sparse_initializer]
    for node in (*_all_nodes(graph.node), *(n for f in model.functions for n in _all_nodes(f.node))):
        texts += [node.name, node.op_type, node.domain, node.overload, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    if not all(isinstance(text, str) for text in texts):
        raise ArtifactError("graph: a name in it is not text; expected UTF-8, export the model again")


def _graphs_below(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in _all_nodes(nodes):
        yield from inner_graphs(node)


def check_functions(model: onnx.ModelProto) -> None:
    """Refuse what would inline without end."""
    bodies = {(f.domain, f.name, f.overload): [_called(node) for node in _all_nodes(f.node)] for f in model.functions}
    try:
        order = list(TopologicalSorter({key: set(calls) for key, calls in bodies.items()}).static_order())
    except CycleError:
        raise ArtifactError(
            f"graph {shown(model.graph.name)!r}: a function calls itself; export the model again"
        ) from None
    sizes: dict[tuple[str, str, str], int] = {}
    for key in order:
        sizes[key] = min(sum(sizes.get(call, 1) for call in bodies.get(key, [])) or 1, MAX_NODES + 1)
    total = sum(sizes.get(_called(node), 1) for node in _all_nodes(model.graph.node))
    if total > MAX_NODES:
        raise ArtifactError(f"graph {shown(model.graph.name)!r}: more than {MAX_NODES} nodes; expected a network")


def _called(node: onnx.NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.overload


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in inner_graphs(node):
            yield from _all_nodes(graph.node)


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the values of its large initializers, so that shapes can be inferred without copying weights.

    The declared shapes of the outputs are left out too: a wrong one would stand against what is inferred.
    """
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name
    for part in ("node", "input", "output", "value_info"):
        getattr(graph, part).extend(getattr(model.graph, part))
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    inputs = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= SMALL_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Functions inlined and shapes filled in, as far as the model allows: one that contradicts itself keeps its own."""
    try:
        inlined = inliner.inline_local_functions(model) if model.functions else model
    except (RuntimeError, ValueError, onnx.checker.ValidationError):
        inlined = model
    for _ in range(2):
        try:
            return shape_inference.infer_shapes(inlined, data_prop=True)
        except (shape_inference.InferenceError, RuntimeError, ValueError):
            del inlined.graph.value_info[:]  # a wrong one may be what stands against it: once more without
    return inlined


def infer_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same in a process of its own: on a crafted file ONNX's native code may crash or never end.

    Raises:
        ArtifactError: it did.
    """
    roots = [str(Path(edgevit.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(  # this interpreter, a module of ours, no shell
            [sys.executable, "-P", "-W", "ignore", "-m", "edgevit.export.lint.worker"],
            input=model.SerializeToString(),
            capture_output=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))},
            timeout=INFER_SECONDS,
            check=True,
        )
    except (subprocess.SubprocessError, ValueError):  # ValueError: too large for one message
        name = shown(model.graph.name)
        raise ArtifactError(
            f"graph {name!r}: its shapes cannot be inferred; check the file with onnx.checker"
        ) from None
    inferred = onnx.ModelProto()
    inferred.ParseFromString(done.stdout)
    return inferred


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The branches or the body of a node."""
    for attribute in node.attribute:
        yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)


def shown(text: str) -> str:
    """A name from a stranger's file without what moves a cursor or hides text, and not without end."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= NAME_LENGTH else clean[:NAME_LENGTH] + "..."
