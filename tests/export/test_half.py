"""float16 graphs: what stays float32 and why, few Casts, and numbers that an emulation of float16 finds right."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, parser
from torch import nn

from edgevit.errors import ExportError, RuntimeFailure
from edgevit.export import opset, passes
from edgevit.export.capture import capture
from edgevit.export.half import TIDY, ToHalf
from edgevit.export.ranges import LIMIT, Ranges, measure
from edgevit.export.to_onnx import to_graph
from edgevit.runtimes import Session
from edgevit.runtimes.typed_ort import TypedOrtRuntime

NOTHING = Ranges({}, {}, 0)  # as if nothing had been measured: a naive conversion
IMAGES = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def graph(body: str, arrays: Mapping[str, Any] | None = None, shape: str = "1,3,8,8", result: str = "") -> ir.Model:
    """A float32 graph with named nodes; `arrays` are its initializers."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{shape}] image) => (float[{result or shape}] logits) '
        f"{{ {body} }}"
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    for name, value in (arrays or {}).items():
        array = np.asarray(value)
        kept = array if array.dtype == np.int64 else array.astype(np.float32)  # whole numbers are shapes
        model.graph.initializer.append(numpy_helper.from_array(kept, name))
    return passes.run(ir.from_proto(model), passes.FINISH)


def halved(model: ir.Model, ranges: Ranges | None = None, batch: Any = 1) -> tuple[onnx.ModelProto, ToHalf]:
    """The float16 form, by measured ranges unless told otherwise; checked to be typed without contradiction."""
    half = ToHalf(measure(model, IMAGES, batch) if ranges is None else ranges)
    done = ir.to_proto(passes.run(model.clone(), (half, *TIDY, *passes.FINISH)))
    onnx.checker.check_model(done, full_check=True)
    for value in (*done.graph.input, *done.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    held, known = {tensor.name for tensor in done.graph.initializer}, types(done)
    makers = {name: node for node in done.graph.node for name in node.output}
    for node in done.graph.node:
        if node.op_type == "Cast":
            assert node.input[0] not in held, "a constant is cast at run time"
            source = makers.get(node.input[0])
            again = source is not None and source.op_type == "Cast" and known[source.input[0]] in FLOATS
            assert not again, "a Cast of a Cast"
    return done, half


def run(model: ir.Model | onnx.ModelProto, folder: Path, images: NDArray[Any] = IMAGES[:1]) -> NDArray[Any]:
    path = folder / "model.onnx"
    onnx.save(model if isinstance(model, onnx.ModelProto) else ir.to_proto(model), path)
    with Session(TypedOrtRuntime(path, 1, "fp16")) as session:
        return session.run({"image": images})["logits"]


def types(model: onnx.ModelProto) -> dict[str, int]:
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def in_half(model: onnx.ModelProto) -> set[str]:
    """Operators whose first output is float16."""
    known = types(model)
    return {n.op_type for n in model.graph.node if known[n.output[0]] == TensorProto.FLOAT16} - {"Cast"}


def casts(model: onnx.ModelProto) -> int:
    return Counter(node.op_type for node in model.graph.node)["Cast"]


# ---- what overflows


class Loud(nn.Module):
    """Two convolutions whose middle reaches about 1e5: a checkpoint with one loud channel, as trained ones have."""

    def __init__(self, gain: float = 3e5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 10)
        with torch.no_grad():
            self.up.weight[3] *= gain
            self.down.weight[:, 3] /= gain
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.down(torch.relu(self.up(x))))  # n 4 h-4 w-4
        return self.head(x.mean((2, 3)))


def captured(module: nn.Module, batch: Any = 1) -> ir.Model:
    found = to_graph(capture(module.eval(), batch, (8, 8)), ["logits"])
    return passes.run(found, (*passes.CLEANUP, *opset.lowering(17), *passes.FINISH))


@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_an_overflow_is_planted_found_named_and_kept_in_float32(tmp_path: Path, batch: Any) -> None:
    module = Loud()
    model = captured(module, batch)
    naive, _ = halved(model, NOTHING)
    with pytest.raises(RuntimeFailure, match=r"tensor conv2d of .*\(Conv\) is beyond float16") as caught:
        run(naive, tmp_path)
    assert "conv2d" in str(caught.value)
    ours, half = halved(model, batch=batch)
    assert [(kept.operator, kept.tensor, kept.why) for kept in half.named] == [
        ("Conv", "conv2d", "range"),
        ("Relu", "conv2d", "range"),
        ("Conv", "relu", "range"),
    ]
    assert all(kept.max_abs > LIMIT for kept in half.named)
    count = 1 if batch == 1 else 4
    expected = module(torch.from_numpy(IMAGES[:count])).numpy()
    assert np.abs(run(ours, tmp_path, IMAGES[:count]) - expected).max() < 2e-3 * np.abs(expected).max()
    assert "Gemm" in in_half(ours)  # what is not loud is float16


