"""Engines built by the real TensorRT for RTX, without a GPU; and what a user reads when that goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import parser

from edgevit.engine_layers import read_lines
from edgevit.errors import ExportError, MissingDependencyError, UnknownNameError, UsageError
from edgevit.export import engine, engine_worker

REAL = pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: no engine is built, no parser asked"
)
PLAIN = "a = Conv<kernel_shape=[1,1]>(image, w) b = Relu(a) logits = MatMul(b, b)"


def model(body: str = PLAIN, shape: str = "1,4,8,8", opsets: str = '"": 17') -> onnx.ModelProto:
    weights = ",".join(["0.5"] * 16)
    made = parser.parse_model(
        f"<ir_version: 8, opset_import: [{opsets}]> g (float[{shape}] image) => (float[{shape}] logits) "
        f"<float[4,4,1,1] w = {{{weights}}}> {{ {body} }}"
    )
    for node in made.graph.node:
        node.name = f"the_{node.op_type.lower()}"
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


# ---- real builds


@REAL
@pytest.mark.parametrize("gpus", [("sm89",), ("sm80", "sm86", "sm120")], ids="-".join)
def test_an_engine_is_built_without_a_gpu(file: Path, gpus: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    made = engine.build_engine(file, file.with_name("model.engine"), gpus)
    assert made.size_bytes == file.with_name("model.engine").stat().st_size > 1000
    assert (made.builder, made.gpus, made.max_batch) == ("tensorrt_rtx", gpus, None)
    assert made.layers is not None and made.layers["products"] == {"fp32": 2}
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.engine", "model.onnx"]
    assert json.loads(json.dumps(made.record()))["gpus"] == list(gpus)
    assert capfd.readouterr() == ("", "")  # NVIDIA's logger writes to both


@REAL
def test_what_one_of_several_gpus_cannot_do_is_said(file: Path) -> None:
    """Turing has float16 products only, of which no flag tells: the builder's own words have to reach the user."""
    with pytest.raises(ExportError, match=r"'the_matmul' for Turing \(SM75\): FP32 GEMM is not supported"):
        engine.build_engine(file, file.with_name("e"), ("sm75", "sm89"))


@REAL
def test_a_dynamic_batch_gets_a_profile(file: Path) -> None:
    onnx.save(model(shape="N,4,8,8"), file)
    assert engine.build_engine(file, file.with_name("e"), ("sm89",), 5).max_batch == 5
    with pytest.raises(ExportError, match=r"TensorRT cannot build model\.onnx") as caught:
        engine.build_engine(file, file.with_name("f"), ("sm89",))
    assert "\n" not in str(caught.value) and not file.with_name("f").exists()


@REAL
def test_what_the_parser_refuses_is_named_in_one_line(file: Path) -> None:
    onnx.save(model("a = Relu(image) b = Det(a) c = Det(b) logits = Relu(a)"), file)
    with pytest.raises(ExportError, match=r"TensorRT cannot build model\.onnx: node .*\(Det\): ") as caught:
        engine.build_engine(file, file.with_name("model.engine"), ("sm89",))
    assert "\n" not in str(caught.value)
    assert not file.with_name("model.engine").exists()


@REAL
def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(file: Path) -> None:
    folder = file.with_name("model.engine")
    folder.mkdir()
    with pytest.raises(ExportError, match="cannot be written: Is a directory"):
        engine.build_engine(file, folder, ("sm89",))
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".part"] == []


@REAL
def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot build none\.onnx"):
        engine.build_engine(tmp_path / "none.onnx", tmp_path / "e", ("sm89",))


