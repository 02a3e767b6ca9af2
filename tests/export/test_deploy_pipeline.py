"""deploy: all rewrites in order on every published network; and what a wrong rewrite meets."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgevit.bench.complexity import count_module
from edgevit.errors import ExportError
from edgevit.export import deploy as package
from edgevit.export.deploy import REWRITES, DeploySpec, deploy
from edgevit.export.deploy.certificate import MAX_REL, certify, relative_difference
from edgevit.models.mobile_former import CONFIGS, MobileFormer
from edgevit.specs import Certificate

pytestmark = pytest.mark.usefixtures("no_grad")

ORDER = [rewrite.__name__ for rewrite in REWRITES]
MOBILE = ORDER[: ORDER.index("group_tokens")]  # those that Mobile-Former knows; the rest are of grouped attention
# Rewrites that trade products for something else; every other one leaves their number alone.
PRODUCTS = {"densify_pointwise", "masked_former", "merge_token_stream", "group_tokens", "read_tokens_only"}
FLOAT32 = 1e-5  # relative, of a form folded in float64 and rounded once: measured at 1e-7 to 2e-6


def holds(model: nn.Module, spec: DeploySpec, shop: Any) -> tuple[nn.Module, list[Certificate]]:
    """Deploy a float32 model, check what must hold for every form, return it."""
    state, picture = copy.deepcopy(model.state_dict()), str(model)
    form, certificates = deploy(model, spec)
    assert str(model) == picture
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    tensors = [*form.parameters(), *form.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    assert not any(t.requires_grad for t in tensors)
    for batch in (1, 2, 5) if spec.batch == "dynamic" else (spec.batch,):
        image = shop.normal(batch, 3, spec.height, spec.width).float()
        assert shop.difference(form(image), model(image)) < FLOAT32
    check_chain(certificates)
    if spec.batch == 1:
        size = (spec.height, spec.width)
        ends = (certificates[0].macs_before, certificates[-1].macs_after)
        assert ends == (count_module(model, size).macs, count_module(form, size).macs)
    return form, certificates


def check_chain(certificates: list[Certificate]) -> None:
    """In the order of the list, each exact, each taking up where the one before left off."""
    names = [certificate.rewrite for certificate in certificates]
    assert names == [name for name in ORDER if name in names]
    assert all(0 <= c.max_rel < MAX_REL == 1e-9 and c.places > 0 and c.input_independent for c in certificates)
    for before, after in itertools.pairwise(certificates):
        assert after.operations_before == before.operations_after
        assert after.parameters_before == before.parameters_after
        assert after.macs_before == before.macs_after > 0
    assert {c.rewrite for c in certificates if c.macs_before != c.macs_after} <= PRODUCTS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model(shop: Any, name: str) -> None:
    model = shop.build(name, num_classes=1000).float()
    form, certificates = holds(model, DeploySpec(1, 64, 64, cache_bytes=60_000), shop)
    grouped = CONFIGS[name].groups > 1
    expected = [name for name in MOBILE if name != "gather_shuffle" and (grouped or name != "densify_pointwise")]
    assert [c.rewrite for c in certificates] == expected
    rewritten = {"BatchNorm2d", "BatchNorm1d", "ChannelShuffle", "DynamicReLU", "Former", "MobileToFormer"}
    assert not (rewritten | {"FormerToMobile"}) & set(shop.kinds(form))
    blocks = sum(row.e2 > 0 for row in CONFIGS[name].rows)
    places = {c.rewrite: c.places for c in certificates}
    assert places["clip_slopes"] == 2 * blocks
    assert places["channel_first_bridges"] == 2 * blocks + 1
    assert places["masked_former"] == places["merge_token_stream"] == blocks
    assert places["branch_hidden"] == len(CONFIGS[name].rows)
    # Measured at 0.53 to 0.64; a bottleneck that is cut costs operations.
    assert certificates[-1].operations_after < 0.7 * certificates[0].operations_before


def test_small_networks(shop: Any, small: MobileFormer) -> None:
    _, certificates = holds(small.float(), DeploySpec("dynamic", 32, 64, cache_bytes=6_000), shop)
    assert certificates[-1].operations_after < certificates[0].operations_before


@pytest.mark.parametrize(
    ("name", "cache_bytes"), [("grouped", 6_000), ("two_groups", None), ("spatial_grouped", 6_000)]
)
def test_small_grouped_networks(shop: Any, name: str, cache_bytes: int | None) -> None:
    spec = DeploySpec("dynamic", 32, 64, "grouped", cache_bytes)
    form, certificates = holds(shop.build(name).float(), spec, shop)
    names = [c.rewrite for c in certificates]
    assert "gather_shuffle" in names and "densify_pointwise" not in names
    assert {"branch_hidden", "merge_token_stream"} <= set(names)
    assert shop.kinds(form)["ChannelShuffle"] == 0


@pytest.mark.parametrize("pointwise", ["dense", "grouped"])
@pytest.mark.parametrize("option", ["spatial_dynamic_relu", "features_only"])
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.groups > 1])
def test_grouped_models(shop: Any, name: str, option: str, pointwise: Any) -> None:
    spec = DeploySpec(2, 32, 64, pointwise, cache_bytes=20_000)
    form, certificates = holds(shop.build(name, **{option: True}).float(), spec, shop)
    shuffle = {"densify_pointwise", "gather_shuffle"} & {c.rewrite for c in certificates}
    assert shuffle == {"densify_pointwise" if pointwise == "dense" else "gather_shuffle"}
    assert shop.kinds(form)["ChannelShuffle"] == 0


# What a network of grouped attention goes through at one picture, by the beginning of its name.
REWRITTEN = {
    "swin": ["group_tokens", "gather_patches", "branch_mlp"],
    "crossformer": ["group_tokens", "flat_embedding", "branch_mlp"],
    "lsla": ["fold_batchnorm", "group_tokens", "branch_mlp"],
    "lsla_features": ["fold_batchnorm", "group_tokens", "gather_patches", "branch_mlp"],
    "vit": ["group_tokens", "fold_positions", "read_tokens_only"],
}
ONE_PICTURE = ["flat_embedding"]
KNOWN_BATCH = ["branch_mlp", *ONE_PICTURE]


def test_networks_of_grouped_attention(shop: Any, network: str) -> None:
    grouped_attention_holds(shop, network, 1, [])


@pytest.mark.parametrize("name", ["swin", "crossformer_plus", "lsla_features", "vit_distilled"])
@pytest.mark.parametrize(("batch", "skipped"), [(3, ONE_PICTURE), ("dynamic", KNOWN_BATCH)])
def test_networks_of_grouped_attention_at_several_pictures(
    shop: Any, name: str, batch: Any, skipped: list[str]
) -> None:
    grouped_attention_holds(shop, name, batch, skipped)


def grouped_attention_holds(shop: Any, network: str, batch: Any, skipped: list[str]) -> None:
    model = shop.network(network).float()
    form, certificates = holds(model, DeploySpec(batch, 64, 96, cache_bytes=30_000), shop)
    key = max((name for name in REWRITTEN if network.startswith(name)), key=len)
    assert [c.rewrite for c in certificates] == [name for name in REWRITTEN[key] if name not in skipped]
    gone = {"BatchNorm2d", "BlockSequence", "DynamicPositionBias"} | ({"PatchMerging"} if batch == 1 else set())
    assert not gone & set(shop.kinds(form))


def test_a_training_model_is_deployed_in_evaluation(shop: Any) -> None:
    """Its statistics are neither used up nor updated."""
    model = shop.build("plain").float()
    expected, _ = deploy(model, DeploySpec(1, 32, 32))
    state = copy.deepcopy(model.state_dict())
    form, _ = deploy(model.train(), DeploySpec(1, 32, 32))
    image = shop.normal(1, 3, 32, 32).float()
    assert torch.equal(form(image), expected(image))
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("cache_bytes", [None, 6_000])
def test_the_form_is_in_evaluation(shop: Any, cache_bytes: int | None) -> None:
    form, _ = deploy(shop.build("plain").float().train(), DeploySpec(1, 32, 32, cache_bytes=cache_bytes))
    assert not any(m.training for m in form.modules())


def test_twice_is_the_same(shop: Any) -> None:
    spec = DeploySpec(1, 64, 64, cache_bytes=6_000)
    model = shop.build("residual").float()
    (first, records), (second, again) = deploy(model, spec), deploy(model, spec)
    assert records == again
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# ---- the proof itself


# These move all of a query's scores alike, and the softmax takes them out again.
UNSEEN = ("global_local.k.bias", "attn.k.bias", "attn.pos.pos3.2.bias")


@pytest.mark.parametrize("name", ["plain", "spatial_features", "swin", "crossformer_plus", "lsla", "vit_distilled"])
def test_every_parameter_moves_the_output(shop: Any, name: str) -> None:
    """A relative change of 1e-3 in any one tensor is seen: no rewrite can be wrong unnoticed."""
    model, image = shop.network(name) if name in shop.networks else shop.build(name), shop.normal(1, 3, 32, 64)
    expected = model(image)
    unseen = []
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or key.endswith(UNSEEN):
            continue
        kept = tensor.clone()
        tensor.mul_(1 + 1e-3 * shop.normal(*tensor.shape, seed=5))
        if not shop.difference(model(image), expected) > 10 * MAX_REL:
            unseen.append(key)
        tensor.copy_(kept)
    assert unseen == []


class Changed(nn.Module):
    """A module whose output is changed."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, image: Tensor) -> Tensor:
        return self.change(self.model(image))


