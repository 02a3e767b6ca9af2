"""The TensorRT target: one strongly typed `model.onnx`, `build.sh` that builds it on a device, engines where asked.

The ONNX file says in which type every tensor is computed, so that TensorRT 8.6, 10 and 11 mean the same by it: the last
has no precision flags any more. An engine can be built here ahead of time for named GPUs (`gpu=sm89`), without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from edgevit.contracts import Built, Calibration
from edgevit.errors import MissingDependencyError, UsageError
from edgevit.specs import MAX_BATCH, Ability, Certificate, ExportSpec, ModelCard

from . import engine, passes
from .build_script import write_build_script
from .capture import capture, single_thread
from .deploy import DeploySpec, deploy
from .files import file_names, save_graphs
from .half import TIDY, Kept, ToHalf
from .node_names import name_by_module
from .opset import DecomposeHardSwish, DecomposeLayerNorm, lowering
from .quantize.equalise import equalise
from .quantize.for_tensorrt import TensorrtRecipe, quantise
from .ranges import LIMIT, Ranges, measure_ranges
from .to_onnx import OnnxExporter, output_names, signature, to_graph

OPSETS = {"8.5": 17, "8.6": 17, "10.0": 20}  # the newest that the oldest TensorRT reads: with 20 Gelu is one operator
LINTED = ("8.5", "8.6", "10.3", "11")  # versions that an export has to suit, from the oldest asked for on
SHOWN = 3  # nodes kept in float32 that a note names; the manifest has all of them


@dataclass(frozen=True)
class TensorrtOptions:
    """What the target takes beside.

    gpu: compute capabilities to build `model.engine` for, ahead of time ("sm75", "sm86", "sm89", ...; several share one
        file), or "here" for the GPU in this machine. None: `model.onnx` and `build.sh` only.
    oldest: the oldest TensorRT that has to read `model.onnx`. 8.5 knows neither LayerNormalization nor HardSwish, which
        are written out for it; from 10.0 on Gelu is one operator.
    max_batch: the largest batch of an engine with a dynamic one; it is tuned for a batch of 1.
    """

    gpu: tuple[str, ...] = ()
    oldest: Literal["8.5", "8.6", "10.0"] = "8.6"
    max_batch: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise UsageError(f"option max_batch={self.max_batch}: expected a whole number from 1 to {MAX_BATCH}")


class TensorrtExporter:
    """Deploy form -> torch.export -> ONNX -> opset of the oldest TensorRT -> float16 by measured ranges -> engine."""

    name = "tensorrt"
    runtime = "trt"
    checker = "typed_ort"
    precisions = ("fp32", "fp16", "int8")
    naive_suffix = ".onnx"
    OPTIONS = TensorrtOptions
    RECIPE = TensorrtRecipe

    def export(
        self,
        model: nn.Module,
        card: ModelCard,
        specs: Sequence[ExportSpec],
        directory: Path,
        calibration: Calibration | None = None,
    ) -> tuple[Built, ...]:
        """Write model.onnx, build.sh and perhaps model.engine; for several sizes one of each, as `model-HxW`.

        Several graphs share `weights.bin`; an engine holds its own weights.
        """
        settings = specs[0].settings
        engine.check_gpus(settings.gpu)
        with single_thread():
            outputs = output_names(model, specs[0])
        names = file_names(card, specs, ".onnx")
        graphs = (_build(model, card, *each, outputs, calibration) for each in zip(specs, names, strict=True))
        made = save_graphs(graphs, directory, alone=len(specs) == 1)
        return tuple(_finish(built, spec, directory) for built, spec in zip(made, specs, strict=True))

    def export_naive(self, model: nn.Module, card: ModelCard, spec: ExportSpec, path: Path) -> None:
        """The plain ONNX export, which is what trtexec is usually given."""
        OnnxExporter().export_naive(model, card, spec, path)

    def lint_for(self, settings: TensorrtOptions) -> tuple[str, ...]:
        """TensorRT from the oldest version asked for to the newest."""
        oldest = float(settings.oldest)
        return tuple(f"tensorrt-{version}" for version in LINTED if float(version) >= oldest)

    def abilities(self) -> tuple[Ability, ...]:
        """ONNX and build.sh anywhere; engines ahead of time with tensorrt-rtx; running takes an NVIDIA GPU."""
        files = Ability("build", True, "model.onnx, and build.sh for any device with trtexec (Jetson: sm_87 and later)")
        try:
            gpus = ", ".join(engine.known_gpus())
            engines = Ability("build", True, f"engines ahead of time for {gpus} by tensorrt-rtx (--option gpu=...)")
        except MissingDependencyError:
            engines = Ability("build", False, "engines ahead of time, by tensorrt-rtx", engine.INSTALL)
        problem = engine.gpu_problem()
        there = "copy the directory to a machine with an NVIDIA GPU; build.sh needs trtexec there and no Python"
        run = Ability("run", problem is None, problem or "an NVIDIA GPU is here", there if problem else "")
        check = Ability(
            "check", True, "model.onnx in its own types against the reference, by ONNX Runtime with float16 emulated"
        )
        return files, engines, run, check


def _build(
    model: nn.Module, card: ModelCard, spec: ExportSpec, name: str, outputs: list[str], calibration: Calibration | None
) -> tuple[ir.Model, Built]:
    """The graph for one size, and what there is to say of it once it is saved as `name`."""
    settings, size = spec.settings, spec.image_size or card.image.size
    images = None if calibration is None or spec.precision != "int8" else calibration.images[size]
    graph, certificates, choices = _float_graph(model, card, spec, outputs, images)
    notes: tuple[str, ...] = ()
    if images is not None:
        placed, notes = quantise(graph, spec.recipe, images, spec.batch)
        choices |= placed
        graph = passes.run(graph, (*TIDY, *passes.FINISH))
    if spec.precision != "fp32":
        ranges = measure_ranges(graph, card.image, size, spec.batch)
        half = ToHalf(ranges)
        graph = passes.run(graph, (half, *TIDY, *passes.FINISH))
        choices |= _half_choices(half, ranges)
        notes += _half_notes(half)
    if settings.oldest == "8.5":  # after float16, which keeps the operator in float32 as a whole: so are its parts
        graph = passes.run(graph, (DecomposeLayerNorm(), *TIDY, *passes.FINISH))
    inputs, outs = (tuple(signature(value) for value in side) for side in (graph.graph.inputs, graph.graph.outputs))
    return graph, Built(name, name, ir.to_proto(graph), inputs, outs, tuple(certificates), choices, notes)


def _float_graph(
    model: nn.Module, card: ModelCard, spec: ExportSpec, outputs: list[str], images: NDArray[Any] | None
) -> tuple[ir.Model, list[Certificate], dict[str, Any]]:
    """The graph in float32 in the operators of the oldest TensorRT; its channels equalised where it becomes int8."""
    settings, size = spec.settings, spec.image_size or card.image.size
    pointwise: Literal["dense", "grouped"] = "grouped" if spec.pointwise == "grouped" else "dense"
    why = "not measured on a GPU: the form with fewer operators" if spec.pointwise == "auto" else "asked for"
    choices: dict[str, Any] = {"pointwise": pointwise, "why": why, "oldest": settings.oldest}
    with single_thread():
        form, certificates = deploy(model, DeploySpec(spec.batch, *size, pointwise=pointwise, cache_bytes=None))
        program = capture(form, spec.batch, size)
        if images is not None and spec.recipe.equalize:
            program, choices["equalized"] = equalise(program, images)
        graph = passes.run(to_graph(program, outputs), passes.CLEANUP)
    name_by_module(graph)
    written_out = (DecomposeHardSwish(),) if settings.oldest == "8.5" else ()
    graph = passes.run(graph, (*written_out, *lowering(OPSETS[settings.oldest]), *passes.FINISH))
    return graph, certificates, choices


def _half_choices(half: ToHalf, ranges: Ranges) -> dict[str, Any]:
    return {
        "kept_fp32": [kept.record() for kept in half.named],
        "kept_fp32_operators": half.operators,
        "fp16_ranges": ranges.record(),
    }


def _half_notes(half: ToHalf) -> tuple[str, ...]:
    """What stays float32 in this network though its operator could be float16: worth a user's look."""
    if not half.named:
        return ()
    shown = ", ".join(f"{kept.node} ({_why(kept)})" for kept in half.named[:SHOWN])
    more = f" and {len(half.named) - SHOWN} more" if len(half.named) > SHOWN else ""
    note = (
        f"float16: {len(half.named)} of the nodes stay float32, because float16 with room for other pictures (up to "
        f"{LIMIT:.0f}) does not hold their numbers: {shown}{more}"
    )
    return (note,)


