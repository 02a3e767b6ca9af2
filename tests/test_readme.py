"""The README's examples run and its links resolve."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the photographs lie where the README says."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "edgevit" / "photos", place / "edgevit" / "photos")
    return place


def test_the_two_commands_stand_first() -> None:
    assert [line.split("#")[0].split() for line in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("edgevit ")])
def test_command_runs(line: str, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", *shlex.split(line)]  # -P: the copied folder must not shadow the package
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if not t.startswith("http")]
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert missing == []
