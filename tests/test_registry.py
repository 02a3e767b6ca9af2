"""Name -> thing: every row leads somewhere, and a name or package that is missing is said in one sentence."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import pytest

import edgevit
from edgevit import registry
from edgevit.contracts import Runtime
from edgevit.errors import EdgevitError, MissingDependencyError, UnknownNameError, UsageError
from edgevit.registry import FAMILIES, RUNTIMES, TARGETS, Row, exporter, family_of, model_names, runtime_class

# ---- every row


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_its_contract(family: str) -> None:
    names = FAMILIES[family][1]
    found, module = family_of(names[0])
    assert found == family
    assert tuple(module.CARDS) == names
    assert is_dataclass(module.OPTIONS)
    module.OPTIONS()  # every field has a default
    for name, card in module.CARDS.items():
        assert (card.name, card.family) == (name, family)
        assert not any(side % card.size_multiple for side in card.image.size)
        assert card.url.startswith("https://") and card.origin
        assert card.paper or card.num_classes != 1000  # the small ones that ship trained are in no paper


@pytest.mark.parametrize("name", TARGETS)
def test_an_exporter_keeps_its_contract(name: str) -> None:
    made = exporter(name)
    assert made.name == name
    assert made.runtime in RUNTIMES
    assert made.precisions and len(set(made.precisions)) == len(made.precisions)
    assert list(inspect.signature(made.export).parameters) == ["model", "card", "specs", "directory", "calibration"]
    assert list(inspect.signature(made.export_naive).parameters) == ["model", "card", "spec", "path"]


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_keeps_its_contract(name: str) -> None:
    cls = runtime_class(name)
    assert cls.name == name
    wanted = {word for word in vars(Runtime) if not word.startswith("_")}
    assert wanted >= {"load", "run", "close", "inputs", "outputs", "effective_precision", "describe"}
    source = "".join(map(inspect.getsource, cls.__mro__[:-1]))  # what its instances have may be set in an __init__
    assert [word for word in wanted if not hasattr(cls, word) and f"self.{word}" not in source] == []


def test_no_name_is_registered_twice() -> None:
    names = model_names()
    assert len(set(names)) == len(names)


# ---- names


def test_model_names_match_a_shell_pattern_in_the_order_of_the_table() -> None:
    assert model_names()[:3] == ["mobileformer_26m", "mobileformer_52m", "mobileformer_96m"]
    assert model_names("mobileformer_?6m") == ["mobileformer_26m", "mobileformer_96m"]
    assert model_names("MOBILEFORMER*") == []
    assert model_names("") == []


@pytest.mark.parametrize(
    ("ask", "kind", "name", "nearest"),
    [
        (family_of, "model", "mobileformer_294", "mobileformer_294m"),
        (family_of, "model", "mobile_former_26m", "mobileformer_26m"),
        (exporter, "target", "onyx", "onnx"),
        (runtime_class, "runtime", "tourch", "torch"),
    ],
)
def test_an_unknown_name_says_the_nearest_and_what_exists(
    ask: Callable[[str], Any], kind: str, name: str, nearest: str
) -> None:
    with pytest.raises(UnknownNameError) as caught:
        ask(name)
    message = str(caught.value)
    assert message.startswith(f"unknown {kind} {name!r}; did you mean {nearest!r}? Known: ")
    assert nearest in message.partition("Known: ")[2].split(", ")
    assert caught.value.exit_code == 2


def test_a_name_like_no_other_gets_no_guess_and_still_a_sentence() -> None:
    assert str(UnknownNameError("target", "zzz", ["onnx", "coreml"])) in (
        "unknown target 'zzz'; known: coreml, onnx",
        "unknown target 'zzz'. Known: coreml, onnx",
        "unknown target 'zzz'; Known: coreml, onnx",
    )


def test_nothing_known_is_said() -> None:
    assert str(UnknownNameError("option of tiny", "a", [])).endswith("nown: none")


@pytest.mark.parametrize("name", ["", " onnx", "ONNX", "onnx\n", "../onnx", "__init__"])
def test_a_name_is_taken_to_the_letter(name: str) -> None:
    with pytest.raises(UnknownNameError):
        exporter(name)


def test_an_unknown_name_is_a_usage_error_is_an_edgevit_error() -> None:
    assert issubclass(UnknownNameError, UsageError) and issubclass(UsageError, EdgevitError)


# ---- packages that are missing


def hide(monkeypatch: pytest.MonkeyPatch, package: str, module: str) -> None:
    """Make `import package` fail, and `module` be imported afresh."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)


def test_a_missing_runtime_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime", "edgevit.runtimes.ort")
    with pytest.raises(MissingDependencyError) as caught:
        runtime_class("ort")
    assert str(caught.value) == "runtime ort needs onnxruntime, which is not installed: pip install edgevit"
    assert caught.value.exit_code == 1
    assert caught.value.__suppress_context__


def test_a_missing_exporter_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnx_ir", "edgevit.export.to_onnx")
    with pytest.raises(MissingDependencyError) as caught:
        exporter("onnx")
    assert str(caught.value) == "target onnx needs onnx_ir, which is not installed: pip install edgevit"


def test_a_row_of_an_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("needs_openvino")
    monkeypatch.setitem(sys.modules, "needs_openvino", module)
    monkeypatch.setitem(sys.modules, "openvino", None)

    def absent(name: str) -> Any:
        return importlib.import_module("openvino"), name

    module.__getattr__ = absent
    row = Row("needs_openvino", "OvRuntime", ("openvino",), "pip install 'edgevit[openvino]'")
    monkeypatch.setitem(registry.RUNTIMES, "ov", row)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'edgevit[openvino]'")):
        runtime_class("ov")


def test_a_bug_of_ours_is_not_taken_for_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.RUNTIMES, "typo", Row("edgevit.runtimes.no_such_module", "X", ("onnxruntime",)))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        runtime_class("typo")


# ---- the names that users import


def test_importing_edgevit_imports_nothing_of_it() -> None:
    program = (
        "import sys, edgevit; heavy = ('torch', 'numpy', 'onnxruntime', 'PIL'); "
        "print(sorted(m for m in sys.modules if m.startswith('edgevit.') or m in heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)


@pytest.mark.parametrize("name", edgevit.__all__)
def test_every_name_of_all_is_there(name: str) -> None:
    assert getattr(edgevit, name) is not None
    assert name in dir(edgevit)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'edgevit' has no attribute 'exprt_model'$"):
        _ = edgevit.exprt_model


def test_every_name_has_a_docstring() -> None:
    words = [name for name in edgevit.__all__ if name != "__version__"]
    assert [name for name in words if not inspect.getdoc(getattr(edgevit, name))] == []
