"""`build.sh`: what a machine with trtexec and without Python needs to build an engine and to time it.

Which flags trtexec takes differs by version; they are data, in `trtexec_flags.json`. The script is written from it and
from `build.sh.in`, so that a new version is one row, and nothing is decided on the device but by the version it finds.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from edgevit.artifact import sha256_of
from edgevit.errors import ExportError, UsageError, first_line

from .files import weight_files

TABLE = Path(__file__).with_name("trtexec_flags.json")
TEMPLATE = Path(__file__).with_name("build.sh.in")
MODE = 0o755  # a script that can be started as ./build.sh
INDENT = " " * 8  # of a case branch in the template
NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")  # a file name that no shell and no trtexec reads as something else
TENSOR = re.compile(r"[A-Za-z0-9_./-]+")  # trtexec splits shapes at : and , and pairs at =
# A pinned softmax is not fused into attention; its values are below 1. Scales have a type of their own.
NEVER_PINNED = ("Cast", "Constant", "DequantizeLinear", "QuantizeLinear", "Softmax")
MAX_ARGUMENT = 100_000  # bytes; Linux refuses one argument of 128 KiB
BATCH_USAGE = " [--batch N] [--max-batch N]"
BATCH_OPTIONS = """  --batch N        pictures per query: what the engine is tuned for and timed at, default 1
  --max-batch N    the most it accepts, default 8
"""


@dataclass(frozen=True)
class Series:
    """One row of the table: the versions from `start` until `end` take the same flags."""

    name: str
    start: tuple[int, int]
    end: tuple[int, int]
    build: tuple[str, ...]
    precision: Mapping[str, tuple[str, ...]]
    pins: bool
    time: tuple[str, ...]

    @property
    def first(self) -> str:
        """The oldest version, as text."""
        return ".".join(map(str, self.start))

    @property
    def versions(self) -> str:
        """What a message calls it: "8.6" or "10.x"."""
        return self.name if "." in self.name else f"{self.name}.x"

    def pattern(self) -> str:
        """A pattern of the shell's `case` that versions of this series match: "8.6 | 8.6.*" or "10.*"."""
        major, minor = self.start
        return f"{major}.{minor} | {major}.{minor}.*" if self.end[0] == major else f"{major}.*"


@cache
def table() -> tuple[tuple[Series, ...], tuple[str, ...]]:
    """The rows of `trtexec_flags.json`, oldest first, and what every timing is told."""
    data: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = tuple(
        Series(
            name=row["series"],
            start=_version(row["from"]),
            end=_version(row["before"]),
            build=tuple(row["build"]),
            precision={precision: tuple(flags) for precision, flags in row["precision"].items()},
            pins=row["pins"],
            time=tuple(row["time"]),
        )
        for row in data["rows"]
    )
    return rows, tuple(data["measure"])


def trtexec_flags(version: str, precision: str) -> tuple[str, ...]:
    """What `trtexec` of TensorRT `version` ("8.6", "10.3.0") is told to build an engine of `precision`, beside files.

    Raises:
        UsageError: a version or precision that is not in the table.
    """
    series = _series(version)
    if precision not in series.precision:
        raise UsageError(f"precision {precision!r} for TensorRT: expected one of {', '.join(series.precision)}")
    return (*series.build, *series.precision[precision])


def timing_flags(version: str) -> tuple[str, ...]:
    """What `trtexec` of `version` is told so that its times compare with those of every other version.

    Version 11 replays a CUDA graph, spins while it waits, moves no data and profiles in a run of its own; older ones
    are told to.

    Raises:
        UsageError: a version that is not in the table.
    """
    return (*_series(version).time, *table()[1])


def write_build_script(
    directory: Path,
    *,
    onnx_file: str,
    precision: str,
    input_name: str,
    input_shape: tuple[int | str, ...],
    oldest: str,
) -> str:
    """Write the script beside `onnx_file`, executable, and return its name: `build.sh`, `build-HxW.sh` for `model-HxW`.

    `input_shape` is (n, c, h, w) with n a name where the batch is dynamic; `oldest` the first TensorRT, e.g. "8.6",
    that reads the graph. Below float32, what computes in float32 is pinned for versions that are typed weakly.

    Raises:
        UsageError: a precision or version that is not in the table, or another dimension than the batch is dynamic.
        ExportError: the graph cannot be read, or a name in it cannot be given to trtexec.
    """
    path = directory / onnx_file
    name, out = _names(onnx_file)
    _check(onnx_file, input_name, input_shape)
    trtexec_flags(oldest, precision)  # refuses either before a file is touched
    rows = [row for row in table()[0] if row.start >= _series(oldest).start]
    pins = pinned(_graph(path)) if precision in ("fp16", "int8") and any(row.pins for row in rows) else ()
    values = {
        "NAME": name,
        "ONNX_NAME": onnx_file,
        "OUT": out,
        "ONNX": shlex.quote(onnx_file),
        "SHA256": sha256_of(path),
        "WEIGHTS": "".join(map(_weight_check, weight_files(path))),
        "PRECISION": shlex.quote(precision),
        "INPUT": shlex.quote(input_name),
        "SHAPE": "x".join(map(str, input_shape[1:])),
        **_batch(input_shape[0]),
        "SERIES": _series_cases(oldest),
        "KNOWN": ", ".join(row.versions for row in rows),
        "BUILD_FLAGS": _flag_cases({row.name: _build_arguments(row, precision, pins) for row in rows}),
        "TIME_FLAGS": _flag_cases({row.name: timing_flags(row.first) for row in rows}),
    }
    script = directory / name
    script.write_text(_filled(TEMPLATE.read_text(encoding="utf-8"), values), encoding="utf-8", newline="\n")
    script.chmod(MODE)
    return name


