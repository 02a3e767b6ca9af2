"""What is known without weights: list, info with the paper's figures beside the counted ones, doctor."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from edgevit import api, paper, registry
from edgevit.errors import UnknownNameError, UsageError
from edgevit.models import model_card
from edgevit.registry import FAMILIES, model_names

# ---- list


@pytest.mark.usefixtures("tiny")
def test_models_are_listed_by_pattern_and_family() -> None:
    assert api.list_models("mobileformer_?6m") == ["mobileformer_26m", "mobileformer_96m"]
    assert api.list_models(family="tiny") == ["tiny"]
    assert api.list_models("t*", "mobile_former") == []
    assert api.list_models("*_t", "crossformer") == ["crossformer_t"]
    assert api.list_models() == model_names()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_listed_by_its_name(family: str) -> None:
    assert api.list_models(family=family) == list(FAMILIES[family][1])


def test_an_unknown_family_says_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown family 'mobileformer'; did you mean 'mobile_former'"):
        api.list_models(family="mobileformer")


# ---- info


@pytest.mark.usefixtures("tiny")
def test_info_counts_exactly_and_scales_with_the_picture() -> None:
    small, large = api.info("tiny"), api.info("tiny", (64, 128))
    assert (small["image_size"], large["image_size"]) == ([64, 64], [64, 128])
    assert small["parameters"] == large["parameters"] == 16 + 5000
    assert small["macs"] == 3 * 4 * 64 * 64 + 4000
    assert large["macs"] == 2 * 3 * 4 * 64 * 64 + 4000
    assert (small["flops"], large["flops"]) == (2 * small["macs"], 2 * large["macs"])
    assert small["options"] == {"double": False}
    assert small["notes"] == large["notes"] == []
    json.dumps(small, allow_nan=False)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("size", [(64, 100), (0, 64), (-64, 64), (64, 8192), (1, 1)])
def test_an_impossible_size_says_the_nearest_one_that_works(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError) as caught:
        api.info("tiny", size)
    near = str(caught.value).rpartition("; try ")[2].split("x")
    api.info("tiny", (int(near[0]), int(near[1])))


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_json_values(family: str) -> None:
    document = api.info(FAMILIES[family][1][0])
    assert json.loads(json.dumps(document, allow_nan=False)) == document  # no tuple among them


def test_options_are_those_asked_for() -> None:
    assert api.info("crossformer_t")["options"] == {"lda_mode": "new", "group_size": None, "interval": None}
    document = api.info("crossformer_t", options={"group_size": "7,7,7,7", "interval": [8, 4, 2, 1]})
    assert document["options"] == {"lda_mode": "new", "group_size": [7, 7, 7, 7], "interval": [8, 4, 2, 1]}


# ---- the paper's figures


def test_the_gap_is_ours_over_the_paper_s_in_percent() -> None:
    document = api.info("crossformer_t")
    assert document["paper"] == {"parameters": "27.8M", "flops": "2.9G", "imagenet_top1_percent": 81.5}
    assert document["gaps"]["parameters"] == pytest.approx((27_776_794 - 27.8e6) / 27.8e6 * 100)
    assert document["gaps"]["macs"] == pytest.approx((2_857_427_552 - 2.9e9) / 2.9e9 * 100)


def test_what_is_not_the_paper_s_network_is_not_compared() -> None:
    published, other_size = api.info("swin_t"), api.info("swin_t", (64, 64))
    assert other_size["gaps"] == {"parameters": published["gaps"]["parameters"], "macs": None}
    assert api.info("swin_t", options={"window_size": 7})["gaps"] == published["gaps"]
    assert api.info("swin_t", options={"window_size": 8})["gaps"] == {"parameters": None, "macs": None}


def test_a_paper_without_a_figure_has_no_gap() -> None:
    assert api.info("deit_tiny")["gaps"]["macs"] is None
    assert api.info("mobileformer_26m")["gaps"]["parameters"] is None


def test_figures_of_another_number_of_classes_are_noted() -> None:
    document = api.info("vit_lsla")
    assert document["gaps"]["parameters"] > 3
    assert any("100 or 102 classes" in note for note in document["notes"])


@pytest.mark.parametrize("name", model_names())
def test_every_figure_of_every_card_can_be_read(name: str) -> None:
    card = model_card(name)
    assert [key for key, printed in card.paper.items() if paper.figure(printed) is None] == []
    close = paper.gaps(card.paper, card.parameters, card.macs)
    assert all(gap is None or abs(gap) < 30 for gap in close.values())  # vit_lsla_swin is known to be 27 % larger


@pytest.mark.parametrize(
    ("printed", "number"),
    [("27.8M", 27.8e6), ("4.9G", 4.9e9), ("4.9 g", 4.9e9), (" 508M ", 508e6), ("1.2B", 1.2e9), ("12K", 12e3),
     ("1T", 1e12), ("3,232,788", 3_232_788), ("0.5", 0.5), (81.2, 81.2), (7, 7)],
)  # fmt: skip
def test_a_printed_figure_is_read(printed: Any, number: float) -> None:
    assert paper.figure(printed) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("printed", ["", "M", "about 5M", "27.8MB", "1.2.3G", "1,2M", "-5M", "4.9G at 224", "nan"])
def test_what_is_no_figure_is_none(printed: str) -> None:
    assert paper.figure(printed) is None
    assert paper.gap_percent(5, printed) is None


def test_a_gap_needs_a_figure_above_zero() -> None:
    assert paper.gap_percent(5, None) is None
    assert paper.gap_percent(5, 0) is None
    assert paper.gap_percent(5, 4) == 25


# ---- doctor


def test_the_doctor_finds_this_machine_well() -> None:
    document = api.doctor()
    assert document["ok"] is True
    rows = [*(("target", name) for name in registry.TARGETS), *(("runtime", name) for name in registry.RUNTIMES)]
    assert [(c["kind"], c["name"]) for c in document["checks"]] == [row for row in rows if row != ("runtime", "fake")]
    json.dumps(document, allow_nan=False)


def test_the_doctor_does_not_mind_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"kind": "runtime", "name": "x", "ok": False, "problem": "runtime x needs x"}
    monkeypatch.setattr(registry, "check_all", lambda: [{**lacking, "optional": True}])
    assert api.doctor()["ok"] is True
    monkeypatch.setattr(registry, "check_all", lambda: [{**lacking, "optional": False}])
    assert api.doctor()["ok"] is False


def test_the_doctor_says_what_is_missing_and_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "edgevit.runtimes.ort", raising=False)
    document = api.doctor()
    (broken,) = (c for c in document["checks"] if not c["ok"])
    assert document["ok"] is False
    assert broken["problem"] == "runtime ort needs onnxruntime, which is not installed: pip install edgevit"


@pytest.mark.parametrize("error", [OSError("libfoo.so: cannot open"), RuntimeError(""), SystemError("two\nlines")])
def test_the_doctor_survives_a_package_that_breaks_on_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise error

    monkeypatch.setitem(sys.modules, "broken_runtime", Broken("broken_runtime"))
    monkeypatch.setitem(registry.RUNTIMES, "broken", registry.Row("broken_runtime", "Runtime"))
    (broken,) = (c for c in api.doctor()["checks"] if not c["ok"])
    assert broken["problem"] and "\n" not in broken["problem"]
