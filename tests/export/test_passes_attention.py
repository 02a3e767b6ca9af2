"""FuseAttention and ReshapeChain: where they apply, where they must not, and that the function stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser, shape_inference

from edgevit.export.passes import CLEANUP, FINISH, FuseAttention, ReshapeChain, run

Array = NDArray[np.float32]
SAME = 1e-6  # relative to the largest output: float32 sums in another order
HEADER = '<ir_version: 10, opset_import: ["" : 20]> main '
GROUPS, MEMBERS, HEADS, WIDTH = 4, 9, 2, 8
TOKENS, CHANNELS = GROUPS * MEMBERS, HEADS * WIDTH
INPUTS = f"float[{TOKENS}, {CHANNELS}] a, float[{TOKENS}, {CHANNELS}] b, float[{TOKENS}, {CHANNELS}] c"
OUTPUT = f"float[{TOKENS}, {CHANNELS}] y"
ATTENTION = """
    qr = Reshape(a, heads) qt = Transpose<perm = [0, 2, 1, 3]>(qr)
    kr = Reshape(b, heads) kt = Transpose<perm = [0, 2, 3, 1]>(kr)
    vr = Reshape(c, heads) vt = Transpose<perm = [0, 2, 1, 3]>(vr)
    s = MatMul(qt, kt) {bias}
    p = Softmax<axis = -1>({logits})
    o = MatMul(p, vt) ot = Transpose<perm = [0, 2, 1, 3]>(o)
    y = Reshape(ot, rows)
"""
PLAIN = ATTENTION.format(bias="", logits="s")
BIASED = ATTENTION.format(bias="z = Add(s, bias)", logits="z")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(text: str, **stored: NDArray[np.generic]) -> onnx.ModelProto:
    stored = {"heads": np.array([-1, MEMBERS, HEADS, WIDTH]), "rows": np.array([-1, CHANNELS])} | stored
    proto = parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def attention(body: str, inputs: str = INPUTS, output: str = OUTPUT, **stored: NDArray[np.generic]) -> onnx.ModelProto:
    return model(f"({inputs}) => ({output}) {{ {body} }}", **stored)


def outputs(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # two shared cores
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def abc(tokens: int = TOKENS) -> dict[str, Array]:
    return {name: normal(tokens, CHANNELS, seed=i) for i, name in enumerate("abc")}


def fused(before: onnx.ModelProto, *feeds: dict[str, Array]) -> onnx.ModelProto:
    """The graph after the pass and a cleaning: same function, and nothing to do a second time."""
    graph = ir.from_proto(before)
    assert FuseAttention()(graph).modified
    assert not FuseAttention()(graph).modified
    after = ir.to_proto(run(graph, (*CLEANUP, *FINISH)))
    for feed in feeds:
        for new, old in zip(outputs(after, feed), outputs(before, feed), strict=True):
            assert new.shape == old.shape
            assert np.abs(new - old).max() <= SAME * np.abs(old).max()
    return after


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


# Relative biases are shared by the groups, masks by the heads, merged ones by neither.
@pytest.mark.parametrize("shape", [(1, HEADS), (GROUPS, HEADS), (GROUPS, 1), (1, 1)], ids=str)
def test_attention_with_a_bias_becomes_one_operator(shape: tuple[int, int]) -> None:
    after = fused(attention(BIASED, bias=normal(*shape, MEMBERS, MEMBERS, seed=9)), abc())
    assert sorted(kinds(after)) == ["Attention", "Reshape", "Reshape", "Reshape", "Reshape"]
    assert (after.opset_import[0].version, after.ir_version) == (23, 11)
    assert {a.name: onnx.helper.get_attribute_value(a) for a in after.graph.node[3].attribute} == {
        "q_num_heads": HEADS,
        "kv_num_heads": HEADS,
        "scale": 1.0,
    }


def test_attention_without_a_bias_and_with_a_dynamic_batch() -> None:
    rows = f"[n, {CHANNELS}]"
    inputs, output = f"float{rows} a, float{rows} b, float{rows} c", f"float{rows} y"
    after = fused(attention(PLAIN, inputs, output), abc(), abc(MEMBERS), abc(7 * MEMBERS))
    assert kinds(after).count("Attention") == 1


def test_queries_of_fewer_tokens_than_keys() -> None:
    """The last block of a classifier computes the class token's query alone."""
    body = PLAIN.replace("Reshape(a, heads)", "Reshape(a, one)")
    inputs = INPUTS.replace(f"float[{TOKENS}, {CHANNELS}] a", f"float[{GROUPS}, {CHANNELS}] a")
    output = f"float[{GROUPS}, {CHANNELS}] y"
    feed = abc() | {"a": normal(GROUPS, CHANNELS, seed=5)}
    after = fused(attention(body, inputs, output, one=np.array([-1, 1, HEADS, WIDTH])), feed)
    assert kinds(after).count("Attention") == 1


