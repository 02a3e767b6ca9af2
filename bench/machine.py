"""The machine a number was measured on, read from /proc and /sys. What cannot be read is absent, never zero.

No host, user or serial name is read: a record can be published. `root` is the folder that stands for "/", so that tests
read trees of their own. Outside Linux the record is shorter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path("/")
LIBRARIES = (  # those that compute or decide what is computed, by distribution
    *("torch", "onnx", "onnxruntime", "openvino", "numpy"),
    *("nncf", "coremltools", "tensorrt", "tensorrt-rtx"),
)
_FLAG_NAMES = (  # the instruction sets that matrix kernels choose between, x86 then ARM
    "avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 amx_fp16 neon asimd fphp asimdhp asimddp i8mm bf16 sve sve2 sme"
)
FLAGS = frozenset(_FLAG_NAMES.split())
_SETTING_NAMES = (  # what decides how many threads compute, where, how they wait, and with which instructions
    "OMP_NUM_THREADS OMP_THREAD_LIMIT OMP_DYNAMIC OMP_WAIT_POLICY OMP_PROC_BIND OMP_PLACES OMP_SCHEDULE "
    "GOMP_CPU_AFFINITY GOMP_SPINCOUNT KMP_AFFINITY KMP_BLOCKTIME KMP_HW_SUBSET MKL_NUM_THREADS MKL_DYNAMIC "
    "MKL_ENABLE_INSTRUCTIONS OPENBLAS_NUM_THREADS OPENBLAS_CORETYPE BLIS_NUM_THREADS VECLIB_MAXIMUM_THREADS "
    "ONEDNN_MAX_CPU_ISA ATEN_CPU_CAPABILITY"
)
SETTINGS = tuple(_SETTING_NAMES.split())
SETTING_LENGTH = 200  # characters of a setting that are kept: a list of cores is shorter, anything longer is no setting
STEAL_COLUMN = 7  # user nice system idle iowait irq softirq steal; the two after it are inside user and nice already
IDLE_COLUMNS = (3, 4)  # idle, and idle while a disk is waited for
UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as the largest number of pages in 63 bits
COOLEST_C, HOTTEST_C = -40.0, 150.0  # what a chip may be stored and run at; sensors that are off tell -274 or 200
CPU_ZONES = ("cpu", "x86_pkg", "soc", "core", "tj")  # in names of thermal zones: PC, Raspberry Pi, Rockchip, Jetson
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")  # names of hwmon drivers; temp1 is the whole package
LARGEST = 2**63  # no count of a machine is larger; an integer of a stranger's file may be
FINGERPRINT = ("cpu_model", "architecture", "cpu_flags", "logical_cores", "affinity_cores", "container_cpu_limit")


@dataclass(frozen=True)
class CpuTicks:
    """CPU time since boot in ticks, summed over some cores; `total` holds busy, idle and steal."""

    total: int
    busy: int
    steal: int


def machine_record(root: Path = ROOT) -> dict[str, Any]:
    """Return what a reader needs to judge a measurement, as JSON values; keys that cannot be read are absent."""
    ticks, load = cpu_ticks(root), (read(root / "proc/loadavg") or "").split()
    cpu = _cpuinfo(root)
    record = {
        "system": platform.system() or None,
        "architecture": platform.machine() or None,
        "kernel": platform.release() or None,
        "board": read(root / "proc/device-tree/model"),
        "cpu_model": cpu_model(cpu),
        "cpu_flags": cpu_flags(cpu),
        "hypervisor": "hypervisor" in cpu["flags"].split() if "flags" in cpu else None,  # ARM has no such flag
        "logical_cores": os.cpu_count(),
        "physical_cores": physical_cores(root),
        "smt": {"1": True, "0": False}.get(read(root / "sys/devices/system/cpu/smt/active") or ""),
        "affinity_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "affinity": _status(root).get("Cpus_allowed_list"),
        "container_cpu_limit": container_cpu_limit(root),
        "container_cpuset": container_cpuset(root),
        "container_memory_limit_bytes": container_memory_limit_bytes(root),
        **cpu_frequency(root),
        "turbo": turbo(root),
        "cpu_temperature_c": cpu_temperature_c(temperature_files(root)),
        "load_average_1min": _number(load[0]) if load else None,
        "steal_ticks": ticks.steal if ticks else None,
        "cpu_ticks": ticks.total if ticks else None,
        "memory_total_bytes": memory_total_bytes(root),
        "thread_settings": thread_settings(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }
    return {key: value for key, value in record.items() if value is not None}


def fingerprint(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"id": 12 hex digits} and the parts it is made of: two records of one machine agree, of two do not.

    The parts are the processor and how much of it may be used (FINGERPRINT); what the record lacks is None. Kernel,
    libraries, load and frequency are left out: they change on one machine, and `diagnose` tells of them. Two machines
    of one make cannot be told apart, which is what a pool of such machines needs. The record may come from a file: what
    is not of the expected type counts as absent.
    """
    parts = {key: known_flags(record) if key == "cpu_flags" else plain(record.get(key)) for key in FINGERPRINT}
    text = json.dumps(parts, sort_keys=True)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:12], **parts}


