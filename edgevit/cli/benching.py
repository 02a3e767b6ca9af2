"""The verb that measures: bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from edgevit.errors import InputError, UsageError
from edgevit.specs import size_text

from .arguments import parse_runtime_options, parse_size
from .shell import (
    AllowFew,
    Calibration,
    CalibrationPictures,
    Json,
    Runtime,
    RuntimeOptions,
    Threads,
    Which,
    app,
    emit,
    err,
    plain,
    progress_bar,
    show_results,
)

AXES = ("threads", "batch", "image-size", "precision")
MIB = 1 << 20
STEPS = {
    "import_ms": "runtime imported",
    "load_ms": "model loaded",
    "first_ms": "first inference",
    "steady_ms": "later ones",
}
LONGEST = 9  # digits of a number: no machine has more threads, no batch more pictures

Items = Annotated[
    list[str], typer.Argument(metavar="ARTIFACT|MODEL...", help="Raced against each other; after --sweep, axes too.")
]
Sweep = Annotated[
    list[str] | None,
    typer.Option("--sweep", metavar="AXIS=A,B...", help="threads, batch, image-size, precision: every combination."),
]
Duration = Annotated[float, typer.Option(help="Seconds for each contestant.")]
MaxDuration = Annotated[float, typer.Option(help="Seconds for a contestant too slow for the samples needed.")]
Percentile = Annotated[float, typer.Option(help="The highest wanted: the race goes on until its samples are there.")]
Loads = Annotated[int, typer.Option(min=1, help="How often each is loaded afresh; one load may be luckier.")]
Rival = Annotated[
    str | None,
    typer.Option(metavar="naive|ARTIFACT|FILE.onnx", help="Race each against PyTorch's own export, or against that."),
]
To = Annotated[str, typer.Option("--to", metavar="TARGET", help="What models are exported to for the occasion.")]
Throughput = Annotated[bool, typer.Option(help="Pictures per second, with more in flight until that gains nothing.")]
ColdStart = Annotated[bool, typer.Option(help="Loading, the first inference and memory, in fresh processes.")]
Explain = Annotated[bool, typer.Option(help="Name the three biggest losses against the machine's limits.")]
Roofline = Annotated[bool, typer.Option(help="The share of the machine's limit; measuring its peaks takes seconds.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Gets each cell as it ends; the same command again goes on from there."),
]


@app.command(epilog="Example: edgevit bench mobileformer_26m --sweep threads=1,2 batch=1,8 --out sweep.json")
def bench(
    items: Items,
    image_size: Which = None,
    threads: Threads = None,
    sweep: Sweep = None,
    duration: Duration = 5.0,
    max_duration: MaxDuration = 60.0,
    percentile: Percentile = 90.0,
    loads: Loads = 3,
    vs: Rival = None,
    runtime: Runtime = None,
    runtime_option: RuntimeOptions = None,
    to: To = "onnx",
    calibration: Calibration = None,
    calibration_pictures: CalibrationPictures = 256,
    allow_few: AllowFew = False,
    throughput: Throughput = False,
    cold_start: ColdStart = False,
    explain: Explain = False,
    roofline: Roofline = True,
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of turns and the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Time artifacts in interleaved rounds; ratios with intervals."""
    from edgevit import api

    items, axes = split_axes(items, sweep)
    with progress_bar() as progress, _resumable(out):
        document = api.benchmark(
            items, image_size=parse_size(image_size), threads=threads, duration_s=duration,
            max_duration_s=max_duration, percentile=percentile, loads=loads, vs=vs, runtime=runtime,
            runtime_options=parse_runtime_options(runtime_option), sweep=axes, to=to,
            calibration=api.Pictures(calibration, calibration_pictures, allow_few), throughput=throughput,
            cold_start=cold_start, explain=explain, roofline=roofline, out=out, seed=seed, progress=progress,
        )  # fmt: skip
    emit(document, as_json, lambda console: _show_checked(console, document, out))