def scaled(model: nn.Module, _: DeploySpec) -> Any:
    """Wrong by one part in a hundred million."""
    return Changed(model, lambda out: out * (1 + 1e-8)), 1, ()


def one_entry(model: nn.Module, _: DeploySpec) -> Any:
    """Wrong in one weight, by one part in a thousand."""
    model.stem[0].weight.view(-1)[0] *= 1 + 1e-3
    return model, 1, ()


def poisoned(model: nn.Module, _: DeploySpec) -> Any:
    return Changed(model, lambda out: out.index_fill(1, torch.tensor([0]), float("nan"))), 1, ()


def overflowing(model: nn.Module, _: DeploySpec) -> Any:
    return Changed(model, lambda out: out / 0), 1, ()


def swapped(model: nn.Module, _: DeploySpec) -> Any:
    """Right but for the order of the pictures."""
    return Changed(model, lambda out: out.flip(0)), 1, ()


@pytest.mark.parametrize("wrong", [scaled, one_entry, poisoned, overflowing])
@pytest.mark.parametrize("before", [(), REWRITES[:1]], ids=["first", "second"])
def test_a_wrong_rewrite_is_refused_by_name(
    shop: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, before: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(package, "REWRITES", (*before, wrong, *REWRITES))
    with pytest.raises(ExportError, match=f"rewrite {wrong.__name__}: "):
        deploy(shop.build("plain").float(), DeploySpec(1, 32, 32))


@pytest.mark.parametrize("batch", [2, 3, "dynamic"])
def test_mixed_up_pictures_are_refused(shop: Any, batch: Any) -> None:
    with pytest.raises(ExportError, match="rewrite swapped: "):
        certify(swapped, shop.build("plain"), DeploySpec(batch, 32, 32))


def test_the_message_says_what_came_and_what_was_allowed(shop: Any) -> None:
    with pytest.raises(ExportError, match=r"relative difference 1.0e-08 in float64, at most 1e-09 allowed; .*report"):
        certify(scaled, shop.build("plain"), DeploySpec(1, 64, 64))


def test_a_refused_rewrite_leaves_the_model(shop: Any) -> None:
    model = shop.build("plain")
    expected = copy.deepcopy(model.state_dict())
    with pytest.raises(ExportError):
        certify(one_entry, model, DeploySpec(1, 32, 32))
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, -1.0], [0.0, -4.0], 0.75),
        ([3.0, 0.0], [0.0, 0.0], 3.0),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([1.0, 2.0], [float("nan"), 2.0], float("inf")),
        ([float("inf"), 2.0], [1.0, 2.0], float("inf")),
        ([float("inf"), 2.0], [float("inf"), 2.0], float("inf")),
    ],
)
def test_relative_difference(actual: list[float], expected: list[float], difference: float) -> None:
    assert relative_difference(torch.tensor(actual), torch.tensor(expected)) == difference


@pytest.mark.parametrize("wrong", [lambda out: out[None], lambda out: out[0]], ids=["one axis more", "one axis less"])
def test_another_shape_is_refused(shop: Any, wrong: Any) -> None:
    def reshaped(model: nn.Module, _: DeploySpec) -> Any:
        return Changed(model, wrong), 1, ()

    with pytest.raises(ExportError, match="rewrite reshaped: "):
        certify(reshaped, shop.build("plain"), DeploySpec(1, 32, 32))


def test_fewer_outputs_are_refused(shop: Any) -> None:
    def truncated(model: nn.Module, _: DeploySpec) -> Any:
        return Changed(model, lambda features: features[:4]), 1, ()

    with pytest.raises(ExportError, match="rewrite truncated: "):
        certify(truncated, shop.build("features"), DeploySpec(1, 32, 32))
