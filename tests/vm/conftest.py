"""Guests for the tests in this folder; every test here boots at least one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lib.procs import short_dir
from tests.vm.guest import ACTIVE, Guest, build_initramfs
from tests.vm.kernel import find_kernel


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Show the logs of every running guest with a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        report.sections += [(f"guest {guest.dir}", guest.logs()) for guest in list(ACTIVE)]


@pytest.fixture(scope="session")
def initramfs() -> Iterator[Path]:
    """What every guest boots from."""
    folder = short_dir()
    try:
        build_initramfs(find_kernel(), folder / "initramfs")
        yield folder / "initramfs"
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def boot(initramfs: Path) -> Iterator[Callable[..., Guest]]:
    """Boot guests: `boot(drives=[...])`; they are ended with the test."""
    with ExitStack() as stack:

        def start(**arguments: Any) -> Guest:
            return stack.enter_context(Guest(initramfs, **arguments))

        yield start
