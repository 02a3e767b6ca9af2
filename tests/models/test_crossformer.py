"""CrossFormer's reference form: official names, counts and numbers; which tokens meet in which group, and pads.

The groups are held against loops written from the description of the official code, one token at a time.
"""

from __future__ import annotations

import json
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
from edgevit.checkpoint import load_state
from edgevit.errors import CheckpointError, UnknownNameError, UsageError
from edgevit.models import crossformer, load_model
from edgevit.models.crossformer import (
    CARDS,
    CONFIGS,
    MASKED,
    OPTIONS,
    CrossFormer,
    CrossFormerBlock,
    CrossFormerConfig,
    Grouping,
    Rule,
    filter_checkpoint,
    fit_checkpoint,
    grouping,
    merge,
    pad_mask,
    partition,
)
from edgevit.models.layers import Features
from edgevit.options import parse_options
from edgevit.registry import model_names

GOLDEN = Path(__file__).parents[1] / "golden"
RULES: tuple[Rule, ...] = ("new", "old_dense", "old_classifier")

# Entries of the official state_dict, DPB's parameters, LDA blocks of each stage at 224, blocks with a cooling layer.
COUNTS = {
    "crossformer_t": (448, 24_498, [0, 0, 4, 0], []),
    "crossformer_s": (344, 24_234, [1, 1, 3, 0], []),
    "crossformer_b": (656, 44_826, [1, 1, 9, 0], []),
    "crossformer_l": (656, 76_808, [1, 1, 9, 0], []),
    "crossformerpp_s": (676, None, [1, 1, 0, 0], [(2, 2), (2, 5), (2, 8), (2, 11), (2, 14)]),
    "crossformerpp_b": (676, None, [1, 1, 0, 0], [(2, 2), (2, 5), (2, 8), (2, 11), (2, 14)]),
    "crossformerpp_l": (676, None, [1, 1, 0, 0], [(2, 2), (2, 5), (2, 8), (2, 11), (2, 14)]),
    "crossformerpp_h": (892, None, [3, 3, 0, 0], [(0, 2), (1, 2), (2, 2), (2, 5), (2, 8), (2, 11), (2, 14)]),
}
PARAMETERS = {  # of the classifier, exactly, and of the backbone in millions
    "crossformer_t": (27_776_794, 27.263),
    "crossformer_s": (30_657_394, 29.887),
    "crossformer_b": (51_971_554, 51.201),
    "crossformer_l": (91_971_184, 90.944),
    "crossformerpp_s": (23_325_340, 22.811),
    "crossformerpp_b": (51_994_594, 51.224),
    "crossformerpp_l": (92_001_904, 90.975),
    "crossformerpp_h": (95_962_944, 94.936),
}
MACS = {  # of the official code by image side, in G
    "crossformer_t": {192: 2.235, 224: 2.857, 256: 5.454, 384: 9.226, 448: 11.417},
    "crossformer_s": {
        160: 3.013,
        192: 3.912,
        224: 4.906,
        256: 9.204,
        288: 10.512,
        320: 11.873,
        384: 15.772,
        448: 19.611,
    }
    | {512: 29.519},
    "crossformer_b": {224: 9.159},
    "crossformer_l": {224: 16.107},
    "crossformerpp_s": {192: 3.158, 224: 4.428, 256: 9.471, 384: 14.363, 448: 17.544},
    "crossformerpp_b": {224: 9.592},
    "crossformerpp_l": {224: 16.722},
    "crossformerpp_h": {224: 22.000},
}
DETECTION = {"group_size": (7, 7, 7, 7), "interval": (8, 4, 2, 1)}
PYRAMID = {"group_size": (14, 14, 7, 7), "interval": (16, 8, 2, 1)}
OLD = {"lda_mode": "old"}

PUBLISHED = [name for name, card in CARDS.items() if card.num_classes == 1000]  # the small network ships trained

