"""Operators of a Core ML program that move values and compute none: reshape, slice, gather, concat, pad, ..."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .mil_ops import Operands, Operator, one


def reshape(a: Operands) -> Tensor:
    """A 0 in the shape keeps that length, -1 is what is left."""
    x, shape = a["x"], a.ints("shape")
    if 0 in shape and len(shape) != x.dim():
        raise ValueError(f"shape {shape} has a 0 and another number of axes than the {x.dim()} of x")
    return x.reshape([x.shape[i] if length == 0 else length for i, length in enumerate(shape)])


def taken(x: Tensor, axis: int, part: slice) -> Tensor:
    """`part` along one axis; PyTorch itself has no steps below one."""
    if part.step is None or part.step > 0:
        return x[(slice(None),) * axis + (part,)]
    return x.index_select(axis, torch.tensor(list(range(*part.indices(x.shape[axis]))), dtype=torch.int64))


def slice_by_index(a: Operands) -> Tensor:
    """x[begin:end:stride] as Python has it; masked bounds are open, squeezed axes take the one entry at begin."""
    x = a["x"]
    rank = x.dim()
    begins, ends, strides = a.ints("begin"), a.ints("end"), a.ints("stride", [1] * rank)
    opened, ended, squeezed = (a.ints(f"{name}_mask", [0] * rank) for name in ("begin", "end", "squeeze"))
    for axis in reversed(range(rank)):  # from the last, so that a squeezed axis moves none that is still to come
        if squeezed[axis]:
            x = x.select(axis, begins[axis])
        else:
            begin, end = None if opened[axis] else begins[axis], None if ended[axis] else ends[axis]
            x = taken(x, axis, slice(begin, end, strides[axis]))
    return x


def slice_by_size(a: Operands) -> Tensor:
    """`size` entries from `begin` on along each axis; -1 takes all that are left."""
    x = a["x"]
    for axis, (begin, size) in enumerate(zip(a.ints("begin"), a.ints("size"), strict=True)):
        start = begin % x.shape[axis] if x.shape[axis] else 0
        x = x.narrow(axis, start, x.shape[axis] - start if size == -1 else size)
    return x


def split(a: Operands) -> tuple[Tensor, ...]:
    """Into pieces of given lengths, or into a number of equal ones."""
    x, axis = a["x"], a.whole("axis", 0)
    sizes = a.ints("split_sizes", [])
    if not sizes:
        number = a.whole("num_splits", 1)
        if x.shape[axis] % number:
            raise ValueError(f"{x.shape[axis]} entries cannot be split into {number} equal pieces")
        sizes = [x.shape[axis] // number] * number
    return torch.split(x, sizes, axis)


def concat(a: Operands) -> Tensor:
    """One after the other, or interleaved: the first entry of each, then the second of each, ..."""
    values, axis = [v.reshape(1) if v.dim() == 0 else v for v in a.many("values")], a.whole("axis", 0)  # numbers, too
    if not a.flag("interleave"):
        return torch.cat(values, axis)
    return torch.stack(values, axis % values[0].dim() + 1).flatten(axis % values[0].dim(), axis % values[0].dim() + 1)


PAD_MODES: dict[str, Any] = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def pad(a: Operands) -> Tensor:
    """Before and after each of the last axes; by NumPy, which reflects and repeats at any rank."""
    x, widths, mode = a["x"], a.ints("pad"), a.text("mode", "constant")
    open_axes = x.dim() - len(widths) // 2
    pairs = [(0, 0)] * open_axes + list(zip(widths[::2], widths[1::2], strict=True))
    if mode == "constant":
        flat = [width for pair in reversed(pairs) for width in pair]  # PyTorch begins at the last axis
        return F.pad(x, flat, value=a.number("constant_val", 0.0))
    padded: NDArray[Any] = np.pad(x.numpy(), pairs, mode=PAD_MODES[mode])
    return torch.from_numpy(padded)


def gather(a: Operands) -> Tensor:
    """The entries `indices` along `axis`; with batch_dims, for each of the leading entries by itself."""
    x, indices, batch = a["x"], a["indices"].long(), a.whole("batch_dims", 0)
    axis = a.whole("axis", 0) % x.dim()
    if batch:
        pairs = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
        rows = torch.stack([_take(row, index, axis - batch) for row, index in pairs])
        return rows.reshape([*x.shape[:batch], *rows.shape[1:]])
    return _take(x, indices, axis)


def _take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """x (..., n, ...), indices of any shape -> (..., *shape of indices, ...); below zero they count from the end."""
    flat = indices.flatten()
    found = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_nd(a: Operands) -> Tensor:
    """The entries whose places are the last axis of `indices`; with batch_dims, for each leading entry by itself."""
    x, indices, batch = a["x"], a["indices"].long(), a.whole("batch_dims", 0)
    if not batch:
        return x[tuple(indices.movedim(-1, 0))]
    pairs = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
    rows = torch.stack([row[tuple(index.movedim(-1, 0))] for row, index in pairs])
    return rows.reshape([*x.shape[:batch], *rows.shape[1:]])


def gather_along_axis(a: Operands) -> Tensor:
    """x[..., indices, ...] entry by entry, along `axis`."""
    x, indices, axis = a["x"], a["indices"].long(), a.whole("axis", 0)
    return torch.take_along_dim(x, torch.where(indices < 0, indices + x.shape[axis], indices), axis)


def expand_dims(a: Operands) -> Tensor:
    """New axes of length 1 at these places of the result."""
    x, axes = a["x"], a.ints("axes")
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(a: Operands) -> Tensor:
    """Without these axes of length 1, by default all of them."""
    x = a["x"]
    axes = [axis % x.dim() for axis in a.ints("axes", [i for i, length in enumerate(x.shape) if length == 1])]
    longer = [axis for axis in axes if x.shape[axis] != 1]
    if longer:
        raise ValueError(f"axis {longer[0]} has length {x.shape[longer[0]]} and cannot be dropped")
    return x.squeeze(axes) if axes else x


def cumsum(a: Operands) -> Tensor:
    """Running sums along an axis, from its end with `reverse`, each without its own entry with `exclusive`."""
    x, axis = a["x"], a.whole("axis", 0)
    turned = x.flip(axis) if a.flag("reverse") else x
    sums = turned.cumsum(axis, dtype=x.dtype)
    sums = sums - turned if a.flag("exclusive") else sums
    return sums.flip(axis) if a.flag("reverse") else sums


def fill(a: Operands) -> Tensor:
    """One value everywhere."""
    value = a.maybe("value")
    return torch.full(a.ints("shape"), 0.0 if value is None else value.item())


SHAPE: dict[str, Operator] = {
    "concat": concat,
    "cumsum": cumsum,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": lambda a: torch.full(
        a["ref_tensor"].shape, a["value"].item() if a.maybe("value") is not None else 0.0
    ),
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "pad": pad,
    "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], a.whole("upscale_factor", 1)),
    "pixel_unshuffle": lambda a: F.pixel_unshuffle(a["x"], a.whole("downscale_factor", 1)),
    "reshape": reshape,
    "reverse": lambda a: a["x"].flip(a.ints("axes", range(a["x"].dim()))),
    "shape": one(lambda x: torch.tensor(x.shape, dtype=torch.int32)),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda a: torch.stack(a.many("values"), a.whole("axis", 0)),
    "tile": lambda a: a["x"].tile(a.ints("reps")),
    "transpose": lambda a: a["x"].permute(a.ints("perm")),
}
