"""Equalisation: the float network stays the same to the last bit, and channels that lay apart no longer do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from edgevit.errors import ExportError
from edgevit.export.capture import capture
from edgevit.export.deploy import DeploySpec, deploy
from edgevit.export.quantize import equalise as module
from edgevit.export.quantize.equalise import equalise

pytestmark = pytest.mark.usefixtures("no_grad")
FACTORS = (64.0, 16.0, 1 / 32)


def pictures(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def program_of(net: nn.Module, *shape: int, dynamic: bool = False) -> ExportedProgram:
    shapes = ({0: Dim("batch", min=1, max=64)},) if dynamic else None
    return torch.export.export(net.eval(), (torch.zeros(shape),), dynamic_shapes=shapes, strict=False)


def same(one: ExportedProgram, other: ExportedProgram, images: np.ndarray) -> bool:
    """To the last bit: factors that are powers of two round nothing."""
    left, right = (program.module()(torch.from_numpy(images)) for program in (one, other))
    pairs = zip(*((x,) if isinstance(x, Tensor) else tuple(x) for x in (left, right)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def spread(tensor: Tensor, width: int) -> Tensor:
    """Factors for a few of `width` channels, in the shape of axis 0 of `tensor`."""
    factors = torch.ones(width)
    factors[: len(FACTORS)] = torch.tensor(FACTORS)
    return factors.view(-1, *[1] * (tensor.dim() - 1))


class Net(nn.Module):
    """A convolution to tokens, then what a test adds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 5)
        self.wide = torch.ones(16)
        self.wide[: len(FACTORS)] = torch.tensor(FACTORS)
        self.norm.weight.mul_(self.wide)
        self.norm.bias.add_(0.3).mul_(self.wide)
        for layer in (self.first, self.second):
            layer.weight.div_(self.wide)

    def tokens(self, image: Tensor) -> Tensor:
        x: Tensor = self.norm(self.stem(image).flatten(2).transpose(1, 2))
        return x


