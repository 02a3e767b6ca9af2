"""Every pass of the older operator set against ONNX Runtime: the same graph before and after, the same numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, parser

from edgevit.errors import ExportError
from edgevit.export import opset, passes
from edgevit.export.capture import capture
from edgevit.export.deploy import DeploySpec, deploy
from edgevit.export.to_onnx import to_graph

CLOSE = 1e-5  # of float32 in another order of operations
SHAPE = (2, 5, 4, 6)


def graph(body: str, *, result: str = "a, b, c, d", version: int = 20, constants: str = "") -> onnx.ModelProto:
    """A graph from `image` of SHAPE to `logits`; `constants` is onnx's text form of initializers."""
    held = f"<{constants}>" if constants else ""
    return parser.parse_model(
        f'<ir_version: 9, opset_import: ["": {version}]> g (float[2,5,4,6] image) => (float[{result}] logits) {held} '
        f"{{ {body} }}"
    )


def run(model: onnx.ModelProto, image: NDArray[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: NDArray[Any] = session.run(None, {"image": image})[0]
    return out


def image() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * 3


def lowered(model: onnx.ModelProto, *first: ir.passes.PassBase, target: int = 17) -> onnx.ModelProto:
    done = passes.run(ir.from_proto(model), (*first, *opset.lowering(target), *passes.FINISH))
    return ir.to_proto(done)


def check(model: onnx.ModelProto, *first: ir.passes.PassBase) -> onnx.ModelProto:
    """Lower a graph and hold it to the same numbers, the older version, and a second application to change nothing."""
    after = lowered(model, *first)
    assert after.opset_import[0].version == 17 and after.ir_version == 8
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(run(after, image()), run(model, image()), rtol=CLOSE, atol=CLOSE)
    assert lowered(after, *first).SerializeToString() == after.SerializeToString()
    return after


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.node))


@pytest.mark.parametrize("kind", sorted(opset.REDUCTIONS))
@pytest.mark.parametrize("axes", ["1, 3", "-1", None])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_of_a_reduction_become_an_attribute(kind: str, axes: str | None, keepdims: int) -> None:
    logs = "Exp(image)" if kind == "ReduceLogSum" else "Identity(image)"  # of a sum that is positive
    count = 0 if axes is None else len(axes.split(","))
    call = f"x = {logs} logits = {kind}<keepdims={keepdims}>(x{'' if axes is None else ', axes'})"
    dims = "1,1,1,1" if keepdims else ""
    shape = {0: dims, 1: "2,5,4,1" if keepdims else "2,5,4", 2: "2,1,4,1" if keepdims else "2,4"}[count]
    held = "" if axes is None else f"int64[{count}] axes = {{{axes}}}"
    after = check(graph(call, result=shape, constants=held))
    assert all(len(node.input) == 1 for node in after.graph.node)


def test_a_reduction_over_computed_axes_is_refused_with_its_name() -> None:
    body = "s = Shape(image) zero = Sub(s, s) first = Slice(zero, a, b) logits = ReduceMean<keepdims=1>(image, first)"
    model = graph(body, result="1,5,4,6", constants="int64[1] a = {0}, int64[1] b = {1}")
    model.graph.node[-1].name = "here"
    with pytest.raises(ExportError, match="node here: ReduceMean over axes that are computed"):
        lowered(model)


@pytest.mark.parametrize(
    "body",
    [
        "x, logits = Split<axis=1, num_outputs=2>(image)",  # 5 = 3 + 2
        "logits, x = Split<axis=-1, num_outputs=2>(image)",
        "x, logits, y = Split<axis=1>(image, sizes)",
    ],
)
def test_sizes_of_a_split_are_spelled_out(body: str) -> None:
    parts = {"x, logits = ": "2,2,4,6", "logits, x = ": "2,5,4,3", "x, logits, y": "2,3,4,6"}
    after = check(graph(body, result=parts[body[:12]], constants="int64[3] sizes = {1, 3, 1}"))
    assert all(not node.attribute or node.attribute[0].name == "axis" for node in after.graph.node)


