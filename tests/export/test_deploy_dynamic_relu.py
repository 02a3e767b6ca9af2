"""clip_slopes: the slopes are one Linear and one clip, within [0, 2] and [-1, 1]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.dynamic_relu import HIGH, LOW, ClippedDynamicReLU, clip_slopes, token_share
from edgevit.models.mobile_former import CONFIGS, DynamicReLU, MobileFormer

pytestmark = pytest.mark.usefixtures("no_grad")

both = pytest.mark.parametrize("spatial", [False, True], ids=["shared", "spatial"])
# batch, channels, tokens, token width, map, how much larger the map is that the scores belong to
blocks = pytest.mark.parametrize(
    ("n", "e", "t", "d", "size", "stride"),
    [(1, 1, 1, 4, (1, 1), 1), (1, 24, 3, 32, (4, 6), 1), (3, 7, 6, 16, (5, 2), 2), (2, 40, 4, 48, (2, 3), 2)],
)


def build(shop: Any, e: int, d: int, spatial: bool) -> tuple[DynamicReLU, ClippedDynamicReLU]:
    relu = shop.randomized(DynamicReLU(d, e, spatial=spatial))
    clipped = shop.alone(clip_slopes, relu)
    assert isinstance(clipped, ClippedDynamicReLU)
    return relu, clipped


def inputs(shop: Any, n: int, e: int, t: int, d: int, size: tuple[int, int], stride: int) -> tuple[Any, Any, Any]:
    scores = shop.normal(n, 2, t, size[0] * stride, size[1] * stride, seed=3)
    return shop.normal(n, e, *size), shop.normal(n, t, d, seed=2), scores


@both
@blocks
def test_block(shop: Any, n: int, e: int, t: int, d: int, size: tuple[int, int], stride: int, spatial: bool) -> None:
    relu, clipped = build(shop, e, d, spatial)
    x, z, scores = inputs(shop, n, e, t, d, size, stride)
    assert shop.difference(clipped(x, z, scores), relu(x, z, scores)) < shop.exact


@both
@blocks
def test_slopes_keep_their_ranges(
    shop: Any, n: int, e: int, t: int, d: int, size: tuple[int, int], stride: int, spatial: bool
) -> None:
    _, clipped = build(shop, e, d, spatial)
    _, z, scores = inputs(shop, n, e, t, d, size, stride)
    a1, a2 = clipped.theta(100 * z, scores, size).split(e, dim=1)  # a hundred times: most slopes are clipped
    rounding = 1e-12  # where spatial, the shares of the tokens sum to one but for rounding
    assert LOW == (0.0, -1.0) and HIGH == (2.0, 1.0)
    assert a1.min() >= LOW[0] - rounding and a1.max() <= HIGH[0] + rounding
    assert a2.min() >= LOW[1] - rounding and a2.max() <= HIGH[1] + rounding


@both
def test_both_ends_and_the_middle_are_compared(shop: Any, spatial: bool) -> None:
    _, clipped = build(shop, 200, 32, spatial)
    a1, a2 = clipped.clipped(shop.normal(4, 32)).split(200, dim=1)
    for slopes, low, high in ((a1, LOW[0], HIGH[0]), (a2, LOW[1], HIGH[1])):
        assert (slopes == low).any() and (slopes == high).any() and ((slopes > low) & (slopes < high)).any()


@both
def test_reorder_moves_both_slopes(shop: Any, spatial: bool) -> None:
    relu, clipped = build(shop, 11, 16, spatial)
    x, z, scores = inputs(shop, 2, 11, 4, 16, (3, 4), 2)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    clipped.reorder(order)
    assert shop.difference(clipped(x[:, order], z, scores), relu(x, z, scores)[:, order]) < shop.exact


@pytest.mark.parametrize("size", [(2, 3), (4, 6), (8, 12), (4, 12)])
def test_token_share_is_the_references_pool(shop: Any, size: tuple[int, int]) -> None:
    scores = shop.normal(2, 2, 3, 8, 12)
    expected = F.adaptive_avg_pool2d(scores.mean(1), size).softmax(1).flatten(2)
    share = token_share(scores, size)
    assert shop.difference(share, expected) < shop.exact
    torch.testing.assert_close(share.sum(1), torch.ones_like(share[:, 0]))


def test_network(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    model, spec = case
    after, certificate = shop.certified(clip_slopes, model, spec)
    before = shop.kinds(model)["DynamicReLU"]
    assert certificate.places == before > 0
    assert (shop.kinds(after)["DynamicReLU"], shop.kinds(after)["ClippedDynamicReLU"]) == (0, before)
    assert certificate.operations_after < certificate.operations_before
    assert any("[0, 2]" in note and "[-1, 1]" in note for note in certificate.notes)


@both
@pytest.mark.parametrize("name", CONFIGS)
def test_every_slope_of_every_model(name: str, spatial: bool) -> None:
    model = MobileFormer(CONFIGS[name], spatial_dynamic_relu=spatial)
    token_blocks = sum(row.e2 > 0 for row in CONFIGS[name].rows)
    after, places, _ = clip_slopes(model, DeploySpec(1, 32, 32))
    assert places == 2 * token_blocks
    assert not any(isinstance(m, DynamicReLU) for m in after.modules())
