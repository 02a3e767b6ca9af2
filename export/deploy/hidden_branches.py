"""Inverted bottlenecks computed in branches of hidden channels that fit the cache; depthwise multipliers undone.

Between the convolutions of a bottleneck every hidden channel is on its own, so the hidden channels can be computed in
groups whose outputs are summed by the last convolution. A group that stays in the processor's cache is read by the
dynamic ReLU without going to memory, and a depthwise convolution with multiplier m, for which runtimes have no fast
kernel, becomes true depthwise convolutions on copies of its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgevit.models.mobile_former import DepthwiseFirst, LiteBottleneck, MobileFormer, PointwiseFirst

from .batchnorm import make_conv
from .certificate import Changed, DeploySpec
from .dynamic_relu import ClippedDynamicReLU, activate

BYTES = 4  # of a float32, the widest activation that is deployed
LANES = 16  # channels that a 512-bit register holds: depthwise kernels want multiples of it
# Positions (28x28) from which m depthwise kernels beat one kernel on m copies: 269 against 315 us at 56x56 (m 4, 24
# channels), 80 against 118 at 28x28 (m 4, 48 channels), equal at 14x14; the multiplier itself took 331, 162 and 115.
WIDE_MAP = 784

Slopes = tuple[Tensor, Tensor]  # a1 and a2 of one branch, (n, e, 1, 1) or (n, e, h, w)


def branch_hidden(model: nn.Module, spec: DeploySpec) -> Changed:
    """Split hidden channels into branches no wider than `spec.cache_bytes`, as far as a depthwise stage can be split.

    It splits by whole copies of its input: one copy may still be wider than the budget.

    Without a budget each block is one branch and depthwise multipliers stay: the same network in the same operators,
    in the form that `merge_token_stream` takes.

    Given:  after `fold_batchnorm`, `densify_pointwise` and `clip_slopes`: project(activation(expand(x)))
    Result: sum over branches i of project_i(activation_i(expand_i(x)))
    """
    if not isinstance(model, MobileFormer):
        return model, 0, ()
    batch = 1 if spec.batch == "dynamic" else spec.batch
    budget = None if spec.cache_bytes is None else spec.cache_bytes // (BYTES * batch)
    stage = _Stage(spec.height // 2, spec.width // 2, 1, budget)
    places, before = 0, 2
    for i, block in enumerate(model.features):
        stage = replace(stage, stride=model.strides[i] // before)
        if isinstance(block, LiteBottleneck) and isinstance(block.conv, nn.Sequential):
            block.conv = LiteBranches(block.conv, stage)  # type: ignore[assignment]  # same call, another module
            places += 1
        elif isinstance(block, PointwiseFirst | DepthwiseFirst):
            model.features[i] = BranchedBlock(block, stage)
            places += 1
        stage, before = stage.next(), model.strides[i]
    width = "whole" if budget is None else f"in branches for a budget of {spec.cache_bytes} bytes"
    return model, places, (f"hidden activations {width}",)


@dataclass(frozen=True)
class _Stage:
    """Where a bottleneck stands: input size, stride of its first convolution, elements that a branch may hold.

    Without a budget nothing is split.
    """

    height: int
    width: int
    stride: int
    budget: int | None

    def next(self) -> _Stage:
        return replace(self, height=self.height // self.stride, width=self.width // self.stride, stride=1)

    @property
    def positions(self) -> int:
        return self.height * self.width // self.stride**2

    def branches(self, hidden: int, units: int) -> int:
        """Smallest divisor of `units` that brings `hidden` channels under the budget, else `units`."""
        if self.budget is None:
            return 1
        fits = (c for c in range(1, units) if units % c == 0 and hidden * self.positions <= c * self.budget)
        return next(fits, units)


class Depthwise(nn.Module):
    """One branch of a depthwise stage with multiplier m: `picks` are its output channels in the reference's order.

    With `shuffled` they are copy by copy, which is the order that the shuffle after a depthwise stage makes.
    """

    def __init__(self, conv: nn.Conv2d, copies: range, stage: _Stage, *, shuffled: bool = False) -> None:
        super().__init__()
        channels = conv.in_channels
        grid = torch.arange(conv.out_channels).view(channels, -1)[:, copies.start : copies.stop]  # c, copies
        wide = stage.positions >= WIDE_MAP
        # Copying a map of which the stride drops three quarters costs more than the slow kernel.
        keep = stage.budget is None or (stage.stride > 1 and not wide)
        if len(copies) > 1 and keep and not shuffled:
            self.picks, self.tiles = grid.reshape(-1), 1
            parts = [self.picks]
        else:
            self.picks = grid.t().reshape(-1)  # copy by copy
            self.tiles = 1 if wide or stage.stride > 1 else len(copies)
            parts = list(self.picks.split(channels * self.tiles))
        groups = channels * self.tiles
        self.convs = nn.ModuleList(make_conv(conv, conv.weight[p], _bias(conv)[p], groups) for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, branch, h', w')."""
        if self.tiles > 1:
            x = torch.cat([x] * self.tiles, dim=1)
        outs = [conv(x) for conv in self.convs]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class DepthwiseBranches(nn.Module):
    """depthwise -> activation -> pointwise, summed over branches of the multiplier's copies."""

    def __init__(self, first: nn.Sequential, second: nn.Sequential, stage: _Stage) -> None:
        super().__init__()
        depthwise, pointwise = _conv(first[0]), _conv(second[0])
        multiplier = depthwise.out_channels // depthwise.in_channels
        if pointwise.groups > 1:  # its groups cut across the branches: one branch, the shuffle absorbed
            self.picks = [torch.arange(depthwise.out_channels)]
            self.depthwise = nn.ModuleList([Depthwise(depthwise, range(multiplier), stage, shuffled=True)])
            self.pointwise = nn.ModuleList([pointwise])
            return
        step = multiplier // stage.branches(depthwise.out_channels, multiplier)
        branches = [Depthwise(depthwise, range(s, s + step), stage) for s in range(0, multiplier, step)]
        self.picks = [branch.picks for branch in branches]
        self.depthwise = nn.ModuleList(branches)
        self.pointwise = nn.ModuleList(_project(pointwise, picks, first=i == 0) for i, picks in enumerate(self.picks))

    def forward(self, x: Tensor, slopes: Sequence[Slopes]) -> Tensor:
        """(n, c, h, w), one pair of slopes a branch -> (n, c_out, h', w')."""
        branches = zip(self.depthwise, self.pointwise, slopes, strict=True)
        return _total([pointwise(activate(depthwise(x), *pair)) for depthwise, pointwise, pair in branches])


