"""The verbs that make an artifact and check it: export, verify."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from edgevit.specs import size_text

from .arguments import parse_batch, parse_options, parse_sizes
from .shell import (
    AllowFew,
    ArtifactPath,
    Calibration,
    CalibrationPictures,
    Json,
    Options,
    Sizes,
    Weights,
    app,
    emit,
    plain,
    progress_bar,
)

KEPT = (  # of the manifest, in the document of an export
    "parity", "runtime", "model_file", "checked_file", "certificates", "files", "weights", "notes", "complexity",
    "choices", "lint", "calibration", "resolutions",
)  # fmt: skip

Classes = Annotated[int | None, typer.Option(help="Classes of the last layer; default: the checkpoint's.")]
Batch = Annotated[str, typer.Option(metavar="N|dynamic", help="Pictures an inference takes.")]
Gpus = Annotated[
    list[str] | None,
    typer.Option("--gpu", metavar="SM[,SM]...", help="TensorRT: build an engine ahead of time for these, e.g. sm89."),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="int8: points that may be lost; blocks go back to float until it holds."),
]


@app.command(
    epilog="Example: edgevit export crossformer_s --to onnx --weights official.pth --image-size 224x224,448x448"
)
def export(
    model: str,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="onnx, openvino, tensorrt or coreml.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8; on OpenVINO also bf16.")] = "fp32",
    weights: Weights = None,
    num_classes: Classes = None,
    image_size: Sizes = None,
    batch: Batch = "1",
    features_only: Annotated[bool, typer.Option(help="Export the backbone's maps instead of logits.")] = False,
    option: Options = None,
    gpu: Gpus = None,
    pointwise: Annotated[str, typer.Option(help="auto, dense or grouped 1x1 convolutions.")] = "auto",
    calibration: Calibration = None,
    calibration_pictures: CalibrationPictures = 256,
    allow_few: AllowFew = False,
    max_drop: MaxDrop = None,
    out: Annotated[Path, typer.Option(help="Directory in which the artifact is made.")] = Path("dist"),
    force: Annotated[bool, typer.Option(help="Replace an artifact that exists.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights, where none are given.")] = 0,
    as_json: Json = False,
) -> None:
    """Export a model to a target, prove it equal to the reference, write the artifact."""
    from edgevit import api

    options = parse_options([*(option or []), *([f"gpu={','.join(gpu)}"] if gpu else [])])
    with progress_bar() as progress:
        artifact = api.export_model(
            model, to, weights=weights, num_classes=num_classes, precision=precision,
            image_size=parse_sizes(image_size), batch=parse_batch(batch),  # type: ignore[arg-type]  # the only text it returns is "dynamic"
            features_only=features_only, options=options,
            calibration=api.Pictures(calibration, calibration_pictures, allow_few), max_drop=max_drop,
            pointwise=pointwise,  # type: ignore[arg-type]  # the exporter checks it
            out=out, force=force, seed=seed, command=_command(), progress=progress,
        )  # fmt: skip
    document = {"artifact": str(artifact.path)}
    document |= {key: artifact.manifest[key] for key in KEPT if key in artifact.manifest}
    emit(document, as_json, lambda console: _show_export(console, document))


def _command() -> str:
    """What was typed, of absolute paths their last part: where files lay is the exporting machine's affair."""
    return shlex.join(["edgevit", *(re.sub(r"(^|=)/(?:[^/]*/)*", r"\1", word) for word in sys.argv[1:])])


def _show_export(out: Console, document: dict[str, Any]) -> None:
    out.print(plain(document["artifact"]))
    sizes = document.get("resolutions", [document])
    for size in sizes:
        if len(sizes) > 1:
            out.print(plain(f"image size  {size_text(size['image_size'])}: {size['model_file']}"))
        for certificate in size["certificates"]:
            change = certificate["macs_after"] - certificate["macs_before"]
            macs = f"{change / 1e6:+,.2f} M MACs, " if change else ""
            out.print(
                f"rewrite     {certificate['rewrite']}: {certificate['places']} places, operations "
                f"{certificate['operations_before']} -> {certificate['operations_after']}, "
                f"{macs}difference {certificate['max_rel']:.0e} (float64)"
            )
        if complexity := size["complexity"]:
            out.print(f"deployed    {complexity['parameters']:,} parameters, {complexity['macs'] / 1e6:,.2f} M MACs")
        if len(sizes) > 1:
            _show_parity(out, size, document["runtime"])
    _show_weights(out, document["weights"])
    for size in sizes:
        _show_int8(out, size["choices"], document["calibration"])
    for note in document["notes"]:
        out.print(plain(f"note        {note}"))
    if len(sizes) == 1:
        _show_parity(out, document, document["runtime"])


def _show_parity(out: Console, size: dict[str, Any], runtime: str) -> None:
    """How far it is from the reference, and what was compared where that is not what the device runs."""
    if size["parity"]["runtime"] != runtime:
        out.print(
            plain(
                f"parity      {runtime} on {size['model_file']}: not run here; in its place "
                f"{size['parity']['runtime']} on {size['checked_file']}:"
            )
        )
    out.print(_parity_line(size["parity"], "reference"))


def _show_int8(out: Console, choices: dict[str, Any], calibration: dict[str, Any] | None) -> None:
    """How much of an int8 export is int8, and what its ranges were measured on."""
    if "quantized" not in choices:
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in choices["quantized"].items()) or "nothing"
    out.print(plain(f"int8        {counts}; {len(choices['kept_float'])} products stay float"))
    if calibration:
        unstable = choices.get("calibrated", {}).get("unstable", [])
        moved = f", {len(unstable)} ranges still moved by over 10 %: more pictures may help" if unstable else ""
        count = len(calibration["pictures"])
        out.print(plain(f"calibrated  on {count} pictures of {calibration['source']}{moved}"))


def _show_weights(out: Console, weights: dict[str, Any]) -> None:
    if "entry" not in weights:
        out.print(f"weights     random (seed {weights['seed']}): timings hold, predictions mean nothing")
    else:
        out.print(plain(f"weights     {weights['source']} ({weights['entry']}, sha256 {weights['sha256'][:12]}...)"))


def _parity_line(parity: dict[str, Any], against: str) -> str:
    top1 = "" if parity["top1_agreement"] is None else f", top-1 agreement {parity['top1_agreement']:.0%}"
    verdict = "equal" if parity["passed"] else "NOT equal"
    return (
        f"parity      {verdict} to the {against} on {parity['inputs']} picture(s): "
        f"max abs {parity['max_abs']:.1e} (limit {parity['max_abs_limit']:.2g}), cosine {parity['cosine']:.7f}{top1}"
    )


@app.command(epilog="Example: edgevit verify dist/mobileformer_294m-onnx-fp32")
def verify(artifact: ArtifactPath, weights: Weights = None, as_json: Json = False) -> None:
    """Check an artifact's files and outputs; with the weights, against the reference on photographs."""
    from edgevit import api

    document = api.verify(artifact, weights)

    def show(out: Console) -> None:
        for size in document.get("resolutions", [document]):
            at = f" at {size_text(size['image_size'])}" if "image_size" in size else ""
            out.print(_parity_line(size["parity"], document["against"] + at))

    emit(document, as_json, show)