def test_gelu_becomes_the_five_operators_that_fusions_know() -> None:
    after = check(graph("x = Gelu(image) logits = Gelu(x)", result="2,5,4,6"))
    assert kinds(after) == {"Div": 2, "Erf": 2, "Add": 2, "Mul": 4}
    assert len(after.graph.initializer) == 3  # the constants are shared
    assert [n.op_type for n in after.graph.node[:5]] == ["Div", "Erf", "Add", "Mul", "Mul"]


def test_names_of_new_tensors_collide_with_none_that_exist() -> None:
    body = "gelu = Gelu(image) gelu_1 = Gelu(gelu) gelu_2 = Gelu(gelu_1) logits = Gelu(gelu_2)"
    after = check(graph(body, result="2,5,4,6"))
    names = [name for node in after.graph.node for name in node.output]
    assert len(names) == len(set(names)) == 20


def test_gelu_by_tanh_is_refused() -> None:
    with pytest.raises(ExportError, match="Gelu by tanh has no rewrite"):
        lowered(graph('logits = Gelu<approximate="tanh">(image)', result="2,5,4,6"))


def test_hard_swish_is_its_definition() -> None:
    after = check(graph("logits = HardSwish(image)", result="2,5,4,6"), opset.DecomposeHardSwish())
    assert kinds(after) == {"HardSigmoid": 1, "Mul": 1}


NORMS = {
    "last axis": ("LayerNormalization(image, w, v)", "float[6] w = {1,2,3,4,5,6}, float[6] v = {6,5,4,3,2,1}"),
    "no bias": ("LayerNormalization<axis=-1>(image, w)", "float[6] w = {1,2,3,4,5,6}"),
    "two axes": ("LayerNormalization<axis=2>(image, w)", f"float[4,6] w = {{{','.join(['2'] * 24)}}}"),
    "epsilon": ("LayerNormalization<epsilon=0.5>(image, w)", "float[6] w = {1,2,3,4,5,6}"),
}


@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_is_its_definition(name: str) -> None:
    call, held = NORMS[name]
    after = check(graph(f"logits = {call}", result="2,5,4,6", constants=held), opset.DecomposeLayerNorm())
    assert "LayerNormalization" not in kinds(after)
    assert kinds(after)["ReduceMean"] == 2 and "Pow" not in kinds(after)


def test_a_layer_norm_with_a_large_mean_keeps_its_digits() -> None:
    held = "float[6] w = {1,1,1,1,1,1}"
    model = graph("logits = LayerNormalization(image, w)", result="2,5,4,6", constants=held)
    after, far = lowered(model, opset.DecomposeLayerNorm()), image() + np.float32(300)
    exact = far.astype(np.float64) - far.astype(np.float64).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    assert np.abs(run(after, far) - exact).max() < 1e-4  # mean of squares minus square of mean would lose 1e-2


def test_a_layer_norm_in_float16_is_not_written_out() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float16[2,6] image) => (float16[2,6] logits) '
        "<float16[6] w = {1,1,1,1,1,1}> { logits = LayerNormalization(image, w) }"
    )
    with pytest.raises(ExportError, match="LayerNormalization in FLOAT16, expected FLOAT"):
        opset.DecomposeLayerNorm().call(ir.from_proto(model))


KEPT = {
    "Reshape": ("logits = Reshape(image, s)", "4,60", "int64[2] s = {4, 60}"),
    "Shape": ("s = Shape<start=1>(image) t = Cast<to=1>(s) logits = Add(t, t)", "3", ""),
    "Equal": ("e = Equal(image, image) logits = Cast<to=1>(e)", "2,5,4,6", ""),
    "Pad": ("logits = Pad(image, p)", "2,5,4,8", "int64[8] p = {0,0,0,1,0,0,0,1}"),
    "Resize": (
        'logits = Resize<mode="nearest">(image, , s)',
        "2,5,8,12",
        "float[4] s = {1,1,2,2}",
    ),
    "AveragePool": ("logits = AveragePool<kernel_shape=[2,2]>(image)", "2,5,3,5", ""),
    "IsNaN": ("e = IsNaN(image) logits = Cast<to=1>(e)", "2,5,4,6", ""),
}


