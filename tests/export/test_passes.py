"""The graph passes, each on a few nodes: where it applies, where it must not, and that the function stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser, shape_inference

from edgevit.errors import ExportError
from edgevit.export.passes import (
    BLOCK,
    CLEANUP,
    CPU_KERNELS,
    FINISH,
    LARGE_SOFTMAX,
    MANY_POSITIONS,
    SHORT_AXIS,
    FuseAttention,
    GemmTranspose,
    PointwiseGemm,
    ShortSoftmax,
    run,
)

Array = NDArray[np.float32]
SAME = 1e-6  # relative to the largest output: float32 sums in another order
HEADER = '<ir_version: 10, opset_import: ["" : 20]> main '


def graph(text: str, **constants: Array) -> onnx.ModelProto:
    """An ONNX model from its text, `(float[2] x) => (float[2] y) { y = Relu(x) }`, and named constants.

    Checked, and inner shapes are written in, as the exporter does.
    """
    proto = parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(proto, full_check=True)
    return shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def outputs(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """What ONNX Runtime computes with the graph as it stands, none of its own rewrites applied."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # two shared cores
    options.log_severity_level = 3  # an unused initializer is a warning, and some passes leave one to the next
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def signature(proto: onnx.ModelProto) -> list[bytes]:
    return [value.SerializeToString() for value in (*proto.graph.input, *proto.graph.output)]


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def applied(one: ir.passes.PassBase, before: onnx.ModelProto, **feeds: Array) -> list[str]:
    """Run a pass that must apply: same function, same signature, nothing to do a second time. Operators in order."""
    model = ir.from_proto(before)
    result = one(model)
    assert result.modified
    assert result.model is model
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert signature(after) == signature(before)
    for new, old in zip(outputs(after, feeds), outputs(before, feeds), strict=True):
        assert new.shape == old.shape and new.dtype == old.dtype
        assert np.abs(new - old).max() <= SAME * np.abs(old).max()
    assert not one(model).modified
    assert ir.to_proto(model) == after
    return kinds(after)


def left(one: ir.passes.PassBase, proto: onnx.ModelProto) -> None:
    """Run a pass that must not apply."""
    model = ir.from_proto(proto)
    before = ir.to_proto(model)
    assert not one(model).modified
    assert ir.to_proto(model) == before


def constants(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}


# ---- GemmTranspose


def transposed_gemm(attributes: str = "", rows: int = 3) -> onnx.ModelProto:
    body = f"t = Transpose<perm = [1, 0]>(a) y = Gemm{attributes}(t, b, c)"
    return graph(f"(float[4, {rows}] a) => (float[{rows}, 5] y) {{ {body} }}", b=normal(4, 5), c=normal(5, seed=1))


@pytest.mark.parametrize("attributes", ["", "<alpha = 0.5, beta = 2.0>", "<transA = 0>"])
def test_transpose_goes_into_the_gemm(attributes: str) -> None:
    proto = transposed_gemm(attributes)
    assert applied(GemmTranspose(), proto, a=normal(4, 3)) == ["Transpose", "Gemm"]  # the next pass removes the first
    gemm = run(ir.from_proto(proto), [GemmTranspose()]).graph[-1]
    assert gemm.attributes.get_int("transA") == 1
    assert [value.name for value in gemm.inputs if value is not None] == ["a", "b", "c"]


def test_transpose_cancels_a_transposed_operand() -> None:
    text = "(float[3, 4] a) => (float[3, 5] y) { t = Transpose<perm = [1, 0]>(a) y = Gemm<transA = 1>(t, b) }"
    proto = graph(text, b=normal(4, 5))
    applied(GemmTranspose(), proto, a=normal(3, 4))
    gemm = run(ir.from_proto(proto), [GemmTranspose()]).graph[-1]
    assert gemm.attributes.get_int("transA") == 0


def test_transpose_with_another_reader_stays() -> None:
    text = "(float[4, 3] a) => (float[3, 5] y, float[3, 4] z) { z = Transpose<perm = [1, 0]>(a) y = Gemm(z, b) }"
    proto = graph(text, b=normal(4, 5))
    applied(GemmTranspose(), proto, a=normal(4, 3))
    assert kinds(ir.to_proto(run(ir.from_proto(proto), CLEANUP))) == ["Transpose", "Gemm"]


