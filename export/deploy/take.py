"""Rows of tokens by a constant index: the one form that every partition, shift, padding and merging takes."""

from __future__ import annotations

from torch import Tensor, nn

from .certificate import DeploySpec


class Take(nn.Module):
    """Tokens of each picture by a constant index, which may repeat and leave out."""

    index: Tensor

    def __init__(self, index: Tensor, tokens: int, spec: DeploySpec) -> None:
        super().__init__()
        self.tokens, self.one_picture = tokens, spec.batch == 1
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (b*t, c) -> (b*len(index), c)."""
        if self.one_picture:
            return x.index_select(0, self.index)
        return x.view(-1, self.tokens, x.shape[1]).index_select(1, self.index).flatten(0, 1)
