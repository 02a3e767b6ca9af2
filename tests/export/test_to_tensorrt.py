"""The TensorRT target end to end: what lies in the directory, in which types and operators, and that it is right.

Numbers are compared through the emulation of float16, not through ONNX Runtime, which computes float16 in float32.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgevit.contracts import Built
from edgevit.errors import MissingDependencyError, UnknownNameError, UsageError
from edgevit.export import engine, to_tensorrt
from edgevit.export.to_tensorrt import TensorrtExporter, TensorrtOptions
from edgevit.inputs import load_images, photographs
from edgevit.models import load_model
from edgevit.options import as_json, parse_options
from edgevit.registry import model_names
from edgevit.runtimes import Session
from edgevit.runtimes.typed_ort import TypedOrtRuntime
from edgevit.specs import ExportSpec, ImageSpec, ModelCard, TensorSpec

REAL = pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: no engine built"
)
CARD = ModelCard("small", "test", "a network of tests", "", "", 0, 0, image=ImageSpec((64, 96)))
NOT_BEFORE_10 = {"Attention", "Gelu", "HardSwish"}
# Of logits of unit size: float16 has 11 bits, and some hundred roundings in a row add up to a few of the last ones.
LIMITS = {"fp32": 1e-4, "fp16": 4e-2}
# One or two of each family: their siblings have more of the same blocks.
REGISTERED = ("mobileformer_26m", "crossformer_s", "crossformerpp_s", "vit_lsla", "swin_t", "deit_tiny")


def export(module: nn.Module, folder: Path, *, card: ModelCard = CARD, **wishes: Any) -> tuple[Built, ...]:
    """One export of a module that may not be registered; `sizes` for several."""
    sizes, settings = wishes.pop("sizes", [card.image.size]), TensorrtOptions(**wishes.pop("settings", {}))
    specs = [ExportSpec(card.name, "tensorrt", image_size=size, settings=settings, **wishes) for size in sizes]
    return TensorrtExporter().export(module, card, specs, folder)


def outputs(path: Path, images: NDArray[np.float32], precision: str, batch: Any) -> dict[str, NDArray[Any]]:
    with Session(TypedOrtRuntime(path, 1, precision)) as session:
        session.require_precision(path)
        return session.run_all(images, batch)


def reference(module: nn.Module, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    with torch.no_grad():
        out = module(torch.from_numpy(images))
    return (
        {"logits": out.numpy()} if isinstance(out, torch.Tensor) else {k: v.numpy() for k, v in out._asdict().items()}
    )


def off(actual: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> float:
    """Largest difference of any output, in units of that output's root mean square."""
    assert list(actual) == list(expected)
    return max(
        float(np.abs(actual[name] - array).max() / np.sqrt(np.square(array).mean())) for name, array in expected.items()
    )


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


CASES = {
    # network, precision, batch, the rest
    "features": ("crossformer_old_features", "fp16", 1, {"features_only": True}),
    "for 8.5": ("lsla", "fp16", 1, {"settings": {"oldest": "8.5"}}),
    "for 10": ("mobile", "fp32", 3, {"settings": {"oldest": "10.0"}, "pointwise": "grouped"}),
}


