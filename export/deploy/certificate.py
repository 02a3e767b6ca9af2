"""Runs one rewrite and writes down what it did, with the proof that the function it computes is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgevit.errors import ExportError
from edgevit.specs import Batch, Certificate

MAX_REL = 1e-9  # float64 rewrites land near 1e-14; 1e-9 leaves room for depth, none for a mistake


@dataclass(frozen=True)
class DeploySpec:
    """The one input shape a deploy form is made for, and the choices that depend on the processor.

    `pointwise`: keep grouped pointwise convolutions with their shuffles, or make them dense.
    `cache_bytes`: hidden activations wider than this are computed in branches that fit; None leaves them whole.
    """

    batch: Batch
    height: int
    width: int
    pointwise: Literal["grouped", "dense"] = "dense"
    cache_bytes: int | None = None


Changed = tuple[nn.Module, int, tuple[str, ...]]  # the rewritten module, how many places, notes
Rewrite = Callable[[nn.Module, DeploySpec], Changed]


def certify(rewrite: Rewrite, model: nn.Module, spec: DeploySpec) -> tuple[nn.Module, Certificate | None]:
    """Apply `rewrite` to a copy of `model` (float64, eval) and measure it; None where nothing matched.

    Raises:
        ExportError: the rewritten module computes something else. That is a bug of the rewrite, never of the model.
    """
    name = rewrite.__name__
    after, places, notes = rewrite(copy.deepcopy(model), spec)
    if places == 0:
        return model, None
    image = torch.randn(
        1 if spec.batch == 1 else 2,  # two pictures where the batch is not one: a mixed-up batch shows
        3, spec.height, spec.width,
        dtype=torch.float64, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with torch.no_grad():
        expected, operations_before = _run(model, image)
        actual, operations_after = _run(after, image)
    max_rel = max(relative_difference(a, e) for a, e in zip(actual, expected, strict=True))
    if not max_rel <= MAX_REL:
        raise ExportError(
            f"rewrite {name}: relative difference {max_rel:.1e} in float64, at most {MAX_REL:.0e} allowed; "
            "this is a bug of the rewrite: please report it with the model and its options"
        )
    return after, Certificate(
        rewrite=name,
        places=places,
        max_rel=max_rel,
        parameters_before=_parameters(model),
        parameters_after=_parameters(after),
        operations_before=operations_before,
        operations_after=operations_after,
        input_independent=True,  # a rewrite is handed the module and a shape, never an image
        notes=notes,
    )


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; NaN counts as infinite."""
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    ratio = difference / scale if scale > 0 else difference
    return float("inf") if ratio != ratio else float(ratio)


def _parameters(module: nn.Module) -> int:
    """Elements of parameters and of floating buffers, which is where folded constants live."""
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    return sum(t.numel() for t in tensors)


def _run(module: nn.Module, image: Tensor) -> tuple[list[Tensor], int]:
    with _CountOperations() as counter:
        out = module(image)
    return ([out] if isinstance(out, Tensor) else list(out)), counter.operations


class _CountOperations(TorchDispatchMode):
    """Counts the tensor operations that compute or move data; views are free in every target."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.operations += 1
        return func(*args, **(kwargs or {}))
