"""A Core ML model without Core ML: the program saved in an `.mlpackage`, run operator by operator on any machine.

Core ML itself exists on Apple's systems only. This interpreter reads the same file and computes what the operator set
defines, so that what was saved can be compared with the reference, and the first operator that overflows float16 can be
named. It says nothing of speed, and nothing of how a Neural Engine sums inside one operator: float16 is emulated by
rounding what each operator makes, with sums inside it in float32, as Apple's GPU and CPU and, documented less, its
Neural Engine accumulate.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
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
from .mil_package import Kind, reason, shown
from .mil_program import PRODUCTS, SPEC_VERSIONS, Output, Program, ProgramRuntime, Step, read_program

OPERATORS: dict[str, Operator] = {**ELEMENTWISE, **ACTIVATIONS, **REDUCTIONS, **QUANTIZATION, **SHAPE, **NN}
Seen = Callable[[Step, tuple[Any, ...]], None]  # told of every step and what it made
Watched = Callable[[Step, tuple[Any, ...], dict[str, Any]], None]  # told of the values so far, too


LARGEST = 65504 / 2  # half of what float16 holds: another picture may make more of what is advised on


@dataclass(frozen=True)
class Problem:
    """The first operator whose result is not finite; `largest` is the largest magnitude it read.

    Where that is a cast, `name` and `type` are those of the operator that made what was cast. `advice` is what to do.
    """

    name: str
    type: str
    kind: str
    what: str
    largest: float
    advice: str

    def __str__(self) -> str:
        return (
            f"{shown(self.type)} '{shown(self.name)}' in {self.kind} {self.what}, "
            f"reading values up to {self.largest:.4g}; {self.advice}"
        )


class MilReference(ProgramRuntime):
    """Runs the package at `path` with `threads` threads (None: one) in the precision that its program has.

    `first_problem` is the first operator of all runs since `load` that overflowed or made a NaN, None where all was
    finite. An infinite value inside is no failure by itself: a mask of minus infinity is one. An output that is not
    finite is.
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
        self._last_problem: Problem | None = None  # of the last run
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
                f"{self.path}: operator {shown(unknown.type)} ('{shown(unknown.name)}') is not known to the "
                f"interpreter; known: {', '.join(sorted(known))}"
            )
        self._program = program
        with _threads(self.threads):
            for step in program.steps:  # compressed weights: constants made of constants
                if step.type.startswith("constexpr_"):
                    made = self._compute(step, program.constants)
                    program.constants.update(zip((out.name for out in step.outputs), made, strict=True))

    def describe(self) -> dict[str, Any]:
        """Versions, threads, and the first problem of all runs."""
        return {
            "runtime": "edgevit MIL interpreter",
            "version": torch.__version__,
            "providers": ["PyTorch on the CPU; no Core ML"],
            "threads": self.threads,
            "program": SPEC_VERSIONS[self._loaded().version],
            "products": self._loaded().macs_shares,
            "first_problem": None if self.first_problem is None else str(self.first_problem),
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; of a classifier also its label, a text, and its probabilities in the order of the labels.

        Raises:
            RuntimeFailure: an operator failed, or an output is not finite; it names the first operator that was not.
        """
        return self._finite(self._run(inputs), inputs)

    def watch(self, inputs: Arrays, see: Callable[[str, NDArray[Any]], None]) -> None:
        """Run once and tell `see` the name and the numbers of every floating value of the program, inputs included.

        A program of a fixed batch gets fewer pictures repeated to fill it. The numbers are to be read at once: they are
        the interpreter's own.

        Raises:
            RuntimeFailure: as `run` does; then `see` has been told a part.
        """
        fixed = {spec.name: spec.shape[0] for spec in self.inputs if spec.shape and isinstance(spec.shape[0], int)}
        fed = {name: np.resize(a, (fixed.get(name, len(a)), *a.shape[1:])) for name, a in inputs.items()}
        self._finite(self._tell(fed, see), fed)

    def ranges(self, inputs: Arrays) -> dict[str, tuple[float, float]]:
        """The lowest and the highest number of every floating value that the program makes, inputs included."""
        found: dict[str, tuple[float, float]] = {}

        def see(name: str, array: NDArray[Any]) -> None:
            if array.size:
                found[name] = (float(array.min()), float(array.max()))

        self._tell(inputs, see)
        return found

    def profile(self, inputs: Arrays, runs: int) -> tuple[OperatorTime, ...]:
        """The precision of every operator, and the interpreter's own time for it, which is no device's.

        Times are medians over `runs`; with `runs` 0 nothing is timed, and they are 0.
        """
        spent = defaultdict[str, list[float]](list)
        last = 0.0

        def see(step: Step, made: tuple[Any, ...]) -> None:  # noqa: ARG001  # what it made is not asked
            nonlocal last
            now = time.perf_counter()
            spent[step.name].append(now - last)
            last = now

        for _ in range(runs):
            last = time.perf_counter()
            self._run(inputs, see)
        macs, precisions = self._loaded().macs, self._loaded().product_precisions
        return tuple(
            OperatorTime(
                name=step.name,
                kind=step.type,
                precision=precisions.get(step.name, step.outputs[0].kind.name if step.outputs[0].kind else "none"),
                time_ms=statistics.median(spent[step.name]) * 1e3 if runs else 0.0,
                origins=(step.name,),
                macs=macs.get(step.name, 0),
            )
            for step in self._loaded().running
        )

    def close(self) -> None:
        """Drop the program and its weights, and forget its problems."""
        self._program = self.first_problem = self._last_problem = None

    def _tell(self, inputs: Arrays, see: Callable[[str, NDArray[Any]], None]) -> dict[str, NDArray[Any]]:
        for name, array in inputs.items():
            see(name, array)

        def told(step: Step, made: tuple[Any, ...]) -> None:
            for out, value in zip(step.outputs, made, strict=True):
                if out.kind is not None and out.kind.floating:
                    see(out.name, value.numpy())

        return self._run(inputs, told)

    def _run(self, inputs: Arrays, see: Seen = lambda step, made: None) -> dict[str, NDArray[Any]]:
        self._last_problem = None
        finite = all(bool(np.isfinite(array).all()) for array in inputs.values())  # else the picture is to blame

        def watch(step: Step, made: tuple[Any, ...], values: dict[str, Any]) -> None:
            if finite and self._last_problem is None:
                self._last_problem = self._problem(step, made, values, inputs)
                self.first_problem = self.first_problem or self._last_problem
            see(step, made)

        return self._execute(inputs, watch)

    def _execute(self, inputs: Arrays, see: Watched, exact: bool = False) -> dict[str, NDArray[Any]]:
        """Every step in its order; with `exact`, float16 values keep what float32 holds of them."""
        program = self._loaded()
        values: dict[str, Any] = {}
        for name, array in inputs.items():
            tensor = torch.from_numpy(np.array(array))
            tensor = tensor.flip(1) if name in program.bgr else tensor  # planes r g b -> b g r
            values[name] = _held(tensor, program.input_kinds[name], exact)
        with _threads(self.threads), torch.no_grad():
            for step in program.running:
                made = self._compute(step, values, exact)
                see(step, made, values)
                values.update(zip((out.name for out in step.outputs), made, strict=True))
                for name in step.drops:
                    values.pop(name, None)
        results = {name: values[name] if name in values else program.constants[name] for name in program.outputs}
        return {name: _array(value) for name, value in results.items()}

    def _compute(self, step: Step, values: dict[str, Any], exact: bool = False) -> tuple[Any, ...]:
        """What one step makes, rounded to the types that the program gives; its shapes are checked against it."""
        program = self._loaded()
        read = {name: self._read(operand, values) for name, operand in step.operands.items()}
        operands = Operands(step.type, read, program.version)
        try:
            if step.type == "classify":
                return _classified(operands)
            result: Result = OPERATORS.get(step.type, mil_ops_owner.compute)(operands)
            made = (result,) if isinstance(result, Tensor) else tuple(result)
            held = tuple(_held(value, out.kind, exact) for value, out in zip(made, step.outputs, strict=True))
        except Exception as error:  # whatever a program that is wrong makes PyTorch or NumPy raise
            raise RuntimeFailure(
                f"{self.path}: operator {step.shown} failed: {type(error).__name__}: {reason(error)}"
            ) from error
        for value, out in zip(held, step.outputs, strict=True):
            _check_shape(self.path, step, value, out)
        return held

    def _read(self, operand: str | list[str], values: dict[str, Any]) -> Any:
        if isinstance(operand, list):
            return [self._read(name, values) for name in operand]
        return values[operand] if operand in values else self._loaded().constants[operand]

    def _problem(self, step: Step, made: tuple[Any, ...], values: dict[str, Any], inputs: Arrays) -> Problem | None:
        """What is wrong with what a step made, None where all of it is finite."""
        pairs = zip(step.outputs, made, strict=True)
        bad = [(o, v) for o, v in pairs if o.kind and o.kind.floating and not bool(torch.isfinite(v).all())]
        if not bad:
            return None
        (out, value), program = bad[0], self._loaded()
        what = "makes a NaN" if bool(torch.isnan(value).any()) else "overflows"
        kind = out.kind.name if out.kind else ""
        read = (self._read(operand, values) for operand in step.operands.values())
        tensors = (t for each in read for t in (each if isinstance(each, list) else [each]) if isinstance(t, Tensor))
        largest = max((float(t.abs().max()) for t in tensors if t.is_floating_point() and t.numel()), default=0.0)
        advice = self._advice(step, inputs) if kind == "fp16" else "check the weights"
        if step.type == "cast":
            what = f"makes what {what} in a cast to {kind}"
            maker = program.maker(out.name)
            out, kind_of = (maker.outputs[0], maker.type) if maker else (out, "input")
            kind = out.kind.name if out.kind else kind
            return Problem(out.name, kind_of, kind, what, largest, advice)
        return Problem(out.name, step.type, kind, what, largest, advice)

    def _advice(self, failed: Step, inputs: Arrays) -> str:
        """What to keep in float32, so that following it once is enough.

        The program is run once more without rounding: what makes or reads more than float16 holds has to be float32,
        and what is so already has to stay.
        """
        program = self._loaded()
        maker = program.maker(failed.name)
        wide: list[Step] = [] if maker is None else [maker]

        def see(step: Step, made: tuple[Any, ...], values: dict[str, Any]) -> None:  # noqa: ARG001  # values: not asked
            if any(_largest(value) > LARGEST for value in made):
                wide.extend([step, *program.readers(step)])

        self._execute(inputs, see, exact=True)
        full = [step for step in program.running if step.outputs[0].kind and step.outputs[0].kind.name == "fp32"]
        kinds = {step.type for step in (*wide, *full)} - {"cast", "classify"}
        named = list(dict.fromkeys(step.type for step in program.running if step.type in kinds))
        products = {step.type for step in program.running if step.type in PRODUCTS}
        if not named or (products and products <= kinds):
            return "export with --precision fp32"
        return f"export with --option keep_fp32={','.join(named)} or --precision fp32"

    def _finite(self, outputs: dict[str, NDArray[Any]], inputs: Arrays) -> dict[str, NDArray[Any]]:
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RuntimeFailure(f"{self.path}: output {shown(name)} is not finite: {self._reason(inputs)}")
        return outputs

    def _reason(self, inputs: Arrays) -> str:
        """Why an output is not finite, and what to do."""
        bad = next((name for name, array in inputs.items() if not np.isfinite(array).all()), None)
        if bad is not None:
            return f"the input {shown(bad)} is not; check the picture"
        if self._last_problem is None:
            return "a constant of the program is not; check the weights"
        return f"first {self._last_problem}"


def _largest(value: Any) -> float:
    """The largest finite magnitude of a floating tensor; infinite ones are masks."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    return float(value.abs().nan_to_num(0.0, 0.0).max())


def _held(value: Tensor, kind: Kind | None, exact: bool) -> Tensor:
    """As the program's type has it: float16 as the float32 numbers that float16 has, beyond its range infinite."""
    if kind is None:
        return value
    return value.half().float() if kind.name == "fp16" and not exact else value.to(kind.held)


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
            f"{path}: operator {step.shown} makes shape {tuple(value.shape)}, the program says {out.shape}"
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
