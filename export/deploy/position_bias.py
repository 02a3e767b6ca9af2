"""What the logits of grouped attention are scaled with and what is added: constants of the weights and the map size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevit.models.layers import GroupedBlock

# What lies so far below the largest of its row is a mask: theirs are -100 and -1e6, learnt biases a few units apart.
GAP = 50.0
# What a mask becomes. exp(-100) is a denormal number, and a MatMul that meets denormals ran eight times slower; -1e6 is
# infinite in float16. exp(-1e4) is 0 in every type, as the networks mean it.
MASK = -1e4
# Bytes of float32 from which bias and mask stay two constants: a merged one is read once for each inference, and above
# this it costs more than a second addition.
MERGE_BYTES = 8 << 20


class LogitBias(nn.Module):
    """The bias of one block as constants: relative positions or the DPB's output, with shift or pad masks.

    One tensor (1 or g, k, n, n), or a bias (1, k, n, n) and a mask (g, 1, n, n) where the product would be large.
    """

    bias: Tensor
    mask: Tensor | None

    def __init__(self, bias: Tensor, groups: int, *, one_picture: bool) -> None:
        super().__init__()
        self.groups, self.one_picture = groups, one_picture
        masked = is_masked(bias)
        mask = None
        if len(bias) > 1 and 4 * bias.numel() > MERGE_BYTES and torch.equal(masked, masked[:, :1].expand_as(masked)):
            mask = masked[:, :1].to(bias.dtype) * MASK  # the same for every head
            bias = bias.amax(0, keepdim=True)  # the same in every group that does not mask it
            masked = is_masked(bias)
        self.register_buffer("bias", bias.masked_fill(masked, MASK).clamp(min=MASK))
        self.register_buffer("mask", mask)

    def forward(self, logits: Tensor) -> Tensor:
        """logits (b*g, k, n, n) -> the same."""
        for term in (self.bias, self.mask):
            if term is not None:
                logits = add_by_group(logits, term, self.groups, one_picture=self.one_picture)
        return logits


def add_by_group(x: Tensor, term: Tensor, groups: int, *, one_picture: bool) -> Tensor:
    """x (b*g, k, n, n) plus what each of the `groups` of every picture gets, term (1 or g, k or 1, n, n)."""
    if one_picture or len(term) == 1:
        return x + term
    return (x.view(-1, groups, *x.shape[1:]) + term).flatten(0, 1)


def is_masked(bias: Tensor) -> Tensor:
    """Which entries of a bias (..., queries, keys) keep a query from a key.

    Not by their value: a softmax does not notice what is added to a whole row. Where all keys of a row are masked, as
    for the queries of a group of pads alone, none is said to be.
    """
    return bias < bias.amax(-1, keepdim=True) - GAP


def masks_pads(bias: Tensor | None, groups: Tensor) -> bool:
    """Whether no token attends to a pad; bias (1 or g, k, n, n), groups (g, n) with -1 for a pad."""
    if bias is None:
        return False
    pad = groups < 0
    attends = ~pad[:, None, :, None] & pad[:, None, None, :]  # g 1 n n: a token's query and a pad's key
    return not bool((attends & ~is_masked(bias)).any())


def folded_parameters(block: GroupedBlock) -> int:
    """Parameters of a block's attention that become constants: bias tables, or the MLP that makes a dynamic bias."""
    kept = {"qkv", "q", "k", "v", "proj"}
    return sum(p.numel() for name, p in block.attn.named_parameters() if name.split(".")[0] not in kept)
