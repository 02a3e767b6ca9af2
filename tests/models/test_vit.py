"""ViT and DeiT: official logits and counts, positions at other sizes, both heads, the checkpoints people bring."""

from __future__ import annotations

import json
import re
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
from edgevit.models.layers import BlockSequence
from edgevit.models.vit import (
    CARDS,
    VisionTransformer,
    ViTBlock,
    ViTConfig,
    ViTOptions,
    build,
    filter_checkpoint,
)
from edgevit.options import parse_options

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = "deit_tiny-224x224"
FIGURES = {  # parameters, MACs at 224x224
    "tiny": (5_717_416, 1_253_683_200),
    "small": (22_050_664, 4_598_882_304),
    "base": (86_567_656, 17_563_828_224),
    "tiny_distilled": (5_910_800, 1_261_003_776),
    "small_distilled": (22_436_432, 4_624_140_288),
    "base_distilled": (87_338_192, 17_656_811_520),
}
TOP1 = {
    "tiny": 72.2,
    "small": 79.9,
    "base": 81.8,
    "tiny_distilled": 74.5,
    "small_distilled": 81.2,
    "base_distilled": 83.4,
}

PUBLISHED = [name for name, card in CARDS.items() if card.num_classes == 1000]  # the small network ships trained

every_model = pytest.mark.parametrize("name", PUBLISHED)
every_kind = pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])


def on_meta(name: str, **options: Any) -> VisionTransformer:
    """Without storage, for counting."""
    with torch.device("meta"):
        return build(name, ViTOptions(**options), num_classes=1000, features_only=False)


