"""group_tokens: windows, shifts, SDA and LDA groups, pads and whole sequences as one Gather between plain products."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgevit.bench.complexity import count_module
from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.certificate import MAX_REL, certify
from edgevit.export.deploy.grouped_attention import (
    Cooling,
    GroupedAttention,
    Pads,
    TokenBlock,
    TokenBlocks,
    group_tokens,
)
from edgevit.export.deploy.take import Take
from edgevit.models.crossformer import CrossFormerBlock
from edgevit.models.layers import BlockSequence, GroupedBlock
from edgevit.models.vit import VisionTransformer

pytestmark = pytest.mark.usefixtures("no_grad")

# Batch, height, width. In tokens, by stage: 8x8 to one token; 16x24 to 2x3, padded in most networks and stages; 8x24 to
# 1x3, longer than wide.
SHAPES = [(1, 32, 32), (1, 64, 96), (3, 32, 96), ("dynamic", 96, 64)]
PADDED = (64, 96)
NATURAL = (224, 224)  # 56x56 to 7x7, which windows of 7 divide


def maps(model: nn.Module, height: int, width: int) -> list[tuple[GroupedBlock, int, int]]:
    """Each block with the height and width of the map it runs on, in tokens, by the strides of these families."""
    if isinstance(model, VisionTransformer):
        tokens = len(model.prefix()) + height // 16 * (width // 16)
        return [(block, 1, tokens) for block in model.blocks]
    stages = enumerate(model.layers)  # type: ignore[arg-type]  # a ModuleList
    return [(block, height // 4 >> s, width // 4 >> s) for s, stage in stages for block in stage.blocks]


def grouped(block: GroupedBlock, height: int, width: int) -> tuple[int, int]:
    """Groups of one picture, and the members of each, pads included."""
    groups, members, _ = block.partition(torch.ones(1, height, width, 1)).shape
    return groups, members


# ---- the function


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_network(shop: Any, network: str, shape: tuple[Any, int, int]) -> None:
    model = shop.network(network)
    after, certificate = shop.certified(group_tokens, model, DeploySpec(*shape))
    assert certificate.places == len(shop.blocks(model))
    assert not any(isinstance(m, BlockSequence | GroupedBlock) for m in after.modules())
    assert shop.kinds(after)["TokenBlock"] == certificate.places
    with shop.recorded() as recorder:
        after(shop.normal(2 if shape[0] == "dynamic" else shape[0], 3, *shape[1:]))
    assert recorder.rank <= (4 if shape[0] == 1 else 5)  # Core ML takes five; the references have six and eight


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("swin", (1, *NATURAL)),
        ("swin", (2, 160, 96)),
        ("swin_features", ("dynamic", 128, 128)),  # windows of 4 divide each map
        ("crossformer", (1, *NATURAL)),
        ("crossformer", (1, 256, 192)),  # LDA pads two regions in a row
        ("crossformer_plus", (1, *NATURAL)),
        ("crossformer_old_features", (2, 192, 256)),  # LDA groups as oblong as the map
        ("lsla", (2, *NATURAL)),
    ],
    ids=str,
)
def test_larger_sizes(shop: Any, name: str, shape: tuple[Any, int, int]) -> None:
    shop.certified(group_tokens, shop.network(name), DeploySpec(*shape))


ABLATIONS = [
    {"projections": p, "dynamic_scale": scale, "outer_bias": outer, "mask_outer_bias": mask}
    for p in ("qxx", "qxv", "qkv")
    for scale in (True, False)
    for outer, mask in ((True, True), (True, False), (False, True))
]


@pytest.mark.parametrize("options", ABLATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_light_self_limited_attention(shop: Any, options: dict[str, Any]) -> None:
    model = shop.randomized(shop.lsla(**options))
    after, _ = shop.certified(group_tokens, model, DeploySpec(2, 96, 64))
    attentions = [m for m in after.modules() if isinstance(m, GroupedAttention)]
    assert all((a.scale is not None) is options["dynamic_scale"] for a in attentions)
    assert all((a.outer is not None) is options["outer_bias"] for a in attentions)
    assert {(a.k is None, a.v is None) for a in attentions} == {
        (options["projections"] != "qkv", options["projections"] == "qxx")
    }


@pytest.mark.parametrize(
    ("kind", "window"), [*(("swin", window) for window in (1, 2, 3, 8, 24)), ("lsla", 1), ("lsla", 6)]
)
def test_windows(shop: Any, kind: str, window: int) -> None:
    model = shop.swin(window) if kind == "swin" else shop.lsla(window_size=window)
    shop.certified(group_tokens, shop.randomized(model), DeploySpec(1, *PADDED))


SIDES = [
    ((1, 1, 1, 1), (8, 4, 2, 1)),
    ((2, 3, 5, 7), (3, 5, 2, 4)),
    ((14, 14, 7, 7), (16, 8, 2, 1)),
    ((7, 7, 7, 7), (1, 1, 1, 1)),
    ((3, 3, 2, 2), (9, 7, 5, 3)),
]


@pytest.mark.parametrize(
    ("rule", "groups", "intervals"),
    [
        *(("new", *sides) for sides in SIDES),
        *(("old_dense", *sides) for sides in SIDES),
        ("old_classifier", *SIDES[0]),
        ("old_classifier", *SIDES[1]),
    ],
)
def test_group_sizes_and_intervals(shop: Any, rule: Any, groups: Any, intervals: Any) -> None:
    model = shop.randomized(shop.crossformer(rule, groups=groups, intervals=intervals))
    shop.certified(group_tokens, model, DeploySpec(1, *PADDED))


@pytest.mark.parametrize("rule", ["new", "old_dense", "old_classifier"])
@pytest.mark.parametrize("shape", [(2, 32, 160), (1, 160, 32)], ids=str)
def test_long_maps(shop: Any, rule: Any, shape: tuple[Any, int, int]) -> None:
    """Where a side lies within one group, the old rule cuts the other into squares, the new one pads to one group."""
    model = shop.randomized(shop.crossformer(rule, features_only=rule == "old_dense"))
    shop.certified(group_tokens, model, DeploySpec(*shape))


def test_features_keep_their_names(shop: Any) -> None:
    for name in ("swin_features", "crossformer_old_features", "lsla_features"):
        model = shop.network(name)
        after, _, _ = certify(group_tokens, model, DeploySpec(1, 64, 64))
        out = after(shop.normal(1, 3, 64, 64))
        assert out._fields == ("feature0", "feature1", "feature2", "feature3")


def test_networks_without_groups_are_left_alone(shop: Any) -> None:
    model = shop.build("plain")
    assert group_tokens(model, DeploySpec(1, 32, 32)) == (model, 0, ())


def test_strong_attention_keeps_its_masks(shop: Any) -> None:
    """Swin's mask is -100, the form's -1e4: the same as long as no masked logit exceeds its rivals by 80."""
    model = shop.network("swin")
    for block in shop.blocks(model):
        block.attn.qkv.weight[: 2 * block.attn.qkv.in_features] *= 4
    with shop.recorded("bmm") as recorder:
        _, certificate = shop.certified(group_tokens, model, DeploySpec(1, 96, 96))
    assert certificate.max_rel < MAX_REL
    assert max(out.std().item() for out in recorder.outputs) > 5  # logits far beyond those of initial weights


# ---- its form


def take_counts(model: nn.Module) -> list[int]:
    return [sum(isinstance(step, Take) for step in m.steps) for m in model.modules() if isinstance(m, TokenBlocks)]


def test_tokens_stay_in_the_order_of_the_last_groups(shop: Any) -> None:
    """Three orders where windows divide the map (plain, shifted, and back), none where one window is the map."""
    for name, expected in {"swin": [3, 3, 3, 0], "crossformer": [3, 3, 3, 0]}.items():
        after, _, _ = certify(group_tokens, shop.network(name), DeploySpec(1, *NATURAL))
        assert take_counts(after) == expected, name
        assert shop.kinds(after)["Pads"] == 0


def test_a_padded_group_leaves_the_order_alone(shop: Any) -> None:
    after, _, _ = certify(group_tokens, shop.network("swin"), DeploySpec(1, *PADDED))
    assert take_counts(after) == [0, 0, 0, 0]
    assert shop.kinds(after)["Pads"] == 4  # two blocks on 16x24 and on 8x12 tokens; 4x6 and 2x3 are a window each


@pytest.mark.parametrize("name", ["swin", "crossformer", "lsla"])
@pytest.mark.parametrize("size", [NATURAL, PADDED], ids=["natural", "padded"])
def test_what_runs(shop: Any, name: str, size: tuple[int, int]) -> None:
    """No roll, and pads only as one row of zeros before the Linears of an unmasked padded block."""
    model = shop.network(name)
    after, _, _ = certify(group_tokens, model, DeploySpec(1, *size))
    image, counts = shop.normal(1, 3, *size), []
    for module in (model, after):
        with shop.recorded() as recorder:
            module(image)
        counts.append(recorder)
    before, now = counts
    assert before.count("roll", "index") > 0  # the reference does: the count sees what it should
    assert now.count("roll", "index", "where", "masked_fill") == 0
    unmasked = [m for m in after.modules() if isinstance(m, Pads) and not m.masked]
    assert now.count("constant_pad_nd") == len(unmasked)
    assert (len(unmasked) > 0) is (size == PADDED and not name.startswith("crossformer"))


def weights_of(block: GroupedBlock) -> tuple[int, int]:
    """Channels, and how many c x c Linears make q, k and v."""
    attn = block.attn
    return attn.proj.in_features, 3 if hasattr(attn, "qkv") else sum(
        getattr(attn, name) is not None for name in ("q", "k", "v")
    )


def hides_pads(block: GroupedBlock, height: int, width: int) -> bool:
    """Whether every token is kept from every pad: by CrossFormer always, by a shift's mask where it so falls."""
    real = block.partition(torch.ones(1, height, width, 1))[..., 0] > 0
    bias = block.attention_bias(height, width)
    assert bias is not None
    pairs = (bias - bias.amax(-1, keepdim=True)).expand(len(real), -1, -1, -1)
    return all(
        bool((pairs[g][:, real[g]][..., ~real[g]] < -50).all()) for g in range(len(real)) if not bool(real[g].all())
    )


