"""The program of a Core ML model as a list of steps, constants already values: what the interpreter runs."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgevit.errors import RuntimeFailure
from edgevit.specs import TensorSpec

from .mil_package import (
    AGAIN,
    KINDS,
    MAX_ELEMENTS,
    STRING,
    Kind,
    Weights,
    kind_and_shape,
    read_package,
    reason,
    shown,
    value_of,
)
from .mil_precision import product_precisions

FUNCTION = "main"  # what Core ML runs unless a program says otherwise
SPEC_VERSIONS = {6: "iOS15", 7: "iOS16", 8: "iOS17", 9: "iOS18", 10: "iOS26"}  # Model.proto
RGB, BGR = 20, 30  # ImageFeatureType.ColorSpace in FeatureTypes.proto
ARRAY_TYPES = {65568: "float32", 65552: "float16", 131104: "int32", 65600: "float64"}  # ArrayFeatureType.ArrayDataType
PRODUCTS = ("conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Output:
    """What a step makes: its name, type (None: no tensor) and shape, None where a length is not known."""

    name: str
    kind: Kind | None
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Step:
    """One operator: its operands as names of values, one or a list, and what it makes; `drops` is not read again."""

    type: str
    operands: Mapping[str, str | list[str]]
    outputs: tuple[Output, ...]
    drops: tuple[str, ...]

    @property
    def reads(self) -> list[str]:
        """The names of its operands."""
        return _flat(self.operands)

    @property
    def name(self) -> str:
        """The name of what it makes first."""
        return self.outputs[0].name

    @property
    def shown(self) -> str:
        """Its type and name for a message."""
        return f"{shown(self.type)} '{shown(self.name)}'"


@dataclass(frozen=True)
class Program:
    """A loaded model. `bgr` names the inputs whose planes come as blue, green, red."""

    path: Path
    version: int
    steps: tuple[Step, ...]
    constants: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    input_kinds: Mapping[str, Kind]
    outputs: tuple[str, ...]
    bgr: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def precision(self) -> str:
        """Of its products, "fp16+fp32" where both occur; of every operator where it has no product."""
        kinds = [out.kind for step in self.steps for out in step.outputs if out.kind]
        products = set(self.product_precisions.values())
        return "+".join(sorted(products or {kind.name for kind in kinds if kind.floating})) or "none"

    @property
    def product_precisions(self) -> dict[str, str]:
        """By the name of what each product makes: the type that it computes in.

        That is "int8" where all it multiplies was 8-bit just before, which a device may compute as such. Where that is
        so of constants alone, they are named beside the type: "fp16, int8 weights".
        """
        return product_precisions([step for step in self.steps if step.type in PRODUCTS], self.steps, self.constants)

    @property
    def macs_shares(self) -> dict[str, float]:
        """The share of the multiply-adds that each precision has."""
        precisions, macs = self.product_precisions, self.macs
        whole = sum(macs.values()) or 1
        return {kind: sum(macs[n] for n, k in precisions.items() if k == kind) / whole
                for kind in sorted(set(precisions.values()))}  # fmt: skip

    @property
    def running(self) -> list[Step]:
        """What is computed for every input: not the constants made of constants."""
        return [step for step in self.steps if not step.type.startswith("constexpr_")]

    def maker(self, name: str) -> Step | None:
        """The operator that makes a value, looked for behind casts; None of an input or a constant."""
        made = {out.name: step for step in self.steps for out in step.outputs}
        step = made.get(name)
        while step is not None and step.type == "cast":
            step = made.get(str(step.operands.get("x")))
        return step

    def readers(self, step: Step) -> list[Step]:
        """The operators that read what a step makes, looked for behind casts."""
        names, found = {out.name for out in step.outputs}, []
        for other in self.steps:
            if names.intersection(other.reads):
                found.append(other)
                names |= {other.name} if other.type == "cast" else set()
        return found

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-adds of each product by the name of what it makes; a length that is not known counts as one."""
        shapes = {spec.name: spec.shape for spec in self.inputs}
        shapes |= {name: tuple(value.shape) for name, value in self.constants.items() if isinstance(value, Tensor)}
        shapes |= {out.name: _named(out.shape) for step in self.steps for out in step.outputs}
        known = {name: tuple(d if isinstance(d, int) else 1 for d in shape) for name, shape in shapes.items()}
        return {step.name: self._macs(step, known) for step in self.steps if step.type in PRODUCTS}

    def _macs(self, step: Step, shapes: Mapping[str, tuple[int, ...]]) -> int:
        made = math.prod(shapes[step.name])
        of = {
            name: shapes[operand]
            for name, operand in step.operands.items()
            if isinstance(operand, str) and operand in shapes
        }
        if step.type in ("conv", "linear"):  # weight k c/g ... or n k
            return made * math.prod(of["weight"][1:])
        if step.type == "conv_transpose":  # x n c ..., weight c k/g ...
            return math.prod(of["x"]) * math.prod(of["weight"][1:])
        if step.type == "scaled_dot_product_attention":  # ... l e, ... s e, ... s v
            return math.prod(of["query"][:-1]) * of["key"][-2] * (of["query"][-1] + of["value"][-1])
        if step.type == "einsum":  # n c h w, n w h u
            return made * shapes[step.operands["values"][0]][-1]
        turned = self.constants.get(str(step.operands.get("transpose_x")))
        return made * of["x"][-2 if turned is not None and bool(turned) and len(of["x"]) > 1 else -1]

    @property
    def labels(self) -> list[str]:
        """The classes of a classifier that names them, in their order."""
        classes = [s.operands.get("classes") for s in self.steps if s.type == "classify"]
        found = [self.constants.get(name) for name in classes if isinstance(name, str)]
        return next((labels for labels in found if isinstance(labels, list)), [])


