"""Every target at every precision, as a user asks for it: made, compared with the reference, checked again, run.

A small network goes through all of them; the networks that people bring are `slow`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgevit import api, inputs, registry
from edgevit.api.running import RunOn, as_fed, obstacle_of, session_of
from edgevit.errors import ExportError, RuntimeFailure, UnknownNameError, UsageError
from edgevit.manifest import MANIFEST
from edgevit.options import option_names
from edgevit.registry import TARGETS, exporter, family_of, model_names

PHOTO = next(path for path in inputs.photographs() if path.stem == "coffee")
NETWORKS = (
    "mobileformer_26m", "mobileformer_294m", "crossformer_s", "crossformerpp_s", "vit_lsla", "swin_t", "deit_tiny",
)  # fmt: skip
SMALL = "vit_reference_tiny"  # of the fewest operators, which is what an export takes its time for
REQUESTS = [(target, precision) for target in TARGETS for precision in exporter(target).precisions]
OPTIONS = {"tensorrt": ("--gpu", "sm89")}
LOOSER = {"fp32": 1e-3, "fp16": 1e-1, "bf16": 1.0, "int8": 2.0}  # logits are of unit size: more proves nothing


def made(cli: Any, out: Path, model: str, target: str, precision: str, *more: str) -> dict[str, Any]:
    """The document of an export by the command line."""
    calibrated = ("--calibration", "reference-task", "--calibration-pictures", "16", "--allow-few")
    options = (*OPTIONS.get(target, ()), *(calibrated if precision == "int8" else ()), *more)
    told = cli("export", model, "--to", target, "--precision", precision, "--out", out, "--json", *options)
    assert told.code == 0, told.err
    document: dict[str, Any] = told.document
    return document


@pytest.mark.parametrize(("target", "precision"), REQUESTS)
def test_an_export_is_proven_and_can_be_checked_run_and_linted(
    cli: Any, tmp_path: Path, target: str, precision: str
) -> None:
    if precision == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    document = made(cli, tmp_path, SMALL, target, precision, "--image-size", "64x64")
    path = Path(document["artifact"])
    assert path.name == f"{SMALL}-{target}-{precision}-64x64"
    assert document["parity"]["passed"] is True and document["parity"]["max_abs"] <= LOOSER[precision]
    assert document["parity"]["runtime"] == exporter(target).checker
    names = [entry["name"] for entry in document["files"]]
    for key in ("model_file", "checked_file"):
        assert any(name == document[key] or name.startswith(f"{document[key]}/") for name in names)
    assert document["lint"]["profiles"] == list(exporter(target).lint_for(exporter(target).OPTIONS()))
    manifest = (path / MANIFEST).read_text()
    assert json.loads(manifest)["runtime"] == exporter(target).runtime
    assert str(tmp_path) not in manifest.replace(json.dumps(json.loads(manifest)["command"])[1:-1], "")
    assert cli("verify", path, "--json").document["parity"]["passed"] is True
    ran = cli("run", path, PHOTO, "--json").document
    assert len(ran["predictions"][0]["top"]) == 5


@pytest.mark.slow  # the other targets have theirs in tests/export; `make exports` makes all of them
@pytest.mark.parametrize("model", NETWORKS)
def test_the_networks_that_people_bring_reach_openvino(cli: Any, tmp_path: Path, model: str) -> None:
    document = made(cli, tmp_path, model, "openvino", "fp16")
    assert document["parity"]["passed"] is True


def test_no_option_belongs_to_a_family_and_a_target() -> None:
    families = set().union(*(option_names(family_of(model)[1].OPTIONS) for model in model_names()))
    targets = set().union(*(option_names(exporter(target).OPTIONS) for target in TARGETS))
    assert families & targets == set()


# ---- where the target's runtime cannot run


@pytest.fixture
def elsewhere(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny target, whose own runtime runs on other machines only."""

    class Elsewhere:
        name = "elsewhere"

        @classmethod
        def obstacle(cls) -> str:
            return "no such device here, expected one; bring one"

    tiny.family.Elsewhere = Elsewhere
    monkeypatch.setitem(registry.RUNTIMES, "elsewhere", registry.Row("tiny_family", "Elsewhere", loads=(".onnx",)))
    tiny.exporter.runtime = "elsewhere"
    return tiny


def test_what_checked_an_export_runs_it_where_the_device_is_not(elsewhere: Any) -> None:
    artifact = elsewhere.export()
    assert obstacle_of("elsewhere") == "no such device here, expected one; bring one"
    assert session_of(artifact, RunOn()).runtime.name == "ort"
    assert api.verify(artifact.path)["parity"]["runtime"] == "ort"
    assert api.predict(artifact.path, [PHOTO])["runtime"] == "ort"


