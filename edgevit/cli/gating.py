"""The verb that decides: gate. Its exit code is the verdict: 0 pass, 4 regression, 5 inconclusive."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from edgevit.artifact import replace_file
from edgevit.errors import OutputError, UsageError
from edgevit.manifest import os_reason

from .arguments import parse_runtime_options, parse_size
from .shell import Json, Runtime, RuntimeOptions, Threads, Which, app, emit, plain, progress_bar

Seed = Annotated[int, typer.Option(min=0, help="Of the order of turns.")]
EXIT_CODES = {"pass": 0, "regression": 4, "inconclusive": 5}
SHARE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(%?)")


def parse_share(flag: str, text: str) -> float:
    """Read "5%" or "0.05" as 0.05.

    Raises:
        UsageError: anything else, and a share above 1 without a percent sign: "5" is 5 % to some, 500 % to others.
    """
    found = SHARE.fullmatch(text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if found is None or not 0 <= value <= 1:
        raise UsageError(f"{flag} {text!r}: expected a share of at most 1, e.g. 5% or 0.05")
    return value


@app.command(epilog="Example: edgevit gate base/swin_t-onnx-fp32 dist/swin_t-onnx-fp32 --max-slowdown 5% --threads 1")
def gate(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="An artifact, a stored result, or their store.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="An artifact, or a stored result.")],
    max_slowdown: Annotated[str, typer.Option(metavar="SHARE", help="How much longer an inference may take.")] = "5%",
    max_drop: Annotated[float, typer.Option(min=0, help="Points of top-1 that may be lost.")] = 0.5,
    max_size: Annotated[str, typer.Option(metavar="SHARE", help="How much larger the files may be.")] = "1%",
    max_parameters: Annotated[str, typer.Option(metavar="SHARE", help="How many more parameters.")] = "0%",
    max_macs: Annotated[str, typer.Option(metavar="SHARE", help="How many more multiply-accumulates.")] = "0%",
    budget: Annotated[float, typer.Option(help="Seconds after which what is not clear is inconclusive.")] = 60.0,
    threads: Threads = None,
    runtime: Runtime = None,
    runtime_option: RuntimeOptions = None,
    image_size: Which = None,
    across_machines: Annotated[bool, typer.Option("--across-machines", help="Take another machine's result.")] = False,
    update_baseline: Annotated[bool, typer.Option("--update-baseline", help="Add what passes to the store.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Append a summary, e.g. to $GITHUB_STEP_SUMMARY.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the whole result as JSON.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Is the candidate slower, larger or less accurate than allowed? Exit 0: no, 4: yes, 5: not clear."""
    from edgevit import api

    shares = {"slowdown": max_slowdown, "size": max_size, "parameters": max_parameters, "macs": max_macs}
    allowed = {f"max_{key}": parse_share(f"--max-{key}", text) for key, text in shares.items()}
    _require_places(out, markdown)
    with progress_bar() as progress:
        report = api.gate(
            baseline,
            candidate,
            **allowed,
            max_drop_points=max_drop,
            budget_s=budget,
            threads=threads,
            runtime=runtime,
            runtime_options=parse_runtime_options(runtime_option),
            image_size=parse_size(image_size),
            across_machines=across_machines,
            update_baseline=update_baseline,
            seed=seed,
            progress=progress,
        )
    emit(report, as_json, lambda shown: shown.print(plain("\n".join(report["text"]))))
    _keep(report, out, markdown)
    raise typer.Exit(EXIT_CODES[report["verdict"]])


def _require_places(*places: Path | None) -> None:
    """Directories that can be written to, or OutputError: better now than when everything has been measured."""
    for place in filter(None, places):
        if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
            raise OutputError(f"{place}: its directory is missing or cannot be written; give a file that can")


def _keep(report: dict[str, Any], out: Path | None, markdown: Path | None) -> None:
    """Write the result and append the summary, where they are wanted."""
    if out is not None:
        replace_file(out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if markdown is not None:
        try:
            with markdown.open("a", encoding="utf-8") as handle:
                handle.write(report["markdown"])
        except OSError as error:
            raise OutputError(f"{markdown}: {os_reason(error)}; give a file that can be written") from None
