"""CrossFormer and CrossFormer++: patches of several sizes, attention among neighbours and at a distance in turn.

Papers: Wang et al., "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", ICLR 2022,
https://arxiv.org/abs/2108.00154; "CrossFormer++", TPAMI 2023, https://arxiv.org/abs/2303.06908
Origin of names and numerics: https://github.com/cheerss/CrossFormer, main at 7952010 ("new" below) and branch
crossformer at 4fbf750 ("old") (MIT; nothing copied here).

This is the reference form: parameter names, layouts and arithmetic are the official network's. Two things are wider
than in the official code: the size is read off the input, so the classifiers take rectangles too, and it is read at
each call, so a small image leaves no trace in what a later one gets (the official dense code keeps such flags).
Stochastic depth, which only trains, is left out.

LSDA, the paper's attention, groups tokens in two ways: SDA takes G x G neighbours, LDA tokens that lie I apart.
Symbols: as in `layers`, and G group side, I interval; R regions, u v a token's place between two members of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevit.errors import UsageError
from edgevit.reference import reference_card
from edgevit.specs import ImageSpec, ModelCard

from .layers import (
    BlockSequence,
    Features,
    GroupedBlock,
    Mlp,
    SelfAttention,
    constant,
    init_weights,
    relative_offsets,
    relative_position_index,
    spread_over_pairs,
    window_merge,
    window_partition,
)

PATCH = 4
STEM_KERNELS = (4, 8, 16, 32)
MERGE_KERNELS = (2, 4)
HEAD_WIDTH = 32
MLP_RATIO = 4
BIAS_RATIO = 16  # the official code divides the block's width by 4 twice; the paper's text says once
COOLING_PERIOD = 3  # of CrossFormer++'s amplitude cooling layer: every third block of a stage, never the last
MASKED = -1e6  # the official mask value
MAX_SIDE = 64  # tokens; beyond it one group would have more than 4096 tokens, and its bias 16 M entries a head
BUFFERS = ("attn.biases", "attn.relative_position_index", "attn_mask")  # some saved by older code; recomputed here

# How LDA makes its groups. The parameters are the same.
Rule = Literal["new", "old_dense", "old_classifier"]


class Grouping(NamedTuple):
    """How one block groups an (h, w) map: members of a group in each axis, and tokens from one member to the next.

    A region of rows*row_step x columns*column_step tokens holds row_step*column_step interleaved groups. Regions that
    the map does not fill are padded below and to the right; pads are no keys.
    """

    rows: int
    columns: int
    row_step: int
    column_step: int


def grouping(height: int, width: int, group: int, interval: int, *, long_distance: bool, rule: Rule) -> Grouping:
    """The grouping of an SDA or LDA block on a map of this size; a side within one group makes any block SDA.

    new: groups of G x G; in LDA their members lie I apart.
    old_dense: an LDA group holds all tokens that lie I apart, so that it grows with the map and is as oblong.
    old_classifier: an LDA group holds G x G tokens that lie side/G apart, whatever I is. The official code refuses
    sides that G does not divide; here the quotient is rounded up. At 224 pixels with G = 7 this is what "new" does.
    """
    if min(height, width) <= group:
        # The official codes differ: the old one cuts the long side into squares, the new one pads the short side.
        group = max(height, width) if rule == "new" else min(height, width)
        long_distance = False
    if not long_distance:
        return Grouping(group, group, 1, 1)
    if rule == "new":
        return Grouping(group, group, interval, interval)
    dy, dx = (interval, interval) if rule == "old_dense" else (-(-height // group), -(-width // group))
    return Grouping(-(-height // dy), -(-width // dx), dy, dx)


def partition(x: Tensor, lay: Grouping) -> Tensor:
    """x (b, h, w, c) -> (b*g, n, c); groups by region, then by place in it, all row by row, like their members."""
    bottom, right = -x.shape[1] % (lay.rows * lay.row_step), -x.shape[2] % (lay.columns * lay.column_step)
    x = F.pad(x, (0, 0, 0, right, 0, bottom))  # also where there is nothing to pad, as in the official code
    if lay.row_step == lay.column_step == 1:
        return window_partition(x, lay.rows, lay.columns)
    _, h, w, c = x.shape
    regions = h // (lay.rows * lay.row_step), w // (lay.columns * lay.column_step)
    x = x.view(-1, regions[0], lay.rows, lay.row_step, regions[1], lay.columns, lay.column_step, c)
    x = x.permute(0, 1, 4, 3, 6, 2, 5, 7)  # b Rh Gh Ih Rw Gw Iw c -> b Rh Rw Ih Iw Gh Gw c
    return x.reshape(-1, lay.rows * lay.columns, c)


def merge(groups: Tensor, lay: Grouping, height: int, width: int) -> Tensor:
    """Undo `partition` of a map of this height and width: (b*g, n, c) -> (b, h, w, c)."""
    h, w = _padded(height, width, lay)
    if lay.row_step == lay.column_step == 1:
        x = window_merge(groups, lay.rows, lay.columns, h, w)
    else:
        c = groups.shape[-1]
        regions = h // (lay.rows * lay.row_step), w // (lay.columns * lay.column_step)
        x = groups.view(-1, *regions, lay.row_step, lay.column_step, lay.rows, lay.columns, c)
        x = x.permute(0, 1, 5, 3, 2, 6, 4, 7)  # b Rh Rw Ih Iw Gh Gw c -> b Rh Gh Ih Rw Gw Iw c
        x = x.reshape(-1, h, w, c)
    return x if (h, w) == (height, width) else x[:, :height, :width].contiguous()


@lru_cache(maxsize=64)  # two groupings a stage
def pad_mask(height: int, width: int, lay: Grouping) -> NDArray[np.float32] | None:
    """(g, n), MASKED for the members of a group that lie beyond the map; None where none do."""
    padded = _padded(height, width, lay)
    if padded == (height, width):
        return None

    def beyond(side: int, length: int, members: int, step: int) -> NDArray[np.bool_]:
        return (np.arange(length) >= side).reshape(-1, members, step).transpose(0, 2, 1)  # R G I -> R I G

    rows = beyond(height, padded[0], lay.rows, lay.row_step)
    columns = beyond(width, padded[1], lay.columns, lay.column_step)
    outside = rows[:, None, :, None, :, None] | columns[None, :, None, :, None, :]  # Rh Rw Ih Iw Gh Gw
    return np.where(outside, MASKED, 0.0).astype(np.float32).reshape(-1, lay.rows * lay.columns)


def _padded(height: int, width: int, lay: Grouping) -> tuple[int, int]:
    return height + -height % (lay.rows * lay.row_step), width + -width % (lay.columns * lay.column_step)


class DynamicPositionBias(nn.Module):
    """DPB: an MLP from the offset between two tokens to each head's bias, so that groups may have any size."""

    def __init__(self, dim: int, heads: int, ratio: int = BIAS_RATIO) -> None:
        super().__init__()
        hidden = dim // ratio
        self.pos_proj = nn.Linear(2, hidden)
        self.pos1 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.pos2 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.pos3 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, heads))

    def forward(self, offsets: Tensor) -> Tensor:
        """offsets (m, 2), in members of the group and not in tokens of the map -> (m, k)."""
        out: Tensor = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))
        return out


