"""LogitBias, masks_pads, folded_parameters: bias and mask as constants, one or two, without a change of the softmax."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from edgevit.export.deploy import DeploySpec, deploy, position_bias
from edgevit.export.deploy.certificate import certify
from edgevit.export.deploy.grouped_attention import GroupedAttention, group_tokens
from edgevit.export.deploy.position_bias import (
    GAP,
    MASK,
    MERGE_BYTES,
    LogitBias,
    folded_parameters,
    masks_pads,
)

pytestmark = pytest.mark.usefixtures("no_grad")

GROUPS, HEADS, MEMBERS = 4, 3, 5


def learnt(shop: Any, groups: int = 1) -> Tensor:
    """(1 or g, k, n, n), every group the same: a few units."""
    return shop.normal(1, HEADS, MEMBERS, MEMBERS, seed=2).expand(groups, -1, -1, -1).clone()


def masks(shop: Any, value: float) -> Tensor:
    """(g, 1, n, n): `value` or 0; the first group without a mask, and no query without a key."""
    hidden = shop.normal(GROUPS, 1, MEMBERS, MEMBERS, seed=3) > 0
    hidden[0] = False
    hidden[..., torch.arange(MEMBERS), torch.arange(MEMBERS)] = False
    return torch.where(hidden, value, 0.0).double()


def weights(bias: Tensor, logits: Tensor) -> Tensor:
    """What the reference computes: logits (b*g, k, n, n), bias (1 or g, k, n, n)."""
    return (logits.view(-1, *bias.shape) + bias).view_as(logits).softmax(-1)


def forms(bias: Tensor, monkeypatch: pytest.MonkeyPatch, *, one_picture: bool) -> list[LogitBias]:
    """Merged, and as two constants."""
    made = []
    for limit in (MERGE_BYTES, 0):
        monkeypatch.setattr(position_bias, "MERGE_BYTES", limit)
        made.append(LogitBias(bias.clone(), GROUPS, one_picture=one_picture))
    return made


@pytest.mark.parametrize("value", [-100.0, -1e6], ids=["Swin's", "CrossFormer's"])
@pytest.mark.parametrize("pictures", [1, 2, 5])
def test_masked_softmax(shop: Any, monkeypatch: pytest.MonkeyPatch, value: float, pictures: int) -> None:
    bias = learnt(shop) + masks(shop, value)
    logits = 3 * shop.normal(pictures * GROUPS, HEADS, MEMBERS, MEMBERS)
    for form in forms(bias, monkeypatch, one_picture=pictures == 1):
        actual = form(logits).softmax(-1)
        assert shop.difference(actual, weights(bias, logits)) < 1e-12
        hidden = (bias < -GAP).repeat(pictures, 1, 1, 1)
        assert not actual[hidden].any()
        assert actual[~hidden].all()


def test_what_is_stored(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = learnt(shop) + masks(shop, -100.0)
    merged, split = forms(bias, monkeypatch, one_picture=False)
    assert merged.mask is None and split.mask is not None
    assert merged.bias.shape == (GROUPS, HEADS, MEMBERS, MEMBERS)
    assert (split.bias.shape, split.mask.shape) == (
        (1, HEADS, MEMBERS, MEMBERS),
        (GROUPS, 1, MEMBERS, MEMBERS),
    )
    assert torch.equal(split.bias, learnt(shop))
    assert set(split.mask.unique().tolist()) == {MASK, 0.0}
    assert torch.equal(merged.bias < -GAP, bias < -GAP)
    assert torch.equal(merged.bias[bias >= -GAP], bias[bias >= -GAP])


def test_a_key_that_every_group_masks(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = learnt(shop, GROUPS)
    bias[..., 2] -= 1e6
    logits = shop.normal(GROUPS, HEADS, MEMBERS, MEMBERS)
    for form in forms(bias, monkeypatch, one_picture=True):
        assert shop.difference(form(logits).softmax(-1), weights(bias, logits)) < 1e-12


def test_one_bias_for_all_groups_is_not_split(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for pictures, one_picture in itertools.product((1, 2), (True, False)):
        for form in forms(learnt(shop), monkeypatch, one_picture=one_picture):
            logits = shop.normal(pictures * GROUPS, HEADS, MEMBERS, MEMBERS)
            assert form.mask is None
            assert torch.equal(form(logits), logits + learnt(shop))


def test_a_group_of_pads_alone_stays_finite(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its keys are masked; what it computes is thrown away, but must not be NaN."""
    bias = learnt(shop, GROUPS)
    bias[1] -= 1e6
    logits = shop.normal(GROUPS, HEADS, MEMBERS, MEMBERS)
    for form in forms(bias, monkeypatch, one_picture=True):
        actual = form(logits).softmax(-1)
        assert torch.isfinite(actual).all()
        assert shop.difference(actual[[0, 2, 3]], weights(bias, logits)[[0, 2, 3]]) < 1e-12


@pytest.mark.parametrize("name", ["swin", "crossformer", "crossformer_old_features", "lsla"])
@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_a_network_with_large_biases(shop: Any, monkeypatch: pytest.MonkeyPatch, name: str, batch: Any) -> None:
    """The same function whether bias and mask are one constant or two."""
    spec = DeploySpec(batch, 64, 96)
    model, image = shop.network(name), shop.normal(1 if batch == 1 else 3, 3, 64, 96)
    merged, _, _ = certify(group_tokens, model, spec)
    monkeypatch.setattr(position_bias, "MERGE_BYTES", 0)
    split, _ = shop.certified(group_tokens, model, spec)
    biases = [[m for m in form.modules() if isinstance(m, LogitBias)] for form in (merged, split)]
    assert not any(bias.mask is not None for bias in biases[0])
    assert any(bias.mask is not None for bias in biases[1])
    assert shop.difference(split(image), merged(image)) < shop.exact
    stored = [sum(b.numel() for form in side for b in form.buffers()) for side in biases]
    assert stored[1] < stored[0]


