"""The interpreter of Core ML programs on small programs written with coremltools' own builder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevit.errors import RuntimeFailure
from edgevit.runtimes import Session
from edgevit.runtimes.mil_reference import MilReference

import coremltools as ct  # isort: skip  # after the interpreter, which silences what its import says
from coremltools.converters.mil import Builder as mb  # noqa: N813  # isort: skip  # the name in Apple's own examples

DRAW = np.random.default_rng(2)
HALF, FULL = ct.precision.FLOAT16, ct.precision.FLOAT32
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a program as a package: `save(body, (1, 3), precision=HALF, ios="17")`, further arguments to `convert`."""

    def write(
        body: Any, shape: Any, precision: Any = FULL, ios: str = "17", change: Any = None, **arguments: Any
    ) -> Path:
        target = getattr(ct.target, f"iOS{ios}")
        program = mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=target)(body)
        given = {"minimum_deployment_target": target, "compute_precision": precision, "skip_model_load": True}
        if "inputs" not in arguments:
            given["outputs"] = [ct.TensorType(dtype=np.float32)]
        model = ct.convert(program, convert_to="mlprogram", **{**given, **arguments})
        model = model if change is None else change(model)
        model.save(str(tmp_path / "model.mlpackage"))
        return tmp_path / "model.mlpackage"

    return write


def loaded(path: Path, precision: str = "fp32") -> MilReference:
    runtime = MilReference(path, precision=precision)
    runtime.load()
    return runtime


def only(outputs: dict[str, Any]) -> np.ndarray:
    (array,) = outputs.values()
    return array


# ---- float16


def test_float16_rounds_after_every_operator(save: Save) -> None:
    x = DRAW.normal(size=(2, 50)).astype(np.float32)

    def body(x: Any) -> Any:
        return mb.add(x=mb.mul(x=x, y=np.float32(1.1)), y=np.float32(0.3))

    half = only(loaded(save(body, x.shape, HALF), "fp16").run({"x": x}))
    expected = x.astype(np.float16) * np.float16(1.1) + np.float16(0.3)
    np.testing.assert_array_equal(half, expected.astype(np.float32))
    full = only(loaded(save(body, x.shape, FULL)).run({"x": x}))
    np.testing.assert_allclose(full, x * np.float32(1.1) + np.float32(0.3), rtol=1e-6)
    assert (half != full).mean() > 0.9  # a float32 result that float16 happens to have is rare


def test_a_product_sums_in_float32_and_rounds_once(save: Save) -> None:
    """4097 ones: a float16 sum would stop at 2048, where one more is half a unit in the last place."""
    weight = np.ones((1, 4097), np.float32)
    path = save(lambda x: mb.linear(x=x, weight=weight), (1, 4097), HALF)
    assert only(loaded(path, "fp16").run({"x": np.ones((1, 4097), np.float32)})) == np.float16(4097)


def planted(x: Any) -> Any:
    """Overflows in the second of four operators."""
    x = mb.mul(x=x, y=np.float32(100), name="first")
    x = mb.square(x=x, name="culprit")
    x = mb.sqrt(x=x, name="after")
    return mb.sub(x=x, y=np.float32(1), name="last")


def test_a_planted_overflow_is_found_and_named(save: Save) -> None:
    runtime = loaded(save(planted, (1, 4), HALF), "fp16")
    assert only(runtime.run({"x": np.full((1, 4), 2.5, np.float32)})) == pytest.approx(np.full((1, 4), 249.0))
    assert runtime.first_problem is None
    with pytest.raises(RuntimeFailure) as caught:
        runtime.run({"x": np.array([[1, 1, 3, 1]], np.float32)})
    problem = runtime.first_problem
    assert problem is not None
    assert (problem.type, problem.kind, problem.what, problem.largest) == ("square", "fp16", "overflows", 300.0)
    assert problem.name.startswith("culprit")
    message = str(caught.value)
    assert "is not finite: first square 'culprit" in message
    assert (
        "in fp16 overflows, reading values up to 300; export with --option keep_fp32=square,sqrt or --precision"
        in message
    )
    assert "\n" not in message
    assert "square" in runtime.describe()["first_problem"]


