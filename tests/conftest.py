"""Fixtures shared by all tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.pki import make_pki
from tests.lib.procs import short_dir


@pytest.fixture(scope="session")
def pki() -> Iterator[Path]:
    """Certificates and PSKs: see tests.lib.pki.make_pki."""
    folder = short_dir()
    try:
        yield make_pki(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