every_model = pytest.mark.parametrize("name", PUBLISHED)
every_rule = pytest.mark.parametrize("rule", RULES)


def build(name: str, *, device: str = "cpu", features_only: bool = False, **options: Any) -> CrossFormer:
    with torch.device(device):
        return crossformer.build(name, OPTIONS(**options), num_classes=1000, features_only=features_only).eval()


def tiny(rule: Rule = "new", *, features_only: bool = False, cooling: bool = True, **sides: Any) -> CrossFormer:
    """One head in the first stage; both kinds of block in each, and in the third a cooling layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CrossFormerConfig(32, (2, 2, 4, 2), cooling=cooling, **sides)
        model = CrossFormer(config, rule, 5, features_only=features_only).eval()
        spread(model)
    return model


def spread(model: nn.Module) -> None:
    """Weights as large as those of a trained network: the initial position biases and logits are next to nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.75 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter if parameter.dim() == 1 else 0))


def blocks_of(model: nn.Module) -> Iterator[tuple[str, CrossFormerBlock]]:
    return ((key, block) for key, block in model.named_modules() if isinstance(block, CrossFormerBlock))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- names and counts


def test_every_config_has_its_counts_and_card() -> None:
    names = model_names("crossformer*")
    assert names == list(CONFIGS) == list(CARDS)
    assert PUBLISHED == list(COUNTS) == list(PARAMETERS) == list(MACS)


@every_model
def test_parameters_and_entries(name: str) -> None:
    model, backbone = build(name, device="meta"), build(name, device="meta", features_only=True)
    entries, bias_parameters, _, _ = COUNTS[name]
    exact, millions = PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == exact == CARDS[name].parameters
    assert len(model.state_dict()) == entries
    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6, 3) == millions
    assert set(model.state_dict()) - set(backbone.state_dict()) == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    if bias_parameters is not None:
        assert sum(p.numel() for key, p in model.named_parameters() if ".attn.pos." in key) == bias_parameters


@every_model
def test_intervals_and_cooling_layers_are_where_the_official_code_has_them(name: str) -> None:
    model = build(name, device="meta")
    _, _, apart, cooled = COUNTS[name]
    grids = [56, 28, 14, 7]  # 224 pixels
    steps = [[block.lay(side, side).row_step for block in model.layers[s].blocks] for s, side in enumerate(grids)]
    assert [sum(step > 1 for step in stage) for stage in steps] == apart
    found = [key for key, block in blocks_of(model) if block.ex_conv is not None]
    assert found == [f"layers.{s}.blocks.{j}" for s, j in cooled]


@every_model
def test_macs_by_image_side(name: str) -> None:
    model = build(name, device="meta")
    for side, expected in MACS[name].items():
        macs = count_module(model, (side, side)).macs
        assert round(macs / 1e9, 3) == expected, side
        if side == 224:
            assert macs == CARDS[name].macs


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [  # in G: old and new with groups of 7, old with groups of 14 in the first two stages
        ("crossformer_s", (800, 1280), (129.80, 104.75, 119.93)),
        ("crossformer_s", (1024, 1024), (133.91, 107.86, 123.00)),
        ("crossformer_s", (512, 512), (28.19, 29.52, 28.20)),
        # The old code has no cooling layers, which ++ has: without them these are the 117.1 and 110.4 counted there.
        ("crossformerpp_s", (800, 1280), (117.19, 89.45, 110.49)),
    ],
)
def test_macs_of_dense_backbones(name: str, size: tuple[int, int], expected: tuple[float, ...]) -> None:
    forms: list[dict[str, Any]] = [OLD | DETECTION, DETECTION, OLD | PYRAMID]
    models = [build(name, device="meta", features_only=True, **options) for options in forms]
    assert tuple(round(count_module(model, size).macs / 1e9, 2) for model in models) == expected


