"""What a target would refuse, get wrong or run slowly, told from the graph alone: `lint`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevit import registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.contracts import Built
from edgevit.errors import ExportError, MissingDependencyError, UsageError
from edgevit.options import parse_options
from edgevit.specs import Finding

PARSER_SINCE = (10, 0)  # TensorRT for RTX has the parser of 11; what it refuses, these refuse too


def lint(path: str | Path, profiles: Sequence[str] = ()) -> dict[str, Any]:
    """Look at an ONNX file, or at those of an artifact, with the rules of some profiles: tensorrt-10.3, coreml-ios17.

    Without profiles an artifact is looked at for its own target. Errors come first, then in the order of the graph; a
    finding says for which of the profiles it holds. Where TensorRT for RTX is installed its parser is asked too.

    Raises:
        UsageError: nothing to look at, or no profile for a bare file. UnknownNameError: no such profile.
        ArtifactError: the artifact or file is missing, damaged or no ONNX.
    """
    from edgevit.export.lint import LEVELS, resolve

    files, names = _what(Path(path), profiles)
    wanted = list({profile.name: profile for profile in map(resolve, names)}.values())
    findings, parsers = list[dict[str, Any]](), list[str]()
    for file in files:
        found, parser = _findings(file, wanted)
        findings += [{"file": file.name, **record} for record in _records(found)]
        parsers.append(parser)
    findings.sort(key=lambda record: LEVELS.index(record["level"]))
    errors, warnings, advice = (sum(record["level"] == level for record in findings) for level in LEVELS)
    return {
        "file": str(path),
        "files": [file.name for file in files],
        "profiles": [profile.name for profile in wanted],
        "findings": findings,
        "errors": errors,
        "warnings": warnings,
        "advice": advice,
        "parser": "; ".join(dict.fromkeys(parsers)),
        "notes": _notes(wanted),
    }


def lint_built(built: Sequence[Built], profiles: Sequence[str]) -> dict[str, Any]:
    """What a manifest keeps of the findings in freshly built graphs: how many of each rule, for which profiles.

    Raises:
        ExportError: an error among them: the target would refuse what was built, or compute something else.
    """
    from edgevit.export.lint import lint_graph

    findings = dict.fromkeys(finding for files in built for finding in lint_graph(files.graph, profiles))
    wrong = next((finding for finding in findings if finding.level == "error"), None)
    if wrong is not None:
        raise ExportError(
            f"lint for {', '.join(profiles)}: {wrong.rule} at {wrong.node}: {wrong.why}; {wrong.do}; nothing is left"
        )
    counts = Counter((finding.level, finding.rule) for finding in findings)
    rules = [{"level": level, "rule": rule, "findings": count} for (level, rule), count in sorted(counts.items())]
    return {"profiles": list(profiles), "rules": rules}


def _what(path: Path, profiles: Sequence[str]) -> tuple[list[Path], Sequence[str]]:
    """The ONNX files to look at, and for which profiles."""
    if path.is_dir():
        artifact = load_artifact(path)
        return _graphs_of(artifact), profiles or _own_profiles(artifact)
    if not profiles:
        raise UsageError(f"lint {path}: for which target? give --for, e.g. --for tensorrt-10.3 or --for coreml-ios17")
    if path.suffix.lower() in (".xml", ".mlpackage", ".engine", ".bin"):
        raise UsageError(f"lint {path}: rules look at ONNX graphs; give an .onnx file or an artifact that has one")
    return [path], profiles


def _graphs_of(artifact: Artifact) -> list[Path]:
    """An artifact's ONNX files: those that were compared with the reference, else any that it lists."""
    views = [artifact.at(size) for size in artifact.image_sizes]
    named = [str(view.manifest[key]) for view in views for key in ("model_file", "checked_file")]
    listed = [str(entry["name"]) for entry in artifact.manifest["files"]]
    names = [name for name in named if name.endswith(".onnx")] or [name for name in listed if name.endswith(".onnx")]
    if not names:
        raise UsageError(
            f"lint {artifact.path}: an artifact for {artifact.manifest['target']} keeps no ONNX graph, its export was "
            "linted when it was made; export the model with --to onnx and lint that with --for"
        )
    return [artifact.path / name for name in dict.fromkeys(names)]


def _own_profiles(artifact: Artifact) -> Sequence[str]:
    target = artifact.manifest["target"]
    exporter = registry.exporter(target)
    settings = parse_options(exporter.OPTIONS, target, artifact.manifest["settings"])
    profiles = exporter.lint_for(settings)
    if not profiles:
        raise UsageError(
            f"lint {artifact.path}: target {target} has no rules of its own; give --for, e.g. --for openvino"
        )
    return profiles


def _findings(file: Path, profiles: Sequence[Any]) -> tuple[list[tuple[str, Finding]], str]:
    """(profile, finding) for one file, and what became of asking the parser."""
    from edgevit.export.lint import check, read_onnx, view

    model = read_onnx(file)
    graph = view(model, stranger=True)
    found = [(profile.name, finding) for profile in profiles for finding in check(graph, profile)]
    asking = [p.name for p in profiles if p.target == "tensorrt" and p.version >= PARSER_SINCE]
    if not asking:
        return found, "not asked (no profile of TensorRT 10 or newer)"
    if any(tensor.data_location for tensor in graph.tensors.values()):
        return found, "not asked (weights lie in another file)"
    try:
        from edgevit.export.engine import ask_parser, parser_version

        refused = ask_parser(file.read_bytes())
    except MissingDependencyError:
        return found, "not asked (tensorrt-rtx is not installed: pip install 'edgevit[tensorrt]')"
    return found + [
        (name, finding) for name in asking for finding in refused
    ], f"asked (tensorrt-rtx {parser_version()})"


def _records(found: Sequence[tuple[str, Finding]]) -> list[dict[str, Any]]:
    """Each finding once, with the profiles for which it holds."""
    profiles: dict[Finding, list[str]] = {}
    for profile, finding in found:
        profiles.setdefault(finding, []).append(profile)
    return [{**dataclasses.asdict(finding), "profiles": names} for finding, names in profiles.items()]


def _notes(profiles: Sequence[Any]) -> list[str]:
    """What a reader must know of the findings as a whole."""
    if not any(profile.target == "coreml" for profile in profiles):
        return []
    return ["CoreML is built from the network, not from this graph: its findings say what the network contains"]
