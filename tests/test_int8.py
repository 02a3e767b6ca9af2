"""INT8 of the trained networks in every target's arithmetic: what became int8, and what that costs in accuracy.

`make bench-int8` has the figures on 2,000 pictures; these hold a part of them, so that a recipe that breaks is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import api, registry
from edgevit.api import Pictures

CALIBRATED = Pictures("reference-task", 128)
TESTED = 192  # pictures: one of them is half a point
AGREE = 0.95  # of predictions at least; 97.4 % and more were seen on 2,000 pictures
NETWORKS = ("mobileformer_tiny", "crossformer_tiny", "vit_lsla_tiny", "swin_tiny", "vit_reference_tiny")
FAST = ("onnx", "openvino")  # what the device's own runtime computes here; the other two are emulated, and slow

# Products by kind: quantised, left in float.
PLACEMENT: dict[tuple[str, str], tuple[dict[str, int], int]] = {}


@pytest.mark.parametrize("target", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in registry.TARGETS])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_trained_network_stays_what_it_is(network: str, target: str, tmp_path: Path) -> None:
    artifact = api.export_model(network, target, precision="int8", calibration=CALIBRATED, out=tmp_path)
    choices = artifact.manifest["choices"]
    assert (choices["quantized"], len(choices["kept_float"])) == PLACEMENT[network, target]
    assert all(entry["why"] for entry in choices["kept_float"])
    found = api.evaluate(artifact.path, "reference-task", against="reference", limit=TESTED)
    assert found["random_weights"] is False and found["data"]["pictures"] == TESTED
    assert found["against"]["drop_points"]["low"] <= 0.5  # the interval does not exclude the half point that is asked
    assert found["against"]["agreement"]["value"] >= AGREE


@pytest.mark.parametrize("network", ["swin_tiny", "mobileformer_tiny"])
def test_enlarged_channels_cost_no_more(network: str, tmp_path: Path) -> None:
    """The same function with a few channels 8 to 64 times as large: what breaks ranges of whole tensors."""
    found = {}
    for equalize in (True, False):
        artifact = api.export_model(
            network, "onnx", precision="int8", weights="reference-task-stress", calibration=CALIBRATED,
            options={"equalize": equalize}, out=tmp_path, force=True,
        )  # fmt: skip
        found[equalize] = api.evaluate(artifact.path, "reference-task", against="reference", limit=TESTED)["against"]
    assert found[True]["drop_points"]["low"] <= 1.0 and found[True]["agreement"]["value"] >= AGREE
    assert found[True]["sqnr_db"] > found[False]["sqnr_db"]  # without, the ranges are destroyed


def test_a_calibrated_export_is_the_same_each_time(tmp_path: Path) -> None:
    made = [
        api.export_model("swin_tiny", "onnx", precision="int8", calibration=CALIBRATED, out=tmp_path / str(i))
        for i in range(2)
    ]
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
