"""Mobile-Former's reference form: the official names, counts and numbers; features, training, the spatial option."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevit.models import create_model
from edgevit.models.mobile_former import (
    CARDS,
    CONFIGS,
    Features,
    MobileFormer,
    MobileFormerConfig,
    hard_sigmoid,
    hard_swish,
)

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {  # parameters, and entries of the official state_dict with BatchNorm's counters
    "mobileformer_26m": (3_232_788, 460),
    "mobileformer_52m": (3_469_092, 460),
    "mobileformer_96m": (4_585_252, 466),
    "mobileformer_151m": (7_595_828, 616),
    "mobileformer_214m": (9_425_920, 616),
    "mobileformer_294m": (11_422_648, 616),
    "mobileformer_508m": (13_976_976, 616),
}
SPATIAL = {"spatial_dynamic_relu": True}

PUBLISHED = [name for name, card in CARDS.items() if card.num_classes == 1000]  # the small network ships trained

every_model = pytest.mark.parametrize("name", PUBLISHED)
every_form = pytest.mark.parametrize("options", [{}, SPATIAL], ids=["shared", "spatial"])


def build(name: str, *, seed: int = 0, **options: Any) -> MobileFormer:
    """Straight from the table: `create_model` also hashes the weights, which costs more than these tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MobileFormer(CONFIGS[name], **options).eval()


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- names and counts


def test_every_config_has_its_counts_and_card() -> None:
    assert list(COUNTS) == PUBLISHED
    assert list(CONFIGS) == list(CARDS)


@every_model
def test_parameters_and_entries(name: str) -> None:
    """The spatial option needs no other parameters: an official checkpoint loads unchanged."""
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name][0] == CARDS[name].parameters
    assert len(model.state_dict()) == COUNTS[name][1]
    assert shapes(build(name, **SPATIAL)) == shapes(model)


@pytest.mark.parametrize("options", [{}, SPATIAL, {"features_only": True}, {"num_classes": 3}], ids=str)
def test_create_model_is_the_seeded_network_of_the_table(options: dict[str, Any]) -> None:
    name = next(iter(CONFIGS))
    expected, model = build(name, seed=3, **options), create_model(name, seed=3, **options)
    assert not model.training
    assert str(model) == str(expected)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


@every_model
def test_official_initialisation(name: str) -> None:
    model = build(name)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)) ** 0.5
            error = 4 / (2 * module.weight.numel()) ** 0.5  # four standard errors of a normal's standard deviation
            assert module.weight.std().item() == pytest.approx(expected, rel=error), key
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1), key  # >= 4096 draws: 9 standard errors
            assert not module.bias.any(), key


# ---- golden cases: what the official code computed


def golden_cases() -> dict[str, dict[str, Any]]:
    cases = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}
    return {stem: case for stem, case in cases.items() if case["model"] in CONFIGS}


CASES = golden_cases()


def golden(stem: str, fill: ModuleType) -> tuple[MobileFormer, Tensor, NDArray[np.float32]]:
    """The network with the case's weights, its images, the official logits."""
    case = CASES[stem]
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        state = {key: torch.from_numpy(value) for key, value in fill.fill_state_dict(case, arrays).items()}
        logits = arrays["logits"]
    model = build(case["model"], num_classes=logits.shape[1], **case.get("options", {}))
    model.load_state_dict(state, strict=True)
    return model, torch.from_numpy(fill.make_input(case)), logits


def test_golden_cases_cover_groups_and_spatial_slopes() -> None:
    assert any(CONFIGS[case["model"]].groups > 1 for case in CASES.values())
    assert any(CONFIGS[case["model"]].groups == 1 for case in CASES.values())
    assert any(case.get("options") == SPATIAL for case in CASES.values())


@pytest.mark.parametrize("stem", CASES)
def test_names_and_shapes_are_the_official_ones(stem: str) -> None:
    case = CASES[stem]
    model = build(case["model"], **case.get("options", {}))
    state = model.state_dict()
    ours = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert ours == case["state_dict"]


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float64, 1e-6),  # the official logits are stored in float32: 1e-6 is their last digit
        (torch.float32, 1e-4),  # rounding through twelve blocks: measured at 1e-6 to 1e-5
    ],
    ids=["float64", "float32"],
)
def test_official_logits(fill: ModuleType, stem: str, dtype: torch.dtype, limit: float) -> None:
    model, images, expected = golden(stem, fill)
    with torch.no_grad():
        logits = model.to(dtype)(images.to(dtype))
    assert logits.shape == expected.shape
    assert np.abs(logits.double().numpy() - expected.astype(np.float64)).max() <= limit


