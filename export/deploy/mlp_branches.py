"""MLPs of large maps, computed for a share of the tokens at a time: their hidden activations stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevit.models.layers import Mlp

from .certificate import Changed, DeploySpec
from .grouped_attention import TokenBlock

BYTES = 4  # of a float32, the widest activation that is deployed
# Of a cache budget: hidden activations from which branches pay, and the most that a weight may have, since each branch
# reads it again. With 640 KiB, in ms for 1, 2, 4, 8 branches: Swin-T's first MLP (4.6 MiB) 5.8, 5.6, 4.8, 4.3; its
# second (2.3 MiB) 4.2, 3.9, 3.6, 3.6; its third (1.1 MiB, weights of 2.3 MiB) 3.6, 4.0, 4.1, 4.0.
LARGE = 3
WEIGHT = 2
MOST = 64  # branches of one MLP: a very large map makes them wider, not the graph endless


def branch_mlp(model: nn.Module, spec: DeploySpec) -> Changed:
    """Split the tokens of a large map, which the MLP takes one by one, into branches.

    Without a budget, or with a batch that is not known, nothing is split.

    Given:  after `group_tokens`: fc2(gelu(fc1(x))) whose hidden activations are larger than LARGE budgets
    Result: cat over branches i of fc2(gelu(fc1(x_i))), none larger than the budget, as far as MOST branches reach
    """
    if spec.cache_bytes is None or spec.batch == "dynamic":
        return model, 0, ()
    places = 0
    for block in [m for m in model.modules() if isinstance(m, TokenBlock) and isinstance(m.mlp, Mlp)]:
        tokens, width = spec.batch * block.tokens, BYTES * block.mlp.fc1.out_features
        weight = BYTES * block.mlp.fc1.weight.numel()
        if tokens * width > LARGE * spec.cache_bytes and weight <= WEIGHT * spec.cache_bytes:
            share = max(spec.cache_bytes // width, -(-tokens // MOST), 1)  # tokens that a branch holds
            block.mlp = MlpBranches(block.mlp, -(-tokens // share))  # type: ignore[assignment]  # same call
            places += 1
    return model, places, ()


class MlpBranches(nn.Module):
    """An MLP on `count` shares of the tokens, one after the other."""

    def __init__(self, mlp: Mlp, count: int) -> None:
        super().__init__()
        self.mlp, self.count = mlp, count

    def forward(self, x: Tensor) -> Tensor:
        """x (b*t, c) -> (b*t, c)."""
        return torch.cat([self.mlp(part) for part in x.chunk(self.count)])
