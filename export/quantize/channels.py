"""Which channels of a captured program may be scaled: what one factor on a channel would reach, and where it ends.

Every output channel of a Linear, convolution or LayerNorm gets a label. While the program runs, each value is followed
by a tensor of its shape that holds the label of every element; what only moves elements moves the labels likewise, so
that no layout has to be understood. A Linear or convolution that reads one label per input channel can take the factor
out again. What is not positively homogeneous pins its labels: their factor stays 1.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.export import ExportedProgram

aten = torch.ops.aten
FIXED = 0  # the label of everything whose factor is 1
MOVES = frozenset(
    (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default,
     aten.permute.default, aten.flatten.using_ints, aten.unflatten.int, aten.index_select.default, aten.slice.Tensor,
     aten.select.int, aten.narrow.default, aten.expand.default, aten.squeeze.default, aten.squeeze.dim,
     aten.squeeze.dims, aten.unsqueeze.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
     aten.unbind.int, aten.cat.default, aten.stack.default, aten.roll.default, aten.contiguous.default,
     operator.getitem)
)  # fmt: skip
KEEPS = frozenset(  # f(c x) = c f(x) for c > 0, element by element
    (aten.relu.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default, aten.clone.default,
     aten.alias.default, aten.detach.default, aten.dropout.default)
)  # fmt: skip
JOINS = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.maximum.default, aten.minimum.default))
PRODUCTS = frozenset((aten.mul.Tensor, aten.div.Tensor))
SUMS = frozenset((aten.sum.dim_IntList, aten.mean.dim))
MATMULS = frozenset((aten.matmul.default, aten.bmm.default))
WEIGHTED = frozenset((aten.linear.default, aten.conv2d.default))


@dataclass(frozen=True)
class Producer:
    """A node whose output channels are `labels`; a factor goes onto axis 0 of each of its `tensors`."""

    node: str
    labels: range
    tensors: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """A Linear or convolution that reads one label per channel of `read`, (groups, channels of a group).

    The inverse factor goes onto its `weight`, (outputs, channels of a group, ...). `axis` is that of the channels.
    """

    node: str
    read: str
    axis: int
    weight: str
    labels: NDArray[np.int64]


class Factors:
    """Which labels must have the same factor, or one another's inverse: union-find with signs."""

    def __init__(self) -> None:
        self._parent, self._sign = [FIXED], [1]

    def add(self, count: int) -> range:
        """New labels, free of each other."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        self._sign.extend([1] * count)
        return range(start, start + count)

    @property
    def count(self) -> int:
        """How many labels there are, FIXED among them."""
        return len(self._parent)

    def find(self, label: int) -> tuple[int, int]:
        """The representative of a label, FIXED where it is pinned, and 1, or -1 where the factors are inverse."""
        path, sign = [], 1
        while self._parent[label] != label:
            path.append(label)
            label = self._parent[label]
        for step in reversed(path):
            sign *= self._sign[step]
            self._parent[step], self._sign[step] = label, sign
        return label, sign

    def unite(self, one: int, other: int, sign: int = 1) -> None:
        """Give two labels the same factor, or with `sign` -1 inverse ones; the smaller label represents them."""
        (a, left), (b, right) = self.find(one), self.find(other)
        sign *= left * right
        if a == b:
            if sign < 0:  # its own inverse
                self._parent[a] = FIXED
            return
        if a > b:
            a, b = b, a
        self._parent[b], self._sign[b] = a, sign

    def pin(self, labels: Tensor) -> None:
        """Keep the factors of these labels at 1."""
        for label in torch.unique(labels).tolist():
            self.unite(FIXED, label)


class Follower(fx.Interpreter):
    """Runs a program once and notes its producers, sites, and which labels depend on each other."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.factors = Factors()
        self.producers: list[Producer] = []
        self.sites: list[Site] = []
        self._labels: dict[fx.Node, Any] = {}
        self._own = sole_tensors(program)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; beside it, its labels."""
        result = super().run_node(n)
        if n.op == "call_function":
            found = self._follow(n, result)
            if found is not None:
                self._labels[n] = found
        elif n.op == "output":
            self._pin(n)
        for used in self.user_to_last_uses.get(n, ()):
            self._labels.pop(used, None)
        return result

    def _follow(self, node: fx.Node, result: Any) -> Any:
        """The labels of a node's result; None where no factor reaches it. What it cannot follow, it pins."""
        target = node.target
        if target in WEIGHTED:
            return self._weighted(node, result)
        if target == aten.layer_norm.default:
            self._pin(node)
            return self._fresh(node, result, -1, node.args[2:4]) if len(node.args[1]) == 1 else None  # type: ignore[arg-type]  # normalized_shape is a list
        labelled = [value for value in node.all_input_nodes if value in self._labels]
        if not labelled:
            return None
        found = None
        if target in MOVES:
            found = self._moved(node)
        elif target in KEEPS or _clips_below_zero(node):
            found = self._labels[labelled[0]]
        elif target in JOINS and len(node.args) == len(labelled) == 2 and not node.kwargs:
            found = self._joined(node, result)
        elif target in PRODUCTS and labelled == [node.args[0] if target == aten.div.Tensor else labelled[0]]:
            found = self._labels[labelled[0]].expand(result.shape)
        elif target in MATMULS:
            found = self._multiplied(node, labelled, result)
        elif target in SUMS:
            found = self._summed(node)
        if found is None and not (target in MATMULS and len(labelled) == 2):
            self._pin(node)
        return found

    def _pin(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            for labels in _flat(self._labels.get(value)):
                self.factors.pin(labels)

    def _weighted(self, node: fx.Node, result: Tensor) -> Tensor | None:
        """A Linear or convolution: takes factors of its input channels out, and may put some on its outputs."""
        image, weight = node.args[0], node.args[1]
        labels = self._labels.get(image) if isinstance(image, fx.Node) else None
        axis = -1 if node.target == aten.linear.default else 1
        if labels is not None:
            of_channels = _constant_but(labels, axis)
            if of_channels is None or weight not in self._own or result.dim() != labels.dim():
                self._pin(node)
            else:
                groups = int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]  # an int in aten's schema
                table = of_channels.numpy().astype(np.int64).reshape(groups, -1)
                self.sites.append(Site(node.name, str(image), axis, str(weight), table))
        return self._fresh(node, result, axis, node.args[1:3])

    def _fresh(self, node: fx.Node, result: Tensor, axis: int, operands: tuple[Any, ...]) -> Tensor | None:
        """New labels for the output channels, where weight and bias belong to this node alone."""
        tensors = [value for value in operands if isinstance(value, fx.Node)]
        if not tensors or any(value not in self._own for value in tensors) or (axis == 1 and result.dim() != 4):
            return None
        labels = self.factors.add(result.shape[axis])
        self.producers.append(Producer(node.name, labels, tuple(value.name for value in tensors)))
        shape = [1] * result.dim()
        shape[axis] = -1
        return torch.arange(labels.start, labels.stop, dtype=torch.int32).view(shape).expand(result.shape)

    def _moved(self, node: fx.Node) -> Any:
        """The same operator on labels; float tensors without a label are FIXED throughout."""

        def stand_in(value: fx.Node) -> Any:
            if value in self._labels:
                return self._labels[value]
            concrete = self.env[value]
            if isinstance(concrete, Tensor) and concrete.is_floating_point():
                return torch.full((), FIXED, dtype=torch.int32).expand(concrete.shape)
            return concrete

        args: Any = fx.node.map_arg(node.args, stand_in)
        kwargs: Any = fx.node.map_arg(node.kwargs, stand_in)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a function in a call_function node

    def _joined(self, node: fx.Node, result: Tensor) -> Tensor:
        """Two values that meet element by element need the same factors."""
        one, other = (self._labels[value].expand(result.shape) for value in node.args)  # type: ignore[index]  # both are nodes
        if not torch.equal(one, other):
            self._relate(one, other, 1)
        return one  # type: ignore[no-any-return]  # labels are tensors

    def _multiplied(self, node: fx.Node, labelled: list[fx.Node], result: Tensor) -> Tensor | None:
        """A matrix product: what it sums over has one factor, or inverse ones on both sides."""
        left, right = (self._labels.get(value) for value in node.args)  # type: ignore[arg-type]  # both are nodes
        if left is not None and right is not None:
            a, b = _constant_along(left, -2), _constant_along(right, -1)
            if a is None or b is None or left.dim() != right.dim() or left.dim() < 2:
                self._pin(node)
            else:
                a, b = torch.broadcast_tensors(a.squeeze(-2), b.squeeze(-1))
                self._relate(a, b, -1)
            return None
        summed = -1 if labelled[0] is node.args[0] else -2
        labels = self._labels[labelled[0]]
        rows = _constant_along(labels, summed) if labels.dim() == result.dim() else None
        return None if rows is None else rows.expand(result.shape)

    def _summed(self, node: fx.Node) -> Tensor | None:
        """A sum or mean over positions that share a label."""
        labels, dims = self._labels[node.all_input_nodes[0]], node.args[1]
        for dim in dims if isinstance(dims, list | tuple) else ():
            labels = None if labels is None else _constant_along(labels, int(dim))  # type: ignore[arg-type]  # ints in aten's schema
        if labels is None or not isinstance(dims, list | tuple):
            return None
        keep = len(node.args) > 2 and bool(node.args[2])
        return labels if keep else labels.squeeze(tuple(dims))  # type: ignore[no-any-return]  # labels are tensors

    def _relate(self, one: Tensor, other: Tensor, sign: int) -> None:
        base = self.factors.count
        for pair in torch.unique(one.long() * base + other).tolist():
            self.factors.unite(pair // base, pair % base, sign)


def sole_tensors(program: ExportedProgram) -> dict[fx.Node, str]:
    """The inputs of the graph that are a float weight or buffer which one node reads and nothing else shares."""
    held = stored_tensors(program)
    owners = Counter(each.untyped_storage().data_ptr() for each in held.values())
    names, mutated = targets(program), set(program.graph_signature.buffers_to_mutate.values())
    found = {}
    for node in program.graph.find_nodes(op="placeholder"):
        tensor = held.get(node.name)
        if tensor is None or len(node.users) != 1 or not tensor.is_floating_point():
            continue
        if owners[tensor.untyped_storage().data_ptr()] == 1 and names[node.name] not in mutated:
            found[node] = node.name
    return found


def stored_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """The program's parameters and buffers by the name of the graph input that stands for them."""
    names = targets(program)
    places: tuple[Mapping[str, Any], ...] = (program.state_dict, program.constants)
    found = {}
    for name, target in names.items():
        tensor: Any = next((place[target] for place in places if target in place), None)
        if isinstance(tensor, Tensor):
            found[name] = tensor
    return found


def targets(program: ExportedProgram) -> dict[str, str]:
    """Graph input -> the name of the parameter, buffer or constant that it stands for."""
    signature = program.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **constants}


def _clips_below_zero(node: fx.Node) -> bool:
    """Whether a clamp has the form max(x, 0), which keeps positive factors."""
    if node.target not in (aten.clamp.default, aten.clamp_min.default) or node.kwargs:
        return False
    return tuple(node.args[1:]) in ((0,), (0, None))


def _constant_along(labels: Tensor, axis: int) -> Tensor | None:
    """One slice along `axis`, kept as an axis of length 1, where all are the same."""
    first = labels.narrow(axis, 0, 1)
    return first if labels.stride(axis) == 0 or bool((labels == first).all()) else None


def _constant_but(labels: Tensor, axis: int) -> Tensor | None:
    """One label for each index of `axis`, where nothing else matters."""
    rows = labels.movedim(axis, -1)
    first = rows[(0,) * (rows.dim() - 1)]
    return first if bool((rows == first).all()) else None


def _flat(labels: Any) -> list[Tensor]:
    """The label tensors of a value, which may be several."""
    if labels is None:
        return []
    return [labels] if isinstance(labels, Tensor) else list(labels)