def test_nothing_is_timed_in_the_place_of_the_device(elsewhere: Any) -> None:
    artifact = elsewhere.export()
    with pytest.raises(RuntimeFailure) as caught:
        api.benchmark([artifact], duration_s=0.01, loads=1)
    assert str(caught.value) == (
        f"{artifact.path}: no such device here, expected one; bring one; it is timed on its device, or name what to "
        "time here with --runtime"
    )
    with pytest.raises(UsageError, match="runtime typed_ort computes what a device would compute"):
        api.benchmark([artifact], duration_s=0.01, loads=1, runtime="typed_ort")
    named = api.benchmark([artifact], duration_s=0.01, loads=1, runtime="ort", threads=1)
    assert named["results"][0]["name"] == f"{artifact.name} on ort"


def test_a_runtime_that_takes_other_files_is_refused_with_those_that_do(elsewhere: Any) -> None:
    artifact = elsewhere.export()
    with pytest.raises(UnknownNameError, match=r"unknown runtime for model\.onnx 'trt'.*Known: .*ort, ov"):
        session_of(artifact, RunOn("trt"))


def test_an_option_that_the_runtime_does_not_have_is_refused(tiny: Any) -> None:
    artifact = tiny.export()
    with pytest.raises(UnknownNameError, match="unknown option of runtime ov 'divice'; did you mean 'device'"):
        session_of(artifact, RunOn("ov", options={"divice": "GPU"}))
    with pytest.raises(UsageError, match="unknown option of runtime ort 'device'"):
        session_of(artifact, RunOn("ort", options={"device": "GPU"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", ""), "option gpu=: expected at least one value"),
        (("--gpu", "sm89", "--option", "gpu=sm86"), "--option gpu: given 2 times"),
        (("--gpu", "sm12"), "unknown GPU"),
        (("--option", "oldest=8.4"), "option oldest=8.4: expected 8.5 or 8.6 or 10.0"),
    ],
)
def test_a_gpu_or_version_that_makes_no_sense_is_refused_at_once(
    cli: Any, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    told = cli("export", "mobileformer_26m", "--to", "tensorrt", *words, "--out", tmp_path / "out")
    assert told.code == 2 and message.lower() in told.message.lower()
    assert not (tmp_path / "out").exists()


def test_a_manifest_keeps_no_absolute_path_of_the_command(cli: Any, tiny: Any, tmp_path: Path) -> None:
    weights = tiny.checkpoint(tmp_path / "w.pth")
    told = cli("export", "tiny", "--to", "onnx", "--weights", weights, "--out", tiny.out, "--num-classes", "10")
    assert told.code == 0, told.err
    manifest = json.loads((tiny.out / "tiny-onnx-fp32" / MANIFEST).read_text())
    assert manifest["command"] == "edgevit export tiny --to onnx --weights w.pth --out out --num-classes 10"
    assert str(tmp_path) not in json.dumps(manifest)


# ---- several sizes


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In float16 for TensorRT at two sizes, which share a weight file."""
    out = tmp_path_factory.mktemp("two")
    return api.export_model(SMALL, "tensorrt", precision="fp16", image_size=[(64, 64), (96, 64)], out=out)


def test_float16_that_the_processor_computes_in_float32_is_refused(two_sizes: Any) -> None:
    for verb in (
        lambda: api.profile(two_sizes.path, runtime="ort", threads=1, runs=1),
        lambda: api.benchmark([two_sizes], runtime="ort", threads=1, duration_s=0.01, loads=1),
    ):
        with pytest.raises(RuntimeFailure, match=r"products ran .* in fp32.*asked for fp16"):
            verb()


def test_several_sizes_are_profiled_one_by_one(tmp_path: Path) -> None:
    artifact = api.export_model(SMALL, "onnx", image_size=[(64, 64), (96, 64)], out=tmp_path)
    for size in artifact.image_sizes:
        document = api.profile(artifact.path, image_size=size, threads=1, runs=1)
        assert document["coverage"] == pytest.approx(1.0)
        assert [share["precision"] for share in document["by_precision"] if share["macs"]] == ["fp32"]


# ---- pixels


def test_pixels_are_those_that_a_normalised_picture_was_made_from(tiny: Any) -> None:
    spec = tiny.family.CARDS["tiny"].image
    pixels = np.arange(3 * 64 * 64).reshape(1, 3, 64, 64) % 256
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (spec.mean, spec.std))
    normalised = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    assert np.array_equal(inputs.as_values(normalised, spec, "pixels"), pixels)
    assert inputs.as_values(normalised, spec, "normalised") is normalised
    assert np.array_equal(as_fed(tiny.export(), normalised), normalised)


# ---- lint


def test_an_export_that_its_target_would_refuse_is_no_export(tiny: Any) -> None:
    def spoil(model: Any) -> None:
        model.graph.node[1].op_type = "Hardmax"

    tiny.exporter.profiles = ("tensorrt-8.5",)
    tiny.exporter.change = spoil
    with pytest.raises(ExportError, match=r"lint for tensorrt-8\.5: .*Hardmax.*nothing is left"):
        tiny.export()
    assert tiny.left() == []
