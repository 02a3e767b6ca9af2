"""Several image sizes in one artifact: a static graph for each, common weights, every verb at every size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import edgevit
from edgevit import api, inputs
from edgevit.artifact import load_artifact, write_manifest
from edgevit.errors import EdgevitError, ExportError, ParityError, UsageError
from edgevit.export.shared_weights import INSIDE_BYTES, SharedWeights
from edgevit.manifest import MANIFEST

SIZES = ((64, 64), (32, 96))
NAME = "tiny-onnx-fp32-64x64+32x96"
QUICK: dict[str, Any] = {"duration_s": 0.02, "loads": 1, "threads": 1}
REAL = ((64, 64), (64, 96))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:  # noqa: ARG001  # for its effect
    """A real network at two sizes: its position embedding differs between them, all other weights are the same."""
    out = tmp_path_factory.mktemp("resolutions")
    return api.export_model("deit_tiny", "onnx", image_size=REAL, out=out, num_classes=10)


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The artifact with another manifest, hashes made to fit."""
    document = json.loads((path / MANIFEST).read_text())
    change(document)
    (path / MANIFEST).unlink()
    write_manifest(path, {key: value for key, value in document.items() if key != "files"})
    return path


# ---- one artifact


def test_each_size_is_built_proven_and_described(tiny: Any) -> None:
    artifact = tiny.export(image_size=SIZES)
    assert tiny.left() == [artifact.name] == [NAME]
    assert artifact.image_sizes == SIZES
    first, second = artifact.manifest["resolutions"]
    assert (first["image_size"], second["image_size"]) == ([64, 64], [32, 96])
    assert (first["model_file"], second["model_file"]) == ("model-64x64.onnx", "model-32x96.onnx")
    assert (first["sample"], second["sample"]) == ("sample", "sample/32x96")
    for entry, (height, width) in zip((first, second), SIZES, strict=True):
        assert entry["inputs"][0]["shape"] == [1, 3, height, width]
        assert entry["complexity"]["macs"] == 3 * 4 * height * width + 40
        assert entry["parity"]["passed"] and entry["parity"]["inputs"] == len(inputs.photographs())


def test_the_first_size_stands_where_old_readers_look(tiny: Any) -> None:
    several, alone = tiny.export(image_size=SIZES), tiny.export()
    differ = {"files", "resolutions", "model_file", "checked_file"}
    assert {k: v for k, v in several.manifest.items() if k not in differ} == {
        k: v for k, v in alone.manifest.items() if k not in differ
    }
    assert several.manifest["model_file"] == "model-64x64.onnx"
    assert np.array_equal(several.array("sample/output.npy"), alone.array("sample/output.npy"))


def test_the_weights_are_loaded_once(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit import checkpoint

    weights, read, reads = tiny.checkpoint(tmp_path / "w.pth"), checkpoint.read_checkpoint, []
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: reads.append(path) or read(path))
    tiny.export(image_size=SIZES, weights=weights)
    assert reads == [weights]


def test_one_size_in_a_sequence_is_one_size(tiny: Any) -> None:
    assert tiny.export(image_size=[(64, 64)]).name == "tiny-onnx-fp32"
    artifact = tiny.export(image_size=[[32, 96]])
    assert (artifact.name, "resolutions" in artifact.manifest) == ("tiny-onnx-fp32-32x96", False)


def test_numbers_of_numpy_and_lists_are_sizes_too(tiny: Any) -> None:
    artifact = tiny.export(image_size=(np.array([32, 96]).tolist(), [np.int64(64), np.int64(64)]))
    assert artifact.image_sizes == ((32, 96), (64, 64))