def test_unread_transpose_is_cleaned_up() -> None:
    assert kinds(ir.to_proto(run(ir.from_proto(transposed_gemm()), CLEANUP))) == ["Gemm"]


def test_dynamic_rows_are_no_hindrance() -> None:
    text = "(float[4, n] a) => (float[n, 5] y) { t = Transpose<perm = [1, 0]>(a) y = Gemm(t, b) }"
    applied(GemmTranspose(), graph(text, b=normal(4, 5)), a=normal(4, 7))


def test_right_operand_is_not_the_left() -> None:
    text = "(float[3, 4] a, float[5, 4] b) => (float[3, 5] y) { t = Transpose<perm = [1, 0]>(b) y = Gemm(a, t) }"
    left(GemmTranspose(), graph(text))


def test_matmul_is_no_gemm() -> None:
    text = "(float[4, 3] a) => (float[3, 5] y) { t = Transpose<perm = [1, 0]>(a) y = MatMul(t, b) }"
    left(GemmTranspose(), graph(text, b=normal(4, 5)))


def test_plain_gemm_stays() -> None:
    left(GemmTranspose(), graph("(float[3, 4] a) => (float[3, 5] y) { y = Gemm(a, b) }", b=normal(4, 5)))


def test_a_transpose_that_moves_nothing_is_none() -> None:
    text = "(float[4, 4] a) => (float[4, 5] y) { t = Transpose<perm = [0, 1]>(a) y = Gemm(t, b) }"
    proto = graph(text, b=normal(4, 5))
    after = ir.to_proto(run(ir.from_proto(proto), [GemmTranspose()]))
    feeds = {"a": normal(4, 4)}
    assert np.abs(outputs(after, feeds)[0] - outputs(proto, feeds)[0]).max() <= SAME


def test_transposes_in_a_row() -> None:
    text = """(float[3, 4] a) => (float[3, 5] y)
        { s = Transpose<perm = [1, 0]>(a) t = Transpose<perm = [1, 0]>(s) y = Gemm(t, b) }"""
    applied(GemmTranspose(), graph(text, b=normal(4, 5)), a=normal(3, 4))


# ---- ShortSoftmax

PARTS = ["ReduceMax", "Sub", "Exp", "ReduceSum", "Div"]


def softmax(shape: Sequence[int | str], axis: int | None) -> onnx.ModelProto:
    attribute = "" if axis is None else f"<axis = {axis}>"
    dims = ", ".join(map(str, shape))
    return graph(f"(float[{dims}] x) => (float[{dims}] y) {{ y = Softmax{attribute}(x) }}")


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 2, 6, 784), 2),
        ((1, 2, 6, 784), -2),
        ((6, 1024), 0),
        ((3, SHORT_AXIS - 1, 16, 16), 1),
        ((1, 1, LARGE_SOFTMAX), 1),
        ((2, 3, 4, 5, 64), 3),
    ],
)
def test_short_inner_axis_is_taken_apart(shape: tuple[int, ...], axis: int) -> None:
    assert applied(ShortSoftmax(), softmax(shape, axis), x=normal(*shape)) == PARTS


def test_dynamic_batch_counts_as_one() -> None:
    proto = softmax(("n", 2, 6, 400), 2)
    assert applied(ShortSoftmax(), proto, x=normal(3, 2, 6, 400)) == PARTS
    left(ShortSoftmax(), softmax(("n", 2, 6, 300), 2))  # 3600 elements in one picture


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 2, 784, 6), 3),
        ((1, 2, 784, 6), -1),
        ((1, 2, 784, 6), None),
        ((1, SHORT_AXIS, 32, 32), 1),
        ((1, 196, 6, 64), 1),
        ((1, 2, 6, 196), 2),
        ((1, 1, LARGE_SOFTMAX - 1), 1),
    ],
    ids=["last", "last from the end", "last by default", "long", "very long", "small", "just too small"],
)
def test_other_softmaxes_stay(shape: tuple[int, ...], axis: int | None) -> None:
    left(ShortSoftmax(), softmax(shape, axis))


