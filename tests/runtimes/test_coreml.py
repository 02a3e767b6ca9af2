"""The Core ML runtime against a stand-in for Core ML: nothing here shows that it runs on a Mac."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session, coreml
from edgevit.runtimes.coreml import CoremlRuntime, CoremlRuntimeOptions

import coremltools as ct  # isort: skip  # after the runtime, which silences what its import says
from coremltools.converters.mil import Builder as mb  # noqa: N813  # isort: skip  # the name in Apple's own examples

LABELS = ["cat", "dog", "tench"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A network on arrays, and a classifier of pictures."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def save(name: str, shape: Any, body: Any, **arguments: Any) -> None:
        program = mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS17)(body)
        made[name] = folder / f"{name}.mlpackage"
        given = {"compute_precision": ct.precision.FLOAT32, "minimum_deployment_target": ct.target.iOS17, **arguments}
        ct.convert(program, convert_to="mlprogram", skip_model_load=True, **given).save(str(made[name]))

    def classified(image: Any) -> Any:
        logits = mb.reduce_mean(x=image, axes=[2, 3], keep_dims=False, name="logits")
        return logits, mb.softmax(x=logits, name="probabilities")

    save("array", (1, 4), lambda image: mb.linear(x=image, weight=np.eye(4, dtype=np.float32), name="logits"))
    save(
        "picture", (1, 3, 2, 2), classified, inputs=[ct.ImageType("image", (1, 3, 2, 2), scale=1 / 255)],
        classifier_config=ct.ClassifierConfig(LABELS, predicted_probabilities_output="probabilities"),
        outputs=[ct.TensorType("logits"), ct.TensorType("probabilities")],
    )  # fmt: skip
    return made


class Model:
    """What coremltools' MLModel is asked for."""

    made: list[Model] = []  # noqa: RUF012  # emptied by the fixture
    answer: dict[str, Any] = {}  # noqa: RUF012  # set by each test

    def __init__(self, path: str, compute_units: Any) -> None:
        self.path, self.units, self.fed = path, compute_units, list[dict[str, Any]]()
        Model.made.append(self)

    def predict(self, feed: dict[str, Any]) -> dict[str, Any]:
        self.fed.append(feed)
        return self.answer

    def get_compiled_model_path(self) -> str:
        return "/compiled.mlmodelc"


class MLNeuralEngineComputeDevice:
    """Named as Core ML names it."""


class MLCPUComputeDevice:
    """Named as Core ML names it."""


class Plan:
    """What coremltools' MLComputePlan is asked for: a constant, and two operators on two devices."""

    rows = (
        ("const", None, None),
        ("ios17.linear", MLNeuralEngineComputeDevice(), 0.75),
        ("cast", MLCPUComputeDevice(), 0.25),
    )

    @classmethod
    def load_from_path(cls, path: str, compute_units: Any) -> Plan:
        assert path == "/compiled.mlmodelc"
        assert compute_units is Model.made[-1].units
        return cls()

    @property
    def model_structure(self) -> Any:
        names = ["weight", "logits", "cast_0"]
        operations = [
            SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)], row=i)
            for i, (name, (kind, _, _)) in enumerate(zip(names, self.rows, strict=True))
        ]
        block = SimpleNamespace(operations=operations)
        return SimpleNamespace(program=SimpleNamespace(functions={"main": SimpleNamespace(block=block)}))

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        device = self.rows[operation.row][1]
        return None if device is None else SimpleNamespace(preferred_compute_device=device)

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        return SimpleNamespace(weight=self.rows[operation.row][2])


@pytest.fixture
def _mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coreml.ct.models.model, "_MLModelProxy", object())
    monkeypatch.setattr(coreml.ct.models, "MLModel", Model)
    monkeypatch.setattr(coreml, "MLComputePlan", Plan)
    Model.made.clear()


def test_elsewhere_it_says_that_it_needs_a_mac(monkeypatch: pytest.MonkeyPatch, packages: dict[str, Path]) -> None:
    monkeypatch.setattr(coreml.platform, "system", lambda: "Linux")
    assert "Core ML runs on macOS only, this is Linux: " in str(CoremlRuntime.obstacle())
    assert "mil_reference" not in str(CoremlRuntime.obstacle())  # bench would refuse it
    with pytest.raises(RuntimeFailure, match="copy the artifact to a Mac"):
        CoremlRuntime(packages["array"]).load()


