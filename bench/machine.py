"""The machine a number was measured on, read from /proc and /sys. What cannot be read is absent, never zero.

No host, user or serial name is read: a record can be published. `root` is the folder that stands for "/", so that tests
read trees of their own. Outside Linux the record is shorter.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path("/")
LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "numpy")  # those that compute or decide what is computed
_FLAG_NAMES = (  # the instruction sets that matrix kernels choose between, x86 then ARM
    "avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 amx_fp16 neon asimd fphp asimdhp asimddp i8mm bf16 sve sve2 sme"
)
FLAGS = frozenset(_FLAG_NAMES.split())
STEAL_COLUMN = 7  # user nice system idle iowait irq softirq steal; the two after it are inside user and nice already


@dataclass(frozen=True)
class CpuLoad:
    """The CPU counters of one moment; None where unreadable. Ticks since boot, over all cores."""

    steal_ticks: int | None = None
    ticks: int | None = None
    load_average_1min: float | None = None
    cores: int | None = None


def machine_record(root: Path = ROOT) -> dict[str, Any]:
    """Return what a reader needs to judge a measurement, as JSON values; keys that cannot be read are absent."""
    load = cpu_load(root)
    cpu = _cpuinfo(root)
    record = {
        "system": platform.system() or None,
        "architecture": platform.machine() or None,
        "kernel": platform.release() or None,
        "board": _read(root / "proc/device-tree/model"),
        "cpu_model": cpu_model(cpu),
        "cpu_flags": cpu_flags(cpu),
        "logical_cores": os.cpu_count(),
        "affinity_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "container_cpu_limit": container_cpu_limit(root),
        **cpu_frequency(root),
        "load_average_1min": load.load_average_1min,
        "steal_ticks": load.steal_ticks,
        "memory_total_bytes": memory_total_bytes(root),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }
    return {key: value for key, value in record.items() if value is not None}


def cpu_load(root: Path = ROOT) -> CpuLoad:
    """Return the counters of /proc/stat and the load average of now."""
    words = (_read(root / "proc/stat") or "").partition("\n")[0].split()
    ticks = [int(word) for word in words[1:] if word.isdigit()] if words[:1] == ["cpu"] else []
    load = (_read(root / "proc/loadavg") or "").split()
    return CpuLoad(
        steal_ticks=ticks[STEAL_COLUMN] if len(ticks) > STEAL_COLUMN else None,
        ticks=sum(ticks[: STEAL_COLUMN + 1]) or None,
        load_average_1min=_number(load[0]) if load else None,
        cores=os.cpu_count(),
    )


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
    """Return governor and frequencies of core 0, in MHz, where the kernel shows them (virtual machines seldom do)."""
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    record: dict[str, Any] = {"cpu_governor": _read(folder / "scaling_governor")}
    for key, name in (("", "scaling_cur_freq"), ("_min", "scaling_min_freq"), ("_max", "scaling_max_freq")):
        khz = _number(_read(folder / name))
        record[f"cpu_frequency{key}_mhz"] = None if khz is None else khz / 1000
    return record


def container_cpu_limit(root: Path = ROOT) -> float | None:
    """Return how many cores' worth of time the control groups allow, the smallest on the way up; None = no limit seen.

    Version 2 has cpu.max ("150000 100000" or "max 100000"), version 1 two files with -1 for no limit.
    """
    limits = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            limits += _limits(root / "sys/fs/cgroup", path, _limit_v2)
        elif "cpu" in controllers.split(","):
            limits += _limits(root / "sys/fs/cgroup" / controllers, path, _limit_v1)
            limits += _limits(root / "sys/fs/cgroup/cpu", path, _limit_v1)
    return min(limits, default=None)


def memory_total_bytes(root: Path = ROOT) -> int | None:
    """Return the memory of the machine in bytes."""
    for line in (_read(root / "proc/meminfo") or "").splitlines():
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


def _limits(mount: Path, path: str, limit: Callable[[Path], float | None]) -> list[float]:
    """Return the limits of the group `path` below `mount` and of its parents, the mount itself included."""
    group = PurePosixPath(path.lstrip("/"))
    if ".." in group.parts:  # a path outside this container's view: only the mount itself can be read
        group = PurePosixPath()
    found = [limit(mount / folder) for folder in (group, *group.parents)]
    return [cores for cores in found if cores is not None]


def _limit_v2(folder: Path) -> float | None:
    quota_us, _, period_us = (_read(folder / "cpu.max") or "max").partition(" ")
    return None if quota_us == "max" else _cores(quota_us, period_us)


def _limit_v1(folder: Path) -> float | None:
    return _cores(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _cores(quota_us: str | None, period_us: str | None) -> float | None:
    quota, period = _number(quota_us), _number(period_us)
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _cpuinfo(root: Path) -> dict[str, str]:
    """Return the first value of each key of /proc/cpuinfo: the cores of one machine agree in what is read here."""
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _read(path: Path) -> str | None:
    """Return the text of a kernel file without the blanks and NULs at its ends; None where missing, denied or empty."""
    try:
        return path.read_text(errors="replace").strip("\0 \t\n") or None
    except OSError:
        return None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