def read_program(path: Path) -> Program:
    """Read and check a package.

    Raises:
        RuntimeFailure: damaged, no ML program, or with parts that are not known here.
    """
    model, folder = read_package(path)
    if model.WhichOneof("Type") != "mlProgram" or model.specificationVersion not in SPEC_VERSIONS:
        kind, version = model.WhichOneof("Type") or "nothing", model.specificationVersion
        known = ", ".join(map(str, SPEC_VERSIONS))
        raise RuntimeFailure(
            f"{path}: holds {kind} of version {version}, expected an mlProgram of version {known}; "
            "convert it again with convert_to='mlprogram'"
        )
    function = model.mlProgram.functions.get(FUNCTION)
    block = None if function is None else function.block_specializations.get(function.opset)
    if function is None or block is None:
        raise RuntimeFailure(f"{path}: the program has no function {FUNCTION} for its opset; export the model again")
    parser = _Parser(path, Weights(path, folder))
    for value in function.inputs:
        parser.define(value.name, "an input")
    for operation in block.operations:
        parser.take(operation)
    missing = [name for name in block.outputs if name not in parser.known]
    if missing or not block.outputs:
        raise RuntimeFailure(f"{path}: the program's output {_names(missing) or 'list'} is made by nothing")
    kinds = {value.name: kind_and_shape(value.type, path) for value in function.inputs}
    inputs, bgr = _inputs(path, model.description.input, kinds)
    return Program(
        path=path,
        version=model.specificationVersion,
        steps=parser.finished(set(block.outputs)),
        constants=parser.constants,
        inputs=inputs,
        input_kinds={name: kind for name, (kind, _) in kinds.items()},
        outputs=tuple(sorted(block.outputs, key=lambda name: name in parser.texts)),  # tensors first
        bgr=bgr,
        metadata=dict(model.description.metadata.userDefined),
    )


