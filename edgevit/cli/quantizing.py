"""The verbs that study int8: sensitivity, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from xml.sax.saxutils import escape

import typer
from rich.console import Console
from rich.table import Table

from edgevit.errors import OutputError

from .arguments import parse_options, parse_size
from .shell import (
    AllowFew,
    Calibration,
    CalibrationPictures,
    Json,
    Options,
    Size,
    Weights,
    app,
    emit,
    plain,
    progress_bar,
)

BAR = 24  # characters of the longest bar
ROW, NAMES, BARS, PLOT = 22, 260, 420, 760  # pixels: a row's height, the names' width, the longest bar's, the picture's

Seed = Annotated[int, typer.Option(min=0, help="Of the random weights, where none are given, and of the pictures.")]


@app.command(epilog="Example: edgevit sensitivity swin_tiny --calibration reference-task --plot swin_tiny.svg")
def sensitivity(
    model: str,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="Whose int8 arithmetic.")] = "onnx",
    calibration: Calibration = None,
    calibration_pictures: CalibrationPictures = 256,
    allow_few: AllowFew = False,
    weights: Weights = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the last layer.")] = None,
    image_size: Size = None,
    option: Options = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the noise of each block.")] = None,
    as_json: Json = False,
) -> None:
    """What each block loses in int8: it alone quantised, and all blocks but it."""
    from edgevit import api

    with progress_bar() as progress:
        document = api.sensitivity(
            model,
            to,
            calibration=api.Pictures(calibration, calibration_pictures, allow_few),
            weights=weights,
            num_classes=num_classes,
            image_size=parse_size(image_size),
            options=parse_options(option),
            seed=seed,
            progress=progress,
        )
    if plot is not None:
        try:
            plot.write_text(draw(document), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{plot}: {error.strerror or error}; choose another --plot") from None
    emit(document, as_json, lambda out: _show_sensitivity(out, document))


def _show_sensitivity(out: Console, document: dict[str, Any]) -> None:
    table = Table(box=None)
    for column in ("block", "M MACs", "alone: SQNR dB", "alone: drop", "without: SQNR dB", "without: drop", "noise"):
        table.add_column(column, justify="left" if column in ("block", "noise") else "right", no_wrap=True)
    shares = noise_shares(document)
    for row, share in zip(document["blocks"], shares, strict=True):
        figures = [text for part in ("one_in", "one_out") for text in _cells(row[part])]
        bar = "#" * round(BAR * share / (max(shares) or 1))
        table.add_row(plain(row["block"]), f"{row['macs'] / 1e6:.1f}", *figures, bar)
    out.print(table)
    whole = document["all_int8"]
    for note in document["notes"]:
        out.print(plain(f"note: {note}"))
    random = ", random weights: accuracy means nothing" if document["random_weights"] else ""
    out.print(
        plain(
            f"{document['model']} for {document['target']}, all blocks: SQNR {_decibel(whole)} dB, drop "
            f"{whole['drop']:.2f} points of {document['measure']}, agreement {whole['agreement']:.2f} % "
            f"on {document['pictures']} calibration pictures{random}"
        )
    )


def _cells(found: dict[str, Any] | None) -> tuple[str, str]:
    """SQNR and drop; the only block leaves nothing without it."""
    return ("", "") if found is None else (_decibel(found), f"{found['drop']:.2f}")


def _decibel(found: dict[str, Any]) -> str:
    return "exact" if found["sqnr_db"] is None else f"{found['sqnr_db']:.1f}"


def noise_shares(document: dict[str, Any]) -> list[float]:
    """Each block's part of the noise that the blocks make alone, from 0 to 1."""
    noise = [0.0 if (db := row["one_in"]["sqnr_db"]) is None else 10 ** (-db / 10) for row in document["blocks"]]
    return [value / (sum(noise) or 1) for value in noise]


def draw(document: dict[str, Any]) -> str:
    """The shares of noise as a bar chart in SVG, blocks in the order of the network."""
    shares = noise_shares(document)
    height = ROW * (len(shares) + 2)
    title = f"{document['model']} for {document['target']}: noise of each block alone in int8"
    parts = [f'<text x="8" y="{ROW}" font-weight="bold">{escape(title)}</text>']
    for i, (row, share) in enumerate(zip(document["blocks"], shares, strict=True)):
        top = ROW * (i + 1) + 8
        width = BARS * share / (max(shares) or 1)
        parts += [
            f'<text x="{NAMES - 8}" y="{top + 14}" text-anchor="end">{escape(row["block"])}</text>',
            f'<rect x="{NAMES}" y="{top}" width="{width:.1f}" height="{ROW - 4}" fill="#3b6ea8"/>',
            f'<text x="{NAMES + width + 6:.1f}" y="{top + 14}">{share:.1%}</text>',
        ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{PLOT}" height="{height}" role="img" '
        f'font-family="sans-serif" font-size="13">\n<title>{escape(title)}</title>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


@app.command(
    epilog="Example: edgevit simulate swin_tiny vit_lsla_tiny --data reference-task --calibration reference-task"
)
def simulate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Registered names.")],
    data: Annotated[str, typer.Option(metavar="DIR|reference-task", help="Pictures in a folder for each class.")],
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="TARGET", help="Default: every target that has int8.")
    ] = None,
    calibration: Calibration = None,
    calibration_pictures: CalibrationPictures = 256,
    allow_few: AllowFew = False,
    weights: Weights = None,
    option: Options = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Pictures to evaluate on.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy under each target's int8 arithmetic, beside float32 on the same pictures."""
    from edgevit import api

    with progress_bar() as progress:
        document = api.simulate(
            models,
            data,
            targets=to or (),
            calibration=api.Pictures(calibration, calibration_pictures, allow_few),
            weights=weights,
            options=parse_options(option),
            limit=limit,
            seed=seed,
            progress=progress,
        )
    emit(document, as_json, lambda out: _show_simulated(out, document))
    if any("problem" in row for row in document["rows"]):
        raise typer.Exit(1)


def _show_simulated(out: Console, document: dict[str, Any]) -> None:
    table = Table(box=None)
    for column in ("model", "target", "computed by", "float32 top-1", "int8 top-1", "lost, points", "agreement"):
        table.add_column(column, no_wrap=True)
    for row in (row for row in document["rows"] if "problem" not in row):
        beside = row["against"]
        accuracies = _percent(beside["top1"]), _percent(row["top1"])
        lost = _points(beside["drop_points"]), _percent(beside["agreement"])
        table.add_row(row["model"], row["target"], row["runtime"], *accuracies, *lost)
    out.print(table)
    for row in (row for row in document["rows"] if "problem" in row):
        out.print(plain(f"{row['model']} for {row['target']}: {row['problem']}"))


def _percent(figure: dict[str, float]) -> str:
    return f"{figure['value']:.2%} [{figure['low']:.2%}, {figure['high']:.2%}]"


def _points(figure: dict[str, float]) -> str:
    return f"{figure['value']:+.2f} [{figure['low']:+.2f}, {figure['high']:+.2f}]"
