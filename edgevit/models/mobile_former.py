"""Mobile-Former: a MobileNet and a handful of global tokens that talk through two-way bridges.

Paper: Chen et al., "Mobile-Former: Bridging MobileNet and Transformer", CVPR 2022, https://arxiv.org/abs/2108.05895
Origin of names and numerics: https://github.com/AAboys/MobileFormer at f447310 (no licence file; nothing copied here).

This is the reference form: parameter names, layouts and arithmetic are the official network's, nothing is optimised.
It departs from the paper where the official code does: the Mobile->Former bridge is gated, and the Former attends to
the tokens themselves (K = V = Z, no projections).

Symbols: n batch, c channels, h w height and width, t tokens, d token width, k heads, e hidden channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.reference import reference_card
from edgevit.specs import ModelCard

BRIDGE_HEADS = 2
FORMER_HEADS = 4
FORMER_RATIO = 2
HYPER_REDUCTION = 4
HEAD_EXPANSION = 6


@dataclass(frozen=True)
class Row:
    """One block: kind D (depthwise first, may stride) or S (pointwise first), expansions, output channels, stride.

    `e2 == 0` marks the token-free lite bottleneck; in an S row `e2` has no other meaning.
    """

    kind: Literal["D", "S"]
    e1: int
    channels: int
    stride: int
    e2: int


@dataclass(frozen=True)
class MobileFormerConfig:
    """What distinguishes one published variant from another."""

    stem: int
    tokens: int
    width: int
    hidden: int
    rows: tuple[Row, ...]
    groups: int = 1


def _rows(text: str) -> tuple[Row, ...]:
    """Parse "D6,24,s2,4 S4,24,s1,4": kind and e1, channels, stride, e2."""
    rows = []
    for item in text.split():
        head, channels, stride, e2 = item.split(",")
        kind: Literal["D", "S"] = "D" if head[0] == "D" else "S"
        rows.append(Row(kind, int(head[1:]), int(channels), int(stride[1:]), int(e2)))
    return tuple(rows)


def hard_sigmoid(y: Tensor) -> Tensor:
    return F.relu6(y + 3) / 6


def hard_swish(x: Tensor) -> Tensor:
    return x * hard_sigmoid(x)


class ChannelShuffle(nn.Module):
    """Interleave `groups` contiguous channel groups: out[i * groups + g] = in[g * (c / groups) + i]."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)  # n c h w -> n g c/g h w -> n c h w


def shuffle_or_identity(groups: int, *, active: bool = True) -> nn.Module:
    return ChannelShuffle(groups) if active and groups > 1 else nn.Identity()


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, *, shuffle: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, and the shuffle that follows it where `shuffle` > 1."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), shuffle_or_identity(shuffle))


