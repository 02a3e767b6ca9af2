"""INT8 for OpenVINO, by NNCF: which products, with which ranges, and what stays float.

Only products are quantised, each with both operands: what NNCF would put beside them (additions, norms, softmax) is an
island of int8 between float operators.

NNCF's accuracy control is not used: `export --max-drop` does the same on every target, on top of `keep_float`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from edgevit.errors import ExportError, MissingDependencyError, UsageError, last_line
from edgevit.specs import Batch

from .recipe import Recipe

DERIVED = "/WithoutBiases"  # what OpenVINO adds to a node's name for its product; the bias is added by another one
ATTENTION = "ScaledDotProductAttention"  # two products: queries with keys, which can be int8, and weights with values
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", ATTENTION)
MIN_SIDE = 16  # of a product of two activations: below it converting them costs more than int8 gains
# Kinds that NNCF would quantise beside the products.
OTHERS = (
    "Add", "Clamp", "Concat", "Divide", "Gelu", "HSigmoid", "HSwish", "MVN", "Maximum", "Minimum", "Multiply",
    "ReduceMean", "ReduceSum", "Relu", "Sigmoid", "Softmax", "Subtract",
)  # fmt: skip
# Between a FakeQuantize, or int8 weights, and a product.
PASSED = (
    "Broadcast", "Concat", "Convert", "Gather", "MaxPool", "Multiply", "Pad", "Reshape", "Slice", "Split", "Squeeze",
    "StridedSlice", "Subtract", "Tile", "Transpose", "Unsqueeze", "VariadicSplit",
)  # fmt: skip
ASKED = "asked for"
DEPTHWISE = "depthwise: int8 brought no time (294M 1.34 times as fast as float32 without it, 1.34 with it)"
NARROW = "product of two activations with a side below 16: both are converted for little work"
VALUES = "attention weights times values: of many keys a weight is about as small as a step of int8"
LEFT = "NNCF left it"
# What stays float by the path of its module; any target's kernels would take these.
KEPT = {"*slopes[./]*": "hyper network of a dynamic ReLU: its few numbers scale whole channels"}
STORED = 1024  # elements; below it smaller weights save no more than the layers take that make float of them
SMOOTH = 0.95  # NNCF's own for transformers: share of a channel's spread that goes to the weights
NO_ENTROPY = (
    "option calibrator=entropy: NNCF has no such range estimator; choose minmax, percentile or mse for OpenVINO"
)
NOT_MEASURED = "whether ranges still move with more pictures is not measured: NNCF does not tell"


@dataclass(frozen=True)
class OpenvinoRecipe(Recipe):
    """How a network becomes int8 for OpenVINO.

    preset: "performance" has symmetric activations, "mixed" asymmetric ones: finer steps for values that lie mostly on
        one side of 0, for a zero point in every product. With all products of swin_t in int8 they were 2.15 times as
        fast as float32, symmetric ones 2.34 times; Mobile-Former-294M 1.38 and 1.40 times.
    smooth_quant: NNCF's SmoothQuant too; `equalize` has moved the same spread before, exactly and for every target.
    bias_correction: what int8 shifts on average goes into the biases; "full" measures it again after every layer.
    depthwise: quantise convolutions in groups too.
    scores: quantise the product of queries and keys; that of attention weights and values stays float.
    """

    preset: Literal["performance", "mixed"] = "performance"
    smooth_quant: bool = False
    bias_correction: Literal["fast", "full", "none"] = "fast"
    depthwise: bool = False
    scores: bool = True

    def __post_init__(self) -> None:
        if self.calibrator == "entropy":
            raise UsageError(NO_ENTROPY)


@dataclass(frozen=True)
class Quantized:
    """The int8 model, and what there is to say of it: entries of `Built.choices` and notes."""

    model: ov.Model
    choices: dict[str, Any]
    notes: tuple[str, ...]


def quantize(
    model: ov.Model, kinds: Mapping[str, str], recipe: OpenvinoRecipe, images: NDArray[np.float32], batch: Batch
) -> Quantized:
    """The int8 form of a float32 model with one input; `model` itself is not kept.

    Args:
        kinds: the operator kinds of the graph's nodes by name. images: normalised, (n, 3, h, w); batch: how many of
            them the model takes at once, a dynamic one gets them one by one.

    Raises:
        MissingDependencyError: NNCF is not installed. ExportError: it failed.
    """
    _without_transposed_rows(model)
    why = {op.get_friendly_name(): reason for op in products(model) if (reason := why_float(op, recipe))}
    if len(why) < len(products(model)):
        model = _by_nncf(model, sorted(why), recipe, _batches(images, batch))
    _store_small(model)
    _number(model)
    counts, kept = Counter[str](), []
    for op in products(model):
        name = op.get_friendly_name()
        node = name.removesuffix(DERIVED)
        if name in why or not is_quantized(op):
            kept.append({"node": node, "why": why.get(name, LEFT)})
            continue
        counts[kinds.get(node, op.get_type_name())] += 1
        if op.get_type_name() == ATTENTION:
            kept.append({"node": node, "why": VALUES})
    choices = {
        "quantized": dict(sorted(counts.items())),
        "kept_float": kept,
        "calibrated": {"calibrator": recipe.calibrator, "pictures": len(images), "unstable": None, "why": NOT_MEASURED},
    }
    return Quantized(model, choices, _notes(kept))


def products(model: ov.Model) -> list[Any]:
    """The model's convolutions and matrix products, in their order."""
    return [op for op in model.get_ordered_ops() if op.get_type_name() in PRODUCTS]


