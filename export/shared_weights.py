"""One weight file for several ONNX graphs: what they have in common is stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir
from onnx_ir import external_data

INSIDE_BYTES = 1024  # smaller tensors stay in the graph: shapes among them, which tools read without the weights
PAGE_BYTES = 4096  # where larger tensors start, so that a runtime can map them
MAPPED_BYTES = 64 << 10  # from here on a tensor starts a page; below, the gaps would cost more than they bring


class SharedWeights:
    """Takes the large tensors out of graphs, then writes them all into one file.

    A tensor is known by its bytes: what several graphs hold, under whatever name, type or shape, is stored once. Until
    `write` the graphs lack what was taken, so that many sizes need the memory of one.
    """

    def __init__(self) -> None:
        self._stored: dict[bytes, ir.TensorProtocol] = {}
        self._holders: list[tuple[ir.Value, bytes, ir.DataType, ir.Shape]] = []

    def take(self, graph: ir.Model) -> None:
        """Take the initializers over INSIDE_BYTES out of the main graph; they come back as references."""
        for value in graph.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > INSIDE_BYTES:
                digest = hashlib.sha256(tensor.tobytes()).digest()
                self._stored.setdefault(digest, tensor)
                self._holders.append((value, digest, tensor.dtype, ir.Shape(tensor.numpy().shape)))
                value.const_value = None

    def write(self, folder: Path, name: str) -> None:
        """Write `folder/name` and let every graph refer to its part of it; the graphs belong into `folder` too."""
        placed = external_data.convert_tensors_to_external(
            list(self._stored.values()), folder, name, alignment=PAGE_BYTES, align_threshold=MAPPED_BYTES
        )
        places = dict(zip(self._stored, placed, strict=True))
        for value, digest, dtype, shape in self._holders:
            at = places[digest]
            value.const_value = ir.ExternalTensor(
                name, at.offset, at.length, dtype, shape=shape, name=value.name or "", base_dir=folder
            )
        self._stored.clear()