class DynamicReLU(nn.Module):
    """max(a1 x, a2 x), a1 in [0, 2] and a2 in [-1, 1] per channel, from a two-layer MLP on tokens (paper section 3.2).

    The slopes come from token 0 alone, or with `spatial`, per position, from all tokens weighted by the attention of
    the Mobile->Former bridge (the official code's `hyper_token_id = -1`; same parameters).
    """

    def __init__(self, width: int, channels: int, *, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        squeezed = width // HYPER_REDUCTION
        self.hyper = nn.Sequential(nn.Linear(width, squeezed), nn.ReLU(), nn.Linear(squeezed, 2 * channels))

    def forward(self, x: Tensor, z: Tensor, scores: Tensor) -> Tensor:
        """x (n, e, h, w), z (n, t, d), scores (n, k, t, h', w') before the softmax -> (n, e, h, w)."""
        if self.spatial:
            theta = hard_sigmoid(self.hyper(z)).transpose(1, 2)  # n t 2e -> n 2e t
            share = scores.mean(1)  # n k t h' w' -> n t h' w'
            if share.shape[-2:] != x.shape[-2:]:
                share = F.adaptive_avg_pool2d(share, (x.shape[2], x.shape[3]))  # n t h' w' -> n t h w
            theta = (theta @ share.softmax(1).flatten(2)).unflatten(2, x.shape[-2:])  # n 2e t @ n t hw -> n 2e h w
        else:
            theta = hard_sigmoid(self.hyper(z[:, 0]))[:, :, None, None]  # n d -> n 2e 1 1
        s1, s2 = theta.chunk(2, dim=1)
        a1, a2 = 2 * (s1 - 0.5) + 1, 2 * (s2 - 0.5)
        return torch.maximum(a1 * x, a2 * x)


class MobileToFormer(nn.Module):
    """Bridge Mobile->Former: tokens attend to the feature map, K = V = X, output gated, post-norm (section 3.1)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.scale = (channels // BRIDGE_HEADS) ** -0.5
        self.q = nn.Linear(width, channels)
        self.alpha = nn.Sequential(nn.Linear(width, channels))
        self.proj = nn.Linear(channels, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, c, h, w), z (n, t, d) -> updated tokens (n, t, d), scaled scores before softmax (n, k, t, h, w)."""
        kv = x.flatten(2).unflatten(1, (BRIDGE_HEADS, -1))  # n c h w -> n k c/k hw
        q = self.q(z).unflatten(2, (BRIDGE_HEADS, -1)).transpose(1, 2)  # n t d -> n k t c/k
        scores = self.scale * (q @ kv)  # n k t hw
        out = (scores.softmax(-1) @ kv.transpose(2, 3)).transpose(1, 2).flatten(2)  # n k t c/k -> n t c
        out = out * 2 * hard_sigmoid(self.alpha(z))
        return self.layer_norm(z + self.proj(out)), scores.unflatten(3, x.shape[-2:])


class Former(nn.Module):
    """Post-norm transformer layer on the tokens; keys and values are the tokens themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = (width // FORMER_HEADS) ** -0.5
        self.q = nn.Linear(width, width)
        self.channel_mlp = nn.Linear(width, width)  # the attention's output projection, under its official name
        self.layer_norm = nn.LayerNorm(width)
        hidden = FORMER_RATIO * width
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, z: Tensor) -> Tensor:
        """z (n, t, d) -> (n, t, d)."""
        q, kv = (a.unflatten(2, (FORMER_HEADS, -1)).transpose(1, 2) for a in (self.q(z), z))  # n t d -> n k t d/k
        scores = self.scale * (q @ kv.transpose(2, 3))  # n k t t
        out = (scores.softmax(-1) @ kv).transpose(1, 2).flatten(2)  # n k t d/k -> n t d
        z = self.layer_norm(z + self.channel_mlp(out))
        return self.ffn_norm(z + self.ffn(z))


class FormerToMobile(nn.Module):
    """Bridge Mobile<-Former: every position attends to the tokens, Q = X, plain residual."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.scale = (channels // BRIDGE_HEADS) ** -0.5
        self.k = nn.Linear(width, channels)
        self.proj = nn.Linear(width, channels)  # the value projection, under its official name

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, c, h, w), z (n, t, d) -> (n, c, h, w)."""
        q = x.flatten(2).unflatten(1, (BRIDGE_HEADS, -1)).transpose(2, 3)  # n c h w -> n k hw c/k
        k, v = (a.unflatten(2, (BRIDGE_HEADS, -1)).transpose(1, 2) for a in (self.k(z), self.proj(z)))  # n k t c/k
        scores = self.scale * (q @ k.transpose(2, 3))  # n k hw t
        out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(1, 2)  # n k hw c/k -> n c hw
        return x + out.unflatten(2, x.shape[-2:])


class LiteBottleneck(nn.Module):
    """Row 0: depthwise, ReLU6, pointwise; the tokens pass untouched."""

    def __init__(self, c_in: int, row: Row, groups: int) -> None:
        super().__init__()
        hidden = c_in * row.e1
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, hidden, 3, row.stride, 1, groups=c_in, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            shuffle_or_identity(c_in, active=groups > 1),
            nn.Conv2d(hidden, row.channels, 1, groups=groups, bias=False),
            nn.BatchNorm2d(row.channels),
        )
        self.residual = row.stride == 1 and c_in == row.channels

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        out = self.conv(x)
        return (x + out if self.residual else out), z


class MobileFormerBlock(nn.Module, ABC):
    """Bridge in, Former, Mobile sub-block steered by token 0, bridge out; subclasses supply the Mobile sub-block."""

    def __init__(self, c_in: int, c_out: int, width: int) -> None:
        super().__init__()
        self.local_global = MobileToFormer(c_in, width)
        self.global_block = Former(width)
        self.global_local = FormerToMobile(c_out, width)

    @abstractmethod
    def mobile(self, x: Tensor, z: Tensor, scores: Tensor) -> Tensor:
        """x (n, c_in, h, w) -> (n, c_out, h', w'), with the residuals that belong to the Mobile sub-block."""

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, c_in, h, w), z (n, t, d) -> (n, c_out, h', w'), (n, t, d)."""
        z, scores = self.local_global(x, z)
        z = self.global_block(z)
        return self.global_local(self.mobile(x, z, scores), z), z


