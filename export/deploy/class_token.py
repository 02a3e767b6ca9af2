"""A plain vision transformer's ends: positions of the image's size, and a last block that computes what is read."""

from __future__ import annotations

from torch import Tensor, nn

from edgevit.models.vit import VisionTransformer

from .certificate import Changed, DeploySpec
from .grouped_attention import TokenBlock, TokenBlocks


def fold_positions(model: nn.Module, spec: DeploySpec) -> Changed:
    """Resample the position embedding once.

    Given:  positions resampled in the forward where the image's grid is not the checkpoint's
    Result: positions of the image's grid, stored
    """
    if not isinstance(model, VisionTransformer):
        return model, 0, ()
    grid = model.patches(spec.height, spec.width)
    if grid == model.grid:
        return model, 0, ()
    note = f"{model.grid[0]}x{model.grid[1]} to {grid[0]}x{grid[1]} patches"
    model.pos_embed = nn.Parameter(model.position(*grid).detach().clone(), requires_grad=False)
    model.grid = grid
    return model, 1, (note,)


def read_tokens_only(model: nn.Module, spec: DeploySpec) -> Changed:  # every size alike
    """The classifier reads the class token (and the distillation token): the last block need not compute the others.

    Given:  the last block's queries, projection and MLP for all n tokens
    Result: the same for the prefix tokens alone; keys and values still come from all
    """
    if not isinstance(model, VisionTransformer) or not isinstance(model.blocks, TokenBlocks):
        return model, 0, ()
    last = model.blocks.steps[-1]
    if not isinstance(last, TokenBlock):
        return model, 0, ()
    model.blocks.steps[-1] = PrefixBlock(last, len(model.prefix()))
    model.blocks.tokens = len(model.prefix())
    return model, 1, ()


class PrefixBlock(nn.Module):
    """A block without groups or biases that puts out the first `prefix` tokens of each picture."""

    def __init__(self, block: TokenBlock, prefix: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp, self.prefix = block.norm1, block.norm2, block.mlp, prefix
        self.attn = attn = block.attn
        if attn.k is None or attn.v is None or attn.bias is not None:
            raise TypeError("expected the attention of a plain vision transformer")
        self.k, self.v = attn.k, attn.v

    def forward(self, x: Tensor) -> Tensor:
        """x (b*n, c) -> (b*p, c)."""
        attn = self.attn
        y = self.norm1(x)
        q = attn.split(attn.q(self._first(y)), self.prefix)
        k, v = (attn.split(linear(y), attn.members) for linear in (self.k, self.v))
        x = self._first(x) + attn.proj(attn.join((q @ k.transpose(-2, -1)).softmax(-1) @ v))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _first(self, x: Tensor) -> Tensor:
        """x (b*n, c) -> (b*p, c)."""
        return x.view(-1, self.attn.members, x.shape[1])[:, : self.prefix].flatten(0, 1)
