"""The warning of image sizes that compute on padding: by cost alone, for every family."""

from __future__ import annotations

import functools
import math

import pytest

from edgevit import api
from edgevit.api.counting import counter
from edgevit.api.natural_size import size_note
from edgevit.errors import UsageError
from edgevit.models import model_card
from edgevit.registry import FAMILIES
from edgevit.specs import ImageSpec, ModelCard, Size

CARD = ModelCard("net", "net", "Net", "https://example.org", "here", 1, 1, image=ImageSpec((224, 224)))


def in_groups(size: Size, group: int = 7) -> int:
    """A network whose maps of stride 32 are padded to whole groups."""
    return math.prod(math.ceil(side / 32 / group) * group for side in size) * 10**6


# ---- by cost alone


@pytest.mark.parametrize(
    ("size", "near"),
    [((256, 256), "224x224"), ((320, 320), "224x224"), ((352, 224), "448x224"), ((480, 480), "448x448")],
)
def test_padding_is_told_with_the_nearest_size_without_it(size: Size, near: str) -> None:
    note = size_note(CARD, size, in_groups)
    assert note is not None and note.endswith(f"; nearest natural size {near}")


def test_the_note_says_what_it_costs() -> None:
    note = size_note(CARD, (256, 256), lambda size: 64 * in_groups(size))
    assert note == (
        "256x256 costs 12.54 G MACs, 3.06 times the cost per pixel of 224x224 (3.14 G): "
        "maps are padded to whole groups there; nearest natural size 224x224"
    )


@pytest.mark.parametrize(
    "cost",
    [
        lambda size: math.prod(size),
        lambda size: 10**7 + math.prod(size),  # a share that does not grow: tokens of their own
        lambda size: math.prod(size) * (1 + math.prod(size) // 100),  # every token sees every other
        lambda size: 10**6 + math.prod(size) ** 2,
    ],
    ids=["pixels", "fixed share", "pixels and pairs", "pairs"],
)
def test_a_network_without_padding_has_no_unnatural_size(cost: object) -> None:
    sides = (32, 64, 96, 128, 192, 256, 288, 384, 512, 640, 800, 1024, 1344, 4096)
    assert [(h, w) for h in sides for w in sides if size_note(CARD, (h, w), cost)] == []  # type: ignore[arg-type]  # a table of costs


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (224, 448), (672, 224), (32, 32), (4096, 4096)])
def test_multiples_of_the_published_size_and_the_extremes_are_natural(size: Size) -> None:
    assert size_note(CARD, size, in_groups) is None


def test_few_sizes_are_counted_and_none_twice_where_nothing_is_wrong() -> None:
    asked: list[Size] = []

    def count(size: Size) -> int:
        asked.append(size)
        return math.prod(size)

    assert size_note(CARD, (256, 256), count) is None
    assert sorted(asked) == [(224, 224), (256, 256), (448, 448)]


@pytest.mark.parametrize("size", [(256, 256), (288, 544), (1024, 1024), (32, 4064), (4064, 32)])
def test_a_warning_takes_a_dozen_counts_or_so(size: Size) -> None:
    asked: set[Size] = set()

    @functools.cache
    def count(size: Size) -> int:
        asked.add(size)
        return in_groups(size)

    size_note(CARD, size, count)
    assert len(asked) <= 16
    assert all(32 <= side <= 4096 and side % 32 == 0 for each in asked for side in each)


def test_sizes_that_the_network_refuses_are_passed_over() -> None:
    def only(*allowed: int) -> object:
        def cost(size: Size) -> int:
            if size[0] not in allowed:
                raise UsageError("no")
            return in_groups(size)

        return cost

    note = size_note(CARD, (256, 256), only(224, 256, 448))  # type: ignore[arg-type]  # a cost
    assert note is not None and note.endswith("nearest natural size 224x224")
    assert size_note(CARD, (256, 256), only(256)) is None  # type: ignore[arg-type]  # a cost


# ---- of real networks, counted on the meta device


counts = functools.cache(lambda model: counter(model, {}))  # each size of each network is counted once


def noted(model: str, height: int, width: int) -> str:
    return size_note(model_card(model), (height, width), lambda size: counts(model)(size).macs) or ""


@pytest.mark.parametrize("side", [256, 288, 320])
def test_crossformer_pads_there(side: int) -> None:
    assert noted("crossformer_s", side, side).endswith("nearest natural size 224x224")


def test_crossformer_at_256_says_the_figures() -> None:
    assert noted("crossformer_s", 256, 256).startswith(
        "256x256 costs 9.20 G MACs, 1.44 times the cost per pixel of 224x224 (4.91 G): maps are padded"
    )


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (224, 448), (192, 192), (384, 384)])
def test_crossformer_hardly_pads_there(size: Size) -> None:
    assert noted("crossformer_s", *size) == ""


@pytest.mark.parametrize("model", ["swin_t", "deit_tiny", "mobileformer_26m"])
@pytest.mark.parametrize("side", [64, 192, 224, 384, 448, 512])
def test_common_sizes_of_other_families_are_natural(model: str, side: int) -> None:
    assert noted(model, side, side) == ""


@pytest.mark.parametrize("side", [128, 256, 288, 320, 800])
def test_attention_between_all_tokens_is_no_padding(side: int) -> None:
    assert noted("deit_tiny", side, side) == ""
    assert noted("mobileformer_26m", side, side) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_no_network_is_warned_of_at_its_own_size(family: str) -> None:
    name = FAMILIES[family][1][0]
    assert not any("nearest natural size" in note for note in api.info(name)["notes"])


def test_info_tells_it() -> None:
    (note,) = (note for note in api.info("swin_t", (256, 256))["notes"] if "natural size" in note)
    assert note.startswith("256x256 costs 7.35 G MACs, 1.25 times the cost per pixel of 224x224 (4.49 G)")
