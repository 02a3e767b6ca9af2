"""Checkpoints: what loads, under which names and types, and how it gets into a network."""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from edgevit.checkpoint import load_state, read_checkpoint, replace_classifier, state_sha256
from edgevit.errors import CheckpointError


def net(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4, classes)))
    return model.eval()


def weights() -> dict[str, Tensor]:
    return dict(net().state_dict())


def saved(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


# ---- what loads


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("entry", ["bare", "state_dict", "model", "state_dict_ema", "model_ema"])
def test_entries(tmp_path: Path, entry: str, legacy: bool) -> None:
    content: dict[str, Any] = weights() if entry == "bare" else {"epoch": 3, entry: weights()}
    path = saved(tmp_path / "weights.pth.tar", content, legacy=legacy)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.state, weights())
    assert checkpoint.entry == entry
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_several_entries(tmp_path: Path) -> None:
    content = {
        "state_dict_ema": {"w": torch.ones(1)},
        "model": {"w": torch.ones(2)},
        "state_dict": {"w": torch.ones(3)},
    }
    path = saved(tmp_path / "weights.pth", content)
    assert read_checkpoint(path).entry == "state_dict"
    assert read_checkpoint(path, prefer_ema=True).entry == "state_dict_ema"
    del content["state_dict"], content["state_dict_ema"]
    assert read_checkpoint(saved(path, content), prefer_ema=True).entry == "model"


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_safetensors_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(weights(), tmp_path / name)
    with warnings.catch_warnings(action="error"):
        checkpoint = read_checkpoint(tmp_path / name)
    assert same(checkpoint.state, weights())
    assert checkpoint.entry == "safetensors"


def test_torch_file_named_safetensors(tmp_path: Path) -> None:
    assert read_checkpoint(saved(tmp_path / "weights.safetensors", weights())).entry == "bare"


@pytest.mark.parametrize("mark", [b"PK", b"\x80\x02"])
def test_safetensors_whose_length_looks_like_another_mark(tmp_path: Path, mark: bytes) -> None:
    path, content = tmp_path / "weights.safetensors", safetensors.torch.save({"w": torch.ones(2)})
    length = int.from_bytes(mark, "little") + 65536
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].ljust(length)
    path.write_bytes(struct.pack("<Q", length) + header + torch.ones(2).numpy().tobytes())
    assert path.read_bytes().startswith(mark)
    assert same(read_checkpoint(path).state, {"w": torch.ones(2)})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_training_are_removed(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "weights.pth", {"model": {prefix + name: value for name, value in weights().items()}})
    assert same(read_checkpoint(path).state, weights())


def test_a_prefix_that_not_all_names_bear_stays(tmp_path: Path) -> None:
    state = {"module.w": torch.ones(1), "w": torch.zeros(1)}
    assert same(read_checkpoint(saved(tmp_path / "weights.pth", state)).state, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_every_float_becomes_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    state = {"w": torch.tensor([0.5, -1.5]).to(dtype), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    path = tmp_path / f"weights.{suffix}"
    torch.save(state, path) if suffix == "pth" else safetensors.torch.save_file(state, path)
    read = read_checkpoint(path).state
    assert torch.equal(read["w"], torch.tensor([0.5, -1.5]))
    assert {name: value.dtype for name, value in read.items()} == {
        "w": torch.float32,
        "steps": torch.int64,
        "mask": torch.bool,
    }


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    read = read_checkpoint(saved(tmp_path / "weights.pth", dict(net().named_parameters()))).state
    assert all(type(value) is Tensor and not value.requires_grad for value in read.values())


def test_what_training_code_stores_beside_the_weights(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, inner=argparse.Namespace(name="x")),
        "simple": types.SimpleNamespace(a=1),
        "path": Path("some/where"),
        "best": np.float64(81.3),
        "history": np.arange(6.0).reshape(2, 3),
        "words": np.array(["a", "b"]),
        "device": torch.device("cuda:0"),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }
    for legacy in (False, True):
        path = saved(tmp_path / "weights.pth", {"model": weights(), **beside}, legacy=legacy)
        assert same(read_checkpoint(path).state, weights())
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))  # as NumPy 1 wrote it
    assert same(read_checkpoint(path).state, weights())


