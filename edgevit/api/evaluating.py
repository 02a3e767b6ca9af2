"""How often an artifact is right on pictures with classes, and what it loses against another: `evaluate`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevit import __version__, inputs, registry
from edgevit.artifact import Artifact, load_artifact, record_accuracy
from edgevit.errors import CheckpointError, InputError, OutputError, RuntimeFailure, UsageError
from edgevit.pictures import Picture, PictureSet, Read, Skipped, find_pictures, none_usable, read_usable
from edgevit.runtimes import Session
from edgevit.specs import Batch, ImageSpec, Size

from .running import RunOn, load_at, session_of

if TYPE_CHECKING:
    from edgevit.shares import Figure

Progress = Callable[[float, str], None]  # share done, what is being done
REFERENCE = "reference"  # an artifact of this name is given as ./reference
SEED = 0  # of the order behind `limit`: two runs, on two artifacts, see the same pictures
CHUNK = 16  # pictures in memory at a time, or the artifact's batch where that is more
TOP = 5  # beside the first class, as ImageNet's own figures


@dataclass
class _Contestant:
    """A loaded classifier, how it takes pictures, and what came out so far, one entry for each picture."""

    what: str
    session: Session
    image: ImageSpec
    batch: Batch
    values: str
    ranks: list[NDArray[np.int64]] = field(default_factory=list)
    predicted: list[NDArray[np.int64]] = field(default_factory=list)
    sqnr_db: list[NDArray[np.float64]] = field(default_factory=list)  # against the last of those that run together

    def logits(self, images: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
        """Logits (n, classes) for normalised pictures (n, 3, h, w).

        Raises:
            UsageError: not a classifier. RuntimeFailure: NaN or infinity.
        """
        outputs = self.session.run_all(inputs.as_values(images, self.image, self.values), self.batch)
        if "logits" not in outputs:
            raise UsageError(f"{self.what}: has no logits (outputs {', '.join(outputs)}); evaluate needs a classifier")
        logits = np.asarray(outputs["logits"])
        wanted = (len(images), classes)
        if logits.shape != wanted:
            raise RuntimeFailure(f"{self.what}: logits {logits.shape}, expected {wanted}; export the model again")
        if not np.isfinite(logits).all():
            raise RuntimeFailure(f"{self.what}: logits are not finite (NaN or infinite); verify it, or its weights")
        return logits


@dataclass
class _Ran:
    """Which pictures were used, and which skipped; `lines` has a hash and the class of each where it is recorded."""

    skipped: list[Skipped]
    lines: list[str] | None = None
    used: list[Picture] = field(default_factory=list)


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    against: str | Path | None = None,
    weights: str | Path | None = None,
    limit: int | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    runtime_options: Mapping[str, Any] | None = None,
    image_size: Size | None = None,
    record: bool = False,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Any]:
    """Top-1 and top-5 of a classifier as shares from 0 to 1, each with its 95 % interval.

    Args:
        path: an artifact. image_size: (height, width), by default its first.
        data: a directory with a folder of pictures for each class, in the order of the network's classes, or
            "reference-task": its test pictures. What cannot be read is left out and listed.
        against: what the loss is measured against: another artifact, which runs in its target's own runtime, or
            "reference": the float32 PyTorch network with the artifact's weights.
        weights: the file these come from, where they are neither random nor shipped with edgevit.
        limit: so many pictures, the same ones in every run. runtime, threads, runtime_options: what runs the artifact.
        record: whether its manifest gets the figures and which pictures were right, for `gate`.

    Raises:
        ArtifactError, CheckpointError, RuntimeFailure: the artifacts. InputError: the data. UsageError: the request.
        OutputError: the manifest cannot be written.
    """
    artifact = _checked(path, image_size, limit, record)
    found = _labelled(data, artifact, str(path))
    opened = [_of_artifact(artifact, str(path), RunOn(runtime, threads, runtime_options or {}))]
    opened += [] if against is None else [_other(artifact, against, weights, threads)]
    with _loaded(opened):
        ran = _run(found, data, opened, limit, progress, hashed=record)
    if record:
        record_accuracy(artifact, _recorded(artifact, opened[0], found, ran, limit))
    return {
        **_described(artifact, str(path), opened[0].session.runtime.name),
        "data": _seen(found, ran, limit),
        **_accuracy(opened[0], len(found.classes)),
        "per_class": _per_class(opened[0], ran, found.classes),
        "against": None if against is None else _compared(opened[1], opened[0], len(found.classes)),
    }


def evaluate_all(
    artifacts: Sequence[Artifact], data: str | Path, weights: str | Path | None, limit: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """The accuracy of several artifacts of one network, each against the float32 reference, on the same pictures.

    What they share is done once: reading the pictures and running the reference. Arguments and errors as of `evaluate`.
    """
    pictures = [_labelled(data, artifact, str(artifact.path)) for artifact in artifacts]
    opened = [_of_artifact(artifact, str(artifact.path), RunOn()) for artifact in artifacts]
    opened.append(_other(artifacts[0], REFERENCE, weights, None))
    with _loaded(opened):
        ran = _run(pictures[0], data, opened, limit, progress)
    classes = len(pictures[0].classes)
    return [
        {
            "runtime": contestant.session.runtime.name,
            "pictures": len(ran.used),
            **_accuracy(contestant, classes),
            "against": _compared(opened[-1], contestant, classes),
        }
        for contestant in opened[:-1]
    ]


def _described(artifact: Artifact, where: str, runtime: str) -> dict[str, Any]:
    """What was evaluated, and on what it ran."""
    return {
        "artifact": where,
        "image_size": list(artifact.image_size),
        "precision": artifact.manifest["precision"],
        "runtime": runtime,
        "target_runtime": registry.exporter(artifact.manifest["target"]).runtime,
        "emulated": registry.RUNTIMES[runtime].emulates,
        "random_weights": artifact.random_weights,
    }


def _seen(found: PictureSet, ran: _Ran, limit: int | None) -> dict[str, Any]:
    """Which pictures the figures rest on."""
    classless = sum(picture.label is None for picture in found.pictures)
    return {
        "source": found.source,
        "kind": found.kind,
        "pictures": len(ran.used),
        "available": len(found.pictures) - classless,
        "without_class": classless,
        "limit": limit,
        "seed": None if limit is None else SEED,
        "skipped": [asdict(each) for each in ran.skipped],
    }


def _checked(path: str | Path, image_size: Size | None, limit: int | None, record: bool) -> Artifact:
    """The artifact, and what would otherwise be found wrong after an hour of evaluating."""
    if limit is not None and limit < 1:
        raise UsageError(f"evaluate: limit {limit}, expected 1 or more pictures")
    artifact = load_at(path, image_size)
    if record and not os.access(artifact.path, os.W_OK):
        raise OutputError(
            f"{artifact.path}: not writable, its accuracy cannot be recorded; change its mode, or copy it"
        )
    return artifact


def _recorded(
    artifact: Artifact, contestant: _Contestant, found: PictureSet, ran: _Ran, limit: int | None
) -> dict[str, Any]:
    """The manifest's account of an accuracy: counts, and one bit for each picture in their order.

    Without a date, so that the same evaluation leaves the same manifest.
    """
    ranks = np.concatenate(contestant.ranks)
    top5 = {"hits": int((ranks < TOP).sum()), "total": len(ranks)} if len(found.classes) > TOP else None
    return {
        "image_size": list(artifact.image_size),
        "data": {
            "source": found.source,
            "kind": found.kind,
            "sha256": hashlib.sha256("".join(ran.lines or []).encode()).hexdigest(),
            "pictures": len(ran.used),
            "limit": limit,
            "seed": None if limit is None else SEED,
        },
        "top1": {"hits": int((ranks < 1).sum()), "total": len(ranks)},
        "top5": top5,
        "hits": np.packbits(ranks < 1).tobytes().hex(),
        "runtime": contestant.session.runtime.name,
        "edgevit": __version__,
    }


def _labelled(data: str | Path, artifact: Artifact, where: str) -> PictureSet:
    """The pictures, which have the artifact's classes."""
    found = find_pictures(data, "test")
    if not found.classes or all(picture.label is None for picture in found.pictures):
        raise InputError(
            f"{data}: its {len(found.pictures)} pictures have no class, expected a folder of pictures for each class; "
            "sort them into folders"
        )
    _check_classes(found, data, artifact, where)
    return found


