"""Moves the spread of channels out of activations and into weights, by algebra that is exact to the last bit.

A tensor that is quantised with one scale for all channels loses the small channels where a few are large. Where a
factor on a channel reaches nothing but products, the channel is multiplied by it where it is made (gain and bias of a
LayerNorm, rows of a Linear or convolution) and divided where it is read (columns). The factors are powers of two: no
number is rounded, and the float network computes what it did. After SmoothQuant (arXiv 2211.10438, section 4) and
cross-layer equalisation (arXiv 1906.04721, section 4.1).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from edgevit.errors import ExportError
from edgevit.export.capture import TRACED_BATCH, single_thread

from .channels import FIXED, Follower, Site, stored_tensors, targets

ALPHA = 0.5  # share of a spread that goes to the weights: half each
PICTURES = 24  # whose largest magnitudes are taken; a channel's spread shows on a few
LIMIT = 10  # in powers of two; a channel that would need more was idle on these pictures, so nothing is known of it
ROUNDS = 12  # more than any network took; the rest would be a power or two on a few channels
MAX_REL = 1e-9  # of the outputs in float64, as for the rewrites of the deploy form
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How far a tensor's channels lie apart: the largest channel over the median one."""

    tensor: str
    ratio: float


def equalise(program: ExportedProgram, images: NDArray[np.float32]) -> tuple[ExportedProgram, dict[str, Any]]:
    """The program with equalised channels, and what was done; the module it was captured from is not changed.

    Args:
        program: of one input, a picture batch (n, 3, h, w), as `capture` makes it. images: normalised (n, 3, h, w).

    Returns:
        A program of its own, the same one where there is nothing to do, and a record: `places` (where channels are
        made), `channels`, `spread_before` and `spread_after` (the largest), `max_rel` (proof, in float64).

    Raises:
        ExportError: there are no pictures, or the outputs changed, which would be a bug of this step.
    """
    if images.ndim != 4 or not len(images):
        raise ExportError(f"equalisation: pictures of shape {images.shape}, expected (n, 3, h, w) with at least one")
    with single_thread(), torch.no_grad():
        batches = list(_batches(program, images))
        follower = Follower(program)
        follower.run(*_inputs(program, stored_tensors(program), batches[0]))
        sites = [site for site in follower.sites if _free(follower, site)]
        before = _measure(program, sites, batches)
        powers = _powers(program, follower, sites, before)
        scaled = _scaled(program, follower, powers)
        if not scaled:
            return program, _record(0, 0, before, before, 0.0, len(images))
        max_rel = _difference(program, scaled, batches[0])
        if not max_rel <= MAX_REL:
            raise ExportError(
                f"equalisation: relative difference {max_rel:.1e} in float64, at most {MAX_REL:.0e} allowed; "
                "this is a bug: please report the model and its options"
            )
        after = {(s.read, s.axis): before[s.read, s.axis] * np.exp2(powers[s.labels.reshape(-1)]) for s in sites}
    places = sum(bool(powers[p.labels.start : p.labels.stop].any()) for p in follower.producers)
    record = _record(places, int(np.count_nonzero(powers)), before, after, max_rel, len(images))
    return _with(program, scaled), record


def _record(
    places: int, channels: int, before: Mapping[tuple[str, int], Vector], after: Mapping[tuple[str, int], Vector],
    max_rel: float, pictures: int,
) -> dict[str, Any]:  # fmt: skip
    worst, left = _worst(before), _worst(after)
    return {
        "places": places,
        "channels": channels,
        "spread_before": worst.ratio,
        "spread_after": left.ratio,
        "widest": worst.tensor,
        "max_rel": max_rel,
        "pictures": min(pictures, PICTURES),
    }


def _worst(amax: Mapping[tuple[str, int], Vector]) -> Spread:
    """The tensor whose channels lie farthest apart; idle channels do not count."""
    found = Spread("", 1.0)
    for (tensor, _), values in amax.items():
        busy = values[values > 0]
        ratio = float(busy.max() / np.median(busy)) if len(busy) else 1.0
        found = max(found, Spread(tensor, ratio), key=lambda spread: spread.ratio)
    return found


