"""The Former layer: heads by masking instead of by transposing, residual biases inside the norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.models.mobile_former import FORMER_HEADS, Former

from .certificate import Changed, DeploySpec
from .linear import ResidualLinear, affine, make_linear, unshift


def masked_former(model: nn.Module, spec: DeploySpec) -> Changed:
    """With a handful of tokens the head split costs more than the attention; a mask needs no data movement.

    Given:  heads of q and z split, transposed, attended, transposed back, concatenated; LN(z + W gelu(V z + a) + b)
    Result: z_h = z * mask_h; sum over h of softmax(q z_h^T) z_h, the scale inside q's Linear; b moved into the norm
            before: z' = z + b leaves that norm, V reads z' with its bias corrected, LN(z' + W gelu(V z' + a'))
    """
    found = [
        (parent, name) for parent in model.modules() for name, m in parent.named_children() if isinstance(m, Former)
    ]
    for parent, name in found:
        setattr(parent, name, MaskedFormer(getattr(parent, name), spec))
    return model, len(found), ()


class MaskedFormer(nn.Module):
    """The Former on tokens kept as (n t, d), which every Linear reads as one Gemm."""

    mask: Tensor

    def __init__(self, former: Former, spec: DeploySpec) -> None:
        super().__init__()
        expand, _, contract = former.ffn
        if not isinstance(expand, nn.Linear) or not isinstance(contract, nn.Linear):
            raise TypeError("expected a feed-forward network of Linear, GELU, Linear")
        self.one_picture = spec.batch == 1
        self.q = affine(former.q, former.scale)
        self.proj = make_linear(former.channel_mlp.weight, former.channel_mlp.bias)
        self.layer_norm = shifted_norm(former.layer_norm, contract.bias)
        self.expand = unshift(expand, contract.bias)
        self.contract = ResidualLinear(contract)
        self.ffn_norm = former.ffn_norm
        width = former.q.in_features
        heads = torch.arange(width) // (width // FORMER_HEADS) == torch.arange(FORMER_HEADS)[:, None]
        self.register_buffer("mask", heads[:, None].to(former.q.weight.dtype))  # k 1 d

    def forward(self, z: Tensor) -> Tensor:
        """z (n, t, d) -> (n, t, d)."""
        return self.update(z.flatten(0, 1), z.shape[1]).unflatten(0, (-1, z.shape[1]))

    def update(self, z: Tensor, tokens: int) -> Tensor:
        """z (n t, d) -> (n t, d)."""
        by_picture = z if self.one_picture else z.reshape(-1, 1, tokens, z.shape[1])  # t d, or n 1 t d
        q = self.q(z).reshape(by_picture.shape)
        masked = by_picture * self.mask  # k t d, or n k t d
        out = ((q @ masked.transpose(-2, -1)).softmax(-1) @ masked).sum(-3)  # t d, or n t d
        z = self.layer_norm(z + self.proj(out.reshape(z.shape)))
        return self.ffn_norm(self.contract(F.gelu(self.expand(z)), z))


def shifted_norm(norm: nn.LayerNorm, shift: Tensor) -> nn.LayerNorm:
    """The LayerNorm that computes norm(x) + shift."""
    shifted = nn.LayerNorm(norm.normalized_shape, norm.eps, dtype=norm.weight.dtype)
    shifted.weight = nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    shifted.bias = nn.Parameter((norm.bias + shift).detach().clone(), requires_grad=False)
    return shifted
