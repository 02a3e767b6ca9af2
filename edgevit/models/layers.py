"""What the attention families share: token grouping on (b, h, w, c) maps, relative positions, the block's contract.

Everything here is a pure function of sizes: nothing is cached on a module, so a small image never changes what a later,
larger one gets. Constants come from NumPy, which a trace sees as constants and not as arithmetic.

Symbols: b batch, h w height and width in tokens, c channels, g groups, n tokens in a group, k heads, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

INIT_STD = 0.02  # of truncated-normal Linear weights and bias tables in all of these networks


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., c) -> (..., c)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Features(NamedTuple):
    """What a dense head gets: one map (b, c, H/s, W/s) for each stride s = 4, 8, 16, 32."""

    feature0: Tensor
    feature1: Tensor
    feature2: Tensor
    feature3: Tensor


class SelfAttention(nn.Module):
    """Multi-head self-attention inside groups of tokens, q, k and v from one Linear."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (b*g, n, c), bias (k, n, n), mask (g, n, n) or (g, 1, n) of the keys -> (b*g, n, c)."""
        _, n, c = x.shape
        qkv = self.qkv(x).reshape(-1, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # 3 b*g k n d
        q, key, value = qkv[0], qkv[1], qkv[2]
        logits = (q * self.scale) @ key.transpose(-2, -1)  # b*g k n n
        if bias is not None:
            logits = logits + bias.unsqueeze(0)
        if mask is not None:
            logits = logits.view(-1, len(mask), self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, self.heads, n, n)
        attended = (logits.softmax(-1) @ value).transpose(1, 2).reshape(-1, n, c)  # b*g k n d -> b*g n c
        out: Tensor = self.proj(attended)
        return out


class GroupedBlock(nn.Module, ABC):
    """A pre-norm transformer block whose attention stays within groups of tokens; what the deploy form relies on.

    The function is x + proj(attention(partition(norm1(x)))) put back in its place, then x + mlp(norm2(x)), then, in
    some blocks, ex_ln(ex_conv(x)) on the map. Which tokens form a group follows from (h, w) alone. `attn` has `heads`,
    `proj`, and `qkv` or `q` with, if they exist, `k` and `v`.
    """

    norm1: nn.LayerNorm
    attn: Any  # a module with the attributes named above
    norm2: nn.LayerNorm
    mlp: Mlp

    def __init__(self) -> None:
        super().__init__()
        self.ex_conv: nn.Conv2d | None = None
        self.ex_ln: nn.LayerNorm | None = None

    @abstractmethod
    def partition(self, x: Tensor) -> Tensor:
        """x (b, h, w, c) -> (b*g, n, c), the members of each group; zero where a group is padded."""

    def scale(self, height: int, width: int) -> Tensor | float:  # noqa: ARG002  # for networks that learn it by place
        """What the logits are multiplied with before a bias: a number, or (1, k, n, n)."""
        scale: float = self.attn.scale
        return scale

    def attention_bias(self, height: int, width: int) -> Tensor | None:  # noqa: ARG002  # most networks have one
        """What is added to the logits before the softmax, masks included: (1 or g, k, n, n), or nothing."""
        return None

    def outer_bias(self, height: int, width: int) -> Tensor | None:  # noqa: ARG002  # only LSLA has one
        """What is added to the weights after the softmax: (1 or g, k, n, n), or nothing."""
        return None


class BlockSequence(nn.ModuleList):
    """Blocks one after the other on one resolution. The deploy form replaces a whole sequence."""

    def __iter__(self) -> Iterator[GroupedBlock]:
        return cast("Iterator[GroupedBlock]", super().__iter__())

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c) -> (b, h*w, c)."""
        for block in self:
            x = block(x, height, width)
        return x


def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right, so that `rows` divides the height and `columns` the width of x (b, h, w, c)."""
    bottom, right = -x.shape[1] % rows, -x.shape[2] % columns
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def window_partition(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (b, h, w, c), `rows` and `columns` divide h and w -> (b*g, n, c), windows and their tokens row by row."""
    _, h, w, c = x.shape
    x = x.view(-1, h // rows, rows, w // columns, columns, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, c)  # b gh r gw s c -> b*gh*gw r*s c


def window_merge(windows: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    """Undo `window_partition` of a map of `height` and `width`: (b*g, n, c) -> (b, h, w, c)."""
    c = windows.shape[-1]
    x = windows.view(-1, height // rows, width // columns, rows, columns, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, c)  # b gh gw r s c -> b h w c


def constant(array: NDArray[np.generic], like: Tensor) -> Tensor:
    """A cached array on the device of `like`, and in its type if it is a floating-point one."""
    tensor = torch.from_numpy(array)
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


@lru_cache(maxsize=64)  # a network uses a handful of group sizes
def relative_offsets(rows: int, columns: int) -> NDArray[np.float32]:
    """All offsets (dy, dx) between two tokens of a group, dy slowest: ((2*rows-1)*(2*columns-1), 2)."""
    dy, dx = np.meshgrid(np.arange(1 - rows, rows), np.arange(1 - columns, columns), indexing="ij")
    return np.stack([dy, dx], axis=-1).reshape(-1, 2).astype(np.float32)


@lru_cache(maxsize=64)  # a network uses a handful of group sizes
def relative_position_index(rows: int, columns: int, table_rows: int = 0, table_columns: int = 0) -> NDArray[np.int64]:
    """Row of the table of offsets for each (query, key) of a group: (n, n).

    A table made for larger groups (`table_rows`, `table_columns`) is read in its middle, where the same offsets lie.
    """
    reach_y, reach_x = max(rows, table_rows) - 1, max(columns, table_columns) - 1
    y, x = (axis.reshape(-1) for axis in np.mgrid[:rows, :columns])
    dy, dx = y[:, None] - y + reach_y, x[:, None] - x + reach_x
    return (dy * (2 * reach_x + 1) + dx).astype(np.int64)


def spread_over_pairs(table: Tensor, index: NDArray[np.int64]) -> Tensor:
    """A table by relative position (m, k) as one by pair of tokens (k, n, n); index (n, n) says which row."""
    n = len(index)
    pairs = table[constant(index, table).view(-1)].view(n, n, -1)
    return pairs.permute(2, 0, 1).contiguous()  # n n k -> k n n


def resize_bias_table(table: Tensor, rows: int) -> Tensor:
    """A table of square windows, ((2m-1)^2, k), resampled bicubically to `rows` rows, as Swin's official loader does.

    Both counts must be squares; a table of any other shape is returned as it is, for the strict load to refuse.
    """
    if table.dim() != 2 or not table.is_floating_point() or not table.numel():
        return table
    old, new = round(table.shape[0] ** 0.5), round(rows**0.5)
    if old == new or old * old != table.shape[0] or new * new != rows:
        return table
    grid = table.t().reshape(1, table.shape[1], old, old)  # m*m k -> 1 k m m
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(table.shape[1], rows).t().contiguous()


def init_weights(module: nn.Module) -> None:
    """The initialisation that these networks share; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
