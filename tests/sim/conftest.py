"""The simulators, built once a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD_LIMIT_S = 400


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where nvsim, nvqos and their mutants are, freshly built."""
    built = subprocess.run([ROOT / "scripts/sim", "--build"], capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert built.returncode == 0, built.stdout + built.stderr
    return ROOT / built.stdout.strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever comes first waits for the compiler, and every other test fails with it if that is cut short."""
    for item in items:
        needs = "folder" in getattr(item, "fixturenames", ())
        if needs and item.path.parent == HERE and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(BUILD_LIMIT_S + 120))