class PointwiseBranches(nn.Module):
    """pointwise -> activation -> depthwise -> activation -> pointwise, summed over branches."""

    def __init__(self, block: PointwiseFirst, stage: _Stage) -> None:
        super().__init__()
        expand, depthwise, project = (_conv(chain[0]) for chain in (block.conv1, block.conv2, block.conv3))
        hidden = expand.out_channels
        if expand.groups > 1:  # its shuffle mixes the branches: one branch, as it is
            self.picks = [torch.arange(hidden)]
            self.expand, self.depthwise, self.project = (
                nn.ModuleList([chain]) for chain in (block.conv1, block.conv2, block.conv3)
            )
            return
        units = hidden // LANES if hidden % LANES == 0 else hidden
        self.picks = list(torch.arange(hidden).chunk(stage.branches(hidden, units)))
        self.expand = nn.ModuleList(make_conv(expand, expand.weight[p], _bias(expand)[p]) for p in self.picks)
        self.depthwise = nn.ModuleList(
            make_conv(depthwise, depthwise.weight[p], _bias(depthwise)[p], len(p)) for p in self.picks
        )
        self.project = nn.ModuleList(_project(project, p, first=i == 0) for i, p in enumerate(self.picks))

    def forward(self, x: Tensor, slopes1: Sequence[Slopes], slopes2: Sequence[Slopes]) -> Tensor:
        """(n, c, h, w), a pair of slopes a branch and activation -> (n, c_out, h, w)."""
        outs = []
        for i, expand in enumerate(self.expand):
            hidden = activate(expand(x), *slopes1[i])
            outs.append(self.project[i](activate(self.depthwise[i](hidden), *slopes2[i])))
        return _total(outs)


