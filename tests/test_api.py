"""Export, verify, predict and bench over a tiny network: export proves, verify checks again, the others trust neither.

Its exports take milliseconds, so that every way an export can go wrong is one test.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import edgevit
from edgevit import api, inputs
from edgevit.artifact import load_artifact, write_manifest
from edgevit.errors import (
    ArtifactError,
    CheckpointError,
    EdgevitError,
    ExportError,
    InputError,
    OutputError,
    ParityError,
    RuntimeFailure,
    UnknownNameError,
    UsageError,
)
from edgevit.manifest import MANIFEST

NAME = "tiny-onnx-fp32"
QUICK: dict[str, Any] = {"duration_s": 0.02, "loads": 1, "threads": 1}

photos = inputs.photographs


def stored(model: Any, name: str) -> NDArray[np.float32]:
    """A weight of an ONNX model, to be written to."""
    from onnx import numpy_helper

    array = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
    return np.array(array)


def put(model: Any, name: str, array: NDArray[Any]) -> None:
    from onnx import numpy_helper

    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def biased(model: Any) -> None:
    put(model, "head.bias", stored(model, "head.bias") + np.float32(0.01))


def not_a_number(model: Any) -> None:
    put(model, "head.bias", stored(model, "head.bias") * np.float32(np.nan))


def one_class_short(model: Any) -> None:
    for name in ("head.weight", "head.bias"):
        put(model, name, stored(model, name)[:-1])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value -= 1


def renamed(model: Any) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "output"


def half(model: Any) -> None:
    """The last layer in half precision, computed back to float32."""
    from onnx import TensorProto, helper

    weight = stored(model, "head.weight").astype(np.float16)
    put(model, "head.weight", weight)
    next(t for t in model.graph.initializer if t.name == "head.weight").name = "half"
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["head.weight"], to=TensorProto.FLOAT))


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The artifact with another manifest, hashes made to fit."""
    document = json.loads((path / MANIFEST).read_text())
    change(document)
    (path / MANIFEST).unlink()
    write_manifest(path, {key: value for key, value in document.items() if key != "files"})
    return path


# ---- export


def test_an_export_is_proven_and_described(tiny: Any) -> None:
    artifact = tiny.export(command="edgevit export tiny")
    manifest = artifact.manifest
    assert artifact.path == tiny.out / NAME
    assert tiny.left() == [NAME]
    assert manifest["parity"]["passed"] and manifest["parity"]["inputs"] == len(photos())
    assert manifest["parity"]["max_abs"] < 1e-5  # summation order alone
    assert (manifest["command"], manifest["seed"], manifest["batch"]) == ("edgevit export tiny", 0, 1)
    assert manifest["weights"]["source"] == "random"
    assert manifest["complexity"]["macs"] == 3 * 4 * 64 * 64 + 40
    assert manifest["tools"]["edgevit"] == edgevit.__version__
    assert {"torch", "onnx", "onnxruntime", "python"} <= set(manifest["tools"])
    assert manifest["image"]["size"] == [64, 64]
    assert artifact == load_artifact(artifact.path)


def test_the_sample_is_what_the_reference_computed(tiny: Any) -> None:
    import torch

    from edgevit.models import load_model

    artifact = tiny.export()
    sample, output = (artifact.array(f"sample/{part}.npy") for part in ("input", "output"))
    assert sample.shape == (1, 3, 64, 64)
    with torch.no_grad():
        reference = load_model("tiny", num_classes=10, randomize=True).module(torch.from_numpy(sample))
    assert np.array_equal(output, reference.numpy())


def test_progress_goes_from_0_to_1(tiny: Any) -> None:
    seen: list[tuple[float, str]] = []
    tiny.export(progress=lambda fraction, text: seen.append((fraction, text)))
    assert seen[0] == (0.0, "loading weights")
    assert seen[-1] == (1.0, "done")
    assert [f for f, _ in seen] == sorted(f for f, _ in seen)


