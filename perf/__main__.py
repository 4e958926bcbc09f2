"""`python -m perf`: run, qos, cache, report, readme, compare, counts, profile, list."""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from perf import compare as comparing
from perf import counts as counting
from perf import qos as limiting
from perf import readme as pages
from perf import report as reporting
from perf import results, sampling, suites
from perf import run as running
from perf.cache import offline
from perf.generators import PointError, build
from perf.model import Result
from perf.peers import BY_NAME, OURS, STORAGE
from perf.results import ResultError
from perf.servers import ServerError
from perf.suites import SuiteError, bytes_of

COUNTED = (OURS, "ceiling", "nbdkit-file", "qemu-nbd-uring")
app = typer.Typer(help="Measure nbdvvol beside other NBD servers.", no_args_is_help=True, add_completion=False)


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def _fail(text: str, status: int = 1) -> typer.Exit:
    print(f"error: {text}", file=sys.stderr)
    return typer.Exit(status)


def _write(result: Result, path: Path) -> None:
    """A result file, its Markdown and charts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.dump(result))
    print(path)
    for written in reporting.write(results.load(path), path):
        print(written)


def _check_peers(names: list[str]) -> None:
    unknown = set(names) - set(BY_NAME) - {STORAGE}
    if unknown:
        raise _fail(f"no peer {', '.join(sorted(unknown))}; there are: {', '.join(BY_NAME)}, {STORAGE}", 2)


@app.command()
def run(
    suite: Annotated[list[str] | None, typer.Option(help="Only this suite (repeatable); all without it.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only this peer (repeatable).")] = None,
    point: Annotated[list[str] | None, typer.Option(help="Only this point (repeatable).")] = None,
    quick: Annotated[bool, typer.Option(help="Two short rounds, of suite core without --suite: does it run?")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each point is measured.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.05, help="Length of one measurement.")] = 0.7,
    size: Annotated[str, typer.Option(help="Bytes of each server's file.")] = "1g",
    counts: Annotated[
        bool | None, typer.Option(help="Also count system calls, instructions and idle cost; a complete run does.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; perf/results/TIME.json without it.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="Result file whose suites these replace, or which they are added to.")
    ] = None,
) -> None:
    """Run suites and write a result file, its Markdown and charts."""
    _check_peers(peer or [])
    if into and (peer or point or quick or out):
        raise _fail("--into takes whole suites: leave --peer, --point, --quick and --out out", 2)
    try:
        options = running.Options(suite or (), peer or (), point or (), rounds, seconds, bytes_of(size))
        options = options.quickened() if quick else options
        before = results.load(into) if into and into.exists() else None
        result = running.run(options, say)
        if options.complete if counts is None else counts:
            say("counting")
            chosen = tuple(p for p in (peer or COUNTED) if p in BY_NAME)
            result = counting.counted(result, options, chosen, say)
        if before is not None:
            result = results.joined(before, result, suites.complete())
    except (SuiteError, PointError, ResultError) as error:
        raise _fail(str(error), 2) from error
    _write(result, into or out or results.FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json")


@app.command()
def qos(
    seconds: Annotated[float, typer.Option(min=0.2, help="Length of one measurement.")] = 10.0,
    quick: Annotated[bool, typer.Option(help="Half a second each: does it run?")] = False,
    out: Annotated[Path | None, typer.Option(help="Result file; perf/results/qos-TIME.json without it.")] = None,
    into: Annotated[Path | None, typer.Option(help="Result file whose limits and shares these replace.")] = None,
) -> None:
    """Limits and shares with the real daemon: what gets through, and how long requests take."""
    if into and (quick or out):
        raise _fail("--into takes a measurement at full length: leave --quick and --out out", 2)
    options = running.Options(quick=quick)
    try:
        before = results.load(into) if into else None
        result = running.run_suites(options, [], say)
        result = limiting.measured(result, options, min(seconds, 0.5) if quick else seconds, say)
        if before is not None:
            of_suites = {"rounds": before.rounds, "seconds": before.seconds}
            result = results.joined(before, result.model_copy(update=of_suites), suites.complete())
    except (PointError, ServerError, ResultError) as error:
        raise _fail(str(error), 2) from error
    _write(result, into or out or results.FOLDER / f"qos-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json")


@app.command()
def cache(
    quick: Annotated[bool, typer.Option(help="Traces a tenth as long: does it run?")] = False,
    out: Annotated[Path | None, typer.Option(help="Result file; perf/cache/results/TIME.json without it.")] = None,
) -> None:
    """Hit ratios of the data plane's cache on generated traces, beside LRU, ARC and S3-FIFO, without any server."""
    folder = running.Options().build
    try:
        build(folder)
    except PointError as error:
        raise _fail(str(error), 2) from error
    path = out or offline.FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    for written in offline.write(offline.run(folder / "cachesim", say, quick=quick), path):
        print(written)


