"""The simulators, built once a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where nvsim, nvqos and their mutants are, freshly built."""
    built = subprocess.run([ROOT / "scripts/sim", "--build"], capture_output=True, text=True, timeout=400)
    assert built.returncode == 0, built.stdout + built.stderr
    return ROOT / built.stdout.strip()
