"""The machine record from trees that stand for "/"; the real machine's own record must only not fail."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from edgevit.bench import machine

X86 = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Example CPU 9000\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni "
    "amx_tile amx_int8 hypervisor\n\nprocessor\t: 1\nmodel name\t: another\n",
    "proc/stat": "cpu  100 10 50 800 5 1 4 30 20 2\ncpu0 50 5 25 400 2 0 2 15 10 1\nctxt 5\n",
    "proc/loadavg": "1.25 0.80 0.40 2/300 4242\n",
    "proc/meminfo": "MemTotal:       16384 kB\nMemFree:  1 kB\n",
    "proc/self/cgroup": "0::/jobs/one\n",
    "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
    "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed:\t3\nCpus_allowed_list:\t0-1,10\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2700000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "3500000\n",
    "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0-1\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1200000\n",
    "sys/devices/system/cpu/cpu1/topology/thread_siblings_list": "0-1\n",
    "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu10/topology/core_cpus_list": "10\n",
    "sys/devices/system/cpu/cpufreq/boost": "1\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "99000\n",
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone1/temp": "54000\n",
    "sys/class/hwmon/hwmon3/name": "k10temp\n",
    "sys/class/hwmon/hwmon3/temp1_input": "55125\n",
}


def grow(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_everything_a_linux_tree_shows_is_recorded(tmp_path: Path) -> None:
    record = machine.machine_record(grow(tmp_path, X86))

    assert record["cpu_model"] == "Example CPU 9000"
    assert record["cpu_flags"] == ["amx_int8", "amx_tile", "avx2", "avx512_vnni", "avx512f"]
    assert record["container_cpu_limit"] == 1.5
    assert record["cpu_governor"] == "performance"
    assert [record[f"cpu_frequency_{of}_mhz"] for of in ("lowest", "mean", "highest", "max")] == [
        1200,
        1800,
        2700,
        3500,
    ]
    assert (record["affinity"], record["physical_cores"], record["smt"]) == ("0-1,10", 2, True)
    assert (record["hypervisor"], record["turbo"], record["cpu_temperature_c"]) == (True, True, 55.125)
    assert record["load_average_1min"] == 1.25
    assert (record["steal_ticks"], record["cpu_ticks"]) == (30, 1000)
    assert record["memory_total_bytes"] == 16 * 1024 * 1024
    assert "cpu_frequency_min_mhz" not in record
    assert "board" not in record


def test_what_cannot_be_read_is_absent_and_never_zero(tmp_path: Path) -> None:
    record = machine.machine_record(tmp_path)

    assert {"cpu_model", "cpu_flags", "container_cpu_limit", "steal_ticks", "memory_total_bytes"}.isdisjoint(record)
    assert None not in record.values()
    assert record["python"] == platform.python_version()


def test_files_of_another_form_than_expected_are_as_good_as_absent(tmp_path: Path) -> None:
    odd = dict.fromkeys(X86, "?\n") | {"proc/meminfo": "MemTotal: much\n", "proc/self/cgroup": "5:cpu\n0::/jobs/one\n"}
    record = machine.machine_record(grow(tmp_path, odd))

    machine_keys = {"system", "architecture", "kernel", "logical_cores", "affinity_cores", "python", "libraries"}
    assert set(record) == {*machine_keys, "affinity", "board", "cpu_governor", "thread_settings"} - {
        "board",
        "affinity",
    }


def test_an_arm_board_is_named_by_its_codes_and_its_device_tree(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimddp crc32\nCPU implementer : 0x41\nCPU part : 0xd42\n",
        "proc/device-tree/model": "Example Board 8GB\0",
    }
    record = machine.machine_record(grow(tmp_path, files))

    assert record["cpu_model"] == "implementer 0x41 part 0xd42"
    assert record["cpu_flags"] == ["asimd", "asimddp"]
    assert record["board"] == "Example Board 8GB"


def test_ticks_leave_out_guest_time_which_user_time_holds_already(tmp_path: Path) -> None:
    assert machine.cpu_ticks(grow(tmp_path, X86)) == machine.CpuTicks(total=1000, busy=165, steal=30)


@pytest.mark.parametrize(
    ("cores", "ticks"),
    [
        ((0,), machine.CpuTicks(total=499, busy=82, steal=15)),
        ((0, 7), machine.CpuTicks(total=499, busy=82, steal=15)),  # a core that is off
        ((7,), machine.CpuTicks(total=1000, busy=165, steal=30)),  # no line for any: all there are
    ],
)
def test_ticks_can_be_those_of_some_cores(tmp_path: Path, cores: tuple[int, ...], ticks: machine.CpuTicks) -> None:
    assert machine.cpu_ticks(grow(tmp_path, X86), cores) == ticks


@pytest.mark.parametrize("text", ["", "cpu  1 2 3\n", "cpu  1 2 3 4 5 6 7 \u00b2\n", "intr 5\ncpu  1 2 3 4 5 6 7 8\n"])
def test_a_stat_file_of_another_form_has_no_ticks(tmp_path: Path, text: str) -> None:
    assert machine.cpu_ticks(grow(tmp_path, {"proc/stat": text})) is None


@pytest.mark.parametrize(
    ("line", "cores"),
    [("0-2,7", (0, 1, 2, 7)), ("3", (3,)), ("", ()), ("0-,-2,x", ()), ("1, 4-5", (1, 4, 5))],
)
def test_the_cores_allowed_are_read_from_their_list(tmp_path: Path, line: str, cores: tuple[int, ...]) -> None:
    assert machine.allowed_cores(grow(tmp_path, {"proc/self/status": f"Cpus_allowed_list:\t{line}\n"})) == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/box\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
    ],
)
def test_the_cpu_limit_of_a_container_is_read_from_either_version(
    tmp_path: Path, files: dict[str, str], cores: float | None
) -> None:
    assert machine.container_cpu_limit(grow(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": "4096\n",
                "sys/fs/cgroup/memory.max": "1024\n",
            },
            1024,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2048\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            2048,
        ),
        ({"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "-1e999\n"}, None),
    ],
)
def test_the_memory_limit_of_a_container_is_read_from_either_version(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    assert machine.container_memory_limit_bytes(grow(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpuset.cpus.effective": "0-3\n"}, "0-3"),
        ({"proc/self/cgroup": "3:cpuset:/b\n", "sys/fs/cgroup/cpuset/b/cpuset.cpus": "2,5\n"}, "2,5"),
        ({"proc/self/cgroup": "3:cpuset:/b\n", "sys/fs/cgroup/cpuset/b/cpuset.cpus": "\n"}, None),
    ],
)
def test_the_cores_of_a_container_are_read_from_either_version(
    tmp_path: Path, files: dict[str, str], cores: str | None
) -> None:
    assert machine.container_cpuset(grow(tmp_path, files)) == cores


def test_one_group_under_two_names_is_found_once(tmp_path: Path) -> None:
    grow(tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/box\n", "sys/fs/cgroup/cpu,cpuacct/box/cpu.stat": "\n"})
    (tmp_path / "sys/fs/cgroup/cpu").symlink_to("cpu,cpuacct")

    mount = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    assert machine.control_groups(tmp_path, "cpu") == [mount / "box", mount]


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"intel_pstate/no_turbo": "1\n", "cpufreq/boost": "1\n"}, False),
        ({"intel_pstate/no_turbo": "0\n"}, True),
        ({"cpufreq/boost": "0\n"}, False),
        ({"cpufreq/boost": "?\n"}, None),
        ({}, None),
    ],
)
def test_turbo_is_read_where_either_driver_shows_it(tmp_path: Path, files: dict[str, str], state: bool | None) -> None:
    grow(tmp_path, {f"sys/devices/system/cpu/{name}": text for name, text in files.items()})

    assert machine.turbo(tmp_path) is state


@pytest.mark.parametrize(
    ("zone", "text", "degrees"),
    [
        ("cpu-thermal", "48312\n", 48.312),  # Raspberry Pi
        ("CPU-therm", "61500\n", 61.5),  # Jetson
        ("soc-thermal", "-274000\n", None),  # a sensor that is off
        ("cpu-thermal", "nan\n", None),
        ("gpu-thermal", "70000\n", None),
        ("battery", "30000\n", None),
    ],
)
def test_the_temperature_is_that_of_a_sane_sensor_of_the_processor(
    tmp_path: Path, zone: str, text: str, degrees: float | None
) -> None:
    folder = "sys/class/thermal/thermal_zone4"
    grow(tmp_path, {f"{folder}/type": f"{zone}\n", f"{folder}/temp": text})

    assert machine.cpu_temperature_c(machine.temperature_files(tmp_path)) == degrees


def test_governors_that_differ_are_all_named(tmp_path: Path) -> None:
    second = {"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n"}

    assert machine.cpu_frequency(grow(tmp_path, X86 | second))["cpu_governor"] == "performance, powersave"


def test_thread_settings_are_those_of_the_environment_and_no_others() -> None:
    set_here = {"OMP_NUM_THREADS": "4", "HOME": "/home/somebody", "KMP_AFFINITY": "x" * 999, "OMP_WAIT_POLICY": ""}

    settings = machine.thread_settings(set_here)
    assert settings == {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "", "KMP_AFFINITY": "x" * 200}


RECORD = {
    "cpu_model": "Example CPU 9000",
    "architecture": "x86_64",
    "cpu_flags": ["avx2", "fma"],
    "logical_cores": 8,
    "affinity_cores": 4,
    "container_cpu_limit": 1.5,
    "kernel": "6.1",
    "libraries": {"numpy": "2.0"},
}


def test_a_fingerprint_is_an_id_and_the_parts_it_is_made_of() -> None:
    parts = {key: RECORD[key] for key in RECORD if key not in ("kernel", "libraries")}

    assert machine.fingerprint(RECORD) == {"id": "e3589bcd5e81", **parts}


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel": "6.18", "libraries": {}, "load_average_1min": 9.5, "cpu_temperature_c": 88.0, "python": "3.12"},
        {"cpu_flags": ["fma", "a_flag_of_a_newer_kernel", "avx2", "fma"]},
        {"hypervisor": True, "cpu_frequency_mean_mhz": 1.0, "board": "another"},
    ],
)
def test_a_fingerprint_stays_where_the_machine_does(changed: dict[str, object]) -> None:
    assert machine.fingerprint(RECORD | changed) == machine.fingerprint(RECORD)


@pytest.mark.parametrize(
    "changed",
    [
        {"cpu_model": "Example CPU 9001"},
        {"architecture": "aarch64"},
        {"cpu_flags": ["avx2"]},
        {"logical_cores": 16},
        {"affinity_cores": 2},
        {"container_cpu_limit": None},
    ],
)
def test_a_fingerprint_differs_where_the_machine_does(changed: dict[str, object]) -> None:
    assert machine.fingerprint(RECORD | changed)["id"] != machine.fingerprint(RECORD)["id"]


@pytest.mark.parametrize("odd", [{}, float("nan"), float("inf"), True, 10**400, None, b"x"])
def test_what_is_of_another_type_in_a_stored_record_counts_as_absent(odd: object) -> None:
    assert machine.fingerprint(dict.fromkeys(RECORD, odd)) == machine.fingerprint({})
    assert machine.fingerprint(RECORD | {"cpu_flags": [odd, [[]]]})["cpu_flags"] == []


def test_text_of_a_stored_record_is_one_short_line_of_a_fingerprint() -> None:
    assert machine.fingerprint({"cpu_model": "a\nb\x1b[31m" + "x" * 999})["cpu_model"] == "a?b?[31m" + "x" * 192


def test_the_fingerprint_of_this_machine_survives_json_and_a_second_reading() -> None:
    first, second = machine.machine_record(), machine.machine_record()

    assert machine.fingerprint(json.loads(json.dumps(first))) == machine.fingerprint(second)


def test_library_versions_leave_out_what_is_not_installed() -> None:
    versions = machine.library_versions(("numpy", "no-such-distribution-of-edgevit"))

    assert list(versions) == ["numpy"]


def test_the_real_record_is_json_and_tells_no_name() -> None:
    text = json.dumps(machine.machine_record(), allow_nan=False)

    assert not {"hostname", "node", "user", "serial"} & set(json.loads(text))
    assert platform.node() not in text.split('"')
