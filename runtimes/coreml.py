"""Core ML on macOS.

Written against the documented interface of coremltools 9 (MLModel, MLComputePlan) and tested with a stand-in: nobody
has run this file on a Mac yet. On any other system `obstacle` says so, and `edgevit.runtimes.mil_reference` computes
what the same package defines.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure
from edgevit.specs import OperatorTime, TensorSpec

from .mil_package import reason
from .mil_program import Program, ProgramRuntime, read_program

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

import coremltools as ct  # noqa: E402  # after the line above, or the remarks are printed
from coremltools.models.compute_plan import MLComputePlan  # noqa: E402  # as above

ELSEWHERE = "copy the artifact to a Mac and run edgevit there; `edgevit verify` checks its numbers on any system"


@dataclass(frozen=True)
class CoremlRuntimeOptions:
    """`compute_units`: what Core ML may use; ALL leaves the choice of CPU, GPU and Neural Engine to it."""

    compute_units: Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"] = "ALL"


class CoremlRuntime(ProgramRuntime):
    """Runs the package at `path`, one prediction after the other.

    The types of a Core ML program are the least precision: Core ML may compute a float16 operator in float32, mostly on
    the CPU, and does not tell. `effective_precision` is therefore that of the program.
    """

    name = "coreml"
    OPTIONS = CoremlRuntimeOptions

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        precision: str = "fp32",
        options: CoremlRuntimeOptions | None = None,
    ) -> None:
        self.path = path
        self.threads = threads  # Core ML takes no number of threads; told in `describe`
        self.precision = precision
        self.options = options or CoremlRuntimeOptions()
        self._model: Any = None
        self._program: Program | None = None

    @classmethod
    def obstacle(cls) -> str | None:
        """Why Core ML cannot run here, or None."""
        if platform.system() != "Darwin":
            return f"Core ML runs on macOS only, this is {platform.system()}: {ELSEWHERE}"
        if getattr(ct.models.model, "_MLModelProxy", None) is None:
            return "coremltools was installed without its macOS part: pip install --force-reinstall coremltools"
        return None

    def load(self) -> None:
        """Read the program, then let Core ML compile it for the compute units.

        Raises:
            RuntimeFailure: no Mac, a damaged package, or one that Core ML refuses.
        """
        if problem := self.obstacle():
            raise RuntimeFailure(f"{self.path}: {problem}")
        self._program = read_program(self.path)
        try:
            self._model = ct.models.MLModel(str(self.path), compute_units=self._units)
        except Exception as error:  # Core ML's errors come as RuntimeError and others
            raise RuntimeFailure(f"{self.path}: Core ML cannot load it: {reason(error)}") from error

    def describe(self) -> dict[str, Any]:
        """Versions, compute units, and the device that Core ML prefers for how many operators."""
        return {
            "runtime": "Core ML",
            "version": f"macOS {platform.mac_ver()[0]}, coremltools {ct.__version__}",
            "providers": [self.options.compute_units],
            "threads": None,
            "devices": dict(Counter(device for _, device, _ in self._planned().values())),
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; of a classifier also its label, a text, and its probabilities in the order of the labels."""
        program = self._loaded()
        feed = {spec.name: _fed(inputs[spec.name], spec) for spec in program.inputs}
        try:
            outputs = self._model.predict(feed)
        except Exception as error:  # Core ML's errors come as RuntimeError and others
            raise RuntimeFailure(f"{self.path}: Core ML failed: {reason(error)}") from error
        return {name: _array(outputs[name], program.labels) for name in program.outputs}

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """Core ML's own estimate of each operator's share, times the median time of a prediction; each with its device.

        Core ML measures no operator. `name` ends with the device that it prefers; `precision` is the program's.
        With `runs` 0 nothing is timed, and the times are 0.
        """
        program, times = self._loaded(), []
        if runs:
            self.run(inputs)  # the first prediction still prepares
        for _ in range(runs):
            begin = time.perf_counter()
            self.run(inputs)
            times.append(time.perf_counter() - begin)
        whole_ms = statistics.median(times) * 1e3 if times else 0.0
        types = {o.name: o.kind.name for s in program.steps for o in s.outputs if o.kind is not None}
        types |= program.product_precisions
        macs = program.macs
        return tuple(
            OperatorTime(
                f"{name} on {device}", kind, types.get(name, "none"), share * whole_ms, (name,), macs.get(name, 0)
            )
            for name, (kind, device, share) in self._planned().items()
        )

    def close(self) -> None:
        """Drop the model."""
        self._model = self._program = None

    def _loaded(self) -> Program:
        if self._model is None:  # Core ML may have refused a program that could be read
            raise RuntimeFailure(f"{self.path}: the Core ML model is not loaded")
        return super()._loaded()

    @property
    def _units(self) -> Any:
        return ct.ComputeUnit[self.options.compute_units]

    def _planned(self) -> dict[str, tuple[str, str, float]]:
        """Of each operator that computes: its type, the device that Core ML prefers, its share of the time."""
        self._loaded()
        try:
            compiled = self._model.get_compiled_model_path()
            plan = MLComputePlan.load_from_path(compiled, compute_units=self._units)
            operations = plan.model_structure.program.functions["main"].block.operations
            found = {}
            for operation in operations:
                usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
                cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
                if usage is not None and operation.outputs:  # constants have none
                    device = (
                        type(usage.preferred_compute_device).__name__.removeprefix("ML").removesuffix("ComputeDevice")
                    )
                    kind = operation.operator_name.rpartition(".")[2]  # "ios17.conv" -> "conv"
                    found[operation.outputs[0].name] = (kind, device, 0.0 if cost is None else float(cost.weight))
        except Exception as error:  # no plan before macOS 14.4; Core ML's errors come as RuntimeError and others
            raise RuntimeFailure(
                f"{self.path}: no compute plan: {reason(error)}; it needs macOS 14.4 or later"
            ) from error
        return found


def _fed(array: NDArray[Any], spec: TensorSpec) -> Any:
    """An array as it is, pixels (1, 3, h, w) from 0 to 255 as a picture."""
    if spec.values != "pixels":
        return np.ascontiguousarray(array)
    bytes_ = np.rint(array[0]).clip(0, 255).astype(np.uint8)  # 3 h w
    return Image.fromarray(np.ascontiguousarray(bytes_.transpose(1, 2, 0)))  # 3 h w -> h w 3


def _array(value: Any, labels: list[str]) -> NDArray[Any]:
    if isinstance(value, dict):
        return np.array([[value[label] for label in labels]], dtype=np.float32)
    return np.array([value]) if isinstance(value, str) else np.array(value)
