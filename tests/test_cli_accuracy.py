"""`edgevit evaluate` on a network whose answers are known: class 0 is red, 1 green, 2 blue, and so are the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import edgevit
from edgevit import api, inputs
from edgevit.api import evaluating
from edgevit.artifact import write_manifest
from edgevit.errors import RuntimeFailure
from edgevit.manifest import MANIFEST
from edgevit.shares import wilson

COLOURS = {"a red": (220, 20, 20), "b green": (20, 220, 20), "c blue": (20, 20, 220)}


def told_colours(classes: int = 3, swap: bool = False) -> dict[str, torch.Tensor]:
    """Weights that answer with the strongest colour; with `swap`, green for blue and the reverse."""
    stem = torch.cat([torch.eye(3), torch.zeros(1, 3)])[:, :, None, None]  # 4 3 1 1
    head = torch.zeros(classes, 4)
    head[[0, 2, 1] if swap else [0, 1, 2], [0, 1, 2]] = 1.0
    return {"stem.weight": stem, "stem.bias": torch.ones(4), "head.weight": head, "head.bias": torch.zeros(classes)}


@pytest.fixture
def weights(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of the network that knows colours."""

    def write(name: str = "w.pth", classes: int = 3, swap: bool = False) -> Path:
        path: Path = tiny.checkpoint(tmp_path / name, classes, **told_colours(classes, swap))
        return path

    return write


