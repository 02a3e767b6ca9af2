"""What the operators of a Core ML program compute, on float32 PyTorch tensors: arithmetic, activations, reductions.

`mil_ops_shape.py` and `mil_ops_nn.py` hold further tables; `mil_reference.py` joins all of them as `OPERATORS`.

The reference is the operator set of coremltools (https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html)
and its `value_inference`, which the format's owner wrote in NumPy. What every network runs often is in PyTorch here,
because the owner's loops would take minutes; tests hold both against each other. What is not here is computed by the
owner's code itself: `mil_ops_owner.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Result = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Operands:
    """What one operator reads, by the names of the operator set; `version` is the model's specification version."""

    type: str
    values: Mapping[str, Any]
    version: int

    def __getitem__(self, name: str) -> Tensor:
        value = self.values[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"operand {name} is no tensor")
        return value

    def maybe(self, name: str) -> Tensor | None:
        """A tensor that may be left out."""
        return self[name] if name in self.values else None

    def many(self, name: str) -> list[Tensor]:
        """The tensors of an operand that is a list; a list of one comes as the tensor."""
        value = self.values[name]
        return list(value) if isinstance(value, list) else [self[name]]

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A vector of whole numbers."""
        value = self.maybe(name)
        if value is None and default is not None:
            return list(default)
        return [int(v) for v in self[name].flatten().tolist()]

    def whole(self, name: str, default: int) -> int:
        """One whole number."""
        return self.ints(name, [default])[0]

    def number(self, name: str, default: float) -> float:
        """One number."""
        value = self.maybe(name)
        return default if value is None else float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """One truth value."""
        value = self.maybe(name)
        return default if value is None else bool(value)

    def text(self, name: str, default: str) -> str:
        """One text."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise TypeError(f"operand {name} is no text")
        return value


Operator = Callable[[Operands], Result]


def one(function: Callable[[Tensor], Tensor]) -> Operator:
    """An operator of x alone."""
    return lambda a: function(a["x"])


def two(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of x and y, which spread over each other's axes as in NumPy."""
    return lambda a: function(a["x"], a["y"])


def by_channel(values: Tensor, rank: int) -> Tensor:
    """One number for each channel, to stand beside (n, c, ...): (c,) -> (c, 1, ...)."""
    return values.reshape(-1, *[1] * (rank - 2)) if values.dim() == 1 else values


def gelu(a: Operands) -> Tensor:
    """Exact, or one of its two approximations."""
    x, mode = a["x"], a.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)  # the operator's own constant
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def softplus_parametric(a: Operands) -> Tensor:
    """alpha_c log(1 + exp(beta_c x))."""
    x = a["x"]
    scaled = by_channel(a["beta"], x.dim()) * x
    return by_channel(a["alpha"], x.dim()) * torch.logaddexp(scaled, torch.zeros_like(scaled))


def prelu(a: Operands) -> Tensor:
    """x, or alpha_c x below zero."""
    x = a["x"]
    return torch.where(x > 0, x, by_channel(a["alpha"], x.dim()) * x)