def test_axis_of_unknown_length_stays() -> None:
    left(ShortSoftmax(), softmax((64, "n", 128), 1))


def test_large_scores_do_not_overflow() -> None:
    x = 300 * normal(2, 6, 1024)  # e^300 is beyond float32
    applied(ShortSoftmax(), softmax((2, 6, 1024), 1), x=x)
    after = ir.to_proto(run(ir.from_proto(softmax((2, 6, 1024), 1)), [ShortSoftmax()]))
    assert np.abs(outputs(after, {"x": x})[0].sum(1) - 1).max() <= SAME


def test_softmax_between_others_keeps_its_neighbours() -> None:
    text = "(float[2, 6, 512] x) => (float[2, 6, 512] y) { a = Neg(x) b = Softmax<axis = 1>(a) y = Mul(b, x) }"
    assert applied(ShortSoftmax(), graph(text), x=normal(2, 6, 512)) == ["Neg", *PARTS, "Mul"]


def test_two_softmaxes_share_their_axis_constant() -> None:
    text = """(float[2, 6, 512] x) => (float[2, 6, 512] y, float[2, 6, 512] z)
        { y = Softmax<axis = 1>(x) a = Neg(x) z = Softmax<axis = 1>(a) }"""
    proto = graph(text)
    assert applied(ShortSoftmax(), proto, x=normal(2, 6, 512)) == [*PARTS, "Neg", *PARTS]
    assert list(constants(ir.to_proto(run(ir.from_proto(proto), CPU_KERNELS))).values()) == [(1,)]


# ---- FuseAttention (more of it in test_passes_attention.py)


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 1, 1, 5), (1, 3, 5, 1), (1, 1, 1, 1)], ids=str)
def test_a_bias_that_add_would_spread_over_queries_or_keys(shape: tuple[int, ...]) -> None:
    """ONNX Runtime's Attention takes a bias for each query and key, and refuses a graph with less when it runs."""
    text = """(float[10, 12] a, float[10, 12] b, float[10, 12] c) => (float[10, 12] y) {
        qr = Reshape(a, heads) q = Transpose<perm = [0, 2, 1, 3]>(qr)
        kr = Reshape(b, heads) k = Transpose<perm = [0, 2, 3, 1]>(kr)
        vr = Reshape(c, heads) v = Transpose<perm = [0, 2, 1, 3]>(vr)
        s = MatMul(q, k) z = Add(s, bias) p = Softmax<axis = -1>(z) o = MatMul(p, v)
        t = Transpose<perm = [0, 2, 1, 3]>(o) y = Reshape(t, rows) }"""
    stored: dict[str, Any] = {"heads": np.array([2, 5, 3, 4]), "rows": np.array([10, 12]), "bias": normal(*shape)}
    proto, feeds = graph(text, **stored), {name: normal(10, 12, seed=i) for i, name in enumerate("abc")}
    after = ir.to_proto(run(ir.from_proto(proto), [FuseAttention()]))
    assert np.abs(outputs(after, feeds)[0] - outputs(proto, feeds)[0]).max() <= SAME


# ---- PointwiseGemm

SIDE = int(MANY_POSITIONS**0.5)


