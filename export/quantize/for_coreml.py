"""INT8 for Core ML, made and calibrated without a Mac.

coremltools measures the ranges of activations by running the model, which takes a Mac. Here the float package is run by
the interpreter of `edgevit.runtimes`, and its ranges are handed to coremltools' own passes: a quantize and a dequantize
in front of each product, then weights as int8 with a scale for each output channel. Core ML computes such a product in
int8 on the Neural Engines that can (from A17 Pro and M4); elsewhere it dequantises first.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from edgevit.contracts import Watch
from edgevit.errors import ExportError, UsageError, first_line
from edgevit.export.mil_kept import PRODUCTS
from edgevit.export.mil_quiet import silent
from edgevit.export.mil_saved import save

from .calibrators import Observer, Range
from .palettes import palette
from .recipe import Recipe

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

import coremltools.optimize.coreml as cto  # noqa: E402  # after the line above, or the remarks are printed
from coremltools.converters.mil.mil.passes.defs.optimize_activation_quantization import (  # noqa: E402  # as above
    insert_suffix_quantize_dequantize_pair,
)
from coremltools.converters.mil.mil.passes.defs.optimize_quantization import (  # noqa: E402  # as above
    dequantize_quantize_pair_elimination,
)
from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipeline  # noqa: E402  # as above
from coremltools.converters.mil.mil.scope import ScopeSource  # noqa: E402  # as above
from coremltools.models import utils as ct_utils  # noqa: E402  # as above
from coremltools.optimize.coreml._quantization_passes import (  # noqa: E402  # as above
    insert_prefix_quantize_dequantize_pair,
    linear_quantize_weights,
    palettize_weights,
)

HANDLE = "debug_handle"  # the one mark of a node of torch.export that coremltools carries through its passes
SCHEMES = {"w8a8": "17", "w8": "16", "palette6": "16", "palette4": "16"}  # the oldest iOS that reads it
GROUPED_FROM = 18  # iOS that reads a palette for each group of channels
GROUP = 16  # channels that share a 4-bit palette, as Apple's examples have it
INT8 = 127  # the largest int8 of a symmetric range
SMALLEST = INT8 * 2.0**-14  # below it the scale is no normal float16, which devices may take for 0
LARGEST = 32752.0  # coremltools computes twice the range in float16

WHERE = (
    "int8 products are faster on the Neural Engine of A17 Pro, M4 and later; other devices dequantise first: for them "
    "take float16, or weights alone (--option scheme=w8)"
)
TWO_ACTIVATIONS = "product of two activations, which Core ML has in float alone"
TRANSPOSED = "product with a constant on the right, which Core ML has in float alone; weights in int8"
# Activations that stay float, by the path of the module: what matches keeps its weights in int8.
FLOAT = {
    "*slopes.*": "hyper network: its error scales whole channels",
    "*entries.*": "token path: few products, read by every pixel",
    "*.former.*": "token path: few products, read by every pixel",
    "*.projection/*": "token path: few products, read by every pixel",
    "head.fc.*": "token path: few products, read by every pixel",
}


@dataclass(frozen=True)
class CoremlRecipe(Recipe):
    """How a network becomes int8 for Core ML.

    scheme: "w8a8" has weights and activations in int8 (iOS 17 and later); the others compress weights alone and need no
        pictures: "w8" in int8 for each channel, "palette6" and "palette4" as indices into 64 or 16 values, from iOS 18
        on 16 values for each 16 channels.
    body: the type of everything that stays float.
    sums: the sums of two activations in int8 too, as coremltools' own calibration has them. It costs accuracy where a
        residual stream has outliers.
    outputs: what products make in int8 too, as coremltools' own calibration has it.
    """

    scheme: Literal["w8a8", "w8", "palette6", "palette4"] = "w8a8"
    body: Literal["fp16", "fp32"] = "fp16"
    sums: bool = False
    outputs: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether activations are quantised, so that their ranges have to be measured."""
        return self.scheme == "w8a8"

    def check(self, ios: str) -> None:
        """Refuse a scheme that the oldest system asked for cannot read.

        Raises:
            UsageError: it cannot.
        """
        if ios < SCHEMES[self.scheme]:
            raise UsageError(
                f"scheme {self.scheme} with ios={ios}: int8 activations need iOS {SCHEMES[self.scheme]} or later; "
                f"use --option ios={SCHEMES[self.scheme]} or --option scheme=w8"
            )


