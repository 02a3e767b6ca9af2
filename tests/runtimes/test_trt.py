"""The TensorRT runtime: its logic on a stand-in library and GPU, its names against the real bindings, a real GPU."""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import json
import sys
import types
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session, device_memory, trt
from edgevit.runtimes.device_memory import Device
from edgevit.runtimes.trt import TrtOptions, TrtRuntime, read_layers

# ---- a stand-in for the driver: memory is memory of this process


class Driver:
    """The functions of libcuda that `Device` calls, on host memory; `fails` maps one to the code that it returns."""

    def __init__(self, gpus: int = 1, **fails: int) -> None:
        self.gpus, self.fails = gpus, fails
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.fails.get(name) or getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0

        return call

    def _cuDeviceGetCount(self, out: Any) -> None:  # noqa: N802  # the driver's own name, here and below
        out._obj.value = self.gpus

    def _cuStreamCreate(self, out: Any, _: int) -> None:  # noqa: N802  # see above
        out._obj.value = 77

    def _cuDeviceGetName(self, out: Any, *_: Any) -> None:  # noqa: N802  # see above
        out.value = b"NVIDIA Stand-in"

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, _: Any) -> None:  # noqa: N802  # see above
        out._obj.value = {75: 8, 76: 9}[attribute]

    def _cuGetErrorString(self, code: int, out: Any) -> None:  # noqa: N802  # see above
        out._obj.value = f"error {code} in words".encode()

    def _cuMemAlloc_v2(self, out: Any, size: Any) -> None:  # noqa: N802  # see above
        block = ctypes.create_string_buffer(size.value)
        out._obj.value = ctypes.addressof(block)
        self.memory[out._obj.value] = block

    def _cuMemFree_v2(self, address: Any) -> None:  # noqa: N802  # see above
        del self.memory[address.value]

    def _cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, _: Any) -> None:  # noqa: N802  # see above
        ctypes.memmove(to.value, source, size.value)

    def _cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, _: Any) -> None:  # noqa: N802  # see above
        ctypes.memmove(to, source.value, size.value)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(device_memory.ctypes, "CDLL", lambda name: made)
    return made


# ---- a stand-in for TensorRT: an engine that doubles its input

LAYERS_11 = [
    {"Name": "gemm_1", "LayerType": "gemm", "Inputs": [{"Name": "x", "Datatype": "Half", "Format": "Row major"}],
     "Metadata": "[ONNX Layer: node_linear]\x1f[ONNX Layer: node_view]"},
    {"Name": "norm", "LayerType": "kgen", "Inputs": [{"Name": "y", "Datatype": "Float"}], "Metadata": ""},
]  # fmt: skip


class Enum:
    """Like a pybind enumeration's member."""

    def __init__(self, name: str) -> None:
        self.name = name


class Named:
    """`Named.ANY` is a member of that name, one object each."""

    def __init__(self, *names: str) -> None:
        for name in names:
            setattr(self, name, Enum(name))


class Library(types.ModuleType):
    """A module like tensorrt; `reads` are the engine files that it takes, `batch` the profile's range."""

    def __init__(self, name: str = "tensorrt", reads: tuple[bytes, ...] = (b"engine",), **behaviour: Any) -> None:
        super().__init__(name)
        self.__version__ = "10.3.0"
        self.reads, self.behaviour, self.contexts = reads, behaviour, list[Any]()
        self.TensorIOMode = Named("INPUT", "OUTPUT", "NONE")
        self.LayerInformationFormat = Named("JSON", "ONELINE")
        self.FLOAT, library = Enum("FLOAT"), self

        class ILogger:
            ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"

        class IProfiler:
            pass

        class Runtime:
            def __init__(self, logger: Any) -> None:
                if behaviour.get("no_gpu"):
                    logger.log(ILogger.ERROR, "CUDA initialization failure\nwith error: 35")
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                self.logger.log(ILogger.WARNING, "chatter")
                if data not in reads:
                    self.logger.log(ILogger.ERROR, "Version tag does not\n match. Note: Current Version: 228")
                    return None
                return Engine(library)

        self.ILogger, self.IProfiler, self.Runtime = ILogger, IProfiler, Runtime