class PointwiseFirst(MobileFormerBlock):
    """Kind S: pointwise, depthwise, pointwise."""

    def __init__(self, c_in: int, row: Row, width: int, groups: int, *, spatial: bool) -> None:
        super().__init__(c_in, row.channels, width)
        hidden = c_in * row.e1
        self.conv1 = conv_bn(c_in, hidden, 1, groups=groups, shuffle=groups)
        self.hyper1 = DynamicReLU(width, hidden, spatial=spatial)
        self.conv2 = conv_bn(hidden, hidden, 3, row.stride, groups=hidden)
        self.hyper2 = DynamicReLU(width, hidden, spatial=spatial)
        self.conv3 = conv_bn(hidden, row.channels, 1, groups=groups, shuffle=groups)
        self.residual = row.stride == 1 and c_in == row.channels

    def mobile(self, x: Tensor, z: Tensor, scores: Tensor) -> Tensor:
        out = self.hyper1(self.conv1(x), z, scores)  # n c_in h w -> n e h w
        out = self.conv3(self.hyper2(self.conv2(out), z, scores))  # n e h w -> n c_out h' w'
        return x + out if self.residual else out


class DepthwiseFirst(MobileFormerBlock):
    """Kind D, where the resolution halves: depthwise, pointwise, depthwise, pointwise."""

    def __init__(self, c_in: int, row: Row, width: int, groups: int, *, spatial: bool) -> None:
        super().__init__(c_in, row.channels, width)
        c_out, hidden1, hidden2 = row.channels, c_in * row.e1, row.channels * row.e2
        self.conv1 = conv_bn(c_in, hidden1, 3, row.stride, groups=c_in, shuffle=c_in if groups > 1 else 1)
        self.hyper1 = DynamicReLU(width, hidden1, spatial=spatial)
        self.conv2 = conv_bn(hidden1, c_out, 1, groups=groups)
        self.conv3 = conv_bn(c_out, hidden2, 3, groups=c_out, shuffle=c_out if groups > 1 else 1)
        self.hyper3 = DynamicReLU(width, hidden2, spatial=spatial)
        self.conv4 = conv_bn(hidden2, c_out, 1, groups=groups)

    def mobile(self, x: Tensor, z: Tensor, scores: Tensor) -> Tensor:
        out = self.conv2(self.hyper1(self.conv1(x), z, scores))  # n c_in h w -> n e1 h' w' -> n c_out h' w'
        return out + self.conv4(self.hyper3(self.conv3(out), z, scores))  # n c_out h' w' -> n e2 h' w' -> n c_out h' w'