def pointwise(
    c_in: int = 8,
    c_out: int = 24,
    *,
    batch: int | str = 1,
    size: tuple[int | str, int | str] = (SIDE, SIDE),
    kernel: int = 1,
    attributes: str = "",
    groups: int = 1,
    bias: bool = True,
    out: str | None = None,
) -> onnx.ModelProto:
    height, width = size
    out = out or f"{height}, {width}"
    stored = {"w": normal(c_out, c_in // groups, kernel, kernel, scale=c_in**-0.5)}
    if bias:
        stored["b"] = normal(c_out, seed=1)
    call = f"Conv{attributes}(x, w{', b' if bias else ''})"
    body = f"(float[{batch}, {c_in}, {height}, {width}] x) => (float[{batch}, {c_out}, {out}] y) {{ y = {call} }}"
    return graph(body, **stored)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("c_in", "c_out"), [(8, 24), (24, 8), (BLOCK - 1, 64), (64, BLOCK - 1), (1, 32), (32, 1), (3, 5)]
)
def test_narrow_pointwise_is_a_gemm(c_in: int, c_out: int, bias: bool) -> None:
    proto = pointwise(c_in, c_out, bias=bias)
    assert applied(PointwiseGemm(), proto, x=normal(1, c_in, SIDE, SIDE)) == ["Reshape", "Gemm", "Reshape"]


@pytest.mark.parametrize(
    "attributes", ["<kernel_shape = [1, 1]>", "<strides = [1, 1], pads = [0, 0, 0, 0], group = 1>"]
)
def test_defaults_may_be_written_out(attributes: str) -> None:
    applied(PointwiseGemm(), pointwise(attributes=attributes), x=normal(1, 8, SIDE, SIDE))


@pytest.mark.parametrize("size", [(7, 28), (56, 60), (1, MANY_POSITIONS)])
def test_map_need_not_be_square(size: tuple[int, int]) -> None:
    applied(PointwiseGemm(), pointwise(size=size), x=normal(1, 8, *size))


@pytest.mark.parametrize(
    "proto",
    [
        pytest.param(lambda: pointwise(BLOCK, 2 * BLOCK), id="whole blocks"),
        pytest.param(lambda: pointwise(BLOCK + 4, BLOCK + 8), id="more than a block"),
        pytest.param(lambda: pointwise(size=(SIDE - 1, SIDE)), id="few positions"),
        pytest.param(lambda: pointwise(batch=2), id="two pictures"),
        pytest.param(lambda: pointwise(batch="n"), id="dynamic batch"),
        pytest.param(lambda: pointwise(size=("h", "w")), id="dynamic size"),
        pytest.param(lambda: pointwise(groups=4, attributes="<group = 4>"), id="grouped"),
        pytest.param(lambda: pointwise(size=(28, 28), out="14, 14", attributes="<strides = [2, 2]>"), id="strided"),
        pytest.param(lambda: pointwise(kernel=3, attributes="<pads = [1, 1, 1, 1]>"), id="3x3"),
    ],
)
def test_other_convolutions_stay(proto: Any) -> None:
    left(PointwiseGemm(), proto())


@pytest.mark.parametrize(
    "text",
    [
        "(float[1, 8, 256] x) => (float[1, 4, 256] y) { y = Conv(x, w) }",
        "(float[1, 8, 4, 16, 16] x) => (float[1, 4, 4, 16, 16] y) { y = Conv(x, w) }",
    ],
    ids=["a row", "a volume"],
)
def test_other_ranks_stay(text: str) -> None:
    rank = text.split("]")[0].count(",") - 1
    left(PointwiseGemm(), graph(text, w=normal(4, 8, *[1] * rank)))


@pytest.mark.parametrize("given", ["w", "b"])
def test_computed_weights_stay(given: str) -> None:
    shapes = {"w": "float[4, 8, 1, 1] w", "b": "float[4] b"}
    stored = {"w": normal(4, 8, 1, 1), "b": normal(4)}
    del stored[given]
    text = f"(float[1, 8, 14, 14] x, {shapes[given]}) => (float[1, 4, 14, 14] y) {{ y = Conv(x, w, b) }}"
    left(PointwiseGemm(), graph(text, **stored))


def test_padded_pointwise_stays() -> None:
    out = f"{SIDE + 2}, {SIDE + 2}"
    left(PointwiseGemm(), pointwise(attributes="<pads = [1, 1, 1, 1]>", out=out))


def test_shared_weights_serve_both() -> None:
    text = "(float[1, 8, 14, 14] x) => (float[1, 8, 14, 14] y) { a = Conv(x, w, b) y = Conv(a, w, b) }"
    proto = graph(text, w=normal(8, 8, 1, 1, scale=0.35), b=normal(8, seed=1))
    assert applied(PointwiseGemm(), proto, x=normal(1, 8, 14, 14)) == ["Reshape", "Gemm", "Reshape"] * 2
    after = ir.to_proto(run(ir.from_proto(proto), CPU_KERNELS))
    assert sorted(constants(after).values()) == [(2,), (4,), (8, 1), (8, 8)]  # two shapes, one bias, one weight
    assert (
        np.abs(outputs(after, {"x": normal(1, 8, 14, 14)})[0] - outputs(proto, {"x": normal(1, 8, 14, 14)})[0]).max()
        < 1e-5
    )


def test_read_by_others_and_put_out() -> None:
    text = "(float[1, 8, 14, 14] x) => (float[1, 4, 14, 14] y, float[1, 4, 14, 14] z) { y = Conv(x, w) z = Relu(y) }"
    proto = graph(text, w=normal(4, 8, 1, 1))
    assert applied(PointwiseGemm(), proto, x=normal(1, 8, 14, 14)) == ["Reshape", "Gemm", "Reshape", "Relu"]


# ---- the sequences


def cleaned(proto: onnx.ModelProto, **feeds: Array) -> onnx.ModelProto:
    """CLEANUP applied: same function and signature; a second application changes nothing."""
    model = run(ir.from_proto(proto), CLEANUP)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert signature(after) == signature(proto)
    for new, old in zip(outputs(after, feeds), outputs(proto, feeds), strict=True):
        assert np.array_equal(new, old)
    assert ir.to_proto(run(model, CLEANUP)) == after
    return after


def test_identities_go() -> None:
    text = "(float[3] x) => (float[3] y) { a = Identity(x) b = Relu(a) y = Identity(b) }"
    assert kinds(cleaned(graph(text), x=normal(3))) == ["Relu"]


def test_input_that_is_the_output_keeps_its_identity() -> None:
    assert kinds(cleaned(graph("(float[3] x) => (float[3] y) { y = Identity(x) }"), x=normal(3))) == ["Identity"]


def test_what_is_computed_twice_is_computed_once() -> None:
    text = "(float[3] x) => (float[3] y) { a = Exp(x) b = Exp(x) y = Add(a, b) }"
    assert kinds(cleaned(graph(text), x=normal(3))) == ["Exp", "Add"]


def test_equal_outputs_both_stay() -> None:
    proto = graph("(float[3] x) => (float[3] y, float[3] z) { y = Exp(x) z = Exp(x) }")
    after = ir.to_proto(run(ir.from_proto(proto), CLEANUP))
    assert signature(after) == signature(proto)
    assert kinds(after).count("Exp") == 1


def test_unread_nodes_and_constants_go() -> None:
    after = cleaned(
        graph("(float[3] x) => (float[3] y) { a = Exp(x) y = Add(x, c) }", c=normal(3), d=normal(3)), x=normal(3)
    )
    assert kinds(after) == ["Add"]
    assert set(constants(after)) == {"c"}


def test_equal_constants_become_one() -> None:
    text = """(float[2, 3] x) => (float[3, 2] y, float[3, 2] z)
        { s = Constant<value_ints = [3, 2]>() y = Reshape(x, s)
          t = Constant<value_ints = [3, 2]>() a = Neg(x) z = Reshape(a, t) }"""
    after = cleaned(graph(text), x=normal(2, 3))
    assert kinds(after).count("Constant") + len(constants(after)) == 1


def test_large_constants_are_lifted() -> None:
    values = ", ".join(str(i) for i in range(20))
    text = f"(float[20] x) => (float[20] y) {{ c = Constant<value = float[20] {{{values}}}>() y = Add(x, c) }}"
    after = cleaned(graph(text), x=normal(20))
    assert kinds(after) == ["Add"]
    assert list(constants(after).values()) == [(20,)]


def test_equal_initializers_become_one() -> None:
    text = "(float[1, 3] x) => (float[1, 3] y) { a = Add(x, c) b = Exp(a) y = Mul(b, d) }"
    after = cleaned(graph(text, c=normal(3), d=normal(3)), x=normal(1, 3))
    assert list(constants(after).values()) == [(3,)]


def test_nothing_to_clean() -> None:
    assert kinds(cleaned(graph("(float[3] x) => (float[3] y) { y = Relu(x) }"), x=normal(3))) == ["Relu"]


NOISY = """(float[3] x) => (float[3] y)
    { a = Exp(x) c = Constant<value = bool {1}>()
      y = If(c) <then_branch = then () => (float[3] p) { p = Neg(a) },
                 else_branch = other () => (float[3] q) { q = Abs(a) }> }"""


def note(target: Any, secret: str) -> None:
    entry = target.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", secret
    target.doc_string = secret


def test_finish_removes_what_the_exporter_noted() -> None:
    """Stack traces hold paths of the exporting machine: on the graph, its nodes and the nodes of branches."""
    proto, secret = graph(NOISY), 'File "/somewhere/private.py", line 5'
    branches = [attribute.g for attribute in proto.graph.node[-1].attribute]
    for target in (proto.graph, *proto.graph.node, *branches, *(node for branch in branches for node in branch.node)):
        note(target, secret)
    onnx.checker.check_model(proto)
    after = ir.to_proto(run(ir.from_proto(proto), FINISH))
    assert secret.encode() not in after.SerializeToString()
    assert np.array_equal(outputs(after, {"x": normal(3)})[0], outputs(proto, {"x": normal(3)})[0])


def test_finish_writes_the_shapes() -> None:
    text = "(float[n, 3] x) => (float[n, 5] y) { a = MatMul(x, w) y = Relu(a) }"
    proto = graph(text, w=normal(3, 5))
    del proto.graph.value_info[:]
    model = run(ir.from_proto(proto), FINISH)
    inner = model.graph[0].outputs[0]
    assert inner.shape is not None and [str(d) for d in inner.shape] == ["n", "5"]


def test_finish_twice_is_once() -> None:
    once = run(ir.from_proto(graph("(float[3] x) => (float[3] y) { a = Exp(x) y = Relu(a) }")), FINISH)
    proto = ir.to_proto(once)
    assert ir.to_proto(run(once, FINISH)) == proto


def test_finish_refuses_a_broken_graph() -> None:
    proto = graph("(float[3] x) => (float[3] y) { y = Relu(x) }")
    proto.graph.node[0].op_type = "Rely"
    with pytest.raises(ExportError, match=r"(?s)graph passes: .*Rely.*please report"):
        run(ir.from_proto(proto), FINISH)


def test_all_together() -> None:
    """A small attention over a feature map, as a network has it, through the sequences that the target runs."""
    text = """(float[1, 8, 28, 28] x) => (float[1, 8, 28, 28] y, float[5, 8] z) {
        i = Identity(x) m = Conv(i, w, b)
        s = Constant<value_ints = [8, 784]>() f = Reshape(m, s)
        t = Constant<value_ints = [8, 784]>() g = Reshape(m, t)
        scores = MatMul(k, f) share = Softmax<axis = 0>(scores)
        mixed = MatMul(v, share) r = Add(mixed, g)
        u = Constant<value_ints = [1, 8, 28, 28]>() y = Reshape(r, u)
        turned = Transpose<perm = [1, 0]>(g) picked = Slice(turned, from, to) back = Transpose<perm = [1, 0]>(picked)
        z = Gemm(picked, p) unused = Exp(back) }"""
    stored: dict[str, Any] = {
        "w": normal(8, 8, 1, 1, scale=0.35),
        "b": normal(8, seed=1),
        "k": normal(6, 8, seed=2),
        "v": normal(8, 6, seed=3),
        "p": normal(8, 8, seed=4),
        "from": np.array([0], np.int64),
        "to": np.array([5], np.int64),
    }
    proto = graph(text, **stored)
    after = ir.to_proto(run(ir.from_proto(proto), (*CLEANUP, *CPU_KERNELS, *FINISH)))
    onnx.checker.check_model(after, full_check=True)
    assert signature(after) == signature(proto)
    computing = [kind for kind in kinds(after) if kind != "Constant"]
    assert computing == [
        *("Reshape", "Gemm", "Reshape"),  # the convolution
        *("Reshape", "MatMul", *PARTS, "MatMul", "Add", "Reshape"),
        *("Transpose", "Slice", "Gemm"),  # nothing reads the transpose back
    ]
    for new, old in zip(
        outputs(after, {"x": normal(1, 8, 28, 28)}), outputs(proto, {"x": normal(1, 8, 28, 28)}), strict=True
    ):
        assert np.abs(new - old).max() <= 10 * SAME * np.abs(old).max()  # two rewritten sums in a row
