"""fold_batchnorm: no BatchNorm is left, and the function is the same."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.batchnorm import fold_batchnorm
from edgevit.export.deploy.certificate import certify
from edgevit.models.mobile_former import CONFIGS, MobileFormer

pytestmark = pytest.mark.usefixtures("no_grad")

SPEC = DeploySpec(1, 32, 32)


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def test_network(shop: Any, case: tuple[MobileFormer, DeploySpec]) -> None:
    model, spec = case
    after, certificate = shop.certified(fold_batchnorm, model, spec)
    assert norms(after) == []
    assert certificate.places == len(norms(model))
    assert certificate.operations_after < certificate.operations_before
    # Weight, bias, mean and variance of a channel go; a convolution gains a bias, a Linear has one already.
    gone = sum((3 if isinstance(m, nn.BatchNorm2d) else 4) * m.num_features for m in norms(model))
    assert certificate.parameters_before - certificate.parameters_after == gone


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("features_only", [False, True])
def test_every_model_keeps_none(name: str, features_only: bool) -> None:
    model = MobileFormer(CONFIGS[name], features_only=features_only).eval()
    expected = len(norms(model))
    after, places, _ = fold_batchnorm(model, SPEC)
    assert places == expected > 0
    assert norms(after) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (6, 9)])
@pytest.mark.parametrize(
    ("c_in", "c_out", "kernel", "stride", "groups"),
    [(3, 8, 3, 2, 1), (6, 4, 1, 1, 1), (6, 9, 1, 1, 3), (5, 5, 3, 1, 5), (4, 12, 5, 2, 4)],
)
def test_convolution(
    shop: Any, c_in: int, c_out: int, kernel: int, stride: int, groups: int, size: tuple[int, int], bias: bool
) -> None:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
    chain = shop.randomized(nn.Sequential(conv, nn.BatchNorm2d(c_out, eps=0.1)))  # an eps that shows if it is forgotten
    x = shop.normal(3, c_in, *size)
    expected = chain(x)
    after, places, _ = fold_batchnorm(chain, SPEC)
    assert places == 1
    assert [type(m) for m in after.children()] == [nn.Conv2d]
    assert shop.difference(after(x), expected) < shop.exact


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (7, 12), (40, 5)])
def test_linear(shop: Any, n_in: int, n_out: int) -> None:
    chain = shop.randomized(nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out, eps=0.1), nn.ReLU()))
    x = shop.normal(4, n_in)
    expected = chain(x)
    after, places, _ = fold_batchnorm(chain, SPEC)
    assert places == 1
    assert [type(m) for m in after.children()] == [nn.Linear, nn.ReLU]
    assert shop.difference(after(x), expected) < shop.exact


def test_two_norms_in_a_row(shop: Any) -> None:
    chain = shop.randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = shop.normal(2, 3, 5, 5)
    expected = chain(x)
    after, places, _ = fold_batchnorm(chain, SPEC)
    assert (places, len(after)) == (2, 1)
    assert shop.difference(after(x), expected) < shop.exact


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)],
        [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)],
        [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.BatchNorm2d(4)],
    ],
    ids=["before", "activation between", "another Sequential between"],
)
def test_a_norm_without_a_layer_before_it_stays(layers: list[nn.Module]) -> None:
    chain = nn.Sequential(*layers).eval()
    expected = str(chain)
    after, places, _ = fold_batchnorm(chain, SPEC)
    assert places == 0
    assert str(after) == expected


def test_nothing_to_fold_is_no_certificate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double().eval()
    after, certificate, _ = certify(fold_batchnorm, model, SPEC)
    assert certificate is None
    assert after is model


def test_folded_layers_do_not_train(shop: Any) -> None:
    after, _, _ = fold_batchnorm(shop.build("plain"), SPEC)
    assert not any(p.requires_grad for p in after.parameters())
