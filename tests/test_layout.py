"""The house of four folders: packages, links, imports, guards and sizes.

Each check takes the root of a house and returns its problems. It is run on this house, where it must find none, and on
a small model house with one violation planted, which it must name.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("export", "runtimes", "bench")  # the three beside the core
FILE_LINES, LONG_FILE_LINES, FUNCTION_LINES = 400, 700, 45  # a model or test file may be long; no function may
OUTSIDE_CORE = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")  # exporters and runtimes
TORCH_FILES = {"checkpoint", "ranges", "stress", "train"}  # core files that may need torch, as all of edgevit.models

Check = Callable[[Path], list[str]]


# ---- the checks


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    """Each .py file under `folders`, relative to `root`; links are not walked."""
    for folder in folders:
        for where, _, names in os.walk(root / folder):
            yield from (Path(where, name).relative_to(root) for name in sorted(names) if name.endswith(".py"))


def package_of(file: PurePath) -> str:
    """The package a file belongs to: export/deploy/former.py -> edgevit.export.deploy."""
    folder = ".".join(file.parent.parts)
    return folder if file.parts[0] == "edgevit" else f"edgevit.{folder}"


def package_problems(root: Path) -> list[str]:
    """The packages and folders that pyproject.toml names are those on disk, and each has its __init__.py."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = list(python_files(root, "edgevit", *FOLDERS))
    on_disk, listed = {package_of(file) for file in files}, set(setuptools["packages"])
    folders = {"edgevit": "edgevit"} | {f"edgevit.{folder}": folder for folder in FOLDERS}
    initialised = {package_of(file) for file in files if file.name == "__init__.py"}
    return [
        *(f"pyproject.toml: packages lacks {name}" for name in sorted(on_disk - listed)),
        *(f"pyproject.toml: packages has {name}, which is not on disk" for name in sorted(listed - on_disk)),
        *(f"{name}: no __init__.py" for name in sorted(on_disk - initialised)),
        *([] if setuptools["package-dir"] == folders else [f"pyproject.toml: package-dir is not {folders}"]),
    ]


def link_problems(root: Path) -> list[str]:
    """Each of the three folders is linked into edgevit, by a relative link."""
    problems = []
    for folder in FOLDERS:
        link = root / "edgevit" / folder
        if not link.is_symlink() or str(link.readlink()) != f"../{folder}":
            problems.append(f"edgevit/{folder}: expected a link to ../{folder}")
    return problems


def room(name: str) -> str:
    """The folder a dotted name lives in: edgevit.bench.stats -> bench; the core and everything foreign -> ""."""
    parts = name.split(".")
    return parts[1] if parts[0] == "edgevit" and len(parts) > 1 and parts[1] in FOLDERS else ""


def import_problem(file: PurePath, node: ast.Import | ast.ImportFrom) -> str | None:
    """What is wrong with one import: core by full name, own folder by one dot, never two dots, never a sibling."""
    package, level = package_of(file), 0
    if isinstance(node, ast.ImportFrom):
        level = node.level
        module = f"{package}.{node.module}" if level and node.module else node.module or package
        names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
    else:
        names = [alias.name for alias in node.names]
    if level > 1:
        return f"relative import of {level} dots"
    siblings = {room(name) for name in names} - {"", room(package)}
    if siblings and package != "edgevit.api":
        return f"imports edgevit.{min(siblings)}: folders meet in edgevit/api"
    if package == "edgevit" and level:
        return "the core is imported by its full name"
    if room(package) and not level and any(name.startswith(f"{package}.") for name in names):
        return "the own folder is imported by one dot"
    return None


def import_problems(root: Path) -> list[str]:
    """The imports of the core and the three folders, wherever in a file they stand."""
    problems = []
    for file in python_files(root, "edgevit", *FOLDERS):
        for node in ast.walk(ast.parse((root / file).read_text())):
            problem = import_problem(file, node) if isinstance(node, ast.Import | ast.ImportFrom) else None
            if problem:
                problems.append(f"{file.as_posix()}:{node.lineno}: {problem}")
    return problems