def _check_classes(found: PictureSet, data: str | Path, artifact: Artifact, where: str) -> None:
    """Refuse what is no classifier, and data with other classes, before anything runs."""
    manifest = artifact.manifest
    names = [str(output.get("name")) for output in manifest.get("outputs", []) if isinstance(output, dict)]
    if manifest["features_only"] or (names and "logits" not in names):
        raise UsageError(f"{where}: has no logits (outputs {', '.join(names)}); evaluate needs a classifier")
    if manifest["num_classes"] != len(found.classes):
        shown = ", ".join(found.classes[:3]) + (", ..." if len(found.classes) > 3 else "")
        raise InputError(
            f"{data}: {len(found.classes)} classes ({shown}), {where} has {manifest['num_classes']}; expected the same "
            "number, in the same order: give the network's own data, or an artifact made for these"
        )


def _of_artifact(artifact: Artifact, what: str, on: RunOn) -> _Contestant:
    session = session_of(artifact, on)
    values = artifact.manifest["inputs"][0]["values"]
    return _Contestant(what, session, artifact.image_spec, artifact.manifest["batch"], values)


def _other(artifact: Artifact, against: str | Path, weights: str | Path | None, threads: int | None) -> _Contestant:
    """What an artifact is compared with: another artifact at the same size where it has it, or the reference."""
    if str(against) != REFERENCE:
        other = load_artifact(against)
        other = other.at(artifact.image_size) if artifact.image_size in other.image_sizes else other
        if other.manifest["num_classes"] != artifact.manifest["num_classes"]:
            raise UsageError(
                f"{against}: {other.manifest['num_classes']} classes, expected the "
                f"{artifact.manifest['num_classes']} of {artifact.path}; compare artifacts of one task"
            )
        return _of_artifact(other, str(against), RunOn(threads=threads))
    module = _reference_module(artifact, weights)
    runtime = registry.runtime_class("torch")(module, artifact.image_size, threads)  # type: ignore[arg-type]  # it takes a module
    return _Contestant(REFERENCE, Session(runtime), artifact.image_spec, "dynamic", "normalised")


