"""The cells of a sweep, and the file that keeps them: each is written as it ends, and a second run goes on from there.

The form of the file, which `read` checks; a result's and a comparison's fields are those of `timing.document`:

    {"schema_version": 1, "kind": "bench", "request": {...},
     "cells": [{"cell": {"items": [...], "threads": ..., "batch": ..., "image_size": ..., "precision": ...},
                "results": [...], "comparisons": [...], "warnings": [...], "changes": [...], "machine": {...}, ...}]}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgevit.artifact import replace_file
from edgevit.errors import InputError, OutputError, UsageError
from edgevit.specs import MAX_BATCH, Size, as_size, size_text

SCHEMA_VERSION = 1  # of the file's form
KIND = "bench"
AXES = ("threads", "batch", "image_size", "precision")
MAX_CELLS = 1000  # at five seconds each that is over an hour: more is a typing error
MAX_THREADS = 4096  # more than any machine has
MAX_FILE_BYTES = 256 << 20  # some five million times; parsed it takes ten times as much memory
PERCENTILE = re.compile(r"p[0-9]{1,2}(\.[0-9]{1,9})?")  # the name of one
MAX_DEPTH = 3  # of two requests, down to which they are told apart field by field; deeper, a message says too much


@dataclass(frozen=True)
class Cell:
    """One setting of the axes; None leaves it to the artifact, the model or the runtime."""

    threads: int | None = None
    batch: int | None = None
    image_size: Size | None = None
    precision: str | None = None

    def __str__(self) -> str:
        """What the command line takes: "threads=1 image-size=64x64"."""
        size = self.image_size and size_text(self.image_size)
        told = {"threads": self.threads, "batch": self.batch, "image-size": size, "precision": self.precision}
        return " ".join(f"{name}={value}" for name, value in told.items() if value is not None)


def grid(base: Cell, axes: Mapping[str, Sequence[Any]]) -> tuple[Cell, ...]:
    """Every combination of the axes' values on top of `base`; the last axis changes fastest.

    Raises:
        UsageError: an unknown axis, one that `base` sets too, one without values or with a value twice, a value of the
        wrong kind, or more than MAX_CELLS combinations.
    """
    for name, values in axes.items():
        shown = name.replace("_", "-")
        if name not in AXES:
            raise UsageError(f"sweep over {shown!r}: expected {', '.join(AXES).replace('_', '-')}")
        if getattr(base, name) is not None:
            raise UsageError(f"sweep over {shown}: --{shown} is given too; leave one of them out")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise UsageError(
                f"sweep over {shown}: {values!r}, expected one value or more, e.g. {shown}={EXAMPLES[name]}"
            )
    checked = {name: [_checked(name, value) for value in values] for name, values in axes.items()}
    for name, values in checked.items():
        if len(set(values)) < len(values):
            raise UsageError(f"sweep over {name.replace('_', '-')}: a value is given twice; give each once")
    count = math.prod(len(values) for values in checked.values())
    if count > MAX_CELLS:
        raise UsageError(f"sweep: {count} cells, at most {MAX_CELLS} are measured in one go; give fewer values")
    return tuple(replace(base, **dict(zip(checked, row, strict=True))) for row in itertools.product(*checked.values()))


EXAMPLES = {"threads": "1,2", "batch": "1,8", "image_size": "224x224,256x320", "precision": "fp32,int8"}


def _checked(name: str, value: Any) -> Any:
    """One value of an axis."""
    if name == "image_size":
        return as_size(value)
    if name == "precision" and isinstance(value, str):
        return value
    most = {"threads": MAX_THREADS, "batch": MAX_BATCH}.get(name, 0)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return value
    wanted = f"whole numbers from 1 to {most}" if most else "names such as fp32"
    raise UsageError(f"sweep over {name}: {value!r}, expected {wanted}, e.g. {name}={EXAMPLES[name]}")


class CellFile:
    """The cells of one request that have ended, in memory and, where `path` is given, in a file."""

    def __init__(self, path: Path | None, request: Mapping[str, Any]) -> None:
        """Read what is there already.

        Raises:
            UsageError: the file is of another request. InputError: it is no such file. OutputError: its place refuses.
        """
        self.path = path
        self.request: dict[str, Any] = json.loads(json.dumps(request))  # as a file has it: lists for tuples
        self.cells: list[dict[str, Any]] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise OutputError(f"--out {path}: {path.parent} is no directory; make it, or give another place")
        if path.exists():
            there = read(path)
            self._refuse_another(there["request"])
            self.cells = there["cells"]

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        """Whether this cell has ended."""
        return self.get(cell) is not None

    def get(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured in a cell."""
        wanted = json.loads(json.dumps(cell))
        return next((there for there in self.cells if there["cell"] == wanted), None)

    def add(self, measured: Mapping[str, Any]) -> None:
        """Keep one more cell; the file holds either all of it or nothing of it."""
        self.cells.append(json.loads(json.dumps(measured, allow_nan=False)))
        if self.path is not None:
            write(self.path, self.document())

    def document(self) -> dict[str, Any]:
        """All of it, as the file has it."""
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, "request": self.request, "cells": self.cells}

    def _refuse_another(self, request: Mapping[str, Any]) -> None:
        different = [text for key in request.keys() | self.request.keys() if key != "axes"
                     for text in differences(key, request.get(key), self.request.get(key))]  # fmt: skip
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise UsageError(
                f"--out {self.path}: it holds another measurement: {sorted(different)[0]}{more}; "
                "give another --out, or remove that file"
            )


