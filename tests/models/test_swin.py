"""Swin's reference form: official logits and counts, windows against a plain loop, the checkpoints people bring."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevit.bench.complexity import count_module
from edgevit.errors import CheckpointError, UsageError
from edgevit.models import LoadedModel, load_model, randomize_
from edgevit.models.layers import BlockSequence, Features
from edgevit.models.swin import (
    CARDS,
    MASKED,
    SwinBlock,
    SwinConfig,
    SwinOptions,
    SwinTransformer,
    WindowAttention,
    build,
    frame,
    shift_mask,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = "swin_t-224x224"
FIGURES = {  # parameters; MACs at 224x224, which the official code's own tables round to 4.491, 8.741 and 15.431 G
    "swin_t": (28_288_354, 4_490_566_656),
    "swin_s": (49_606_258, 8_740_875_264),
    "swin_b": (87_768_224, 15_430_946_816),
}
SMALL = SwinConfig(32, (2, 2, 2, 2))

PUBLISHED = [name for name, card in CARDS.items() if card.num_classes == 1000]  # the small network ships trained

every_model = pytest.mark.parametrize("name", PUBLISHED)


def small(window: int = 7, *, seed: int = 0, features_only: bool = False) -> SwinTransformer:
    """A network of the same kind with nothing neutral in it, float64, ten classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SwinTransformer(SMALL, window, 10, features_only=features_only)
        randomize_(model)
    return model.double().eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loaded(tmp_path: Path, state: dict[str, Tensor], name: str = "swin_t", **arguments: Any) -> LoadedModel:
    torch.save({"model": state}, tmp_path / "weights.pth")
    return load_model(name, tmp_path / "weights.pth", **arguments)


def agree(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


# ---- names, counts, official logits


@every_model
def test_parameters_and_macs(name: str) -> None:
    with torch.device("meta"):
        model = build(name, SwinOptions(), num_classes=1000, features_only=False)
    count = count_module(model, (224, 224))
    assert (count.parameters, count.macs) == FIGURES[name]
    assert (CARDS[name].parameters, CARDS[name].macs) == FIGURES[name]


@pytest.fixture(scope="module")
def official(fill: ModuleType) -> tuple[dict[str, Tensor], Tensor, NDArray[np.float32]]:
    """The golden case: the official state_dict with its buffers, the images, the official logits."""
    schema = json.loads((GOLDEN / f"{CASE}.json").read_text())
    with np.load(GOLDEN / f"{CASE}.npz") as arrays:
        state = {key: torch.from_numpy(value) for key, value in fill.fill_state_dict(schema, arrays).items()}
        return state, torch.from_numpy(fill.make_input(schema)), arrays["logits"]


@pytest.fixture(scope="module")
def model(official: Any, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return loaded(tmp_path_factory.mktemp("official"), official[0]).module


def test_an_official_checkpoint_loads_without_its_buffers(official: Any, model: nn.Module) -> None:
    buffers = {key for key in official[0] if key.endswith(("relative_position_index", "attn_mask"))}
    assert len(official[0]) == 190 and len(buffers) == 17  # what the official file holds
    assert agree(model, {key: tensor for key, tensor in official[0].items() if key not in buffers})


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float64, 1e-6),  # the official logits are stored in float32: 1e-6 is their last digit
        (torch.float32, 1e-4),  # rounding through twelve blocks: measured at 1e-6
    ],
    ids=["float64", "float32"],
)
def test_official_logits(official: Any, model: nn.Module, dtype: torch.dtype, limit: float) -> None:
    _, images, expected = official
    with torch.no_grad():
        logits = model.to(dtype)(images.to(dtype))
    model.float()
    assert logits.shape == expected.shape
    assert np.abs(logits.double().numpy() - expected.astype(np.float64)).max() <= limit
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # a network that ignored its image would not get here


# ---- windows


