"""Operations of a reference form at any image size, without weights and without computing anything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from edgevit import registry
from edgevit.options import parse_options
from edgevit.specs import ModuleCount, Size


def counter(
    model: str, options: Mapping[str, Any], *, num_classes: int = 1000, features_only: bool = False
) -> Callable[[Size], ModuleCount]:
    """What counts a registered model at a size (height, width), each size once; UsageError where it refuses one.

    Nothing is built before the first count.

    Raises:
        UnknownNameError, UsageError: the model or its options.
    """
    family = registry.family_of(model)[1]
    chosen = parse_options(family.OPTIONS, model, options)

    @functools.cache
    def module() -> Any:
        return family.build(model, chosen, num_classes=num_classes, features_only=features_only).eval()

    @functools.cache
    def count(size: Size) -> ModuleCount:
        import torch

        from edgevit.bench.complexity import count_module

        with torch.device("meta"):
            return count_module(module(), size)

    return count
