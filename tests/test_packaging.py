"""What ships: the wheel, built by way of the source distribution as a release is, and the pins it is tested with.

The checkout is copied first, so that nothing is built in it and no file left from an earlier build gets in.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import edgevit

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOMES = {"edgevit": "edgevit", "export": "edgevit/export", "runtimes": "edgevit/runtimes", "bench": "edgevit/bench"}
METADATA = f"edgevit-{PROJECT['version']}.dist-info"
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
CUDA = ("nvidia-", "cuda-", "triton")  # come with a CUDA build of torch only, which pins them itself


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    source, built = tmp_path_factory.mktemp("source") / "edgevit", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_COPIED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def foreign(names: Iterable[str]) -> set[str]:
    """Top-level names that an install would leave in site-packages beside edgevit."""
    return {name.split("/")[0] for name in names} - {"edgevit", METADATA}


def expected_files() -> set[str]:
    """Every file of the four folders, at its place in the wheel."""
    return {
        Path(home, where.relative_to(ROOT / folder), name).as_posix()
        for folder, home in HOMES.items()
        for where, _, files in ((Path(where), folders, files) for where, folders, files in os.walk(ROOT / folder))
        for name in files
        if where.name != "__pycache__"
    }


def test_only_edgevit_lands_in_site_packages(names: list[str]) -> None:
    assert foreign(names) == set()


def test_a_foreign_name_would_be_found() -> None:
    assert foreign(["edgevit/api.py", "bench/stats.py", "tests/test_a.py"]) == {"bench", "tests"}


def test_the_wheel_holds_every_file_of_the_four_folders_once_and_nothing_else(names: list[str]) -> None:
    shipped = [name for name in names if not name.startswith(f"{METADATA}/")]
    assert sorted(shipped) == sorted(expected_files())


def test_photographs_types_and_licences_are_inside(names: list[str]) -> None:
    photographs = {f"edgevit/photos/{name}.jpg" for name in ("astronaut", "chelsea", "coffee", "rocket")}
    licences = {f"{METADATA}/licenses/LICENSE", f"{METADATA}/licenses/edgevit/photos/LICENSE.md"}
    assert photographs | licences | {"edgevit/py.typed", "edgevit/photos/LICENSE.md"} <= set(names)


def test_no_test_is_inside(names: list[str]) -> None:
    folders_and_files = [Path(name) for name in names]
    assert [p for p in folders_and_files if {"tests", "golden"} & set(p.parts) or p.name.startswith("test_")] == []


IMPORT_ALL = """
import importlib, pkgutil, sys
import edgevit
for module in pkgutil.walk_packages(edgevit.__path__, "edgevit."):
    if module.name != "edgevit.__main__":
        importlib.import_module(module.name)
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "edgevit"), sep="\\n")
"""


def test_every_module_of_the_wheel_can_be_imported_from_it(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        modules = {str(site / name) for name in archive.namelist() if name.endswith(".py")}
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == modules - {str(site / "edgevit/__main__.py")}


def test_the_command_is_declared_and_the_version_is_one(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{METADATA}/entry_points.txt").decode().split("\n")[:2] == [
            "[console_scripts]",
            "edgevit = edgevit.cli:main",
        ]
    assert edgevit.__version__ == PROJECT["version"]


# ---- constraints.txt


def needed() -> set[str]:
    """The packages that `.[test]` brings, all the way down, as installed here."""
    queue = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    names: set[str] = set()
    while queue:
        requirement = Requirement(queue.pop())
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if applies and name not in names and not name.startswith(CUDA):
            names.add(name)
            queue += importlib.metadata.requires(name) or []
    return names


def test_constraints_pin_what_installs_and_nothing_else() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    assert pinned == needed()


def test_torch_is_pinned_without_a_build() -> None:
    """`torch==2.13.0+cpu` could be installed from few places; `torch==2.13.0` is met by that build too."""
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
