"""The ranges of a float graph's tensors on pictures, as int8 needs them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgevit.errors import ExportError, first_line
from edgevit.specs import Batch

from .calibrators import Observer, Range

LAYOUT = ("Flatten", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # move values, change none
UNIT = ("HardSigmoid", "Sigmoid", "Softmax")  # from 0 to 1 by definition
FATAL_ONLY = 4  # ONNX Runtime's log level: failures are raised, and its own lines would repeat them


@dataclass(frozen=True)
class Observed:
    """The range of each tensor, and the names of those that moved when the number of pictures doubled."""

    ranges: Mapping[str, Range]
    unstable: tuple[str, ...]


def observe(
    graph: ir.Model, names: Collection[str], images: NDArray[np.float32], batch: Batch, calibrator: str
) -> Observed:
    """Run a float32 graph with input `image` on the pictures, one thread, and note the range of each named tensor.

    What a tensor holds by definition is not measured: probabilities, clipped values. Tensors that differ in shape alone
    are measured once, at their source.

    Args:
        graph: not changed. images: normalised, (n, 3, h, w). batch: pictures that the graph takes at once; a dynamic
            one gets them one by one, and the last ones of a static one are filled up with repetitions.

    Raises:
        ExportError: a name is unknown, the graph cannot be run, there are no pictures, a tensor is not finite.
    """
    if not len(images):
        raise ExportError("calibration: there are no pictures, expected at least one; name more with --calibration")
    values = _values(graph, names)
    known = {name: known_range(value) for name, value in values.items()}
    sources = {name: source_of(value).name or "" for name, value in values.items() if known[name] is None}
    found, early = _run(graph, sorted(set(sources.values())), images, batch, calibrator)
    ranges = {name: known[name] or found[sources[name]] for name in values}
    unstable = tuple(name for name in values if name in sources and early[sources[name]].moved(ranges[name]))
    return Observed(ranges, unstable)


def source_of(value: ir.Value) -> ir.Value:
    """The tensor that `value` is another shape of, itself if of none."""
    while (node := value.producer()) is not None and (source := moved(node)) is not None:
        value = source
    return value


def moved(node: ir.Node) -> ir.Value | None:
    """What a node only puts elsewhere, every element of it; None where it computes or picks out."""
    source = node.inputs[0] if node.op_type in LAYOUT else None
    if source is None or (node.op_type == "Gather" and _elements(source) != _elements(node.outputs[0])):
        return None
    return source


def _elements(value: ir.Value) -> int | None:
    """How many a tensor has for one picture of a dynamic batch; None where the shape is not known."""
    if value.shape is None:
        return None
    return math.prod(d if isinstance(d, int) else 1 for d in value.shape)


def known_range(value: ir.Value) -> Range | None:
    """The range that a tensor has by definition of what makes it; None where it follows from the pictures."""
    producer = source_of(value).producer()
    if producer is None:
        return None
    if producer.op_type in UNIT:
        return Range(0.0, 1.0)
    if producer.op_type != "Clip" or len(producer.inputs) < 3:
        return None
    ends = [None if end is None or end.const_value is None else float(end.const_value.numpy())
            for end in producer.inputs[1:3]]  # fmt: skip
    low, high = ends
    return None if low is None or high is None else Range(min(low, 0.0), max(high, 0.0))


def _values(graph: ir.Model, names: Collection[str]) -> dict[str, ir.Value]:
    values = {value.name: value for value in graph.graph.inputs}
    values |= {value.name: value for node in graph.graph for value in node.outputs}
    missing = [name for name in names if name not in values]
    if missing:
        raise ExportError(
            f"calibration: the graph has no tensor {missing[0]!r}; please report the model and its options"
        )
    return {name: values[name] for name in names}


def _run(
    graph: ir.Model, sources: list[str], images: NDArray[np.float32], batch: Batch, calibrator: str
) -> tuple[dict[str, Range], dict[str, Range]]:
    """The ranges over all pictures, and those over the first half of them."""
    observers = {name: Observer(calibrator, f"calibration: tensor {name}") for name in sources}
    chunks = list(_chunks(images, 1 if batch == "dynamic" else batch))
    half = (len(chunks) + 1) // 2
    early: dict[str, Range] = {}
    inputs = {value.name for value in graph.graph.inputs}
    with tempfile.TemporaryDirectory(prefix="edgevit-calibration-") as folder:
        session = _session(graph, [name for name in sources if name not in inputs], Path(folder, "probe.onnx"))
        names = [value.name for value in session.get_outputs() if value.name in observers]
        for index, chunk in enumerate(chunks):
            try:
                found = session.run(names, {"image": chunk}) if names else []
            except Exception as error:  # its exceptions share no base below Exception
                raise ExportError(f"calibration: ONNX Runtime failed: {first_line(error)}") from error
            for name, array in [*zip(names, found, strict=True), ("image", chunk)]:
                if name in observers:
                    observers[name].update(array)
            if index + 1 == half:
                early = {name: observer.range() for name, observer in observers.items()}
    return {name: observer.range() for name, observer in observers.items()}, early


def _chunks(images: NDArray[np.float32], count: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(images), count):
        yield np.ascontiguousarray(np.resize(images[start : start + count], (count, *images.shape[1:])))


def _session(graph: ir.Model, names: list[str], path: Path) -> ort.InferenceSession:
    """A session of a copy of the graph that has the named tensors among its outputs."""
    probe = graph.clone()
    values = {value.name: value for node in probe.graph for value in node.outputs}
    present = {value.name for value in probe.graph.outputs}
    probe.graph.outputs.extend(values[name] for name in names if name not in present)
    ir.save(probe, path, external_data="probe.data")  # beside the graph: protobuf stops at 2 GB
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base below Exception
        raise ExportError(f"calibration: ONNX Runtime cannot load the graph: {first_line(error)}") from error
