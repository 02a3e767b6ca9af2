"""The command line: arguments -> one api call -> lines or one JSON document; exit codes; progress. Nothing else.

Exit codes: 0 done, 1 failed, 2 usage, 3 not equal to the reference, 4 regression, 5 inconclusive, 128 + n signal n.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
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
from typer.exceptions import TyperException

from edgevit.arguments import parse_batch, parse_options, parse_size, parse_sizes
from edgevit.errors import EdgevitError, UsageError
from edgevit.specs import size_text

app = typer.Typer(
    name="edgevit",
    help="Vision transformers on edge devices: export, verify, run, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True, highlight=False)
PIPE_WIDTH = 200  # columns where no terminal limits them: tables are not cut off in a log

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="What the family takes beside.")
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
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory that `edgevit export` wrote.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads inside an operator; default: all cores.")]


def main() -> None:
    """Run the command line; a failure is one message and an exit code, never a traceback without --debug."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    try:
        sys.exit(app(standalone_mode=False))
    except EdgevitError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except _Interrupted as interrupt:
        _fail("interrupted; nothing half written was left behind", 128 + interrupt.number)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout went away; Python would complain about it on exit
        sys.exit(1)
    except TyperException as error:  # the parser's: it shows the usage beside its message, on stderr
        if "--json" in sys.argv:
            _print_error(error.format_message(), error.exit_code)
        if hasattr(error, "show"):
            error.show()
        sys.exit(error.exit_code)
    except Exception as error:  # a bug of edgevit: the user gets one line and a way to see more
        if debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error}; run again with --debug and report what it prints", 1)


class _Interrupted(BaseException):
    """Ctrl-C or a termination request; not an Exception, so that every `finally` runs and no handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: object) -> None:
    for repeated in (signal.SIGINT, signal.SIGTERM):
        signal.signal(repeated, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
    raise _Interrupted(number)


def _fail(message: str, code: int) -> None:
    if "--json" in sys.argv:
        _print_error(message, code)
    err.print(f"edgevit: {plain(message)}", soft_wrap=True)
    sys.exit(code)


def _print_error(message: str, code: int) -> None:
    print(json.dumps({"error": {"message": message, "exit_code": code}}, indent=2))


def plain(text: str) -> str:
    """Text from outside for a terminal: no markup of Rich's, no control sequence of the terminal's."""
    return escape("".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text))


def _emit(document: dict[str, Any] | list[Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """The document as JSON, or `show` it for a person."""
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        show(Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH))


@contextmanager
def _progress() -> Iterator[Callable[[float, str], None]]:
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


@app.command("list", epilog="Example: edgevit list --family mobile_former")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Json = False,
) -> None:
    """List the registered models."""
    from edgevit import api

    names = api.list_models(pattern, family)
    _emit({"models": names}, as_json, lambda out: out.print("\n".join(names)))


@app.command(epilog="Example: edgevit info mobileformer_294m --image-size 256x320")
def info(model: str, image_size: Size = None, option: Options = None, as_json: Json = False) -> None:
    """Parameters, MACs and FLOPs beside the paper's figures, options and notes of a model."""
    from edgevit import api

    document = api.info(model, parse_size(image_size), parse_options(option))
    _emit(document, as_json, lambda out: _show_info(out, document))


def _show_info(out: Console, document: dict[str, Any]) -> None:
    paper, gaps = dict(document["paper"]), document["gaps"]
    flops = f"{paper.pop('flops')} multiply-adds" if "flops" in paper else ""  # papers call them FLOPs
    rows = (
        ("parameters", f"{document['parameters']:,}", str(paper.pop("parameters", "")), gaps["parameters"]),
        ("MACs", f"{document['macs'] / 1e6:,.2f} M at {size_text(document['image_size'])}", flops, gaps["macs"]),
        ("FLOPs", f"{document['flops'] / 1e6:,.2f} M (2 x MACs)", "", None),
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "counted", "paper", "gap"):
        table.add_column(column)
    for label, counted, printed, gap in rows:
        missing = "n/a (of another size or options)" if printed else ""
        table.add_row(label, counted, printed, missing if gap is None else f"{gap:+.1f} %")
    out.print(f"{document['model']}  {document['title']}\n{document['url']}  {document['origin']}")
    out.print(table)
    if paper:
        out.print("paper       " + ", ".join(f"{key} {value}" for key, value in paper.items()))
    out.print(plain("options     " + ", ".join(f"{key}={value}" for key, value in document["options"].items())))
    for note in document["notes"]:
        out.print(plain(f"note        {note}"))


@app.command(epilog="Example: edgevit doctor --json")
def doctor(as_json: Json = False) -> None:
    """What works on this machine, and what to type for what does not."""
    from edgevit import api

    document = api.doctor()

    def show(out: Console) -> None:
        out.print(f"edgevit {document['edgevit']}, Python {document['python']}")
        for check in document["checks"]:
            state = "ok" if check["ok"] else plain(f"not available: {check['problem']}")
            out.print(f"{check['kind']:8} {check['name']:10} {state}")
        for key, value in document["machine"].items():
            out.print(plain(f"{key}: {value}"))

    _emit(document, as_json, show)
    if not document["ok"]:
        raise typer.Exit(1)