def known_flags(record: Mapping[str, Any]) -> list[str] | None:
    """Return those of a record's instruction sets that are in FLAGS, sorted; None where it has no list of them."""
    flags = record.get("cpu_flags")
    return sorted({flag for flag in flags if isinstance(flag, str)} & FLAGS) if isinstance(flags, list) else None


def cpu_ticks(root: Path = ROOT, cores: Collection[int] = ()) -> CpuTicks | None:
    """Return the ticks of `cores`, or of all where none are named or the kernel shows no line for them."""
    lines: dict[str, list[int]] = {}
    for line in (read(root / "proc/stat") or "").splitlines():
        name, *words = line.split() or [""]
        if not name.startswith("cpu"):  # the cores come first
            break
        if len(words) > STEAL_COLUMN and all(word.isdecimal() for word in words):
            lines[name] = [int(word) for word in words[: STEAL_COLUMN + 1]]
    chosen = [lines[f"cpu{core}"] for core in cores if f"cpu{core}" in lines] or [
        lines[n] for n in ("cpu",) if n in lines
    ]
    if not chosen:
        return None
    sums = [sum(column) for column in zip(*chosen, strict=True)]
    total, steal = sum(sums), sums[STEAL_COLUMN]
    return CpuTicks(total, total - steal - sum(sums[i] for i in IDLE_COLUMNS), steal)


def allowed_cores(root: Path = ROOT) -> tuple[int, ...]:
    """Return the numbers of the cores that this process may run on, () where the kernel does not tell."""
    cores: list[int] = []
    for part in (_status(root).get("Cpus_allowed_list") or "").split(","):
        first, dash, last = part.strip().partition("-")
        if first.isdecimal() and (last.isdecimal() or not dash):
            cores += range(int(first), int(last or first) + 1)
    return tuple(cores)


def cpu_model(cpuinfo: dict[str, str]) -> str | None:
    """Return the CPU's name; ARM kernels give two codes instead of a name."""
    if "model name" in cpuinfo:
        return cpuinfo["model name"]
    if "CPU implementer" in cpuinfo and "CPU part" in cpuinfo:
        return f"implementer {cpuinfo['CPU implementer']} part {cpuinfo['CPU part']}"
    return None


def cpu_flags(cpuinfo: dict[str, str]) -> list[str] | None:
    """Return the sorted instruction sets of FLAGS that the CPU has; x86 calls the line "flags", ARM "Features"."""
    line = cpuinfo.get("flags", cpuinfo.get("Features"))
    return None if line is None else sorted(FLAGS.intersection(line.split()))


def cpu_frequency(root: Path = ROOT) -> dict[str, Any]:
    """Return governor and frequencies in MHz, where the kernel shows them (virtual machines seldom do).

    Over all cores: the frequency of now is told as lowest, mean and highest, `_min` and `_max` are the limits set;
    governors that differ are joined by a comma. An idle core is slow: the highest is that of the core at work.
    """
    folders = [folder / "cpufreq" for folder in core_folders(root)]
    now = frequencies_mhz([folder / "scaling_cur_freq" for folder in folders])
    lowest = frequencies_mhz([folder / "scaling_min_freq" for folder in folders])
    highest = frequencies_mhz([folder / "scaling_max_freq" for folder in folders])
    governors = {text for folder in folders if (text := read(folder / "scaling_governor"))}
    return {
        "cpu_governor": ", ".join(sorted(governors)) or None,
        "cpu_frequency_lowest_mhz": min(now, default=None),
        "cpu_frequency_mean_mhz": sum(now) / len(now) if now else None,
        "cpu_frequency_highest_mhz": max(now, default=None),
        "cpu_frequency_min_mhz": min(lowest, default=None),
        "cpu_frequency_max_mhz": max(highest, default=None),
    }


def core_folders(root: Path = ROOT, cores: Collection[int] = ()) -> list[Path]:
    """Return the folders of `cores` in /sys, or of all cores where none are named, in their order."""
    folder = root / "sys/devices/system/cpu"
    found = [path for path in folder.glob("cpu[0-9]*") if path.name[3:].isdecimal()]
    chosen = [path for path in found if not cores or int(path.name[3:]) in cores]
    return sorted(chosen, key=lambda path: int(path.name[3:]))


def frequencies_mhz(files: Collection[Path]) -> list[float]:
    """Return what files of cpufreq hold, in MHz, without those that cannot be read."""
    return [khz / 1000 for file in files if (khz := _number(read(file))) is not None and khz > 0]


def turbo(root: Path = ROOT) -> bool | None:
    """Return whether the processor may exceed its nominal frequency; None where the kernel does not tell."""
    folder = root / "sys/devices/system/cpu"
    off = {"0": True, "1": False}.get(read(folder / "intel_pstate/no_turbo") or "")
    return {"1": True, "0": False}.get(read(folder / "cpufreq/boost") or "") if off is None else off