def _why(kept: Kept) -> str:
    """What float16 does not hold of a node's numbers."""
    if kept.why == "sum":
        return f"the magnitudes that it sums to {kept.tensor} may reach {kept.max_abs:.3g}"
    if kept.why == "weight":
        return f"its weight {kept.tensor} reaches {kept.max_abs:.3g}, or rounds too coarsely"
    small = kept.max_abs < LIMIT
    return f"{kept.tensor} stays below {kept.max_abs:.3g}" if small else f"{kept.tensor} reaches {kept.max_abs:.3g}"


def _finish(built: Built, spec: ExportSpec, directory: Path) -> Built:
    """Write the build script, and the engine if one was asked for, beside the saved graph."""
    settings, image = spec.settings, built.inputs[0]
    write_build_script(
        directory,
        onnx_file=built.checked_file,
        precision=spec.precision,
        input_name=image.name,
        input_shape=image.shape,
        oldest=settings.oldest,
    )
    if not settings.gpu:
        return built
    name = f"{Path(built.checked_file).stem}.engine"
    largest = settings.max_batch if spec.batch == "dynamic" else None
    made = engine.build_engine(directory / built.checked_file, directory / name, settings.gpu, largest)
    note = (
        f"{name} was built for {', '.join(made.gpus)} and not run here: what was compared with the reference is "
        f"{built.checked_file}, from which it was built"
    )
    choices = {**built.choices, "engine": made.record()}
    return dataclasses.replace(built, model_file=name, choices=choices, notes=(*built.notes, note))
