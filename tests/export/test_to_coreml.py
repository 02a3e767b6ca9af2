"""The Core ML target end to end: networks of every family, options, metadata, silence; checked on the saved program."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevit import api, inputs
from edgevit.bench.attestation import Attestation, attest
from edgevit.bench.complexity import count_onnx
from edgevit.contracts import Built
from edgevit.errors import EdgevitError, ExportError, InputError, UnknownNameError, UsageError
from edgevit.export import to_coreml
from edgevit.export.mil_pixels import scaled_input
from edgevit.export.to_coreml import CoremlExporter, CoremlOptions
from edgevit.models import load_model
from edgevit.registry import model_names
from edgevit.runtimes.mil_reference import MilReference
from edgevit.specs import ExportSpec, ImageSpec, ModelCard

CARD = ModelCard("small", "test", "Small", "https://example.org", "here", 1, 1, image=ImageSpec((32, 32)))
FULL_LIMIT = 1e-4  # float32 in another summation order: 1e-6 is seen
HALF_LIMIT = 2e-2  # of logits of about one after a few blocks in float16: 2e-3 is seen
MAX_RANK = 5  # of a Core ML tensor


class Maps(NamedTuple):
    """What a backbone returns."""

    feature0: Tensor
    feature1: Tensor


class Tiny(nn.Module):
    """Two convolutions of the picture, one of them padded, or a sum that reads it too."""

    def __init__(self, *, features: bool = False, beside: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 2, 2)
        self.head = nn.Linear(8, 5)
        self.features, self.beside = features, beside
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | Maps:
        maps = torch.cat([self.one(x), self.two(x)], 1).relu()  # n 3 h w -> n 8 h/2 w/2
        if self.features:
            return Maps(maps, -maps)
        logits = self.head(maps.mean((2, 3)))
        return logits + x.mean((1, 2, 3))[:, None] if self.beside else logits


def exported(model: nn.Module, folder: Path, spec: dict[str, Any] | None = None, **options: Any) -> Built:
    """The package of one size in `folder`."""
    given = {"image_size": (32, 32), **(spec or {})}
    full = ExportSpec("small", "coreml", settings=CoremlOptions(**options), **given)
    folder.mkdir(exist_ok=True)
    (built,) = CoremlExporter().export(model, CARD, [full], folder)
    return built


def interpreter(folder: Path, built: Built, precision: str = "fp32") -> MilReference:
    runtime = MilReference(folder / built.checked_file, precision=precision)
    runtime.load()
    return runtime


def pictures(n: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, 3, *size)).astype(np.float32)


def off(model: nn.Module, runtime: MilReference, built: Built, x: np.ndarray, fed: np.ndarray | None = None) -> float:
    """The largest difference from the reference over all outputs."""
    out = runtime.run({"image": x if fed is None else fed})
    with torch.no_grad():
        expected = model(torch.from_numpy(x))
    pairs = zip(built.outputs, [expected] if isinstance(expected, Tensor) else expected, strict=True)
    return max(float(np.abs(out[spec.name] - value.numpy()).max()) for spec, value in pairs)


def ranks(runtime: MilReference) -> set[int]:
    assert runtime._program is not None
    return {len(out.shape) for step in runtime._program.steps for out in step.outputs}


# ---- networks


NETWORKS = [
    ("vit_distilled", "fp32", "18", 2),
    ("residual", "fp16", "16", 1),
    pytest.param("swin", "fp16", "18", 1, marks=pytest.mark.slow),
    pytest.param("crossformer_plus", "fp16", "16", 2, marks=pytest.mark.slow),
    pytest.param("lsla", "fp16", "17", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "precision", "ios", "batch"), NETWORKS)
def test_a_network_of_each_family(shop: Any, tmp_path: Path, name: str, precision: str, ios: Any, batch: int) -> None:
    model = (shop.network(name) if name in shop.networks else shop.build(name)).float()
    built = exported(model, tmp_path, {"image_size": (64, 32), "precision": precision, "batch": batch}, ios=ios)
    runtime = interpreter(tmp_path, built, precision)
    assert runtime.effective_precision == runtime.asked_precision == precision
    assert runtime.describe()["program"] == f"iOS{ios}"
    assert off(model, runtime, built, pictures(batch, (64, 32))) <= (FULL_LIMIT if precision == "fp32" else HALF_LIMIT)
    assert runtime.first_problem is None
    assert max(ranks(runtime)) <= MAX_RANK
    assert built.certificates
    assert runtime._program is not None
    assert sum(runtime._program.macs.values()) == count_onnx(built.graph).macs
    assert {node.op_type for node in built.graph.graph.node} & {"Conv", "MatMul", "Gemm"}


@pytest.mark.slow
@pytest.mark.parametrize("network", ["swin_features", "crossformer_old_features", "lsla_features", "vit_distilled"])
def test_small_networks_at_any_batch(shop: Any, network: str, tmp_path: Path) -> None:
    features = "features" in network
    model = shop.network(network).float()
    built = exported(model, tmp_path, {"image_size": (64, 96), "batch": "dynamic", "features_only": features})
    runtime = interpreter(tmp_path, built)
    for n in (1, 3):
        assert off(model, runtime, built, pictures(n, (64, 96))) <= FULL_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "grouped", "spatial_features"])
def test_small_mobile_formers_at_any_batch(shop: Any, name: str, tmp_path: Path) -> None:
    model, features = shop.build(name).float(), "features" in name
    built = exported(model, tmp_path, {"image_size": (32, 64), "batch": "dynamic", "features_only": features})
    runtime = interpreter(tmp_path, built)
    assert max(off(model, runtime, built, pictures(n, (32, 64))) for n in (1, 3)) <= FULL_LIMIT


# One or two of each family: their siblings have more of the same blocks.
LARGE = ("mobileformer_26m", "crossformer_s", "crossformerpp_s", "vit_lsla", "swin_t", "deit_tiny")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [*((name, "fp16") for name in LARGE), ("mobileformer_294m", "fp32")])
def test_the_published_networks(name: str, precision: str, tmp_path: Path) -> None:
    """Through the api, so that parity on the photographs within its limits is part of it."""
    artifact = api.export_model(name, "coreml", precision=precision, out=tmp_path)
    assert artifact.manifest["precision"] == precision
    assert artifact.manifest["parity"]["passed"]
    assert name in model_names()


# ---- options, on a network of three layers


def test_a_batch_of_any_size_is_one_package(tmp_path: Path) -> None:
    model = Tiny()
    built = exported(model, tmp_path, {"batch": "dynamic"})
    assert built.inputs[0].shape == ("batch", 3, 32, 32)
    assert built.notes == (to_coreml.ANY_BATCH,)
    assert built.outputs[0].shape == ("batch", 5)
    runtime = interpreter(tmp_path, built)
    assert max(off(model, runtime, built, pictures(n)) for n in (1, 2, 5)) <= FULL_LIMIT
    assert runtime._program is not None
    assert sum(runtime._program.macs.values()) == 16 * 16 * 4 * 3 * (9 + 4) + 8 * 5  # of one picture


def test_features_keep_their_names(tmp_path: Path) -> None:
    model = Tiny(features=True)
    built = exported(model, tmp_path, {"features_only": True})
    assert [(spec.name, spec.shape, spec.layout) for spec in built.outputs] == [
        ("feature0", (1, 8, 16, 16), "NCHW"), ("feature1", (1, 8, 16, 16), "NCHW"),
    ]  # fmt: skip
    assert off(model, interpreter(tmp_path, built), built, pictures(1)) <= FULL_LIMIT


def test_several_sizes_are_one_package_each(tmp_path: Path) -> None:
    model, sizes = Tiny(), [(32, 32), (64, 32)]
    specs = [ExportSpec("small", "coreml", image_size=size, settings=CoremlOptions()) for size in sizes]
    made = CoremlExporter().export(model, CARD, specs, tmp_path)
    assert [built.model_file for built in made] == ["model-32x32.mlpackage", "model-64x32.mlpackage"]
    for built, size in zip(made, sizes, strict=True):
        assert off(model, interpreter(tmp_path, built), built, pictures(1, size)) <= FULL_LIMIT


@pytest.mark.parametrize(("beside", "precision"), [(False, "fp32"), (True, "fp32"), (False, "fp16")])
def test_an_image_input_takes_pixels(tmp_path: Path, beside: bool, precision: str) -> None:
    """Its scale, its bias and the division by std are all inside; the division costs no operator where it can."""
    model = Tiny(beside=beside)
    built = exported(model, tmp_path, {"precision": precision}, input="image")
    assert built.inputs[0].values == "pixels"
    folded = (
        "an operator of its own: not only convolutions read the picture" if beside else "folded into 2 convolutions"
    )
    assert built.choices["std"] == folded
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32)).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CARD.image.mean, CARD.image.std))
    runtime = interpreter(tmp_path, built, precision)
    limit = FULL_LIMIT if precision == "fp32" else HALF_LIMIT
    assert off(model, runtime, built, (pixels / 255 - mean) / std, pixels) <= limit
    (spec,) = runtime.inputs
    assert spec.values == "pixels"
    np.testing.assert_array_equal(inputs.as_values((pixels / 255 - mean) / std, CARD.image, "pixels"), pixels)


def test_dividing_by_std_is_exact_and_leaves_the_network_alone() -> None:
    model = Tiny().double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scaled, where = scaled_input(model, (0.2, 0.3, 0.4), torch.zeros(1, 3, 8, 8))
    assert where == "folded into 2 convolutions"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x, std = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    expected = model(x / std[:, None, None])
    assert float((scaled.double()(x) - expected).abs().max()) < 1e-5  # float32 weights


def test_labels_make_a_classifier_whose_logits_stay(tmp_path: Path) -> None:
    names = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead"]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    model = Tiny()
    labels = tmp_path / "labels.txt"
    built = exported(model, tmp_path / "out", {"precision": "fp16"}, labels=labels, input="image")
    assert [spec.name for spec in built.outputs] == ["logits"]
    runtime = interpreter(tmp_path / "out", built, "fp16")
    pixels = np.full((1, 3, 32, 32), 77, np.float32)
    out = runtime.run({"image": pixels})
    assert out["classLabel"].tolist() == [names[int(out["logits"].argmax())]]
    shares = np.exp(out["logits"]) / np.exp(out["logits"]).sum()
    np.testing.assert_allclose(out["classLabel_probs"], shares, atol=1e-3)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CARD.image.mean, CARD.image.std))
    assert off(model, runtime, built, (pixels / 255 - mean) / std, pixels) <= HALF_LIMIT


def test_operators_kept_in_float32(tmp_path: Path) -> None:
    built = exported(Tiny(), tmp_path, {"precision": "fp16"}, keep_fp32=("linear",))
    runtime = interpreter(tmp_path, built, "fp16")
    assert runtime.effective_precision == runtime.asked_precision == "fp16"
    assert built.choices["keep_fp32"] == ["linear"]
    assert built.notes == ()  # it was asked for
    assert [(kept["type"], kept["why"]) for kept in built.choices["kept_fp32"]] == [("linear", "asked for")]
    attested = attested_of(runtime, built)
    assert attested.as_asked, attested.verdict
    assert {share.precision for share in attested.by_precision if share.macs} == {"fp16", "fp32"}
    undeclared = attest(runtime.profile({"image": pictures(1)}, 0), "fp16", None)
    assert [other.kind for other in undeclared.others] == ["linear"]


def attested_of(runtime: MilReference, built: Built) -> Attestation:
    """What `profile` judges by, with what the export declares."""
    declared = {kept["node"] for kept in built.choices["kept_fp32"]}
    total = count_onnx(built.graph).macs
    return attest(runtime.profile({"image": pictures(1)}, 0), runtime.asked_precision, total, declared)


def test_a_weight_beyond_float16_is_listed_and_noted(tmp_path: Path) -> None:
    """coremltools keeps such an operator in float32 by itself and does not tell."""
    model = Tiny()
    model.head.weight[0, 0] = 1e5
    built = exported(model, tmp_path, {"precision": "fp16"})
    ((node, kind, why),) = [tuple(kept.values()) for kept in built.choices["kept_fp32"]]
    assert (kind, why) == ("linear", "constant beyond float16")
    (note,) = built.notes
    assert f"1 (linear {node})" in note
    assert "leave the Neural Engine" in note
    assert attested_of(interpreter(tmp_path, built, "fp16"), built).as_asked


def test_an_fp16_export_without_a_product_in_fp16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"option keep_fp32=linear,conv: leaves no product in fp16; keep fewer"):
        exported(Tiny(), tmp_path, {"precision": "fp16"}, keep_fp32=("linear", "conv"))
    assert list(tmp_path.iterdir()) == []


def test_labels_of_another_network_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labels.txt").write_text("one\ntwo")
    monkeypatch.setattr(to_coreml, "deploy", None)  # whoever comes so far fails otherwise
    with pytest.raises(InputError, match="2 names, expected 5 class names"):
        exported(Tiny(), tmp_path / "out", labels=tmp_path / "labels.txt")


@pytest.mark.slow
def test_following_the_advice_once_is_enough(tmp_path: Path) -> None:
    """One BatchNorm of a real network overflows: parity fails with the operators to keep, and they are all."""
    model = load_model("mobileformer_26m", None).module
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[3].weight.data.fill_(3e5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    given: Any = {"weights": tmp_path / "weights.pth", "precision": "fp16", "image_size": (64, 64)}
    with pytest.raises(EdgevitError, match=r"keep_fp32=[a-z_,0-9]+ or") as caught:
        api.export_model("mobileformer_26m", "coreml", **given, out=tmp_path / "one")
    kept = str(caught.value).split("keep_fp32=")[1].split(" ")[0]
    artifact = api.export_model(
        "mobileformer_26m", "coreml", **given, options={"keep_fp32": kept}, out=tmp_path / "two"
    )
    assert artifact.manifest["parity"]["passed"]
    assert api.profile(artifact.path, runs=1)["effective_precision"] == "fp16"


def test_an_overflow_of_an_export_is_named_with_what_helps(tmp_path: Path) -> None:
    """Weights that no network should have: the message names an operator, and keeping it in float32 helps."""
    from edgevit.errors import RuntimeFailure

    model = Tiny()
    model.head.weight.mul_(1e5)
    x = pictures(1)
    built = exported(model, tmp_path / "half", {"precision": "fp16"})
    with pytest.raises(
        RuntimeFailure, match=r"first linear '.*' in fp.*export with --option keep_fp32=linear or"
    ) as caught:
        interpreter(tmp_path / "half", built, "fp16").run({"image": x})
    assert "\n" not in str(caught.value)


# ---- refusals


@pytest.mark.parametrize(
    ("spec", "options", "kind", "message"),
    [
        ({"precision": "fp16"}, {"keep_fp32": ("linaer",)}, UnknownNameError, "did you mean 'linear'"),
        ({}, {"keep_fp32": ("linear",)}, UsageError, "add --precision fp16"),
        ({"batch": 2}, {"input": "image"}, UsageError, "one picture at a time; use batch 1"),
        ({"batch": "dynamic"}, {"input": "image"}, UsageError, "use batch 1"),
        ({"batch": 2}, {"labels": Path("x")}, UsageError, "one class at a time; use batch 1"),
        ({"features_only": True}, {"labels": Path("x")}, UsageError, "features have no classes"),
        ({}, {"labels": Path("nowhere.txt")}, InputError, "nowhere.txt: no such file"),
        *(
            (
                {"precision": "fp16"},
                {"keep_fp32": (name,)},
                UsageError,
                f"keep_fp32: {name} computes nothing that could",
            )
            for name in ("const", "cond", "_const_symbolic", "cast", "constexpr_cast")
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_file(
    tmp_path: Path, spec: Any, options: Any, kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        exported(Tiny(), tmp_path, spec, **options)
    assert list(tmp_path.iterdir()) == []


class Odd(nn.Module):
    """An operator that coremltools does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x).mean((2, 3))


