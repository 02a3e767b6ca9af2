"""What a machine measured of an artifact before: the baselines that a CI compares with when it has no second artifact.

    <store>/<fingerprint id>/<artifact name>.json     {"schema_version", "machine", "artifact", "history": [entry, ...]}

The history only grows: an entry is neither changed nor dropped here. A file is written beside its place and renamed,
under a lock, so that of two jobs at once none loses what the other added. Whoever can write to the store decides what
is passed: it is untrusted input all the same, read without running anything, and every field that is used is checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgevit import __version__
from edgevit.artifact import replace_file
from edgevit.errors import InputError, OutputError, UsageError
from edgevit.manifest import os_reason

from .budget import gated_part

SCHEMA_VERSION = 1
MAX_BYTES = 64 << 20  # of a file: ten thousand entries of a hundred rounds each
MAX_ROUNDS = 100_000  # of an entry: a day of rounds of one second
MAX_LOG_RATIO = 50.0  # e^50 times as long as the reference workload is no measurement
MAX_DEPTH = 12  # of lists and objects: an accuracy in a manifest is the deepest, at seven
LOCK = ".lock"  # stays where it is: removing it would let a third job in beside a second one
MAX_WORD = 1000  # characters
MAX_THREADS = 1 << 16
MAX_MS = 1e9  # eleven days
SHOWN = 5  # machines that a message lists
IDENTITY = re.compile(r"[0-9a-f]{12}")  # what `machine.fingerprint` makes
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")  # as `artifact_name` makes them; becomes the name of a file
DIGEST = re.compile(r"[0-9a-f]{64}")  # sha256
COMMIT = re.compile(r"[0-9a-f]{7,64}")  # of git: SHA-1 or SHA-256, or the start of one
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
ANEW = "remove the file, and gate with --update-baseline"


@dataclass(frozen=True)
class Reference:
    """The workload that was measured beside an artifact: two results are comparable where it is the same."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One measurement of an artifact against the reference workload.

    `log_ratios` has one number for each round: the logarithm of the artifact's time over the workload's. `checks` is
    the part of the manifest that `budget.check_manifests` reads, `options` those of the runtime, `machine` the record
    of the machine as it was then.
    """

    taken_at: str
    edgevit: str
    artifact_sha256: str
    precision: str
    threads: int | None
    runtime: str
    log_ratios: tuple[float, ...]
    reference: Reference
    p50_ms: float | None
    machine: Mapping[str, Any]
    checks: Mapping[str, Any]
    options: Mapping[str, str]
    commit: str | None = None


@dataclass(frozen=True)
class Stored:
    """What a store has of one artifact on one machine, the oldest entry first."""

    machine: Mapping[str, Any]  # the fingerprint
    artifact: str
    history: tuple[Entry, ...]

    @property
    def latest(self) -> Entry:
        """The baseline."""
        return self.history[-1]


def _utc_now() -> datetime:
    return datetime.now(UTC)


def new_entry(
    manifest: Mapping[str, Any],
    *,
    runtime: str,
    threads: int | None,
    options: Mapping[str, Any],
    log_ratios: Sequence[float],
    reference: Reference,
    p50_ms: float | None,
    machine: Mapping[str, Any],
    clock: Callable[[], datetime] = _utc_now,
    environment: Mapping[str, str] = os.environ,
) -> Entry:
    """An entry of now; what the manifest, the clock and the environment (GITHUB_SHA) know is filled in."""
    commit = environment.get("GITHUB_SHA", "")
    return Entry(
        taken_at=clock().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        edgevit=__version__,
        artifact_sha256=files_sha256(manifest),
        precision=manifest["precision"],
        threads=threads,
        runtime=runtime,
        log_ratios=tuple(log_ratios),
        reference=reference,
        p50_ms=p50_ms,
        machine=machine,
        checks=gated_part(manifest),
        options={key: str(value) for key, value in options.items()},
        commit=commit if COMMIT.fullmatch(commit) else None,
    )


def files_sha256(manifest: Mapping[str, Any]) -> str:
    """What tells two artifacts apart: sha256 over name, size and sha256 of each file."""
    lines = (f"{file['sha256']} {file['bytes']} {file['name']}\n" for file in manifest["files"])
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(path: Path) -> Stored:
    """What a file of a store says.

    Raises:
        InputError: missing, unreadable, damaged, or from a newer edgevit.
    """
    return _stored(_document(path), path)


def find(store: Path, fingerprint_id: str, name: str) -> Stored | None:
    """What `store` has of the artifact `name` on one machine; None where it has nothing: `missing` says what it has.

    Raises:
        UsageError: no name of an artifact. InputError: as `read`, or the file is of another machine or artifact.
    """
    path = place_of(store, fingerprint_id, name)
    if not path.exists():
        return None
    stored = read(path)
    _check_place(stored, path, fingerprint_id, name)
    return stored


def _check_place(stored: Stored, path: Path, fingerprint_id: str, name: str) -> None:
    if (stored.machine["id"], stored.artifact) != (fingerprint_id, name):
        came = f"it is of {stored.artifact} on machine {stored.machine['id']}"
        raise InputError(f"{path}: {came}; expected what its place says, so put it back where it was")


def missing(store: Path, fingerprint_id: str, name: str) -> InputError:
    """What to raise where `find` found nothing: which machines the store knows, and what to do."""
    known = machines(store, name)
    if not known:
        return InputError(f"{store}: no baseline of {name}; measure one with --update-baseline")
    listed = ", ".join(f"{each} ({model})" for each, model in list(known.items())[:SHOWN])
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return InputError(
        f"{store}: no baseline of {name} on this machine ({fingerprint_id}), it has those of {listed}{more}; measure "
        "one here with --update-baseline, or give the file of another machine with --across-machines"
    )


def machines(store: Path, name: str) -> dict[str, str]:
    """The machines of which `store` has the artifact `name`: fingerprint id to CPU model, sorted by id.

    Raises:
        UsageError: no name of an artifact. InputError: the store cannot be listed.
    """
    try:
        entries = sorted(entry.name for entry in store.iterdir()) if store.is_dir() else []
    except OSError as error:
        raise InputError(f"{store}: {os_reason(error)}; give a store that can be read") from None
    found = {}
    for folder in filter(IDENTITY.fullmatch, entries):
        path = place_of(store, folder, name)
        if path.is_file():
            try:
                found[folder] = _model(read(path).machine)
            except InputError:
                found[folder] = "damaged file"
    return found


def _model(fingerprint: Mapping[str, Any]) -> str:
    """The CPU's name, in few words and on one line."""
    return " ".join(str(fingerprint.get("cpu_model", "CPU not known")).split())[:60]


