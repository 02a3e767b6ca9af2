"""INT8 of the trained networks in every target's arithmetic: what became int8, and what that costs in accuracy.

`make bench-int8` has the figures on 2,000 pictures; these hold a part of them, so that a recipe that breaks is noticed.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import api, registry
from edgevit.api import Pictures
from edgevit.artifact import Artifact
from edgevit.errors import ParityError

CALIBRATED = Pictures("reference-task", 128)
TESTED = 96  # pictures: what a broken recipe costs is tens of points
AGREE = 0.93  # of predictions at least: six of 96 may differ; 97.4 % and more were seen on 2,000 pictures
NETWORKS = ("mobileformer_tiny", "crossformer_tiny", "vit_lsla_tiny", "swin_tiny", "vit_reference_tiny")
# What runs always: one with convolutions and one without, in what the device's own runtime computes here.
TWO = ("mobileformer_tiny", "swin_tiny")
EMULATED = ("tensorrt", "coreml")
FAST = {(network, target) for network in TWO for target in registry.TARGETS if target not in EMULATED}

# Products by kind: quantised, left in float.
PLACEMENT: dict[tuple[str, str], tuple[dict[str, int], int]] = {
    ("mobileformer_tiny", "onnx"): ({"Conv": 9, "Gemm": 11}, 70),
    ("mobileformer_tiny", "openvino"): ({"Conv": 11, "Gemm": 27}, 52),
    ("mobileformer_tiny", "tensorrt"): ({"Conv": 17, "Add": 4}, 66),
    ("mobileformer_tiny", "coreml"): ({"conv": 19, "linear": 1}, 63),
    ("crossformer_tiny", "onnx"): ({"Conv": 5, "Gemm": 20}, 21),
    ("crossformer_tiny", "openvino"): ({"Conv": 10, "Gemm": 31, "MatMul": 5}, 5),
    ("crossformer_tiny", "tensorrt"): ({"Gemm": 30, "Conv": 6}, 15),
    ("crossformer_tiny", "coreml"): ({"conv": 10, "linear": 31}, 10),
    ("vit_lsla_tiny", "onnx"): ({"Conv": 4, "Gemm": 12}, 20),
    ("vit_lsla_tiny", "openvino"): ({"Conv": 5, "Gemm": 21, "MatMul": 10}, 0),
    ("vit_lsla_tiny", "tensorrt"): ({"Conv": 4, "Gemm": 20}, 12),
    ("vit_lsla_tiny", "coreml"): ({"conv": 5, "linear": 21}, 10),
    ("swin_tiny", "onnx"): ({"Gemm": 22}, 18),
    ("swin_tiny", "openvino"): ({"Conv": 1, "Gemm": 34, "MatMul": 5}, 5),
    ("swin_tiny", "tensorrt"): ({"Gemm": 33}, 12),
    ("swin_tiny", "coreml"): ({"conv": 1, "linear": 34}, 10),
    ("vit_reference_tiny", "onnx"): ({"Gemm": 24}, 6),
    ("vit_reference_tiny", "openvino"): ({"Conv": 1, "Gemm": 25, "MatMul": 3}, 4),
    ("vit_reference_tiny", "tensorrt"): ({"Gemm": 20}, 14),
    ("vit_reference_tiny", "coreml"): ({"conv": 1, "linear": 25}, 8),
}


def exported(network: str, target: str, out: Path) -> Artifact:
    return api.export_model(network, target, precision="int8", calibration=CALIBRATED, out=out)


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported("swin_tiny", "onnx", tmp_path_factory.mktemp("swin"))


@pytest.mark.parametrize(
    ("network", "target"),
    [
        case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
        for case in product(NETWORKS, registry.TARGETS)
    ],
)
def test_a_trained_network_stays_what_it_is(
    network: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made = (network, target) == ("swin_tiny", "onnx")
    artifact = request.getfixturevalue("swin") if made else exported(network, target, tmp_path)
    choices = artifact.manifest["choices"]
    assert (choices["quantized"], len(choices["kept_float"])) == PLACEMENT[network, target]
    assert all(entry["why"] for entry in choices["kept_float"])
    if target in EMULATED and network not in TWO:
        return  # its parity on the photographs is checked by the export; an emulation of 96 pictures takes a minute
    found = api.evaluate(artifact.path, "reference-task", against="reference", limit=TESTED)
    assert found["random_weights"] is False and found["data"]["pictures"] == TESTED
    assert found["against"]["drop_points"]["low"] <= 0.5  # the interval does not exclude the half point that is asked
    assert found["against"]["agreement"]["value"] >= AGREE


@pytest.mark.parametrize("network", ["swin_tiny", pytest.param("mobileformer_tiny", marks=pytest.mark.slow)])
def test_enlarged_channels_cost_no_more(network: str, tmp_path: Path) -> None:
    """The same function with a few channels 8 to 64 times as large: what breaks ranges of whole tensors."""
    asked: dict[str, Any] = {"precision": "int8", "weights": "reference-task-stress", "calibration": CALIBRATED}
    artifact = api.export_model(network, "onnx", out=tmp_path, **asked)
    found = api.evaluate(artifact.path, "reference-task", against="reference", limit=TESTED)["against"]
    assert found["drop_points"]["low"] <= 1.0 and found["agreement"]["value"] >= AGREE
    with pytest.raises(ParityError, match="not equal to the reference"):  # as they are, their ranges are destroyed
        api.export_model(network, "onnx", out=tmp_path / "plain", options={"equalize": False}, **asked)


def test_a_calibrated_export_is_the_same_each_time(swin: Artifact, tmp_path: Path) -> None:
    made = [swin, exported("swin_tiny", "onnx", tmp_path)]
    first, second = ({f["name"]: f["sha256"] for f in artifact.manifest["files"]} for artifact in made)
    assert first == second
    assert made[0].manifest["calibration"]["sha256"] == made[1].manifest["calibration"]["sha256"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((130, 3, 224, 224), np.nan, np.float32), "NaN or infinity in row 0"),
        (np.zeros((130, 3, 64, 64), np.float32), "pictures of 64x64, expected 224x224"),
        (np.zeros((130, 224, 224), np.float32), "shape (130, 224, 224), expected one float32 array"),
        (np.zeros((2, 3, 224, 224), np.float32), "1 different pictures among 2 for the calibration, expected 128"),
    ],
)
def test_calibration_that_makes_no_sense_ends_in_one_line(
    cli: Any, tmp_path: Path, array: np.ndarray[Any, Any], message: str
) -> None:
    np.savez_compressed(tmp_path / "c.npz", images=array)
    words = ("--to", "onnx", "--precision", "int8", "--calibration", tmp_path / "c.npz", "--out", tmp_path / "out")
    told = cli("export", "swin_tiny", *words)
    assert told.code == 1 and message in told.message and "Traceback" not in told.err
    assert not (tmp_path / "out").exists()
