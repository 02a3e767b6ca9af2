"""Take and token_sizes: rows by a constant index, picture by picture; and the sizes at which parts are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.take import Take
from edgevit.export.deploy.token_sizes import token_sizes
from edgevit.models.layers import BlockSequence
from edgevit.models.swin import PatchMerging

pytestmark = pytest.mark.usefixtures("no_grad")

TOKENS, CHANNELS = 6, 3


@pytest.mark.parametrize(
    "index", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [4, 4, 0], [2], [1, 5, 5, 5, 0, 3, 2, 4, 0]], ids=str
)
@pytest.mark.parametrize("batch", [1, 3, "dynamic"])
def test_rows_of_each_picture(shop: Any, index: list[int], batch: Any) -> None:
    take = Take(torch.tensor(index), TOKENS, DeploySpec(batch, 32, 32))
    for n in {1: (1,), 3: (3,), "dynamic": (1, 2, 5)}[batch]:
        x = shop.normal(n, TOKENS, CHANNELS)
        expected = torch.stack([torch.stack([picture[i] for i in index]) for picture in x])
        assert torch.equal(take(x.flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_one_gather_and_nothing_else_moves(shop: Any, batch: Any) -> None:
    take, x = Take(torch.tensor([3, 1, 2]), TOKENS, DeploySpec(batch, 32, 32)), shop.normal(TOKENS, CHANNELS)
    with shop.recorded() as recorder:
        take(x)
    assert [name for name, _ in recorder.calls if name not in ("view", "_unsafe_view", "unsqueeze")] == ["index_select"]


def test_the_index_is_a_buffer_of_whole_numbers() -> None:
    take = Take(torch.tensor([1, 0]), 2, DeploySpec(1, 32, 32)).half()
    assert {key: buffer.dtype for key, buffer in take.named_buffers()} == {"index": torch.int64}


# ---- sizes


def test_sizes_of_each_stage(shop: Any) -> None:
    sizes = token_sizes(shop.network("swin"), BlockSequence, DeploySpec("dynamic", 64, 96))
    assert sizes == {f"layers.{s}.blocks": (16 >> s, 24 >> s) for s in range(4)}
    merged = token_sizes(shop.network("swin"), PatchMerging, DeploySpec(1, 64, 96))
    assert merged == {f"layers.{s}.downsample": (16 >> s, 24 >> s) for s in range(3)}


@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("vit_distilled", 2)])
def test_a_plain_transformer_is_one_row(shop: Any, name: str, prefix: int) -> None:
    sizes = token_sizes(shop.network(name), BlockSequence, DeploySpec(1, 48, 80))
    assert sizes == {"blocks": (1, prefix + 3 * 5)}


def test_a_network_without_such_parts_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("ran")

    model = nn.Linear(1, 1)
    monkeypatch.setattr(model, "forward", run)
    assert token_sizes(model, BlockSequence, DeploySpec(1, 32, 32)) == {}


def test_no_hook_stays(shop: Any) -> None:
    model = shop.network("swin")
    token_sizes(model, BlockSequence, DeploySpec(1, 32, 32))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_no_hook_stays_after_a_failure(shop: Any) -> None:
    model = shop.network("swin")
    with pytest.raises(RuntimeError):
        token_sizes(model, BlockSequence, DeploySpec(1, 40, 40))  # 10x10 tokens cannot be halved twice
    assert not any(m._forward_pre_hooks for m in model.modules())
