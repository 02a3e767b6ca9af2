"""The Core ML target: `model.mlpackage`, an ML program made from the captured deploy form.

Conversion needs no Mac; running does. What was saved is checked by `edgevit.runtimes.mil_reference`, which runs the
program of the package operator by operator.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgevit import __version__
from edgevit.contracts import Built, Calibration
from edgevit.errors import ExportError, UsageError, first_line
from edgevit.inputs import as_values, read_labels
from edgevit.specs import MAX_BATCH, Ability, ExportSpec, ModelCard

from . import passes
from .capture import capture, quiet, single_thread
from .deploy import DeploySpec, deploy
from .files import file_names
from .mil_kept import beyond_note, check_types, kept_fp32
from .mil_pixels import Divided, scaled_input
from .mil_quiet import silent
from .mil_saved import described, save
from .node_names import name_by_module
from .quantize.equalise import equalise
from .quantize.for_coreml import CoremlRecipe, number_nodes, origins, quantize
from .to_onnx import output_names, to_graph

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

import coremltools as ct  # noqa: E402  # after the line above, or the remarks are printed
from coremltools.converters.mil.frontend.torch import ops as torch_ops  # noqa: E402  # as above
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY  # noqa: E402  # as above
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass  # noqa: E402  # as above
from coremltools.converters.mil.mil.passes.pass_registry import register_pass  # noqa: E402  # as above

DATE = "com.github.apple.coremltools.conversion_date"  # the day of the export, which makes equal exports differ


VALUES = {"tensor": "normalised", "image": "pixels"}  # of the option input: what a package takes
ANY_BATCH = "any batch: Core ML plans fixed shapes best; for the Neural Engine export the batch that you will use"


@dataclass(frozen=True)
class CoremlOptions:
    """What a Core ML export takes beside.

    ios: the oldest system that has to run it; macOS 13, 14 and 15 go with 16, 17 and 18.
    input: "tensor" takes normalised float32, "image" a picture (RGB, 0 to 255), which the model normalises itself.
    keep_fp32: operator types of the program that stay in float32 when the precision is fp16, e.g. softmax,layer_norm.
        None is the default: with random weights no network here made more than 650 on the photographs (masks aside,
        -1e4), a hundredth of float16's range, and every operator kept leaves the Neural Engine, which has float16
        alone. A checkpoint that does overflow fails its parity check, which names what to keep.
    labels: a file of class names, which makes the model a classifier with labels beside its logits.
    author, license: shown by Xcode.
    """

    ios: Literal["16", "17", "18"] = "17"
    input: Literal["tensor", "image"] = "tensor"
    keep_fp32: tuple[str, ...] = ()
    labels: Path | None = None
    author: str = ""
    license: str = ""


class CoremlExporter:
    """Deploy form -> torch.export -> coremltools -> model.mlpackage."""

    name = "coreml"
    runtime = "coreml"
    checker = "mil_reference"
    precisions = ("fp32", "fp16", "int8")
    naive_suffix = ".mlpackage"
    OPTIONS = CoremlOptions
    RECIPE = CoremlRecipe

    def export(
        self,
        model: nn.Module,
        card: ModelCard,
        specs: Sequence[ExportSpec],
        directory: Path,
        calibration: Calibration | None = None,
    ) -> tuple[Built, ...]:
        """Write `model.mlpackage`; for several sizes `model-HxW.mlpackage` each, with weights of their own."""
        _check(specs[0])
        with single_thread():
            outputs, labels = output_names(model, specs[0]), _labels(model, card, specs[0])
        paths = [directory / name for name in file_names(card, specs, ".mlpackage")]
        made = _Outputs(outputs, labels)
        return tuple(
            _build(model, card, spec, made, calibration, path) for spec, path in zip(specs, paths, strict=True)
        )

    def export_naive(self, model: nn.Module, card: ModelCard, spec: ExportSpec, path: Path) -> None:
        """coremltools' conversion of the reference form, nothing else: what a user gets without edgevit."""
        with single_thread():
            program = capture(model.eval(), spec.batch, spec.image_size or card.image.size)
            outputs = output_names(model, spec)
        save(_convert(program, outputs, spec, card, None)[0], path)

    def lint_for(self, settings: CoremlOptions) -> tuple[str, ...]:
        """The rules of the oldest system that has to run it."""
        return (f"coreml-ios{settings.ios}",)

    def abilities(self) -> tuple[Ability, ...]:
        """Core ML itself exists on Apple's systems only; everything before it does not need it."""
        mac = bool(getattr(ct.models.model, "_MLModelProxy", None))
        how = "" if mac else "copy the artifact to a Mac with macOS 13 or later and edgevit[coreml], run it there"
        return (
            Ability("build", True, f"model.mlpackage with coremltools {ct.__version__}"),
            Ability("run", mac, "Core ML on this Mac" if mac else "Core ML exists on Apple's systems only", how),
            Ability("check", True, "the saved program, operator by operator, in float32 and emulated float16"),
        )


