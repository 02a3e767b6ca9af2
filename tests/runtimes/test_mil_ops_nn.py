"""Convolution, pooling, norms, attention and moves of values: Core ML's operators against loops and slices in NumPy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevit.runtimes import mil_ops_owner
from edgevit.runtimes.mil_ops import Operands
from edgevit.runtimes.mil_reference import OPERATORS

IOS17 = 8  # the specification version that knows every operator here
CLOSE = 1e-5  # float32 sums of some tens of products against float64
DRAW = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32)


def operands(kind: str, values: dict[str, Any]) -> Operands:
    """NumPy arrays, numbers, texts and lists of arrays as the interpreter hands them over."""

    def held(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray | np.generic):
            return [held(each) for each in value]
        array = np.asarray(value)
        array = array.astype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype))
        return torch.from_numpy(np.array(array))

    return Operands(kind, {name: held(value) for name, value in values.items()}, IOS17)


def computed(kind: str, values: dict[str, Any]) -> list[np.ndarray]:
    result = OPERATORS[kind](operands(kind, values))
    return [result.numpy()] if isinstance(result, Tensor) else [each.numpy() for each in result]


def check(kind: str, values: dict[str, Any], *expected: Any) -> None:
    """The operator's outputs are those expected, and those of the owner's code where it has the operator."""
    for found, want in zip(computed(kind, values), expected, strict=True):
        assert found.shape == np.shape(want)
        np.testing.assert_allclose(found.astype(np.float64), np.asarray(want, np.float64), rtol=CLOSE, atol=CLOSE)


# ---- convolution and pooling, by loops


def widths(kind: str, pad: list[int], size: Any, kernel: Any, strides: Any) -> list[tuple[int, int]]:
    if kind == "custom":
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(len(size))]
    if kind == "valid":
        return [(0, 0)] * len(size)
    pairs = []
    for d, k, s in zip(size, kernel, strides, strict=True):
        total = max(0, (-(-d // s) - 1) * s + k - d)
        pairs.append((total // 2, total - total // 2) if kind == "same" else (total - total // 2, total // 2))
    return pairs


def convolved(x: Any, w: Any, bias: Any, strides: Any, pads: Any, dilations: Any, groups: int) -> np.ndarray:
    """By the definition: every output is a sum over its group's channels and the kernel."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    size = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, strides, strict=True)]
    out = np.zeros((x.shape[0], w.shape[0], *size))
    step, share = w.shape[1], w.shape[0] // groups
    for n, k, place in itertools.product(range(x.shape[0]), range(w.shape[0]), np.ndindex(*size)):
        window = tuple(
            slice(p * s, p * s + span, d) for p, s, span, d in zip(place, strides, spans, dilations, strict=True)
        )
        first = k // share * step
        out[(n, k, *place)] = (x[(n, slice(first, first + step), *window)] * w[k]).sum()
    return out + bias.reshape(1, -1, *[1] * len(size))


