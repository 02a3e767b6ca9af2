"""Rules on an ONNX graph, as data: what a target refuses, gets wrong or runs slowly, told before the device says it.

One table, `RULES`; its rows stand in one file per topic. CoreML is built from the network and not from ONNX: its rules
look at the graph as a picture of what the network contains.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from edgevit.specs import Finding

from . import attention, operators, precision, quantization, shapes
from .graph import Graph, view
from .reading import read_onnx
from .rules import KNOWN, Profile, Rule, resolve

__all__ = ["KNOWN", "LEVELS", "RULES", "Profile", "Rule", "check", "lint_graph", "read_onnx", "resolve", "view"]

RULES: tuple[Rule, ...] = (
    *shapes.RULES, *operators.RULES, *quantization.RULES, *precision.RULES, *attention.RULES,
)  # fmt: skip
LEVELS = ("error", "warning", "advice")


def lint_graph(model: onnx.ModelProto, profiles: Sequence[str]) -> tuple[Finding, ...]:
    """What the rules of these profiles find in a model: errors first, then in the order of the graph.

    Raises:
        UnknownNameError: no such profile. ArtifactError: no rule can look at such a graph.
    """
    wanted = [resolve(name) for name in profiles]
    graph = view(model)
    found = dict.fromkeys(finding for profile in wanted for finding in check(graph, profile))
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def check(graph: Graph, profile: Profile) -> list[Finding]:
    """The findings of one profile: errors first, then in the order of the graph; what is not a node comes before."""
    places = {node.name: node.order for node in reversed(graph.nodes)}
    findings = [rule.finding(hit) for rule in RULES if rule.applies(profile) for hit in rule.check(graph, profile)]
    return sorted(dict.fromkeys(findings), key=lambda f: (LEVELS.index(f.level), places.get(f.node, -1)))
