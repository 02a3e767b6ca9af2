"""A Core ML package (`.mlpackage`) as files: the manifest, the program's protobuf and the weights beside it.

The package is a directory that a stranger may have written. Nothing in it is executed, no path in it leads out of it,
and every size and offset is checked against the files before memory is taken.

Formats, as coremltools 9 writes them: `Manifest.json` (fileFormatVersion 1) names the root model,
https://github.com/apple/coremltools/tree/main/modelpackage; the model is the message `Model` of Model.proto; a weight
file is the blob storage of https://github.com/apple/coremltools/tree/main/mlmodel/src/MILBlob.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevit.errors import RuntimeFailure, first_line

logging.getLogger("coremltools").addHandler(logging.NullHandler())  # its import prints what it does not find on Linux

from coremltools.proto import Model_pb2  # noqa: E402  # after the line above, or the remarks are printed

MAX_MANIFEST_BYTES = 1 << 20  # a manifest has two entries and under 1 KB
MAX_PROGRAM_BYTES = 512 << 20  # weights lie outside; the largest network here has a program of 2 MB
MAX_ELEMENTS = 1 << 30  # of one tensor: 4 GB in float32, what a phone has for all
MAX_CONSTANT_BYTES = 4 << 30  # all constants of a program as they are held; the largest network here has 0.8 GB
HOLLOW_BYTES = 1 << 20  # a shorter file with holes costs nothing
HOLLOW_SHARE = 16  # a file as many times longer than what the disk keeps of it is nearly all holes, no network
CHUNK = 1 << 16  # numbers below a byte unpacked at once: each takes up to 56 bytes meanwhile
MAX_TEXT = 80  # characters of a package's own text in a message
AGAIN = "copy it again or export the model again"
MODEL_PATH = "@model_path/"  # what file names in a program begin with: the folder of the program itself
SENTINEL = 0xDEADBEEF  # begins the metadata of every tensor in a weight file
METADATA = struct.Struct("<IIQQ")  # sentinel, type, size in bytes, offset of the data in the file
BLOB_HEADER = struct.Struct("<II")  # number of tensors, version of the format
BLOB_VERSION = 2  # the one version that Core ML has had
UNNAMED = 0  # a code that no weight file has


@dataclass(frozen=True)
class Kind:
    """A type of the format: its name, how a value is held here, how it is stored, its code in a weight file.

    float16 values are held as float32 numbers that float16 has; types below a byte as whole bytes.
    """

    name: str
    held: torch.dtype
    stored: str
    bits: int
    blob: int = UNNAMED

    @property
    def floating(self) -> bool:
        """Whether it may overflow or be no number."""
        return self.held.is_floating_point


def shown(text: str, length: int = MAX_TEXT) -> str:
    """A text of a package for a message: shortened, and what cannot be printed escaped."""
    whole = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: length + 1])
    return whole if len(whole) <= length else f"{whole[: length - 3]}..."


def reason(error: BaseException) -> str:
    """What an error says first; texts of the package may be part of it."""
    return shown(first_line(error), 160)  # one line on a terminal


STRING = Kind("string", torch.uint8, "", 0)
# Number of the type in MIL.proto -> the type.
KINDS: dict[int, Kind] = {
    1: Kind("bool", torch.bool, "u1", 8),
    2: STRING,
    10: Kind("fp16", torch.float32, "<f2", 16, 1),
    11: Kind("fp32", torch.float32, "<f4", 32, 2),
    12: Kind("fp64", torch.float64, "<f8", 64),
    21: Kind("int8", torch.int8, "i1", 8, 4),
    22: Kind("int16", torch.int16, "<i2", 16, 6),
    23: Kind("int32", torch.int32, "<i4", 32, 14),
    24: Kind("int64", torch.int64, "<i8", 64),
    25: Kind("int4", torch.int8, "i1", 4, 8),
    31: Kind("uint8", torch.uint8, "u1", 8, 3),
    32: Kind("uint16", torch.int32, "<u2", 16, 7),
    33: Kind("uint32", torch.int64, "<u4", 32, 15),
    35: Kind("uint4", torch.uint8, "u1", 4, 11),
    36: Kind("uint2", torch.uint8, "u1", 2, 10),
    37: Kind("uint1", torch.uint8, "u1", 1, 9),
    38: Kind("uint6", torch.uint8, "u1", 6, 13),
    39: Kind("uint3", torch.uint8, "u1", 3, 12),
}


def read_package(path: Path) -> tuple[Any, Path]:
    """The model of a package, a protobuf message, and the folder that the file names in it start from.

    Raises:
        RuntimeFailure: no package, damaged, or a path in it that leads out of it.
    """
    manifest = _manifest(path)
    entries, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    entry = entries.get(root) if isinstance(entries, dict) and isinstance(root, str) else None
    name = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise RuntimeFailure(f"{path}: Manifest.json names no root model with a path; {AGAIN}")
    file = inside(path / "Data", name, path)
    message = Model_pb2.Model()
    try:
        message.ParseFromString(_bytes(file, MAX_PROGRAM_BYTES))
    except RuntimeFailure:
        raise
    except Exception as error:  # protobuf's decoders differ in what they raise
        raise RuntimeFailure(f"{file}: not a Core ML model ({reason(error)}); {AGAIN}") from error
    return message, file.parent


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise RuntimeFailure(f"{path}: no such package, expected the directory of a Core ML model (.mlpackage)")
    file = inside(path, "Manifest.json", path)
    try:
        manifest = json.loads(_bytes(file, MAX_MANIFEST_BYTES))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers or nesting without end
        raise RuntimeFailure(f"{file}: not JSON ({reason(error)}); {AGAIN}") from error
    if not isinstance(manifest, dict):
        raise RuntimeFailure(f"{file}: expected a JSON object; {AGAIN}")
    return manifest


def inside(folder: Path, name: str, package: Path) -> Path:
    """The regular file `name` below `folder`, which must not leave `package`, not by a link either.

    Raises:
        RuntimeFailure: it does, or there is no such file.
    """
    parts = PurePosixPath(name).parts
    try:
        file = folder.joinpath(*parts).resolve()
        leaves = not parts or parts[0] == "/" or ".." in parts or not file.is_relative_to(package.resolve())
        present = not leaves and file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a null character, a name too long, links in a circle
        raise RuntimeFailure(f"{package}: file name '{shown(name)}': {reason(error)}; {AGAIN}") from error
    if leaves:
        raise RuntimeFailure(f"{package}: file name '{shown(name)}' leads out of the package; do not use this package")
    if not present:
        raise RuntimeFailure(f"{package}: has no file '{shown(name)}'; {AGAIN}")
    return file


def _bytes(file: Path, limit: int) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise RuntimeFailure(f"{file}: cannot be read ({reason(error)}); check its permissions") from error
    if len(content) > limit:
        raise RuntimeFailure(f"{file}: more than {limit >> 20} MB, which no such file needs; {AGAIN}")
    return content


class Weights:
    """The weight files of one package, each mapped into memory when it is first asked for."""

    def __init__(self, package: Path, folder: Path) -> None:
        self.package = package
        self._folder = folder
        self._maps: dict[str, memoryview] = {}
        self._held_bytes = 0

    def reserve(self, count: int, kind: Kind) -> None:
        """Count the memory of a constant before it is read.

        Raises:
            RuntimeFailure: with those before it more than `MAX_CONSTANT_BYTES`.
        """
        self._held_bytes += count * kind.held.itemsize
        if self._held_bytes > MAX_CONSTANT_BYTES:
            raise RuntimeFailure(
                f"{self.package}: constants of more than {MAX_CONSTANT_BYTES >> 20} MB, which no network for a phone "
                f"needs; {AGAIN}"
            )

    def data(self, name: str, offset: int, kind: Kind, count: int) -> NDArray[Any]:
        """The `count` numbers whose metadata lies at `offset` of the file `name`; types below a byte unpacked.

        Raises:
            RuntimeFailure: another file, type or size than the program says.
        """
        content = self._content(name)
        where = f"{self.package}: tensor at byte {offset} of {shown(name)}"
        if offset + METADATA.size > len(content):
            raise RuntimeFailure(f"{where}: the file has {len(content)} bytes; {AGAIN}")
        sentinel, code, size, start = METADATA.unpack_from(content, offset)
        wanted = (count * kind.bits + 7) // 8
        if sentinel != SENTINEL or code != kind.blob or kind.blob == UNNAMED or size != wanted:
            raise RuntimeFailure(
                f"{where}: type code {code} and {size} bytes, expected {count} numbers of type {kind.name}; {AGAIN}"
            )
        if start + size > len(content):
            raise RuntimeFailure(f"{where}: cut short, {len(content)} of {start + size} bytes; {AGAIN}")
        return unpacked(content[start : start + size], kind, count)

    def _content(self, name: str) -> memoryview:
        if name not in self._maps:
            if not name.startswith(MODEL_PATH):
                raise RuntimeFailure(f"{self.package}: weight file '{shown(name)}', expected {MODEL_PATH}...; {AGAIN}")
            file = inside(self._folder, name.removeprefix(MODEL_PATH), self.package)
            size = file.stat().st_size
            if size < BLOB_HEADER.size:
                raise RuntimeFailure(f"{file}: no weight file; {AGAIN}")
            with file.open("rb") as stream:
                kept = _kept(stream.fileno(), size)
                if size > max(HOLLOW_BYTES, HOLLOW_SHARE * kept):
                    raise RuntimeFailure(f"{file}: says {size} bytes, of which {kept} are on disk; {AGAIN}")
                content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            version = BLOB_HEADER.unpack_from(content, 0)[1]
            if version != BLOB_VERSION:
                raise RuntimeFailure(f"{file}: weight file of version {version}, expected {BLOB_VERSION}; {AGAIN}")
            self._maps[name] = content
        return self._maps[name]


def _kept(file: int, size: int) -> int:
    """How many bytes of a file its disk keeps; the others are holes, which read as zeros and take memory."""
    if not hasattr(os, "SEEK_DATA"):  # not on Windows
        return size
    kept = end = 0
    try:
        while end < size:
            begin = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, begin, os.SEEK_HOLE)
            kept += end - begin
    except OSError:  # nothing but a hole up to the end
        pass
    return kept


def unpacked(content: bytes | memoryview, kind: Kind, count: int) -> NDArray[Any]:
    """`count` numbers from their bytes; below a byte they follow each other from the lowest bit up."""
    if kind.bits >= 8:
        return np.frombuffer(content, dtype=kind.stored, count=count)
    packed, values = np.frombuffer(content, np.uint8), np.empty(count, kind.stored)
    for begin in range(0, count, CHUNK):  # a chunk begins at a whole byte
        some = min(CHUNK, count - begin)
        first = begin * kind.bits // 8
        part = packed[first : first + (some * kind.bits + 7) // 8]
        bits = np.unpackbits(part, bitorder="little")[: some * kind.bits]
        numbers = bits.reshape(some, kind.bits) @ (1 << np.arange(kind.bits, dtype=np.int64))  # some bits -> some
        if kind.name.startswith("int"):
            numbers = np.where(numbers >= 1 << (kind.bits - 1), numbers - (1 << kind.bits), numbers)
        values[begin : begin + some] = numbers
    return values


def value_of(value: Any, weights: Weights) -> Tensor | str | list[str]:
    """What a message `Value` holds: a tensor, a text, or a list of texts.

    Raises:
        RuntimeFailure: a type that is not known here, or fewer numbers than its shape needs.
    """
    if value.type.WhichOneof("type") == "listType":
        return [text for item in value.immediateValue.list.values for text in item.immediateValue.tensor.strings.values]
    kind, shape = kind_and_shape(value.type, weights.package)
    if kind is STRING:
        return "".join(value.immediateValue.tensor.strings.values[:1])
    known = [d for d in shape if d is not None]
    count = math.prod(known)
    if len(known) < len(shape) or count > MAX_ELEMENTS:
        raise RuntimeFailure(f"{weights.package}: a constant of shape {shape}, expected a known and sane one; {AGAIN}")
    weights.reserve(count, kind)
    if value.WhichOneof("value") == "blobFileValue":
        file = value.blobFileValue
        array = weights.data(file.fileName, file.offset, kind, count)
    else:
        array = _immediate(value.immediateValue.tensor, kind, count)
    if array.size != count:
        raise RuntimeFailure(f"{weights.package}: a constant of {array.size} numbers, its shape is {shape}; {AGAIN}")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(kind.held).reshape(known)


def _immediate(tensor: Any, kind: Kind, count: int) -> NDArray[Any]:
    field = tensor.WhichOneof("value")
    if field is None:
        return np.zeros(0, np.int32)
    values = getattr(tensor, field).values
    if field != "bytes":
        return np.array(values, dtype=None if len(values) else np.int32)
    short = len(values) * 8 < count * kind.bits
    return np.zeros(0, np.int32) if short else unpacked(values, kind, count)


def kind_and_shape(message: Any, package: Path) -> tuple[Kind, tuple[int | None, ...]]:
    """Of a message `ValueType` for a tensor: its type, and its shape with None where a length is not known.

    Raises:
        RuntimeFailure: no tensor, or a type that is not known here.
    """
    tensor = message.tensorType
    if message.WhichOneof("type") != "tensorType" or tensor.dataType not in KINDS:
        name = tensor.dataType if message.WhichOneof("type") == "tensorType" else message.WhichOneof("type")
        known = ", ".join(kind.name for kind in KINDS.values())
        raise RuntimeFailure(f"{package}: a value of type {name}, which is not known here; known: {known}")
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return KINDS[tensor.dataType], shape