def test_a_size_and_an_option_reach_exporter_and_manifest(tiny: Any) -> None:
    artifact = tiny.export(image_size=(32, 96), options={"double": "true"}, pointwise="grouped", seed=3)
    assert artifact.name == f"{NAME}-32x96"
    assert artifact.manifest["image"]["size"] == [32, 96]
    assert artifact.manifest["options"] == {"double": "true"}
    assert artifact.manifest["choices"] == {"pointwise": "grouped"}
    assert artifact.manifest["seed"] == artifact.manifest["weights"]["seed"] == 3
    assert api.verify(artifact.path)["against"] == "reference"


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_static_batch_is_filled_up(tiny: Any, batch: int) -> None:
    artifact = tiny.export(batch=batch)
    assert artifact.array("sample/input.npy").shape[0] == artifact.array("sample/output.npy").shape[0] == batch
    assert artifact.manifest["parity"]["inputs"] == max(batch, len(photos()))
    assert api.verify(artifact.path)["parity"]["passed"]


def test_a_dynamic_batch_runs_at_any_number_of_pictures(tiny: Any) -> None:
    artifact = tiny.export(batch="dynamic")
    assert artifact.manifest["batch"] == "dynamic"
    with edgevit.load(artifact.path, threads=1) as runtime:
        one = runtime.run({"image": inputs.load_images(photos(), artifact.image_spec)[:1]})["logits"]
        all_four = runtime.run({"image": inputs.load_images(photos(), artifact.image_spec)})["logits"]
    assert all_four.shape == (4, 10)
    assert np.abs(all_four[:1] - one).max() < 1e-5  # summation order alone


def test_features_are_exported_and_proven(tiny: Any) -> None:
    artifact = tiny.export(features_only=True)
    assert artifact.manifest["parity"]["top1_agreement"] is None
    assert api.verify(artifact.path)["parity"]["passed"]
    with edgevit.load(artifact.path) as runtime:
        assert sorted(runtime.run({"image": artifact.array("sample/input.npy")})) == ["feature0", "feature1"]


# ---- export with weights