@pytest.mark.parametrize("options", [OLD, PYRAMID, OLD | PYRAMID], ids=["old", "pyramid", "old-pyramid"])
def test_options_change_no_parameter(options: dict[str, Any]) -> None:
    plain = build("crossformer_s", device="meta", features_only=True)
    other = build("crossformer_s", device="meta", features_only=True, **options)
    assert shapes(other) == shapes(plain)


def test_options_reach_the_blocks() -> None:
    model = build("crossformer_t", device="meta", features_only=True, **OLD, **PYRAMID)
    stages = [{(block.group, block.interval, block.rule) for block in stage.blocks} for stage in model.layers]
    assert stages == [{(14, 16, "old_dense")}, {(14, 8, "old_dense")}, {(7, 2, "old_dense")}, {(7, 1, "old_dense")}]
    classifier = build("crossformer_t", device="meta", **OLD)
    assert {block.rule for _, block in blocks_of(classifier)} == {"old_classifier"}


def test_official_initialisation() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("crossformer_t")
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module.weight.numel() >= 4096:  # nine standard errors below
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), key
            assert not module.bias.any(), key
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5 and torch.equal(module.weight, torch.ones_like(module.weight)), key


# ---- golden cases: what the official code computed


def golden_cases() -> dict[str, dict[str, Any]]:
    cases = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}
    return {stem: case for stem, case in cases.items() if case["model"] in CONFIGS}


CASES = golden_cases()
every_type = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def golden_state(stem: str, fill: ModuleType) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        return {key: torch.from_numpy(value) for key, value in fill.fill_state_dict(CASES[stem], arrays).items()}


def golden_outputs(stem: str) -> dict[str, NDArray[np.float64]]:
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        return {key: arrays[key].astype(np.float64) for key in arrays if not key.startswith("buffer/")}


def golden_model(stem: str) -> CrossFormer:
    case = CASES[stem]
    dense = case.get("task") == "features"
    return build(case["model"], features_only=dense, lda_mode=case.get("lda_mode", "new"))


def test_golden_cases_cover_both_networks_and_both_modes() -> None:
    assert {case["model"] for case in CASES.values()} == {"crossformer_t", "crossformer_s", "crossformerpp_s"}
    assert {case["lda_mode"] for case in CASES.values() if case.get("task") == "features"} == {"new", "old"}


@pytest.mark.parametrize("stem", CASES)
def test_names_and_shapes_are_the_official_ones(stem: str) -> None:
    state = golden_model(stem).state_dict()
    ours = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert ours == CASES[stem]["state_dict"]


@pytest.mark.parametrize("stem", [stem for stem, case in CASES.items() if case.get("task") != "features"])
@every_type
def test_official_logits(fill: ModuleType, stem: str, dtype: torch.dtype) -> None:
    model = golden_model(stem)
    model.load_state_dict(golden_state(stem, fill), strict=True)
    expected = golden_outputs(stem)["logits"]
    with torch.no_grad():
        logits = model.to(dtype)(torch.from_numpy(fill.make_input(CASES[stem])).to(dtype))
    limit = 1e-6 if dtype == torch.float64 else 1e-4  # the official logits are stored in float32; its own rounding
    assert logits.shape == expected.shape
    assert np.abs(logits.double().numpy() - expected).max() <= limit


@pytest.mark.parametrize("stem", [stem for stem, case in CASES.items() if case.get("task") == "features"])
@every_type
def test_official_features(fill: ModuleType, stem: str, dtype: torch.dtype) -> None:
    """The official dense code computes in float32 whatever it is given: 1e-5 is its rounding at values up to 8."""
    model = golden_model(stem)
    model.load_state_dict(golden_state(stem, fill), strict=True)
    with torch.no_grad():
        features = model.to(dtype)(torch.from_numpy(fill.make_input(CASES[stem])).to(dtype))
    assert isinstance(features, Features)
    expected, seen = golden_outputs(stem), set()
    for i, feature in enumerate(features):
        ours = feature.double().numpy()
        found = {"": ours, "_channel_mean": ours.mean((0, 2, 3)), "_channel_std": ours.std((0, 2, 3))}
        for part in found:
            key = f"feature{i}{part}"
            if key in expected:
                seen.add(key)
                assert np.abs(found[part] - expected[key]).max() <= 1e-5, key
    assert seen == set(expected) and {"feature2", "feature3", "feature0_channel_mean"} < seen


