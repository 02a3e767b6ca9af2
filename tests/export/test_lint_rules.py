"""Every rule of the linter on a graph that breaks it and on one that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import ArrayLike
from onnx import numpy_helper, parser

from edgevit.export.lint import RULES, check, resolve, view

F16, F32, I8, I64 = np.float16, np.float32, np.int8, np.int64
NONE = np.float32(np.nan)


@dataclass(frozen=True)
class Case:
    """Graphs in ONNX's text form; `stored` has the initializers of both."""

    profile: str
    bad: str
    good: str
    bad_head: dict[str, Any]
    good_head: dict[str, Any]


def model(
    body: str,
    *,
    takes: str = "float[1,8,16,16] x",
    gives: str = "float[a,b,c,d] y",
    opset: int = 17,
    ir: int = 8,
    domains: tuple[str, ...] = (),
    external: tuple[str, ...] = (),
    **stored: ArrayLike,
) -> onnx.ModelProto:
    """A model of these nodes; keyword arguments are its stored tensors."""
    imports = ", ".join(f'"{name}" : {version}' for name, version in (("", opset), *((d, 1) for d in domains)))
    text = f"<ir_version: {ir}, opset_import: [{imports}]> g ({takes}) => ({gives}) {{ {body} }}"
    made = parser.parse_model(text)
    for name, values in stored.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    for name in external:
        tensor = made.graph.initializer.add(name=name, data_type=1, dims=[8, 8, 1, 1], data_location=1)
        tensor.external_data.add(key="location", value="../../secret.bin")
    return made


def case(profile: str, bad: str, good: str, head: Any = None, other: Any = None, **both: Any) -> Case:
    """`head` and `other` are the arguments of `model` that only the bad, only the good graph has."""
    return Case(profile, bad, good, {**both, **(head or {})}, {**both, **(other or {})})


QDQ = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
ONE = {"s": F32(0.1), "z": I8(0)}
WEIGHTS = {"w": np.ones((8, 8, 1, 1), F32)}
INT8_WEIGHTS = {"w8": np.ones((16, 16, 3, 3), I8), "ws": np.full(16, 0.1, F32), "wz": np.zeros(16, I8)}
WIDE = "float[1,16,16,16] x"
TOKENS = "float[2,4,49,32] q, float[2,4,32,49] k, float[2,4,49,32] v"
BIAS = np.zeros((1, 4, 49, 49), F32)
FUSED = "a = MatMul(q, k) b = Add(a, bias) p = Softmax<axis=-1>(b) y = MatMul(p, v)"
NORM = (
    "m = ReduceMean<axes=[-1]>(x) c = Sub(x, m) p = Pow(c, two) v = ReduceMean<axes=[-1]>(p) "
    "e = Add(v, eps) r = Sqrt(e) y = Div(c, r)"
)
NORM_PARTS = {"two": F32(2), "eps": F32(1e-5)}
HALF_PARTS = {"two": F16(2), "eps": F16(1e-5)}
ONE_NORM = "y = LayerNormalization(x, g)"
HALF = {"takes": "float16[1,8,16,16] x", "gives": "float16[a,b,c,d] y"}
DYNAMIC = "float[n,8,16,16] x"
ANY_SIZE = "float[1,8,h,w] x"
RELU = "y = Relu(x)"
IF = (
    "y = If(c) <then_branch = g1 () => (float[1,8,16,16] t) { t = Relu(x) }, "
    "else_branch = g2 () => (float[1,8,16,16] e) { e = Neg(x) }>"
)

