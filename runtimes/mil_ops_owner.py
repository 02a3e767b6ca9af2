"""Operators of a Core ML program by the code of the format's owner: coremltools' `value_inference`, in NumPy.

It exists to fold constants: an operator object is given operands whose values are known and asked for its result. Here
the object is made without a program around it, and the operands come from the interpreter.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mil_ops import Operands, Result

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

from coremltools.converters.mil._deployment_compatibility import AvailableTarget  # noqa: E402  # after the line above
from coremltools.converters.mil.mil import Operation, types  # noqa: E402  # after the line above
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry  # noqa: E402  # after the line above

LEFT_OUT = {
    *("const", "cond", "while_loop", "list_length", "_const_symbolic"),  # no values in and out
    "thresholded_relu",  # written into its operand, which a single number refuses; mil_ops.py has its own
}


def owned() -> list[str]:
    """The operators that the owner's code can compute."""
    return sorted(name for name in SSAOpRegistry.core_ops if name not in LEFT_OUT and _method(name, 0) is not None)


def compute(operands: Operands) -> Result:
    """One operator's outputs.

    Raises:
        KeyError: the owner has no such operator, or no code for it.
    """
    found = _method(operands.type, operands.version)
    if found is None or operands.type in LEFT_OUT:
        raise KeyError(operands.type)
    kind, method = found
    operation = object.__new__(kind)
    operation._input_types = {}  # what is asked for values that are not known: here all are
    given = {name: _known(value) for name, value in operands.values.items()}
    for name in kind.input_spec.input_types:
        setattr(operation, name, given.get(name))
    defaults = operation.default_inputs()
    for name, value in defaults.items():
        if name not in given:
            setattr(operation, name, None if value is None else _known(value))
    result = getattr(operation, method)()
    return tuple(map(_tensor, result)) if isinstance(result, tuple | list) else _tensor(result)


def _method(name: str, version: int) -> tuple[Any, str] | None:
    """The class of an operator in a version of the format (0: the newest), and its method that computes values."""
    variants = SSAOpRegistry.core_ops.get(name, {})
    kind = variants.get(AvailableTarget(version)) if version else None
    kind = kind or next(reversed(variants.values()), None)
    for method in ("value_inference", "materialized_val_inference"):
        if kind is not None and getattr(kind, method, None) not in (None, getattr(Operation, method, None)):
            return kind, method
    return None


def _known(value: Any) -> Any:
    """An operand as the owner's code asks for it: value, symbolic value, shape, rank, type."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [_known(each) for each in value]
    if isinstance(value, str):
        return SimpleNamespace(val=value, sym_val=value, shape=(), rank=0, dtype=types.str)
    array = np.array(value.numpy() if isinstance(value, Tensor) else value)  # copied: some of the code writes into it
    array = array.astype(np.int32) if array.dtype == np.int64 else array
    number = array.item() if array.dtype == np.bool_ and not array.ndim else array[()]
    held = array if array.ndim else number  # a scalar, where the operator set has one
    kind = types.numpy_type_to_builtin_type(array.dtype)
    whole = types.tensor(kind, array.shape) if array.ndim else kind
    return SimpleNamespace(val=held, sym_val=held, shape=array.shape, rank=array.ndim, dtype=kind, sym_type=whole)


def _tensor(value: Any) -> Tensor:
    array = np.asarray(value)
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype == np.float16 else None))
