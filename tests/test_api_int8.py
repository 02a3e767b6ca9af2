"""int8 as the api sees it: what is asked of the pictures, the blocks that go back to float, the study of blocks.

The exporter is a stand-in that spoils the weights of each quantised block by a known amount.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevit import api, registry
from edgevit.api import Pictures
from edgevit.api.quantizing import block_of, loss, patterns_of
from edgevit.errors import ExportError, UnknownNameError, UsageError
from edgevit.export.quantize import Recipe
from edgevit.manifest import MANIFEST

INT8: dict[str, Any] = {"precision": "int8"}
BLOCKS = {"stem": "stem", "head": "head"}


@dataclass(frozen=True)
class TinyRecipe(Recipe):
    """What the stand-in takes beside."""

    weights_only: bool = False

    @property
    def calibrated(self) -> bool:
        return not self.weights_only


@pytest.fixture
def int8(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny exporter in int8: `int8.spoiled[block]` is what quantising a block does to its weights."""
    from edgevit.runtimes.ort import OrtRuntime

    class StandIn(OrtRuntime):
        """Takes the spoilt float graph for int8."""

        name = "standin"
        effective_precision = property(lambda self: self.asked_precision)  # type: ignore[assignment]  # read only either way

    exporter = tiny.exporter
    tiny.family.StandIn, exporter.runtime, exporter.checker = StandIn, "standin", "standin"
    monkeypatch.setitem(registry.RUNTIMES, "standin", registry.Row("tiny_family", "StandIn", loads=(".onnx",)))
    one = exporter.export_one
    exporter.spoiled = {"stem": 0.0, "head": 0.0}
    exporter.precisions, exporter.RECIPE, exporter.calibrations = ("fp32", "int8"), TinyRecipe, []

    def export(model: Any, card: Any, specs: Any, directory: Path, calibration: Any = None) -> Any:  # noqa: ARG001  # the contract's signature
        exporter.calibrations.append(calibration)
        return tuple(quantised(model, spec, len(specs) == 1, directory) for spec in specs)

    def quantised(model: Any, spec: Any, alone: bool, directory: Path) -> Any:
        from onnx import numpy_helper

        def spoil(proto: Any) -> None:
            proto.graph.node[0].name, proto.graph.node[-1].name = "stem/conv", "head/gemm"
            for tensor in proto.graph.initializer:
                block = tensor.name.split(".")[0]
                if spec.recipe and spec.recipe.quantizes(f"{block}/x"):
                    noise = np.random.default_rng(0).standard_normal(list(tensor.dims))
                    spoilt = numpy_helper.to_array(tensor) + exporter.spoiled[block] * noise
                    tensor.CopyFrom(numpy_helper.from_array(spoilt.astype(np.float32), tensor.name))

        exporter.change = spoil
        built = one(model, spec, alone, directory)
        kept = [f"{block}/x" for block in BLOCKS if spec.recipe and not spec.recipe.quantizes(f"{block}/x")]
        choices = {"quantized": {"Gemm": 2 - len(kept)}, "kept_float": [{"node": n, "why": "asked"} for n in kept]}
        return replace(built, choices={**built.choices, **choices})

    monkeypatch.setattr(exporter, "export", export)
    return tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of three pictures each."""
    random = np.random.default_rng(1)
    for index in range(30):
        place = tmp_path / "pictures" / f"class{index % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return tmp_path / "pictures"


def few(folder: Path) -> Pictures:
    """24 of its pictures."""
    return Pictures(folder, 24, allow_few=True)


def test_int8_needs_pictures_and_says_how_to_give_them(int8: Any) -> None:
    with pytest.raises(UsageError) as caught:
        int8.export(precision="int8")
    assert str(caught.value) == (
        "int8 for onnx: no pictures to measure ranges on, expected some like those that the model will see; "
        "add --calibration DIR, FILE.npz or reference-task"
    )
    assert int8.left() == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"calibration": "x"}, "calibration with precision fp32: it is for int8; add --precision int8"),
        ({"max_drop": 0.5}, "max drop with precision fp32: it is for int8; add --precision int8"),
        ({"calibration": Pictures(allow_few=True)}, "allow few with precision fp32: it is for int8; add"),
        ({"precision": "int8", "calibration": "x", "max_drop": -1}, "max drop -1: expected 0 to 100 points, e.g. 0.5"),
        ({"precision": "int8", "calibration": "x", "max_drop": float("nan")}, "max drop nan: expected 0 to 100 points"),
        ({"precision": "int8", "calibration": Pictures("x", 0)}, "calibration pictures 0: expected 1"),
        (
            {"precision": "int8", "calibration": "x", "options": {"weights_only": True}},
            "calibration with weights alone in int8 for onnx: no range is measured; leave it out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    int8: Any, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message[:40]) as caught:
        int8.export(**request_)
    assert str(caught.value).startswith(message)
    assert int8.left() == []


def test_a_recipes_options_are_known_in_int8_alone(int8: Any, folder: Path) -> None:
    artifact = int8.export(calibration=few(folder), options={"calibrator": "mse", "keep_float": "head/*"}, **INT8)
    assert artifact.manifest["recipe"]["calibrator"] == "mse"
    assert artifact.manifest["recipe"]["keep_float"] == ["head/*"]
    with pytest.raises(UnknownNameError, match="unknown option of tiny 'calibrator'"):
        int8.export(options={"calibrator": "mse"})
    with pytest.raises(UnknownNameError, match="unknown option of tiny or onnx in int8 'calibrater'; did you mean"):
        int8.export(calibration=few(folder), options={"calibrater": "mse"}, **INT8)
    with pytest.raises(UsageError, match="option calibrator=median: expected minmax or percentile"):
        int8.export(calibration=few(folder), options={"calibrator": "median"}, **INT8)


def test_weights_alone_need_no_pictures(int8: Any) -> None:
    artifact = int8.export(precision="int8", options={"weights_only": True})
    assert artifact.manifest["calibration"] is None and int8.exporter.calibrations == [None]


def test_the_manifest_says_what_was_calibrated_on(int8: Any, folder: Path) -> None:
    artifact = int8.export(calibration=few(folder), **INT8)
    record = json.loads((artifact.path / MANIFEST).read_text())["calibration"]
    assert len(record["pictures"]) == 24 and record["source"] == "pictures"
    assert str(folder) not in json.dumps(artifact.manifest)
    assert any("24 pictures are few" in note for note in artifact.manifest["notes"])
    images = int8.exporter.calibrations[0].images
    assert {size: array.shape for size, array in images.items()} == {(64, 64): (24, 3, 64, 64)}


# ---- within a drop


def test_the_block_that_hurts_goes_back_to_float_and_the_export_says_which(int8: Any, folder: Path) -> None:
    int8.exporter.spoiled = {"stem": 1e-6, "head": 3.0}
    artifact = int8.export(calibration=few(folder), max_drop=0.0, num_classes=11, **INT8)  # no labels: agreement counts
    told = artifact.manifest["calibration"]["max_drop"]
    assert told["raised_to_float"] == ["head"] and told["drop_after"] <= 0.0
    assert artifact.manifest["recipe"]["keep_float"] == ["head.*", "head/*"]
    assert artifact.manifest["choices"]["kept_float"] == [{"node": "head/x", "why": "asked"}]
    assert any("went back to float: head" in note for note in artifact.manifest["notes"])


def test_nothing_goes_back_where_nothing_is_lost(int8: Any, folder: Path) -> None:
    artifact = int8.export(calibration=few(folder), max_drop=0.5, **INT8)
    told = artifact.manifest["calibration"]["max_drop"]
    assert told["raised_to_float"] == [] and told["drop_before"] == told["drop_after"] == 0.0
    assert artifact.manifest["recipe"]["keep_float"] == []
    assert any("no block had to go back to float" in note for note in artifact.manifest["notes"])


def test_what_float_blocks_cannot_mend_is_an_error_and_leaves_nothing(
    int8: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8.exporter.spoiled = {"stem": 0.0, "head": 3.0}
    monkeypatch.setattr(TinyRecipe, "quantizes", lambda self, node: True)  # a recipe that does not listen
    with pytest.raises(ExportError, match="with all blocks but one in float it still is more; allow"):
        int8.export(calibration=few(folder), max_drop=0.0, num_classes=11, **INT8)
    assert int8.left() == []


def test_without_labels_the_drop_is_disagreement_with_float32(int8: Any, folder: Path) -> None:
    artifact = int8.export(calibration=Pictures(folder / "class0", 3, allow_few=True), max_drop=0.5, **INT8)
    assert artifact.manifest["calibration"]["max_drop"]["measure"] == "agreement with float32"
    artifact = int8.export(calibration=few(folder), max_drop=0.5, force=True, **INT8)
    assert artifact.manifest["calibration"]["max_drop"]["measure"] == "top-1"
    artifact = int8.export(calibration=few(folder), max_drop=0.5, force=True, num_classes=11, **INT8)
    assert artifact.manifest["calibration"]["max_drop"]["measure"] == "agreement with float32"


def test_features_have_no_accuracy_to_lose(int8: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="features have no classes to lose"):
        int8.export(calibration=few(folder), max_drop=0.5, features_only=True, **INT8)


# ---- sensitivity


def test_sensitivity_tells_each_block_alone_and_all_but_it(int8: Any, folder: Path) -> None:
    int8.exporter.spoiled = {"stem": 1e-3, "head": 1.0}
    document = api.sensitivity("tiny", calibration=few(folder), num_classes=10)
    stem, head = document["blocks"]
    assert (stem["block"], head["block"]) == ("stem", "head")
    assert head["one_in"]["sqnr_db"] < 20 < stem["one_in"]["sqnr_db"]
    assert stem["one_out"]["sqnr_db"] == pytest.approx(head["one_in"]["sqnr_db"])
    assert document["all_int8"]["sqnr_db"] == pytest.approx(head["one_in"]["sqnr_db"], abs=0.5)
    assert document["pictures"] == 24 and document["random_weights"] is True
    json.dumps(document, allow_nan=False)


def test_sensitivity_needs_pictures_and_int8(int8: Any) -> None:
    with pytest.raises(UsageError, match="no pictures to measure ranges on"):
        api.sensitivity("tiny")
    int8.exporter.precisions = ("fp32",)
    with pytest.raises(UnknownNameError, match="unknown precision for onnx 'int8'"):
        api.sensitivity("tiny", calibration="x")


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("layers.0.blocks.steps.1.attn.q/linear", "layers.0.blocks.steps.1"),
        ("layers.0.blocks.steps.1.attn/matmul", "layers.0.blocks.steps.1"),
        ("layers.0.downsample.reductions.1/conv2d_5", "layers.0.downsample"),
        ("blocks.11.former.q/linear", "blocks.11"),
        ("blocks.steps.3.mlp.fc1/linear_22", "blocks.steps.3"),
        ("stem.0/conv2d", "stem"),
        ("head/linear", "head"),
        ("node_matmul_7", ""),
    ],
)
def test_a_nodes_block_is_read_from_its_name(node: str, block: str) -> None:
    assert block_of(node) == block
    recipe = Recipe(only=patterns_of(block))
    assert recipe.quantizes(node) or not block
    assert not recipe.quantizes("blocks.1.former.q/linear")


def test_a_loss_is_exact_where_nothing_changed_and_in_points_of_accuracy() -> None:
    expected = np.eye(4, dtype=np.float32)
    assert loss(expected, expected, None).sqnr_db == float("inf")
    worse = expected[[0, 1, 2, 2]]
    assert loss(expected, worse, np.arange(4)).drop == 25.0
    assert loss(expected, worse, np.array([0, 1, 2, 2])).drop == -25.0  # what was wrong came right
    assert loss(expected, worse, None).drop == 25.0
    assert loss(expected, worse, None).agreement == 75.0
