"""Who races whom: an artifact at its batch, and its peer: the plain export, anyone's ONNX file, or another artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgevit import registry
from edgevit.artifact import Artifact, load_artifact
from edgevit.contracts import Arrays, Runtime
from edgevit.errors import ArtifactError, UnknownNameError, UsageError, first_line
from edgevit.runtimes import Session
from edgevit.specs import ExportSpec, TensorSpec, size_text

from .proving import reference_of
from .running import RunOn, open_runtime, timed_session


@dataclass(frozen=True)
class Entry:
    """One contestant: what it is called, and the artifact, or the file in its place, that is run on `feed`.

    `kind` is "own" for what was asked for, "naive" for the plain export of the same network, "foreign" for anyone's
    file; of the last two `file` is what is run. `batch` is the pictures of an inference.
    """

    name: str
    artifact: Artifact
    batch: int
    kind: Literal["own", "naive", "foreign"] = "own"
    file: Path | None = None

    @property
    def path(self) -> Path:
        """The file that is run."""
        return self.file or self.artifact.model_file

    def sample(self) -> NDArray[np.float32]:
        """What is fed, (batch, 3, h, w): the artifact's sample, its pictures again and again for a larger batch."""
        stored = self.artifact.sample("input")
        return np.resize(stored, (self.batch, *stored.shape[1:]))

    def session(self, on: RunOn) -> Session:
        """What is timed; nothing stands in for the target's own runtime unless it was named."""
        if self.kind != "foreign":
            return timed_session(self.artifact, on, self.file)
        return Session(self._foreign(timed_session(self.artifact, on).runtime.name, on))

    def feed(self, session: Session) -> dict[str, NDArray[np.float32]]:
        """The sample under the name of the one input.

        Raises:
            UsageError: anyone's file, which takes something else.
        """
        sample, specs = self.sample(), session.runtime.inputs
        if self.kind != "foreign":
            return {"image": sample}
        if len(specs) != 1 or specs[0].dtype != "float32" or not _fits(sample.shape, specs[0].shape):
            there = "; ".join(map(_shown, specs)) or "nothing"
            raise UsageError(
                f"bench --vs {self.file}: it takes {there}; expected one float32 input of {size_text(sample.shape)}, "
                f"what {self.artifact.name} takes: export one of them at the other's size and batch"
            )
        return {specs[0].name: sample}

    def _foreign(self, runtime: str, on: RunOn) -> Runtime:
        """A runtime on anyone's file: the one that the artifact is run by, in its floating-point precision."""
        if runtime not in registry.runtimes_for(self.path.name):
            raise UnknownNameError(f"runtime for {self.path.name}", runtime, registry.runtimes_for(self.path.name))
        asked = self.artifact.manifest["precision"]
        return open_runtime(runtime, self.path, "fp32" if asked == "int8" else asked, on)


def _fits(shape: tuple[int, ...], spec: tuple[int | str, ...]) -> bool:
    pairs = list(zip(shape, spec, strict=False))
    return len(shape) == len(spec) and all(isinstance(want, str) or got == want for got, want in pairs)


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} {size_text(spec.shape) or 'of no dimension'}"


def peer_of(entry: Entry, vs: str | Path, scratch: Path, *, alone: bool) -> Entry:
    """Whom an artifact races: "naive", an artifact's directory, or anyone's .onnx file. It is the baseline.

    With several artifacts, each in a race of its own, peers are told apart by whom they race.

    Raises:
        UsageError, ArtifactError: it is none of these, cannot be read, or reads files outside of its directory.
    """
    if vs == "naive":
        return Entry(f"{entry.name} (naive)", entry.artifact, entry.batch, "naive", _naive(entry, scratch))
    path = Path(vs)
    name = path.name if alone else f"{path.name} (beside {entry.name})"
    name = f"{vs}" if name == entry.name else name
    if not path.is_dir():
        return Entry(name, entry.artifact, entry.batch, "foreign", path)
    artifact = load_artifact(path)
    if entry.artifact.image_size in artifact.image_sizes:
        artifact = artifact.at(entry.artifact.image_size)
    batch = entry.batch if artifact.manifest["batch"] == "dynamic" else artifact.manifest["batch"]
    return Entry(name, artifact, batch)


def check_peer(vs: str | Path) -> dict[str, str]:
    """What a request keeps of a peer: its name and sha256; refuses early what cannot be one.

    Raises:
        UsageError: neither. ArtifactError: a file that is no ONNX, or reads files outside of its directory.
    """
    from edgevit.artifact import sha256_of
    from edgevit.manifest import MANIFEST

    path = Path(vs)
    if path.is_dir():
        load_artifact(path)
        return {"artifact": path.name, "sha256": sha256_of(path / MANIFEST)}
    if path.suffix.lower() != ".onnx" or not path.is_file():
        raise UsageError(f"--vs {str(vs)!r}: expected naive, an artifact's directory, or an .onnx file that exists")
    _refuse_outside(path)
    return {"file": path.name, "sha256": sha256_of(path)}


