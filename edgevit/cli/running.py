"""The verb that runs an artifact: run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .arguments import parse_runtime_options, parse_size
from .shell import ArtifactPath, Json, Runtime, RuntimeOptions, Which, app, emit, plain


@app.command(epilog="Example: edgevit run dist/mobileformer_294m-onnx-fp32 photo.jpg --labels imagenet.txt")
def run(
    artifact: ArtifactPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    labels: Annotated[Path | None, typer.Option(help="A text file with one class name a line, or JSON.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    image_size: Which = None,
    runtime: Runtime = None,
    runtime_option: RuntimeOptions = None,
    as_json: Json = False,
) -> None:
    """Classify pictures."""
    from edgevit import api

    options = parse_runtime_options(runtime_option)
    document = api.predict(artifact, images, labels, top, parse_size(image_size), runtime, options)

    def show(out: Console) -> None:
        for prediction in document["predictions"]:
            table = Table(title=plain(prediction["image"]), title_justify="left", box=None)
            table.add_column("class", justify="right")
            table.add_column("label")
            table.add_column("probability", justify="right")
            for row in prediction["top"]:
                table.add_row(str(row["class"]), plain(row["label"]), f"{row['probability']:.2%}")
            out.print(table)
        if document["runtime"] != document["target_runtime"]:
            out.print(f"computed by {document['runtime']}, in place of {document['target_runtime']}")
        if document["random_weights"]:
            out.print("the weights are random: these predictions mean nothing")

    emit(document, as_json, show)