def test_a_window_as_long_as_an_axis_neither_moves_nor_shrinks_the_other() -> None:
    assert frame(56, 56, 7, shifted=True) == (7, 7, 3, 3)
    assert frame(56, 56, 7, shifted=False) == (7, 7, 0, 0)
    assert frame(7, 14, 7, shifted=True) == (7, 7, 0, 3)
    assert frame(5, 3, 7, shifted=True) == (5, 3, 0, 0)


# maps that windows of 4 divide, pad, cover on one axis or on both
SIZES = [(8, 8), (12, 8), (6, 10), (4, 12), (9, 3), (4, 4), (2, 3), (5, 5)]
every_size = pytest.mark.parametrize(("height", "width"), SIZES)
every_shift = pytest.mark.parametrize("shifted", [False, True], ids=["regular", "shifted"])


def block(*, shifted: bool) -> SwinBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SwinBlock(64, 4, 2, shifted=shifted)
        randomize_(made)
    return made.double().eval()


@every_size
@every_shift
def test_partition_and_merge_are_a_round_trip(height: int, width: int, shifted: bool) -> None:
    one, x = block(shifted=shifted), image(3, height, width, 64)
    groups = one.partition(x)
    assert groups.shape[1] == min(4, height) * min(4, width)
    assert torch.equal(one.merge(groups, height, width), x)


Place = tuple[int, int]


def windows(height: int, width: int, *, shifted: bool) -> Iterator[list[tuple[Place, Place]]]:
    """Each window's tokens: (place in the window, place in the map padded to whole windows), by a plain loop."""
    rows, columns = min(4, height), min(4, width)
    down, right = (2 if shifted and side > 4 else 0 for side in (height, width))  # half a window
    tall, wide = (-(-height // rows) * rows, -(-width // columns) * columns)
    for top in range(0, tall, rows):
        for left in range(0, wide, columns):
            yield [
                ((i, j), ((top + i + down) % tall, (left + j + right) % wide))
                for i in range(rows)
                for j in range(columns)
            ]


def together(one: tuple[Place, Place], other: tuple[Place, Place]) -> bool:
    """Whether two tokens lie in the map as they lie in the window; otherwise the roll brought them together."""
    (a, p), (b, q) = one, other
    return all(p[axis] - q[axis] == a[axis] - b[axis] for axis in (0, 1))


@every_size
@every_shift
def test_the_mask_separates_what_the_roll_brought_together(height: int, width: int, shifted: bool) -> None:
    lay = frame(height, width, 4, shifted=shifted)
    mask = shift_mask(height + -height % lay.rows, width + -width % lay.columns, lay)
    expected = np.array(
        [
            [[0 if together(a, b) else MASKED for b in tokens] for a in tokens]
            for tokens in windows(height, width, shifted=shifted)
        ]
    )
    if mask is None:
        assert not expected.any()
    else:
        assert np.array_equal(mask, expected) and expected.any()


def attended(one: SwinBlock, normed: Tensor, *, shifted: bool) -> Tensor:
    """One picture's map after norm1 (h, w, c) -> what attention adds to it, token by token."""
    height, width, c = normed.shape
    attn, d = one.attn, c // 2
    table = attn.relative_position_bias_table.view(7, 7, 2)  # offsets -3..3 of rows, of columns, heads
    out = torch.zeros_like(normed)
    for tokens in windows(height, width, shifted=shifted):
        inside = [p[0] < height and p[1] < width for _, p in tokens]
        x = torch.stack(
            [normed[p] if real else normed.new_zeros(c) for (_, p), real in zip(tokens, inside, strict=True)]
        )
        q, key, value = attn.qkv(x).split(c, -1)
        result = torch.empty_like(x)
        for head, cut in enumerate((slice(0, d), slice(d, 2 * d))):
            logits = q[:, cut] @ key[:, cut].T / d**0.5
            for m, a in enumerate(tokens):
                for n, b in enumerate(tokens):
                    logits[m, n] += table[a[0][0] - b[0][0] + 3, a[0][1] - b[0][1] + 3, head]
                    logits[m, n] += 0 if together(a, b) else MASKED
            result[:, cut] = logits.softmax(-1) @ value[:, cut]
        for (_, p), real, row in zip(tokens, inside, attn.proj(result), strict=True):
            if real:
                out[p] = row
    return out


@every_size
@every_shift
def test_a_block_is_what_a_plain_loop_computes(height: int, width: int, shifted: bool) -> None:
    """Also where windows do not divide the map: zeros after norm1, which no mask hides."""
    one, x = block(shifted=shifted), image(1, height * width, 64)
    with torch.no_grad():
        normed = one.norm1(x).view(height, width, 64)
        expected = x + attended(one, normed, shifted=shifted).view_as(x)
        expected = expected + one.mlp(one.norm2(expected))
        torch.testing.assert_close(one(x, height, width), expected, rtol=0, atol=1e-12)  # float64's rounding


@every_size
@every_shift
def test_a_block_keeps_the_contract_of_the_deploy_form(height: int, width: int, shifted: bool) -> None:
    """partition, plain attention with attention_bias, merge: the same numbers."""
    one, x = block(shifted=shifted), image(2, height * width, 64)
    with torch.no_grad():
        groups, bias = one.partition(one.norm1(x).view(2, height, width, 64)), one.attention_bias(height, width)
        assert bias.shape[0] in (1, groups.shape[0] // 2) and bias.shape[1:] == (2, *2 * groups.shape[1:2])
        qkv = one.attn.qkv(groups).view(2, -1, groups.shape[1], 3, 2, 32).permute(3, 0, 1, 4, 2, 5)  # 3 b g k n d
        mixed = (qkv[0] @ qkv[1].mT / 32**0.5 + bias).softmax(-1) @ qkv[2]
        groups = one.attn.proj(mixed.transpose(2, 3).reshape(groups.shape))
        expected = x + one.merge(groups, height, width).view_as(x)
        expected = expected + one.mlp(one.norm2(expected))
        torch.testing.assert_close(one(x, height, width), expected, rtol=0, atol=1e-12)  # float64's rounding


# ---- whole networks


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 160), (224, 64)])
def test_rectangles_and_batches(height: int, width: int) -> None:
    net, images = small(), image(2, 3, height, width)
    with torch.no_grad():
        logits, alone = net(images), torch.cat([net(one[None]) for one in images])
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)  # float64: other kernels for another batch