def split_axes(items: Sequence[str], sweep: Sequence[str] | None) -> tuple[list[str], dict[str, list[Any]]]:
    """What is measured, and the axes: those of `--sweep` and, where it was given, the arguments that look like one.

    Raises:
        UsageError: an axis twice, of no such name, or a value of the wrong kind.
    """
    loose = [item for item in items if item.partition("=")[0] in AXES and "=" in item and not Path(item).exists()]
    if loose and not sweep:
        raise UsageError(f"{loose[0]!r}: neither an artifact nor a model; put --sweep before it")
    axes: dict[str, list[Any]] = {}
    for text in [*(sweep or []), *loose]:
        name, equals, values = text.partition("=")
        if not equals or name not in AXES:
            raise UsageError(f"--sweep {text!r}: expected AXIS=VALUE,VALUE, an axis being {', '.join(AXES)}")
        key = name.replace("-", "_")
        if key in axes:
            raise UsageError(f"--sweep {text!r}: {name} is given twice; give its values as {name}=A,B")
        axes[key] = [_value(name, value.strip()) for value in values.split(",")]
    return [item for item in items if item not in loose], axes


def _value(axis: str, text: str) -> Any:
    if axis == "precision":
        return text
    if axis == "image-size":
        return parse_size(text)
    if not (text.isascii() and text.isdigit() and len(text) <= LONGEST):
        raise UsageError(f"--sweep {axis}={text}: expected whole numbers, e.g. {axis}=1,2")
    return int(text)


@contextmanager
def _resumable(out: Path | None) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except Exception:
        raise
    except BaseException:  # an interruption is none of Exception
        if out is not None and out.exists():
            err.print(plain(f"{out} has the cells that ended; the same command goes on from there"), soft_wrap=True)
        raise


def _show_checked(out: Console, document: dict[str, Any], place: Path | None) -> None:
    """Show what was measured. Cells measured before come from a file, which may be anyone's.

    Raises:
        InputError: such a cell has a field of another kind than is written there.
    """
    try:
        _show(out, document, place)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if not document["resumed"]:
            raise
        raise InputError(f"{place}: a cell holds what cannot be shown ({error!r}); remove the file") from None


def _show(out: Console, document: dict[str, Any], place: Path | None) -> None:
    """Each cell's table under its name; then where it is kept."""
    cells = document.get("cells", [document])
    for index, cell in enumerate(cells):
        if "cells" in document:
            out.print(plain(f"{'' if index == 0 else chr(10)}{_name(cell['cell'])}"))
        show_results(out, cell)
        for result in cell["results"]:
            _show_beside(out, result)
    if place is not None:
        there = document["resumed"]
        before = f", {there} of them measured before" if there else ""
        out.print(plain(f"{place}: {len(cells)} {'cell' if len(cells) == 1 else 'cells'}{before}"))


def _show_beside(out: Console, result: dict[str, Any]) -> None:
    """What was asked for beside one result's latency."""
    if sentences := (result.get("roofline") or {}).get("explanation"):
        out.print(plain(f"{result['name']}: what it loses"))
        for sentence in [*sentences, *result["roofline"]["warnings"]]:
            out.print(plain(f"  {sentence}"))
    if found := result.get("throughput"):
        out.print(plain(f"{result['name']}: throughput"))
        for level in found["levels"]:
            best = ", best" if level == found["best"] else ""
            out.print(plain(f"  {level['in_flight']} in flight  {level['text']}{best}"))
        for sentence in (found["reason"], *found["warnings"]):
            out.print(plain(f"  {sentence}"))
    if found := result.get("cold_start"):
        cache = "from the disk" if found["page_cache"] == "model files dropped" else "from memory: files stay there"
        out.print(plain(f"{result['name']}: {found['starts']} starts, the model {cache}"))
        for key, text in STEPS.items():
            out.print(plain(f"  {text:<16} {found[key]['text']}"))
        _show_memory(out, result["memory"])


def _show_memory(out: Console, memory: dict[str, int | None]) -> None:
    peak, model = (memory[key] for key in ("peak_bytes", "model_bytes"))
    if peak is not None and model is not None:
        out.print(f"  {'memory':<16} {peak / MIB:.0f} MiB at the most, {model / MIB:.0f} of them for the model")


def _name(cell: dict[str, Any]) -> str:
    told = {**cell, "image_size": cell["image_size"] and size_text(cell["image_size"])}
    return " ".join(f"{axis}={told[key]}" for axis in AXES if told[key := axis.replace("-", "_")] is not None)
