"""Reading callgrind's profile files: instructions and calls, by function.

Format: Valgrind manual, "Callgrind Format Specification". Names are compressed: `fn=(7) name` defines
number 7, `fn=(7)` uses it. A `calls=N target` line says that the current `fn` called the last `cfn` N
times; the line after it is that call's inclusive cost and not the function's own.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_NAME = re.compile(r"^c?fn=\((\d+)\)(?: (.*))?$")
_COST = re.compile(r"^[+*\-\d][^ ]* (\d+)")


@dataclass
class Profile:
    """One profile: own instructions and calls received, by function."""

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


def parse(text: str) -> Profile:
    """Read one profile with the default event list (Ir first)."""
    profile, names = Profile(), dict[str, str]()
    function = called = ""
    inclusive = False
    for line in text.splitlines():
        if named := _NAME.match(line):
            number, name = named.groups()
            if name is not None:
                names[number] = name
            if line.startswith("c"):
                called = names[number]
            else:
                function = names[number]
        elif line.startswith("calls="):
            profile.calls[called] += int(line[6:].split()[0])
            inclusive = True
        elif cost := _COST.match(line):
            if not inclusive:
                profile.own[function] += int(cost.group(1))
            inclusive = False
    return profile


def parse_file(path: Path) -> Profile:
    """Read one profile file."""
    return parse(path.read_text(errors="replace"))