def _check(spec: ExportSpec) -> None:
    """Refuse what cannot go together, before any work."""
    settings = spec.settings
    check_types(settings.keep_fp32)
    if spec.precision == "int8":
        spec.recipe.check(settings.ios)
    if settings.keep_fp32 and not _in_half(spec):
        raise UsageError(
            f"option keep_fp32 with precision {spec.precision}: it excepts operators from fp16; add --precision fp16"
        )
    if settings.input == "image" and spec.batch != 1:
        raise UsageError(
            f"option input=image with batch {spec.batch}: Core ML takes one picture at a time; use batch 1"
        )
    if settings.labels is not None and spec.features_only:
        raise UsageError("option labels with features only: features have no classes; leave one of them out")
    if settings.labels is not None and spec.batch != 1:
        raise UsageError(f"option labels with batch {spec.batch}: Core ML names one class at a time; use batch 1")


@dataclass(frozen=True)
class _Outputs:
    """Their names, and the names of a classifier's classes."""

    names: list[str]
    labels: list[str] | None


def _labels(model: nn.Module, card: ModelCard, spec: ExportSpec) -> list[str] | None:
    """The class names asked for, as many as the network has classes.

    Raises:
        InputError: no label file of this network.
    """
    if spec.settings.labels is None:
        return None
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, *(spec.image_size or card.image.size)))
    return read_labels(spec.settings.labels, int(logits.shape[1]))


def _build(
    model: nn.Module,
    card: ModelCard,
    spec: ExportSpec,
    outputs: _Outputs,
    calibration: Calibration | None,
    path: Path,
) -> Built:
    """Write the package for one size."""
    settings, size = spec.settings, spec.image_size or card.image.size
    pointwise: Literal["dense", "grouped"] = "grouped" if spec.pointwise == "grouped" else "dense"
    choices: dict[str, Any] = {"pointwise": pointwise, "ios": settings.ios, "input": settings.input}
    images = None if calibration is None else calibration.images[size]
    with single_thread():
        form, certificates = deploy(model, DeploySpec(spec.batch, *size, pointwise=pointwise, cache_bytes=None))
        program = capture(form, spec.batch, size)
        graph = _graph(program, outputs.names)
        if settings.input == "image":
            form, choices["std"] = scaled_input(form, card.image.std, torch.zeros(1, 3, *size))
        if outputs.labels:
            form = WithProbabilities(form).eval()
        if outputs.labels or settings.input == "image":
            program = capture(form, spec.batch, size)
        if images is not None and spec.recipe.equalize:
            program, choices["equalized"] = equalise(program, _as_read(images, card, settings))
    converted, nodes = _convert(program, outputs.names, spec, card, outputs.labels)
    notes: tuple[str, ...] = (ANY_BATCH,) if spec.batch == "dynamic" else ()
    if _in_half(spec):
        choices["keep_fp32"] = list(settings.keep_fp32)
        choices["kept_fp32"] = kept = kept_fp32(converted._mil_program, settings.keep_fp32)
        notes += beyond_note(kept)
    if spec.precision == "int8":
        fed = None if images is None else as_values(images, card.image, VALUES[settings.input])
        done = quantize(converted, nodes, spec.recipe, settings.ios, fed, calibration.watch if calibration else None)
        converted, notes = done.model, notes + done.notes
        choices |= done.choices
    _describe(converted, card, spec)
    save(converted, path)
    return replace(described(path.name, converted, ir.to_proto(graph), certificates, choices), notes=notes)


def _graph(program: ExportedProgram, outputs: list[str]) -> ir.Model:
    """The ONNX form of a program, on which operations are counted; its nodes are named as patterns name them."""
    graph = passes.run(to_graph(program, outputs), passes.CLEANUP)
    name_by_module(graph)  # before FINISH, which forgets the modules
    return passes.run(graph, passes.FINISH)


def _as_read(images: NDArray[np.float32], card: ModelCard, settings: CoremlOptions) -> NDArray[np.float32]:
    """Normalised pictures (n, 3, h, w) as the captured program gets them: of a picture input before the division."""
    std = np.array(card.image.std, np.float32)[:, None, None]  # 3 1 1
    return images * std if settings.input == "image" else images