# ---- which tokens meet: loops over tokens against the reshapes


def members(height: int, width: int, group: int, interval: int, *, long: bool, rule: Rule) -> list[list[Any]]:
    """Each group's tokens (y, x) in order, None for a pad; written from the description of the official codes."""
    if min(height, width) <= group:
        long = False
        group = max(height, width) if rule == "new" else min(height, width)
    if not long:
        corners = [(y, x) for y in range(0, height, group) for x in range(0, width, group)]
        groups = [[(a + i, b + j) for i in range(group) for j in range(group)] for a, b in corners]
    elif rule == "new":
        region = group * interval
        starts = [
            (a + u, b + v)
            for a in range(0, height, region)
            for b in range(0, width, region)
            for u in range(interval)
            for v in range(interval)
        ]
        reach = range(0, region, interval)
        groups = [[(y + i, x + j) for i in reach for j in reach] for y, x in starts]
    else:
        step_y, step_x = interval, interval
        if rule == "old_classifier":
            step_y, step_x = (next(s for s in range(1, 999) if s * group >= side) for side in (height, width))
        tall, wide = -(-height // step_y) * step_y, -(-width // step_x) * step_x  # the padded map
        groups = [
            [(y, x) for y in range(u, tall, step_y) for x in range(v, wide, step_x)]
            for u in range(step_y)
            for v in range(step_x)
        ]
    return [[(y, x) if y < height and x < width else None for y, x in group] for group in groups]


SIZES = [(56, 56), (28, 28), (14, 14), (7, 7), (8, 8), (4, 7), (12, 16), (48, 64), (9, 30), (40, 25), (64, 64), (3, 11)]
every_size = pytest.mark.parametrize(("height", "width"), SIZES)


@every_rule
@every_size
@pytest.mark.parametrize("long", [False, True], ids=["SDA", "LDA"])
@pytest.mark.parametrize(("group", "interval"), [(7, 8), (7, 2), (7, 1), (4, 4), (14, 16), (5, 3)])
def test_groups_are_the_described_ones(
    height: int, width: int, group: int, interval: int, long: bool, rule: Rule
) -> None:
    lay = grouping(height, width, group, interval, long_distance=long, rule=rule)
    expected = members(height, width, group, interval, long=long, rule=rule)
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1) + 1.0
    maps = torch.stack([places, 1000 + places])  # two pictures, token (y, x) holding y + 1 and x + 1
    groups = partition(maps, lay).view(2, len(expected), -1, 2)
    assert groups.shape[2] == lay.rows * lay.columns
    wanted = torch.tensor([[(0, 0) if t is None else (t[0] + 1, t[1] + 1) for t in group] for group in expected])
    assert torch.equal(groups[0], wanted.float())
    assert torch.equal(groups[1], torch.where(wanted > 0, 1000 + wanted, 0).float())
    assert torch.equal(merge(groups.flatten(0, 1), lay, height, width), maps)
    mask = pad_mask(height, width, lay)
    padded = np.array([[token is None for token in group] for group in expected])
    assert padded.any() == (mask is not None)
    if mask is not None:
        assert np.array_equal(mask, np.where(padded, np.float32(MASKED), np.float32(0)))


def test_every_token_is_in_one_group() -> None:
    for rule in RULES:
        tokens = [t for group in members(48, 61, 7, 4, long=True, rule=rule) for t in group if t is not None]
        assert sorted(tokens) == [(y, x) for y in range(48) for x in range(61)]


