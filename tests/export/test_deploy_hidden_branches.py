"""branch_hidden: hidden activations in branches that fit the budget, depthwise multipliers undone."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.batchnorm import fold_batchnorm
from edgevit.export.deploy.certificate import certify
from edgevit.export.deploy.hidden_branches import (
    LANES,
    WIDE_MAP,
    BranchedBlock,
    Depthwise,
    DepthwiseBranches,
    LiteBranches,
    PointwiseBranches,
    branch_hidden,
)
from edgevit.models.mobile_former import DepthwiseFirst, MobileFormer, PointwiseFirst

pytestmark = pytest.mark.usefixtures("no_grad")

FLOAT = 4  # bytes
UNLIMITED = 10**9  # more bytes than any activation here: one branch everywhere
budgets = pytest.mark.parametrize("cache_bytes", [1, 6_000, UNLIMITED], ids=["narrowest", "some", "whole"])


def branchings(module: nn.Module) -> list[Any]:
    """The bottlenecks in branches, in order."""
    kinds = (DepthwiseBranches, PointwiseBranches, LiteBranches)
    return [m for m in module.modules() if isinstance(m, kinds)]


def held_bytes(model: nn.Module, image: Tensor) -> list[list[int]]:
    """The float32 bytes of each branch's hidden activation, bottleneck by bottleneck, as they really come out."""
    found: list[list[int]] = []
    for branching in branchings(model):
        held: list[int] = []
        for source in branching.expand if isinstance(branching, PointwiseBranches) else branching.depthwise:
            source.register_forward_hook(lambda *call, held=held: held.append(call[2].numel() * FLOAT))
        found.append(held)
    model(image)
    return found


def divisible(branching: Any) -> int:
    """Into how many equal branches an undivided bottleneck can be cut: by copies, by registers, else by channels."""
    if isinstance(branching, PointwiseBranches):
        hidden = branching.expand[0].out_channels
        return hidden // LANES if hidden % LANES == 0 else hidden
    depthwise = branching.depthwise[0]
    return len(depthwise.picks) // (depthwise.convs[0].in_channels // depthwise.tiles)


def fewest(hidden_bytes: int, parts: int, budget: int) -> int:
    """The smallest number of equal branches that fits; all parts on their own where none does."""
    return next((n for n in range(1, parts + 1) if parts % n == 0 and hidden_bytes / n <= budget), parts)


