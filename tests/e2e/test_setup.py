"""The README's first command in a fresh copy of the tree: sets itself up, runs, rebuilds what changed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.procs import Process, children, need, run, running, short_dir, wait_until

ROOT = Path(__file__).parents[2]
SETUP_S = 600.0


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """What a clone of the present tree would hold; its set-up is its own."""
    folder = short_dir()
    names = run(["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(SETUP_S + 120)
def test_make_run_in_a_fresh_clone(copy: Path) -> None:
    make = Process(["make", "-C", copy, "run"], copy / "make.log")
    try:
        wait_until("ready", lambda: re.search(r"^ready$", make.text(), re.MULTILINE) or not make.alive(), SETUP_S, 0.2)
        assert make.alive(), make.text()
        uris = re.findall(r"^(vm1/\w+)  (\w+)  (nbd\+unix:\S+)$", make.text(), re.MULTILINE)
        assert [(name, size) for name, size, _ in uris] == [("vm1/root", "1GiB"), ("vm1/swap", "256MiB")]
        for _, size, uri in uris:
            shown = run([need("nbdinfo", "libnbd-bin"), "--size", uri]).stdout.strip()
            assert shown == {"1GiB": "1073741824", "256MiB": "268435456"}[size]
        assert (copy / "data" / "local.img").exists()
        offspring = children(make.pid)
        (up,) = [pid for pid in offspring if "up" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
        # As Ctrl-C in a terminal: the whole foreground group.
        # By the system call: procps' kill may read `-INT -1234` as pid -1, which is every process there is.
        assert os.getpgid(make.pid) == make.pid
        os.killpg(make.pid, signal.SIGINT)
        make.popen.wait(60)
        assert not running(up)
        assert not [pid for pid in offspring if running(pid)]
        assert "control stops" in make.text()
    finally:
        for pid in children(make.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if make.alive():
            make.kill_group()


def test_a_second_set_up_is_quick_and_silent(copy: Path) -> None:
    begin = time.monotonic()
    done = run([copy / "scripts" / "setup", "run"], timeout_s=60)
    assert done.stdout + done.stderr == ""
    assert time.monotonic() - begin < 20


def test_a_change_in_c_is_built(copy: Path) -> None:
    library = copy / "nbdvvol" / "dataplane" / "_native.abi3.so"
    before = library.read_bytes()
    header = copy / "native" / "include" / "nbdvvol.cdef.h"
    header.write_text(header.read_text() + "\n#define NV_SETUP_TEST 4711\n")
    run([copy / "scripts" / "setup", "run"], timeout_s=300)
    assert library.read_bytes() != before
    program = "from nbdvvol.dataplane.ffi import lib; print(lib.NV_SETUP_TEST)"
    assert run([copy / ".venv" / "bin" / "python", "-c", program]).stdout == "4711\n"


def test_a_broken_source_fails_with_the_compilers_words(copy: Path) -> None:
    broken = copy / "native" / "volume" / "broken.c"
    broken.write_text("/* broken on purpose */\nint oops(void) { return nothing; }\n")
    done = run([copy / "scripts" / "setup", "run"], timeout_s=300, check=False)
    broken.unlink()
    assert done.returncode == 1
    assert "broken.c:2" in done.stderr and "setup: failed" in done.stderr


def test_ci_calls_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    dry = run(["make", "-n", "-C", ROOT, "test"]).stdout
    assert "scripts/setup run test" in dry and "pytest" in dry


def test_a_wheel_holds_the_data_plane(copy: Path) -> None:
    python = copy / ".venv" / "bin" / "python"
    build = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", copy / "wheels", copy]
    run([python, *build], timeout_s=300)
    (wheel,) = (copy / "wheels").glob("nbdvvol-*-cp311-abi3-linux_*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(copy / "unpacked")
    assert names.count("nbdvvol/dataplane/_native.abi3.so") == 1
    assert not [name for name in names if name.startswith(("tests/", "native/"))]
    # Without the editable install's finder, so that the wheel's own files answer.
    program = "import nbdvvol.dataplane._native as n; print(n.__file__)"
    shown = run([python, "-S", "-c", f"import sys; sys.path[:0] = {_paths(copy)!r}; {program}"]).stdout
    assert shown.strip() == str(copy / "unpacked" / "nbdvvol" / "dataplane" / "_native.abi3.so")


def _paths(copy: Path) -> list[str]:
    return [str(copy / "unpacked"), *map(str, copy.glob(".venv/lib/python3*/site-packages"))]
