"""Dynamic ReLU slopes as one Gemm and one clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.models.mobile_former import DynamicReLU

from .certificate import Changed, DeploySpec
from .linear import make_linear

LOW = (0.0, -1.0)  # lower ends of a1 and a2: known without calibration, the quantizer reads them from here
HIGH = (2.0, 1.0)  # upper ends of a1 and a2


def clip_slopes(model: nn.Module, spec: DeploySpec) -> Changed:
    """Fold the hard sigmoid and its scalings into the hyper network's last Linear.

    Given:  s = clip(y + 3, 0, 6) / 6; a1 = 2 (s1 - 0.5) + 1; a2 = 2 (s2 - 0.5)
    Result: a1 = clip(y1 / 3 + 1, 0, 2); a2 = clip(y2 / 3, -1, 1), with y / 3 and + 1 inside the Linear
    """
    found = [
        (parent, name)
        for parent in model.modules()
        for name, m in parent.named_children()
        if isinstance(m, DynamicReLU)
    ]
    for parent, name in found:
        setattr(parent, name, ClippedDynamicReLU(getattr(parent, name)))
    return model, len(found), ("static ranges: a1 in [0, 2], a2 in [-1, 1]",)


class ClippedDynamicReLU(nn.Module):
    """max(a1 x, a2 x); slopes by clipping one Linear's output."""

    low: Tensor
    high: Tensor

    def __init__(self, relu: DynamicReLU) -> None:
        super().__init__()
        hidden, _, last = relu.hyper
        if not isinstance(hidden, nn.Linear) or not isinstance(last, nn.Linear):
            raise TypeError("expected a hyper network of Linear, ReLU, Linear")
        self.spatial = relu.spatial
        self.channels = last.out_features // 2
        self.hidden = make_linear(hidden.weight, hidden.bias)
        offset = torch.zeros_like(last.bias)
        offset[: self.channels] = 1.0
        self.slopes = make_linear(last.weight / 3, last.bias / 3 + offset)
        self.register_buffer("low", slope_limits(LOW, self.channels, last.weight))
        self.register_buffer("high", slope_limits(HIGH, self.channels, last.weight))

    def clipped(self, z: Tensor) -> Tensor:
        """z (..., d) -> slopes (..., 2e): a1 then a2."""
        return clip(self.slopes(F.relu(self.hidden(z))), self.low, self.high)

    def theta(self, z: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """z (n, t, d), scores (n, k, t, h', w') -> slopes (n, 2e, 1, 1), or (n, 2e, *size) where spatial."""
        if not self.spatial:
            return self.clipped(z[:, 0])[:, :, None, None]  # n d -> n 2e 1 1
        share = token_share(scores, size)  # n t hw
        return (self.clipped(z).transpose(1, 2) @ share).unflatten(2, size)  # n 2e t @ n t hw -> n 2e h w

    def reorder(self, order: Tensor) -> None:
        """Make channel i the one that was order[i]; a1 and a2 move alike."""
        rows = torch.cat([order, order + self.channels])
        self.slopes = make_linear(self.slopes.weight[rows], self.slopes.bias[rows])

    def forward(self, x: Tensor, z: Tensor, scores: Tensor) -> Tensor:
        """x (n, e, h, w), z (n, t, d), scores (n, k, t, h', w') -> (n, e, h, w)."""
        a1, a2 = self.theta(z, scores, (x.shape[2], x.shape[3])).split(self.channels, dim=1)
        return activate(x, a1, a2)


def activate(x: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """The dynamic ReLU itself: x (n, e, h, w), slopes (n, e, 1, 1) or (n, e, h, w)."""
    return torch.maximum(a1 * x, a2 * x)


def token_share(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention of each position over the tokens: scores (n, k, t, h', w') -> (n, t, h w)."""
    share = scores.mean(1)  # n k t h' w' -> n t h' w'
    if share.shape[-2] != size[0]:
        stride = (share.shape[-2] // size[0], share.shape[-1] // size[1])
        share = F.avg_pool2d(share, stride)  # the adaptive pool of the reference, its window known
    return share.softmax(1).flatten(2)


def clip(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip each channel to its own range."""
    return torch.minimum(torch.maximum(y, low), high)


def slope_limits(ends: tuple[float, float], channels: int, like: Tensor) -> Tensor:
    """(2e,): the same end for every a1, then for every a2."""
    return torch.cat([like.new_full((channels,), end) for end in ends])
