"""`evaluate --record`: the accuracy in the manifest, for the gate, and nothing else changed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import edgevit
from edgevit import api
from edgevit import artifact as artifact_module
from edgevit.artifact import load_artifact, record_accuracy
from edgevit.bench.budget import Limits, check_manifests
from edgevit.errors import ArtifactError, OutputError
from edgevit.manifest import MANIFEST, MAX_ACCURACIES

COLOURS = {"a red": (220, 20, 20), "b green": (20, 220, 20), "c blue": (20, 20, 220)}
SHOWN = ["rrrrrrg", "gggggg", "bbbbbr"]  # one green among the red, one red among the blue: 17 of 19 are right
RIGHT = [letter == own for folder, own in zip(SHOWN, "rgb", strict=True) for letter in folder]


@pytest.fixture
def weights(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint that answers with the strongest colour; with `swap`, green for blue and the reverse."""

    def write(name: str = "w.pth", swap: bool = False) -> Path:
        stem = torch.cat([torch.eye(3), torch.zeros(1, 3)])[:, :, None, None]  # 4 3 1 1
        head = torch.zeros(3, 4)
        head[[0, 2, 1] if swap else [0, 1, 2], [0, 1, 2]] = 1.0
        state = {
            "stem.weight": stem, "stem.bias": torch.ones(4), "head.weight": head, "head.bias": torch.zeros(3)
        }  # fmt: skip
        path: Path = tiny.checkpoint(tmp_path / name, 3, **state)
        return path

    return write