class Classifier(nn.Module):
    """Pointwise expansion, pooling, hard-swish, [pooled, token 0] -> two Linear layers."""

    def __init__(self, channels: int, width: int, hidden: int, groups: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        expanded = HEAD_EXPANSION * channels
        self.conv = nn.Sequential(
            shuffle_or_identity(groups),
            nn.Conv2d(channels, expanded, 1, groups=groups, bias=False),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(),
        )
        self.fc = nn.Sequential(nn.Linear(expanded + width, hidden), nn.BatchNorm1d(hidden))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, c, h, w), z (n, t, d) -> logits (n, classes)."""
        pooled = hard_swish(self.conv(x).mean((2, 3)))  # n c h w -> n 6c
        hidden = self.fc(torch.cat([pooled, z[:, 0]], dim=1))  # n 6c+d -> n fc
        logits: Tensor = self.classifier(hard_swish(hidden))
        return logits


class MobileFormer(nn.Module):
    """The classification network, or with `features_only` the backbone without the last bridge and the head."""

    def __init__(
        self,
        config: MobileFormerConfig,
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        spatial_dynamic_relu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features_only = features_only
        self.tokens = nn.Embedding(config.tokens, config.width)
        conv, norm, _ = conv_bn(3, config.stem, 3, 2)
        self.stem = nn.Sequential(conv, norm, nn.ReLU6())
        self.features = nn.ModuleList()
        channels, stride, self.strides = config.stem, 2, []
        for row in config.rows:
            self.features.append(_block(channels, row, config, spatial=spatial_dynamic_relu))
            channels, stride = row.channels, stride * row.stride
            self.strides.append(stride)
        if not features_only:
            self.local_global = MobileToFormer(channels, config.width)
            self.classifier = Classifier(channels, config.width, config.hidden, config.groups, num_classes, dropout)
        self.apply(_init)

    def forward(self, image: Tensor) -> Tensor | Features:
        """image (n, 3, h, w), normalised, h and w multiples of 32 -> logits (n, classes), or `Features`."""
        z = self.tokens.weight.expand(image.shape[0], -1, -1)  # t d -> n t d
        x = self.stem(image)  # n 3 h w -> n c h/2 w/2
        maps: dict[int, Tensor] = {}
        for block, stride in zip(self.features, self.strides, strict=True):
            x, z = block(x, z)
            maps[stride] = x
        if self.features_only:
            return Features(maps[4], maps[8], maps[16], maps[32], z)
        z, _ = self.local_global(x, z)
        logits: Tensor = self.classifier(x, z)
        return logits


class Features(NamedTuple):
    """What a dense head gets: the last map (n, c, h/s, w/s) of each stride s, and the tokens (n, t, d)."""

    feature0: Tensor
    feature1: Tensor
    feature2: Tensor
    feature3: Tensor
    tokens: Tensor


def _block(channels: int, row: Row, config: MobileFormerConfig, *, spatial: bool) -> nn.Module:
    if row.e2 == 0:
        return LiteBottleneck(channels, row, config.groups)
    kind = DepthwiseFirst if row.kind == "D" else PointwiseFirst
    return kind(channels, row, config.width, config.groups, spatial=spatial)


def _init(module: nn.Module) -> None:
    """The official initialisation; for convolutions the fan is not divided by the groups."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)


# fmt: off  # one row a stage of the table in the paper reads better than one tuple a line
CONFIGS = {
    "mobileformer_26m": MobileFormerConfig(
        8,
        3,
        128,
        1024,
        groups=4,
        rows=_rows(
            "D3,12,s2,0 S3,12,s1,3 D6,24,s2,4 S3,24,s1,3 D6,48,s2,4 S4,48,s1,4 S6,64,s1,4 D6,96,s2,4 S6,96,s1,4"
        ),
    ),
    "mobileformer_52m": MobileFormerConfig(
        8,
        3,
        128,
        1024,
        rows=_rows(
            "D3,12,s2,0 S3,12,s1,3 D6,24,s2,4 S3,24,s1,3 D6,48,s2,4 S4,48,s1,4 S6,64,s1,4 D6,96,s2,4 S6,96,s1,4"
        ),
    ),
    "mobileformer_96m": MobileFormerConfig(
        12,
        4,
        128,
        1280,
        rows=_rows(
            "D2,12,s1,0 D6,16,s2,4 D6,32,s2,4 S3,32,s1,3 D6,64,s2,4 S4,64,s1,4 S6,88,s1,4 D6,128,s2,4 S6,128,s1,4"
        ),
    ),
    "mobileformer_151m": MobileFormerConfig(
        12,
        6,
        192,
        1280,
        rows=_rows(
            "D2,12,s1,0 D6,16,s2,4 S3,16,s1,3 D6,32,s2,4 S3,32,s1,3 D6,64,s2,4 S4,64,s1,4 S6,88,s1,4 S6,88,s1,4"
            " D6,128,s2,4 S6,128,s1,4 S6,128,s1,4"
        ),
    ),
    "mobileformer_214m": MobileFormerConfig(
        12,
        6,
        192,
        1600,
        rows=_rows(
            "D2,12,s1,0 D6,20,s2,4 S3,20,s1,4 D6,40,s2,4 S4,40,s1,4 D6,80,s2,4 S4,80,s1,4 S6,112,s1,4 S6,112,s1,4"
            " D6,160,s2,4 S6,160,s1,4 S6,160,s1,4"
        ),
    ),
    "mobileformer_294m": MobileFormerConfig(
        16,
        6,
        192,
        1920,
        rows=_rows(
            "D2,16,s1,0 D6,24,s2,4 S4,24,s1,4 D6,48,s2,4 S4,48,s1,4 D6,96,s2,4 S4,96,s1,4 S6,128,s1,4 S6,128,s1,4"
            " D6,192,s2,4 S6,192,s1,4 S6,192,s1,4"
        ),
    ),
    "mobileformer_508m": MobileFormerConfig(
        24,
        6,
        192,
        1920,
        rows=_rows(
            "D2,24,s1,0 D6,40,s2,4 S3,40,s1,3 D6,72,s2,4 S3,72,s1,3 D6,128,s2,4 S4,128,s1,4 S6,176,s1,4 S6,176,s1,4"
            " D6,240,s2,4 S6,240,s1,4 S6,240,s1,4"
        ),
    ),
    "mobileformer_tiny": MobileFormerConfig(
        8, 3, 64, 256, rows=_rows("D3,12,s2,0 D4,24,s2,3 S3,24,s1,3 D4,40,s2,3 D4,64,s2,3")
    ),
}
# fmt: on


