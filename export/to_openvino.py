"""The OpenVINO target: IR, `model.xml` with its `model.bin`, the weights in float32 or compressed to float16."""

from __future__ import annotations

import ast
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
import openvino as ov
from torch import nn

from edgevit.contracts import Built
from edgevit.errors import ExportError, last_line
from edgevit.specs import Ability, ExportSpec, ModelCard, NoOptions

from . import passes
from .capture import capture, single_thread
from .deploy import DeploySpec, deploy
from .files import file_names
from .to_onnx import CACHE_BYTES, UNMEASURED, OnnxExporter, output_names, signature, to_graph

SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter notes the modules that a node came from
DERIVED = "/WithoutBiases"  # what OpenVINO adds to a node's name for its product; the bias is added by another one
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
    precisions = ("fp32", "fp16", "bf16")
    naive_suffix = ".onnx"
    OPTIONS = NoOptions

    def export(
        self, model: nn.Module, card: ModelCard, specs: Sequence[ExportSpec], directory: Path
    ) -> tuple[Built, ...]:
        """Write `model.xml` and `model.bin`; for several sizes `model-HxW.xml` and `model-HxW.bin` each."""
        with single_thread():
            outputs = output_names(model, specs[0])
        paths = [directory / name for name in file_names(card, specs, ".xml")]
        made = [_build(model, card, spec, outputs, path) for spec, path in zip(specs, paths, strict=True)]
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


def _build(model: nn.Module, card: ModelCard, spec: ExportSpec, outputs: list[str], path: Path) -> Built:
    """Write the IR of one size and say what there is to say of it."""
    size = spec.image_size or card.image.size
    pointwise: Literal["dense", "grouped"] = "grouped" if spec.pointwise == "grouped" else "dense"
    why = GROUPED.get(card.name, UNMEASURED) if spec.pointwise == "auto" else "asked for"
    shape = DeploySpec(spec.batch, *size, pointwise=pointwise, cache_bytes=CACHE_BYTES)
    with single_thread():
        form, certificates = deploy(model, shape)
        graph = to_graph(capture(form, spec.batch, size), outputs)
    graph = passes.run(graph, passes.CLEANUP)
    name_by_module(graph)  # before FINISH, which forgets the modules
    graph = passes.run(graph, passes.FINISH)
    inputs, outs = (tuple(signature(value) for value in side) for side in (graph.graph.inputs, graph.graph.outputs))
    proto = ir.to_proto(graph)
    _save(to_ir(proto), path, half=spec.precision == "fp16")
    hint = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[spec.precision]
    stored = "f16" if spec.precision == "fp16" else "f32"
    choices = {"pointwise": pointwise, "why": why, "weights": stored, "inference_precision": hint}
    return Built(
        path.name, path.name, proto, inputs, outs, tuple(certificates), choices, (SET_PRECISION.format(hint=hint),)
    )


def name_by_module(graph: ir.Model) -> None:
    """Name each node after the module it came from: `blocks.0.attn.q/linear_3` in place of `node_linear_3`.

    The names live on in the IR, so that a profile says which part of the network takes the time.
    """
    for node in graph.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        module = scopes[-2] if len(scopes) > 1 else ""
        if node.name is not None and module:
            node.name = f"{module}/{node.name.removeprefix('node_')}"


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
