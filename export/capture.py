"""nn.Module -> torch.export program: static shapes by default, a dynamic batch on request."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edgevit.errors import ExportError, first_line
from edgevit.specs import MAX_BATCH, Batch

TRACED_BATCH = 2  # pictures traced for a dynamic batch: one would be specialised to a constant


def example_image(batch: Batch, size: tuple[int, int]) -> Tensor:
    """A zero image batch of the shape to trace: (n, 3, height, width)."""
    return torch.zeros(TRACED_BATCH if batch == "dynamic" else batch, 3, *size)


def capture(module: nn.Module, batch: Batch, size: tuple[int, int]) -> ExportedProgram:
    """The program that `module` computes for one input shape.

    Raises:
        ExportError: torch.export cannot follow the module.
    """
    shapes = {0: Dim("batch", min=1, max=MAX_BATCH)} if batch == "dynamic" else None
    try:
        with quiet():
            return torch.export.export(module, (example_image(batch, size),), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch.export raises a wide tree of its own; each is a failed capture
        where = f"capture of {type(module).__name__} at {size[0]}x{size[1]}"
        raise ExportError(f"{where}: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PyTorch's exporter says about itself; edgevit reports its own failures."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def single_thread() -> Iterator[None]:
    """Run PyTorch on one thread: on a busy two-core machine its float64 convolutions took 80 times longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
