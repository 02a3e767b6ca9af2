"""Swin Transformer: attention inside windows that shift by half a window in every other block.

Paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
https://arxiv.org/abs/2103.14030
Origin of names and numerics: https://github.com/microsoft/Swin-Transformer at f82860b (MIT; nothing copied here).

This is the reference form: parameter names, layouts and arithmetic are the official network's. Two things are wider
than in the official code: the size is read off the input, so any rectangle that stays even at each merge works, and
maps that windows do not divide are padded with zeros after norm1 (not masked), as the dense-prediction code and timm
do. Symbols as in `layers`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevit.errors import UsageError
from edgevit.reference import reference_card
from edgevit.specs import ImageSpec, ModelCard

from .layers import (
    INIT_STD,
    BlockSequence,
    Features,
    GroupedBlock,
    Mlp,
    SelfAttention,
    constant,
    init_weights,
    pad_to_multiple,
    relative_position_index,
    resize_bias_table,
    spread_over_pairs,
    window_merge,
    window_partition,
)

PATCH = 4
HEAD_WIDTH = 32
MLP_RATIO = 4
MAX_WINDOW = 64  # tokens; beyond it one window would have more than 4096 tokens and its bias 16 M entries a head
MASKED = -100.0  # the official mask value; e^-100 is 0 beside any logit these networks produce
BUFFERS = ("attn_mask", "relative_position_index")  # saved by the official code, recomputed here


class Frame(NamedTuple):
    """How one block lays windows over an (h, w) map: window sides and cyclic shift, in tokens."""

    rows: int
    columns: int
    shift_rows: int
    shift_columns: int


def frame(height: int, width: int, window: int, *, shifted: bool) -> Frame:
    """The frame of a block: an axis that one window covers has a window of its length and no shift."""
    (rows, dy), (columns, dx) = ((min(window, side), window // 2 * (side > window)) for side in (height, width))
    return Frame(rows, columns, dy if shifted else 0, dx if shifted else 0)


@lru_cache(maxsize=64)  # two frames a stage
def shift_mask(height: int, width: int, lay: Frame) -> NDArray[np.float32] | None:
    """(g, n, n), MASKED where a shift brought tokens from opposite borders into one window; None without a shift.

    `height` and `width` are those of the padded map.
    """
    if not (lay.shift_rows or lay.shift_columns):
        return None

    def region(side: int, window: int, shift: int) -> NDArray[np.int64]:
        place = np.arange(side)
        return (place >= side - window).astype(np.int64) + (place >= side - shift) if shift else 0 * place

    rows, columns = region(height, lay.rows, lay.shift_rows), region(width, lay.columns, lay.shift_columns)
    regions = rows[:, None] * 3 + columns  # h w; NumPy, since a trace would record PyTorch's arithmetic
    windows = regions.reshape(height // lay.rows, lay.rows, width // lay.columns, lay.columns)
    label = windows.transpose(0, 2, 1, 3).reshape(-1, lay.rows * lay.columns)  # gh r gw s -> g n
    return np.where(label[:, :, None] == label[:, None, :], 0.0, MASKED).astype(np.float32)


class WindowAttention(SelfAttention):
    """Self-attention inside windows, with a learnt bias for each relative position."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)

    def position_bias(self, rows: int, columns: int) -> Tensor:
        """(k, n, n) for windows of `rows` x `columns`."""
        index = relative_position_index(rows, columns, self.window, self.window)
        return spread_over_pairs(self.relative_position_bias_table, index)

    def forward(self, x: Tensor, lay: Frame, mask: Tensor | None) -> Tensor:
        """x (b*g, n, c), mask (g, n, n) -> (b*g, n, c)."""
        return self.attend(x, self.position_bias(lay.rows, lay.columns), mask)


