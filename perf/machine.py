"""What machine this is: part of every result, for a figure without its machine means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from perf.model import Machine

_VERSIONS = {
    "fio": ["fio", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "qemu-nbd": ["qemu-nbd", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "nbd-server": ["nbd-server", "-V"],
    "gcc": ["gcc", "--version"],
}


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _mitigations() -> str:
    active = []
    for path in sorted(Path("/sys/devices/system/cpu/vulnerabilities").glob("*")):
        state = _text(str(path))
        if not state.startswith("Not affected"):
            active.append(f"{path.name}: {state}")
    return "; ".join(active) or "none needed"


def _disk(path: Path) -> str:
    device = _first_line(["findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", "-T", str(path)])
    return " ".join(device.split())


def processor_ticks() -> tuple[int, int]:
    """Clock ticks that the hypervisor kept from this machine, and all ticks, since it started."""
    fields = [int(field) for field in _text("/proc/stat").splitlines()[0].split()[1:]]
    return (fields[7] if len(fields) > 7 else 0), sum(fields[:8])


def stolen_since(before: tuple[int, int]) -> float:
    """The share of the processors that the hypervisor gave to others since `before`."""
    stolen, total = (now - then for now, then in zip(processor_ticks(), before, strict=True))
    return stolen / total if total > 0 else 0.0


def describe(disk: Path) -> Machine:
    """This machine; `disk`: where the files of the disk suites lie."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=_cpu(),
        cpus=os.cpu_count() or 1,
        memory_bytes=memory,
        kernel=platform.release(),
        mitigations=_mitigations(),
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        virtual=_first_line(["systemd-detect-virt", "--vm"])
        or ("kvm" if "hypervisor" in _text("/proc/cpuinfo") else "none"),
        disk=_disk(disk),
        versions={name: version for name, command in _VERSIONS.items() if (version := _first_line(command))},
    )


_WRITTEN = (":!perf/results", ":!README.md", ":!docs/performance.md")


def commit(root: Path) -> str:
    """The tree's commit, with `+changes` where files differ from it: all but those that `perf` itself writes."""
    head = _first_line(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _first_line(
        ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN]
    )
    return (head or "unknown") + ("+changes" if changed else "")
