"""What the verbs share: the Typer application, their common options, documents and progress on a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    name="edgevit",
    help="Vision transformers on edge devices: export, verify, lint, run, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True, highlight=False)
PIPE_WIDTH = 200  # columns where no terminal limits them: tables are not cut off in a log

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="What the family or the target takes beside.")
]
Size = Annotated[str | None, typer.Option("--image-size", metavar="HxW", help="Height x width in pixels.")]
Sizes = Annotated[
    str | None,
    typer.Option("--image-size", metavar="HxW[,HxW]...", help="Height x width in pixels; several share one artifact."),
]
Which = Annotated[
    str | None,
    typer.Option("--image-size", metavar="HxW", help="Of an artifact with several sizes; default: the first."),
]
Weights = Annotated[Path | None, typer.Option(help="Official .pth, bare state_dict or .safetensors.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE.npz|reference-task", help="Pictures that int8 ranges are measured on; 128 or more."
    ),
]
CalibrationPictures = Annotated[int, typer.Option(min=1, metavar="N", help="How many of them are taken.")]
AllowFew = Annotated[bool, typer.Option(help="Calibrate on fewer than 128 pictures.")]
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory that `edgevit export` wrote.")]
Runtime = Annotated[str | None, typer.Option(help="Another runtime than the target's own, e.g. ov for OpenVINO.")]
RuntimeOptions = Annotated[
    list[str] | None,
    typer.Option("--runtime-option", metavar="KEY=VALUE", help="What the runtime takes beside, e.g. device=GPU."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads inside an operator; default: all cores.")]


def plain(text: str) -> str:
    """Text from outside for a terminal: no markup of Rich's, no control sequence of the terminal's."""
    return escape("".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text))


def emit(document: dict[str, Any] | list[Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """The document as JSON, or `show` it for a person."""
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        show(Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH))


def show_results(out: Console, document: dict[str, Any]) -> None:
    """Latencies as a table, then what compares them, then what changed on the machine, then the warnings."""
    results = document["results"]
    percentiles = sorted({q for result in results for q in result["latency_text"]}, key=lambda q: float(q[1:]))
    table, with_limit = Table(box=None), any(result.get("roofline") for result in results)
    columns = ("name", "precision", *(f"{q} ms" for q in percentiles), "runs", *(("of limit",) if with_limit else ()))
    for column in columns:
        table.add_column(column, justify="left" if column in ("name", "precision") else "right", no_wrap=True)
    for result in results:
        cells = [plain(result["latency_text"].get(q, "")) for q in percentiles]
        precision = plain(result["effective_precision"] or "not known")
        limit = (_share(result.get("roofline")),) if with_limit else ()
        table.add_row(plain(result["name"]), precision, *cells, str(len(result["samples_ms"])), *limit)
    out.print(table)
    for comparison in document["comparisons"]:
        names = f"{comparison['candidate']} against {comparison['baseline']}"
        out.print(plain(f"{names}: {comparison['verdict']}"))
    for change in document.get("changes", ()):
        err.print(plain(f"the machine changed: {change['text']}"), soft_wrap=True)
    for warning in document["warnings"]:
        err.print(plain(f"warning: {warning}"), soft_wrap=True)


def _share(roofline: dict[str, Any] | None) -> str:
    """The share of the machine's limit that a result reached."""
    share = (roofline or {}).get("share")
    return "n/a" if share is None else f"{share:.0%}"


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """A bar on a terminal, a plain line for each new step in a pipe."""
    if err.is_terminal:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err, transient=True
        ) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda fraction, text: bar.update(task, completed=fraction, description=plain(text))
        return
    last = ""

    def line(fraction: float, text: str) -> None:
        nonlocal last
        step = re.sub(r"\d+", "", text)  # a counter that moves on is the same step
        if step != last:
            err.print(plain(text), soft_wrap=True)
            last = step

    yield line
