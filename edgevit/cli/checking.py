"""The verbs that look into a model file or a device's output: lint, profile, ingest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .arguments import parse_runtime_options, parse_size
from .shell import ArtifactPath, Json, Runtime, RuntimeOptions, Threads, Which, app, emit, plain, show_results

NODES_SHOWN = 3  # of a finding at many nodes; --json has them all


@app.command(epilog="Example: edgevit lint model.onnx --for tensorrt-8.6 --for coreml-ios17")
def lint(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT|FILE.onnx", help="What is to be checked.")],
    profiles: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="PROFILE", help="E.g. tensorrt-8.6, coreml-ios17; default: the artifact's own."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a graph against what a target can run, without the target; exit 1 if it finds errors."""
    from edgevit import api

    document = api.lint(path, profiles or [])
    emit(document, as_json, lambda out: _show_findings(out, document))
    if document["errors"]:
        raise typer.Exit(1)


def _show_findings(out: Console, document: dict[str, Any]) -> None:
    """One paragraph for each rule that found something, with the first nodes."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for finding in document["findings"]:
        where = ", ".join(finding["profiles"])
        key = (*(finding[name] for name in ("level", "rule", "why", "do", "source")), where)
        grouped.setdefault(key, []).append(finding["node"])
    for (level, rule, why, do, source, where), nodes in grouped.items():
        more = f" and {len(nodes) - NODES_SHOWN} more" if len(nodes) > NODES_SHOWN else ""
        out.print(plain(f"{level:8} {rule}  {', '.join(nodes[:NODES_SHOWN])}{more}: {why}; {do} ({where}; {source})"))
    counts = ", ".join(f"{document[level]} {level}" for level in ("errors", "warnings", "advice"))
    for note in document["notes"]:
        out.print(plain(f"note     {note}"))
    out.print(plain(f"{document['file']} for {', '.join(document['profiles'])}: {counts}"))
    out.print(plain(f"TensorRT-RTX's own parser: {document['parser']}"))


@app.command(epilog="Example: edgevit profile dist/swin_t-openvino-bf16 --threads 1")
def profile(
    artifact: ArtifactPath,
    image_size: Which = None,
    threads: Threads = None,
    runtime: Runtime = None,
    runtime_option: RuntimeOptions = None,
    runs: Annotated[int, typer.Option(min=1, help="Inferences, of which the median is taken.")] = 20,
    as_json: Json = False,
) -> None:
    """Which precision each operator really ran in, and where the time goes, as the runtime itself reports it."""
    from edgevit import api

    document = api.profile(
        artifact,
        image_size=parse_size(image_size),
        threads=threads,
        runtime=runtime,
        runtime_options=parse_runtime_options(runtime_option),
        runs=runs,
    )
    emit(document, as_json, lambda out: _show_profile(out, document))


def _show_profile(out: Console, document: dict[str, Any]) -> None:
    table = Table(box=None)
    for column in ("operator", "precision", "count", "ms", "share of time"):
        table.add_column(column, justify="left" if column in ("operator", "precision") else "right", no_wrap=True)
    for row in document["by_kind"]:
        cells = (str(row["count"]), f"{row['time_ms']:.3f}", _percent(row["time_share"]))
        table.add_row(plain(row["kind"]), row["precision"], *cells)
    out.print(table)
    for row in document["by_precision"]:
        shares = f"{_percent(row['macs_share'])} of the MACs, {_percent(row['time_share'])} of the time"
        out.print(f"{row['precision']}: {shares}")
    out.print(plain(f"{document['verdict']} ({document['runtime']['runtime']})"))


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


@app.command(epilog="Example: edgevit ingest times.json profile.json layers.json --artifact dist/swin_t-tensorrt-fp16")
def ingest(
    files: Annotated[list[Path], typer.Argument(metavar="FILE|DIR...", help="What trtexec or build.sh wrote.")],
    artifact: Annotated[
        Path | None, typer.Option(help="What was run; a precision that is not its own is refused.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the result is called.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures in a query; default: what build.sh noted, or the artifact's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a device's times, profile and layers as a result like any other."""
    from edgevit import api

    document = api.ingest(files, name=name, artifact=artifact, batch=batch)
    emit(document, as_json, lambda out: _show_ingested(out, document))


def _show_ingested(out: Console, document: dict[str, Any]) -> None:
    for result in document["results"]:
        where = result["device"].get("name") or "an unnamed device"
        out.print(plain(f"{result['name']}: TensorRT {result['version'] or 'of unknown version'} on {where}"))
    show_results(out, document)
