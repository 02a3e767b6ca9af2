"""Plain vision transformers: ViT, DeiT and DeiT distilled, patches of 16x16 pixels, one resolution throughout.

Papers: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, https://arxiv.org/abs/2010.11929; Touvron et
al., "Training data-efficient image transformers & distillation through attention", ICML 2021,
https://arxiv.org/abs/2012.12877; Steiner et al., "How to train your ViT?", TMLR 2022,
https://arxiv.org/abs/2106.10270 (the `vit_*` weights).
Origin of names and numerics: https://github.com/facebookresearch/deit and timm 1.0.31 (both Apache-2.0; nothing copied
here). A `vit_*` and its `deit_*` are one graph; they differ in their weights and in how pictures are normalised.

This is the reference form: parameter names, layouts and arithmetic are the official network's. One thing is wider: the
size is read off the input, and where its grid is not that of the position embedding, the embedding is resampled.
Symbols as in `layers`; p prefix tokens (class and distillation token), n = p + h*w.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.checkpoint import replace_classifier
from edgevit.errors import UsageError
from edgevit.reference import reference_card
from edgevit.specs import MAX_SIDE, ImageSpec, ModelCard

from .layers import INIT_STD, BlockSequence, GroupedBlock, Mlp, SelfAttention, init_weights

PATCH = 16
HEAD_WIDTH = 64
DEPTH = 12
MLP_RATIO = 4
EPS = 1e-6  # of every LayerNorm here; PyTorch's own default is 1e-5


class ViTBlock(GroupedBlock):
    """LayerNorm, attention, residual; LayerNorm, MLP, residual. The whole sequence is one group."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, MLP_RATIO * dim)

    def partition(self, x: Tensor) -> Tensor:
        """x (b, 1, n, c) -> (b, n, c)."""
        return x.flatten(1, 2)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, n, c), height 1 and width n -> (b, n, c)."""
        groups = self.partition(self.norm1(x).view(-1, height, width, x.shape[-1]))
        x = x + self.attn.attend(groups)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Each PATCH x PATCH square of pixels becomes one token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, image: Tensor) -> Tensor:
        """image (b, 3, H, W) -> (b, h*w, c)."""
        return self.proj(image).flatten(2).transpose(1, 2)  # b c h w -> b h*w c


class VisionTransformer(nn.Module):
    """Patch embedding, prefix tokens, positions, blocks, classifier of the class token.

    Distilled: a second prefix token with its own classifier; the logits are the mean of both, as in official inference.
    """

    def __init__(self, config: ViTConfig, grid: int, num_classes: int) -> None:
        super().__init__()
        dim = config.width
        self.grid = (grid, grid)
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.prefix_tokens + grid * grid, dim))
        self.blocks = BlockSequence(ViTBlock(dim, dim // config.head_width) for _ in range(config.depth or DEPTH))
        self.norm = nn.LayerNorm(dim, EPS)
        self.head = nn.Linear(dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes) if config.distilled else None
        self.apply(init_weights)
        for token in self.prefix():
            nn.init.trunc_normal_(token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)

    def prefix(self) -> tuple[Tensor, ...]:
        """The tokens before those of the patches, each (1, 1, c)."""
        return (self.cls_token,) if self.dist_token is None else (self.cls_token, self.dist_token)

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """The grid of patches of an image of `height` x `width` pixels."""
        return height // PATCH, width // PATCH

    def position(self, height: int, width: int) -> Tensor:
        """What is added to all tokens of an image of `height` x `width` patches: (1, n, c)."""
        return resample_positions(self.pos_embed, len(self.prefix()), self.grid, (height, width))

    def forward(self, image: Tensor) -> Tensor:
        """image (b, 3, H, W), normalised, H and W multiples of 16 -> logits (b, classes)."""
        height, width = self.patches(image.shape[2], image.shape[3])
        patches = self.patch_embed(image)
        tokens = [token.expand(patches.shape[0], -1, -1) for token in self.prefix()]
        x = torch.cat([*tokens, patches], 1) + self.position(height, width)  # b p+h*w c
        x = self.norm(self.blocks(x, 1, x.shape[1]))
        logits: Tensor = self.head(x[:, 0])
        return logits if self.head_dist is None else (logits + self.head_dist(x[:, 1])) / 2


def resample_positions(table: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (1, p + h*w, c) of an `old` grid (h, w) for a `new` one, bicubic, antialiased, as timm does.

    The `prefix` rows are kept. The same grid returns the table itself.
    """
    if old == new:
        return table
    grid = table[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # 1 h*w c -> 1 c h w
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


@dataclass(frozen=True)
class ViTConfig:
    """What distinguishes one published variant from another."""

    width: int
    distilled: bool = False
    head_width: int = HEAD_WIDTH
    depth: int | None = None  # None: DEPTH

    @property
    def prefix_tokens(self) -> int:
        return 2 if self.distilled else 1


WIDTHS = {"tiny": 192, "small": 384, "base": 768}
CONFIGS = {
    **{f"deit_{size}": ViTConfig(width) for size, width in WIDTHS.items()},
    **{f"deit_{size}_distilled": ViTConfig(width, distilled=True) for size, width in WIDTHS.items()},
    **{f"vit_{size}": ViTConfig(width) for size, width in WIDTHS.items()},
    "vit_reference_tiny": ViTConfig(96, head_width=32, depth=4),
}


@dataclass(frozen=True)
class ViTOptions:
    """What `--option` takes: `pretrained_size` in pixels, the square whose positions the network stores.

    384 keeps the positions of a 384x384 checkpoint as they are; at 224 they are resampled when the weights load. Either
    way any legal image size runs, with the stored positions resampled to it.
    """

    pretrained_size: int = 224

    def __post_init__(self) -> None:
        if not PATCH <= self.pretrained_size <= MAX_SIDE or self.pretrained_size % PATCH:
            raise UsageError(
                f"pretrained_size {self.pretrained_size}: expected a multiple of {PATCH} from {PATCH} to {MAX_SIDE}"
            )


OPTIONS = ViTOptions
CLASSIFIER = "head"  # and `head_dist`, see `fit_checkpoint`
HEAD_PREFIXES = ("norm.", "head.", "head_dist.")

TORCHVISION = (  # what its names begin with or hold, and what takes that place
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


def build(name: str, options: ViTOptions, *, num_classes: int, features_only: bool) -> VisionTransformer:
    """The reference form with DeiT's initialisation.

    Raises:
        UsageError: features are asked for, and a plain transformer has no maps of several strides.
    """
    if features_only:
        raise UsageError(
            f"{name}: features_only needs maps of stride 4, 8, 16 and 32, and this family has stride {PATCH} alone; "
            "take a model of mobile_former, crossformer, swin or vit_lsla"
        )
    return VisionTransformer(CONFIGS[name], options.pretrained_size // PATCH, num_classes)


def filter_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeiT's and timm's names as they are, torchvision's renamed; nothing is dropped."""
    if "conv_proj.weight" not in state:
        return state
    return {_from_torchvision(key): tensor for key, tensor in state.items()}


def _from_torchvision(key: str) -> str:
    for pattern, replacement in TORCHVISION:
        key = re.sub(pattern, replacement, key)
    return key


def fit_checkpoint(state: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Resample positions to the module's grid; replace a distilled network's second classifier with its first.

    Positions of no square grid, or no positions at all, stay as they are, for the strict load to refuse.
    """
    state, note = replace_classifier(module, state, "head_dist")  # `head` was the caller's
    notes = [note] if note else []
    table, wanted = state.get("pos_embed"), module.state_dict()["pos_embed"]
    prefix = 2 if "dist_token" in module.state_dict() else 1
    if table is None or not table.is_floating_point() or table.shape == wanted.shape or table.dim() != 3:
        return state, tuple(notes)
    old, new = (math.isqrt(max(rows - prefix, 0)) for rows in (table.shape[1], wanted.shape[1]))
    if table.shape == (1, prefix + old * old, wanted.shape[2]) and old:
        state["pos_embed"] = resample_positions(table, prefix, (old, old), (new, new))
        notes.append(
            f"pos_embed was resampled from {old}x{old} to {new}x{new} patches: "
            f"pretrained_size={old * PATCH} keeps it as it is"
        )
    return state, tuple(notes)


# name: parameters (exact), MACs at 224x224 (convolutions, linears, matmuls), the paper's figures
_FIGURES: dict[str, tuple[int, int, dict[str, str | float]]] = {
    "deit_tiny": (5_717_416, 1_253_683_200, {"parameters": "5M", "imagenet_top1_percent": 72.2}),
    "deit_small": (22_050_664, 4_598_882_304, {"parameters": "22M", "imagenet_top1_percent": 79.9}),
    "deit_base": (86_567_656, 17_563_828_224, {"parameters": "86M", "imagenet_top1_percent": 81.8}),
    "deit_tiny_distilled": (5_910_800, 1_261_003_776, {"parameters": "6M", "imagenet_top1_percent": 74.5}),
    "deit_small_distilled": (22_436_432, 4_624_140_288, {"parameters": "22M", "imagenet_top1_percent": 81.2}),
    "deit_base_distilled": (87_338_192, 17_656_811_520, {"parameters": "87M", "imagenet_top1_percent": 83.4}),
    "vit_tiny": (5_717_416, 1_253_683_200, {"parameters": "5M"}),
    "vit_small": (22_050_664, 4_598_882_304, {"parameters": "22M"}),
    "vit_base": (86_567_656, 17_563_828_224, {"parameters": "86M"}),
}
_AUGREG = "for the weights that timm calls augreg: pictures normalised to [-1, 1], not with ImageNet's statistics"
_SAME_GRAPH = "the paper's parameters are those of the DeiT paper, for the same graph"
_TORCHVISION = (
    "torchvision's vit_b_16 weights load here (they want ImageNet's normalisation): the 224x224 ones were made for "
    "crop 0.875 and bilinear resizing, the 384x384 ones need pretrained_size=384"
)


def _card(name: str) -> ModelCard:
    parameters, macs, paper = _FIGURES[name]
    notes: tuple[str, ...]
    if name.startswith("deit"):
        title = "Training data-efficient image transformers & distillation through attention (ICML 2021)"
        url, origin = "https://arxiv.org/abs/2012.12877", "https://github.com/facebookresearch/deit"
        image, notes = ImageSpec(crop=0.9, interpolation="bicubic"), ("the paper's top-1 is the official README's",)
    else:
        title = "How to train your ViT? Data, Augmentation, and Regularization in Vision Transformers (TMLR 2022)"
        url, origin = "https://arxiv.org/abs/2106.10270", "https://github.com/huggingface/pytorch-image-models"
        half = (0.5, 0.5, 0.5)
        image, notes = ImageSpec(mean=half, std=half, crop=0.9, interpolation="bicubic"), (_AUGREG, _SAME_GRAPH)
    if name == "deit_base":
        notes = (*notes, _TORCHVISION)
    return ModelCard(name, "vit", title, url, origin, parameters, macs, paper, image, PATCH, notes)


CARDS = {name: _card(name) for name in _FIGURES}
CARDS["vit_reference_tiny"] = reference_card(CARDS["vit_tiny"], "vit_reference_tiny", 541_936, 131_404_032)