class Engine:
    num_io_tensors = 2

    def __init__(self, library: Library) -> None:
        self.library = library
        self.low, self.high = library.behaviour.get("batch", (1, 1))

    def get_tensor_name(self, index: int) -> str:
        return ("image", "logits")[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.library.TensorIOMode
        return modes.INPUT if name == "image" else modes.OUTPUT

    def get_tensor_dtype(self, _: str) -> Any:
        return self.library.FLOAT

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return (self.low if self.low == self.high else -1, 2)

    def get_tensor_profile_shape(self, *_: Any) -> list[tuple[int, ...]]:
        return [(self.low, 2), (self.low, 2), (self.high, 2)]

    def create_engine_inspector(self) -> Any:
        layers = self.library.behaviour.get("layers", LAYERS_11)
        text = layers if isinstance(layers, str) else json.dumps({"Layers": layers, "I/O Tensors": []})
        return types.SimpleNamespace(get_engine_information=lambda form: text)

    def create_execution_context(self) -> Any:
        if self.library.behaviour.get("no_memory"):
            return None
        self.library.contexts.append(Context(self.library))
        return self.library.contexts[-1]


class Context:
    def __init__(self, library: Library) -> None:
        self.library, self.shapes, self.addresses = library, dict[str, Any](), dict[str, int]()
        self.profiler: Any = None
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return not self.library.behaviour.get("no_shape")

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return self.shapes["image"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return not self.library.behaviour.get("no_address")

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        count = int(np.prod(self.shapes["image"]))
        values = [(ctypes.c_float * count).from_address(self.addresses[name]) for name in ("image", "logits")]
        for index in range(count):
            values[1][index] = 2 * values[0][index]
        if self.profiler is not None:
            self.profiler.report_layer_time("gemm_1", 0.5)
            self.profiler.report_layer_time("extra", 0.25)
        return not self.library.behaviour.get("fails")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    (tmp_path / "model.engine").write_bytes(b"engine")
    return tmp_path / "model.engine"


def use(monkeypatch: pytest.MonkeyPatch, *libraries: Library) -> None:
    monkeypatch.setattr(trt, "_libraries", lambda: list(libraries))


ONE = {"image": np.array([[1.5, -2.0]], np.float32)}


# ---- load, run, close


def test_it_runs_an_engine_and_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, engine: Path
) -> None:
    library = Library()
    use(monkeypatch, library)
    runtime = TrtRuntime(engine, None, "fp16")
    with Session(runtime) as session:
        first = session.run(ONE)["logits"]
        second = session.run({"image": ONE["image"] * 10})["logits"]
        assert [(s.name, s.shape, s.dtype) for s in (*runtime.inputs, *runtime.outputs)] == [
            ("image", (1, 2), "float32"),
            ("logits", (1, 2), "float32"),
        ]
        assert runtime.effective_precision == runtime.asked_precision == "fp16"
        described = runtime.describe()
        assert described["version"] == "10.3.0" and described["providers"] == ["NVIDIA Stand-in (sm89)"]
    np.testing.assert_array_equal(first, [[3, -4]])  # and the second run did not overwrite it
    np.testing.assert_array_equal(second, [[30, -40]])
    assert driver.memory == {} and driver.calls.count("cuMemAlloc_v2") == 2  # one for each tensor, used again
    assert library.contexts[0].streams == [77, 77]
    assert driver.calls[-2:] == ["cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]
    runtime.close()  # may be called twice
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime.run(ONE)


def test_a_dynamic_batch_runs_within_its_profile(monkeypatch: pytest.MonkeyPatch, driver: Driver, engine: Path) -> None:
    use(monkeypatch, Library(batch=(1, 4)))
    with Session(TrtRuntime(engine, None, "fp16")) as session:
        assert session.runtime.inputs[0].shape == ("batch", 2)
        for count in (1, 4, 2):
            images = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
            np.testing.assert_array_equal(session.run({"image": images})["logits"], 2 * images)
        with pytest.raises(RuntimeFailure, match="input image has shape 5x2, the engine takes 1x2 to 4x2"):
            session.run({"image": np.zeros((5, 2), np.float32)})
    assert driver.memory == {}


@pytest.mark.usefixtures("driver")
def test_an_input_that_is_not_contiguous_is_copied_right(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    use(monkeypatch, Library(batch=(1, 4)))
    images = np.arange(8, dtype=np.float32).reshape(2, 4).T[:, ::-1]  # 4 2, both axes turned
    with Session(TrtRuntime(engine)) as session:
        np.testing.assert_array_equal(session.run({"image": images})["logits"], 2 * images)


@pytest.mark.usefixtures("driver")
def test_the_second_library_reads_what_the_first_does_not(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    use(monkeypatch, Library(reads=()), Library("tensorrt_rtx"))
    with Session(TrtRuntime(engine)) as session:
        assert session.runtime.describe()["runtime"] == "tensorrt_rtx"


def test_an_engine_of_another_version_is_one_line(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, engine: Path
) -> None:
    use(monkeypatch, Library(reads=()), Library("tensorrt_rtx", no_gpu=True))
    with pytest.raises(RuntimeFailure) as caught:
        TrtRuntime(engine).load()
    text = str(caught.value)
    assert "\n" not in text and "build it again from model.onnx" in text
    assert "tensorrt 10.3.0: Version tag does not match. Note: Current Version: 228" in text
    assert "tensorrt_rtx 10.3.0: CUDA initialization failure with error: 35" in text
    assert driver.memory == {} and driver.calls[-1] == "cuDevicePrimaryCtxRelease_v2"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"no_memory": True}, "makes no execution context"),
        ({"no_shape": True}, "refuses shape 1x2 for input image"),
        ({"no_address": True}, "refuses the memory for image"),
        ({"fails": True}, "TensorRT failed to run it"),
    ],
)
def test_what_tensorrt_refuses_is_an_error(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, engine: Path, behaviour: dict[str, bool], message: str
) -> None:
    use(monkeypatch, Library(**behaviour))
    with pytest.raises(RuntimeFailure, match=message), Session(TrtRuntime(engine)) as session:
        session.run(ONE)
    assert driver.memory == {}