def test_a_picture_and_its_transpose_tell_rows_from_columns() -> None:
    """Height and width have their own windows: swapping them with every table and kernel swaps nothing else."""
    net, images = small(), image(1, 3, 64, 160)
    swapped = small()
    state = swapped.state_dict()
    for key, tensor in state.items():
        if key.endswith("relative_position_bias_table"):
            state[key] = tensor.view(13, 13, -1).transpose(0, 1).reshape(169, -1)
        elif key.endswith("proj.weight") and tensor.dim() == 4:
            state[key] = tensor.transpose(2, 3).clone()
        elif re.search(r"downsample\.(norm\.(weight|bias)|reduction\.weight)$", key):
            corners = tensor.chunk(4, -1)  # (0,0), (1,0), (0,1), (1,1)
            state[key] = torch.cat([corners[i] for i in (0, 2, 1, 3)], -1)
    swapped.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(swapped(images.transpose(2, 3)), net(images), rtol=0, atol=1e-12)


def test_a_small_picture_leaves_nothing_behind() -> None:
    net = small()
    with torch.no_grad():
        before = net(image(1, 3, 256, 256))
        net(image(1, 3, 32, 32))
        assert torch.equal(net(image(1, 3, 256, 256)), before)


def test_features_are_the_stages_normed() -> None:
    whole, backbone = small(), small(features_only=True)
    stages: list[Tensor] = []
    state = {key: tensor for key, tensor in whole.state_dict().items() if not key.startswith(("norm.", "head."))}
    norms = {key: tensor for key, tensor in backbone.state_dict().items() if key.startswith("norm")}
    backbone.load_state_dict({**state, **norms})
    for sequence in (module for module in whole.modules() if isinstance(module, BlockSequence)):
        sequence.register_forward_hook(lambda *call: stages.append(call[2]))
    with torch.no_grad():
        whole(image(2, 3, 64, 96))
        features = backbone(image(2, 3, 64, 96))
        assert isinstance(features, Features)
        for s, (feature, stage) in enumerate(zip(features, stages, strict=True)):
            height, width, c = 16 >> s, 24 >> s, 32 << s
            assert feature.shape == (2, c, height, width)
            expected = backbone.get_submodule(f"norm{s}")(stage).view(2, height, width, c)
            assert torch.equal(feature.permute(0, 2, 3, 1), expected)


