"""Instructions by function: the addresses that perf/native/steps counted, given names.

Names come from the objects' own symbol tables (`nm`) through /proc/PID/maps. The C library is stripped, and
its memcpy is chosen by the processor at start: those few are found by asking this process, which has the same
library on the same processor, where they ended up.
"""

from __future__ import annotations

import ctypes
import subprocess
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CHOSEN_AT_START = ("memcpy", "memmove", "memset", "memcmp", "strlen")


@dataclass(frozen=True)
class Mapping:
    """One executable mapping; `bias`: what to take from an address to get the object's own."""

    start: int
    end: int
    bias: int
    path: str


@dataclass
class Profile:
    """Own instructions by `object:function`, and calls by function: how often its first instruction ran."""

    own: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        """All of them."""
        return sum(self.own.values())

    def minus(self, other: Profile) -> Profile:
        """What this profile did more than `other`."""
        left = Profile(Counter(self.own), Counter(self.calls))
        left.own.subtract(other.own)
        left.calls.subtract(other.calls)
        return left


@cache
def _load_bias(path: str) -> int:
    """Virtual address minus file offset of an object's executable segment, from its program headers."""
    done = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        words = line.split()
        if words[:1] == ["LOAD"] and "E" in "".join(words[6:-1]):
            return int(words[2], 16) - int(words[1], 16)
    return 0


def mappings(text: str) -> list[Mapping]:
    """Executable mappings of /proc/PID/maps."""
    found = []
    for line in text.splitlines():
        span, mode, offset, _, _, *path = line.split(maxsplit=5)
        if "x" not in mode:
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        name = path[0] if path else "anonymous"
        shift = _load_bias(name) if name.startswith("/") else 0
        found.append(Mapping(start, end, start - int(offset, 16) - shift, name))
    return found


@cache
def _symbols(path: str) -> tuple[list[int], list[str]]:
    """Function starts and names of an object, sorted; the dynamic table where there is no other."""
    table: dict[int, str] = {}
    for option in ("-D", "-a"):
        done = subprocess.run(["nm", option, "--defined-only", path], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in "tTwWiI":
                table[int(words[0], 16)] = words[2].split("@")[0]
    if Path(path).name.startswith("libc.so"):
        table |= _chosen(path)
    starts = sorted(table)
    return starts, [table[start] for start in starts]


def _chosen(path: str) -> dict[int, str]:
    """Where this processor's memcpy and its like are, as the object's own addresses."""
    library = ctypes.CDLL(None)
    own = mappings(Path("/proc/self/maps").read_text())
    found: dict[int, str] = {}
    for name in CHOSEN_AT_START:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        for mapping in own:
            if mapping.start <= address < mapping.end and Path(mapping.path).samefile(path):
                found.setdefault(address - mapping.bias, name)
    return found


def name_of(address: int, where: list[Mapping]) -> tuple[str, bool]:
    """`object:function`, and whether the address is the function's first."""
    for mapping in where:
        if mapping.start <= address < mapping.end:
            if not mapping.path.startswith("/"):
                return mapping.path, False
            starts, names = _symbols(mapping.path)
            at = bisect_right(starts, address - mapping.bias) - 1
            short = Path(mapping.path).name.split(".")[0]
            return (f"{short}:{names[at]}", starts[at] == address - mapping.bias) if at >= 0 else (short, False)
    return "unknown", False


def parse(text: str, where: list[Mapping]) -> Profile:
    """Lines of ADDRESS COUNT, as steps writes them."""
    profile = Profile()
    for line in text.splitlines():
        address, count = line.split()
        name, first = name_of(int(address, 16), where)
        profile.own[name] += int(count)
        if first:
            profile.calls[name.partition(":")[2]] += int(count)
    return profile
