"""The verbs that tell what there is: list, info, doctor."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edgevit.specs import size_text

from .arguments import parse_options, parse_size
from .shell import Json, Options, Size, app, emit, plain


@app.command("list", epilog="Example: edgevit list --family mobile_former")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Json = False,
) -> None:
    """List the registered models."""
    from edgevit import api

    names = api.list_models(pattern, family)
    emit({"models": names}, as_json, lambda out: out.print("\n".join(names)))


@app.command(epilog="Example: edgevit info mobileformer_294m --image-size 256x320")
def info(model: str, image_size: Size = None, option: Options = None, as_json: Json = False) -> None:
    """Parameters, MACs and FLOPs beside the paper's figures, options and notes of a model."""
    from edgevit import api

    document = api.info(model, parse_size(image_size), parse_options(option))
    emit(document, as_json, lambda out: _show_info(out, document))


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
            _show_check(out, check)
        for key, value in document["machine"].items():
            out.print(plain(f"{key}: {value}"))

    emit(document, as_json, show)
    if not document["ok"]:
        raise typer.Exit(1)


def _show_check(out: Console, check: dict[str, Any]) -> None:
    """One target with a line for each ability, or one runtime."""
    name = f"{check['kind']:8} {check['name']:13}"
    if not check["ok"]:
        out.print(f"{name} " + plain(f"not available: {check['problem']}"))
    elif check["kind"] == "runtime":
        out.print(f"{name} " + plain(f"not here: {check['obstacle']}" if check["obstacle"] else "ok"))
    for ability in check.get("abilities", []):
        state = f"yes: {ability['detail']}" if ability["ok"] else f"no: {ability['detail']}"
        out.print(f"{name} {ability['what']:6} " + plain(state + (f"; {ability['how']}" if ability["how"] else "")))
