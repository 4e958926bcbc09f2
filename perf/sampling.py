"""Where a server's time goes, kernel and user: the stacks that `perf record` samples under one point's load.

It samples the processor clock, which virtual machines have even where they have no performance counters. User code is
built without frame pointers, so of user stacks only the innermost function is trusted; the kernel's stacks are whole.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from perf import suites
from perf.generators import PointError, loadgen_json, serving
from perf.peers import BY_NAME
from perf.run import Options, fill, place_of
from perf.suites import SuiteError

FREQUENCY_HZ = 2999
"""Not a divisor of anything that ticks."""
KERNEL = "[kernel.kallsyms]"
SHOWN = 24
Stack = tuple[str, ...]


def parse_script(text: str) -> Counter[Stack]:
    """Samples of `perf script -F comm,ip,sym,dso` by stack, outermost first: `user`, its function, kernel functions."""
    found: Counter[Stack] = Counter()
    frames: list[tuple[str, str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith((" ", "\t")) and line.strip():
            _, _, rest = line.strip().partition(" ")
            name, _, home = rest.rpartition(" (")
            frames.append((name.partition("+")[0] or "unknown", home.rstrip(")")))
        elif not line.strip() and frames:
            found[_stack(frames)] += 1
            frames = []
    return found


def _stack(frames: list[tuple[str, str]]) -> Stack:
    """perf writes the innermost frame first."""
    kernel = [name for name, home in frames if home == KERNEL]
    user = [f"{Path(home).name.split('.')[0]}:{name}" for name, home in frames if home != KERNEL]
    return ("kernel" if kernel else "user", *user[:1], *reversed(kernel))


@dataclass
class Shares:
    """Samples by function: `own`, the function itself ran; `under`, it or what it called."""

    total: int = 0
    kernel: int = 0
    own: Counter[str] = field(default_factory=Counter)
    under: Counter[str] = field(default_factory=Counter)


def shares(stacks: Counter[Stack]) -> Shares:
    """Of all stacks."""
    found = Shares()
    for stack, count in stacks.items():
        found.total += count
        found.kernel += count if stack[0] == "kernel" else 0
        found.own[stack[-1]] += count
        for name in set(stack[1:]):
            found.under[name] += count
    return found


def table(found: Shares, cpu_us: float) -> str:
    """Markdown: the functions that cost most, by themselves, with what is below them, and what that is per request."""
    lines = [
        f"{found.total} samples, {found.kernel / found.total:.0%} in the kernel; {cpu_us:.2f} µs of CPU per request",
        "", "| function | itself | with what it calls | µs per request, itself |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, count in found.own.most_common(SHOWN):
        own, under = count / found.total, found.under[name] / found.total
        lines.append(f"| {name} | {own:.1%} | {under:.1%} | {own * cpu_us:.3f} |")
    lines += ["", "| widest in the kernel | with what it calls |", "| --- | ---: |"]
    wide = [(name, count) for name, count in found.under.most_common() if ":" not in name][: SHOWN // 2]
    lines += [f"| {name} | {count / found.total:.1%} |" for name, count in wide]
    return "\n".join(lines)


# ---- the flame graph ----

WIDTH, ROW, LEAST = 1200, 17, 0.003
_COLOURS = {"user": "#e8a33d", "kernel": "#d9694a"}


def _frames(
    stacks: Iterable[tuple[Stack, int]], depth: int, left: float, scale: float
) -> Iterator[tuple[str, int, float, float]]:
    """Name, depth, left edge and width of every frame that is wide enough to be seen."""
    groups: dict[str, list[tuple[Stack, int]]] = {}
    for stack, count in stacks:
        if len(stack) > depth:
            groups.setdefault(stack[depth], []).append((stack, count))
    for name, inside in sorted(groups.items()):
        width = sum(count for _, count in inside) * scale
        if width >= LEAST * WIDTH:
            yield name, depth, left, width
            yield from _frames(inside, depth + 1, left, scale)
        left += width


def flame(stacks: Counter[Stack], title: str) -> str:
    """An SVG: a frame's width is its share of the samples, what it calls stands on it."""
    total = sum(stacks.values())
    frames = list(_frames(stacks.items(), 0, 0.0, WIDTH / total))
    height = ROW * (max(depth for _, depth, _, _ in frames) + 3)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"',
        ' font-family="monospace" font-size="11">',
        f'<text x="4" y="14">{escape(title)}</text>',
    ]
    for name, depth, left, width in frames:
        top, share = height - ROW * (depth + 1), width / WIDTH
        text = escape(name[: max(0, int(width / 6.7) - 1)])
        colour = _COLOURS["user" if depth == 1 or name == "user" else "kernel"]
        lines.append(
            f'<g><title>{escape(name)} {share:.1%}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" '
            f'height="{ROW - 1}" fill="{colour}"/><text x="{left + 2:.1f}" y="{top + 12}">{text}</text></g>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


# ---- measuring ----


def _recorded(pid: int, seconds: float, folder: Path) -> Counter[Stack]:
    data = folder / "perf.data"
    record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY_HZ), "-g", "-p", str(pid), "-o", str(data)]
    done = subprocess.run([*record, "--", "sleep", str(seconds)], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not data.exists():
        raise PointError(f"perf record does not work here: {done.stderr.strip()[-300:]}")
    script = ["perf", "script", "-i", str(data), "-F", "comm,ip,sym,dso"]
    stacks = parse_script(subprocess.run(script, capture_output=True, text=True, check=False).stdout)
    if not stacks:
        raise PointError("perf recorded no sample: the server did nothing, or sampling is not permitted")
    return stacks


@contextmanager
def _loaded(command: list[str]) -> Iterator[None]:
    """The load generator in the background for the length of the block."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        try:
            yield
        finally:
            load.terminate()


def report_point(options: Options, name: str, peer: str, seconds: float, graph: Path | None) -> str:
    """Load one server as a point says, and tell where its time went. Raises PointError, SuiteError, ServerError."""
    suite_name, _, point = name.partition("/")
    suite = suites.load(suite_name)
    if suite.generator != "loadgen" or point not in suite.points:
        raise SuiteError(
            f"no point {name!r}: write SUITE/POINT, a suite of the load generator; see `python -m perf list`"
        )
    if not shutil.which("perf"):
        raise PointError("perf is not installed (package linux-perf)")
    parent = options.disk if suite.backend == "disk" else options.tmpfs
    parent.mkdir(parents=True, exist_ok=True)
    size = suites.bytes_of(suite.size) if suite.size else options.size
    with (
        tempfile.TemporaryDirectory(prefix="nv", dir="/tmp") as folder,
        tempfile.TemporaryDirectory(prefix="nbdvvol-perf-", dir=parent) as store,
    ):
        file = Path(store) / "disk.img"
        if suite.backend != "null":
            fill(file, size)
        place = place_of(options, suite, Path(folder), file, size)
        with serving(BY_NAME[peer], place) as server:
            tool, load = options.build / "loadgen", suite.points[point].arguments()
            out = loadgen_json(tool, server, [*load, "--seconds", str(seconds)], seconds + 60)
            with _loaded([str(tool), *server.loadgen_arguments(), *load, "--seconds", str(seconds + 2)]):
                stacks = _recorded(server.pid, seconds, Path(folder))
    cpu_us = out["server"]["cpu_ns_per_request"] / 1000
    if graph:
        graph.write_text(flame(stacks, f"{peer}, {name}: {cpu_us:.2f} µs of server CPU per request"))
    return table(shares(stacks), cpu_us)
