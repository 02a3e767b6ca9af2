"""What an int8 export is calibrated on: the request, and the pictures that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit import registry
from edgevit.contracts import Calibration, Watch
from edgevit.errors import UsageError
from edgevit.runtimes import Session
from edgevit.specs import ExportSpec, ImageSpec, Size

Progress = Callable[[float, str], None]  # share done, what is being done
PICTURES = 256  # twice the least that is taken without asking: range stability compares one half with the whole
HOW = "--calibration DIR, FILE.npz or reference-task"


@dataclass(frozen=True)
class Pictures:
    """Where calibration pictures come from, how many are taken, and whether fewer than 128 will do."""

    source: str | Path | None = None
    count: int = PICTURES
    allow_few: bool = False


Source = str | Path | Pictures | None  # a place alone is taken with the defaults


def pictures_for(spec: ExportSpec, given: Source, max_drop: float | None) -> Pictures:
    """The pictures asked for, once they go together with the export's precision and recipe.

    Raises:
        UsageError.
    """
    wanted = given if isinstance(given, Pictures) else Pictures(given)
    if wanted.count < 1:
        raise UsageError(f"calibration pictures {wanted.count}: expected 1 or more, e.g. {PICTURES}")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise UsageError(f"max drop {max_drop}: expected 0 to 100 points, e.g. 0.5")
    if spec.recipe is None:
        asked = {"calibration": wanted.source, "max drop": max_drop, "allow few": wanted.allow_few or None}
        odd = next((name for name, value in asked.items() if value is not None), None)
        if odd is not None:
            raise UsageError(f"{odd} with precision {spec.precision}: it is for int8; add --precision int8")
        return wanted
    needed = spec.recipe.calibrated or max_drop is not None
    if needed and wanted.source is None:
        raise UsageError(
            f"int8 for {spec.target}: no pictures to measure ranges on, expected some like those that the model "
            f"will see; add {HOW}"
        )
    if not needed and wanted.source is not None:
        raise UsageError(
            f"calibration with weights alone in int8 for {spec.target}: no range is measured; leave it out"
        )
    return wanted


def calibrate(spec: ExportSpec, sizes: Sequence[Size], image: ImageSpec, wanted: Pictures) -> Calibration | None:
    """The pictures of an export at its sizes; None where it has no use for them.

    Raises:
        InputError, UsageError: the pictures.
    """
    if spec.recipe is None or wanted.source is None:
        return None
    from edgevit.export.quantize.calibration import load_calibration

    found: Calibration = load_calibration(
        str(wanted.source), image, sizes, allow_few=wanted.allow_few, count=wanted.count, seed=spec.seed
    )
    return dataclasses.replace(found, watch=_watch_with(registry.exporter(spec.target).checker))


def _watch_with(checker: str) -> Watch | None:
    """What shows an exporter the values inside a model file, where its checker can."""
    cls: Any = registry.runtime_class(checker)
    if not hasattr(cls, "watch"):
        return None

    def watch(path: Path, images: NDArray[Any], see: Callable[[str, NDArray[Any]], None]) -> None:
        with Session(cls(path)) as session:
            for image in images:
                session.runtime.watch({session.runtime.inputs[0].name: np.ascontiguousarray(image[None])}, see)  # type: ignore[attr-defined]  # asked for above

    return watch