@app.command(
    epilog="Example: edgevit export crossformer_s --to onnx --weights official.pth --image-size 224x224,448x448"
)
def export(
    model: str,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="Target, e.g. onnx.")],
    precision: Annotated[str, typer.Option(help="fp32.")] = "fp32",
    weights: Weights = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the last layer; default: the checkpoint's.")
    ] = None,
    image_size: Sizes = None,
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Pictures an inference takes.")] = "1",
    features_only: Annotated[bool, typer.Option(help="Export the backbone's maps instead of logits.")] = False,
    option: Options = None,
    pointwise: Annotated[str, typer.Option(help="auto, dense or grouped 1x1 convolutions.")] = "auto",
    out: Annotated[Path, typer.Option(help="Directory in which the artifact is made.")] = Path("dist"),
    force: Annotated[bool, typer.Option(help="Replace an artifact that exists.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights, where none are given.")] = 0,
    as_json: Json = False,
) -> None:
    """Export a model to a target, prove it equal to the reference, write the artifact."""
    from edgevit import api

    with _progress() as progress:
        artifact = api.export_model(
            model,
            to,
            weights=weights,
            num_classes=num_classes,
            precision=precision,
            image_size=parse_sizes(image_size),
            batch=parse_batch(batch),  # type: ignore[arg-type]  # the only text it returns is "dynamic"
            features_only=features_only,
            options=parse_options(option),
            pointwise=pointwise,  # type: ignore[arg-type]  # the exporter checks it
            out=out,
            force=force,
            seed=seed,
            command=shlex.join(["edgevit", *sys.argv[1:]]),
            progress=progress,
        )
    kept = ("parity", "certificates", "files", "weights", "notes", "complexity", "choices", "resolutions")
    known = {key: artifact.manifest[key] for key in kept if key in artifact.manifest}
    document = {"artifact": str(artifact.path), **known}
    _emit(document, as_json, lambda console: _show_export(console, document))


def _show_export(out: Console, document: dict[str, Any]) -> None:
    out.print(plain(document["artifact"]))
    sizes = document.get("resolutions", [document])
    for size in sizes:
        if len(sizes) > 1:
            out.print(plain(f"image size  {size_text(size['image_size'])}: {size['model_file']}"))
        for certificate in size["certificates"]:
            out.print(
                f"rewrite     {certificate['rewrite']}: {certificate['places']} places, operations "
                f"{certificate['operations_before']} -> {certificate['operations_after']}, "
                f"difference {certificate['max_rel']:.0e} (float64)"
            )
        if complexity := size["complexity"]:
            out.print(f"deployed    {complexity['parameters']:,} parameters, {complexity['macs'] / 1e6:,.2f} M MACs")
        if len(sizes) > 1:
            out.print(_parity_line(size["parity"], "reference"))
    _show_weights(out, document["weights"])
    for note in document["notes"]:
        out.print(plain(f"note        {note}"))
    if len(sizes) == 1:
        out.print(_parity_line(document["parity"], "reference"))


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
        f"max abs {parity['max_abs']:.1e} (limit {parity['max_abs_limit']:.0e}), cosine {parity['cosine']:.7f}{top1}"
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

    _emit(document, as_json, show)


@app.command(epilog="Example: edgevit run dist/mobileformer_294m-onnx-fp32 photo.jpg --labels imagenet.txt")
def run(
    artifact: ArtifactPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    labels: Annotated[Path | None, typer.Option(help="A text file with one class name a line, or JSON.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    image_size: Which = None,
    as_json: Json = False,
) -> None:
    """Classify pictures."""
    from edgevit import api

    document = api.predict(artifact, images, labels, top, parse_size(image_size))

    def show(out: Console) -> None:
        for prediction in document["predictions"]:
            table = Table(title=plain(prediction["image"]), title_justify="left", box=None)
            table.add_column("class", justify="right")
            table.add_column("label")
            table.add_column("probability", justify="right")
            for row in prediction["top"]:
                table.add_row(str(row["class"]), plain(row["label"]), f"{row['probability']:.2%}")
            out.print(table)
        if document["random_weights"]:
            out.print("the weights are random: these predictions mean nothing")

    _emit(document, as_json, show)


@app.command(epilog="Example: edgevit bench mobileformer_26m --vs naive --threads 1 --duration 20")
def bench(
    items: Annotated[list[str], typer.Argument(metavar="ARTIFACT|MODEL...", help="Raced against each other.")],
    image_size: Which = None,
    threads: Threads = None,
    duration: Annotated[float, typer.Option(help="Seconds for each contestant.")] = 5.0,
    loads: Annotated[int, typer.Option(min=1, help="How often each is loaded afresh; one load may be luckier.")] = 3,
    vs: Annotated[str | None, typer.Option(help="naive: race each against PyTorch's own export.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Another runtime than the target's own: ov for OpenVINO.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of turns and the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Time artifacts in interleaved rounds; ratios with intervals."""
    from edgevit import api

    if vs not in (None, "naive"):
        raise UsageError(f"--vs {vs!r}: expected naive")
    with _progress() as progress:
        document = api.benchmark(
            items,
            image_size=parse_size(image_size),
            threads=threads,
            duration_s=duration,
            loads=loads,
            vs="naive" if vs else None,
            runtime=runtime,
            seed=seed,
            progress=progress,
        )

    def show(out: Console) -> None:
        table = Table(box=None)
        for column in ("name", "precision", "p50 ms", "p90 ms", "p99 ms", "runs"):
            table.add_column(column, justify="left" if column in ("name", "precision") else "right", no_wrap=True)
        for result in document["results"]:
            cells = [result["latency_text"][q] for q in ("p50", "p90", "p99")]
            table.add_row(plain(result["name"]), result["effective_precision"], *cells, str(len(result["samples_ms"])))
        out.print(table)
        for comparison in document["comparisons"]:
            names = f"{comparison['candidate']} against {comparison['baseline']}"
            out.print(plain(f"{names}: {comparison['verdict']}"))
        for warning in document["warnings"]:
            err.print(plain(f"warning: {warning}"), soft_wrap=True)

    _emit(document, as_json, show)
