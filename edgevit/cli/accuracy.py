"""The verb that tells how often an artifact is right: evaluate."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from edgevit.manifest import MANIFEST

from .arguments import parse_runtime_options, parse_size
from .shell import (
    ArtifactPath,
    Json,
    Runtime,
    RuntimeOptions,
    Threads,
    Weights,
    Which,
    app,
    emit,
    err,
    plain,
    progress_bar,
)

SKIPPED_SHOWN = 5  # --json has them all


@app.command(epilog="Example: edgevit evaluate dist/swin_tiny-openvino-int8 --data reference-task --against reference")
def evaluate(
    artifact: ArtifactPath,
    data: Annotated[
        str, typer.Option(metavar="DIR|reference-task", help="A directory with a folder of pictures for each class.")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="ARTIFACT|reference", help="Measure the loss against it; reference: PyTorch in float32."),
    ] = None,
    weights: Weights = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Pictures, the same ones in every run; default: all.")
    ] = None,
    image_size: Which = None,
    threads: Threads = None,
    runtime: Runtime = None,
    runtime_option: RuntimeOptions = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the accuracy into the artifact's manifest, where `gate` finds it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a classifier's accuracy on pictures with classes, each figure with its 95 % interval."""
    from edgevit import api

    with progress_bar() as progress:
        document = api.evaluate(
            artifact,
            data,
            against=against,
            weights=weights,
            limit=limit,
            runtime=runtime,
            threads=threads,
            runtime_options=parse_runtime_options(runtime_option),
            image_size=parse_size(image_size),
            record=record,
            progress=progress,
        )
    if record:
        err.print(plain(f"recorded in {artifact / MANIFEST}"), soft_wrap=True)
    emit(document, as_json, lambda out: _show(out, document))


def _show(out: Console, document: dict[str, Any]) -> None:
    data, other = document["data"], document["against"]
    out.print(plain(f"{document['artifact']}: {data['pictures']} of {data['available']} pictures of {data['source']}"))
    _show_accuracy(out, document)
    if other is not None:
        out.print(plain(f"against {other['what']} ({other['runtime']}) on the same pictures"))
        _show_accuracy(out, other)
        out.print(f"  loss       {_interval(other['drop_points'], 1)} points of top-1")
        out.print(f"  agreement  {_interval(other['agreement'], 100)} %")
        out.print(f"  SQNR       {other['sqnr_db']:.1f} dB of the logits")
    skipped = data["skipped"]
    for each in skipped[:SKIPPED_SHOWN]:
        out.print(plain(f"skipped {each['name']}: {each['why']}"))
    if skipped:
        more = f", {len(skipped) - SKIPPED_SHOWN} more are in --json" if len(skipped) > SKIPPED_SHOWN else ""
        out.print(f"skipped in all: {len(skipped)}{more}")
    if data["without_class"]:
        out.print(f"left out: {data['without_class']} pictures beside the folders, which have no class")
    if document["runtime"] != document["target_runtime"]:
        out.print(f"computed by {document['runtime']}, in place of {document['target_runtime']}")
    if document["random_weights"]:
        out.print("the weights are random: these figures mean nothing")


def _show_accuracy(out: Console, figures: dict[str, Any]) -> None:
    for name in (name for name in ("top1", "top5") if figures[name] is not None):
        out.print(f"  {name[:3]}-{name[3]}      {_interval(figures[name], 100)} %")


def _interval(figure: dict[str, float], factor: float) -> str:
    """A figure and the ends of its interval: 91.25 [90.01, 92.35]."""
    value, low, high = (factor * figure[key] for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