@pytest.mark.parametrize("pad_type", ["valid", "same", "same_lower", "custom"])
@pytest.mark.parametrize(("strides", "dilations", "groups"), [((1, 1), (1, 1), 1), ((2, 3), (2, 1), 2)])
def test_conv(pad_type: str, strides: Any, dilations: Any, groups: int) -> None:
    x, w, bias, pad = normal(2, 4, 7, 8), normal(6, 4 // groups, 3, 2), normal(6), [2, 1, 0, 3]
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = widths(pad_type, pad, x.shape[2:], spans, strides)
    values = {"x": x, "weight": w, "bias": bias, "strides": strides, "dilations": dilations, "groups": groups,
              "pad_type": pad_type, **({"pad": pad} if pad_type == "custom" else {})}  # fmt: skip
    check("conv", values, convolved(x, w, bias, strides, pads, dilations, groups))


@pytest.mark.parametrize("axes", [1, 3])
def test_conv_on_lines_and_volumes(axes: int) -> None:
    x, w = normal(1, 2, *[5] * axes), normal(3, 2, *[3] * axes)
    expected = convolved(x, w, np.zeros(3), [1] * axes, [(0, 0)] * axes, [1] * axes, 1)
    check("conv", {"x": x, "weight": w}, expected)


def transposed(x: Any, w: Any, strides: Any, dilations: Any, groups: int) -> np.ndarray:
    """By the definition: every input adds a scaled kernel to the output."""
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    size = [(n - 1) * s + span for n, span, s in zip(x.shape[2:], spans, strides, strict=True)]
    out = np.zeros((x.shape[0], w.shape[1] * groups, *size))
    share = x.shape[1] // groups
    for n, c, place in itertools.product(range(x.shape[0]), range(x.shape[1]), np.ndindex(*x.shape[2:])):
        window = tuple(
            slice(p * s, p * s + span, d) for p, s, span, d in zip(place, strides, spans, dilations, strict=True)
        )
        first = c // share * w.shape[1]
        out[(n, slice(first, first + w.shape[1]), *window)] += x[(n, c, *place)] * w[c].astype(np.float64)
    return out


@pytest.mark.parametrize(("dilations", "groups"), [((1, 1), 1), ((2, 1), 2)])
def test_conv_transpose(dilations: Any, groups: int) -> None:
    x, w, bias = normal(1, 4, 3, 4), normal(4, 3, 3, 2), normal(3 * groups)
    whole = transposed(x, w, (2, 3), dilations, groups) + bias[:, None, None]
    values = {"x": x, "weight": w, "bias": bias, "strides": (2, 3), "dilations": dilations, "groups": groups}
    check("conv_transpose", values, whole)
    custom = {**values, "pad_type": "custom", "pad": [1, 0, 0, 2]}
    check("conv_transpose", custom, whole[:, :, 1:, : whole.shape[3] - 2])
    longer = {**custom, "output_shape": [1, bias.size, whole.shape[2], whole.shape[3] - 2]}
    grown = np.concatenate(
        [whole[:, :, 1:, :-2], np.broadcast_to(bias[:, None], (1, bias.size, whole.shape[3] - 2))[:, :, None]], 2
    )
    check("conv_transpose", longer, grown)


def pooled(x: Any, kernel: Any, strides: Any, pads: Any, extra: Any, how: Any, empty: float) -> np.ndarray:
    """`how` of each window; `extra` is what ceil_mode appends."""
    filled = np.pad(
        x, [(0, 0), (0, 0), *[(b, a + e) for (b, a), e in zip(pads, extra, strict=True)]], constant_values=empty
    )
    size = [(n - k) // s + 1 for n, k, s in zip(filled.shape[2:], kernel, strides, strict=True)]
    out = np.zeros((*x.shape[:2], *size))
    for place in np.ndindex(*size):
        window = tuple(slice(p * s, p * s + k) for p, s, k in zip(place, strides, kernel, strict=True))
        out[(slice(None), slice(None), *place)] = how(filled[(slice(None), slice(None), *window)])
    return out


POOLS = [("valid", [], (0, 0)), ("same", [], (0, 0)), ("same_lower", [], (0, 0)), ("custom", [1, 1, 0, 1], (0, 0))]


@pytest.mark.parametrize(("pad_type", "pad", "extra"), POOLS, ids=[pool[0] for pool in POOLS])
@pytest.mark.parametrize("excluded", [False, True])
def test_pooling(pad_type: str, pad: list[int], extra: Any, excluded: bool) -> None:
    x, kernel, strides = normal(2, 3, 7, 6), (3, 2), (2, 1)
    pads = widths(pad_type, pad, x.shape[2:], kernel, strides)
    values = {"x": x, "kernel_sizes": kernel, "strides": strides, "pad_type": pad_type}
    values |= {"pad": pad} if pad else {}
    axes = (2, 3)
    check("max_pool", values, pooled(x, kernel, strides, pads, extra, lambda v: v.max(axes), -np.inf))
    total = pooled(x, kernel, strides, pads, extra, lambda v: v.astype(np.float64).sum(axes), 0.0)
    seen = pooled(np.ones_like(x), kernel, strides, pads, extra, lambda v: v.sum(axes), 0.0 if excluded else 1.0)
    check("avg_pool", {**values, "exclude_padding_from_average": excluded}, total / seen)
    squares = pooled(x**2, kernel, strides, pads, extra, lambda v: v.sum(axes), 0.0)
    check("l2_pool", values, np.sqrt(squares))


@pytest.mark.parametrize(("size", "pad"), [(7, 0), (8, 1), (5, 1), (6, 0)])
@pytest.mark.parametrize("excluded", [False, True])
def test_pooling_with_ceil_mode_is_that_of_pytorch(size: int, pad: int, excluded: bool) -> None:
    x = torch.from_numpy(normal(1, 2, size, size))
    values = {"x": x.numpy(), "kernel_sizes": (3, 3), "strides": (2, 2), "pad_type": "custom", "pad": [pad] * 4}
    values |= {"ceil_mode": True}
    mean = torch.nn.functional.avg_pool2d(x, 3, 2, pad, ceil_mode=True, count_include_pad=not excluded)
    check("avg_pool", {**values, "exclude_padding_from_average": excluded}, mean.numpy())
    check("max_pool", values, torch.nn.functional.max_pool2d(x, 3, 2, pad, ceil_mode=True).numpy())


# ---- products and norms


@pytest.mark.parametrize(("tx", "ty"), list(itertools.product([False, True], repeat=2)))
def test_matmul_with_either_side_stored_transposed(tx: bool, ty: bool) -> None:
    x, y = normal(2, 1, 3, 5), normal(4, 5, 2)
    stored = (x.swapaxes(-1, -2) if tx else x), (y.swapaxes(-1, -2) if ty else y)
    check("matmul", {"x": stored[0], "y": stored[1], "transpose_x": tx, "transpose_y": ty}, x @ y)


def test_linear_with_and_without_bias_and_einsum() -> None:
    x, w, bias = normal(2, 3, 5), normal(4, 5), normal(4)
    check("linear", {"x": x, "weight": w}, x @ w.T)
    check("linear", {"x": x, "weight": w, "bias": bias}, x @ w.T + bias)
    a, b = normal(2, 3, 4, 5), normal(2, 5, 4, 6)
    check("einsum", {"values": [a, b], "equation": "nchw,nwhu->nchu"}, np.einsum("nchw,nwhu->nchu", a, b))


@pytest.mark.parametrize("mask", ["none", "added", "boolean"])
def test_attention_scales_by_the_root_of_the_width(mask: str) -> None:
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6)
    added = {"none": np.zeros((4, 5)), "added": normal(4, 5), "boolean": np.where(np.eye(4, 5) > 0, 0.0, -np.inf)}[mask]
    logits = q.astype(np.float64) @ k.swapaxes(-1, -2) / math.sqrt(8) + added
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    values: dict[str, Any] = {"query": q, "key": k, "value": v}
    values |= {} if mask == "none" else {"attn_mask": np.eye(4, 5) > 0 if mask == "boolean" else added}
    check("scaled_dot_product_attention", values, weights / weights.sum(-1, keepdims=True) @ v)


@pytest.mark.parametrize("axes", [[-1], [2, 1], [1], [0, 2], None])
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_over_any_axes(axes: list[int] | None, affine: bool) -> None:
    x = normal(2, 3, 4)
    over = tuple(sorted(a % 3 for a in (axes or [0, 1, 2])))
    lengths = [x.shape[a] for a in over]
    gamma, beta = normal(*lengths), normal(*lengths)
    expected = (x - x.mean(over, keepdims=True)) / np.sqrt(x.var(over, keepdims=True) + 0.01)
    if affine:
        shape = [x.shape[a] if a in over else 1 for a in range(3)]
        expected = expected * gamma.reshape(shape) + beta.reshape(shape)
    values = {"x": x, "epsilon": 0.01, **({} if axes is None else {"axes": axes})}
    check("layer_norm", {**values, **({"gamma": gamma, "beta": beta} if affine else {})}, expected)


def test_norms_with_stored_statistics_by_channel_and_by_length() -> None:
    x, mean, variance, gamma, beta = normal(2, 3, 4, 5), normal(3), np.abs(normal(3)), normal(3), normal(3)

    def channel(values: np.ndarray) -> np.ndarray:
        return values[:, None, None]

    normed = (x - channel(mean)) / np.sqrt(channel(variance) + 1e-5)
    check("batch_norm", {"x": x, "mean": mean, "variance": variance}, normed)
    affine = {"gamma": gamma, "beta": beta}
    check("batch_norm", {"x": x, "mean": mean, "variance": variance, **affine}, normed * channel(gamma) + channel(beta))
    own = (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-3)
    check("instance_norm", {"x": x, "epsilon": 1e-3, **affine}, own * channel(gamma) + channel(beta))
    length = np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + 1e-6)
    check("l2_norm", {"x": x}, x / length)
    around = np.stack([(x[:, max(0, i - 1) : i + 2] ** 2).sum(1) for i in range(3)], 1)
    check(
        "local_response_norm", {"x": x, "size": 3, "alpha": 0.3, "beta": 0.5, "k": 2.0}, x / (2 + 0.1 * around) ** 0.5
    )