@app.command()
def report(file: Path) -> None:
    """Write the Markdown table and charts of a result file beside it."""
    try:
        result = results.load(file)
    except ResultError as error:
        raise _fail(str(error), 2) from error
    for written in reporting.write(result, file):
        print(written)


@app.command()
def readme(file: Path) -> None:
    """Write a complete run's tables into README.md and docs/performance.md."""
    try:
        written = pages.write(file)
    except (ResultError, pages.ReadmeError) as error:
        raise _fail(str(error), 2) from error
    for path in written:
        print(path)


@app.command()
def compare(old: Path, new: Path) -> None:
    """Compare two result files; status 1 when something got worse beyond noise."""
    try:
        before, after = results.load(old), results.load(new)
        changes = comparing.compare(before, after)
    except (ResultError, comparing.CompareError) as error:
        raise _fail(str(error), 2) from error
    for warning in comparing.warnings(before, after):
        say(f"warning: {warning}")
    print(comparing.table(changes))
    worse = [change for change in changes if change.regression]
    if worse:
        raise _fail(f"{len(worse)} of {len(changes)} figures got worse beyond noise")


@app.command()
def counts(
    peer: Annotated[list[str] | None, typer.Option(help="Servers to count (repeatable); ours without it.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer requests.")] = False,
    into: Annotated[Path | None, typer.Option(help="Result file whose counts these replace: of all servers.")] = None,
) -> None:
    """Count system calls, instructions and idle cost per request, and print where instructions go."""
    _check_peers(peer or [])
    if into and (peer or quick):
        raise _fail("--into takes what a complete run counts: leave --peer and --quick out", 2)
    options = running.Options(quick=quick)
    chosen = tuple(p for p in (COUNTED if into else peer or [OURS]) if p in BY_NAME)
    try:
        before = results.load(into) if into else None
        result = counting.counted(running.run_suites(options, [], say), options, chosen, say)
        if into and before is not None:
            _write(results.joined(before, result, suites.complete()), into)
    except (PointError, ResultError) as error:
        raise _fail(str(error), 2) from error
    found = result.counts
    for count in found:
        print(f"{count.peer}\t{count.work}\t{count.name}\t{count.value:.4g}")
    if not found:
        raise _fail("nothing could be counted")


@app.command()
def profile(
    point: Annotated[str, typer.Argument(help="SUITE/POINT of a suite of the load generator; see `list`.")],
    peer: Annotated[str, typer.Option(help="Whose time to take apart.")] = OURS,
    seconds: Annotated[float, typer.Option(min=0.2, help="How long to watch.")] = 3.0,
    flame: Annotated[Path | None, typer.Option(help="Also write a flame graph here (SVG).")] = None,
) -> None:
    """Where a server's time goes under load, kernel and user, by perf's samples."""
    _check_peers([peer])
    try:
        options = running.Options()
        build(options.build)
        print(sampling.report_point(options, point, peer, seconds, flame))
    except (SuiteError, PointError, ServerError) as error:
        raise _fail(str(error), 2) from error


@app.command("list")
def list_all() -> None:
    """Suites with their points, and peers."""
    for name in suites.names():
        suite = suites.load(name)
        print(f"{name} ({suite.generator}, {suite.backend}, {suite.transport}): {', '.join(suite.point_names())}")
    for peer in BY_NAME.values():
        print(f"peer {peer.name}: {peer.missing() or 'ready'}")


if __name__ == "__main__":
    # Ending by SIGTERM unwinds like ending by Ctrl-C: servers are stopped and their files removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