def test_on_a_mac_without_the_native_part_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coreml.ct.models.model, "_MLModelProxy", None)
    assert "without its macOS part" in str(CoremlRuntime.obstacle())


@pytest.mark.usefixtures("_mac")
@pytest.mark.parametrize("units", ["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"])
def test_arrays_go_in_as_they_are_on_the_units_asked_for(packages: dict[str, Path], units: Any) -> None:
    runtime = CoremlRuntime(packages["array"], options=CoremlRuntimeOptions(units))
    Model.answer = {"logits": np.array([[1, 2, 3, 4]], np.float32)}
    with Session(runtime) as session:
        session.require_precision(packages["array"])
        x = np.arange(4, dtype=np.float32)[None]
        out = session.run({"image": x})
        assert Model.made[0].units is ct.ComputeUnit[units]
        assert Model.made[0].path == str(packages["array"])
        np.testing.assert_array_equal(Model.made[0].fed[0]["image"], x)
        np.testing.assert_array_equal(out["logits"], Model.answer["logits"])
        assert out["logits"] is not Model.answer["logits"]
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime.run({"image": x})


@pytest.mark.usefixtures("_mac")
def test_pixels_go_in_as_a_picture_and_labels_come_out_in_their_order(packages: dict[str, Path]) -> None:
    runtime = CoremlRuntime(packages["picture"])
    runtime.load()
    assert runtime.inputs[0].values == "pixels"
    Model.answer = {
        "logits": np.zeros((1, 3), np.float32), "classLabel": "dog",
        "classLabel_probs": {"tench": 0.25, "dog": 0.5, "cat": 0.125},
    }  # fmt: skip
    pixels = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2) * 20 + 0.4
    out = runtime.run({"image": pixels})
    picture = Model.made[0].fed[0]["image"]
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.rint(pixels[0]).transpose(1, 2, 0))
    assert out["classLabel"].tolist() == ["dog"]
    np.testing.assert_array_equal(out["classLabel_probs"], np.array([[0.125, 0.5, 0.25]], np.float32))


@pytest.mark.usefixtures("_mac")
def test_the_compute_plan_gives_devices_and_shares(packages: dict[str, Path]) -> None:
    runtime = CoremlRuntime(packages["array"])
    Model.answer = {"logits": np.zeros((1, 4), np.float32)}
    runtime.load()
    assert runtime.describe()["devices"] == {"NeuralEngine": 1, "CPU": 1}
    rows = runtime.profile({"image": np.zeros((1, 4), np.float32)}, 5)
    assert [(row.name, row.kind, row.precision) for row in rows] == [
        ("logits on NeuralEngine", "linear", "fp32"), ("cast_0 on CPU", "cast", "none"),
    ]  # fmt: skip
    assert rows[0].time_ms == pytest.approx(3 * rows[1].time_ms)
    assert len(Model.made[0].fed) == 6  # one to prepare, five timed
    untimed = runtime.profile({"image": np.zeros((1, 4), np.float32)}, 0)
    assert [(row.name, row.time_ms) for row in untimed] == [(row.name, 0.0) for row in rows]
    assert len(Model.made[0].fed) == 6


@pytest.mark.usefixtures("_mac")
def test_what_core_ml_raises_becomes_one_line(packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **more: Any) -> Any:  # noqa: ARG001  # raises whatever it is given
        raise RuntimeError("Error compiling model\nsecond line")

    runtime = CoremlRuntime(packages["array"])
    runtime.load()
    monkeypatch.setattr(Model, "predict", broken)
    with pytest.raises(RuntimeFailure, match=r"Core ML failed: Error compiling model$"):
        runtime.run({"image": np.zeros((1, 4), np.float32)})
    monkeypatch.setattr(coreml, "MLComputePlan", SimpleNamespace(load_from_path=broken))
    with pytest.raises(RuntimeFailure, match=r"no compute plan: .*; it needs macOS 14.4 or later"):
        runtime.describe()
    monkeypatch.setattr(coreml.ct.models, "MLModel", broken)
    refused = CoremlRuntime(packages["array"])
    with pytest.raises(RuntimeFailure, match=r"Core ML cannot load it: Error compiling model$"):
        refused.load()
    with pytest.raises(RuntimeFailure, match="the Core ML model is not loaded"):
        refused.run({"image": np.zeros((1, 4), np.float32)})