def test_a_network_that_is_not_loud_keeps_nothing(tmp_path: Path) -> None:
    module = Loud(gain=1.0)
    ours, half = halved(captured(module))
    assert half.named == () and half.operators == {}
    assert in_half(ours) >= {"Conv", "Relu", "ReduceMean", "Gemm"}
    assert casts(ours) == 2  # one at each end
    expected = module(torch.from_numpy(IMAGES[:1])).numpy()
    assert 0 < np.abs(run(ours, tmp_path) - expected).max() < 2e-3


def test_a_tensor_that_pictures_of_more_contrast_would_overflow_is_kept() -> None:
    model = graph("x = Mul(image, k) logits = Div(x, k)", {"k": 2 * LIMIT / np.abs(IMAGES).max()})
    assert [kept.tensor for kept in halved(model)[1].named] == ["x", "x"]
    model = graph("x = Mul(image, k) logits = Div(x, k)", {"k": 0.9 * LIMIT / np.abs(IMAGES).max()})
    assert halved(model)[1].named == ()


def test_sums_that_cancel_inside_a_product_keep_it() -> None:
    weights = np.array([3e4] * 3 + [-3e4] * 3).reshape(1, 6, 1, 1)
    model = graph("x = Concat<axis=1>(image, image) logits = Conv(x, w)", {"w": weights}, result="1,1,8,8")
    kept = halved(model)[1].named
    assert [(k.operator, k.why) for k in kept] == [("Conv", "sum")] and kept[0].max_abs > LIMIT


def test_numbers_too_small_for_float16_are_kept(tmp_path: Path) -> None:
    model = graph("x = Mul(image, k) logits = Div(x, k)", {"k": 1e-6})
    done, half = halved(model)
    assert {kept.tensor for kept in half.named} == {"x"}
    np.testing.assert_allclose(run(done, tmp_path), IMAGES[:1], rtol=1e-3)


# ---- weights


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (70000.0, False), (-1e6, False), (-np.inf, True)])
def test_a_weight_beyond_float16_is_noticed(value: float, fits: bool) -> None:
    model = graph("logits = Max(image, w)", {"w": np.full((3, 1, 1), value)})
    kept = halved(model, NOTHING)[1].named
    assert ([(k.operator, k.why, k.tensor) for k in kept] == [("Max", "weight", "w")]) is not fits


def test_a_weight_that_would_vanish_is_noticed_but_a_bias_may() -> None:
    quiet = np.full((3, 3, 1, 1), 1e-7)
    kept = halved(graph("logits = Conv(image, w)", {"w": quiet}), NOTHING)[1].named
    assert [(k.why, k.tensor) for k in kept] == [("weight", "w")]
    body = {"w": np.ones((3, 3, 1, 1)), "b": np.full(3, 1e-9)}
    assert halved(graph("logits = Conv(image, w, b)", body), NOTHING)[1].named == ()


def test_zeros_and_a_few_tiny_weights_among_others_are_fine() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 3, 1, 1))
    weights[0, 0], weights[1, 1] = 0, 1e-8
    for value in (weights, np.zeros((3, 3, 1, 1))):
        assert halved(graph("logits = Conv(image, w)", {"w": value}), NOTHING)[1].named == ()


def test_a_mask_of_minus_ten_thousand_works_in_float16(tmp_path: Path) -> None:
    mask = np.zeros((8, 8))
    mask[:, 5:] = -1e4
    model = graph("x = Add(image, mask) logits = Softmax(x)", {"mask": mask})
    done, half = halved(model)
    assert half.named == () and "Add" in in_half(done)
    out, shown = run(done, tmp_path), np.exp(IMAGES[:1, ..., :5])
    assert (out[..., 5:] == 0).all()
    np.testing.assert_allclose(out[..., :5], shown / shown.sum(-1, keepdims=True), rtol=4e-3)


# ---- Casts and constants


def test_what_squares_or_exponentiates_stays_float32_between_casts() -> None:
    body = "n = LayerNormalization<axis=-1>(image, w) s = Softmax(n) e = Exp(s) r = Relu(e) logits = Neg(r)"
    done, half = halved(graph(body, {"w": np.ones(8)}))
    assert half.operators == {"Exp": 1, "LayerNormalization": 1, "Softmax": 1}
    assert in_half(done) == {"Relu", "Neg"}
    assert casts(done) == 2  # before Relu, at the end: three float32 neighbours have none between them, nor the input
    assert types(done)["w"] == TensorProto.FLOAT


def test_movers_between_float32_operators_stay_float32() -> None:
    body = "a = Softmax(image) t = Transpose<perm=[0,1,3,2]>(a) r = Identity(t) logits = Softmax(r)"
    done, _ = halved(graph(body))
    assert casts(done) == 0 and not in_half(done)
    body = "a = Softmax(image) t = Transpose<perm=[0,1,3,2]>(a) m = MatMul(t, t) logits = Neg(m)"
    done, _ = halved(graph(body))
    assert casts(done) == 2 and in_half(done) == {"Transpose", "MatMul", "Neg"}


