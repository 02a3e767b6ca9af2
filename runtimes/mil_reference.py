"""A Core ML model without Core ML: the program saved in an `.mlpackage`, run operator by operator on any machine.

Core ML itself exists on Apple's systems only. This interpreter reads the same file and computes what the operator set
defines, so that what was saved can be compared with the reference, and the first operator that overflows float16 can be
named. It says nothing of speed, and nothing of how a Neural Engine sums inside one operator: float16 is emulated by
rounding what each operator makes, with sums inside it in float32, as Apple's GPU and CPU and, documented less, its
Neural Engine accumulate.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure
from edgevit.specs import NoOptions, OperatorTime

from . import mil_ops_owner
from .mil_ops import ACTIVATIONS, ELEMENTWISE, QUANTIZATION, REDUCTIONS, Operands, Operator, Result
from .mil_ops_nn import NN
from .mil_ops_shape import SHAPE
from .mil_package import Kind
from .mil_program import SPEC_VERSIONS, Output, Program, ProgramRuntime, Step, read_program

OPERATORS: dict[str, Operator] = {**ELEMENTWISE, **ACTIVATIONS, **REDUCTIONS, **QUANTIZATION, **SHAPE, **NN}
Seen = Callable[[Step, tuple[Any, ...]], None]  # told of every step and what it made


@dataclass(frozen=True)
class Problem:
    """The first operator whose result is not finite; `largest` is the largest magnitude it read.

    `readers` are the types of what reads the result: in float16 they would meet the infinity again.
    """

    name: str
    type: str
    kind: str
    what: str
    largest: float
    readers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.type} {self.name!r} in {self.kind} {self.what}, reading values up to {self.largest:.4g}"


class MilReference(ProgramRuntime):
    """Runs the package at `path` with `threads` threads (None: one) in the precision that its program has.

    `first_problem` is the first operator of the last run that overflowed or made a NaN, None where all was finite. An
    infinite value inside is no failure by itself: a mask of minus infinity is one. An output that is not finite is.
    """

    name = "mil_reference"
    OPTIONS = NoOptions

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        precision: str = "fp32",
        options: NoOptions | None = None,  # noqa: ARG002  # the contract's signature
    ) -> None:
        self.path = path
        self.threads = threads or 1
        self.precision = precision
        self.first_problem: Problem | None = None
        self._program: Program | None = None

    @classmethod
    def obstacle(cls) -> str | None:
        """None: it runs wherever PyTorch and coremltools do."""
        return None

    def load(self) -> None:
        """Read the package, look up every operator, and unpack compressed weights once.

        Raises:
            RuntimeFailure: a damaged package, or an operator that is not known here.
        """
        program = read_program(self.path)
        known = {*OPERATORS, *mil_ops_owner.owned(), "classify"}
        unknown = next((step for step in program.steps if step.type not in known), None)
        if unknown is not None:
            raise RuntimeFailure(
                f"{self.path}: operator {unknown.type} ({unknown.name!r}) is not known to the interpreter; "
                f"known: {', '.join(sorted(known))}"
            )
        self._program = program
        with _threads(self.threads):
            for step in program.steps:  # compressed weights: constants made of constants
                if step.type.startswith("constexpr_"):
                    made = self._compute(step, program.constants)
                    program.constants.update(zip((out.name for out in step.outputs), made, strict=True))

    def describe(self) -> dict[str, Any]:
        """Versions, threads, and the first problem of the last run."""
        return {
            "runtime": "edgevit MIL interpreter",
            "version": torch.__version__,
            "providers": ["PyTorch on the CPU; no Core ML"],
            "threads": self.threads,
            "program": SPEC_VERSIONS[self._loaded().version],
            "first_problem": None if self.first_problem is None else str(self.first_problem),
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; of a classifier also its label, a text, and its probabilities in the order of the labels.

        Raises:
            RuntimeFailure: an operator failed, or an output is not finite; it names the first operator that was not.
        """
        outputs = self._run(inputs)
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RuntimeFailure(f"{self.path}: output {name} is not finite: {self._reason(inputs)}")
        return outputs

    def ranges(self, inputs: Arrays) -> dict[str, tuple[float, float]]:
        """The lowest and the highest number of every floating value that the program makes, inputs included."""
        found = {name: (float(array.min()), float(array.max())) for name, array in inputs.items()}

        def see(step: Step, made: tuple[Any, ...]) -> None:
            for out, value in zip(step.outputs, made, strict=True):
                if out.kind is not None and out.kind.floating and value.numel():
                    found[out.name] = (float(value.min()), float(value.max()))

        self._run(inputs, see)
        return found

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """The precision of every operator, and the interpreter's own time for it, which is no device's."""
        spent: dict[str, float] = {}
        last = 0.0

        def see(step: Step, made: tuple[Any, ...]) -> None:  # noqa: ARG001  # what it made is not asked
            nonlocal last
            now = time.perf_counter()
            spent[step.name] = spent.get(step.name, 0.0) + now - last
            last = now

        for _ in range(runs):
            last = time.perf_counter()
            self._run(inputs, see)
        macs = self._loaded().macs
        return tuple(
            OperatorTime(
                name=step.name,
                kind=step.type,
                precision=step.outputs[0].kind.name if step.outputs[0].kind else "none",
                time_ms=spent[step.name] / runs * 1e3,
                origins=(step.name,),
                macs=macs.get(step.name, 0),
            )
            for step in self._loaded().steps
            if step.name in spent
        )

    def close(self) -> None:
        """Drop the program and its weights."""
        self._program = None

    def _run(self, inputs: Arrays, see: Seen = lambda step, made: None) -> dict[str, NDArray[Any]]:
        program, self.first_problem = self._loaded(), None
        values: dict[str, Any] = {}
        for name, array in inputs.items():
            tensor = torch.from_numpy(np.array(array))
            tensor = tensor.flip(1) if name in program.bgr else tensor  # planes r g b -> b g r
            values[name] = _held(tensor, program.input_kinds[name])
        with _threads(self.threads), torch.no_grad():
            for step in (step for step in program.steps if not step.type.startswith("constexpr_")):
                made = self._compute(step, values)
                self._watch(step, values, made)
                see(step, made)
                values.update(zip((out.name for out in step.outputs), made, strict=True))
                for name in step.drops:
                    values.pop(name, None)
        results = {name: values[name] if name in values else program.constants[name] for name in program.outputs}
        return {name: _array(value) for name, value in results.items()}

    def _compute(self, step: Step, values: dict[str, Any]) -> tuple[Any, ...]:
        """What one step makes, rounded to the types that the program gives; its shapes are checked against it."""
        program = self._loaded()
        read = {name: self._read(operand, values) for name, operand in step.operands.items()}
        operands = Operands(step.type, read, program.version)
        try:
            if step.type == "classify":
                return _classified(operands)
            result: Result = OPERATORS.get(step.type, mil_ops_owner.compute)(operands)
            made = (result,) if isinstance(result, Tensor) else tuple(result)
            held = tuple(_held(value, out.kind) for value, out in zip(made, step.outputs, strict=True))
        except Exception as error:  # whatever a program that is wrong makes PyTorch or NumPy raise
            reason = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
            raise RuntimeFailure(
                f"{self.path}: operator {step.type} {step.name!r} failed: {type(error).__name__}: {reason}"
            ) from error
        for value, out in zip(held, step.outputs, strict=True):
            _check_shape(self.path, step, value, out)
        return held

    def _read(self, operand: str | list[str], values: dict[str, Any]) -> Any:
        if isinstance(operand, list):
            return [self._read(name, values) for name in operand]
        return values[operand] if operand in values else self._loaded().constants[operand]

    def _watch(self, step: Step, values: dict[str, Any], made: tuple[Any, ...]) -> None:
        if self.first_problem is not None:
            return
        for value, out in zip(made, step.outputs, strict=True):
            if out.kind is None or not out.kind.floating or bool(torch.isfinite(value).all()):
                continue
            what = "makes a NaN" if bool(torch.isnan(value).any()) else "overflows"
            read = [self._read(operand, values) for operand in step.operands.values()]
            tensors = [
                t for each in read for t in (each if isinstance(each, list) else [each]) if isinstance(t, Tensor)
            ]
            largest = max((float(t.abs().max()) for t in tensors if t.is_floating_point() and t.numel()), default=0.0)
            readers = {s.type for s in self._loaded().steps if out.name in s.reads}
            self.first_problem = Problem(out.name, step.type, out.kind.name, what, largest, tuple(sorted(readers)))
            return

    def _reason(self, inputs: Arrays) -> str:
        """Why an output is not finite, and what to do."""
        bad = next((name for name, array in inputs.items() if not np.isfinite(array).all()), None)
        if bad is not None:
            return f"the input {bad} is not; check the picture"
        if self.first_problem is None:
            return "a constant of the program is not; check the weights"
        kinds = dict.fromkeys((self.first_problem.type, *self.first_problem.readers))
        advice = f"export with --option keep_fp32={','.join(k for k in kinds if k != 'cast')} or --precision fp32"
        return f"first {self.first_problem}; {advice if self.first_problem.kind == 'fp16' else 'check the weights'}"