class SixAxes(nn.Module):
    """Six axes on the way, which nothing takes back."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return (x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).relu() + 1).mean((1, 2, 3, 4))


@pytest.mark.parametrize(("model", "message"), [(Odd(), "bessel_j0"), (SixAxes(), "outputs a rank 6 tensor")])
def test_what_core_ml_cannot_do_is_an_error_that_names_the_operator(model: nn.Module, message: str) -> None:
    program = to_coreml.capture(model, 1, (32, 32))
    spec = ExportSpec("small", "coreml", image_size=(32, 32), settings=CoremlOptions())
    with pytest.raises(ExportError, match="conversion to Core ML: ") as caught:
        to_coreml._convert(program, ["logits"], spec, CARD, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what is in the package


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Built]:
    """The same export in two folders."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    spec = {"precision": "fp16", "weights": "/home/somebody/weights.pth"}
    options = {"author": "Somebody", "license": "MIT"}
    built = [exported(Tiny(), folder, spec, **options) for folder in folders]
    return folders[0] / "model.mlpackage", folders[1] / "model.mlpackage", built[0]


def files(package: Path) -> dict[str, bytes]:
    return {str(f.relative_to(package)): f.read_bytes() for f in sorted(package.rglob("*")) if f.is_file()}


def test_a_package_holds_three_files_and_no_random_name(twice: tuple[Path, Path, Built]) -> None:
    """Not that the programs are equal byte by byte: coremltools orders constants by chance now and then."""
    one, two = files(twice[0]), files(twice[1])
    assert list(one) == [
        "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin", "Manifest.json",
    ]  # fmt: skip
    assert one["Manifest.json"] == two["Manifest.json"]
    assert list(one) == list(two)
    assert (
        json.loads(one["Manifest.json"])["rootModelIdentifier"] in json.loads(one["Manifest.json"])["itemInfoEntries"]
    )