def test_the_first_problem_is_kept_over_runs_until_the_close(save: Save) -> None:
    """A parity check runs several batches and asks afterwards."""
    runtime = loaded(save(lambda x: mb.minimum(x=mb.square(x=x), y=np.float32(9)), (1, 4), HALF), "fp16")
    runtime.run({"x": np.full((1, 4), 300, np.float32)})
    first = runtime.first_problem
    assert first is not None
    runtime.run({"x": np.ones((1, 4), np.float32)})
    runtime.run({"x": np.full((1, 4), 400, np.float32)})
    assert runtime.first_problem == first
    assert str(first).startswith("square ")
    assert str(first).endswith(
        "reading values up to 300; export with --option keep_fp32=square,minimum or --precision fp32"
    )
    runtime.close()
    assert runtime.first_problem is None


def test_an_overflow_in_a_cast_is_that_of_what_made_the_value(save: Save) -> None:
    """Nobody can keep a cast in float32; what is float32 already has to stay in the list."""

    def body(x: Any) -> Any:
        x = mb.square(x=mb.mul(x=mb.exp(x=x), y=np.float32(1)), name="big")
        return mb.sub(x=mb.sqrt(x=mb.relu(x=x)), y=np.float32(1))

    half = ct.transform.FP16ComputePrecision(lambda op: op.op_type not in ("exp", "square"))
    runtime = loaded(save(body, (1, 4), half), "fp16")
    with pytest.raises(
        RuntimeFailure, match=r"first square 'big' in fp32 makes what overflows in a cast to fp16, "
    ) as e:
        runtime.run({"x": np.full((1, 4), 6, np.float32)})
    advice = str(e.value).split("keep_fp32=")[1].split(" ")[0]
    assert advice == "exp,square,relu,sqrt"
    half = ct.transform.FP16ComputePrecision(lambda op: op.op_type not in advice.split(","))
    once = only(loaded(save(body, (1, 4), half), "fp16").run({"x": np.full((1, 4), 6, np.float32)}))
    assert once == pytest.approx(np.full((1, 4), np.exp(6) - 1), rel=1e-3)


def test_where_every_product_would_have_to_stay_float32_is_the_advice(save: Save) -> None:
    weight = np.full((1, 4), 60000, np.float32)
    runtime = loaded(save(lambda x: mb.linear(x=x, weight=weight), (1, 4), HALF), "fp16")
    with pytest.raises(RuntimeFailure, match=r"linear .* up to 6e\+04; export with --precision fp32$"):
        runtime.run({"x": np.full((1, 4), 9, np.float32)})


def test_the_same_program_in_float32_overflows_nowhere(save: Save) -> None:
    runtime = loaded(save(planted, (1, 4), FULL))
    np.testing.assert_allclose(only(runtime.run({"x": np.full((1, 4), 3, np.float32)})), 299.0)
    assert runtime.first_problem is None


def test_an_operator_kept_in_float32_overflows_no_more(save: Save) -> None:
    kept = ct.transform.FP16ComputePrecision(lambda op: op.op_type not in ("square", "sqrt"))  # what was advised
    runtime = loaded(save(planted, (1, 4), kept), "fp16")
    assert only(runtime.run({"x": np.full((1, 4), 3, np.float32)})) == pytest.approx(np.full((1, 4), 299.0))
    assert runtime.first_problem is None


def test_a_nan_made_inside_is_named(save: Save) -> None:
    runtime = loaded(save(lambda x: mb.add(x=mb.sqrt(x=x, name="root"), y=np.float32(1)), (1, 3)))
    with pytest.raises(RuntimeFailure, match=r"first sqrt 'root' in fp32 makes a NaN, .*up to 4; check the weights"):
        runtime.run({"x": np.array([[1, -4, 1]], np.float32)})


def test_a_picture_that_is_not_finite_is_blamed_itself(save: Save) -> None:
    runtime = loaded(save(lambda x: mb.add(x=x, y=np.float32(1)), (1, 3)))
    with pytest.raises(RuntimeFailure, match="the input x is not; check the picture"):
        runtime.run({"x": np.array([[1, np.nan, 1]], np.float32)})


