"""OpenVINO: the precision that runs, devices and options, the runtime contract's corners, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgevit.errors import RuntimeFailure, UsageError
from edgevit.options import parse_options
from edgevit.runtimes import Session
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.ov import OvOptions, OvRuntime


@pytest.fixture
def path(tiny: Any) -> Path:
    """The ONNX file of the tiny network, which OpenVINO reads as it is."""
    return Path(tiny.export().model_file)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hide arithmetic of this machine's processor: `without("BF16")`."""
    true = ov.Core.get_property

    def hide(*names: str) -> None:
        def get_property(self: Any, device: str, name: str) -> Any:
            found = true(self, device, name)
            return [each for each in found if each not in names] if name == "OPTIMIZATION_CAPABILITIES" else found

        monkeypatch.setattr(ov.Core, "get_property", get_property)

    return hide


def loaded(path: Path, *arguments: Any) -> Session:
    return Session(OvRuntime(path, 1, *arguments))


def refusal(runtime: OvRuntime) -> str:
    with pytest.raises(RuntimeFailure) as caught, Session(runtime):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what it computes


def test_equals_onnx_runtime_in_float32(tiny: Any) -> None:
    path: Path = tiny.export(batch="dynamic").model_file
    with Session(OvRuntime(path, 1)) as ours, Session(OrtRuntime(path, 1)) as theirs:
        assert ours.runtime.effective_precision == "fp32"  # on processors with bfloat16 OpenVINO would take that
        assert [spec.name for spec in ours.runtime.inputs] == [spec.name for spec in theirs.runtime.inputs]
        assert ours.runtime.inputs[0].shape[1:] == theirs.runtime.inputs[0].shape[1:]
        for batch in (1, 3):
            _, *size = theirs.runtime.inputs[0].shape
            image = np.random.default_rng(batch).standard_normal((batch, *map(int, size))).astype(np.float32)
            feed = {"image": image}
            np.testing.assert_allclose(ours.run(feed)["logits"], theirs.run(feed)["logits"], rtol=0, atol=1e-4)
        assert ours.runtime.describe()["threads"] == 1


def test_outputs_are_the_callers_to_keep(path: Path) -> None:
    with loaded(path) as session:
        shape = [int(d) for d in session.runtime.inputs[0].shape]
        first = session.run({"image": np.zeros(shape, np.float32)})["logits"]
        kept = first.copy()
        session.run({"image": np.ones(shape, np.float32)})
        assert np.array_equal(first, kept)


# ---- precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_precision_asked_for_is_set_and_read_back(path: Path, precision: str) -> None:
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in capabilities:
        pytest.skip("this processor has no bfloat16 arithmetic")
    with loaded(path, precision) as session:
        session.require_precision(path)
        expected = "fp32" if precision == "fp16" and "FP16" not in capabilities else precision
        assert session.runtime.effective_precision == session.runtime.asked_precision == expected
        assert session.runtime.describe()["precision"] == expected
        assert session.runtime.describe()["model_precision"] == precision


def test_float16_falls_back_to_float32_and_says_so(path: Path, without: Any) -> None:
    without("FP16")
    with loaded(path, "fp16") as session:
        assert session.runtime.effective_precision == session.runtime.asked_precision == "fp32"
        assert session.runtime.describe()["model_precision"] == "fp16"


def test_bfloat16_falls_back_to_nothing(path: Path, without: Any) -> None:
    without("BF16", "FP16")
    assert refusal(OvRuntime(path, 1, "bf16")) == (
        "OpenVINO on CPU: it has no bf16 arithmetic, only fp32; "
        "run the model elsewhere, or export it with --precision fp32"
    )


