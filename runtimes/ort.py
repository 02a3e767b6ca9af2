"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure, first_line
from edgevit.specs import NoOptions, OperatorTime, TensorSpec

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}
PROVIDER = "CPUExecutionProvider"
PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "int8": "int8", "uint8": "int8"}
PRODUCTS = ("Attention", "Conv", "Gemm", "MatMul")  # part of the kinds that have them, also of FusedConv, MatMulInteger
# Kernels that multiply integers, whatever they are fed: some of them quantise a float input themselves.
INTEGER = ("ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv",
           "QLinearMatMul")  # fmt: skip
EVENT, REORDERED = "_kernel_time", "_nchwc"  # what ONNX Runtime puts behind names of nodes, and of those in its layout
UNCAST = "InsertedPrecisionFreeCast_"  # what it puts before names where a float32 kernel computes a float16 node
WARMUP_RUNS = 2  # before a profile: the first run allocates
FATAL_ONLY = 4  # ONNX Runtime's log level: failures are raised, and its own lines would repeat them


class OrtRuntime:
    """Runs `path` with `threads` threads inside an operator (None: all cores), one operator at a time."""

    name = "ort"
    OPTIONS = NoOptions

    def __init__(
        self, path: Path, threads: int | None = None, precision: str = "fp32", options: NoOptions | None = None
    ) -> None:
        self.path = path
        self.asked_precision = precision
        self.options = options or NoOptions()
        self.threads = threads
        self._session: ort.InferenceSession | None = None
        self._precision = ""

    @classmethod
    def obstacle(cls) -> str | None:
        """None: a dependency, on any processor."""
        return None

    def load(self) -> None:
        """Create the session with all graph optimisations, as is ONNX Runtime's default.

        Where int8 is asked for, the graph as it was optimised is read back: Q/DQ alone computes nothing in integers.
        """
        options = self._options()
        if self.asked_precision != "int8":
            self._session = self._start(options)
            self._precision = _weights_precision(self.path)
            return
        with tempfile.TemporaryDirectory(prefix="edgevit-executed-") as scratch:
            executed = Path(scratch, "executed.onnx")
            options.optimized_model_filepath = str(executed)
            self._session = self._start(options)
            kinds = {node.op_type for node in onnx.load(executed, load_external_data=False).graph.node}
        self._precision = "int8" if kinds.intersection(INTEGER) else "fp32"

    @property
    def inputs(self) -> list[TensorSpec]:
        """The graph's inputs."""
        return [_spec(value) for value in self._loaded().get_inputs()]

    @property
    def outputs(self) -> list[TensorSpec]:
        """The graph's outputs."""
        return [_spec(value) for value in self._loaded().get_outputs()]

    @property
    def effective_precision(self) -> str:
        """Read off the stored weights; what computes, `profile` tells: of float16, float32 kernels between casts.

        Of int8, read off the kernels: "int8" if there are any that multiply integers, else "fp32".
        """
        mixed = self.asked_precision == "fp16" and self._precision == "fp16+fp32"
        return "fp16" if mixed else self._precision  # a float16 graph keeps in float32 what float16 cannot hold

    def describe(self) -> dict[str, Any]:
        """Version, provider and threads."""
        providers = self._loaded().get_providers()
        return {"runtime": "onnxruntime", "version": ort.__version__, "providers": providers, "threads": self.threads}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        session = self._loaded()
        outputs = self._infer(session, inputs)
        return {value.name: array for value, array in zip(session.get_outputs(), outputs, strict=True)}

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """What each executed operator took, the median of `runs`, and the type of what it was fed.

        A session of its own writes down the times and the graph as it was optimised, in a directory that is removed.
        With `runs` 0 the times are all 0.
        """
        self._loaded()
        options = self._options()
        with tempfile.TemporaryDirectory(prefix="edgevit-profile-") as scratch:
            executed = Path(scratch, "executed.onnx")
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(scratch, "times"))
            options.optimized_model_filepath = str(executed)
            session = self._start(options)
            for _ in range(WARMUP_RUNS + runs if runs else 1):
                self._infer(session, inputs)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            origins = _origins(*(onnx.load(file, load_external_data=False) for file in (self.path, executed)))
        return tuple(_operators(events, origins, runs))

    def close(self) -> None:
        """Drop the session."""
        self._session = None

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.inter_op_num_threads = 1
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options

    def _start(self, options: ort.SessionOptions, graph: bytes | None = None) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(graph or str(self.path), options, providers=[PROVIDER])
        except Exception as error:  # its exceptions share no base below Exception
            raise RuntimeFailure(f"{self.path}: ONNX Runtime cannot load it: {first_line(error)}") from error

    def _infer(self, session: ort.InferenceSession, inputs: Arrays) -> list[NDArray[Any]]:
        try:
            found: list[NDArray[Any]] = session.run(None, {k: np.ascontiguousarray(v) for k, v in inputs.items()})
        except Exception as error:  # its exceptions share no base below Exception
            raise RuntimeFailure(f"{self.path}: ONNX Runtime failed: {first_line(error)}") from error
        return found

    def _loaded(self) -> ort.InferenceSession:
        if self._session is None:
            raise RuntimeFailure(f"{self.path}: the ONNX Runtime session is not loaded")
        return self._session


def _spec(value: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorSpec(value.name, shape, TYPES.get(value.type, value.type))


def _weights_precision(path: Path) -> str:
    """fp32 where every floating weight is float32, else the types found."""
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16",
             onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "int8"}  # fmt: skip
    model = onnx.load(path, load_external_data=False)
    return "+".join(sorted({names[t.data_type] for t in model.graph.initializer if t.data_type in names})) or "fp32"


def _operators(events: Sequence[Any], origins: dict[str, tuple[str, ...]], runs: int) -> Iterator[OperatorTime]:
    """The operators in the profile's events, one event for each run of each operator, in the order of their first."""
    found = defaultdict[tuple[str, str], list[Any]](list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(EVENT):
            found[event["name"].removesuffix(EVENT), event["args"]["node_index"]].append(event)
    for (name, _), of_one in found.items():
        arguments = of_one[0]["args"]
        fed = [kind for port in arguments["input_type_shape"] or arguments["output_type_shape"] for kind in port]
        precision = "int8" if arguments["op_name"] in INTEGER else fed[0] if fed else "none"
        times_ms = [event["dur"] / 1000 for event in of_one[WARMUP_RUNS:]]  # dur is in microseconds
        yield OperatorTime(
            name=name,
            kind=arguments["op_name"],
            precision=PRECISIONS.get(precision, precision),
            time_ms=statistics.median(times_ms) if runs and times_ms else 0.0,
            origins=origins.get(name, ()),
        )


def _origins(source: onnx.ModelProto, executed: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """The nodes of the file that each executed node computes, as far as its name and tensors tell.

    An optimised node writes the tensor that the last of the nodes wrote that it stands for, or is named after it. From
    there back through nodes of whose tensors one is written by no other executed node.
    """
    makers = {output: node for node in source.graph.node for output in node.output}
    sources = {node.name: node for node in source.graph.node if node.name}
    written = {node.name: _tensors(node, makers, sources) for node in executed.graph.node}
    own = Counter(tensor for tensors in written.values() for tensor in tensors)
    return {name: tuple(_back(tensors, makers, own)) for name, tensors in written.items()}


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