def test_every_parameter_learns() -> None:
    net = small().train()
    F.cross_entropy(net(image(2, 3, 64, 64)), torch.arange(2)).backward()
    assert [
        key for key, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ] == []


# ---- checkpoints


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that timm gives: merging at the start of the next stage, the classifier one level down."""
    renamed = {}
    for key, tensor in state.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        parts = key.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head":
            parts.insert(1, "fc")
        renamed[".".join(parts)] = tensor
    return renamed


def test_timm_s_names_are_the_same_network(official: Any, model: nn.Module, tmp_path: Path) -> None:
    state = timm_names(official[0])
    assert {"head.fc.weight", "layers.3.downsample.norm.weight"} <= state.keys()
    assert not any(key.startswith("layers.0.downsample") for key in state)
    assert agree(loaded(tmp_path, state).module, dict(model.state_dict()))


def test_a_detector_gives_its_backbone(tmp_path: Path) -> None:
    trained = load_model("swin_t", features_only=True, randomize=True).module.state_dict()
    detector = {f"backbone.{key}": tensor for key, tensor in trained.items()} | {"neck.conv.weight": torch.zeros(1)}
    found = loaded(tmp_path, detector, features_only=True)
    assert agree(found.module, trained)
    assert found.notes == ()


def test_a_classifier_gives_a_backbone_with_new_norms(official: Any, tmp_path: Path) -> None:
    found = loaded(tmp_path, official[0], features_only=True)
    assert [note for note in found.notes if "norm0 to norm3" in note] == list(found.notes) != []
    state = found.module.state_dict()
    assert {key.partition(".")[0] for key in state.keys() - official[0].keys()} == {f"norm{s}" for s in range(4)}
    assert all(torch.equal(state[key], official[0][key]) for key in state.keys() & official[0].keys())


def test_another_window_resizes_the_tables(official: Any, tmp_path: Path) -> None:
    found = loaded(tmp_path, official[0], options={"window_size": 12})
    key = "layers.2.blocks.3.attn.relative_position_bias_table"
    grid = official[0][key].T.reshape(1, 12, 13, 13)  # 169 k -> 1 k 13 13
    expected = F.interpolate(grid, size=(23, 23), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(found.module.state_dict()[key], expected)
    assert [note for note in found.notes if note.startswith("12 bias tables were resized")] == list(found.notes) != []
    with torch.no_grad():
        assert found.module(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_the_middle_of_a_table_serves_small_maps() -> None:
    """A map smaller than the window reads the same offsets, so the bias is the corner of the large window's."""
    attn = WindowAttention(64, 7, 2)
    large, little = attn.position_bias(7, 7).view(2, 7, 7, 7, 7), attn.position_bias(3, 5).view(2, 3, 5, 3, 5)
    assert torch.equal(little, large[:, :3, :5, :3, :5])


@pytest.mark.parametrize(
    "table",
    [
        *(torch.zeros(shape) for shape in ((170, 3), (0, 3), (529, 0), (529, 4), (529,), (1, 529, 3), ())),
        torch.zeros(529, 3, dtype=torch.int64),
    ],
    ids=lambda table: f"{tuple(table.shape)} {table.dtype}",
)
def test_what_cannot_be_a_table_is_refused(official: Any, tmp_path: Path, table: Tensor) -> None:
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(CheckpointError, match=f"'{re.escape(key)}' is "):
        loaded(tmp_path, {**official[0], key: table})


@pytest.mark.parametrize("size", [0, -7, 65])
def test_an_impossible_window_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"window_size {size}: expected 1 to 64"):
        SwinOptions(window_size=size)
