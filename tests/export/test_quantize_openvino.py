"""INT8 for OpenVINO: what becomes int8 and what stays float, the same bytes each time, wrong recipes, clean streams."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevit.contracts import Built, Calibration
from edgevit.errors import ExportError, MissingDependencyError, RuntimeFailure, UsageError
from edgevit.export.quantize import for_openvino
from edgevit.export.quantize.for_openvino import OpenvinoRecipe, import_nncf, is_quantized, products
from edgevit.export.to_openvino import OpenvinoExporter
from edgevit.options import parse_options
from edgevit.runtimes import Session
from edgevit.runtimes.ov import OvRuntime
from edgevit.specs import ExportSpec, ModelCard

CARD = ModelCard("small", "small", "Small", "https://example.org", "here", 0, 0)
SIZE = (64, 64)
NEAR = 0.97  # cosine of an int8 network of random weights with its reference; 0.99 and more is seen


def pictures(count: int = 4, size: tuple[int, int] = SIZE) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, *size)).astype(np.float32)


def exported(model: nn.Module, folder: Path, *sizes: tuple[int, int], **options: Any) -> tuple[Built, ...]:
    folder.mkdir(exist_ok=True)
    rest = {key: options.pop(key) for key in ("batch", "features_only") if key in options}
    recipe = OpenvinoRecipe(**{"equalize": False, **options})
    sizes = sizes or (SIZE,)
    specs = [ExportSpec("small", "openvino", "int8", image_size=size, recipe=recipe, **rest) for size in sizes]
    images = {size: pictures(size=size) for size in sizes}
    return OpenvinoExporter().export(model, CARD, specs, folder, Calibration(images))


def cosine(model: nn.Module, path: Path, batch: int = 1) -> float:
    """Of the first output of both with each other, on a calibration picture."""
    images = pictures(batch)
    with torch.no_grad():
        out = model(torch.from_numpy(images))
    expected = (out if isinstance(out, Tensor) else out[0]).numpy().astype(np.float64).ravel()
    with Session(OvRuntime(path, None, "int8")) as session:
        session.require_precision(path)
        actual = next(iter(session.run({"image": images}).values())).astype(np.float64).ravel()
    return float(actual @ expected / np.linalg.norm(actual) / np.linalg.norm(expected))


def quantised(path: Path) -> set[str]:
    """The products of a file whose operands are both in int8."""
    model = ov.Core().read_model(path)
    return {op.get_friendly_name() for op in products(model) if is_quantized(op)}


@pytest.fixture(scope="module")
def swin(shop: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Built]:
    """A small Swin, where it was exported to in int8, and what was said of it."""
    model, folder = shop.network("swin").float(), tmp_path_factory.mktemp("swin")
    (built,) = exported(model, folder)
    return model, folder, built


def test_every_linear_becomes_int8_and_the_network_stays_what_it_was(swin: tuple[nn.Module, Path, Built]) -> None:
    model, folder, built = swin
    floats = [entry["node"] for entry in built.choices["kept_float"]]
    assert built.choices["quantized"]["Gemm"] > 20
    assert all("matmul" in name for name in floats)
    assert sum(built.choices["quantized"].values()) == len(quantised(folder / "model.xml"))
    assert built.choices["weights"] == "i8" and built.choices["inference_precision"] == "f32"
    assert built.choices["calibrated"]["pictures"] == 4
    assert cosine(model, folder / "model.xml") > NEAR


def test_mobile_former_quantises_and_keeps_hyper_networks_and_depthwise_float(shop: Any, tmp_path: Path) -> None:
    model = shop.build("plain").float()
    (built,) = exported(model, tmp_path)
    why = {entry["node"]: entry["why"] for entry in built.choices["kept_float"]}
    assert any("slopes" in name and "hyper network" in reason for name, reason in why.items())
    assert any("depthwise" in reason for reason in why.values())
    assert built.choices["quantized"]["Conv"] > 5
    assert any("products that stay in float" in note for note in built.notes)
    assert cosine(model, tmp_path / "model.xml") > NEAR


def test_only_and_keep_float_are_honoured_for_every_product(shop: Any, tmp_path: Path) -> None:
    model = shop.network("swin").float()
    exported(model, tmp_path / "only", only=("layers.1.*",))
    names = quantised(tmp_path / "only" / "model.xml")
    assert names and all(name.startswith("layers.1.") for name in names)
    exported(model, tmp_path / "but", keep_float=("layers.1.*",))
    names = quantised(tmp_path / "but" / "model.xml")
    assert names and not any(name.startswith("layers.1.") for name in names)


def test_nothing_left_to_quantise_is_not_called_int8(shop: Any, tmp_path: Path) -> None:
    model = shop.network("vit").float()
    (built,) = exported(model, tmp_path, keep_float=("*",))
    assert built.choices["quantized"] == {}
    assert {entry["why"] for entry in built.choices["kept_float"]} <= {"asked for", *for_openvino.KEPT.values()}
    with pytest.raises(RuntimeFailure, match=r"runs in fp32, expected int8"):
        cosine(model, tmp_path / "model.xml")


@pytest.mark.parametrize("batch", ["dynamic", pytest.param(3, marks=pytest.mark.slow)])
def test_other_batches(batch: Any, shop: Any, tmp_path: Path) -> None:
    model = shop.network("vit").float()
    exported(model, tmp_path, batch=batch)
    assert cosine(model, tmp_path / "model.xml", 3) > NEAR


def test_features_and_several_sizes(shop: Any, tmp_path: Path) -> None:
    model = shop.network("swin_features").float()
    built = exported(model, tmp_path, (64, 64), (32, 64), features_only=True)
    assert [each.model_file for each in built] == ["model-64x64.xml", "model-32x64.xml"]
    assert cosine(model, tmp_path / "model-64x64.xml") > NEAR


def test_the_same_model_gives_the_same_bytes_prints_nothing_and_leaves_the_environment_alone(
    shop: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, before = shop.network("vit").float(), dict(os.environ)
    for folder in ("first", "second"):
        exported(model, tmp_path / folder)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before
    for ending in ("xml", "bin"):
        first, second = ((tmp_path / f / f"model.{ending}").read_bytes() for f in ("first", "second"))
        assert first == second
    assert str(tmp_path) not in (tmp_path / "first" / "model.xml").read_text()


def test_the_file_is_a_third_of_float32(swin: tuple[nn.Module, Path, Built], tmp_path: Path) -> None:
    model, folder, _ = swin
    OpenvinoExporter().export(model, CARD, [ExportSpec("small", "openvino", image_size=SIZE)], tmp_path)
    small, large = ((path / "model.bin").stat().st_size for path in (folder, tmp_path))
    assert small < 0.3 * large


def test_what_stays_float_is_stored_small_and_computes_the_same(shop: Any, tmp_path: Path) -> None:
    model = shop.swin().float().eval()
    exported(model, tmp_path, keep_float=("*",))
    types = set()
    for op in ov.Core().read_model(tmp_path / "model.xml").get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_data().size > 1024:  # 1024 are scales
            types.add(op.get_element_type().get_type_name())
    assert types == {"i8", "f16"}
    with torch.no_grad():
        expected = model(torch.from_numpy(pictures(1))).numpy().ravel()
    with Session(OvRuntime(tmp_path / "model.xml", None, "fp32")) as session:
        actual = next(iter(session.run({"image": pictures(1)}).values())).ravel()
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("place", [np.s_[-1], np.s_[:, 5]])
def test_weights_of_one_large_row_or_column_keep_the_small_ones(place: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weights[place] *= 1000  # as the biases of a dynamic ReLU beside its weights
    rounded, scales = for_openvino._in_int8(weights)
    difference = np.abs(rounded * scales - weights)
    difference[place] = 0
    assert difference.max() < 0.02
    assert not for_openvino._in_int8(0 * weights)[0].any()


def test_the_profile_tells_int8_from_float_inside_one_fused_operator(swin: tuple[nn.Module, Path, Built]) -> None:
    _, folder, built = swin
    with Session(OvRuntime(folder / "model.xml", None, "int8")) as session:
        share = session.runtime.describe()["int8_share"]
        operators = session.runtime.profile({"image": pictures(1)}, 0)
    assert 0.5 < share < 1
    by_type = {kind: sum(o.macs or 0 for o in operators if o.precision == kind) for kind in ("int8", "fp32")}
    assert share == pytest.approx(by_type["int8"] / sum(by_type.values()))
    floats = {entry["node"] for entry in built.choices["kept_float"]}
    assert all(o.name in floats or floats & set(o.origins) for o in operators if o.macs and o.precision == "fp32")


@pytest.mark.parametrize(
    "options",
    [
        {"calibrator": "mse"},
        pytest.param({"calibrator": "percentile"}, marks=pytest.mark.slow),
        pytest.param({"preset": "performance"}, marks=pytest.mark.slow),
    ],
)
def test_other_choices_work(options: dict[str, Any], shop: Any, tmp_path: Path) -> None:
    model = shop.network("vit").float()
    exported(model, tmp_path, **options)
    assert cosine(model, tmp_path / "model.xml") > NEAR


@pytest.mark.parametrize(
    "wrong", [{"calibrator": "entropy"}, {"preset": "fast"}, {"bias_correction": "some"}, {"smooth_quant": "perhaps"}]
)
def test_a_wrong_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(OpenvinoRecipe, "openvino in int8", wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("calibration", [None, Calibration({}), Calibration({SIZE: pictures(0)})])
def test_no_pictures_are_an_error(calibration: Calibration | None, shop: Any, tmp_path: Path) -> None:
    spec = ExportSpec("small", "openvino", "int8", image_size=SIZE, recipe=OpenvinoRecipe())
    with pytest.raises(ExportError, match=r"no calibration pictures of this size.*--calibration"):
        OpenvinoExporter().export(shop.network("vit").float(), CARD, [spec], tmp_path, calibration)


def test_a_missing_nncf_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    true = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "nncf":
            raise ImportError("No module named 'nncf'")
        return true(name, *rest)

    monkeypatch.delitem(sys.modules, "nncf", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgevit\[openvino\]'"):
        import_nncf()


def test_what_nncf_cannot_do_is_one_line(shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("first\nlast")

    monkeypatch.setattr(import_nncf(), "quantize", failing)
    with pytest.raises(ExportError, match=r"^quantisation by NNCF: last$"):
        exported(shop.network("vit").float(), tmp_path)
