"""densify_pointwise and gather_shuffle: no ChannelShuffle is left; dense leaves no grouped pointwise either."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.batchnorm import fold_batchnorm
from edgevit.export.deploy.certificate import certify
from edgevit.export.deploy.channel_shuffle import (
    ChannelGather,
    densify_pointwise,
    gather_shuffle,
    permute_slopes,
    shuffle_order,
)
from edgevit.models.mobile_former import (
    CONFIGS,
    ChannelShuffle,
    DynamicReLU,
    MobileFormer,
    MobileFormerConfig,
    Row,
)

pytestmark = pytest.mark.usefixtures("no_grad")

LITE = Row("D", 3, 12, 2, 0)
KINDS = {  # which blocks stand behind the stem; a lite row first, as in every variant
    "lite": (LITE,),
    "lite_residual": (Row("D", 2, 8, 1, 0),),
    "pointwise_first": (LITE, Row("S", 2, 24, 1, 1)),
    "pointwise_first_residual": (LITE, Row("S", 3, 12, 1, 1)),
    "depthwise_first": (LITE, Row("D", 4, 16, 2, 3)),
    "depthwise_first_once": (LITE, Row("D", 1, 24, 2, 1)),
}
GROUPED = ["grouped", "two_groups", "spatial_grouped"]
GROUPED_MODELS = [name for name, config in CONFIGS.items() if config.groups > 1]


def shuffles(module: nn.Module) -> int:
    return sum(isinstance(m, ChannelShuffle) for m in module.modules())


def grouped_pointwise(module: nn.Module) -> int:
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return sum(m.kernel_size == (1, 1) and m.groups > 1 for m in convs)


# ---- dense


@pytest.mark.parametrize("name", GROUPED)
def test_dense_network(shop: Any, name: str, spec: DeploySpec) -> None:
    folded = shop.prepared(densify_pointwise, shop.build(name), spec)
    after, certificate = shop.certified(densify_pointwise, folded, spec)
    assert certificate.places == shuffles(folded)
    assert (shuffles(after), grouped_pointwise(after)) == (0, 0)
    assert certificate.operations_after < certificate.operations_before


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spatial", [False, True], ids=["shared", "spatial"])
def test_dense_block(shop: Any, kind: str, groups: int, spatial: bool) -> None:
    spec = DeploySpec("dynamic", 32, 64)
    config = MobileFormerConfig(8, 3, 16, 8, KINDS[kind], groups)
    model = shop.randomized(MobileFormer(config, num_classes=5, spatial_dynamic_relu=spatial))
    after, _ = shop.certified(densify_pointwise, fold_batchnorm(model, spec)[0], spec)
    assert (shuffles(after), grouped_pointwise(after)) == (0, 0)


@pytest.mark.parametrize("name", GROUPED_MODELS)
@pytest.mark.parametrize("features_only", [False, True])
def test_dense_published_network(shop: Any, name: str, features_only: bool) -> None:
    spec = DeploySpec(1, 64, 64)
    folded = fold_batchnorm(shop.build(name, features_only=features_only), spec)[0]
    after, _ = shop.certified(densify_pointwise, folded, spec)
    assert (shuffles(after), grouped_pointwise(after)) == (0, 0)


def test_dense_weights_are_the_grouped_ones_and_zeros(shop: Any) -> None:
    spec = DeploySpec(1, 32, 32)
    folded = fold_batchnorm(shop.build("grouped"), spec)[0]
    after, _, _ = certify(densify_pointwise, folded, spec)
    convs, dense = ([m for m in form.modules() if isinstance(m, nn.Conv2d)] for form in (folded, after))
    for grouped, conv in zip(convs, dense, strict=True):
        assert torch.equal(conv.weight[conv.weight != 0].sort().values, grouped.weight.flatten().sort().values)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_asked_for_is_left(shop: Any, name: str) -> None:
    spec = DeploySpec(1, 32, 32, pointwise="grouped")
    folded = fold_batchnorm(shop.build(name), spec)[0]
    after, certificate, _ = certify(densify_pointwise, folded, spec)
    assert certificate is None
    assert after is folded


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in GROUPED_MODELS])
def test_no_shuffle_no_place(name: str) -> None:
    model = MobileFormer(CONFIGS[name])
    expected = str(model)
    for rewrite in (densify_pointwise, gather_shuffle):
        after, places, _ = rewrite(model, DeploySpec(1, 32, 32))
        assert places == 0
        assert str(after) == expected


def test_dense_needs_folded_norms(shop: Any) -> None:
    with pytest.raises(ValueError, match="run fold_batchnorm first"):
        certify(densify_pointwise, shop.build("grouped"), DeploySpec(1, 32, 32))


@pytest.mark.parametrize("spatial", [False, True], ids=["shared", "spatial"])
@pytest.mark.parametrize("channels", [1, 6, 17])
def test_permuted_slopes(shop: Any, channels: int, spatial: bool) -> None:
    relu = shop.randomized(DynamicReLU(16, channels, spatial=spatial))
    x, z, scores = shop.normal(2, channels, 3, 5), shop.normal(2, 4, 16), shop.normal(2, 2, 4, 6, 10)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    expected = relu(x, z, scores)[:, order]
    permute_slopes(relu, order)
    assert shop.difference(relu(x[:, order], z, scores), expected) < shop.exact


# ---- gather


@pytest.mark.parametrize(("groups", "each"), [(1, 4), (2, 3), (3, 2), (4, 9), (12, 1), (24, 6)])
@pytest.mark.parametrize("batch", [1, 3])
def test_gather_is_the_shuffle(shop: Any, groups: int, each: int, batch: int) -> None:
    shuffle, x = ChannelShuffle(groups), shop.normal(batch, groups * each, 2, 5)
    gather = ChannelGather(shuffle_order(shuffle, groups * each))
    assert torch.equal(gather(x), shuffle(x))  # moved, not computed: equal to the bit


def test_shuffle_interleaves() -> None:
    """out[i * groups + g] = in[g * each + i], written out for 2 groups of 3."""
    x = torch.arange(6.0)[None, :, None, None]
    assert ChannelShuffle(2)(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("name", GROUPED)
def test_gather_network(shop: Any, name: str, spec: DeploySpec) -> None:
    model = shop.build(name)
    after, certificate = shop.certified(gather_shuffle, model, spec)
    assert certificate.places == shuffles(model)
    assert shuffles(after) == 0
    assert grouped_pointwise(after) == grouped_pointwise(model)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("cache_bytes", [None, 4096])
def test_gather_in_the_pipeline(shop: Any, name: str, cache_bytes: int | None, spec: DeploySpec) -> None:
    spec = replace(spec, pointwise="grouped", cache_bytes=cache_bytes)
    form = shop.prepared(gather_shuffle, shop.build(name), spec)
    after, _ = shop.certified(gather_shuffle, form, spec)
    assert shuffles(after) == 0
    assert grouped_pointwise(after) > 0


@pytest.mark.parametrize("name", GROUPED)
def test_gather_finds_nothing_behind_dense(shop: Any, name: str, spec: DeploySpec) -> None:
    form = shop.prepared(gather_shuffle, shop.build(name), spec)
    after, certificate, _ = certify(gather_shuffle, form, spec)
    assert certificate is None
    assert after is form
