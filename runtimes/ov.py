"""OpenVINO on CPU, GPU or NPU: reads its own IR and ONNX files."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure, UsageError, last_line
from edgevit.specs import OperatorTime, TensorSpec

TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}  # OpenVINO's word: ours
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # our word: OpenVINO's
ARITHMETIC = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}  # our word: what a device lists among its capabilities
WARMUP_RUNS = 2  # before a profile: the first run allocates, the second has been seen to be slow still
DERIVED = "/WithoutBiases"  # on the product of a node with a bias; the executed graph has the node's own name
NO_WORK = {"Const", "Input", "Output"}  # kinds of the executed graph that compute nothing


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

    @classmethod
    def obstacle(cls) -> str | None:
        """Why OpenVINO runs nothing here, or None: its CPU plugin needs no driver."""
        devices = ov.Core().available_devices
        return None if devices else "OpenVINO finds no device; install the openvino package for this processor"

    def load(self) -> None:
        """Read the model and compile it for the device."""
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
        """What the compiled model says it computes in."""
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
            "cache_dir": self.options.cache_dir,
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        if self._request is None:
            raise RuntimeFailure(f"{self.path}: the OpenVINO model is not loaded")
        results = self._infer(self._request, inputs)
        return {port.any_name: np.array(results[port]) for port in self._loaded().outputs}  # copied: the request's own

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
        graph = _guarded(f"{self.path}: OpenVINO on {self.options.device} tells no profile", model.get_runtime_model)
        ops = [op for op in graph.get_ordered_ops() if _text(op, "layerType") not in NO_WORK]
        macs = _shared_out(_products(read, {name: array.shape for name, array in inputs.items()}), ops)
        timed = [(op, times.get(op.get_friendly_name())) for op in ops]
        return tuple(
            OperatorTime(
                name=op.get_friendly_name().removesuffix(DERIVED),
                kind=_text(op, "layerType"),
                precision=_precision(op),
                time_ms=statistics.median(times_ms) if times_ms else 0.0,
                origins=tuple(dict.fromkeys(origin.removesuffix(DERIVED) for origin in _origins(op))),
                macs=macs[op.get_friendly_name()],
            )
            for op, times_ms in timed
            if times_ms or not runs or macs[op.get_friendly_name()]  # the rest is done in place, as a Reshape is
        )

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
    offered = [name for name, listed in ARITHMETIC.items() if listed in known]
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


def _products(model: ov.Model, shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, list[str]]]:
    """Each product's multiply-accumulates for inputs of these shapes, and the names that it may be executed under.

    A product that was fused with what follows is executed under its own name, the node's without the addition, or that
    of the addition, perhaps of a scaled product, perhaps of the conversion of what comes out.
    """
    if model.is_dynamic():
        model.reshape({name: list(shape) for name, shape in shapes.items()})
    found = []
    for op in model.get_ordered_ops():
        if cost := _macs(op):
            name = op.get_friendly_name()
            readers = _readers(op)
            readers += [
                after for reader in readers if reader.get_type_name() == "Multiply" for after in _readers(reader)
            ]
            readers += [
                after for one in (op, *readers) for after in _readers(one) if after.get_type_name() == "Convert"
            ]
            names = [name, name.removesuffix(DERIVED), *(reader.get_friendly_name() for reader in readers)]
            found.append((cost, names))
    return found


def _readers(op: Any) -> list[Any]:
    return [port.get_node() for port in op.output(0).get_target_inputs()]


def _shared_out(products: Sequence[tuple[int, list[str]]], executed: Sequence[Any]) -> Counter[str]:
    """The products' multiply-accumulates by the name of the executed node that each went into."""
    runs_as: dict[str, str] = {}
    for op in executed:
        for origin in _origins(op):
            runs_as.setdefault(origin, op.get_friendly_name())
    macs = Counter[str]()
    for cost, names in products:
        for name in [name for name in names if name in runs_as][:1]:
            macs[runs_as[name]] += cost
    return macs


def _origins(op: Any) -> list[str]:
    """The model's nodes that an executed node stands for."""
    return [name for name in _text(op, "originalLayersNames").split(",") if name]


def _macs(op: Any) -> int:
    kind = op.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention"):
        return 0
    shapes = [[int(side) for side in port.get_shape()] for port in (op.input(0), op.input(1), op.output(0))]
    first, second, out = shapes
    if kind == "MatMul":  # a row of the first for each element that comes out
        return math.prod(out) * first[-2 if op.get_attributes()["transpose_a"] else -1]
    if kind == "ScaledDotProductAttention":  # q . k for each query and key, then weights . v
        return (math.prod(first) + math.prod(out)) * second[-2]
    return math.prod(out) * math.prod(second[1 if kind == "Convolution" else 2 :])  # o i h w, or g o i h w


def _precision(op: Any) -> str:
    """The type of the data that a kernel takes, the last word of its name: "brgemm_avx512_amx_bf16".

    The node's own `runtimePrecision` says f16 of a float32 product whose weights are stored in float16.
    """
    suffix = _text(op, "primitiveType").rpartition("_")[2].lower()
    kind = suffix if suffix in TYPES else _text(op, "runtimePrecision")
    return TYPES.get(kind, kind)


def _text(op: Any, key: str) -> str:
    """One entry of what the executed graph says of a node, "" where it says nothing; OpenVINO wraps some texts."""
    info = op.get_rt_info()
    value = info[key] if key in info else ""  # noqa: SIM401  # its map has no get
    return str(value if isinstance(value, str) else value.astype(str))


def _spec(port: Any) -> TensorSpec:
    shape = tuple(d.get_length() if d.is_static else "batch" for d in port.partial_shape)
    return TensorSpec(port.any_name, shape, port.element_type.to_dtype().name)