def test_no_library_a_missing_file_and_no_gpu_are_errors(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, engine: Path
) -> None:
    use(monkeypatch, Library())
    with pytest.raises(RuntimeFailure, match=r"none\.engine: cannot be read: No such file"):
        TrtRuntime(engine.with_name("none.engine")).load()
    driver.gpus = 0
    with pytest.raises(RuntimeFailure, match="finds no GPU"):
        TrtRuntime(engine).load()
    use(monkeypatch)
    with pytest.raises(RuntimeFailure, match=r"neither tensorrt nor tensorrt-rtx .* pip install 'edgevit\[tensorrt\]'"):
        TrtRuntime(engine).load()


def test_an_obstacle_is_named_or_there_is_none(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    use(monkeypatch, Library())
    assert TrtRuntime.obstacle() is None
    use(monkeypatch)
    assert "pip install 'edgevit[tensorrt]'" in str(TrtRuntime.obstacle())
    driver.fails["cuInit"] = 100
    assert "does not start (CUDA error 100)" in str(TrtRuntime.obstacle())

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device_memory.ctypes, "CDLL", missing)
    assert "no NVIDIA driver" in str(TrtRuntime.obstacle())


def test_a_library_without_its_native_parts_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.10: cannot open shared object file")
        return sys

    monkeypatch.setattr(trt.importlib, "import_module", broken)
    assert trt._libraries() == [sys]


# ---- profile and precision


@pytest.mark.usefixtures("driver")
def test_a_profile_has_time_for_one_run_and_the_nodes_of_each_layer(
    monkeypatch: pytest.MonkeyPatch, engine: Path
) -> None:
    library = Library()
    use(monkeypatch, library)
    with Session(TrtRuntime(engine, None, "fp16")) as session:
        first, untimed, other = session.runtime.profile(ONE, 10)
    assert (first.name, first.kind, first.precision, first.time_ms) == ("gemm_1", "gemm", "fp16", 0.5)
    assert first.origins == ("node_linear", "node_view")
    assert (untimed.name, untimed.time_ms) == ("norm", 0.0)
    assert (other.name, other.kind, other.time_ms) == ("extra", "unknown", 0.25)
    assert len(library.contexts[0].streams) == 10 + trt.WARM_UP