@pytest.mark.parametrize("stem", CASES)
def test_golden_logits_differ_by_picture(stem: str) -> None:
    """A network that ignored its image would match logits that do; these do not."""
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        logits = arrays["logits"]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2  # a hundred times the loosest limit above


# ---- shapes


def channels_by_stride(config: MobileFormerConfig) -> dict[int, int]:
    """The last row of each stride, read off the table."""
    stride, channels = 2, {}
    for row in config.rows:
        stride *= row.stride
        channels[stride] = row.channels
    return channels


@every_model
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 64, 96), (1, 192, 256)])
def test_features(name: str, batch: int, height: int, width: int) -> None:
    config, model = CONFIGS[name], build(name, features_only=True)
    with torch.no_grad():
        features = model(image(batch, 3, height, width))
    assert isinstance(features, Features)
    channels = channels_by_stride(config)
    expected = [(batch, channels[s], height // s, width // s) for s in (4, 8, 16, 32)]
    assert [tuple(f.shape) for f in features] == [*expected, (batch, config.tokens, config.width)]


@every_model
def test_features_are_those_of_the_whole_network(name: str) -> None:
    whole, backbone = build(name, seed=1), build(name, features_only=True)
    state, kept = whole.state_dict(), shapes(backbone)
    assert kept.items() < shapes(whole).items()
    backbone.load_state_dict({key: state[key] for key in kept})
    seen: list[tuple[Tensor, Tensor]] = []
    whole.features[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        whole(image(1, 3, 64, 64))
        features = backbone(image(1, 3, 64, 64))
    assert torch.equal(features.feature3, seen[0][0])
    assert torch.equal(features.tokens, seen[0][1])


@every_model
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 160)])
def test_logits_for_other_sizes_and_classes(name: str, height: int, width: int) -> None:
    model = build(name, num_classes=7)
    with torch.no_grad():
        assert model(image(3, 3, height, width)).shape == (3, 7)


@every_model
@every_form
def test_pictures_of_a_batch_do_not_meet(name: str, options: dict[str, Any]) -> None:
    model, images = build(name, **options), image(2, 3, 64, 64)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(one[None]) for one in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)  # float32: other kernels for another batch


@every_model
def test_spatial_slopes_change_the_output(name: str) -> None:
    shared, spatial = build(name), build(name, **SPATIAL)
    for model in (shared, spatial):
        model.load_state_dict(spread(shared.state_dict()))
    with torch.no_grad():
        out, other = shared(image(1, 3, 64, 64)), spatial(image(1, 3, 64, 64))
    assert (out - other).abs().max() > 1e-3 * out.abs().max()  # rounding would be 1e-6


def spread(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hyper networks start near zero, where every slope is a plain ReLU's: give their last layers weight."""
    gain = 50.0  # the initial 0.01 becomes 0.5
    return {key: value * (gain if "hyper.2.weight" in key else 1.0) for key, value in state.items()}


# ---- activations


def test_hard_activations_are_pytorchs() -> None:
    y = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(hard_sigmoid(y), F.hardsigmoid(y))
    torch.testing.assert_close(hard_swish(y), F.hardswish(y))


# ---- training


def training_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


@every_model
@every_form
def test_every_parameter_learns_and_one_step_lowers_the_loss(name: str, options: dict[str, Any]) -> None:
    model = build(name, num_classes=5, **options).train()
    images, labels = image(2, 3, 64, 64), torch.arange(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the official recipe's optimiser and rate
    before = training_loss(model, images, labels)
    before.backward()
    idle = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # The keys' bias moves a position's scores for all tokens alike, which the softmax over tokens takes out again.
    assert {key for key in idle if not key.endswith("global_local.k.bias")} == set()
    optimizer.step()
    assert training_loss(model, images, labels).item() < before.item() - 0.01  # of ln 5 = 1.6: not a rounding


@every_model
def test_training_updates_statistics_and_evaluation_does_not(name: str) -> None:
    model, images = build(name), image(2, 3, 32, 32)
    with torch.no_grad():
        statistics = {key: value for key, value in model.state_dict().items() if "running" in key}
        before = {key: value.clone() for key, value in statistics.items()}
        model(images)
        assert all(torch.equal(value, before[key]) for key, value in statistics.items())
        model.train()(images)
    assert not any(torch.equal(value, before[key]) for key, value in statistics.items())