@dataclass(frozen=True)
class Product:
    """An operator that multiplies, or a sum of two activations.

    name: of what it makes. node: the module and the node that it came from. kind: its type. reads: the activations
    among its operands. weight: the matrix or kernel among them, where it is constant; channels: the length of its
    first axis.
    """

    name: str
    node: str
    kind: str
    reads: tuple[str, ...]
    weight: str | None
    channels: int


@dataclass(frozen=True)
class Plan:
    """Which operators get int8 activations, which constants are compressed, what stays float and why."""

    activations: tuple[Product, ...]
    weights: tuple[Product, ...]
    kept: tuple[tuple[Product, str], ...]


@dataclass(frozen=True)
class Measured:
    """The range of each value that becomes int8, and the names of those that moved when the pictures doubled."""

    ranges: Mapping[str, Range]
    unstable: tuple[str, ...]
    pictures: int


def number_nodes(program: ExportedProgram, around: Sequence[type[Any]]) -> list[str]:
    """Mark the nodes of a captured program so that `origins` finds them again; their names in that order.

    A name is that of the module and the node, `layers.0.blocks.1.attn.q/linear_3`; modules of the types `around` are
    left out: they stand around the network.
    """
    outer = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in around)
    names = []
    for number, node in enumerate(program.graph.nodes):
        node.meta[HANDLE] = number
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        depth = sum(kind in outer for _, kind in stack)
        path = ".".join(stack[-1][0].split(".")[depth:])
        names.append(f"{path}/{node.name}" if path else f"node_{node.name}")  # as `node_names` leaves them
    return names


def origins(program: Any, names: Sequence[str]) -> dict[str, str]:
    """What each value of a program of coremltools came from, by the names that `number_nodes` gave."""
    found: dict[str, str] = {}
    for operation in program.functions["main"].operations:
        handle = (operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or [None])[0]
        if handle is not None:
            found |= {out.name: names[handle] for out in operation.outputs}
    return found


def products_of(program: Any, nodes: Mapping[str, str]) -> list[Product]:
    """The products of a program of coremltools and its sums of two activations, in their order."""
    found = []
    for operation in program.functions["main"].operations:
        if operation.op_type not in (*PRODUCTS, "add"):
            continue
        inputs = _read_by(operation)
        fixed = [v for v in inputs if v.op is not None and v.op.op_type == "const"]
        live = tuple(v.name for v in inputs if v not in fixed)
        weight = next((v for v in fixed if v.rank > 1), None)  # a bias has one axis, strides and the like too
        name, at = operation.outputs[0].name, ("", 0) if weight is None else (weight.name, weight.shape[0])
        if len(live) > (operation.op_type == "add"):
            found.append(Product(name, nodes.get(name, name), operation.op_type, live, at[0] or None, at[1]))
    return found


def _read_by(operation: Any) -> list[Any]:
    """The values that an operator of coremltools reads, those in lists too."""
    return [v for each in operation.inputs.values() for v in (each if isinstance(each, list | tuple) else [each])]


def plan(products: Sequence[Product], recipe: CoremlRecipe) -> Plan:
    """Which of the products become int8, and how far."""
    activations: list[Product] = []
    weights: list[Product] = []
    kept: dict[Product, str] = {}
    for product in products:
        why = _why_float(product, recipe)
        if product.kind != "add" and product.weight is not None and recipe.quantizes(product.node):
            weights.append(product)
        if product.kind != "add" and why and (recipe.calibrated or product not in weights):
            kept[product] = why
        elif not why and recipe.calibrated and (product.kind != "add" or recipe.sums):
            activations.append(product)
    refused = {p.weight for p in kept if p not in weights} - {None}  # one constant of several products is one choice
    shared = {p: "shares its weights with one that stays float" for p in weights if p.weight in refused}
    return Plan(
        tuple(p for p in activations if p not in shared),
        tuple(p for p in weights if p not in shared),
        tuple((kept | shared).items()),
    )


