"""Grouped pointwise convolutions with channel shuffles, rewritten as dense ones without a shuffle.

A shuffle is three data movements per feature map and breaks TensorRT 8.5 (NVIDIA/TensorRT#3273); a dense 1x1
convolution of the same width reads the same activations once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevit.models.mobile_former import (
    ChannelShuffle,
    Classifier,
    DepthwiseFirst,
    DynamicReLU,
    LiteBottleneck,
    MobileFormer,
    PointwiseFirst,
)

from .batchnorm import make_conv
from .certificate import Changed, DeploySpec
from .linear import make_linear


def densify_pointwise(model: nn.Module, spec: DeploySpec) -> Changed:
    """Write grouped pointwise weights as block-diagonal ones and carry each shuffle into the weights around it.

    Given:  after `fold_batchnorm`: Conv2d(1x1, groups g) and ChannelShuffle, or a depthwise Conv2d and ChannelShuffle
    Result: Conv2d(1x1, groups 1); no ChannelShuffle
    """
    if spec.pointwise != "dense" or not isinstance(model, MobileFormer):
        return model, 0, ()
    places = sum(isinstance(m, ChannelShuffle) for m in model.modules())
    if places == 0:
        return model, 0, ()
    for block in model.features:
        if isinstance(block, LiteBottleneck):
            _densify_chain(block.conv)
        elif isinstance(block, PointwiseFirst):
            for chain in (block.conv1, block.conv3):
                dense = _dense(chain[0])
                order = shuffle_order(chain[1], dense.out_channels)
                chain[0] = make_conv(dense, dense.weight[order], _bias(dense)[order])
                del chain[1]
        elif isinstance(block, DepthwiseFirst):
            _unshuffle(block.conv1, block.hyper1, block.conv2)
            _unshuffle(block.conv3, block.hyper3, block.conv4)
    if not model.features_only:
        _densify_head(model.classifier)
    return model, places, ("grouped pointwise convolutions made dense",)


def gather_shuffle(model: nn.Module, spec: DeploySpec) -> Changed:
    """Where grouped convolutions stay, a shuffle is one Gather of whole channels.

    Given:  ChannelShuffle: reshape to (n, g, c/g, h, w), transpose, reshape back
    Result: ChannelGather: x[:, order]
    """
    places = 0
    for chain in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(chain):
            if isinstance(layer, ChannelShuffle):
                before = [other for other in list(chain)[:i] if isinstance(other, nn.Conv2d)]
                after = [other for other in list(chain)[i:] if isinstance(other, nn.Conv2d)]
                channels = before[-1].out_channels if before else after[0].in_channels
                chain[i] = ChannelGather(shuffle_order(layer, channels))
                places += 1
    return model, places, ()


class ChannelGather(nn.Module):
    """A channel shuffle by index: out[i] = in[order[i]]."""

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        return x.index_select(1, self.order)


def shuffle_order(shuffle: nn.Module, channels: int) -> Tensor:
    """out[i] = in[order[i]], as the shuffle does it; the identity where there is none."""
    positions = torch.arange(channels)
    if isinstance(shuffle, ChannelShuffle):
        return positions.view(shuffle.groups, -1).t().reshape(-1)
    return positions


def _bias(conv: nn.Conv2d) -> Tensor:
    """The folded BatchNorm's shift; a rewrite that runs before folding would find none."""
    if conv.bias is None:
        raise ValueError("densify_pointwise needs folded BatchNorm: run fold_batchnorm first")
    return conv.bias


def _dense(layer: nn.Module) -> nn.Conv2d:
    """The block-diagonal convolution equal to a grouped 1x1 one."""
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"expected a pointwise Conv2d, got {type(layer).__name__}")
    blocks = layer.weight.flatten(1).chunk(layer.groups)  # g blocks of (out / g, in / g)
    return make_conv(layer, torch.block_diag(*blocks)[:, :, None, None], layer.bias, groups=1)


def _densify_chain(chain: nn.Sequential) -> None:
    """Depthwise, ReLU6, shuffle, grouped pointwise (the lite bottleneck): the shuffle goes into the columns."""
    at = next(i for i, layer in enumerate(chain) if isinstance(layer, ChannelShuffle))
    chain[at + 1] = _reorder_inputs(_dense(chain[at + 1]), chain[at])
    del chain[at]


def _densify_head(head: Classifier) -> None:
    head.conv[1] = _reorder_inputs(_dense(head.conv[1]), head.conv[0])
    head.conv[0] = nn.Identity()


def _reorder_inputs(conv: nn.Conv2d, shuffle: nn.Module) -> nn.Conv2d:
    """The convolution that reads the unshuffled channels."""
    order = shuffle_order(shuffle, conv.in_channels)
    return make_conv(conv, conv.weight[:, torch.argsort(order)], conv.bias)


def _unshuffle(depthwise: nn.Sequential, relu: DynamicReLU, pointwise: nn.Sequential) -> None:
    """Depthwise, shuffle, dynamic ReLU, grouped pointwise: the shuffle goes into the slopes' rows and the columns."""
    conv = _dense(pointwise[0])
    order = shuffle_order(depthwise[1], conv.in_channels)
    pointwise[0] = _reorder_inputs(conv, depthwise[1])
    del depthwise[1]
    permute_slopes(relu, torch.argsort(order))


def permute_slopes(relu: DynamicReLU, order: Tensor) -> None:
    """Make channel i of the dynamic ReLU the one that was order[i]; both halves of the last Linear move alike."""
    last = relu.hyper[2]
    if not isinstance(last, nn.Linear):
        raise TypeError(f"expected the hyper network's last Linear, got {type(last).__name__}")
    rows = torch.cat([order, order + order.numel()])
    relu.hyper[2] = make_linear(last.weight[rows], last.bias[rows])
