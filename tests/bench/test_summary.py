"""A report as lines and as Markdown, to the letter; and names that try to be more than names."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

import pytest

from edgevit.bench.summary import markdown, text
from edgevit.specs import Check, GateReport

MACHINE = {"cpu_model": "Some CPU", "logical_cores": 8, "affinity_cores": 2, "system": "Linux"}
CHECKS = (
    Check("latency", "regression", "ms", 5.0, 5.31, 0.062, 0.05, 0.0521, 0.0712),
    Check("accuracy", "pass", "%", 75.0, 74.75, 0.25, 0.5, -0.1, 0.62, "top-1 of the same 2,000 pictures of val"),
    Check("size", "pass", "bytes", 12_900_000, 12_900_640, 640 / 12_900_000, 0.01),
    Check("parameters", "pass", "parameters", 3_237_203, 3_237_203, 0.0, 0.0),
    Check("macs", "not gated", "MACs", 6_773_296, None, None, 0.0, detail="not in the manifest of the candidate"),
)
REPORT = GateReport(
    verdict="regression",
    baseline="dist-base/net",
    candidate="dist-head/net",
    checks=CHECKS,
    compared="side by side",
    rounds=24,
    spent_s=31.4,
    stopped_by="clear",
    smallest_seen=0.0613,
    log_ratios=(0.06,) * 24,
    causes=("steal: 3.1 % of the CPU time was taken away by the hypervisor",),
    warnings=("the candidate is of another precision",),
)


def changed(**other: Any) -> GateReport:
    return dataclasses.replace(REPORT, **other)


def with_check(check: Check) -> GateReport:
    verdict: Any = "pass" if check.verdict == "not gated" else check.verdict
    return changed(verdict=verdict, checks=(check,))


def test_lines_for_a_terminal() -> None:
    assert "\n".join(text(REPORT)) == (
        "regression: dist-head/net against dist-base/net: latency beyond what is allowed\n"
        "what         baseline  candidate                       change      allowed  verdict\n"
        "latency      5.000 ms   5.310 ms          +6.2 % [+5.2, +7.1]         +5 %  regression\n"
        "accuracy      75.00 %    74.75 %  -0.25 points [-0.62, +0.10]  -0.5 points  pass\n"
        "size         12.90 MB   12.90 MB                      +0.00 %         +1 %  pass\n"
        "parameters  3,237,203  3,237,203                        0.0 %         +0 %  pass\n"
        "MACs        6,773,296        n/a                          n/a         +0 %  not gated\n"
        "accuracy: top-1 of the same 2,000 pictures of val\n"
        "MACs: not in the manifest of the candidate\n"
        "24 rounds side by side in 31 s, stopped when the answer was clear. In 4 of 5 such gates it would find a "
        "slowdown of 6.1 % or more.\n"
        "likely cause: steal: 3.1 % of the CPU time was taken away by the hypervisor\n"
        "warning: the candidate is of another precision"
    )


def test_markdown_for_a_pull_request() -> None:
    assert markdown(REPORT, MACHINE, ("--threads", "1")) == (
        "### edgevit gate: regression\n"
        "\n"
        "`dist-head/net` against `dist-base/net`: latency beyond what is allowed\n"
        "\n"
        "| what | baseline | candidate | change | allowed | verdict |\n"
        "|---|---:|---:|---:|---:|---|\n"
        "| latency | 5.000 ms | 5.310 ms | +6.2 % [+5.2, +7.1] | +5 % | **regression** |\n"
        "| accuracy | 75.00 % | 74.75 % | -0.25 points [-0.62, +0.10] | -0.5 points | pass |\n"
        "| size | 12.90 MB | 12.90 MB | +0.00 % | +1 % | pass |\n"
        "| parameters | 3,237,203 | 3,237,203 | 0.0 % | +0 % | pass |\n"
        "| MACs | 6,773,296 | n/a | n/a | +0 % | not gated |\n"
        "\n"
        "- accuracy: top-1 of the same 2,000 pictures of val\n"
        "- MACs: not in the manifest of the candidate\n"
        "\n"
        "24 rounds side by side in 31 s, stopped when the answer was clear. In 4 of 5 such gates it would find a "
        "slowdown of 6.1 % or more.\n"
        "\n"
        "Likely causes:\n"
        "\n"
        "- steal: 3.1 % of the CPU time was taken away by the hypervisor\n"
        "\n"
        "Warnings:\n"
        "\n"
        "- the candidate is of another precision\n"
        "\n"
        "Measured on Some CPU, 2 cores, Linux. To repeat it:\n"
        "\n"
        "```sh\n"
        "edgevit gate --max-slowdown 5% --max-drop 0.5 --max-size 1% --max-parameters 0% --max-macs 0% --threads 1 -- "
        "dist-base/net dist-head/net\n"
        "```\n"
    )


def test_what_is_not_there_is_not_mentioned() -> None:
    bare = changed(verdict="pass", checks=(), causes=(), warnings=(), smallest_seen=None, rounds=1, stopped_by="budget")
    assert markdown(bare, {}) == (
        "### edgevit gate: pass\n\n`dist-head/net` against `dist-base/net`: nothing beyond what is allowed\n\n"
        "| what | baseline | candidate | change | allowed | verdict |\n|---|---:|---:|---:|---:|---|\n\n"
        "1 round side by side in 31 s, stopped by the budget.\n\n"
        "Measured on an unknown CPU. To repeat it:\n\n```sh\nedgevit gate -- dist-base/net dist-head/net\n```\n"
    )


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (("regression", "regression", "pass", "regression", "pass"), "latency, accuracy and parameters beyond what is"),
        (("pass", "pass", "pass", "pass", "pass"), "nothing beyond what is allowed"),
        (("pass", "not gated", "pass", "pass", "not gated"), "nothing beyond what is allowed, accuracy and MACs not"),
        (("inconclusive", "pass", "pass", "pass", "pass"), "not clear within the budget; a longer --budget or a quie"),
    ],
)
def test_the_first_line_says_what_decided(verdicts: tuple[Any, ...], said: str) -> None:
    checks = tuple(dataclasses.replace(c, verdict=v) for c, v in zip(CHECKS, verdicts, strict=True))
    verdict: Any = next((v for v in ("regression", "inconclusive") if v in verdicts), "pass")
    report = changed(verdict=verdict, checks=checks)
    assert said in text(report)[0] and said in markdown(report, MACHINE).splitlines()[2]


def test_two_sets_of_pictures_are_one_word_in_the_sentence_and_one_flag() -> None:
    twice = dataclasses.replace(CHECKS[1], verdict="regression")
    report = changed(checks=(twice, twice))
    assert "net: accuracy beyond what is allowed" in text(report)[0]
    assert markdown(report, {}).count("--max-drop") == 1


@pytest.mark.parametrize(
    ("check", "cells"),
    [
        (Check("latency", "pass", "ms", 0.0512, 0.05, -0.0234, 0.03), "0.051 ms | 0.050 ms | -2.3 % | +3 %"),
        (Check("latency", "pass", "ms", 512.0, 1234.5, 1.41, 0.03), "512.0 ms | 1234.5 ms | +141.0 % | +3 %"),
        (Check("latency", "inconclusive", "ms", 5.0, 5.0, 0.0, 0.05, -0.02, 0.07), "0.0 % [-2.0, +7.0] | +5 % | **inc"),
        (Check("size", "regression", "bytes", 0, 999, None, 0.01), "0 B | 999 B | n/a | +1 % | **regression**"),
        (Check("size", "pass", "bytes", 1000, 2.5e9, 0.004, 0.125), "1.00 kB | 2.50 GB | +0.40 % | +12.5 %"),
        (Check("accuracy", "pass", "%", 75.0, 76.0, -1.0, 0.0, -2.0, 0.5), "+1.00 points [-0.50, +2.00] | -0 points"),
        (
            Check("parameters", "regression", "parameters", 10**9, 10**9 + 1, 1e-9, 0.0),
            "1,000,000,001 | +0.00 % | +0 %",
        ),
    ],
)
def test_figures_are_rounded_only_here_and_keep_their_sign(check: Check, cells: str) -> None:
    assert cells in markdown(with_check(check), MACHINE)


def test_a_stored_baseline_says_how_it_was_compared() -> None:
    assert "24 rounds through the reference workload in 31 s" in text(changed(compared="reference workload"))[-3]


# ---- names that try to be more

HOSTILE = [
    "a|b|c",
    "`code`",
    "a``b`",
    "` `",
    "",
    "   ",
    "line\nbreak\r\n| x | y |\n# heading",
    "<script>alert(1)</script><img src=x onerror=y>",
    "[click](https://evil.example)![](http://evil.example/p.png)",
    "@someone #1 GH-12 www.evil.example https://evil.example a@b.example",
    "```\nend",
    "\x1b[31mred\x1b[0m\x00\u202edlrow",
    "$(rm -rf ~); `reboot`",
    "'; reboot; '",
    "--out=/etc/passwd",
    "\\",
    "**bold** __x__ ~~y~~ $z$ &lt;",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_its_code_span_and_line(name: str) -> None:
    lines = markdown(changed(baseline=name, candidate=name), MACHINE).splitlines()
    assert len(lines) == len(markdown(REPORT, MACHINE).splitlines())
    headline = lines[2]
    span = r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)"  # as CommonMark finds a code span
    outside = re.sub(span, "CODE", headline)
    assert outside == "CODE against CODE: latency beyond what is allowed"
    assert headline.isprintable() and len(headline) < 1000


@pytest.mark.parametrize("name", HOSTILE)
def test_the_command_to_repeat_it_gives_a_shell_two_words(name: str) -> None:
    told = markdown(changed(baseline=name, candidate="--help"), MACHINE)
    fence, command, end = re.findall(r"^(`{3,})sh\n(.*)\n(`{3,})\n\Z", told, re.M)[0]
    assert fence == end and fence not in command
    words = shlex.split(command)
    assert words[-3:] == ["--", "".join(c if c.isprintable() else "?" for c in name), "--help"]


def reasons(reason: str) -> str:
    """Markdown with `reason` wherever text is taken as it comes."""
    check = dataclasses.replace(CHECKS[1], detail=reason)
    report = changed(verdict="pass", checks=(check,), causes=(reason,), warnings=(reason,))
    return markdown(report, {**MACHINE, "cpu_model": reason})


@pytest.mark.parametrize("reason", [each for each in HOSTILE if each])
def test_a_hostile_reason_is_text_and_nothing_else(reason: str) -> None:
    told = reasons(reason)
    assert len(told.splitlines()) == len(reasons("harmless").splitlines())
    body = "\n".join(told.splitlines()[7:-4])  # after the table, before the command
    assert not re.search(r"<[a-z/!]|(?<!\\)[`*_\[\]|~$]|@(?!&)|#(?!&#8203;|\d+;)|://|www\.|GH-\d", body, re.IGNORECASE)
    assert len(told) < 3000


def test_a_reason_reads_as_it_was_written() -> None:
    cause = "a_b | <c> @d #1 https://e.example"
    line = next(line for line in markdown(changed(causes=(cause,)), {}).splitlines() if "a\\_b" in line)
    assert line == r"- a\_b \| &#60;c&#62; @&#8203;d #&#8203;1 https:&#8203;//e.example"


def test_a_reason_that_begins_with_a_number_is_left_alone() -> None:
    assert "\n- 31.6% of the CPU time\n" in markdown(changed(causes=("31.6% of the CPU time",)), {})


@pytest.mark.parametrize("cause", ["---", "1.", "- x", "1. x", "12) x", "+ x", "=== x"])
def test_a_reason_does_not_begin_a_list_in_the_list(cause: str) -> None:
    assert f"\n- &#8203;{cause}\n" in markdown(changed(causes=(cause,)), {})
