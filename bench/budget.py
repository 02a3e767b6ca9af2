"""What a candidate may cost beside time: accuracy, size, parameters and multiply-adds, from two manifests.

Nothing is measured here. The figures are exact, and so is the comparison with a limit: 101 bytes for 100 are within
1 %, which floating point would deny. Manifests are untrusted input: a figure of another kind counts as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from edgevit.errors import UsageError
from edgevit.manifest import SAMPLE, are_accuracies
from edgevit.specs import Check, Verdict, size_text

from .accuracy import Hits, drop_points

MAX_COUNT = 1 << 63  # bytes, parameters, MACs of a whole network: more is no count
MAX_POINTS = 100.0  # there are no more to lose
OPS_SHOWN = 5  # of those that nobody counts; the manifest has them all
RECORD = "run: edgevit evaluate {} --data DIR --record"

Counted = Literal["size", "parameters", "macs"]


@dataclass(frozen=True)
class Limits:
    """How much worse a candidate may be: shares of the baseline's figure (0.05 = 5 %), of accuracy points of top-1."""

    max_slowdown: float = 0.05  # a judgement: below it few would wait for a faster one
    max_drop_points: float = 0.5  # what INT8 may lose against float32 here
    max_size: float = 0.01  # names, padding and a new exporter's metadata move a file by less
    max_parameters: float = 0.0  # nothing but a change of the network or of a rewrite moves them
    max_macs: float = 0.0  # as parameters

    def __post_init__(self) -> None:
        """Raises UsageError on what is no limit."""
        for name, value in asdict(self).items():
            top, wish = (MAX_POINTS, "points, e.g. 0.5") if name == "max_drop_points" else (1.0, "e.g. 0.05 for 5 %")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= top:  # NaN is not in between either
                raise UsageError(f"{name} {value!r}: expected a number from 0 to {top:g}, {wish}")


def check_manifests(baseline: Mapping[str, Any], candidate: Mapping[str, Any], limits: Limits) -> tuple[Check, ...]:
    """Accuracy (one check for each set of pictures that both recorded), size, parameters and MACs of two manifests.

    Each manifest is seen at its own image size, that of its `image`. "not gated" where a figure is missing or cannot be
    compared: what nobody recorded is not a loss, and a gate that fails for want of it would be switched off. The check
    says what to do about it.
    """
    size, parameters = ([counted(each, key) for each in (baseline, candidate)] for key in ("size", "parameters"))
    return (
        *_accuracies(baseline, candidate, limits.max_drop_points),
        _exact("size", "bytes", size[0], size[1], limits.max_size),
        _exact("parameters", "parameters", parameters[0], parameters[1], limits.max_parameters),
        _macs(baseline, candidate, limits.max_macs),
    )


