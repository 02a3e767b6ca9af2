"""INT8 for Core ML: what the saved program computes in int8, what stays float, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevit.contracts import Built, Calibration
from edgevit.errors import ExportError, RuntimeFailure, UsageError
from edgevit.export.quantize.for_coreml import (
    FLOAT,
    LARGEST,
    SMALLEST,
    TRANSPOSED,
    TWO_ACTIVATIONS,
    CoremlRecipe,
)
from edgevit.export.quantize.palettes import palette
from edgevit.export.to_coreml import CoremlExporter, CoremlOptions
from edgevit.inputs import as_values
from edgevit.runtimes.mil_reference import MilReference
from edgevit.specs import ExportSpec, ImageSpec, ModelCard

CARD = ModelCard("small", "test", "Small", "https://example.org", "here", 1, 1, image=ImageSpec((32, 32)))
SIZE = (32, 32)
INT8_LIMIT = 0.06  # of the root mean square of the logits: 8 bits over a few layers
W8_LIMIT = 0.04  # weights alone


class Maps(NamedTuple):
    """What a backbone returns."""

    feature0: Tensor


class Small(nn.Module):
    """A convolution, a hyper network that scales its channels, attention, a sum and a head."""

    def __init__(self, *, features: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.slopes = nn.ModuleDict({"hidden": nn.Linear(32, 32)})
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)
        self.features, self.gain = features, gain
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | Maps:
        maps = self.stem(x) * self.gain  # n 3 h w -> n 32 h/4 w/4
        tokens = maps.flatten(2).transpose(1, 2)  # n 32 h/4 w/4 -> n hw/16 32
        steered = tokens * torch.sigmoid(self.slopes["hidden"](tokens.mean(1, keepdim=True)))
        weights = torch.softmax(0.05 * self.q(steered) @ self.k(steered).transpose(1, 2), -1)  # n t 32 -> n t t
        mixed = steered + weights @ self.v(steered)
        return Maps(mixed) if self.features else self.head(mixed.mean(1))


def pictures(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Pixels of 0 to 255, normalised, so that a picture input can give the same."""
    image, draw = CARD.image, np.random.default_rng(count)
    pixels = draw.integers(0, 256, (count, 3, *size)).astype(np.float32)
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (image.mean, image.std))
    return ((pixels / 255 - mean) / std).astype(np.float32)


def watch(path: Path, images: Any, see: Any) -> None:
    """What edgevit/api hands to an exporter."""
    runtime = MilReference(path)
    runtime.load()
    for image in images:
        runtime.watch({runtime.inputs[0].name: image[None]}, see)


def exported(
    folder: Path,
    model: nn.Module | None = None,
    images: dict[tuple[int, int], Any] | None = None,
    spec: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **recipe: Any,
) -> tuple[Built, ...]:
    """Packages of a network in `folder`, one for each size of `images`."""
    wanted, shown = CoremlRecipe(**recipe), images or {SIZE: pictures(8)}
    settings = CoremlOptions(**(options or {}))
    specs = [
        ExportSpec("small", "coreml", "int8", image_size=size, settings=settings, recipe=wanted, **(spec or {}))
        for size in shown
    ]
    folder.mkdir(exist_ok=True)
    calibration = Calibration(shown, watch=watch) if wanted.calibrated else None
    return CoremlExporter().export(model or Small(), CARD, specs, folder, calibration)


def loaded(folder: Path, built: Built) -> MilReference:
    runtime = MilReference(folder / built.checked_file, precision="int8")
    runtime.load()
    return runtime


def off(model: nn.Module, runtime: MilReference, x: np.ndarray, fed: np.ndarray | None = None) -> float:
    """The largest difference from the reference, relative to its root mean square."""
    found = runtime.run({"image": x if fed is None else fed})[runtime.outputs[0].name]
    with torch.no_grad():
        expected = model(torch.from_numpy(x))
    whole = (expected if isinstance(expected, Tensor) else expected[0]).numpy()
    return float(np.abs(found - whole).max() / np.sqrt(np.mean(whole**2)))


def precisions(runtime: MilReference) -> dict[str, str]:
    """What each product computes in."""
    return {row.name: row.precision for row in runtime.profile({}, 0) if row.macs}


# ---- int8 products