def test_network(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    """In the narrowest branches; `test_deploy_token_stream.py` runs the same networks where only some are cut."""
    model, spec = case[0], replace(case[1], cache_bytes=1)
    form = shop.prepared(branch_hidden, model, spec)
    after, certificate = shop.certified(branch_hidden, form, spec)
    assert certificate.places == len(model.features)
    assert not any(isinstance(m, PointwiseFirst | DepthwiseFirst) for m in after.modules())
    assert certificate.parameters_after == certificate.parameters_before
    assert any("1 bytes" in note for note in certificate.notes)


@pytest.mark.parametrize(
    ("batch", "cache_bytes"), [(1, 1), (1, 6_000), (1, UNLIMITED), (3, 6_000), (3, 18_000), ("dynamic", 6_000)]
)
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_branches_fit_and_are_as_few_as_can_be(shop: Any, name: str, batch: Any, cache_bytes: int) -> None:
    """The budget is for a fixed batch together, and for one picture where the batch is dynamic."""
    spec = DeploySpec(batch, 64, 96)
    form = shop.prepared(branch_hidden, shop.build(name), spec)
    whole = branch_hidden(form, replace(spec, cache_bytes=UNLIMITED))[0]
    form = shop.prepared(branch_hidden, shop.build(name), spec)
    after = branch_hidden(form, replace(spec, cache_bytes=cache_bytes))[0]
    image = shop.normal(1 if batch == "dynamic" else batch, 3, 64, 96)
    undivided, divided = held_bytes(whole, image), held_bytes(after, image)
    parts = [divisible(branching) for branching in branchings(whole)]
    assert all(len(held) == 1 for held in undivided)
    assert [len(held) for held in divided] == [
        fewest(held[0], n, cache_bytes) for held, n in zip(undivided, parts, strict=True)
    ]
    for held, total, n in zip(divided, undivided, parts, strict=True):
        assert set(held) == {total[0] // len(held)}
        assert held[0] <= cache_bytes or len(held) == n


@pytest.mark.parametrize("batch", [1, 3])
def test_the_last_byte_decides(shop: Any, batch: int) -> None:
    """An activation of exactly the budget is whole; with one byte less it is cut."""
    spec = DeploySpec(batch, 64, 96)
    form = shop.prepared(branch_hidden, shop.build("plain"), spec)
    image = shop.normal(batch, 3, 64, 96)

    def held(cache_bytes: int) -> list[list[int]]:
        return held_bytes(branch_hidden(copy.deepcopy(form), replace(spec, cache_bytes=cache_bytes))[0], image)

    widest = max(map(max, held(UNLIMITED)))
    assert all(len(branches) == 1 for branches in held(widest))
    assert any(len(branches) > 1 for branches in held(widest - 1))


@budgets
def test_every_hidden_channel_is_in_one_branch(shop: Any, cache_bytes: int) -> None:
    spec = DeploySpec(1, 64, 96, cache_bytes=cache_bytes)
    after = branch_hidden(shop.prepared(branch_hidden, shop.build("plain"), spec), spec)[0]
    blocks = [m for m in after.modules() if isinstance(m, BranchedBlock)]
    assert len(blocks) > 0
    for block in blocks:
        for picks, hyper in ((block.picks1, block.hyper1), (block.picks2, block.hyper2)):
            assert torch.equal(torch.cat(picks).sort().values, torch.arange(hyper.channels))


def test_pointwise_branches_fill_registers(shop: Any) -> None:
    spec = DeploySpec(1, 64, 96, cache_bytes=1)
    after = branch_hidden(shop.prepared(branch_hidden, shop.build("plain"), spec), spec)[0]
    found = [b for b in branchings(after) if isinstance(b, PointwiseBranches)]
    aligned = [b for b in found if sum(map(len, b.picks)) % LANES == 0]
    assert 0 < len(aligned) < len(found)
    assert all(len(picks) == LANES for b in aligned for picks in b.picks)


@pytest.mark.parametrize("name", ["grouped", "two_groups", "spatial_grouped"])
def test_grouped_bottlenecks_stay_whole(shop: Any, name: str, spec: DeploySpec) -> None:
    """Groups cut across branches; a depthwise stage takes its shuffle in, a pointwise one keeps it."""
    spec = replace(spec, pointwise="grouped", cache_bytes=1)
    form = shop.prepared(branch_hidden, shop.build(name), spec)
    after, _ = shop.certified(branch_hidden, form, spec)
    assert all(len(branching.depthwise) == 1 for branching in branchings(after))
    pointwise_first = shop.kinds(form)["PointwiseFirst"]
    head = 1
    assert shop.kinds(after)["ChannelShuffle"] == 2 * pointwise_first + head


@pytest.mark.parametrize("name", ["plain", "spatial_features"])
def test_no_budget_no_branches(shop: Any, name: str, spec: DeploySpec) -> None:
    """Every block is one branch, and a multiplier stays one convolution."""
    form = shop.prepared(branch_hidden, shop.build(name), spec)
    after, certificate, _ = certify(branch_hidden, form, spec)
    assert certificate is not None
    assert certificate.notes == ("hidden activations whole",)
    assert all(len(branching.depthwise) == 1 for branching in branchings(after))
    depthwise = [m for m in after.modules() if isinstance(m, Depthwise)]
    assert depthwise
    assert all(len(m.convs) == 1 and m.tiles == 1 for m in depthwise)


def test_clipped_slopes_come_first(shop: Any) -> None:
    spec = DeploySpec(1, 32, 32, cache_bytes=1)
    folded = fold_batchnorm(shop.build("plain"), spec)[0]
    with pytest.raises(TypeError, match="run clip_slopes first"):
        branch_hidden(folded, spec)


# ---- one depthwise stage

MAPS = {"narrow": (6, 10), "wide": (28, 28)}


@pytest.mark.parametrize("shuffled", [False, True], ids=["own order", "shuffled"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("channels", "multiplier"), [(1, 3), (8, 1), (6, 4), (5, 3)])
def test_depthwise(shop: Any, channels: int, multiplier: int, kind: str, stride: int, shuffled: bool) -> None:
    """Each branch computes its picks of the convolution; all branches together every channel once."""
    height, width = MAPS[kind]
    stage: Any = SimpleNamespace(stride=stride, positions=height * width, budget=1)
    assert (stage.positions >= WIDE_MAP) == (kind == "wide")
    conv = nn.Conv2d(channels, channels * multiplier, 3, stride, 1, groups=channels)
    x = shop.normal(2, channels, height * stride, width * stride)
    expected = shop.randomized(conv)(x)
    for step in (s for s in range(1, multiplier + 1) if multiplier % s == 0):
        branches = [Depthwise(conv, range(i, i + step), stage, shuffled=shuffled) for i in range(0, multiplier, step)]
        for branch in branches:
            assert len(branch.picks) == channels * step
            assert shop.difference(branch(x), expected[:, branch.picks]) < shop.exact
        assert torch.equal(torch.cat([b.picks for b in branches]).sort().values, torch.arange(conv.out_channels))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", MAPS)
def test_multipliers_are_undone(shop: Any, kind: str, stride: int) -> None:
    """One input channel for each output channel, except where a stride would drop most of the copies."""
    height, width = MAPS[kind]
    conv = shop.randomized(nn.Conv2d(6, 24, 3, stride, 1, groups=6))
    stage: Any = SimpleNamespace(stride=stride, positions=height * width, budget=1)
    convs = list(Depthwise(conv, range(4), stage).convs)
    true_depthwise = all(c.groups == c.in_channels == c.out_channels for c in convs)
    assert true_depthwise == ((kind, stride) != ("narrow", 2))
    assert len(convs) == (4 if kind == "wide" else 1)


def test_shuffled_order_is_the_shuffles(shop: Any) -> None:
    """Copy by copy is what the channel shuffle behind a depthwise stage makes of channel by channel."""
    stage: Any = SimpleNamespace(stride=2, positions=60, budget=1)
    conv = shop.randomized(nn.Conv2d(5, 15, 3, 2, 1, groups=5))
    picks = Depthwise(conv, range(3), stage, shuffled=True).picks
    assert picks.tolist() == torch.arange(15).view(5, 3).t().flatten().tolist()