def dynamic_bias_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """What the DPB of every block costs in the reference."""
    total = 0
    for block, height, width in maps(model, *size):
        if isinstance(block, CrossFormerBlock):
            lay, p, heads = block.lay(height, width), block.attn.pos.pos_proj.out_features, block.attn.heads
            total += (2 * lay.rows - 1) * (2 * lay.columns - 1) * (2 * p + 2 * p * p + p * heads)
    return total


@pytest.mark.parametrize("name", ["swin", "swin_features", "crossformer", "crossformer_plus", "lsla", "lsla_plain"])
def test_pads_pass_no_linear(shop: Any, name: str) -> None:
    """All that is saved: the Linears of every pad, but for the one row of zeros where pads are no masked keys.

    Where one group holds the whole map and its pads are masked, they take no part at all.
    """
    model = shop.network(name)
    after, _, _ = certify(group_tokens, model, DeploySpec(1, *PADDED))
    saved = dynamic_bias_macs(model, PADDED)
    for block, height, width in maps(model, *PADDED):
        (c, linears), (groups, members) = weights_of(block), grouped(block, height, width)
        pads, masked = groups * members - height * width, hides_pads(block, height, width)
        saved += pads * (linears + 1) * c * c
        if pads and not masked:
            saved -= linears * c * c
        if pads and masked and groups == 1:
            saved += 2 * c * (members**2 - (height * width) ** 2)
    assert saved > dynamic_bias_macs(model, PADDED)
    assert count_module(model, PADDED).macs - count_module(after, PADDED).macs == saved


