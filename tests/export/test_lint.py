"""The linter as a whole: profiles, order, hostile files, whole networks, and what TensorRT's own parser says."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper, parser

from edgevit.errors import ArtifactError, UnknownNameError
from edgevit.export import lint, to_onnx
from edgevit.export.lint.operators import tensorrt_operators
from edgevit.export.lint.rules import KNOWN, support
from edgevit.specs import ExportSpec, Finding, ImageSpec, ModelCard

EVERY_PROFILE = ("8.5", "8.6", "10.3", "10.14", "11", "coreml-ios16", "coreml-ios18", "openvino")
RELU = "g (float[1,8] x) => (float[1,8] y) { y = Relu(x) }"


def parsed(graph: str, opset: int = 17, functions: str = "", domain: str = "mine") -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "{domain}" : 1]> {graph} {functions}')


def rules(model: onnx.ModelProto, *profiles: str) -> list[str]:
    return [finding.rule for finding in lint.lint_graph(model, profiles)]


# ---- profiles


@pytest.mark.parametrize(
    ("name", "target", "version"),
    [
        ("tensorrt-8.6", "tensorrt", (8, 6)),
        ("8.6", "tensorrt", (8, 6)),
        ("tensorrt-10.7", "tensorrt", (10, 7)),
        ("10", "tensorrt", (10, 0)),
        ("11", "tensorrt", (11, 0)),
        ("tensorrt-11.4", "tensorrt", (11, 4)),
        ("coreml-ios17", "coreml", (17, 0)),
        ("openvino", "openvino", (0, 0)),
    ],
)
def test_a_profile_is_a_target_and_a_version(name: str, target: str, version: tuple[int, int]) -> None:
    profile = lint.resolve(name)
    assert (profile.target, profile.version) == (target, version)
    assert profile.name == (name if name.startswith(target) else f"tensorrt-{name}")


@pytest.mark.parametrize(
    "name", ["8.4", "12", "tensorrt", "tensorrt-", "17", "coreml-ios15", "coreml", "", "10.3.1", "\u0661\u0661"]
)
def test_an_unknown_profile_is_answered_with_what_exists(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown lint profile") as caught:
        lint.lint_graph(parsed(RELU), [name])
    assert all(known in str(caught.value) for known in KNOWN)


def test_the_nearest_profile_is_named() -> None:
    with pytest.raises(UnknownNameError, match=re.escape("did you mean 'coreml-ios17'?")):
        lint.resolve("coreml-ois17")


def test_a_release_reads_all_that_an_older_one_reads() -> None:
    releases = [tuple(map(int, release.split("."))) for release in support()["tensorrt"]["operators"]]
    assert releases == sorted(releases)
    for older, newer in itertools.pairwise(releases):
        assert tensorrt_operators(older) < tensorrt_operators(newer)
    assert {"LayerNormalization", "Gelu", "Attention"} & tensorrt_operators((8, 5)) == set()
    assert {"LayerNormalization", "Mod"} <= tensorrt_operators((8, 6))


def test_every_operator_in_the_tables_exists() -> None:
    """A name with a typing error would make an operator unsupported, or never find it."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    experimental = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of ONNX 1.0, which parsers still read
    assert tensorrt_operators((99, 0)) - known <= experimental
    for table in ("openvino", "coreml"):
        assert set(support()[table]["unsupported"].split()) <= known


# ---- findings


def test_errors_come_first_and_then_the_order_of_the_graph() -> None:
    body = "g (float[n,12] x) => (float[n,12] y) { a = Det(x) b = Unique(a) c = LayerNormalization(b, b) y = Det(c) }"
    found = lint.lint_graph(parsed(body), ["8.5"])
    assert [finding.level for finding in found] == sorted(
        (f.level for f in found), key=["error", "warning", "advice"].index
    )
    assert [finding.node for finding in found if finding.rule == "TRT-OPS-001"] == ["a", "b", "c", "y"]


def test_what_holds_for_two_profiles_is_said_once() -> None:
    model = parsed("g (float[n,8] x) => (float[n,8] y) { y = Relu(x) }")
    once = lint.lint_graph(model, ["10.3"])
    assert [finding.rule for finding in once] == ["TRT-DYN-001"]
    assert lint.lint_graph(model, ["10.3", "tensorrt-10.3", "10.7"]) == once


def test_a_model_is_left_as_it_was() -> None:
    model = parsed("g (float[n,8] x) => (float[n,8] y) { y = mine.f(x) }", functions=FUNCTION)
    before = model.SerializeToString()
    lint.lint_graph(model, EVERY_PROFILE)
    assert model.SerializeToString() == before


def test_no_profile_finds_nothing() -> None:
    assert lint.lint_graph(parsed("g (float[n,8] x) => (float[n,8] y) { y = Det(x) }"), []) == ()


def test_a_node_without_a_name_is_called_by_its_output_and_names_cannot_move_a_cursor() -> None:
    model = parsed("g (float[2,2] x) => (float[1] y, float[1] z) { y = Det(x) z = Det(x) }")
    model.graph.node[1].name = "evil\x1b[2J\n\u202ename" + "x" * 500
    first, second = (f.node for f in lint.lint_graph(model, ["openvino"]))
    assert first == "y"
    assert second.startswith("evil?[2J??name") and len(second) < 210


# ---- subgraphs and functions

BRANCHES = (
    "g (float[1,8] x, bool c) => (float[1,8] y) { y = If(c) <then_branch = a () => (float[1,8] t) { t = Det(x) }, "
    "else_branch = b () => (float[1,8] t) { t = Neg(x) }> }"
)
FUNCTION = '<domain: "mine", opset_import: ["" : 17]> f (x) => (y) { d = Det(x) y = Relu(d) }'


def test_branches_are_looked_into_and_may_use_the_same_names() -> None:
    found = lint.lint_graph(parsed(BRANCHES), ["11"])
    assert [(f.rule, f.node) for f in found] == [("TRT-OPS-001", "t"), ("GEN-FLOW-001", "y")]


def test_functions_are_looked_into() -> None:
    model = parsed("g (float[2,2] x) => (float[1] y) { y = mine.f(x) }", functions=FUNCTION)
    assert rules(model, "11") == ["TRT-OPS-001"]


def test_a_function_that_calls_itself_is_refused() -> None:
    functions = (
        '<domain: "mine", opset_import: ["" : 17, "mine" : 1]> f (x) => (y) { y = mine.h(x) } '
        '<domain: "mine", opset_import: ["" : 17, "mine" : 1]> h (x) => (y) { y = mine.f(x) }'
    )
    with pytest.raises(ArtifactError, match="a function calls itself"):
        lint.lint_graph(parsed("g (float[1] x) => (float[1] y) { y = mine.f(x) }", functions=functions), ["11"])


def test_functions_that_multiply_without_end_are_refused_at_once() -> None:
    calls = " ".join(f"y{i} = mine.f{{below}}(x)" for i in range(9))
    head = '<domain: "mine", opset_import: ["" : 17, "mine" : 1]>'
    bodies = [f"{head} f{level} (x) => (y0) {{ {calls.format(below=level - 1)} }}" for level in range(1, 20)]
    functions = f"{head} f0 (x) => (y) {{ y = Relu(x) }} " + " ".join(bodies)
    start = time.monotonic()
    with pytest.raises(ArtifactError, match="more than 100000 nodes"):
        lint.lint_graph(parsed("g (float[1] x) => (float[1] y) { y = mine.f19(x) }", functions=functions), ["11"])
    assert time.monotonic() - start < 10  # seconds; 9^19 nodes would take for ever


# ---- hostile graphs


def test_a_circle_is_named_and_ends() -> None:
    model = parsed("g (float[8] x) => (float[8] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }")
    found = [f for f in lint.lint_graph(model, EVERY_PROFILE) if f.rule == "GEN-GRAPH-001"]
    assert [f.why.split(":")[0] for f in found] == ["a circle of nodes that wait for each other"]


def test_a_circle_of_attention_ends() -> None:
    model = parsed(
        "g (float[1,1,8,8] x) => (float[1,1,8,8] y) { a = Add(p, x) p = Softmax(a) b = Add(p, b) y = MatMul(b, a) }"
    )
    assert "GEN-GRAPH-001" in rules(model, *EVERY_PROFILE)


def test_a_node_that_reads_itself_and_a_tensor_made_twice_are_named() -> None:
    model = parsed("g (float[8] x) => (float[8] y) { y = Add(x, y) a = Relu(x) a = Neg(x) }")
    reasons = sorted(f.why.split(":")[0] for f in lint.lint_graph(model, ["11"]) if f.rule == "GEN-GRAPH-001")
    assert reasons == ["a circle of nodes that wait for each other", "an output that another node makes too"]


