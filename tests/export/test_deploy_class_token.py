"""fold_positions and read_tokens_only: a plain transformer's positions, and a last block for what is read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from edgevit.bench.complexity import count_module
from edgevit.export.deploy import DeploySpec, deploy
from edgevit.export.deploy.certificate import certify
from edgevit.export.deploy.class_token import PrefixBlock, fold_positions, read_tokens_only
from edgevit.export.deploy.grouped_attention import TokenBlocks, group_tokens

pytestmark = pytest.mark.usefixtures("no_grad")

NAMES = ["vit", "vit_distilled"]
# Grids of the checkpoints are 2x2 (vit) and 3x3 (distilled).
SHAPES = [(1, 16, 16), (1, 64, 96), (3, 48, 48), ("dynamic", 32, 32), ("dynamic", 112, 16), (1, 224, 224)]


def prefix(name: str) -> int:
    return 2 if name == "vit_distilled" else 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_fold_positions(shop: Any, name: str, shape: tuple[Any, int, int]) -> None:
    model, spec = shop.network(name), DeploySpec(*shape)
    grid = (spec.height // 16, spec.width // 16)
    if grid == model.grid:
        assert fold_positions(model, spec) == (model, 0, ())
        return
    after, certificate = shop.certified(fold_positions, model, spec)
    side = model.grid[0]
    assert (certificate.places, certificate.notes) == (1, (f"{side}x{side} to {grid[0]}x{grid[1]} patches",))
    assert after.pos_embed.shape == (1, prefix(name) + grid[0] * grid[1], 64)
    assert torch.equal(after.pos_embed[:, : prefix(name)], model.pos_embed[:, : prefix(name)])
    change = (grid[0] * grid[1] - side * side) * 64
    assert certificate.parameters_after - certificate.parameters_before == change
    with shop.recorded() as recorder:
        after(shop.normal(1, 3, spec.height, spec.width))
    assert recorder.count("_upsample_bicubic2d_aa") == 0


def test_the_reference_resamples_in_its_forward(shop: Any) -> None:
    """The count above sees what it should."""
    with shop.recorded() as recorder:
        shop.network("vit")(shop.normal(1, 3, 64, 96))
    assert recorder.count("_upsample_bicubic2d_aa") == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_read_tokens_only(shop: Any, name: str, shape: tuple[Any, int, int]) -> None:
    spec = DeploySpec(*shape)
    form = shop.prepared(read_tokens_only, shop.network(name), spec)
    after, certificate = shop.certified(read_tokens_only, form, spec)
    assert (certificate.places, certificate.notes) == (1, ())
    assert shop.kinds(after)["PrefixBlock"] == 1
    assert isinstance(after.blocks.steps[-1], PrefixBlock)
    assert certificate.parameters_after == certificate.parameters_before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(16, 16), (64, 96), (224, 224)])
def test_what_is_not_read_is_not_computed(shop: Any, name: str, size: tuple[int, int]) -> None:
    """Queries, projection, MLP and both products of attention for all tokens but the prefix, in the last block."""
    spec, c = DeploySpec(1, *size), 64
    form = shop.prepared(read_tokens_only, shop.network(name), spec)
    tokens = prefix(name) + size[0] // 16 * (size[1] // 16)
    unread = tokens - prefix(name)
    before = count_module(form, size).macs  # the rewrite changes what it is handed
    after, _, _ = read_tokens_only(form, spec)
    assert before - count_module(after, size).macs == unread * (2 * c * c + 8 * c * c + 2 * tokens * c)


@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_every_patch_still_reaches_the_logits(shop: Any, batch: Any) -> None:
    """Keys and values come from all tokens; a change of one patch in one picture moves that picture's logits alone."""
    spec = DeploySpec(batch, 48, 64)
    form = shop.prepared(read_tokens_only, shop.network("vit"), spec)
    after, _, _ = certify(read_tokens_only, form, spec)
    n = 1 if batch == 1 else 3
    image = shop.normal(n, 3, 48, 64)
    expected = after(image)
    for row in range(3):
        for column in range(4):
            changed = image.clone()
            changed[-1, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] *= 1.5
            actual = after(changed)
            assert not torch.isclose(actual[-1], expected[-1]).any()
            assert torch.equal(actual[:-1], expected[:-1])


def test_only_after_group_tokens(shop: Any) -> None:
    model, spec = shop.network("vit"), DeploySpec(1, 32, 32)
    assert read_tokens_only(model, spec) == (model, 0, ())
    assert isinstance(group_tokens(model, spec)[0].blocks, TokenBlocks)
    assert read_tokens_only(model, spec)[1] == 1


@pytest.mark.parametrize("name", ["swin", "crossformer", "lsla"])
def test_networks_that_read_all_tokens_are_left_alone(shop: Any, name: str) -> None:
    spec = DeploySpec(1, 32, 32)
    form = shop.prepared(read_tokens_only, shop.network(name), spec)
    assert fold_positions(form, spec) == (form, 0, ())
    assert read_tokens_only(form, spec) == (form, 0, ())


@pytest.mark.parametrize("name", NAMES)
def test_the_second_of_two_deploy_forms_is_of_the_model(shop: Any, name: str) -> None:
    """A form for one size leaves nothing behind in the model that the next size would see."""
    model = shop.network(name).float()
    state = copy.deepcopy(model.state_dict())
    for size in ((64, 96), (16, 16), (48, 48)):
        form, _ = deploy(model, DeploySpec(1, *size))
        image = shop.normal(1, 3, *size).float()
        assert shop.difference(form(image), model(image)) < 1e-5  # float32
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
