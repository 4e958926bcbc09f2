"""Every fuzzer for some seconds, and proof that a finding is reported: with a planted bug the same run must fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 8


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts/fuzz"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    result = subprocess.run([ROOT / "scripts/fuzz", "--build"], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(500)
@pytest.mark.parametrize("fuzzer", ["transmission", "tls", "desc", "log", "handshake"])
def test_nothing_is_found(fuzzer: str) -> None:
    result = fuzz(SECONDS, fuzzer)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = int(result.stdout.split(": ")[1].split()[0])
    assert runs > 50, f"only {runs} inputs in {SECONDS} s: the fuzzer is not doing its work"


@pytest.mark.timeout(500)
@pytest.mark.parametrize("canary", ["canary", "handshake-canary"])
def test_a_planted_bug_is_reported(canary: str) -> None:
    result = fuzz(150, canary)  # it ends as soon as the bug is found
    assert result.returncode == 1 and "FOUND SOMETHING" in result.stdout, result.stdout + result.stderr
    assert "the planted bug" in result.stdout
    found = list((ROOT / "build/fuzz/findings").glob(f"{canary}-crash-*"))
    assert found, "the input that does it is kept"
    for path in found:
        path.unlink()