def _reference_module(artifact: Artifact, weights: str | Path | None) -> Any:
    """The float32 network that an artifact was made from, with the very same weights."""
    from edgevit.models import load_model
    from edgevit.reference import trained

    manifest = artifact.manifest
    known = str(manifest["weights"]["source"])
    shipped = known if known in trained.NAMES else None
    loaded = load_model(
        manifest["model"],
        shipped if weights is None else str(weights),
        manifest["num_classes"],
        features_only=False,
        options=manifest["options"],
        seed=manifest["seed"],
        randomize=True,
    )
    if loaded.weights["sha256"] != manifest["weights"].get("sha256"):
        if weights is None and shipped is not None:
            raise CheckpointError(
                f"{artifact.path}: made from other weights than the {known!r} that ship with this edgevit; export the "
                "model again"
            )
        came = "no weights" if weights is None else f"weights {weights}"
        raise CheckpointError(
            f"{artifact.path}: {came} for its reference, expected those that it was made from, {known!r}; name that "
            "file with --weights"
        )
    return loaded.module


@contextlib.contextmanager
def _loaded(opened: list[_Contestant]) -> Iterator[None]:
    """All of them at once, each in the precision that was asked for."""
    with contextlib.ExitStack() as stack:
        for contestant in opened:
            stack.enter_context(contestant.session).require_precision(Path(contestant.what))
        yield