def length_problems(root: Path) -> list[str]:
    """Files and functions that are longer than the house allows."""
    problems = []
    for file in python_files(root, "edgevit", *FOLDERS, "tests"):
        text = (root / file).read_text()
        limit = LONG_FILE_LINES if file.parts[0] == "tests" or "models" in file.parts else FILE_LINES
        lines = len(text.splitlines())
        if lines > limit:
            problems.append(f"{file.as_posix()}: {lines} lines, at most {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    where = f"{file.as_posix()}:{node.lineno}: {node.name}"
                    problems.append(f"{where} has {lines} lines, at most {FUNCTION_LINES}")
    return problems


SILENCED = re.compile(r"#\s*(noqa|type:\s*ignore)\b[^#]*(#\W*)?$")  # no second comment with a word in it


def reason_problems(root: Path) -> list[str]:
    """Every silenced finding carries its reason on the same line, as a comment of its own."""
    problems = []
    for file in python_files(root, "edgevit", *FOLDERS, "tests"):
        tokens = tokenize.generate_tokens(io.StringIO((root / file).read_text()).readline)
        lines = [t.start[0] for t in tokens if t.type == tokenize.COMMENT and SILENCED.match(t.string)]
        problems += [f"{file.as_posix()}:{line}: silenced without a reason" for line in lines]
    return problems


def document_problems(root: Path) -> list[str]:
    """Links between the documents and files resolve, and CONTRIBUTING.md has a link to each package's folder."""
    problems, linked = [], set()
    for document in sorted(root.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            linked.add((document.name, target.rstrip("/")))
            if not (root / target).exists():
                problems.append(f"{document.name}: links to {target}, which does not exist")
    folders = {file.parent.as_posix() for file in python_files(root, "edgevit", *FOLDERS)}
    missing = sorted(folder for folder in folders if ("CONTRIBUTING.md", folder) not in linked)
    return problems + [f"CONTRIBUTING.md: its tree lacks {folder}" for folder in missing]


def python(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the house at `root` first on the path, whatever is installed."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def guard_problems(root: Path) -> list[str]:
    """None of the three folders can be imported by its own name."""
    problems = []
    for folder in FOLDERS:
        expected = f"ImportError: this folder is the package edgevit.{folder}: import that name"
        last_line = (python(root, f"import {folder}").stderr.strip().splitlines() or ["nothing"])[-1]
        if last_line != expected:
            problems.append(f"import {folder}: expected {expected!r}, got {last_line!r}")
    return problems


BLOCKED = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Block())
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name + ": " + str(error))
"""


def core_problems(root: Path) -> list[str]:
    """Core modules can be imported without exporters and runtimes, and all but networks and weights without torch."""
    modules: dict[bool, list[str]] = {True: [], False: []}
    for file in python_files(root, "edgevit"):
        if file.stem != "__main__":  # importing it runs the command line
            name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            modules[file.stem in TORCH_FILES or "models" in file.parts].append(name)
    problems = []
    for torch_allowed, names in modules.items():
        blocked = OUTSIDE_CORE if torch_allowed else (*OUTSIDE_CORE, "torch")
        done = python(root, BLOCKED.format(blocked=blocked, modules=sorted(names)))
        problems += done.stdout.splitlines() if done.returncode == 0 else [done.stderr]
    return problems


def light_problems(root: Path) -> list[str]:
    """`import edgevit` brings the standard library and edgevit's own files, nothing else."""
    code = """
import sys
before = set(sys.modules)
import edgevit
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"edgevit"}))
"""
    done = python(root, code)
    return [f"import edgevit: brings {name}" for name in done.stdout.split()] + done.stderr.splitlines()[-1:]


CHECKS: list[Check] = [
    package_problems,
    link_problems,
    import_problems,
    length_problems,
    reason_problems,
    document_problems,
    guard_problems,
    core_problems,
    light_problems,
]


@pytest.mark.parametrize("check", CHECKS)
def test_this_house_is_in_order(check: Check) -> None:
    assert "\n".join(check(ROOT)) == ""


def test_examples_in_docstrings_hold() -> None:
    found = []
    for file in python_files(ROOT, "edgevit", *FOLDERS):
        if ">>>" in (ROOT / file).read_text():
            module = importlib.import_module(f"{package_of(file)}.{file.stem}".removesuffix(".__init__"))
            found.append((file.as_posix(), doctest.testmod(module).failed))
    assert found
    assert [name for name, failed in found if failed] == []


# ---- each check finds what is planted


def guarded(folder: str) -> str:
    name = f"edgevit.{folder}"
    message = f"this folder is the package {name}: import that name"
    return f'if __name__ != "{name}":\n    raise ImportError("{message}")\n'


HOUSE = {
    "pyproject.toml": """
[tool.setuptools]
packages = ["edgevit", "edgevit.api", "edgevit.models", "edgevit.export", "edgevit.export.deploy", "edgevit.runtimes",
"edgevit.bench"]
[tool.setuptools.package-dir]
edgevit = "edgevit"
"edgevit.export" = "export"
"edgevit.runtimes" = "runtimes"
"edgevit.bench" = "bench"
""",
    "edgevit/__init__.py": "import edgevit.errors\n",
    "edgevit/errors.py": "",
    "edgevit/api/__init__.py": "from .exporting import export\n",
    "edgevit/api/exporting.py": "def export() -> None:\n    from edgevit.export import deploy\n",
    "edgevit/models/__init__.py": "from . import net\n",
    "edgevit/models/net.py": "from edgevit import errors\n",
    "export/__init__.py": guarded("export"),
    "export/deploy/__init__.py": "from .fold import A\n",
    "export/deploy/fold.py": "import onnx\nfrom edgevit.export.capture import A\n",
    "export/capture.py": "from edgevit.errors import A\nfrom .deploy.fold import B\n",
    "runtimes/__init__.py": guarded("runtimes"),
    "bench/__init__.py": guarded("bench"),
    "CONTRIBUTING.md": "[a](edgevit) [b](edgevit/models) [c](export) [d](export/deploy/) [e](runtimes#f) [g](bench) "
    "[h](edgevit/api)",
    "tests/test_net.py": "def test_net() -> None: ...\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A house of a few lines in which all is well."""
    for name, text in HOUSE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for folder in FOLDERS:
        (tmp_path / "edgevit" / folder).symlink_to(f"../{folder}")
    return tmp_path


@pytest.mark.parametrize("check", CHECKS)
def test_a_house_in_order_has_no_problem(house: Path, check: Check) -> None:
    assert check(house) == []


MEET = "folders meet in edgevit/api"
ONE_DOT = "the own folder is imported by one dot"


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("bench/a.py", "from edgevit.export import b", f"1: imports edgevit.export: {MEET}"),
        ("bench/a.py", "from edgevit import runtimes", f"1: imports edgevit.runtimes: {MEET}"),
        ("runtimes/a.py", "import edgevit.bench.b", f"1: imports edgevit.bench: {MEET}"),
        ("edgevit/a.py", "def f():\n import edgevit.bench", f"2: imports edgevit.bench: {MEET}"),
        ("edgevit/a.py", "from .export import b", f"1: imports edgevit.export: {MEET}"),
        ("edgevit/models/a.py", "from edgevit import export", f"1: imports edgevit.export: {MEET}"),
        ("edgevit/api.py", "import edgevit.bench", f"1: imports edgevit.bench: {MEET}"),
        ("edgevit/api/a.py", "from ..bench import b", "1: relative import of 2 dots"),
        ("edgevit/a.py", "from .errors import b", "1: the core is imported by its full name"),
        ("edgevit/models/a.py", "from ..errors import b", "1: relative import of 2 dots"),
        ("export/deploy/a.py", "from ..capture import b", "1: relative import of 2 dots"),
        ("bench/a.py", "from edgevit.bench.b import c", f"1: {ONE_DOT}"),
        ("export/a.py", "from edgevit.export import capture", f"1: {ONE_DOT}"),
    ],
)
def test_a_planted_import_is_found(house: Path, file: str, text: str, problem: str) -> None:
    (house / file).write_text(text)
    assert import_problems(house) == [f"{file}:{problem}"]


