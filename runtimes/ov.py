"""OpenVINO on CPU, GPU or NPU: reads its own IR and ONNX files."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure, UsageError, last_line
from edgevit.specs import OperatorTime, TensorSpec

from .ov_products import TYPES, executed, operators, products, share_in_int8, shared_out

# Our word: OpenVINO's. What an int8 model has in float stays float32, so that int8 is all that it loses.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
# Our word: what a device lists among its capabilities.
ARITHMETIC = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}
WARMUP_RUNS = 2  # before a profile: the first run allocates, the second has been seen to be slow still


@dataclass(frozen=True)
class OvOptions:
    """`device` is CPU, NPU, GPU, or one of several as GPU.1; `streams` inferences share the threads.

    "throughput" suits many inferences at a time; one at a time, as `run` does it, is slower with it. `cache_dir` keeps
    compiled models, so that the next load is faster; who can write there decides what is run.
    """

    device: str = "CPU"
    hint: Literal["latency", "throughput"] = "latency"
    streams: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(CPU|GPU|NPU)(\.[0-9]{1,2})?", self.device):
            raise UsageError(f"option device={self.device}: expected CPU, GPU or NPU, or one of several as GPU.1")
        if self.streams is not None and self.streams < 1:
            raise UsageError(f"option streams={self.streams}: expected a whole number above 0")


class OvRuntime:
    """Runs `path` in `precision` with `threads` threads (None: OpenVINO's choice), one inference after the other.

    Left alone, OpenVINO computes float32 models in bfloat16 on processors that have it; the precision is always set and
    read back. Where a device has no float16 arithmetic, a float16 model is computed in float32.
    """

    name = "ov"
    OPTIONS = OvOptions

    def __init__(
        self, path: Path, threads: int | None = None, precision: str = "fp32", options: OvOptions | None = None
    ) -> None:
        self.path = path
        self.threads = threads
        self.precision = precision
        self.asked_precision = precision
        self.options = options or OvOptions()
        self._model: ov.CompiledModel | None = None
        self._request: ov.InferRequest | None = None
        self._int8_share: float | None = None

    @classmethod
    def obstacle(cls) -> str | None:
        """Why OpenVINO runs nothing here, or None: its CPU plugin needs no driver."""
        devices = ov.Core().available_devices
        return None if devices else "OpenVINO finds no device; install the openvino package for this processor"

    def load(self) -> None:
        """Read the model and compile it for the device; nothing else is done with it."""
        core = self._core()
        self.asked_precision = _computed_in(core, self.options.device, self.precision)
        self._model = self._compile(core, self._read(core), {})
        self._request = self._model.create_infer_request()

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
        """What the compiled model says it computes in; "int8" where its executed graph has products in int8.

        Those are looked for when first asked for, not while loading, whose time and memory are OpenVINO's own.
        """
        if self.asked_precision == "int8" and self._share_in_int8() > 0:
            return "int8"
        kind: str = self._loaded().get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return TYPES.get(kind, kind)

    def describe(self) -> dict[str, Any]:
        """Version, device and how it was set up, as the compiled model has it; None where its device has no such."""
        model, device = self._loaded(), self.options.device

        def effective(name: str) -> Any:
            return model.get_property(name) if name in model.get_property("SUPPORTED_PROPERTIES") else None

        hint = effective("PERFORMANCE_HINT")
        return {
            "runtime": "openvino",
            "version": ov.get_version(),
            "providers": list(model.get_property("EXECUTION_DEVICES")),
            "device": str(ov.Core().get_property(device, "FULL_DEVICE_NAME")).strip(),
            "threads": effective("INFERENCE_NUM_THREADS"),
            "streams": effective("NUM_STREAMS"),
            "hint": None if hint is None else str(getattr(hint, "name", hint)).lower(),
            "precision": self.effective_precision,
            "model_precision": self.precision,
            "float_precision": str(effective("INFERENCE_PRECISION_HINT").get_type_name()),
            "int8_share": self._share_in_int8() if self.precision == "int8" else None,
            "cache_dir": self.options.cache_dir,
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        if self._request is None:
            raise RuntimeFailure(f"{self.path}: the OpenVINO model is not loaded")
        return self._asked(self._request, inputs)

    def lane(self) -> Callable[[Arrays], dict[str, NDArray[Any]]]:
        """A request of its own: as many run at once as there are `streams`, the others wait for one."""
        request = self._loaded().create_infer_request()
        return lambda inputs: self._asked(request, inputs)

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """What each executed operator took, the median of `runs`, and the precision of the executed graph.

        With `runs` 0 the loaded model tells its operators without times; otherwise one that counts is compiled anew,
        for counting takes time itself.
        """
        model, times = self._loaded(), dict[str, list[float]]()
        core = self._core()
        read = self._read(core)
        if runs:
            model = self._compile(core, read, {"PERF_COUNT": True, "CACHE_DIR": ""})
            request = model.create_infer_request()
            for index in range(WARMUP_RUNS + runs):
                self._infer(request, inputs)
                for entry in request.get_profiling_info() if index >= WARMUP_RUNS else ():
                    if entry.status == ov.ProfilingInfo.Status.EXECUTED:
                        times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1000)
        ops = executed(self._graph(model))
        costs = shared_out(products(read, {name: array.shape for name, array in inputs.items()}), ops)
        timed = [(op, times.get(op.get_friendly_name())) for op in ops]
        return tuple(
            operator
            for op, times_ms in timed
            if times_ms or not runs or costs[op.get_friendly_name()].macs  # the rest is done in place, as a Reshape is
            for operator in operators(op, statistics.median(times_ms) if times_ms else 0.0, costs)
        )

    def _graph(self, model: ov.CompiledModel) -> ov.Model:
        """What OpenVINO made of the model."""
        return _guarded(f"{self.path}: OpenVINO on {self.options.device} tells no profile", model.get_runtime_model)

    def close(self) -> None:
        """Drop the request and the model."""
        self._request = None
        self._model = None

    def _core(self) -> ov.Core:
        """OpenVINO with the device that was chosen."""
        core, device = ov.Core(), self.options.device
        known = core.available_devices
        kind = device.removesuffix(".0")  # the first of a kind goes by both names
        if not any(name.removesuffix(".0") == kind or name.split(".")[0] == device for name in known):
            raise RuntimeFailure(
                f"{self.path}: OpenVINO has no device {device} on this machine; it has {', '.join(known) or 'none'}: "
                "choose one with --runtime-option device=..., or install the device's driver"
            )
        return core

    def _read(self, core: ov.Core) -> ov.Model:
        if self.path.suffix == ".xml" and not self.path.with_suffix(".bin").is_file():
            raise RuntimeFailure(
                f"{self.path}: its weights {self.path.with_suffix('.bin').name} are missing; keep both files together"
            )
        return _guarded(f"{self.path}: OpenVINO cannot load it", lambda: core.read_model(self.path))

    def _compile(self, core: ov.Core, model: ov.Model, more: dict[str, Any]) -> ov.CompiledModel:
        options = self.options
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.asked_precision],
            "PERFORMANCE_HINT": options.hint.upper(),
        }
        if options.device.startswith("CPU") and self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        if options.streams is not None or (options.hint == "latency" and options.device.startswith("CPU")):
            settings["NUM_STREAMS"] = options.streams or 1
        if options.cache_dir is not None:
            settings["CACHE_DIR"] = _directory(options.cache_dir)
        where = f"{self.path}: OpenVINO cannot compile it for {options.device}"
        return _guarded(where, lambda: core.compile_model(model, options.device, settings | more))

    def _asked(self, request: ov.InferRequest, inputs: Arrays) -> dict[str, NDArray[Any]]:
        results = self._infer(request, inputs)
        return {port.any_name: np.array(results[port]) for port in self._loaded().outputs}  # copied: the request's own

    def _share_in_int8(self) -> float:
        """The share of the products' multiply-accumulates that the executed graph does in int8, found out once."""
        if self._int8_share is None:
            shapes = {spec.name: [side if isinstance(side, int) else 1 for side in spec.shape] for spec in self.inputs}
            self._int8_share = share_in_int8(self._read(self._core()), shapes, self._graph(self._loaded()))
        return self._int8_share

    def _infer(self, request: ov.InferRequest, inputs: Arrays) -> Any:
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        return _guarded(f"{self.path}: OpenVINO failed", lambda: request.infer(feed))

    def _loaded(self) -> ov.CompiledModel:
        if self._model is None:
            raise RuntimeFailure(f"{self.path}: the OpenVINO model is not loaded")
        return self._model


T = TypeVar("T")


def _guarded(where: str, call: Callable[[], T]) -> T:
    """What `call` returns; what OpenVINO raises as one line."""
    try:
        return call()
    except RuntimeError as error:
        raise RuntimeFailure(f"{where}: {last_line(error)}") from error


def _computed_in(core: ov.Core, device: str, precision: str) -> str:
    """What a model of this precision is computed in on a device: float16 falls back to float32.

    Raises:
        RuntimeFailure: the device has no such arithmetic.
    """
    known = list(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    if ARITHMETIC[precision] in known:
        return precision
    if precision == "fp16" and "FP32" in known:
        return "fp32"
    offered = [name for name, listed in ARITHMETIC.items() if listed in known and name != "int8"]
    raise RuntimeFailure(
        f"OpenVINO on {device}: it has no {precision} arithmetic, only {', '.join(offered) or 'integers'}; "
        f"run the model elsewhere, or export it with --precision {offered[0] if offered else 'int8'}"
    )


def _directory(path: str) -> str:
    """A directory for compiled models, made if need be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeFailure(
            f"option cache_dir={path}: expected a directory that can be written ({error.strerror}); choose another"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise RuntimeFailure(f"option cache_dir={path}: expected a directory that can be written; choose another")
    return path


def _spec(port: Any) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else "batch" for d in port.partial_shape)
    return TensorSpec(port.any_name, shape, port.element_type.to_dtype().name)
