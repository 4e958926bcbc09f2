"""The data plane's own unit tests once more on its ASan+UBSan build and on its TSan build: no report is tolerated.

Python itself is not instrumented: the sanitizer's library is preloaded, and what it watches is our C. Leaks of the C
are looked for by the simulator, whose process is ours alone (native/sim, tests/sim).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.lib.pairs import in_pairs

ROOT = Path(__file__).resolve().parents[2]
REPORT_EXIT = 66
TESTS = [
    "protocol",
    "data",
    "durability",
    "life",
    "tls",
    "qos",
    "remote",
    "remote_loss",
    "remote_doubt",
    "remote_bad",
    "trace",
    "cache",
    "cache_stress",
    "log",
    "log_fail",
    "bulk",
    "log_switch",
    "log_opening",
]
# Not with the thread sanitizer: the slowest of a kind of which others remain, and what measures resident memory.
NOT_TSAN = "not 65536 and not random_operations_on_one_run and not memory"
RACE = """
#include <pthread.h>
static int shared;
static void *work(void *unused) { for (int i = 0; i < 100000; i++) shared++; return unused; }
void fault(void)
{
    pthread_t one, two;
    pthread_create(&one, 0, work, 0);
    pthread_create(&two, 0, work, 0);
    pthread_join(one, 0);
    pthread_join(two, 0);
}
"""
OVERFLOW = """
#include <stdlib.h>
void fault(void) { volatile char *bytes = malloc(16); bytes[17] = 1; free((void *)bytes); }
"""


def environment(kind: str, log: Path) -> dict[str, str]:
    """What makes a Python process run under a sanitizer, with reports in `log`.PID and a telling exit code."""
    library = subprocess.run(["gcc", f"-print-file-name=lib{kind}.so"], capture_output=True, text=True, check=True)
    options = f"log_path={log}:exitcode={REPORT_EXIT}:halt_on_error=0"
    return os.environ | {
        "LD_PRELOAD": library.stdout.strip(),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",
        "TSAN_OPTIONS": f"{options}:history_size=4",
        "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
    }


def reports(log: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(log.parent.glob(f"{log.name}.*")))


def run_on(kind: str, log: Path) -> subprocess.CompletedProcess[str]:
    """Build the data plane with a sanitizer and run its tests on that; what the sanitizer reports is in `log`.PID."""
    build = subprocess.run([ROOT / "scripts/build-native", kind], capture_output=True, text=True, timeout=400)
    assert build.returncode == 0, build.stdout + build.stderr
    chosen = environment(kind, log) | {"NBDVVOL_NATIVE": str(ROOT / f"build/{kind}/_native.abi3.so")}
    files = [str(ROOT / f"tests/unit/test_plane_{name}.py") for name in TESTS]
    some = ["-k", NOT_TSAN] if kind == "tsan" else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "300", *some, *files]
    return subprocess.run(command, cwd=ROOT, env=chosen, capture_output=True, text=True, timeout=850)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, logs: Path) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    with in_pairs(request, "sanitizer", lambda kind: run_on(kind, logs / kind)) as found:
        yield found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_no_report(runs: dict[str, Future[subprocess.CompletedProcess[str]]], logs: Path, sanitizer: str) -> None:
    result = runs[sanitizer].result()
    found = reports(logs / sanitizer)
    assert not found, found[:20_000]
    assert result.returncode == 0, (result.stdout + result.stderr)[-20_000:]


@pytest.mark.parametrize(
    ("kind", "flags", "source", "says"),
    [
        ("tsan", "-fsanitize=thread", RACE, "data race"),
        ("asan", "-fsanitize=address,undefined", OVERFLOW, "heap-buffer-overflow"),
    ],
    ids=["tsan", "asan"],
)
def test_a_fault_would_be_reported(kind: str, flags: str, source: str, says: str, tmp_path: Path) -> None:
    """The same set-up with a library that is wrong: otherwise silence would prove nothing."""
    (tmp_path / "fault.c").write_text(source)
    library = tmp_path / "fault.so"
    command = ["gcc", "-g", "-O1", "-fPIC", "-shared", flags, str(tmp_path / "fault.c"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    log = tmp_path / "report"
    call = f"import ctypes; ctypes.CDLL({str(library)!r}).fault()"
    result = subprocess.run([sys.executable, "-c", call], env=environment(kind, log), timeout=60)
    assert result.returncode == REPORT_EXIT
    assert says in reports(log)