def _why_float(product: Product, recipe: CoremlRecipe) -> str:
    """Why the activations of a product stay float; empty where they do not."""
    if not recipe.quantizes(product.node):
        return "asked for"
    if product.weight is None and product.kind != "add":
        return TWO_ACTIVATIONS
    if product.kind not in ("conv", "linear", "add"):
        return TRANSPOSED
    return next((why for pattern, why in FLOAT.items() if fnmatch.fnmatchcase(product.node, pattern)), "")


def measure(
    watch: Watch, package: Path, images: NDArray[np.float32], names: Sequence[str], recipe: CoremlRecipe
) -> Measured:
    """The range of each named value of a float package on pictures (n, 3, h, w), as the package takes them.

    Raises:
        ExportError: a value is not finite, or there are no pictures.
    """
    half = (len(images) + 1) // 2
    observers = {name: Observer(recipe.calibrator, f"calibration: {name}") for name in names}

    def see(name: str, array: NDArray[Any]) -> None:
        if name in observers:
            observers[name].update(array)

    watch(package, images[:half], see)
    early = {name: observer.range() for name, observer in observers.items()}
    watch(package, images[half:], see)
    ranges = {name: observer.range() for name, observer in observers.items()}
    return Measured(ranges, tuple(n for n in names if early[n].moved(ranges[n])), len(images))


@dataclass(frozen=True)
class Quantized:
    """The model of coremltools, what `Built.choices` says of it, and what the user must be told."""

    model: Any
    choices: Mapping[str, Any]
    notes: tuple[str, ...]


def quantize(
    converted: Any,
    nodes: Mapping[str, str],
    recipe: CoremlRecipe,
    ios: str,
    images: NDArray[np.float32] | None = None,
    watch: Watch | None = None,
) -> Quantized:
    """A float model of coremltools as the recipe wants it; `converted` is not changed.

    Args:
        nodes: what `origins` found. images: what ranges are measured on, (n, 3, h, w), as the model takes them; watch:
            runs a package and shows its values. Both are needed where the recipe is calibrated.

    Raises:
        ExportError: no pictures, a value that is not finite on them, or coremltools fails.
        UsageError: nothing is left to be quantised.
    """
    chosen = plan(products_of(converted._mil_program, nodes), recipe)
    if not chosen.weights:
        raise UsageError("int8 for Core ML: no product is left to be int8; name other nodes in only or keep_float")
    measured = Measured({}, (), 0)
    if recipe.calibrated:
        if images is None or watch is None:
            raise ExportError("int8 for Core ML: activations need calibration pictures; add --calibration")
        names = [name for p in chosen.activations for name in (*p.reads, *([p.name] if recipe.outputs else []))]
        with tempfile.TemporaryDirectory(prefix="edgevit-calibration-") as folder:
            save(converted, Path(folder, "float.mlpackage"))
            measured = measure(watch, Path(folder, "float.mlpackage"), images, list(dict.fromkeys(names)), recipe)
        chosen = _within_float16(chosen, measured.ranges)
    model = compressed(converted, chosen, recipe, measured.ranges, ios)
    return Quantized(model, _choices(chosen, recipe, measured), (WHERE,) if chosen.activations else ())


def _within_float16(chosen: Plan, ranges: Mapping[str, Range]) -> Plan:
    """The plan without products of values so large that their scale is no float16."""
    wide = [p for p in chosen.activations if any(_magnitude(ranges[name]) > LARGEST for name in p.reads)]
    kept = (*chosen.kept, *((p, f"reads values beyond {LARGEST:.0f}") for p in wide if p.kind != "add"))
    return dataclasses.replace(chosen, activations=tuple(p for p in chosen.activations if p not in wide), kept=kept)


def _magnitude(values: Range) -> float:
    return max(-values.low, values.high)


def _choices(chosen: Plan, recipe: CoremlRecipe, measured: Measured) -> dict[str, Any]:
    """What the manifest says of a plan."""
    whole = chosen.activations if recipe.calibrated else chosen.weights
    choices: dict[str, Any] = {
        "scheme": recipe.scheme,
        "body": recipe.body,
        "quantized": dict(Counter(p.kind for p in whole)),
        "weights": dict(Counter(p.kind for p in chosen.weights)),
        "kept_float": [{"node": p.node, "value": p.name, "why": why} for p, why in chosen.kept],
    }
    if recipe.calibrated:
        nodes = {name: p.node for p in chosen.activations for name in p.reads}
        unstable = list(dict.fromkeys(nodes.get(name, name) for name in measured.unstable))
        choices["calibrated"] = {
            "calibrator": recipe.calibrator, "pictures": measured.pictures, "unstable": unstable,
        }  # fmt: skip
    return choices