def test_constants_take_the_place_of_parameters(shop: Any) -> None:
    for name in ("swin", "crossformer", "lsla"):
        after, _, _ = certify(group_tokens, shop.network(name), DeploySpec(1, 64, 64))
        names = {key for key, _ in after.named_parameters()}
        assert not any("table" in key or ".pos." in key for key in names)
        assert {buffer.requires_grad for buffer in after.buffers()} == {False}


@pytest.mark.parametrize("name", ["swin", "crossformer", "lsla_plain", "vit"])
def test_a_fixed_scale_goes_into_the_queries(shop: Any, name: str) -> None:
    model = shop.network(name)
    after, _, _ = certify(group_tokens, model, DeploySpec(1, 64, 64))
    attentions = [m for m in after.modules() if isinstance(m, GroupedAttention)]
    for block, form in zip(shop.blocks(model), attentions, strict=True):
        attn = block.attn
        c = attn.proj.in_features
        q = attn.q if hasattr(attn, "q") else attn.qkv
        torch.testing.assert_close(form.q.weight, q.weight[:c] * (c // attn.heads) ** -0.5)
        torch.testing.assert_close(form.q.bias, q.bias[:c] * (c // attn.heads) ** -0.5)
        assert form.scale is None


@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_cooling_alone(shop: Any, batch: Any) -> None:
    block = next(b for b in shop.blocks(shop.network("crossformer_plus")) if b.ex_conv is not None)
    channels, (height, width) = block.ex_conv.in_channels, (3, 5)
    cooling = Cooling(block.ex_conv, block.ex_ln, height, width)
    for n in (1,) if batch == 1 else (1, 2, 5):
        x = shop.normal(n, height * width, channels)
        expected = block.ex_ln(block.ex_conv(x.transpose(1, 2).reshape(n, channels, height, width)).flatten(2).mT)
        assert shop.difference(cooling(x.flatten(0, 1)), expected.flatten(0, 1)) < shop.exact


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), NATURAL])
def test_each_cooling_layer_finds_its_map_in_order(shop: Any, height: int, width: int) -> None:
    """The block before it groups 4x4 neighbours, so that its tokens come in another order."""
    model = shop.network("crossformer_plus")
    after, _, _ = certify(group_tokens, model, DeploySpec(1, height, width))
    assert shop.kinds(after)["Cooling"] == sum(b.ex_conv is not None for b in shop.blocks(model)) == 1
    steps = list(after.layers[0].blocks.steps)
    place = next(i for i, step in enumerate(steps) if isinstance(step, Cooling))
    assert isinstance(steps[place - 1], Take) and isinstance(steps[place - 2], TokenBlock)


# ---- masks and denormals


def softmax_outputs(shop: Any, module: nn.Module, image: Tensor) -> list[Tensor]:
    with shop.recorded("_softmax") as recorder:
        module(image)
    return recorder.outputs


def denormals(outputs: list[Tensor]) -> int:
    tiny = torch.finfo(torch.float32).tiny
    return sum(int(((out != 0) & (out.abs() < tiny)).sum()) for out in outputs)


@pytest.mark.parametrize("kind", ["swin", "lsla"])
@pytest.mark.parametrize("size", [NATURAL, PADDED], ids=["natural", "padded"])
def test_no_denormal_leaves_a_softmax(shop: Any, kind: str, size: tuple[int, int]) -> None:
    """A MatMul that meets exp(-100), a denormal, ran eight times slower."""
    model, image = shop.network(kind), shop.normal(1, 3, *size).float()
    after, _, _ = certify(group_tokens, model, DeploySpec(1, *size))
    before, now = (softmax_outputs(shop, module.float(), image) for module in (model, after))
    assert len(now) == len(before) == len(shop.blocks(model))
    assert denormals(before) > 0
    assert denormals(now) == 0
    assert sum(int((out == 0).sum()) for out in now) >= denormals(before)


def test_masks_are_finite_in_float16(shop: Any) -> None:
    for name in ("swin", "crossformer", "lsla"):
        after, _, _ = certify(group_tokens, shop.network(name), DeploySpec(1, *PADDED))
        buffers = [buffer for key, buffer in after.named_buffers() if buffer.is_floating_point()]
        assert min(buffer.min().item() for buffer in buffers) == -1e4
        assert all(torch.isfinite(buffer.half()).all() for buffer in buffers)


# ---- certificate


def expected_note(model: nn.Module, size: tuple[int, int]) -> str:
    tables = [p for key, p in model.named_parameters() if ".attn.pos." in key or key.endswith("_table")]
    masked = 0
    for block, height, width in maps(model, *size):
        bias = block.attention_bias(height, width)
        assert bias is not None
        alone = grouped(block, height, width)[0] == 1  # its pads are left out, and no mask is needed
        masked += bool((bias < -50).any()) and not alone
    count, parameters = len(maps(model, *size)), sum(p.numel() for p in tables)
    return f"position biases of {count} blocks, {parameters} parameters, are constants; {masked} hold a mask as well"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin", NATURAL),
        ("swin", PADDED),
        ("swin_features", (32, 160)),
        ("crossformer", NATURAL),
        ("crossformer", (256, 256)),
        ("crossformer", PADDED),  # a group of 6x6 on 4x6 tokens among others: one group, whose pads are left out
        ("crossformer_plus", (96, 96)),
        ("crossformer_old", PADDED),
        ("crossformer_old_features", (192, 256)),
        ("lsla", NATURAL),
        ("lsla_plain", PADDED),
    ],
)
def test_the_note_counts_blocks_parameters_and_masks(shop: Any, name: str, size: tuple[int, int]) -> None:
    model = shop.network(name)
    _, places, notes = group_tokens(shop.network(name), DeploySpec(1, *size))
    assert places == len(shop.blocks(model))
    assert notes == (expected_note(model, size),)


