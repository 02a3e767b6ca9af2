"""Accuracy, size, parameters and MACs of two manifests: exact figures, exact limits, and nothing believed unchecked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgevit.bench.accuracy import drop_points
from edgevit.bench.budget import Limits, check_manifests, counted, gated_part
from edgevit.errors import UsageError
from edgevit.specs import Check

DIGEST = "ab" * 32
WHATS = ("accuracy", "size", "parameters", "macs")


def record(right: list[int], pictures: int = 20, digest: str = DIGEST, size: tuple[int, int] = (64, 64)) -> Any:
    """The accuracy of a classifier that was right on these pictures."""
    hits = np.zeros(pictures, np.bool_)
    hits[right] = True
    return {
        "image_size": list(size),
        "data": {
            "source": "val",
            "kind": "class folders",
            "sha256": digest,
            "pictures": pictures,
            "limit": None,
            "seed": None,
        },
        "top1": {"hits": len(right), "total": pictures},
        "top5": None,
        "hits": np.packbits(hits).tobytes().hex(),
        "runtime": "ort",
        "edgevit": "0.1.0",
    }


def manifest(
    size: Any = 1000, parameters: Any = 500, macs: Any = 9000, accuracy: list[Any] | None = None, **other: Any
) -> dict[str, Any]:
    files = [{"name": "model.onnx", "bytes": size}, {"name": "sample/input.npy", "bytes": 77}]
    complexity = {"parameters": parameters, "macs": macs, "unknown": {}}
    return {
        "files": files,
        "complexity": complexity,
        "image": {"size": [64, 64]},
        "batch": 1,
        **({} if accuracy is None else {"accuracy": accuracy}),
        **other,
    }


def checked(baseline: Any, candidate: Any, **limits: float) -> dict[str, Check]:
    checks = check_manifests(baseline, candidate, Limits(**limits))
    assert tuple(check.what for check in checks) == WHATS
    return {check.what: check for check in checks}


# ---- exact figures


def test_the_same_manifest_passes_and_its_samples_do_not_count() -> None:
    checks = checked(manifest(), manifest())
    assert checks["size"] == Check("size", "pass", "bytes", 1000, 1000, 0.0, 0.01)
    assert checks["parameters"] == Check("parameters", "pass", "parameters", 500, 500, 0.0, 0.0)
    assert checks["macs"] == Check("macs", "pass", "MACs", 9000, 9000, 0.0, 0.0)


@pytest.mark.parametrize(
    ("after", "limit", "verdict"),
    [
        (1010, 0.01, "pass"),  # in floating point 1010 / 1000 - 1 is more than 0.01
        (1011, 0.01, "regression"),
        (1030, 0.03, "pass"),  # the float 0.03 is less than three hundredths
        (1001, 0.0, "regression"),
        (1000, 0.0, "pass"),
        (2000, 1, "pass"),
        (2001, 1.0, "regression"),
        (0, 0.0, "pass"),
        (1000 + 1, 1e-3, "pass"),
    ],
)
def test_a_limit_is_reached_and_not_crossed_by_what_equals_it(after: int, limit: float, verdict: str) -> None:
    assert checked(manifest(), manifest(size=after), max_size=limit)["size"].verdict == verdict


def test_one_parameter_more_among_a_billion_is_seen() -> None:
    check = checked(manifest(parameters=10**18), manifest(parameters=10**18 + 1))["parameters"]
    assert (check.verdict, check.worse) == ("regression", 1e-18)


def test_worse_is_relative_and_negative_where_it_is_better() -> None:
    checks = checked(manifest(), manifest(size=500, macs=13_500), max_macs=0.5)
    assert (checks["size"].worse, checks["macs"].worse, checks["macs"].verdict) == (-0.5, 0.5, "pass")


def test_something_where_there_was_nothing_is_a_regression_without_a_share() -> None:
    checks = checked(manifest(macs=0), manifest(macs=1))
    assert checks["macs"] == Check("macs", "regression", "MACs", 0, 1, None, 0.0, detail="the baseline has none")
    assert checked(manifest(macs=0), manifest(macs=0))["macs"].verdict == "pass"


def test_each_figure_has_its_own_limit() -> None:
    worse = manifest(size=1100, parameters=550, macs=9900)
    for limit, passing in (("max_size", "size"), ("max_parameters", "parameters"), ("max_macs", "macs")):
        checks = checked(manifest(), worse, **{limit: 0.1})
        assert [what for what in WHATS[1:] if checks[what].verdict == "pass"] == [passing]


# ---- multiply-adds that are not known


def test_macs_that_are_a_lower_bound_are_not_gated_unless_they_are_too_many_already() -> None:
    unknown = {"parameters": 500, "macs": 9000, "unknown": {"Custom": 2}}
    check = checked(manifest(), manifest(complexity=unknown))["macs"]
    assert check.verdict == "not gated"
    assert check.detail == "the candidate has at least so many: nobody counts its Custom"
    assert checked(manifest(complexity=unknown), manifest())["macs"].verdict == "not gated"
    more = {**unknown, "macs": 9001}
    assert checked(manifest(), manifest(complexity=more))["macs"].verdict == "regression"
    assert checked(manifest(complexity=unknown), manifest(complexity=more))["macs"].verdict == "not gated"


def test_passes_of_other_batches_are_not_compared_and_a_dynamic_one_is_of_one() -> None:
    check = checked(manifest(), manifest(batch=4))["macs"]
    assert (check.verdict, check.detail) == (
        "not gated",
        "one pass is of 1 pictures in the baseline, of 4 in the candidate; export both for one batch",
    )
    assert checked(manifest(), manifest(batch="dynamic"))["macs"].verdict == "pass"


# ---- accuracy


def test_the_drop_on_the_same_pictures_is_exact_and_its_interval_is_paired() -> None:
    before, after = list(range(15)), list(range(2, 16))
    check = checked(manifest(accuracy=[record(before)]), manifest(accuracy=[record(after)]), max_drop_points=4)[
        "accuracy"
    ]
    hits = [np.isin(np.arange(20), right) for right in (before, after)]
    drop = drop_points(*hits)
    assert check == Check(
        "accuracy", "regression", "%", 75.0, 70.0, 5.0, 4, drop.low, drop.high, "top-1 of the same 20 pictures of val"
    )


@pytest.mark.parametrize(("lost", "verdict"), [(0, "pass"), (1, "pass"), (2, "regression")])
def test_the_drop_s_limit_is_exact_too(lost: int, verdict: str) -> None:
    before, after = record(list(range(800)), 1000), record(list(range(lost, 800)), 1000)
    limits = {"max_drop_points": 0.1}  # one picture of a thousand
    assert checked(manifest(accuracy=[before]), manifest(accuracy=[after]), **limits)["accuracy"].verdict == verdict


def test_a_gain_is_a_negative_loss() -> None:
    check = checked(manifest(accuracy=[record([1])]), manifest(accuracy=[record([1, 2])]))["accuracy"]
    assert (check.verdict, check.worse) == ("pass", -5.0)


def test_which_pictures_were_right_counts_and_not_only_how_many() -> None:
    same = checked(manifest(accuracy=[record([1, 2])]), manifest(accuracy=[record([1, 2])]))["accuracy"]
    other = checked(manifest(accuracy=[record([1, 2])]), manifest(accuracy=[record([3, 4])]))["accuracy"]
    assert same.worse == other.worse == 0.0
    assert same.high is not None and other.high is not None and same.high < other.high


def test_two_runtimes_are_named() -> None:
    other = {**record([1]), "runtime": "ov"}
    check = checked(manifest(accuracy=[record([1])]), manifest(accuracy=[other]))["accuracy"]
    assert check.detail == "top-1 of the same 20 pictures of val, by ort and by ov"


RUN = "run: edgevit evaluate"


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (None, None, f"neither has one; {RUN} ARTIFACT --data DIR --record for both"),
        ([], None, f"neither has one; {RUN} ARTIFACT --data DIR --record for both"),
        (
            [record([1])],
            None,
            f"the baseline has one, of 20 pictures of val, the candidate none; {RUN} CANDIDATE --data DIR --record",
        ),
        (
            None,
            [record([1])],
            f"the candidate has one, of 20 pictures of val, the baseline none; {RUN} BASELINE --data DIR --record",
        ),
        (
            [record([1])],
            [record([1], size=(32, 32))],
            "the baseline has one, of 20 pictures of val, the candidate none at 64x64; "
            f"{RUN} CANDIDATE --data DIR --record",
        ),
        (
            [record([1])],
            [record([1], pictures=9, digest="cd" * 32)],
            "recorded on other pictures, the baseline of 20 pictures of val, the candidate of 9 pictures of val; "
            f"{RUN} ARTIFACT --data DIR --record both on the same, with the same --limit",
        ),
    ],
)
def test_accuracy_that_cannot_be_compared_is_not_gated_and_says_why(before: Any, after: Any, why: str) -> None:
    check = checked(manifest(accuracy=before), manifest(accuracy=after))["accuracy"]
    assert (check.verdict, check.detail) == ("not gated", why)
    assert (check.baseline, check.candidate, check.worse) == (None, None, None)


def test_the_limit_of_the_record_is_repeated_in_what_to_type() -> None:
    limited = record([1])
    limited["data"].update(limit=20, seed=0)
    check = checked(manifest(accuracy=[limited]), manifest())["accuracy"]
    assert check.detail.endswith("edgevit evaluate CANDIDATE --data DIR --record --limit 20")


def test_each_set_of_pictures_that_both_recorded_is_a_check() -> None:
    others = ["cd" * 32, "ef" * 32]
    before = manifest(accuracy=[record([1, 2]), record([1], digest=others[0]), record([1], digest=others[1])])
    after = manifest(accuracy=[record([1], digest=others[0]), record([1])])
    checks = check_manifests(before, after, Limits())
    assert [(check.what, check.worse) for check in checks[:2]] == [("accuracy", 5.0), ("accuracy", 0.0)]
    assert len(checks) == 5


def test_each_side_is_seen_at_its_own_image_size() -> None:
    before = manifest(accuracy=[record([1, 2]), record([1], size=(96, 96))])
    after = manifest(accuracy=[record([1, 2]), record([1], size=(96, 96))], image={"size": (96, 96)})
    check = checked(before, after)["accuracy"]
    assert (check.baseline, check.candidate, check.verdict) == (10.0, 5.0, "regression")


# ---- what is not believed

NO_COUNT: list[Any] = [None, -1, 1.5, "7", True, float("nan"), float("inf"), 1 << 63, [], {}]


@pytest.mark.parametrize("value", NO_COUNT)
def test_what_is_no_count_is_not_gated(value: Any) -> None:
    for what in ("size", "parameters", "macs"):
        check = checked(manifest(), manifest(**{what: value}))[what]
        assert check.verdict == "not gated"
        assert check.detail == "not in the manifest of the candidate; export again"
    both = checked(manifest(size=value), manifest(size=value))["size"]
    assert both.detail == "not in the manifest of the baseline and of the candidate; export again"


@pytest.mark.parametrize(
    "hostile",
    [
        {},
        {"files": None, "complexity": None, "image": None, "accuracy": None, "batch": None},
        {"files": [1, None, {"name": 3}], "complexity": [], "image": {"size": 3}, "accuracy": {}},
        {"files": [], "complexity": {"macs": {}}, "image": {"size": [[]]}, "accuracy": [1]},
        {"files": [{"name": "a"}], "complexity": {"unknown": 3, "macs": 1}, "image": [], "accuracy": "x"},
        {"files": {"name": "sample/"}, "batch": {"a": []}, "image": {"size": [None, {}]}},
    ],
)
def test_a_manifest_of_nonsense_gates_nothing_and_breaks_nothing(hostile: dict[str, Any]) -> None:
    for pair in ((hostile, hostile), (hostile, manifest()), (manifest(), hostile), (hostile, gated_part(hostile))):
        checks = checked(*pair)
        assert checks["accuracy"].verdict == checks["size"].verdict == checks["parameters"].verdict == "not gated"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(target: dict[str, Any]) -> None:
        *inside, last = path.split(".")
        for key in inside:
            target = target[key]
        target[last] = value

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        change("hits", "ff" * 3),  # more than top1 says
        change("hits", "40000"),
        change("hits", "zz0000"),
        change("hits", "000001"),  # behind the last picture
        change("hits", "4000001"),
        change("hits", None),
        change("top1.hits", 2),
        change("top1.hits", 1.0),
        change("top1.total", 19),
        change("top1", None),
        change("top5", {"hits": 21, "total": 20}),
        change("data.sha256", "no digest"),
        change("data.pictures", 0),
        change("data.pictures", 10**9),
        change("data.source", 3),
        change("image_size", [64]),
        change("image_size", [64, -64]),
        change("runtime", None),
    ],
)
def test_an_accuracy_that_contradicts_itself_counts_as_none(spoil: Callable[[dict[str, Any]], None]) -> None:
    good, bad = record([1]), record([1])
    spoil(bad)
    check = checked(manifest(accuracy=[good]), manifest(accuracy=[bad]))["accuracy"]
    assert check.verdict == "not gated"
    assert "the candidate none" in check.detail


def test_long_names_are_cut() -> None:
    long = record([1])
    long["data"]["source"] = "v" * 5000
    check = checked(manifest(accuracy=[long]), manifest())["accuracy"]
    assert len(check.detail) < 300


# ---- limits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_slowdown", 5),
        ("max_slowdown", -0.01),
        ("max_size", float("nan")),
        ("max_size", float("inf")),
        ("max_macs", "5%"),
        ("max_macs", True),
        ("max_parameters", None),
        ("max_drop_points", 101),
        ("max_drop_points", -1),
    ],
)
def test_what_is_no_limit_is_refused_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} .*: expected a number from 0 to "):
        Limits(**{name: value})


def test_a_share_is_not_taken_for_per_cent() -> None:
    with pytest.raises(UsageError) as caught:
        Limits(max_slowdown=5)
    assert str(caught.value) == "max_slowdown 5: expected a number from 0 to 1, e.g. 0.05 for 5 %"


def test_a_limit_of_numpy_is_a_limit() -> None:
    assert checked(manifest(), manifest(size=1010), max_size=np.float64(0.01))["size"].verdict == "pass"


# ---- for the store


def test_the_part_that_is_stored_gates_as_the_manifest_does() -> None:
    whole = manifest(accuracy=[record([1, 2])], weights={"source": "secret"}, command="edgevit export")
    part = json.loads(json.dumps(gated_part(whole)))
    candidate = manifest(size=1500, accuracy=[record([1])])
    assert check_manifests(part, candidate, Limits()) == check_manifests(whole, candidate, Limits())
    assert sorted(part) == ["accuracy", "batch", "complexity", "files", "image"]


def test_one_figure_can_be_asked_for() -> None:
    assert [counted(manifest(), what) for what in ("size", "parameters", "macs")] == [1000, 500, 9000]
    assert counted({}, "size") is None
