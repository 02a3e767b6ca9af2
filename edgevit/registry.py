"""Name -> thing, loaded on demand: model families, targets, runtimes. The one table of each.

>>> UnknownNameError("runtime", "onnxrt", ["ort", "torch"]).args[0]
"unknown runtime 'onnxrt'; did you mean 'ort'? Known: ort, torch"
"""

from __future__ import annotations

import fnmatch
import importlib
from dataclasses import dataclass
from typing import Any, cast

from edgevit.contracts import Exporter, ModelFamily, Runtime
from edgevit.errors import MissingDependencyError, UnknownNameError


@dataclass(frozen=True)
class Row:
    """Where a thing lives: `module:attribute`, the packages it imports, the extra that installs them, if it is one."""

    module: str
    attribute: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    for_tests: bool = False
    loads: tuple[str, ...] = ()  # of a runtime: endings of the model files that it takes
    emulates: bool = False  # of a runtime: it computes what a device would, in its own time

    @property
    def install(self) -> str:
        """What to type if a package is missing."""
        return f"pip install 'edgevit[{self.extra}]'" if self.extra else "pip install edgevit"


FAMILIES: dict[str, tuple[Row, tuple[str, ...]]] = {
    "mobile_former": (
        Row("edgevit.models.mobile_former"),
        tuple(f"mobileformer_{size}" for size in ("26m", "52m", "96m", "151m", "214m", "294m", "508m", "tiny")),
    ),
    "crossformer": (
        Row("edgevit.models.crossformer"),
        tuple(f"crossformer{size}" for size in ("_t", "_s", "_b", "_l", "pp_s", "pp_b", "pp_l", "pp_h", "_tiny")),
    ),
    "vit_lsla": (Row("edgevit.models.vit_lsla"), ("vit_lsla", "vit_lsla_swin", "vit_lsla_r3", "vit_lsla_tiny")),
    "swin": (Row("edgevit.models.swin"), ("swin_t", "swin_s", "swin_b", "swin_tiny")),
    "vit": (
        Row("edgevit.models.vit"),
        (
            *(f"deit_{size}" for size in ("tiny", "small", "base")),
            *(f"deit_{size}_distilled" for size in ("tiny", "small", "base")),
            *(f"vit_{size}" for size in ("tiny", "small", "base", "reference_tiny")),
        ),
    ),
}

TARGETS: dict[str, Row] = {
    "onnx": Row("edgevit.export.to_onnx", "OnnxExporter", ("onnx", "onnxscript", "onnx_ir")),
    "openvino": Row("edgevit.export.to_openvino", "OpenvinoExporter", ("openvino",), extra="openvino"),
    "tensorrt": Row("edgevit.export.to_tensorrt", "TensorrtExporter", ("onnx", "onnxscript", "onnx_ir")),
    "coreml": Row("edgevit.export.to_coreml", "CoremlExporter", ("coremltools",), extra="coreml"),
}

RUNTIMES: dict[str, Row] = {
    "ort": Row("edgevit.runtimes.ort", "OrtRuntime", ("onnxruntime",), loads=(".onnx",)),
    "typed_ort": Row(
        "edgevit.runtimes.typed_ort", "TypedOrtRuntime", ("onnxruntime",), loads=(".onnx",), emulates=True
    ),
    "ov": Row("edgevit.runtimes.ov", "OvRuntime", ("openvino",), extra="openvino", loads=(".onnx", ".xml")),
    "trt": Row("edgevit.runtimes.trt", "TrtRuntime", extra="tensorrt", loads=(".engine",)),
    "coreml": Row("edgevit.runtimes.coreml", "CoremlRuntime", ("coremltools",), extra="coreml", loads=(".mlpackage",)),
    "mil_reference": Row(
        "edgevit.runtimes.mil_reference",
        "MilReference",
        ("coremltools",),
        extra="coreml",
        loads=(".mlpackage",),
        emulates=True,
    ),
    "torch": Row("edgevit.runtimes.torch_eager", "TorchRuntime", ("torch",)),
    "fake": Row("edgevit.runtimes.fake", "FakeRuntime", for_tests=True),
}


def model_names(pattern: str = "*") -> list[str]:
    """Registered model names that match a shell pattern, in the order of the table."""
    return [name for _, names in FAMILIES.values() for name in names if fnmatch.fnmatchcase(name, pattern)]


def family_of(name: str) -> tuple[str, ModelFamily]:
    """The family's name and module of a registered model.

    Raises:
        UnknownNameError: no family has this model.
    """
    for family, (row, names) in FAMILIES.items():
        if name in names:
            return family, cast(ModelFamily, importlib.import_module(row.module))
    raise UnknownNameError("model", name, model_names())


def exporter(name: str) -> Exporter:
    """The exporter of a target.

    Raises:
        UnknownNameError, MissingDependencyError.
    """
    return cast(Exporter, _load("target", name, TARGETS)())


def runtime_class(name: str) -> type[Runtime]:
    """The class of a runtime; its constructor takes what the runtime needs.

    Raises:
        UnknownNameError, MissingDependencyError.
    """
    return cast(type[Runtime], _load("runtime", name, RUNTIMES))


def runtimes_for(model_file: str) -> list[str]:
    """The runtimes that take a model file of this name."""
    return [name for name, row in RUNTIMES.items() if model_file.endswith(row.loads)]


def check_all() -> list[dict[str, Any]]:
    """Whether each target and runtime can be imported here, and what is in the way; `optional` ones need an extra."""
    checks = []
    for kind, rows in (("target", TARGETS), ("runtime", RUNTIMES)):
        for name in (name for name, row in rows.items() if not row.for_tests):
            try:
                _load(kind, name, rows)
                problem = None
            except Exception as error:  # a broken package may raise anything on import
                problem = (str(error).splitlines() or [repr(error)])[0]
            optional = bool(rows[name].extra)
            checks.append({"kind": kind, "name": name, "ok": problem is None, "optional": optional, "problem": problem})
    return checks


def _load(kind: str, name: str, rows: dict[str, Row]) -> Any:
    if name not in rows:
        raise UnknownNameError(kind, name, rows)
    row = rows[name]
    try:
        return getattr(importlib.import_module(row.module), row.attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in row.packages:
            raise
        raise MissingDependencyError(
            f"{kind} {name} needs {error.name}, which is not installed: {row.install}"
        ) from None