def test_products_of_one_activation_become_int8_and_the_rest_is_named_with_its_reason(tmp_path: Path) -> None:
    model = Small()
    (built,) = exported(tmp_path, model)
    runtime = loaded(tmp_path, built)
    assert runtime.effective_precision == runtime.asked_precision == "int8"
    assert built.choices["quantized"] == {"conv": 1, "linear": 4}
    assert built.choices["weights"] == {"conv": 1, "linear": 5}
    why = {entry["node"]: entry["why"] for entry in built.choices["kept_float"]}
    assert why["slopes.hidden/linear"] == FLOAT["*slopes.*"]
    assert sum("two activations" in reason for reason in why.values()) == 2
    assert len(why) == 3
    assert built.choices["calibrated"]["pictures"] == 8
    assert "Neural Engine" in built.notes[0]
    found = list(precisions(runtime).values())
    assert sorted(found) == ["fp16"] * 2 + ["fp16, int8 weights"] + ["int8"] * 5
    assert off(model, runtime, pictures(3)[:1]) < INT8_LIMIT


def test_the_shares_of_the_products_are_told(tmp_path: Path) -> None:
    (built,) = exported(tmp_path)
    shares = loaded(tmp_path, built).describe()["products"]
    tokens, width = 64, 32
    eight = tokens * width * (3 * 4 * 4 + 3 * width) + width * 5  # stem; q, k, v; head
    scaled, attention = width * width, 2 * tokens * tokens * width
    whole = eight + scaled + attention
    assert shares == pytest.approx(
        {"int8": eight / whole, "fp16, int8 weights": scaled / whole, "fp16": attention / whole}
    )


def test_a_scale_is_the_largest_magnitude_that_the_calibration_saw(tmp_path: Path) -> None:
    images = pictures(6)
    (built,) = exported(tmp_path, images={SIZE: images}, equalize=False)
    program = loaded(tmp_path, built)._program
    assert program is not None
    stem = next(step for step in program.steps if step.type == "conv")
    quantize = next(step for step in program.steps if step.type == "quantize")
    assert program.steps.index(quantize) < program.steps.index(stem)
    scale = float(program.constants[str(quantize.operands["scale"])])
    assert scale == pytest.approx(float(np.abs(images).max()) / 127, rel=2**-10)  # float16


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        ({"only": ("stem/*", "head*")}, {"q", "k", "v", "slopes.hidden"}),
        ({"keep_float": ("[qkv]/*",)}, {"q", "k", "v"}),
        ({"only": ("q/*", "stem*"), "keep_float": ("stem/conv2d",)}, {"stem", "head", "k", "v", "slopes.hidden"}),
    ],
)
def test_what_the_user_keeps_float_has_neither_activations_nor_weights_in_int8(
    tmp_path: Path, recipe: dict[str, Any], kept: set[str]
) -> None:
    (built,) = exported(tmp_path, **recipe)
    asked = {e["node"].split("/")[0] for e in built.choices["kept_float"] if e["why"] == "asked for"}
    assert kept <= asked
    runtime = loaded(tmp_path, built)
    found = list(precisions(runtime).values())
    assert found.count("fp16") == len(kept) + 2  # and the two products of attention
    assert runtime.effective_precision == "int8"


def test_a_recipe_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no product is left to be int8"):
        exported(tmp_path, only=("nothing*",))


def test_sums_and_outputs_are_int8_where_asked_for(tmp_path: Path) -> None:
    (built,) = exported(tmp_path / "all", sums=True, outputs=True)
    (plain,) = exported(tmp_path / "plain")
    counts = []
    for folder, each in (("all", built), ("plain", plain)):
        program = loaded(tmp_path / folder, each)._program
        assert program is not None
        counts.append(sum(step.type == "quantize" for step in program.steps))
    assert built.choices["quantized"]["add"] >= 1
    assert counts[0] > counts[1]
    assert off(Small(), loaded(tmp_path / "all", built), pictures(1)) < 2 * INT8_LIMIT


def test_a_body_of_float32(tmp_path: Path) -> None:
    (built,) = exported(tmp_path, body="fp32")
    found = set(precisions(loaded(tmp_path, built)).values())
    assert found == {"fp32", "fp32, int8 weights", "int8"}
    assert "kept_fp32" not in built.choices


# ---- calibration


def test_values_beyond_float16_stay_float_and_are_named(tmp_path: Path) -> None:
    (built,) = exported(tmp_path, Small(gain=LARGEST), body="fp32", equalize=False)
    why = {entry["node"]: entry["why"] for entry in built.choices["kept_float"]}
    assert why["q/linear_1"] == f"reads values beyond {LARGEST:.0f}"
    assert "conv" in built.choices["quantized"]