class GroupAttention(SelfAttention):
    """Self-attention inside groups, with a bias for each relative position."""

    def __init__(self, dim: int, heads: int, bias_ratio: int = BIAS_RATIO) -> None:
        super().__init__(dim, heads)
        self.pos = DynamicPositionBias(dim, heads, bias_ratio)

    def position_bias(self, rows: int, columns: int) -> Tensor:
        """(k, n, n) for groups of `rows` x `columns`."""
        offsets = constant(relative_offsets(rows, columns), self.pos.pos_proj.weight)
        return spread_over_pairs(self.pos(offsets), relative_position_index(rows, columns))  # m 2 -> m k -> k n n

    def forward(self, x: Tensor, lay: Grouping, mask: Tensor | None) -> Tensor:
        """x (b*g, n, c), mask (g, n) of the keys -> (b*g, n, c)."""
        bias = self.position_bias(lay.rows, lay.columns)
        return self.attend(x, bias, None if mask is None else mask.unsqueeze(1))


class CrossFormerBlock(GroupedBlock):
    """LayerNorm, SDA or LDA, residual; LayerNorm, MLP, residual; in some blocks of CrossFormer++ a cooling layer.

    The cooling layer (ACL) is a depthwise convolution and a LayerNorm on the residual stream itself, with no path
    around it, so that amplitudes do not pile up with depth.
    """

    attn: GroupAttention

    def __init__(
        self,
        dim: int,
        group: int,
        interval: int,
        rule: Rule,
        *,
        long_distance: bool,
        cooled: bool,
        head_width: int = HEAD_WIDTH,
        bias_ratio: int = BIAS_RATIO,
    ) -> None:
        super().__init__()
        self.group, self.interval, self.rule, self.long_distance = group, interval, rule, long_distance
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, dim // head_width, bias_ratio)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cooled else None
        self.ex_ln = nn.LayerNorm(dim) if cooled else None

    def lay(self, height: int, width: int) -> Grouping:
        """How this block groups a map of `height` x `width` tokens."""
        return grouping(height, width, self.group, self.interval, long_distance=self.long_distance, rule=self.rule)

    def partition(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> (b*g, n, c)."""
        return partition(x, self.lay(x.shape[1], x.shape[2]))

    def merge(self, groups: Tensor, height: int, width: int) -> Tensor:
        """Undo `partition`: (b*g, n, c) -> (b, h, w, c)."""
        return merge(groups, self.lay(height, width), height, width)

    def attention_bias(self, height: int, width: int) -> Tensor:
        """Position bias and pad mask: (1 or g, k, n, n)."""
        lay = self.lay(height, width)
        bias = self.attn.position_bias(lay.rows, lay.columns).unsqueeze(0)
        mask = pad_mask(height, width, lay)
        return bias if mask is None else bias + constant(mask, bias)[:, None, None]

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c) -> (b, h*w, c)."""
        _, tokens, c = x.shape
        lay = self.lay(height, width)
        mask = pad_mask(height, width, lay)
        groups = partition(self.norm1(x).view(-1, height, width, c), lay)
        groups = self.attn(groups, lay, None if mask is None else constant(mask, x))
        x = x + merge(groups, lay, height, width).view(-1, tokens, c)
        x = x + self.mlp(self.norm2(x))
        if self.ex_conv is not None and self.ex_ln is not None:
            x = self.ex_conv(x.transpose(1, 2).reshape(-1, c, height, width))  # b hw c -> b c h w
            x = self.ex_ln(x.flatten(2).transpose(1, 2))  # b c h w -> b hw c
        return x


def shares(width: int, parts: int) -> list[int]:
    """Channels for each kernel of a cross-scale embedding: half for the smallest, half of the rest for the next, ..."""
    return [width // 2 ** min(i + 1, parts - 1) for i in range(parts)]


class PatchEmbed(nn.Module):
    """CEL: convolutions of all sizes around the same centres make one token of each PATCH x PATCH square of pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projs = nn.ModuleList(
            nn.Conv2d(3, share, kernel, PATCH, (kernel - PATCH) // 2)
            for kernel, share in zip(STEM_KERNELS, shares(dim, len(STEM_KERNELS)), strict=True)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """image (b, 3, H, W) -> (b, h*w, c)."""
        x = torch.cat([proj(image) for proj in self.projs], 1)  # b c h w
        out: Tensor = self.norm(x.flatten(2).transpose(1, 2))  # b c h w -> b hw c
        return out


class PatchMerging(nn.Module):
    """CEL between stages: half the height and width, twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, share, kernel, 2, (kernel - 2) // 2)
            for kernel, share in zip(MERGE_KERNELS, shares(2 * dim, len(MERGE_KERNELS)), strict=True)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c), h and w even -> (b, h*w/4, 2c)."""
        c = x.shape[-1]
        x = self.norm(x).transpose(1, 2).reshape(-1, c, height, width)  # b hw c -> b c h w
        x = torch.cat([reduction(x) for reduction in self.reductions], 1)  # b c h w -> b 2c h/2 w/2
        return x.flatten(2).transpose(1, 2)  # b 2c h/2 w/2 -> b hw/4 2c


class Stage(nn.Module):
    """Blocks on one resolution, SDA and LDA in turn, and the merging that ends it."""

    def __init__(self, config: CrossFormerConfig, stage: int, rule: Rule) -> None:
        super().__init__()
        dim, depth = config.width * 2**stage, config.depths[stage]
        self.blocks = BlockSequence(
            CrossFormerBlock(
                dim,
                config.groups[stage],
                config.intervals[stage],
                rule,
                long_distance=bool(j % 2),
                cooled=config.cooling and (j + 1) % COOLING_PERIOD == 0 and j < depth - 1,
                head_width=config.head_width,
                bias_ratio=config.bias_ratio,
            )
            for j in range(depth)
        )
        self.downsample = None if stage == 3 else PatchMerging(dim)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """x (b, h*w, c) -> this stage's map (b, h*w, c); what follows it: (b, h*w/4, 2c), or the last map itself."""
        x = self.blocks(x, height, width)
        return x, x if self.downsample is None else self.downsample(x, height, width)


class CrossFormer(nn.Module):
    """Patch embedding, four stages, classifier; or the four maps, without norms, for dense prediction."""

    def __init__(self, config: CrossFormerConfig, rule: Rule, num_classes: int, *, features_only: bool) -> None:
        super().__init__()
        self.features_only = features_only
        self.patch_embed = PatchEmbed(config.width)
        self.layers = nn.ModuleList(Stage(config, stage, rule) for stage in range(4))
        if not features_only:
            self.norm = nn.LayerNorm(8 * config.width)
            self.head = nn.Linear(8 * config.width, num_classes)
        self.apply(init_weights)

    def forward(self, image: Tensor) -> Tensor | Features:
        """image (b, 3, H, W), normalised, H and W multiples of 32 -> logits (b, classes), or `Features`.

        Raises:
            UsageError: a height or width that a merge would meet odd.
        """
        height, width = _grid(image.shape[2], image.shape[3])
        x = self.patch_embed(image)
        maps = []
        for stage in self.layers:
            last, x = stage(x, height, width)
            if self.features_only:
                maps.append(last.transpose(1, 2).reshape(-1, last.shape[-1], height, width))  # b hw c -> b c h w
            height, width = height // 2, width // 2
        if self.features_only:
            return Features(*maps)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def _grid(height: int, width: int) -> tuple[int, int]:
    """The first map's height and width in tokens; three merges must each find both even."""
    h, w = height // PATCH, width // PATCH
    if not h or not w or h % 8 or w % 8:
        near = [max(-(-side // 32), 1) * 32 for side in (height, width)]
        raise UsageError(
            f"image of {height}x{width} pixels: its {h}x{w} tokens cannot be halved three times; height and width must "
            f"be multiples of 32; pad it to {near[0]}x{near[1]}"
        )
    return h, w


@dataclass(frozen=True)
class CrossFormerConfig:
    """What distinguishes one published variant from another; `cooling` is CrossFormer++'s ACL."""

    width: int
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int] = (7, 7, 7, 7)
    intervals: tuple[int, int, int, int] = (8, 4, 2, 1)
    cooling: bool = False
    head_width: int = HEAD_WIDTH
    bias_ratio: int = BIAS_RATIO


def _plus(width: int, depths: tuple[int, int, int, int]) -> CrossFormerConfig:
    """CrossFormer++: groups that grow with depth, and cooling layers."""
    return CrossFormerConfig(width, depths, groups=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooling=True)


CONFIGS = {
    "crossformer_t": CrossFormerConfig(64, (1, 1, 8, 6)),
    "crossformer_s": CrossFormerConfig(96, (2, 2, 6, 2)),
    "crossformer_b": CrossFormerConfig(96, (2, 2, 18, 2)),
    "crossformer_l": CrossFormerConfig(128, (2, 2, 18, 2)),
    "crossformerpp_s": _plus(64, (2, 2, 18, 2)),
    "crossformerpp_b": _plus(96, (2, 2, 18, 2)),
    "crossformerpp_l": _plus(128, (2, 2, 18, 2)),
    "crossformerpp_h": _plus(128, (6, 6, 18, 2)),
    "crossformer_tiny": CrossFormerConfig(16, (1, 1, 2, 1), head_width=16, bias_ratio=4),
}


@dataclass(frozen=True)
class CrossFormerOptions:
    """What `--option` takes; the parameters are the same whatever is chosen.

    lda_mode: "old" for weights trained with the branch `crossformer`, as all released detectors were; see `grouping`.
    group_size, interval: G and I of each stage, in tokens; None is the variant's own. Detectors were trained with
    7,7,7,7 and 8,4,2,1, the segmenters on a feature pyramid some with 14,14,7,7 and 16,8,2,1.
    """

    lda_mode: Literal["new", "old"] = "new"
    group_size: tuple[int, int, int, int] | None = None
    interval: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.lda_mode not in ("new", "old"):
            raise UsageError(f"lda_mode {self.lda_mode}: expected new or old")
        for name, sides in (("group_size", self.group_size), ("interval", self.interval)):
            if sides is not None and (len(sides) != 4 or not all(1 <= side <= MAX_SIDE for side in sides)):
                given = ",".join(map(str, sides))
                raise UsageError(f"{name} {given}: expected 1 to {MAX_SIDE} tokens for each of the 4 stages")


OPTIONS = CrossFormerOptions
CLASSIFIER = "head"
HEAD_PREFIXES = ("norm.", "head.")


def build(name: str, options: CrossFormerOptions, *, num_classes: int, features_only: bool) -> CrossFormer:
    """The reference form with its official initialisation.

    Raises:
        UsageError: an interval for the old classifier, which derives its own from the image.
    """
    rule: Rule = "new"
    if options.lda_mode == "old":
        rule = "old_dense" if features_only else "old_classifier"
    if rule == "old_classifier" and options.interval is not None:
        raise UsageError("interval: a classifier with lda_mode=old divides the map by group_size; leave interval out")
    config = CONFIGS[name]
    config = replace(config, groups=options.group_size or config.groups, intervals=options.interval or config.intervals)
    return CrossFormer(config, rule, num_classes, features_only=features_only)


def filter_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official names as they are, or a detector's `backbone.`; the recomputed buffers dropped."""
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): t for key, t in state.items() if key.startswith("backbone.")}
    return {key: tensor for key, tensor in state.items() if not key.endswith(BUFFERS)}


def fit_checkpoint(
    state: dict[str, Tensor],
    module: nn.Module,  # noqa: ARG001  # the families share one signature
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """No parameter depends on the options or the image size."""
    return state, ()


NOTES = (
    "the paper's FLOPs are multiply-adds",
    "published FLOPs of detectors and segmenters use lda_mode=old; new takes 25 G less in S at 1280x800",
)
OWN_NOTES = {"crossformerpp_s": ("the published 4.9G is not reproduced: the official code itself counts 4.4 G",)}

# name: parameters (exact), MACs at 224x224 (convolutions, linears, matmuls), the papers' figures
_FIGURES = {
    "crossformer_t": (27_776_794, 2_857_427_552, ("27.8M", "2.9G", 81.5)),
    "crossformer_s": (30_657_394, 4_906_063_692, ("30.7M", "4.9G", 82.5)),
    "crossformer_b": (51_971_554, 9_159_389_964, ("52.0M", "9.2G", 83.4)),
    "crossformer_l": (91_971_184, 16_107_451_680, ("92.0M", "16.1G", 84.0)),
    "crossformerpp_s": (23_325_340, 4_427_970_432, ("23.3M", "4.9G", 83.2)),
    "crossformerpp_b": (51_994_594, 9_591_549_804, ("52.0M", "9.5G", 84.2)),
    "crossformerpp_l": (92_001_904, 16_721_525_280, ("92.0M", "16.6G", 84.7)),
    "crossformerpp_h": (95_962_944, 22_000_137_056, ("96.0M", "21.8G", 84.9)),
}


def _card(name: str) -> ModelCard:
    plus = CONFIGS[name].cooling
    parameters, macs, published = _FIGURES[name]
    return ModelCard(
        name=name,
        family="crossformer",
        title=f"CrossFormer{'++' if plus else ''}: A Versatile Vision Transformer Hinging on Cross-scale Attention "
        f"({'TPAMI 2023' if plus else 'ICLR 2022'})",
        url=f"https://arxiv.org/abs/{'2303.06908' if plus else '2108.00154'}",
        origin="https://github.com/cheerss/CrossFormer",
        parameters=parameters,
        macs=macs,
        paper=dict(zip(("parameters", "flops", "imagenet_top1_percent"), published, strict=True)),
        image=ImageSpec(interpolation="bicubic"),
        notes=(*NOTES, *OWN_NOTES.get(name, ())),
    )


CARDS = {name: _card(name) for name in _FIGURES}
CARDS["crossformer_tiny"] = reference_card(CARDS["crossformer_t"], "crossformer_tiny", 437_883, 98_999_724)