def test_upsampling() -> None:
    x = normal(1, 2, 3, 4)
    nearest = {"x": x, "scale_factor_height": 2, "scale_factor_width": 3}
    check("upsample_nearest_neighbor", nearest, x.repeat(2, 2).repeat(3, 3))
    ramp = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
    corners = {"x": ramp, "scale_factor_height": 1, "scale_factor_width": 2, "align_corners": True}
    check("upsample_bilinear", corners, np.linspace(0, 3, 8).reshape(1, 1, 1, 8))
    centres = {**corners, "align_corners": False, "half_pixel_centers": True}
    check("upsample_bilinear", centres, [[[[0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]]]])
    with pytest.raises(ValueError, match="neither align_corners nor half_pixel_centers"):
        computed("upsample_bilinear", {**corners, "align_corners": False, "half_pixel_centers": False})


# ---- moves of values

X = normal(2, 3, 4)
FLAT = np.arange(24).reshape(2, 3, 4).astype(np.float32)
MOVES: list[tuple[str, dict[str, Any], Any]] = [
    ("concat", {"values": [X, X + 1], "axis": -2}, np.concatenate([X, X + 1], 1)),
    ("concat", {"values": [X, X + 1], "axis": 1, "interleave": True}, np.stack([X, X + 1], 2).reshape(2, 6, 4)),
    ("concat", {"values": [np.int32(2), np.array([3, 4], np.int32)], "axis": 0}, [2, 3, 4]),
    ("stack", {"values": [X, X + 1], "axis": -1}, np.stack([X, X + 1], -1)),
    ("cumsum", {"x": X, "axis": 1}, X.cumsum(1)),
    ("cumsum", {"x": FLAT, "axis": -1, "reverse": True}, FLAT[..., ::-1].cumsum(-1)[..., ::-1]),
    ("cumsum", {"x": FLAT, "axis": 0, "exclusive": True}, FLAT.cumsum(0) - FLAT),
    ("cumsum", {"x": FLAT, "axis": 2, "exclusive": True, "reverse": True},
     FLAT[..., ::-1].cumsum(-1)[..., ::-1] - FLAT),
    ("expand_dims", {"x": X, "axes": [-1, 0]}, X[None, ..., None]),
    ("squeeze", {"x": X[:, :1, :1], "axes": [-1]}, X[:, :1, 0]),
    ("squeeze", {"x": X[:, :1, :1]}, X[:, 0, 0]),
    ("fill", {"shape": [2, 3], "value": 1.5}, np.full((2, 3), 1.5)),
    ("fill_like", {"ref_tensor": X, "value": 2.0}, np.full(X.shape, 2.0)),
    ("gather", {"x": X, "indices": np.array([[2, 0], [-1, 1]]), "axis": 1}, X[:, [[2, 0], [-1, 1]]]),
    ("gather", {"x": X, "indices": np.int32(-1), "axis": -1}, X[..., -1]),
    ("gather", {"x": X, "indices": np.array([[2], [0]]), "axis": 1, "batch_dims": 1}, np.stack([X[0, [2]], X[1, [0]]])),
    ("gather_along_axis", {"x": X, "indices": X.argsort(-1), "axis": -1}, np.sort(X, -1)),
    ("gather_along_axis", {"x": X, "indices": np.array([[[-1] * 4], [[0] * 4]]), "axis": 1}, [X[0, 2:], X[1, :1]]),
    ("gather_nd", {"x": X, "indices": np.array([[0, 1], [1, 2]])}, X[[0, 1], [1, 2]]),
    ("gather_nd", {"x": X, "indices": np.array([[[0, 1]], [[2, 3]]]), "batch_dims": 1}, [[X[0, 0, 1]], [X[1, 2, 3]]]),
    ("pad", {"x": X, "pad": [1, 2], "mode": "constant", "constant_val": 9.0},
     np.pad(X, ((0, 0), (0, 0), (1, 2)), constant_values=9)),
    ("pad", {"x": X, "pad": [1, 0, 0, 2], "mode": "reflect"}, np.pad(X, ((0, 0), (1, 0), (0, 2)), mode="reflect")),
    ("pad", {"x": X, "pad": [1, 1, 0, 0, 2, 0], "mode": "replicate"}, np.pad(X, ((1, 1), (0, 0), (2, 0)), mode="edge")),
    ("pixel_shuffle", {"x": FLAT.reshape(1, 4, 2, 3), "upscale_factor": 2},
     FLAT.reshape(2, 2, 2, 3).transpose(2, 0, 3, 1).reshape(1, 1, 4, 6)),
    ("pixel_unshuffle", {"x": FLAT.reshape(1, 1, 4, 6), "downscale_factor": 2},
     FLAT.reshape(2, 2, 3, 2).transpose(1, 3, 0, 2).reshape(1, 4, 2, 3)),
    ("reshape", {"x": X, "shape": [-1, 8]}, X.reshape(3, 8)),
    ("reshape", {"x": X, "shape": [4, 0, 2]}, X.reshape(4, 3, 2)),
    ("reverse", {"x": X, "axes": [-1, 0]}, X[::-1, :, ::-1]),
    ("reverse", {"x": X}, X[::-1, ::-1, ::-1]),
    ("shape", {"x": X}, [2, 3, 4]),
    ("slice_by_index", {"x": X, "begin": [0, 1, 0], "end": [2, 3, 4]}, X[:, 1:3]),
    ("slice_by_index", {"x": X, "begin": [0, -2, 1], "end": [1, -1, 99], "begin_mask": [1, 0, 0],
                        "end_mask": [1, 0, 0], "stride": [1, 1, 2]}, X[:, -2:-1, 1::2]),
    ("slice_by_index", {"x": X, "begin": [1, 0, 3], "end": [0, 0, 0], "squeeze_mask": [1, 0, 0],
                        "begin_mask": [0, 1, 0], "end_mask": [0, 1, 1], "stride": [1, 1, -2]}, X[1, :, 3::-2]),
    ("slice_by_index", {"x": X, "begin": [0, 0, -1], "end": [2, 3, 0], "squeeze_mask": [0, 0, 1]}, X[..., -1]),
    ("slice_by_size", {"x": X, "begin": [0, 1, 2], "size": [-1, 2, 1]}, X[:, 1:3, 2:3]),
    ("tile", {"x": X, "reps": [2, 1, 3]}, np.tile(X, (2, 1, 3))),
    ("transpose", {"x": X, "perm": [-1, 0, 1]}, X.transpose(2, 0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "expected"), MOVES, ids=[f"{i}-{m[0]}" for i, m in enumerate(MOVES)])
def test_values_are_moved(kind: str, values: dict[str, Any], expected: Any) -> None:
    check(kind, values, expected)


def fails_in_the_owners_code(kind: str, values: dict[str, Any]) -> bool:
    """It leaves `interleave` out, takes no numbers, and puts an array where NumPy wants a type."""
    odd = kind == "concat" and ("interleave" in values or not values["values"][0].ndim)
    return odd or (kind == "cumsum" and "exclusive" in values)


PRODUCTS: list[tuple[str, dict[str, Any], Any]] = [
    ("linear", {"x": X, "weight": normal(5, 4), "bias": normal(5)}, None),
    ("matmul", {"x": X, "y": normal(4, 2)}, None),
    ("layer_norm", {"x": X, "axes": [1, -1], "gamma": normal(3, 4), "beta": normal(3, 4), "epsilon": 0.1}, None),
    ("l2_norm", {"x": X, "epsilon": 0.1}, None),
]
OWNED = [
    case
    for case in (*MOVES, *PRODUCTS)
    if case[0] in mil_ops_owner.owned() and not fails_in_the_owners_code(case[0], case[1])
]


@pytest.mark.parametrize(("kind", "values", "expected"), OWNED, ids=[f"{i}-{c[0]}" for i, c in enumerate(OWNED)])
def test_the_code_of_the_owner_agrees(kind: str, values: dict[str, Any], expected: Any) -> None:  # noqa: ARG001  # the table's columns
    theirs = mil_ops_owner.compute(operands(kind, values))
    theirs = [theirs] if isinstance(theirs, Tensor) else list(theirs)
    for a, b in zip(theirs, computed(kind, values), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.numpy(), b, rtol=CLOSE, atol=CLOSE)


def test_split_by_number_and_by_sizes() -> None:
    check("split", {"x": X, "num_splits": 2, "axis": -1}, X[..., :2], X[..., 2:])
    check("split", {"x": X, "split_sizes": [1, 2], "axis": 1}, X[:, :1], X[:, 1:])
    check("split", {"x": X, "num_splits": 2, "split_sizes": [3, 1], "axis": 2}, X[..., :3], X[..., 3:])
    with pytest.raises(ValueError, match="4 entries cannot be split into 3"):
        computed("split", {"x": X, "num_splits": 3, "axis": 2})


def test_a_zero_in_a_shape_needs_its_axis() -> None:
    with pytest.raises(ValueError, match="has a 0 and another number of axes than the 3"):
        computed("reshape", {"x": X, "shape": [0, -1]})


def test_an_axis_that_is_longer_than_one_is_not_dropped() -> None:
    with pytest.raises(ValueError, match="axis 1 has length 3"):
        computed("squeeze", {"x": X, "axes": [1]})


def test_what_the_table_lacks_comes_from_the_owner() -> None:
    """Operators that no network here has, computed by coremltools' own code: one each of several kinds."""
    top = mil_ops_owner.compute(operands("topk", {"x": X, "k": 2, "axis": -1, "ascending": False}))
    assert not isinstance(top, Tensor)
    np.testing.assert_array_equal(top[0].numpy(), -np.sort(-X, -1)[..., :2])
    np.testing.assert_array_equal(top[1].numpy(), np.argsort(-X, -1)[..., :2])
    steps = mil_ops_owner.compute(operands("range_1d", {"start": np.int32(1), "end": np.int32(7), "step": np.int32(2)}))
    assert isinstance(steps, Tensor) and steps.tolist() == [1, 3, 5]
    band = mil_ops_owner.compute(operands("band_part", {"x": X, "lower": np.int32(0), "upper": np.int32(-1)}))
    assert isinstance(band, Tensor)
    np.testing.assert_array_equal(band.numpy(), np.triu(X))
    before = X.copy()
    mil_ops_owner.compute(operands("argsort", {"x": X}))
    np.testing.assert_array_equal(X, before)
    with pytest.raises(KeyError):
        mil_ops_owner.compute(operands("thresholded_relu", {"x": X, "alpha": 0.5}))  # it writes into its operand
