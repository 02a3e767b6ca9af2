"""The emulation of float16 against numpy's own float16, and that ONNX Runtime alone would not show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session
from edgevit.runtimes.typed_ort import TypedOrtRuntime

HALF_IO = "up = Cast<to=1>(h)"


def write(folder: Path, body: str, held: str = "", shape: str = "N") -> Path:
    """A graph of named nodes from `image` to `logits`, both float32."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{shape}] image) => (float[{shape}] logits) '
        f"{f'<{held}>' if held else ''} {{ {body} }}"
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def run(path: Path, *values: float) -> np.ndarray:
    with Session(TypedOrtRuntime(path, 1, "fp16")) as session:
        return session.run({"image": np.array(values, np.float32)})["logits"]


SQUARE_ROOT = "h = Cast<to=10>(image) m = Mul(h, h) s = Sqrt(m) logits = Cast<to=1>(s)"


def test_every_float16_tensor_is_rounded(tmp_path: Path) -> None:
    values = np.array([1.0001, 3.14159, 1e-3, 7e-5, 200.0], np.float32)
    half = values.astype(np.float16)
    expected = np.sqrt((half * half).astype(np.float16)).astype(np.float16).astype(np.float32)
    path = write(tmp_path, SQUARE_ROOT)
    np.testing.assert_array_equal(run(path, *values), expected)
    plain = onnxruntime.InferenceSession(str(path)).run(None, {"image": values})[0]
    assert not np.array_equal(plain, expected)  # else nobody needs this runtime


def test_an_overflow_that_onnx_runtime_hides_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, SQUARE_ROOT)
    plain = onnxruntime.InferenceSession(str(path)).run(None, {"image": np.array([700], np.float32)})[0]
    assert np.isfinite(plain).all()
    with pytest.raises(RuntimeFailure, match=r"tensor m of node node_1 \(Mul\) is beyond float16 on this input"):
        run(path, 1, 700)


def test_an_overflow_that_becomes_nan_is_named_where_it_began(tmp_path: Path) -> None:
    body = "h = Cast<to=10>(image) m = Mul(h, h) d = Sub(m, m) e = Add(d, h) logits = Cast<to=1>(e)"
    with pytest.raises(RuntimeFailure, match="tensor m of node node_1"):
        run(write(tmp_path, body), 700)


def test_a_nan_that_no_overflow_made_is_named_too(tmp_path: Path) -> None:
    body = "h = Cast<to=10>(image) s = Sqrt(h) n = Neg(s) logits = Cast<to=1>(n)"
    with pytest.raises(RuntimeFailure, match=r"tensor s of node node_1 \(Sqrt\)"):
        run(write(tmp_path, body), 4, -1, 9)


def test_an_overflow_that_a_clip_takes_back_is_no_failure(tmp_path: Path) -> None:
    body = "h = Cast<to=10>(image) m = Mul(h, h) c = Min(m, six) logits = Cast<to=1>(c)"
    path = write(tmp_path, body)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(6, np.float16), "six"))
    onnx.save(model, path)
    np.testing.assert_array_equal(run(path, 700, 2), [6, 4])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_is_no_number_is_told_from_an_overflow(tmp_path: Path, value: float) -> None:
    with pytest.raises(RuntimeFailure, match="the input is not finite"):
        run(write(tmp_path, SQUARE_ROOT), value)


def test_a_float32_graph_that_divides_by_zero_is_not_blamed_on_float16(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="no float16 tensor is the cause"):
        run(write(tmp_path, "logits = Reciprocal(image)"), 0)


def test_sums_inside_a_product_are_kept_in_float32(tmp_path: Path) -> None:
    """2048 + 1 is 2048 in float16, so that 1 added 4096 times would stop there."""
    path = write(tmp_path, "h = Cast<to=10>(image) m = MatMul(h, w) logits = Cast<to=1>(m)", shape="1,4096")
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4096, 1), np.float16), "w"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, path)
    with Session(TypedOrtRuntime(path, 1, "fp16")) as session:
        assert session.runtime.effective_precision == "fp16"
        assert session.run({"image": np.ones((1, 4096), np.float32)})["logits"] == 4096