@pytest.fixture
def artifact(tiny: Any, weights: Callable[..., Path]) -> Path:
    path: Path = tiny.export(weights=weights(), num_classes=3).path
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    colours = dict(zip("rgb", COLOURS.values(), strict=True))
    for folder, shown in zip(COLOURS, SHOWN, strict=True):
        (root / folder).mkdir(parents=True)
        for i, letter in enumerate(shown):
            pixels = np.clip(colours[letter] + rng.integers(-20, 20, (70, 80, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i:02}.png")
    return root


def manifest(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return document


def accuracy(path: Path, data: Path | str, **request: Any) -> dict[str, Any]:
    """What one evaluation leaves as the last record."""
    api.evaluate(path, data, record=True, **request)
    record: dict[str, Any] = manifest(path)["accuracy"][-1]
    return record


# ---- what is written


def test_the_record_has_counts_a_bit_for_each_picture_and_who_they_were(artifact: Path, data: Path) -> None:
    record = accuracy(artifact, data)
    digest = record["data"].pop("sha256")
    assert len(digest) == 64
    assert record == {
        "image_size": [64, 64],
        "data": {"source": "data", "kind": "class folders", "pictures": 19, "limit": None, "seed": None},
        "top1": {"hits": 17, "total": 19},
        "top5": None,
        "hits": np.packbits(RIGHT).tobytes().hex(),
        "runtime": "ort",
        "edgevit": edgevit.__version__,
    }


def test_everything_else_stays_byte_for_byte(artifact: Path, data: Path) -> None:
    before, files = (artifact / MANIFEST).read_text(), {p: p.read_bytes() for p in artifact.rglob("*") if p.is_file()}
    accuracy(artifact, data)
    after = (artifact / MANIFEST).read_text()
    assert after.startswith(before.removesuffix("\n}\n") + ',\n  "accuracy": [')
    del files[artifact / MANIFEST]
    assert all(path.read_bytes() == content for path, content in files.items())
    assert {p for p in artifact.rglob("*") if p.is_file()} == {*files, artifact / MANIFEST}
    load_artifact(artifact)


def test_the_same_evaluation_leaves_the_same_manifest_and_no_second_record(artifact: Path, data: Path) -> None:
    accuracy(artifact, data)
    before = (artifact / MANIFEST).read_bytes()
    accuracy(artifact, data)
    assert (artifact / MANIFEST).read_bytes() == before


def test_the_document_is_the_same_with_and_without_it(cli: Any, artifact: Path, data: Path) -> None:
    plain = cli("evaluate", artifact, "--data", data, "--json").document
    told = cli("evaluate", artifact, "--data", data, "--json", "--record")
    assert told.document == plain
    assert told.message == f"recorded in {artifact / MANIFEST}"
    assert "accuracy" in manifest(artifact)


def test_without_it_nothing_is_written(artifact: Path, data: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    api.evaluate(artifact, data)
    assert (artifact / MANIFEST).read_bytes() == before


def test_against_another_only_the_first_is_recorded(artifact: Path, data: Path, copied: Callable[..., Path]) -> None:
    other = copied(artifact)
    accuracy(artifact, data, against=other)
    assert "accuracy" not in manifest(other)
    assert manifest(artifact)["accuracy"][0]["data"]["pictures"] == 19


def test_each_set_of_pictures_and_each_size_is_a_record(tiny: Any, weights: Callable[..., Path], data: Path) -> None:
    path = tiny.export(weights=weights(), num_classes=3, image_size=((64, 64), (32, 96))).path
    records = [accuracy(path, data), accuracy(path, data, limit=7), accuracy(path, data, image_size=(32, 96))]
    assert manifest(path)["accuracy"] == records
    assert [record["image_size"] for record in records] == [[64, 64], [64, 64], [32, 96]]
    assert (records[1]["data"]["limit"], records[1]["data"]["seed"], records[1]["top1"]["total"]) == (7, 0, 7)
    assert records[0]["data"]["sha256"] == records[2]["data"]["sha256"] != records[1]["data"]["sha256"]


def test_top_5_is_recorded_where_there_is_one(tiny: Any, data: Path) -> None:
    for name in ("d", "e", "f"):
        (data / name).mkdir()
    record = accuracy(tiny.export(num_classes=6).path, data)
    assert record["top5"]["total"] == 19 and record["top5"]["hits"] >= record["top1"]["hits"]


def test_pixels_of_the_reference_task_are_hashed_too(tiny: Any) -> None:
    path = tiny.export(num_classes=16).path
    record = accuracy(path, "reference-task", limit=5)
    assert record["data"]["source"] == "reference-task"
    assert accuracy(path, "reference-task", limit=5) == record


# ---- which pictures these are


def digest_of(path: Path, data: Path) -> str:
    digest: str = accuracy(path, data)["data"]["sha256"]
    return digest


def test_the_hash_tells_other_pixels_classes_and_numbers_of_pictures(artifact: Path, data: Path) -> None:
    seen = [digest_of(artifact, data)]
    red = sorted((data / "a red").iterdir())
    red[0].write_bytes(red[1].read_bytes())
    seen.append(digest_of(artifact, data))
    red[6].rename(data / "b green" / "00.0.png")  # the same order, another class
    seen.append(digest_of(artifact, data))
    red[4].unlink()
    seen.append(digest_of(artifact, data))
    assert len(set(seen)) == 4


def test_the_hash_does_not_tell_where_the_pictures_lie(artifact: Path, data: Path) -> None:
    moved = Path(shutil.copytree(data, data.parent / "elsewhere"))
    assert digest_of(artifact, moved) == digest_of(artifact, data)
    assert len(manifest(artifact)["accuracy"]) == 1 and manifest(artifact)["accuracy"][0]["data"]["source"] == "data"


def test_a_picture_that_cannot_be_read_is_not_among_them(artifact: Path, data: Path) -> None:
    whole = digest_of(artifact, data)
    (data / "a red" / "99.png").write_bytes(b"no picture")
    assert digest_of(artifact, data) == whole


# ---- what the gate makes of it


def test_the_gate_finds_the_loss_between_two_recorded_artifacts(
    tiny: Any, artifact: Path, weights: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    other = tiny.export(weights=weights("o.pth", swap=True), num_classes=3, out=tmp_path / "other").path
    api.evaluate(artifact, data, record=True)
    api.evaluate(other, data, record=True)
    first, second = load_artifact(artifact), load_artifact(other)
    check = check_manifests(first.manifest, second.manifest, Limits())[0]
    assert (check.what, check.verdict) == ("accuracy", "regression")
    document = api.evaluate(other, data, against=artifact)
    assert check.worse == pytest.approx(document["against"]["drop_points"]["value"])
    assert check.low == document["against"]["drop_points"]["low"]
    same = check_manifests(first.manifest, first.manifest, Limits())[0]
    assert (same.verdict, same.worse) == ("pass", 0.0)


# ---- what goes wrong


@pytest.fixture
def record(artifact: Path, data: Path, copied: Callable[..., Path]) -> dict[str, Any]:
    """A record of `artifact`, which has none itself."""
    return accuracy(copied(artifact, "first"), data)


def test_an_artifact_exported_anew_meanwhile_does_not_get_the_old_one_s_accuracy(
    artifact: Path, record: dict[str, Any]
) -> None:
    loaded = load_artifact(artifact)
    known = manifest(artifact)
    known["files"][0]["sha256"] = "0" * 64
    (artifact / MANIFEST).write_text(json.dumps(known))
    with pytest.raises(ArtifactError) as caught:
        record_accuracy(loaded, record)
    assert str(caught.value) == f"{artifact / MANIFEST}: exported anew while it was evaluated; evaluate it again"
    assert "accuracy" not in manifest(artifact)


def test_what_was_recorded_meanwhile_stays(artifact: Path, record: dict[str, Any]) -> None:
    loaded = load_artifact(artifact)
    other = {**record, "data": {**record["data"], "sha256": "0" * 64}}
    record_accuracy(loaded, other)
    record_accuracy(loaded, record)  # of what was loaded before the other one was there
    assert manifest(artifact)["accuracy"] == [other, record]


def test_a_place_that_is_not_writable_is_refused_before_anything_runs(
    cli: Any, artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != artifact or mode != os.W_OK)
    told = cli("evaluate", artifact, "--data", data, "--record")
    assert (told.code, told.out) == (1, "")
    why = "not writable, its accuracy cannot be recorded; change its mode, or copy it"
    assert told.err == f"edgevit: {artifact}: {why}\n"


def test_an_interrupted_write_leaves_the_old_manifest_and_nothing_beside(
    artifact: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = (artifact / MANIFEST).read_bytes(), sorted(os.listdir(artifact))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact_module.os, "fsync", full)
    with pytest.raises(OutputError) as caught:
        record_accuracy(load_artifact(artifact), record)
    assert str(caught.value) == (
        f"{artifact / MANIFEST}: no space left on the device; make its directory writable, or free space"
    )
    assert ((artifact / MANIFEST).read_bytes(), sorted(os.listdir(artifact))) == (before, names)


def test_the_mode_of_the_manifest_stays(artifact: Path, record: dict[str, Any]) -> None:
    (artifact / MANIFEST).chmod(0o604)
    record_accuracy(load_artifact(artifact), record)
    assert stat.S_IMODE((artifact / MANIFEST).stat().st_mode) == 0o604


def test_a_full_list_is_not_made_unreadable(artifact: Path, record: dict[str, Any]) -> None:
    loaded = load_artifact(artifact)
    for i in range(MAX_ACCURACIES):
        record_accuracy(loaded, {**record, "data": {**record["data"], "sha256": f"{i:064x}"}})
    with pytest.raises(OutputError, match=f"has {MAX_ACCURACIES} accuracies, no room for another"):
        record_accuracy(loaded, record)
    load_artifact(artifact)


@pytest.mark.parametrize("constant", ["NaN", "Infinity"])
def test_a_manifest_with_numbers_that_json_lacks_is_refused(
    artifact: Path, record: dict[str, Any], constant: str
) -> None:
    text = (artifact / MANIFEST).read_text()
    (artifact / MANIFEST).write_text(text.replace('"seed": 0,', f'"seed": 0, "x": {constant},', 1))
    with pytest.raises(ArtifactError, match="holds what JSON cannot; export the model again"):
        record_accuracy(load_artifact(artifact), record)


HOSTILE: list[Any] = [
    None, {}, 3, "x", [None], [[]], [{}], [{"image_size": [64, 64]}], [1] * 100,
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_an_accuracy_of_another_kind_is_no_manifest(cli: Any, artifact: Path, value: Any) -> None:
    (artifact / MANIFEST).write_text(json.dumps({**manifest(artifact), "accuracy": value}))
    told = cli("verify", artifact)
    assert told.code == 1
    assert told.message == (
        f"edgevit: {artifact / MANIFEST}: not an edgevit manifest (accuracy is of another kind); export the model again"
    )


def test_two_records_of_the_same_pictures_are_no_manifest(artifact: Path, record: dict[str, Any]) -> None:
    (artifact / MANIFEST).write_text(json.dumps({**manifest(artifact), "accuracy": [record, record]}))
    with pytest.raises(ArtifactError, match="accuracy is of another kind"):
        load_artifact(artifact)