@REAL
def test_weights_beside_the_graph_are_found(file: Path) -> None:
    onnx.save(model(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert engine.build_engine(file, file.with_name("e"), ("sm89",)).size_bytes > 1000


@REAL
def test_python_files_beside_the_model_are_not_run(file: Path) -> None:
    for name in ("json", "edgevit", "tensorrt_rtx"):
        file.with_name(f"{name}.py").write_text("open('taken', 'w')\nraise SystemExit('taken over')\n")
    assert engine.build_engine(file, file.with_name("e"), ("sm89",)).size_bytes > 1000
    assert not file.with_name("taken").exists()


# ---- the parser as a lint rule


@REAL
def test_the_parser_finds_nothing_in_a_good_graph() -> None:
    assert engine.parser_version()[0].isdigit()
    assert engine.ask_parser(model().SerializeToString()) == ()


@REAL
def test_the_parser_names_the_node_and_its_text_is_harmless() -> None:
    bad = model("a = Relu(image) logits = x.y.Funny(a)", opsets='"": 17, "x.y": 1')
    bad.graph.node[1].name = "bad\x1b[31m\nnode"
    (found,) = engine.ask_parser(bad.SerializeToString())
    assert (found.rule, found.level, found.node) == ("TRT-PARSER", "error", "bad [31m node")
    assert found.why.startswith("TensorRT for RTX ") and "Plugin not found" in found.why
    assert found.why.isprintable() and found.do and found.source.startswith("https://")


@REAL
@pytest.mark.parametrize("data", [b"garbage" * 100, b"\x0a\xff\xff\xff\xff\x0f", bytes(1000)])
def test_a_strangers_file_is_a_finding_not_a_crash(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (found,) = engine.ask_parser(data)
    assert found.rule == "TRT-PARSER" and found.why.isprintable()
    assert capfd.readouterr() == ("", "")


@REAL
def test_a_file_that_names_another_one_does_not_get_it_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64))
    bad = model()
    tensor = bad.graph.initializer[0]
    del tensor.float_data[:]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(secret))
    assert engine.ask_parser(bad.SerializeToString())


def test_without_the_package_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.util, "find_spec", lambda name: None)
    for ask in (lambda: engine.ask_parser(b""), engine.known_gpus, lambda: engine.check_gpus(("sm89",))):
        with pytest.raises(MissingDependencyError, match=r"tensorrt-rtx.*: pip install 'edgevit\[tensorrt\]'"):
            ask()
    engine.check_gpus(())  # no engine asked for, nothing needed


# ---- which GPUs


@REAL
@pytest.mark.parametrize(
    ("gpus", "kind", "message"),
    [
        (("sm98",), UnknownNameError, "unknown gpu 'sm98'; did you mean 'sm"),
        (("SM89",), UnknownNameError, "unknown gpu 'SM89'"),
        (("none",), UnknownNameError, "unknown gpu 'none'"),
        (("sm89\n",), UnknownNameError, "unknown gpu"),
        (("sm87",), UsageError, "a Jetson builds its own engine; export without gpu, .* build.sh"),
        (("sm89", "sm86", "sm89"), UsageError, "sm89 is given twice"),
        (("here", "sm89"), UsageError, "here stands alone"),
    ],
)
def test_a_gpu_that_cannot_be_built_for_is_refused_first(gpus: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        engine.check_gpus(gpus)


@REAL
def test_known_gpus_are_those_of_the_installed_builder_in_order() -> None:
    known = engine.known_gpus()
    assert {"sm75", "sm86", "sm89", "sm120"} <= set(known)
    assert list(known) == sorted(known, key=lambda name: int(name[2:]))


def test_here_needs_a_gpu_and_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.util, "find_spec", lambda name: True)
    monkeypatch.setattr(engine, "gpu_problem", lambda: "this machine has no NVIDIA driver")
    with pytest.raises(UsageError, match="gpu here: this machine has no NVIDIA driver; name a GPU"):
        engine.check_gpus(("here",))


@pytest.mark.parametrize(
    ("installed", "library", "gpus"),
    [({"tensorrt", "tensorrt_rtx"}, "tensorrt", []), ({"tensorrt_rtx"}, "tensorrt_rtx", ["CURRENT"])],
)
def test_here_is_built_by_tensorrt_where_it_is(
    monkeypatch: pytest.MonkeyPatch, file: Path, installed: set[str], library: str, gpus: list[str]
) -> None:
    asked: list[dict[str, Any]] = []
    reply = {"errors": [], "version": "10.3", "size_bytes": 1, "seconds": 2.0, "layers": None}
    monkeypatch.setattr(engine.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(engine, "gpu_problem", lambda: None)
    monkeypatch.setattr(engine, "_ask", lambda request, seconds, folder: asked.append(request) or reply)
    made = engine.build_engine(file, file.with_name("model.engine"), ("here",))
    assert (asked[0]["library"], asked[0]["gpus"], made.builder) == (library, gpus, library)


def test_gpu_problem_is_none_or_a_reason() -> None:
    assert engine.gpu_problem() in (None, "this machine has no NVIDIA driver", "the NVIDIA driver finds no GPU")


# ---- a worker that dies, hangs or talks


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("raise SystemExit('out of memory')", "failed: out of memory"),
        ("import sys; sys.exit(3)", "failed: no reason given"),
    ],
)
def test_native_code_that_dies_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, file: Path, code: str, message: str
) -> None:
    real = subprocess.run
    monkeypatch.setattr(engine, "check_gpus", lambda gpus: None)
    monkeypatch.setattr(
        engine.subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options)
    )
    with pytest.raises(ExportError, match=f"TensorRT's builder {message}; please report the model"):
        engine.build_engine(file, file.with_name("e"), ("sm89",))


