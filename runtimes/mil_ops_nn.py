"""Operators of a Core ML program that make products or statistics: convolution, linear, attention, pooling, norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .mil_ops import Operands, Operator, by_channel

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padding(
    a: Operands, default: str, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """What is added before and after each axis of `size`; `kernel` is as wide as its dilation makes it."""
    kind = a.text("pad_type", default)
    if kind == "custom":
        widths = a.ints("pad", [0] * 2 * len(size))
        return list(zip(widths[::2], widths[1::2], strict=True))
    if kind == "valid":
        return [(0, 0)] * len(size)
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type {kind}")
    totals = [max(0, (math.ceil(d / s) - 1) * s + k - d) for d, k, s in zip(size, kernel, strides, strict=True)]
    small = [(total // 2, total - total // 2) for total in totals]
    return small if kind == "same" else [(after, before) for before, after in small]


def padded(x: Tensor, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """x (n, c, ...) with its spatial axes padded, or cut where a width is below zero."""
    flat = [width for pair in reversed(widths) for width in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def conv(a: Operands) -> Tensor:
    """x (n, c, ...), weight (k, c / groups, ...) -> (n, k, ...)."""
    x, weight = a["x"], a["weight"]
    axes = x.dim() - 2
    strides, dilations = a.ints("strides", [1] * axes), a.ints("dilations", [1] * axes)
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    widths = padding(a, "valid", x.shape[2:], kernel, strides)
    groups, bias = a.whole("groups", 1), a.maybe("bias")
    if all(before == after for before, after in widths):
        return CONVOLUTIONS[axes](x, weight, bias, strides, [before for before, _ in widths], dilations, groups)
    return CONVOLUTIONS[axes](padded(x, widths), weight, bias, strides, 0, dilations, groups)


def conv_transpose(a: Operands) -> Tensor:
    """x (n, c, ...), weight (c, k / groups, ...) -> (n, k, ...): the whole result, cut to the padding asked for."""
    x, weight = a["x"], a["weight"]
    axes = x.dim() - 2
    strides, dilations = a.ints("strides", [1] * axes), a.ints("dilations", [1] * axes)
    whole = TRANSPOSED[axes](x, weight, None, strides, 0, 0, a.whole("groups", 1), dilations)
    sizes, widths = whole.shape[2:], [(0, 0)] * axes
    if a.text("pad_type", "valid") == "same":
        surplus = [size - d * s for size, d, s in zip(sizes, x.shape[2:], strides, strict=True)]
        widths = [(extra // 2, extra - extra // 2) for extra in surplus]
    elif a.text("pad_type", "valid") == "custom":
        flat = a.ints("pad", [0] * 2 * axes)
        widths = list(zip(flat[::2], flat[1::2], strict=True))
    wanted = a.ints("output_shape", [0] * 2 + [n - b - e for n, (b, e) in zip(sizes, widths, strict=True)])[2:]
    cut = [(-before, length - size + before) for length, size, (before, _) in zip(wanted, sizes, widths, strict=True)]
    bias = a.maybe("bias")
    result = padded(whole, cut)
    return result if bias is None else result + by_channel(bias, result.dim())


def linear(a: Operands) -> Tensor:
    """x (..., k), weight (n, k) -> (..., n)."""
    return F.linear(a["x"], a["weight"], a.maybe("bias"))


def matmul(a: Operands) -> Tensor:
    """x (..., m, k), y (..., k, n) -> (..., m, n), either of them stored transposed."""
    x, y = a["x"], a["y"]
    x = x.transpose(-1, -2) if a.flag("transpose_x") and x.dim() > 1 else x
    y = y.transpose(-1, -2) if a.flag("transpose_y") and y.dim() > 1 else y
    return x @ y


def attention(a: Operands) -> Tensor:
    """query (..., l, e), key (..., s, e), value (..., s, v) -> (..., l, v); a boolean mask keeps where it is true."""
    query, key, value, mask = a["query"], a["key"], a["value"], a.maybe("attn_mask")
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # ... l s
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1) @ value


def windows(a: Operands) -> tuple[list[int], list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Of a pooling: kernel, strides, padding, and the padding with what `ceil_mode` adds at the end."""
    size, kernel = a["x"].shape[2:], a.ints("kernel_sizes")
    strides = a.ints("strides", [1] * len(kernel))
    widths = padding(a, "valid", size, kernel, strides)
    if not a.flag("ceil_mode"):
        return kernel, strides, widths, widths
    longer = []
    for length, k, s, (before, after) in zip(size, kernel, strides, widths, strict=True):
        number = math.ceil((length + before + after - k) / s) + 1
        number -= (number - 1) * s >= length + before  # a window that would begin in the padding is dropped
        longer.append((before, after + max(0, (number - 1) * s + k - length - before - after)))
    return kernel, strides, widths, longer