def test_an_infinite_mask_inside_is_no_failure(save: Save) -> None:
    mask = np.array([[0, -np.inf, 0]], np.float32)
    runtime = loaded(save(lambda x: mb.softmax(x=mb.add(x=x, y=mask, name="masked")), (1, 3)))
    np.testing.assert_allclose(only(runtime.run({"x": np.zeros((1, 3), np.float32)})), [[0.5, 0, 0.5]])
    assert runtime.first_problem is not None
    runtime.run({"x": np.ones((1, 3), np.float32)})
    assert runtime.first_problem is not None
    assert runtime.first_problem.name == "masked"


# ---- what is read from the program


@pytest.mark.parametrize(
    ("kept", "effective", "asked"),
    [((), "fp16", "fp16"), (("linear",), "fp16", "fp16"), (("linear", "matmul"), "fp32", "fp16")],
)
def test_the_precision_is_that_of_the_products(save: Save, kept: Any, effective: str, asked: str) -> None:
    def body(x: Any) -> Any:
        y = mb.linear(x=x, weight=np.eye(4, dtype=np.float32))
        return mb.softmax(x=mb.matmul(x=y, y=y, transpose_y=True))

    half = ct.transform.FP16ComputePrecision(lambda op: op.op_type not in kept)
    runtime = loaded(save(body, (3, 4), half), "fp16")
    assert (runtime.effective_precision, runtime.asked_precision) == (effective, asked)
    mixed = loaded(runtime.path, "fp32")  # a float32 export never holds float16
    assert mixed.effective_precision == ("fp16+fp32" if kept == ("linear",) else effective)


def test_without_products_every_operator_counts(save: Save) -> None:
    assert loaded(save(lambda x: mb.relu(x=x), (1, 4))).effective_precision == "fp32"


def test_a_session_checks_what_goes_in(save: Save) -> None:
    with Session(MilReference(save(lambda x: mb.relu(x=x), (1, 4)))) as session:
        with pytest.raises(RuntimeFailure, match="input x has shape 2x4, expected 1x4"):
            session.run({"x": np.zeros((2, 4), np.float32)})
        with pytest.raises(RuntimeFailure, match="is float64, expected a float32"):
            session.run({"x": np.zeros((1, 4))})
    with pytest.raises(RuntimeFailure, match="not loaded"):
        session.runtime.inputs  # noqa: B018  # reading the property is what fails