def temperature_files(root: Path = ROOT) -> list[Path]:
    """Return the files that hold a temperature of the processor: thermal zones by name, sensors by driver."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    sensors = sorted((root / "sys/class/hwmon").glob("hwmon*"))
    return [
        *(z / "temp" for z in zones if any(word in (read(z / "type") or "").lower() for word in CPU_ZONES)),
        *(s / "temp1_input" for s in sensors if read(s / "name") in CPU_SENSORS),
    ]


def cpu_temperature_c(files: Collection[Path]) -> float | None:
    """Return the highest temperature that `files` hold (thousandths of a degree Celsius), None where none is sane."""
    read_c = [number / 1000 for file in files if (number := _number(read(file))) is not None]
    return max((each for each in read_c if COOLEST_C < each < HOTTEST_C), default=None)


def physical_cores(root: Path = ROOT) -> int | None:
    """Return how many cores there are when the threads of one core count once."""
    folders = [core / "topology" for core in core_folders(root)]
    lists = {read(f / "core_cpus_list") or read(f / "thread_siblings_list") or "" for f in folders}  # newer name first
    return sum(text[:1].isdecimal() for text in lists) or None


def container_cpu_limit(root: Path = ROOT) -> float | None:
    """Return how many cores' worth of time the control groups allow, the smallest on the way up; None = no limit seen.

    Version 2 has cpu.max ("150000 100000" or "max 100000"), version 1 two files with -1 for no limit.
    """
    return min(_found(control_groups(root, "cpu"), _cpu_limit), default=None)


def container_cpuset(root: Path = ROOT) -> str | None:
    """Return the list of cores that the control group may use ("0-3,8"), where one is set."""
    for folder in control_groups(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if text := read(folder / name):
                return text
    return None


def container_memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that the control groups allow, the smallest on the way up; None = no limit seen."""
    limit = min(_found(control_groups(root, "memory"), _memory_limit), default=None)
    return None if limit is None else int(limit)


def control_groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control group for `controller` and of its parents, the mount included.

    Of both versions where both are mounted; only one has the controller, in the other's folders its files are absent.
    """
    folders: list[Path] = []
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        mounts = [root / "sys/fs/cgroup"]
        if controllers:
            mounts = [mounts[0] / name for name in (controllers, controller)]
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # a path outside this container's view: only the mount itself can be read
            group = PurePosixPath()
        if not controllers or controller in controllers.split(","):
            mount = next((each for each in mounts if each.is_dir()), mounts[0])
            folders += [mount / folder for folder in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def memory_total_bytes(root: Path = ROOT) -> int | None:
    """Return the memory of the machine in bytes."""
    for line in (read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            kib = _number(line.split()[1])
            return None if kib is None else int(kib) * 1024
    return None


def library_versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Return the installed versions by distribution name, without importing anything; what is missing is absent."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def thread_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of SETTINGS that are set."""
    return {name: environment[name][:SETTING_LENGTH] for name in SETTINGS if name in environment}


def plain(value: object) -> str | int | float | None:
    """Return a value of a record as it may be printed: one short line of text, or a finite number; else None."""
    if isinstance(value, str):
        return "".join(char if char.isprintable() else "?" for char in value[:SETTING_LENGTH])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < LARGEST else None  # NaN is not either


def read(path: Path | str) -> str | None:
    """Return the text of a kernel file without the blanks and NULs at its ends; None where missing, denied or empty."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # half the time of Path.open, in each round
            return file.read().decode(errors="replace").strip("\0 \t\n") or None
    except OSError:
        return None


def _found(folders: Collection[Path], limit: Callable[[Path], float | None]) -> list[float]:
    return [value for folder in folders if (value := limit(folder)) is not None]


def _cpu_limit(folder: Path) -> float | None:
    quota_us, _, period_us = (read(folder / "cpu.max") or "").partition(" ")
    if not quota_us:
        return _cores(read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us"))
    return None if quota_us == "max" else _cores(quota_us, period_us)


def _memory_limit(folder: Path) -> float | None:
    limit = _number(read(folder / "memory.max") or read(folder / "memory.limit_in_bytes"))  # "max" is no number
    return limit if limit is not None and limit < UNLIMITED_BYTES else None


def _cores(quota_us: str | None, period_us: str | None) -> float | None:
    quota, period = _number(quota_us), _number(period_us)
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _cpuinfo(root: Path) -> dict[str, str]:
    """Return the first value of each key of /proc/cpuinfo: the cores of one machine agree in what is read here."""
    return _fields(read(root / "proc/cpuinfo"))


def _status(root: Path) -> dict[str, str]:
    return _fields(read(root / "proc/self/status"))


def _fields(text: str | None) -> dict[str, str]:
    """Return the first value of each key of lines "key : value"."""
    fields: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _number(text: str | None) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        number = None if text is None else float(text)
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None
