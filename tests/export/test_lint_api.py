"""`lint` of files and artifacts: which graphs are looked at, for which profiles, and what the document says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import parser

from edgevit.api.linting import lint
from edgevit.errors import ArtifactError, MissingDependencyError, UnknownNameError, UsageError
from edgevit.export import engine
from edgevit.export.lint import reading
from edgevit.specs import Finding

DET = (
    '<ir_version: 8, opset_import: ["" : 17]> g (float[n,2,2] x) => (float[n] y, float[n] z) { y = Det(x) z = Det(x) }'
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The models that TensorRT's parser is asked about; it refuses each at the node `y`."""
    models = list[bytes]()

    def ask(model: bytes) -> tuple[Finding, ...]:
        models.append(model)
        return (Finding("TRT-PARSER", "error", "y", "refused", "change it", "https://example.org"),)

    monkeypatch.setattr(engine, "ask_parser", ask)
    monkeypatch.setattr(engine, "parser_version", lambda: "1.2.3")
    return models


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A graph with two operators that nothing reads."""
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(DET), path)
    return path


def test_a_file_is_looked_at_for_each_profile_and_every_finding_says_for_which_it_holds(file: Path) -> None:
    document = lint(file, ["openvino", "tensorrt-8.6", "coreml-ios17"])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["profiles"] == ["openvino", "tensorrt-8.6", "coreml-ios17"]
    assert (document["file"], document["files"]) == (str(file), ["model.onnx"])
    rules = [(f["level"], f["rule"], f["node"], f["profiles"]) for f in document["findings"]]
    assert rules == [
        ("error", "OV-OPS-001", "y", ["openvino"]),
        ("error", "OV-OPS-001", "z", ["openvino"]),
        ("error", "TRT-OPS-001", "y", ["tensorrt-8.6"]),
        ("error", "TRT-OPS-001", "z", ["tensorrt-8.6"]),
        ("warning", "CML-DYN-001", "x", ["coreml-ios17"]),
        ("warning", "CML-OPS-001", "y", ["coreml-ios17"]),
        ("warning", "CML-OPS-001", "z", ["coreml-ios17"]),
        ("advice", "TRT-DYN-001", "x", ["tensorrt-8.6"]),
    ]
    assert (document["errors"], document["warnings"], document["advice"]) == (4, 3, 1)
    assert document["parser"] == "not asked (no profile of TensorRT 10 or newer)"
    assert document["notes"] == [
        "CoreML is built from the network, not from this graph: its findings say what the network contains"
    ]


def test_the_same_profile_twice_is_one(file: Path, asked: list[bytes]) -> None:
    document = lint(file, ["10.3", "tensorrt-10.3", "11"])
    assert document["profiles"] == ["tensorrt-10.3", "tensorrt-11"]
    assert len(asked) == 1
    assert all(f["profiles"] == ["tensorrt-10.3", "tensorrt-11"] for f in document["findings"])


def test_the_parser_is_asked_for_new_releases_and_its_errors_count(file: Path, asked: list[bytes]) -> None:
    document = lint(file, ["8.6", "10.3"])
    assert asked == [file.read_bytes()]
    (refused,) = [f for f in document["findings"] if f["rule"] == "TRT-PARSER"]
    assert (refused["node"], refused["profiles"]) == ("y", ["tensorrt-10.3"])
    assert document["parser"] == "asked (tensorrt-rtx 1.2.3)"
    assert [f["profiles"] for f in document["findings"] if f["rule"] == "TRT-OPS-001"] == [
        ["tensorrt-8.6", "tensorrt-10.3"]
    ] * 2
    assert document["errors"] == 3


def test_a_missing_parser_is_said_and_nothing_else_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: bytes) -> tuple[Finding, ...]:  # noqa: ARG001  # the real one's signature
        raise MissingDependencyError("not here")

    monkeypatch.setattr(engine, "ask_parser", missing)
    document = lint(file, ["11"])
    assert document["parser"] == "not asked (tensorrt-rtx is not installed: pip install 'edgevit[tensorrt]')"
    assert document["errors"] == 2


def test_weights_in_another_file_keep_the_parser_from_being_asked(tmp_path: Path, asked: list[bytes]) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { y = Add(x, w) }'
    )
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    document = lint(tmp_path / "model.onnx", ["11"])
    assert asked == []
    assert document["parser"] == "not asked (weights lie in another file)"
    assert [f["rule"] for f in document["findings"]] == ["GEN-EXT-001"]


def test_a_file_without_a_profile_is_asked_for_one(file: Path) -> None:
    with pytest.raises(UsageError, match=r"give --for, e\.g\. --for tensorrt-10\.3"):
        lint(file)


@pytest.mark.parametrize("name", ["model.xml", "model.mlpackage", "model.engine"])
def test_what_is_no_graph_is_refused_with_what_to_give(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="rules look at ONNX graphs"):
        lint(tmp_path / name, ["openvino"])


def test_a_missing_file_a_damaged_one_and_an_unknown_profile_are_errors_of_one_line(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file or directory; expected an ONNX file"):
        lint(tmp_path / "gone.onnx", ["openvino"])
    with pytest.raises(UnknownNameError, match=r"unknown lint profile 'tensorrt-9999'"):
        lint(file, ["tensorrt-9999"])
    file.write_bytes(file.read_bytes()[:40] + b"\xff" * 40)
    with pytest.raises(ArtifactError) as caught:
        lint(file, ["openvino"])
    assert "\n" not in str(caught.value)


def test_a_file_that_keeps_native_code_from_ending_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's shape inference goes round for ever over this equation."""
    monkeypatch.setattr(reading, "INFER_SECONDS", 5)
    body = 'y = Einsum<equation="...i,...i&>...">(x, x)'
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[1,8,16,16] x) => (float[a] y) {{ {body} }}'
    onnx.save(parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="graph 'g': its shapes cannot be inferred"):
        lint(tmp_path / "model.onnx", ["openvino"])


