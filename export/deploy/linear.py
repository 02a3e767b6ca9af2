"""Exact algebra on Linear layers that several rewrites share. All of it is done in the precision it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A Linear with these parameters: weight (out, in), bias (out)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def affine(linear: nn.Linear, scale: float, offset: float = 0.0) -> nn.Linear:
    """The Linear that computes scale * linear(x) + offset."""
    return make_linear(linear.weight * scale, linear.bias * scale + offset)


def stack(*linears: nn.Linear) -> nn.Linear:
    """One Linear for several that read the same input; outputs concatenated in the order given."""
    return make_linear(torch.cat([part.weight for part in linears]), torch.cat([part.bias for part in linears]))


def unshift(linear: nn.Linear, shift: Tensor) -> nn.Linear:
    """The Linear that computes linear(x) from x + shift."""
    return make_linear(linear.weight, linear.bias - linear.weight @ shift)


class ResidualLinear(nn.Module):
    """residual + x W, one Gemm; the bias has been moved into whatever produced the residual.

    The weight is kept (in, out), as the Gemm reads it, so that no Transpose enters the graph.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (m, in), residual (m, out) -> (m, out)."""
        return torch.addmm(residual, x, self.weight)