@pytest.mark.parametrize(
    "body",
    [
        BIASED.replace("z = Add(s, bias)", "m = Mul(s, bias) z = Add(m, bias)"),  # LSLA's dynamic scale
        BIASED.replace("MatMul(p, vt)", "MatMul(w, vt)").replace("o = ", "w = Add(p, bias) o = "),  # its outer bias
        BIASED.replace("Add(s, bias)", "Add(s, s)"),  # not a constant
        BIASED.replace("axis = -1", "axis = 2"),
        PLAIN.replace("[0, 2, 3, 1]>(kr)", "[0, 3, 1, 2]>(kr2)").replace("kt =", "kr2 = Reshape(b, turned) kt ="),
    ],
    ids=["scale", "outer", "computed", "axis", "layout"],
)
def test_what_is_no_plain_attention_stays(body: str) -> None:
    stored = {"bias": normal(1, HEADS, MEMBERS, MEMBERS), "turned": np.array([GROUPS, HEADS, MEMBERS, WIDTH])}
    if "turned" in body:
        body = body.replace("[0, 3, 1, 2]", "[0, 1, 3, 2]")
    graph = ir.from_proto(attention(body, **stored))
    before = ir.to_proto(graph)
    assert not FuseAttention()(graph).modified
    assert ir.to_proto(graph) == before


def test_weights_that_are_read_elsewhere_stay() -> None:
    weights = f"{OUTPUT}, float[{GROUPS}, {HEADS}, {MEMBERS}, {MEMBERS}] p"
    assert not FuseAttention()(ir.from_proto(attention(PLAIN, output=weights))).modified


# ---- ReshapeChain


def reshaped(body: str, output: str = "float[4, 6] y") -> list[str]:
    stored = {"flat": np.array([24]), "cube": np.array([2, 3, 4]), "four": np.array([4, 6]), "rest": np.array([4, -1])}
    proto = model(f"(float[4, 6] x) => ({output}) {{ {body} }}", **stored)
    graph = ir.from_proto(proto)
    changed = ReshapeChain()(graph).modified
    assert not ReshapeChain()(graph).modified
    after = ir.to_proto(run(graph, CLEANUP))
    feed = {"x": normal(4, 6)}
    for new, old in zip(outputs(after, feed), outputs(proto, feed), strict=True):
        np.testing.assert_array_equal(new, old)
    return [*kinds(after), *(["changed"] if changed else [])]


def test_a_chain_becomes_its_last_reshape() -> None:
    body = "a = Relu(x) b = Reshape(a, flat) c = Reshape(b, cube) y = Relu(c)"
    assert reshaped(body, "float[2, 3, 4] y") == ["Relu", "Reshape", "Relu", "changed"]


@pytest.mark.parametrize("shape", ["four", "rest"])
def test_a_chain_that_comes_back_is_gone(shape: str) -> None:
    assert reshaped(f"a = Relu(x) b = Reshape(a, flat) c = Reshape(b, {shape}) y = Relu(c)") == [
        "Relu",
        "Relu",
        "changed",
    ]


def test_a_reshape_in_between_that_is_read_stays() -> None:
    body = "b = Reshape(x, flat) c = Reshape(b, cube) y = Relu(c) z = Relu(b)"
    assert reshaped(body, "float[2, 3, 4] y, float[24] z") == ["Reshape", "Reshape", "Relu", "Relu", "changed"]


def test_an_output_keeps_its_name_and_reshape() -> None:
    assert reshaped("a = Relu(x) y = Reshape(a, four)") == ["Relu", "Reshape"]