def gated_part(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `check_manifests` reads of a manifest, for a store of baselines; JSON values."""
    complexity = manifest.get("complexity")
    counts = complexity if isinstance(complexity, dict) else {}
    return {
        "files": manifest.get("files", []),
        "image": {"size": _image_size(manifest)},
        "batch": manifest.get("batch"),
        "complexity": {key: counts.get(key) for key in ("parameters", "macs", "unknown")},
        "accuracy": manifest.get("accuracy", []),
    }


def counted(manifest: Mapping[str, Any], what: Counted) -> int | None:
    """One figure of a manifest, None where it has none: bytes of all files but the samples, parameters, or MACs."""
    if what == "size":
        return _size_bytes(manifest)
    complexity = manifest.get("complexity")
    value = complexity.get(what) if isinstance(complexity, dict) else None
    return value if _is_count(value) else None


def _size_bytes(manifest: Mapping[str, Any]) -> int | None:
    files = manifest.get("files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in files):
        return None
    sizes = [file.get("bytes") for file in files if not file["name"].startswith(f"{SAMPLE}/")]
    return sum(sizes) if sizes and all(map(_is_count, sizes)) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _exact(what: Counted, unit: str, before: int | None, after: int | None, limit: float) -> Check:
    """A check of two whole numbers."""
    if before is None or after is None:
        lacking = [name for name, value in (("baseline", before), ("candidate", after)) if value is None]
        why = f"not in the manifest of the {' and of the '.join(lacking)}; export again"
        return _not_gated(what, unit, before, after, limit, why)
    if before == 0:  # no share of nothing
        detail = "the baseline has none" if after else ""
        return Check(what, _verdict(after > 0), unit, before, after, None if after else 0.0, limit, detail=detail)
    share = Fraction(after - before, before)
    return Check(what, _verdict(share > _written(limit)), unit, before, after, float(share), limit)


def _macs(baseline: Mapping[str, Any], candidate: Mapping[str, Any], limit: float) -> Check:
    """MACs of one pass, unless they are only known to be at least so many, or the passes are of different batches."""
    check = _exact("macs", "MACs", counted(baseline, "macs"), counted(candidate, "macs"), limit)
    if check.verdict == "not gated":
        return check
    batches = [1 if each.get("batch") == "dynamic" else each.get("batch") for each in (baseline, candidate)]
    if batches[0] != batches[1]:
        why = f"one pass is of {_shown(batches[0])} pictures in the baseline, of {_shown(batches[1])} in the candidate"
        return _not_gated("macs", "MACs", check.baseline, check.candidate, limit, f"{why}; export both for one batch")
    before, after = _uncounted(baseline), _uncounted(candidate)
    if before or (after and check.verdict == "pass"):  # a lower bound beyond the limit is beyond it
        side, names = ("baseline", before) if before else ("candidate", after)
        why = f"the {side} has at least so many: nobody counts its {', '.join(names[:OPS_SHOWN])}"
        return _not_gated("macs", "MACs", check.baseline, check.candidate, limit, why)
    return check


def _uncounted(manifest: Mapping[str, Any]) -> list[str]:
    """The operators that may hide a product."""
    unknown = manifest["complexity"].get("unknown")
    return sorted(map(_shown, unknown)) if isinstance(unknown, dict) else []


def _accuracies(baseline: Mapping[str, Any], candidate: Mapping[str, Any], limit: float) -> list[Check]:
    before, after = _recorded(baseline), _recorded(candidate)
    shared = [digest for digest in before if digest in after]
    if shared:
        return [_accuracy(before[digest], after[digest], limit) for digest in shared]
    return [_not_gated("accuracy", "%", None, None, limit, _why_no_accuracy(baseline, candidate))]


def _recorded(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The accuracies of a manifest at its own image size, by the sha256 of their pictures."""
    records = manifest.get("accuracy", [])
    if not are_accuracies(records):
        return {}
    size = _image_size(manifest)
    return {record["data"]["sha256"]: record for record in records if record["image_size"] == size}


def _accuracy(before: Mapping[str, Any], after: Mapping[str, Any], limit: float) -> Check:
    """The same pictures on both sides: the loss on them is exact, the interval is for others like them."""
    pictures, hits = before["data"]["pictures"], (before["top1"]["hits"], after["top1"]["hits"])
    lost = Fraction(100 * (hits[0] - hits[1]), pictures)
    interval = drop_points(_hits(before), _hits(after))
    runtimes = (before["runtime"], after["runtime"])
    by = "" if runtimes[0] == runtimes[1] else f", by {_shown(runtimes[0])} and by {_shown(runtimes[1])}"
    return Check(
        "accuracy",
        _verdict(lost > _written(limit)),
        "%",
        100 * hits[0] / pictures,
        100 * hits[1] / pictures,
        float(lost),
        limit,
        interval.low,
        interval.high,
        f"top-1 of the same {_pictures(before)}{by}",
    )


def _why_no_accuracy(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    """Why no two accuracies could be compared, and what to do."""
    sides = {"baseline": baseline, "candidate": candidate}
    lacking = [name for name, manifest in sides.items() if not _recorded(manifest)]
    if not lacking:
        first, second = (next(iter(_recorded(manifest).values())) for manifest in sides.values())
        came = f"the baseline of {_pictures(first)}, the candidate of {_pictures(second)}"
        return (
            f"recorded on other pictures, {came}; {RECORD.format('ARTIFACT')} both on the same, with the same --limit"
        )
    if len(lacking) == 2:
        return f"neither has one; {RECORD.format('ARTIFACT')} for both"
    (name,) = lacking
    other = next(each for each in sides if each != name)
    at = _image_size(sides[name])
    where = f" at {size_text(at)}" if at and sides[name].get("accuracy") else ""
    record = next(iter(_recorded(sides[other]).values()))
    limit = record["data"]["limit"]
    command = RECORD.format(name.upper()) + ("" if limit is None else f" --limit {limit}")
    return f"the {other} has one, of {_pictures(record)}, the {name} none{where}; {command}"


def _hits(record: Mapping[str, Any]) -> Hits:
    """(pictures,) of True where top-1 was right."""
    packed = np.frombuffer(bytes.fromhex(record["hits"]), np.uint8)
    return np.unpackbits(packed, count=record["data"]["pictures"]).astype(np.bool_)


def _pictures(record: Mapping[str, Any]) -> str:
    return f"{record['data']['pictures']:,} pictures of {_shown(record['data']['source'])}"


def _image_size(manifest: Mapping[str, Any]) -> list[Any]:
    """[height, width], empty where it says none."""
    image = manifest.get("image")
    size = image.get("size") if isinstance(image, dict) else None
    return list(size) if isinstance(size, list | tuple) else []


def _written(limit: float) -> Fraction:
    """A limit as it was written: 0.01 is a hundredth, which no float is."""
    return Fraction(repr(float(limit)))


def _verdict(beyond: bool) -> Verdict:
    return "regression" if beyond else "pass"


def _shown(value: Any) -> str:
    """A word of a manifest for a sentence, cut where it goes on and on."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _not_gated(
    what: Literal["accuracy", "size", "parameters", "macs"],
    unit: str,
    before: float | None,
    after: float | None,
    limit: float,
    why: str,
) -> Check:
    return Check(what, "not gated", unit, before, after, None, limit, detail=why)