LONG = "def f() -> None:\n" + "    ...\n" * FUNCTION_LINES


@pytest.mark.parametrize(
    ("check", "file", "text", "problem"),
    [
        (package_problems, "export/lint/__init__.py", "", "pyproject.toml: packages lacks edgevit.export.lint"),
        (package_problems, "bench/plots/bars.py", "", "edgevit.bench.plots: no __init__.py"),
        (length_problems, "bench/a.py", "\n" * 401, "bench/a.py: 401 lines, at most 400"),
        (length_problems, "edgevit/models/a.py", "\n" * 701, "edgevit/models/a.py: 701 lines, at most 700"),
        (length_problems, "tests/test_a.py", "\n" * 701, "tests/test_a.py: 701 lines, at most 700"),
        (length_problems, "bench/a.py", LONG, "bench/a.py:1: f has 46 lines, at most 45"),
        (reason_problems, "bench/a.py", "x = 1  # noqa: E501", "bench/a.py:1: silenced without a reason"),
        (reason_problems, "bench/a.py", "x = 1  # type: ignore[misc]", "bench/a.py:1: silenced without a reason"),
        (document_problems, "README.md", "[a](docs/gone.md)", "README.md: links to docs/gone.md, which does not exist"),
        (document_problems, "CONTRIBUTING.md", "[a](export)", "CONTRIBUTING.md: its tree lacks bench"),
        (core_problems, "edgevit/a.py", "import torch", "edgevit.a: No module named 'torch'"),
        (core_problems, "edgevit/a.py", "import onnx_ir.passes", "edgevit.a: No module named 'onnx_ir'"),
        (core_problems, "edgevit/models/a.py", "import onnx", "edgevit.models.a: No module named 'onnx'"),
        (light_problems, "edgevit/errors.py", "import numpy", "import edgevit: brings numpy"),
        (light_problems, "edgevit/errors.py", "import nothing", "ModuleNotFoundError: No module named 'nothing'"),
    ],
)
def test_a_planted_file_is_found(house: Path, check: Check, file: str, text: str, problem: str) -> None:
    (house / file).parent.mkdir(exist_ok=True)
    (house / file).write_text(text)
    assert problem in check(house)