class _Parser:
    """Collects steps and constants; every name must be known before it is read, and made once."""

    def __init__(self, path: Path, weights: Weights) -> None:
        self.path, self.weights = path, weights
        self.known: set[str] = set()
        self.texts: set[str] = set()  # what is no tensor: a classifier's label and its dictionary
        self.constants: dict[str, Any] = {}
        self._steps: list[tuple[str, dict[str, str | list[str]], tuple[Output, ...]]] = []

    def define(self, name: str, place: str) -> None:
        if not name or not name.isprintable() or name in self.known:
            raise RuntimeFailure(
                f"{self.path}: {place}: its name '{shown(name)}' is empty, taken or not printable; "
                "export the model again"
            )
        self.known.add(name)

    def take(self, operation: Any) -> None:
        place = f"operator '{shown(operation.type)}'"
        if not operation.outputs or not operation.type.isprintable():
            raise RuntimeFailure(f"{self.path}: {place}: has no proper type, or makes nothing; export the model again")
        if operation.type == "const":
            self.define(operation.outputs[0].name, place)
            self.constants[operation.outputs[0].name] = self._value(operation.attributes["val"], place)
            return
        operands: dict[str, str | list[str]] = {}
        for name, value in operation.attributes.items():  # constexpr_* of iOS16 have their operands here
            if name != "name":
                operands[name] = self._constant(value, place)
        for name, argument in operation.inputs.items():
            names = [self._bound(binding, place) for binding in argument.arguments]
            operands[name] = names[0] if len(names) == 1 else names
        for value in operation.outputs:
            self.define(value.name, place)
        outputs = tuple(_output(value, self.path) for value in operation.outputs)
        for out in outputs:
            count = math.prod(length for length in out.shape if length is not None)
            if count > MAX_ELEMENTS:
                raise RuntimeFailure(
                    f"{self.path}: {place}: makes {count} numbers, more than a phone can hold; {AGAIN}"
                )
            if out.kind is not None and operation.type.startswith("constexpr_"):
                self.weights.reserve(count, out.kind)
        self.texts |= {out.name for out in outputs if out.kind is None}
        self._steps.append((operation.type, operands, outputs))

    def finished(self, wanted: set[str]) -> tuple[Step, ...]:
        """The steps in order, each with the values that nothing after it reads."""
        reads = Counter(name for _, operands, _ in self._steps for name in set(_flat(operands)))
        steps = []
        for kind, operands, outputs in self._steps:
            reads.subtract(set(_flat(operands)))
            made = (*_flat(operands), *(out.name for out in outputs))
            drops = tuple({n for n in made if not reads[n] and n not in wanted and n not in self.constants})
            steps.append(Step(kind, operands, outputs, drops))
        return tuple(steps)

    def _bound(self, binding: Any, place: str) -> str:
        if binding.WhichOneof("binding") == "value":
            return self._constant(binding.value, place)
        name: str = binding.name
        if name not in self.known:
            raise RuntimeFailure(f"{self.path}: {place}: reads '{shown(name)}', which nothing before it makes")
        return name

    def _constant(self, value: Any, place: str) -> str:
        name = f" {len(self.constants)}"  # no name of the program begins with a space
        self.constants[name] = self._value(value, place)
        return name

    def _value(self, value: Any, place: str) -> Any:
        try:
            return value_of(value, self.weights)
        except RuntimeFailure:
            raise
        except Exception as error:  # texts where numbers should be, and what else a damaged file may hold
            raise RuntimeFailure(
                f"{self.path}: {place}: a constant that cannot be read ({type(error).__name__}: {reason(error)}); "
                "export the model again"
            ) from error


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(shown, itertools.islice(names, 8)))  # 8: no network here has more outputs


def _flat(operands: Mapping[str, str | list[str]]) -> list[str]:
    return [name for each in operands.values() for name in ([each] if isinstance(each, str) else each)]


def _output(value: Any, path: Path) -> Output:
    """Of `classify`, a text and a dictionary, which are not described further."""
    if value.type.WhichOneof("type") != "tensorType" or KINDS.get(value.type.tensorType.dataType) is STRING:
        return Output(value.name, None, ())
    kind, shape = kind_and_shape(value.type, path)
    return Output(value.name, kind, shape)


