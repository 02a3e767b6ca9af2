"""Attention within groups of tokens: windows, shifted windows, SDA and LDA groups, or the whole sequence.

A group is a list of token positions, so window partition, cyclic shift, long-distance grouping, padding and the way
back are one thing: a constant index. Everything else in a block works token by token and does not care for their
order, so tokens stay in the order of the last groups, and one Gather brings them into the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.models.layers import BlockSequence, GroupedBlock

from .certificate import Changed, DeploySpec
from .linear import affine, make_linear
from .position_bias import LogitBias, add_by_group, folded_parameters, masks_pads
from .take import Take
from .token_sizes import token_sizes


def group_tokens(model: nn.Module, spec: DeploySpec) -> Changed:
    """Grouped attention as plain matrix products between constants.

    Given:  x + back(proj(attention(partition(norm1(x))))), with roll, zero pads and transposes of rank 6 to 8 both
            ways; q, k, v from one Linear, split by a transpose of rank 5; q scaled; bias tables or an MLP for the
            position bias; bias and mask added one after the other
    Result: one Gather of rows where the order of tokens changes, none where a group is the whole map; a padded group is
            entered and left by a Gather, and its pads pass no Linear; q, k, v from a Linear each, a fixed scale inside
            q's; bias and mask one constant
    """
    blocks = parameters = masked = 0
    for name, (height, width) in token_sizes(model, BlockSequence, spec).items():
        sequence = model.get_submodule(name)
        if not isinstance(sequence, BlockSequence):
            raise TypeError(f"{name}: expected a BlockSequence")
        blocks += len(sequence)
        parameters += sum(folded_parameters(block) for block in sequence)
        form = TokenBlocks(sequence, height, width, spec)
        masked += sum(m.masked for m in form.modules() if isinstance(m, GroupedAttention))
        model.set_submodule(name, form)
    note = f"position biases of {blocks} blocks, {parameters} parameters, are constants; {masked} hold a mask as well"
    return model, blocks, (note,) if parameters else ()


class TokenBlocks(nn.Module):
    """What a BlockSequence becomes: the same call, tokens kept in the order of the groups in between."""

    def __init__(self, sequence: BlockSequence, height: int, width: int, spec: DeploySpec) -> None:
        super().__init__()
        self.tokens = height * width
        steps: list[nn.Module] = []
        raster = order = torch.arange(self.tokens)  # order[i]: the raster position of the token at place i
        for block in sequence:
            groups, bias = _members(block, height, width)
            flat = groups.flatten()
            if (flat >= 0).all():
                steps += _reorder(order, flat, spec)
                order = flat
            steps.append(TokenBlock(block, groups, bias, order, (height, width), spec))
            if block.ex_conv is not None and block.ex_ln is not None:
                steps += _reorder(order, raster, spec)
                order = raster
                steps.append(Cooling(block.ex_conv, block.ex_ln, height, width))
        self.steps = nn.ModuleList([*steps, *_reorder(order, raster, spec)])

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # noqa: ARG002  # those it was made for
        """x (b, h*w, c), row by row -> (b, h*w, c), row by row."""
        c = x.shape[-1]
        x = x.reshape(-1, c)
        for step in self.steps:
            x = step(x)
        return x.view(-1, self.tokens, c)


def _members(block: GroupedBlock, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """The raster positions of each group's tokens, -1 for a pad: (g, n); and the bias (1 or g, k or 1, n, n).

    Pads that nobody attends to are left out where there is one group.
    """
    positions = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, height, width, 1)
    groups, bias = block.partition(positions)[..., 0].long() - 1, block.attention_bias(height, width)
    if len(groups) == 1 and bias is not None and masks_pads(bias, groups):
        real = groups[0] >= 0
        return groups[:, real], bias[:, :, real][..., real]
    return groups, bias


def _places(order: Tensor) -> Tensor:
    """The inverse of an order: where each raster position stands."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _reorder(now: Tensor, wanted: Tensor, spec: DeploySpec) -> list[nn.Module]:
    return [] if torch.equal(now, wanted) else [Take(_places(now)[wanted], len(now), spec)]


