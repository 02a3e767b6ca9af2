"""`create_model`: which weights, how many classes, what options, and that nobody else's random numbers move."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgevit
from edgevit.errors import CheckpointError, UnknownNameError, UsageError
from edgevit.models import MAX_CLASSES, create_model, load_model, randomize_

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = "mobileformer_26m-224x224"
NAME = "mobileformer_26m"
HEAD = "classifier.classifier.1"


def picture(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def golden() -> Any:
    """The schema, arrays and stand-in weights of the golden case."""
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    assert spec is not None and spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    schema = json.loads((GOLDEN / f"{CASE}.json").read_text())
    arrays = np.load(GOLDEN / f"{CASE}.npz")
    state = {name: torch.from_numpy(np.asarray(a)) for name, a in fill.fill_state_dict(schema, arrays).items()}
    return schema, state, torch.from_numpy(fill.make_input(schema)), arrays["logits"]


@pytest.fixture(scope="module")
def official(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the paper's code writes it: a top-level `state_dict`, names with the prefix `module.`."""
    path = tmp_path_factory.mktemp("official") / "official.pth"
    state = {f"module.{name}": tensor for name, tensor in golden[1].items()}
    torch.save({"epoch": 450, "arch": "mobile_former", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare state_dict of a network that someone trained on ten classes."""
    path = tmp_path_factory.mktemp("ten") / "ten.pth"
    torch.save(load_model(NAME, num_classes=10, seed=7, randomize=True).module.state_dict(), path)
    return path


# ---- weights


def test_an_official_checkpoint_gives_the_official_logits(golden: Any, official: Path) -> None:
    _, state, images, logits = golden
    model = create_model(NAME, weights=official)
    assert same(dict(model.state_dict()), {name: state[name].to(t.dtype) for name, t in model.state_dict().items()})
    with torch.no_grad():
        assert np.abs(model(images).numpy() - logits).max() < 1e-4  # the limit in float32


def test_the_path_may_be_text(ten_classes: Path) -> None:
    assert same(
        create_model(NAME, weights=str(ten_classes)).state_dict(), create_model(NAME, weights=ten_classes).state_dict()
    )


def test_the_record_says_where_the_weights_came_from(official: Path, ten_classes: Path) -> None:
    for path, entry in ((official, "state_dict"), (ten_classes, "bare")):
        record = load_model(NAME, path).weights
        assert record == {
            "source": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "entry": entry,
        }


def test_random_weights_say_so_and_their_hash_tells_them_apart() -> None:
    first, again, other = (load_model(NAME, seed=seed).weights for seed in (1, 1, 2))
    assert (first["source"], first["seed"]) == ("random", 1)
    assert first == again
    assert first["sha256"] != other["sha256"]


def test_missing_and_unexpected_names_are_listed(official: Path, tmp_path: Path) -> None:
    state = dict(torch.load(official, weights_only=True)["state_dict"])
    gone = sorted(name for name in state if "running_mean" in name)[:12]
    for name in gone:
        del state[name]
    state["module.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError) as caught:
        create_model(NAME, weights=tmp_path / "broken.pth")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'broken.pth'}: 13 of the names or shapes do not fit the network: ")
    assert message.count(" is missing") == 10
    assert "; and 3 more; use the weights of this very model" in message


def test_weights_of_another_model_are_refused(official: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit the network"):
        create_model("mobileformer_52m", weights=official)


def test_weights_that_do_not_fit_the_option_are_refused_or_shared(official: Path) -> None:
    # the spatial option has the same parameters, so the same checkpoint fits and computes something else
    shared, spatial = (create_model(NAME, weights=official, spatial_dynamic_relu=on) for on in (False, True))
    assert same(shared.state_dict(), spatial.state_dict())
    with torch.no_grad():
        assert (shared(picture()) - spatial(picture())).abs().max() > 1e-3  # far above float32's noise


# ---- classes


def test_the_checkpoint_decides_the_number_of_classes(official: Path, ten_classes: Path) -> None:
    with warnings.catch_warnings(action="error"):
        for path, classes in ((official, 1000), (ten_classes, 10)):
            model = create_model(NAME, weights=path)
            with torch.no_grad():
                assert model(picture()).shape == (1, classes)


def test_the_checkpoint_s_own_number_asked_for_changes_nothing(ten_classes: Path) -> None:
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, weights=ten_classes, num_classes=10)
    assert same(model.state_dict(), torch.load(ten_classes, weights_only=True))


def test_another_number_replaces_the_last_layer_and_warns_the_caller(ten_classes: Path) -> None:
    with pytest.warns(UserWarning, match=f"{HEAD}: 10 classes in the checkpoint, 3 asked for") as caught:
        model = create_model(NAME, weights=ten_classes, num_classes=3)
    assert [warning.filename for warning in caught] == [__file__]
    state, trained = model.state_dict(), torch.load(ten_classes, weights_only=True)
    fresh = {f"{HEAD}.weight", f"{HEAD}.bias"}
    assert {name for name in state if not torch.equal(state[name], trained[name])} == fresh
    assert state[f"{HEAD}.weight"].shape[0] == state[f"{HEAD}.bias"].shape[0] == 3


def test_the_new_layer_is_seeded(ten_classes: Path) -> None:
    heads = [load_model(NAME, ten_classes, 3, seed=seed).module.state_dict()[f"{HEAD}.weight"] for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_without_weights_there_are_a_thousand_classes_or_those_asked_for() -> None:
    with torch.no_grad():
        assert create_model(NAME)(picture()).shape == (1, 1000)
        assert create_model(NAME, num_classes=1)(picture()).shape == (1, 1)


@pytest.mark.parametrize("classes", [0, -1, MAX_CLASSES + 1])
def test_an_impossible_number_of_classes_is_refused(classes: int) -> None:
    with pytest.raises(UsageError, match=f"^number of classes {classes}: expected 1 to {MAX_CLASSES}$"):
        create_model(NAME, num_classes=classes)


@pytest.mark.parametrize(
    "rows", [torch.tensor(1.0), torch.zeros(0, 4), torch.zeros(4)], ids=["scalar", "no rows", "flat"]
)
def test_a_classifier_of_an_impossible_shape_is_a_bad_checkpoint(tiny: Any, tmp_path: Path, rows: Tensor) -> None:
    path = tiny.checkpoint(tmp_path / "odd.pth", **{"head.weight": rows})
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        create_model("tiny", weights=path)


def test_a_checkpoint_does_not_get_more_classes_than_a_caller(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"head.weight": torch.zeros(MAX_CLASSES + 1, dtype=torch.uint8)}, path)  # 1 MB; the layer would be 5 GB
    tiny.family.built.clear()
    with pytest.raises((CheckpointError, UsageError)):
        create_model("tiny", weights=path)
    assert all(classes <= MAX_CLASSES for _, classes in tiny.family.built)


# ---- features


def test_a_classification_checkpoint_gives_a_backbone(official: Path, golden: Any) -> None:
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, weights=official, features_only=True)
    state, trained = model.state_dict(), golden[1]
    assert not any(name.startswith(("classifier.", "local_global.")) for name in state)
    assert all(torch.equal(tensor, trained[name].to(tensor.dtype)) for name, tensor in state.items())
    with torch.no_grad():
        features = model(picture(96))
    maps = {name: tuple(value.shape) for name, value in features._asdict().items()}
    assert [maps[f"feature{i}"][2:] for i in range(4)] == [(24, 24), (12, 12), (6, 6), (3, 3)]
    assert len(maps["tokens"]) == 3


def test_a_backbone_s_own_weights_load_too(official: Path, tmp_path: Path) -> None:
    state = create_model(NAME, weights=official, features_only=True).state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    assert same(create_model(NAME, weights=tmp_path / "backbone.pth", features_only=True).state_dict(), state)


# ---- options


@pytest.mark.parametrize(
    ("given", "meant"), [(True, True), ("true", True), ("True", True), (False, False), ("false", False)]
)
def test_an_option_is_a_value_or_its_text(tiny: Any, given: Any, meant: bool) -> None:  # noqa: ARG001  # registers `tiny`
    doubled, plain = (create_model("tiny", double=double) for double in (given, False))
    with torch.no_grad():
        assert torch.equal(doubled(picture()), plain(picture())) is not meant


@pytest.mark.parametrize("value", [1, 0, None, "yes", "1", "", [], 0.5])
def test_an_option_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^option spatial_dynamic_relu=.*: expected true or false$"):
        create_model(NAME, spatial_dynamic_relu=value)


def test_an_unknown_option_says_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        create_model(NAME, spatial_dynamic_rlu=True)
    assert str(caught.value) == (
        "unknown option of mobileformer_26m 'spatial_dynamic_rlu'; did you mean 'spatial_dynamic_relu'? "
        "Known: spatial_dynamic_relu"
    )


def test_an_unknown_model_says_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mobileformer_508m'"):
        create_model("mobileformer_508")


# ---- chance


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    first, again, other = (create_model(NAME, seed=seed).state_dict() for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize(
    "call", [create_model, lambda name: load_model(name, randomize=True)], ids=["created", "randomized"]
)
def test_nobody_else_s_random_numbers_move(call: Callable[[str], Any]) -> None:
    def state() -> tuple[list[int], str, object]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002  # the global state is what must not move

    torch.manual_seed(123)
    before = state()
    call(NAME)
    assert state() == before


def test_the_caller_s_seed_does_not_decide_the_weights() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(create_model(NAME).state_dict())
    assert same(*states)


def test_a_seed_beyond_64_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="seed"):
        create_model(NAME, seed=2**64)


def test_randomized_weights_leave_nothing_neutral() -> None:
    module = load_model(NAME, randomize=True).module
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.unique().numel() > tensor.numel() // 2, name  # float32 draws may coincide
            assert torch.isfinite(tensor).all(), name
            assert (tensor > 0).all() or not name.endswith("running_var"), name
    with torch.no_grad():
        logits = module(picture())
    assert 0.1 < logits.std() < 100  # neither vanished nor exploded through the depth


def test_randomizing_keeps_counters_and_draws_from_the_current_generator() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        randomize_(norm)
        states.append({name: tensor.clone() for name, tensor in norm.state_dict().items()})
    assert same(*states)
    assert states[0]["num_batches_tracked"] == 0


# ---- what comes back


def test_it_comes_in_eval_mode_trainable_and_in_float32() -> None:
    model = create_model(NAME)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_training_mode_is_the_caller_s_choice() -> None:
    model = create_model(NAME, num_classes=2).train()
    assert all(module.training for module in model.modules())
    model(torch.cat([picture(), picture() + 1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_two_models_share_no_weights(ten_classes: Path) -> None:
    one, other = (create_model(NAME, weights=ten_classes) for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in other.parameters())


def test_it_is_what_edgevit_exports() -> None:
    assert edgevit.create_model is create_model
