"""What a rule is, and what it is for: a profile names a target and a version of it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from edgevit.errors import UnknownNameError
from edgevit.specs import Finding

from .graph import Graph, Node

Version = tuple[int, int]
Target = Literal["tensorrt", "coreml", "openvino"]
Level = Literal["error", "warning", "advice"]
EVERY: tuple[Target, ...] = ("tensorrt", "coreml", "openvino")
OLDEST_TENSORRT, NEWEST_TENSORRT = (8, 5), (11, 99)  # 8.5 is JetPack 5.1; of 11 all minor releases are alike so far
IOS = (16, 17, 18)  # mlprogram with weights in float16 begins at 15; these are what the CoreML target offers
# What an unknown name is compared with; any TensorRT release between the first and the last is a profile too.
KNOWN = (
    *(f"tensorrt-{version}" for version in ("8.5", "8.6", "10.0", "10.3", "10.7", "10.13", "10.14", "10.15", "11")),
    *(f"coreml-ios{version}" for version in IOS),
    "openvino",
)


@dataclass(frozen=True)
class Profile:
    """One version of one target; OpenVINO's ONNX reader has had the same rules for years and has no version here."""

    name: str
    target: Target
    version: Version

    @property
    def title(self) -> str:
        """As a sentence says it: "TensorRT 8.6"."""
        major, minor = self.version
        return {
            "tensorrt": f"TensorRT {major}.{minor}" if minor or major < 11 else f"TensorRT {major}",
            "coreml": f"CoreML on iOS {major}",
            "openvino": "OpenVINO",
        }[self.target]


@dataclass(frozen=True)
class Hit:
    """One place that breaks a rule, and what there is in particular."""

    node: str
    what: str = ""


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    `error`: the target refuses the graph or computes something else. `warning`: it may, or loses accuracy.
    `advice`: it runs slower than it need. `since` and `before` bound the versions of a rule with one target.
    """

    id: str
    level: Level
    targets: tuple[Target, ...]
    title: str
    why: str
    do: str
    source: str
    check: Callable[[Graph, Profile], Iterable[Hit]]
    since: Version | None = None
    before: Version | None = None

    def applies(self, profile: Profile) -> bool:
        """Whether the rule holds for this version of this target."""
        after = self.since is None or profile.version >= self.since
        return profile.target in self.targets and after and (self.before is None or profile.version < self.before)

    def finding(self, hit: Hit) -> Finding:
        """The finding for one place."""
        return Finding(
            self.id, self.level, hit.node, f"{hit.what}: {self.why}" if hit.what else self.why, self.do, self.source
        )


def resolve(name: str) -> Profile:
    """The profile of a name: tensorrt-10.3 or only 10.3, coreml-ios17, openvino.

    Raises:
        UnknownNameError: there is none.
    """
    release = re.fullmatch(r"(?:tensorrt-)?([0-9]{1,2})(?:\.([0-9]{1,2}))?", name)
    if release is not None:
        version = int(release[1]), int(release[2] or 0)
        if OLDEST_TENSORRT <= version <= NEWEST_TENSORRT:
            return Profile(f"tensorrt-{release[1]}" + (f".{release[2]}" if release[2] else ""), "tensorrt", version)
    if name in (f"coreml-ios{version}" for version in IOS):
        return Profile(name, "coreml", (int(name.removeprefix("coreml-ios")), 0))
    if name == "openvino":
        return Profile(name, "openvino", (0, 0))
    raise UnknownNameError("lint profile", name, KNOWN)


@functools.cache
def support() -> Mapping[str, Any]:
    """What each target reads, per release: `support.json`."""
    text = resources.files(__package__ or "").joinpath("support.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def at_release(table: Mapping[str, Any], version: Version) -> Any:
    """The row of a table {release: value} that holds for a version: the newest that is not newer."""
    rows = {tuple(map(int, release.split("."))): value for release, value in table.items()}
    return rows[max((row for row in rows if row <= version), default=min(rows))]


def hits(nodes: Iterable[Node], what: str = "") -> list[Hit]:
    """A hit at each of these nodes."""
    return [Hit(node.name, what) for node in nodes]