def sums(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    """The sum of each window of x (n, c, ...)."""
    axes = tuple(range(2, x.dim()))
    for axis, k, s in zip(axes, kernel, strides, strict=True):
        x = x.unfold(axis, k, s).sum(-1)
    return x


def avg_pool(a: Operands) -> Tensor:
    """The mean of each window; padding counts unless it is excluded, and what `ceil_mode` adds never does."""
    x = a["x"]
    kernel, strides, widths, longer = windows(a)
    counted, beyond = torch.ones(1, 1, *x.shape[2:]), longer
    if not a.flag("exclude_padding_from_average"):
        counted = padded(counted, widths, 1.0)
        beyond = [(0, more - after) for (_, after), (_, more) in zip(widths, longer, strict=True)]
    return sums(padded(x, longer), kernel, strides) / sums(padded(counted, beyond), kernel, strides)


def max_pool(a: Operands) -> Tensor:
    """The largest of each window; padding never is."""
    kernel, strides, _, longer = windows(a)
    x = padded(a["x"], longer, -math.inf)
    for axis, k, s in zip(range(2, x.dim()), kernel, strides, strict=True):
        x = x.unfold(axis, k, s).amax(-1)
    return x


def l2_pool(a: Operands) -> Tensor:
    """The root of the sum of squares of each window."""
    kernel, strides, _, longer = windows(a)
    return sums(padded(a["x"].square(), longer), kernel, strides).sqrt()


def layer_norm(a: Operands) -> Tensor:
    """Zero mean and unit variance over `axes`, then gamma and beta, which have the lengths of these axes."""
    x, gamma, beta = a["x"], a.maybe("gamma"), a.maybe("beta")
    axes = sorted(axis % x.dim() for axis in a.ints("axes", range(x.dim())))
    epsilon = a.number("epsilon", 1e-5)  # the default of the operator set
    if axes == list(range(axes[0], x.dim())):
        return F.layer_norm(x, x.shape[axes[0] :], gamma, beta, epsilon)
    shape = [x.shape[i] if i in axes else 1 for i in range(x.dim())]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + epsilon)
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def batch_norm(a: Operands) -> Tensor:
    """With stored statistics, one of each for a channel."""
    epsilon = a.number("epsilon", 1e-5)  # the default of the operator set
    return F.batch_norm(a["x"], a["mean"], a["variance"], a.maybe("gamma"), a.maybe("beta"), eps=epsilon)


def instance_norm(a: Operands) -> Tensor:
    """Zero mean and unit variance over each channel's positions."""
    epsilon = a.number("epsilon", 1e-5)  # the default of the operator set
    return F.instance_norm(a["x"], weight=a.maybe("gamma"), bias=a.maybe("beta"), eps=epsilon)


def l2_norm(a: Operands) -> Tensor:
    """Unit length over the last three axes."""
    x = a["x"]
    axes = list(range(-3, 0))
    return x * torch.rsqrt(x.square().sum(axes, keepdim=True) + a.number("epsilon", 1e-6))  # the operator set's


def local_response_norm(a: Operands) -> Tensor:
    """Divided by a power of the squares of neighbouring channels."""
    return F.local_response_norm(
        a["x"], a.whole("size", 1), a.number("alpha", 1e-4), a.number("beta", 0.75), a.number("k", 1.0)
    )


def upsample_bilinear(a: Operands) -> Tensor:
    """x (n, c, h, w) -> (n, c, h', w')."""
    x = a["x"]
    size = [
        math.floor(d * a.number(f"scale_factor_{axis}", 1.0))
        for d, axis in zip(x.shape[-2:], ("height", "width"), strict=True)
    ]
    corners = a.flag("align_corners", default=True)
    if not corners and not a.flag("half_pixel_centers", default=not corners):
        raise ValueError("neither align_corners nor half_pixel_centers, which is not known here")
    return F.interpolate(x, size, mode="bilinear", align_corners=corners)


def upsample_nearest(a: Operands) -> Tensor:
    """x (n, c, h, w) -> (n, c, h', w')."""
    x = a["x"]
    scales = [a.number(f"scale_factor_{axis}", 1.0) for axis in ("height", "width")]
    size = [math.floor(d * scale) for d, scale in zip(x.shape[-2:], scales, strict=True)]
    return F.interpolate(x, size, mode="nearest")


NN: dict[str, Operator] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "einsum": lambda a: torch.einsum(a.text("equation", ""), *a.many("values")),
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "l2_pool": l2_pool,
    "layer_norm": layer_norm,
    "linear": linear,
    "local_response_norm": local_response_norm,
    "matmul": matmul,
    "max_pool": max_pool,
    "scaled_dot_product_attention": attention,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest,
}