CASES = {
    # operators
    "TRT-OPS-001": case("8.5", ONE_NORM, RELU, g=np.ones(16, F32)),
    "TRT-OPS-002": case("10.3", "y = com.microsoft.FusedConv(x)", RELU, domains=("com.microsoft",)),
    "TRT-OPS-003": case("10.3", "y = mine.Wonder(x)", RELU, domains=("mine",)),
    "TRT-OPS-004": case("8.6", "y = ReduceMean(x, axes)", "y = ReduceMean(x)", opset=18, axes=np.array([1])),
    "TRT-OPS-005": case("8.6", RELU, RELU, {"opset": 18}),
    "TRT-OPS-006": case("8.6", RELU, RELU, {"ir": 10}),
    "TRT-OPS-007": case(
        "8.5",
        "k = ReduceMax<keepdims=0>(n) y, i = TopK(x, k)",
        "y, i = TopK(x, one)",
        {"takes": "float[1,8] x, int64[1] n"},
        takes="float[1,8] x",
        one=np.array([1]),
    ),
    "TRT-OPS-008": case(
        "10.3", 'y = Einsum<equation="...i,...i->...">(x, x)', 'y = Einsum<equation="abcd,abcd->abc">(x, x)'
    ),
    "OV-OPS-001": case("openvino", "y = Det(x)", RELU),
    "OV-OPS-002": case("openvino", "y = mine.Wonder(x)", RELU, domains=("mine",)),
    "CML-OPS-001": case("coreml-ios17", "y = Det(x)", RELU),
    "CML-ANE-001": case("coreml-ios17", "y, i = TopK(x, one)", RELU, one=np.array([1])),
    "GEN-FLOW-001": case("openvino", IF, RELU, {"takes": "float[1,8,16,16] x, bool c"}),
    # quantization
    "TRT-QDQ-001": case("11", f"{QDQ} y = Relu(d)", f"{QDQ} y = Relu(d)", {"s": F32(0.1), "z": I8(3)}, ONE),
    "TRT-QDQ-002": case("11", f"{QDQ} y = Relu(d)", f"{QDQ} y = Relu(d)", {"s": F32(0.1), "z": np.uint8(0)}, ONE),
    "TRT-QDQ-003": case(
        "11",
        "b = DequantizeLinear(bq, s) y = Conv(x, w, b)",
        "y = Conv(x, w, b)",
        {"bq": np.ones(8, np.int32)},
        {"b": np.ones(8, F32)},
        **WEIGHTS,
        s=F32(0.1),
    ),
    "TRT-QDQ-004": case(
        "11",
        "y = QuantizeLinear(x, s, z)",
        "q = QuantizeLinear(x, s, z) m = Reshape(q, t) y = DequantizeLinear(m, s, z)",
        {"gives": "int8[a,b,c,d] y"},
        **ONE,
        t=np.array([1, 2048]),
    ),
    "TRT-QDQ-005": case(
        "11",
        "d = Cast<to=1>(c) y = Add(x, d)",
        "d = DequantizeLinear(c, s, z) y = Add(x, d)",
        c=np.ones((1, 8, 1, 1), I8),
        **ONE,
    ),
    "TRT-QDQ-006": case(
        "11",
        "q = QuantizeLinear<axis=1>(x, s, z) y = DequantizeLinear<axis=1>(q, s, z)",
        f"{QDQ} y = Relu(d)",
        {"s": np.full(8, 0.1, F32), "z": np.zeros(8, I8)},
        ONE,
    ),
    "TRT-QDQ-007": case(
        "11",
        "w = DequantizeLinear<axis=1>(w8, ws, wz) y = Conv(x, w)",
        "w = DequantizeLinear<axis=0>(w8, ws, wz) y = Conv(x, w)",
        takes=WIDE,
        **INT8_WEIGHTS,
    ),
    "TRT-QDQ-008": case("11", f"{QDQ} y = Cast<to=10>(d)", f"{QDQ} y = Relu(d)", **ONE, gives="float16[a,b,c,d] y"),
    "TRT-QDQ-009": case(
        "10.3",
        "m = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, m, z) y = DequantizeLinear(q, m, z)",
        f"{QDQ} y = Relu(d)",
        **ONE,
    ),
    "GEN-QDQ-001": case(
        "openvino", f"{QDQ} y = Relu(d)", f"{QDQ} y = Relu(d)", {"s": F32(0)}, {"s": F32(0.1)}, z=I8(0)
    ),
    "TRT-QDQ-010": case("11", "q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", f"{QDQ} y = Relu(d)", **ONE),
    "TRT-QDQ-011": case(
        "11",
        f"{QDQ} w = DequantizeLinear<axis=0>(w8, ws, wz) c = Conv<pads=[1,1,1,1]>(d, w) y = Add(c, x)",
        f"{QDQ} w = DequantizeLinear<axis=0>(w8, ws, wz) c = Conv<pads=[1,1,1,1]>(d, w) y = Add(c, d)",
        takes=WIDE,
        **ONE,
        **INT8_WEIGHTS,
    ),
    "TRT-QDQ-012": case(
        "11",
        f"{QDQ} a = MatMul(d, d) p = Softmax(a) y = Relu(p)",
        f"{QDQ} a = MatMul(d, d) p = Softmax(a) y = Relu(p)",
        {"takes": "float[1,4,784,784] x"},
        {"takes": "float[1,4,196,196] x"},
        **ONE,
    ),
    "TRT-QDQ-013": case(
        "11",
        f"{QDQ} v = DequantizeLinear(m, s, z) y = MatMul(d, v)",
        f"{QDQ} v = DequantizeLinear(m, s, z) y = MatMul(d, v)",
        {"takes": "float[1,32] x"},
        {"takes": "float[49,32] x"},
        **ONE,
        m=np.ones((32, 32), I8),
    ),
    "TRT-QDQ-014": case("11", f"{QDQ} y = Relu(d)", RELU, **ONE),
    # precision
    "GEN-FP16-001": case("11", NORM, NORM, {**HALF, **HALF_PARTS}, NORM_PARTS),
    "TRT-FP16-001": case("10.3", NORM, ONE_NORM, NORM_PARTS, {"g": np.ones(16, F32)}),
    "TRT-FP16-002": case(
        "10.3",
        ONE_NORM,
        "f = Cast<to=1>(x) h = LayerNormalization(f, g) y = Cast<to=10>(h)",
        {"g": np.ones(16, F16)},
        {"g": np.ones(16, F32)},
        **HALF,
    ),
    "GEN-FP16-002": case(
        "11", "y = Add(x, c)", "y = Add(x, c)", {"c": np.array([-np.inf], F16)}, {"c": np.array([-1e4], F16)}, **HALF
    ),
    "GEN-FP16-003": case("coreml-ios17", "y = Add(x, c)", "y = Add(x, c)", {"c": F32(-1e6)}, {"c": F32(-1e4)}),
    "TRT-FP16-003": case("10.3", "y = Add(x, c)", "y = Add(x, c)", {"c": F32(-1e6)}, {"c": F32(-1e4)}),
    "GEN-NAN-001": case("openvino", "y = Add(x, c)", "y = Add(x, c)", {"c": np.array([1, NONE])}, {"c": F32(1)}),
    "TRT-TYPE-001": case("11", "d = Cast<to=11>(x) y = Cast<to=1>(d)", RELU),
    "TRT-TYPE-002": case(
        "8.6", "y = Cast<to=7>(x)", "y = Cast<to=6>(x)", {"gives": "int64[a,b,c,d] y"}, {"gives": "int32[a,b,c,d] y"}
    ),
    "TRT-TYPE-003": case("11", "i = Cast<to=5>(x) y = Cast<to=1>(i)", RELU),
    # shapes
    "TRT-RANK-001": case(
        "11",
        "y = Reshape(x, t)",
        "y = Reshape(x, t)",
        {"t": np.array([1] * 7 + [8, 256])},
        {"t": np.array([1] * 6 + [8, 256])},
    ),
    "CML-RANK-001": case(
        "coreml-ios16",
        "y = Reshape(x, t)",
        "y = Reshape(x, t)",
        {"t": np.array([1, 2, 4, 4, 4, 16])},
        {"t": np.array([2, 4, 4, 4, 16])},
    ),
    "TRT-DYN-001": case("10.3", RELU, RELU, {"takes": DYNAMIC}),
    "TRT-DYN-002": case("10.3", RELU, RELU, {"takes": ANY_SIZE}, {"takes": DYNAMIC}),
    "CML-DYN-001": case("coreml-ios18", RELU, RELU, {"takes": DYNAMIC}),
    "OV-DYN-001": case("openvino", RELU, RELU, {"takes": ANY_SIZE}, {"takes": DYNAMIC}),
    "GEN-BATCH-001": case(
        "10.3",
        "y = Reshape(x, t)",
        "y = Reshape(x, t)",
        {"t": np.array([1, 2048])},
        {"t": np.array([-1, 2048])},
        takes=DYNAMIC,
    ),
    "GEN-BATCH-002": case(
        "openvino",
        "y = Reshape(x, t)",
        "y = Reshape(x, t)",
        {"t": np.array([1, -1])},
        {"t": np.array([0, -1])},
        takes=DYNAMIC,
    ),
    "GEN-SHAPE-001": case("11", "y = NonZero(x)", RELU, {"gives": "int64[a,b] y"}),
    "GEN-SHAPE-002": case(
        "11", "s = Shape(x) y = Reshape(x, s)", "s = Shape(x) y = Reshape(x, s)", None, {"takes": DYNAMIC}
    ),
    "GEN-SHAPE-003": case(
        "11", "i = Mod(n, m) y = Gather<axis=1>(x, i)", "y = Gather<axis=1>(x, n)", n=np.array([0, 9]), m=np.array([8])
    ),
    "GEN-GRAPH-001": case("11", "y = Add(x, ghost)", RELU),
    "GEN-GRAPH-002": case("11", "y = Relu(a) a = Neg(x)", "a = Neg(x) y = Relu(a)"),
    "GEN-EXT-001": case("11", "y = Conv(x, w)", "y = Conv(x, w)", {"external": ("w",)}, WEIGHTS),
    # attention and products
    "TRT-ATT-001": case("8.5", FUSED, RELU, {"takes": TOKENS}, bias=BIAS),
    "TRT-ATT-002": case(
        "10.3",
        "a = MatMul(q, k) c = Mul(a, scale) p = Softmax<axis=-1>(c) y = MatMul(p, v)",
        FUSED,
        takes=TOKENS,
        bias=BIAS,
        scale=F32(0.2),
    ),
    "TRT-ATT-003": case("11", "y = Attention(x, x, x)", "y = Attention(x, x, x)", None, HALF, opset=23),
    "TRT-GEMM-001": case("10.3", "y = Conv(x, w)", "y = Conv(x, w)", {"w": np.ones((12, 8, 1, 1), F32)}, WEIGHTS),
    "TRT-GEMM-002": case(
        "10.3",
        "h = MatMul(x, m) y = Relu(h)",
        "h = MatMul(x, m) y = Relu(h)",
        {"takes": "float[1,16] x"},
        {"takes": "float[49,16] x"},
        m=np.ones((16, 16), F32),
    ),
}