class LiteBranches(nn.Module):
    """The lite bottleneck's depthwise -> ReLU6 -> pointwise, summed over branches."""

    def __init__(self, chain: nn.Sequential, stage: _Stage) -> None:
        super().__init__()
        depthwise, self.activation, *_, pointwise = chain
        branches = DepthwiseBranches(nn.Sequential(depthwise), nn.Sequential(pointwise), stage)
        self.depthwise, self.pointwise = branches.depthwise, branches.pointwise

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c_out, h', w')."""
        branches = zip(self.depthwise, self.pointwise, strict=True)
        return _total([pointwise(self.activation(depthwise(x))) for depthwise, pointwise in branches])


class BranchedBlock(nn.Module):
    """A Mobile-Former block whose Mobile sub-block runs in branches."""

    def __init__(self, block: PointwiseFirst | DepthwiseFirst, stage: _Stage) -> None:
        super().__init__()
        self.stride = stage.stride
        self.local_global, self.global_block, self.global_local = (
            block.local_global, block.global_block, block.global_local
        )  # fmt: skip
        if isinstance(block, PointwiseFirst):
            self.residual = block.residual
            self.hyper1, self.hyper2 = _clipped(block.hyper1), _clipped(block.hyper2)
            self.bottleneck = PointwiseBranches(block, stage)
            self.picks1 = self.picks2 = self.bottleneck.picks
        else:
            self.residual = False
            self.hyper1, self.hyper2 = _clipped(block.hyper1), _clipped(block.hyper3)
            self.down = DepthwiseBranches(block.conv1, block.conv2, stage)
            self.refine = DepthwiseBranches(block.conv3, block.conv4, stage.next())
            self.picks1, self.picks2 = self.down.picks, self.refine.picks
        self.hyper1.reorder(torch.cat(self.picks1))
        self.hyper2.reorder(torch.cat(self.picks2))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, c_in, h, w), z (n, t, d) -> (n, c_out, h', w'), (n, t, d)."""
        z, scores = self.local_global(x, z)
        z = self.global_block(z)
        theta1, theta2 = (hyper.theta(z, scores, self.out_size(x)) for hyper in (self.hyper1, self.hyper2))
        x = self.mobile(x, *self.slopes(torch.cat([theta1, theta2], dim=1)))
        return self.global_local(x, z), z

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the map after this block."""
        return x.shape[2] // self.stride, x.shape[3] // self.stride

    def slopes(self, theta: Tensor) -> tuple[list[Slopes], list[Slopes]]:
        """theta (n, 2e1 + 2e2, ...), both hyper networks' outputs -> slopes by branch for both activations."""
        widths = [[len(picks) for picks in side] for side in (self.picks1, self.picks2)]
        pieces = theta.split([*widths[0] * 2, *widths[1] * 2], dim=1)
        n1, n2 = len(widths[0]), len(widths[1])
        first, second = pieces[: 2 * n1], pieces[2 * n1 :]
        return list(zip(first[:n1], first[n1:], strict=True)), list(zip(second[:n2], second[n2:], strict=True))

    def mobile(self, x: Tensor, slopes1: Sequence[Slopes], slopes2: Sequence[Slopes]) -> Tensor:
        """x (n, c_in, h, w) -> (n, c_out, h', w'), residuals included."""
        if hasattr(self, "bottleneck"):
            out: Tensor = self.bottleneck(x, slopes1, slopes2)
            return x + out if self.residual else out
        down: Tensor = self.down(x, slopes1)
        refined: Tensor = self.refine(down, slopes2)
        return down + refined


def _total(outs: list[Tensor]) -> Tensor:
    total = outs[0]
    for out in outs[1:]:
        total = total + out
    return total


def _project(conv: nn.Conv2d, picks: Tensor, *, first: bool) -> nn.Conv2d:
    """The columns of a projection that one branch feeds; the bias is added once."""
    return make_conv(conv, conv.weight[:, picks], conv.bias if first else None)


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _conv(layer: nn.Module) -> nn.Conv2d:
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"expected Conv2d, got {type(layer).__name__}")
    return layer


def _clipped(layer: nn.Module) -> ClippedDynamicReLU:
    if not isinstance(layer, ClippedDynamicReLU):
        raise TypeError(f"expected ClippedDynamicReLU, got {type(layer).__name__}: run clip_slopes first")
    return layer
