"""What stays float32 in a float16 Core ML program: the operators that may be asked to, and those that do."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from edgevit.errors import UnknownNameError, UsageError

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

from coremltools.converters.mil.mil import types  # noqa: E402  # after the line above, or the remarks are printed
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry  # noqa: E402  # as above
from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision  # noqa: E402  # as above

PRODUCTS = ("conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention")
ANY_TYPE = {"concat", "einsum", "identity", "stack"}  # their operands are lists or anything, which no domain describes
ASKED, BEYOND = "asked for", "constant beyond float16"
NAMED = 4  # operators named in a note; more would not be read


def check_types(asked: Collection[str]) -> None:
    """Refuse what is no operator type, or none that could be float16.

    Raises:
        UnknownNameError: coremltools has no such type. UsageError: it has no float16 form.
    """
    for name in asked:
        if name not in SSAOpRegistry.core_ops:
            known = filter(_can_be_half, SSAOpRegistry.core_ops)
            raise UnknownNameError("operator type of a Core ML program in keep_fp32", name, known)
        if not _can_be_half(name):
            raise UsageError(f"option keep_fp32: {name} computes nothing that could be float16; leave it out")


def _can_be_half(name: str) -> bool:
    if name in FP16ComputePrecision._UNSUPPORTED_FP16_OPS or name.startswith("constexpr_"):
        return False
    if name in ANY_TYPE:
        return True
    variants = SSAOpRegistry.core_ops[name].values()
    return any(types.fp16 in domain for kind in variants for domain in kind.type_domains.values())


def kept_fp32(program: Any, asked: Collection[str]) -> list[dict[str, str]]:
    """The operators of a float16 program (of coremltools) that stay float32 though they could be float16, and why.

    `node` is the name of what an operator makes, as the saved program has it. coremltools itself keeps those with a
    constant that float16 does not hold.

    Raises:
        UsageError: no product is left in float16.
    """
    operations = [o for o in program.functions["main"].operations if o.outputs and _can_be_half(o.op_type)]
    full = [o for o in operations if o.outputs[0].is_tensor_or_scalar_of(dtype="fp32")]
    reasons = [(o, ASKED if o.op_type in asked else BEYOND) for o in full]
    kept = [(o, why) for o, why in reasons if why == ASKED or FP16ComputePrecision.fp16_overflow(o)]
    products = [o for o in operations if o.op_type in PRODUCTS]
    if products and not any(o.outputs[0].is_tensor_or_scalar_of(dtype="fp16") for o in products):
        cause = f"option keep_fp32={','.join(asked)}" if asked else "constants beyond float16"
        raise UsageError(f"{cause}: leaves no product in fp16; keep fewer operators or export with --precision fp32")
    return [{"node": o.outputs[0].name, "type": o.op_type, "why": why} for o, why in kept]


def beyond_note(kept: list[dict[str, str]]) -> tuple[str, ...]:
    """What a user must be told of operators that nobody asked to stay float32."""
    own = [f"{entry['type']} {entry['node']}" for entry in kept if entry["why"] == BEYOND]
    if not own:
        return ()
    names = ", ".join(own[:NAMED]) + (f" and {len(own) - NAMED} more" if len(own) > NAMED else "")
    what = f"operators kept float32 for a constant beyond float16's 65504: {len(own)} ({names})"
    return (f"{what}; they leave the Neural Engine, which has float16 alone; check these weights",)
