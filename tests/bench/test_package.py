"""The package bears one name only and needs neither torch nor onnx to race."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


def test_the_folder_cannot_be_imported_by_its_own_name() -> None:
    last_line = python("import bench").stderr.strip().splitlines()[-1]

    assert last_line == "ImportError: this folder is the package edgevit.bench: import that name"


def test_racing_imports_neither_torch_nor_onnx() -> None:
    code = "import sys, edgevit.bench.timing; print({'torch', 'onnx', 'onnx_ir'} & set(sys.modules))"

    assert python(code).stdout == "set()\n"
