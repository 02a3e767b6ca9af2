"""ViT-LSLA's reference form: the sizes it was reconstructed from, the ablations, attention against a plain loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevit.bench.complexity import count_module
from edgevit.errors import CheckpointError, UsageError
from edgevit.models import load_model, randomize_
from edgevit.models.layers import BlockSequence, Features
from edgevit.models.swin import frame, shift_mask
from edgevit.models.vit_lsla import (
    CARDS,
    CONFIGS,
    LslaAttention,
    LslaBlock,
    LslaOptions,
    VitLsla,
    build,
    filter_checkpoint,
)
from edgevit.options import parse_options

SIZES = {  # parameters with 100, 102 and 1000 classes; of the stem and the four stages; MACs with 1000 classes
    "vit_lsla": (
        (18_898_606, 18_900_144, 19_590_706),
        (43_056, 115_362, 1_070_280, 7_818_912, 9_772_560),
        3_496_178_688,
    ),
    "vit_lsla_swin": (
        (23_359_138, 23_360_676, 24_051_238),
        (43_056, 189_474, 822_084, 9_205_656, 13_020_432),
        3_928_796_160,
    ),
    "vit_lsla_r3": (
        (19_084_498, 19_086_036, 19_776_598),
        (85_920, 152_418, 674_244, 7_433_880, 10_659_600),
        3_381_476_352,
    ),
}
PLAIN: dict[str, Any] = {"dynamic_scale": False, "outer_bias": False}
ABLATIONS = [  # options, parameters and MACs of vit_lsla_swin with 100 classes
    ({"projections": "qkv", **PLAIN}, 27_634_414, 4_621_737_984),
    ({"projections": "qxv", **PLAIN}, 25_473_454, 4_274_921_472),
    (PLAIN, 23_312_494, 3_928_104_960),
    ({"outer_bias": False}, 23_335_816, 3_928_104_960),
    ({"dynamic_scale": False}, 23_335_816, 3_928_104_960),
    ({}, 23_359_138, 3_928_104_960),
]

PUBLISHED = [name for name, card in CARDS.items() if card.num_classes == 1000]  # the small network ships trained

every_model = pytest.mark.parametrize("name", PUBLISHED)
every_ablation = pytest.mark.parametrize("options", [row[0] for row in ABLATIONS], ids=str)


def on_meta(name: str, num_classes: int, **options: Any) -> VitLsla:
    """Without storage, for counting."""
    with torch.device("meta"):
        return build(name, LslaOptions(**options), num_classes=num_classes, features_only=False)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seeded(name: str, *, randomized: bool, features_only: bool = False, **options: Any) -> VitLsla:
    """A network of ten classes in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name, LslaOptions(**options), num_classes=10, features_only=features_only)
        if randomized:
            randomize_(model)
    return model.double().eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- sizes


@every_model
def test_parameters_and_macs(name: str) -> None:
    totals, parts, macs = SIZES[name]
    assert tuple(parameters(on_meta(name, classes)) for classes in (100, 102, 1000)) == totals
    model = on_meta(name, 1000)
    assert (parameters(model.stem), *map(parameters, model.layers)) == parts
    assert count_module(model, (224, 224)).macs == macs
    assert (CARDS[name].parameters, CARDS[name].macs) == (totals[-1], macs)


def test_the_headline_variant_prints_the_paper_s_figures() -> None:
    for classes in (100, 102):
        count = count_module(on_meta("vit_lsla", classes), (224, 224))
        assert f"{count.parameters / 1e6:.1f}M" == CARDS["vit_lsla"].paper["parameters"]
        assert f"{count.macs / 1e9:.1f}G" == CARDS["vit_lsla"].paper["flops"]


def test_the_other_variants_do_not_and_their_cards_say_so() -> None:
    for name in ("vit_lsla_swin", "vit_lsla_r3"):
        assert f"{SIZES[name][0][0] / 1e6:.1f}M" != CARDS[name].paper["parameters"]
        assert "match" in CARDS[name].notes[0]
    assert "not the authors' configuration" in CARDS["vit_lsla"].notes[0]


