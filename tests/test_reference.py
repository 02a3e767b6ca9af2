"""The reference task and the networks that ship trained on it: the same everywhere, as good as recorded, intact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevit.errors import CheckpointError, UsageError
from edgevit.models import create_model, load_model
from edgevit.reference import CLASSES, ranges, task, trained
from edgevit.reference.stress import stress
from edgevit.registry import family_of, model_names

TINY = [name for name in model_names() if family_of(name)[1].CARDS[name].num_classes == CLASSES]
SHIPPED = trained.models()
COARSE = (120, 160, 85, 116)  # grey of the quarters of picture 5 of the test split
COUNT = 128  # test pictures: 8 of each class; more would take longer than the margin gains
MAX_BYTES = 12_000_000  # of all shipped weights: what a wheel may carry without anyone minding

every_shipped = pytest.mark.parametrize("name", SHIPPED)


@pytest.fixture(scope="module")
def test_pictures() -> Tensor:
    """(COUNT, 3, 224, 224)."""
    return ranges.pictures("test", COUNT)


def logits(name: str, weights: str, images: Tensor) -> Tensor:
    with torch.no_grad():
        module = load_model(name, weights).module
        return torch.cat([module(part) for part in images.split(16)])  # small parts stay in the cache


# ---- the task


def test_a_picture_is_the_same_at_every_call_and_no_other_is_like_it() -> None:
    wanted = [("train", 0), ("train", 1), ("train", 16), ("calibration", 0), ("test", 0)]
    seen = [np.asarray(task.picture(*each)) for each in wanted]
    for each, pixels in zip(wanted, seen, strict=True):
        assert pixels.shape == (task.SIDE, task.SIDE, 3) and pixels.dtype == np.uint8
        assert np.array_equal(np.asarray(task.picture(*each)), pixels)
    assert len({pixels.tobytes() for pixels in seen}) == len(seen)


def test_a_picture_does_not_depend_on_the_pictures_before_it_or_on_numpy_s_global_seed() -> None:
    expected = task.picture("test", 40).tobytes()
    np.random.seed(7)  # noqa: NPY002  # what a user's program may have done
    task.picture("test", 39)
    assert task.picture("test", 40).tobytes() == expected


def test_the_pictures_are_those_that_the_networks_were_trained_on() -> None:
    """Coarse means, not bytes: the last digit of a sine is the processor's own."""
    coarse = np.asarray(task.picture("test", 5).convert("L").resize((2, 2))).ravel()
    assert coarse == pytest.approx(np.array(COARSE), abs=2)


@pytest.mark.parametrize("split", task.SPLITS)
def test_every_split_has_all_classes_equally_often(split: str) -> None:
    labels = np.bincount([task.label(split, i) for i in range(task.SPLITS[split])])
    assert len(labels) == len(task.CLASSES) == len(set(task.CLASSES)) == CLASSES
    assert labels.min() == labels.max()


def test_the_test_split_is_large_enough_for_the_recorded_accuracy() -> None:
    assert task.SPLITS["test"] >= trained.TESTED >= 2000


@pytest.mark.parametrize(
    ("split", "index", "said"),
    [
        ("tset", 0, "split 'tset' of the reference task: expected one of train, calibration, test"),
        ("test", -1, "picture -1 of the reference task: expected 0 to 4095 in test"),
        ("test", 4096, "picture 4096 of the reference task: expected 0 to 4095 in test"),
    ],
)
def test_what_is_no_picture_is_refused(split: str, index: int, said: str) -> None:
    for ask in (task.picture, task.label):
        with pytest.raises(UsageError) as caught:
            ask(split, index)
        assert str(caught.value) == said


# ---- the shipped networks


def test_each_family_s_small_network_and_26m_ship() -> None:
    assert len(TINY) == 5
    assert {family_of(name)[0] for name in TINY} == {"mobile_former", "crossformer", "vit_lsla", "swin", "vit"}
    assert sorted([*TINY, "mobileformer_26m"]) == SHIPPED


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in trained.FOLDER.iterdir()) < MAX_BYTES


@every_shipped
def test_a_record_says_how_the_weights_were_made(name: str) -> None:
    record, loaded = trained.record(name), load_model(name, trained.PLAIN)
    assert record["model"] == name and record["sha256"] == loaded.weights["sha256"]
    assert record["parameters"] == sum(p.numel() for p in loaded.module.parameters())
    assert record["top1_low"] < record["top1"] < record["top1_high"]
    assert record["pictures"] >= 2000
    assert record["command"].startswith(f"python -m edgevit.reference.train {name}")


@every_shipped
def test_a_shipped_network_is_as_good_as_recorded(name: str, test_pictures: Tensor) -> None:
    expected = trained.record(name)["top1"]
    labels = torch.tensor([task.label("test", i) for i in range(COUNT)])
    right = (logits(name, trained.PLAIN, test_pictures).argmax(1) == labels).float().mean().item()
    slack = 4 * (expected * (1 - expected) / COUNT) ** 0.5  # four standard errors
    assert abs(right - expected) < slack
    assert right > 0.5  # chance is 1/16


@pytest.mark.parametrize("name", TINY)
def test_a_small_network_comes_with_its_weights(name: str) -> None:
    for randomize in (False, True):  # exports ask for the latter
        loaded = load_model(name, randomize=randomize)
        assert loaded.weights == load_model(name, trained.PLAIN).weights
        assert (loaded.num_classes, loaded.notes) == (CLASSES, ())
    assert {"source", "sha256", "entry"} == set(loaded.weights)
    assert loaded.weights["source"] == "reference-task"