@pytest.mark.parametrize("kind", KEPT)
def test_operators_that_only_gained_types_stay(kind: str) -> None:
    body, shape, held = KEPT[kind]
    model = graph(body, result=shape, constants=held)
    assert kinds(check(model)) == kinds(model)


@pytest.mark.parametrize(
    ("body", "shape", "held"),
    [
        ("logits = Mish(image)", "2,5,4,6", ""),
        ("logits = Pad(image, p, , x)", "2,5,4,8", "int64[2] p = {1,1}, int64[1] x = {3}"),
        ('logits = Resize<mode="linear", antialias=1>(image, , s)', "2,5,2,3", "float[4] s = {1,1,0.5,0.5}"),
        ("logits = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(image)", "2,5,2,4", ""),
    ],
    ids=["Mish", "Pad", "Resize", "AveragePool"],
)
def test_what_an_older_reader_lacks_is_refused_by_name(body: str, shape: str, held: str) -> None:
    model = graph(body, result=shape, constants=held)
    model.graph.node[-1].name = "here"
    kind = model.graph.node[-1].op_type
    with pytest.raises(ExportError, match=f"opset 17: node here is {kind}, whose form changed by opset 20"):
        lowered(model)


CHANGED = sorted(
    {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == "" and 17 < s.since_version <= 20}
)


@pytest.mark.parametrize("kind", CHANGED)
def test_every_operator_that_changed_is_rewritten_kept_or_refused(kind: str) -> None:
    node = ir.node(kind, [], name="here")
    if kind in opset.REWRITES:
        return
    if kind in opset.TYPES_ONLY:
        assert onnx.defs.get_schema(kind, 17).since_version <= 17
        return
    model = ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"": 20}), ir_version=9)
    with pytest.raises(ExportError, match=f"node here is {kind}"):
        opset.LowerOpset(17).call(model)


def test_a_foreign_operator_is_refused() -> None:
    model = graph("logits = Relu(image)", result="2,5,4,6")
    model.graph.node[0].domain, model.graph.node[0].name = "com.microsoft", "here"
    with pytest.raises(ExportError, match=r"node here is com\.microsoft\.Relu: not ONNX's own"):
        opset.LowerOpset(17).call(ir.from_proto(model))


def test_an_operator_that_does_not_exist_is_refused() -> None:
    model = helper.make_model(
        helper.make_graph([helper.make_node("Frobnicate", ["image"], ["logits"])], "g", [], []), ir_version=9
    )
    with pytest.raises(ExportError, match="has no operator Frobnicate"):
        opset.LowerOpset(17).call(ir.from_proto(model))


def test_opset_20_keeps_gelu_and_takes_the_file_format_that_came_with_it() -> None:
    model = graph("logits = Gelu(image)", result="2,5,4,6")
    after = lowered(model, target=20)
    assert kinds(after) == {"Gelu": 1} and after.ir_version == 9 and after.opset_import[0].version == 20


def test_a_whole_network_stays_equal(shop: Any) -> None:
    """One here; `test_to_tensorrt.py` holds the others to their reference."""
    form, _ = deploy(shop.network("swin"), DeploySpec(1, 64, 96, cache_bytes=None))
    before = passes.run(to_graph(capture(form, 1, (64, 96)), ["logits"]), (*passes.CLEANUP, *passes.FINISH))
    model = ir.to_proto(before)
    after = lowered(model, opset.DecomposeHardSwish())
    late = ir.to_proto(passes.run(ir.from_proto(after), (opset.DecomposeLayerNorm(), *passes.FINISH)))
    assert not {"Gelu", "HardSwish"} & set(kinds(after)) and "LayerNormalization" not in kinds(late)
    pictures = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    for other in (after, late):
        np.testing.assert_allclose(run(other, pictures), run(model, pictures), rtol=1e-3, atol=1e-4)
