"""Weights from a file, without running anything the file holds, and into a network, all of them or none.

A checkpoint comes from a stranger. A pickle can name any function and have it called, so `torch.load` runs with
`weights_only=True`: only tensors, plain containers and a short list of harmless names are built. What training code
likes to store beside the weights (argparse namespaces, yacs nodes, NumPy numbers, paths) is read as something inert
in its place, so the official checkpoints load although those packages are never imported.

    read_checkpoint -> a family's filter_checkpoint -> replace_classifier -> load_state
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from edgevit.errors import CheckpointError
from edgevit.inputs import file_problem

MAX_BYTES = 16 * 2**30  # a file beyond 16 GiB is no network for an edge device, and would fill the memory
UNPACK_LIMIT = 4  # x the file's size: torch.save never compresses, so more is a zip bomb; spares re-zipped files
SHARE_LIMIT = 4  # elements per byte of file: an element takes 1 byte or more; leaves room for tensors that share memory
LISTED = 10  # names in one message: enough to see the pattern
HEAD = 512  # bytes; the longest mark looked for is tar's, at 257

EXPECTED = "expected a checkpoint written by torch.save, or a safetensors file"
ENTRIES = ("state_dict", "model", "state_dict_ema", "model_ema")  # as timm, Swin, CrossFormer, DETR and DeiT name them
EMA_ENTRIES = ("state_dict_ema", "model_ema")
DTYPES = (  # what is a real number to both torch and NumPy, or converts to one; not quantised, complex or sub-byte
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name

# Read as an OrderedDict, which the safe unpickler lets a file fill with items and attributes, and which runs nothing.
NODES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
)
# Read as `_Inert`: their contents are not wanted, and NumPy's own unpickling was not made for hostile files.
IGNORED = (
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)

KINDS = (  # how files that are often taken for a checkpoint begin, in lower case
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89hdf", "an HDF5 file", "convert it to safetensors first"),
    (b"<!doctype html", "a web page", "download the file itself, not the page about it"),
    (b"<html", "a web page", "download the file itself, not the page about it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in its repository"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file held: its tensors by name, on the CPU, every floating-point one as float32.

    `sha256` is that of the file, in hex. `entry` says where in the file the tensors lay: "state_dict", "model",
    "state_dict_ema", "model_ema", "bare" (the file is the mapping itself) or "safetensors".
    """

    state: dict[str, Tensor]
    sha256: str
    entry: str