def small(grid: int = 4, *, distilled: bool = False, seed: int = 0) -> VisionTransformer:
    """A narrow network of ten classes with nothing neutral in it and positions that matter, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(ViTConfig(128, distilled=distilled), grid, 10)
        randomize_(model)
        nn.init.normal_(model.pos_embed)
    return model.double().eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loaded(tmp_path: Path, state: dict[str, Tensor], name: str = "deit_tiny", **arguments: Any) -> LoadedModel:
    torch.save({"model": state}, tmp_path / "weights.pth")
    return load_model(name, tmp_path / "weights.pth", **arguments)


def agree(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


# ---- names, counts, cards, official logits


@every_model
def test_parameters_and_macs(name: str) -> None:
    expected = FIGURES[name.partition("_")[2]]
    count = count_module(on_meta(name), (224, 224))
    assert (count.parameters, count.macs) == expected
    assert (CARDS[name].parameters, CARDS[name].macs) == expected


def test_positions_for_384_and_its_cost() -> None:
    """torchvision gives vit_b_16 at 384: 86,859,496 parameters, 55.484 G."""
    count = count_module(on_meta("vit_base", pretrained_size=384), (384, 384))
    assert count.parameters == 86_859_496
    assert f"{count.macs / 1e9:.3f}" == "55.484"


@every_model
def test_a_card_s_preprocessing_is_that_of_its_weights(name: str) -> None:
    card, half = CARDS[name], (0.5, 0.5, 0.5)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (card.image.mean, card.image.std) == (imagenet if name.startswith("deit") else (half, half))
    assert (card.image.crop, card.image.interpolation, card.image.size) == (0.9, "bicubic", (224, 224))
    assert card.size_multiple == 16
    assert card.paper.get("imagenet_top1_percent") == (TOP1[name[5:]] if name.startswith("deit") else None)


def test_the_card_of_deit_base_says_what_torchvision_s_weights_want() -> None:
    assert any("vit_b_16" in note and "ImageNet's normalisation" in note for note in CARDS["deit_base"].notes)


@every_model
def test_every_norm_has_the_official_epsilon(name: str) -> None:
    norms = [module for module in on_meta(name).modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6} and len(norms) == 25


@pytest.fixture(scope="module")
def official(fill: ModuleType) -> tuple[dict[str, Tensor], Tensor, NDArray[np.float32]]:
    """The golden case: the official state_dict, the images, the official logits."""
    schema = json.loads((GOLDEN / f"{CASE}.json").read_text())
    with np.load(GOLDEN / f"{CASE}.npz") as arrays:
        state = {key: torch.from_numpy(value) for key, value in fill.fill_state_dict(schema, arrays).items()}
        return state, torch.from_numpy(fill.make_input(schema)), arrays["logits"]


@pytest.mark.parametrize("name", ["deit_tiny", "vit_tiny"])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float64, 1e-6),  # the official logits are stored in float32: 1e-6 is their last digit
        (torch.float32, 1e-4),  # rounding through twelve blocks: measured at 2e-6
    ],
    ids=["float64", "float32"],
)
def test_official_logits(official: Any, tmp_path: Path, name: str, dtype: torch.dtype, limit: float) -> None:
    state, images, expected = official
    found = loaded(tmp_path, state, name)
    assert agree(found.module, state) and found.notes == ()
    with torch.no_grad():
        logits = found.module.to(dtype)(images.to(dtype))
    assert logits.shape == expected.shape
    assert np.abs(logits.double().numpy() - expected.astype(np.float64)).max() <= limit
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # a network that ignored its image would not get here


# ---- the function


@every_kind
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (16, 16)])
def test_it_is_pytorch_s_own_encoder(distilled: bool, height: int, width: int) -> None:
    """The same weights in nn.TransformerEncoderLayer; the sizes beside 64x64 use resampled positions."""
    model, images = small(distilled=distilled), image(2, 3, height, width)
    with torch.no_grad():
        x = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16).flatten(2).mT
        prefix = [token for token in (model.cls_token, model.dist_token) if token is not None]
        x = torch.cat([*(token.expand(2, -1, -1) for token in prefix), x], 1)
        x = x + model.position(height // 16, width // 16)
        for block in model.blocks:
            layer = nn.TransformerEncoderLayer(
                128, 2, 512, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
            ).train()  # its eval mode takes a fused path
            layer.load_state_dict({pytorch_name(key): tensor for key, tensor in block.state_dict().items()})
            x = layer(x)
        x = model.norm(x)
        expected = model.head(x[:, 0])
        if model.head_dist is not None:
            expected = torch.stack([expected, model.head_dist(x[:, 1])]).mean(0)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)  # float64's rounding


def pytorch_name(key: str) -> str:
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def test_distilled_has_two_heads_that_differ() -> None:
    model, images = small(distilled=True), image(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
        model.head_dist.weight.zero_()
        model.head_dist.bias.zero_()
        class_half = model(images)
        model.head.weight.zero_()
        model.head.bias.zero_()
        assert not model(images).any()
    assert (logits - class_half).abs().max() > 0.1  # the distillation token's half, of logits near 1


@every_kind
def test_batches_and_small_pictures_leave_nothing_behind(distilled: bool) -> None:
    model, images = small(distilled=distilled), image(3, 3, 48, 80)
    with torch.no_grad():
        logits, alone = model(images), torch.cat([model(one[None]) for one in images])
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)  # float64: other kernels for another batch
        model(image(1, 3, 16, 16))
        assert torch.equal(model(images), logits)


@every_kind
def test_every_parameter_learns(distilled: bool) -> None:
    model = small(distilled=distilled).train()
    F.cross_entropy(model(image(2, 3, 64, 64)), torch.arange(2)).backward()
    assert [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ] == []


def test_initialisation_leaves_no_token_at_zero() -> None:
    model = build("deit_tiny_distilled", ViTOptions(), num_classes=10, features_only=False)
    for token in (*model.prefix(), model.pos_embed, model.blocks[3].attn.qkv.weight):
        assert token.std().item() == pytest.approx(0.02, rel=0.25)  # 192 draws: five standard errors


def test_the_deploy_form_s_contract() -> None:
    """One sequence, whose every block takes all tokens as one group without a bias."""
    model, tokens = small(), image(2, 1, 17, 128)
    assert isinstance(model.blocks, BlockSequence)
    for block in model.blocks:
        assert isinstance(block, ViTBlock)
        assert torch.equal(block.partition(tokens), tokens[:, 0])
        assert block.attention_bias(1, 17) is None


@every_model
def test_a_feature_pyramid_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: features_only needs maps.* swin or vit_lsla$"):
        load_model(name, features_only=True)


# ---- positions


@every_kind
def test_positions_of_the_own_grid_are_the_parameter(distilled: bool) -> None:
    model = small(distilled=distilled)
    assert model.position(4, 4) is model.pos_embed


@every_kind
def test_positions_of_another_grid_keep_prefix_and_directions(distilled: bool) -> None:
    """A ramp down the rows stays one, along the columns too, and neither becomes the other."""
    model, prefix = small(8, distilled=distilled), 2 if distilled else 1
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    with torch.no_grad():
        model.pos_embed[0, prefix:, 0], model.pos_embed[0, prefix:, 1] = rows.flatten(), columns.flatten()
        position = model.position(4, 16)
        assert position.shape == (1, prefix + 64, 128)
        assert torch.equal(position[:, :prefix], model.pos_embed[:, :prefix])
        down, right = (position[0, prefix:, channel].view(4, 16) for channel in (0, 1))
        assert (down.diff(dim=0) > 1).all() and torch.allclose(down, down[:, :1], rtol=0, atol=1e-12)
        assert (right[:, 1:-2].diff(dim=1) > 0.2).all() and torch.allclose(right, right[:1], rtol=0, atol=1e-12)


@every_kind
def test_a_384_checkpoint_kept_or_resampled(tmp_path: Path, distilled: bool) -> None:
    name, prefix = ("deit_tiny_distilled", 2) if distilled else ("deit_tiny", 1)
    trained = load_model(name, options={"pretrained_size": 384}, num_classes=10, randomize=True).module.state_dict()
    kept = loaded(tmp_path, trained, name, options={"pretrained_size": 384})
    assert agree(kept.module, trained) and kept.notes == ()
    resampled = loaded(tmp_path, trained, name)
    assert resampled.notes == (
        "pos_embed was resampled from 24x24 to 14x14 patches: pretrained_size=384 keeps it as it is",
    )
    grid = trained["pos_embed"][:, prefix:].mT.unflatten(2, (24, 24))
    grid = F.interpolate(grid, size=(14, 14), mode="bicubic", antialias=True)
    expected = torch.cat([trained["pos_embed"][:, :prefix], grid.flatten(2).mT], 1)
    assert torch.equal(resampled.module.state_dict()["pos_embed"], expected)
    with torch.no_grad():
        picture = image(1, 3, 224, 224).float()
        assert torch.equal(kept.module(picture), resampled.module(picture))


@pytest.mark.parametrize(
    "table",
    [
        *(torch.zeros(1, rows, 192) for rows in (0, 1, 198, 200)),
        *(torch.zeros(shape) for shape in ((), (577,), (577, 192), (2, 577, 192), (1, 577, 0), (1, 577, 384))),
        torch.zeros(1, 577, 192, dtype=torch.int64),
    ],
    ids=lambda table: f"{tuple(table.shape)} {table.dtype}",
)
def test_what_cannot_be_positions_is_refused(official: Any, tmp_path: Path, table: Tensor) -> None:
    with pytest.raises(CheckpointError, match="'pos_embed' is "):
        loaded(tmp_path, {**official[0], "pos_embed": table})


# ---- checkpoints and options


def torchvision_names(state: dict[str, Tensor], first: str, second: str) -> dict[str, Tensor]:
    """The same weights as torchvision's VisionTransformer names them."""
    outside = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj.weight": "conv_proj.weight",
        "patch_embed.proj.bias": "conv_proj.bias",
        "norm.weight": "encoder.ln.weight",
        "norm.bias": "encoder.ln.bias",
        "head.weight": "heads.head.weight",
        "head.bias": "heads.head.bias",
    }
    inside = {
        "norm1": "ln_1.",
        "attn.qkv": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj.",
        "norm2": "ln_2.",
        "mlp.fc1": f"mlp.{first}.",
        "mlp.fc2": f"mlp.{second}.",
    }
    renamed = {theirs: state[ours] for ours, theirs in outside.items()}
    for i in range(12):
        for ours, theirs in inside.items():
            for leaf in ("weight", "bias"):
                renamed[f"encoder.layers.encoder_layer_{i}.{theirs}{leaf}"] = state[f"blocks.{i}.{ours}.{leaf}"]
    return renamed


