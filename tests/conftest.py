"""Fixtures shared by all tests: certificates, running farms, a bystander that must never be harmed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import Scheduling

from tests.lib.beside import TwoEnds
from tests.lib.bystander import Bystander
from tests.lib.farm import ACTIVE, Farm
from tests.lib.pki import make_pki
from tests.lib.procs import short_dir
from tests.lib.shared import SharedFarm


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """How files are dealt out to several workers."""
    return TwoEnds(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the logs of every running farm with a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for farm in list(ACTIVE):
            report.sections.append((f"farm {farm.folder}", farm.log_text()))


@pytest.fixture(scope="session")
def pki() -> Iterator[Path]:
    """Certificates and PSKs: see tests.lib.pki.make_pki."""
    folder = short_dir()
    try:
        yield make_pki(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared(pki: Path) -> Iterator[SharedFarm]:
    """One farm for all wire tests; see tests.lib.shared for its VVols."""
    with SharedFarm(pki) as farm:
        farm.start()
        yield farm


@pytest.fixture
def farms() -> Iterator[Callable[..., Farm]]:
    """Make farms of one's own: `farm = farms(spec)`; each is stopped cleanly at the end and deleted."""
    made: list[Farm] = []

    def make(spec: dict[str, Any], folder: Path | None = None) -> Farm:
        made.append(Farm(spec, folder))
        return made[-1]

    try:
        yield make
        for farm in made:
            farm.stop()
    finally:
        for farm in made:
            farm.remove()


@pytest.fixture(scope="module")
def bystander(shared: SharedFarm) -> Iterator[Bystander]:
    """Another client's verified I/O, all through a module."""
    bystander = Bystander(shared.open("bystander"))
    yield bystander
    bystander.stop()


@pytest.fixture
def unharmed(shared: SharedFarm, bystander: Bystander) -> Iterator[Bystander]:
    """Verified I/O of another client during the test; the same daemons must live on after it."""
    pids = shared.filter_pid(), shared.control_pid
    bystander.check(1)
    yield bystander
    bystander.check(1)
    assert (shared.filter_pid(), shared.control_pid) == pids, "a daemon was restarted"
