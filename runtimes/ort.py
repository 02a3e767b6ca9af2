"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure
from edgevit.specs import TensorSpec

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}
PROVIDER = "CPUExecutionProvider"
FATAL_ONLY = 4  # ONNX Runtime's log level: failures are raised, and its own lines would repeat them


class OrtRuntime:
    """Runs `path` with `threads` threads inside an operator (None: all cores), one operator at a time."""

    name = "ort"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        self.threads = threads
        self._session: ort.InferenceSession | None = None
        self._precision = ""

    def load(self) -> None:
        """Create the session with all graph optimisations, as is ONNX Runtime's default."""
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.inter_op_num_threads = 1
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=[PROVIDER])
        except Exception as error:  # its exceptions share no base below Exception
            raise RuntimeFailure(f"{self.path}: ONNX Runtime cannot load it: {_first_line(error)}") from error
        self._precision = _weights_precision(self.path)

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
        """The CPU provider computes in the type a tensor is stored in, so it is read off the stored weights."""
        return self._precision

    def describe(self) -> dict[str, Any]:
        """Version, provider and threads."""
        providers = self._loaded().get_providers()
        return {"runtime": "onnxruntime", "version": ort.__version__, "providers": providers, "threads": self.threads}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        session = self._loaded()
        try:
            outputs = session.run(None, {name: np.ascontiguousarray(array) for name, array in inputs.items()})
        except Exception as error:  # its exceptions share no base below Exception
            raise RuntimeFailure(f"{self.path}: ONNX Runtime failed: {_first_line(error)}") from error
        return {value.name: array for value, array in zip(session.get_outputs(), outputs, strict=True)}

    def close(self) -> None:
        """Drop the session."""
        self._session = None

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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
