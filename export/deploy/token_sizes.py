"""At which map sizes a network's parts run: their calls say it, and a deploy form is made for one image size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .certificate import DeploySpec


def token_sizes(model: nn.Module, kind: type[nn.Module], spec: DeploySpec) -> dict[str, tuple[int, int]]:
    """Height and width, in tokens, with which each module of `kind` is called as module(x, height, width), by name."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, kind)}
    sizes: dict[str, tuple[int, int]] = {}

    def note(module: nn.Module, args: tuple[Tensor, int, int]) -> None:
        sizes[names[module]] = args[1:]

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        if names:
            model(torch.zeros(1, 3, spec.height, spec.width, dtype=next(model.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    return sizes
