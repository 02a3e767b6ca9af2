"""Patch merging: Swin's strided slices as one Gather, CrossFormer's convolutions between matrices of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevit.models import crossformer
from edgevit.models.swin import PatchMerging

from .certificate import Changed, DeploySpec
from .take import Take
from .token_sizes import token_sizes


def gather_patches(model: nn.Module, spec: DeploySpec) -> Changed:
    """The four neighbours of a patch as four rows in a row.

    Given:  cat(x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]) of a map (h, w, c), norm, Linear
    Result: tokens gathered in that order, read as (h*w/4, 4c); norm, Linear
    """
    sizes = token_sizes(model, PatchMerging, spec)
    for name, (height, width) in sizes.items():
        merging = model.get_submodule(name)
        if not isinstance(merging, PatchMerging):
            raise TypeError(f"{name}: expected a PatchMerging")
        model.set_submodule(name, GatheredPatches(merging, height, width, spec))
    return model, len(sizes), ()


class GatheredPatches(nn.Module):
    """Patch merging of a map whose size is known."""

    def __init__(self, merging: PatchMerging, height: int, width: int, spec: DeploySpec) -> None:
        super().__init__()
        self.norm, self.reduction = merging.norm, merging.reduction
        place = torch.arange(height * width).view(height, width)
        corners = (place[0::2, 0::2], place[1::2, 0::2], place[0::2, 1::2], place[1::2, 1::2])
        self.take = Take(torch.stack(corners, -1).flatten(), height * width, spec)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (b, h*w, c) -> (b, h*w/4, 2c)."""
        c = x.shape[-1]
        x = self.take(x.reshape(-1, c)).view(-1, 4 * c)  # b*h*w c -> b*h*w/4 4c
        out: Tensor = self.reduction(self.norm(x))
        return out.view(-1, height * width // 4, 2 * c)


def flat_embedding(model: nn.Module, spec: DeploySpec) -> Changed:
    """One picture's tokens stay a matrix on the way to a map and back, as the blocks around keep them.

    Given:  norm of (1, h*w, c), transpose, convolutions, concatenation, transpose
    Result: norm of (h*w, c), transpose of a matrix; what follows is transposed back as a matrix
    """
    if spec.batch != 1:
        return model, 0, ()
    names = [name for name, module in model.named_modules() if isinstance(module, crossformer.PatchMerging)]
    for name in names:
        merging = model.get_submodule(name)
        if isinstance(merging, crossformer.PatchMerging):
            model.set_submodule(name, FlatEmbedding(merging))
    return model, len(names), ()


class FlatEmbedding(nn.Module):
    """CrossFormer's cross-scale embedding between stages, for one picture."""

    def __init__(self, merging: crossformer.PatchMerging) -> None:
        super().__init__()
        self.norm, self.reductions = merging.norm, merging.reductions

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (1, h*w, c) -> (1, h*w/4, 2c)."""
        c = x.shape[-1]
        x = self.norm(x.reshape(-1, c)).t().reshape(1, c, height, width)  # h*w c -> 1 c h w
        x = torch.cat([reduction(x) for reduction in self.reductions], 1)  # 1 c h w -> 1 2c h/2 w/2
        return x.reshape(2 * c, -1).t().reshape(1, -1, 2 * c)  # 1 2c h/2 w/2 -> 1 h*w/4 2c
