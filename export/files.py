"""The files that graphs become: their names, one alone, several beside one weight file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from edgevit.contracts import Built
from edgevit.specs import ExportSpec, ModelCard, size_text

from .shared_weights import SharedWeights

EXTERNAL_BYTES = 1_500_000_000  # protobuf stops at 2 GB; beyond this the weights go beside the graph
WEIGHTS_FILE = "weights.bin"


def file_names(card: ModelCard, specs: Sequence[ExportSpec], suffix: str) -> list[str]:
    """`model<suffix>` for one image size, `model-HxW<suffix>` for each of several."""
    if len(specs) == 1:
        return [f"model{suffix}"]
    return [f"model-{size_text(spec.image_size or card.image.size)}{suffix}" for spec in specs]


def save_graphs(graphs: Iterable[tuple[ir.Model, Built]], directory: Path, *, alone: bool) -> tuple[Built, ...]:
    """Write each graph as its `checked_file`: one with its weights inside, several beside `weights.bin`.

    Of several, each gives up its weights before the next is made, if the graphs come one by one.
    """
    if alone:
        ((graph, built),) = graphs
        save(graph, directory / built.checked_file)
        return (built,)
    pool, made = SharedWeights(), []
    for graph, built in graphs:
        pool.take(graph)
        made.append((graph, built))
    pool.write(directory, WEIGHTS_FILE)
    for graph, built in made:
        ir.save(graph, directory / built.checked_file)
    return tuple(built for _, built in made)


def weight_files(path: Path) -> list[Path]:
    """The files beside a saved graph that hold weights of it."""
    return [file for file in (path.parent / WEIGHTS_FILE, _beside(path)) if file.exists()]


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def save(graph: ir.Model, path: Path) -> None:
    """Write the model, weights inside the file unless they would exceed protobuf's limit."""
    weights = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    ir.save(graph, path, external_data=_beside(path).name if weights > EXTERNAL_BYTES else None)
