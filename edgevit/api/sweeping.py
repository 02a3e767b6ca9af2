"""What is measured in each cell of a sweep: artifacts as far as they go, models exported for the occasion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit import registry
from edgevit.artifact import Artifact, load_artifact, sha256_of
from edgevit.errors import UnknownNameError, UsageError
from edgevit.manifest import MANIFEST
from edgevit.specs import check_batch, check_image_sizes, size_text

from .calibrating import Pictures, Progress, Source, pictures_for
from .exporting import export_model
from .peering import Entry
from .quantizing import specify

if TYPE_CHECKING:
    from edgevit.bench.sweep import Cell, CellFile

HOW = "give the model's name instead, which is exported for each cell"


@dataclass
class Entrants:
    """The items of a benchmark: artifacts, and models that are exported to `target` below `scratch` when needed."""

    items: Sequence[Artifact | str]
    target: str
    calibration: Source
    scratch: Path
    exported: dict[tuple[Any, ...], Artifact] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What the items are called: an artifact by its directory, by its path where two are of one name."""
        short = [item if isinstance(item, str) else item.name for item in self.items]
        return [
            str(item.path) if isinstance(item, Artifact) and short.count(name) > 1 else name
            for item, name in zip(self.items, short, strict=True)
        ]

    def identities(self) -> list[dict[str, Any]]:
        """What a request keeps of the items, so that another run knows the same again."""
        return [
            {"model": item}
            if isinstance(item, str)
            else {"artifact": item.name, "image_size": list(item.image_size), "sha256": sha256_of(item.path / MANIFEST)}
            for item in self.items
        ]

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse at once what a later cell could not do.

        Raises:
            UsageError, UnknownNameError: an artifact that is not of a cell's precision, size or batch; a model that
            cannot be exported like this.
        """
        for cell in cells:
            for item in self.items:
                if isinstance(item, Artifact):
                    _seen_at(item, cell)
                else:
                    self._check_model(item, cell)

    def entries(self, cell: Cell, runtime: str | None, progress: Progress) -> list[Entry]:
        """The contestants of one cell."""
        artifacts = [
            _seen_at(item, cell) if isinstance(item, Artifact) else self._export(item, cell, progress)
            for item in self.items
        ]
        labels = _labels(artifacts, runtime)
        return [Entry(label, a, _batch_of(a, cell)) for label, a in zip(labels, artifacts, strict=True)]

    def _check_model(self, model: str, cell: Cell) -> None:
        from edgevit.models import model_card

        exporter, precision = registry.exporter(self.target), cell.precision or "fp32"
        if precision not in exporter.precisions:
            raise UnknownNameError(f"precision of target {self.target}", precision, exporter.precisions)
        card = model_card(model)
        check_image_sizes(cell.image_size, card.image.size, card.size_multiple)
        check_batch(cell.batch or 1)
        pictures_for(specify(model, exporter, precision, {}, 0), self._pictures(precision), None)

    def _pictures(self, precision: str) -> Source:
        """What ranges are measured on, where there are any."""
        return self.calibration if precision == "int8" else None

    def _export(self, model: str, cell: Cell, progress: Progress) -> Artifact:
        precision, batch = cell.precision or "fp32", cell.batch or 1
        wish = (model, cell.image_size, precision, batch)
        if wish not in self.exported:
            progress(0.0, f"exporting {model}")
            self.exported[wish] = export_model(
                model, self.target, image_size=cell.image_size, precision=precision, batch=batch,
                calibration=self._pictures(precision), out=self.scratch / str(len(self.exported)),
            )  # fmt: skip
        return self.exported[wish]


def entrants(items: Sequence[Artifact | str | Path], target: str, calibration: Source, scratch: Path) -> Entrants:
    """The items as artifacts and names of models.

    Raises:
        ArtifactError. UnknownNameError: neither. UsageError: nothing at all, or pictures for int8 and no model.
    """
    if not items:
        raise UsageError("bench: nothing to measure; give artifacts or model names")
    found: list[Artifact | str] = []
    for item in items:
        if isinstance(item, Artifact):
            found.append(load_artifact(item.path).at(item.image_size))
        elif Path(item).exists():
            found.append(load_artifact(item))
        elif str(item) in (names := registry.model_names()):
            found.append(str(item))
        else:
            raise UnknownNameError("artifact directory or model", str(item), names)
    source = calibration.source if isinstance(calibration, Pictures) else calibration
    if source is not None and all(isinstance(item, Artifact) for item in found):
        raise UsageError("bench: calibration pictures are for models, which int8 cells export; leave them out")
    return Entrants(found, target, calibration, scratch)


def _seen_at(artifact: Artifact, cell: Cell) -> Artifact:
    """An artifact as a cell wants it, where it holds that."""
    manifest = artifact.manifest
    if cell.precision not in (None, manifest["precision"]):
        raise UsageError(
            f"{artifact.path}: precision {cell.precision}, expected {manifest['precision']}, in which it was exported; "
            f"{HOW}"
        )
    if cell.batch is not None and manifest["batch"] not in ("dynamic", cell.batch):
        raise UsageError(
            f"{artifact.path}: batch {cell.batch}, expected {manifest['batch']}, which it was exported for; {HOW}, or "
            "export it with --batch dynamic"
        )
    return artifact if cell.image_size is None else artifact.at(cell.image_size)


def _batch_of(artifact: Artifact, cell: Cell) -> int:
    """The pictures of an inference: those of the sample unless a cell wants others."""
    batch = artifact.manifest["batch"]
    return int(batch) if batch != "dynamic" else cell.batch or 1


def _labels(race: Sequence[Artifact], runtime: str | None) -> list[str]:
    """What contestants are called: by directory, the size of several, the runtime if one is named."""
    names = [a.name for a in race]
    plain = [str(a.path) if names.count(a.name) > 1 else a.name for a in race]  # two of one name: by their paths
    sizes = ["" if len(a.image_sizes) == 1 else f" at {size_text(a.image_size)}" for a in race]
    return [name + size + (f" on {runtime}" if runtime else "") for name, size in zip(plain, sizes, strict=True)]


def measure_cells(
    cells: Sequence[Cell],
    kept: CellFile,
    items: Sequence[str],
    measure: Callable[[Cell, Progress], Mapping[str, Any]],
    progress: Progress,
) -> int:
    """Measure the cells that are not kept yet and keep each as it ends; return how many were there already."""
    from edgevit.bench.sweep import record
    from edgevit.bench.timing import part_of

    there = 0
    for index, cell in enumerate(cells):
        whole = part_of(progress, index, len(cells))
        if kept.get(record(cell, items)) is not None:
            there += 1
            whole(1.0, f"{cell}: measured before")
            continue
        prefix = f"{cell}: " if len(cells) > 1 else ""
        measured = measure(cell, lambda fraction, text, at=whole, to=prefix: at(fraction, to + text))  # type: ignore[misc]  # bound now
        kept.add({"cell": record(cell, items), **measured})
    return there
