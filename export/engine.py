"""ONNX file -> TensorRT engine: ahead of time for named GPUs by TensorRT for RTX, or by TensorRT for a GPU in here."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import edgevit
from edgevit.engine_layers import EngineLayer, read_lines
from edgevit.errors import ExportError, MissingDependencyError, UnknownNameError, UsageError
from edgevit.specs import Finding

AHEAD, LOCAL = "tensorrt_rtx", "tensorrt"  # the packages: without a GPU for named ones; on a GPU for itself
HERE = "here"  # what a user names instead of a GPU to have the engine built by and for the one in this machine
PARSE_SECONDS = 120  # the largest network takes 2 s; a file that takes longer was made to
BUILD_SECONDS = 3600  # ahead of time 10 s; on a slow GPU that tries every kernel, most of an hour
SHOWN = 3  # parser errors in one message; the rest are counted
PARSER_RULE, PARSER_URL = "TRT-PARSER", "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
INSTALL = "pip install 'edgevit[tensorrt]'"


@dataclass(frozen=True)
class Engine:
    """One engine that was built: by what, for which GPUs, how large, how long it took.

    `layers` has what the builder said of it, where it did: `count`, `products` by precision, `fused_attentions`.
    """

    builder: str
    version: str
    gpus: tuple[str, ...]
    size_bytes: int
    seconds: float
    max_batch: int | None
    layers: dict[str, Any] | None

    def record(self) -> dict[str, Any]:
        """The fields, for a manifest."""
        return asdict(self) | {"gpus": list(self.gpus)}


def parser_version() -> str:
    """The version of the parser that `ask_parser` asks; tensorrt-rtx must be installed."""
    return metadata.version(AHEAD)


def ask_parser(model: bytes) -> tuple[Finding, ...]:
    """What TensorRT's own parser refuses in a serialised ONNX model; nothing where it takes all of it.

    The file may be a stranger's: it is parsed in a process of its own, and files that it refers to are not read.

    Raises:
        MissingDependencyError: tensorrt-rtx is not installed.
    """
    _require(AHEAD)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        request = {"task": "parse", "library": AHEAD, "model": str(path)}
        try:
            errors = _ask(request, PARSE_SECONDS, Path(folder))["errors"]
        except ExportError as error:
            errors = [{"node": "", "operator": "", "text": str(error)}]
    return tuple(
        Finding(
            PARSER_RULE,
            "error",
            _plain(error["node"] or error["operator"]),
            f"TensorRT for RTX {parser_version()} refuses it: {_plain(error['text'])}",
            "replace the operator, or export the network with edgevit export --to tensorrt",
            PARSER_URL,
        )
        for error in errors
    )


def known_gpus() -> tuple[str, ...]:
    """The compute capabilities that the installed TensorRT for RTX builds for: "sm75", "sm80", ...

    Raises:
        MissingDependencyError: tensorrt-rtx is not installed.
    """
    _require(AHEAD)
    names = importlib.import_module(AHEAD).ComputeCapability.__members__
    return tuple(sorted((name.lower() for name in names if name.startswith("SM")), key=lambda name: int(name[2:])))


def check_gpus(gpus: Sequence[str]) -> None:
    """Raise where an engine for these GPUs cannot be built here, before anything else is done.

    Raises:
        MissingDependencyError: the builder is not installed. UnknownNameError, UsageError: the names.
    """
    if HERE in gpus and len(gpus) > 1:
        raise UsageError(f"gpu {','.join(gpus)}: {HERE} stands alone; name GPUs to build for others ahead of time")
    if tuple(gpus) == (HERE,):
        _require(LOCAL if util.find_spec(LOCAL) is not None else AHEAD)
        if (problem := gpu_problem()) is not None:
            raise UsageError(f"gpu {HERE}: {problem}; name a GPU to build for it ahead of time, e.g. gpu=sm89")
        return
    twice = next((gpu for gpu in gpus if list(gpus).count(gpu) > 1), None)
    if twice is not None:
        raise UsageError(f"gpu {','.join(gpus)}: {twice} is given twice; give each GPU once")
    known = known_gpus() if gpus else ()
    for gpu in gpus:
        if gpu in ("sm87", "sm101", "sm110"):  # Orin and Thor, before and after CUDA 13 renamed the latter
            raise UsageError(
                f"gpu {gpu}: a Jetson builds its own engine; export without gpu, copy the directory there and "
                "run build.sh"
            )
        if gpu not in known:
            raise UnknownNameError("gpu", gpu, (*known, HERE))


def build_engine(model: Path, engine: Path, gpus: Sequence[str], max_batch: int | None = None) -> Engine:
    """Build `engine` from the ONNX file `model`; the engine appears whole or not at all.

    Args:
        gpus: compute capabilities as `known_gpus` names them, several in one engine; or ("here",).
        max_batch: the largest batch of an engine with a dynamic one.

    Raises:
        MissingDependencyError, UnknownNameError, UsageError: see `check_gpus`.
        ExportError: the parser or the builder refused the model.
    """
    check_gpus(gpus)
    local = tuple(gpus) == (HERE,)
    library = LOCAL if local and util.find_spec(LOCAL) is not None else AHEAD
    request = {
        "task": "build",
        "library": library,
        "model": str(model.resolve()),
        "engine": str(engine.resolve()),
        "gpus": ["CURRENT"] if local and library == AHEAD else [] if local else list(gpus),
        "max_batch": max_batch,
    }
    reply = _ask(request, BUILD_SECONDS, model.resolve().parent)
    if reply["errors"]:
        raise ExportError(f"TensorRT cannot build {model.name}: {_text(reply['errors'])}")
    layers = None if reply["layers"] is None else summary(read_lines(reply["layers"]))
    return Engine(library, reply["version"], tuple(gpus), reply["size_bytes"], reply["seconds"], max_batch, layers)


def summary(layers: Sequence[EngineLayer]) -> dict[str, Any]:
    """How many layers an engine has, in which precision its products run, and how many attentions became one kernel."""
    products = Counter(layer.precision or "unknown" for layer in layers if layer.product)
    attentions = sum(layer.attention for layer in layers)
    return {"count": len(layers), "products": dict(sorted(products.items())), "fused_attentions": attentions}


def gpu_problem() -> str | None:
    """Why no NVIDIA GPU can be used here, or None; asks the driver itself, which every GPU needs."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    return None