@pytest.mark.parametrize(
    ("arguments", "rule", "expected"),
    [
        ((14, 14, 7, 2), "new", Grouping(7, 7, 2, 2)),
        ((7, 7, 7, 1), "new", Grouping(7, 7, 1, 1)),  # one group: no LDA
        ((6, 8, 7, 1), "new", Grouping(8, 8, 1, 1)),  # the short side is padded
        ((6, 8, 7, 1), "old_dense", Grouping(6, 6, 1, 1)),  # the long side is cut
        ((25, 40, 7, 1), "old_dense", Grouping(25, 40, 1, 1)),  # all tokens of the map
        ((48, 64, 7, 8), "old_dense", Grouping(6, 8, 8, 8)),
        ((48, 64, 7, 8), "old_classifier", Grouping(7, 7, 7, 10)),  # 49 by 70 after padding
        ((112, 56, 7, 8), "old_classifier", Grouping(7, 7, 16, 8)),
    ],
)
def test_grouping_by_hand(arguments: tuple[int, int, int, int], rule: Rule, expected: Grouping) -> None:
    assert grouping(*arguments, long_distance=True, rule=rule) == expected


def test_masks_of_crossformerpp_at_224() -> None:
    model = build("crossformerpp_s", device="meta")
    found = {}
    for key, block in blocks_of(model):
        side = 56 // 2 ** int(key.split(".")[1])
        mask = pad_mask(side, side, block.lay(side, side))
        if mask is not None:
            found[key] = mask.shape
    assert found == {"layers.0.blocks.1": (256, 16), "layers.1.blocks.1": (64, 16)}


@pytest.mark.parametrize("name", ["crossformer_t", "crossformer_s", "crossformer_b", "crossformer_l"])
def test_old_and_new_classifiers_are_one_at_224(name: str) -> None:
    new, old = build(name, device="meta"), build(name, device="meta", **OLD)
    for (key, block), (_, other) in zip(blocks_of(new), blocks_of(old), strict=True):
        side = 56 // 2 ** int(key.split(".")[1])
        assert block.lay(side, side) == other.lay(side, side), key
        assert pad_mask(side, side, block.lay(side, side)) is None
    assert new.layers[0].blocks[0].lay(80, 80) == old.layers[0].blocks[0].lay(80, 80)  # SDA never differs in squares
    assert new.layers[2].blocks[1].lay(20, 20) != old.layers[2].blocks[1].lay(20, 20)  # LDA does elsewhere


def test_old_and_new_logits_are_equal_at_224_and_differ_elsewhere() -> None:
    new, old = (tiny(rule, cooling=False) for rule in ("new", "old_classifier"))
    with torch.no_grad():
        assert torch.equal(new(image(1, 3, 224, 224)), old(image(1, 3, 224, 224)))
        assert not torch.allclose(new(image(1, 3, 256, 256)), old(image(1, 3, 256, 256)), atol=1e-3)


# ---- attention and pads


