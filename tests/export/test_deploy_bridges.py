"""channel_first_bridges: projections merged, scales and gate folded, no feature map transposed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.bridges import (
    ChannelFirstFormerToMobile,
    ChannelFirstMobileToFormer,
    channel_first_bridges,
    map_heads,
    split_heads,
)
from edgevit.models.mobile_former import BRIDGE_HEADS, CONFIGS, FormerToMobile, MobileFormer, MobileToFormer

pytestmark = pytest.mark.usefixtures("no_grad")

# batch, channels, token width, tokens, map
shapes = pytest.mark.parametrize(
    ("n", "c", "d", "t", "size"),
    [
        (1, 2, 8, 1, (1, 1)),
        (1, 16, 32, 3, (7, 5)),
        (2, 12, 16, 6, (4, 6)),
        (5, 24, 48, 4, (3, 11)),
        (3, 96, 128, 3, (2, 2)),
    ],
)
MOVES = ("clone", "copy_", "_to_copy", "contiguous")  # what a transposed operand costs once it must lie in memory


@shapes
def test_mobile_to_former(shop: Any, n: int, c: int, d: int, t: int, size: tuple[int, int]) -> None:
    bridge = shop.randomized(MobileToFormer(c, d))
    after = shop.alone(channel_first_bridges, bridge)
    x, z = shop.normal(n, c, *size), shop.normal(n, t, d, seed=2)
    assert isinstance(after, ChannelFirstMobileToFormer)
    assert shop.difference(after(x, z), bridge(x, z)) < shop.exact


@shapes
def test_former_to_mobile(shop: Any, n: int, c: int, d: int, t: int, size: tuple[int, int]) -> None:
    bridge = shop.randomized(FormerToMobile(c, d))
    after = shop.alone(channel_first_bridges, bridge)
    x, z = shop.normal(n, c, *size), shop.normal(n, t, d, seed=2)
    assert isinstance(after, ChannelFirstFormerToMobile)
    assert shop.difference(after(x, z), bridge(x, z)) < shop.exact


def test_gate_reaches_both_ends(shop: Any) -> None:
    """Otherwise the clip of the gate would not have been compared."""
    bridge = shop.randomized(MobileToFormer(64, 32))
    after = shop.alone(channel_first_bridges, bridge)
    _, gate = split_heads(after.queries(shop.normal(12, 32)), 3, parts=2)
    assert (gate < 0).any() and (gate > 2).any() and ((gate > 0) & (gate < 2)).any()


def test_one_linear_for_what_reads_the_tokens(shop: Any) -> None:
    inward = shop.alone(channel_first_bridges, shop.randomized(MobileToFormer(16, 32)))
    outward = shop.alone(channel_first_bridges, shop.randomized(FormerToMobile(16, 32)))
    assert {name: m.out_features for name, m in inward.named_children() if isinstance(m, nn.Linear)} == {
        "queries": 2 * 16,
        "proj": 32,
    }
    assert {name: m.out_features for name, m in outward.named_children()} == {"keys_values": 2 * 16}


@pytest.mark.parametrize("kind", [MobileToFormer, FormerToMobile])
@pytest.mark.parametrize("n", [1, 3])
def test_no_map_is_moved(shop: Any, kind: type[nn.Module], n: int) -> None:
    c, d, t, size = 16, 32, 3, (7, 5)
    x, z = shop.normal(n, c, *size), shop.normal(n, t, d)
    bridge = shop.randomized(kind(c, d))
    moved = []
    for module in (bridge, shop.alone(channel_first_bridges, bridge)):
        with shop.recorded() as recorder:
            module(x, z)
        moved.append(recorder.count("transpose", "permute", *MOVES, elements=x.numel()))
    assert moved[0] > 0  # the reference does: the count sees what it should
    assert moved[1] == 0


def test_map_heads_is_the_same_memory(shop: Any) -> None:
    x = shop.normal(2, 8, 3, 5)
    heads = map_heads(x)
    assert heads.shape == (2, BRIDGE_HEADS, 8 // BRIDGE_HEADS, 15)
    assert heads.data_ptr() == x.data_ptr()
    assert torch.equal(heads.reshape(x.shape), x)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("n", "t"), [(1, 3), (2, 5)])
def test_split_heads(shop: Any, parts: int, n: int, t: int) -> None:
    """Part p, head k, channel c of token t stands in column (p * heads + k) * c/k + c."""
    channels = 6
    projected = shop.normal(n * t, parts * channels)
    pieces = split_heads(projected, t, parts)
    expected = projected.reshape(n, t, parts, BRIDGE_HEADS, channels // BRIDGE_HEADS)
    assert len(pieces) == parts
    for p, piece in enumerate(pieces):
        assert torch.equal(piece, expected[:, :, p].permute(0, 2, 3, 1))


def test_network(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    model, spec = case
    after, certificate = shop.certified(channel_first_bridges, model, spec)
    before, now = shop.kinds(model), shop.kinds(after)
    assert certificate.places == before["MobileToFormer"] + before["FormerToMobile"]
    assert (now["MobileToFormer"], now["FormerToMobile"]) == (0, 0)
    assert before["Linear"] - now["Linear"] == certificate.places  # each bridge has one Linear less
    assert certificate.operations_after < certificate.operations_before
    assert certificate.parameters_after == certificate.parameters_before


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_bridge_of_every_model(name: str, features_only: bool) -> None:
    model = MobileFormer(CONFIGS[name], features_only=features_only)
    token_blocks = sum(row.e2 > 0 for row in CONFIGS[name].rows)
    after, places, _ = channel_first_bridges(model, DeploySpec(1, 32, 32))
    assert places == 2 * token_blocks + (not features_only)
    assert not any(isinstance(m, MobileToFormer | FormerToMobile) for m in after.modules())