class _Inert:
    """Stands where a file wants an object of a class that is not wanted: takes anything, keeps and does nothing."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_checkpoint(path: Path, *, prefer_ema: bool = False) -> Checkpoint:
    """Return the weights in the file at `path`; nothing in it is executed.

    Of several sets of weights the plain ones come first (`state_dict`, then `model`), as the official evaluation code
    does; with `prefer_ema` the running averages, where there are any: `entry` says which were taken. The prefixes of
    parallel and compiled training are removed from the names.

    Raises CheckpointError: no regular file, another kind of file, damaged, larger than 16 GiB, asking for forbidden
    code, without tensors, or with weights that are NaN or infinite.
    """
    if problem := file_problem(path):
        raise CheckpointError(f"{path}: {problem}, {EXPECTED}; check the path")
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size > MAX_BYTES:
                limit = f"expected at most {MAX_BYTES >> 30} GiB"
                raise CheckpointError(f"{path}: {size / 2**30:.0f} GiB, {limit}; check the path")
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            content, entry = _read(path, stream)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}), {EXPECTED}; check its permissions") from None
    if entry != "safetensors":
        content, entry = _choose(path, content, prefer_ema=prefer_ema)
    state = _checked(path, _unwrapped(content), limit=SHARE_LIMIT * size)
    return Checkpoint(state, sha256, entry)


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], *, where: str, ignore_missing: tuple[str, ...] = ()
) -> None:
    """Load `state` into `model`, in place, if all of it fits; otherwise change nothing.

    `where` names the weights in messages. `ignore_missing` lists names that may be absent and keep the model's values;
    each may be a pattern such as "head.*" or "*.num_batches_tracked".

    Raises CheckpointError: names missing or unexpected, shapes that differ, or whole numbers in place of fractions.
    """
    expected = model.state_dict()
    problems = [
        f"{_quoted(name)} is missing"
        for name in expected
        if name not in state and not any(fnmatchcase(name, pattern) for pattern in ignore_missing)
    ]
    problems += [f"{_quoted(name)} is unexpected" for name in state if name not in expected]
    problems += [
        f"{_quoted(name)} is {_described(tensor)}, expected {_described(expected[name])}"
        for name, tensor in state.items()
        if name in expected and _described(tensor) != _described(expected[name])
    ]
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(
            f"{where}: {len(problems)} of the names or shapes do not fit the network: {'; '.join(problems[:LISTED])}"
            f"{more}; use the weights of this very model, with the same options and number of classes"
        )
    model.load_state_dict(state, strict=False)


def replace_classifier(
    model: nn.Module, state: Mapping[str, Tensor], layer: str
) -> tuple[dict[str, Tensor], str | None]:
    """Return `state` made to fit a `model` of another number of classes, and a note for the user if it was changed.

    Given a classifier `<layer>.weight` and `<layer>.bias` with another number of rows than the model's, the result
    holds the model's own, fresh tensors in their place. Any other misfit is left for `load_state` to report.
    """
    expected, fitted = model.state_dict(), dict(state)
    weight = f"{layer}.weight"
    if weight not in state or weight not in expected:
        return fitted, None
    came, wanted = state[weight].shape, expected[weight].shape
    if came[:1] == wanted[:1] or came[1:] != wanted[1:]:
        return fitted, None
    fitted |= {name: expected[name] for name in (weight, f"{layer}.bias") if name in state and name in expected}
    return fitted, (
        f"{layer}: {came[0]} classes in the checkpoint, {wanted[0]} asked for: "
        "the layer is new (seeded random) and needs training"
    )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, over the names (sorted), types, shapes and bytes of the tensors in `state`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, stream: IO[bytes]) -> tuple[Any, str]:
    """Return what the file holds, not yet trusted, and "safetensors" or "pickle"."""
    stream.seek(0)
    head = stream.read(HEAD)
    stream.seek(0)
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes <= MAX_BYTES:  # safetensors first: its length can look like another's mark
        return _read_safetensors(path, stream.read()), "safetensors"
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path, stream)
    elif not head.startswith(b"\x80"):  # how every pickle by torch.save begins
        found, advice = _kind(head)
        raise CheckpointError(f"{path}: {found}, {EXPECTED}; {advice}")
    stream.seek(0)
    return _read_pickle(path, stream), "pickle"


def _kind(head: bytes) -> tuple[str, str]:
    """Return what a file that begins like this is, and what to do about it."""
    start = head.lstrip().lower()
    for mark, found, advice in KINDS:
        if start.startswith(mark):
            return found, advice
    if head[257:262] == b"ustar":  # the mark of a tar archive
        return "a tar archive", "unpack it first"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "a text file", "check the path and the download"
    return "a file of an unknown kind", "check the path and the download"


def _read_safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception:  # SafetensorError for a lying header, KeyError for an unknown type, ...
        raise CheckpointError(
            f"{path}: a safetensors file whose header and contents disagree, expected an undamaged one; "
            "download it again"
        ) from None


def _check_zip(path: Path, stream: IO[bytes]) -> None:
    """Refuse an archive that is damaged, TorchScript, not by torch.save, or that unpacks to far more than it is."""
    try:
        with zipfile.ZipFile(stream) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # BadZipFile mostly; a crafted archive makes the reader raise others
        raise CheckpointError(f"{path}: a damaged or cut short zip archive, {EXPECTED}; download it again") from None
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript program, {EXPECTED}; save the weights alone with "
            "torch.save(torch.jit.load(file).state_dict(), new_file) where you trust it"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive that torch.save did not write, {EXPECTED}; unpack it first")
    if unpacked > UNPACK_LIMIT * stream.seek(0, os.SEEK_END):
        raise CheckpointError(
            f"{path}: unpacks to {unpacked} bytes, expected about the size of the file; do not trust this file"
        )


def _read_pickle(path: Path, stream: IO[bytes]) -> Any:
    allowed: list[Any] = [(OrderedDict, name) for name in NODES] + [(_Inert, name) for name in IGNORED]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # a crafted pickle makes the reader raise anything
        wanted = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: asks for {_quoted(wanted[1])}, expected tensors in plain containers; nothing was run: if you "
                "trust the file, load it where it was made and save model.state_dict() alone"
            ) from None
        raise CheckpointError(
            f"{path}: damaged, cut short, or a pickle of more than tensors ({type(error).__name__}), {EXPECTED}; "
            "nothing was run: download it again, or save model.state_dict() alone"
        ) from None


def _choose(path: Path, content: Any, *, prefer_ema: bool) -> tuple[dict[Any, Any], str]:
    """Return the mapping with the weights and the name of its entry."""
    if not isinstance(content, dict):
        found = "a whole tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path}: holds {found}, expected names and tensors; save model.state_dict()")
    items = dict(_items(content))
    for entry in (*EMA_ENTRIES, *ENTRIES) if prefer_ema else ENTRIES:
        if isinstance(items.get(entry), dict):
            return dict(_items(items[entry])), entry
    if not any(isinstance(value, Tensor) for value in items.values()):
        keys = ", ".join(_quoted(key) for key in list(items)[:LISTED]) or "nothing"
        raise CheckpointError(
            f"{path}: holds {keys}, expected tensors by name or an entry {', '.join(ENTRIES)}; save model.state_dict()"
        )
    return items, "bare"


def _items(mapping: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the items by dict's own method: a file may have given its OrderedDict an attribute `items`."""
    yield from dict.items(mapping)


