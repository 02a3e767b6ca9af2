"""Rules on operators: which are read at all, in which form, from which opset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from onnx import defs

from .graph import CONTROL_FLOW, Graph, Node
from .rules import EVERY, Hit, Profile, Rule, Version, at_release, support

PARSER_TABLE = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
PARSER_CHANGES = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md"
ONNX_CHANGES = "https://github.com/onnx/onnx/blob/main/docs/Changelog.md"
OPENVINO_TABLE = "https://github.com/openvinotoolkit/openvino/blob/master/src/frontends/onnx/docs/supported_ops.md"
MIL_OPS = "https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html"
ONNX_IR = "https://github.com/onnx/onnx/blob/main/docs/IR.md"
# Domains whose operators exist in one runtime only; another domain may be that of a plugin.
FOREIGN = (
    "com.microsoft",
    "com.ms",
    "ai.onnx.ml",
    "ai.onnx.training",
    "ai.onnx.preview",
    "org.pytorch",
    "pkg.onnxscript",
)


@functools.cache
def tensorrt_operators(version: Version) -> frozenset[str]:
    """What the parser of a TensorRT release reads."""
    table = support()["tensorrt"]["operators"].items()
    rows = [names.split() for release, names in table if tuple(map(int, release.split("."))) <= version]
    return frozenset(name for row in rows for name in row)


def unread_by_tensorrt(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Operators of ONNX that are not in the release's table."""
    known = tensorrt_operators(profile.version)
    for node in graph.nodes:
        if node.standard and node.op not in known:
            yield Hit(node.name, f"{node.op}, {_first_release(node.op)}")


@functools.cache
def _first_release(op: str) -> str:
    """From which release on an operator is read, as a sentence says it."""
    table = support()["tensorrt"]["operators"].items()
    release = next((release for release, names in table if op in names.split()), None)
    return "which no TensorRT reads" if release is None else f"which TensorRT reads from {release} on"


