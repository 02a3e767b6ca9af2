"""`api.benchmark` beside its races: what a result says, peers of any origin, sweeps that go on where they stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit import api
from edgevit.api import benching, describing, explaining, peering
from edgevit.artifact import load_artifact, write_manifest
from edgevit.bench.sweep import read
from edgevit.errors import ArtifactError, EdgevitError, RuntimeFailure, UnknownNameError, UsageError
from edgevit.manifest import MANIFEST

NAME = "tiny-onnx-fp32"
QUICK: dict[str, Any] = {"duration_s": 0.02, "loads": 1, "threads": 1, "roofline": False}
SWEPT: dict[str, Any] = {"duration_s": 0.02, "loads": 1, "roofline": False}


def cells_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in cell["cell"].items() if v is not None and k != "items"} for cell in document["cells"]]


# ---- what a result says


def test_a_result_says_what_was_run_and_what_it_costs(tiny: Any) -> None:
    artifact = tiny.export(image_size=(32, 64), batch=2)
    (result,) = api.benchmark([artifact], **QUICK)["results"]
    assert (result["kind"], result["model"], result["target"], result["precision"]) == ("own", "tiny", "onnx", "fp32")
    assert (result["threads"], result["batch"], result["image_size"]) == (1, 2, [32, 64])
    assert result["runtime"]["runtime"] == "onnxruntime" and result["runtime"]["version"]
    assert result["attestation"]["as_asked"] is True
    assert result["size_bytes"] == artifact.model_file.stat().st_size
    cost, counted = result["complexity"], artifact.manifest["complexity"]
    assert {key: cost[key] for key in describing.COUNTS} == {key: counted[key] for key in describing.COUNTS}
    moved = counted["weight_bytes"] + counted["activation_bytes"]
    assert cost["arithmetic_intensity"] == pytest.approx(counted["flops"] / moved)
    assert cost["not_counted"] == counted["not_counted"] and cost["unknown"] == {}
    json.dumps(result, allow_nan=False)


def test_a_dynamic_batch_costs_as_many_times_as_it_has_pictures(tiny: Any) -> None:
    artifact = tiny.export(batch="dynamic")
    one, eight = (cell["results"][0] for cell in api.benchmark([artifact], sweep={"batch": (1, 8)}, **QUICK)["cells"])
    assert (one["batch"], eight["batch"]) == (1, 8)
    assert eight["complexity"]["macs"] == 8 * one["complexity"]["macs"] > 0
    assert eight["complexity"]["activation_bytes"] == 8 * one["complexity"]["activation_bytes"]
    assert eight["complexity"]["weight_bytes"] == one["complexity"]["weight_bytes"]
    assert eight["complexity"]["arithmetic_intensity"] > one["complexity"]["arithmetic_intensity"]
    for kind, elements in one["complexity"]["not_counted"].items():
        assert eight["complexity"]["not_counted"][kind] == 8 * elements


@pytest.mark.parametrize(
    "counted",
    [None, {}, {"macs": "many"}, {"macs": -1}, {"macs": True}, {"macs": 10**40}, [1], {"macs_by_op": {"Conv": None}}],
)
def test_a_manifest_with_no_such_count_has_none_and_no_traceback(tiny: Any, counted: Any) -> None:
    path = tiny.export().path
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).unlink()
    whole = manifest["complexity"]
    manifest["complexity"] = {**whole, **counted} if isinstance(counted, dict) and counted else counted
    write_manifest(path, manifest)
    (result,) = api.benchmark([path], **QUICK)["results"]
    assert result["complexity"] is None


def test_the_file_of_the_weights_counts_to_the_size(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(b"x" * 10)
    (tmp_path / "model.bin").write_bytes(b"x" * 20)
    (tmp_path / "model.mlpackage" / "Data").mkdir(parents=True)
    (tmp_path / "model.mlpackage" / "Data" / "weight.bin").write_bytes(b"x" * 30)
    sizes = [
        sum(file.stat().st_size for file in describing.model_files(tmp_path / name))
        for name in ("model.xml", "model.mlpackage")
    ]
    assert sizes == [30, 30]


def test_a_percentile_that_is_wanted_is_there(tiny: Any) -> None:
    document = api.benchmark([tiny.export()], **QUICK, percentile=99)
    (result,) = document["results"]
    assert len(result["samples_ms"]) >= 662
    assert result["latency_ms"]["p99"] is not None
    assert document["settings"]["wanted"] == 99
    other = api.benchmark([tiny.export(out=tiny.out / "b")], **QUICK, percentile=75.0)
    assert set(other["results"][0]["latency_ms"]) == {"p50", "p75", "p90", "p99"}


@pytest.mark.parametrize("percentile", [0, 100, -1, float("nan")])
def test_a_percentile_that_is_none_is_refused(tiny: Any, percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        api.benchmark([tiny.export()], **QUICK, percentile=percentile)


# ---- beside the latency


def test_what_is_measured_beside_stands_with_each_result_of_ours(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        benching,
        "throughput_of",
        lambda a, on, *rest, **more: asked.append((a.name, on.threads, more)) or {"levels": []},
    )
    monkeypatch.setattr(benching, "cold_start_of", lambda *_, **more: {"cold_start": {"starts": 11}, "memory": {}})
    artifact = tiny.export(batch="dynamic")
    document = api.benchmark([artifact], **QUICK, vs="naive", throughput=True, cold_start=True)
    naive, own = document["results"]
    assert "throughput" not in naive and "cold_start" not in naive
    assert (own["throughput"], own["cold_start"]) == ({"levels": []}, {"starts": 11})
    assert asked == [(NAME, 1, {"batch": 1})]


def test_each_result_says_its_share_of_the_limit(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describing, "PEAKS", {})
    measured = []
    real = describing.measure_peaks

    def counting(*arguments: Any, **more: Any) -> Any:
        measured.append(arguments)
        return real(*arguments, **more, budget_s=0.05)

    monkeypatch.setattr(describing, "measure_peaks", counting)
    document = api.benchmark([tiny.export()], **{**QUICK, "roofline": True}, vs="naive", explain=True)
    for result in document["results"]:
        roofline = result["roofline"]
        assert roofline["limit_ms"] > 0
        assert roofline["share"] > 0
        assert roofline["explanation"]
    assert measured[0] == ("ort", 1, list(explaining.PRECISIONS))  # what another one would bring is explained too
    assert len(measured) <= 2 * len(document["results"])  # each size of weights once, and once more above the limit
    json.dumps(document, allow_nan=False)


def test_a_share_above_the_limit_measures_the_peaks_once_more(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(describing, "_peaks", lambda *_, explained, again=False: calls.append((explained, again)))
    shares = iter([1.5, 0.8])
    monkeypatch.setattr(describing, "roof_of", lambda *_, **__: {"share": next(shares)})
    (result,) = api.benchmark([tiny.export()], **{**QUICK, "roofline": True})["results"]
    assert calls == [(False, False), (False, True)]
    assert result["roofline"] == {"share": 0.8}


def test_limits_that_cannot_be_measured_are_said_and_no_failure(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeFailure("no memory for the probes")

    monkeypatch.setattr(describing, "PEAKS", {})
    monkeypatch.setattr(describing, "measure_peaks", refuse)
    (result,) = api.benchmark([tiny.export()], **{**QUICK, "roofline": True})["results"]
    assert result["roofline"]["share"] is None
    assert result["roofline"]["warnings"] == ["no limit is known: no memory for the probes"]


# ---- peers


def saved(path: Path, change: Callable[[Any], None], source: Path) -> Path:
    """A copy of an ONNX file, changed: anyone's export of the same network."""
    import onnx

    model = onnx.load(source)
    change(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def renamed(model: Any) -> None:
    """Other names for the input and the output."""
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = {"image": "pixel_values"}.get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = {"logits": "scores"}.get(name, name)
    model.graph.input[0].name, model.graph.output[0].name = "pixel_values", "scores"


def test_anyones_export_of_the_same_network_is_the_baseline_and_computes_the_same(tiny: Any, tmp_path: Path) -> None:
    artifact = tiny.export()
    theirs = saved(tmp_path / "theirs.onnx", renamed, artifact.model_file)
    document = api.benchmark([artifact], **QUICK, vs=theirs)
    (comparison,), (peer,) = document["comparisons"], document["peers"]
    assert (comparison["baseline"], comparison["candidate"]) == ("theirs.onnx", NAME)
    assert (peer["item"], peer["peer"], peer["same"]) == (NAME, "theirs.onnx", True)
    assert peer["outputs"] == [{"ours": "logits", "theirs": "scores", "max_abs": 0.0, "relative_to_rms": 0.0}]
    result = document["results"][0]
    assert (result["kind"], result["model"], result["precision"]) == ("foreign", None, None)
    assert result["effective_precision"] == "fp32"
    assert result["complexity"]["macs"] == document["results"][1]["complexity"]["macs"]
    assert not [text for text in document["warnings"] if "compute the same" in text]
    assert document["request"]["vs"]["file"] == "theirs.onnx"
    json.dumps(document, allow_nan=False)


def test_a_peer_that_computes_something_else_is_a_warning(tiny: Any, tmp_path: Path) -> None:
    from onnx import numpy_helper

    def other(model: Any) -> None:
        bias = next(t for t in model.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(3), "head.bias"))

    artifact = tiny.export()
    document = api.benchmark([artifact], **QUICK, vs=saved(tmp_path / "theirs.onnx", other, artifact.model_file))
    (peer,) = document["peers"]
    assert peer["same"] is False
    assert peer["outputs"][0]["max_abs"] == pytest.approx(3, rel=1e-3)
    (warning,) = [text for text in document["warnings"] if "compute the same" in text]
    assert warning.startswith(f"{NAME} and theirs.onnx do not compute the same: logits differs by up to 3, ")
    assert warning.endswith("compare their MACs before their times.")


