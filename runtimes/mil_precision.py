"""What the products of a Core ML program compute in, read from the program: where int8 begins and ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .mil_program import Step

FACTORS = ("x", "y", "weight", "values", "query", "key", "value")  # operands of products that are multiplied
EIGHT = (torch.int8, torch.uint8)
INT4 = 8  # no weight of int4 is larger; the largest of each channel of int8 is 127
COMPRESSED = "constexpr_"  # what the operators that unpack weights begin with


def product_precisions(products: Iterable[Step], steps: Iterable[Step], constants: Mapping[str, Any]) -> dict[str, str]:
    """By the name of what each product makes: the type that it computes in.

    That is "int8" where all it multiplies was 8-bit just before, which a device may compute as such. Where that is so
    of weights alone, they are named beside the type: "fp16, int8 weights".
    """
    makers = {out.name: step for step in steps for out in step.outputs}
    return {step.name: _precision(step, makers, constants) for step in products if step.outputs[0].kind}


def _precision(step: Step, makers: Mapping[str, Step], constants: Mapping[str, Any]) -> str:
    given = [each for key, each in step.operands.items() if key in FACTORS]
    read = [makers.get(name) for each in given for name in ([each] if isinstance(each, str) else each)]
    kept = [(maker, _kept_as(maker, constants)) for maker in read]
    if all(stored == "int8" for _, stored in kept):
        return "int8"
    weights = [stored for maker, stored in kept if stored and maker is not None and maker.type.startswith(COMPRESSED)]
    kind = step.outputs[0].kind.name if step.outputs[0].kind else ""
    return f"{kind}, {weights[0]} weights" if weights else kind


def _kept_as(maker: Step | None, constants: Mapping[str, Any]) -> str:
    """What a value is before `maker` turns it into a float; empty of what is a float from the start."""
    if maker is None:
        return ""
    if maker.type == "dequantize":
        return "int8"
    if maker.type == "constexpr_lut_to_dense":
        table = constants.get(str(maker.operands.get("lut")))
        if not isinstance(table, Tensor) or not table.dim():
            return ""
        return f"{(table.shape[-2 if table.dim() > 1 else 0] - 1).bit_length()}-bit"  # iOS 18: ..., values, 1
    data = constants.get(str(maker.operands.get("quantized_data", maker.operands.get("data"))))
    if not maker.type.startswith(COMPRESSED) or not isinstance(data, Tensor) or data.dtype not in EIGHT:
        return ""
    return "int8" if not data.numel() or int(data.abs().max()) > INT4 or data.dtype == torch.uint8 else "int4"