ODD = {
    "no inputs": "y = Conv()",
    "too few inputs": "y = Reshape(x)",
    "an attribute of another type": 'y = Softmax<axis = "last">(x)',
    "an axis that is not there": "y = Softmax<axis = 77>(x)",
    "an empty equation": 'y = Einsum<equation = "">(x)',
    "scales from nowhere": "q = QuantizeLinear() y = DequantizeLinear(q)",
    "a chain of nothing": "a = MatMul() p = Softmax(a) y = MatMul(p)",
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
@pytest.mark.parametrize("opset", [0, 1, 17, 99999])
def test_what_onnx_would_not_allow_is_no_reason_to_fail(body: str, opset: int) -> None:
    model = parsed(f"g (float[1,8] x) => (float[1,8] y) {{ {body} }}", opset)
    assert all(isinstance(finding, Finding) for finding in lint.lint_graph(model, EVERY_PROFILE))


def test_damaged_tensors_are_no_reason_to_fail() -> None:
    model = parsed("g (float[1,8] x) => (float[1,8] y) { a = Add(x, w) b = Reshape(a, s) y = Mul(b, u) }")
    model.graph.initializer.add(name="w", data_type=1, dims=[1 << 40, 1 << 40], raw_data=b"abc")
    model.graph.initializer.add(name="s", data_type=7, dims=[-5])
    model.graph.initializer.add(name="u", data_type=999, dims=[2])
    assert all(isinstance(finding, Finding) for finding in lint.lint_graph(model, EVERY_PROFILE))


def test_names_that_are_no_text_are_refused() -> None:
    data = parsed(RELU.replace("Relu", "Abcd")).SerializeToString().replace(b"Abcd", b"A\xff\xfed")
    with pytest.raises(ArtifactError, match="a name in it is not text"):
        lint.lint_graph(onnx.ModelProto.FromString(data), EVERY_PROFILE)


def test_any_damage_to_a_file_ends_in_findings_or_in_one_error() -> None:
    seeds = [parsed(BRANCHES), parsed("g (float[2,2] x) => (float[1] y) { y = mine.f(x) }", functions=FUNCTION)]
    seeds += [parsed(f"g (float[1,8] x) => (float[1,8] y) {{ {body} }}") for body in ODD.values()]
    draw = random.Random(0)
    for data in [seed.SerializeToString() for seed in seeds] * 40:
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 2, 4])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        model = onnx.ModelProto()
        with contextlib.suppress(DecodeError, ArtifactError):
            model.ParseFromString(bytes(damaged))
            assert all(isinstance(finding, Finding) for finding in lint.lint_graph(model, EVERY_PROFILE))


# ---- weights


def test_weights_in_another_file_are_not_opened(tmp_path: Path) -> None:
    model = parsed("g (float[1,8,4,4] x) => (float[1,8,4,4] y) { y = Conv(x, w) }")
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[8, 8, 1, 1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../nothing-here.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (finding,) = lint.lint_graph(lint.read_onnx(path), ["openvino"])
    assert (finding.rule, finding.why.split(":")[0]) == ("GEN-EXT-001", "1 tensors lie in another file")


def test_a_large_network_is_linted_in_seconds() -> None:
    nodes, weights, last = [], [], "x"
    for i in range(300):
        weights.append(numpy_helper.from_array(np.full((320, 320), 0.01, np.float32), f"w{i}"))  # 300 of them: 123 MB
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        last = f"h{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 320]) for name in ("x", last)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    start = time.monotonic()
    found = lint.lint_graph(model, EVERY_PROFILE)
    assert time.monotonic() - start < 10  # seconds: 0.5 on a quiet core, where one profile alone takes 0.2
    assert len([f for f in found if f.rule == "TRT-GEMM-002"]) == 299


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it holds no graph"),
        (b"no onnx, just words and words and words", "not an ONNX file, or a damaged one"),
        (b"\x08\x08", "it holds no graph"),
    ],
)
def test_a_file_that_is_no_onnx_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=reason) as caught:
        lint.read_onnx(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_larger_than_protobuf_reads_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate((2 << 30) + 1)  # a hole: it takes no space
    with pytest.raises(ArtifactError, match="2147483649 bytes"):
        lint.read_onnx(path)


@pytest.mark.parametrize("name", ["gone.onnx", ".", "a\0b.onnx", "x" * 300])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="expected an ONNX file"):
        lint.read_onnx(tmp_path / name)


