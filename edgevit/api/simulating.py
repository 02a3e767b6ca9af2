"""One table of networks and targets: what each target's int8 arithmetic costs in accuracy. `simulate`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgevit import registry
from edgevit.artifact import Artifact
from edgevit.errors import EdgevitError, UsageError

from .calibrating import Progress, Source
from .evaluating import evaluate_all
from .exporting import export_model


def simulate(
    models: Sequence[str],
    data: str | Path,
    *,
    targets: Sequence[str] = (),
    calibration: Source = None,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Quantise each model for each target and evaluate it where the target's arithmetic is computed or emulated here.

    Args:
        models: registered names. data: what they are evaluated on, as `evaluate` takes it. targets: by default all that
            have int8. limit: pictures. The rest as of `export_model`.

    Every row is compared with the float32 PyTorch network on the same pictures. A target that cannot be built here has
    a `problem` in place of figures.

    Raises:
        UsageError, UnknownNameError, InputError: the request.
    """
    if not models:
        raise UsageError("simulate: no model; give one or more names")
    wanted = list(targets) or [name for name in registry.TARGETS if "int8" in registry.exporter(name).precisions]
    asked: dict[str, Any] = {"weights": weights, "calibration": calibration, "options": options, "seed": seed}
    rows = list[dict[str, Any]]()
    for i, model in enumerate(models):
        with tempfile.TemporaryDirectory(prefix="edgevit-simulate-") as folder:
            part = partial(_part, progress, i, len(models))
            made, problems = _quantise(model, wanted, Path(folder), asked, part)
            found = evaluate_all(list(made.values()), data, weights, limit, part) if made else []
            rows += [_row(model, target, made[target], row) for target, row in zip(made, found, strict=True)]
            rows += [{"model": model, "target": target, "problem": why} for target, why in problems.items()]
    return {"data": str(data), "rows": rows}


def _part(progress: Progress, i: int, of: int, fraction: float, text: str) -> None:
    progress((i + fraction) / of, text)


def _quantise(
    model: str, targets: Sequence[str], out: Path, asked: dict[str, Any], progress: Progress
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """The artifact for each target; of those that cannot be built, why. A target alone raises."""
    made: dict[str, Artifact] = {}
    problems: dict[str, str] = {}
    for target in targets:
        progress(0.0, f"{model}: int8 for {target}")
        try:
            made[target] = export_model(model, target, precision="int8", out=out, force=True, **asked)
        except EdgevitError as error:
            if len(targets) == 1:
                raise
            problems[target] = str(error)
    return made, problems


def _row(model: str, target: str, artifact: Artifact, found: dict[str, Any]) -> dict[str, Any]:
    choices = artifact.manifest["choices"]
    kept = len(choices["kept_float"])
    weights = {"random_weights": artifact.random_weights}
    return {"model": model, "target": target, **weights, **found, "quantized": choices["quantized"], "kept_float": kept}
