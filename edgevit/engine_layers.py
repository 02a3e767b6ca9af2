"""The layers of a TensorRT engine, in every form that TensorRT 8 to 11 and TensorRT for RTX tell them in.

The inspector and trtexec give JSON, whose keys differ in case and form: 8 and 10 write a tensor's format and type in
one text, `Format/Datatype`, 11 splits it. A builder logs one line for each layer. All of it may come from a stranger's
device: what is not of the expected type counts as absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PRECISIONS = (  # the first that matches a type's text; None: it holds no floating-point numbers
    (re.compile(r"bf16|bfloat16|bfloat"), "bf16"),
    (re.compile(r"fp16|half|float16"), "fp16"),
    (re.compile(r"\bfp8|float8|e4m3|e5m2"), "fp8"),
    (re.compile(r"\bfp4|float4|e2m1"), "fp4"),
    (re.compile(r"int64|int32|uint8|bool"), None),
    (re.compile(r"int8"), "int8"),
    (re.compile(r"int4"), "int4"),
    (re.compile(r"fp32|float"), "fp32"),
)
BITS = {"int4": 4, "fp4": 4, "int8": 8, "fp8": 8, "fp16": 16, "bf16": 16, "tf32": 19, "fp32": 32}
TYPE_KEYS = ("datatype", "type", "format/datatype", "format")  # where a tensor's type stands, the surest first
ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]{1,500})\]")
ATTENTION = re.compile(r"fmha|_mha_|mha_v[0-9]|kgen_mha|fused_mha", re.IGNORECASE)  # in the name of a kernel
PRODUCT = re.compile(  # in the kind of a layer
    r"conv(?!ert)|correlation|gemm|matmul|matrix_?multiply|fully_?connected|\bfc\b|einsum", re.IGNORECASE
)
GENERATED = ("kgen", "runtime_fusion", "")  # made for a group of layers: only the name tells whether a product is in it
NAMED_PRODUCT = re.compile(r"(?i:gemm|matmul|mha)|^__myl_\w*Fc(?![a-z])")
OPAQUE = ("myelin",)  # a whole subgraph: its inputs and outputs tell nothing of what runs inside
LINE_KEY = re.compile(r", (LayerType|Inputs|Constants|Outputs|ParameterType|TacticName|StreamId|Metadata): ")
LINE_TYPE = re.compile(r"(?:Format/)?Datatype: ([^,}]{1,200})", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, `origins` the ONNX nodes that it computes.

    `precision` is None where the engine does not tell. `product` is a convolution, a matrix product or an attention,
    `attention` one that became a single kernel.
    """

    name: str
    kind: str = ""
    precision: str | None = None
    product: bool = False
    attention: bool = False
    origins: tuple[str, ...] = ()


def read_layer(row: Mapping[str, Any]) -> EngineLayer:
    """A layer from its JSON object, keys in any case."""
    row = _folded(row)
    name, kind, tactic = _text(row, "name"), _text(row, "layertype"), _text(row, "tacticname")
    sort = kind.lower()
    opaque = sort in OPAQUE or name.startswith("{ForeignNode")
    by_name = sort in GENERATED and NAMED_PRODUCT.search(name) is not None
    attention = bool(ATTENTION.search(tactic)) or (sort in (*GENERATED, *OPAQUE, "gemm") and "mha" in name.lower())
    return EngineLayer(
        name=name,
        kind=kind,
        precision=None if opaque else _precision(row, tactic),
        product=opaque or attention or by_name or bool(PRODUCT.search(f"{kind} {_text(row, 'parametertype')}")),
        attention=attention,
        origins=tuple(dict.fromkeys(ORIGIN.findall(_text(row, "metadata")))),
    )


def read_lines(text: str) -> tuple[EngineLayer, ...]:
    """The layers in what a builder logs: "Name: c, LayerType: correlation, Inputs: [ { Name: x, Datatype: Half }]"."""
    return tuple(read_layer(_row(line)) for line in text.split("\n") if line.startswith("Name: "))


def type_of(tensor: Mapping[str, Any]) -> str | None:
    """The precision of one tensor, keys in any case; None where it holds no floating-point numbers or does not tell."""
    tensor = _folded(tensor)
    for text in (_text(tensor, key).lower() for key in TYPE_KEYS):
        for pattern, precision in PRECISIONS if text else ():
            if pattern.search(text):
                return precision
    return None


def _precision(row: Mapping[str, Any], tactic: str) -> str | None:
    """What a layer computes in: the narrowest of what it reads, else of what it writes; "tf32" as its kernel says.

    What it reads beside may be wider, e.g. the sum that a product is added to.
    """
    for key in ("inputs", "outputs"):
        found = [precision for tensor in _tensors(row.get(key)) if (precision := type_of(tensor))]
        if found:
            narrowest = min(found, key=lambda precision: BITS[precision])
            return "tf32" if narrowest == "fp32" and "tf32" in tactic.lower() else narrowest
    return None


def _tensors(value: Any) -> Iterable[Mapping[str, Any]]:
    return [tensor for tensor in value if isinstance(tensor, dict)] if isinstance(value, list) else []


def _row(line: str) -> dict[str, Any]:
    """A line of a builder's log in the form of the JSON."""
    first, *rest = LINE_KEY.split(line)
    row: dict[str, Any] = {"Name": first.removeprefix("Name: "), **dict(zip(rest[::2], rest[1::2], strict=True))}
    tensors = {
        key: [{"Datatype": found} for found in LINE_TYPE.findall(row.get(key, ""))] for key in ("Inputs", "Outputs")
    }
    return row | tensors


def _folded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace(" ", "").lower(): value for key, value in row.items()}


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""