def test_the_manifest_says_where_the_weights_came_from(tiny: Any, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "official.pth")
    weights = tiny.export(weights=path, num_classes=None).manifest["weights"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights == {"source": "official.pth", "sha256": sha256, "entry": "state_dict"}


def test_verify_with_the_weights_is_against_the_reference_and_without_against_the_sample(
    tiny: Any, tmp_path: Path
) -> None:
    weights = tiny.checkpoint(tmp_path / "official.pth")
    path = tiny.export(weights=weights, num_classes=None).path
    assert api.verify(path, weights)["against"] == "reference"
    alone = api.verify(path)
    assert (alone["against"], alone["parity"]["inputs"]) == ("sample", 1)
    json.dumps(alone, allow_nan=False)


def test_verify_with_other_weights_is_not_equal(tiny: Any, tmp_path: Path) -> None:
    path = tiny.export(weights=tiny.checkpoint(tmp_path / "official.pth"), num_classes=None).path
    with pytest.raises(ParityError, match=r"not equal to its reference: max abs .*; export the model again"):
        api.verify(path, tiny.checkpoint(tmp_path / "other.pth", seed=6))


def test_other_classes_than_the_checkpoint_s_are_a_note_in_the_manifest(tiny: Any, tmp_path: Path) -> None:
    weights = tiny.checkpoint(tmp_path / "official.pth")
    artifact = tiny.export(weights=weights, num_classes=3)
    (note,) = artifact.manifest["notes"]
    assert note.startswith("head: 10 classes in the checkpoint, 3 asked for: the layer is new")
    assert artifact.array("sample/output.npy").shape == (1, 3)
    assert api.verify(artifact.path, weights)["against"] == "reference"


def test_the_manifest_holds_the_classes_that_were_built(tiny: Any, tmp_path: Path) -> None:
    artifact = tiny.export(weights=tiny.checkpoint(tmp_path / "official.pth"), num_classes=None)
    assert artifact.manifest["num_classes"] == 10


def test_weights_that_do_not_fit_leave_nothing(tiny: Any, tmp_path: Path) -> None:
    import torch

    odd = tiny.checkpoint(tmp_path / "odd.pth", tail=torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"1 of the names or shapes do not fit .* 'tail' is unexpected"):
        tiny.export(weights=odd)
    assert tiny.left() == []


# ---- exports that go wrong


@pytest.mark.parametrize("spoil", [biased, not_a_number, one_class_short, renamed], ids=lambda f: f.__name__)
def test_a_model_that_is_not_the_reference_is_no_artifact(tiny: Any, spoil: Callable[[Any], None]) -> None:
    tiny.exporter.change = spoil
    with pytest.raises(ParityError) as caught:
        tiny.export()
    assert caught.value.exit_code == 3
    assert "not equal to the reference" in str(caught.value)
    assert tiny.left() == []


def test_a_failing_parity_says_how_far_off_it_is(tiny: Any) -> None:
    tiny.exporter.change = biased
    with pytest.raises(
        ParityError, match=r"^tiny at 64x64 on ort: not equal to the reference: max abs 1\.00e-02 \(limit 0.001\)"
    ):
        tiny.export()


def test_a_model_that_runs_in_another_precision_is_no_artifact(tiny: Any) -> None:
    tiny.exporter.change = half
    with pytest.raises(RuntimeFailure, match=r"runs in fp16\+fp32, expected fp32"):
        tiny.export()
    assert tiny.left() == []


def test_a_model_that_the_runtime_refuses_is_no_artifact(tiny: Any) -> None:
    def unknown_operator(model: Any) -> None:
        model.graph.node[0].op_type = "NoSuchOperator"

    tiny.exporter.change = unknown_operator
    with pytest.raises(EdgevitError):
        tiny.export()
    assert tiny.left() == []


def failing(error: BaseException) -> Callable[[Path], None]:
    """What an exporter does that half writes its file and then meets `error`."""

    def fail(directory: Path) -> None:
        (directory / "model.onnx").write_bytes(b"half")
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [ExportError("capture of Tiny"), KeyboardInterrupt(), MemoryError(), ValueError("bug")],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_a_failing_exporter_leaves_what_was_there(tiny: Any, error: BaseException, force: bool) -> None:
    before = tiny.export(seed=1).manifest if force else None
    tiny.exporter.before = failing(error)
    with pytest.raises(type(error)):
        tiny.export(force=force)
    assert tiny.left() == ([NAME] if force else [])
    if before is not None:
        assert load_artifact(tiny.out / NAME).manifest == before
        assert api.verify(tiny.out / NAME)["against"] == "reference"


def test_an_artifact_that_exists_is_refused_before_any_work(tiny: Any) -> None:
    tiny.export()
    tiny.exporter.before = lambda directory: pytest.fail("it worked before it looked")
    with pytest.raises(OutputError, match="exists already; give --force"):
        tiny.export(progress=lambda fraction, text: pytest.fail(f"{text} before it looked"))


def test_force_replaces_it(tiny: Any) -> None:
    tiny.export(seed=1)
    assert tiny.export(seed=2, force=True).manifest["seed"] == 2
    assert load_artifact(tiny.out / NAME).manifest["seed"] == 2
    assert tiny.left() == [NAME]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"batch": 0}, "batch 0: expected a whole number from 1 to 1024, or 'dynamic'"),
        ({"batch": -1}, "batch -1"),
        ({"batch": 2000}, "batch 2000"),
        ({"batch": "two"}, "batch two"),
        ({"batch": 1.5}, r"batch 1\.5"),
        ({"batch": None}, "batch None"),
        ({"precision": "fp8"}, "unknown precision for onnx 'fp8'"),
        ({"image_size": (64, 65)}, "image size 64x65: height and width must be multiples of 32 .*; try 64x64"),
        ({"image_size": (64, 64.5)}, r"image size 64x64\.5"),
        ({"num_classes": 0}, "number of classes 0: expected 1 to 1000000"),
        ({"options": {"duble": "true"}}, "unknown option of tiny 'duble'; did you mean 'double'"),
        ({"options": {"double": "maybe"}}, "option double=maybe: expected true or false"),
        ({"pointwise": "sparse"}, "pointwise"),
        ({"seed": 2**64}, "seed"),
    ],
    ids=str,
)
def test_an_impossible_request_is_refused(tiny: Any, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny.export(**request_)
    assert tiny.left() == []


def test_an_unknown_model_or_target_says_the_nearest(tiny: Any) -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'tinny'; did you mean 'tiny'"):
        api.export_model("tinny", "onnx", out=tiny.out)
    with pytest.raises(UnknownNameError, match="unknown target 'onyx'; did you mean 'onnx'"):
        api.export_model("tiny", "onyx", out=tiny.out)
    assert tiny.left() == []


# ---- load, verify


def test_a_loaded_artifact_runs_inside_its_block_only(tiny: Any) -> None:
    artifact = tiny.export()
    picture = artifact.array("sample/input.npy")
    runtime = edgevit.load(artifact.path)
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime.run({"image": picture})
    with runtime:
        logits = runtime.run({"image": picture})["logits"]
    assert logits.dtype == np.float32 and logits.shape == (1, 10)
    with pytest.raises(RuntimeFailure, match="closed already"):
        runtime.run({"image": picture})


def test_verify_finds_outputs_that_are_not_the_sample_s(tiny: Any) -> None:
    path = tiny.export().path
    np.save(path / "sample" / "output.npy", np.load(path / "sample" / "output.npy") + np.float32(0.01))
    with pytest.raises(ParityError, match=r"not equal to its sample: max abs 1\.00e-02"):
        api.verify(edited(path, lambda m: None))


def test_verify_finds_a_model_that_is_not_its_seed_s(tiny: Any) -> None:
    path = edited(tiny.export(seed=1).path, lambda m: m.update(seed=2))
    with pytest.raises(ParityError, match="not equal to its reference"):
        api.verify(path)


def test_verify_finds_a_precision_that_is_not_what_runs(tiny: Any) -> None:
    path = edited(tiny.export().path, lambda m: m.update(precision="fp16"))
    with pytest.raises(RuntimeFailure, match="runs in fp32, expected fp16; its numbers would be another model's"):
        api.verify(path)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 64, 64), (2, 3, 64, 64)])
