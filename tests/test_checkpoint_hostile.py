"""Checkpoints that are refused: each in one sentence, and a hostile one runs nothing."""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from edgevit.checkpoint import read_checkpoint
from edgevit.errors import CheckpointError


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5))


def weights() -> dict[str, Tensor]:
    return dict(net().state_dict())


def saved(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def written(path: Path, kind: str) -> bytes:
    """A good file of this kind, as bytes; it is at `path` too."""
    if kind == "safetensors":
        safetensors.torch.save_file(weights(), path)
    else:
        saved(path, {"model": weights()}, legacy=kind == "legacy")
    return path.read_bytes()


def refusal(path: Path) -> str:
    """The message of the refusal: one line without a traceback, naming the path; and not a word on stderr."""
    with warnings.catch_warnings(action="error"), pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 450  # characters; a sentence, not a page
    assert "; " in message  # what to do
    return message


# ---- what is hostile


class Charge:
    """Pickles as a call of `function`, as an attacker would have it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def charges(marker: Path) -> dict[str, Charge]:
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return {
        "posix.system": Charge(os.system, f"touch {marker}"),
        "shutil.copyfile": Charge(shutil.copyfile, __file__, str(marker)),
        "exec": Charge(builtins.exec, touch),
        "eval": Charge(builtins.eval, touch),
    }


def test_the_charges_are_live(tmp_path: Path) -> None:
    """The proof below rests on this: the same pickles, read carelessly, do make the marker."""
    marker = tmp_path / "marker"
    for charge in charges(marker).values():
        pickle.loads(pickle.dumps(charge))
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("name", ["posix.system", "shutil.copyfile", "exec", "eval"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "nested", "namespace", "state", "suffix", "newest"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, name: str, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    charge = charges(marker)[name]
    if form == "plain":
        path.write_bytes(pickle.dumps(charge, protocol=2))
    elif form == "newest":
        torch.save({"model": weights(), "extra": charge}, path, pickle_protocol=4)
    elif form == "nested":
        saved(path, {"model": weights(), "optimizer": {"groups": [({"hook": [charge]},)]}})
    elif form == "namespace":
        saved(path, {"model": weights(), "args": argparse.Namespace(inner=[charge])})
    elif form == "state":
        saved(path, {"model": {**weights(), "w": charge}})
    else:
        path = path.with_suffix(".safetensors") if form == "suffix" else path
        saved(path, {"model": weights(), "extra": charge}, legacy=form == "legacy")
    message = refusal(path)
    assert "nothing was run" in message
    assert form == "newest" or f"asks for '{name}', expected tensors" in message  # torch reads no name in protocol 4
    assert not marker.exists()


def test_a_whole_module_is_refused_with_advice(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "whole.pth", {"model": net()}))
    assert "asks for 'torch.nn.modules.container.Sequential'" in message
    assert message.endswith("load it where it was made and save model.state_dict() alone")


def test_a_name_cannot_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(b"\x80\x02c\x1b[31mred\nname\x1b]0;title\x07\n.")
    assert r"'\x1b[31mred.name\x1b]0;title\x07'" in refusal(tmp_path / "evil.pth")
    message = refusal(saved(tmp_path / "nan.pth", {"\x1b[31m" + "w" * 999: torch.tensor([torch.nan])}))
    assert r"first '\x1b[31mwww" in message


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    whole, packed = saved(tmp_path / "whole.pth", {"w": torch.zeros(4_000_000)}), tmp_path / "packed.pth"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "unpacks to 16" in refusal(packed)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_larger_than_its_file(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.zeros(1).expand(2**40)}, legacy=legacy)
    assert "entry 'w' claims more elements than the file can hold" in refusal(path)


def quantised() -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # deprecated in torch; such checkpoints are still about
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        quantised(),
        torch.ones(2, device="meta"),
        torch.empty(2, dtype=torch.float4_e2m1fn_x2),
        "a word",
        None,
        np.ones(3),
    ],
    ids=["complex", "sparse", "quantised", "meta", "4 bits", "str", "none", "numpy"],
)
def test_entries_that_are_no_usable_tensor(tmp_path: Path, value: object) -> None:
    message = refusal(saved(tmp_path / "weights.pth", {"a": torch.ones(1), "odd": value}))
    assert "entry 'odd' is a " in message
    assert "expected a name and a dense real tensor" in message


def test_names_that_are_no_words(tmp_path: Path) -> None:
    assert "entry 7 is a Tensor of an unusable kind" in refusal(saved(tmp_path / "w.pth", {7: torch.ones(1)}))


def test_nan_and_infinity(tmp_path: Path) -> None:
    large = torch.tensor(1e300, dtype=torch.float64)  # finite, but not as float32
    state = {**weights(), "1.bias": torch.tensor([1, torch.nan, torch.inf, 2]), "z": large}
    message = refusal(saved(tmp_path / "weights.pth", state))
    assert "NaN or infinite weights in 2 of 10 tensors, first '1.bias' (2 of 4 values)" in message


# ---- what is no checkpoint


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_cut_short(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "weights.pth"
    content = written(path, kind)
    path.write_bytes(content[: max(int(len(content) * share), 1)])
    refusal(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_flipped_bytes_never_end_in_a_traceback(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    content, random = written(path, kind), np.random.default_rng(0)
    for place in random.integers(0, len(content), 150):  # 150 places: a second, and every part of the file is met
        damaged = bytearray(content)
        damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)  # a flipped weight may pass: only its value has changed
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file, expected a checkpoint written by torch.save, or a safetensors file; check the path"),
        (b"just a few words\n", "a text file, expected"),
        (b"version {1, 2}", "a text file, expected"),
        (b"cposix\nsystem\n(S'true'\ntR.", "a text file, expected"),  # a pickle of protocol 0
        (LFS, "a Git LFS pointer, not the weights, expected"),
        (LFS, "run `git lfs pull` in its repository"),
        (b"\n<!DOCTYPE html><html>", "a web page, expected"),
        (b"<html><body>404</body></html>", "download the file itself, not the page about it"),
        (b"\x1f\x8b\x08\0\0\0", "a gzip archive, expected"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file, expected"),
        (bytes(range(1, 99)), "a file of an unknown kind, expected"),
        (struct.pack("<Q", 10**9) + b'{"w":', "a safetensors file whose header and contents disagree"),
        (struct.pack("<Q", 2**60) + b'{"w":', "a file of an unknown kind, expected"),
        (pickle.dumps({"w": 1}, protocol=2), "damaged, cut short, or a pickle of more than tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes would make unreadable names
)
def test_other_files(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert found in refusal(path)


@pytest.mark.parametrize("span", [[0, 99], [0, 4], [8, 4], [-4, 4]])
def test_safetensors_with_a_lying_header(tmp_path: Path, span: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": span}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "whose header and contents disagree" in refusal(tmp_path / "w.safetensors")


def test_archives_of_another_kind(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated; checkpoints in it are still about
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    assert "a TorchScript program, expected" in refusal(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", w=np.ones(3))
    assert "a zip archive that torch.save did not write" in refusal(tmp_path / "arrays.npz")
    with tarfile.open(tmp_path / "real.pth.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    assert "a tar archive, expected" in refusal(tmp_path / "real.pth.tar")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {"epoch": 3, "net": {"w": torch.ones(1)}},
            "holds 'epoch', 'net', expected tensors by name or an entry state_dict",
        ),
        ({}, "holds nothing, expected"),
        ({"model": {}}, "holds no tensors"),
        (torch.ones(3), "holds a whole tensor"),
        ([torch.ones(3)], "holds a list"),
    ],
)
def test_contents_without_weights(tmp_path: Path, content: object, found: str) -> None:
    assert found in refusal(saved(tmp_path / "weights.pth", content))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert "a directory, expected" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "missing.pth")
    assert "a link to a missing file" in refusal(tmp_path / "link")
    assert "cannot be opened" in refusal(tmp_path / "loop")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.pth").open("wb") as stream:
        stream.truncate(17 * 2**30)  # a hole: it takes no room on the disk
    assert "17 GiB, expected at most 16 GiB" in refusal(tmp_path / "huge.pth")