def compressed(converted: Any, chosen: Plan, recipe: CoremlRecipe, ranges: Mapping[str, Range], ios: str) -> Any:
    """The model of coremltools with activations and weights as planned.

    Raises:
        ExportError: coremltools fails.
    """
    steps: list[Any] = []
    if chosen.activations:
        eight = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_tensor")
        made = {out.name: o for o in converted._mil_program.functions["main"].operations for out in o.outputs}
        config = cto.OptimizationConfig(op_name_configs={made[p.name].name: eight for p in chosen.activations})
        before, behind = insert_prefix_quantize_dequantize_pair(config), insert_suffix_quantize_dequantize_pair()
        behind.config = config
        before.activation_stats = behind.activation_stats = {name: _ends(each) for name, each in ranges.items()}
        steps += [before, *([behind] if recipe.outputs else []), dequantize_quantize_pair_elimination()]
    compressors = {p.weight: _weight_config(p, recipe, ios) for p in chosen.weights if p.weight is not None}
    config = cto.OptimizationConfig(op_name_configs=compressors)  # the rest is left alone
    steps.append(palettize_weights(config) if recipe.scheme.startswith("palette") else linear_quantize_weights(config))
    with silent():
        try:
            program = ct_utils._apply_graph_pass(converted, steps, return_pymil_prog=True)
            model = _converted(program, converted)
        except Exception as error:  # coremltools raises whatever its passes meet
            raise ExportError(f"int8 for Core ML: {first_line(error)[:200]}; please report the model") from error
    _prove(model._mil_program, chosen)
    return model


def _converted(program: Any, original: Any) -> Any:
    """A changed program of coremltools as a model with the description of the one that it was made from."""
    pipeline, spec = PassPipeline.DEFAULT, original.get_spec()
    pipeline.remove_passes({"common::topological_reorder"})  # it moves a classifier from the end, where it has to be
    return ct_utils._mil_convert(
        program,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=spec.specificationVersion,
        compute_units=original.compute_unit,
        model_description=spec.description,
        skip_model_load=True,
        pass_pipeline=pipeline,
    )


def _prove(program: Any, chosen: Plan) -> None:
    """See to it that every product is what the plan says: coremltools' passes leave out what does not suit them.

    Raises:
        ExportError: one is not.
    """
    operations = {out.name: o for o in program.functions["main"].operations for out in o.outputs}
    wanted_by = [(p, "dequantize") for p in chosen.activations] + [(p, "constexpr_") for p in chosen.weights]
    for product, wanted in wanted_by:
        read = _read_by(operations[product.name]) if product.name in operations else []
        if not any(v.op is not None and v.op.op_type.startswith(wanted) for v in read):
            asked = f"keep it so with --option keep_float={product.node}"
            raise ExportError(f"int8 for Core ML: coremltools left {product.node} float; {asked}")


def _ends(values: Range) -> dict[str, float]:
    """A range as coremltools' passes take it: what lies in the middle of a symmetric one is of no use to them."""
    magnitude = min(max(_magnitude(values), SMALLEST), LARGEST)
    return {"rmin": -magnitude, "rmax": magnitude}


def _weight_config(product: Product, recipe: CoremlRecipe, ios: str) -> Any:
    """How the weights of one product are compressed; none are too few: an int8 product needs them in int8."""
    if not recipe.scheme.startswith("palette"):
        return cto.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_channel", weight_threshold=0)
    table = palette(int(recipe.scheme.removeprefix("palette")))
    groups = recipe.scheme == "palette4" and int(ios) >= GROUPED_FROM and product.channels % GROUP == 0
    if groups and product.kind != "matmul":
        return cto.OpPalettizerConfig(
            mode="custom", lut_function=table, granularity="per_grouped_channel", group_size=GROUP, weight_threshold=0
        )
    return cto.OpPalettizerConfig(mode="custom", lut_function=table, weight_threshold=0)