def _batches(program: ExportedProgram, images: NDArray[np.float32]) -> Iterator[Tensor]:
    """Some of the pictures, from all over, in batches that the program takes."""
    chosen = images[np.linspace(0, len(images) - 1, min(len(images), PICTURES)).astype(int)]
    length = _image(program).meta["val"].shape[0]
    count = length if isinstance(length, int) else TRACED_BATCH
    for start in range(0, len(chosen), count):
        chunk = np.resize(chosen[start : start + count], (count, *images.shape[1:]))
        yield torch.from_numpy(np.ascontiguousarray(chunk, np.float32))


def _image(program: ExportedProgram) -> fx.Node:
    names = program.graph_signature.user_inputs
    nodes: list[fx.Node] = [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    if len(nodes) != 1:
        raise ExportError(f"equalisation: the program has {len(nodes)} inputs, expected one picture batch")
    return nodes[0]


def _inputs(program: ExportedProgram, tensors: Mapping[str, Tensor], batch: Tensor) -> list[Any]:
    """The arguments of the graph in order, in the type of the batch."""
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            found.append(batch)
        else:
            tensor = tensors[spec.arg.name]
            found.append(tensor.detach().to(batch.dtype) if tensor.is_floating_point() else tensor)
    return found


def _free(follower: Follower, site: Site) -> bool:
    return any(follower.factors.find(int(label))[0] != FIXED for label in site.labels.flat)


class _Largest(fx.Interpreter):
    """Runs a program and keeps the largest magnitude of each channel of some values."""

    def __init__(self, program: ExportedProgram, wanted: Mapping[str, set[int]]) -> None:
        super().__init__(program.graph_module)
        self.wanted = wanted
        self.found: dict[tuple[str, int], Vector] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        for axis in self.wanted.get(n.name, ()):
            others = [i for i in range(value.dim()) if i != axis % value.dim()]
            amax = value.abs().amax(others).double().numpy()
            self.found[n.name, axis] = np.maximum(self.found.get((n.name, axis), 0.0), amax)
        return value


def _measure(
    program: ExportedProgram, sites: Sequence[Site], batches: Sequence[Tensor]
) -> dict[tuple[str, int], Vector]:
    """The largest magnitude of each channel that the sites read."""
    wanted = defaultdict[str, set[int]](set)
    for site in sites:
        wanted[site.read].add(site.axis)
    largest = _Largest(program, wanted)
    for batch in batches if sites else ():
        largest.run(*_inputs(program, stored_tensors(program), batch))
    return largest.found


def _powers(
    program: ExportedProgram, follower: Follower, sites: Sequence[Site], amax: Mapping[tuple[str, int], Vector]
) -> NDArray[np.int64]:
    """The power of two for each label, repeated until nothing moves: a weight's rows are another place's columns."""
    groups = _groups(follower, sites)
    count = 1 + max((p.labels[-1] for p in follower.producers), default=0)
    roots, signs = np.array([follower.factors.find(label) for label in range(count)], np.int64).reshape(-1, 2).T
    total = np.zeros(count, np.int64)
    for _ in range(ROUNDS):
        weights = stored_tensors(program) | _scaled(program, follower, total)
        sums, wishes = np.zeros(count), np.zeros(count)
        for (read, axis), largest in amax.items():
            reading = [site for site in sites if (site.read, site.axis) == (read, axis)]
            labels = reading[0].labels.reshape(-1)
            wish = _wishes(reading, largest * np.exp2(total[labels]), weights)
            known = np.isfinite(wish) & (roots[labels] != FIXED)
            np.add.at(sums, roots[labels[known]], (wish * signs[labels])[known])
            np.add.at(wishes, roots[labels[known]], 1)
        step = _rounded({int(root): sums[root] / wishes[root] for root in np.flatnonzero(wishes)}, groups)
        change = np.zeros(count, np.int64)
        change[list(step)] = list(step.values())
        found = total + signs * change[roots]
        found[np.abs(found) > LIMIT] = 0
        if np.array_equal(found, total):
            break
        total = found
    return total


def _wishes(sites: Sequence[Site], largest: Vector, weights: Mapping[str, Tensor]) -> Vector:
    """The power of two that each channel of one tensor would like; NaN for an idle one."""
    alone = all(site.labels.shape[1] == 1 for site in sites)
    alpha = 1.0 if alone else ALPHA  # with one channel for each output, scales of weights take up everything for free
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.maximum.reduce([_column_amax(site, weights[site.weight]) for site in sites])
        wish: Vector = (1 - alpha) * np.log2(weight) - alpha * np.log2(largest)
    return wish


def _rounded(wishes: Mapping[int, float], groups: _Groups) -> dict[int, int]:
    """Whole powers around the middle of each group, so that no tensor as a whole grows or shrinks."""
    members = defaultdict[int, list[int]](list)
    for root in wishes:
        members[groups.of(root)].append(root)
    found = {}
    for roots in members.values():
        middle = np.floor(np.median([wishes[root] for root in roots]) + 0.5)
        for root in roots:
            power = int(np.floor(wishes[root] + 0.5) - middle)
            found[root] = power if abs(power) <= LIMIT else 0
    return found


class _Groups:
    """Labels that are made or read together, by their smallest; FIXED joins nothing."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def of(self, label: int) -> int:
        while (parent := self._parent.get(label, label)) != label:
            self._parent[label] = self._parent.get(parent, parent)
            label = parent
        return label

    def join(self, one: int, other: int) -> None:
        if FIXED not in (one, other):
            a, b = sorted((self.of(one), self.of(other)))
            self._parent[b] = a


def _groups(follower: Follower, sites: Sequence[Site]) -> _Groups:
    groups = _Groups()
    for labels in [*(p.labels for p in follower.producers), *(site.labels.reshape(-1).tolist() for site in sites)]:
        for label in labels:
            groups.join(labels[0], label)
            groups.join(label, follower.factors.find(label)[0])
    return groups


def _column_amax(site: Site, weight: Tensor) -> Vector:
    """The largest weight that reads each input channel."""
    groups, width = site.labels.shape
    rows: Vector = weight.detach().double().reshape(groups, -1, width, *weight.shape[2:]).abs().numpy()
    largest: Vector = rows.max(axis=tuple(i for i in range(rows.ndim) if i not in (0, 2))).reshape(-1)
    return largest


def _scaled(program: ExportedProgram, follower: Follower, powers: NDArray[np.int64]) -> dict[str, Tensor]:
    """New tensors for those that change, by graph input."""
    tensors, found = stored_tensors(program), dict[str, Tensor]()
    for producer in follower.producers:
        factors = torch.from_numpy(np.exp2(powers[producer.labels.start : producer.labels.stop]))
        for name in producer.tensors if bool((factors != 1).any()) else ():
            tensor = tensors[name].detach().double()
            found[name] = tensor * factors.view(-1, *[1] * (tensor.dim() - 1))
    for site in follower.sites:
        factors = torch.from_numpy(np.exp2(-powers[site.labels]))  # groups channels
        if bool((factors != 1).any()):
            tensor = found.get(site.weight, tensors[site.weight].detach().double())
            groups, width = site.labels.shape
            rows = tensor.reshape(groups, -1, width, *tensor.shape[2:])  # groups outputs channels ...
            spread = factors.view(groups, 1, width, *[1] * (tensor.dim() - 2))
            found[site.weight] = (rows * spread).reshape(tensor.shape)
    return {name: tensor.to(tensors[name].dtype) for name, tensor in found.items()}


def _difference(program: ExportedProgram, scaled: Mapping[str, Tensor], batch: Tensor) -> float:
    """Largest difference of an output in float64, relative to its largest magnitude; NaN counts as infinite."""
    tensors, found = stored_tensors(program), 0.0
    both = [
        fx.Interpreter(program.graph_module).run(*_inputs(program, held, batch.double()))
        for held in (tensors, {**tensors, **scaled})
    ]
    for expected, actual in zip(*both, strict=True):
        scale = expected.abs().max().item() or 1.0
        ratio = (actual - expected).abs().max().item() / scale
        found = max(found, ratio if ratio == ratio else float("inf"))
    return found


def _with(program: ExportedProgram, scaled: Mapping[str, Tensor]) -> ExportedProgram:
    """A copy of the program with other weights."""
    state, constants, names = dict(program.state_dict), dict(program.constants), targets(program)
    for name, tensor in scaled.items():
        place: dict[str, Any] = state if names[name] in state else constants
        old = place[names[name]]
        place[names[name]] = (
            torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor
        )
    return ExportedProgram(
        root=program.graph_module,
        graph=copy.deepcopy(program.graph),
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )
