"""What a device measured by itself, read back: `ingest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.artifact import Artifact, load_artifact
from edgevit.errors import InputError, RuntimeFailure, UsageError
from edgevit.manifest import MANIFEST
from edgevit.specs import MAX_BATCH

from .profiling import declared_fp32

if TYPE_CHECKING:
    from edgevit.bench.ingest import Run

BUILT = "built"  # the folder that build.sh makes; build-HxW.sh makes built-HxW


def ingest(
    files: Sequence[str | Path],
    *,
    name: str | None = None,
    artifact: str | Path | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """trtexec's logs and JSON files as one document of results, like that of `benchmark`.

    Each directory is one run, what `build.sh` left, or an artifact with such in it; single files together are one more.
    A file is told by what it holds. `name` is what the one run is called. With `artifact`, the results carry its name,
    model, target and precision, and a run whose products were computed in another precision is refused. `batch` is the
    pictures in a query: by default what build.sh recorded, else the artifact's own, else 1.

    Raises:
        InputError: unreadable, damaged, or of different runs. ArtifactError: the artifact. UsageError: an argument.
        RuntimeFailure: trtexec failed, or the precision that ran is not the artifact's.
    """
    from edgevit.bench.ingest import result_of

    if not files:
        raise UsageError("ingest: nothing to read; give trtexec's files, or the directory that build.sh wrote")
    if batch is not None and not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"ingest: batch {batch}: expected a number of pictures from 1 to {MAX_BATCH}")
    exported = None if artifact is None else load_artifact(artifact)
    runs = _runs([Path(file) for file in files])
    if len(runs) > 1 and name is not None:
        raise UsageError(f"ingest: {len(runs)} runs and one name {name!r}; read them one by one, or without --name")
    results, warnings = [], []
    for run in runs:
        called = name or (exported.name if exported is not None and len(runs) == 1 else _name_of(Path(run.place)))
        result, told = result_of(run, called, _batch(run, exported, batch))
        results.append(result if exported is None else {**result, **_attested(run, result, exported)})
        warnings += told
    return {
        "results": results,
        "comparison": None,
        "comparisons": [],
        "warnings": list(dict.fromkeys(warnings)),
        "settings": {"source": "trtexec"},
        "machine": {"before": results[0]["device"], "after": results[0]["device"]},
    }


def _name_of(place: Path) -> str:
    """What a run is called: its file or folder, or the artifact in which build.sh made that folder, and the size."""
    path = place.resolve()
    made, dash, size = path.name.partition("-")
    if made != BUILT or not path.parent.name:
        return path.name
    return f"{path.parent.name} at {size}" if dash else path.parent.name


def _runs(paths: Sequence[Path]) -> list[Run]:
    """One run for each directory, for an artifact each that build.sh left in it, and one for single files together."""
    from edgevit.bench.ingest import read_directory, read_run

    runs = []
    for path in filter(Path.is_dir, paths):
        inside = sorted(p for p in path.glob(f"{BUILT}*") if p.is_dir()) if (path / MANIFEST).is_file() else []
        runs += [read_directory(folder) for folder in inside or [path]]
    single = [path for path in paths if not path.is_dir()]
    if single:
        runs.append(read_run(single, str(single[0]), strict=True))
    return runs


def _batch(run: Run, artifact: Artifact | None, asked: int | None) -> int:
    """Pictures in a query, from the most certain source; raises where what was asked contradicts it."""
    record = run.record or run.build_record
    known = None if record is None else int(record["batch"])
    if known is None and artifact is not None and artifact.manifest["batch"] != "dynamic":
        known = int(artifact.manifest["batch"])
    if known is not None and asked is not None and asked != known:
        raise UsageError(f"{run.place}: batch {asked}, but its queries have {known} pictures each; leave --batch away")
    return known or asked or 1


def _attested(run: Run, result: Mapping[str, Any], artifact: Artifact) -> dict[str, Any]:
    """What a result says of its artifact, once the two are known to belong together.

    Raises:
        InputError: the engine was built from another graph. RuntimeFailure: another precision ran.
    """
    from edgevit.bench.ingest import precision_of

    manifest = artifact.manifest
    records = [record for record in (run.record, run.build_record) if record is not None]
    graphs = {record["onnx_sha256"] for record in records if "onnx_sha256" in record}
    if graphs - {entry["sha256"] for entry in manifest["files"]}:
        raise InputError(f"{run.place}: was built from another model.onnx than that of {artifact.path}")
    asked, actual = manifest["precision"], precision_of(run, declared_fp32(manifest["choices"]))
    if actual is not None and actual != asked:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in result["precision_share"]["products"].items())
        raise RuntimeFailure(
            f"{run.place}: its products ran in {actual} ({shares}), {artifact.name} asks for {asked}; its numbers "
            "would be another model's: build with build.sh, which passes what this TensorRT needs"
        )
    return {
        "artifact": artifact.name,
        "model": manifest["model"],
        "target": manifest["target"],
        "precision": asked,
        "effective_precision": actual,
        "random_weights": artifact.random_weights,
    }