def _require(package: str) -> None:
    if util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise MissingDependencyError(f"building an engine needs {name}, which is not installed: {INSTALL}")


def _ask(request: dict[str, Any], seconds: int, folder: Path) -> dict[str, Any]:
    """The worker's answer; a crash or a hang of the native code becomes an error."""
    what = "parser" if request["task"] == "parse" else "builder"
    roots = [str(Path(edgevit.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(  # this interpreter, a module of ours, no shell
            [sys.executable, "-P", "-m", "edgevit.export.engine_worker"],  # -P: no module from beside the model
            input=json.dumps(request),
            capture_output=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))},
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"TensorRT's {what} was stopped after {seconds} s, expected far less; try again") from None
    if done.returncode != 0:
        raise ExportError(f"TensorRT's {what} {_death(done.returncode, done.stderr)}; please report the model")
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def _death(code: int, stderr: str) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"failed: {(stderr.strip().splitlines() or ['no reason given'])[-1]}"


def _text(errors: Sequence[dict[str, str]]) -> str:
    """Several errors on one line, each with its node."""
    parts = []
    for error in errors[:SHOWN]:
        where = f"node {error['node']} ({error['operator']}): " if error["node"] or error["operator"] else ""
        parts.append(_plain(f"{where}{error['text']}"))
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return "; ".join(parts) + more


def _plain(text: str) -> str:
    """One line without control characters: names come from the file."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