@pytest.mark.parametrize("text", ["x = 1  # noqa: E501  # a table", "x = 1  # type: ignore[misc]  # no stubs"])
def test_a_silenced_finding_with_its_reason_is_fine(house: Path, text: str) -> None:
    (house / "bench/a.py").write_text(text)
    assert reason_problems(house) == []


def test_packages_that_are_gone_or_lie_elsewhere_are_found(house: Path) -> None:
    text = HOUSE["pyproject.toml"].replace('"edgevit.bench"]', '"edgevit.gone"]').replace('"runtimes"', '"src"')
    (house / "pyproject.toml").write_text(text)
    lacks, gone, moved = package_problems(house)
    assert lacks == "pyproject.toml: packages lacks edgevit.bench"
    assert gone == "pyproject.toml: packages has edgevit.gone, which is not on disk"
    assert moved.startswith("pyproject.toml: package-dir is not {'edgevit': 'edgevit', ")


@pytest.mark.parametrize("target", [None, "../bench", "."])
def test_a_link_that_is_missing_or_points_elsewhere_is_found(house: Path, target: str | None) -> None:
    link = house / "edgevit/export"
    link.unlink()
    if target is not None:
        link.symlink_to(target)
    assert link_problems(house) == ["edgevit/export: expected a link to ../export"]


def test_a_folder_in_the_place_of_a_link_is_found(house: Path) -> None:
    (house / "edgevit/export").unlink()
    (house / "edgevit/export").mkdir()
    assert link_problems(house) == ["edgevit/export: expected a link to ../export"]


def test_a_folder_without_its_guard_is_found(house: Path) -> None:
    (house / "bench/__init__.py").write_text("")
    (problem,) = guard_problems(house)
    assert problem.startswith("import bench: expected 'ImportError: this folder is the package edgevit.bench: ")
    assert problem.endswith("got 'nothing'")
