"""One real export for the whole run, and a network so small that an export of it takes milliseconds.

pytest's importlib mode has no import between test files, so what several of them need comes as fixtures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from edgevit.specs import NoOptions

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 300  # for a program of our own; an export of 26M takes 10 s on a quiet core, half a minute on a busy one


# ---- the command line


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; anything beside it makes this fail."""
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The last line of stderr, which says what went wrong."""
        return self.err.rstrip("\n").rpartition("\n")[2]


def environment() -> dict[str, str]:
    """For programs started elsewhere: they import this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def started() -> Callable[..., subprocess.Popen[str]]:
    """Start a Python program: `started("-m", "edgevit", "list")`; stdout and stderr are pipes."""

    def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment())

    return start


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run a command line in this process: `cli("list", "--json").document`.

    What it raises beside SystemExit goes through: that would be a user's traceback. Output is captured below Python,
    where native libraries write.
    """
    from edgevit.cli import main

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgevit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        return Outcome(int(caught.value.code or 0), out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- a real artifact


class Exported(NamedTuple):
    """The artifact that the command line made of mobileformer_26m at 64x64, and what the command said."""

    path: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, started: Callable[..., subprocess.Popen[str]]) -> Exported:
    """The one real export of these tests. Not to be changed: copy it with `copied`."""
    out = tmp_path_factory.mktemp("exported")
    command = ["export", "mobileformer_26m", "--to", "onnx", "--image-size", "64x64", "--out", "dist", "--json"]
    process = started("-m", "edgevit", *command, cwd=out)
    outcome = Outcome(*ended(process))
    assert outcome.code == 0, outcome.err
    return Exported(out / "dist" / "mobileformer_26m-onnx-fp32-64x64", outcome)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, once it ends."""
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """Copy an artifact to where it may be damaged: `copied(path)`, or under another name."""

    def copy(path: Path, name: str | None = None) -> Path:
        return Path(shutil.copytree(path, tmp_path / "copied" / (name or path.name)))

    return copy


# ---- a tiny family and its exporter


