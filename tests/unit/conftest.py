"""Fixtures of several unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import generators


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measuring suite's own C programs, built once."""
    out = tmp_path_factory.mktemp("tools")
    generators.build(out)
    return out