def _inputs(
    path: Path, described: Any, kinds: Mapping[str, tuple[Kind, tuple[int | None, ...]]]
) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """The inputs as they are fed, and which of them are images of reversed planes."""
    specs, bgr = [], []
    for feature in described:
        if feature.name not in kinds:
            raise RuntimeFailure(f"{path}: input '{shown(feature.name)}' is not one of the program; export it again")
        shape = _named(kinds[feature.name][1])
        image = feature.type.WhichOneof("Type") == "imageType"
        if image and feature.type.imageType.colorSpace not in (RGB, BGR):
            raise RuntimeFailure(f"{path}: input {shown(feature.name)}: a picture in grey, expected one in colour")
        if image and feature.type.imageType.colorSpace == BGR:
            bgr.append(feature.name)
        dtype = "float32" if image else ARRAY_TYPES.get(feature.type.multiArrayType.dataType, "")
        if not dtype:
            raise RuntimeFailure(
                f"{path}: input {shown(feature.name)} is neither a picture nor an array of a known type"
            )
        layout = "NCHW" if len(shape) == 4 else ""
        specs.append(TensorSpec(feature.name, shape, dtype, layout, "pixels" if image else "normalised"))
    if {spec.name for spec in specs} != set(kinds):
        raise RuntimeFailure(f"{path}: its program takes {_names(kinds)}, which its description does not name")
    return tuple(specs), tuple(bgr)


class ProgramRuntime:
    """What the program of a saved package tells by itself, whoever runs it."""

    path: Path
    precision: str
    _program: Program | None

    @property
    def inputs(self) -> list[TensorSpec]:
        """The model's inputs; an image input takes RGB from 0 to 255."""
        return list(self._loaded().inputs)

    @property
    def outputs(self) -> list[TensorSpec]:
        """The program's tensors; a classifier's label comes as a text beside them."""
        program = self._loaded()
        made = {out.name: out for step in program.steps for out in step.outputs}
        return [_described(made[name]) for name in program.outputs if name in made]

    @property
    def asked_precision(self) -> str:
        """`precision`; of a program whose weights alone are compressed, "int8" means what it is instead."""
        if self.precision != "int8" or self._program is None or "int8" in self._program.product_precisions.values():
            return self.precision
        return _compressed(self._program) or self.precision

    @property
    def effective_precision(self) -> str:
        """The types of what the saved program's products make: the least that Core ML computes in.

        A float16 program may keep products in float32, an int8 program in either: those that its export lists. What
        computes, `profile` tells.
        """
        program = self._loaded()
        if self.precision == "int8":
            return (
                "int8" if "int8" in program.product_precisions.values() else _compressed(program) or program.precision
            )
        return "fp16" if self.precision == "fp16" and program.precision == "fp16+fp32" else program.precision

    def _loaded(self) -> Program:
        if self._program is None:
            raise RuntimeFailure(f"{self.path}: the Core ML program is not loaded")
        return self._program


def _compressed(program: Program) -> str:
    """What most products with compressed weights are, empty where there are none."""
    shares = {kind: share for kind, share in program.macs_shares.items() if kind.endswith(" weights")}
    return max(shares, key=lambda kind: shares[kind], default="")


def _described(out: Output) -> TensorSpec:
    if out.kind is None:
        return TensorSpec(out.name, ("batch",), "string")
    shape = _named(out.shape)
    dtype = "float32" if out.kind.floating else str(out.kind.held).removeprefix("torch.")
    return TensorSpec(out.name, shape, dtype, "NCHW" if len(shape) == 4 else "")


def _named(shape: tuple[int | None, ...]) -> tuple[int | str, ...]:
    """Lengths that are not known get names."""
    return tuple(d if d is not None else "batch" if i == 0 else f"dim{i}" for i, d in enumerate(shape))
