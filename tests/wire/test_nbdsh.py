"""nbdsh (libnbd-bin) against the running daemon, as a person at a prompt uses it."""

from __future__ import annotations

import pytest

from tests.lib.procs import need, run
from tests.lib.shared import ROOT_SIZE, SharedFarm

pytestmark = pytest.mark.timeout(60)


def nbdsh(uri: str, *commands: str) -> str:
    argv = [need("nbdsh", "libnbd-bin"), "--base-allocation", "-u", uri]
    for command in commands:
        argv += ["-c", command]
    return run(argv).stdout


def test_size_read_and_write(shared: SharedFarm) -> None:
    out = nbdsh(
        shared.uri("root"),
        "print(h.get_size())",
        "h.pwrite(b'from nbdsh', 4096, nbd.CMD_FLAG_FUA)",
        "print(h.pread(10, 4096).decode())",
    )
    assert out.split("\n")[:2] == [str(ROOT_SIZE), "from nbdsh"]


def test_block_status(shared: SharedFarm) -> None:
    out = nbdsh(
        shared.uri("root"),
        "h.zero(8 << 20, 0)",
        "h.pwrite(b'x' * 65536, 4 << 20)",
        "h.block_status(8 << 20, 0, lambda name, offset, e, err: print(name, e))",
    )
    assert out.startswith(f"base:allocation [{4 << 20}, 3, 65536, 0, ")


def test_errors_are_python_exceptions_with_errno(shared: SharedFarm) -> None:
    failed = run([need("nbdsh", "libnbd-bin"), "-u", shared.uri("root"), "-c", "h.pread(1, h.get_size())"], check=False)
    assert failed.returncode != 0 and "EINVAL" in failed.stderr