def test_a_sample_of_another_shape_is_refused(tiny: Any, shape: tuple[int, ...]) -> None:
    path = tiny.export().path
    np.save(path / "sample" / "input.npy", np.zeros(shape, np.float32))
    with pytest.raises(EdgevitError, match="has shape"):
        api.verify(edited(path, lambda m: None))


def test_a_sample_output_of_another_shape_is_refused(tiny: Any) -> None:
    path = tiny.export().path
    np.save(path / "sample" / "output.npy", np.zeros((1, 7), np.float32))
    with pytest.raises(EdgevitError):
        api.verify(edited(path, lambda m: None))


NONSENSE: dict[str, tuple[Any, ...]] = {
    **{key: (None, 5, "x", [], {}) for key in ("weights", "options", "image")},
    **{key: (None, "x", [], -1, 0, 1.5) for key in ("batch", "seed")},
    "num_classes": ("x", [], -1, 1.5),
    "features_only": (None, "x", []),
    **dict.fromkeys(("model", "target", "precision"), ("x", "")),
}


@pytest.mark.parametrize("key", NONSENSE)
def test_a_manifest_of_nonsense_is_an_error_of_edgevit_s(tiny: Any, key: str) -> None:
    path = tiny.export().path
    whole = (path / MANIFEST).read_text()
    others: list[str] = []
    verbs: dict[str, Callable[[], Any]] = {
        "verify": lambda: api.verify(path),
        "predict": lambda: api.predict(path, photos()[:1]),
        "benchmark": lambda: api.benchmark([path], **QUICK, vs="naive"),
    }
    for value in (*NONSENSE[key], "missing"):
        document = json.loads(whole)
        document.pop(key) if value == "missing" else document.update({key: value})
        (path / MANIFEST).write_text(json.dumps(document))
        for verb, call in verbs.items():
            try:
                call()
            except EdgevitError:
                continue
            except Exception as error:
                others.append(f"{verb} with {key} {value!r}: {type(error).__name__}: {error}")
    assert others == []


# ---- predict


def expected_top(artifact: Any, paths: list[Path], top: int) -> list[list[tuple[int, float]]]:
    images = inputs.load_images(paths, artifact.image_spec)
    with edgevit.load(artifact.path) as runtime:
        logits = np.concatenate([runtime.run({"image": image[None]})["logits"] for image in images]).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return [[(int(c), float(row[c])) for c in np.argsort(-row)[:top]] for row in shares]


def test_the_top_classes_come_with_a_softmax_in_float64(tiny: Any) -> None:
    artifact = tiny.export()
    document = api.predict(artifact.path, photos())
    for prediction, path, expected in zip(
        document["predictions"], photos(), expected_top(artifact, photos(), 5), strict=True
    ):
        assert prediction["image"] == str(path)
        assert [row["class"] for row in prediction["top"]] == [c for c, _ in expected]
        assert [row["label"] for row in prediction["top"]] == [str(c) for c, _ in expected]
        shares = [row["probability"] for row in prediction["top"]]
        assert shares == pytest.approx([p for _, p in expected], rel=1e-12)  # float64; float32 would be at 1e-7
        assert sum(shares) <= 1
    json.dumps(document, allow_nan=False)