def test_values_that_are_all_zero_get_the_smallest_normal_scale(tmp_path: Path) -> None:
    model = Small(gain=0.0)
    (built,) = exported(tmp_path, model, equalize=False)
    runtime = loaded(tmp_path, built)
    assert off(model, runtime, pictures(1)) < INT8_LIMIT
    assert runtime._program is not None
    scales = [
        float(runtime._program.constants[str(step.operands["scale"])])
        for step in runtime._program.steps
        if step.type == "quantize"
    ]
    assert min(scales) == pytest.approx(SMALLEST / 127)


def test_pictures_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    images = pictures(4)
    images[2, 0, 3, 3] = np.nan
    with pytest.raises((ExportError, RuntimeFailure), match=r"NaN|not finite"):
        exported(tmp_path, images={SIZE: images}, equalize=False)


def test_activations_without_pictures_are_refused(tmp_path: Path) -> None:
    spec = ExportSpec(
        "small", "coreml", "int8", image_size=SIZE, settings=CoremlOptions(), recipe=CoremlRecipe(equalize=False)
    )
    with pytest.raises(ExportError, match="need calibration pictures"):
        CoremlExporter().export(Small(), CARD, [spec], tmp_path)


def test_a_range_that_grows_with_the_pictures_is_unstable(tmp_path: Path) -> None:
    images = pictures(8)
    images[4:] *= 3
    (built,) = exported(tmp_path / "grows", images={SIZE: images}, equalize=False)
    assert "stem/conv2d" in built.choices["calibrated"]["unstable"]
    (calm,) = exported(tmp_path / "calm", images={SIZE: np.repeat(pictures(1), 4, 0)}, equalize=False)
    assert calm.choices["calibrated"]["unstable"] == []


# ---- weights alone


@pytest.mark.parametrize(
    ("scheme", "ios", "label", "limit"),
    [
        ("w8", "16", "int8", W8_LIMIT),
        ("w8", "18", "int8", W8_LIMIT),
        ("palette6", "16", "6-bit", 0.2),
        ("palette4", "16", "4-bit", 1.0),
        ("palette4", "18", "4-bit", 1.0),
    ],
)
def test_weights_alone_need_no_pictures_and_say_what_they_are(
    tmp_path: Path, scheme: Any, ios: Any, label: str, limit: float
) -> None:
    model = Small()
    (built,) = exported(tmp_path, model, options={"ios": ios}, scheme=scheme)
    runtime = loaded(tmp_path, built)
    assert runtime.effective_precision == runtime.asked_precision == f"fp16, {label} weights"
    assert built.choices["quantized"] == {"conv": 1, "linear": 5}
    assert "calibrated" not in built.choices
    assert off(model, runtime, pictures(1)) < limit
    assert not any(step.type == "quantize" for step in runtime._program.steps)  # type: ignore[union-attr]  # it is loaded


