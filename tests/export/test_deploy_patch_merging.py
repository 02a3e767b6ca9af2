"""gather_patches: Swin's merging as one Gather; flat_embedding: CrossFormer's between matrices of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgevit.export.deploy import DeploySpec
from edgevit.export.deploy.patch_merging import GatheredPatches, flat_embedding, gather_patches
from edgevit.models.swin import PatchMerging

pytestmark = pytest.mark.usefixtures("no_grad")

SHAPES = [(1, 32, 32), (1, 64, 96), (3, 96, 64), ("dynamic", 32, 160)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", ["swin", "swin_features", "lsla_features"])
def test_network(shop: Any, name: str, shape: tuple[Any, int, int]) -> None:
    after, certificate = shop.certified(gather_patches, shop.network(name), DeploySpec(*shape))
    assert certificate.places == shop.kinds(after)["GatheredPatches"] == 3
    assert shop.kinds(after)["PatchMerging"] == 0
    assert certificate.parameters_after == certificate.parameters_before
    assert certificate.operations_after < certificate.operations_before


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=["one", "dynamic"])
def test_network_in_the_pipeline(shop: Any, shape: tuple[Any, int, int]) -> None:
    spec = DeploySpec(*shape)
    form = shop.prepared(gather_patches, shop.network("swin"), spec)
    shop.certified(gather_patches, form, spec)


@pytest.mark.parametrize("name", ["crossformer", "lsla", "vit"])
def test_other_mergings_are_left_alone(shop: Any, name: str) -> None:
    model = shop.network(name)
    assert gather_patches(model, DeploySpec(1, 32, 32)) == (model, 0, ())


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 2)])
@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_each_patch_has_its_four_corners(shop: Any, batch: Any, height: int, width: int) -> None:
    """By a plain loop: (0, 0), (1, 0), (0, 1), (1, 1), as (row, column)."""
    merging = shop.randomized(PatchMerging(5))
    form = GatheredPatches(merging, height, width, DeploySpec(batch, 32, 32))
    for n in (1,) if batch == 1 else (1, 3):
        x = shop.normal(n, height, width, 5)
        patches = [
            torch.cat(
                [x[:, 2 * i, 2 * j], x[:, 2 * i + 1, 2 * j], x[:, 2 * i, 2 * j + 1], x[:, 2 * i + 1, 2 * j + 1]], -1
            )
            for i in range(height // 2)
            for j in range(width // 2)
        ]
        expected = merging.reduction(merging.norm(torch.stack(patches, 1)))
        actual = form(x.flatten(1, 2), height, width)
        assert shop.difference(actual, expected) < shop.exact
        assert shop.difference(merging(x.flatten(1, 2), height, width), expected) < shop.exact


def test_one_gather(shop: Any) -> None:
    form = GatheredPatches(shop.randomized(PatchMerging(5)), 4, 6, DeploySpec(1, 32, 32))
    with shop.recorded() as recorder:
        form(shop.normal(1, 24, 5), 4, 6)
    assert recorder.count("index_select") == 1
    assert recorder.count("slice", "cat", "clone", "copy_") == 0


# ---- CrossFormer's


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
@pytest.mark.parametrize("name", ["crossformer", "crossformer_old_features", "crossformer_plus"])
def test_flat_embedding(shop: Any, name: str, size: tuple[int, int]) -> None:
    after, certificate = shop.certified(flat_embedding, shop.network(name), DeploySpec(1, *size))
    assert certificate.places == shop.kinds(after)["FlatEmbedding"] == 3
    assert shop.kinds(after)["PatchMerging"] == 0
    assert certificate.parameters_after == certificate.parameters_before


@pytest.mark.parametrize(
    ("name", "batch"), [("crossformer", 3), ("crossformer", "dynamic"), ("swin", 1), ("lsla", 1), ("vit", 1)]
)
def test_flat_embedding_leaves_batches_and_other_families_alone(shop: Any, name: str, batch: Any) -> None:
    model = shop.network(name)
    assert flat_embedding(model, DeploySpec(batch, 32, 32)) == (model, 0, ())