def cast(a: Operands) -> Tensor:
    """To another type; a fraction is cut off. float16 and float32 are told apart by the type of the output."""
    kind = a.text("dtype", "fp32")
    types = {"bool": torch.bool, "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.int32}
    return a["x"].to({**types, "int32": torch.int32, "fp16": torch.float32, "fp32": torch.float32}[kind])


ELEMENTWISE: dict[str, Operator] = {
    "abs": one(torch.abs),
    "acos": one(torch.acos),
    "asin": one(torch.asin),
    "atan": one(torch.atan),
    "atanh": one(torch.atanh),
    "ceil": one(torch.ceil),
    "cos": one(torch.cos),
    "cosh": one(torch.cosh),
    "erf": one(torch.erf),
    "exp": one(torch.exp),
    "exp2": one(torch.exp2),
    "floor": one(torch.floor),
    "identity": one(lambda x: x),
    "logical_not": one(torch.logical_not),
    "round": one(torch.round),  # halves go to even
    "sign": one(torch.sign),
    "sin": one(torch.sin),
    "sinh": one(torch.sinh),
    "sqrt": one(torch.sqrt),
    "square": one(torch.square),
    "tan": one(torch.tan),
    "tanh": one(torch.tanh),
    "clip": lambda a: a["x"].clamp(a.number("alpha", -math.inf), a.number("beta", math.inf)),
    "inverse": lambda a: 1 / (a["x"] + a.number("epsilon", 1e-4)),  # the default of the operator set
    "log": lambda a: torch.log(a["x"] + a.number("epsilon", 1e-45)),  # the default of the operator set
    "rsqrt": lambda a: torch.rsqrt(a["x"] + a.number("epsilon", 1e-12)),  # the default of the operator set
    "threshold": lambda a: a["x"].clamp(min=a.number("alpha", 0.0)),
    "cast": cast,
    "add": two(torch.add),
    "equal": two(torch.eq),
    "floor_div": two(torch.floor_divide),
    "greater": two(torch.gt),
    "greater_equal": two(torch.ge),
    "less": two(torch.lt),
    "less_equal": two(torch.le),
    "logical_and": two(torch.logical_and),
    "logical_or": two(torch.logical_or),
    "logical_xor": two(torch.logical_xor),
    "maximum": two(torch.maximum),
    "minimum": two(torch.minimum),
    "mod": two(torch.remainder),  # the sign of y, as in NumPy
    "mul": two(torch.mul),
    "not_equal": two(torch.ne),
    "pow": two(torch.pow),
    "real_div": two(torch.true_divide),
    "sub": two(torch.sub),
    "select": lambda a: torch.where(a["cond"].bool(), a["a"], a["b"]),
}

ACTIVATIONS: dict[str, Operator] = {
    "clamped_relu": lambda a: torch.where(a["x"] >= 0, a["x"], a["alpha"] * a["x"]).clamp(max=a.number("beta", 0.0)),
    "elu": lambda a: torch.where(a["x"] > 0, a["x"], a["alpha"] * torch.expm1(a["x"])),
    "gelu": gelu,
    "leaky_relu": lambda a: torch.where(a["x"] >= 0, a["x"], a["alpha"] * a["x"]),
    "linear_activation": lambda a: a["alpha"] * a["x"] + a["beta"],
    "prelu": prelu,
    "relu": one(torch.relu),
    "relu6": one(lambda x: x.clamp(0, 6)),
    "scaled_tanh": lambda a: a["alpha"] * torch.tanh(a["beta"] * a["x"]),
    "sigmoid": one(torch.sigmoid),
    "sigmoid_hard": lambda a: (a["alpha"] * a["x"] + a["beta"]).clamp(0, 1),
    "silu": one(F.silu),
    "softmax": lambda a: torch.softmax(a["x"], a.whole("axis", -1)),
    "softplus": one(lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "softplus_parametric": softplus_parametric,
    "softsign": one(F.softsign),
    "thresholded_relu": lambda a: torch.where(a["x"] >= a["alpha"], a["x"], 0),
}


def reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    """A reduction over `axes`, by default all."""

    def run(a: Operands) -> Tensor:
        x = a["x"]
        axes = sorted({axis % x.dim() for axis in a.ints("axes", range(x.dim()))}) if x.dim() else []
        return function(x, axes, a.flag("keep_dims"))

    return run


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """PyTorch multiplies along one axis at a time."""
    for axis in reversed(axes):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def arg(function: Callable[[Tensor, int, bool], Tensor]) -> Operator:
    """The place of an extreme along one axis."""
    return lambda a: function(a["x"], a.whole("axis", -1), a.flag("keep_dims"))


REDUCTIONS: dict[str, Operator] = {
    "reduce_argmax": arg(torch.argmax),
    "reduce_argmin": arg(torch.argmin),
    "reduce_l1_norm": reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "reduce_log_sum": reduce(lambda x, axes, keep: x.sum(axes, keep).log()),
    "reduce_log_sum_exp": reduce(torch.logsumexp),
    "reduce_max": reduce(torch.amax),
    "reduce_mean": reduce(torch.mean),
    "reduce_min": reduce(torch.amin),
    "reduce_prod": reduce(product),
    "reduce_sum": reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_sum_square": reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
}


def along(values: Tensor, a: Operands) -> Tensor:
    """A scale or zero point, one or one for each entry of `axis`, to stand beside the data."""
    if values.dim() == 0:
        return values
    rank = a["input"].dim()
    return values.reshape([-1 if i == a.whole("axis", 0) % rank else 1 for i in range(rank)])


def quantize(a: Operands) -> Tensor:
    """clip(round(input / scale) + zero_point), halves to even."""
    zero = a.maybe("zero_point")
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[a.text("output_dtype", "")]
    steps = torch.round(a["input"] / along(a["scale"], a))
    return (steps if zero is None else steps + along(zero.float(), a)).clamp(low, high)


def dequantize(a: Operands) -> Tensor:
    """scale * (input - zero_point)."""
    zero, data = a.maybe("zero_point"), a["input"].float()
    return (data if zero is None else data - along(zero.float(), a)) * along(a["scale"], a)


QUANTIZATION: dict[str, Operator] = {"quantize": quantize, "dequantize": dequantize}