def _unwrapped(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return `state` without the prefixes of WRAPPERS, in whatever order every name bears them."""
    if not all(isinstance(name, str) for name in state):
        return state  # refused by `_checked`
    while prefix := next((p for p in WRAPPERS if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _checked(path: Path, state: dict[Any, Any], limit: int) -> dict[str, Tensor]:
    """Return `state` with float32 for every floating-point type, or say what in it is no usable tensor.

    `limit` bounds the elements of all tensors together: a tensor of stride 0 can claim far more than the file holds.
    """
    elements, result, broken = 0, {}, []
    if not state:
        raise CheckpointError(f"{path}: holds no tensors, expected the weights of a network; check the file")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise CheckpointError(
                f"{path}: entry {_quoted(name)} is a {type(value).__name__} of an unusable kind, expected a name and a "
                "dense real tensor; save model.state_dict() alone"
            )
        elements += value.numel()
        if elements > limit:
            raise CheckpointError(
                f"{path}: entry {_quoted(name)} claims more elements than the file can hold, expected {limit} in all; "
                "do not trust this file"
            )
        tensor = value.detach()
        result[name] = tensor.float() if tensor.is_floating_point() else tensor
        # By NumPy: on hundreds of small tensors torch spends its time waking threads, seconds in all.
        bad = np.count_nonzero(~np.isfinite(result[name].numpy(force=True)))
        if bad:
            broken.append(f"{_quoted(name)} ({bad} of {value.numel()} values)")
    if broken:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(broken)} of {len(result)} tensors, first {broken[0]}, expected "
            "finite float32 numbers; the training diverged or the file is damaged: take an earlier checkpoint"
        )
    return result


def _is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor of real numbers with its data on the CPU."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.dtype in DTYPES


def _described(tensor: Tensor) -> str:
    """Return shape and kind: "(64, 3, 3, 3) float"; widths do not matter, loading converts them."""
    return f"{tuple(tensor.shape)} {'float' if tensor.is_floating_point() else 'integer'}"


def _quoted(name: object) -> str:
    """Return a name out of a file, quoted, in ASCII, of bounded length: it may hold anything."""
    text = ascii(name) if isinstance(name, str | int) else f"a {type(name).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."  # 120: one line on a terminal