def _naive(entry: Entry, scratch: Path) -> Path:
    artifact, manifest = entry.artifact, entry.artifact.manifest
    module, card = reference_of({**manifest, "seed": 0}, None)
    exporter = registry.exporter(manifest["target"])
    spec = ExportSpec(
        manifest["model"],
        manifest["target"],
        image_size=artifact.image_size,
        batch=manifest["batch"],
        settings=exporter.OPTIONS(),
    )
    path = scratch / f"{artifact.name}-naive{exporter.naive_suffix}"
    exporter.export_naive(module, card, spec, path)
    return path


def _refuse_outside(path: Path) -> None:
    """Anyone's ONNX file may name others that hold its weights: only plain files below its own directory are read."""
    for location in external_files(path):
        parts = PurePosixPath(location).parts
        steps = [path.parent.joinpath(*parts[: i + 1]) for i in range(len(parts))]
        leaves = not parts or PurePosixPath(location).is_absolute() or ".." in parts or {"\\", "\0"} & set(location)
        if leaves or any(step.is_symlink() for step in steps):
            raise ArtifactError(
                f"{path}: it reads {location!r}, outside of its directory; do not trust this file, or export the "
                "model anew with its weights inside"
            )
        if not steps[-1].is_file():
            raise ArtifactError(f"{path}: it reads {location!r}, which is not there; keep both files together")


def external_files(path: Path) -> list[str]:
    """The files in which an ONNX file keeps weights, as it names them.

    Raises:
        ArtifactError: it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its stubs are a package apart

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise ArtifactError(f"{path}: expected a readable ONNX file ({first_line(error)})") from None
    if not model.graph.node:  # an empty file is read without complaint
        raise ArtifactError(f"{path}: expected a readable ONNX file (it holds no graph)")
    nodes = [node for function in model.functions for node in function.node]
    tensors = [*_tensors_of(model.graph), *(tensor for node in nodes for tensor in _tensors_in(node))]
    entries = [entry for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    return sorted({str(entry.value) for entry in entries})


def _tensors_of(graph: Any) -> Iterator[Any]:
    """Every stored tensor of a graph and of the graphs inside it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_in(node)


def _tensors_in(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors_of(graph)


def compared(
    ours: Entry, theirs: Entry, outputs: Mapping[str, Arrays], precisions: Mapping[str, str]
) -> dict[str, Any]:
    """Whether two contestants compute the same from one sample: outputs in their order, differences relative to ours.

    `outputs` and `precisions` (as they really ran) are by contestant's name. `same` is None where nothing can be
    compared; the limit is what an export of the less exact of both precisions may differ by from its reference.
    """
    from edgevit.export.verify import LIMITS

    a, b = outputs[ours.name], outputs[theirs.name]
    told: dict[str, Any] = {
        "item": ours.name,
        "peer": theirs.name,
        "same": None,
        "limit": None,
        "outputs": [],
        "why": "",
    }
    shapes = [[array.shape for array in each.values()] for each in (a, b)]
    if not np.array_equal(ours.sample(), theirs.sample()):
        return {**told, "why": "each was fed its own sample: they take pictures of different sizes or values"}
    if shapes[0] != shapes[1]:
        shown = [", ".join(map(size_text, each)) for each in shapes]
        return {**told, "same": False, "why": f"outputs of {shown[0]} against {shown[1]}"}
    limits = [LIMITS[part][0] for name in precisions.values() for part in name.split("+") if part in LIMITS]
    told["limit"] = max(limits, default=LIMITS["fp32"][0])
    for (name, first), (other, second) in zip(a.items(), b.items(), strict=True):
        exact = first.astype(np.float64)
        apart = float(np.abs(exact - second.astype(np.float64)).max(initial=0))
        rms = float(np.sqrt(np.square(exact).mean()))
        finite = bool(np.isfinite(apart) and np.isfinite(rms))
        relative = apart / rms if finite and rms > 0 else 0.0 if finite and apart == 0 else None
        record = {"ours": name, "theirs": other, "max_abs": apart if finite else None, "relative_to_rms": relative}
        told["outputs"].append(record)
    found = [record["relative_to_rms"] for record in told["outputs"]]
    told["same"] = all(value is not None and value <= told["limit"] for value in found)
    if not told["same"]:
        worst = max(
            told["outputs"],
            key=lambda record: np.inf if record["relative_to_rms"] is None else record["relative_to_rms"],
        )
        told["why"] = f"{worst['ours']} {_apart(worst)}"
    return told


def _apart(record: Mapping[str, Any]) -> str:
    if record["relative_to_rms"] is None:
        return "is not finite, or 0 throughout"
    return f"differs by up to {record['max_abs']:.2g}, {record['relative_to_rms']:.2g} times its RMS"


def warn_of(told: Mapping[str, Any]) -> list[str]:
    """What a reader of the comparison must be told where the two do not compute the same."""
    if told["same"] is None:
        return [f"{told['item']} against {told['peer']}: not known to compute the same ({told['why']})"]
    if told["same"]:
        return []
    text = (
        f"{told['item']} and {told['peer']} do not compute the same: {told['why']} on the same input. They probably "
        "have other weights, or are other networks: compare their MACs before their times."
    )
    return [text]