def attend_by_token(block: CrossFormerBlock, x: Tensor, *, long: bool) -> Tensor:
    """The block on one map x (h, w, c), group by group, on the tokens that exist: no pads, masks or bias tables."""
    height, width, c = x.shape
    lay, attn = block.lay(height, width), block.attn
    normed, out = block.norm1(x), torch.zeros_like(x)
    for group in members(height, width, block.group, block.interval, long=long, rule=block.rule):
        present = [(place, token) for place, token in enumerate(group) if token is not None]
        rows, columns = torch.tensor([token for _, token in present]).T
        seats = torch.tensor([divmod(place, lay.columns) for place, _ in present])
        q, k, v = attn.qkv(normed[rows, columns]).view(-1, 3, attn.heads, c // attn.heads).permute(1, 2, 0, 3)
        offsets = (seats[:, None] - seats[None]).to(x.dtype)  # query minus key, in places of the group
        logits = q @ k.mT / (c // attn.heads) ** 0.5 + attn.pos(offsets).permute(2, 0, 1)
        out[rows, columns] = attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(-1, c))
    x = x + out
    x = x + block.mlp(block.norm2(x))
    if block.ex_conv is not None and block.ex_ln is not None:
        x = block.ex_ln(block.ex_conv(x.permute(2, 0, 1)[None])[0].permute(1, 2, 0))
    return x


def one_block(rule: Rule, *, long: bool, group: int = 7, interval: int = 2, cooled: bool = False) -> CrossFormerBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        block = CrossFormerBlock(64, group, interval, rule, long_distance=long, cooled=cooled).double().eval()
        spread(block)
    return block


@every_rule
@pytest.mark.parametrize("long", [False, True], ids=["SDA", "LDA"])
@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (6, 8), (12, 16), (18, 11), (5, 20)])
def test_a_block_is_attention_among_the_tokens_that_exist(rule: Rule, long: bool, height: int, width: int) -> None:
    block = one_block(rule, long=long, cooled=height == 12)
    maps = image(2, height, width, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = block(maps.flatten(1, 2), height, width).view_as(maps)
        expected = torch.stack([attend_by_token(block, x, long=long) for x in maps])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_rule
@pytest.mark.parametrize("long", [False, True], ids=["SDA", "LDA"])
def test_what_is_padded_does_not_matter(rule: Rule, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = 12, 17  # no group size or interval below divides them
    block, maps = one_block(rule, long=long), image(2, 12 * 17, 64, dtype=torch.float64)

    pad = F.pad

    def noise(x: Tensor, pads: tuple[int, ...]) -> Tensor:
        assert any(pads)
        inside = pad(torch.ones_like(x), pads)
        return pad(x, pads) + (1 - inside) * 50 * image(*inside.shape, seed=7)

    with torch.no_grad():
        expected = block(maps, height, width)
        monkeypatch.setattr(crossformer.F, "pad", noise)
        torch.testing.assert_close(block(maps, height, width), expected, rtol=1e-12, atol=1e-12)


@every_rule
@pytest.mark.parametrize(("height", "width"), [(14, 14), (12, 16), (6, 8)])
def test_blocks_are_what_their_protocol_says(rule: Rule, height: int, width: int) -> None:
    """Partition, plain attention with `attention_bias`, merge: what the deploy form is made of."""
    for long in (False, True):
        block = one_block(rule, long=long)
        maps, heads = image(2, height * width, 64, dtype=torch.float64), block.attn.heads
        with torch.no_grad():
            bias = block.attention_bias(height, width)
            groups = block.partition(block.norm1(maps).view(2, height, width, 64))
            n, g = groups.shape[1], groups.shape[0] // 2
            assert bias.shape in {(1, heads, n, n), (g, heads, n, n)}
            q, k, v = block.attn.qkv(groups).view(2, g, n, 3, heads, 32).permute(3, 0, 1, 4, 2, 5)
            attended = (q @ k.mT * block.scale(height, width) + bias.unsqueeze(0)).softmax(-1) @ v
            merged = block.merge(block.attn.proj(attended.transpose(2, 3).reshape(2 * g, n, 64)), height, width)
            x = maps + merged.view_as(maps)
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(block(maps, height, width), x, rtol=1e-9, atol=1e-9)


def test_groups_without_any_token_do_no_harm() -> None:
    """An interval beyond the map leaves phases empty; their softmax is over pads alone."""
    for rule in ("new", "old_dense"):
        block = one_block(rule, long=True, group=2, interval=16)
        maps = image(1, 9 * 5, 64, dtype=torch.float64)
        with torch.no_grad():
            ours = block(maps, 9, 5).view(9, 5, 64)
            torch.testing.assert_close(ours, attend_present(block, maps.view(9, 5, 64)), rtol=1e-9, atol=1e-9)


def attend_present(block: CrossFormerBlock, x: Tensor) -> Tensor:
    """With such an interval each token is alone in its group: attention returns its own value."""
    normed = block.norm1(x)
    x = x + block.attn.proj(block.attn.qkv(normed)[..., -x.shape[-1] :])
    return x + block.mlp(block.norm2(x))


# ---- images


@every_rule
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (160, 64)])
def test_rectangles(rule: Rule, height: int, width: int) -> None:
    backbone, classifier = tiny(rule, features_only=True), tiny(rule)
    backbone.load_state_dict({key: classifier.state_dict()[key] for key in backbone.state_dict()})
    with torch.no_grad():
        features, logits = backbone(image(2, 3, height, width)), classifier(image(2, 3, height, width))
        pooled = classifier.norm(features.feature3.flatten(2).mT).mean(1)
        torch.testing.assert_close(logits, classifier.head(pooled), rtol=1e-5, atol=1e-6)
    assert isinstance(features, Features)
    strides = (4, 8, 16, 32)
    assert [tuple(f.shape) for f in features] == [(2, 8 * s, height // s, width // s) for s in strides]
    assert logits.shape == (2, 5) and torch.isfinite(logits).all()


@every_rule
def test_pictures_of_a_batch_do_not_meet(rule: Rule) -> None:
    model, images = tiny(rule).double(), image(3, 3, 96, 160, dtype=torch.float64)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(one[None]) for one in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert (together[0] - together[1]).abs().max() > 1e-3  # and they do matter


@every_rule
def test_a_small_image_leaves_no_trace(rule: Rule) -> None:
    """After one small image the official dense code groups later, larger ones in another way."""
    model, fresh, large = tiny(rule, features_only=True), tiny(rule, features_only=True), image(1, 3, 320, 320)
    before = [vars(block).copy() for _, block in blocks_of(model)]
    with torch.no_grad():
        model(image(1, 3, 96, 96))
        after, expected = model(large), fresh(large)
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert [vars(block) for _, block in blocks_of(model)] == before


@pytest.mark.parametrize(("height", "width"), [(200, 224), (224, 200), (48, 32), (31, 32), (16, 16), (2, 64)])
def test_sizes_that_a_merge_would_meet_odd_are_refused(height: int, width: int) -> None:
    near = [-(-side // 32) * 32 for side in (height, width)]
    with pytest.raises(UsageError) as caught:
        tiny()(image(1, 3, height, width))
    assert str(caught.value) == (
        f"image of {height}x{width} pixels: its {height // 4}x{width // 4} tokens cannot be halved three times; "
        f"height and width must be multiples of 32; pad it to {near[0]}x{near[1]}"
    )


# ---- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lda_mode": "newer"}, "option lda_mode=newer: expected new or old"),
        ({"group_size": "7,7,7"}, "option group_size=7,7,7: expected 4 whole numbers, e.g. group_size=7,7,7,7"),
        ({"group_size": "0,7,7,7"}, "group_size 0,7,7,7: expected 1 to 64 tokens for each of the 4 stages"),
        ({"group_size": (7, 7, 7, 65)}, "group_size 7,7,7,65: expected 1 to 64 tokens for each of the 4 stages"),
        ({"interval": "8,4,2,0"}, "interval 8,4,2,0: expected 1 to 64 tokens for each of the 4 stages"),
        ({"interval": (8, 4, 2, 100)}, "interval 8,4,2,100: expected 1 to 64 tokens for each of the 4 stages"),
    ],
)
def test_options_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(OPTIONS, "crossformer_s", given)
    assert str(caught.value) == message


def test_options_made_in_python_are_checked_too() -> None:
    with pytest.raises(UsageError, match=r"^lda_mode newer: expected new or old$"):
        OPTIONS(lda_mode="newer")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(UsageError, match=r"^interval 8,4: expected 1 to 64 tokens for each of the 4 stages$"):
        OPTIONS(interval=(8, 4))  # type: ignore[arg-type]  # the mistake under test


def test_options_from_the_command_line() -> None:
    parsed = parse_options(OPTIONS, "crossformer_s", {"lda_mode": "old", "group_size": "14,14,7,7"})
    assert parsed == OPTIONS(lda_mode="old", group_size=(14, 14, 7, 7))
    with pytest.raises(UnknownNameError, match="group_size"):
        parse_options(OPTIONS, "crossformer_s", {"group_sizes": "14,14,7,7"})


def test_an_interval_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^interval: a classifier with lda_mode=old divides the map by group_size"):
        build("crossformer_s", device="meta", lda_mode="old", interval=(8, 4, 2, 1))


# ---- checkpoints


def with_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the old branch saves beside the parameters of each block."""
    blocks = {key.partition(".attn.")[0] for key in state if ".attn." in key}
    extra: dict[str, Tensor] = {}
    for block in blocks:
        extra[f"{block}.attn.biases"] = torch.zeros(169, 2)
        extra[f"{block}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
        extra[f"{block}.attn_mask"] = torch.zeros(4, 49, 49)
    return state | extra


def test_recomputed_buffers_are_dropped() -> None:
    model = tiny()
    state = dict(model.state_dict())
    filtered = filter_checkpoint(with_buffers(state))
    assert filtered == state
    assert fit_checkpoint(filtered, model) == (state, ())
    load_state(tiny(), filtered, where="here")


def test_a_detectors_backbone_is_taken_alone() -> None:
    backbone = tiny(features_only=True)
    state = dict(backbone.state_dict())
    detector = {f"backbone.{key}": value for key, value in with_buffers(state).items()}
    detector |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "bbox_head.fc.bias": torch.zeros(1)}
    assert filter_checkpoint(detector) == state


@pytest.mark.parametrize("key", ["layers.0.blocks.0.attn.pos.pos1.3.weight", "layers.0.blocks.0.attn.bias", "head.w"])
def test_a_typo_is_an_error(key: str) -> None:
    """The official loader is not strict, so that a misspelt name passes there in silence."""
    model = tiny()
    state = filter_checkpoint(dict(model.state_dict()) | {key: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"'{key}' is unexpected"):
        load_state(model, state, where="here")
    del state[key], state["layers.2.blocks.2.ex_ln.bias"]
    with pytest.raises(CheckpointError, match=r"'layers.2.blocks.2.ex_ln.bias' is missing"):
        load_state(model, state, where="here")


def test_an_old_detectors_file_becomes_a_backbone(tmp_path: Path) -> None:
    path, model = tmp_path / "detector.pth", build("crossformer_t")
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(("norm.", "head."))}
    names = {f"backbone.{key}": value for key, value in with_buffers(state).items()}
    torch.save({"state_dict": names | {"neck.fpn.weight": torch.zeros(1)}, "meta": {"epoch": 12}}, path)
    loaded = load_model("crossformer_t", path, features_only=True, options={"lda_mode": "old", "interval": "8,4,2,1"})
    assert loaded.notes == ()
    found = loaded.module.state_dict()
    assert set(found) == set(state) and all(torch.equal(found[key], value) for key, value in state.items())


# ---- training


def test_every_parameter_learns_and_one_step_lowers_the_loss() -> None:
    model, images, labels = tiny().train(), image(2, 3, 64, 96), torch.arange(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)  # the official recipe's optimiser and rate
    before = F.cross_entropy(model(images), labels)
    before.backward()
    idle = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {key for key in idle if not key.endswith("pos3.2.bias")} == set()  # the softmax takes a constant out again
    optimizer.step()
    assert F.cross_entropy(model(images), labels).item() < before.item() - 0.01  # of ln 5 = 1.6: not a rounding