@pytest.mark.parametrize("batch", [2, "dynamic"])
def test_every_size_has_the_batch_asked_for(tiny: Any, batch: Any) -> None:
    artifact = tiny.export(image_size=SIZES, batch=batch)
    for size in SIZES:
        sample = artifact.at(size).sample("input")
        assert sample.shape == (1 if batch == "dynamic" else batch, 3, *size)
    assert api.verify(artifact.path)["against"] == "reference"


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (((64, 64), (32, 32), (64, 64)), "image sizes 64x64,32x32,64x64: 64x64 is given twice; give each size once"),
        (((64, 64), (32, 40)), "image size 32x40: height and width must be multiples of 32 .*; try 32x32"),
        (((64, 64), "dynamic"), "image size .*: expected .height, width. in whole pixels"),
        (((64, 64), (64,)), r"image size 64: expected .height, width. in whole pixels, e.g. .224, 224., or a sequence"),
        (((64, 64), (64, 64, 64)), "image size 64x64x64: expected"),
        ("64x64", "image size '64x64': expected"),
        ("64x64,32x32", "image size '64x64,32x32': expected"),
        (64, "image size 64: expected"),
        ((), r"image size \(\): expected"),
        ((64, None), r"image size \(64, None\): expected"),
        (tuple((32, 32 * i) for i in range(1, 18)), "image sizes: 17 of them, at most 16 share an artifact"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_and_leave_nothing(tiny: Any, image_size: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        tiny.export(image_size=image_size)
    assert tiny.left() == []


def test_a_second_size_that_is_not_equal_leaves_nothing(tiny: Any) -> None:
    def spoil_the_second(model: Any) -> None:
        if model.graph.input[0].type.tensor_type.shape.dim[2].dim_value == 32:
            bias = next(t for t in model.graph.initializer if t.name == "head.bias")
            bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1), "head.bias"))

    tiny.exporter.change = spoil_the_second
    with pytest.raises(ParityError, match=r"^tiny at 32x96 on ort: not equal to the reference: max abs 1\.0"):
        tiny.export(image_size=SIZES)
    assert tiny.left() == []


def test_an_exporter_that_fails_at_the_second_size_leaves_nothing(tiny: Any) -> None:
    calls: list[Any] = []

    def fail(model: Any) -> None:
        calls.append(model)
        if len(calls) == 2:
            raise ExportError("capture")

    tiny.exporter.change = fail
    with pytest.raises(ExportError):
        tiny.export(image_size=SIZES)
    assert tiny.left() == []


