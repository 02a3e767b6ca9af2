"""The OpenVINO target: IR, `model.xml` with its `model.bin`, the weights in float32, float16 or int8."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import openvino as ov
from numpy.typing import NDArray
from torch import nn

from edgevit.contracts import Built, Calibration
from edgevit.errors import ExportError, last_line
from edgevit.specs import Ability, ExportSpec, ModelCard, NoOptions, Size, size_text

from . import passes
from .capture import capture, single_thread
from .deploy import DeploySpec, deploy
from .files import file_names
from .node_names import name_by_module
from .quantize.equalise import equalise
from .quantize.for_openvino import DERIVED, OpenvinoRecipe, quantize
from .to_onnx import CACHE_BYTES, UNMEASURED, OnnxExporter, output_names, signature, to_graph

SET_PRECISION = (
    "OpenVINO computes in bf16 where the processor has it unless told otherwise: an application that loads the model "
    "by itself sets INFERENCE_PRECISION_HINT to {hint}, as edgevit does"
)
# Why a model's pointwise convolutions are dense here, where both forms were raced.
GROUPED = {"mobileformer_26m": "measured 2026-11-20: grouped over dense 0.98x [0.96, 1.00] in fp32, 0.92x in bf16"}
SEPARATE = "OpenVINO cannot share weights between image sizes: each size has a .bin file of its own"


class OpenvinoExporter:
    """Deploy form -> torch.export -> ONNX in memory -> OpenVINO's model -> IR.

    The attention stays in separate operators, which OpenVINO's CPU plugin fuses by itself; the branches that keep
    hidden activations in the cache are as good for it as for ONNX Runtime (Mobile-Former-294M 1.07 times as fast).
    """

    name = "openvino"
    runtime = checker = "ov"
    precisions = ("fp32", "fp16", "bf16", "int8")
    naive_suffix = ".onnx"
    OPTIONS = NoOptions
    RECIPE = OpenvinoRecipe

    def export(
        self,
        model: nn.Module,
        card: ModelCard,
        specs: Sequence[ExportSpec],
        directory: Path,
        calibration: Calibration | None = None,
    ) -> tuple[Built, ...]:
        """Write `model.xml` and `model.bin`; for several sizes `model-HxW.xml` and `model-HxW.bin` each."""
        with single_thread():
            outputs = output_names(model, specs[0])
        paths = [directory / name for name in file_names(card, specs, ".xml")]
        made = [_build(model, card, spec, calibration, outputs, path) for spec, path in zip(specs, paths, strict=True)]
        notes = () if len(specs) == 1 else (SEPARATE,)
        return tuple(replace(built, notes=(*built.notes, *notes)) for built in made)

    def export_naive(self, model: nn.Module, card: ModelCard, spec: ExportSpec, path: Path) -> None:
        """The plain ONNX export of the reference form, which OpenVINO reads as it is.

        OpenVINO's own conversion from PyTorch cannot trace most of the networks.
        """
        OnnxExporter().export_naive(model, card, spec, path)

    def lint_for(self, settings: NoOptions) -> tuple[str, ...]:  # noqa: ARG002  # the contract's signature
        """OpenVINO's rules."""
        return ("openvino",)

    def abilities(self) -> tuple[Ability, ...]:
        """IR is built anywhere; it is checked on the CPU, and run on what devices there are."""
        core = ov.Core()
        names = {device: str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices}
        found = ", ".join(f"{device} ({name.strip()})" for device, name in names.items())
        missing = [kind for kind in ("GPU", "NPU") if not any(device.startswith(kind) for device in names)]
        how = f"{' and '.join(missing)}: install Intel's driver on a machine that has one" if missing else ""
        return (
            Ability("build", True, "model.xml and model.bin"),
            Ability("run", bool(names), f"OpenVINO on {found or 'no device'}", how),
            Ability("check", "CPU" in names, "against the reference, by OpenVINO on the CPU"),
        )


def _build(
    model: nn.Module, card: ModelCard, spec: ExportSpec, calibration: Calibration | None, outputs: list[str], path: Path
) -> Built:
    """Write the IR of one size and say what there is to say of it."""
    size = spec.image_size or card.image.size
    pointwise: Literal["dense", "grouped"] = "grouped" if spec.pointwise == "grouped" else "dense"
    why = GROUPED.get(card.name, UNMEASURED) if spec.pointwise == "auto" else "asked for"
    images = _images(spec, size, calibration)
    hint = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}[spec.precision]
    stored = {"fp16": "f16", "int8": "i8"}.get(spec.precision, "f32")
    choices: dict[str, Any] = {"pointwise": pointwise, "why": why, "weights": stored, "inference_precision": hint}
    shape = DeploySpec(spec.batch, *size, pointwise=pointwise, cache_bytes=CACHE_BYTES)
    with single_thread():
        form, certificates = deploy(model, shape)
        program = capture(form, spec.batch, size)
        if images is not None and spec.recipe.equalize:
            program, choices["equalized"] = equalise(program, images)
        graph = to_graph(program, outputs)
    graph = passes.run(graph, passes.CLEANUP)
    name_by_module(graph)  # before FINISH, which forgets the modules
    graph = passes.run(graph, passes.FINISH)
    inputs, outs = (tuple(signature(value) for value in side) for side in (graph.graph.inputs, graph.graph.outputs))
    proto = ir.to_proto(graph)
    notes: tuple[str, ...] = (SET_PRECISION.format(hint=hint),)
    converted = to_ir(proto)
    if images is not None:
        kinds = {node.name: node.op_type for node in proto.graph.node}
        made = quantize(converted, kinds, spec.recipe, images, spec.batch)
        converted, notes, choices = made.model, (*notes, *made.notes), choices | made.choices
    _save(converted, path, half=spec.precision == "fp16")
    return Built(path.name, path.name, proto, inputs, outs, tuple(certificates), choices, notes)


def _images(spec: ExportSpec, size: Size, calibration: Calibration | None) -> NDArray[np.float32] | None:
    """What int8 ranges are measured on, (n, 3, h, w); None for another precision.

    Raises:
        ExportError: int8 without pictures of this size.
    """
    if spec.precision != "int8":
        return None
    images = None if calibration is None else calibration.images.get(size)
    if images is None or not len(images):
        raise ExportError(
            f"int8 at {size_text(size)}: no calibration pictures of this size, expected at least one; give some with "
            "--calibration"
        )
    return images


def to_ir(proto: onnx.ModelProto) -> ov.Model:
    """OpenVINO's model of an ONNX graph; the same graph gives the same names.

    OpenVINO numbers what it adds by a counter of the whole process; here it is numbered by its place in the graph.

    Raises:
        ExportError: OpenVINO cannot convert the graph.
    """
    try:
        model = ov.convert_model(io.BytesIO(proto.SerializeToString()))
    except Exception as error:  # its exceptions share no base below Exception
        raise ExportError(f"conversion to OpenVINO: {last_line(error)}") from error
    known = {node.name for node in proto.graph.node} | {tensor.name for tensor in proto.graph.initializer}
    known |= {value.name for value in (*proto.graph.input, *proto.graph.output)}
    for place, op in enumerate(model.get_ordered_ops()):
        kind = op.get_type_name()
        if op.get_friendly_name().removesuffix(DERIVED) not in known and kind != "Result":
            op.set_friendly_name(f"{kind}_{place}")
    return model


def _save(model: ov.Model, path: Path, *, half: bool) -> None:
    try:
        ov.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as error:
        raise ExportError(f"{path.name}: OpenVINO cannot write it: {last_line(error)}") from error