def test_more_classes_than_there_are_gives_all_of_them(tiny: Any) -> None:
    (prediction,) = api.predict(tiny.export().path, photos()[:1], top=99)["predictions"]
    assert sorted(row["class"] for row in prediction["top"]) == list(range(10))
    assert sum(row["probability"] for row in prediction["top"]) == pytest.approx(1, abs=1e-12)  # float64


@pytest.mark.parametrize("batch", [2, 3, "dynamic"])
def test_the_batch_of_the_graph_does_not_show(tiny: Any, batch: Any) -> None:
    paths = [*photos(), photos()[0]]
    single = api.predict(tiny.export().path, paths)["predictions"]
    batched = api.predict(tiny.export(batch=batch, force=True).path, paths)["predictions"]
    for one, other in zip(single, batched, strict=True):
        assert one["image"] == other["image"]
        assert [row["class"] for row in one["top"]] == [row["class"] for row in other["top"]]
        close = pytest.approx(
            [row["probability"] for row in one["top"]], rel=1e-5
        )  # float32 logits, other summation order
        assert [row["probability"] for row in other["top"]] == close


def test_random_weights_are_said_and_a_checkpoint_s_are_not(tiny: Any, tmp_path: Path) -> None:
    assert api.predict(tiny.export().path, photos()[:1])["random_weights"] is True
    trained = tiny.export(weights=tiny.checkpoint(tmp_path / "w.pth"), force=True)
    assert api.predict(trained.path, photos()[:1])["random_weights"] is False


def test_labels_name_the_classes(tiny: Any, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"name {i}\n" for i in range(10)))
    (prediction,) = api.predict(tiny.export().path, photos()[:1], labels)["predictions"]
    assert [row["label"] for row in prediction["top"]] == [f"name {row['class']}" for row in prediction["top"]]


def test_labels_of_another_data_set_are_refused(tiny: Any, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"labels\.txt: 2 names, expected 10 class names"):
        api.predict(tiny.export().path, photos()[:1], labels)


def test_features_are_no_classifier(tiny: Any) -> None:
    path = tiny.export(features_only=True).path
    with pytest.raises(UsageError, match=r"has no logits \(outputs feature0, feature1\); run needs a classifier"):
        api.predict(path, photos()[:1])


def test_a_small_picture_and_a_grey_one_are_classified(tiny: Any, tmp_path: Path) -> None:
    Image.new("L", (1, 1), 128).save(tmp_path / "dot.png")
    (prediction,) = api.predict(tiny.export().path, [tmp_path / "dot.png"])["predictions"]
    assert len(prediction["top"]) == 5


def test_no_picture_is_refused(tiny: Any) -> None:
    with pytest.raises(EdgevitError, match="no pictures given"):
        api.predict(tiny.export().path, [])


def test_logits_that_are_no_numbers_are_an_error_not_a_prediction(tiny: Any) -> None:
    import onnx

    artifact = tiny.export()
    model = onnx.load(artifact.model_file)
    not_a_number(model)
    onnx.save(model, artifact.model_file)
    with pytest.raises(EdgevitError, match=r"NaN|finite"):
        api.predict(edited(artifact.path, lambda m: None), photos()[:1])


# ---- benchmark


def test_one_artifact_is_timed(tiny: Any) -> None:
    document = api.benchmark([tiny.export()], **QUICK)
    (result,) = document["results"]
    assert result["name"] == NAME
    assert result["effective_precision"] == "fp32"
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p90"]
    assert len(result["samples_ms"]) == len(result["rounds"]) >= 64  # what p90 needs
    assert document["comparison"] is None and document["comparisons"] == []
    assert document["settings"]["threads"] == 1 and document["settings"]["loads"] == 1
    assert {"before", "after"} == set(document["machine"])
    json.dumps(document, allow_nan=False)


