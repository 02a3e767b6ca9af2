"""merge_token_stream: what reads the same tokens is one Linear, and what only the embedding decides is a constant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.bridges import channel_first_bridges
from edgevit.export.deploy.certificate import certify
from edgevit.export.deploy.dynamic_relu import HIGH, LOW, ClippedDynamicReLU
from edgevit.export.deploy.linear import stack
from edgevit.export.deploy.token_stream import Head, SlopePair, TokenStream, first_token, merge_token_stream
from edgevit.models.mobile_former import Classifier, DynamicReLU, Features, MobileFormer

pytestmark = pytest.mark.usefixtures("no_grad")

BUDGET = 6_000  # bytes: some bottlenecks of the small networks are cut, some stay whole
PRODUCTS = ("addmm", "mm", "bmm")


def ready(shop: Any, model: MobileFormer, spec: DeploySpec) -> tuple[nn.Module, DeploySpec]:
    """The form that comes to this rewrite, which needs blocks in branches, and so a budget."""
    spec = replace(spec, cache_bytes=BUDGET)
    return shop.prepared(merge_token_stream, model, spec), spec


def test_network(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    form, spec = ready(shop, *case)
    after, certificate = shop.certified(merge_token_stream, form, spec)
    assert isinstance(after, TokenStream)
    assert certificate.places == shop.kinds(form)["BranchedBlock"] > 0
    assert certificate.operations_after < certificate.operations_before
    # The bridges' output biases went into the norms and constants before them.
    assert all([name for name, _ in entry.named_parameters()] == ["weight"] for entry in after.entries)


@pytest.mark.parametrize("name", ["grouped", "two_groups", "spatial_grouped"])
def test_grouped_network(shop: Any, name: str, spec: DeploySpec) -> None:
    form, spec = ready(shop, shop.build(name), replace(spec, pointwise="grouped"))
    after, _ = shop.certified(merge_token_stream, form, spec)
    assert shop.kinds(after)["ChannelGather"] > 0


def test_matrix_products_fall(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    """Every bridge's queries join the keys and values before it, or the constants; a block's hyper networks join."""
    form, spec = ready(shop, *case)
    image = shop.normal(1 if spec.batch == "dynamic" else spec.batch, 3, spec.height, spec.width)
    with shop.recorded() as before:
        form(image)
    after, _, _ = merge_token_stream(form, spec)
    with shop.recorded() as now:
        after(image)
    joined = len(after.entries)  # queries of each bridge
    for block in after.blocks:
        joined += 1  # first layers of both hyper networks
        joined += block.slopes.paired  # their second layers
        joined += block.spatial  # their weighted sums over the tokens
    assert before.count(*PRODUCTS) - now.count(*PRODUCTS) == joined


def test_second_layers_pair_for_one_picture_only(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    form, spec = ready(shop, *case)
    hypers = [(m.hyper1, m.hyper2) for m in form.modules() if type(m).__name__ == "BranchedBlock"]
    same = [a.channels == b.channels and not a.spatial for a, b in hypers]
    after, _, _ = merge_token_stream(form, spec)
    assert [block.slopes.paired for block in after.blocks] == [s and spec.batch == 1 for s in same]


@pytest.mark.parametrize("name", ["plain", "residual", "spatial_features"])
def test_embedding_is_folded(shop: Any, name: str) -> None:
    """The first block's queries and gates are what its bridge computes from the embedding."""
    form, spec = ready(shop, shop.build(name), DeploySpec(1, 32, 32))
    first = next(m for m in form.modules() if type(m).__name__ == "BranchedBlock").local_global
    embedding = form.tokens.weight
    columns = first.queries(embedding).reshape(len(embedding), 2, 2, -1)  # t parts k c/k
    after, _, _ = merge_token_stream(form, spec)
    assert shop.kinds(after)["Embedding"] == 0
    torch.testing.assert_close(after.queries, columns[:, 0].permute(1, 2, 0)[None])
    torch.testing.assert_close(after.gates, columns[:, 1].permute(1, 2, 0)[None].clamp(0, 2))
    assert not after.queries.requires_grad and not after.gates.requires_grad


