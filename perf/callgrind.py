"""Instructions per request of the code above the I/O port, counted by callgrind in the simulator's steady program.

valgrind cannot run the real data plane (its io_uring_enter never lets other threads go on), so the same C runs on the
simulated port (native/sim/steady.c). What is counted is what lies in the product's own files above the port: neither
the simulation nor the C library. The same source and compiler give the same figure on every machine.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from os.path import normpath
from pathlib import Path

from perf.generators import PointError
from perf.peers import ROOT

ROOMS = ("nbd", "reactor", "volume", "backend")
LOADS = {"read": 32, "structured": 32, "write": 15, "mirror": 15}
"""What steady.c does, and how many requests it has in a batch."""
MAPS = {"region": 32, "runs": 32, "uneven": 32}
"""Reads in random order: of one region, of a million runs of a block each, of a million that differ in length."""
CACHES = {
    "absent": (15, "write-4k past a cache that does not hold it"),
    "held": (15, "write-4k of what a cache holds"),
    "kept": (15, "write-4k into a cache that keeps it"),
    "scan": (8, "read-256k in sequence"),
    "scan-cached": (8, "read-256k in sequence past a cache"),
}
"""What a cache costs beside the same without one: how many requests in a batch, and what they are called."""
CACHE = "cache"
"""One more room, of loads that have a cache."""
INTENT_FILES = frozenset({"volume/intent.c", "volume/intent.h"})
"""What a write to a mirror executes to know that its regions' intents are set."""
BATCHES = 20
COUNTED = "count_batches*"
"""Of steady.c: what it calls is counted, after what opens the world (a million runs, for instance) and warms it up."""
_COST = re.compile(r"(?:\+|-)?\d+|\*")


def parse(text: str) -> Counter[str]:
    """Own instructions by source file, of callgrind's output with neither names nor positions compressed."""
    costs: Counter[str] = Counter()
    current, inclusive = "", False
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and key in ("fl", "fi", "fe"):
            current = normpath(value)  # a header is named as it was found: native/sim/../volume/map.h
        elif equals and key == "calls":
            inclusive = True
        elif line and _COST.fullmatch(line.split(" ", 1)[0]):
            costs[current] += 0 if inclusive else int(line.split()[1])
            inclusive = False
    return costs


def rooms(costs: Counter[str]) -> Counter[str]:
    """Instructions in the product's files above the port, by room."""
    found: Counter[str] = Counter()
    for file, cost in costs.items():
        parts = Path(file).parts
        if "native" in parts and (room := parts[parts.index("native") + 1]) in (*ROOMS, CACHE):
            found[room] += cost
    return found


def _counted(program: Path, load: str) -> Counter[str]:
    """Instructions by source file of all batches together. Raises PointError."""
    with tempfile.TemporaryDirectory(prefix="nvgrind") as folder:
        out = Path(folder) / "out"
        options = ["--tool=callgrind", "--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={out}"]
        only = ["--collect-atstart=no", f"--toggle-collect={COUNTED}"]
        command = ["valgrind", *options, *only, str(program), load, str(BATCHES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PointError(f"callgrind: {done.stderr.strip()[-400:]}")
        return parse(out.read_text())


def build() -> Path:
    """The steady program. Raises PointError with the compiler's output."""
    command = [str(ROOT / "scripts" / "sim"), "--build", "nvsim_steady"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PointError(f"building nvsim_steady failed: {done.stderr.strip()[-400:]}")
    return ROOT / done.stdout.strip() / "nvsim_steady"


def per_request(program: Path, load: str) -> dict[str, float]:
    """Instructions per request by room. Raises PointError."""
    batches = {**LOADS, **MAPS, **{name: batch for name, (batch, _) in CACHES.items()}}
    requests = BATCHES * batches[load]
    return {room: cost / requests for room, cost in rooms(_counted(program, load)).items()}


def share(program: Path, load: str, files: frozenset[str]) -> float:
    """The part of a request's instructions that lies in these source files (native/...). Raises PointError."""
    costs = _counted(program, load)
    inside = sum(cost for file, cost in costs.items() if any(file.endswith(f"native/{name}") for name in files))
    return inside / sum(rooms(costs).values())