def test_a_peer_that_computes_no_numbers_is_a_warning_too(tiny: Any, tmp_path: Path) -> None:
    from onnx import numpy_helper

    def nan(model: Any) -> None:
        bias = next(t for t in model.graph.initializer if t.name == "head.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32("nan"), "head.bias"))

    artifact = tiny.export()
    document = api.benchmark([artifact], **QUICK, vs=saved(tmp_path / "theirs.onnx", nan, artifact.model_file))
    assert document["peers"][0]["outputs"][0]["max_abs"] is None
    assert "is not finite" in document["peers"][0]["why"]
    json.dumps(document, allow_nan=False)


def test_a_peer_with_other_outputs_is_compared_in_time_alone(tiny: Any, tmp_path: Path) -> None:
    artifact = tiny.export()
    features = tiny.export(features_only=True, out=tmp_path / "features", num_classes=None)
    document = api.benchmark([artifact], **QUICK, vs=features.model_file)
    (peer,) = document["peers"]
    assert (peer["same"], peer["why"]) == (False, "outputs of 1x10 against 1x4x64x64, 1x4x64x64")
    assert len(document["comparisons"]) == 1


def test_another_artifact_is_a_peer(tiny: Any, copied: Any) -> None:
    first = tiny.export().path
    document = api.benchmark([first], **QUICK, vs=copied(first, "other"))
    assert [(c["baseline"], c["candidate"]) for c in document["comparisons"]] == [("other", NAME)]
    assert document["peers"][0]["same"] is True
    assert [result["kind"] for result in document["results"]] == ["own", "own"]
    assert set(document["request"]["vs"]) == {"artifact", "sha256"}


def test_an_artifact_of_another_size_races_and_is_not_known_to_compute_the_same(tiny: Any, tmp_path: Path) -> None:
    first, other = tiny.export(), tiny.export(image_size=(32, 32), out=tmp_path / "small")
    document = api.benchmark([first], **QUICK, vs=other.path)
    assert document["peers"][0]["same"] is None
    assert any("not known to compute the same (each was fed its own sample" in text for text in document["warnings"])


def test_several_artifacts_race_the_peer_one_by_one(tiny: Any, copied: Any) -> None:
    first = tiny.export().path
    document = api.benchmark([first, copied(first, "second")], **QUICK, vs=load_artifact(first).model_file)
    assert [(c["baseline"], c["candidate"]) for c in document["comparisons"]] == [
        (f"model.onnx (beside {NAME})", NAME),
        ("model.onnx (beside second)", "second"),
    ]


def test_a_peer_with_a_dynamic_batch_takes_any(tiny: Any, tmp_path: Path) -> None:
    artifact = tiny.export(batch=2)
    dynamic = tiny.export(batch="dynamic", out=tmp_path / "dynamic")
    document = api.benchmark([artifact], **QUICK, vs=dynamic.model_file)
    peer, own = document["results"]
    assert peer["batch"] == own["batch"] == 2
    assert peer["complexity"]["macs"] == own["complexity"]["macs"]


def test_an_int8_artifact_s_peer_is_asked_for_float32(tiny: Any, tmp_path: Path) -> None:
    artifact = tiny.export()
    entry = peering.Entry("a", artifact, 1, "foreign", saved(tmp_path / "b.onnx", renamed, artifact.model_file))
    int8 = peering.Entry(
        "a", type(artifact)(artifact.path, {**artifact.manifest, "precision": "int8"}), 1, "foreign", entry.file
    )
    assert [each.session(peering.RunOn()).runtime.asked_precision for each in (entry, int8)] == ["fp32", "fp32"]


def wider(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 96


def halved(model: Any) -> None:
    """Takes float16, which it casts itself."""
    from onnx import TensorProto, helper

    model.graph.input[0].name, model.graph.input[0].type.tensor_type.elem_type = "raw", TensorProto.FLOAT16
    model.graph.node.insert(0, helper.make_node("Cast", ["raw"], ["image"], to=TensorProto.FLOAT))


def two_inputs(model: Any) -> None:
    from onnx import TensorProto, helper

    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (wider, "image float32 1x3x64x96"),
        (halved, "raw float16 1x3x64x64"),
        (two_inputs, "image float32 1x3x64x64; mask float32 1"),
    ],
)
def test_a_peer_that_takes_something_else_says_what(tiny: Any, tmp_path: Path, change: Any, there: str) -> None:
    artifact = tiny.export()
    theirs = saved(tmp_path / "theirs.onnx", change, artifact.model_file)
    with pytest.raises(UsageError, match=f"it takes {there}; expected one float32 input of 1x3x64x64") as caught:
        api.benchmark([artifact], **QUICK, vs=theirs)
    assert "\n" not in str(caught.value)


