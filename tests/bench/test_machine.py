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
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2700000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "3500000\n",
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
    assert (record["cpu_frequency_mhz"], record["cpu_frequency_max_mhz"]) == (2700.0, 3500.0)
    assert record["load_average_1min"] == 1.25
    assert record["steal_ticks"] == 30
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

    assert {"cpu_model", "container_cpu_limit", "steal_ticks", "load_average_1min", "memory_total_bytes"}.isdisjoint(
        record
    )


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
    load = machine.cpu_load(grow(tmp_path, X86))

    assert (load.steal_ticks, load.ticks) == (30, 1000)


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


def test_library_versions_leave_out_what_is_not_installed() -> None:
    versions = machine.library_versions(("numpy", "no-such-distribution-of-edgevit"))

    assert list(versions) == ["numpy"]


def test_the_real_record_is_json_and_tells_no_name() -> None:
    text = json.dumps(machine.machine_record())

    assert not {"hostname", "node", "user", "serial"} & set(json.loads(text))