def place_of(store: Path, fingerprint_id: str, name: str) -> Path:
    """Where the history of an artifact on a machine lies.

    Raises:
        UsageError: either would not be the name of a file.
    """
    if not IDENTITY.fullmatch(fingerprint_id):
        raise UsageError(f"fingerprint {fingerprint_id!r}: expected 12 hexadecimal digits")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"artifact name {name!r}: expected up to 200 letters, digits and _.+- for a file in the store; rename its "
            "directory"
        )
    return store / fingerprint_id / f"{name}.json"


def append(store: Path, fingerprint: Mapping[str, Any], name: str, entry: Entry) -> Path:
    """Add an entry to the end of a history, which is begun where there is none, and return its file.

    Safe with several processes at once. What older entries hold beside the known fields is kept.

    Raises:
        UsageError: no name of an artifact. InputError: the file that is there is damaged. OutputError: it cannot be
            written, or is full.
    """
    identity = str(fingerprint.get("id"))
    path = place_of(store, identity, name)
    document: Any = {"schema_version": SCHEMA_VERSION, "machine": dict(fingerprint), "artifact": name, "history": []}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            if path.exists():
                document = _document(path)
                _check_place(_stored(document, path), path, identity, name)
            document["history"].append(asdict(entry))
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            _stored(json.loads(text), path)  # what is written can be read
            if len(text) > MAX_BYTES:
                raise OutputError(f"{path}: full with {len(document['history']) - 1} entries; begin another store")
            replace_file(path, text)
    except OSError as error:
        raise OutputError(f"{path}: {os_reason(error)}; give a store that can be written") from None
    except (ValueError, TypeError, RecursionError):  # NaN, or no JSON value, in what was measured
        raise OutputError(f"{path}: the measurement holds what JSON cannot; it was not stored") from None
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in `folder` until the block ends, or the process does."""
    with (folder / LOCK).open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _document(path: Path) -> Any:
    """The JSON of a file of a store."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give a stored result")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MB, no stored result is; {ANEW}")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"{path}: {os_reason(error)}; give a file that can be read") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON, a stored result was expected; {ANEW}") from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are Python's, not JSON's


