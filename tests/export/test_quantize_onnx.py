"""INT8 of the ONNX target: which products, by which rule, in which kernels, and what is told of the rest."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgevit.api.profiling import declared_fp32
from edgevit.bench import attestation
from edgevit.bench.complexity import macs_by_node
from edgevit.contracts import Built, Calibration
from edgevit.errors import ExportError, RuntimeFailure
from edgevit.export import passes
from edgevit.export.quantize.for_onnx import OnnxRecipe, place, quantize
from edgevit.export.quantize.streamed import insert_dynamic, store_half, store_int8
from edgevit.export.to_onnx import OnnxExporter
from edgevit.inputs import load_images, photographs
from edgevit.models import load_model, model_card
from edgevit.runtimes import Session
from edgevit.runtimes.ort import OrtRuntime
from edgevit.specs import Batch, ExportSpec, ImageSpec

MODEL, SIZE = "mobileformer_tiny", (64, 64)
ISLANDS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")


def one_node(
    kind: str, shape: list[Any], weight: tuple[int, ...], *, left: bool = False, bias: Any = None, **attributes: Any
) -> ir.Model:
    """A graph of one product of `image` and a constant."""
    rng = np.random.default_rng(0)
    stored = {"w": rng.standard_normal(weight).astype(np.float32)}
    inputs = ["w", "image"] if left else ["image", "w"]
    if bias is not None:
        stored["b"] = rng.standard_normal(bias).astype(np.float32)
        inputs.append("b")
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, inputs, ["y"], name="blocks.0.layer/product", **attributes)], "g", [image], [out],
            [numpy_helper.from_array(array, name) for name, array in stored.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )  # fmt: skip
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, image: NDArray[np.float32]) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(passes.run(model, passes.FINISH)).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"image": image})[0]
    return found


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def decibels(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected - actual).sum()))


@pytest.mark.parametrize(
    ("kind", "shape", "weight", "options", "how"),
    [
        ("Gemm", [196, 384], (384, 384), {}, "static"),
        ("Gemm", [196, 384], (384, 384), {"transB": 1}, "static"),
        ("Gemm", [3136, 16], (16, 32), {}, "float"),  # too little for what is moved
        ("Gemm", [6, 192], (192, 384), {}, "dynamic"),
        ("Gemm", ["batch", 192], (192, 1000), {}, "dynamic"),
        ("Gemm", [1, 64], (64, 16), {}, "float"),  # nothing to stream
        ("Gemm", [16, 6], (16, 192), {"transA": 1}, "float"),
        ("MatMul", [2, 1, 49], (2, 49, 192), {}, "float"),
        ("Conv", [1, 96, 14, 14], (576, 96, 1, 1), {}, "static"),
        ("Conv", [1, 16, 112, 112], (16, 16, 1, 1), {}, "float"),
        ("Conv", [1, 96, 28, 28], (96, 1, 3, 3), {"group": 96}, "float"),
        ("Conv", [1, 3, 224, 224], (96, 3, 4, 4), {"strides": [4, 4]}, "float"),
        ("Conv", [1, 3, 224, 224], (384, 3, 16, 16), {"strides": [16, 16]}, "static"),
        ("Conv", ["batch", 48, 56, 56], (96, 48, 3, 3), {"strides": [2, 2]}, "static"),
    ],
)
def test_shapes_decide_what_int8_pays_for(
    kind: str, shape: list[Any], weight: tuple[int, ...], options: dict[str, Any], how: str
) -> None:
    (node,) = one_node(kind, shape, weight, **options).graph
    found, why = place(node, OnnxRecipe())
    assert (found, bool(why)) == (how, how == "float")
    assert place(node, OnnxRecipe(keep_float=("blocks.0.*",))) == ("float", "asked for")
    assert place(node, OnnxRecipe(only=("blocks.1.*",))) == ("float", "asked for")
    assert place(node, OnnxRecipe(only=("blocks.0.*",)))[0] == how


def test_the_hyper_network_stays_float_whatever_its_shape() -> None:
    (node,) = one_node("Gemm", [1, 192], (192, 1000)).graph
    for name in ("blocks.2.slopes.hidden/linear", "blocks.2.slopes/matmul_4", "blocks.2.slopes.seconds.0/linear_1"):
        node.name = name
        assert place(node, OnnxRecipe())[0] == "float"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"transB": 1}, {"transB": 1, "bias": (64,)}, {"bias": (1, 64), "alpha": 0.5}])
def test_a_product_of_few_rows_is_close_at_any_batch(count: int, options: dict[str, Any]) -> None:
    weight = (64, 128) if options.get("transB") else (128, 64)
    model = one_node("Gemm", ["batch", 128], weight, **options)
    image = 3 * noise(count, 128)
    expected = run(model, image)
    assert insert_dynamic(model, ["blocks.0.layer/product"]) == {"Gemm": 1}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {node.op_type for node in model.graph}
    assert 35 < decibels(expected, run(model, image)) < 70


def test_an_operand_on_its_side_and_a_bias_of_rows_are_kept() -> None:
    model = one_node("Gemm", [128, 6], (128, 64), transA=1, bias=(6, 64))
    image = noise(128, 6)
    expected = run(model, image)
    insert_dynamic(model, ["blocks.0.layer/product"])
    assert decibels(expected, run(model, image)) > 35


def test_what_is_no_product_with_a_matrix_cannot_be_streamed() -> None:
    with pytest.raises(ExportError, match="no product with a constant matrix"):
        insert_dynamic(one_node("MatMul", [2, 1, 49], (2, 49, 8)), ["blocks.0.layer/product"])


@pytest.mark.parametrize(
    ("kind", "shape", "weight", "index", "options"),
    [
        ("Conv", [1, 8, 5, 5], (6, 8, 3, 3), 1, {}),
        ("Gemm", [4, 16], (16, 24), 1, {}),
        ("Gemm", [4, 16], (24, 16), 1, {"transB": 1}),
        ("Gemm", [16, 9], (24, 16), 0, {"left": True}),
        ("MatMul", [2, 1, 16], (2, 16, 24), 1, {}),
    ],
)
def test_stored_weights_have_a_scale_for_each_sum(
    kind: str, shape: list[Any], weight: tuple[int, ...], index: int, options: dict[str, Any]
) -> None:
    model = one_node(kind, shape, weight, **options)
    (node,) = model.graph
    image = noise(*shape)
    expected = run(model, image)
    store_int8(model, node, index)
    assert decibels(expected, run(model, image)) > 40
    used = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None and list(v.uses())]
    assert sum(tensor.nbytes for tensor in used) < 2 * np.prod(weight)


def test_a_weight_that_float16_cannot_hold_stays_as_it_is() -> None:
    model = one_node("Gemm", [4, 16], (16, 24))
    (node,) = model.graph
    weight = node.inputs[1]
    assert weight is not None
    weight.const_value = ir.tensor(np.full((16, 24), 1e6, np.float32), name="w")
    store_half(model, node, 1)
    assert [each.op_type for each in model.graph] == ["Gemm"]


@pytest.mark.parametrize("batch", [1, 3, "dynamic"])
def test_a_convolution_that_narrows_becomes_rows_of_pixels(batch: Batch) -> None:
    first = "batch" if batch == "dynamic" else batch
    model = one_node("Conv", [first, 64, 7, 9], (24, 64, 1, 1), bias=(24,))
    images = noise(3, 64, 7, 9)
    expected = run(model, images[: batch if isinstance(batch, int) else 3])
    model, done = quantize(model, OnnxRecipe(), images, batch)
    assert (done.static, done.dynamic, done.kept) == ({"Conv": 1}, {}, ())
    assert {node.op_type for node in model.graph} >= {"Gemm", "QuantizeLinear"}
    assert decibels(expected, run(model, images[: len(expected)])) > 35


def test_a_bias_of_rows_is_added_behind_the_integer_kernel() -> None:
    model = one_node("Gemm", [49, 128], (128, 64), bias=(49, 64))
    images = noise(49, 128)
    expected = run(model, images)
    model, _ = quantize(model, OnnxRecipe(), images, 49)
    assert Counter(node.op_type for node in model.graph)["Add"] == 1
    assert decibels(expected, run(model, images)) > 35


def test_patterns_that_leave_nothing_are_refused() -> None:
    for recipe in (OnnxRecipe(keep_float=("*",)), OnnxRecipe(only=("nowhere*",))):
        with pytest.raises(ExportError, match="no product of the network is left to quantise"):
            quantize(one_node("Gemm", [196, 384], (384, 384)), recipe, noise(196, 384), 196)


def calibration(*sizes: tuple[int, int]) -> Calibration:
    return Calibration({size: load_images(photographs(), ImageSpec(), size) for size in sizes})


def export(
    folder: Path, recipe: OnnxRecipe, batch: Batch = 1, *sizes: tuple[int, int], features: bool = False
) -> tuple[Built, ...]:
    sizes = sizes or (SIZE,)
    module = load_model(MODEL, None, None, features_only=features, options={}, seed=0, randomize=True).module
    specs = [
        ExportSpec(
            MODEL, "onnx", "int8", image_size=size, batch=batch, recipe=recipe, features_only=features,
            pointwise="dense",
        )
        for size in sizes
    ]  # fmt: skip
    return OnnxExporter().export(module, model_card(MODEL), specs, folder, calibration(*sizes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    folder = tmp_path_factory.mktemp("int8")
    (built,) = export(folder, OnnxRecipe(equalize=False))
    return folder / built.model_file, built


def test_an_export_says_what_it_quantised_and_what_not(exported: tuple[Path, Built]) -> None:
    _, built = exported
    choices = built.choices
    assert choices["quantized"] == {"Conv": 9, "Gemm": 11}
    assert choices["calibrated"]["calibrator"] == "minmax"
    assert choices["calibrated"]["pictures"] == 4
    reasons = Counter(kept["why"].partition(":")[0] for kept in choices["kept_float"])
    assert reasons["product of two activations"] > 10
    assert reasons["depthwise or grouped convolution"] >= 8
    assert reasons["hyper network"] >= 8
    assert "kept in float32 because int8 would be no faster" in built.notes[0]
    names = {node.name for node in built.graph.graph.node}
    assert {kept["node"] for kept in choices["kept_float"]} <= names


def test_the_integer_kernels_of_the_runtime_take_what_was_meant_for_them(exported: tuple[Path, Built]) -> None:
    path, built = exported
    with Session(OrtRuntime(path, 1, "int8")) as session:
        assert session.runtime.effective_precision == "int8"
        session.require_precision(path)
        operators = session.runtime.profile({"image": calibration(SIZE).images[SIZE][:1]}, 0)
    kinds = Counter(operator.kind for operator in operators)
    whole = sum(built.choices["quantized"].values())
    integer = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearConv")
    assert sum(kinds[kind] for kind in integer) == whole
    assert {o.precision for o in operators if o.kind in integer} == {"int8"}
    macs = macs_by_node(path)
    judged = attestation.attest(
        attestation.with_macs(operators, macs), "int8", sum(macs.values()), declared_fp32(built.choices)
    )
    assert judged.as_asked is True
    assert judged.coverage == pytest.approx(1.0, abs=1e-6)
    undeclared = attestation.attest(attestation.with_macs(operators, macs), "int8", sum(macs.values()))
    assert undeclared.as_asked is False


def test_no_float_product_reads_dequantised_values(exported: tuple[Path, Built], tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    ort.InferenceSession(str(exported[0]), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "executed.onnx").graph
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert not [node.name for node in graph.node if node.op_type in ISLANDS and dequantised & set(node.input)]


def test_float_passed_off_as_int8_is_refused(exported: tuple[Path, Built], tmp_path: Path) -> None:
    model = one_node("Gemm", [4, 16], (16, 24))
    ir.save(model, tmp_path / "float.onnx")
    with Session(OrtRuntime(tmp_path / "float.onnx", 1, "int8")) as session:
        assert session.runtime.effective_precision == "fp32"
        with pytest.raises(RuntimeFailure, match="runs in fp32, expected int8"):
            session.require_precision(tmp_path)
    with Session(OrtRuntime(exported[0], 1, "fp32")) as session, pytest.raises(RuntimeFailure, match="expected fp32"):
        session.require_precision(exported[0])


@pytest.mark.parametrize(("batch", "features"), [("dynamic", False), (2, True)], ids=["dynamic", "features"])
def test_batches_and_features_stay_close_to_float(tmp_path: Path, batch: Batch, features: bool) -> None:
    (built,) = export(tmp_path, OnnxRecipe(), batch, features=features)
    images = calibration(SIZE).images[SIZE]
    module = load_model(MODEL, None, None, features_only=features, options={}, seed=0, randomize=True).module
    with Session(OrtRuntime(tmp_path / built.model_file, 1, "int8")) as session:
        found = session.run_all(images, batch)
    import torch

    with torch.no_grad():
        reference = module(torch.from_numpy(images))
    expected = reference._asdict() if features else {"logits": reference}
    for name, value in expected.items():
        assert found[name].shape == tuple(value.shape)
        assert decibels(value.numpy(), found[name]) > 12, name  # a wrong scale gives 0 or less
    assert built.choices["equalized"]["max_rel"] < 1e-9


def test_sizes_share_their_int8_weights(exported: tuple[Path, Built], tmp_path: Path) -> None:
    built = export(tmp_path, OnnxRecipe(equalize=False), 1, SIZE, (64, 96))
    assert len({each.model_file for each in built}) == 2
    one = exported[0].stat().st_size
    assert (tmp_path / "weights.bin").stat().st_size < 1.1 * one
    for each, size in zip(built, (SIZE, (64, 96)), strict=True):
        with Session(OrtRuntime(tmp_path / each.model_file, 1, "int8")) as session:
            found = session.run({"image": calibration(size).images[size][:1]})
        assert np.isfinite(found["logits"]).all()


def test_seven_bit_weights_have_no_larger_values() -> None:
    recipe = dataclasses.replace(OnnxRecipe(), weight_bits="7", stored=False)
    model, _ = quantize(one_node("Gemm", [49, 128], (128, 64)), recipe, noise(49, 128), 49)
    stored = [v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value is not None]
    whole = [array for array in stored if array.dtype == np.int8 and array.ndim == 2]
    assert [int(np.abs(array).max()) for array in whole] == [63]
