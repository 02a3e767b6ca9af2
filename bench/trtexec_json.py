"""The JSON files that trtexec exports: times, profile, layer information; and what build.sh records beside them.

Each is told by what it holds, not by its name. TensorRT 8 to 10 writes a tensor's format and type in one text,
`Format/Datatype`; 11 splits it, and `Bindings` becomes `I/O Tensors`. Keys are read in any case. Everything is checked
here: these files come from strangers' devices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from edgevit.errors import InputError

from .trtexec_log import clean, number, short

TIMES = ("latencyms", "computems", "h2dms", "d2hms")
MAX_COUNT = 1e12  # of queries and repetitions
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
ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]{1,500})\]")
ATTENTION = re.compile(r"fmha|_mha_|mha_v[0-9]|kgen_mha|fused_mha", re.IGNORECASE)
PRODUCT = re.compile(r"conv(?!ert)|gemm|matmul|matrix_?multiply|fully_?connected|einsum", re.IGNORECASE)  # kinds
GENERATED = ("kgen", "")  # kernels made for a group of layers: only their names tell whether a product is among them
NAMED_PRODUCT = re.compile(r"gemm|matmul|mha", re.IGNORECASE)
OPAQUE = ("myelin",)  # a whole subgraph: its inputs and outputs tell nothing of what runs inside


@dataclass(frozen=True)
class Times:
    """One number per query, in milliseconds, in the order they ran; `span_ms` from the first start to the last end."""

    latency_ms: tuple[float, ...]
    compute_ms: tuple[float, ...]
    transfer_ms: tuple[float, ...]
    span_ms: float | None


@dataclass(frozen=True)
class Layer:
    """One layer of an engine; `precision` is None where the file does not tell."""

    name: str
    kind: str
    precision: str | None
    product: bool
    attention: bool
    origins: tuple[str, ...]


@dataclass(frozen=True)
class Layers:
    """The layers of an engine; `detailed` is false where only their names were kept at the build."""

    layers: tuple[Layer, ...]
    detailed: bool


Profile = tuple[tuple[str, float], ...]  # (layer, milliseconds per query)


def read_json(place: str, text: str) -> Times | Profile | Layers | dict[str, Any] | None:
    """What a JSON text is: times, a profile, layers, build.sh's record (a dict), or None for anything else.

    Raises:
        InputError: it is no JSON, or one of these and damaged.
    """
    try:
        # not strict: trtexec writes the names of layers as they are, and ONNX names may hold control characters
        document = json.loads(text, parse_constant=_no_number, strict=False)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else short(str(error))
        raise InputError(f"{place}: not JSON ({reason}); copy the file from the device again") from None
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        rows = [_lower(row) for row in document]
        if "latencyms" in rows[0]:
            return _times(place, rows)
        if "count" in rows[0] or "averagems" in rows[0]:
            return _profile(place, rows)
    if isinstance(document, dict):
        keys = _lower(document)
        if "layers" in keys:
            return _layers(place, keys["layers"])
        if document.get("tool") == "edgevit build.sh":
            return _record(place, document)
    return None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _lower(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in row.items()}


def _times(place: str, rows: list[dict[str, Any]]) -> Times:
    columns: dict[str, list[float]] = {key: [] for key in TIMES}
    for i, row in enumerate(rows):
        for key in TIMES:
            columns[key].append(number(place, f"query {i + 1}: {key}", row.get(key)))
    if not min(columns["latencyms"]) > 0:
        raise InputError(f"{place}: a query took 0 ms; time it again")
    first, last = rows[0].get("starth2dms"), rows[-1].get("endd2hms")
    span = None
    if first is not None and last is not None:
        span = number(place, "endD2hMs", last, MAX_COUNT) - number(place, "startH2dMs", first, MAX_COUNT)
    transfer = tuple(a + b for a, b in zip(columns["h2dms"], columns["d2hms"], strict=True))
    span = span if span is not None and span > 0 else None
    return Times(tuple(columns["latencyms"]), tuple(columns["computems"]), transfer, span)


def _profile(place: str, rows: list[dict[str, Any]]) -> Profile:
    """Milliseconds per query; `averageMs` where it is, else `timeMs` over the number of queries in the first row."""
    count = number(place, "count", rows[0].get("count"), MAX_COUNT) if "count" in rows[0] else None
    entries = []
    for row in rows if count is None else rows[1:]:
        name = _text(place, "a layer's name", row.get("name"))
        if "averagems" in row:
            entries.append((name, number(place, f"averageMs of {name}", row["averagems"])))
        elif count:
            entries.append((name, number(place, f"timeMs of {name}", row.get("timems"), MAX_COUNT) / count))
        else:
            raise InputError(f"{place}: {name} has no averageMs, and no count divides its timeMs; profile it again")
    return tuple(entries)


def _text(place: str, what: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {short(value)}, expected a text")
    return clean(value)


def _word(row: Mapping[str, Any], key: str) -> str:
    """A text that may be absent; anything else counts as absent."""
    value = row.get(key)
    return value if isinstance(value, str) else ""


def _layers(place: str, rows: Any) -> Layers:
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise InputError(f"{place}: Layers is {short(rows)}, expected a list of layers; export it again")
    layers = tuple(
        Layer(clean(row), "", None, product=False, attention=False, origins=())
        if isinstance(row, str)
        else _layer(place, _lower(row))
        for row in rows
    )
    return Layers(layers, detailed=any(isinstance(row, dict) for row in rows))


def _layer(place: str, row: dict[str, Any]) -> Layer:
    name, kind = _text(place, "a layer's Name", row.get("name")), clean(_word(row, "layertype"))
    tactic = _word(row, "tacticname")
    by_name = kind.lower() in GENERATED and NAMED_PRODUCT.search(name) is not None
    opaque = kind.lower() in OPAQUE or name.startswith("{ForeignNode")
    attention = bool(ATTENTION.search(tactic)) or (kind.lower() in ("kgen", "myelin", "gemm") and "mha" in name.lower())
    return Layer(
        name=name,
        kind=kind,
        precision=None if opaque else _precision(place, row, tactic),
        product=opaque or attention or by_name or bool(PRODUCT.search(f"{kind} {_word(row, 'parametertype')}")),
        attention=attention,
        origins=tuple(clean(origin) for origin in ORIGIN.findall(_word(row, "metadata"))),
    )


def _precision(place: str, row: dict[str, Any], tactic: str) -> str | None:
    """What a layer computes in: the narrowest of what it reads, else of what it writes; "tf32" as its kernel says."""
    for key in ("inputs", "outputs"):
        found = [precision for tensor in _tensors(place, row.get(key)) if (precision := type_of(tensor))]
        if found:
            narrowest = min(found, key=lambda precision: BITS[precision])
            return "tf32" if narrowest == "fp32" and "tf32" in tactic.lower() else narrowest
    return None


def _tensors(place: str, value: Any) -> Iterable[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tensor, dict) for tensor in value):
        raise InputError(f"{place}: a layer's tensors are {short(value)}, expected a list of objects; export it again")
    return [_lower(tensor) for tensor in value]


def type_of(tensor: Mapping[str, Any]) -> str | None:
    """The precision of one tensor (keys in lower case), from the type's own field or the text beside the format."""
    for key in ("datatype", "data type", "type", "format/datatype", "format"):
        text = _word(tensor, key).lower()
        for pattern, precision in PRECISIONS if text else ():
            if pattern.search(text):
                return precision
    return None


def _record(place: str, document: dict[str, Any]) -> dict[str, Any]:
    """build.sh's own record: texts cleaned, flags a list of texts, batch a count."""
    record: dict[str, Any] = {key: clean(value) for key, value in document.items() if isinstance(value, str)}
    batch, flags = document.get("batch"), document.get("flags")
    if not isinstance(batch, int) or isinstance(batch, bool) or not 0 < batch <= MAX_COUNT:
        raise InputError(f"{place}: batch is {short(batch)}, expected a number of pictures")
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        raise InputError(f"{place}: flags is {short(flags)}, expected a list of texts")
    if record.get("step") not in ("build", "time"):
        raise InputError(f"{place}: step is {short(document.get('step'))}, expected build or time")
    return {**record, "batch": batch, "flags": [clean(flag) for flag in flags]}