def test_unnatural_sizes_are_noted_in_the_manifest(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevit.api import exporting
    from edgevit.specs import ModuleCount

    cost = {(64, 64): 64, (64, 96): 128, (128, 128): 256, (32, 96): 48}
    monkeypatch.setattr(exporting, "counter", lambda *_, **__: lambda size: ModuleCount(1, cost.get(size, 10**6), 1))
    artifact = tiny.export(image_size=((64, 64), (64, 96), (128, 128)))
    (note,) = artifact.manifest["notes"]
    assert note.startswith("64x96 costs ") and note.endswith("; nearest natural size 64x64")


# ---- every verb


def test_load_runs_the_size_asked_for(tiny: Any) -> None:
    path = tiny.export(image_size=SIZES).path
    for size in SIZES:
        artifact = load_artifact(path).at(size)
        with edgevit.load(path, threads=1, image_size=size) as runtime:
            logits = runtime.run({"image": artifact.sample("input")})["logits"]
        assert np.abs(logits - artifact.sample("output")).max() < 1e-5  # summation order alone
    with edgevit.load(path) as runtime:
        assert runtime.runtime.inputs[0].shape == (1, 3, 64, 64)


def test_a_size_that_the_artifact_lacks_is_refused_by_every_verb(tiny: Any) -> None:
    path = tiny.export(image_size=SIZES).path
    for call in (
        lambda: edgevit.load(path, image_size=(96, 32)),
        lambda: api.predict(path, inputs.photographs()[:1], image_size=(96, 32)),
        lambda: api.benchmark([path], image_size=(96, 32), **QUICK),
    ):
        with pytest.raises(UsageError, match="image size 96x32, expected one of 64x64,32x96; export the model"):
            call()


def test_predict_prepares_the_picture_for_the_size(tiny: Any) -> None:
    path = tiny.export(image_size=SIZES).path
    alone = tiny.export(image_size=SIZES[1]).path
    several, one = (api.predict(p, inputs.photographs(), image_size=s) for p, s in ((path, SIZES[1]), (alone, None)))
    assert several["predictions"] == one["predictions"]
    first = api.predict(path, inputs.photographs())
    assert first["predictions"] == api.predict(path, inputs.photographs(), image_size=SIZES[0])["predictions"]
    assert first["predictions"] != several["predictions"]


def test_verify_checks_every_size(tiny: Any, tmp_path: Path) -> None:
    weights = tiny.checkpoint(tmp_path / "w.pth")
    path = tiny.export(image_size=SIZES, weights=weights).path
    for given, against in ((None, "sample"), (weights, "reference")):
        document = api.verify(path, given)
        assert (document["against"], len(document["resolutions"])) == (against, 2)
        assert document["resolutions"][0] == {"image_size": [64, 64], "parity": document["parity"]}
        assert document["resolutions"][1]["image_size"] == [32, 96]
        json.dumps(document, allow_nan=False)
    with pytest.raises(ParityError, match="64x64: not equal to its reference"):
        api.verify(path, tiny.checkpoint(tmp_path / "other.pth", seed=6))


def test_verify_finds_a_second_size_that_is_not_equal(tiny: Any) -> None:
    path = tiny.export(image_size=SIZES).path
    output = path / "sample" / "32x96" / "output.npy"
    np.save(output, np.load(output) + np.float32(0.01))
    with pytest.raises(
        ParityError, match=rf"^{path} at 32x96: not equal to its sample: max abs 1\.00e-02".replace("+", r"\+")
    ):
        api.verify(edited(path, lambda m: None))


def test_verify_finds_sizes_that_are_each_other_s(tiny: Any) -> None:
    path = tiny.export(image_size=SIZES).path

    def swap(document: dict[str, Any]) -> None:
        first, second = document["resolutions"]
        first["model_file"], second["model_file"] = second["model_file"], first["model_file"]
        document["model_file"] = first["model_file"]

    with pytest.raises(EdgevitError, match="has shape"):
        api.verify(edited(path, swap))


def test_bench_measures_the_first_size_unless_told(tiny: Any) -> None:
    artifact = tiny.export(image_size=SIZES)
    names = [
        api.benchmark([item], **settings, **QUICK)["results"][0]["name"]
        for item, settings in (
            (artifact, {}),
            (artifact.path, {"image_size": (32, 96)}),
            (artifact.at((32, 96)), {}),
            ("tiny", {"image_size": (96, 96)}),
        )
    ]
    assert names == [f"{NAME} at 64x64", f"{NAME} at 32x96", f"{NAME} at 32x96", "tiny-onnx-fp32-96x96"]


def test_two_sizes_of_one_artifact_race(tiny: Any) -> None:
    artifact = tiny.export(image_size=SIZES)
    document = api.benchmark([artifact, artifact.at(SIZES[1])], **QUICK)
    assert [r["name"].rpartition(" at ")[2] for r in document["results"]] == ["64x64", "32x96"]
    assert len(api.benchmark([artifact.at(SIZES[1])], vs="naive", **QUICK)["comparisons"]) == 1


# ---- a real network


def test_the_weights_lie_in_one_file(real: Any) -> None:
    sizes = {entry["name"]: entry["bytes"] for entry in real.manifest["files"]}
    samples = {f"sample/{folder}{part}.npy" for folder in ("", "64x96/") for part in ("input", "output")}
    assert set(sizes) == {"model-64x64.onnx", "model-64x96.onnx", "weights.bin"} | samples
    weights = 4 * real.manifest["complexity"]["parameters"]
    assert weights * 0.99 < sizes["weights.bin"] < weights * 1.02
    assert max(sizes["model-64x64.onnx"], sizes["model-64x96.onnx"]) < 0.02 * weights


def test_only_what_differs_between_the_sizes_is_stored_twice(real: Any) -> None:
    places: list[set[tuple[str, ...]]] = []
    for size in REAL:
        graph = onnx.load(real.at(size).model_file, load_external_data=False).graph
        outside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert all(len(t.raw_data) <= INSIDE_BYTES for t in graph.initializer)
        assert all(int(entry["length"]) > INSIDE_BYTES for entry in map(external, outside))
        places.append({tuple(sorted(external(t).items())) for t in outside})
    assert len(places[0] - places[1]) == len(places[1] - places[0]) == 1  # the position embedding
    assert len(places[0] & places[1]) > 50


def external(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data if entry.key in ("location", "offset", "length")}


def test_every_size_is_the_reference_in_onnx_runtime(real: Any) -> None:
    document = api.verify(real.path)
    assert document["against"] == "reference"
    assert [r["image_size"] for r in document["resolutions"]] == [[64, 64], [64, 96]]
    assert all(r["parity"]["max_abs"] < 1e-4 for r in document["resolutions"])  # 1e-5 is seen
    for size in REAL:  # from its path alone, as a user's program would
        session = onnxruntime.InferenceSession(real.at(size).model_file)
        assert session.get_inputs()[0].shape == [1, 3, *size]


def test_the_shared_file_is_no_reason_to_compute_otherwise(real: Any, tmp_path: Path) -> None:
    alone = api.export_model("deit_tiny", "onnx", image_size=REAL[1], out=tmp_path, num_classes=10)
    several = real.at(REAL[1])
    assert several.manifest["complexity"] == alone.manifest["complexity"]
    assert several.manifest["certificates"] == alone.manifest["certificates"]
    with edgevit.load(alone.path, threads=1) as one, edgevit.load(real.path, threads=1, image_size=REAL[1]) as other:
        feed = {"image": alone.sample("input")}
        assert np.array_equal(one.run(feed)["logits"], other.run(feed)["logits"])


def test_a_changed_weight_file_is_found(real: Any, copied: Callable[..., Path]) -> None:
    path = copied(real.path)
    content = bytearray((path / "weights.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "weights.bin").write_bytes(content)
    with pytest.raises(EdgevitError, match=r"weights\.bin: changed since it was exported"):
        load_artifact(path)


# ---- the weight file


def graph_of(**arrays: Any) -> ir.Model:
    """A graph that holds these initializers and computes nothing."""
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="g"), ir_version=10)


def stored(graph: ir.Model) -> dict[str, Any]:
    return {str(name): value.const_value for name, value in graph.graph.initializers.items()}


def test_equal_bytes_are_stored_once_under_any_name_type_and_shape(tmp_path: Path) -> None:
    ones, other = np.ones((20, 20), np.float32), np.arange(300, dtype=np.float32)
    graphs = [graph_of(a=ones, b=other), graph_of(c=ones.reshape(400), d=ones.view(np.int32), e=other + 1)]
    pool = SharedWeights()
    for graph in graphs:
        pool.take(graph)
    pool.write(tmp_path, "weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size == 4 * (400 + 300 + 300)
    for i, graph in enumerate(graphs):
        ir.save(graph, tmp_path / f"{i}.onnx")
    (first, second) = (stored(ir.load(tmp_path / f"{i}.onnx")) for i in range(2))
    assert np.array_equal(first["a"].numpy(), ones) and np.array_equal(first["b"].numpy(), other)
    assert second["c"].numpy().shape == (400,) and np.array_equal(second["d"].numpy(), ones.view(np.int32))
    assert np.array_equal(second["e"].numpy(), other + 1)


def test_small_tensors_stay_inside(tmp_path: Path) -> None:
    graph = graph_of(small=np.zeros(INSIDE_BYTES // 8, np.int64), large=np.zeros(INSIDE_BYTES // 8 + 1, np.int64))
    pool = SharedWeights()
    pool.take(graph)
    assert stored(graph)["large"] is None  # taken out until it is written
    pool.write(tmp_path, "weights.bin")
    kinds = {name: isinstance(tensor, ir.ExternalTensor) for name, tensor in stored(graph).items()}
    assert kinds == {"small": False, "large": True}


def test_large_tensors_start_a_page(tmp_path: Path) -> None:
    graph = graph_of(a=np.zeros(300, np.float32), b=np.ones(20_000, np.float32), c=np.full(400, 2, np.float32))
    pool = SharedWeights()
    pool.take(graph)
    pool.write(tmp_path, "weights.bin")
    assert stored(graph)["b"].offset % 4096 == 0
    assert stored(graph)["c"].offset == stored(graph)["b"].offset + 80_000


def test_graphs_without_large_tensors_leave_an_empty_file_or_none(tmp_path: Path) -> None:
    pool = SharedWeights()
    pool.take(graph_of(small=np.zeros(3, np.float32)))
    pool.write(tmp_path, "weights.bin")
    assert not (tmp_path / "weights.bin").exists() or (tmp_path / "weights.bin").stat().st_size == 0