# ---- whole networks


@pytest.mark.parametrize(
    ("network", "batch"),
    [
        ("vit", "dynamic"),
        ("swin", 1),
        pytest.param("crossformer", "dynamic", marks=pytest.mark.slow),
        pytest.param("lsla", 1, marks=pytest.mark.slow),
    ],
)
def test_the_deploy_form_of_a_network_has_no_error_but_operators_that_a_release_lacks(
    shop: Any, network: str, batch: Any, tmp_path: Path
) -> None:
    """In the ONNX target's own form, which uses Gelu and Attention; CoreML and OpenVINO are told by the same graph."""
    size = (64, 64) if network != "vit" else (32, 32)
    card = ModelCard(network, network, "", "", "", 0, 0, image=ImageSpec(size))
    spec = ExportSpec(network, "onnx", image_size=size, batch=batch)
    to_onnx.OnnxExporter().export(shop.network(network).float(), card, [spec], tmp_path)
    model = lint.read_onnx(tmp_path / "model.onnx")
    errors = [f for f in lint.lint_graph(model, EVERY_PROFILE) if f.level == "error"]
    assert {f.rule for f in errors} <= {"TRT-OPS-001", "TRT-OPS-004", "TRT-OPS-007"}
    assert [f for f in lint.lint_graph(model, ["11", "coreml-ios16", "openvino"]) if f.level == "error"] == []


# ---- the targets' own readers


def test_what_openvino_is_said_not_to_read_it_refuses() -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino, whose ONNX reader is asked")
    core = openvino.Core()
    for op in support()["openvino"]["unsupported"].split():
        inputs = ["x"] * max(1, onnx.defs.get_schema(op).min_input)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node(op, inputs, ["y"])], "g", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
        with pytest.raises(RuntimeError, match="unsupported operations"):
            core.read_model(model.SerializeToString())


PARSE = """
import json, pathlib, sys
import tensorrt_rtx as trt

class Silent(trt.ILogger):
    def log(self, severity, text):
        pass

logger, answers = Silent(), {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    builder = trt.Builder(logger)
    network = builder.create_network(flags)
    answers[path.stem] = trt.OnnxParser(network, logger).parse(path.read_bytes())
pathlib.Path(sys.argv[1], "answers.json").write_text(json.dumps(answers))
"""
# What the parser refuses for a reason that the rules know only as a warning.
REFUSED = {
    "TRT-OPS-003-bad": "a plugin that does not exist here; it may on the device",
    "OV-OPS-002-bad": "the same",
    "GEN-SHAPE-001-bad": "NonZero needs a plugin that TensorRT for RTX leaves out and TensorRT has",
    "CML-OPS-001-bad": "Det: an error for TensorRT too",
    "GEN-EXT-001-bad": "the other file is not there",
}
# What it takes although a rule calls it an error: it is the builder that refuses, or numbers that go wrong.
TAKEN = {"TRT-QDQ-002", "TRT-QDQ-005", "GEN-FP16-001", "GEN-FP16-002", "GEN-NAN-001", "GEN-BATCH-001", "GEN-QDQ-001"}


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """The graphs of `test_lint_rules.py`."""
    spec = importlib.util.spec_from_file_location("lint_cases", Path(__file__).with_name("test_lint_rules.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lint_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_rules_agree_with_tensorrts_own_parser(cases: ModuleType, tmp_path: Path) -> None:
    """What it refuses is an error for TensorRT 11; what it takes has no error of operators."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, whose parser is asked")
    expected = {}
    for name, case in cases.CASES.items():
        for side, body, head in (("bad", case.bad, case.bad_head), ("good", case.good, case.good_head)):
            model = cases.model(body, **head)
            (tmp_path / f"{name}-{side}.onnx").write_bytes(model.SerializeToString())
            expected[f"{name}-{side}"] = {f.rule for f in lint.lint_graph(model, ["11"]) if f.level == "error"}
    subprocess.run([sys.executable, "-c", PARSE, str(tmp_path)], check=True, capture_output=True, timeout=300)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers.keys() == expected.keys()
    missed = [name for name, taken in answers.items() if not taken and not expected[name] and name not in REFUSED]
    false_alarms = [name for name, taken in answers.items() if taken and expected[name] - TAKEN]
    assert (missed, false_alarms) == ([], [])