def test_inputs_are_not_changed_and_outputs_are_the_callers(save: Save) -> None:
    runtime = loaded(save(lambda x: mb.identity(x=x), (1, 4)))
    x = np.arange(4, dtype=np.float32)[None]
    first = only(runtime.run({"x": x}))
    first += 1
    np.testing.assert_array_equal(x, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(only(runtime.run({"x": x})), x)


def test_values_are_dropped_after_their_last_reader(save: Save) -> None:
    def body(x: Any) -> Any:
        y = mb.relu(x=x)
        return mb.add(x=mb.tanh(x=y), y=mb.exp(x=y))

    steps = loaded(save(body, (1, 4)))._program.steps  # type: ignore[union-attr]  # loaded
    made = {out.name for step in steps for out in step.outputs}
    dropped = [name for step in steps for name in step.drops]
    assert len(dropped) == len(set(dropped))
    assert set(dropped) == (made | {"x"}) - {steps[-1].name}


def test_threads_are_set_for_a_run_only(save: Save) -> None:
    before = torch.get_num_threads()
    runtime = MilReference(save(lambda x: mb.relu(x=x), (1, 4)), threads=before + 1)
    runtime.load()
    runtime.run({"x": np.zeros((1, 4), np.float32)})
    assert torch.get_num_threads() == before
    assert runtime.describe()["threads"] == before + 1


def test_ranges_and_profile_name_the_operators(save: Save) -> None:
    runtime = loaded(save(planted, (1, 4), HALF), "fp16")
    x = np.array([[-2, 0.5, 1, 2]], np.float32)
    ranges = runtime.ranges({"x": x})
    squared = next(value for name, value in ranges.items() if name.startswith("culprit"))
    assert ranges["x"] == (-2.0, 2.0)
    assert squared == (2500.0, 40000.0)
    rows = runtime.profile({"x": x}, 3)
    assert [row.kind for row in rows if row.kind != "cast"] == ["mul", "square", "sqrt", "sub"]
    assert {row.precision for row in rows if row.kind != "cast"} == {"fp16"}
    assert all(row.time_ms > 0 and row.macs == 0 for row in rows)
    untimed = runtime.profile({"x": x}, 0)
    assert [(row.name, row.time_ms) for row in untimed] == [(row.name, 0.0) for row in rows]


def test_times_are_medians(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, clock = loaded(save(lambda x: mb.relu(x=x), (1, 4))), iter([0, 1, 10, 12, 20, 120])
    monkeypatch.setattr("edgevit.runtimes.mil_reference.time.perf_counter", lambda: float(next(clock)))
    (row,) = runtime.profile({"x": np.ones((1, 4), np.float32)}, 3)
    assert row.time_ms == 2000


def test_products_are_counted_by_their_shapes(save: Save) -> None:
    def body(x: Any) -> Any:  # 1 4 6 6
        y = mb.conv(x=x, weight=DRAW.normal(size=(8, 2, 3, 3)).astype(np.float32), groups=2, name="conv")  # 1 8 4 4
        y = mb.conv_transpose(x=y, weight=DRAW.normal(size=(8, 4, 2, 2)).astype(np.float32), name="up")  # 1 4 5 5
        y = mb.reshape(x=y, shape=[1, 4, 25])
        y = mb.matmul(x=y, y=y, transpose_x=True, name="gram")  # 1 25 25
        return mb.scaled_dot_product_attention(query=y, key=y, value=y, name="attended")

    program = loaded(save(body, (1, 4, 6, 6), ios="18"))._program
    assert program is not None
    wanted = [8 * 16 * 2 * 9, 8 * 16 * 4 * 4, 25 * 25 * 4, 25 * 25 * (25 + 25)]
    assert list(program.macs.values()) == wanted


# ---- kinds of models


def test_a_classifier_gives_label_probabilities_and_logits(save: Save) -> None:
    def body(x: Any) -> Any:
        logits = mb.linear(x=x, weight=np.eye(3, dtype=np.float32), name="logits")
        return logits, mb.softmax(x=logits, name="probabilities")

    labels = ct.ClassifierConfig(["cat", "dog", "tench"], predicted_probabilities_output="probabilities")
    path = save(
        body, (1, 3), classifier_config=labels, outputs=[ct.TensorType("logits"), ct.TensorType("probabilities")]
    )
    runtime = loaded(path)
    out = runtime.run({"x": np.array([[0, 2, 1]], np.float32)})
    assert out["classLabel"].tolist() == ["dog"]
    np.testing.assert_allclose(out["logits"], [[0, 2, 1]])
    np.testing.assert_allclose(out["classLabel_probs"], [np.exp([0, 2, 1]) / np.exp([0, 2, 1]).sum()], rtol=1e-6)
    assert {spec.name: spec.dtype for spec in runtime.outputs}["classLabel"] == "string"
    assert next(iter(out)) == runtime.outputs[0].name == "logits"


@pytest.mark.parametrize(("layout", "order"), [("RGB", [0, 1, 2]), ("BGR", [2, 1, 0])])
def test_an_image_input_takes_rgb_pixels_and_the_program_scales_them(save: Save, layout: str, order: list[int]) -> None:
    image = ct.ImageType("x", (1, 3, 4, 4), scale=0.5, bias=[1, 2, 3], color_layout=getattr(ct.colorlayout, layout))
    runtime = loaded(save(lambda x: mb.relu(x=x), (1, 3, 4, 4), inputs=[image]))
    (spec,) = runtime.inputs
    assert (spec.values, spec.dtype, spec.shape) == ("pixels", "float32", (1, 3, 4, 4))
    pixels = DRAW.integers(0, 256, (1, 3, 4, 4)).astype(np.float32)
    expected = pixels[:, order] * 0.5 + np.array([1, 2, 3]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(only(runtime.run({"x": pixels})), expected)


WEIGHT = (DRAW.normal(size=(32, 64)) * np.linspace(0.5, 2, 32)[:, None]).astype(np.float32)


def compress(kind: str) -> Callable[[Any], Any]:
    from coremltools.optimize import coreml as cto

    configs: dict[str, tuple[Any, Any]] = {
        "int8": (cto.linear_quantize_weights, cto.OpLinearQuantizerConfig("linear_symmetric", weight_threshold=0)),
        "uint8": (cto.linear_quantize_weights,
                  cto.OpLinearQuantizerConfig("linear", dtype="uint8", weight_threshold=0)),
        "int4": (cto.linear_quantize_weights,
                 cto.OpLinearQuantizerConfig("linear_symmetric", dtype="int4", granularity="per_block", block_size=32,
                                             weight_threshold=0)),
        "palette": (cto.palettize_weights, cto.OpPalettizerConfig("uniform", nbits=4, weight_threshold=0)),
        "pruned": (cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)),
    }  # fmt: skip
    method, config = configs[kind]
    return lambda model: method(model, cto.OptimizationConfig(global_config=config))


@pytest.mark.parametrize(
    ("kind", "ios", "worst"),
    [("int8", "16", 0.023), ("int8", "18", 0.023), ("uint8", "17", 0.023), ("int4", "18", 0.41), ("palette", "16", 0.4),
     ("palette", "18", 0.4), ("pruned", "16", 1.2), ("pruned", "18", 1.2)],
)  # fmt: skip
def test_compressed_weights_are_unpacked(save: Save, kind: str, ios: str, worst: float) -> None:
    """A picture of unit vectors reads the weights back; the limit is half a step of the largest row."""
    path = save(lambda x: mb.linear(x=x, weight=WEIGHT), (64, 64), ios=ios, change=compress(kind))
    found = only(loaded(path).run({"x": np.eye(64, dtype=np.float32)})).T
    assert np.abs(found - WEIGHT).max() < worst
    assert np.abs(found - WEIGHT).max() > 1e-4  # nothing was compressed
    if kind == "pruned":
        assert (found == 0).mean() == pytest.approx(0.5, abs=0.01)
        np.testing.assert_allclose(found[found != 0], WEIGHT[found != 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_activations_are_quantized_as_the_program_says(save: Save, dtype: str) -> None:
    zero = np.dtype(dtype).type(7)

    def body(x: Any) -> Any:
        q = mb.quantize(input=x, scale=np.float32(0.1), zero_point=zero, output_dtype=dtype)
        return mb.dequantize(input=q, scale=np.float32(0.1), zero_point=zero)

    x = np.array([[-99, -0.31, 0.04, 0.26, 99]], np.float32)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    expected = (np.clip(np.rint(x / np.float32(0.1)) + 7, low, high) - 7) * 0.1
    np.testing.assert_allclose(only(loaded(save(body, x.shape)).run({"x": x})), expected, rtol=1e-6)


def test_an_operator_that_nobody_computes_is_named_with_what_is_known(save: Save) -> None:
    path = save(lambda x: mb.relu(x=mb.space_to_depth(x=x, block_size=2)), (1, 1, 4, 4))
    with pytest.raises(
        RuntimeFailure, match=r"operator space_to_depth \(.*\) is not known to the interpreter; known: "
    ):
        loaded(path)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_any_size(save: Save, batch: int) -> None:
    shape = (ct.RangeDim(1, 8, default=1), 4)
    path = save(lambda x: mb.linear(x=x, weight=np.eye(4, dtype=np.float32)), (3, 4), ios="17")
    assert loaded(path).inputs[0].shape == (3, 4)

    from coremltools.converters.mil.mil import get_new_symbol

    symbolic = (get_new_symbol(), 4)
    path = save(lambda x: mb.reshape(x=mb.relu(x=x), shape=[-1, 2, 2]), symbolic, inputs=[ct.TensorType("x", shape)])
    runtime = loaded(path)
    assert runtime.inputs[0].shape == ("batch", 4)
    x = DRAW.normal(size=(batch, 4)).astype(np.float32)
    np.testing.assert_array_equal(only(runtime.run({"x": x})), np.maximum(x, 0).reshape(batch, 2, 2))


# ---- what int8 is proven by


def in_int8(x: Any, dtype: str = "int8") -> Any:
    """`x` as eight bits and back."""
    zero = np.dtype(dtype).type(0)
    eight = mb.quantize(input=x, scale=np.float32(0.05), zero_point=zero, output_dtype=dtype)
    return mb.dequantize(input=eight, scale=np.float32(0.05), zero_point=zero)


LABELS = [
    ("float", "", "fp32"),
    ("weights", "int8", "fp32, int8 weights"),
    ("weights", "palette", "fp32, 4-bit weights"),
    ("activations", "", "fp32"),  # a float weight makes the product a float one
    ("both", "int8", "int8"),
    ("behind", "int8", "fp32, int8 weights"),  # what an activation was before something else changed it does not count
]


@pytest.mark.parametrize(("body", "weights", "label"), LABELS, ids=[f"{b}-{w}" for b, w, _ in LABELS])
@pytest.mark.parametrize("ios", ["17", "18"])
def test_a_product_is_int8_where_all_that_it_multiplies_was(
    save: Save, ios: str, body: str, weights: str, label: str
) -> None:
    def program(x: Any) -> Any:
        read = x if body in ("float", "weights") else in_int8(x)
        return mb.linear(x=mb.relu(x=read) if body == "behind" else read, weight=WEIGHT)

    runtime = loaded(save(program, (2, 64), ios=ios, change=compress(weights) if weights else None), "int8")
    assert runtime.effective_precision == label
    whole = label == "fp32"  # nothing of it is compressed: int8 was asked for in vain
    assert runtime.asked_precision == ("int8" if whole else label)
    rows = runtime.profile({}, 0)
    assert [(row.precision, row.macs) for row in rows if row.macs] == [(label, 2 * 32 * 64)]
    assert runtime.describe()["products"] == {label: 1.0}


def test_weights_of_four_bits_are_not_called_int8(save: Save) -> None:
    path = save(lambda x: mb.linear(x=in_int8(x), weight=WEIGHT), (2, 64), ios="18", change=compress("int4"))
    assert loaded(path, "int8").effective_precision == "fp32, int4 weights"


def test_the_share_of_each_precision_is_by_multiply_adds(save: Save) -> None:
    def body(x: Any) -> Any:
        y = in_int8(x)
        return mb.matmul(x=mb.matmul(x=y, y=in_int8(x, "uint8"), transpose_y=True), y=x)

    runtime = loaded(save(body, (2, 64)), "int8")
    assert runtime.describe()["products"] == {"fp32": 0.5, "int8": 0.5}
    assert runtime.effective_precision == "int8"


# ---- watching


def test_every_floating_value_is_shown_with_the_input(save: Save) -> None:
    path = save(lambda x: mb.relu(x=in_int8(mb.mul(x=x, y=np.float32(2), name="double")), name="last"), (1, 3))
    seen: dict[str, np.ndarray] = {}
    loaded(path).watch({"x": np.array([[-1, 0.25, 2]], np.float32)}, lambda name, array: seen.update({name: array + 0}))
    np.testing.assert_array_equal(seen["x"], [[-1, 0.25, 2]])
    np.testing.assert_array_equal(seen["double"], [[-2, 0.5, 4]])
    assert all(array.dtype == np.float32 for array in seen.values())  # no integers between
    assert len(seen) == 4


def test_a_fixed_batch_is_filled_by_repeating(save: Save) -> None:
    seen: dict[str, np.ndarray] = {}
    runtime = loaded(save(lambda x: mb.relu(x=x, name="last"), (3, 2)))
    runtime.watch({"x": np.array([[1, -1]], np.float32)}, lambda name, array: seen.update({name: array + 0}))
    np.testing.assert_array_equal(seen["last"], [[1, 0]] * 3)


def test_watching_what_is_not_finite_fails_as_a_run_does(save: Save) -> None:
    runtime = loaded(save(lambda x: mb.log(x=x, epsilon=np.float32(0)), (1, 2)))
    with pytest.raises(RuntimeFailure, match="is not finite: first log"):
        runtime.watch({"x": np.array([[-1, 1]], np.float32)}, lambda name, array: None)
