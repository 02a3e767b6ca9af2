"""masked_former: heads by mask instead of by transposes, the feed-forward bias inside the norm before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.former import MaskedFormer, masked_former, shifted_norm
from edgevit.export.deploy.linear import ResidualLinear
from edgevit.models.mobile_former import CONFIGS, FORMER_HEADS, Former, MobileFormer

pytestmark = pytest.mark.usefixtures("no_grad")

shapes = pytest.mark.parametrize(("t", "d"), [(1, 4), (3, 32), (6, 48), (4, 128), (11, 16)])


@shapes
def test_one_picture(shop: Any, t: int, d: int) -> None:
    former, z = shop.randomized(Former(d)), shop.normal(1, t, d)
    after = shop.alone(masked_former, former, batch=1)
    assert isinstance(after, MaskedFormer)
    assert shop.difference(after(z), former(z)) < shop.exact


@shapes
@pytest.mark.parametrize("batch", [2, "dynamic"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_several_pictures(shop: Any, t: int, d: int, batch: int | str, n: int) -> None:
    former, z = shop.randomized(Former(d)), shop.normal(n, t, d)
    after = shop.alone(masked_former, former, batch)
    assert shop.difference(after(z), former(z)) < shop.exact


@pytest.mark.parametrize("n", [1, 3])
def test_flat_tokens(shop: Any, n: int) -> None:
    """`update` is `forward` on (n t, d), as the merged token stream carries them."""
    z = shop.normal(n, 4, 32)
    after = shop.alone(masked_former, shop.randomized(Former(32)), "dynamic")
    assert torch.equal(after.update(z.flatten(0, 1), 4), after(z).flatten(0, 1))


def test_masks_split_the_width(shop: Any) -> None:
    mask = shop.alone(masked_former, shop.randomized(Former(32))).mask
    assert mask.shape == (FORMER_HEADS, 1, 32)
    assert torch.equal(mask.sum(0), torch.ones(1, 32, dtype=mask.dtype))
    assert torch.equal(mask.sum(2), torch.full((FORMER_HEADS, 1), 32 / FORMER_HEADS, dtype=mask.dtype))


def test_no_token_is_moved(shop: Any) -> None:
    former, z = shop.randomized(Former(32)), shop.normal(1, 3, 32)
    copies = []
    for module in (former, shop.alone(masked_former, former)):
        with shop.recorded() as recorder:
            module(z)
        copies.append(recorder.count("clone", "copy_", "_to_copy"))
    assert copies[0] > 0  # the reference does: the count sees what it should
    assert copies[1] == 0


def test_the_last_bias_went_into_the_norm(shop: Any) -> None:
    former = shop.randomized(Former(32))
    after = shop.alone(masked_former, former)
    assert [name for name, _ in after.contract.named_parameters()] == ["weight"]
    torch.testing.assert_close(after.layer_norm.bias, former.layer_norm.bias + former.ffn[2].bias)


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32)])
def test_shifted_norm(shop: Any, shape: tuple[int, ...]) -> None:
    norm, shift, x = shop.randomized(torch.nn.LayerNorm(32, eps=0.1)), shop.normal(32, seed=2), shop.normal(*shape)
    assert shop.difference(shifted_norm(norm, shift)(x), norm(x) + shift) < shop.exact


def test_residual_linear(shop: Any) -> None:
    linear, x, residual = shop.randomized(torch.nn.Linear(7, 12)), shop.normal(5, 7), shop.normal(5, 12, seed=2)
    expected = residual + linear(x) - linear.bias
    assert shop.difference(ResidualLinear(linear)(x, residual), expected) < shop.exact


def test_network(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    model, spec = case
    after, certificate = shop.certified(masked_former, model, spec)
    before, now = shop.kinds(model), shop.kinds(after)
    assert certificate.places == before["Former"] == now["MaskedFormer"] > 0
    assert now["Former"] == 0
    assert before["Linear"] - now["Linear"] == now["ResidualLinear"] == certificate.places
    assert certificate.operations_after < certificate.operations_before


def test_network_in_the_pipeline(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    model, spec = case
    form = shop.prepared(masked_former, model, spec)
    after, _ = shop.certified(masked_former, form, spec)
    assert shop.kinds(after)["Former"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_former_of_every_model(name: str) -> None:
    model = MobileFormer(CONFIGS[name])
    after, places, _ = masked_former(model, DeploySpec(1, 32, 32))
    assert places == sum(row.e2 > 0 for row in CONFIGS[name].rows)
    assert not any(isinstance(m, Former) for m in after.modules())
