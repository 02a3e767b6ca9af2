"""A Core ML package on disk, the same bytes for the same model, and what there is to say of it."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from edgevit.contracts import Built
from edgevit.specs import Certificate, TensorSpec

from .mil_quiet import silent

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

from coremltools.proto import Model_pb2  # noqa: E402  # after the line above, or the remarks are printed

PROGRAM = "Data/com.apple.CoreML/model.mlmodel"  # inside a package, as Core ML's tools lay it out
DEBUG_MAP = "executorch_debug_handle_mapping.json"  # written for another project's debugger


def save(converted: Any, path: Path) -> None:
    """Write the package with nothing random of ours: maps in order, items named after their paths."""
    package = path.with_suffix(".mlpackage")
    with silent():
        converted.save(str(package))
    (package / DEBUG_MAP).unlink(missing_ok=True)
    spec: Any = Model_pb2.Model()
    spec.ParseFromString((package / PROGRAM).read_bytes())
    (package / PROGRAM).write_bytes(spec.SerializeToString(deterministic=True))
    (package / PROGRAM).chmod(0o644)  # coremltools leaves it readable by its writer alone
    manifest = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
    names = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in manifest["itemInfoEntries"].items()
    }
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    items = sorted((names[old], item) for old, item in manifest["itemInfoEntries"].items())
    text = json.dumps({**manifest, "itemInfoEntries": dict(items)}, indent=2, sort_keys=True)
    (package / "Manifest.json").write_text(text + "\n", encoding="utf-8")
    if package != path:
        shutil.move(package, path)


def described(
    name: str, converted: Any, graph: Any, certificates: Sequence[Certificate], choices: dict[str, Any]
) -> Built:
    """What there is to say of the saved package."""
    function = converted.get_spec().mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    made = {value.name: value.type for operation in block.operations for value in operation.outputs}
    pixels: Literal["normalised", "pixels"] = "pixels" if choices["input"] == "image" else "normalised"
    inputs = [TensorSpec(value.name, _lengths(value.type), values=pixels) for value in function.inputs]
    outputs = [TensorSpec(name, _lengths(made[name])) for name in block.outputs if _lengths(made[name])]
    inputs, outputs = (
        [replace(s, layout="NCHW" if len(s.shape) == 4 else "") for s in each] for each in (inputs, outputs)
    )
    return Built(name, name, graph, tuple(inputs), tuple(outputs), tuple(certificates), choices)


def _lengths(value_type: Any) -> tuple[int | str, ...]:
    dimensions = value_type.tensorType.dimensions
    return tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else "batch" for d in dimensions)
