"""What a gate found, for a person: lines for a terminal, Markdown for a pull request.

Names and reasons come from manifests, directories and stores, so that whoever opens a pull request may have chosen
them. In Markdown they can neither leave their line or cell, nor make a link, a mention, HTML or a picture.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from edgevit.specs import Check, GateReport

TITLES = {"latency": "latency", "accuracy": "accuracy", "size": "size", "parameters": "parameters", "macs": "MACs"}
FLAGS = {  # of the command that repeats a gate
    "latency": "--max-slowdown", "accuracy": "--max-drop", "size": "--max-size", "parameters": "--max-parameters",
    "macs": "--max-macs",
}  # fmt: skip
COLUMNS = ("what", "baseline", "candidate", "change", "allowed", "verdict")
SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))  # decimal, as sizes of files and MACs are told
LONGEST = 300  # characters of a name or reason; a longer one is cut
ZERO_WIDTH = "&#8203;"  # a space that is not seen
SPECIAL = re.compile(r"://|www\.|GH-|[&<>@#\\`*_\[\]~|$]", re.IGNORECASE)  # what GitHub's Markdown takes for its own
STARTS_A_LIST = re.compile(r"[-+=]|\d+[.)](\s|$)")


def text(report: GateReport) -> tuple[str, ...]:
    """The lines of a report for a terminal, nothing escaped: the caller's console knows what it must not print."""
    rows = [COLUMNS, *(_row(check) for check in report.checks)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return (
        f"{report.verdict}: {_headline(report, report.baseline, report.candidate)}",
        *table,
        *(f"{TITLES[check.what]}: {check.detail}" for check in report.checks if check.detail),
        _effort(report),
        *(f"likely cause: {cause}" for cause in report.causes),
        *(f"warning: {warning}" for warning in report.warnings),
    )


def markdown(report: GateReport, machine: Mapping[str, Any], options: Sequence[str] = ()) -> str:
    """The report for a pull request or $GITHUB_STEP_SUMMARY, in GitHub's Markdown.

    Args:
        report: what the gate found.
        machine: the record of `machine.machine_record`.
        options: what the command line had beside the limits, e.g. ("--threads", "1"), for repeating it.
    """
    names = _code(report.baseline), _code(report.candidate)
    rows = [f"| {' | '.join(_marked(check))} |" for check in report.checks]
    notes = [f"- {TITLES[c.what]}: {_prose(c.detail)}" for c in report.checks if c.detail]
    parts = [
        f"### edgevit gate: {report.verdict}",
        _headline(report, *names),
        "\n".join((f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|---:|---|", *rows)),
        *(["\n".join(notes)] if notes else []),
        _effort(report),
        *_listed("Likely causes:", report.causes),
        *_listed("Warnings:", report.warnings),
        f"Measured on {_prose(_described(machine))}. To repeat it:",
        _fenced(_command(report, options)),
    ]
    return "\n\n".join(parts) + "\n"


def _headline(report: GateReport, baseline: str, candidate: str) -> str:
    """One sentence: what decided."""
    deciding = [TITLES[check.what] for check in report.checks if check.verdict == report.verdict]
    against = f"{candidate} against {baseline}"
    if report.verdict == "regression":
        return f"{against}: {_and(deciding)} beyond what is allowed"
    if report.verdict == "inconclusive" and report.rounds == 0:
        return f"{against}: not clear from what is stored; measure one of them again with a longer --budget"
    if report.verdict == "inconclusive":
        return f"{against}: not clear within the budget; a longer --budget or a quieter machine helps"
    skipped = [TITLES[check.what] for check in report.checks if check.verdict == "not gated"]
    but = f", {_and(skipped)} not gated" if skipped else ""
    return f"{against}: nothing beyond what is allowed{but}"


def _and(words: Sequence[str]) -> str:
    """latency, size and parameters; each once."""
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} and {last}" if most else last


def _row(check: Check) -> tuple[str, ...]:
    """The cells of a check, in the order of COLUMNS."""
    return (
        TITLES[check.what],
        _amount(check, check.baseline),
        _amount(check, check.candidate),
        _change(check),
        f"-{check.limit:g} points" if check.what == "accuracy" else f"+{100 * check.limit:g} %",
        check.verdict,
    )


def _marked(check: Check) -> tuple[str, ...]:
    """The same for Markdown: what decides against the candidate stands out."""
    *cells, verdict = _row(check)
    return *cells, f"**{verdict}**" if verdict in ("regression", "inconclusive") else verdict


def _amount(check: Check, value: float | None) -> str:
    """A figure with its unit; whole numbers exactly, since the smallest change of them counts."""
    if value is None:
        return "n/a"
    if check.what == "latency":
        return f"{value:.3f} ms" if value < 100 else f"{value:.1f} ms"
    if check.what == "accuracy":
        return f"{value:.2f} %"
    if check.what == "size":
        scale, prefix = next(((s, p) for s, p in SCALES if value >= s), (1.0, ""))
        return f"{value / scale:.2f} {prefix}B" if prefix else f"{value:.0f} B"
    return f"{value:,.0f}"


def _change(check: Check) -> str:
    """How much the figure moved, with its interval: more time is "+", lost accuracy is "-"."""
    if check.worse is None:
        return "n/a"
    accuracy = check.what == "accuracy"
    factor, unit = (-1.0, "points") if accuracy else (100.0, "%")
    moved, ends = factor * check.worse, None
    if check.low is not None and check.high is not None:
        ends = sorted((factor * check.low, factor * check.high))
    digits = 2 if accuracy or 0 < abs(moved) < 1 else 1
    shown = f"{_signed(moved, digits)} {unit}"
    return shown if ends is None else f"{shown} [{', '.join(_signed(end, digits) for end in ends)}]"


def _signed(value: float, digits: int) -> str:
    """+1.2 or -1.2; 0.0 without a sign, and what rounds to it as "+0.0"."""
    shown = f"{abs(value):.{digits}f}"
    return shown if value == 0 else f"{'+' if value > 0 else '-'}{shown}"


def _effort(report: GateReport) -> str:
    """How it was compared, how long that took, and what it could have seen."""
    if report.rounds == 0:
        return "Compared as stored, by the ratios to the reference workload; nothing was measured."
    how = {"clear": "stopped when the answer was clear", "budget": "stopped by the budget"}[report.stopped_by]
    through = "side by side" if report.compared == "side by side" else "through the reference workload"
    seen = report.smallest_seen
    least = "" if seen is None else f" In 4 of 5 such gates it would find a slowdown of {100 * seen:.1f} % or more."
    rounds = "1 round" if report.rounds == 1 else f"{report.rounds} rounds"
    return f"{rounds} {through} in {report.spent_s:.0f} s, {how}.{least}"


def _described(machine: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    cores = machine.get("affinity_cores", machine.get("logical_cores"))
    words = [str(machine.get("cpu_model", "an unknown CPU")), f"{cores} cores" if cores is not None else ""]
    limit = machine.get("container_cpu_limit")
    words += [f"a container's limit of {limit} cores" if limit is not None else "", str(machine.get("system", ""))]
    return ", ".join(word for word in words if word)


def _command(report: GateReport, options: Sequence[str]) -> str:
    """What to type to repeat it, safe to paste into a shell."""
    limits: dict[str, str] = {}
    for check in report.checks:
        limit = f"{check.limit:g}" if check.what == "accuracy" else f"{100 * check.limit:g}%"
        limits.setdefault(FLAGS[check.what], limit)
    words = [*(word for pair in limits.items() for word in pair), *options, "--", report.baseline, report.candidate]
    return f"edgevit gate {' '.join(shlex.quote(word) for word in words)}"


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return ["\n".join((title, "", *(f"- {_prose(line)}" for line in lines)))] if lines else []


def _visible(value: str) -> str:
    """One line of printable characters, at most LONGEST; the rest as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def _prose(value: str) -> str:
    """Text as itself: no markup, no HTML, and nothing that GitHub makes a link, a mention or a list of.

    A zero-width space parts what would be one, as Dependabot does it.
    """
    shown = SPECIAL.sub(_harmless, _visible(value))
    return f"{ZERO_WIDTH}{shown}" if STARTS_A_LIST.match(shown) else shown


def _harmless(found: re.Match[str]) -> str:
    """What stands for a match of SPECIAL."""
    special = found[0]
    if special in "&<>":
        return f"&#{ord(special)};"
    if special in ("@", "#"):
        return f"{special}{ZERO_WIDTH}"
    if len(special) > 1:  # :// after its colon, www. and GH- before their last
        cut = 1 if special == "://" else -1
        return special[:cut] + ZERO_WIDTH + special[cut:]
    return f"\\{special}"


def _code(value: str) -> str:
    """A name as a code span, which nothing in it ends."""
    shown = _visible(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(line: str) -> str:
    """A block of code, which nothing in it ends."""
    shown = "".join(c if c.isprintable() else "?" for c in line)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}sh\n{shown}\n{fence}"
