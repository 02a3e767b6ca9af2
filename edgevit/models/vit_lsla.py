"""ViT-LSLA: Swin's windows with light self-limited attention, whose keys and values are the input itself.

Paper: Hechen, Huang, Zhao, "ViT-LSLA: Vision Transformer with Light Self-Limited-Attention", 2022,
https://arxiv.org/abs/2210.17115. There is no public code and no checkpoint.

What is the paper's: Q = X W_q, K = V = X, an output projection; a dynamic scale for each pair of positions in place of
d^-0.5; a bias inside the softmax as in Swin and a second one of the same structure outside it; windows of 7; a stem of
two 3x3 convolutions to 96 channels at stride 4; four stages with patch merging; all else as in Swin.
What is a reconstruction, because the text at hand is silent: the scale's table has the shape of Swin's bias table,
starts at d^-0.5 and multiplies; the outer bias is added, starts at 0 and is 0 where a shift's mask separates two
tokens; X is split over the heads by channels; the stem's norms (BatchNorm) and activation (ReLU); Swin's heads, mask
value and tail; the sizes of every variant (see CONFIGS). Symbols as in `layers`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgevit.errors import UsageError
from edgevit.reference import reference_card
from edgevit.specs import ImageSpec, ModelCard

from .layers import (
    INIT_STD,
    BlockSequence,
    Features,
    Mlp,
    constant,
    init_weights,
    relative_position_index,
    resize_bias_table,
    spread_over_pairs,
)
from .swin import BUFFERS, HEAD_WIDTH, MAX_WINDOW, PatchMerging, WindowBlock

WIDTH = 96  # channels of the first stage; each merging doubles them
STRIDE = 4  # of the stem


@dataclass(frozen=True)
class LslaOptions:
    """What `--option` takes; the defaults are the paper's network, the rest its ablations.

    projections: which of q, k and v are linear maps of the input ("x": the input itself).
    dynamic_scale: a learnt scale per relative position and head; without it d^-0.5.
    outer_bias: a learnt bias after the softmax.
    mask_outer_bias: keep it 0 between tokens that a shifted window holds but must not mix.
    window_size: in tokens; a checkpoint's tables are resized to it.
    """

    projections: Literal["qxx", "qxv", "qkv"] = "qxx"
    dynamic_scale: bool = True
    outer_bias: bool = True
    mask_outer_bias: bool = True
    window_size: int = 7

    def __post_init__(self) -> None:
        if self.projections not in ("qxx", "qxv", "qkv"):
            raise UsageError(f"projections {self.projections!r}: expected qxx, qxv or qkv")
        if not 1 <= self.window_size <= MAX_WINDOW:
            raise UsageError(f"window_size {self.window_size}: expected 1 to {MAX_WINDOW} tokens")


class LslaAttention(nn.Module):
    """(softmax(Q X^T * DS + B_i) + B_o) X in every head, then the output projection."""

    def __init__(self, dim: int, heads: int, options: LslaOptions) -> None:
        super().__init__()
        self.heads, self.window = heads, options.window_size
        self.fixed_scale = (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim) if options.projections == "qkv" else None
        self.v = nn.Linear(dim, dim) if options.projections != "qxx" else None
        self.proj = nn.Linear(dim, dim)
        size = ((2 * self.window - 1) ** 2, heads)
        self.dynamic_scale_table = nn.Parameter(torch.full(size, self.fixed_scale)) if options.dynamic_scale else None
        self.inner_bias_table = nn.Parameter(torch.zeros(size))
        self.outer_bias_table = nn.Parameter(torch.zeros(size)) if options.outer_bias else None
        nn.init.trunc_normal_(self.inner_bias_table, std=INIT_STD)

    def dynamic_scale(self, rows: int, columns: int) -> Tensor | None:
        """(k, n, n) for windows of `rows` x `columns`; None where the scale is `fixed_scale`."""
        return None if self.dynamic_scale_table is None else self._spread(self.dynamic_scale_table, rows, columns)

    def inner_bias(self, rows: int, columns: int) -> Tensor:
        """(k, n, n) for windows of `rows` x `columns`."""
        return self._spread(self.inner_bias_table, rows, columns)

    def outer_bias(self, rows: int, columns: int) -> Tensor | None:
        """(k, n, n) for windows of `rows` x `columns`; None for a network without it."""
        return None if self.outer_bias_table is None else self._spread(self.outer_bias_table, rows, columns)

    def _spread(self, table: Tensor, rows: int, columns: int) -> Tensor:
        return spread_over_pairs(table, relative_position_index(rows, columns, self.window, self.window))

    def _split(self, x: Tensor) -> Tensor:
        """x (b*g, n, c) -> (b*g, k, n, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, scale: Tensor | float, bias: Tensor, outer: Tensor | None) -> Tensor:
        """x (b*g, n, c); scale (1, k, n, n) or a number; bias, outer (1 or g, k, n, n) -> (b*g, n, c)."""
        query = self._split(self.q(x))
        key = self._split(x if self.k is None else self.k(x))
        value = self._split(x if self.v is None else self.v(x))
        logits = query @ key.transpose(-2, -1) * scale  # b*g k n n
        attention = _add_groups(logits, bias).softmax(-1)
        if outer is not None:
            attention = _add_groups(attention, outer)
        out = attention @ value
        return self.proj(out.transpose(1, 2).flatten(2))  # b*g k n d -> b*g n c