@pytest.mark.parametrize(("options", "size", "macs"), ABLATIONS, ids=str)
def test_the_ablations_have_their_sizes(options: dict[str, Any], size: int, macs: int) -> None:
    model = on_meta("vit_lsla_swin", 100, **options)
    assert parameters(model) == size
    assert count_module(model, (224, 224)).macs == macs


@every_model
def test_names(name: str) -> None:
    state = on_meta(name, 10).state_dict()
    block = {
        *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q.weight", "attn.q.bias"),
        *("attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
        *("attn.dynamic_scale_table", "attn.inner_bias_table", "attn.outer_bias_table"),
    }
    found = {key.removeprefix("layers.0.blocks.0.") for key in state if key.startswith("layers.0.blocks.0.")}
    assert found == block
    assert {key.split(".")[1] for key in state if ".downsample." in key} == {"1", "2", "3"}
    assert {key.split(".")[1] for key in state if key.startswith("stem.")} == {"conv1", "bn1", "conv2", "bn2"}


# ---- what the reconstruction promises


@every_model
def test_it_starts_as_attention_with_a_fixed_scale(name: str) -> None:
    """DS = d^-0.5 and B_o = 0 are the initial values, and then the network is LSA."""
    full, fixed = seeded(name, randomized=False), seeded(name, randomized=False, **PLAIN)
    state = full.state_dict()
    for key, tensor in state.items():
        if key.endswith("dynamic_scale_table"):
            assert torch.equal(tensor, torch.full_like(tensor, torch.tensor(32**-0.5)))  # float32's 32^-0.5
            tensor.fill_(32**-0.5)
        if key.endswith("outer_bias_table"):
            assert not tensor.any()
        if key.endswith("inner_bias_table"):
            assert tensor.std() == pytest.approx(0.02, rel=0.2)
    fixed.load_state_dict({key: state[key] for key in fixed.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(full(image(1, 3, 64, 96)), fixed(image(1, 3, 64, 96)), rtol=0, atol=1e-12)


@every_ablation
def test_every_switch_changes_the_output(options: dict[str, Any]) -> None:
    full, other = seeded("vit_lsla_swin", randomized=True), seeded("vit_lsla_swin", randomized=True, **options)
    other.load_state_dict(
        {**other.state_dict(), **{k: t for k, t in full.state_dict().items() if k in other.state_dict()}}
    )
    with torch.no_grad():
        difference = (full(image(1, 3, 64, 64)) - other(image(1, 3, 64, 64))).abs().max()
    assert (difference > 1e-3) == bool(options)  # the logits are near 1


def leak(*, mask_outer_bias: bool) -> tuple[float, float]:
    """How far +1 on some tokens of shifted windows moves those that a mask separates from them, and the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = LslaBlock(96, 4, LslaOptions(mask_outer_bias=mask_outer_bias), shifted=True).double()
        nn.init.normal_(block.attn.outer_bias_table, std=0.02)
    nn.init.eye_(block.attn.proj.weight)
    x = image(4, 49, 96)  # the four windows of a 14x14 map
    mask = shift_mask(14, 14, frame(14, 14, 7, shifted=True))
    assert mask is not None
    apart = torch.from_numpy(mask[:, 0] != 0)  # from each window's first token: (g, n)
    terms = block.scale(14, 14), block.attention_bias(14, 14), block.outer_bias(14, 14)
    with torch.no_grad():
        moved = (block.attn(x + apart.unsqueeze(-1), *terms) - block.attn(x, *terms)).abs().amax(-1)
    return moved[:, 0].max().item(), moved[apart].max().item()


def test_masked_tokens_do_not_leak_through_the_outer_bias() -> None:
    separated, others = leak(mask_outer_bias=True)
    assert separated == 0
    assert others > 0.1  # they see the change


def test_without_its_mask_the_outer_bias_leaks() -> None:
    assert leak(mask_outer_bias=False)[0] > 0.1  # of a change of 1


# ---- attention against a plain loop

# maps that windows of 4 divide, pad, cover on one axis or on both
MAPS = [(8, 8), (6, 10), (4, 12), (9, 3), (2, 3)]
every_map = pytest.mark.parametrize(("height", "width"), MAPS)
every_shift = pytest.mark.parametrize("shifted", [False, True], ids=["regular", "shifted"])
FORMS: list[dict[str, Any]] = [{}, {"mask_outer_bias": False}, {"projections": "qkv", **PLAIN}, {"projections": "qxv"}]
every_form = pytest.mark.parametrize("options", FORMS, ids=str)


def small_block(options: dict[str, Any], *, shifted: bool) -> LslaBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = LslaBlock(64, 2, LslaOptions(window_size=4, **options), shifted=shifted)
        randomize_(block)
    return block.double().eval()


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


def mixed(attn: LslaAttention, x: Tensor, tokens: list[tuple[Place, Place]], *, gate: bool) -> Tensor:
    """One window x (n, c), token by token as the specification has it, before the output projection."""
    query = attn.q(x)
    key, value = (x if layer is None else layer(x) for layer in (attn.k, attn.v))
    out = torch.zeros_like(x)
    for head, cut in enumerate((slice(0, 32), slice(32, 64))):
        scale, inner, outer = (
            None if table is None else table.view(7, 7, 2)[..., head]  # offsets -3..3 of rows, of columns
            for table in (attn.dynamic_scale_table, attn.inner_bias_table, attn.outer_bias_table)
        )
        for m, (a, p) in enumerate(tokens):
            logits, added = x.new_zeros(len(tokens)), x.new_zeros(len(tokens))
            for n, (b, q) in enumerate(tokens):
                dy, dx = a[0] - b[0], a[1] - b[1]
                together = (p[0] - q[0], p[1] - q[1]) == (dy, dx)
                offset = (dy + 3, dx + 3)
                assert inner is not None
                logits[n] = (query[m, cut] @ key[n, cut]) * (32**-0.5 if scale is None else scale[offset])
                logits[n] += inner[offset] + (0 if together else -100)
                if outer is not None and (together or not gate):
                    added[n] = outer[offset]
            out[m, cut] = (logits.softmax(-1) + added) @ value[:, cut]
    return out


@every_map
@every_shift
@every_form
def test_a_block_is_what_a_plain_loop_computes(height: int, width: int, shifted: bool, options: dict[str, Any]) -> None:
    block, x = small_block(options, shifted=shifted), image(1, height * width, 64)
    attn, added = block.attn, torch.zeros(height, width, 64, dtype=torch.float64)
    with torch.no_grad():
        padded = F.pad(block.norm1(x).view(height, width, 64), (0, 0, 0, -width % 4, 0, -height % 4))
        for tokens in windows(height, width, shifted=shifted):
            inside = torch.stack([padded[place] for _, place in tokens])
            out = attn.proj(mixed(attn, inside, tokens, gate=block.mask_outer_bias))
            for (_, place), row in zip(tokens, out, strict=True):
                if place[0] < height and place[1] < width:
                    added[place] = row
        expected = x + added.view_as(x)
        expected = expected + block.mlp(block.norm2(expected))
        torch.testing.assert_close(block(x, height, width), expected, rtol=0, atol=1e-12)  # float64's rounding


@every_map
@every_shift
def test_partition_and_merge_are_a_round_trip(height: int, width: int, shifted: bool) -> None:
    block, x = small_block({}, shifted=shifted), image(3, height, width, 64)
    assert torch.equal(block.merge(block.partition(x), height, width), x)


@every_map
@every_shift
def test_a_block_keeps_the_contract_of_the_deploy_form(height: int, width: int, shifted: bool) -> None:
    """The shapes of what the deploy form folds: (1 or g, k, n, n)."""
    block = small_block({}, shifted=shifted)
    groups = block.partition(image(1, height, width, 64))
    g, n = groups.shape[:2]
    scale, bias, outer = (
        block.scale(height, width),
        block.attention_bias(height, width),
        block.outer_bias(height, width),
    )
    assert isinstance(scale, Tensor) and outer is not None
    moved = shifted and (height > 4 or width > 4)
    assert scale.shape == (1, 2, n, n)
    assert bias.shape == outer.shape == (g if moved else 1, 2, n, n)
    rows, columns = min(4, height), min(4, width)
    assert torch.equal(scale[0], block.attn.dynamic_scale(rows, columns))
    if not moved:
        assert torch.equal(bias[0], block.attn.inner_bias(rows, columns))
        assert torch.equal(outer[0], block.attn.outer_bias(rows, columns))


@every_model
def test_every_other_block_is_shifted(name: str) -> None:
    for stage, depth in zip(on_meta(name, 10).layers, CONFIGS[name].depths, strict=True):
        assert [block.shifted for block in stage.blocks] == [i % 2 == 1 for i in range(depth)]


def test_an_ablated_block_says_what_it_lacks() -> None:
    block = small_block(PLAIN, shifted=True)
    assert block.scale(8, 8) == block.attn.fixed_scale == 32**-0.5
    assert block.outer_bias(8, 8) is block.attn.dynamic_scale(4, 4) is block.attn.outer_bias(4, 4) is None


# ---- stem, merging, whole networks


def test_the_stem_is_two_convolutions_with_norms_and_a_relu_between() -> None:
    stem, images = seeded("vit_lsla", randomized=True).stem, image(2, 3, 32, 48)
    with torch.no_grad():
        x = images
        for conv, norm in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2)):
            x = F.conv2d(x if conv is stem.conv1 else x.relu(), conv.weight, stride=2, padding=1)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        assert x.shape == (2, 96, 8, 12)
        torch.testing.assert_close(stem(images), x.flatten(2).mT, rtol=0, atol=1e-12)  # float64's rounding


def test_convolutional_merging_keeps_rows_and_columns_apart() -> None:
    merging, x = seeded("vit_lsla", randomized=True).layers[1].downsample, image(2, 8 * 12, 96)
    with torch.no_grad():
        grid = x.mT.view(2, 96, 8, 12)
        grid = F.conv2d(grid, merging.reduction.weight, merging.reduction.bias, stride=2, padding=1)
        expected = F.layer_norm(grid.flatten(2).mT, (192,), merging.norm.weight, merging.norm.bias)
        torch.testing.assert_close(merging(x, 8, 12), expected, rtol=0, atol=1e-12)  # float64's rounding


@every_model
def test_the_classifier_reads_the_mean_of_the_normed_tokens(name: str) -> None:
    model, images = seeded(name, randomized=True), image(2, 3, 64, 32)
    with torch.no_grad():
        x, height, width = model.stem(images), 16, 8
        for s, stage in enumerate(model.layers):
            x = stage(x, height, width)
            height, width = (height, width) if s == 0 else (height // 2, width // 2)
        assert x.shape == (2, 2, 768)
        torch.testing.assert_close(model(images), model.head(model.norm(x).mean(1)), rtol=0, atol=1e-12)


@every_model
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 160)])
def test_rectangles_and_batches(name: str, height: int, width: int) -> None:
    model, images = seeded(name, randomized=True), image(2, 3, height, width)
    with torch.no_grad():
        logits, alone = model(images), torch.cat([model(one[None]) for one in images])
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-11)  # float64: other kernels for another batch


def test_a_small_picture_leaves_nothing_behind() -> None:
    model = seeded("vit_lsla", randomized=True)
    with torch.no_grad():
        before = model(image(1, 3, 128, 128))
        model(image(1, 3, 32, 32))
        assert torch.equal(model(image(1, 3, 128, 128)), before)


@every_model
def test_features_are_what_the_stages_put_out(name: str) -> None:
    whole, backbone = seeded(name, randomized=True), seeded(name, randomized=False, features_only=True)
    backbone.load_state_dict({key: whole.state_dict()[key] for key in backbone.state_dict()})
    stages: list[Tensor] = []
    for sequence in (module for module in whole.modules() if isinstance(module, BlockSequence)):
        sequence.register_forward_hook(lambda *call: stages.append(call[2]))
    with torch.no_grad():
        whole(image(2, 3, 64, 96))
        features = backbone(image(2, 3, 64, 96))
    assert isinstance(features, Features)
    for s, (feature, stage) in enumerate(zip(features, stages, strict=True)):
        assert feature.shape == (2, 96 << s, 16 >> s, 24 >> s)
        assert torch.equal(feature.flatten(2).mT, stage)


@every_model
def test_every_parameter_learns(name: str) -> None:
    model = seeded(name, randomized=False).train()
    F.cross_entropy(model(image(2, 3, 64, 64)), torch.arange(2)).backward()
    assert [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ] == []


# ---- checkpoints and options


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    return load_model("vit_lsla", num_classes=10, randomize=True).module.state_dict()


def test_a_checkpoint_loads_with_a_trainer_s_buffers(trained: dict[str, Tensor], tmp_path: Path) -> None:
    buffers = {
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
    }
    torch.save({"model": {**trained, **buffers}}, tmp_path / "weights.pth")
    found = load_model("vit_lsla", tmp_path / "weights.pth")
    assert found.num_classes == 10 and found.notes == ()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in found.module.state_dict().items())


def test_a_classifier_or_a_detector_gives_a_backbone(trained: dict[str, Tensor], tmp_path: Path) -> None:
    detector = {f"backbone.{key}": tensor for key, tensor in trained.items()} | {"neck.weight": torch.zeros(1)}
    assert filter_checkpoint(detector).keys() == trained.keys()
    for weights in (trained, detector):
        torch.save(weights, tmp_path / "weights.pth")
        state = load_model("vit_lsla", tmp_path / "weights.pth", features_only=True).module.state_dict()
        assert trained.keys() - state.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        assert all(torch.equal(tensor, trained[key]) for key, tensor in state.items())


def test_another_window_resizes_the_tables(trained: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "weights.pth")
    found = load_model("vit_lsla", tmp_path / "weights.pth", options={"window_size": 4})
    assert found.notes == ("48 tables were resized bicubically to the window of this model",)  # 16 blocks, 3 each
    for table in ("dynamic_scale_table", "inner_bias_table", "outer_bias_table"):
        key = f"layers.1.blocks.2.attn.{table}"
        grid = trained[key].T.reshape(1, 6, 13, 13)  # 169 k -> 1 k 13 13
        expected = F.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False)[0].flatten(1).T
        assert torch.equal(found.module.state_dict()[key], expected)


@every_ablation
def test_weights_of_another_ablation_are_refused(
    trained: dict[str, Tensor], tmp_path: Path, options: dict[str, Any]
) -> None:
    torch.save(trained, tmp_path / "weights.pth")
    if not options:
        load_model("vit_lsla", tmp_path / "weights.pth")
        return
    with pytest.raises(CheckpointError, match="do not fit the network"):
        load_model("vit_lsla", tmp_path / "weights.pth", options=options)


def test_options_come_as_texts_too() -> None:
    texts = {"projections": "qxv", "dynamic_scale": "false", "outer_bias": "true", "window_size": "8"}
    assert parse_options(LslaOptions, "vit_lsla", texts) == LslaOptions("qxv", dynamic_scale=False, window_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size 0: expected 1 to 64 tokens"),
        ({"window_size": 65}, "window_size 65: expected 1 to 64 tokens"),
        ({"projections": "xxx"}, "projections 'xxx': expected qxx, qxv or qkv"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        LslaOptions(**options)