@dataclass(frozen=True)
class MobileFormerOptions:
    """What `--option` takes: `spatial_dynamic_relu` computes slopes per position from all tokens, same parameters."""

    spatial_dynamic_relu: bool = False


# name: parameters (exact), MACs at 224x224 (convolutions, linears, matmuls), the paper's top-1 in percent
_FIGURES = {
    "mobileformer_26m": (3_232_788, 23_550_208, 64.0),
    "mobileformer_52m": (3_469_092, 49_290_496, 68.7),
    "mobileformer_96m": (4_585_252, 92_017_040, 72.8),
    "mobileformer_151m": (7_595_828, 146_249_168, 75.2),
    "mobileformer_214m": (9_425_920, 208_374_240, 76.7),
    "mobileformer_294m": (11_422_648, 286_732_160, 77.9),
    "mobileformer_508m": (13_976_976, 498_467_680, 79.3),
}

OPTIONS = MobileFormerOptions
CLASSIFIER = "classifier.classifier.1"
HEAD_PREFIXES = ("local_global.", "classifier.")


def build(name: str, options: MobileFormerOptions, *, num_classes: int, features_only: bool) -> MobileFormer:
    """The reference form with its official initialisation."""
    return MobileFormer(
        CONFIGS[name],
        num_classes=num_classes,
        features_only=features_only,
        spatial_dynamic_relu=options.spatial_dynamic_relu,
    )


def filter_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints carry this file's names already."""
    return state


def fit_checkpoint(
    state: dict[str, Tensor],
    module: nn.Module,  # noqa: ARG001  # families whose tables depend on the options look at it
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Nothing depends on the options or the image size."""
    return state, ()


CARDS = {
    name: ModelCard(
        name=name,
        family="mobile_former",
        title="Mobile-Former: Bridging MobileNet and Transformer (CVPR 2022)",
        url="https://arxiv.org/abs/2108.05895",
        origin="https://github.com/AAboys/MobileFormer",
        parameters=parameters,
        macs=macs,
        paper={"flops": f"{name.split('_')[1].upper()}", "imagenet_top1_percent": top1},
        notes=(
            "the paper's FLOPs are multiply-adds and count element-wise work too: 2 to 10 % above the MACs here",
            "follows the official code where it departs from the paper: gated Mobile->Former bridge, K = V = Z Former",
        ),
    )
    for name, (parameters, macs, top1) in _FIGURES.items()
}
CARDS["mobileformer_tiny"] = reference_card(CARDS["mobileformer_26m"], "mobileformer_tiny", 382_232, 16_565_056)