def test_the_package_says_what_it_is_and_nothing_of_this_machine(twice: tuple[Path, Path, Built]) -> None:
    from edgevit.runtimes.mil_package import read_package

    metadata = read_package(twice[0])[0].description.metadata
    facts = dict(metadata.userDefined)
    assert metadata.shortDescription == "Small (small), https://example.org"
    assert (metadata.author, metadata.license) == ("Somebody", "MIT")
    assert facts["edgevit.weights"] == "weights.pth"
    assert facts["edgevit.precision"] == "fp16"
    assert facts["edgevit.mean"] == "0.485, 0.456, 0.406"
    assert not [key for key in facts if "date" in key]
    everything = b"".join(files(twice[0]).values())
    for trace in (b"/home/", b"site-packages", str(Path.cwd()).encode(), b".py"):
        assert trace not in everything


def test_coremltools_itself_reads_the_package(twice: tuple[Path, Path, Built]) -> None:
    model = to_coreml.ct.models.MLModel(str(twice[0]), skip_model_load=True)
    assert model.short_description == "Small (small), https://example.org"
    assert [feature.name for feature in model.get_spec().description.output] == ["logits"]


# ---- manners


def test_an_export_is_silent_and_leaves_coremltools_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger, table = logging.getLogger("coremltools"), to_coreml._TORCH_OPS_REGISTRY.name_to_func_mapping
    before = list(logger.handlers), logger.propagate, dict(table)
    exported(Tiny(), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (list(logger.handlers), logger.propagate, dict(table)) == before


def test_importing_the_exporter_and_the_interpreter_prints_nothing(started: Callable[..., Any]) -> None:
    process = started("-c", "import edgevit.export.to_coreml, edgevit.runtimes.coreml, edgevit.runtimes.mil_reference")
    assert process.communicate(timeout=300) == ("", "")


def test_the_plain_conversion_is_the_same_function(tmp_path: Path) -> None:
    """The baseline of `bench --vs naive`, under whatever name it is asked for."""
    model = Tiny()
    spec = ExportSpec("small", "coreml", image_size=(32, 32), settings=CoremlOptions())
    CoremlExporter().export_naive(model, CARD, spec, tmp_path / "naive.mlpackage")
    runtime = MilReference(tmp_path / "naive.mlpackage")
    runtime.load()
    x = pictures(1)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()  # type: ignore[union-attr]  # logits
    assert np.abs(runtime.run({"image": x})["logits"] - expected).max() <= FULL_LIMIT


def test_abilities_and_lint_profiles() -> None:
    exporter = CoremlExporter()
    assert [(a.what, a.ok) for a in exporter.abilities() if a.what != "run"] == [("build", True), ("check", True)]
    assert all(a.ok or a.how for a in exporter.abilities())
    assert exporter.lint_for(CoremlOptions(ios="16")) == ("coreml-ios16",)


@pytest.mark.slow
def test_the_weights_of_a_real_network_go_through_the_api(tmp_path: Path) -> None:
    """26M at its smallest: artifact, parity on the photographs, verify."""
    artifact = api.export_model("mobileformer_26m", "coreml", image_size=(64, 64), out=tmp_path)
    assert artifact.manifest["parity"]["passed"]
    assert api.verify(artifact.path)["parity"]["passed"]
    assert load_model("mobileformer_26m", None, randomize=True).card.name == artifact.manifest["model"]