@pytest.mark.parametrize(("first", "second"), [("0", "3"), ("linear_1", "linear_2")], ids=["now", "before 0.13"])
def test_torchvision_s_names_are_the_same_network(official: Any, tmp_path: Path, first: str, second: str) -> None:
    state = torchvision_names(official[0], first, second)
    assert len(state) == len(official[0]) == 152
    found = loaded(tmp_path, state)
    assert agree(found.module, official[0]) and found.notes == ()


def test_nothing_is_dropped(official: Any, tmp_path: Path) -> None:
    for state, key in (
        (official[0], "pre_logits.fc.weight"),
        (torchvision_names(official[0], "0", "3"), "extra.weight"),
    ):
        strange = {**state, key: torch.zeros(1)}
        assert len(filter_checkpoint(strange)) == len(strange)
        with pytest.raises(CheckpointError, match=f"'{key}' is unexpected"):
            loaded(tmp_path, strange)


def test_a_distilled_checkpoint_is_no_plain_one(tmp_path: Path) -> None:
    state = load_model("deit_tiny_distilled", num_classes=10).module.state_dict()
    with pytest.raises(CheckpointError, match="'dist_token' is unexpected"):
        loaded(tmp_path, state, "deit_tiny")
    plain = load_model("deit_tiny", num_classes=10).module.state_dict()
    with pytest.raises(CheckpointError, match="'dist_token' is missing"):
        loaded(tmp_path, plain, "deit_tiny_distilled")


def test_other_classes_replace_both_heads(tmp_path: Path) -> None:
    name = "deit_tiny_distilled"
    trained = load_model(name, num_classes=10, randomize=True).module.state_dict()
    assert loaded(tmp_path, trained, name).num_classes == 10
    assert agree(loaded(tmp_path, trained, name, num_classes=10).module, trained)
    found = loaded(tmp_path, trained, name, num_classes=3)
    assert [note.partition(",")[0] for note in found.notes] == [
        f"{head}: 10 classes in the checkpoint" for head in ("head", "head_dist")
    ]
    state = found.module.state_dict()
    fresh = {f"{head}.{leaf}" for head in ("head", "head_dist") for leaf in ("weight", "bias")}
    assert {key for key in state if not torch.equal(state[key], trained[key])} == fresh
    assert {state[key].shape[0] for key in fresh} == {3}


def test_options_come_as_texts_too() -> None:
    assert parse_options(ViTOptions, "deit_tiny", {"pretrained_size": "384"}) == ViTOptions(384)


@pytest.mark.parametrize("size", [0, 8, 100, 4112])
def test_an_impossible_size_is_refused(size: int) -> None:
    message = f"pretrained_size {size}: expected a multiple of 16 from 16 to 4096"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        ViTOptions(size)