class Plain(Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        x = functional.gelu(self.first(x)) + functional.gelu(self.second(x[:, 1:2]))
        return self.head(x.mean(1))  # type: ignore[no-any-return]  # calling a module has type Any


class AlsoRead(Net):
    """The norm's result is added to something: its channels may not change."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        return self.head(functional.gelu(self.first(x) + self.second(x + 1)).mean(1))  # type: ignore[no-any-return]  # as above


class Shared(Net):
    """One weight reads two tensors."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        return self.head(functional.gelu(self.first(x) + self.first(x.flip(1).tanh())).mean(1))  # type: ignore[no-any-return]  # as above


class Tied(Net):
    """Two layers have one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight

    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        return self.head(functional.gelu(self.first(x)).mean(1) + self.second(x.mean(1)))  # type: ignore[no-any-return]  # as above


class Mixed(Net):
    """Channels are permuted on the way, cut in two, padded and put together."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        order = torch.arange(15, -1, -1)
        left, right = x.index_select(2, order).split([4, 12], 2)
        x = torch.cat((left.reshape(x.shape[0], -1).view(left.shape), right), 2)
        return self.head(functional.gelu(self.first(x)).mean(1))  # type: ignore[no-any-return]  # as above


class Convolved(nn.Module):
    """Pointwise, a dynamic ReLU, depthwise, ReLU, grouped pointwise: as in Mobile-Former."""

    def __init__(self, clip: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.clip = clip
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand, self.depthwise = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 3, 1, 1, groups=16)
        self.project, self.slopes = nn.Conv2d(32, 8, 1, groups=2), nn.Linear(8, 32)
        for made, read in ((self.expand, self.depthwise), (self.depthwise, None)):
            made.weight.mul_(spread(made.weight, len(made.weight)))
            if made.bias is not None:
                made.bias.mul_(spread(made.bias, len(made.weight)))
            if read is not None:
                read.weight.div_(spread(read.weight, 16).repeat_interleave(2, 0))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        one, other = self.slopes(x.mean((2, 3))).tanh()[:, :, None, None].split(16, 1)
        x = self.expand(x)
        x = self.depthwise(torch.maximum(one * x, other * x))
        x = functional.relu(x) if self.clip is None else x.clamp(0, self.clip)
        return self.project(x).mean((2, 3))  # type: ignore[no-any-return]  # calling a module has type Any


def test_what_a_norm_spreads_moves_into_the_weights_behind_it() -> None:
    images = pictures(6, 3, 16, 16)
    program = program_of(Plain(), 1, 3, 16, 16)
    found, record = equalise(program, images)
    assert same(program, found, images[:1])
    assert record["max_rel"] == 0.0
    assert record["spread_before"] > 20 > 6 > record["spread_after"]
    assert record["places"] == 1
    weight = found.state_dict["norm.weight"] / program.state_dict["norm.weight"]
    assert float(weight[0]) < 0.3 < 3 < float(weight[2])
    assert torch.equal(weight.log2(), weight.log2().round())


def test_the_module_and_its_program_keep_their_weights() -> None:
    net = Plain()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    program = program_of(net, 1, 3, 16, 16)
    found, _ = equalise(program, pictures(4, 3, 16, 16))
    assert found is not program
    for name, tensor in before.items():
        assert torch.equal(net.state_dict()[name], tensor)
        assert torch.equal(program.state_dict[name], tensor)


def test_a_second_time_it_finds_nothing() -> None:
    for net in (Plain(), Mixed(), Convolved()):
        images = pictures(6, 3, 16, 16)
        found, record = equalise(program_of(net, 1, 3, 16, 16), images)
        assert record["places"] > 0
        again, second = equalise(found, images)
        assert again is found
        assert (second["places"], second["channels"]) == (0, 0)
        assert second["spread_before"] == second["spread_after"] == record["spread_after"]


@pytest.mark.parametrize("net", [AlsoRead, Shared, Tied])
def test_what_something_else_reads_is_left_alone(net: type[Net]) -> None:
    images = pictures(4, 3, 16, 16)
    program = program_of(net(), 1, 3, 16, 16)
    found, record = equalise(program, images)
    assert same(program, found, images[:1])
    assert record["places"] == 0


def test_channels_are_followed_through_permutations_cuts_and_joins() -> None:
    images = pictures(4, 3, 16, 16)
    net = Mixed()
    net.first.weight.copy_(net.first.weight.flip(1))
    program = program_of(net, 1, 3, 16, 16)
    found, record = equalise(program, images)
    assert same(program, found, images[:1])
    assert record["spread_before"] > 20 > 6 > record["spread_after"]


def test_a_dynamic_relu_lets_factors_through_and_a_depthwise_weight_takes_all_of_them() -> None:
    images = pictures(8, 3, 16, 16)
    program = program_of(Convolved(), 1, 3, 16, 16)
    found, record = equalise(program, images)
    assert same(program, found, images[:1])
    assert record["places"] == 2  # expand, and depthwise through its ReLU
    assert record["spread_before"] > 20
    assert record["spread_after"] < record["spread_before"] / 4  # half of it stays, for project leans nowhere


def test_a_clip_from_above_stops_it() -> None:
    images = pictures(8, 3, 16, 16)
    program = program_of(Convolved(clip=6.0), 1, 3, 16, 16)
    found, record = equalise(program, images)
    assert same(program, found, images[:1])
    assert record["places"] == 1
    changed = {name for name, tensor in found.state_dict.items() if not torch.equal(tensor, program.state_dict[name])}
    assert changed == {"expand.weight", "expand.bias", "depthwise.weight"}


def test_a_dynamic_batch_is_equalised_for_every_batch() -> None:
    images = pictures(7, 3, 16, 16)
    program = program_of(Plain(), 2, 3, 16, 16, dynamic=True)
    found, record = equalise(program, images)
    assert record["places"] == 1
    assert all(same(program, found, images[:count]) for count in (1, 2, 5))


def test_idle_channels_are_left_alone() -> None:
    net = Plain()
    net.norm.weight[4] = net.norm.bias[4] = 0
    net.first.weight[:, 5] = net.second.weight[:, 5] = 0
    program = program_of(net, 1, 3, 16, 16)
    found, _ = equalise(program, pictures(4, 3, 16, 16))
    factors = found.state_dict["norm.bias"] / program.state_dict["norm.bias"]
    assert float(factors[5]) == 1.0
    assert torch.isfinite(found.state_dict["first.weight"]).all()


FAMILIES = ("swin", "swin_features", "crossformer", "crossformer_old_features", "lsla", "lsla_plain", "vit_distilled")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_each_attention_family_stays_the_same(shop: Any, name: str, batch: Any) -> None:
    size = (48, 48) if name == "vit_distilled" else (64, 96)
    form, _ = deploy(shop.network(name), DeploySpec(batch, *size))
    program = capture(form, batch, size)
    images = pictures(3, 3, *size)
    found, record = equalise(program, images)
    assert same(program, found, images[: 1 if batch == 1 else 3])
    assert record["places"] > 3
    assert record["max_rel"] == 0.0


@pytest.mark.parametrize("cache_bytes", [None, 2048])
@pytest.mark.parametrize("name", ["plain", "residual", "two_groups", "spatial"])
def test_each_mobile_former_stays_the_same(shop: Any, name: str, cache_bytes: int | None) -> None:
    form, _ = deploy(shop.build(name), DeploySpec(1, 64, 64, cache_bytes=cache_bytes))
    program = capture(form, 1, (64, 64))
    images = pictures(3, 3, 64, 64)
    found, record = equalise(program, images)
    assert same(program, found, images[:1])
    assert record["places"] > 3


def test_the_keys_of_lsla_take_the_inverse_factors_of_its_queries(shop: Any) -> None:
    """Keys and values are the norm's result itself: only queries can make up for what changes in it."""
    form, _ = deploy(shop.network("lsla"), DeploySpec(1, 64, 64))
    program = capture(form, 1, (64, 64))
    found, _ = equalise(program, pictures(3, 3, 64, 64))
    names = [name.removesuffix("norm1.weight") for name in program.state_dict if name.endswith("norm1.weight")]
    changed = 0
    for prefix in names:
        norm, query = (
            found.state_dict[prefix + name] / program.state_dict[prefix + name]
            for name in ("norm1.weight", "attn.q.bias")
        )
        changed += not torch.equal(norm, torch.ones_like(norm))
        torch.testing.assert_close(query, 1 / norm)
    assert changed


def test_a_changed_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module._scaled

    def wrong(*args: Any) -> dict[str, Tensor]:
        return {name: tensor * 1.001 for name, tensor in honest(*args).items()}

    monkeypatch.setattr(module, "_scaled", wrong)
    with pytest.raises(ExportError, match=r"equalisation: relative difference .* in float64, at most 1e-09 allowed"):
        equalise(program_of(Plain(), 1, 3, 16, 16), pictures(4, 3, 16, 16))


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (3, 16, 16)])
def test_no_pictures_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match="expected \\(n, 3, h, w\\) with at least one"):
        equalise(program_of(Plain(), 1, 3, 16, 16), np.zeros(shape, np.float32))
