"""A runtime's outputs against the float32 reference, on real pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgevit.errors import ParityError, UnknownNameError
from edgevit.specs import Parity

Outputs = Mapping[str, NDArray[np.float32]]

# precision: largest difference of an output, smallest cosine. fp32 differs by summation order alone, about 1e-5 here;
# 1e-3 is far above it and far below what moves a class. float16 rounds by 2^-11 and bfloat16 by 2^-8 at every operator:
# 2.1 % and 14 % of the root mean square were the most seen, both on Mobile-Former, the deepest of the families.
# int8 is judged by `evaluate`, on thousands of pictures; here a broken graph has to be told from a coarse one.
LIMITS = {"fp32": (1e-3, 0.99999), "fp16": (5e-2, 0.9999), "bf16": (2.5e-1, 0.999), "int8": (1.0, 0.95)}


def compare_outputs(expected: Outputs, actual: Outputs, precision: str, runtime: str) -> Parity:
    """Parity over all outputs of one batch of pictures.

    Logits in float32 are compared as they are, features in float32 relative to the root mean square of the map where
    that is above one: they have no fixed scale. Rounding to a shorter type is relative by nature: there differences are
    taken relative to the root mean square, whatever it is. A near tie is no disagreement: top-1 agrees when the
    reference's value for the runtime's class is within the limit of its largest.
    """
    if precision not in LIMITS:
        raise UnknownNameError("precision", precision, LIMITS)
    max_abs_limit, cosine_limit = LIMITS[precision]
    for name, reference in expected.items():
        if name not in actual or actual[name].shape != reference.shape:
            came = f"shape {actual[name].shape}" if name in actual else f"outputs {', '.join(actual) or 'none'}"
            raise ParityError(
                f"{runtime}: not equal to the reference: {came}, expected {name} of shape {reference.shape}; "
                "please report the model and its options"
            )
    differences, cosines = [], []
    for name, reference in expected.items():
        scale = _scale(name, reference, precision)
        differences.append(float(np.max(np.abs(actual[name].astype(np.float64) - reference))) / scale)
        cosines += [cosine(one, other) for one, other in zip(reference, actual[name], strict=True)]  # of each picture
    top1 = None
    if "logits" in expected:
        tie = max_abs_limit * _scale("logits", expected["logits"], precision)
        top1 = top1_agreement(expected["logits"], actual["logits"], tie)
    return Parity(
        inputs=next(iter(expected.values())).shape[0],
        max_abs=max(differences) if not np.isnan(differences).any() else float("inf"),
        max_abs_limit=max_abs_limit,
        cosine=min(cosines),
        cosine_limit=cosine_limit,
        top1_agreement=top1,
        reference="reference form, PyTorch float32",
        runtime=runtime,
    )


def _scale(name: str, reference: NDArray[np.float32], precision: str) -> float:
    """What a difference of this output is divided by."""
    rms = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    if precision != "fp32":
        return rms or 1.0  # an output of zeros has no scale
    return 1.0 if name == "logits" else max(1.0, rms)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Cosine of the angle between two tensors as vectors; -1 where either is not finite."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return -1.0
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 0 else float(np.array_equal(x, y))


def top1_agreement(expected: NDArray[np.float32], actual: NDArray[np.float32], tie: float) -> float:
    """Share of pictures on which both name the same class, (n, classes) each."""
    chosen = expected[np.arange(len(expected)), actual.argmax(1)]
    return float(np.mean(expected.max(1) - chosen <= tie))