def outside(location: str) -> Callable[[Any], None]:
    """Weights in a file that lies elsewhere."""

    def change(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1  # external
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    return change


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "link.bin", "folder/x.bin", "\\\\host\\x"]
)
def test_weights_outside_of_its_directory_are_not_read(tiny: Any, tmp_path: Path, location: str) -> None:
    import onnx

    artifact = tiny.export()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 1000)
    place = tmp_path / "theirs"
    (place / "a").mkdir(parents=True)
    (place / "link.bin").symlink_to(tmp_path / "secret.bin")
    (place / "folder").symlink_to(tmp_path)
    model = onnx.load(artifact.model_file)
    outside(location)(model)
    (place / "theirs.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"outside of its directory; do not trust this file") as caught:
        api.benchmark([artifact], **QUICK, vs=place / "theirs.onnx")
    assert "\n" not in str(caught.value)


def test_weights_hidden_in_a_constant_are_found(tiny: Any, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(tiny.export().model_file)
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["c"], value=onnx.TensorProto())], "g", [], []
    )
    outside("../x.bin")(type("", (), {"graph": type("", (), {"initializer": [inner.node[0].attribute[0].t]})}))
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    (tmp_path / "theirs.onnx").write_bytes(model.SerializeToString())
    assert peering.external_files(tmp_path / "theirs.onnx") == ["../x.bin"]