# ---- artifacts


def test_an_artifact_is_looked_at_for_its_own_target(tiny: Any) -> None:
    given = []
    tiny.exporter.lint_for = lambda settings: given.append(settings) or ("tensorrt-8.6",)
    artifact = tiny.export()
    given.clear()
    document = lint(artifact.path)
    assert given == [tiny.exporter.OPTIONS()]
    assert document["profiles"] == ["tensorrt-8.6"]
    assert [(f["rule"], f["file"]) for f in document["findings"]] == [
        ("TRT-OPS-005", "model.onnx"),
        ("TRT-OPS-006", "model.onnx"),
        ("TRT-GEMM-001", "model.onnx"),
    ]
    assert lint(artifact.path, ["openvino"])["findings"] == []


def test_an_artifact_for_a_target_without_rules_is_asked_for_a_profile(tiny: Any) -> None:
    tiny.exporter.lint_for = lambda settings: ()
    with pytest.raises(UsageError, match="target onnx has no rules of its own; give --for"):
        lint(tiny.export().path)


def test_every_size_of_an_artifact_is_looked_at(tiny: Any) -> None:
    document = lint(tiny.export(image_size=((64, 64), (32, 96))).path, ["8.6"])
    assert document["files"] == ["model-64x64.onnx", "model-32x96.onnx"]
    assert [f["file"] for f in document["findings"] if f["rule"] == "TRT-OPS-005"] == document["files"]


def test_an_artifact_without_a_graph_says_what_can_be_done(tiny: Any, copied: Callable[..., Path]) -> None:
    path = copied(tiny.export().path)
    (path / "model.onnx").rename(path / "model.xml")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("model.onnx", "model.xml"))
    with pytest.raises(UsageError, match=r"keeps no ONNX graph.*--to onnx and lint that with --for"):
        lint(path, ["openvino"])


def test_a_graph_beside_an_engine_is_the_one_that_is_looked_at(tiny: Any, copied: Callable[..., Path]) -> None:
    path = copied(tiny.export().path)
    document = json.loads((path / "manifest.json").read_text())
    document["model_file"] = "sample/input.npy"  # as an engine is: listed, and no ONNX file
    (path / "manifest.json").write_text(json.dumps(document))
    assert lint(path, ["openvino"])["files"] == ["model.onnx"]


def test_an_artifact_that_was_changed_is_refused(tiny: Any, copied: Callable[..., Path]) -> None:
    path = copied(tiny.export().path)
    with (path / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ArtifactError, match="changed since it was exported"):
        lint(path, ["openvino"])