def _in_half(spec: ExportSpec) -> bool:
    """Whether what is not int8 is float16."""
    return spec.precision == "fp16" or (spec.precision == "int8" and spec.recipe.body == "fp16")


class WithProbabilities(nn.Module):
    """Logits, and the probabilities that Core ML names a class by."""

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (1, 3, h, w) -> twice (1, classes)."""
        logits = self.form(x)
        return logits, torch.softmax(logits, 1)


AROUND = (WithProbabilities, Divided)  # modules around the network, which no user's pattern names


def _convert(
    program: ExportedProgram, outputs: list[str], spec: ExportSpec, card: ModelCard, labels: list[str] | None
) -> tuple[Any, dict[str, str]]:
    """The package's model, not saved yet, and the module and node that each of its values came from.

    Raises:
        ExportError: coremltools cannot convert an operator, or a tensor has more than five axes.
    """
    settings = spec.settings
    height, width = spec.image_size or card.image.size
    batch = ct.RangeDim(1, MAX_BATCH, default=1) if spec.batch == "dynamic" else spec.batch
    shape = (batch, 3, height, width)
    if settings.input == "image":
        bias = [-mean for mean in card.image.mean]
        image = ct.ImageType("image", shape, scale=1 / 255, bias=bias, color_layout=ct.colorlayout.RGB)
    else:
        image = ct.TensorType("image", shape, dtype=np.float32)
    names = [*outputs, "probabilities"] if labels else outputs
    classes = ct.ClassifierConfig(labels, predicted_probabilities_output="probabilities") if labels else None
    kept = set(settings.keep_fp32)
    half = ct.transform.FP16ComputePrecision(lambda operation: operation.op_type not in kept)
    pipeline = ct.PassPipeline.DEFAULT
    if labels:
        pipeline.append_pass(FORGET)
    with quiet(), silent() as remarks, _alias_known():
        try:
            program = program.run_decompositions({})
            nodes = number_nodes(program, AROUND)
            converted = ct.convert(
                program,
                convert_to="mlprogram",
                inputs=[image],
                outputs=[ct.TensorType(name, dtype=np.float32) for name in names],
                classifier_config=classes,
                pass_pipeline=pipeline,
                minimum_deployment_target=getattr(ct.target, f"iOS{settings.ios}"),
                compute_precision=half if _in_half(spec) else ct.precision.FLOAT32,
                skip_model_load=True,
            )
        except Exception as error:  # coremltools raises whatever its passes meet
            place = f"{remarks[-1]}: " if remarks else ""
            raise ExportError(
                f"conversion to Core ML: {place}{first_line(error)[:200]}; please report the model"
            ) from error
    return converted, origins(converted._mil_program, nodes)


@register_pass(namespace="edgevit")
class forget_output_types(AbstractGraphPass):  # type: ignore[misc]  # noqa: N801  # coremltools is untyped; its names
    """coremltools gives a classifier an output more than was asked for, and then looks for the type of each.

    By the end of its passes the types are part of the program.
    """

    def apply(self, prog: Any) -> None:
        """Forget them."""
        for function in prog.functions.values():
            function.output_types = None


FORGET = "edgevit::forget_output_types"


def _describe(converted: Any, card: ModelCard, spec: ExportSpec) -> None:
    """Metadata that Xcode shows and programs read; nothing of the machine that exported."""
    image, settings = card.image, spec.settings
    converted.short_description = f"{card.title} ({card.name}), {card.url}"
    converted.author, converted.license, converted.version = settings.author, settings.license, __version__
    taken = "RGB pixels, normalised inside" if settings.input == "image" else "(RGB / 255 - mean) / std, planes"
    weights = f"random, seed {spec.seed}" if spec.weights is None else Path(spec.weights).name
    facts = {
        "model": card.name, "version": __version__, "weights": weights, "precision": spec.precision, "input": taken,
        "mean": ", ".join(map(str, image.mean)), "std": ", ".join(map(str, image.std)),
        "crop": str(image.crop), "interpolation": image.interpolation,
    }  # fmt: skip
    for key, value in facts.items():
        converted.user_defined_metadata[f"edgevit.{key}"] = value
    converted.user_defined_metadata.pop(DATE, None)


@contextlib.contextmanager
def _alias_known() -> Iterator[None]:
    """torch.export writes `alias` for a view of a whole tensor; coremltools has no translation for it."""
    table = _TORCH_OPS_REGISTRY.name_to_func_mapping
    if "alias" in table:
        yield
        return
    table["alias"] = lambda context, node: context.add(
        torch_ops._get_inputs(context, node, expected=1)[0], torch_name=node.name
    )
    try:
        yield
    finally:
        del table["alias"]