def test_a_tensor_read_by_many_is_cast_once() -> None:
    body = "a = Neg(image) s = Softmax(a) n = LayerNormalization(a, w) x = Exp(a) p = Add(s, n) q = Add(s, x) "
    done, _ = halved(graph(body + "logits = Add(p, q)", {"w": np.ones(8)}))
    sources = [node.input[0] for node in done.graph.node if node.op_type == "Cast"]
    assert len(sources) == len(set(sources))
    assert sources.count("a") == 1


def test_a_constant_read_in_both_types_is_stored_in_both_and_others_once() -> None:
    body = "a = LayerNormalization(image, w) b = Mul(a, w) c = Mul(b, v) logits = Add(c, v)"
    done, _ = halved(graph(body, {"w": np.ones(8), "v": np.full(8, 2.0)}))
    kinds = {tensor.name: tensor.data_type for tensor in done.graph.initializer}
    assert kinds == {"w": TensorProto.FLOAT, "w/fp16": TensorProto.FLOAT16, "v": TensorProto.FLOAT16}


def test_an_output_that_is_also_read_inside_keeps_its_name_and_type(tmp_path: Path) -> None:
    model = graph("logits = Neg(image) y = Relu(logits)")
    model.graph.outputs.append(next(v for node in model.graph for v in node.outputs if v.name == "y"))
    model.graph.outputs[1].name = "second"
    done, _ = halved(model, NOTHING)
    assert [value.name for value in done.graph.output] == ["logits", "second"]
    np.testing.assert_allclose(run(done, tmp_path), -IMAGES[:1], rtol=1e-3)


def test_scales_of_a_resize_stay_float32(tmp_path: Path) -> None:
    body = 'logits = Resize<mode="nearest">(image, , scales)'
    done, _ = halved(graph(body, {"scales": [1.0, 1.0, 2.0, 2.0]}, result="1,3,16,16"))
    assert types(done)["scales"] == TensorProto.FLOAT and "Resize" in in_half(done)
    assert run(done, tmp_path).shape == (1, 3, 16, 16)


def test_integers_and_conditions_are_left_alone(tmp_path: Path) -> None:
    body = "z = Mul(image, zero) c = Greater(image, z) w = Where(c, image, z) logits = Reshape(w, s)"
    done, _ = halved(graph(body, {"zero": 0.0, "s": np.array([3, 64])}, result="3,64"))
    assert types(done)["s"] == TensorProto.INT64 and types(done)["c"] == TensorProto.BOOL
    np.testing.assert_allclose(run(done, tmp_path), np.maximum(IMAGES[0], 0).reshape(3, 64), rtol=1e-3)


def test_a_cast_from_integers_stays_what_it_is() -> None:
    body = "s = Shape(image) f = Cast<to=1>(s) m = ReduceMax<keepdims=0>(f) logits = Mul(image, m)"
    done, _ = halved(graph(body))
    assert "Mul" in in_half(done)


def permutations() -> Iterator[tuple[str, ...]]:
    yield from itertools.permutations(("Softmax", "Relu", "Identity", "Exp"))


@pytest.mark.parametrize("order", permutations(), ids="-".join)
def test_any_order_of_operators_is_typed_without_contradiction(tmp_path: Path, order: tuple[str, ...]) -> None:
    names = ["image", "a", "b", "c", "logits"]
    body = " ".join(f"{names[i + 1]} = {kind}({names[i]})" for i, kind in enumerate(order))
    model = graph(body)
    done, _ = halved(model)  # which runs onnx's checker and looks for Casts of Casts
    np.testing.assert_allclose(run(done, tmp_path), run(model, tmp_path), rtol=8e-3, atol=1e-4)


def test_a_second_application_changes_nothing() -> None:
    model = graph("a = Softmax(image) logits = Neg(a)")
    ranges = measure(model, IMAGES, 1)
    once = passes.run(model, (ToHalf(ranges), *TIDY, *passes.FINISH))
    before = ir.to_proto(once).SerializeToString()
    assert not ToHalf(ranges)(once).modified
    assert ir.to_proto(once).SerializeToString() == before


def test_two_conversions_give_the_same_bytes() -> None:
    model = captured(Loud())
    assert halved(model)[0].SerializeToString() == halved(model)[0].SerializeToString()


def test_a_graph_inside_a_node_is_refused() -> None:
    branches = ["then_branch = t () => (float[1,3,8,8] p) { p = Neg(image) }"]
    branches += ["else_branch = e () => (float[1,3,8,8] q) { q = Abs(image) }"]
    model = graph(f"s = ReduceSum<keepdims=0>(image) c = Cast<to=9>(s) logits = If (c) <{', '.join(branches)}>")
    with pytest.raises(ExportError, match=r"node If_2 \(If\) holds a graph"):
        halved(model, NOTHING)


def test_an_untyped_tensor_is_refused() -> None:
    model = graph("a = Neg(image) logits = Neg(a)")
    model.graph[0].outputs[0].type = None
    with pytest.raises(ExportError, match="tensor a of node Neg_0 has no known type"):
        passes.run(model, (ToHalf(NOTHING),))
