"""Every trace through every policy at several cache sizes: hit ratios, a table and a chart.

Ours is the data plane's C code (native/cache), driven by perf/native/cachesim.c; the others are in policies.py.
"""

from __future__ import annotations

import json
import subprocess
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from perf.cache.policies import REFERENCES, hits
from perf.cache.traces import all_traces

OURS = "ours"
SIZES = (0.01, 0.05, 0.1, 0.2, 0.4)
"""Of the blocks that a trace may touch."""
BLOCKS, REQUESTS = 40_000, 400_000
FOLDER = Path(__file__).with_name("results")
QUICK = 10
"""So many times smaller."""
POLICIES = (*REFERENCES, OURS, f"{OURS}, 4 shards")
LINES = (("--", 1.2), ("-.", 1.2), (":x", 1.4), ("-", 2.2), ("o", 0.0))
"""How a chart draws each: the last one lies on the one before it, so it has points alone."""


@dataclass(frozen=True)
class Ratio:
    """One run."""

    trace: str
    policy: str
    frames: int
    size: float
    hit_ratio: float
    ns: float = 0.0
    """Per request; ours only."""


def replay(binary: Path, trace: array[int], frames: int, shards: int) -> tuple[float, float]:
    """The data plane's cache on a trace: hit ratio, and nanoseconds a request. Raises CalledProcessError."""
    run = subprocess.run(
        [binary, str(frames), str(shards)], input=trace.tobytes(), capture_output=True, check=True, timeout=300
    )
    hit, requests, spent_ns = map(int, run.stdout.split())
    return hit / requests, spent_ns / requests


def run(binary: Path, say: Callable[[str], None], *, quick: bool = False) -> list[Ratio]:
    """All of them. `binary` is cachesim."""
    scale = QUICK if quick else 1
    blocks = BLOCKS // scale
    found = []
    for name, trace in all_traces(blocks, REQUESTS // scale).items():
        say(f"{name}: {len(trace)} requests")
        for size in SIZES:
            frames = max(64, int(blocks * size))
            for policy, make in REFERENCES.items():
                found.append(Ratio(name, policy, frames, size, hits(make(frames), trace) / len(trace)))
            for policy, shards in ((OURS, 1), (POLICIES[-1], 4)):
                ratio, ns = replay(binary, trace, frames, shards)
                found.append(Ratio(name, policy, frames, size, ratio, ns))
    return found


def markdown(found: list[Ratio]) -> str:
    """A table a trace: a row a policy, a column a size."""
    lines = ["# Hit ratios on generated traces", "", "Cache sizes are fractions of the blocks a trace may touch.", ""]
    for trace in dict.fromkeys(ratio.trace for ratio in found):
        lines += [f"| {trace} | {' | '.join(f'{size:.0%}' for size in SIZES)} |", "| --- |" + " ---: |" * len(SIZES)]
        for policy in POLICIES:
            row = {ratio.size: ratio.hit_ratio for ratio in found if (ratio.trace, ratio.policy) == (trace, policy)}
            lines.append(f"| {policy} | {' | '.join(f'{row[size]:.1%}' for size in SIZES)} |")
        lines.append("")
    return "\n".join(lines)


def chart(found: list[Ratio], path: Path) -> Path:
    """Hit ratio over cache size, a panel a trace. Needs matplotlib."""
    from matplotlib import pyplot

    from perf.charts import save

    traces = list(dict.fromkeys(ratio.trace for ratio in found))
    figure, axes = pyplot.subplots(2, (len(traces) + 1) // 2, figsize=(11, 6), layout="constrained")
    for axis, trace in zip(axes.flat, traces, strict=False):
        for policy, (style, width) in zip(POLICIES, LINES, strict=True):
            points = [(r.size, r.hit_ratio) for r in found if (r.trace, r.policy) == (trace, policy)]
            axis.plot(*zip(*points, strict=True), style, label=policy, linewidth=width, markersize=5)
        axis.set_title(trace, fontsize=9, loc="left")
        axis.set_ylim(0, 1)
    for axis in axes.flat[len(traces) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel("cache, of the blocks that a trace may touch", fontsize=9)
    figure.supylabel("hit ratio", fontsize=9)
    return save(figure, path)


def write(found: list[Ratio], path: Path) -> list[Path]:
    """The figures, the table and the chart, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(ratio) for ratio in found], indent=1) + "\n")
    page = path.with_suffix(".md")
    page.write_text(markdown(found))
    return [path, page, chart(found, path.with_suffix(".png"))]