def is_quantized(product: Any) -> bool:
    """Whether both operands come from a FakeQuantize, or from int8 weights; of an attention, queries and keys."""
    return all(_comes_quantized(product.input_value(index).get_node()) for index in (0, 1))


def why_float(product: Any, recipe: OpenvinoRecipe) -> str | None:
    """Why a product stays float, None where it becomes int8."""
    name = product.get_friendly_name().removesuffix(DERIVED)
    pattern = next((pattern for pattern in KEPT if fnmatch.fnmatchcase(name, pattern)), None)
    if pattern is not None:
        return KEPT[pattern]
    if not recipe.quantizes(name):
        return ASKED
    if product.get_type_name() == "GroupConvolution":
        return None if recipe.depthwise else DEPTHWISE
    if product.get_type_name() == "Convolution" or _is_constant(product.input_value(1).get_node()):
        return None
    return _why_float_attention(product, recipe)


def _why_float_attention(product: Any, recipe: OpenvinoRecipe) -> str | None:
    if min(_sides(product)) < MIN_SIDE:
        return NARROW
    source = product.input_value(0).get_node()
    while source.get_type_name() in ("Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    if source.get_type_name() == "Softmax":
        return VALUES
    return None if recipe.scores else ASKED


def _sides(product: Any) -> list[int]:
    """Rows, columns and inner length of a product of two activations; those of a dynamic batch do not count."""
    first, second = product.get_input_partial_shape(0), product.get_input_partial_shape(1)
    if product.get_type_name() == ATTENTION:
        sides = first[-2], second[-2], first[-1]
    else:
        out = product.get_output_partial_shape(0)
        sides = out[-2], out[-1], first[-2 if product.get_attributes()["transpose_a"] else -1]
    return [side.get_length() for side in sides if side.is_static]


def _is_constant(node: Any) -> bool:
    """Whether a value is stored, perhaps in another type or scaled."""
    while node.get_type_name() in PASSED:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _comes_quantized(node: Any) -> bool:
    while node.get_type_name() in PASSED:
        if node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in ("i8", "u8"):
            return True
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _without_transposed_rows(model: ov.Model) -> None:
    """Transpose in front of a product what it would transpose itself, as OpenVINO does when it compiles.

    Given:  MatMul(a, b, transpose_a)
    Result: MatMul(Transpose(a), b); NNCF's bias correction takes the rows of `a` for channels otherwise, and fails
    """
    for op in model.get_ordered_ops():
        if op.get_type_name() != "MatMul" or not op.get_attributes()["transpose_a"]:
            continue
        rank = len(op.get_input_partial_shape(0))
        turned = ops.transpose(op.input_value(0), [*range(rank - 2), rank - 1, rank - 2])
        turned.set_friendly_name(f"{op.get_friendly_name()}/rows")
        turned.input_value(1).get_node().set_friendly_name(f"{op.get_friendly_name()}/order")
        product = ops.matmul(turned, op.input_value(1), False, op.get_attributes()["transpose_b"])
        product.set_friendly_name(op.get_friendly_name())
        for port in op.output(0).get_target_inputs():
            port.replace_source_output(product.output(0))


def _store_small(model: ov.Model) -> None:
    """Store in int8 the weights of products that stay float, and in float16 what else is large, for the file's size.

    OpenVINO makes float32 of them again when it compiles; its own compression to float16 leaves int8 models alone. The
    division keeps it from computing with the int8 values: for scales along the inner axis that was wrong in 2026.4.

    Given:  MatMul(x, w), w in float32
    Result: MatMul(x, Divide(Convert(int8 w), 1 / scales)), or MatMul(x, Convert(float16 w))
    """
    for constant in model.get_ordered_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type() != ov.Type.f32:
            continue
        values = constant.get_data()
        if values.size < STORED or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        readers = constant.output(0).get_target_inputs()
        kinds = {port.get_node().get_type_name() for port in readers}
        if any(_is_scale(port) for port in readers):  # OpenVINO wants it as it is, to see the int8 weights
            continue
        if kinds <= {"Convolution", "MatMul"}:
            rounded, scales = _in_int8(values)
            small = ops.divide(ops.convert(ops.constant(rounded), "f32"), ops.constant(1 / scales))
        else:
            small = _in_half(values)
        for port in readers:
            port.replace_source_output(small.output(0))


def _is_scale(port: Any) -> bool:
    """Whether a constant is what int8 weights are multiplied with."""
    node = port.get_node()
    return bool(node.get_type_name() == "Multiply" and node.input_value(0).get_node().get_type_name() == "Convert")


def _in_half(values: NDArray[np.float32]) -> Any:
    """Values as float16, once for all places where they stand again: attention biases of windows with equal masks."""
    rows, places = np.unique(values.reshape(len(values), -1), axis=0, return_inverse=True)
    if 2 * len(rows) > len(values):
        return ops.convert(ops.constant(values.astype(np.float16)), "f32")
    stored = ops.convert(ops.constant(rows.astype(np.float16).reshape(-1, *values.shape[1:])), "f32")
    return ops.gather(stored, ops.constant(places.ravel().astype(np.int32)), ops.constant(np.int32(0)))


def _in_int8(weights: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights as int8 with a scale for each row, or for each column where that halves what a weight loses on average.

    The second layer of a dynamic ReLU has the biases for one of its rows, which are far larger than the others.
    """
    axes = ((-1,), (-2,)) if weights.ndim < 4 else (tuple(range(1, weights.ndim)),)  # of a convolution o i h w
    found = [_scaled(weights, axis) for axis in axes]
    least = np.maximum(np.abs(weights), np.finfo(np.float32).tiny)
    lost = [float((np.abs(rounded * scales - weights) / least).mean()) for rounded, scales in found]
    return found[-1] if lost[-1] < lost[0] / 2 else found[0]


def _scaled(weights: NDArray[np.float32], axis: tuple[int, ...]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = np.abs(weights).max(axis=axis, keepdims=True) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(weights / scales).astype(np.int8), scales


def _number(model: ov.Model) -> None:
    """Number by place what OpenVINO named by a counter of the whole process, so that equal exports are equal files."""
    for place, op in enumerate(model.get_ordered_ops()):
        kind = op.get_type_name()
        if re.fullmatch(rf"{kind}_[0-9]+", op.get_friendly_name()):
            op.set_friendly_name(f"{kind}_{place}")


def _batches(images: NDArray[np.float32], batch: Batch) -> list[NDArray[np.float32]]:
    """The pictures as the model takes them; the last ones are filled up with repetitions."""
    count = 1 if batch == "dynamic" else batch
    return [
        np.resize(images[start : start + count], (count, *images.shape[1:])) for start in range(0, len(images), count)
    ]


def _by_nncf(model: ov.Model, kept: list[str], recipe: OpenvinoRecipe, batches: list[NDArray[np.float32]]) -> ov.Model:
    nncf = import_nncf()
    preset = nncf.QuantizationPreset.MIXED if recipe.preset == "mixed" else nncf.QuantizationPreset.PERFORMANCE
    try:
        with _silent():
            return nncf.quantize(
                model,
                nncf.Dataset(batches),
                preset=preset,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(batches),
                fast_bias_correction=recipe.bias_correction != "full",
                ignored_scope=nncf.IgnoredScope(names=kept, types=list(OTHERS), validate=False),
                advanced_parameters=_advanced(nncf, recipe),
            )
    except Exception as error:  # its exceptions, and those of what it calls, share no base below Exception
        raise ExportError(f"quantisation by NNCF: {last_line(error)}") from error


def _advanced(nncf: Any, recipe: OpenvinoRecipe) -> Any:
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Estimators

    estimators = {"minmax": Estimators.MINMAX, "percentile": Estimators.MEAN_QUANTILE, "mse": Estimators.HISTOGRAM}
    return advanced.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.DISABLE,  # halved weights are for processors without VNNI
        disable_bias_correction=recipe.bias_correction == "none",
        activations_range_estimator_params=estimators[recipe.calibrator],
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=SMOOTH if recipe.smooth_quant else -1),
    )


def import_nncf() -> Any:
    """NNCF, imported without its remarks and without its telemetry.

    Raises:
        MissingDependencyError: it is not installed, or cannot be imported.
    """
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"  # read once, on import: nothing is sent
    try:
        with _silent():
            import nncf
    except ImportError as error:
        raise MissingDependencyError(
            f"int8 for OpenVINO needs nncf ({last_line(error)}): pip install 'edgevit[openvino]'"
        ) from error
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
    return nncf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """NNCF prints progress and logs to stdout, which belongs to the caller's JSON."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(max(level, logging.ERROR))  # its import sets INFO


def _notes(kept: list[dict[str, str]]) -> tuple[str, ...]:
    reasons = Counter(entry["why"] for entry in kept)
    if not reasons:
        return ()
    told = "; ".join(f"{count} ({why})" for why, count in sorted(reasons.items()))
    return (f"products that stay in float: {told}",)