@pytest.mark.parametrize("name", TINY)
def test_another_number_of_classes_keeps_all_but_the_last_layer(name: str) -> None:
    loaded = load_model(name, num_classes=3)
    assert loaded.num_classes == 3
    assert any("16 classes in the checkpoint, 3 asked for" in note for note in loaded.notes)
    layer, shipped = family_of(name)[1].CLASSIFIER, load_model(name).module.state_dict()
    own = loaded.module.state_dict()
    assert {key for key, tensor in own.items() if not torch.equal(tensor, shipped[key])} == {
        f"{layer}.weight",
        f"{layer}.bias",
    }


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("vit_reference")])
def test_features_come_from_the_shipped_weights(name: str) -> None:
    features = create_model(name, features_only=True)
    shipped = load_model(name).module.state_dict()
    own = features.state_dict()
    assert all(torch.equal(tensor, shipped[key]) for key, tensor in own.items() if key in shipped)
    assert sum(key not in shipped for key in own) <= 8  # Swin's output norms are new
    with torch.no_grad():
        maps = features(torch.zeros(1, 3, 64, 96))
    assert [tuple(each.shape[2:]) for each in maps[:4]] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_26m_ships_weights_but_is_random_without_being_asked_for_them() -> None:
    assert load_model("mobileformer_26m").weights["source"] == "random"
    assert load_model("mobileformer_26m").num_classes == 1000
    assert load_model("mobileformer_26m", "reference-task").num_classes == CLASSES


@pytest.mark.parametrize("weights", trained.NAMES)
def test_a_network_without_shipped_weights_names_those_that_have_some(weights: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model("deit_tiny", weights)
    assert str(caught.value) == (
        f"deit_tiny: no weights of the reference task ship for it; expected one of {', '.join(SHIPPED)}"
    )


def test_a_file_of_that_name_is_still_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(trained.FOLDER / "swin_tiny.safetensors", tmp_path / "reference-task")
    monkeypatch.chdir(tmp_path)
    for weights in ("./reference-task", tmp_path / "reference-task"):
        assert load_model("swin_tiny", weights).weights == load_model("swin_tiny").weights
    with pytest.raises(UsageError):
        load_model("deit_tiny", "reference-task")


# ---- damage


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights that may be damaged."""
    folder = tmp_path / "weights"
    shutil.copytree(trained.FOLDER, folder)
    monkeypatch.setattr(trained, "FOLDER", folder)
    return folder


def test_weights_that_are_not_those_shipped_are_refused(copied: Path) -> None:
    shutil.copy(copied / "swin_tiny.safetensors", copied / "vit_lsla_tiny.safetensors")
    with pytest.raises(CheckpointError, match=r"as shipped; install edgevit again$"):
        load_model("vit_lsla_tiny")
    (copied / "swin_tiny.safetensors").write_bytes(b"\x80")
    with pytest.raises(CheckpointError):
        load_model("swin_tiny")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"sha256": 3}', "NaN", "[" * 100_000, b"\xff\xfe\x00"], ids=range(7)
)
def test_a_damaged_record_is_refused(copied: Path, content: Any) -> None:
    record = copied / "swin_tiny.json"
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        CheckpointError, match=r"damaged, expected the record of shipped weights; install edgevit again$"
    ):
        load_model("swin_tiny")


def test_a_small_network_without_its_weights_is_not_silently_random(copied: Path) -> None:
    (copied / "swin_tiny.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_model("swin_tiny")



# ---- stress


@every_shipped
def test_stressed_weights_compute_the_same(name: str, test_pictures: Tensor) -> None:
    images = test_pictures[:8]
    plain, stressed = (logits(name, weights, images) for weights in trained.NAMES)
    assert (plain - stressed).abs().max() <= 1e-3 * plain.abs().max()
    other = images[:, :, :160, :128]
    plain, stressed = (logits(name, weights, other) for weights in trained.NAMES)
    assert (plain - stressed).abs().max() <= 1e-3 * plain.abs().max()


@every_shipped
def test_stressed_weights_have_uneven_channels_where_the_plain_ones_do_not(name: str, test_pictures: Tensor) -> None:
    images = test_pictures[:16]
    plain, stressed = (
        ranges.summary(ranges.channel_spread(load_model(name, weights).module, images)) for weights in trained.NAMES
    )
    assert stressed["above_8"] >= plain["above_8"] + 5
    assert stressed["largest"] > 8


def test_which_channels_are_stressed_is_said_and_always_the_same() -> None:
    first, second = (load_model("swin_tiny", "reference-task-stress") for _ in range(2))
    assert first.weights == second.weights
    assert first.weights["source"] == "reference-task-stress" and first.weights["entry"] == "safetensors"
    assert first.weights["sha256"] != load_model("swin_tiny").weights["sha256"]
    assert first.weights["enlarged"] > 0


@pytest.mark.parametrize("options", [{"projections": "qxv"}, {"projections": "qkv"}], ids=str)
def test_every_form_of_lsla_computes_the_same_under_stress(options: dict[str, Any]) -> None:
    family = family_of("vit_lsla_tiny")[1]
    torch.manual_seed(0)
    model = family.build("vit_lsla_tiny", family.OPTIONS(**options), num_classes=4, features_only=False).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        done = stress(model, seed=3)
        after = model(images)
    assert done.places and (before - after).abs().max() <= 1e-4 * before.abs().max()