def pinned(graph: onnx.GraphProto) -> tuple[str, ...]:
    """The nodes that compute in float32 in a graph whose body is float16, by name.

    A strongly typed network keeps them by itself. TensorRT 8 takes the types of a graph as a hint: with `--fp16` it may
    run them in float16, where they overflow. So it is told their names. Products of quantised operands are float32 in
    the graph because their scales are, and become INT8: they and their Q/DQ are not pinned.

    Raises:
        ExportError: one of them has no name, or one that `--layerPrecisions` cannot hold.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    nodes = [
        node
        for node in graph.node
        if node.op_type not in NEVER_PINNED
        and any(types.get(o) == onnx.TensorProto.FLOAT for o in node.output)
        and not dequantized.intersection(node.input)
    ]
    for node in nodes:
        if not node.name or set(node.name) & set(":,*'"):
            raise ExportError(f"node {node.name!r} ({node.op_type}): TensorRT 8 needs a name without : , * ' to pin it")
    names = tuple(node.name for node in nodes)
    if sum(len(name) + len(":fp32,") for name in names) > MAX_ARGUMENT:
        raise ExportError(f"{len(names)} nodes compute in float32: more names than trtexec can be given")
    return names


def _weight_check(file: Path) -> str:
    return f'\n    check_file "$here"/{shlex.quote(file.name)} {sha256_of(file)}'


def _graph(path: Path) -> onnx.GraphProto:
    """The graph with the types of all its tensors; weights in other files are not read."""
    try:
        model = onnx.load(path, load_external_data=False)
        return onnx.shape_inference.infer_shapes(model).graph
    except Exception as error:  # protobuf and onnx raise types of their own
        raise ExportError(f"{path}: not an ONNX graph ({first_line(error)})") from None


def _version(text: str) -> tuple[int, int]:
    parts = text.split(".")
    if not 2 <= len(parts) <= 4 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"TensorRT version {text!r}: expected MAJOR.MINOR, e.g. 10.3")
    return int(parts[0]), int(parts[1])


def _series(version: str) -> Series:
    rows, number = table()[0], _version(version)
    for row in rows:
        if row.start <= number < row.end:
            return row
    known = ", ".join(row.versions for row in rows)
    raise UsageError(f"TensorRT version {version!r}: its trtexec is not known; known are {known}")


def _names(onnx_file: str) -> tuple[str, str]:
    """Names of the script and of its folder of results: build.sh and built, build-HxW.sh and built-HxW."""
    if not NAME.fullmatch(onnx_file) or onnx_file.startswith(".."):
        raise UsageError(f"ONNX file {onnx_file!r}: expected a plain file name of letters, digits, '.', '_' and '-'")
    stem = Path(onnx_file).stem
    suffix = "" if stem == "model" else f"-{stem.removeprefix('model-')}"
    return f"build{suffix}.sh", f"built{suffix}"


def _check(onnx_file: str, input_name: str, input_shape: tuple[int | str, ...]) -> None:
    if not TENSOR.fullmatch(input_name):
        raise ExportError(f"{onnx_file}: input {input_name!r}: trtexec takes names of letters, digits, '_.-' and '/'")
    if len(input_shape) < 2 or any(isinstance(side, str) or side < 1 for side in input_shape[1:]):
        raise UsageError(f"{onnx_file}: input shape {input_shape}: only the batch may be dynamic in build.sh")


def _batch(batch: int | str) -> dict[str, str]:
    """What the script says of the batch: a dynamic one is chosen where it runs."""
    if isinstance(batch, int):
        return {"DYNAMIC": "no", "BATCH": str(batch), "USAGE": "", "OPTIONS": "", "VALUE_OPTIONS": ""}
    chosen = {"USAGE": BATCH_USAGE, "OPTIONS": BATCH_OPTIONS, "VALUE_OPTIONS": " | --batch | --max-batch"}
    return {"DYNAMIC": "yes", "BATCH": "1", **chosen}


def _series_cases(oldest: str) -> str:
    """What the script says of each version: its series, or that it is too old for this graph."""
    first = _series(oldest)
    lines = []
    for row in table()[0]:
        if row.start >= first.start:
            lines.append(f"{row.pattern()}) series={row.name} ;;")
        else:
            advice = f"$onnx_name needs {oldest} or newer; export again with --option oldest={row.name}"
            lines += [f"{row.pattern()})", f'    die 4 "TensorRT $version: {advice}"', "    ;;"]
    return "\n".join(INDENT + line for line in lines)


def _build_arguments(row: Series, precision: str, pins: Iterable[str]) -> tuple[str, ...]:
    listed = ",".join(f"{name}:fp32" for name in pins)
    if not row.pins or not listed:
        return (*row.build, *row.precision[precision])
    return (*row.build, *row.precision[precision], "--precisionConstraints=obey", f"--layerPrecisions={listed}")


def _flag_cases(flags: Mapping[str, Iterable[str]]) -> str:
    """One branch for each series, which adds its flags to the arguments."""
    branches = (f'{name}) set -- "$@" {shlex.join(words)} ;;' for name, words in flags.items())
    return "\n".join(INDENT + branch for branch in branches)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each @KEY@ replaced; values are not searched again."""
    return re.sub(r"@([A-Z][A-Z0-9_]*)@", lambda found: values[found[1]], template)
