"""TensorRT engines on an NVIDIA GPU, by TensorRT or TensorRT for RTX, whichever built the engine.

An engine holds native code that the GPU, and with some options the host, executes: NVIDIA warns never to load one from
a source that is not trusted. edgevit checks an artifact's sha256 first, which shows that it is the file that its
manifest names, not that the manifest's author means well.

Written against NVIDIA's documented API and checked against the names in its real bindings. The project's own machines
have no GPU: what runs on one is in the tests marked `gpu`.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.contracts import Arrays
from edgevit.engine_layers import EngineLayer, read_layer
from edgevit.errors import RuntimeFailure, first_line
from edgevit.specs import OperatorTime, TensorSpec

from .device_memory import Device, empty, open_driver

LIBRARIES = ("tensorrt", "tensorrt_rtx")  # the order in which an engine is offered to them
INSTALL = "pip install 'edgevit[tensorrt]'"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8", "BOOL": "bool"}
WARM_UP = 3  # runs before a profile: the first ones load kernels


@dataclass(frozen=True)
class TrtOptions:
    """What the runtime takes beside; device: number of the GPU, as nvidia-smi counts them."""

    device: int = 0


class TrtRuntime:
    """Runs the engine at `path`; `threads` has no meaning on a GPU."""

    name = "trt"
    OPTIONS = TrtOptions

    def __init__(
        self, path: Path, threads: int | None = None, precision: str = "fp32", options: TrtOptions | None = None
    ) -> None:
        self.path = path
        self.threads = threads
        self.asked_precision = precision
        self.options = options or TrtOptions()
        self._trt: Any = None
        self._reader: Any = None  # its library's Runtime, which has to outlive the engine
        self._engine: Any = None
        self._context: Any = None
        self._device: Device | None = None
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor: address, bytes
        self._layers: tuple[EngineLayer, ...] = ()

    @classmethod
    def obstacle(cls) -> str | None:
        """What is missing here: the driver, a GPU, or the library."""
        try:
            open_driver()
        except RuntimeFailure as error:
            return str(error)
        return None if _libraries() else f"neither tensorrt nor tensorrt-rtx can be imported: {INSTALL}"

    def load(self) -> None:
        """Take the GPU and deserialise the engine with the first library that reads it."""
        libraries = _libraries()
        if not libraries:
            raise RuntimeFailure(f"{self.path}: neither tensorrt nor tensorrt-rtx can be imported: {INSTALL}")
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise RuntimeFailure(f"{self.path}: cannot be read: {error.strerror}; check the path") from error
        self._device = Device(self.options.device)
        try:
            self._trt, self._reader, self._engine = _deserialise(libraries, data, self.path)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise RuntimeFailure(f"{self.path}: TensorRT makes no execution context; is the GPU's memory full?")
            self._layers = _layers(self._engine, self._trt)
        except RuntimeFailure:
            self.close()
            raise

    @property
    def inputs(self) -> list[TensorSpec]:
        """The engine's inputs; a dynamic dimension may be as long as the profile it was built with allows."""
        return self._tensors(self._loaded().TensorIOMode.INPUT)

    @property
    def outputs(self) -> list[TensorSpec]:
        """The engine's outputs."""
        return self._tensors(self._loaded().TensorIOMode.OUTPUT)

    @property
    def effective_precision(self) -> str:
        """The precision in which most of the engine's products run, from its own layer information.

        An engine asked to be int8 is that where any product is: which ones stay float16 is the exporter's affair.
        """
        kinds = Counter(layer.precision or "unknown" for layer in self._layers if layer.product)
        if self.asked_precision == "int8" and kinds["int8"]:
            return "int8"
        found = max(sorted(kinds), key=lambda kind: kinds[kind], default="unknown")
        if found == "unknown":
            raise RuntimeFailure(
                f"{self.path}: the engine does not say what its layers compute in; build it with detailed profiling "
                "verbosity, as edgevit export and build.sh do"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """Library, version and GPU."""
        trt = self._loaded()
        name = self._device.name if self._device is not None else ""
        return {"runtime": trt.__name__, "version": trt.__version__, "providers": [name], "threads": None}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; copies to the GPU and back are part of it.

        Raises:
            RuntimeFailure: a batch beyond the engine's profile, or TensorRT or the driver failed.
        """
        trt, device = self._loaded(), self._device
        if device is None:
            raise RuntimeFailure(f"{self.path}: the engine is not loaded")
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in arrays.items():
            self._shape_input(name, array.shape)
            device.upload(self._buffer(name, array.nbytes), array)
        outputs = {}
        for spec in self._tensors(trt.TensorIOMode.OUTPUT):
            outputs[spec.name] = empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            self._buffer(spec.name, outputs[spec.name].nbytes)
        if not self._context.execute_async_v3(device.stream):
            raise RuntimeFailure(f"{self.path}: TensorRT failed to run it; see nvidia-smi for memory and errors")
        for name, array in outputs.items():
            device.download(self._buffers[name][0], array)
        device.synchronize()
        return outputs

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """Median times of the engine's layers; their sum exceeds the latency, for each is timed by itself.

        Layers that TensorRT does not time, and all where `runs` is 0, have 0.

        Raises:
            RuntimeFailure: see `run`.
        """
        timed = self._timed(inputs, runs) if runs else []
        names = dict.fromkeys(name for run in timed for name in run)
        spent = {name: median(run.get(name, 0.0) for run in timed) for name in names}
        layers = [(layer, spent.pop(layer.name, 0.0)) for layer in self._layers]
        layers += [(EngineLayer(name, "unknown"), time_ms) for name, time_ms in spent.items()]
        return tuple(
            OperatorTime(layer.name, layer.kind or "unknown", layer.precision or "unknown", time_ms, layer.origins)
            for layer, time_ms in layers
        )

    def _timed(self, inputs: Arrays, runs: int) -> list[dict[str, float]]:
        """What each layer took in each run, in ms."""
        trt = self._loaded()
        for _ in range(WARM_UP):
            self.run(inputs)
        timed: list[dict[str, float]] = []

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]  # the class is known only when the library is
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                timed[-1][layer_name] = timed[-1].get(layer_name, 0.0) + ms

        self._context.profiler = Profiler()
        try:
            for _ in range(runs):
                timed.append({})
                self.run(inputs)
        finally:
            self._context.profiler = None
        return timed

    def close(self) -> None:
        """Drop context and engine, then the memory they used."""
        self._context = None
        self._engine = None
        self._reader = self._trt = None
        self._buffers.clear()
        if self._device is not None:
            self._device.close()
            self._device = None

    def _shape_input(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, 0))
        if not all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True)):
            raise RuntimeFailure(
                f"{self.path}: input {name} has shape {'x'.join(map(str, shape))}, the engine takes "
                f"{'x'.join(map(str, low))} to {'x'.join(map(str, high))}; export again with --option max_batch"
            )
        if not self._context.set_input_shape(name, shape):
            raise RuntimeFailure(f"{self.path}: TensorRT refuses shape {'x'.join(map(str, shape))} for input {name}")

    def _buffer(self, name: str, size: int) -> int:
        """The tensor's GPU memory, made anew where it has become too small, and made known to the context."""
        address, there = self._buffers.get(name, (0, -1))
        if self._device is not None and there < size:
            if there >= 0:
                self._device.free(self._buffers.pop(name)[0])
            address = self._device.allocate(size)
            self._buffers[name] = (address, size)
            if not self._context.set_tensor_address(name, address):
                raise RuntimeFailure(f"{self.path}: TensorRT refuses the memory for {name}; please report the model")
        return address

    def _tensors(self, mode: Any) -> list[TensorSpec]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [self._spec(name) for name in names if self._engine.get_tensor_mode(name) == mode]

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(int(d) if d >= 0 else "batch" for d in self._engine.get_tensor_shape(name))
        kind = self._engine.get_tensor_dtype(name).name
        return TensorSpec(name, shape, DTYPES.get(kind, kind.lower()), "NCHW" if len(shape) == 4 else "")

    def _loaded(self) -> Any:
        if self._context is None:
            raise RuntimeFailure(f"{self.path}: the engine is not loaded")
        return self._trt


def _libraries() -> list[Any]:
    """Those of the two libraries that can be imported here; one without its native parts cannot."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(importlib.import_module(name))
        except (ImportError, OSError):  # OSError: its shared libraries are for another machine
            continue
    return found


def _deserialise(libraries: list[Any], data: bytes, path: Path) -> tuple[Any, Any, Any]:
    """The library that reads the engine, its Runtime, and the engine.

    Raises:
        RuntimeFailure: none does; says what each of them answers.
    """
    answers = []
    for trt in libraries:
        messages: list[str] = []

        class Listener(trt.ILogger):  # type: ignore[misc, name-defined]  # the class is known only when the library is
            def __init__(self, library: Any, said: list[str]) -> None:
                library.ILogger.__init__(self)
                self.said, self.bad = said, (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR)

            def log(self, severity: Any, message: str) -> None:
                if severity in self.bad:
                    self.said.append(" ".join(message.split()))

        try:
            reader = trt.Runtime(Listener(trt, messages))
            engine = reader.deserialize_cuda_engine(data)
        except Exception as error:  # pybind reports a failed constructor as a TypeError
            engine, messages = None, [*messages, f"{type(error).__name__}: {first_line(error)}"]
        if engine is not None:
            return trt, reader, engine
        answers.append(f"{trt.__name__} {trt.__version__}: {(messages or ['no reason given'])[0]}")
    raise RuntimeFailure(
        f"{path}: no engine for this machine: {'; '.join(answers)}; an engine runs on the GPUs and the version of "
        "TensorRT that it was built for: build it again from model.onnx"
    )


def _layers(engine: Any, trt: Any) -> tuple[EngineLayer, ...]:
    """The engine's layers as its inspector describes them; none where it was built without the details."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return read_layers(text)


def read_layers(text: str) -> tuple[EngineLayer, ...]:
    """Layers from the inspector's JSON; a stranger's engine may tell anything."""
    try:
        found = json.loads(text, strict=False)  # names and metadata hold control characters as they are
    except (ValueError, RecursionError):
        return ()
    keys = {key.lower(): value for key, value in found.items()} if isinstance(found, dict) else {}
    rows = keys.get("layers")
    return tuple(read_layer(row) for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()