class Cooling(nn.Module):
    """A block's convolution and norm on the map, which needs the tokens in raster order."""

    def __init__(self, conv: nn.Conv2d, norm: nn.LayerNorm, height: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.height, self.width = conv, norm, height, width

    def forward(self, x: Tensor) -> Tensor:
        """x (b*h*w, c) -> (b*h*w, c)."""
        x = x.view(-1, self.height * self.width, x.shape[1]).transpose(1, 2)  # b*h*w c -> b c h*w
        x = self.conv(x.unflatten(2, (self.height, self.width))).flatten(2)
        out: Tensor = self.norm(x.transpose(1, 2).flatten(0, 1))  # b c h*w -> b*h*w c
        return out


class TokenBlock(nn.Module):
    """One block on rows of tokens: norm, grouped attention, residual; norm, MLP, residual."""

    def __init__(
        self,
        block: GroupedBlock,
        groups: Tensor,
        bias: Tensor | None,
        order: Tensor,
        size: tuple[int, int],
        spec: DeploySpec,
    ) -> None:
        super().__init__()
        self.tokens = len(order)
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = GroupedAttention(block, groups, bias, order, size, spec)

    def forward(self, x: Tensor) -> Tensor:
        """x (b*t, c) -> (b*t, c)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Pads(nn.Module):
    """Into padded groups and out of them.

    A pad is a row of zeros before the Linears, so it is their bias after them. Where the bias masks every pad's key,
    any finite row does as well, and the first token stands in.
    """

    def __init__(self, groups: Tensor, order: Tensor, spec: DeploySpec, *, masked: bool) -> None:
        super().__init__()
        tokens, flat = len(order), groups.flatten()
        self.tokens, self.masked, self.one_picture = tokens, masked, spec.batch == 1
        real = (flat >= 0).nonzero().flatten()
        source = torch.full_like(flat, 0 if masked else tokens)
        source[real] = _places(order)[flat[real]]
        place = torch.empty(tokens, dtype=torch.long)  # of each raster position among the groups' members
        place[flat[real]] = real
        self.enter = Take(source, tokens if masked else tokens + 1, spec)
        self.leave = Take(place[order], len(flat), spec)

    def extend(self, y: Tensor) -> Tensor:
        """y (b*t, c) -> (b*t, c), or with a row of zeros behind each picture's tokens (b*(t+1), c)."""
        if self.masked:
            return y
        if self.one_picture:
            return F.pad(y, (0, 0, 0, 1))
        return F.pad(y.view(-1, self.tokens, y.shape[1]), (0, 0, 0, 1)).flatten(0, 1)


class GroupedAttention(nn.Module):
    """proj((softmax(q k^T * scale + bias) + outer bias) v) in each group.

    A part that a network does not have is None: LSLA takes the tokens themselves for k and v, and only it has an outer
    bias and a scale that vary with the position.
    """

    scale: Tensor | None
    outer: Tensor | None

    def __init__(
        self,
        block: GroupedBlock,
        groups: Tensor,
        bias: Tensor | None,
        order: Tensor,
        size: tuple[int, int],
        spec: DeploySpec,
    ) -> None:
        super().__init__()
        attn, scale = block.attn, block.scale(*size)
        self.groups, self.members = groups.shape
        self.heads, self.one_picture = attn.heads, spec.batch == 1
        self.q, self.k, self.v = _projections(attn, 1.0 if isinstance(scale, Tensor) else scale)
        self.proj: nn.Linear = attn.proj
        self.bias = None if bias is None else LogitBias(bias, self.groups, one_picture=self.one_picture)
        self.masked = bias is not None and bias.shape[0] > 1
        self.register_buffer("scale", scale if isinstance(scale, Tensor) else None)
        self.register_buffer("outer", block.outer_bias(*size))
        padded = bool((groups < 0).any())
        self.pads = Pads(groups, order, spec, masked=masks_pads(bias, groups)) if padded else None

    def forward(self, y: Tensor) -> Tensor:
        """y (b*t, c) -> (b*t, c)."""
        if self.pads is not None:
            y = self.pads.extend(y)
        q, k, v = (self._grouped(y if linear is None else linear(y)) for linear in (self.q, self.k, self.v))
        logits = q @ k.transpose(-2, -1)  # b*g k n n
        if self.scale is not None:
            logits = logits * self.scale
        weights = (logits if self.bias is None else self.bias(logits)).softmax(-1)
        if self.outer is not None:
            weights = add_by_group(weights, self.outer, self.groups, one_picture=self.one_picture)
        out = self.join(weights @ v)
        if self.pads is not None:
            out = self.pads.leave(out)
        projected: Tensor = self.proj(out)
        return projected

    def _grouped(self, y: Tensor) -> Tensor:
        """y (b*t, c) -> (b*g, k, n, d)."""
        return self.split(y if self.pads is None else self.pads.enter(y), self.members)

    def split(self, y: Tensor, members: int) -> Tensor:
        """y (b*g*n, c) -> (b*g, k, n, d), `members` tokens in a group."""
        return y.view(-1, members, self.heads, y.shape[1] // self.heads).transpose(1, 2)

    def join(self, out: Tensor) -> Tensor:
        """out (b*g, k, n, d) -> (b*g*n, c)."""
        return out.transpose(1, 2).reshape(-1, self.heads * out.shape[3])


def _projections(attn: Any, scale: float) -> tuple[nn.Linear, nn.Linear | None, nn.Linear | None]:
    """Linears to q (scaled), k and v; None where the tokens themselves are taken."""
    qkv = getattr(attn, "qkv", None)
    if isinstance(qkv, nn.Linear):
        parts = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        q, k, v = (make_linear(weight, bias) for weight, bias in parts)
        return affine(q, scale), k, v
    return affine(attn.q, scale), getattr(attn, "k", None), getattr(attn, "v", None)
