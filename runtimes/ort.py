"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure, first_line
from edgevit.specs import NoOptions, OperatorTime, TensorSpec

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}
PROVIDER = "CPUExecutionProvider"
PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "int8": "int8", "uint8": "int8"}
# Kernels that multiply integers, whatever they are fed: some of them quantise a float input themselves.
INTEGER = ("ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv",
           "QLinearMatMul")  # fmt: skip
EVENT = "_kernel_time"  # what ONNX Runtime puts behind the names of nodes in its profile
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
        """Create the session with all graph optimisations, as is ONNX Runtime's default; nothing else is read."""
        self._session = self._start(self._options())

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

        Of int8, read off the kernels: "int8" if there are any that multiply integers, else "fp32". Found out when first
        asked for, not while loading, whose time and memory are then the runtime's own.
        """
        if not self._precision:
            self._loaded()
            self._precision = self._found_precision()
        mixed = self.asked_precision == "fp16" and self._precision == "fp16+fp32"
        return "fp16" if mixed else self._precision  # a float16 graph keeps in float32 what float16 cannot hold

    def describe(self) -> dict[str, Any]:
        """Version, provider and threads."""
        providers = self._loaded().get_providers()
        return {"runtime": "onnxruntime", "version": ort.__version__, "providers": providers, "threads": self.threads}

    def lane(self) -> Callable[[Arrays], dict[str, NDArray[Any]]]:
        """`run` itself: a session may be run by several callers at once, each of which uses all of its threads."""
        self._loaded()
        return self.run

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
        from .ort_graph import origins  # not above: it needs onnx, which who only runs a model need not load

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
            found = origins(self.path, executed)
        return tuple(_operators(events, found, runs))

    def close(self) -> None:
        """Drop the session."""
        self._session = None

    def _found_precision(self) -> str:
        """The precision as the graph tells it: for int8 the optimised one, since Q/DQ alone computes no integers."""
        from .ort_graph import kinds, weights_precision  # not above: as in `profile`

        if self.asked_precision != "int8":
            return weights_precision(self.path)
        with tempfile.TemporaryDirectory(prefix="edgevit-executed-") as scratch:
            options, executed = self._options(), Path(scratch, "executed.onnx")
            options.optimized_model_filepath = str(executed)
            self._start(options)
            return "int8" if kinds(executed).intersection(INTEGER) else "fp32"

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