def _stored(document: Any, path: Path) -> Stored:
    """A document whose every used field has been checked."""
    if not isinstance(document, dict) or not _is_shallow(document, MAX_DEPTH):
        raise InputError(f"{path}: not a stored result (no object, or nested too deeply); {ANEW}")
    version: Any = document.get("schema_version")
    if version is None:
        raise InputError(f"{path}: not a stored result; expected a file of a store, STORE/MACHINE/ARTIFACT.json")
    if not _is_whole(version) or version < 1:
        raise InputError(f"{path}: not a stored result (schema_version {version!r}); {ANEW}")
    if version > SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version {version}, this edgevit reads {SCHEMA_VERSION}; update edgevit")
    machine, history = document.get("machine"), document.get("history")
    name: Any = document.get("artifact")
    if not isinstance(machine, dict) or not _matches(IDENTITY, machine.get("id")):
        raise InputError(f"{path}: not a stored result (machine is missing or of another kind); {ANEW}")
    if not _matches(NAME, name) or not isinstance(history, list) or not history:
        raise InputError(f"{path}: not a stored result (artifact or history is missing or of another kind); {ANEW}")
    return Stored(machine, name, tuple(_entry(each, i, path) for i, each in enumerate(history)))


def _entry(value: Any, index: int, path: Path) -> Entry:
    fields = value if isinstance(value, dict) else {}
    wrong = next((key for key, check in FIELDS.items() if key not in fields or not check(fields[key])), None)
    if wrong is not None:
        raise InputError(f"{path}: {wrong} of entry {index + 1} is missing or of another kind; {ANEW}")
    known = {key: fields[key] for key in FIELDS}
    return Entry(
        **{
            **known,
            "log_ratios": tuple(map(float, known["log_ratios"])),
            "reference": Reference(*(known["reference"][key] for key in ("name", "version", "sha256"))),
        }
    )


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_WORD


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, largest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_shallow(value: Any, depth: int) -> bool:
    """Not more than `depth` levels of objects and lists, and no number that JSON lacks (1e999 is read as infinite)."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_shallow(each, depth - 1) for each in inside)
    return not isinstance(value, float) or math.isfinite(value)


def _is_reference(value: Any) -> bool:
    words = isinstance(value, dict) and _is_word(value.get("name")) and _is_word(value.get("version"))
    return words and _matches(DIGEST, value.get("sha256"))


# What the readers of an entry rely on, each checked once, here.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "taken_at": lambda value: _matches(TIME, value),
    "edgevit": _is_word,
    "artifact_sha256": lambda value: _matches(DIGEST, value),
    "precision": _is_word,
    "threads": lambda value: value is None or (_is_whole(value) and 0 < value <= MAX_THREADS),
    "runtime": _is_word,
    "log_ratios": lambda value: (
        isinstance(value, list)
        and 0 < len(value) <= MAX_ROUNDS
        and all(_is_number(each, MAX_LOG_RATIO) for each in value)
    ),
    "reference": _is_reference,
    "p50_ms": lambda value: value is None or (_is_number(value, MAX_MS) and value > 0),
    "machine": _is_object,
    "checks": _is_object,
    "options": lambda value: isinstance(value, dict) and all(map(_is_word, value.values())),
    "commit": lambda value: value is None or _matches(COMMIT, value),
}
