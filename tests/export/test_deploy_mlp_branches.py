"""branch_mlp: the MLPs of large maps in shares of the tokens that fit a cache budget."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from edgevit.export.deploy import DeploySpec, deploy
from edgevit.export.deploy.certificate import certify
from edgevit.export.deploy.class_token import PrefixBlock
from edgevit.export.deploy.mlp_branches import BYTES, LARGE, WEIGHT, MlpBranches, branch_mlp
from edgevit.models.layers import Mlp

pytestmark = pytest.mark.usefixtures("no_grad")

# Bytes, for the small networks at 64x96: hidden activations of 196 KB and more in the first stage, weights of 16 to 37.
BUDGET = 20_000


def branched(model: nn.Module) -> list[MlpBranches]:
    return [m for m in model.modules() if isinstance(m, MlpBranches)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["swin", "crossformer_plus", "lsla_features"])
def test_network(shop: Any, name: str, batch: int) -> None:
    spec = DeploySpec(batch, 64, 96, cache_bytes=BUDGET)
    form = shop.prepared(branch_mlp, shop.network(name), spec)
    after, certificate = shop.certified(branch_mlp, form, spec)
    assert certificate.places == len(branched(after)) > 0
    assert certificate.parameters_after == certificate.parameters_before
    assert branch_mlp(after, spec)[1] == 0


@pytest.mark.parametrize(("batch", "budget"), [("dynamic", BUDGET), (1, None), (1, 1 << 30)])
def test_what_is_left_whole(shop: Any, batch: Any, budget: int | None) -> None:
    spec = DeploySpec(batch, 64, 96, cache_bytes=budget)
    form = shop.prepared(branch_mlp, shop.network("swin"), spec)
    assert branch_mlp(form, spec) == (form, 0, ())


@pytest.mark.parametrize(("batch", "stages"), [(1, 1), (3, 2)])
def test_only_the_large(shop: Any, batch: int, stages: int) -> None:
    """Tokens of the four stages: 384, 96, 24, 6, of 128, 256, 512, 1024 hidden channels; all pictures count."""
    budget = BYTES * 96 * 256 // LARGE  # the second stage of one picture is just not too large
    spec = DeploySpec(batch, 64, 96, cache_bytes=budget)
    form = shop.prepared(branch_mlp, shop.network("swin"), spec)
    after, places, _ = branch_mlp(form, spec)
    assert places == 2 * stages
    for layer in after.layers[:stages]:
        assert all(isinstance(step.mlp, MlpBranches) for step in layer.blocks.steps if hasattr(step, "mlp"))


def test_a_weight_that_each_branch_would_read_again_is_not_split(shop: Any) -> None:
    weight = BYTES * 32 * 128  # of the first stage
    spec = DeploySpec(1, 64, 96, cache_bytes=weight // WEIGHT - 1)
    form = shop.prepared(branch_mlp, shop.network("swin"), spec)
    assert branch_mlp(form, spec)[1] == 0


class Widest(nn.Module):
    """An MLP that notes how many tokens it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Any) -> Any:
        self.rows.append(x.shape[0])
        return 2 * x


@pytest.mark.parametrize("tokens", [1, 5, 384, 385, 3136])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_branches_take_each_token_once(shop: Any, tokens: int, count: int) -> None:
    form = MlpBranches(Mlp(3, 4), count)
    form.mlp = widest = Widest()  # type: ignore[assignment]  # same call
    x = shop.normal(tokens, 3)
    assert (form(x) == 2 * x).all()
    assert sum(widest.rows) == tokens
    assert max(widest.rows) == -(-tokens // count)


@pytest.mark.parametrize("budget", [20_000, 12_000, 10_000])
def test_no_branch_is_larger_than_the_budget(shop: Any, budget: int) -> None:
    spec = DeploySpec(1, 64, 96, cache_bytes=budget)
    form = shop.prepared(branch_mlp, shop.network("swin"), spec)
    after, _, _ = certify(branch_mlp, form, spec)
    assert branched(after)
    widest = 0
    for branches in branched(after):
        hidden = branches.mlp.fc1.out_features
        branches.mlp.fc1.register_forward_hook(
            lambda _, args, __, hidden=hidden: rows.append(args[0].shape[0] * hidden * BYTES)  # type: ignore[misc]  # bound now
        )
    rows: list[int] = []
    after(shop.normal(1, 3, 64, 96))
    widest = max(rows)
    assert widest <= budget


@pytest.mark.parametrize("name", ["vit", "vit_distilled"])
def test_the_few_tokens_that_are_read_are_not_split(shop: Any, name: str) -> None:
    """The last block of a plain transformer puts out one or two tokens: branches would read its weights twice."""
    form, _ = deploy(shop.network(name).float(), DeploySpec(1, 224, 224, cache_bytes=34_000))
    assert len(branched(form)) >= 2
    last = form.blocks.steps[-1]
    assert isinstance(last, PrefixBlock)
    assert isinstance(last.mlp, Mlp)
