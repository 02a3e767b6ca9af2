"""What an artifact's operators really do on this machine: `profile`, and `attest` for whoever measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit import registry
from edgevit.artifact import Artifact
from edgevit.contracts import Arrays
from edgevit.errors import RuntimeFailure, UsageError
from edgevit.runtimes import Session
from edgevit.specs import OperatorTime, Size

from .running import RunOn, load_at, session_of

if TYPE_CHECKING:
    from edgevit.bench.attestation import Attestation

MAX_RUNS = 10_000  # of a profile: each keeps a time for every operator


def profile(
    path: str | Path,
    *,
    image_size: Size | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    runtime_options: Mapping[str, Any] | None = None,
    runs: int = 20,
) -> dict[str, Any]:
    """Which precision each executed operator ran in and what it took, as the runtime itself reports it.

    Times are medians over `runs` in ms for one inference, on the artifact's sample; operators that the runtime does not
    time have 0, and all of an interpreter's, whose time is no device's. MACs are those of the graph nodes that an
    operator stands for; `coverage` says how much of the artifact's own count was found again.

    Raises:
        ArtifactError, UsageError. RuntimeFailure: the products ran in another precision than the one asked for, or the
        runtime cannot tell.
    """
    if not 1 <= runs <= MAX_RUNS:
        raise UsageError(f"profile: {runs} runs, expected a number from 1 to {MAX_RUNS}")
    artifact = load_at(path, image_size)
    with session_of(artifact, RunOn(runtime, threads, runtime_options or {})) as session:
        session.require_precision(artifact.path)
        feed = {"image": artifact.sample("input")}
        session.run(feed)  # checks the input, which goes to the runtime itself then
        if registry.RUNTIMES[session.runtime.name].emulates:
            runs = 0  # an interpreter's own times would be taken for the device's
        operators, attestation = _judged(session, artifact, feed, artifact.model_file, runs)
        described, effective = session.runtime.describe(), session.runtime.effective_precision
    _require(attestation, artifact.path)
    return {
        "artifact": str(path),
        "image_size": list(artifact.image_size),
        "runtime": described,
        "runs": runs,
        "asked_precision": attestation.asked,
        "effective_precision": effective,
        "coverage": attestation.coverage,
        "by_precision": [asdict(share) for share in attestation.by_precision],
        "by_kind": [asdict(share) for share in attestation.by_kind],
        "operators": [asdict(operator) for operator in operators],
        "verdict": attestation.verdict,
    }


def attest(session: Session, artifact: Artifact, feed: Arrays, model_file: Path | None = None) -> dict[str, Any]:
    """What a measurement keeps to show in which precision a loaded session computes; nothing is timed.

    `model_file` is what runs where it is not the artifact's own. Of a runtime that cannot tell, `as_asked` is None and
    the verdict says why.

    Raises:
        RuntimeFailure: the products run in another precision than the one asked for.
    """
    try:
        _, attestation = _judged(session, artifact, feed, model_file or artifact.model_file, runs=0)
    except RuntimeFailure as error:
        asked = session.runtime.asked_precision
        return {"asked": asked, "coverage": None, "by_precision": [], "as_asked": None, "verdict": str(error)}
    _require(attestation, model_file or artifact.path)
    return attestation.record()


def _judged(
    session: Session, artifact: Artifact, feed: Arrays, path: Path, runs: int
) -> tuple[tuple[OperatorTime, ...], Attestation]:
    """The profile, its operators' multiply-accumulates filled in, and what it shows."""
    from edgevit.bench import attestation
    from edgevit.bench.complexity import macs_by_node

    operators = session.runtime.profile(feed, runs)
    own = path == artifact.model_file
    complexity = artifact.manifest.get("complexity") if own else None
    total = complexity.get("macs") if isinstance(complexity, dict) else None
    total = total if isinstance(total, int) else None
    graphs = [file for file in ([path, artifact.checked_file] if own else [path]) if file.suffix == ".onnx"]
    if graphs and any(operator.macs is None for operator in operators):
        macs = macs_by_node(graphs[0])
        operators = attestation.with_macs(operators, macs)
        total = sum(macs.values()) if total is None else total
    asked = session.runtime.asked_precision
    return operators, attestation.attest(operators, asked, total, declared_fp32(artifact.manifest["choices"]))


def declared_fp32(choices: Mapping[str, Any]) -> set[str]:
    """The graph nodes that the export kept in float32: float16 cannot hold them, or int8 does not suit them."""
    lists = [choices.get(key) for key in ("kept_fp32", "kept_float")]
    entries = [entry for kept in lists if isinstance(kept, list) for entry in kept]
    names = [name for e in entries for name in ((e.get("node"), e.get("value")) if isinstance(e, dict) else (e,))]
    return {name for name in names if isinstance(name, str)}


def _require(attestation: Attestation, where: Path) -> None:
    if attestation.as_asked is False:
        raise RuntimeFailure(f"{where}: {attestation.verdict}; its numbers would be another model's")