@pytest.mark.parametrize("batch", [1, 2, "dynamic"])
@pytest.mark.parametrize("name", ["features", "spatial_features"])
def test_features_keep_their_names(shop: Any, name: str, batch: Any) -> None:
    form, spec = ready(shop, shop.build(name), DeploySpec(batch, 64, 96))
    after, _, _ = merge_token_stream(form, spec)
    assert isinstance(after(shop.normal(1 if batch == "dynamic" else batch, 3, 64, 96)), Features)


@pytest.mark.parametrize("name", ["plain", "features"])
def test_other_forms_are_left(shop: Any, name: str) -> None:
    """The reference, a form without branches, and a single block."""
    spec = DeploySpec(1, 32, 32)
    model = shop.build(name)
    half = channel_first_bridges(shop.build(name), spec)[0]
    for form in (model, half, model.features):
        after, places, _ = merge_token_stream(form, spec)
        assert places == 0
        assert after is form


# ---- parts


def clipped(shop: Any, d: int, channels: int, spatial: bool, seed: int) -> ClippedDynamicReLU:
    return ClippedDynamicReLU(shop.randomized(DynamicReLU(d, channels, spatial=spatial), seed))


@pytest.mark.parametrize("one_picture", [True, False])
@pytest.mark.parametrize("spatial", [False, True], ids=["shared", "spatial"])
@pytest.mark.parametrize("channels", [(6, 6), (6, 10), (1, 1)])
def test_slope_pair(shop: Any, channels: tuple[int, int], spatial: bool, one_picture: bool) -> None:
    hypers = [clipped(shop, 16, c, spatial, seed) for seed, c in enumerate(channels)]
    pair = SlopePair(stack(*(h.hidden for h in hypers)), hypers, one_picture=one_picture)
    z = shop.normal(1 if one_picture and not spatial else 5, 16)
    slopes = pair(z)
    expected = torch.cat([h.clipped(z) for h in hypers], dim=1)[:, :, None, None]
    assert pair.paired == (one_picture and not spatial and channels[0] == channels[1])
    assert shop.difference(slopes, expected) < shop.exact


@pytest.mark.parametrize("channels", [(6, 6), (6, 10)])
def test_slope_pair_keeps_the_ranges(shop: Any, channels: tuple[int, int]) -> None:
    hypers = [clipped(shop, 16, c, False, seed) for seed, c in enumerate(channels)]
    pair = SlopePair(stack(*(h.hidden for h in hypers)), hypers, one_picture=True)
    first, second = channels
    for seed in range(5):
        slopes = pair(100 * shop.normal(1, 16, seed=seed)).flatten()  # a hundred times: most slopes are clipped
        sides = slopes.split([first, first, second, second])
        for side, low, high in zip(sides, LOW * 2, HIGH * 2, strict=True):
            assert side.min() >= low and side.max() <= high


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_head(shop: Any, groups: int, n: int) -> None:
    classifier = shop.randomized(Classifier(8, 16, 12, groups, 5, dropout=0.5))
    x, z = shop.normal(n, 8, 2, 3), shop.normal(n, 4, 16)
    head = Head(classifier)
    assert shop.kinds(head)["Dropout"] == 0
    assert shop.difference(head(x, z[:, 0]), classifier(x, z)) < shop.exact


@pytest.mark.parametrize("n", [1, 2, 5])
def test_first_token(shop: Any, n: int) -> None:
    z = shop.normal(n, 3, 8)
    assert torch.equal(first_token(z.flatten(0, 1), 3, one_picture=False), z[:, 0])
    if n == 1:
        assert torch.equal(first_token(z.flatten(0, 1), 3, one_picture=True), z[:, 0])


def test_nothing_to_merge_is_no_certificate(shop: Any) -> None:
    model, spec = shop.build("plain"), DeploySpec(1, 32, 32)
    after, certificate, _ = certify(merge_token_stream, model, spec)
    assert certificate is None
    assert after is model
