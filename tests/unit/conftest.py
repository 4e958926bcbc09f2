"""Fixtures of several unit tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import generators
from tests.lib.faultfs import FaultFs, fault_fs


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measuring suite's own C programs, built once."""
    out = tmp_path_factory.mktemp("tools")
    generators.build(out)
    return out


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, for registries: they sync every change, of which most of a test's time was made."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="nv"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fs() -> Iterator[FaultFs]:
    """A file system whose device fails, or hangs, when the test says so."""
    with fault_fs() as one:
        yield one