def test_a_network_without_biases_has_no_note(shop: Any) -> None:
    _, certificate, _ = certify(group_tokens, shop.network("vit"), DeploySpec(1, 64, 64))
    assert certificate is not None
    assert (certificate.places, certificate.notes) == (3, ())


def test_parameters_and_operations_are_counted(shop: Any) -> None:
    for name in ("swin", "crossformer", "lsla"):
        model = shop.network(name)
        after, certificate, _ = certify(group_tokens, model, DeploySpec(1, 64, 64))
        assert certificate is not None
        floats = [b for b in after.buffers() if b.is_floating_point()]
        assert certificate.parameters_after == sum(t.numel() for t in [*after.parameters(), *floats])
        assert certificate.operations_after < certificate.operations_before


# ---- parts on their own


def layouts() -> list[tuple[Tensor, Tensor]]:
    """Groups with pads (g, n), and an order of the tokens."""
    mixed = torch.tensor([[0, 1, -1], [3, -1, 2], [-1, -1, 4]])
    lost = torch.tensor([[-1, -1], [1, 0], [-1, -1]])  # groups of pads alone
    return [
        (mixed, torch.arange(5)),
        (mixed, torch.tensor([4, 2, 0, 1, 3])),
        (lost, torch.tensor([1, 0])),
        (torch.tensor([[0, -1]]), torch.tensor([0])),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 2, "dynamic"])