def found(profile: str, body: str, head: dict[str, Any]) -> list[str]:
    return [finding.rule for finding in check(view(model(body, **head)), resolve(profile))]


def test_every_rule_has_a_graph_that_breaks_it_and_one_that_does_not() -> None:
    assert sorted(CASES) == sorted(rule.id for rule in RULES)


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_finds_what_breaks_it_and_nothing_else(rule: str) -> None:
    row = CASES[rule]
    assert rule in found(row.profile, row.bad, row.bad_head)
    assert rule not in found(row.profile, row.good, row.good_head)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_says_why_what_to_do_and_where_it_comes_from(rule: Any) -> None:
    assert rule.level in ("error", "warning", "advice")
    assert rule.id.split("-")[0] in {"tensorrt": ["TRT"], "coreml": ["CML"], "openvino": ["OV"]}.get(
        rule.targets[0] if len(rule.targets) == 1 else "", ["GEN"]
    )
    assert all((rule.title, rule.why, rule.do))
    assert rule.source.startswith("https://")


VERSIONS = [
    ("TRT-OPS-001", "8.5", "8.6"),  # LayerNormalization
    ("TRT-OPS-007", "8.5", "8.6"),  # a K that is computed
    ("TRT-OPS-008", "10.11", "10.12"),
    ("TRT-QDQ-009", "10.15", "11"),
    ("TRT-TYPE-002", "8.6", "10.0"),
    ("TRT-ATT-001", "8.5", "8.6"),
    ("TRT-FP16-003", "10.15", "11"),
]


