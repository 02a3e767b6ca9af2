"""INT8 for TensorRT: symmetric Q/DQ around the products that its INT8 kernels compute faster, float16 for the rest.

TensorRT fuses a product with the DequantizeLinear of both operands into one INT8 kernel. Biases and results stay in
floating point: a result that is quantised by itself cannot be fused with what follows. Of an addition behind a
convolution the other operand is quantised too, or the fused kernel would have to write floating point.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgevit.specs import Batch

from .observe import observe
from .qdq import WEIGHTED, Scheme, insert_qdq, measured, weight_axis
from .recipe import Recipe

SCHEME = Scheme(activation="int8", symmetric=True)  # the parser refuses any other zero point, and an INT32 bias
MIN_CHANNELS = 16  # of a product's operand and result: an INT8 matrix instruction takes 16 of a row at once
GROUPED_MULTIPLE, GROUPED_KERNEL = 8, 3  # channels and side of a grouped convolution for which there are INT8 kernels
NUMBER = re.compile(r"\b\d+\b")  # in an expression of a dynamic length; names like s77 have none
SHOWN = 3  # products that a note names; the manifest has all of them
# What stays float by the module that a node came from: reasons from how it computes, not measured one by one.
KEPT = {
    "*.slopes.*": "hyper network of a dynamic ReLU: its few numbers scale whole channels",
    "*.former.*": "token path: a handful of rows, and attention logits",
    "entries.*": "token path: a handful of rows",
    "*.projection/*": "token path: a handful of rows",
}


@dataclass(frozen=True)
class TensorrtRecipe(Recipe):
    """How a network becomes int8 for TensorRT.

    depthwise: quantise convolutions in groups too, where their channels and kernel have INT8 kernels.
    residuals: quantise the other operand of additions behind quantised convolutions.
    """

    depthwise: bool = True
    residuals: bool = True


@dataclass(frozen=True)
class Placement:
    """The nodes that become int8, the tensors of residuals beside them, and what stays float and why."""

    products: tuple[str, ...]
    additions: dict[str, str]
    kept: tuple[dict[str, str], ...]


def quantise(
    graph: ir.Model, recipe: TensorrtRecipe, images: NDArray[np.float32], batch: Batch
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Put Q/DQ into a float32 graph, in place; choices for the manifest and notes for the user.

    Args:
        graph: nodes named after their modules, constants folded. images: normalised, (n, 3, h, w).
        batch: pictures that the graph takes at once.

    Raises:
        ExportError: the graph cannot be run on the pictures.
    """
    placement = place(graph, recipe)
    names = [*measured(graph, SCHEME, placement.products), *placement.additions.values()]
    chosen = (*placement.products, *placement.additions)
    observed = observe(graph, list(dict.fromkeys(names)), images, batch, recipe.calibrator)
    counts = insert_qdq(graph, observed.ranges, SCHEME, chosen)
    choices = {
        "quantized": counts,
        "kept_float": list(placement.kept),
        "calibrated": {
            "calibrator": recipe.calibrator,
            "pictures": len(images),
            "unstable": list(observed.unstable),
        },
    }
    return choices, _notes(placement, observed.unstable)


def place(graph: ir.Model, recipe: TensorrtRecipe) -> Placement:
    """Decide for each product of a graph."""
    products, kept = [], []
    for node in graph.graph:
        if node.op_type in (*WEIGHTED, "ConvTranspose"):
            why = why_float(node, recipe)
            if why is None:
                products.append(node.name or "")
            else:
                kept.append({"node": node.name or "", "why": why})
    return Placement(tuple(products), _residuals(graph, products) if recipe.residuals else {}, tuple(kept))


def why_float(node: ir.Node, recipe: TensorrtRecipe) -> str | None:
    """Why a product stays float, None where it becomes int8."""
    name = node.name or ""
    if weight_axis(node) is None:
        return "no weight: attention is fused in float16"
    pattern = next((pattern for pattern in KEPT if fnmatch.fnmatchcase(name, pattern)), None)
    if pattern is not None:
        return KEPT[pattern]
    if not recipe.quantizes(name):
        return "asked for"
    return _convolution(node, recipe) if node.op_type == "Conv" else _matrix(node)


def _convolution(node: ir.Node, recipe: TensorrtRecipe) -> str | None:
    outputs, inputs, *kernel = _shape(node.inputs[1])
    groups = node.attributes.get_int("group", 1)
    if groups > 1:
        if not recipe.depthwise:
            return "in groups: asked for"
        fits = outputs % GROUPED_MULTIPLE == 0 and min(kernel) >= GROUPED_KERNEL
        return None if fits else f"in groups: no int8 kernel for {outputs} channels, kernel {min(kernel)}"
    few = min(outputs, inputs)
    return None if few >= MIN_CHANNELS else f"{few} channels: conversions cost more than int8 gains"


def _matrix(node: ir.Node) -> str | None:
    rows = math.prod(_shape(node.outputs[0])[:-1])
    if rows == 1:
        return "one row: reading the weights is what takes the time"
    few = min(_shape(node.inputs[1]))
    return None if few >= MIN_CHANNELS else f"{few} channels: conversions cost more than int8 gains"


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    """A tensor's shape for one picture of a dynamic batch: `batch` is 1, `49*batch` is 49."""
    shape = () if value is None or value.shape is None else value.shape
    return tuple(d if isinstance(d, int) else int((NUMBER.findall(str(d.value)) or [1])[0]) for d in shape)


def _residuals(graph: ir.Model, products: Collection[str]) -> dict[str, str]:
    """Additions of a quantised convolution's result that nothing else reads, and a computed tensor: that tensor."""
    found: dict[str, str] = {}
    for node in graph.graph:
        sides = [value for value in node.inputs if value is not None] if node.op_type == "Add" else []
        if len(sides) != 2 or any(value.const_value is not None or value.producer() is None for value in sides):
            continue
        for side, other in (sides, sides[::-1]):
            maker = side.producer()
            last = maker is not None and maker.op_type == "Conv" and maker.name in products and len(side.uses()) == 1
            if last and not side.is_graph_output() and side.shape == other.shape:
                found[node.name or ""] = other.name or ""
    return found


def _notes(placement: Placement, unstable: Collection[str]) -> tuple[str, ...]:
    notes = []
    reasons = Counter(kept["why"] for kept in placement.kept)
    if not placement.products:
        notes.append("int8: no product of this network becomes int8; export it with precision fp16")
    elif reasons:
        listed = "; ".join(f"{count} ({why})" for why, count in reasons.most_common())
        notes.append(f"int8: {len(placement.kept)} products stay float: {listed}")
    if unstable:
        shown = ", ".join(list(unstable)[:SHOWN]) + (
            f" and {len(unstable) - SHOWN} more" if len(unstable) > SHOWN else ""
        )
        notes.append(
            f"int8: {len(unstable)} ranges moved by more than 10 % when the pictures doubled: {shown}; "
            "calibrate with more pictures"
        )
    return tuple(notes)
