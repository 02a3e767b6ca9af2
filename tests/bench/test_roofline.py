"""Limits against figures worked out by hand, probes against what they claim, sentences word for word."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from edgevit.bench import advice, probes
from edgevit.bench.complexity import Moved, NodeCost, count_onnx
from edgevit.bench.roofline import Limit, Loss, Peaks, Work, limit_ms, limit_of, losses, works
from edgevit.specs import OperatorTime

MB = 10**6
PEAKS = Peaks("ort", 1, {"fp32": 100e9, "int8": 400e9}, ((1 * MB, 50e9), (10 * MB, 10e9)), {"bf16": "it has none"})


def tensor(name: str, elements: int, bits: int = 32, *, stored: bool = False) -> Moved:
    return Moved(name, elements, bits, stored)


def loss(**changed: Any) -> Loss:
    """A row of 10 products that took 2 ms and could take 1."""
    fields: dict[str, Any] = {
        "kind": "Conv", "precision": "fp32", "count": 10, "macs": 50 * MB, "weight_bytes": 4e6, "activation_bytes": 1e6,
        "time_ms": 2.0, "limit_ms": 1.0, "share": 0.5, "lost_ms": 1.0, "bound_by": "compute",
    }  # fmt: skip
    return Loss(**{**fields, **changed})


# Peaks


def test_the_bandwidth_of_a_working_set_is_that_of_the_next_smaller_one_measured() -> None:
    assert [PEAKS.bandwidth_at(size) for size in (0, 999, 1 * MB, 9 * MB, 10 * MB, 10**12)] == [
        50e9, 50e9, 50e9, 50e9, 10e9, 10e9,
    ]  # fmt: skip


def test_a_smaller_set_is_never_slower_than_a_larger_one() -> None:
    disturbed = Peaks("ov", 1, {}, ((1, 5e9), (2, 30e9), (3, 20e9)))
    assert [disturbed.bandwidth_at(size) for size in (1, 2, 3)] == [30e9, 30e9, 20e9]
    assert Peaks("ov", 1, {}, ()).bandwidth_at(1) is None


def test_two_measurements_merge_into_the_higher_one() -> None:
    other = Peaks("ort", 1, {"fp32": 90e9, "bf16": 200e9}, ((1 * MB, 60e9), (20 * MB, 5e9)), unsteady=2.0)
    both = PEAKS.merged(other)
    assert both.flops_per_s == {"fp32": 100e9, "int8": 400e9, "bf16": 200e9}
    assert both.bandwidth == ((1 * MB, 60e9), (10 * MB, 10e9), (20 * MB, 5e9))
    assert both.absent == {} and both.unsteady == 1.0


@pytest.mark.parametrize("other", [Peaks("ov", 1, {}, ()), Peaks("ort", 2, {}, ())])
def test_measurements_of_other_things_do_not_merge(other: Peaks) -> None:
    with pytest.raises(ValueError, match="peaks of ort, 1 threads"):
        PEAKS.merged(other)


def test_the_record_of_peaks_is_json_and_has_no_zero_for_what_is_absent() -> None:
    record = json.loads(json.dumps(PEAKS.record(), allow_nan=False))
    assert "bf16" not in record["flops_per_s"] and record["absent"] == {"bf16": "it has none"}
    assert record["bandwidth"][0] == {"working_set_bytes": MB, "bytes_per_s": 50e9}


# Limits


@pytest.mark.parametrize(
    ("work", "expected", "bound"),
    [
        (Work("Conv", "fp32", 50 * MB, 0.0, 1000.0), Limit(1.0, 0.00002), "compute"),
        (Work("Conv", "int8", 50 * MB, 0.0, 1000.0), Limit(0.25, 0.00002), "compute"),
        (Work("Gemm", "fp32", 5 * MB, 20e6, 0.0), Limit(0.1, 2.0), "memory"),  # weights at the network's bandwidth
        (Work("Add", "fp32", 0, 0.0, 1000.0), Limit(0.0, 0.00002), "memory"),  # activations at that of their size
        (Work("Add", "fp32", 0, 0.0, 20e6), Limit(0.0, 2.0), "memory"),
        (Work("Conv", "bf16", 50 * MB, 0.0, 1000.0), Limit(None, 0.00002), None),  # no peak: a bound by moving alone
        (Work("Conv", "fp32", 50 * MB, None, None), Limit(1.0, None), None),
        (Work("MVN", "fp32", 0, None, None), Limit(None, None), None),
        (Work("Reshape", "fp32", 0, 0.0, 0.0), Limit(0.0, 0.0), None),
    ],
)
def test_a_limit_is_the_longer_of_computing_and_moving(work: Work, expected: Limit, bound: str | None) -> None:
    found = limit_of(work, PEAKS, 10 * MB)
    assert found.compute_ms == pytest.approx(expected.compute_ms)
    assert found.memory_ms == pytest.approx(expected.memory_ms)
    assert found.bound_by == bound
    known = [value for value in (found.compute_ms, found.memory_ms) if value is not None]
    assert found.ms == (max(known) if known else None)


def test_the_limit_of_a_network_is_the_sum_over_its_products() -> None:
    found = [
        Work("Conv", "fp32", 50 * MB, 0.0, 1000.0),
        Work("Gemm", "fp32", 5 * MB, 20e6, 0.0),
        Work("Add", "fp32", 0, 0.0, 20e6),
    ]
    total_ms, bound_by = limit_ms(found, PEAKS, 10 * MB)
    assert total_ms == pytest.approx(3.0) and bound_by == "memory"  # the Add is left out
    assert limit_ms([], PEAKS, 0) == (None, None)
    assert limit_ms([Work("Conv", "bf16", 5, None, None)], PEAKS, 0) == (None, None)


def test_losses_are_by_kind_and_precision_the_largest_first() -> None:
    found = [
        Work("Conv", "fp32", 50 * MB, 0.0, 0.0, 1.5),
        Work("Conv", "int8", 50 * MB, 0.0, 0.0, 5.0),
        Work("Conv", "fp32", 50 * MB, 0.0, 0.0, 1.5),
        Work("MVN", "fp32", 0, None, None, 2.0),
    ]
    rows = losses(found, PEAKS, 0)
    assert [(row.kind, row.precision, row.count, row.lost_ms) for row in rows] == [
        ("Conv", "int8", 1, 4.75), ("MVN", "fp32", 1, 2.0), ("Conv", "fp32", 2, 1.0),
    ]  # fmt: skip
    assert (rows[1].limit_ms, rows[1].share, rows[2].share) == (None, None, pytest.approx(2 / 3))


def test_what_was_not_timed_has_limits_and_no_losses() -> None:
    (row,) = losses([Work("Conv", "fp32", 50 * MB, 0.0, 0.0)], PEAKS, 0)
    assert (row.limit_ms, row.time_ms, row.share, row.lost_ms) == (1.0, None, None, None)
    assert advice.told([row], PEAKS, 1.0) == []


# What executed operators move

COSTS = {
    "fc": NodeCost(100, (tensor("x", 10), tensor("w", 100, stored=True)), (tensor("a", 10),)),
    "relu": NodeCost(0, (tensor("a", 10),), (tensor("b", 10),)),
    "next": NodeCost(50, (tensor("b", 10), tensor("w", 100, stored=True)), (tensor("c", 5),)),
    "skip": NodeCost(0, (tensor("a", 10), tensor("c", 5)), (tensor("d", 10),)),
}


def moved(*origins: str, precision: str = "fp32", kind: str = "Gemm") -> tuple[float | None, float | None]:
    (work,) = works([OperatorTime("one", kind, precision, 1.0, origins)], COSTS, timed=True)
    return work.weight_bytes, work.activation_bytes


def test_what_only_a_fused_operators_own_nodes_read_is_not_moved() -> None:
    assert moved("relu") == (0, 80)
    assert moved("relu", "next") == (400, 40 + 20)  # "b" stays inside
    assert moved("fc", "relu") == (400, 40 + 40 + 40)  # "a" is read by another operator as well
    assert moved("fc", "fc", "next") == (400, 40 + 40 + 40 + 20)  # one weight is read once


def test_a_run_in_half_precision_moves_half_the_bytes_of_a_float32_file() -> None:
    assert moved("fc", precision="bf16") == (200, 40)
    assert moved("fc", precision="int8") == (400, 80)  # what is int8 is so in the file


def test_what_the_runtime_added_moves_nothing_that_must_be_and_what_is_unnamed_is_not_known() -> None:
    assert moved(kind="Reorder") == (0, 0)
    assert moved("another name") == (None, None)
    (work,) = works([OperatorTime("one", "Gemm", "fp32", 1.0, ("fc",), 7)], None, timed=False)
    assert work == Work("Gemm", "fp32", 7, None, None, None)


# Probes


@pytest.mark.parametrize("precision", sorted(probes.LAYERS))
def test_a_probe_of_products_has_the_operations_that_it_claims(precision: str) -> None:
    probe = probes.product_probe(precision)
    onnx.checker.check_model(probe.model, full_check=True)
    assert count_onnx(probe.model).flops == probe.flops > 3e9
    assert not count_onnx(probe.model).unknown


@pytest.mark.parametrize("size", [0, 1, 4, 1 << 18, 1 << 20, 1 << 23, 1 << 40])
def test_a_probe_of_streaming_reads_its_matrix_again_and_again(size: int) -> None:
    probe = probes.stream_probe(size)
    onnx.checker.check_model(probe.model)
    assert count_onnx(probe.model).weight_bytes == probe.set_bytes <= max(4, min(size, probes.MAX_STREAM))
    assert 4 * count_onnx(probe.model).macs == probe.read_bytes
    assert probe.shape[1] ** 2 * 4 == probe.set_bytes


def test_the_best_time_is_found_by_turns_and_a_first_round_is_dropped(make_stage: Callable[[], Any]) -> None:
    stage = make_stage()
    first = stage.contestant("a", [900.0, 3.0, 2.0, 9.0, 2.5, 3.0])
    second = stage.contestant("b", [500.0, 7.0, 7.0, 7.0, 7.0, 7.0])
    found = probes.best_times([first.run, second.run], budget_s=0.0, clock=stage.clock)
    assert [(round(t.best_s, 6), round(t.median_s, 6)) for t in found] == [(0.002, 0.003), (0.007, 0.007)]
    assert stage.log == ["a", "b"] * 6


def test_the_search_ends_with_its_budget(make_stage: Callable[[], Any]) -> None:
    stage = make_stage()
    probes.best_times([stage.contestant("a", 10.0).run], budget_s=0.095, clock=stage.clock)
    assert len(stage.log) == 11
    assert probes.best_times([], budget_s=1.0, clock=stage.clock) == []


# Sentences


def test_the_three_largest_losses_are_told_with_cause_and_next_step() -> None:
    rows = [
        loss(kind="Softmax", macs=0, count=1, limit_ms=0.01, share=0.005, lost_ms=1.99, bound_by="memory"),
        loss(),
        loss(kind="Reorder", macs=0, count=3, limit_ms=0.0, share=0.0, lost_ms=2.0, bound_by=None),
        loss(kind="MatMul", lost_ms=0.5),
    ]
    assert advice.told(rows, PEAKS, 10.0) == [
        "Reorder in fp32: 3 operators, 2.00 of 10.0 ms, none of it needed for what the network computes: 2.00 ms lost. "
        "Likely they move values and compute nothing: layouts or types differ between neighbours. Next: `edgevit lint` "
        "names those that are in the file; the others the runtime added: try another with --runtime.",
        "Softmax in fp32: 1 operator, 2.00 of 10.0 ms against a limit of 0.0100 ms by memory (under 1%): 1.99 ms lost. "
        "Likely exponentials cost many instructions for each value, which a limit by moved bytes does not count.",
        "Conv in fp32: 10 operators, 2.00 of 10.0 ms against a limit of 1.00 ms by arithmetic (50%): 1.00 ms lost. "
        "Likely few channels, rows or groups leave vector units idle. Next: int8 has 4.0 times this peak here: export "
        "with --precision int8.",
    ]


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({"share": 0.8}, "Little is left to gain in this precision. Next: int8 has 4.0 times this peak here"),
        ({"share": 0.8, "bound_by": "memory"}, "Next: store the weights narrower (int8, fp16)"),
        ({"count": 1000}, "Likely they are too small to reach a limit: 50,000 multiply-accumulates each."),
        ({"bound_by": "memory"}, "Likely 4.0 MB of weights stream past for a few rows each. Next: store the weights"),
        ({"bound_by": "memory", "weight_bytes": 1e5}, "few operations for each value moved, as in depthwise"),
        ({"bound_by": None}, "Not all that they move is known, so their limit may be higher."),
        (
            {"bound_by": "memory", "weight_bytes": None},
            "Not all that they move is known, so their limit may be higher. Next: int8 has",
        ),
        ({"precision": "int8"}, "leave vector units idle. Next: try another runtime with --runtime."),
        ({"limit_ms": None, "share": None}, "2.00 of 10.0 ms, no limit known: 1.00 ms lost."),
        ({"macs": 0, "kind": "Odd"}, "against a limit of 1.00 ms by arithmetic (50%): 1.00 ms lost."),
    ],
)
def test_each_cause_has_its_sentence(changed: dict[str, Any], end: str) -> None:
    (sentence,) = advice.told([loss(**changed)], PEAKS, 10.0)
    assert end in sentence


def test_a_network_that_is_int8_elsewhere_is_not_told_to_become_int8() -> None:
    sentence, _ = advice.told([loss(), loss(precision="int8", lost_ms=0.1)], PEAKS, 10.0)
    assert sentence.endswith("Next: the manifest says why they are not in int8 as others are (kept_float).")


def test_the_summary_says_what_is_known() -> None:
    assert advice.summary(2.5, "memory", 10.0) == (
        "10.0 ms an inference; its products need 2.50 ms at this machine's measured peaks, most of it by memory: 25% "
        "of the limit is reached."
    )
    assert advice.summary(10.1, "compute", 10.0).endswith("101% of the limit is reached.")
    assert advice.summary(12.0, "compute", 10.0) == (
        "10.0 ms an inference is less than the limit of 12.0 ms, which was probably measured under load: nothing can "
        "be said of losses in arithmetic."
    )
    assert advice.summary(None, None, 10.0) == "10.0 ms an inference; no limit is known."


def test_operators_that_do_not_add_up_are_told() -> None:
    assert list(advice.between(9.5, 10.0)) == [] == list(advice.between(0.0, 10.0))
    assert list(advice.between(5.0, 10.0)) == [
        "The operators add up to 5.00 of 10.0 ms: 5.00 ms were spent between them: calls, threads that wait."
    ]
    assert "5.00 ms were added by profiling, so that their times are scaled down" in "".join(advice.between(15.0, 10.0))


def test_a_share_above_the_limit_is_never_silent() -> None:
    assert list(advice.warnings(0.9, [], PEAKS)) == []
    (over,) = advice.warnings(1.2, [], Peaks("ort", 1, {}, (), unsteady=1.5))
    assert over == (
        "120% of the limit: faster than can be. The limit was probably measured under load; its probes varied "
        "1.50-fold. Measure again on a quiet machine; this share says nothing."
    )
    (shaky,) = advice.warnings(0.9, [], Peaks("ort", 1, {}, (), unsteady=1.5))
    assert shaky.startswith("the limit's probes varied 1.50-fold")
    (row,) = advice.warnings(0.9, [loss(share=1.3)], PEAKS)
    assert row.startswith("faster than their limit: Conv in fp32 (130%)")


def test_a_precision_without_a_peak_is_told() -> None:
    (told,) = advice.warnings(None, [loss(precision="bf16"), loss(precision="bf16")], PEAKS)
    end = "Its products count with what they move alone, so the limit is too low."
    assert told == f"no peak of bf16: it has none. {end}"


def test_every_figure_of_a_probe_is_finite() -> None:
    for tensor_ in probes.product_probe("int8").model.graph.initializer:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor_).astype(np.float64)).all()
