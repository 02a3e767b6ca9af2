"""Runs one rewrite and writes down what it did, with the proof that the function it computes is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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


@dataclass(frozen=True)
class Probe:
    """What a module computes on the test image, and what it costs; `macs` for one picture."""

    outputs: tuple[Tensor, ...]
    operations: int
    macs: int
    parameters: int


def probe(module: nn.Module, spec: DeploySpec) -> Probe:
    """Run a float64 module on a fixed random image of the shape of `spec`; two pictures where the batch is not one."""
    pictures = 1 if spec.batch == 1 else 2
    shape = (pictures, 3, spec.height, spec.width)
    image = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _CountOperations() as counter:
        out = module(image)
    outputs = (out,) if isinstance(out, Tensor) else tuple(out)
    return Probe(outputs, counter.operations, counter.flops // (2 * pictures), _parameters(module))


def certify(
    rewrite: Rewrite, model: nn.Module, spec: DeploySpec, before: Probe | None = None
) -> tuple[nn.Module, Certificate | None, Probe]:
    """Apply `rewrite` to a copy of `model` (float64, eval) and measure it; no certificate where nothing matched.

    `before` is the probe of `model` where the caller has it; the probe of the result is returned for the next rewrite.

    Raises:
        ExportError: the rewritten module computes something else. That is a bug of the rewrite, never of the model.
    """
    before = probe(model, spec) if before is None else before
    after, places, notes = rewrite(copy.deepcopy(model), spec)
    if places == 0:
        return model, None, before
    now = probe(after.eval(), spec)  # a rewrite makes its modules in training mode
    shapes, wanted = ([tuple(out.shape) for out in p.outputs] for p in (now, before))
    if shapes != wanted:
        raise ExportError(
            f"rewrite {rewrite.__name__}: outputs of shapes {shapes}, expected {wanted}; "
            "this is a bug of the rewrite: please report it with the model and its options"
        )
    max_rel = max(relative_difference(a, e) for a, e in zip(now.outputs, before.outputs, strict=True))
    if not max_rel <= MAX_REL:
        raise ExportError(
            f"rewrite {rewrite.__name__}: relative difference {max_rel:.1e} in float64, at most {MAX_REL:.0e} allowed; "
            "this is a bug of the rewrite: please report it with the model and its options"
        )
    certificate = Certificate(
        rewrite=rewrite.__name__,
        places=places,
        max_rel=max_rel,
        parameters_before=before.parameters,
        parameters_after=now.parameters,
        operations_before=before.operations,
        operations_after=now.operations,
        macs_before=before.macs,
        macs_after=now.macs,
        input_independent=True,  # a rewrite is handed the module and a shape, never an image
        notes=notes,
    )
    return after, certificate, now


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


class _CountOperations(TorchDispatchMode):
    """Counts the tensor operations that compute or move data, views being free in every target, and products' flops."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.operations = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.operations += 1
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