@dataclass(frozen=True)
class TinyOptions:
    """What the tiny family takes beside."""

    double: bool = False


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Two PyTorch threads on a busy machine of two cores wait for each other."""
    import torch

    torch.set_num_threads(1)


def tiny_family() -> ModuleType:
    """A model file of one network, `tiny`: 1x1 convolution, ReLU, mean, Linear. Satisfies `contracts.ModelFamily`."""
    from torch import Tensor, nn

    from edgevit.specs import ImageSpec, ModelCard

    class Features(NamedTuple):
        feature0: Any
        feature1: Any

    class Tiny(nn.Module):
        def __init__(self, classes: int, *, features_only: bool, double: bool) -> None:
            super().__init__()
            self.gain = 2.0 if double else 1.0
            self.stem = nn.Conv2d(3, 4, 1)
            self.head = None if features_only else nn.Linear(4, classes)

        def forward(self, x: Tensor) -> Tensor | Features:
            maps = self.stem(x).relu() * self.gain  # n 4 h w
            return Features(maps, -maps) if self.head is None else self.head(maps.mean((2, 3)))

    def build(name: str, options: TinyOptions, *, num_classes: int, features_only: bool) -> nn.Module:
        module.built.append((name, num_classes))
        return Tiny(num_classes, features_only=features_only, double=options.double)

    module: Any = ModuleType("tiny_family")
    module.CARDS = {
        "tiny": ModelCard(
            "tiny", "tiny", "Tiny", "https://example.org", "here", 5016, 53_152, image=ImageSpec((64, 64))
        )
    }
    module.OPTIONS, module.CLASSIFIER, module.HEAD_PREFIXES = TinyOptions, "head", ("head.",)
    module.build, module.built = build, []
    module.filter_checkpoint, module.fit_checkpoint = lambda state: state, lambda state, module: (state, ())
    return module  # type: ignore[no-any-return]  # it is a ModuleType


class TinyExporter:
    """Writes the tiny network with onnx.helper. `before` runs first; `change` may spoil the finished graph."""

    name, runtime, checker, precisions = "onnx", "ort", "ort", ("fp32",)
    naive_suffix, OPTIONS, RECIPE = ".onnx", NoOptions, NoOptions

    def __init__(self) -> None:
        self.before: Callable[[Path], None] = lambda directory: None
        self.change: Callable[[Any], None] = lambda model: None
        self.profiles: tuple[str, ...] = ()  # what an export is linted for
        self.naive: list[Any] = []  # the modules of which the plain export was wanted

    def export(self, model: Any, card: Any, specs: Any, directory: Path, calibration: Any = None) -> Any:  # noqa: ARG002  # the contract's signature
        self.before(directory)
        return tuple(self.export_one(model, spec, len(specs) == 1, directory) for spec in specs)

    def export_one(self, model: Any, spec: Any, alone: bool, directory: Path) -> Any:
        import onnx

        from edgevit.contracts import Built
        from edgevit.specs import Certificate, TensorSpec, size_text

        name = "model.onnx" if alone else f"model-{size_text(spec.image_size)}.onnx"
        proto = tiny_onnx(model, spec)
        self.change(proto)
        onnx.save(proto, directory / name)
        signature = TensorSpec("image", (spec.batch, 3, *spec.image_size), layout="NCHW")
        outputs = tuple(TensorSpec(value.name, ()) for value in proto.graph.output)
        certificate = Certificate("nothing", 1, 0.0, 16, 16, 4, 4, 9, 9, input_independent=True)
        return Built(name, name, proto, (signature,), outputs, (certificate,), {"pointwise": spec.pointwise})

    def lint_for(self, settings: Any) -> tuple[str, ...]:  # noqa: ARG002  # the contract's signature
        return self.profiles

    def abilities(self) -> tuple[Any, ...]:
        return ()

    def export_naive(self, model: Any, card: Any, spec: Any, path: Path) -> None:  # noqa: ARG002  # the contract's signature
        import onnx

        self.naive.append(model)
        onnx.save(tiny_onnx(model, spec), path)


def tiny_onnx(module: Any, spec: Any) -> Any:
    """The tiny network as an ONNX model, weights as initializers."""
    from onnx import TensorProto, helper, numpy_helper

    batch, (height, width) = "batch" if spec.batch == "dynamic" else spec.batch, spec.image_size
    stored = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    stored["stem.weight"], stored["stem.bias"] = (stored[f"stem.{part}"] * module.gain for part in ("weight", "bias"))
    nodes = [
        helper.make_node("Conv", ["image", "stem.weight", "stem.bias"], ["stem"]),
        helper.make_node("Relu", ["stem"], ["feature0"]),
    ]
    shapes: dict[str, list[Any]] = {name: [batch, 4, height, width] for name in ("feature0", "feature1")}
    if module.head is None:
        nodes.append(helper.make_node("Neg", ["feature0"], ["feature1"]))
    else:
        shapes = {"logits": [batch, module.head.out_features]}
        nodes += [
            helper.make_node("GlobalAveragePool", ["feature0"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], transB=1),
        ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, height, width])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(
        nodes, "tiny", [image], outputs, [numpy_helper.from_array(a, name) for name, a in stored.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class Tiny(NamedTuple):
    """The registered tiny family, its exporter and exports of it."""

    family: Any
    exporter: TinyExporter
    out: Path

    def export(self, **request: Any) -> Any:
        """Export `tiny` to ONNX below `out`."""
        from edgevit import api

        return api.export_model("tiny", "onnx", **{"out": self.out, "num_classes": 10, **request})

    def checkpoint(self, path: Path, classes: int = 10, seed: int = 5, **extra: Any) -> Path:
        """Write a checkpoint of `tiny` as papers' code does: under `state_dict`, names with the prefix `module.`."""
        import torch

        from edgevit.models import load_model

        state = load_model("tiny", num_classes=classes, seed=seed, randomize=True).module.state_dict()
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in {**state, **extra}.items()}}, path)
        return path

    def left(self) -> list[str]:
        """What lies in `out`, hidden entries included."""
        return sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_thread: None) -> Tiny:  # noqa: ARG001  # for its effect
    """Register the family `tiny`, and put its exporter in the place of the target `onnx`."""
    from edgevit import registry

    module, exporter = tiny_family(), TinyExporter()
    module.exporter = lambda: exporter  # type: ignore[attr-defined]  # a module takes any attribute
    monkeypatch.setitem(sys.modules, "tiny_family", module)
    monkeypatch.setitem(registry.FAMILIES, "tiny", (registry.Row("tiny_family"), ("tiny",)))
    monkeypatch.setitem(registry.TARGETS, "onnx", registry.Row("tiny_family", "exporter"))
    return Tiny(module, exporter, tmp_path / "out")


@pytest.fixture(scope="session")
def fill() -> ModuleType:
    """The module that rebuilds the golden cases' weights and images."""
    spec = importlib.util.spec_from_file_location("golden_fill", Path(__file__).parent / "golden" / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