class WindowBlock(GroupedBlock):
    """A block whose groups are windows, shifted by half a window where `shifted` says so."""

    def __init__(self, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted

    def frame(self, height: int, width: int) -> Frame:
        """How the windows lie on a map of this size."""
        return frame(height, width, self.window, shifted=self.shifted)

    def mask(self, height: int, width: int) -> NDArray[np.float32] | None:
        """(g, n, n), what a shift adds to the logits; None without a shift."""
        lay = self.frame(height, width)
        return shift_mask(*_padded(height, width, lay), lay)

    def partition(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> (b*g, n, c)."""
        lay = self.frame(x.shape[1], x.shape[2])
        x = pad_to_multiple(x, lay.rows, lay.columns)
        if lay.shift_rows or lay.shift_columns:
            x = torch.roll(x, (-lay.shift_rows, -lay.shift_columns), (1, 2))
        return window_partition(x, lay.rows, lay.columns)

    def merge(self, windows: Tensor, height: int, width: int) -> Tensor:
        """Undo `partition`: (b*g, n, c) -> (b, h, w, c)."""
        lay = self.frame(height, width)
        padded = _padded(height, width, lay)
        x = window_merge(windows, lay.rows, lay.columns, *padded)
        if lay.shift_rows or lay.shift_columns:
            x = torch.roll(x, (lay.shift_rows, lay.shift_columns), (1, 2))
        return x if padded == (height, width) else x[:, :height, :width].contiguous()


class SwinBlock(WindowBlock):
    """LayerNorm, (shifted) window attention, residual; LayerNorm, MLP, residual."""

    def __init__(self, dim: int, window: int, heads: int, *, shifted: bool) -> None:
        super().__init__(window, shifted=shifted)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim)

    def attention_bias(self, height: int, width: int) -> Tensor:
        """Relative bias and shift mask: (1 or g, k, n, n)."""
        lay, mask = self.frame(height, width), self.mask(height, width)
        bias = self.attn.position_bias(lay.rows, lay.columns).unsqueeze(0)
        return bias if mask is None else bias + constant(mask, bias).unsqueeze(1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c) -> (b, h*w, c)."""
        _, tokens, c = x.shape
        lay, mask = self.frame(height, width), self.mask(height, width)
        windows = self.partition(self.norm1(x).view(-1, height, width, c))
        windows = self.attn(windows, lay, None if mask is None else constant(mask, x))
        x = x + self.merge(windows, height, width).view(-1, tokens, c)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def _padded(height: int, width: int, lay: Frame) -> tuple[int, int]:
    return height + -height % lay.rows, width + -width % lay.columns


class PatchMerging(nn.Module):
    """Each 2x2 neighbourhood becomes one token of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c), h and w even -> (b, h*w/4, 2c)."""
        c = x.shape[-1]
        x = x.view(-1, height, width, c)
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        x = torch.cat(corners, -1).view(-1, height * width // 4, 4 * c)
        out: Tensor = self.reduction(self.norm(x))
        return out


class Stage(nn.Module):
    """Blocks on one resolution, and the merging that ends it."""

    def __init__(self, dim: int, depth: int, window: int, heads: int, *, last: bool) -> None:
        super().__init__()
        self.blocks = BlockSequence(SwinBlock(dim, window, heads, shifted=bool(i % 2)) for i in range(depth))
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """x (b, h*w, c) -> this stage's map (b, h*w, c); what follows it: (b, h*w/4, 2c), or the last map itself."""
        x = self.blocks(x, height, width)
        return x, x if self.downsample is None else self.downsample(x, height, width)


class PatchEmbed(nn.Module):
    """Each PATCH x PATCH square of pixels becomes one token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """image (b, 3, H, W) -> (b, h*w, c)."""
        out: Tensor = self.norm(self.proj(image).flatten(2).transpose(1, 2))  # b c h w -> b h*w c
        return out


class SwinTransformer(nn.Module):
    """Patch embedding, four stages, classifier; or the four maps, each with its own norm, for dense prediction."""

    def __init__(self, config: SwinConfig, window: int, num_classes: int, *, features_only: bool) -> None:
        super().__init__()
        self.features_only = features_only
        self.patch_embed = PatchEmbed(config.width)
        dims = [config.width * 2**s for s in range(4)]
        self.layers = nn.ModuleList(
            Stage(dim, depth, window, dim // config.head_width, last=s == 3)
            for s, (dim, depth) in enumerate(zip(dims, config.depths, strict=True))
        )
        if features_only:
            for s, dim in enumerate(dims):
                self.add_module(f"norm{s}", nn.LayerNorm(dim))
        else:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = nn.Linear(dims[-1], num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor | Features:
        """image (b, 3, H, W), normalised, H and W multiples of 32 -> logits (b, classes), or `Features`."""
        height, width = image.shape[2] // PATCH, image.shape[3] // PATCH
        x = self.patch_embed(image)
        maps = []
        for s, stage in enumerate(self.layers):
            last, x = stage(x, height, width)
            if self.features_only:
                normed = self.get_submodule(f"norm{s}")(last)
                maps.append(normed.transpose(1, 2).reshape(-1, last.shape[-1], height, width))  # b hw c -> b c h w
            height, width = height // 2, width // 2
        if self.features_only:
            return Features(*maps)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@dataclass(frozen=True)
class SwinConfig:
    """What distinguishes one published variant from another."""

    width: int
    depths: tuple[int, int, int, int]
    head_width: int = HEAD_WIDTH


CONFIGS = {
    "swin_t": SwinConfig(96, (2, 2, 6, 2)),
    "swin_s": SwinConfig(96, (2, 2, 18, 2)),
    "swin_b": SwinConfig(128, (2, 2, 18, 2)),
    "swin_tiny": SwinConfig(16, (1, 1, 2, 1), head_width=16),
}


@dataclass(frozen=True)
class SwinOptions:
    """What `--option` takes: `window_size` in tokens; a checkpoint's bias tables are resized to it."""

    window_size: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.window_size <= MAX_WINDOW:
            raise UsageError(f"window_size {self.window_size}: expected 1 to {MAX_WINDOW} tokens")


OPTIONS = SwinOptions
CLASSIFIER = "head"
HEAD_PREFIXES = ("norm.", "head.")


def build(name: str, options: SwinOptions, *, num_classes: int, features_only: bool) -> SwinTransformer:
    """The reference form with its official initialisation."""
    return SwinTransformer(CONFIGS[name], options.window_size, num_classes, features_only=features_only)


def filter_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's names as they are, timm's and a detector's `backbone.` renamed; the recomputed buffers dropped."""
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): t for key, t in state.items() if key.startswith("backbone.")}
    if any(key.startswith("layers.3.downsample.") for key in state):  # timm: merging at the start of a stage
        state = {_from_timm(key): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in state.items() if not key.endswith(BUFFERS)}


def _from_timm(key: str) -> str:
    key = re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
    return key.replace("head.fc.", "head.")


def fit_checkpoint(state: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Resize bias tables to the module's window; give a backbone the output norms that a classifier lacks."""
    state, notes, resized = dict(state), [], 0
    bare = not any(re.match(r"norm\d\.", key) for key in state)
    for key, wanted in module.state_dict().items():
        if key.endswith("relative_position_bias_table") and key in state and state[key].shape != wanted.shape:
            state[key] = resize_bias_table(state[key], wanted.shape[0])
            resized += 1
        if bare and re.match(r"norm\d\.", key):
            state[key] = wanted
            notes.append("the weights have no output norms (norm0 to norm3): they are new")
    if resized:
        notes.append(f"{resized} bias tables were resized bicubically to the window of this model")
    return state, tuple(dict.fromkeys(notes))


# name: parameters (exact), MACs at 224x224 (convolutions, linears, matmuls), the paper's figures
_FIGURES: dict[str, tuple[int, int, dict[str, str | float]]] = {
    "swin_t": (28_288_354, 4_490_566_656, {"parameters": "28M", "flops": "4.5G", "imagenet_top1_percent": 81.2}),
    "swin_s": (49_606_258, 8_740_875_264, {"parameters": "50M", "flops": "8.7G", "imagenet_top1_percent": 83.2}),
    "swin_b": (87_768_224, 15_430_946_816, {"parameters": "88M", "flops": "15.4G", "imagenet_top1_percent": 83.5}),
}

CARDS = {
    name: ModelCard(
        name=name,
        family="swin",
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (ICCV 2021)",
        url="https://arxiv.org/abs/2103.14030",
        origin="https://github.com/microsoft/Swin-Transformer",
        parameters=parameters,
        macs=macs,
        paper=paper,
        image=ImageSpec(interpolation="bicubic"),
        notes=("the paper's FLOPs are multiply-adds, with a few more for norms than the MACs here",),
    )
    for name, (parameters, macs, paper) in _FIGURES.items()
}
CARDS["swin_tiny"] = reference_card(CARDS["swin_t"], "swin_tiny", 364_475, 65_845_504)