def test_weights_beside_the_file_are_read_and_counted(tiny: Any, tmp_path: Path) -> None:
    import onnx

    artifact = tiny.export()
    onnx.save(
        onnx.load(artifact.model_file),
        tmp_path / "theirs.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    document = api.benchmark([artifact], **QUICK, vs=tmp_path / "theirs.onnx")
    files = [tmp_path / "theirs.onnx", tmp_path / "w.bin"]
    assert document["results"][0]["size_bytes"] == sum(file.stat().st_size for file in files)
    assert document["peers"][0]["same"] is True
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ArtifactError, match=r"it reads 'w.bin', which is not there"):
        api.benchmark([artifact], **QUICK, vs=tmp_path / "theirs.onnx")


def test_an_operator_that_nobody_has_is_one_line(tiny: Any, tmp_path: Path) -> None:
    def custom(model: Any) -> None:
        import onnx

        model.graph.node[0].domain = "com.example"
        model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))

    artifact = tiny.export()
    with pytest.raises(RuntimeFailure, match="ONNX Runtime cannot load it") as caught:
        api.benchmark([artifact], **QUICK, vs=saved(tmp_path / "theirs.onnx", custom, artifact.model_file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\x08", b"not a model" * 100, b"\0" * 5000])
def test_a_peer_that_is_no_model_is_one_line(tiny: Any, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "theirs.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match="expected a readable ONNX file") as caught:
        api.benchmark([tiny.export()], **QUICK, vs=tmp_path / "theirs.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vs", ["", "tensorrt", "gone.onnx", "model.xml", "."])
def test_what_is_no_peer_is_refused(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vs: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(EdgevitError) as caught:
        api.benchmark([tiny.export()], **QUICK, vs=vs)
    assert "\n" not in str(caught.value)
    assert "expected naive" in str(caught.value) or "no manifest.json" in str(caught.value)


def test_a_runtime_that_takes_no_onnx_file_has_no_such_peer(tiny: Any, tmp_path: Path) -> None:
    artifact = tiny.export()
    theirs = saved(tmp_path / "theirs.onnx", renamed, artifact.model_file)
    entry = peering.Entry("a", artifact, 1, "foreign", theirs)
    with pytest.raises(UnknownNameError, match=r"unknown runtime for theirs.onnx 'trt'"):
        entry._foreign("trt", peering.RunOn())


# ---- sweeps


def test_every_cell_of_a_sweep_is_measured(tiny: Any) -> None:
    artifact = tiny.export(image_size=((64, 64), (32, 96)), batch="dynamic")
    document = api.benchmark(
        [artifact], sweep={"threads": (1, 2), "image_size": ((64, 64), (32, 96)), "batch": [3]}, **SWEPT
    )
    assert cells_of(document) == [
        {"threads": threads, "image_size": size, "batch": 3} for threads in (1, 2) for size in ([64, 64], [32, 96])
    ]
    for cell in document["cells"]:
        (result,) = cell["results"]
        asked = cell["cell"]
        assert (result["threads"], result["image_size"], result["batch"]) == (asked["threads"], asked["image_size"], 3)
        assert asked["items"] == [artifact.name]
    assert (document["schema_version"], document["kind"], document["resumed"]) == (1, "bench", 0)
    assert document["request"]["axes"] == {"threads": [1, 2], "image_size": [[64, 64], [32, 96]], "batch": [3]}


def test_items_race_each_other_in_every_cell(tiny: Any, copied: Any) -> None:
    first = tiny.export().path
    document = api.benchmark([first, copied(first, "second")], sweep={"threads": (1, 2)}, **SWEPT)
    assert [[c["candidate"] for c in cell["comparisons"]] for cell in document["cells"]] == [["second"]] * 2


def test_models_are_exported_for_each_cell_once(tiny: Any) -> None:
    document = api.benchmark(["tiny"], sweep={"batch": (1, 2), "image_size": ((32, 32),), "threads": (1, 2)}, **SWEPT)
    found = [(c["results"][0]["batch"], c["results"][0]["image_size"]) for c in document["cells"]]
    assert found == [(1, [32, 32])] * 2 + [(2, [32, 32])] * 2
    assert len(tiny.family.built) <= 2 * 3  # each export builds the network a few times; four cells are two exports
    assert tiny.left() == []


@pytest.mark.parametrize(
    ("sweep", "text"),
    [
        ({"batch": (1, 8)}, "batch 8, expected 1, which it was exported for; give the model's name"),
        ({"precision": ("fp32", "int8")}, "precision int8, expected fp32, in which it was exported; give the model's"),
        ({"image_size": ((64, 64), (32, 32))}, "image size 32x32, expected one of 64x64; export the model with"),
    ],
)
def test_what_an_artifact_does_not_hold_is_refused_before_anything_runs(
    tiny: Any, tmp_path: Path, sweep: Any, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        api.benchmark([tiny.export()], sweep=sweep, out=tmp_path / "s.json", **SWEPT)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("sweep", "error", "text"),
    [
        ({"precision": ("fp32", "fp8")}, UnknownNameError, "unknown precision of target onnx 'fp8'"),
        ({"image_size": ((64, 64), (33, 64))}, UsageError, "image size 33x64"),
        ({"batch": (1, 5000)}, UsageError, "sweep over batch: 5000, expected whole numbers from 1 to 1024"),
    ],
)
def test_what_a_model_cannot_be_is_refused_before_anything_runs(tiny: Any, sweep: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        api.benchmark(["tiny"], sweep=sweep, **SWEPT)
    assert tiny.family.built == []


def test_pictures_are_for_models_alone(tiny: Any) -> None:
    with pytest.raises(UsageError, match="calibration pictures are for models"):
        api.benchmark([tiny.export()], calibration="reference-task", **SWEPT)


def test_int8_cells_need_pictures(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.export.quantize.for_onnx import OnnxRecipe

    monkeypatch.setattr(type(tiny.exporter), "precisions", ("fp32", "int8"))
    monkeypatch.setattr(type(tiny.exporter), "RECIPE", OnnxRecipe)
    with pytest.raises(UsageError, match="int8 for onnx: no pictures to measure ranges on"):
        api.benchmark(["tiny"], sweep={"precision": ("fp32", "int8")}, **SWEPT)


def test_a_second_call_goes_on_where_the_first_was_interrupted(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, place = tiny.export().path, tmp_path / "s.json"
    real, asked = benching._measure, []

    def interrupted(plan: Any, cell: Any, *rest: Any) -> Any:
        asked.append(cell.threads)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(plan, cell, *rest)

    monkeypatch.setattr(benching, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.benchmark([path], sweep={"threads": (1, 2)}, out=place, **SWEPT)
    assert [cell["cell"]["threads"] for cell in read(place)["cells"]] == [1]
    first = read(place)["cells"][0]
    document = api.benchmark([path], sweep={"threads": (1, 2)}, out=place, **SWEPT)
    assert (document["resumed"], asked) == (1, [1, 2, 2])
    assert document["cells"][0] == first
    assert {k: v for k, v in document.items() if k != "resumed"} == read(place)


@pytest.mark.parametrize("place_of_change", ["seed", "artifact", "vs"])
def test_a_file_of_another_measurement_is_refused(tiny: Any, copied: Any, tmp_path: Path, place_of_change: str) -> None:
    path, place = copied(tiny.export().path), tmp_path / "s.json"
    api.benchmark([path], out=place, **QUICK)
    change: dict[str, Any] = {}
    if place_of_change == "artifact":
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).unlink()
        write_manifest(path, {**manifest, "seed": 5})
    else:
        change = {"seed": {"seed": 3}, "vs": {"vs": "naive"}}[place_of_change]
    with pytest.raises(UsageError, match="it holds another measurement: "):
        api.benchmark([path], out=place, **QUICK, **change)


def test_without_a_sweep_the_file_has_the_one_cell_and_the_document_its_fields(tiny: Any, tmp_path: Path) -> None:
    path, place = tiny.export().path, tmp_path / "s.json"
    document = api.benchmark([path], out=place, **QUICK)
    (cell,) = read(place)["cells"]
    assert {key: document[key] for key in cell} == cell
    assert "cells" not in document
    again = api.benchmark([path], out=place, **QUICK)
    assert again["resumed"] == 1 and again["results"] == document["results"]


def test_no_path_of_this_machine_is_in_the_file(tiny: Any, tmp_path: Path) -> None:
    artifact, place = tiny.export(), tmp_path / "s.json"
    api.benchmark([artifact], out=place, vs=artifact.model_file, **QUICK)
    assert str(tmp_path) not in place.read_text()
    assert os.uname().nodename not in place.read_text()