@pytest.fixture
def artifact(tiny: Any, weights: Callable[..., Path]) -> Path:
    path: Path = tiny.export(weights=weights(), num_classes=3).path
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten pictures of each colour, of which one red and two blue ones lie in the folder of green."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    folders = (["a red"] * 9, [*["b green"] * 10, "a red", *["c blue"] * 2], ["c blue"] * 8)
    for folder, shown in zip(COLOURS, folders, strict=True):
        (root / folder).mkdir(parents=True)
        for i, colour in enumerate(shown):
            pixels = np.clip(COLOURS[colour] + rng.integers(-20, 20, (70, 80, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i:02}.png")
    return root


def failure(told: Any, code: int) -> str:
    """The message of a failed command: nothing on stdout, no traceback."""
    assert told.code == code, told.err
    assert told.out == ""
    assert "Traceback" not in told.err and "internal error" not in told.err
    assert told.message.startswith("edgevit: ")
    return str(told.message.removeprefix("edgevit: "))


def seal(artifact: Path, **changes: Any) -> None:
    """Write the manifest anew, with the hashes that the files have by now and other entries."""
    manifest = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).unlink()
    write_manifest(artifact, {**manifest, **changes})


# ---- figures


def test_each_figure_is_printed_with_its_interval(cli: Any, artifact: Path, data: Path) -> None:
    told = cli("evaluate", artifact, "--data", data)
    assert told.code == 0, told.err
    assert told.out == f"{artifact}: 30 of 30 pictures of data\n  top-1      90.00 [74.38, 96.54] %\n"
    assert told.err == "evaluating: 16 of 30 pictures\n"


def test_document_has_shares_intervals_and_counts_per_class(cli: Any, artifact: Path, data: Path) -> None:
    document = cli("evaluate", artifact, "--data", data, "--json").document
    share = wilson(27, 30)
    assert document == {
        "artifact": str(artifact),
        "image_size": [64, 64],
        "precision": "fp32",
        "runtime": "ort",
        "target_runtime": "ort",
        "emulated": False,
        "random_weights": False,
        "data": {
            "source": "data",
            "kind": "class folders",
            "pictures": 30,
            "available": 30,
            "without_class": 0,
            "limit": None,
            "seed": None,
            "skipped": [],
        },
        "top1": {"value": share.value, "low": share.low, "high": share.high},
        "top5": None,
        "per_class": [
            {"class": 0, "name": "a red", "pictures": 9, "correct": 9},
            {"class": 1, "name": "b green", "pictures": 13, "correct": 10},
            {"class": 2, "name": "c blue", "pictures": 8, "correct": 8},
        ],
        "against": None,
    }


def test_top_5_stands_beside_top_1_where_there_are_more_classes(
    cli: Any, tiny: Any, weights: Callable[..., Path], data: Path
) -> None:
    path = tiny.export(weights=weights(classes=6), num_classes=6).path
    for name in ("d", "e", "f"):
        (data / name).mkdir()
    assert "\n  top-5      100.00 [88.65, 100.00] %\n" in cli("evaluate", path, "--data", data).out


@pytest.mark.parametrize("batch", [1, 4, 7, 32, "dynamic"])
@pytest.mark.parametrize("chunk", [1, 16])
def test_neither_batch_nor_chunk_changes_a_figure(
    tiny: Any, weights: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch, batch: Any, chunk: int
) -> None:
    monkeypatch.setattr(evaluating, "CHUNK", chunk)
    document = api.evaluate(tiny.export(weights=weights(), num_classes=3, batch=batch).path, data)
    assert document["top1"]["value"] == 0.9 and document["data"]["pictures"] == 30


def test_memory_holds_a_few_pictures_at_a_time(artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = evaluating._Contestant.logits

    def spy(self: Any, images: Any, classes: int) -> Any:
        seen.append(len(images))
        return logits(self, images, classes)

    monkeypatch.setattr(evaluating._Contestant, "logits", spy)
    api.evaluate(artifact, data, against="reference", weights=data.parent / "w.pth")
    assert seen == [16, 16, 14, 14]


def test_limit_takes_the_same_pictures_in_every_run(cli: Any, artifact: Path, data: Path) -> None:
    first, again = (cli("evaluate", artifact, "--data", data, "--limit", "7", "--json").document for _ in range(2))
    assert first == again
    assert (first["data"]["pictures"], first["data"]["limit"], first["data"]["seed"]) == (7, 7, 0)
    assert sum(row["pictures"] > 0 for row in first["per_class"]) > 1  # not the first class alone
    assert cli("evaluate", artifact, "--data", data, "--limit", "99", "--json").document["data"]["pictures"] == 30


def test_size_asked_for_is_the_one_evaluated(tiny: Any, weights: Callable[..., Path], data: Path) -> None:
    path = tiny.export(weights=weights(), num_classes=3, image_size=((64, 64), (32, 96))).path
    document = api.evaluate(path, data, image_size=(32, 96))
    assert document["image_size"] == [32, 96] and document["top1"]["value"] == 0.9


def test_reference_task_is_taken_by_name(cli: Any, tiny: Any) -> None:
    told = cli("evaluate", tiny.export(num_classes=16).path, "--data", "reference-task", "--limit", "24")
    assert told.code == 0, told.err
    assert "24 of 4096 pictures of reference-task\n" in told.out
    assert told.out.endswith("the weights are random: these figures mean nothing\n")


def test_another_runtime_is_named(cli: Any, artifact: Path, data: Path) -> None:
    told = cli("evaluate", artifact, "--data", data, "--runtime", "ov", "--threads", "1")
    assert told.code == 0, told.err
    assert "90.00 [74.38, 96.54] %" in told.out and told.out.endswith("computed by ov, in place of ort\n")


def test_evaluate_is_a_name_of_the_package(artifact: Path, data: Path) -> None:
    steps: list[tuple[float, str]] = []
    document = edgevit.evaluate(artifact, data, progress=lambda share, text: steps.append((share, text)))
    assert document["top1"]["value"] == 0.9
    assert steps[-1] == (1.0, "evaluating: 30 of 30 pictures")


# ---- against another


def test_loss_against_another_artifact_is_paired(
    cli: Any, tiny: Any, artifact: Path, weights: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    other = tiny.export(weights=weights("o.pth", swap=True), num_classes=3, out=tmp_path / "other").path
    told = cli("evaluate", other, "--data", data, "--against", artifact)
    assert told.code == 0, told.err
    assert told.out == (
        f"{other}: 30 of 30 pictures of data\n"
        "  top-1      36.67 [21.87, 54.49] %\n"
        f"against {artifact} (ort) on the same pictures\n"
        "  top-1      90.00 [74.38, 96.54] %\n"
        "  loss       53.33 [27.31, 70.70] points of top-1\n"
        "  agreement  33.33 [19.23, 51.22] %\n"
        "  SQNR       48.0 dB of the logits\n"  # equal on red pictures, which counts as 150 dB
    )


def test_reference_agrees_with_its_float_export(cli: Any, artifact: Path, data: Path) -> None:
    document = cli(
        "evaluate", artifact, "--data", data, "--against", "reference", "--weights", data.parent / "w.pth", "--json"
    ).document
    against = document["against"]
    assert (against["what"], against["runtime"]) == ("reference", "torch")
    assert against["top1"] == document["top1"] and against["agreement"]["value"] == 1.0
    assert against["drop_points"]["value"] == 0.0 and against["sqnr_db"] > 100


def test_reference_of_random_weights_is_rebuilt_from_their_seed(tiny: Any, data: Path) -> None:
    document = api.evaluate(tiny.export(num_classes=3, seed=11).path, data, against="reference")
    assert document["random_weights"] and document["against"]["agreement"]["value"] == 1.0


def test_reference_with_other_weights_than_the_artifact_s_is_refused(
    cli: Any, artifact: Path, weights: Callable[..., Path], data: Path
) -> None:
    request = ("evaluate", artifact, "--data", data, "--against", "reference")
    other = weights("other.pth", swap=True)
    expected = "for its reference, expected those that it was made from, 'w.pth'; name that file with --weights"
    assert failure(cli(*request), 1) == f"{artifact}: no weights {expected}"
    assert failure(cli(*request, "--weights", other), 1) == f"{artifact}: weights {other} {expected}"


@pytest.mark.parametrize(
    ("source", "given", "wanted"),
    [
        ("reference-task-stress", None, "reference-task-stress"),
        ("w.pth", None, None),
        ("reference-task", Path("mine.pth"), "mine.pth"),
    ],
)
def test_weights_that_ship_with_edgevit_are_found_by_name(
    monkeypatch: pytest.MonkeyPatch, source: str, given: Path | None, wanted: str | None
) -> None:
    from edgevit import models
    from edgevit.artifact import Artifact

    asked: list[Any] = []

    def load(name: str, weights: Any, classes: int, **_: Any) -> Any:
        asked.append((name, weights, classes))
        return SimpleNamespace(weights={"sha256": "1"}, module="the module")

    monkeypatch.setattr(models, "load_model", load)
    record = {"source": source, "sha256": "1", "entry": ""}
    manifest = {"model": "swin_tiny", "num_classes": 16, "options": {}, "seed": 0, "weights": record}
    assert evaluating._reference_module(Artifact(Path("a"), manifest), given) == "the module"
    assert asked == [("swin_tiny", wanted, 16)]
    record["sha256"] = "2"
    came = "made from other weights than the 'reference-task-stress' that ship" if "stress" in source else "for its ref"
    with pytest.raises(edgevit.EdgevitError, match=came):
        evaluating._reference_module(Artifact(Path("a"), manifest), given)


def test_artifacts_of_other_classes_are_not_compared(
    cli: Any, tiny: Any, artifact: Path, data: Path, tmp_path: Path
) -> None:
    other = tiny.export(num_classes=4, out=tmp_path / "other").path
    assert failure(cli("evaluate", artifact, "--data", data, "--against", other), 2) == (
        f"{other}: 4 classes, expected the 3 of {artifact}; compare artifacts of one task"
    )


def test_against_what_is_no_artifact_is_refused(cli: Any, artifact: Path, data: Path, tmp_path: Path) -> None:
    message = failure(cli("evaluate", artifact, "--data", data, "--against", tmp_path / "nowhere"), 1)
    assert message.startswith(f"artifact {tmp_path / 'nowhere'}: no such directory")


# ---- bad data


def test_corrupt_pictures_are_named_and_counted(cli: Any, artifact: Path, data: Path) -> None:
    for i in range(7):
        (data / "a red" / f"bad{i}.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(data / "loose.png")
    told = cli("evaluate", artifact, "--data", data)
    assert told.code == 0, told.err
    why = "not a picture that can be read, expected a JPEG, PNG, WebP, TIFF, GIF, BMP or PPM picture; convert it first"
    assert told.out == (
        f"{artifact}: 30 of 37 pictures of data\n"
        "  top-1      90.00 [74.38, 96.54] %\n"
        + "".join(f"skipped a red/bad{i}.png: {why}\n" for i in range(5))
        + "skipped in all: 7, 2 more are in --json\n"
        "left out: 1 pictures beside the folders, which have no class\n"
    )
    document = cli("evaluate", artifact, "--data", data, "--json").document
    assert document["data"]["skipped"][6] == {"name": "a red/bad6.png", "why": why}


def test_limit_is_filled_up_where_a_picture_is_corrupt(artifact: Path, data: Path) -> None:
    for path in sorted(data.rglob("*.png"))[::2]:
        path.write_bytes(b"no picture")
    document = api.evaluate(artifact, data, limit=10)
    assert document["data"]["pictures"] == 10 and 0 < len(document["data"]["skipped"]) <= 15


def test_name_of_a_picture_cannot_write_on_the_terminal(cli: Any, artifact: Path, data: Path) -> None:
    (data / "a red" / "\x1b[31m[bold]x\n.png").write_bytes(b"no picture")
    told = cli("evaluate", artifact, "--data", data)
    assert "\x1b" not in told.out and "[bold]x" in told.out


def test_all_corrupt_is_an_error(cli: Any, artifact: Path, data: Path) -> None:
    for path in data.rglob("*.png"):
        path.write_bytes(b"no picture")
    message = failure(cli("evaluate", artifact, "--data", data), 1)
    assert message.startswith(f"{data}: none of its 30 pictures can be read, the first is a red/00.png: not a picture")
    assert message.endswith("; give other pictures")


def test_empty_directory_is_an_error(cli: Any, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert failure(cli("evaluate", artifact, "--data", tmp_path / "empty"), 1) == (
        f"{tmp_path / 'empty'}: no pictures in it, expected a directory of pictures, a directory with a folder of "
        "pictures for each class, or reference-task; check the path"
    )


def test_pictures_without_classes_are_refused(cli: Any, artifact: Path) -> None:
    photos = inputs.photographs()[0].parent
    assert failure(cli("evaluate", artifact, "--data", photos), 1) == (
        f"{photos}: its 4 pictures have no class, expected a folder of pictures for each class; sort them into folders"
    )


def test_another_number_of_classes_is_refused_with_both(cli: Any, tiny: Any, data: Path) -> None:
    path = tiny.export(num_classes=10).path
    assert failure(cli("evaluate", path, "--data", data), 1) == (
        f"{data}: 3 classes (a red, b green, c blue), {path} has 10; expected the same number, in the same order: give "
        "the network's own data, or an artifact made for these"
    )
    assert "16 classes (striped disc, " in failure(cli("evaluate", path, "--data", "reference-task"), 1)


# ---- bad artifacts and requests


def test_features_are_no_classifier(cli: Any, tiny: Any, data: Path) -> None:
    path = tiny.export(features_only=True, num_classes=None).path
    assert failure(cli("evaluate", path, "--data", data), 2) == (
        f"{path}: has no logits (outputs feature0, feature1); evaluate needs a classifier"
    )


def test_manifest_that_lies_about_outputs_or_classes_is_found_out(artifact: Path, data: Path) -> None:
    seal(artifact, num_classes=4)
    (data / "d").mkdir()
    with pytest.raises(RuntimeFailure, match=r"logits \(16, 3\), expected \(16, 4\); export the model again"):
        api.evaluate(artifact, data)


def test_logits_that_are_not_finite_are_refused(cli: Any, artifact: Path, data: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(artifact / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(3, np.nan, np.float32), "head.bias"))
    onnx.save(model, artifact / "model.onnx")
    seal(artifact)
    assert failure(cli("evaluate", artifact, "--data", data), 1) == (
        f"{artifact}: logits are not finite (NaN or infinite); verify it, or its weights"
    )


@pytest.mark.parametrize("limit", ["0", "-3", "x"])
def test_limit_is_a_positive_number(cli: Any, artifact: Path, data: Path, limit: str) -> None:
    assert cli("evaluate", artifact, "--data", data, "--limit", limit).code == 2
    with pytest.raises(edgevit.EdgevitError, match="limit 0, expected 1 or more pictures"):
        api.evaluate(artifact, data, limit=0)


def test_data_must_be_named(cli: Any, artifact: Path) -> None:
    assert cli("evaluate", artifact).code == 2