def test_pads_alone(shop: Any, number: int, masked: bool, batch: Any) -> None:
    """Members come from where the order has them, a pad is a row of zeros, or any finite row; leaving undoes it."""
    groups, order = layouts()[number]
    pads = Pads(groups, order, DeploySpec(batch, 32, 32), masked=masked)
    for n in {1: (1,), 2: (2,), "dynamic": (1, 2, 5)}[batch]:
        x = shop.normal(n, len(order), 7)
        raster = torch.empty_like(x)
        raster[:, order] = x
        entered = pads.enter(pads.extend(x.flatten(0, 1))).view(n, *groups.shape, 7)
        for g, i in itertools.product(*map(range, groups.shape)):
            if groups[g, i] >= 0:
                assert torch.equal(entered[:, g, i], raster[:, groups[g, i]])
            elif not masked:
                assert not entered[:, g, i].any()
        assert torch.isfinite(entered).all()
        assert torch.equal(pads.leave(entered.flatten(0, 2)), x.flatten(0, 1))


def test_a_stand_in_is_of_the_same_picture(shop: Any) -> None:
    """No picture's output may depend on another's: one poisoned picture leaves the others as they are."""
    for name, batch in itertools.product(("crossformer", "swin", "lsla"), (3, "dynamic")):
        after, _, _ = certify(group_tokens, shop.network(name), DeploySpec(batch, *PADDED))
        image = shop.normal(3, 3, *PADDED)
        expected = after(image)
        image[1] = math.nan
        actual = after(image)
        assert torch.equal(actual[[0, 2]], expected[[0, 2]])
        assert torch.isnan(actual[1]).any()


@pytest.mark.parametrize("kind", ["swin", "lsla", "crossformer"])
def test_attention_alone_on_each_block(shop: Any, kind: str) -> None:
    """One block of the form against the reference block, each with the weights and the bias of its own size."""
    model = shop.network(kind)
    for (block, height, width), batch in itertools.product(maps(model, 96, 160), (1, "dynamic")):
        c = block.norm1.normalized_shape[0]
        form = TokenBlocks(BlockSequence([block]), height, width, DeploySpec(batch, 96, 160))
        for n in (1,) if batch == 1 else (1, 3):
            x = shop.normal(n, height * width, c)
            assert shop.difference(form(x, height, width), block(x, height, width)) < shop.exact


def test_pads_of_the_only_group_are_left_out(shop: Any) -> None:
    """4x6 tokens in a group of 6x6: a short side that lies within one group is padded to the long one."""
    model = shop.network("crossformer")
    after, _, _ = certify(group_tokens, model, DeploySpec(1, *PADDED))
    stages = [
        [step.attn for step in m.steps if isinstance(step, TokenBlock)]
        for m in after.modules()
        if isinstance(m, TokenBlocks)
    ]
    assert [{(a.groups, a.members) for a in stage} for stage in stages[2:]] == [{(1, 24)}, {(1, 6)}]
    assert all(a.pads is None for stage in stages[2:] for a in stage)