def foreign_operator(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Operators of a domain that no plugin of TensorRT's serves."""
    for node in graph.nodes:
        if node.domain.startswith(FOREIGN) and node.op not in tensorrt_operators(profile.version):
            yield Hit(node.name, node.kind)


def plugin_operator(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Operators of other domains, which need a plugin; or which are taken for ONNX's own of the same name."""
    known = tensorrt_operators(profile.version)
    for node in graph.nodes:
        if node.standard:
            continue
        if node.op in known:
            yield Hit(node.name, f"{node.kind} is read as ONNX's own {node.op}")
        elif not node.domain.startswith(FOREIGN):
            yield Hit(node.name, f"{node.kind} needs a plugin of this name")


def newer_form(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Operators that use an input or attribute which came after the opset that a release knows."""
    newest = at_release(support()["tensorrt"]["opset"], profile.version)
    if graph.opset <= newest:
        return
    for node in graph.nodes:
        news = _news(node, graph.opset, newest) if node.standard else ""
        if news:
            yield Hit(node.name, f"{node.op} {news}")


def _news(node: Node, opset: int, newest: int) -> str:
    """What a node uses that its operator did not have at an older opset."""
    try:
        schema, old = defs.get_schema(node.op, opset), defs.get_schema(node.op, newest)
    except defs.SchemaError:  # an operator that did not exist then is another rule's affair
        return ""
    if schema.since_version == old.since_version:
        return ""
    added = [name for name in node.attributes if name not in old.attributes and _differs(node, name, schema)]
    if added:
        return f"has the attribute {added[0]} of opset {schema.since_version}"
    given = len([name for name in node.inputs if name])
    return f"has {given} inputs, which came with opset {schema.since_version}" if given > old.max_input else ""


def _differs(node: Node, name: str, schema: defs.OpSchema) -> bool:
    """Whether an attribute says something else than leaving it out."""
    known = schema.attributes.get(name)
    return known is None or known.default_value.SerializeToString() != _bare(node, name)


def _bare(node: Node, name: str) -> bytes:
    copy = type(node.attributes[name])()
    copy.CopyFrom(node.attributes[name])
    copy.ClearField("doc_string")
    return bytes(copy.SerializeToString())


def undocumented_opset(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """An opset outside of what a release documents."""
    tables = support()["tensorrt"]
    oldest, newest = (at_release(tables[key], profile.version) for key in ("oldest_opset", "opset"))
    if not oldest <= graph.opset <= newest:
        yield Hit("opset", f"opset {graph.opset}, {profile.title} documents {oldest} to {newest}")


def newer_file_format(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """A file format newer than the ONNX that a release was built with."""
    newest = at_release(support()["tensorrt"]["file_format"], profile.version)
    if graph.ir_version > newest:
        yield Hit("ir_version", f"IR version {graph.ir_version}, the parser of {profile.title} was built with {newest}")


def _constant_input(index: int, what: str) -> Callable[[Graph, Node], str]:
    def check(graph: Graph, node: Node) -> str:
        name = node.input(index)
        return f"{node.op} computes its {what}" if name and not graph.is_constant(name) else ""

    return check


def _extra_output(_: Graph, node: Node) -> str:
    return f"{node.op} has a second output" if len([name for name in node.outputs if name]) > 1 else ""


def _dilated(_: Graph, node: Node) -> str:
    return f"{node.op} has dilations" if any(d != 1 for d in node.integers("dilations")) else ""


def _antialiased(_: Graph, node: Node) -> str:
    return "Resize has antialias" if node.integer("antialias", 0) else ""


def _not_4d(graph: Graph, node: Node) -> str:
    rank = graph.rank(node.input(0))
    return f"{node.op} has an input of rank {rank}, not 4" if rank not in (None, 4) else ""


def _softcap(_: Graph, node: Node) -> str:
    capped = "softcap" in node.attributes and node.attributes["softcap"].f != 0
    return "Attention has softcap" if capped else ""


REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
AXES = _constant_input(1, "axes")
# Operators, what of them is not read, and the release that lifted it.
RESTRICTIONS: tuple[tuple[tuple[str, ...], Callable[[Graph, Node], str], Version | None], ...] = (
    (REDUCTIONS, AXES, None),
    (("Squeeze", "Unsqueeze"), AXES, (10, 7)),
    (("Slice",), _constant_input(3, "axes"), (10, 3)),
    (("Pad",), _constant_input(3, "axes"), (10, 4)),
    (("CumSum",), _constant_input(1, "axis"), (10, 8)),
    (("OneHot",), _constant_input(1, "depth"), None),
    (("TopK",), _constant_input(1, "K"), (8, 6)),
    (("MaxPool", "LayerNormalization"), _extra_output, None),
    (("MaxPool", "AveragePool", "LpPool"), _dilated, None),
    (("Resize",), _antialiased, None),
    (("GridSample",), _not_4d, None),
    (("Attention",), _not_4d, (11, 0)),
    (("Attention",), _softcap, None),
)


def restricted_use(graph: Graph, profile: Profile) -> Iterator[Hit]:
    """Operators that are read, but not the way they are used."""
    known = tensorrt_operators(profile.version)
    for node in graph.live:
        if node.op not in known:
            continue
        for ops, check, lifted in RESTRICTIONS:
            what = check(graph, node) if node.is_a(*ops) and (lifted is None or profile.version < lifted) else ""
            if what:
                yield Hit(node.name, what)


def wide_einsum(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Ellipses and diagonals."""
    for node in graph.named("Einsum"):
        equation = node.text("equation").replace(" ", "")
        terms = equation.split("->")[0].split(",")
        if "..." in equation or any(len(set(term)) < len(term) for term in terms):
            yield Hit(node.name, f"equation {equation[:80]!r}")


def unread_by_openvino(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Operators that the ONNX reader answers with "unsupported"."""
    missing = set(support()["openvino"]["unsupported"].split())
    for node in graph.nodes:
        if node.standard and node.op in missing:
            yield Hit(node.name, node.op)


def foreign_to_openvino(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Operators of domains that the frontend does not list."""
    for node in graph.nodes:
        if not node.standard and node.domain not in support()["openvino"]["domains"]:
            yield Hit(node.name, node.kind)


def without_mil_operator(graph: Graph, _: Profile) -> Iterator[Hit]:
    """What CoreML's own language has no operator for."""
    missing = set(support()["coreml"]["unsupported"].split())
    for node in graph.live:
        if not node.standard or node.op in missing:
            yield Hit(node.name, node.kind)


def leaves_neural_engine(graph: Graph, _: Profile) -> Iterator[Hit]:
    """Operators seen to run outside of the Neural Engine."""
    for node in graph.named(*support()["coreml"]["leaves_neural_engine"].split()):
        yield Hit(node.name, node.op)


def control_flow(graph: Graph, _: Profile) -> Iterator[Hit]:
    """If, Loop and Scan."""
    for node in graph.named(*CONTROL_FLOW):
        yield Hit(node.name, node.op)


RULES = (
    Rule(
        "TRT-OPS-001", "error", ("tensorrt",), "operator not supported",
        "the parser of this release refuses the graph",
        "export for this release (`edgevit export --to tensorrt` writes it in older operators), or use a newer release",
        PARSER_TABLE, unread_by_tensorrt,
    ),
    Rule(
        "TRT-OPS-002", "error", ("tensorrt",), "operator of another runtime",
        "it exists in one runtime only and the parser refuses the graph",
        "lint and build the graph from before that runtime's optimiser changed it",
        PARSER_TABLE, foreign_operator,
    ),
    Rule(
        "TRT-OPS-003", "warning", ("tensorrt",), "operator of another domain",
        "the parser looks for a plugin, and takes an operator for ONNX's own where it has the name of one",
        "load the plugin's library when building, or express it in ONNX's own operators",
        PARSER_CHANGES, plugin_operator,
    ),
    Rule(
        "TRT-OPS-004", "error", ("tensorrt",), "form of an operator too new",
        "a parser that knows an older opset overlooks it and builds something else, or refuses",
        "export with the opset of this release",
        ONNX_CHANGES, newer_form,
    ),
    Rule(
        "TRT-OPS-005", "warning", ("tensorrt",), "opset not documented for the release",
        "a parser reads operators in the form it knows, but nobody promises it for this opset",
        "export with an opset that the release documents",
        PARSER_TABLE, undocumented_opset,
    ),
    Rule(
        "TRT-OPS-006", "advice", ("tensorrt",), "file format newer than the parser",
        "the parser only notes it in its log; fields that it does not know are overlooked",
        "save the file with the IR version that belongs to its opset",
        ONNX_IR, newer_file_format,
    ),
    Rule(
        "TRT-OPS-007", "error", ("tensorrt",), "use of an operator not supported",
        "the parser refuses this use of the operator",
        "make it a constant, drop the output or attribute, or use a release that reads it",
        PARSER_TABLE, restricted_use,
    ),
    Rule(
        "TRT-OPS-008", "error", ("tensorrt",), "Einsum with an ellipsis or a diagonal",
        "releases before 10.12 read neither",
        "write every axis as a letter of its own, or a MatMul with Transpose",
        PARSER_CHANGES, wide_einsum, before=(10, 12),
    ),
    Rule(
        "OV-OPS-001", "error", ("openvino",), "operator not supported",
        "OpenVINO's ONNX reader does not know the operator",
        "express it in other operators, or give OpenVINO an extension for it",
        OPENVINO_TABLE, unread_by_openvino,
    ),
    Rule(
        "OV-OPS-002", "warning", ("openvino",), "operator of another domain",
        "OpenVINO's ONNX reader knows no operator of this domain without an extension",
        "express it in ONNX's own operators, or give OpenVINO an extension for it",
        OPENVINO_TABLE, foreign_to_openvino,
    ),
    Rule(
        "CML-OPS-001", "warning", ("coreml",), "no counterpart in CoreML",
        "CoreML is built from the network and not from this graph, but its language has no such operator",
        "express it in other operators in the network",
        MIL_OPS, without_mil_operator,
    ),
    Rule(
        "CML-ANE-001", "advice", ("coreml",), "leaves the Neural Engine",
        "seen to run on the CPU, with a copy there and back; which unit runs what is not documented",
        "keep it at the end of the network, or select with constant indices",
        "https://github.com/roboflow/rf-detr/issues/1495", leaves_neural_engine,
    ),
    Rule(
        "GEN-FLOW-001", "warning", EVERY, "control flow",
        "what branches or loops is compiled in pieces, without fusion across their borders; some devices refuse it",
        "export for a fixed shape, where decisions on shapes are taken beforehand",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-with-loops.html", control_flow,
    ),
)  # fmt: skip