@pytest.mark.parametrize(("rule", "last", "first"), VERSIONS)
def test_a_rule_ends_with_the_release_that_lifted_it(rule: str, last: str, first: str) -> None:
    row = CASES[rule]
    assert rule in found(last, row.bad, row.bad_head)
    assert rule not in found(first, row.bad, row.bad_head)


def test_a_fused_attention_is_not_advised_on_and_each_hindrance_is_named() -> None:
    def why(body: str, takes: str = TOKENS) -> list[str]:
        made = model(body, takes=takes, bias=BIAS, scale=F32(0.2), t=np.array([2, 4, 49, 49]))
        return [f.why.split(":")[0] for f in check(view(made), resolve("10.3")) if f.rule == "TRT-ATT-002"]

    tail = "p = Softmax<axis=-1>(b) y = MatMul(p, v)"
    assert why(FUSED) == []
    assert why(f"a = MatMul(q, k) b = Div(a, scale) {tail}") == ["the scores are scaled"]
    assert why(f"a = MatMul(q, k) b = Reshape(a, t) {tail}") == ["the scores are reshaped or transposed"]
    assert why(f"a = MatMul(q, k) c = Add(a, bias) b = Add(c, bias) {tail}") == [
        "the scores are added to more than once"
    ]
    assert why("a = MatMul(q, k) p = Softmax<axis=2>(a) y = MatMul(p, v)") == ["the softmax is not over the last axis"]
    assert why("a = MatMul(q, k) p = Softmax(a) z = IsNaN(p) c = Where(z, a, p) y = MatMul(c, v)") == [
        "the weights are changed after the softmax, the softmax is read more than once"
    ]
    assert why("a = MatMul(q, k) p = Softmax(a) c = Add(p, bias) y = MatMul(c, v)") == [
        "the weights are changed after the softmax"
    ]
    flat = "float[8,49,32] q, float[8,32,49] k, float[8,49,32] v"
    assert why("a = MatMul(q, k) p = Softmax(a) y = MatMul(p, v)", flat) == ["rank 3, not 4"]