def test_yacs_nodes_load_without_yacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CfgNode(dict[str, Any]):
        """As yacs makes them: a dict whose instances have attributes too."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.__dict__["__immutable__"] = True
            self.__dict__["__deprecated_keys__"] = {"old"}

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    config = CfgNode({"MODEL": CfgNode({"SWIN": CfgNode({"DEPTHS": [2, 2, 6, 2]})}), "AMP": True})
    path = tmp_path / "swin.pth"
    with monkeypatch.context() as patch:
        package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
        module.CfgNode = CfgNode  # type: ignore[attr-defined]  # a module made here has what is put into it
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        saved(path, {"model": weights(), "config": config, "max_accuracy": 81.3})
    assert b"yacs.config" in zipfile.ZipFile(path).read("swin/data.pkl")
    assert same(read_checkpoint(path).state, weights())
    assert not any(name.startswith("yacs") for name in sys.modules)


def test_nothing_stays_allowed_after_reading(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(saved(tmp_path / "weights.pth", {"model": weights(), "args": argparse.Namespace(a=1)}))
    (tmp_path / "bad.pth").write_bytes(b"\x80\x02no pickle")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "bad.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_mapping_that_hides_its_own_methods(tmp_path: Path) -> None:
    class Hiding:
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, (list(weights().items()),), {"items": 7, "keys": 7, "get": 7, "values": 7}

    state = Hiding()
    assert same(read_checkpoint(saved(tmp_path / "weights.pth", {"model": state})).state, weights())
    assert same(read_checkpoint(saved(tmp_path / "bare.pth", state)).state, weights())


def test_a_link_is_followed(tmp_path: Path) -> None:
    saved(tmp_path / "blob", weights())
    (tmp_path / "weights.pth").symlink_to(tmp_path / "blob")
    assert same(read_checkpoint(tmp_path / "weights.pth").state, weights())


# ---- into the network


def test_load_state() -> None:
    model, state = net(), {name: torch.full_like(value, 2) for name, value in weights().items()}
    load_state(model, state, where="weights.pth")
    assert same(dict(model.state_dict()), state)


def test_every_misfit_is_named_and_nothing_is_loaded() -> None:
    model, state = net(), {name: torch.full_like(value, 2) for name, value in weights().items()}
    del state["stem.bias"]
    state["norm.extra"] = torch.ones(1)
    state["head.weight"] = torch.ones(7, 4)
    state["stem.weight"] = torch.ones(4, 3, 3, 3, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state, where="weights.pth")
    assert str(caught.value) == (
        "weights.pth: 4 of the names or shapes do not fit the network: 'stem.bias' is missing; 'norm.extra' is "
        "unexpected; 'stem.weight' is (4, 3, 3, 3) integer, expected (4, 3, 3, 3) float; 'head.weight' is (7, 4) "
        "float, expected (5, 4) float; use the weights of this very model, with the same options and number of classes"
    )
    assert same(dict(model.state_dict()), weights())


def test_of_12_misfits_10_are_listed() -> None:
    state = {**weights(), **{f"wrong{i}": torch.ones(1) for i in range(12)}}
    with pytest.raises(CheckpointError) as caught:
        load_state(net(), state, where="weights.pth")
    message = str(caught.value)
    assert "weights.pth: 12 of the names or shapes do not fit" in message
    assert message.count("is unexpected") == 10
    assert "; and 2 more; use" in message


def test_ignore_missing() -> None:
    model, state = net(), weights()
    del state["norm.num_batches_tracked"], state["head.bias"]
    load_state(model, state, where="weights.pth", ignore_missing=("*.num_batches_tracked", "head.bias"))
    with pytest.raises(CheckpointError, match=r"'head\.bias' is missing"):
        load_state(model, state, where="weights.pth", ignore_missing=("*.num_batches_tracked",))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_number_of_classes(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "w.pth", {"model": {prefix + k: v + 1 for k, v in net(1000).state_dict().items()}})
    model, state = net(10), read_checkpoint(path).state
    fresh = model.get_parameter("head.weight").detach().clone()
    fitted, note = replace_classifier(model, state, "head")
    assert note == (
        "head: 1000 classes in the checkpoint, 10 asked for: the layer is new (seeded random) and needs training"
    )
    assert state["head.weight"].shape == (1000, 4)  # the caller's mapping is left alone
    load_state(model, fitted, where="w.pth")
    assert torch.equal(model.get_parameter("head.weight"), fresh)
    assert torch.equal(model.get_parameter("stem.weight"), state["stem.weight"])


@pytest.mark.parametrize("shape", [(5, 4), (9, 3), (9,)])
def test_a_classifier_that_fits_or_differs_otherwise_is_left_alone(shape: tuple[int, ...]) -> None:
    state = {**weights(), "head.weight": torch.ones(shape)}
    fitted, note = replace_classifier(net(), state, "head")
    assert note is None
    assert same(fitted, state)
    assert replace_classifier(net(), {}, "head") == ({}, None)


def test_state_sha256() -> None:
    state = {**weights(), "half": torch.ones(3).bfloat16(), "empty": torch.ones(0), "mask": torch.tensor([True])}
    digest = state_sha256(state)
    assert len(digest) == 64
    assert digest == state_sha256(dict(reversed(state.items())))
    assert digest == state_sha256({name: value.clone() for name, value in state.items()})
    for name, other in [
        ("half", torch.ones(3).half()),
        ("half", torch.ones(3, 1).bfloat16()),
        ("half", torch.tensor([1, 1, 2]).bfloat16()),
        ("empty", torch.ones(0, 2)),
    ]:
        assert state_sha256({**state, name: other}) != digest
    turned = torch.arange(6.0).reshape(2, 3).T  # the same values, another order in memory
    assert state_sha256({"w": turned}) == state_sha256({"w": torch.tensor([[0.0, 3], [1, 4], [2, 5]])})