def differences(where: str, there: Any, now: Any) -> Iterator[str]:
    """Where two JSON values differ, as "settings.seed 0 there, 1 now"."""
    if isinstance(there, dict) and isinstance(now, dict) and where.count(".") < MAX_DEPTH:
        for key in sorted(there.keys() | now.keys()):
            yield from differences(f"{where}.{key}", there.get(key), now.get(key))
    elif there != now:
        yield f"{where} {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # a message is one line


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` by a document in one step, a cell on each line.

    Raises:
        OutputError: the place refuses, or the file would be larger than what `read` takes.
    """
    head = {key: value for key, value in document.items() if key != "cells"}
    cells = ",\n".join(json.dumps(cell, allow_nan=False) for cell in document["cells"])
    text = f'{json.dumps(head, allow_nan=False)[:-1]}, "cells": [\n{cells}\n]}}\n'  # ASCII: a character is a byte
    if len(text) > MAX_FILE_BYTES:
        raise OutputError(
            f"--out {path}: {len(text) >> 20} MiB with this cell, at most {MAX_FILE_BYTES >> 20}; its earlier cells "
            "are kept; measure the others with another --out, or with a shorter --duration"
        )
    replace_file(path, text)


def read(path: Path) -> dict[str, Any]:
    """The document in a file, each field that a reader relies on checked: it may be anyone's.

    Raises:
        InputError: it cannot be read, is too large, no JSON, or not of this form.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a file; expected one that `edgevit bench --out` wrote")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; expected what `edgevit bench --out` wrote"
            )
        document = json.loads(path.read_bytes(), parse_constant=_no_number, parse_float=_finite)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a file that can be read") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON, or cut off; remove it, or give another file") from None
    problem = _problem(document)
    if problem:
        raise InputError(f"{path}: not what `edgevit bench --out` writes ({problem}); remove it, or give another file")
    return dict(document)


def _no_number(text: str) -> None:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _problem(document: Any) -> str | None:
    """What is wrong with a document, or None."""
    if not isinstance(document, dict) or document.get("kind") != KIND:
        return f"kind is not {KIND!r}"
    if document.get("schema_version") != SCHEMA_VERSION or isinstance(document["schema_version"], bool):
        return f"schema_version is not {SCHEMA_VERSION}"
    if not isinstance(document.get("request"), dict) or not isinstance(document.get("cells"), list):
        return "request or cells is missing"
    cells = document["cells"]
    odd = next((i for i, cell in enumerate(cells) if not _is_cell(cell)), None)
    if odd is not None:
        return f"cell {odd + 1} of {len(cells)} lacks a field or has one of another kind"
    keys = [json.dumps(cell["cell"], sort_keys=True) for cell in cells]
    return "a cell is there twice" if len(set(keys)) < len(keys) else None


def _is_cell(value: Any) -> bool:
    """Whether all is there that a reader shows."""
    lists = ("results", "comparisons", "warnings", "changes")
    if not isinstance(value, dict) or any(not isinstance(value.get(key), list) for key in lists):
        return False
    cell = value.get("cell")
    return (
        isinstance(cell, dict)
        and set(cell) == {"items", *AXES}
        and _texts(cell["items"])
        and isinstance(value.get("machine"), dict)
        and all(map(_is_result, value["results"]))
        and all(isinstance(c, dict) and _texts([c.get(k) for k in SHOWN]) for c in value["comparisons"])
        and _texts(value["warnings"])
        and all(isinstance(change, dict) and _texts([change.get("text")]) for change in value["changes"])
    )


SHOWN = ("baseline", "candidate", "verdict")  # of a comparison


def _is_result(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("effective_precision"), str | None)
        and isinstance(value.get("latency_text"), dict)
        and all(PERCENTILE.fullmatch(name) for name in value["latency_text"])
        and _texts(list(value["latency_text"].values()))
        and isinstance(value.get("samples_ms"), list)
        and all(isinstance(ms, int | float) and not isinstance(ms, bool) for ms in value["samples_ms"])
    )


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def record(cell: Cell, items: Sequence[str]) -> dict[str, Any]:
    """A cell as the file has it."""
    return {"items": list(items), **asdict(cell)}