@pytest.mark.parametrize("name", CASES)
def test_small_networks_are_right_in_every_form(shop: Any, tmp_path: Path, name: str) -> None:
    network, precision, batch, wishes = CASES[name]
    module = (shop.build("spatial_grouped") if network == "mobile" else shop.network(network)).float()
    (built,) = export(module, tmp_path, precision=precision, batch=batch, **wishes)
    assert built.model_file == built.checked_file == "model.onnx"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.sh", "model.onnx"]
    oldest = built.choices["oldest"]
    model, found = onnx.load(tmp_path / "model.onnx"), kinds(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    expected = (20, 9) if oldest == "10.0" else (17, 8)
    assert (model.opset_import[0].version, model.ir_version) == expected
    assert not found.keys() & (
        NOT_BEFORE_10 if oldest == "8.5" else {"Attention", "Gelu"} if oldest == "8.6" else set()
    )
    assert ("LayerNormalization" in found) is (oldest != "8.5")
    assert all(spec.dtype == "float32" for spec in (*built.inputs, *built.outputs))
    assert built.graph.SerializeToString() == model.SerializeToString()
    assert built.certificates and not built.notes
    assert built.choices["pointwise"] == wishes.get("pointwise", "dense")
    assert json.loads(json.dumps(dict(built.choices), allow_nan=False)) == built.choices
    images = load_images(photographs(), ImageSpec(), (64, 96))
    assert (
        off(outputs(tmp_path / "model.onnx", images, precision, batch), reference(module, images)) < LIMITS[precision]
    )


@REAL
def test_several_sizes_share_their_weights_and_have_an_engine_each(shop: Any, tmp_path: Path) -> None:
    module = shop.network("vit").float()
    sizes = [(64, 96), (32, 32)]
    made = export(module, tmp_path, precision="fp16", sizes=sizes, settings={"gpu": ("sm86", "sm89")})
    assert [b.model_file for b in made] == ["model-64x96.engine", "model-32x32.engine"]
    assert [b.checked_file for b in made] == ["model-64x96.onnx", "model-32x32.onnx"]
    names = {f"{stem}-{size}.{end}" for size in ("64x96", "32x32") for stem, end in
             (("model", "onnx"), ("model", "engine"), ("build", "sh"))}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names | {"weights.bin"}
    for size, built in zip(sizes, made, strict=True):
        assert built.inputs == (TensorSpec("image", (1, 3, *size), layout="NCHW"),)
        images = load_images(photographs(), ImageSpec(), size)
        found = outputs(tmp_path / built.checked_file, images, "fp16", 1)
        assert off(found, reference(module, images)) < LIMITS["fp16"]
        record = built.choices["engine"]
        assert record["gpus"] == ["sm86", "sm89"] and record["builder"] == "tensorrt_rtx" and record["seconds"] > 0
        assert record["size_bytes"] == (tmp_path / built.model_file).stat().st_size
        assert set(record["layers"]["products"]) == {"fp16"}
        assert "not run here" in built.notes[-1] and built.checked_file in built.notes[-1]


class Overflowing(nn.Module):
    """Reaches 1e6 inside, as a network with one loud channel does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3)
        with torch.no_grad():
            self.up.weight *= 1e6
            self.down.weight *= 1e-6
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).mean((2, 3))  # n 3 h w -> n 10


def test_what_overflows_is_kept_named_and_told_to_the_user(tmp_path: Path) -> None:
    module = Overflowing().eval()
    (built,) = export(module, tmp_path, precision="fp16", batch="dynamic")
    kept = built.choices["kept_fp32"]
    assert {row["tensor"] for row in kept} == {"conv2d", "relu"} and all(row["max_abs"] > 65504 for row in kept)
    assert built.choices["fp16_ranges"]["over_limit"] == 2
    assert built.choices["fp16_ranges"]["largest"][0]["max_abs"] > 65504
    (note,) = built.notes
    assert note.startswith("float16: 3 of the nodes stay float32") and "conv2d" in note and "\n" not in note
    images = load_images(photographs(), ImageSpec(), (64, 96))
    path = tmp_path / "model.onnx"
    with Session(TypedOrtRuntime(path, 1, "fp16")) as session:
        found = session.run_all(images, "dynamic")
    assert off(found, reference(module, images)) < LIMITS["fp16"]


# ---- the attention that TensorRT fuses


@pytest.fixture(scope="module")
def swin(shop: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A small Swin in float16 with a dynamic batch, and where it was exported to."""
    module, folder = shop.network("swin").float(), tmp_path_factory.mktemp("swin")
    export(module, folder, precision="fp16", batch="dynamic")
    return module, folder


def test_a_dynamic_batch_is_right_at_every_size_of_it(swin: tuple[nn.Module, Path]) -> None:
    module, folder = swin
    images = load_images(photographs(), ImageSpec(), (64, 96))
    expected = reference(module, images)
    with Session(TypedOrtRuntime(folder / "model.onnx", 1, "fp16")) as session:
        for count in (1, 2, 4):
            found = session.run({"image": images[:count]})
            assert off(found, {"logits": expected["logits"][:count]}) < LIMITS["fp16"]


@REAL
def test_every_attention_of_a_float16_engine_is_one_kernel(swin: tuple[nn.Module, Path]) -> None:
    """With Softmax in float32 between Casts, and a dynamic batch: the builder's own list of layers is asked."""
    _, folder = swin
    made = engine.build_engine(folder / "model.onnx", folder / "model.engine", ("sm89",), 4)
    assert made.layers is not None
    assert made.layers["fused_attentions"] == kinds(folder / "model.onnx")["Softmax"] == 8
    assert set(made.layers["products"]) == {"fp16"}


def test_attention_has_the_form_that_fusions_know(swin: tuple[nn.Module, Path]) -> None:
    """BMM, bias, softmax, BMM on (b, h, s, d), with nothing in between but Casts, and Reshapes for the mask
    of any number of pictures: the scale is in the query.
    """
    graph = onnx.load(swin[1] / "model.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}

    def before(node: onnx.NodeProto) -> onnx.NodeProto:
        source = makers[node.input[0]]
        return before(source) if source.op_type in ("Cast", "Reshape") else source

    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    for softmax in softmaxes:
        assert ranks[softmax.output[0]] == 4
        assert [before(softmax).op_type, before(before(softmax)).op_type] == ["Add", "MatMul"]


# ---- options, errors, what the target says of itself


def test_options_are_parsed_from_texts() -> None:
    options = parse_options(TensorrtOptions, "tensorrt", {"gpu": "sm86, sm89", "oldest": "8.5", "max_batch": "16"})
    assert options == TensorrtOptions(("sm86", "sm89"), "8.5", 16)
    assert as_json(TensorrtOptions()) == {"gpu": [], "oldest": "8.6", "max_batch": 8}
    with pytest.raises(UsageError, match=r"oldest=9: expected 8\.5 or 8\.6 or 10\.0"):
        parse_options(TensorrtOptions, "tensorrt", {"oldest": "9"})
    for value in (0, 1025, -1):
        with pytest.raises(UsageError, match="max_batch"):
            TensorrtOptions(max_batch=value)


@pytest.mark.parametrize(
    ("gpu", "installed", "kind"),
    [
        pytest.param(("sm12",), True, UnknownNameError, marks=REAL),
        (("sm89",), False, MissingDependencyError),
        pytest.param(("sm87",), True, UsageError, marks=REAL),
    ],
)
def test_a_gpu_is_refused_before_anything_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Any, installed: bool, kind: type[Exception]
) -> None:
    if not installed:
        monkeypatch.setattr(engine.util, "find_spec", lambda name: None)
    monkeypatch.setattr(to_tensorrt, "deploy", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(kind):
        export(Overflowing(), tmp_path, settings={"gpu": gpu})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("oldest", "first"), [("8.5", "tensorrt-8.5"), ("8.6", "tensorrt-8.6"), ("10.0", "tensorrt-10.3")]
)
def test_it_is_linted_for_every_version_from_the_oldest_on(oldest: Any, first: str) -> None:
    profiles = TensorrtExporter().lint_for(TensorrtOptions(oldest=oldest))
    assert profiles[0] == first and profiles[-1] == "tensorrt-11"


@pytest.mark.parametrize("installed", [True, False])
def test_abilities_say_what_can_be_done_here(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    problem = "this machine has no NVIDIA driver"
    monkeypatch.setattr(engine, "gpu_problem", lambda: problem)
    if not installed:
        monkeypatch.setattr(engine.util, "find_spec", lambda name: None)
    elif util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed: its GPUs are not listed")
    files, engines, run, check = TensorrtExporter().abilities()
    assert files.ok and "build.sh" in files.detail and "Jetson" in files.detail
    assert engines.ok is installed and ("sm89" in engines.detail if installed else "pip install" in engines.how)
    assert not run.ok and run.detail == problem and "copy the directory" in run.how
    assert check.ok and [a.what for a in (files, engines, run, check)] == ["build", "build", "run", "check"]


# ---- the registered networks


def registered(name: str, precision: str, folder: Path) -> None:
    loaded = load_model(name, None, randomize=True, seed=0)
    (built,) = export(loaded.module, folder, card=loaded.card, precision=precision, settings={"gpu": ("sm89",)})
    images = load_images(photographs(), loaded.card.image)[:2]
    found = outputs(folder / "model.onnx", images, precision, 1)
    assert off(found, reference(loaded.module, images)) < LIMITS[precision]
    layers = built.choices["engine"]["layers"]
    assert set(layers["products"]) == {precision}
    if precision == "fp16":
        assert built.choices["kept_fp32"] == []
        if not name.startswith("mobileformer"):  # whose attention has 3 to 6 tokens on one side
            assert layers["fused_attentions"] == kinds(folder / "model.onnx")["Softmax"]


@REAL
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp16") for name in REGISTERED), ("mobileformer_294m", "fp32")]
)
def test_registered_networks_build_for_sm89(name: str, precision: str, tmp_path: Path) -> None:
    registered(name, precision, tmp_path)


def test_the_names_are_registered() -> None:
    assert set(REGISTERED) <= set(model_names())
