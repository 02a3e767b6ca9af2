"""BatchNorm into the convolution or Linear before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .certificate import Changed, DeploySpec
from .linear import make_linear


def fold_batchnorm(model: nn.Module, spec: DeploySpec) -> Changed:
    """Fold BatchNorm statistics, which are constants in inference, into the layer that feeds them.

    Given:  Conv2d -> BatchNorm2d, or Linear -> BatchNorm1d, neighbours in one Sequential
    Result: Conv2d with bias, or Linear
    """
    places = 0
    for parent in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        layers: list[nn.Module] = []
        for layer in parent:
            before = layers[-1] if layers else None
            if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) or layer.running_mean is None:
                layers.append(layer)
            elif isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                layers[-1] = _fold_conv(before, layer)
                places += 1
            elif isinstance(layer, nn.BatchNorm1d) and isinstance(before, nn.Linear):
                scale, shift = _scale_and_shift(layer)
                layers[-1] = make_linear(before.weight * scale[:, None], _bias(before) * scale + shift)
                places += 1
            else:
                layers.append(layer)
        if len(layers) != len(parent):
            del parent[:]
            parent.extend(layers)
    return model, places, ()


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm in inference is y = scale * x + shift per channel."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("BatchNorm without running statistics is no constant")
    weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias
    scale = weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, bias - norm.running_mean * scale


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias


def _fold_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    scale, shift = _scale_and_shift(norm)
    return make_conv(conv, conv.weight * scale[:, None, None, None], _bias(conv) * scale + shift)


def make_conv(like: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> nn.Conv2d:
    """A convolution with `like`'s stride and padding: weight (out, in / groups, kh, kw), bias (out)."""
    groups = like.groups if groups is None else groups
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],  # type: ignore[arg-type]  # a torch.Size of two
        like.stride,  # type: ignore[arg-type]  # stored as a tuple of two
        like.padding,  # type: ignore[arg-type]  # stored as a tuple of two
        like.dilation,  # type: ignore[arg-type]  # stored as a tuple of two
        groups=groups,
        bias=bias is not None,
        padding_mode=like.padding_mode,
        dtype=weight.dtype,
    )
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv
