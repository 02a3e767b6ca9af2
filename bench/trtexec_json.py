"""The JSON files that trtexec exports: times, profile, layer information; and what build.sh records beside them.

Each is told by what it holds, not by its name. Keys are read in any case. Everything is checked here: these files come
from strangers' devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from edgevit.engine_layers import EngineLayer, read_layer
from edgevit.errors import InputError

from .trtexec_log import clean, number, short

TIMES = ("latencyms", "computems", "h2dms", "d2hms")
MAX_COUNT = 1e12  # of queries and repetitions


@dataclass(frozen=True)
class Times:
    """One number per query, in milliseconds, in the order they ran; `span_ms` from the first start to the last end."""

    latency_ms: tuple[float, ...]
    compute_ms: tuple[float, ...]
    transfer_ms: tuple[float, ...]
    span_ms: float | None


@dataclass(frozen=True)
class Layers:
    """The layers of an engine; `detailed` is false where only their names were kept at the build."""

    layers: tuple[EngineLayer, ...]
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


def _layers(place: str, rows: Any) -> Layers:
    if not isinstance(rows, list) or not all(isinstance(row, str | dict) for row in rows):
        raise InputError(f"{place}: Layers is {short(rows)}, expected a list of layers; export it again")
    layers = tuple(EngineLayer(clean(row)) if isinstance(row, str) else _layer(place, row) for row in rows)
    return Layers(layers, detailed=any(isinstance(row, dict) for row in rows))


def _layer(place: str, row: dict[str, Any]) -> EngineLayer:
    keys = _lower(row)
    name = _text(place, "a layer's Name", keys.get("name"))
    for tensors in (keys.get("inputs"), keys.get("outputs")):
        good = isinstance(tensors, list) and all(isinstance(tensor, dict) for tensor in tensors)
        if tensors is not None and not good:
            raise InputError(
                f"{place}: a layer's tensors are {short(tensors)}, expected a list of objects; export it again"
            )
    layer = read_layer(row)
    return replace(layer, name=name, kind=clean(layer.kind), origins=tuple(map(clean, layer.origins)))


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
