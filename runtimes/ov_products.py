"""What OpenVINO's executed graph says of a model's products: where each went, and which type it ran in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov

from edgevit.specs import OperatorTime

TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}  # OpenVINO's word: ours
DERIVED = "/WithoutBiases"  # on the product of a node with a bias; the executed graph has the node's own name
SCALED = "/DequantizationMultiply"  # behind it: an int8 product that was fused with its scale
NO_WORK = {"Const", "Input", "Output"}  # kinds of the executed graph that compute nothing
ATTENTION = "ScaledDotProductAttention"  # two products: queries with keys, and weights with values
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", ATTENTION)
INTEGERS = ("i8", "u8")
# Between a FakeQuantize, or stored int8, and the product that reads it.
MOVES = (
    "Broadcast", "Concat", "Convert", "Gather", "MaxPool", "Multiply", "Pad", "Reshape", "Slice", "Split", "Squeeze",
    "StridedSlice", "Subtract", "Tile", "Transpose", "Unsqueeze", "VariadicSplit",
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A product of the model: its multiply-accumulates, the names it may be executed under, whether it is float.

    It is float where the file does not have both operands in int8.
    """

    name: str
    macs: int
    names: tuple[str, ...]
    is_float: bool


def products(model: ov.Model, shapes: Mapping[str, Sequence[int]]) -> list[Product]:
    """The model's products for inputs of these shapes.

    A product that was fused with what follows is executed under its own name, the node's without the addition, or that
    of the addition, perhaps of a scaled product, perhaps of the conversion of what comes out.
    """
    if model.is_dynamic():
        model.reshape({name: list(shape) for name, shape in shapes.items()})
    found = []
    for op in model.get_ordered_ops():
        if cost := _macs(op):
            name = op.get_friendly_name()
            readers = _readers(op)
            readers += [
                more for reader in readers if reader.get_type_name() == "Multiply" for more in _readers(reader)
            ]
            readers += [
                more for one in (op, *readers) for more in _readers(one) if more.get_type_name() == "Convert"
            ]
            after = (each.get_friendly_name() for each in readers)
            names = (name, name + SCALED, name.removesuffix(DERIVED), *after)
            is_float = not all(_is_int8(op.input_value(index).get_node()) for index in (0, 1))
            node = name.removesuffix(DERIVED)
            if op.get_type_name() == ATTENTION:  # its values are float even where queries and keys are int8
                values = _values_macs(op)
                found.append(Product(node, values, names, is_float=True))
                cost -= values
            found.append(Product(node, cost, names, is_float))
    return found


def _is_int8(node: Any) -> bool:
    """Whether a value comes from a FakeQuantize, or from stored int8, by operators that only move or scale it."""
    while node.get_type_name() in MOVES:
        if node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in INTEGERS:
            return True
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _readers(op: Any) -> list[Any]:
    return [port.get_node() for port in op.output(0).get_target_inputs()]


@dataclass
class Cost:
    """Multiply-accumulates that went into an executed node: of products with int8 operands, of float ones by name."""

    int8: int
    floats: dict[str, int]

    @property
    def macs(self) -> int:
        """All of them."""
        return self.int8 + sum(self.floats.values())


def shared_out(found: Sequence[Product], nodes: Sequence[Any]) -> dict[str, Cost]:
    """What the products cost by the name of the executed node that each went into."""
    runs_as: dict[str, str] = {}
    for op in nodes:
        for origin in _origins(op):
            runs_as.setdefault(origin, op.get_friendly_name())
    costs = {op.get_friendly_name(): Cost(0, {}) for op in nodes}
    for product in found:
        for name in [name for name in product.names if name in runs_as][:1]:
            cost = costs[runs_as[name]]
            if product.is_float:
                cost.floats[product.name] = cost.floats.get(product.name, 0) + product.macs
            else:
                cost.int8 += product.macs
    return costs


def operators(op: Any, time_ms: float, costs: Mapping[str, Cost]) -> list[OperatorTime]:
    """An executed node as its profile shows it.

    A fused attention may have one product in int8 and the other in float, and calls all of itself int8: then the second
    stands beside, with its multiply-accumulates and without the time.
    """
    name, cost, precision = op.get_friendly_name(), costs[op.get_friendly_name()], _precision(op)
    origins = tuple(dict.fromkeys(_node_of(origin) for origin in _origins(op)))
    kind = text(op, "layerType")
    split = precision == "int8" and cost.int8 > 0 and cost.floats
    whole = OperatorTime(
        name=_node_of(name), kind=kind, precision=precision, time_ms=time_ms, origins=origins,
        macs=cost.int8 if split else cost.macs,
    )  # fmt: skip
    if not split:
        return [whole]
    return [whole, *(OperatorTime(one, kind, "fp32", 0.0, (one,), macs) for one, macs in cost.floats.items())]


def _node_of(name: str) -> str:
    """The graph's node that an executed name comes from."""
    return name.removesuffix(SCALED).removesuffix(DERIVED)


def _origins(op: Any) -> list[str]:
    """The model's nodes that an executed node stands for."""
    return [name for name in text(op, "originalLayersNames").split(",") if name]


def _macs(op: Any) -> int:
    kind = op.get_type_name()
    if kind not in PRODUCTS:
        return 0
    shapes = [[int(side) for side in port.get_shape()] for port in (op.input(0), op.input(1), op.output(0))]
    first, second, out = shapes
    if kind == "MatMul":  # a row of the first for each element that comes out
        return math.prod(out) * first[-2 if op.get_attributes()["transpose_a"] else -1]
    if kind == ATTENTION:  # q . k for each query and key, then weights . v
        return math.prod(first) * second[-2] + _values_macs(op)
    return math.prod(out) * math.prod(second[1 if kind == "Convolution" else 2 :])  # o i h w, or g o i h w


def _values_macs(attention: Any) -> int:
    """What the product of attention weights and values costs: a row of keys for each element that comes out."""
    return int(math.prod(attention.output(0).get_shape())) * int(attention.input(1).get_shape()[-2])


def _precision(op: Any) -> str:
    """The type of the data that a kernel takes, the last word of its name: "brgemm_avx512_amx_bf16".

    The node's own `runtimePrecision` says f16 of a float32 product whose weights are stored in float16.
    """
    suffix = text(op, "primitiveType").rpartition("_")[2].lower()
    kind = suffix if suffix in TYPES else text(op, "runtimePrecision")
    return TYPES.get(kind, kind)


def text(op: Any, key: str) -> str:
    """One entry of what the executed graph says of a node, "" where it says nothing; OpenVINO wraps some texts."""
    info = op.get_rt_info()
    value = info[key] if key in info else ""  # noqa: SIM401  # its map has no get
    return str(value if isinstance(value, str) else value.astype(str))


def executed(model: ov.Model) -> list[Any]:
    """The nodes of an executed graph that compute anything."""
    return [op for op in model.get_ordered_ops() if text(op, "layerType") not in NO_WORK]


def share_in_int8(read: ov.Model, shapes: Mapping[str, Sequence[int]], graph: ov.Model) -> float:
    """The share of a model's multiply-accumulates that its executed graph computes in int8."""
    ops = executed(graph)
    costs = shared_out(products(read, shapes), ops)
    found = [operator for op in ops for operator in operators(op, 0.0, costs)]
    total = sum(operator.macs or 0 for operator in found)
    return sum(operator.macs or 0 for operator in found if operator.precision == "int8") / total if total else 0.0