def test_float16_weights_keep_their_values(tmp_path: Path) -> None:
    path = write(tmp_path, "h = Cast<to=10>(image) m = Add(h, w) logits = Cast<to=1>(m)")
    model = onnx.load(path)
    tiny = np.array([6e-8, -65504, -1e4], np.float16)
    model.graph.initializer.append(onnx.numpy_helper.from_array(tiny, "w"))
    onnx.save(model, path)
    np.testing.assert_array_equal(run(path, 0, 0, 0), tiny.astype(np.float32))


def test_a_float32_graph_runs_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "m = Mul(image, image) logits = Sqrt(m)")
    np.testing.assert_array_equal(run(path, 700, 1.0001), np.sqrt(np.array([700, 1.0001], np.float32) ** 2))


@pytest.mark.parametrize(
    ("types", "precision"),
    [(("fp16", "fp16", "fp32"), "fp16"), (("fp32", "fp32", "fp16"), "fp32"), ((), "fp32")],
)
def test_the_precision_is_that_of_most_products(tmp_path: Path, types: tuple[str, ...], precision: str) -> None:
    lines = ["h0 = Cast<to=10>(image)"]
    for index, kind in enumerate(types):
        source = f"h{index}" if kind == "fp16" else f"f{index}"
        lines += [f"f{index} = Cast<to=1>(h{index})", f"m{index} = MatMul({source}, {source})"]
        lines += [f"h{index + 1} = Cast<to=10>(m{index})"]
    lines += [f"logits = Cast<to=1>(h{len(types)})"]
    with Session(TypedOrtRuntime(write(tmp_path, " ".join(lines), shape="2,2"), 1, "fp16")) as session:
        assert session.runtime.effective_precision == precision


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c = Constant<value=float16[1] {1}>() f = Cast<to=1>(c) logits = Add(image, f)", "makes float16 by itself"),
        ("logits = com.foreign.Odd(image)", "cannot"),
    ],
)
def test_what_cannot_be_emulated_is_refused(tmp_path: Path, body: str, message: str) -> None:
    path = write(tmp_path, body)
    with pytest.raises(RuntimeFailure, match=message):
        run(path, 1)


def test_a_graph_inside_a_node_is_refused(tmp_path: Path) -> None:
    then = "then_branch = t () => (float[N] a) { a = Neg(image) }"
    other = "else_branch = e () => (float[N] b) { b = Abs(image) }"
    body = f"s = ReduceSum<keepdims=0>(image) c = Cast<to=9>(s) logits = If (c) <{then}, {other}>"
    with pytest.raises(RuntimeFailure, match=r"\(If\) holds a graph"):
        run(write(tmp_path, body), 1)


def test_float16_inputs_are_refused(tmp_path: Path) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float16[N] image) => (float16[N] logits) { logits = Neg(image) }'
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(RuntimeFailure, match="inputs or outputs in float16, expected float32"):
        TypedOrtRuntime(tmp_path / "model.onnx").load()


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08" * 5000])
def test_a_damaged_file_is_an_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(RuntimeFailure) as caught:
        TypedOrtRuntime(tmp_path / "model.onnx").load()
    assert "\n" not in str(caught.value) and "model.onnx" in str(caught.value)


def test_a_missing_file_and_a_session_that_was_not_loaded_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="not a readable ONNX model"):
        TypedOrtRuntime(tmp_path / "none.onnx").load()
    with pytest.raises(RuntimeFailure, match="not loaded"):
        TypedOrtRuntime(tmp_path / "none.onnx").run({})


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "logits = Add(image, w)")
    model = onnx.load(path)
    tensor = onnx.numpy_helper.from_array(np.ones(1, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/hostname")
    model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RuntimeFailure, match="not a readable ONNX model"):
        TypedOrtRuntime(path).load()


def test_it_describes_itself_and_has_no_profile(tmp_path: Path) -> None:
    runtime = TypedOrtRuntime(write(tmp_path, SQUARE_ROOT), 1, "fp16")
    assert TypedOrtRuntime.obstacle() is None
    with Session(runtime):
        assert "emulated" in runtime.describe()["runtime"] and runtime.asked_precision == "fp16"
        assert [s.name for s in runtime.outputs] == ["logits"]
        with pytest.raises(RuntimeFailure, match="an emulation has no profile"):
            runtime.profile({}, 1)
