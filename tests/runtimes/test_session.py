"""The wrapper around every runtime: what goes in is checked, what is closed stays closed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session
from edgevit.runtimes.fake import FakeRuntime
from edgevit.runtimes.ort import OrtRuntime
from edgevit.runtimes.torch_eager import TorchRuntime
from edgevit.specs import TensorSpec

STATIC = TensorSpec("image", (2, 3, 32, 64), layout="NCHW")


def means(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {"logits": inputs["image"].mean((2, 3))}


def fake(*inputs: TensorSpec) -> FakeRuntime:
    return FakeRuntime(means, inputs) if inputs else FakeRuntime(means)


def image(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.ones(shape, dtype)


def refusal(session: Session, inputs: Any) -> str:
    with pytest.raises(RuntimeFailure) as caught:
        session.run(inputs)
    return str(caught.value)


# ---- what goes in


def test_a_fitting_input_reaches_the_runtime_and_its_output_comes_back() -> None:
    with Session(fake(STATIC)) as session:
        assert session.run({"image": image(2, 3, 32, 64)})["logits"].tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_a_dynamic_dimension_takes_any_batch(batch: int) -> None:
    with Session(fake()) as session:
        assert session.run({"image": image(batch, 3, 32, 32)})["logits"].shape == (batch, 3)


def test_a_dynamic_dimension_takes_no_empty_batch() -> None:
    with Session(fake()) as session:
        assert "has shape 0x3x32x32, expected batchx3x32x32" in refusal(session, {"image": image(0, 3, 32, 32)})


@pytest.mark.parametrize("shape", [(1, 3, 32, 64), (2, 3, 64, 32), (2, 1, 32, 64), (3, 32, 64), (2, 3, 32, 64, 1), ()])
def test_a_wrong_shape_is_named_with_the_right_one(shape: tuple[int, ...]) -> None:
    with Session(fake(STATIC)) as session:
        came = "x".join(map(str, shape))
        assert refusal(session, {"image": image(*shape)}) == (
            f"runtime fake: input image has shape {came}, expected 2x3x32x64; "
            "export again with --batch or --image-size for another"
        )


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64"])
def test_a_wrong_type_is_not_converted_in_silence(dtype: str) -> None:
    with Session(fake()) as session:
        message = refusal(session, {"image": image(1, 3, 32, 32, dtype=dtype)})
    assert message == f"runtime fake: input image is {dtype}, expected a float32 array"


@pytest.mark.parametrize(("value", "kind"), [([[1.0]], "list"), (None, "NoneType"), (1.5, "float")])
def test_what_is_no_array_is_refused(value: object, kind: str) -> None:
    with Session(fake()) as session:
        assert refusal(session, {"image": value}) == f"runtime fake: input image is {kind}, expected a float32 array"


@pytest.mark.parametrize("names", [[], ["images"], ["image", "mask"]])
def test_wrong_names_are_listed_beside_the_right_ones(names: list[str]) -> None:
    with Session(fake()) as session:
        message = refusal(session, {name: image(1, 3, 32, 32) for name in names})
    assert message == f"runtime fake: inputs {names}, expected ['image']"


def test_a_refused_input_never_reaches_the_runtime() -> None:
    runtime = fake()
    with Session(runtime) as session:
        refusal(session, {"image": image(1, 3, 31, 32)})
    assert runtime.calls == ["load", "close"]


# ---- lifetime


def test_it_is_loaded_on_entry_and_closed_on_exit() -> None:
    runtime = fake()
    with Session(runtime) as session:
        session.run({"image": image(1, 3, 32, 32)})
    assert runtime.calls == ["load", "run", "close"]


def test_nothing_runs_before_it_is_loaded() -> None:
    runtime = fake()
    message = refusal(Session(runtime), {"image": image(1, 3, 32, 32)})
    assert message == "runtime fake: not loaded, or closed already; use it as a context manager"
    assert runtime.calls == []


def test_nothing_runs_after_it_is_closed() -> None:
    with Session(fake()) as session:
        pass
    assert "closed already" in refusal(session, {"image": image(1, 3, 32, 32)})


def test_closing_twice_does_no_harm() -> None:
    with Session(fake()) as session:
        session.close()
        assert "closed already" in refusal(session, {"image": image(1, 3, 32, 32)})
    session.close()


def test_it_is_closed_when_the_block_fails() -> None:
    def fail(_: Any) -> Any:
        raise RuntimeFailure("out of memory")

    runtime = FakeRuntime(fail)
    with pytest.raises(RuntimeFailure, match=r"^out of memory$"), Session(runtime) as session:
        session.run({"image": image(1, 3, 32, 32)})
    assert runtime.calls == ["load", "run", "close"]


# ---- the real runtimes behind it


@pytest.fixture
def tiny_model(tiny: Any) -> Path:
    path: Path = tiny.export(batch="dynamic").model_file
    return path


def test_onnx_runtime_keeps_the_contract(tiny_model: Path) -> None:
    runtime = OrtRuntime(tiny_model, 1)
    with Session(runtime) as session:
        assert [spec.name for spec in runtime.inputs] == ["image"]
        assert runtime.inputs[0].shape == ("batch", 3, 64, 64)
        assert [spec.name for spec in runtime.outputs] == ["logits"]
        assert runtime.effective_precision == "fp32"
        assert runtime.describe()["threads"] == 1
        given = image(3, 3, 64, 64)
        first = session.run({"image": given})["logits"]
        kept = first.copy()
        second = session.run({"image": 2 * given})["logits"]
        assert np.array_equal(given, image(3, 3, 64, 64))
        assert np.array_equal(first, kept)
        assert not np.array_equal(first, second)
    runtime.close()
    with pytest.raises(RuntimeFailure, match="not loaded"):
        runtime.run({"image": given})


def test_onnx_runtime_takes_a_view_that_is_not_contiguous(tiny_model: Path) -> None:
    wide = np.random.default_rng(0).random((1, 3, 64, 128), np.float32)
    with Session(OrtRuntime(tiny_model, 1)) as session:
        view = session.run({"image": wide[..., ::2]})["logits"]
        assert np.array_equal(view, session.run({"image": np.ascontiguousarray(wide[..., ::2])})["logits"])


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x0a"])
def test_onnx_runtime_says_which_file_it_cannot_load(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(RuntimeFailure, match=f"^{re.escape(str(path))}: ONNX Runtime cannot load it: .+$") as caught:
        Session(OrtRuntime(path)).__enter__()
    assert "\n" not in str(caught.value)


def test_onnx_runtime_tells_half_precision_weights(tiny: Any, tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(tiny.export().model_file)
    bias = next(t for t in model.graph.initializer if t.name == "head.bias")
    half = numpy_helper.from_array(numpy_helper.to_array(bias).astype(np.float16), "half")
    model.graph.initializer.remove(bias)
    model.graph.initializer.append(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["head.bias"], to=onnx.TensorProto.FLOAT))
    onnx.save(model, tmp_path / "half.onnx")
    with Session(OrtRuntime(tmp_path / "half.onnx", 1)) as session:
        assert session.runtime.effective_precision == "fp16+fp32"


def test_torch_runs_any_batch_and_restores_the_threads(one_thread: None) -> None:  # noqa: ARG001  # for its effect
    import torch

    given = image(2, 3, 32, 32)
    with Session(TorchRuntime(torch.nn.Flatten(), (32, 32), threads=2)) as session:
        assert torch.get_num_threads() == 2
        assert session.run({"image": given})["logits"].shape == (2, 3 * 32 * 32)
        assert session.run({"image": given[:1]})["logits"].shape == (1, 3 * 32 * 32)
    assert torch.get_num_threads() == 1


def test_torch_shares_no_memory_with_the_caller(one_thread: None) -> None:  # noqa: ARG001  # for its effect
    import torch

    class Spoiler(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2).flatten(1)

    given = image(1, 3, 32, 32)
    with Session(TorchRuntime(Spoiler(), (32, 32))) as session:
        first = session.run({"image": given})["logits"]
    assert given.max() == 1
    assert first.min() == first.max() == 2


# ---- more pictures than the graph takes


def counted(sizes: list[int]) -> Any:
    def script(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        sizes.append(len(inputs["image"]))
        return means(inputs)

    return script


def ramp(count: int) -> NDArray[np.float32]:
    """Pictures that can be told apart."""
    return np.ones((count, 3, 32, 32), np.float32) * np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("batch", "count", "sizes"),
    [(1, 3, [1, 1, 1]), (2, 5, [2, 2, 2]), (4, 3, [4]), ("dynamic", 4, [1, 3]), ("dynamic", 1, [1])],
)
def test_all_pictures_run_in_batches_that_the_graph_takes(batch: Any, count: int, sizes: list[int]) -> None:
    seen: list[int] = []
    with Session(FakeRuntime(counted(seen))) as session:
        outputs = session.run_all(ramp(count), batch)
    assert seen == sizes
    assert outputs["logits"][:, 0].tolist() == list(range(count))  # what fills up a batch is dropped


@pytest.mark.parametrize("precision", ["bf16", "fp16+fp32", ""])
def test_a_precision_that_is_not_what_runs_is_an_error(precision: str) -> None:
    with Session(FakeRuntime(means, precision=precision)) as session, pytest.raises(RuntimeFailure) as caught:
        session.require_precision(Path("dist/model"))
    with Session(FakeRuntime(means, precision=precision, asked=precision)) as session:
        session.require_precision(Path("dist/model"))
    assert str(caught.value) == (
        f"dist/model: runs in {precision}, expected fp32; its numbers would be another model's"
    )