def test_a_palette_for_each_group_of_channels_is_closer(tmp_path: Path) -> None:
    """One table for all serves the large channels; the small ones share what is left of it."""
    model = Small()
    model.q.weight.data[16:] *= 50
    small = model.q.weight.data[:16].numpy()
    errors = []
    for ios in ("17", "18"):
        (built,) = exported(tmp_path / ios, model, options={"ios": ios}, scheme="palette4", equalize=False)
        program = loaded(tmp_path / ios, built)._program
        stored = next(np.asarray(v) for name, v in program.constants.items() if name.startswith("p_q_weight_to_fp16_"))
        errors.append(float(np.square(stored.reshape(model.q.weight.shape)[:16] - small).sum()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("bits", [4, 6])
def test_a_palette_is_exact_for_few_values_and_close_for_many(bits: int) -> None:
    draw = np.random.default_rng(bits)
    few = draw.choice(np.linspace(-1, 1, (1 << bits) - 3).astype(np.float16), (5, 7, 3))
    table, indices = palette(bits)(few)
    assert table.shape == (1 << bits,)
    assert (indices.shape, indices.dtype) == ((few.size,), np.uint8)
    np.testing.assert_array_equal(table[indices], few.ravel())
    many = draw.normal(size=(64, 64)).astype(np.float32)
    table, indices = palette(bits)(many)
    assert (np.diff(table) >= 0).all()
    uniform = np.linspace(many.min(), many.max(), 1 << bits)
    nearest = uniform[np.abs(many.ravel()[:, None] - uniform).argmin(1)]
    error, plain = (np.square(values - many.ravel()).mean() for values in (table[indices], nearest))
    assert error < 0.7 * plain


@pytest.mark.parametrize("weights", [np.zeros((4, 4)), np.full((2, 3), -2.5), np.r_[np.zeros(5000), 7.0]])
def test_a_palette_of_nearly_equal_weights_is_exact(weights: np.ndarray) -> None:
    table, indices = palette(4)(weights.astype(np.float16))
    np.testing.assert_array_equal(table[indices], weights.ravel())


def test_eight_bit_activations_need_ios_17(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"scheme w8a8 with ios=16.*ios=17 or --option scheme=w8"):
        exported(tmp_path, options={"ios": "16"})
    assert list(tmp_path.iterdir()) == []


# ---- shapes, inputs, files


def test_an_image_input_with_labels_computes_what_a_tensor_does(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcde"))
    model, x = Small(), pictures(1)
    (built,) = exported(tmp_path / "image", model, options={"input": "image", "labels": labels})
    runtime = loaded(tmp_path / "image", built)
    fed = as_values(x, CARD.image, "pixels")
    assert off(model, runtime, x, fed) < INT8_LIMIT
    found = runtime.run({"image": fed})
    assert found["classLabel"][0] == "abcde"[int(found["logits"].argmax())]
    assert {entry["node"] for entry in built.choices["kept_float"]} >= {"slopes.hidden/linear"}  # no `form.` before it


def test_each_size_is_calibrated_on_its_own_pictures(tmp_path: Path) -> None:
    model = Small()
    images = {size: pictures(4, size) * gain for size, gain in (((32, 32), 1), ((64, 32), 3))}
    built = exported(tmp_path, model, images)
    for (size, x), each in zip(images.items(), built, strict=True):
        assert off(model, loaded(tmp_path, each), x[:1]) < INT8_LIMIT, size


@pytest.mark.parametrize("batch", [3, "dynamic"])
def test_a_batch_is_calibrated_picture_by_picture(tmp_path: Path, batch: Any) -> None:
    model = Small()
    (built,) = exported(tmp_path, model, spec={"batch": batch})
    runtime = loaded(tmp_path, built)
    for count in (3,) if batch == 3 else (1, 2, 5):
        assert off(model, runtime, pictures(count)) < INT8_LIMIT


def test_features_are_int8_too(tmp_path: Path) -> None:
    model = Small(features=True)
    (built,) = exported(tmp_path, model, spec={"features_only": True})
    runtime = loaded(tmp_path, built)
    assert [spec.name for spec in built.outputs] == ["feature0"]
    assert off(model, runtime, pictures(1)) < 2 * INT8_LIMIT


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("scheme", ["w8a8", "palette4"])
def test_the_same_export_is_the_same_bytes(tmp_path: Path, scheme: Any) -> None:
    for name in ("one", "two"):
        exported(tmp_path / name, scheme=scheme)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert len(hashes(tmp_path / "one")) == 3


NETWORKS = [
    "residual",
    pytest.param("swin", marks=pytest.mark.slow),
    pytest.param("vit_distilled", marks=pytest.mark.slow),
    pytest.param("crossformer_plus", marks=pytest.mark.slow),
    pytest.param("lsla", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_each_family(shop: Any, tmp_path: Path, name: str) -> None:
    model = (shop.network(name) if name in shop.networks else shop.build(name)).float()
    size = (64, 32)
    (built,) = exported(tmp_path, model, {size: pictures(4, size)})
    runtime = loaded(tmp_path, built)
    assert runtime.effective_precision == "int8"
    kept = [entry for entry in built.choices["kept_float"] if entry["why"] not in FLOAT.values()]
    assert {entry["why"] for entry in kept} <= {TWO_ACTIVATIONS, TRANSPOSED}  # what Core ML does not have in int8
    found = list(precisions(runtime).values())
    assert found.count("int8") == sum(built.choices["quantized"].values())
    assert len(found) - found.count("int8") == len(built.choices["kept_float"])
    found, x = runtime.run({"image": pictures(1, size)})["logits"], torch.from_numpy(pictures(1, size))
    with torch.no_grad():
        expected = model(x).numpy()
    assert float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)) > 0.97
