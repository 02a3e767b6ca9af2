"""The ONNX target: one `model.onnx`, weights inside, in the form that ONNX Runtime's CPU kernels run fast.

Several sizes share one weight file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from edgevit.contracts import Built, Calibration
from edgevit.errors import ExportError, first_line
from edgevit.specs import MAX_BATCH, Ability, ExportSpec, ModelCard, NoOptions, TensorSpec

from . import passes
from .capture import capture, example_image, quiet, single_thread
from .deploy import DeploySpec, deploy
from .files import file_names, save_graphs
from .node_names import name_by_module
from .quantize.equalise import equalise
from .quantize.for_onnx import OnnxRecipe, quantize

OPSET = 20  # LayerNormalization (17) and Gelu (20) stay one operator each; every current runtime reads it
# Of hidden activations in a branch: 508M was fastest of 400, 640, 1000 and 1300 KiB, 294M much the same at 450 and 700.
CACHE_BYTES = 640 << 10
UNMEASURED = "no grouped convolutions measured for this model"


class OnnxExporter:
    """Deploy form -> torch.export -> ONNX -> graph passes -> model.onnx."""

    name = "onnx"
    runtime = checker = "ort"
    precisions = ("fp32", "int8")
    naive_suffix = ".onnx"
    OPTIONS = NoOptions
    RECIPE = OnnxRecipe

    def export(
        self,
        model: nn.Module,
        card: ModelCard,
        specs: Sequence[ExportSpec],
        directory: Path,
        calibration: Calibration | None = None,
    ) -> tuple[Built, ...]:
        """Write `model.onnx`, weights inside; for several sizes `model-HxW.onnx` each and `weights.bin` for all."""
        with single_thread():
            outputs = output_names(model, specs[0])
        names = file_names(card, specs, ".onnx")
        graphs = (_build(model, card, *each, outputs, calibration) for each in zip(specs, names, strict=True))
        return save_graphs(graphs, directory, alone=len(specs) == 1)

    def export_naive(self, model: nn.Module, card: ModelCard, spec: ExportSpec, path: Path) -> None:
        """`torch.onnx.export(dynamo=True)` of the reference form, nothing else: what a user gets without edgevit."""
        image = example_image(spec.batch, spec.image_size or card.image.size)
        shapes = ({0: Dim("batch", min=1, max=MAX_BATCH)},) if spec.batch == "dynamic" else None
        with quiet(), _silent_streams(), torch.no_grad():
            torch.onnx.export(
                model.eval(), (image,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
            )

    def lint_for(self, settings: NoOptions) -> tuple[str, ...]:  # noqa: ARG002  # the contract's signature
        """None: ONNX Runtime itself loads and runs every export."""
        return ()

    def abilities(self) -> tuple[Ability, ...]:
        """Everything, everywhere: ONNX Runtime is a dependency."""
        return (
            Ability("build", True, "model.onnx"),
            Ability("run", True, "ONNX Runtime on the CPU"),
            Ability("check", True, "against the reference, by ONNX Runtime"),
        )


def _build(
    model: nn.Module, card: ModelCard, spec: ExportSpec, name: str, outputs: list[str], calibration: Calibration | None
) -> tuple[ir.Model, Built]:
    """The graph for one size, and what there is to say of it once it is saved as `name`."""
    size = spec.image_size or card.image.size
    pointwise, why = choose_pointwise(card.name, spec.pointwise)
    shape = DeploySpec(spec.batch, *size, pointwise=pointwise, cache_bytes=CACHE_BYTES)
    choices: dict[str, Any] = {"pointwise": pointwise, "why": why}
    with single_thread():
        form, certificates = deploy(model, shape)
        program = capture(form, spec.batch, size)
        if calibration is not None and spec.recipe.equalize:
            program, choices["equalized"] = equalise(program, calibration.images[size])
        graph = passes.run(to_graph(program, outputs), passes.CLEANUP)
    name_by_module(graph)
    graph = passes.run(graph, passes.CPU_KERNELS)
    notes: tuple[str, ...] = ()
    if calibration is not None:
        graph, done = quantize(graph, spec.recipe, calibration.images[size], spec.batch)
        choices, notes = {**choices, **done.choices()}, done.notes()
    graph = passes.run(graph, passes.FINISH)
    inputs, outs = (tuple(signature(value) for value in side) for side in (graph.graph.inputs, graph.graph.outputs))
    return graph, Built(name, name, ir.to_proto(graph), inputs, outs, tuple(certificates), choices, notes)


def choose_pointwise(model: str, wish: str) -> tuple[Literal["dense", "grouped"], str]:
    """Dense or grouped pointwise convolutions, and why: the user's wish, else the recorded measurement."""
    if wish != "auto":
        return "dense" if wish == "dense" else "grouped", "asked for"
    text = resources.files(__package__ or "").joinpath("measurements.json").read_text(encoding="utf-8")
    record: dict[str, Any] | None = json.loads(text)["grouped_over_dense"].get(model)
    if record is None:
        return "dense", UNMEASURED
    faster: Literal["dense", "grouped"] = "grouped" if record["ratio"] > 1 else "dense"
    interval = f"[{record['low']:.2f}, {record['high']:.2f}]"
    return faster, f"measured {record['date']}: grouped over dense {record['ratio']:.2f}x {interval}"


def output_names(model: nn.Module, spec: ExportSpec) -> list[str]:
    """The graph's outputs: logits, or the fields of the features that the network returns."""
    if not spec.features_only:
        return ["logits"]
    with torch.no_grad():
        features = model(torch.zeros(1, 3, *(spec.image_size or (224, 224))))
    return list(features._fields)


def to_graph(program: ExportedProgram, outputs: list[str]) -> ir.Model:
    """The ONNX graph of a captured program; input `image`, outputs as named.

    Raises:
        ExportError: PyTorch's exporter has no translation for an operator.
    """
    try:
        with quiet(), _silent_streams():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=outputs,
                dynamic_shapes=(
                    {0: "batch"},
                ),  # its name where it is dynamic, "s40" otherwise; a fixed one stays fixed
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"conversion to ONNX: {first_line(error)}") from error
    if converted is None:
        raise ExportError("conversion to ONNX: PyTorch's exporter returned nothing; please report the model")
    graph: ir.Model = converted.model
    graph.producer_name, graph.producer_version = "edgevit", None
    return graph


def signature(value: ir.Value) -> TensorSpec:
    """Name, shape and type of a graph's input or output.

    Raises:
        ExportError: it lacks one of them.
    """
    if value.name is None or value.shape is None or value.dtype is None:
        raise ExportError("conversion to ONNX: an input or output has no name, shape or type; please report the model")
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    layout = "NCHW" if len(shape) == 4 else ""
    return TensorSpec(value.name, shape, value.dtype.numpy().name, layout)


@contextlib.contextmanager
def _silent_streams() -> Iterator[None]:
    """PyTorch's exporter prints progress; stdout belongs to the caller's JSON."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        Path(os.devnull).open("w") as sink,
        contextlib.redirect_stderr(sink),
    ):
        yield