def test_several_race_and_each_is_compared_with_the_first(tiny: Any, copied: Any) -> None:
    first = tiny.export()
    others = [copied(first.path, name) for name in ("second", "third")]
    document = api.benchmark([first, *others], **QUICK)
    assert [r["name"] for r in document["results"]] == [NAME, "second", "third"]
    assert [(c["baseline"], c["candidate"]) for c in document["comparisons"]] == [(NAME, "second"), (NAME, "third")]
    assert document["comparison"] == document["comparisons"][0]
    for comparison in document["comparisons"]:
        assert comparison["low"] <= comparison["ratio"] <= comparison["high"]


def test_a_model_s_name_is_exported_for_the_occasion_and_left_nowhere(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    assert api.benchmark(["tiny"], **QUICK)["results"][0]["name"] == NAME
    assert os.listdir(scratch) == []
    assert sorted(os.listdir(tmp_path)) == ["scratch"]
    assert tiny.left() == []


def test_artifacts_of_one_name_are_told_apart_by_their_paths(tiny: Any, copied: Any) -> None:
    first = tiny.export().path
    names = [r["name"] for r in api.benchmark([first, copied(first)], **QUICK)["results"]]
    assert names[0] == str(first) and names[1] != names[0]


def test_against_the_naive_export_each_races_its_own(tiny: Any, copied: Any) -> None:
    first = tiny.export().path
    document = api.benchmark([first, copied(first, "second")], **QUICK, vs="naive")
    assert [(c["baseline"], c["candidate"]) for c in document["comparisons"]] == [
        (f"{NAME} (naive)", NAME),
        ("second (naive)", "second"),
    ]
    assert len(document["results"]) == 4


def test_the_naive_export_has_as_many_classes_as_the_artifact(tiny: Any, tmp_path: Path) -> None:
    weights = tiny.checkpoint(tmp_path / "seven.pth", classes=7)
    api.benchmark([tiny.export(weights=weights, num_classes=None)], **QUICK, vs="naive")
    assert [module.head.out_features for module in tiny.exporter.naive] == [7]


@pytest.mark.parametrize(("batch", "first"), [(2, 2), ("dynamic", "batch")])
def test_the_naive_export_has_the_batch_of_the_artifact(tiny: Any, tmp_path: Path, batch: Any, first: Any) -> None:
    import onnxruntime

    from edgevit.export.to_onnx import OnnxExporter
    from edgevit.models import load_model
    from edgevit.specs import ExportSpec

    loaded = load_model("tiny", num_classes=10)
    spec = ExportSpec("tiny", "onnx", image_size=(32, 64), batch=batch)
    OnnxExporter().export_naive(loaded.module, loaded.card, spec, tmp_path / "naive.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "naive.onnx")
    assert session.get_inputs()[0].shape == [first, 3, 32, 64]
    assert tiny.left() == []


def test_a_race_runs_in_each_artifact_s_own_shape(tiny: Any) -> None:
    small, large = tiny.export(image_size=(32, 32)), tiny.export(image_size=(96, 64), batch=2)
    assert len(api.benchmark([small, large], **QUICK)["results"]) == 2


def test_a_precision_that_is_not_what_runs_is_no_result(tiny: Any) -> None:
    path = edited(tiny.export().path, lambda m: m.update(precision="fp16"))
    with pytest.raises(RuntimeFailure, match="runs in fp32, expected fp16"):
        api.benchmark([path], **QUICK)


def test_a_changed_artifact_is_not_timed(tiny: Any) -> None:
    artifact = tiny.export()
    artifact.model_file.write_bytes(b"x" * artifact.model_file.stat().st_size)
    with pytest.raises(ArtifactError, match="changed since it was exported"):
        api.benchmark([artifact], **QUICK)


@pytest.mark.parametrize(
    "settings",
    [
        {"duration_s": 0},
        {"duration_s": -1},
        {"duration_s": float("nan")},
        {"duration_s": float("inf")},
        {"loads": 0},
        {"threads": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(tiny: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"duration|loads|threads"):
        api.benchmark([tiny.export()], **{**QUICK, **settings})


def test_nothing_to_measure_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        api.benchmark([])
    path = tiny.export().path
    with pytest.raises(UsageError, match="equal name"):
        api.benchmark([path, path], **QUICK)


def test_what_is_neither_artifact_nor_model_says_the_nearest(tiny: Any) -> None:  # noqa: ARG001  # registers `tiny`
    with pytest.raises(UnknownNameError, match="unknown artifact directory or model 'tny'; did you mean 'tiny'"):
        api.benchmark(["tny"])
