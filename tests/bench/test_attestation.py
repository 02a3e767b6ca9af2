"""Which share of the products ran in which precision: counted, judged, told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgevit.bench.attestation import attest, with_macs
from edgevit.specs import OperatorTime


def ran(name: str, precision: str, macs: int | None, time_ms: float = 1.0, **more: Any) -> OperatorTime:
    return OperatorTime(name, more.get("kind", "Conv"), precision, time_ms, more.get("origins", (name,)), macs)


def test_all_as_asked() -> None:
    found = attest([ran("a", "bf16", 60), ran("b", "bf16", 40), ran("norm", "fp32", 0, kind="MVN")], "bf16", 100)
    assert found.as_asked is True
    assert found.coverage == 1.0
    assert found.others == ()
    assert found.verdict == "products ran 100.0% in bf16; asked for bf16"
    assert [(s.precision, s.operators, s.macs_share) for s in found.by_precision] == [
        ("bf16", 2, 1.0),
        ("fp32", 1, 0.0),
    ]


@pytest.mark.parametrize(("asked", "real"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "int8")])
def test_another_precision_is_noticed_whether_lower_or_higher(asked: str, real: str) -> None:
    found = attest([ran("a", asked, 98), ran("b", real, 2)], asked, 100)
    assert found.as_asked is False
    assert [o.name for o in found.others] == ["b"]
    assert found.verdict == f"products ran 98.0% in {asked}, 2.0% in {real}; asked for {asked}; beside: b in {real}"


def test_a_hundredth_may_run_in_another() -> None:
    assert attest([ran("a", "bf16", 99), ran("b", "fp32", 1)], "bf16", 100).as_asked is True
    assert attest([ran("a", "bf16", 989), ran("b", "fp32", 11)], "bf16", 1000).as_asked is False


def test_what_was_declared_may_run_in_float32_and_in_nothing_else() -> None:
    fused = ran("fused", "fp32", 50, origins=("head", "bias"))
    assert attest([ran("a", "fp16", 50), fused], "fp16", 100, {"head"}).as_asked is True
    assert attest([ran("a", "fp16", 50), fused], "fp16", 100, {"tail"}).as_asked is False
    assert attest([ran("a", "fp16", 50), ran("head", "bf16", 50)], "fp16", 100, {"head"}).as_asked is False


@pytest.mark.parametrize("kept", ["fp32", "fp16", "bf16"])
def test_a_product_that_int8_leaves_out_may_run_in_any_float_type(kept: str) -> None:
    operators = [ran("a", "int8", 60), ran("softmax", kept, 40)]
    assert attest(operators, "int8", 100, {"softmax"}).as_asked is True
    undeclared = attest(operators, "int8", 100)
    assert undeclared.as_asked is False
    assert undeclared.others_share == 0.4
    assert f"beside: softmax in {kept}" in undeclared.verdict


def test_of_other_precisions_no_other_float_type_is_meant() -> None:
    for asked, real in (("fp16", "bf16"), ("bf16", "fp16"), ("fp32", "fp16")):
        assert attest([ran("a", asked, 60), ran("b", real, 40)], asked, 100, {"b"}).as_asked is False


@pytest.mark.parametrize("real", ["fp32", "fp16", "bf16", "unknown"])
def test_int8_without_an_integer_product_is_refused_whatever_was_declared(real: str) -> None:
    operators = [ran("a", real, 100), ran("add", "int8", 0, kind="QLinearAdd"), ran("q", "int8", None)]
    assert attest(operators, "int8", 100, {"a"}).as_asked is False
    assert attest([ran("a", "fp32", 100)], "fp16", 100, {"a"}).as_asked is True  # the rule is int8's alone


@pytest.mark.parametrize("macs", [98, 102, 0])
def test_what_is_not_covered_is_not_attested(macs: int) -> None:
    found = attest([ran("a", "fp32", macs)], "fp32", 100)
    assert found.as_asked is None
    assert found.coverage == macs / 100
    assert found.verdict.startswith("not attested: ")


@pytest.mark.parametrize("operators", [[], [ran("norm", "fp32", 0)], [ran("norm", "fp32", None)]])
def test_nothing_to_judge(operators: list[OperatorTime]) -> None:
    for total in (None, 0, 100):
        found = attest(operators, "fp32", total)
        assert found.as_asked is None
        assert found.verdict.startswith("not attested: none of the products found")


def test_without_the_graphs_own_count_what_was_found_is_judged() -> None:
    found = attest([ran("a", "fp32", 7)], "fp32", None)
    assert (found.as_asked, found.coverage) == (True, None)


def test_many_others_are_counted_and_the_costliest_named() -> None:
    operators = [ran(f"n{i}", "fp32", 10 + i) for i in range(20)]
    verdict = attest(operators, "bf16", None).verdict
    assert "beside: n19 in fp32, n18 in fp32" in verdict
    assert verdict.endswith(" and 12 more")


def test_times_and_products_are_summed_by_kind() -> None:
    operators = [
        ran("a", "fp32", 10, 3.0),
        ran("b", "fp32", 20, 1.0),
        ran("c", "bf16", 70, 4.0),
        ran("s", "fp32", 0, 2.0, kind="Softmax"),
    ]
    found = attest(operators, "fp32", 100)
    rows = [(r.kind, r.precision, r.count, r.macs, r.time_ms, r.time_share) for r in found.by_kind]
    assert rows == [
        ("Conv", "bf16", 1, 70, 4.0, 0.4),
        ("Conv", "fp32", 2, 30, 4.0, 0.4),
        ("Softmax", "fp32", 1, 0, 2.0, 0.2),
    ]
    assert sum(r.macs_share or 0 for r in found.by_precision) == pytest.approx(1)


def test_without_times_the_shares_of_time_are_unknown() -> None:
    found = attest([ran("a", "fp32", 1, 0.0)], "fp32", 1)
    assert {row.time_share for row in (*found.by_kind, *found.by_precision)} == {None}


def test_a_node_that_ran_as_several_operators_counts_once() -> None:
    halves = [ran("x1", "fp32", None, origins=("x", "bias")), ran("x2", "fp32", None, origins=("x",))]
    found = with_macs([*halves, ran("y", "fp32", None, origins=("unheard-of",))], {"x": 5, "z": 9})
    assert [o.macs for o in found] == [5, 0, 0]


def test_the_record_is_json() -> None:
    record = attest([ran("a", "fp32", 1)], "fp32", 1).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record) == {"asked", "coverage", "by_precision", "as_asked", "verdict"}