def test_a_worker_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(engine, "_require", lambda package: None)
    monkeypatch.setattr(engine, "parser_version", lambda: "1.7")
    monkeypatch.setattr(engine.subprocess, "run", hang)
    (found,) = engine.ask_parser(file.read_bytes())
    assert f"stopped after {engine.PARSE_SECONDS} s" in found.why


def test_many_errors_are_counted_after_the_first(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    errors = [{"node": f"n{i}", "operator": "Det", "text": "no\nway"} for i in range(9)]
    monkeypatch.setattr(engine, "check_gpus", lambda gpus: None)
    monkeypatch.setattr(engine, "_ask", lambda request, seconds, folder: {"errors": errors})
    with pytest.raises(ExportError) as caught:
        engine.build_engine(file, file.with_name("e"), ("sm89",))
    assert str(caught.value) == (
        "TensorRT cannot build model.onnx: node n0 (Det): no way; node n1 (Det): no way; node n2 (Det): no way; "
        "and 6 more"
    )


# ---- what the builder says of its layers, and the worker with a stand-in library

LAYERS = """Layers:
Name: _gemm_mha_v2_myl0_8, LayerType: kgen, Inputs: [ { Name: q, Datatype: Half }], Constants: [], Outputs: [ ]
Name: node_conv2d, LayerType: correlation, Inputs: [ { Name: x, Datatype: Float }], Constants: [ { Datatype: Half }]
Name: __myl_FcAdd_myl0_9, LayerType: runtime_fusion, Inputs: [ { Name: y, Datatype: BFloat16 }], Constants: []
Name: __myl_AddMul_myl0_1, LayerType: kgen, Inputs: [ { Name: gemm_out, Datatype: Half }], Constants: []

I/O Tensors:
 Name: image, IOMode: Input"""


def test_layers_are_counted_by_the_precision_of_their_products() -> None:
    assert engine.summary(read_lines(LAYERS)) == {
        "count": 4,
        "products": {"bf16": 1, "fp16": 1, "fp32": 1},
        "fused_attentions": 1,
    }


def test_an_old_tensorrt_is_sent_to_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "8.6.2"

    monkeypatch.setattr(engine_worker, "open_library", lambda name: (Old, None))
    (error,) = engine_worker.answer({"library": "tensorrt", "task": "build"})["errors"]
    assert "8.6.2 has no strongly typed networks" in error["text"] and "build.sh" in error["text"]


def test_a_constructor_that_fails_gives_the_reason_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        errors = ("CUDA initialization failure with error: 35",)

    class Broken:
        __version__ = "10.3.0"

        class NetworkDefinitionCreationFlag:
            STRONGLY_TYPED = 1

        @staticmethod
        def Builder(_: Any) -> None:  # noqa: N802  # the binding's own name
            raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(engine_worker, "open_library", lambda name: (Broken, Listener))
    reply = engine_worker.answer({"library": "tensorrt", "task": "build", "model": "m"})
    assert reply["errors"][0]["text"] == "CUDA initialization failure with error: 35"


# ---- the names that the worker uses, against NVIDIA's own bindings

NAMES = {
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "BuilderFlag": ("TF32",),
    "IBuilderConfig": ("add_optimization_profile", "clear_flag", "profiling_verbosity"),
    "ILogger": ("ERROR", "INTERNAL_ERROR", "log"),
    "INetworkDefinition": ("get_input", "num_inputs", "num_outputs"),
    "IOptimizationProfile": ("set_shape",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("get_error", "num_errors", "parse", "parse_from_file"),
    "ParserError": ("code", "desc", "node_name", "node_operator"),
    "ProfilingVerbosity": ("DETAILED",),
}


def test_tensorrt_has_every_name_that_the_worker_uses() -> None:
    """Its bindings cannot be imported without its libraries; the names that they register stand in the file."""
    spec = util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt-cu13-bindings is not installed: TensorRT's own names are unchecked")
    data = (Path(spec.origin).parent / "tensorrt.so").read_bytes()
    words = {*NAMES, *(name for names in NAMES.values() for name in names)}
    assert [word for word in sorted(words) if word.encode() + b"\0" not in data] == []
    source = Path(engine_worker.__file__).read_text(encoding="utf-8")
    owners = {"ParserError", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile"}  # objects, never named
    assert [word for word in sorted(words - owners) if word not in source] == []