def _held(value: Tensor, kind: Kind | None) -> Tensor:
    """As the program's type has it: float16 as the float32 numbers that float16 has, beyond its range infinite."""
    if kind is None:
        return value
    return value.half().float() if kind.name == "fp16" else value.to(kind.held)


def _classified(a: Operands) -> tuple[str, Tensor]:
    """The label of the largest probability, and all probabilities in the order of the labels."""
    probabilities, labels = a["probabilities"], a.values["classes"]
    if probabilities.numel() != len(labels):
        raise ValueError(f"{probabilities.numel()} probabilities for {len(labels)} labels")
    return labels[int(probabilities.argmax())], probabilities


def _check_shape(path: Path, step: Step, value: Tensor, out: Output) -> None:
    """A program that disagrees with what it was typed with was read or computed wrongly."""
    if out.kind is None:
        return
    fits = value.dim() == len(out.shape) and all(
        want in (None, got) for got, want in zip(value.shape, out.shape, strict=True)
    )
    if not fits:
        raise RuntimeFailure(
            f"{path}: operator {step.type} {step.name!r} makes shape {tuple(value.shape)}, the program says {out.shape}"
        )


def _array(value: Any) -> NDArray[Any]:
    return np.array(value.numpy()) if isinstance(value, Tensor) else np.array([value])


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Run PyTorch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