@pytest.mark.parametrize(
    ("takes", "rows"), [("n,16", "one"), ("n,1,16", "one"), ("n,49,16", "many"), ("1,n,16", "many")]
)
def test_a_dynamic_batch_counts_as_one_row_and_any_other_unknown_length_as_many(takes: str, rows: str) -> None:
    stored = {"m": np.ones((16, 16), F32), "t": np.array([-1, 16])}
    straight = model("h = MatMul(x, m) y = Relu(h)", takes=f"float[{takes}] x", **stored)
    assert ("TRT-GEMM-002" in [f.rule for f in check(view(straight), resolve("11"))]) is (rows == "one")
    merged = model("r = Reshape(x, t) h = MatMul(r, m) y = Relu(h)", takes="float[n,49,16] x", **stored)
    assert "TRT-GEMM-002" not in [f.rule for f in check(view(merged), resolve("11"))]


@pytest.mark.parametrize("limit", ["Clip(x, c)", "Clip(x, lo, c)"])
def test_a_bound_beyond_float16_is_no_finding(limit: str) -> None:
    made = model(f"y = {limit}", c=F32(3e38), lo=F32(-3e38))
    assert [f.rule for f in check(view(made), resolve("coreml-ios17"))] == []


def test_a_scalar_constant_is_not_quantized_away() -> None:
    """TensorRT's builder refuses it, though a DequantizeLinear reads it."""
    made = model("d = DequantizeLinear(c, s, z) y = Add(x, d)", c=I8(5), **ONE)
    (finding,) = [f for f in check(view(made), resolve("11")) if f.level == "error"]
    assert (finding.rule, finding.node) == ("TRT-QDQ-005", "d")
    assert finding.why.startswith("a single number")


@pytest.mark.parametrize(
    ("op", "axis", "fits"),
    [("MatMul", 1, True), ("MatMul", -1, True), ("MatMul", 0, False), ("Gemm", 1, True), ("Gemm", 0, False)],
)
def test_scales_of_weights_lie_along_the_outputs(op: str, axis: int, fits: bool) -> None:
    made = model(f"w = DequantizeLinear<axis={axis}>(w8, ws, wz) y = {op}(x, w)", takes="float[49,16] x",
                 w8=np.ones((16, 16), I8), ws=np.full(16, 0.1, F32), wz=np.zeros(16, I8))  # fmt: skip
    assert ("TRT-QDQ-007" in [f.rule for f in check(view(made), resolve("11"))]) is not fits


def test_the_form_of_an_operator_is_judged_by_what_it_uses_and_not_by_its_opset() -> None:
    """Reshape and Cast got newer versions too, which say nothing else unless they use what is new."""
    body = "r = Reshape(x, t) c = Cast<to=1, saturate=1>(r) y = Split<num_outputs=2>(c)"
    rules = [(f.rule, f.node) for f in check(view(model(body, opset=19, t=np.array([8, 256]))), resolve("8.6"))]
    assert rules == [("TRT-OPS-004", "y"), ("TRT-OPS-005", "opset")]