def test_a_session_whose_precision_was_left_to_openvino_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic, which is what OpenVINO would take by itself")
    true = ov.Core.compile_model

    def careless(self: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        return true(self, model, device, {k: v for k, v in settings.items() if k != "INFERENCE_PRECISION_HINT"})

    monkeypatch.setattr(ov.Core, "compile_model", careless)
    with loaded(path) as session, pytest.raises(RuntimeFailure, match=r"runs in bf16, expected fp32"):
        session.require_precision(path)


# ---- options


def test_latency_on_one_stream_is_the_default(path: Path) -> None:
    with loaded(path) as session:
        described = session.runtime.describe()
    assert (described["providers"], described["hint"], described["streams"]) == (["CPU"], "latency", 1)
    assert described["device"] and described["cache_dir"] is None


def test_throughput_and_streams_take_effect(path: Path) -> None:
    options = parse_options(OvOptions, "runtime ov", {"hint": "throughput", "streams": "2"})
    with Session(OvRuntime(path, 2, "fp32", options)) as session:
        described = session.runtime.describe()
    assert (described["hint"], described["streams"]) == ("throughput", 2)


@pytest.mark.parametrize("device", ["GPU.7", "NPU.9", "CPU.3"])
def test_a_device_that_is_not_there_is_named_beside_those_that_are(path: Path, device: str) -> None:
    message = refusal(OvRuntime(path, 1, "fp32", OvOptions(device=device)))
    assert message.startswith(f"{path}: OpenVINO has no device {device} on this machine; it has CPU")


@pytest.mark.parametrize("device", ["", "cpu", "AUTO", "HETERO:GPU,CPU", "GPU.", "GPU.1;rm", "CPU\n"])
def test_what_is_no_device_is_a_wrong_option(device: str) -> None:
    with pytest.raises(UsageError, match=r"expected CPU, GPU or NPU"):
        OvOptions(device=device)


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"streams": "-1"}, {"hint": "fast"}, {"threads": 1}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        parse_options(OvOptions, "runtime ov", wrong)


def test_compiled_models_are_kept_where_it_is_told_to(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        with loaded(path, "fp32", OvOptions(cache_dir=str(cache))) as session:
            assert session.runtime.effective_precision == "fp32"
            assert session.runtime.describe()["cache_dir"] == str(cache)
    assert list(cache.glob("*.blob"))


def test_a_cache_never_gives_back_another_precision(path: Path, tmp_path: Path) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    for precision in ("bf16", "fp32", "bf16"):
        with loaded(path, precision, OvOptions(cache_dir=str(tmp_path / "cache"))) as session:
            assert session.runtime.effective_precision == precision


def test_a_file_is_no_cache_directory(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(OvRuntime(path, 1, "fp32", OvOptions(cache_dir=str(tmp_path / "file"))))
    assert message.startswith(f"option cache_dir={tmp_path / 'file'}: expected a directory that can be written")


# ---- what is no model


@pytest.mark.parametrize("content", [b"junk", b"", b"\x08\x07" * 1000])
def test_what_is_no_onnx_file_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(content)
    assert refusal(OvRuntime(path)).startswith(f"{path}: OpenVINO cannot")


@pytest.mark.parametrize(
    "content", [b"junk", b"", b"<net/>", b"<net version='11'><layers><layer id='0'/></layers></net>"]
)
def test_what_is_no_ir_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.xml"
    path.write_bytes(content)
    path.with_suffix(".bin").write_bytes(b"")
    assert refusal(OvRuntime(path)).startswith(f"{path}: OpenVINO cannot")


def test_an_ir_without_its_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text("<net/>")
    assert refusal(OvRuntime(path)) == f"{path}: its weights model.bin are missing; keep both files together"


def test_a_runtime_that_is_not_loaded_says_so(tmp_path: Path) -> None:
    runtime = OvRuntime(tmp_path / "model.onnx")
    runtime.close()  # closing what was never loaded is no failure
    for call in (runtime.describe, lambda: runtime.run({}), lambda: runtime.profile({}, 1)):
        with pytest.raises(RuntimeFailure, match="not loaded"):
            call()


def test_the_cpu_is_no_obstacle() -> None:
    assert OvRuntime.obstacle() is None
