"""INT8 for TensorRT: what is quantised and what is not, in which types, and what the emulation makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from edgevit.contracts import Built, Calibration
from edgevit.export.quantize.for_tensorrt import TensorrtRecipe
from edgevit.export.to_tensorrt import TensorrtExporter, TensorrtOptions
from edgevit.runtimes import Session
from edgevit.runtimes.typed_ort import TypedOrtRuntime
from edgevit.specs import ExportSpec, ModelCard

SIZE = (64, 64)
CARD = ModelCard("tiny", "family", "a title", "https://example.org", "origin", 1, 1)
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def pictures(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, *SIZE)).astype(np.float32)


class Made:
    """An int8 export of a small network, and what can be asked of it."""

    def __init__(self, net: torch.nn.Module, folder: Path, oldest: str, batch: Any, recipe: TensorrtRecipe) -> None:
        self.net = net.float()
        spec = ExportSpec(
            "tiny", "tensorrt", "int8", image_size=SIZE, batch=batch,
            settings=TensorrtOptions(oldest=oldest), recipe=recipe,  # type: ignore[arg-type]  # one of the literals
        )  # fmt: skip
        seen = Calibration({SIZE: pictures()})
        self.built: Built = TensorrtExporter().export(self.net, CARD, [spec], folder, seen)[0]
        self.path = folder / self.built.checked_file
        self.model = onnx.shape_inference.infer_shapes(onnx.load(self.path))
        self.types = {v.name: v.type.tensor_type.elem_type for v in self.model.graph.value_info}
        self.makers = {name: node for node in self.model.graph.node for name in node.output}
        self.stored = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type in kinds]

    def products(self) -> list[onnx.NodeProto]:
        """The products of two dequantised operands."""
        return [n for n in self.nodes("Conv", "Gemm", "MatMul") if all(self.from_dq(name) for name in n.input[:2])]

    def from_dq(self, name: str) -> bool:
        return name in self.makers and self.makers[name].op_type == DQ


@pytest.fixture(scope="module")
def make(shop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    held: dict[Any, Made] = {}

    def made(name: str, oldest: str = "8.6", batch: Any = 1, **recipe: Any) -> Made:
        key = (name, oldest, batch, repr(sorted(recipe.items())))
        if key not in held:
            with torch.no_grad():
                net = shop.build(name) if name in ("plain", "residual") else shop.network(name)
                folder = tmp_path_factory.mktemp("int8")
                held[key] = Made(net, folder, oldest, batch, TensorrtRecipe(**recipe))
        return held[key]

    return made


@pytest.mark.parametrize(("name", "oldest"), [("swin", "8.6"), ("swin", "10.0"), ("residual", "8.6")])
def test_scales_are_symmetric_and_signed_and_biases_stay_floating(make: Any, name: str, oldest: str) -> None:
    made = make(name, oldest)
    assert made.products()
    for node in made.nodes(Q, DQ):
        assert not numpy_helper.to_array(made.stored[node.input[2]]).any()
        assert made.stored[node.input[2]].data_type == TensorProto.INT8
        assert (numpy_helper.to_array(made.stored[node.input[1]]) > 0).all()
    for node in made.products():
        weight = made.makers[node.input[1]]
        assert made.stored[weight.input[0]].data_type == TensorProto.INT8
        assert numpy_helper.to_array(made.stored[weight.input[1]]).ndim == 1  # one scale for each output
        assert len(node.input) < 3 or made.stored[node.input[2]].data_type != TensorProto.INT32


@pytest.mark.parametrize(
    ("name", "oldest", "kind"),
    [
        ("swin", "8.6", TensorProto.FLOAT),
        ("swin", "10.0", TensorProto.FLOAT16),
        ("residual", "8.6", TensorProto.FLOAT),
    ],
)
def test_a_product_has_the_type_of_its_scales_with_no_cast_between(
    make: Any, name: str, oldest: str, kind: int
) -> None:
    made = make(name, oldest)
    assert {made.types[node.input[0]] for node in made.products()} == {kind}
    readers = [n for n in made.nodes("Cast") if made.from_dq(n.input[0])]
    assert readers == []
    assert TensorProto.FLOAT16 in made.types.values()  # the rest is float16


def test_results_of_products_are_not_quantised_for_themselves(make: Any) -> None:
    made = make("swin")
    outputs = {node.output[0] for node in made.products()}
    assert not [node for node in made.nodes(Q) if node.input[0] in outputs]


def test_attention_and_single_rows_stay_float_with_the_reason(make: Any) -> None:
    made = make("swin")
    why = {row["node"]: row["why"] for row in made.built.choices["kept_float"]}
    attention = [node for node in made.nodes("MatMul") if node.name.endswith(("matmul", "matmul_1"))]
    assert attention
    assert all("attention" in why[node.name] for node in attention)
    head = next(node for node in made.nodes("Gemm") if node.name.startswith("head"))
    assert why[head.name].startswith("one row")
    assert made.built.choices["quantized"]["Gemm"] == len(made.products())
    assert made.built.choices["calibrated"]["pictures"] == 4
    assert any("products stay float" in note for note in made.built.notes)


def test_the_hyper_network_and_the_token_path_stay_float(make: Any) -> None:
    made = make("residual")
    names = {node.name for node in made.products()}
    assert names
    assert not [name for name in names if ".former." in name or ".slopes." in name or name.startswith("entries.")]


def test_the_other_side_of_a_residual_addition_is_quantised(make: Any) -> None:
    made = make("residual")
    added = [node for node in made.nodes("Add") if any(made.from_dq(name) for name in node.input)]
    assert len(added) == made.built.choices["quantized"]["Add"] > 0
    for node in added:
        assert sum(made.from_dq(name) for name in node.input) == 1
    without = make("residual", residuals=False)
    assert "Add" not in without.built.choices["quantized"]


def test_depthwise_convolutions_can_be_left_out(make: Any) -> None:
    def grouped(made: Made) -> int:
        return sum(attr.i > 1 for node in made.products() for attr in node.attribute if attr.name == "group")

    assert grouped(make("residual")) > 0
    assert grouped(make("residual", depthwise=False)) == 0


def test_the_users_patterns_hold(make: Any) -> None:
    only = make("swin", only=("layers.1.*",))
    assert {node.name[: len("layers.1")] for node in only.products()} == {"layers.1"}
    kept = make("swin", keep_float=("*.mlp.*",))
    assert kept.products()
    assert not [node.name for node in kept.products() if ".mlp." in node.name]
    nothing = make("vit", only=("nowhere*",))
    assert not nothing.nodes(Q, DQ)
    assert any("no product of this network becomes int8" in note for note in nothing.built.notes)


@pytest.mark.parametrize(
    "name", ["swin", "residual", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lsla", "crossformer"))]
)
def test_it_stays_close_to_the_float_network(make: Any, name: str) -> None:
    made, images = make(name), pictures()
    with torch.no_grad():
        expected = made.net(torch.from_numpy(images)).numpy()
    with Session(TypedOrtRuntime(made.path, 1, "int8")) as session:
        found = session.run_all(images, 1)["logits"]
        assert session.runtime.effective_precision == "int8"
        told = session.runtime.describe()
    assert told["int8_products"] == len(made.products())
    assert 0.2 < told["int8_macs_share"] < 1
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(expected, found, strict=True)]
    assert min(cosines) > 0.97


def test_any_batch_is_quantised_alike(make: Any) -> None:
    made, images = make("swin", batch="dynamic"), pictures()
    assert len(made.products()) == len(make("swin").products())
    with Session(TypedOrtRuntime(made.path, 1, "int8")) as session:
        alone = np.concatenate([session.run({"image": images[i : i + 1]})["logits"] for i in range(len(images))])
        np.testing.assert_allclose(session.run({"image": images})["logits"], alone, atol=2e-2 * np.abs(alone).max())


def test_equalisation_can_be_turned_off(make: Any) -> None:
    assert make("swin").built.choices["equalized"]["places"] > 0
    assert "equalized" not in make("swin", equalize=False).built.choices


def test_int8_products_are_not_pinned_to_float32(make: Any) -> None:
    script = (make("swin").path.parent / "build.sh").read_text()
    names = [node.name for node in make("swin").products()]
    assert "--int8 --fp16" in script
    assert "norm1/" in script.split("--layerPrecisions=")[1].splitlines()[0]
    assert not [name for name in names if f"{name}:fp32" in script]
