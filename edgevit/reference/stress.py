"""Weights that compute the same and quantise badly: a few channels of a trained network enlarged, undone right after.

Networks trained on millions of pictures have channels tens of times larger than the rest; those of a small task hardly
do. Where a channel may be enlarged by exact algebra it is here, by powers of two, which change no digit: what a scale
for a whole tensor then loses in eight bits, it would lose in a real network too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgevit.models.crossformer import PatchMerging as CrossScaleMerging
from edgevit.models.layers import GroupedBlock
from edgevit.models.mobile_former import DepthwiseFirst, PointwiseFirst
from edgevit.models.swin import PatchMerging

SHARE = 0.04  # of the channels of each place, at least one: "a few per cent", as outlier channels are in real networks
POWERS = (3, 6)  # of two: factors of 8, 16, 32 and 64


@dataclass
class Stressed:
    """How many places were met, the channels there, and how many of these were enlarged."""

    generator: torch.Generator = field(repr=False)
    places: int = 0
    channels: int = 0
    enlarged: int = 0

    def scale(self, channels: int) -> Tensor:
        """(channels,): 1 for most, a power of two for some."""
        chosen = torch.randperm(channels, generator=self.generator)[: max(round(SHARE * channels), 1)]
        powers = torch.randint(POWERS[0], POWERS[1] + 1, (len(chosen),), generator=self.generator)
        scale = torch.ones(channels)
        scale[chosen] = 2.0**powers
        self.places, self.channels, self.enlarged = (
            self.places + 1,
            self.channels + channels,
            self.enlarged + len(chosen),
        )
        return scale


@torch.no_grad()
def stress(model: nn.Module, seed: int = 0) -> Stressed:
    """Enlarge channels in place, and have what reads them undo it; which ones, `seed` says.

    Given: y = f(x), where f reads channel c of x by weights alone, or first by max(a1 x, a2 x).
    Result: what writes x puts out s x, with s > 0 for each channel, and those weights are divided by s; y is the same.
    """
    done = Stressed(torch.Generator().manual_seed(seed))
    for module in model.modules():
        if isinstance(module, GroupedBlock):
            _stress_block(module, done)
        elif isinstance(module, PatchMerging):
            _rescale(module.norm, [module.reduction], done)
        elif isinstance(module, CrossScaleMerging):
            _rescale(module.norm, list(module.reductions), done)
        elif isinstance(module, PointwiseFirst):
            _rescale_mobile(module.conv1, module.conv2, done)
            _rescale_mobile(module.conv2, module.conv3, done)
        elif isinstance(module, DepthwiseFirst):
            _rescale_mobile(module.conv1, module.conv2, done)
            _rescale_mobile(module.conv3, module.conv4, done)
    norm, heads = getattr(model, "norm", None), (getattr(model, name, None) for name in ("head", "head_dist"))
    if isinstance(norm, nn.LayerNorm):
        _rescale(norm, [head for head in heads if head is not None], done)
    return done


def _stress_block(block: GroupedBlock, done: Stressed) -> None:
    """norm1 to the projections, norm2 to the MLP, values to the output projection."""
    attn = block.attn
    scale = _rescale(block.norm2, [block.mlp.fc1], done)
    if hasattr(attn, "qkv"):
        _rescale(block.norm1, [attn.qkv], done)
        width = len(scale)
        scale = done.scale(width)
        _enlarge(attn.qkv, scale, slice(2 * width, None))
        _divide(attn.proj, scale)
        return
    scale = _rescale(block.norm1, [each for each in (attn.q, attn.k, attn.v) if each is not None], done)
    if attn.k is None:  # the keys are the input itself: s x . q = x . s q
        _enlarge(attn.q, 1 / scale)
    if attn.v is None:
        _divide(attn.proj, scale)


def _rescale_mobile(writer: nn.Sequential, reader: nn.Sequential, done: Stressed) -> None:
    """Convolution and BatchNorm, perhaps a shuffle, a dynamic ReLU, and the convolution that reads it."""
    scale = done.scale(len(writer[1].get_parameter("weight")))
    _enlarge(writer[1], scale)
    shuffle = writer[2]
    _divide(reader[0], shuffle(scale.view(1, -1, 1, 1)).flatten())


def _rescale(norm: nn.LayerNorm, readers: list[nn.Module], done: Stressed) -> Tensor:
    """A LayerNorm, and all that reads what it puts out."""
    scale = done.scale(len(norm.get_parameter("weight")))
    _enlarge(norm, scale)
    for reader in readers:
        _divide(reader, scale)
    return scale


def _enlarge(layer: nn.Module, scale: Tensor, rows: slice = slice(None)) -> None:
    """Have a layer put out channel c (of `rows`) times scale[c]; bias and gain alike."""
    for tensor in layer.parameters():
        part = tensor[rows]
        part.mul_(scale.to(part).view(-1, *[1] * (part.dim() - 1)))


def _divide(layer: nn.Module, scale: Tensor) -> None:
    """Have a Linear, or a convolution of any number of groups, divide channel c of its input by scale[c]."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.get_parameter("weight").unflatten(0, (groups, -1))  # g o i ...
    weight.div_(scale.to(weight).view(groups, 1, -1, *[1] * (weight.dim() - 3)))