def _add_groups(x: Tensor, term: Tensor) -> Tensor:
    """x (b*g, k, n, n) plus what each group of every picture gets, term (1 or g, k, n, n)."""
    return (x.view(-1, *term.shape) + term).view_as(x)


class LslaBlock(WindowBlock):
    """Swin's block with light self-limited attention."""

    attn: LslaAttention

    def __init__(
        self, dim: int, mlp_ratio: int, options: LslaOptions, *, shifted: bool, head_width: int = HEAD_WIDTH
    ) -> None:
        super().__init__(options.window_size, shifted=shifted)
        self.mask_outer_bias = options.mask_outer_bias
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LslaAttention(dim, dim // head_width, options)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def scale(self, height: int, width: int) -> Tensor | float:
        """What multiplies the products of queries and keys: (1, k, n, n), or one number."""
        lay = self.frame(height, width)
        scale = self.attn.dynamic_scale(lay.rows, lay.columns)
        return self.attn.fixed_scale if scale is None else scale.unsqueeze(0)

    def attention_bias(self, height: int, width: int) -> Tensor:
        """Inner bias and shift mask: (1 or g, k, n, n)."""
        lay = self.frame(height, width)
        bias = self.attn.inner_bias(lay.rows, lay.columns).unsqueeze(0)
        mask = self.mask(height, width)
        return bias if mask is None else bias + constant(mask, bias).unsqueeze(1)  # g 1 n n

    def outer_bias(self, height: int, width: int) -> Tensor | None:
        """What is added after the softmax: (1 or g, k, n, n), or nothing."""
        lay = self.frame(height, width)
        bias = self.attn.outer_bias(lay.rows, lay.columns)
        if bias is None:
            return None
        mask = self.mask(height, width) if self.mask_outer_bias else None
        return bias.unsqueeze(0) if mask is None else bias * constant((mask == 0).astype(np.float32), bias).unsqueeze(1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c) -> (b, h*w, c)."""
        size = (height, width)
        windows = self.partition(self.norm1(x).unflatten(1, size))
        windows = self.attn(windows, self.scale(*size), self.attention_bias(*size), self.outer_bias(*size))
        x = x + self.merge(windows, *size).flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class ConvMerging(nn.Module):
    """A 3x3 convolution of stride 2 to twice the width, then LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c), h and w even -> (b, h*w/4, 2c)."""
        x = self.reduction(x.transpose(1, 2).unflatten(2, (height, width)))  # b h*w c -> b 2c h/2 w/2
        return self.norm(x.flatten(2).transpose(1, 2))


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2, each with BatchNorm, a ReLU between them."""

    def __init__(self, middle: int, width: int) -> None:
        parts = {
            "conv1": nn.Conv2d(3, middle, 3, 2, 1, bias=False),
            "bn1": nn.BatchNorm2d(middle),
            "act": nn.ReLU(),
            "conv2": nn.Conv2d(middle, width, 3, 2, 1, bias=False),
            "bn2": nn.BatchNorm2d(width),
        }
        super().__init__(OrderedDict(parts))

    def forward(self, image: Tensor) -> Tensor:
        """image (b, 3, H, W) -> (b, h*w, c)."""
        x = image
        for layer in self:
            x = layer(x)
        return x.flatten(2).transpose(1, 2)  # b c h w -> b h*w c


