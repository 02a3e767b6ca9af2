"""The GitHub Action's script, run with a stand-in for `edgevit`, and the workflows that use it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import edgevit
from edgevit.cli import app

ROOT = Path(__file__).resolve().parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text(encoding="utf-8"))
(STEP,) = ACTION["runs"]["steps"]
SCRIPT: str = STEP["run"]
GUIDE = (ROOT / "docs/gate.md").read_text(encoding="utf-8")

# Writes down its arguments, one for each line, and the files that it was asked for; ends as it was told.
STANDIN = """#!/bin/bash
printf '%s\\n' "$@" > "$TOLD"
for argument in "$@"; do
  case "$argument" in
    --markdown=*) [ -n "$SUMMARY_TEXT" ] && printf '%s\\n' "$SUMMARY_TEXT" > "${argument#*=}" ;;
    --out=*) [ -n "$REPORT_TEXT" ] && printf '%s' "$REPORT_TEXT" > "${argument#*=}" ;;
  esac
done
exit "$CODE"
"""
REPORT = {"verdict": "regression", "checks": [{"what": "size", "worse": 0.5}, {"what": "latency", "worse": 0.0625}]}


class Ran(NamedTuple):
    """What a run of the action's script came to."""

    code: int
    log: str
    arguments: list[str]
    outputs: dict[str, str]
    summary: str


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Ran]:
    """Run the script as a runner does, with these inputs, ending in `code`: `run(4, baseline="a", candidate="b")`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "edgevit").write_text(STANDIN)
    (folder / "edgevit").chmod(0o755)
    (tmp_path / "work").mkdir()

    def go(code: int, *, report: Any = REPORT, summary: str = "### the verdict", **inputs: str) -> Ran:
        values = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()}
        values |= {name.replace("_", "-"): value for name, value in inputs.items()}
        environment = {
            variable: values[re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) \}\}", expression)[1]]  # type: ignore[index]  # it matches
            for variable, expression in STEP["env"].items()
        }
        told, outputs, page = (tmp_path / name for name in ("told", "outputs", "page"))
        for path in (told, outputs, page):
            path.write_text("")
        environment |= {
            "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin",
            "RUNNER_TEMP": str(tmp_path),
            "GITHUB_OUTPUT": str(outputs),
            "GITHUB_STEP_SUMMARY": str(page),
            "TOLD": str(told),
            "CODE": str(code),
            "SUMMARY_TEXT": summary,
            "REPORT_TEXT": report if isinstance(report, str) else json.dumps(report),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", SCRIPT]  # as `shell: bash` is run there
        done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        lines = [line.partition("=") for line in outputs.read_text().splitlines()]
        return Ran(
            done.returncode,
            done.stdout + done.stderr,
            told.read_text().splitlines(),
            {key: value for key, _, value in lines},
            page.read_text(),
        )

    return go


# ---- the verdict


def test_the_command_has_every_input_and_the_two_artifacts_last(run: Callable[..., Ran]) -> None:
    ran = run(0, baseline="dist base/a", candidate="-dist", max_slowdown="3%", max_size="2%", budget="90", threads="2")
    markdown, out = (next(a for a in ran.arguments if a.startswith(f"--{name}=")) for name in ("markdown", "out"))
    assert ran.arguments == [
        "gate",
        "--max-slowdown=3%", "--max-drop=0.5", "--max-size=2%", "--max-parameters=0%", "--max-macs=0%", "--budget=90",
        markdown, out, "--threads=2", "--", "dist base/a", "-dist",
    ]  # fmt: skip
    assert ran.outputs == {
        "verdict": "pass",
        "change": "0.0625",
        "summary": markdown.partition("=")[2],
        "report": out.partition("=")[2],
    }
    assert ran.summary == "### the verdict\n"


@pytest.mark.parametrize(
    ("ends", "on_inconclusive", "code", "verdict", "note"),
    [
        (0, "fail", 0, "pass", None),
        (0, "warn", 0, "pass", None),
        (0, "pass", 0, "pass", None),
        (1, "pass", 1, "error", "::error title=edgevit gate::failed with exit code 1; the log says why"),
        (2, "warn", 2, "error", "::error title=edgevit gate::failed with exit code 2; the log says why"),
        (4, "fail", 4, "regression", "::error title=edgevit gate::regression; "),
        (4, "pass", 4, "regression", "::error title=edgevit gate::regression; "),
        (5, "fail", 5, "inconclusive", "::error title=edgevit gate::inconclusive: "),
        (5, "warn", 0, "inconclusive", "::warning title=edgevit gate::inconclusive: "),
        (5, "pass", 0, "inconclusive", None),
        (137, "pass", 137, "error", "::error title=edgevit gate::failed with exit code 137; "),
    ],
)
def test_each_exit_code_becomes_a_verdict_and_the_job_s_end(
    run: Callable[..., Ran], ends: int, on_inconclusive: str, code: int, verdict: str, note: str | None
) -> None:
    ran = run(ends, baseline="a", candidate="b", on_inconclusive=on_inconclusive)
    assert (ran.code, ran.outputs["verdict"]) == (code, verdict)
    notes = [line for line in ran.log.splitlines() if line.startswith("::")]
    assert len(notes) == (note is not None) and all(line.startswith(str(note)) for line in notes)


def test_too_noisy_a_runner_warns_unless_told_otherwise(run: Callable[..., Ran]) -> None:
    ran = run(5, baseline="a", candidate="b")
    assert ran.code == 0 and "::warning" in ran.log


@pytest.mark.parametrize(
    "report",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"checks": [3]}',
        '{"checks": []}',
        '{"checks": [{"what": "latency", "worse": NaN}]}',
        '{"checks": [{"what": "latency", "worse": 1e999}]}',
        {"checks": [{"what": "latency"}]},
        {"checks": [{"what": "latency", "worse": None}]},
        {"checks": [{"what": "latency", "worse": "x\nverdict=pass"}]},
    ],
)
def test_a_report_that_says_no_change_leaves_it_empty_and_the_verdict_as_it_is(
    run: Callable[..., Ran], report: Any
) -> None:
    ran = run(4, baseline="a", candidate="b", report=report)
    assert (ran.code, ran.outputs["verdict"], ran.outputs["change"]) == (4, "regression", "")


def test_a_gate_that_failed_early_leaves_no_files_and_says_so(run: Callable[..., Ran]) -> None:
    ran = run(1, baseline="a", candidate="b", report="", summary="")
    assert (ran.code, ran.outputs["verdict"], ran.outputs["change"], ran.summary) == (1, "error", "", "")


def test_a_missing_edgevit_is_an_error_of_its_own(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "bin/edgevit").unlink()
    ran = run(0, baseline="a", candidate="b")
    assert (ran.code, ran.outputs["verdict"]) == (127, "error")


def test_a_store_stands_in_the_baseline_s_place(run: Callable[..., Ran]) -> None:
    ran = run(0, store="baselines", candidate="b", update_baseline="true", threads="")
    assert ran.arguments[-4:] == ["--update-baseline", "--", "baselines", "b"]
    assert not any(argument.startswith("--threads") for argument in ran.arguments)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"candidate": "b"}, "baseline or store: give one of them"),
        ({"baseline": "a", "store": "s"}, "baseline and store: give one of them"),
        ({"baseline": "a", "update_baseline": "true"}, "update-baseline: give a store"),
        ({"baseline": "a", "update_baseline": "yes"}, "update-baseline: expected true or false"),
        ({"baseline": "a", "on_inconclusive": "ignore"}, "on-inconclusive: expected fail, warn or pass"),
        ({"baseline": "a", "on_inconclusive": "pass | *"}, "on-inconclusive: expected fail, warn or pass"),
        ({"baseline": "a", "on_inconclusive": ""}, "on-inconclusive: expected fail, warn or pass"),
    ],
)
def test_inputs_that_cannot_be_meant_measure_nothing(run: Callable[..., Ran], inputs: dict[str, str], why: str) -> None:
    ran = run(0, **{"candidate": "b", **inputs})
    assert (ran.code, ran.arguments, ran.outputs) == (2, [], {"verdict": "error"})
    assert ran.log == f"::error title=edgevit gate::{why}\n"


# ---- what a pull request may choose


@pytest.mark.parametrize(
    "hostile",
    [
        "$(touch bad)",
        "`touch bad`",
        "a; touch bad",
        "a' 'b",
        'a" "b',
        "a\\",
        "*",
        "~",
        "-rf",
        "a && touch bad",
        "${PATH}",
    ],
)
def test_an_input_is_one_word_whatever_it_holds(run: Callable[..., Ran], hostile: str, tmp_path: Path) -> None:
    every = {name.replace("-", "_"): hostile for name in ACTION["inputs"] if name.startswith(("max-", "budget", "thr"))}
    ran = run(0, baseline=hostile, candidate=hostile, **every)
    assert ran.arguments[-3:] == ["--", hostile, hostile]
    assert f"--max-drop={hostile}" in ran.arguments and len(ran.arguments) == 13
    assert list((tmp_path / "work").iterdir()) == []
    assert set(ran.outputs) == {"verdict", "change", "summary", "report"}


def test_a_module_in_the_workspace_is_not_run_by_the_action(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "work/json.py").write_text("raise SystemExit('run')")
    assert run(4, baseline="a", candidate="b").outputs["change"] == "0.0625"


# ---- the files themselves


def scripts(document: Any) -> list[str]:
    """Every script of a workflow or an action."""
    jobs = document.get("jobs", {"only": document.get("runs")})
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def pages() -> dict[str, str]:
    """Every workflow here and in the documents, by where it stands."""
    found = {"own": (ROOT / ".github/workflows/throughput.yml").read_text(encoding="utf-8")}
    for page in ("README.md", "docs/gate.md"):
        blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
        found |= {f"{page} {i}": block for i, block in enumerate(blocks)}
    return found


def test_each_input_reaches_the_script_by_the_environment_alone() -> None:
    assert sorted(STEP["env"].values()) == sorted(f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"])
    assert "${{" not in SCRIPT


def test_outputs_are_those_the_script_writes() -> None:
    written = set(re.findall(r'echo "(\w+)=\$', SCRIPT))
    assert written == set(ACTION["outputs"])
    assert all(f"steps.gate.outputs.{name} " in spec["value"] for name, spec in ACTION["outputs"].items())


def test_every_option_of_the_script_is_one_of_the_command() -> None:
    verbs: Any = typer.main.get_command(app)
    assert "gate" in verbs.commands
    known = {name for parameter in verbs.commands["gate"].params for name in parameter.opts}
    assert set(re.findall(r"(--[a-z]+(?:-[a-z]+)*)[=)]", SCRIPT)) <= known


@pytest.mark.parametrize("where", pages())
def test_a_workflow_gives_the_action_inputs_that_it_has(where: str) -> None:
    document = yaml.safe_load(pages()[where])
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    uses = [step for step in steps if step.get("uses", "").split("@")[0].endswith("/.github/actions/gate")]
    assert uses
    needed = {name for name, spec in ACTION["inputs"].items() if spec.get("required")}
    for step in uses:
        assert needed <= set(step["with"]) <= set(ACTION["inputs"])
        assert ("baseline" in step["with"]) != ("store" in step["with"])


@pytest.mark.parametrize("where", pages())
def test_a_workflow_has_few_rights_and_runs_no_text_of_a_pull_request(where: str) -> None:
    document = yaml.safe_load(pages()[where])
    assert document["permissions"]["contents"] == "read"
    assert set(document["permissions"]) <= {"contents", "pull-requests"}
    triggers = document[True]  # YAML 1.1 reads the key `on` as true
    assert "pull_request_target" not in triggers and "workflow_run" not in triggers
    assert all("${{" not in script for script in scripts(document))


@pytest.mark.parametrize("where", ["action", *pages()])
def test_a_script_is_what_shellcheck_has_nothing_against(where: str, tmp_path: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")  # where pip puts it, which need not be on the PATH
    checker = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if checker is None:
        pytest.skip("shellcheck is not installed; the scripts of the gate's workflows were not checked")
    for script in scripts(ACTION if where == "action" else yaml.safe_load(pages()[where])):
        (tmp_path / "script.sh").write_text(f"#!/bin/bash\n{script}")
        done = subprocess.run([checker, str(tmp_path / "script.sh")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("where", pages())
def test_each_command_of_a_workflow_exists_with_its_options(where: str) -> None:
    verbs: Any = typer.main.get_command(app)
    for script in scripts(yaml.safe_load(pages()[where])):
        for verb, rest in re.findall(r"edgevit\"? ([a-z]+)(.*)", script):
            known = {name for parameter in verbs.commands[verb].params for name in parameter.opts}
            assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known


def test_the_guide_s_links_resolve() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", GUIDE) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


# ---- the example for pytest


@pytest.mark.parametrize(("verdict", "fails"), [("pass", False), ("inconclusive", False), ("regression", True)])
def test_the_example_for_pytest_fails_on_a_regression_alone(
    monkeypatch: pytest.MonkeyPatch, verdict: str, fails: bool
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    report = {"verdict": verdict, "checks": [{"what": "latency", "worse": 0.1}], "causes": (), "smallest_seen": 0.02}
    asked: list[Any] = []
    monkeypatch.setattr(
        edgevit, "gate", lambda *pair, **request: asked.append((pair, request)) or report, raising=False
    )
    names: dict[str, Any] = {}
    exec(code, names)
    test = names["test_the_new_model_is_not_slower"]
    if fails:
        with pytest.raises(AssertionError):
            test()
    else:
        test()
    assert asked[0][1] == {"max_slowdown": 0.05, "budget_s": 60}
