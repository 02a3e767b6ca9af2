"""What differs between two machine records, in exact text; what is alike, unknown or hostile gives nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from edgevit.bench.diagnosis import diagnose
from edgevit.bench.machine import machine_record

RECORD: dict[str, Any] = {
    "system": "Linux",
    "architecture": "x86_64",
    "kernel": "6.1.0",
    "cpu_model": "Example CPU 9000",
    "cpu_flags": ["avx2", "avx512_vnni", "fma"],
    "logical_cores": 4,
    "affinity_cores": 4,
    "container_cpu_limit": 2.0,
    "cpu_governor": "performance",
    "turbo": True,
    "cpu_frequency_highest_mhz": 3900.0,
    "cpu_frequency_max_mhz": 4000.0,
    "cpu_temperature_c": 55.0,
    "load_average_1min": 0.3,
    "steal_ticks": 100,
    "cpu_ticks": 10_000,
    "thread_settings": {"OMP_NUM_THREADS": "4"},
    "libraries": {"numpy": "2.4.6", "onnxruntime": "1.30.0"},
}
CPU = "Times of different processors do not compare; measure both on one."
LIMITS = "Threads beyond the limit wait for each other. Give both runs the same limits, or set the threads to it."
CLOCK = "The clock follows it. Set both alike and repeat."
SETTING = "It decides how threads compute. Set both alike and repeat."
RELEASE = "Kernels change between releases. Repeat with the former one."


def test_two_runs_on_the_same_machine_differ_in_nothing() -> None:
    usual = {"load_average_1min": 1.1, "cpu_temperature_c": 61.0, "cpu_frequency_highest_mhz": 3700.0, "python": "3.12"}

    assert diagnose(RECORD, copy.deepcopy(RECORD)) == ()
    assert diagnose(RECORD, RECORD | usual | {"steal_ticks": 9_999, "cpu_ticks": 20_000, "affinity": "4-7"}) == ()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"cpu_model": "Example CPU 1"}, f"the processor was Example CPU 9000, is Example CPU 1. {CPU}"),
        ({"architecture": "aarch64"}, f"the architecture was x86_64, is aarch64. {CPU}"),
        ({"logical_cores": 6}, f"the number of cores was 4, is 6. {CPU}"),
        (
            {"cpu_flags": ["avx2", "fma", "amx_int8"]},
            "the processor's instruction sets are other ones: now without avx512_vnni; with amx_int8. Kernels are "
            f"chosen by them. {CPU}",
        ),
        ({"affinity_cores": 1}, f"the number of cores allowed was 4, is 1. {LIMITS}"),
        ({"container_cpu_limit": 1.5}, f"the container's CPU limit was 2, is 1.5. {LIMITS}"),
        ({"container_cpu_limit": None}, f"the container's CPU limit was 2, is none. {LIMITS}"),
        (
            {"container_memory_limit_bytes": 1 << 30},
            "the container's memory limit was none, is 1073741824. Less memory means more reading. Set both alike.",
        ),
        ({"cpu_governor": "powersave"}, f"the frequency governor was performance, is powersave. {CLOCK}"),
        ({"turbo": False}, f"turbo was on, is off. {CLOCK}"),
        ({"cpu_frequency_max_mhz": 1500.0}, f"the highest clock allowed was 4000, is 1500. {CLOCK}"),
        ({"thread_settings": {"OMP_NUM_THREADS": "1"}}, f"OMP_NUM_THREADS was 4, is 1. {SETTING}"),
        ({"thread_settings": {}}, f"OMP_NUM_THREADS was 4, is unset. {SETTING}"),
        (
            {"libraries": {"numpy": "2.4.6", "onnxruntime": "1.31.1", "nncf": "3.4.0"}},
            f"onnxruntime was 1.30.0, is 1.31.1. {RELEASE}",
        ),
        (
            {"kernel": "6.18.1"},
            "the kernel was 6.1.0, is 6.18.1. Scheduling and mitigations differ between kernels. Repeat the former run "
            "on this one.",
        ),
        (
            {"cpu_frequency_highest_mhz": 2600.0},
            "the clock of the fastest core was 3900 MHz, is 2600 MHz. Heat, a power limit or the governor probably "
            "holds the slower one down. Bring both to the same clock and repeat.",
        ),
        (
            {"cpu_temperature_c": 92.0},
            "the chip was at 55 degrees Celsius, is at 92. A hot chip lowers its clock. Let it cool, or cool it, and "
            "repeat.",
        ),
        (
            {"load_average_1min": 4.0},
            "the load average before the run was 0.30 on 4 cores, is 4.00 on 4. Other programs probably ran beside the "
            "busier run. Close them and repeat.",
        ),
    ],
)
def test_each_difference_is_told_with_what_to_do(changed: dict[str, Any], text: str) -> None:
    assert diagnose(RECORD, RECORD | changed) == (text,)


def test_a_difference_is_told_in_either_direction() -> None:
    (text,) = diagnose(RECORD | {"load_average_1min": 9.0, "logical_cores": 4}, RECORD)

    assert text.startswith("the load average before the run was 9.00 on 4 cores, is 0.30 on 4. ")


def test_steal_is_told_of_runs_with_both_ends() -> None:
    quiet = {"before": RECORD, "after": RECORD | {"steal_ticks": 105, "cpu_ticks": 11_000}}
    robbed = {"before": RECORD, "after": RECORD | {"steal_ticks": 220, "cpu_ticks": 11_000}}

    assert diagnose(quiet, robbed) == (
        "the hypervisor took away 0.5% of the CPU time then and 12.0% now (steal). Another virtual machine on the same "
        "host is probably busy. Repeat later; trust ratios more than times.",
    )
    assert diagnose(robbed, quiet)[0].startswith("the hypervisor took away 12.0% of the CPU time then and 0.5% now")
    assert diagnose(quiet, RECORD) == ()


def test_heat_is_that_at_the_end_and_load_that_at_the_start() -> None:
    run = {"before": RECORD, "after": RECORD | {"cpu_temperature_c": 90.0, "load_average_1min": 4.0}}

    assert [text.split(".")[0] for text in diagnose(RECORD, run)] == ["the chip was at 55 degrees Celsius, is at 90"]


def test_what_explains_most_comes_first() -> None:
    other = RECORD | {"libraries": {"numpy": "1"}, "cpu_model": "X", "cpu_governor": "powersave", "kernel": "5"}

    assert [text.split(" was ")[0] for text in diagnose(RECORD, other)] == [
        "the processor",
        "the frequency governor",
        "numpy",
        "the kernel",
    ]


def test_counters_set_back_by_a_restart_are_no_steal() -> None:
    quiet = {"before": RECORD, "after": RECORD | {"cpu_ticks": 11_000}}
    odd = [
        {"steal_ticks": 5, "cpu_ticks": 50},
        {"steal_ticks": 5, "cpu_ticks": 11_000},
        {"steal_ticks": None, "cpu_ticks": 11_000},
        {"steal_ticks": "many", "cpu_ticks": 11_000},
    ]

    assert [diagnose(quiet, {"before": RECORD, "after": RECORD | end}) for end in odd] == [()] * 4


@pytest.mark.parametrize("record", [{}, {"before": {}, "after": {}}, {"before": None, "after": {}}])
def test_without_a_record_nothing_is_known(record: dict[str, Any]) -> None:
    assert diagnose(record, RECORD) == diagnose(RECORD, record) == ()


@pytest.mark.parametrize("odd", [{}, [], [[1]], float("nan"), -float("inf"), 10**400, b"x", object()])
def test_values_of_another_type_are_passed_over(odd: object) -> None:
    strange = dict.fromkeys(RECORD, odd)
    texts = diagnose(RECORD, strange) + diagnose(strange, RECORD) + diagnose({"before": odd, "after": RECORD}, RECORD)

    told = {text.split(" was ")[0].split(" are ")[0] for text in texts}
    assert told <= {"the container's CPU limit", "OMP_NUM_THREADS", "the processor's instruction sets"}


def test_a_strangers_text_stays_one_short_line() -> None:
    hostile = "a\nb\x1b[31m" + "x" * 10_000
    many = {f"lib{i}": "1" for i in range(10_000)}
    texts = diagnose(
        RECORD | {"libraries": many},
        RECORD | {"cpu_model": hostile, "thread_settings": {hostile: hostile}, "libraries": dict.fromkeys(many, "2")},
    )

    assert all(text.isprintable() and len(text) < 600 for text in texts)
    assert len(texts) < 70


def test_this_machine_differs_from_itself_in_nothing_that_is_fixed() -> None:
    texts = diagnose(machine_record(), machine_record())

    moving = ("the clock of the fastest core", "the chip", "the load average")  # a busy machine may change in between
    assert [text for text in texts if not text.startswith(moving)] == []
