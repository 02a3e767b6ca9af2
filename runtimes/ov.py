"""OpenVINO on the CPU: reads ONNX files and its own IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure
from edgevit.specs import TensorSpec

DEVICE = "CPU"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class OvRuntime:
    """Runs `path` in float32 with `threads` threads (None: OpenVINO's choice), one picture after the other.

    Left alone, OpenVINO computes float32 models in bfloat16 on processors that have it; the precision is set and read
    back.
    """

    name = "ov"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        self.threads = threads
        self._model: ov.CompiledModel | None = None
        self._request: ov.InferRequest | None = None

    def load(self) -> None:
        """Read and compile the model for latency: one stream."""
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        try:
            core = ov.Core()
            self._model = core.compile_model(core.read_model(self.path), DEVICE, settings)
            self._request = self._model.create_infer_request()
        except RuntimeError as error:
            raise RuntimeFailure(f"{self.path}: OpenVINO cannot load it: {_last_line(error)}") from error

    @property
    def inputs(self) -> list[TensorSpec]:
        """The model's inputs."""
        return [_spec(port) for port in self._loaded().inputs]

    @property
    def outputs(self) -> list[TensorSpec]:
        """The model's outputs."""
        return [_spec(port) for port in self._loaded().outputs]

    @property
    def effective_precision(self) -> str:
        """What the compiled model says it computes in."""
        kind: str = self._loaded().get_property("INFERENCE_PRECISION_HINT").to_dtype().name
        return PRECISIONS.get(kind, kind)

    def describe(self) -> dict[str, Any]:
        """Version, device and threads."""
        model = self._loaded()
        return {
            "runtime": "openvino",
            "version": ov.get_version(),
            "providers": list(model.get_property("EXECUTION_DEVICES")),
            "threads": model.get_property("INFERENCE_NUM_THREADS"),
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        model = self._loaded()
        if self._request is None:
            raise RuntimeFailure(f"{self.path}: the OpenVINO model is not loaded")
        try:
            results = self._request.infer({name: np.ascontiguousarray(array) for name, array in inputs.items()})
        except RuntimeError as error:
            raise RuntimeFailure(f"{self.path}: OpenVINO failed: {_last_line(error)}") from error
        return {port.any_name: np.array(results[port]) for port in model.outputs}  # copied: the request owns them

    def close(self) -> None:
        """Drop the request and the model."""
        self._request = None
        self._model = None

    def _loaded(self) -> ov.CompiledModel:
        if self._model is None:
            raise RuntimeFailure(f"{self.path}: the OpenVINO model is not loaded")
        return self._model


def _spec(port: Any) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else "batch" for d in port.partial_shape)
    return TensorSpec(port.any_name, shape, port.element_type.to_dtype().name)


def _last_line(error: Exception) -> str:
    """OpenVINO puts the files and lines of its own sources first and the reason last."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
