"""Operators of Core ML programs against formulas in NumPy, and against the code of the format's owner."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevit.runtimes import mil_ops_owner
from edgevit.runtimes.mil_ops import Operands
from edgevit.runtimes.mil_reference import OPERATORS

IOS17 = 8  # the specification version that knows every operator here
CLOSE = 2e-6  # float32 against float64 formulas of a few steps on numbers of about one
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(2, 3, 4)).astype(np.float32)
Y = DRAW.normal(size=(3, 1)).astype(np.float32)
POSITIVE = np.abs(X) + np.float32(0.1)
UNIT = (0.9 * X / np.abs(X).max()).astype(np.float32)  # inside (-1, 1)
WHOLE = np.array([[-7, -1, 0], [1, 5, 8]], np.int32)
LOGIC = np.array([True, False, True, False])


def operands(kind: str, version: int = IOS17, **values: Any) -> Operands:
    """NumPy arrays, numbers, texts and lists of arrays as the interpreter hands them over."""

    def held(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            return [held(each) for each in value]
        array = np.asarray(value)
        array = array.astype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype))
        return torch.from_numpy(np.array(array))

    return Operands(kind, {name: held(value) for name, value in values.items()}, version)


def arrays(result: Any) -> list[np.ndarray]:
    return [result.numpy()] if isinstance(result, Tensor) else [each.numpy() for each in result]


def computed(kind: str, **values: Any) -> np.ndarray:
    (array,) = arrays(OPERATORS[kind](operands(kind, **values)))
    return array


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


FORMULAS: list[tuple[str, dict[str, Any], Any]] = [
    ("abs", {"x": X}, np.abs(X)),
    ("acos", {"x": UNIT}, np.arccos(UNIT)),
    ("asin", {"x": UNIT}, np.arcsin(UNIT)),
    ("atan", {"x": X}, np.arctan(X)),
    ("atanh", {"x": UNIT}, np.arctanh(UNIT)),
    ("ceil", {"x": X}, np.ceil(X)),
    ("cos", {"x": X}, np.cos(X)),
    ("cosh", {"x": X}, np.cosh(X)),
    ("erf", {"x": X}, erf(X)),
    ("exp", {"x": X}, np.exp(X)),
    ("exp2", {"x": X}, 2.0**X),
    ("floor", {"x": X}, np.floor(X)),
    ("identity", {"x": X}, X),
    ("logical_not", {"x": LOGIC}, ~LOGIC),
    ("round", {"x": np.array([-2.5, -1.5, 0.5, 1.5, 2.4])}, [-2, -2, 0, 2, 2]),
    ("sign", {"x": np.array([-3.0, 0.0, 2.0])}, [-1, 0, 1]),
    ("sin", {"x": X}, np.sin(X)),
    ("sinh", {"x": X}, np.sinh(X)),
    ("sqrt", {"x": POSITIVE}, np.sqrt(POSITIVE)),
    ("square", {"x": X}, X**2),
    ("tan", {"x": X}, np.tan(X)),
    ("tanh", {"x": X}, np.tanh(X)),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.25}, np.clip(X, -0.5, 0.25)),
    ("inverse", {"x": POSITIVE}, 1 / (POSITIVE + 1e-4)),
    ("inverse", {"x": POSITIVE, "epsilon": 0.5}, 1 / (POSITIVE + 0.5)),
    ("log", {"x": POSITIVE}, np.log(POSITIVE)),
    ("log", {"x": POSITIVE, "epsilon": 1.0}, np.log1p(POSITIVE)),
    ("rsqrt", {"x": POSITIVE}, 1 / np.sqrt(POSITIVE)),
    ("rsqrt", {"x": POSITIVE, "epsilon": 1.0}, 1 / np.sqrt(POSITIVE + 1)),
    ("threshold", {"x": X, "alpha": 0.1}, np.maximum(X, 0.1)),
    ("cast", {"x": np.array([-1.9, 1.9]), "dtype": "int32"}, [-1, 1]),
    ("cast", {"x": np.array([-0.5, 0.0]), "dtype": "bool"}, [True, False]),
    ("cast", {"x": WHOLE, "dtype": "fp32"}, WHOLE.astype(np.float32)),
    ("add", {"x": X, "y": Y}, X + Y),
    ("sub", {"x": X, "y": Y}, X - Y),
    ("mul", {"x": X, "y": Y}, X * Y),
    ("real_div", {"x": X, "y": Y}, X / Y),
    ("floor_div", {"x": WHOLE, "y": np.int32(3)}, WHOLE // 3),
    ("floor_div", {"x": X, "y": Y}, X // Y),
    ("mod", {"x": WHOLE, "y": np.int32(-3)}, WHOLE % -3),
    ("mod", {"x": WHOLE, "y": np.int32(3)}, WHOLE % 3),
    ("pow", {"x": POSITIVE, "y": 2.5}, POSITIVE**2.5),
    ("maximum", {"x": X, "y": Y}, np.maximum(X, Y)),
    ("minimum", {"x": X, "y": Y}, np.minimum(X, Y)),
    ("equal", {"x": WHOLE, "y": np.int32(5)}, WHOLE == 5),
    ("not_equal", {"x": WHOLE, "y": np.int32(5)}, WHOLE != 5),
    ("greater", {"x": WHOLE, "y": np.int32(1)}, WHOLE > 1),
    ("greater_equal", {"x": WHOLE, "y": np.int32(1)}, WHOLE >= 1),
    ("less", {"x": WHOLE, "y": np.int32(1)}, WHOLE < 1),
    ("less_equal", {"x": WHOLE, "y": np.int32(1)}, WHOLE <= 1),
    ("logical_and", {"x": LOGIC, "y": ~LOGIC}, LOGIC & ~LOGIC),
    ("logical_or", {"x": LOGIC, "y": ~LOGIC}, LOGIC | ~LOGIC),
    ("logical_xor", {"x": LOGIC, "y": LOGIC}, LOGIC ^ LOGIC),
    ("select", {"cond": X > 0, "a": X, "b": Y}, np.where(X > 0, X, np.broadcast_to(Y, X.shape))),
    ("clamped_relu", {"x": X, "alpha": 0.2, "beta": 0.7}, np.minimum(np.where(X >= 0, X, 0.2 * X), 0.7)),
    ("clamped_relu", {"x": X, "alpha": -2.0, "beta": 0.7}, np.minimum(np.where(X >= 0, X, -2 * X), 0.7)),
    ("elu", {"x": X, "alpha": 1.5}, np.where(X > 0, X, 1.5 * (np.exp(X) - 1))),
    ("gelu", {"x": X}, 0.5 * X * (1 + erf(X / math.sqrt(2)))),
    ("gelu", {"x": X, "mode": "EXACT"}, 0.5 * X * (1 + erf(X / math.sqrt(2)))),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"},
     0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)))),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}, X * sigmoid(1.702 * X)),
    ("leaky_relu", {"x": X, "alpha": 0.2}, np.where(X >= 0, X, 0.2 * X)),
    ("linear_activation", {"x": X, "alpha": 2.0, "beta": -1.0}, 2 * X - 1),
    ("prelu", {"x": X, "alpha": np.array([0.1, -0.2, 3.0])},
     np.where(X > 0, X, np.array([0.1, -0.2, 3.0])[:, None] * X)),
    ("relu", {"x": X}, np.maximum(X, 0)),
    ("relu6", {"x": 10 * X}, np.clip(10 * X, 0, 6)),
    ("scaled_tanh", {"x": X, "alpha": 2.0, "beta": 0.5}, 2 * np.tanh(0.5 * X)),
    ("sigmoid", {"x": X}, sigmoid(X)),
    ("sigmoid_hard", {"x": X, "alpha": 0.3, "beta": 0.4}, np.clip(0.3 * X + 0.4, 0, 1)),
    ("silu", {"x": X}, X * sigmoid(X)),
    ("softmax", {"x": X}, np.exp(X) / np.exp(X).sum(-1, keepdims=True)),
    ("softmax", {"x": X, "axis": -2}, np.exp(X) / np.exp(X).sum(1, keepdims=True)),
    ("softplus", {"x": X}, np.log1p(np.exp(X))),
    ("softplus_parametric", {"x": X, "alpha": np.array([1.0, 2, 3]), "beta": np.array([0.5, 1, -1])},
     np.array([1.0, 2, 3])[:, None] * np.log1p(np.exp(np.array([0.5, 1, -1])[:, None] * X))),
    ("softsign", {"x": X}, X / (1 + np.abs(X))),
    ("thresholded_relu", {"x": X, "alpha": 0.3}, np.where(X >= 0.3, X, 0)),
    ("reduce_sum", {"x": X}, X.sum()),
    ("reduce_sum", {"x": X, "axes": [-1, 0]}, X.sum((0, 2))),
    ("reduce_sum", {"x": X, "axes": [1], "keep_dims": True}, X.sum(1, keepdims=True)),
    ("reduce_mean", {"x": X, "axes": [-2]}, X.mean(1)),
    ("reduce_max", {"x": X, "axes": [0, 2]}, X.max((0, 2))),
    ("reduce_min", {"x": X, "axes": [0, 2], "keep_dims": True}, X.min((0, 2), keepdims=True)),
    ("reduce_prod", {"x": X, "axes": [0, -1]}, X.prod((0, 2))),
    ("reduce_l1_norm", {"x": X, "axes": [1]}, np.abs(X).sum(1)),
    ("reduce_l2_norm", {"x": X, "axes": [1, 2]}, np.sqrt((X**2).sum((1, 2)))),
    ("reduce_log_sum", {"x": POSITIVE, "axes": [2]}, np.log(POSITIVE.sum(2))),
    ("reduce_log_sum_exp", {"x": X, "axes": [2]}, np.log(np.exp(X).sum(2))),
    ("reduce_sum_square", {"x": X}, (X**2).sum()),
    ("reduce_argmax", {"x": X}, X.argmax(-1)),
    ("reduce_argmin", {"x": X, "axis": 0, "keep_dims": True}, X.argmin(0)[None]),
    ("quantize", {"input": np.array([-9.0, -0.75, 0.25, 0.75, 99.0]), "scale": 0.5, "output_dtype": "int8"},
     [-18, -2, 0, 2, 127]),
    ("quantize", {"input": np.array([-9.0, 0.5, 200.0]), "scale": 1.0, "zero_point": np.uint8(128),
                  "output_dtype": "uint8"}, [119, 128, 255]),
    ("quantize", {"input": X, "scale": np.array([0.1, 0.2, 0.4]), "axis": -2, "output_dtype": "int8"},
     np.clip(np.rint(X / np.array([0.1, 0.2, 0.4], np.float32)[:, None]), -128, 127)),
    ("dequantize", {"input": np.array([-3, 100], np.int8), "scale": 0.5, "zero_point": np.int8(-100)}, [48.5, 100]),
    ("dequantize", {"input": np.array([[1, 2], [3, 4]], np.int8), "scale": np.array([0.5, 2.0]), "axis": 0},
     [[0.5, 1], [6, 8]]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "expected"), FORMULAS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FORMULAS)])
def test_an_operator_computes_its_formula(kind: str, values: dict[str, Any], expected: Any) -> None:
    found = computed(kind, **values)
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found.astype(np.float64), np.asarray(expected, np.float64), rtol=CLOSE, atol=CLOSE)


SHARED = [case for case in FORMULAS if case[0] in mil_ops_owner.owned()]


@pytest.mark.parametrize(("kind", "values", "expected"), SHARED, ids=[f"{i}-{c[0]}" for i, c in enumerate(SHARED)])
def test_the_code_of_the_owner_agrees(kind: str, values: dict[str, Any], expected: Any) -> None:
    theirs = arrays(mil_ops_owner.compute(operands(kind, **values)))
    ours = arrays(OPERATORS[kind](operands(kind, **values)))
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-5, atol=1e-5)
    assert theirs[0].shape == np.shape(expected)