class Stage(nn.Module):
    """The merging that begins it, except in the first stage, and blocks on one resolution."""

    def __init__(self, index: int, config: LslaConfig, options: LslaOptions) -> None:
        super().__init__()
        dim = (config.width or WIDTH) * 2**index
        merging = ConvMerging if config.merging == "conv" else PatchMerging
        self.downsample = merging(dim // 2) if index else None
        self.blocks = BlockSequence(
            LslaBlock(dim, config.mlp_ratio, options, shifted=bool(i % 2), head_width=config.head_width)
            for i in range(config.depths[index])
        )

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c) -> the same, or with merging (b, h*w/4, 2c)."""
        if self.downsample is not None:
            x, height, width = self.downsample(x, height, width), height // 2, width // 2
        return self.blocks(x, height, width)


class VitLsla(nn.Module):
    """Stem, four stages, classifier; or the four maps for dense prediction: what the stages put out, without norms."""

    def __init__(self, config: LslaConfig, options: LslaOptions, num_classes: int, *, features_only: bool) -> None:
        super().__init__()
        self.features_only = features_only
        width = config.width or WIDTH
        self.stem = Stem(config.stem_width, width)
        self.layers = nn.ModuleList(Stage(s, config, options) for s in range(4))
        if not features_only:
            self.norm = nn.LayerNorm(8 * width)
            self.head = nn.Linear(8 * width, num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor | Features:
        """image (b, 3, H, W), normalised, H and W multiples of 32 -> logits (b, classes), or `Features`."""
        height, width = image.shape[2] // STRIDE, image.shape[3] // STRIDE
        x = self.stem(image)
        maps = []
        for s, stage in enumerate(self.layers):
            x = stage(x, height, width)
            if s:
                height, width = height // 2, width // 2
            maps.append((x, height, width))
        if self.features_only:
            return Features(*(x.transpose(1, 2).unflatten(2, size) for x, *size in maps))  # b h*w c -> b c h w
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class LslaConfig:
    """What distinguishes one variant from another; all of them are reconstructions."""

    depths: tuple[int, int, int, int]
    mlp_ratio: int
    stem_width: int
    merging: Literal["linear", "conv"]
    width: int | None = None  # None: WIDTH
    head_width: int = HEAD_WIDTH


CONFIGS = {
    "vit_lsla": LslaConfig((2, 4, 8, 2), 2, 48, "conv"),
    "vit_lsla_swin": LslaConfig((2, 2, 6, 2), 4, 48, "linear"),
    "vit_lsla_r3": LslaConfig((2, 2, 6, 2), 3, 96, "linear"),
    "vit_lsla_tiny": LslaConfig((1, 1, 2, 1), 2, 16, "conv", width=16, head_width=16),
}
OPTIONS = LslaOptions
CLASSIFIER = "head"
HEAD_PREFIXES = ("norm.", "head.")


def build(name: str, options: LslaOptions, *, num_classes: int, features_only: bool) -> VitLsla:
    """The reference form with Swin's initialisation; the scale starts at d^-0.5 and the outer bias at 0."""
    return VitLsla(CONFIGS[name], options, num_classes, features_only=features_only)


def filter_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's `backbone.` renamed; buffers that a training code saved and this one recomputes dropped."""
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): t for key, t in state.items() if key.startswith("backbone.")}
    return {key: tensor for key, tensor in state.items() if not key.endswith(BUFFERS)}


def fit_checkpoint(state: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Resize the tables to the module's window."""
    state, resized = dict(state), 0
    for key, wanted in module.state_dict().items():
        if key.endswith("_table") and key in state and state[key].shape != wanted.shape:
            state[key] = resize_bias_table(state[key], wanted.shape[0])
            resized += 1
    return state, (f"{resized} tables were resized bicubically to the window of this model",) if resized else ()


# what each variant is
_SIZES = {
    "vit_lsla": "a size-matched reconstruction, not the authors' configuration: depths, MLP ratio 2 and convolutional "
    "merging were chosen to meet the paper's 18.9M (18,898,606 with 100 classes) and 3.5G; other choices meet them too",
    "vit_lsla_swin": "the literal reading of the text, Swin-T with its attention replaced: 23.4M with 100 classes and "
    "3.9G, which do not match the paper's figures",
    "vit_lsla_r3": "the literal reading with MLP ratio 3 and a wider stem: 19.1M with 100 classes and 3.4G, near the "
    "paper's figures, but no match",
}
_FLOPS = "the paper's figures are with 100 or 102 classes and its FLOPs multiply-adds; those here are with 1000 classes"
_FROM_PAPER = (
    "from the paper: K = V = X, dynamic scale, inner and outer bias, windows of 7, two 3x3 convolutions at the start, "
    "all else as in Swin"
)
_INFERRED = (
    "inferred: the scale multiplies and has the bias table's shape, the outer bias is added and masked, BatchNorm and "
    "ReLU in the stem, Swin's heads, tail and preprocessing"
)
# name: parameters (exact), MACs at 224x224 (convolutions, linears, matmuls), both with 1000 classes
_FIGURES = {
    "vit_lsla": (19_590_706, 3_496_178_688),
    "vit_lsla_swin": (24_051_238, 3_928_796_160),
    "vit_lsla_r3": (19_776_598, 3_381_476_352),
}
_PAPER: dict[str, str | float] = {
    "parameters": "18.9M",
    "flops": "3.5G",
    "ip102_top1_percent": 71.6,
    "mini_imagenet_top1_percent": 87.2,
}

CARDS = {
    name: ModelCard(
        name=name,
        family="vit_lsla",
        title="ViT-LSLA: Vision Transformer with Light Self-Limited-Attention (2022)",
        url="https://arxiv.org/abs/2210.17115",
        origin="none: the authors published no code and no weights",
        parameters=parameters,
        macs=macs,
        paper=dict(_PAPER),
        image=ImageSpec(interpolation="bicubic"),
        notes=(_SIZES[name], _FLOPS, _FROM_PAPER, _INFERRED),
    )
    for name, (parameters, macs) in _FIGURES.items()
}
CARDS["vit_lsla_tiny"] = reference_card(CARDS["vit_lsla"], "vit_lsla_tiny", 270_065, 58_018_048)