def test_the_limit_is_in_bytes_of_float32(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = learnt(shop) + masks(shop, -100.0)
    for limit, split in ((4 * bias.numel(), False), (4 * bias.numel() - 1, True)):
        monkeypatch.setattr(position_bias, "MERGE_BYTES", limit)
        assert (LogitBias(bias, GROUPS, one_picture=True).mask is not None) is split


# ---- learnt biases as large as masks. A constant on all keys is nothing to a softmax, and nothing holds a trained
# table near zero (Swin's is kept from weight decay), so no threshold on the value itself can tell a mask.


@pytest.mark.parametrize("offset", [-60.0, 60.0])
@pytest.mark.parametrize("masked", [False, True])
def test_an_offset_of_all_keys_changes_nothing(
    shop: Any, monkeypatch: pytest.MonkeyPatch, offset: float, masked: bool
) -> None:
    bias = learnt(shop) + offset + (masks(shop, -100.0) if masked else 0.0)
    logits = shop.normal(GROUPS, HEADS, MEMBERS, MEMBERS)
    for form in forms(bias, monkeypatch, one_picture=True):
        assert shop.difference(form(logits).softmax(-1), weights(bias, logits)) < 1e-9


@pytest.mark.parametrize("value", [-60.0, 60.0])
def test_one_head_with_a_strong_bias_leaves_the_others(
    shop: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    bias = learnt(shop, GROUPS) + masks(shop, -1e6)
    bias[:, 0, :, 1] += value  # the first head fears or loves the second token
    logits = shop.normal(GROUPS, HEADS, MEMBERS, MEMBERS)
    for form in forms(bias, monkeypatch, one_picture=True):
        assert shop.difference(form(logits).softmax(-1), weights(bias, logits)) < 1e-9


@pytest.mark.parametrize("name", ["swin", "crossformer"])
def test_a_network_whose_biases_have_an_offset_can_be_deployed(shop: Any, name: str) -> None:
    """The same network as without: each head's biases shifted by one number."""
    model, image = shop.network(name), shop.normal(1, 3, 64, 96)
    expected = model(image)
    for block in shop.blocks(model):
        if name == "swin":
            block.attn.relative_position_bias_table -= 60.0
        else:
            block.attn.pos.pos3[2].bias -= 60.0
    assert shop.difference(model(image), expected) < 1e-9  # the reference does not care
    form, _ = deploy(model.float(), DeploySpec(1, 64, 96))
    assert shop.difference(form(image.float()).double(), expected) < 1e-4  # float32


# ---- pads


def pads(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_no_bias_masks_no_pads() -> None:
    assert masks_pads(None, pads([0, 1, -1])) is False


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        ([(0, slice(None), slice(None), 2), (1, slice(None), slice(None), 0)], True),
        ([(0, slice(None), slice(None), 2)], False),  # the second group's pad is seen
        ([(0, 1, slice(None), 2), (1, slice(None), slice(None), 0)], False),  # by one head only
        ([(0, slice(None), 1, 2), (1, slice(None), slice(None), 0)], False),  # for one query only
        ([(0, slice(None), 2), (1, slice(None), 0)], False),  # the pads' queries, not their keys
        ([(slice(None), slice(None), slice(None), slice(0, 3, 2))], True),  # more than the pads
    ],
)
def test_every_pad_must_be_masked_for_every_head_and_query(masked: list[Any], expected: bool) -> None:
    bias = torch.zeros(2, HEADS, 3, 3)
    for place in masked:
        bias[place] = -1e6
    assert masks_pads(bias, pads([0, 1, -1], [-1, 2, 3])) is expected


def test_one_bias_may_mask_the_pads_of_every_group() -> None:
    bias = torch.zeros(1, HEADS, 3, 3)
    bias[..., 2] = -1e6
    assert masks_pads(bias, pads([0, 1, -1], [2, 3, -1])) is True
    assert masks_pads(bias, pads([0, 1, -1], [2, -1, 3])) is False


@pytest.mark.parametrize(
    ("name", "expected"),
    [("crossformer", True), ("crossformer_old", True), ("crossformer_old_features", True), ("swin", False)],
)
def test_which_networks_mask_their_pads(shop: Any, name: str, expected: bool) -> None:
    after, _, _ = certify(group_tokens, shop.network(name), DeploySpec(1, 64, 96))
    found = {m.pads.masked for m in after.modules() if isinstance(m, GroupedAttention) and m.pads is not None}
    assert found == {expected}


# ---- folded parameters


def test_folded_parameters_are_those_that_are_gone(shop: Any) -> None:
    for name in ("swin", "crossformer", "lsla", "lsla_plain", "vit"):
        model = shop.network(name)
        folded = sum(map(folded_parameters, shop.blocks(model)))
        after, _, _ = certify(group_tokens, model, DeploySpec(1, 64, 64))
        assert folded == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in after.parameters()), name
        assert (folded > 0) is (name != "vit")


def test_a_mask_is_nothing_in_every_type() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        mask = torch.tensor(MASK, dtype=dtype)
        assert torch.isfinite(mask)
        assert torch.exp(mask) == 0.0