@pytest.mark.usefixtures("driver")
def test_a_profile_of_no_runs_tells_the_layers_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    library = Library()
    use(monkeypatch, library)
    with Session(TrtRuntime(engine, None, "fp16")) as session:
        found = session.runtime.profile(ONE, 0)
    assert [(o.name, o.precision, o.time_ms) for o in found] == [("gemm_1", "fp16", 0.0), ("norm", "fp32", 0.0)]
    assert found[0].origins == ("node_linear", "node_view")
    assert library.contexts[0].streams == []


@pytest.mark.usefixtures("driver")
def test_a_slow_run_does_not_move_a_profile(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    times = iter([0.5, 100.0, 0.5])
    timed = Context.execute_async_v3

    def unsteady(self: Context, stream: int) -> bool:
        if self.profiler is not None:
            self.profiler.report_layer_time("norm", next(times))
        return timed(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", unsteady)
    use(monkeypatch, Library())
    with Session(TrtRuntime(engine, None, "fp16")) as session:
        assert {o.name: o.time_ms for o in session.runtime.profile(ONE, 3)}["norm"] == 0.5


@pytest.mark.usefixtures("driver")
def test_an_engine_whose_products_mostly_do_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    opaque = [{"Name": f"{{ForeignNode[a...{i}]}}", "LayerType": "Myelin", "Inputs": [{"Datatype": "Float"}]}
              for i in range(3)]  # fmt: skip
    use(monkeypatch, Library(layers=[*opaque, *LAYERS_11]))
    with Session(TrtRuntime(engine, None, "fp16")) as session:
        with pytest.raises(RuntimeFailure, match="does not say what its layers"):
            _ = session.runtime.effective_precision
        assert [o.precision for o in session.runtime.profile(ONE, 0)][:4] == ["unknown"] * 3 + ["fp16"]


def test_metadata_may_hold_control_characters_as_they_are() -> None:
    text = '{"Layers": [{"Name": "a", "LayerType": "gemm", "Metadata": "[ONNX Layer: x]\x1e[ONNX Layer: y]"}]}'
    assert read_layers(text)[0].origins == ("x", "y")


@pytest.mark.parametrize(
    "layers", ["", "not JSON", "[]", '{"Layers": 3}', '{"Layers": ["a", "b"]}', "[" * 100_000, "{}"]
)
@pytest.mark.usefixtures("driver")
def test_an_engine_that_does_not_say_its_precision_is_refused(
    monkeypatch: pytest.MonkeyPatch, engine: Path, layers: str
) -> None:
    use(monkeypatch, Library(layers=layers))
    with Session(TrtRuntime(engine)) as session, pytest.raises(RuntimeFailure, match="does not say what its layers"):
        _ = session.runtime.effective_precision


@pytest.mark.usefixtures("driver")
def test_the_precision_of_most_products_counts(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    rows = [{"Name": f"gemm_{i}", "LayerType": "gemm", "Inputs": [{"Datatype": kind}]}
            for i, kind in enumerate(("Float", "Half", "Half"))]  # fmt: skip
    use(monkeypatch, Library(layers=rows))
    with Session(TrtRuntime(engine, None, "fp16")) as session:
        assert session.runtime.effective_precision == "fp16"
        session.require_precision(engine)
    with Session(TrtRuntime(engine, None, "fp32")) as session, pytest.raises(RuntimeFailure, match="fp16"):
        session.require_precision(engine)


# ---- memory


def test_a_failing_call_is_told_in_words_and_leaves_nothing(driver: Driver) -> None:
    device = Device()
    driver.fails["cuMemAlloc_v2"] = 2
    with pytest.raises(RuntimeFailure, match=r"cuMemAlloc_v2 failed: error 2 in words \(CUDA error 2\)"):
        device.allocate(10)
    device.close()
    device.close()
    assert driver.calls.count("cuDevicePrimaryCtxRelease_v2") == 1
    driver.fails["cuStreamCreate"] = 2
    with pytest.raises(RuntimeFailure):
        Device()
    assert driver.calls[-1] == "cuDevicePrimaryCtxRelease_v2"


@pytest.mark.usefixtures("driver")
def test_a_copy_beyond_its_buffer_is_refused() -> None:
    device = Device()
    address = device.allocate(8)
    device.upload(address, np.zeros(2, np.float32))
    for array in (np.zeros(3, np.float32), np.zeros((2, 2), np.float32)[:, 0]):
        with pytest.raises(RuntimeFailure, match="bytes for a buffer of 8"):
            device.download(address, array)
    device.close()


@pytest.mark.usefixtures("driver")
def test_the_gpu_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, engine: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(trt, "Device", lambda index: asked.append(index) or Device(index))
    use(monkeypatch, Library())
    with Session(TrtRuntime(engine, options=TrtOptions(device=3))):
        assert asked == [3]


# ---- the names, against NVIDIA's own bindings

NAMES = {
    "ICudaEngine": (
        "create_engine_inspector", "create_execution_context", "get_tensor_dtype", "get_tensor_mode", "get_tensor_name",
        "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
    ),
    "IExecutionContext": ("execute_async_v3", "get_tensor_shape", "profiler", "set_input_shape", "set_tensor_address"),
    "EngineInspector": ("get_engine_information",),
    "Runtime": ("deserialize_cuda_engine",),
    "IProfiler": ("report_layer_time",),
    "ILogger": ("ERROR", "INTERNAL_ERROR", "log"),
    "LayerInformationFormat": ("JSON",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("FLOAT", "HALF", "INT32", "INT64", "INT8", "BOOL"),
}  # fmt: skip


def test_the_list_of_names_is_what_the_runtime_uses() -> None:
    """Every attribute read from the library, the engine, its context and its inspector."""
    tree = ast.parse(inspect.getsource(trt))
    owners = {"trt", "library", "_engine", "_context", "_reader", "reader", "engine"}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and getattr(node.value, "attr", getattr(node.value, "id", "")) in owners}  # fmt: skip
    used |= {"get_engine_information", "JSON", "INPUT", "OUTPUT", "ERROR", "INTERNAL_ERROR", "log", "report_layer_time"}
    listed = {*NAMES, *(name for names in NAMES.values() for name in names)}
    assert used - {"__name__", "__version__"} <= listed
    assert {name for name in listed if name not in used} <= {
        *("ICudaEngine", "IExecutionContext", "EngineInspector", "DataType"),
        *NAMES["DataType"],
    }


@pytest.mark.skipif(util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: its names unchecked")
@pytest.mark.parametrize("owner", NAMES)
def test_tensorrt_rtx_has_every_name(owner: str) -> None:
    library = importlib.import_module("tensorrt_rtx")
    missing = [name for name in NAMES[owner] if not hasattr(getattr(library, owner), name)]
    missing = [name for name in missing if (owner, name) != ("IProfiler", "report_layer_time")]  # which we define
    assert missing == []


def test_tensorrt_has_every_name() -> None:
    """Its bindings cannot be imported without its libraries; the names that they register stand in the file, some as
    the end of a longer one."""
    spec = util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt-cu13-bindings is not installed: TensorRT's own names are unchecked")
    data = (Path(spec.origin).parent / "tensorrt.so").read_bytes()
    words = {*NAMES, *(name for names in NAMES.values() for name in names)}
    assert [word for word in sorted(words) if word.encode() + b"\0" not in data] == []


@pytest.mark.gpu
@pytest.mark.skipif(TrtRuntime.obstacle() is not None, reason=f"{TrtRuntime.obstacle()}: no engine was run")
def test_an_engine_built_here_runs_here(tmp_path: Path) -> None:
    """What only a GPU shows: deserialisation, addresses, streams, the inspector's and the profiler's real forms."""
    from edgevit.export.engine import build_engine

    weights = ",".join(str(i / 16) for i in range(16))
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,4,8,8] image) => (float[N,4,8,8] logits) '
        f"<float[4,4,1,1] w = {{{weights}}}> {{ a = Conv(image, w) logits = Relu(a) }}"
    )
    onnx.save(parser.parse_model(text), tmp_path / "model.onnx")
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", ("here",), 4)
    images = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32)
    expected = np.maximum(np.einsum("oi,nihw->nohw", np.arange(16).reshape(4, 4) / 16, images), 0)
    with Session(TrtRuntime(tmp_path / "model.engine", None, "fp32")) as session:
        session.require_precision(tmp_path)
        np.testing.assert_allclose(session.run({"image": images})["logits"], expected, rtol=1e-4, atol=1e-5)
        assert session.runtime.profile({"image": images}, 5)