def _run(
    found: PictureSet,
    data: str | Path,
    opened: list[_Contestant],
    limit: int | None,
    progress: Progress,
    *,
    hashed: bool = False,
) -> _Ran:
    """Run all on the same pictures, a few at a time; `hashed` tells afterwards which ones they were."""
    from edgevit.bench.accuracy import ranks, sqnr_db

    sequence = [p for p in (found.pictures if limit is None else found.shuffled(SEED)) if p.label is not None]
    wanted = min(limit or len(sequence), len(sequence))
    ran = _Ran(list(found.skipped), [] if hashed else None)
    shapes = list(dict.fromkeys((contestant.image, contestant.image.size) for contestant in opened))
    for chunk in _chunks(read_usable(found, sequence, shapes, ran.skipped), _chunk_size(opened), wanted):
        labels = np.array([read.picture.label for read in chunk])
        logits = []
        for i, contestant in enumerate(opened):
            mine = shapes.index((contestant.image, contestant.image.size))
            images = np.stack([read.arrays[mine] for read in chunk])  # n 3 h w
            logits.append(contestant.logits(images, len(found.classes)))
            contestant.ranks.append(ranks(logits[i], labels))
            contestant.predicted.append(logits[i].argmax(axis=1))
        for i, contestant in enumerate(opened[:-1]):
            contestant.sqnr_db.append(sqnr_db(logits[-1], logits[i]))
        ran.used += [read.picture for read in chunk]
        if ran.lines is not None:
            ran.lines += [f"{found.sha256(read.picture, read.image)} {read.picture.label}\n" for read in chunk]
        progress(len(ran.used) / wanted, f"evaluating: {len(ran.used)} of {wanted} pictures")
    if not ran.used:
        raise none_usable(data, ran.skipped)
    return ran


def _chunk_size(opened: list[_Contestant]) -> int:
    """A multiple of the largest static batch, so that none but the last one has to be filled up."""
    largest = max(1 if contestant.batch == "dynamic" else contestant.batch for contestant in opened)
    return -(-CHUNK // largest) * largest


def _chunks(reads: Iterator[Read], size: int, wanted: int) -> Iterator[list[Read]]:
    """`wanted` pictures, or as many as there are, `size` at a time."""
    reads = itertools.islice(reads, wanted)
    while chunk := list(itertools.islice(reads, size)):
        yield chunk


def _accuracy(contestant: _Contestant, classes: int) -> dict[str, Any]:
    """Top-1 and top-5 as shares; no top-5 where it would be right whatever comes out."""
    from edgevit.bench.accuracy import share

    found = np.concatenate(contestant.ranks)
    return {"top1": asdict(share(found < 1)), "top5": asdict(share(found < TOP)) if classes > TOP else None}


def _per_class(contestant: _Contestant, ran: _Ran, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """How many pictures of each class there were, and how many were told rightly."""
    labels = np.array([picture.label for picture in ran.used])
    right = np.concatenate(contestant.ranks) == 0
    return [
        {"class": i, "name": name, "pictures": int((labels == i).sum()), "correct": int(right[labels == i].sum())}
        for i, name in enumerate(names)
    ]


def _compared(second: _Contestant, first: _Contestant, classes: int) -> dict[str, Any]:
    """What the first loses against the second on the same pictures."""
    from edgevit.bench.accuracy import drop_points, share

    rank, other = np.concatenate(first.ranks), np.concatenate(second.ranks)
    same = np.concatenate(first.predicted) == np.concatenate(second.predicted)
    drop: Figure = drop_points(other < 1, rank < 1)
    return {
        "what": second.what,
        "runtime": second.session.runtime.name,
        **_accuracy(second, classes),
        "drop_points": asdict(drop),
        "agreement": asdict(share(same)),
        "sqnr_db": float(np.concatenate(first.sqnr_db).mean()),
    }
