"""Running a server, and one point once: our load generator, fio through its nbd engine, or fio on the file itself."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perf import fio, servers, usage
from perf.model import Latency, Sample
from perf.peers import STORAGE, Peer
from perf.servers import PSK_HEX, PSK_IDENTITY, Place, Running
from perf.suites import Load, Suite

NATIVE = Path(__file__).with_name("native")
EXTRA_LIMIT_S = 60.0
VERIFY_BYTES = 64 << 20
VERIFY_LOOPS = 2
WARM_UP_S = 0.05


class PointError(Exception):
    """A point that failed: the generator's own words."""


def build(out: Path) -> None:
    """Compile the measuring tools. Raises PointError with the compiler's output."""
    done = subprocess.run(
        ["make", "-s", "-C", str(NATIVE), f"OUT={out.resolve()}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PointError(f"building the load generator failed: {done.stderr.strip()}")


def _run(command: list[str], limit_s: float, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise PointError(f"{command[0]} did not end within {limit_s:.0f} s") from error
    except OSError as error:
        raise PointError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise PointError((done.stderr.strip() or f"{command[0]} exit {done.returncode}")[-400:])
    return done.stdout


def loadgen_json(tool: Path, running: Running, arguments: list[str], limit_s: float = EXTRA_LIMIT_S) -> dict[str, Any]:
    """The load generator's own JSON."""
    text = _run([str(tool), *running.loadgen_arguments(), *arguments], limit_s)
    parsed: dict[str, Any] = json.loads(text)
    return parsed


@contextmanager
def serving(peer: Peer, place: Place) -> Iterator[Running]:
    """A server for the length of the block, filled where it starts empty. Raises ServerError, PointError."""
    plan = peer.plan(place)
    with servers.running(plan, place) as server:
        for kind in ["write"] * plan.prefill + ["read"] * plan.warm:
            block = 1 << 20
            fill = ["--mix", f"{kind}=100", "--block", "1m", "--depth", "4", "--sequential", "--count"]
            loadgen_json(place.build / "loadgen", server, [*fill, str(place.size // block)])
        yield server


def loadgen(tool: Path, running: Running, load: Load, peer: str, turn: int, seconds: float) -> Sample:
    """One sample by our load generator."""
    length = ["--seconds", str(seconds), "--warmup", str(WARM_UP_S if load.warmup is None else load.warmup)]
    out = loadgen_json(tool, running, [*load.arguments(), *length], seconds + EXTRA_LIMIT_S)
    latency, server, requests = out["latency"]["all"], out["server"], int(out["requests"])
    if requests == 0:
        raise PointError("no request was answered")
    names = ("mean", "p50", "p90", "p99", "p999", "max")
    return Sample(
        peer=peer,
        round=turn,
        requests=requests,
        iops=out["iops"],
        latency=Latency(**{f"{name}_us": latency[f"{name}_ns"] / 1000 for name in names}),
        server_cpu_us=server["cpu_ns_per_request"] / 1000,
        client_cpu_us=out["client"]["cpu_ns_per_request"] / 1000,
        rss_bytes=server["rss_bytes"],
        rss_anon_bytes=server["rss_anon_bytes"],
        threads=server["threads"],
        switches_per_request=server["switches"] / requests,
    )


def _weighted(values: list[tuple[float, int]]) -> float:
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else 0.0


def fio_latency(report: fio.Report) -> Latency:
    """All jobs and directions together. Percentiles of several are the worst one: they cannot be merged."""
    parts = [d for job in report.jobs for d in job.directions]
    blocks = [(d.clat_ns if d.clat_ns.percentile else d.lat_ns, d.total_ios) for d in parts]

    def worst(percent: float) -> float:
        return max((b.at(percent) for b, _ in blocks), default=0.0) / 1000

    return Latency(
        mean_us=_weighted([(d.lat_ns.mean, d.total_ios) for d in parts]) / 1000,
        p50_us=worst(50),
        p90_us=worst(90),
        p99_us=worst(99),
        p999_us=worst(99.9),
        max_us=max((d.lat_ns.maximum for d in parts), default=0.0) / 1000,
    )


def fio_sample(report: fio.Report, peer: str, turn: int, cost: usage.Usage | None) -> Sample:
    """fio's report as a sample; `cost` is what the server used meanwhile."""
    requests = sum(job.requests for job in report.jobs)
    if requests == 0:
        raise PointError("fio made no request")
    runtime_s = max(d.runtime_ms for job in report.jobs for d in job.directions) / 1000
    return Sample(
        peer=peer,
        round=turn,
        requests=requests,
        iops=requests / runtime_s,
        latency=fio_latency(report),
        server_cpu_us=cost.cpu_ns / 1000 / requests if cost else None,
        rss_bytes=cost.rss_bytes if cost else None,
        rss_anon_bytes=cost.rss_anon_bytes if cost else None,
        threads=cost.threads if cost else None,
    )


def run_fio(arguments: list[str], environment: dict[str, str], limit_s: float) -> fio.Report:
    """fio, once. Raises PointError."""
    with tempfile.TemporaryDirectory(prefix="nvfio") as folder:
        out = Path(folder) / "out.json"
        command = ["fio", "--output-format=json", f"--output={out}", f"--aux-path={folder}", *arguments]
        _run(command, limit_s, {**os.environ, **environment})
        try:
            return fio.parse_file(out)
        except fio.FioError as error:
            raise PointError(str(error)) from error


def fio_nbd(running: Running, suite: Suite, section: str, peer: str, turn: int, seconds: float) -> Sample:
    """One section of a suite's job file through fio's nbd engine."""
    uri = running.uri()
    if running.place.transport == "tls":
        keys = running.place.folder / "keys.psk"
        uri = uri.replace("://", f"://{PSK_IDENTITY}@") + f"?tls-type=psk&tls-psk-file={keys}"
        assert PSK_HEX in keys.read_text()
    environment = {
        "NBD_URI": uri,
        "RUNTIME": f"{round(seconds * 1000)}ms",
        "SIZE": str(running.place.size),
        "VERIFY_SIZE": str(min(running.place.size, VERIFY_BYTES)),
        "LOOPS": str(VERIFY_LOOPS),
    }
    before = usage.read(running.pid)
    report = run_fio([f"--section={section}", str(suite.job_file)], environment, seconds + EXTRA_LIMIT_S)
    after = usage.read(running.pid)
    cost = usage.Usage(after.cpu_ns - before.cpu_ns, after.rss_bytes, after.rss_anon_bytes, after.threads)
    return fio_sample(report, peer, turn, cost)


def storage_arguments(load: Load, file: Path, size: int, direct: bool, seconds: float) -> list[str] | None:
    """fio's io_uring engine doing a load generator's point on the file itself; None: it has no such thing."""
    mix = {name: int(percent) for name, _, percent in (item.partition("=") for item in load.mix.split(","))}
    if set(mix) - {"read", "write"} or load.structured:
        return None
    kind = {1: "read" if "read" in mix else "write", 2: "rw"}[len(mix)]
    if not load.sequential:
        kind = f"rand{kind}"
    arguments = [
        "--name=storage", "--ioengine=io_uring", f"--filename={file}", f"--size={size}", f"--rw={kind}",
        f"--bs={load.block_bytes}", f"--iodepth={load.depth}", f"--numjobs={load.connections}", "--group_reporting",
        f"--direct={int(direct)}", "--time_based", f"--runtime={round(seconds * 1000)}ms", "--norandommap",
        "--percentile_list=50:90:99:99.9",
    ]  # fmt: skip
    return [*arguments, f"--rwmixread={mix['read']}"] if len(mix) == 2 else arguments


GROUPS_MAX = 4
"""Records of a write-back log that are under way at once (native/include/limits.h)."""


def log_arguments(load: Load, file: Path, size: int, seconds: float) -> list[str]:
    """fio writing what a write-back log writes for a point, and nothing else: records in sequence, past the cache."""
    assert load.group is not None
    depth = min(GROUPS_MAX, max(1, load.depth // load.group))
    return [
        "--name=storage", "--ioengine=io_uring", f"--filename={file}", f"--size={size}", "--rw=write",
        f"--bs={(load.group + 1) * load.block_bytes}", f"--iodepth={depth}", "--direct=1", "--time_based",
        f"--runtime={round(seconds * 1000)}ms", "--percentile_list=50:90:99:99.9",
    ]  # fmt: skip


def committed(load: Load, file: Path, size: int, turn: int, seconds: float) -> Sample:
    """The log device's own rate of blocks, as many a record as the point says."""
    assert load.group is not None
    report = run_fio(log_arguments(load, file, size, seconds), {}, seconds + EXTRA_LIMIT_S)
    sample = fio_sample(report, STORAGE, turn, None)
    blocks = sample.requests * load.group
    return sample.model_copy(update={"iops": sample.iops * load.group, "requests": blocks})


def storage(load: Load, file: Path, size: int, direct: bool, turn: int, seconds: float) -> Sample | None:
    """The storage's ceiling: the same work without any server, or what a log makes of it."""
    if load.group is not None:
        return committed(load, file, size, turn, seconds)
    arguments = storage_arguments(load, file, size, direct, seconds)
    if arguments is None:
        return None
    return fio_sample(run_fio(arguments, {}, seconds + EXTRA_LIMIT_S), STORAGE, turn, None)
