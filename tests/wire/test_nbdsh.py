"""nbdsh (libnbd-bin) against the running daemon, as a person at a prompt uses it."""

from __future__ import annotations

import subprocess

import pytest

from tests.lib.procs import need, run
from tests.lib.shared import ROOT_SIZE, SharedFarm

pytestmark = pytest.mark.timeout(60)


def nbdsh(uri: str, *commands: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run nbdsh, which takes the first python3 of the PATH: it has to be Debian's."""
    argv = ["env", "PATH=/usr/bin:/bin", need("nbdsh", "libnbd-bin"), "--base-allocation", "-u", uri]
    for command in commands:
        argv += ["-c", command]
    return run(argv, check=check)


def test_size_read_and_write(shared: SharedFarm) -> None:
    out = nbdsh(
        shared.uri("root"),
        "print(h.get_size())",
        "h.pwrite(b'from nbdsh', 4096, nbd.CMD_FLAG_FUA)",
        "print(h.pread(10, 4096).decode())",
    ).stdout
    assert out.split("\n")[:2] == [str(ROOT_SIZE), "from nbdsh"]


def test_block_status(shared: SharedFarm) -> None:
    out = nbdsh(
        shared.uri("root"),
        "h.zero(8 << 20, 0)",
        "h.pwrite(b'x' * 65536, 4 << 20)",
        "h.block_status(8 << 20, 0, lambda name, offset, e, err: print(name, e))",
    ).stdout
    assert out.startswith(f"base:allocation [{4 << 20}, 3, 65536, 0, ")


def test_a_bad_request_is_the_servers_own_error(shared: SharedFarm) -> None:
    failed = nbdsh(shared.uri("root"), "h.set_strict_mode(0)", "h.pread(1, h.get_size())", check=False)
    assert failed.returncode == 1
    assert "command failed: Invalid argument" in failed.stderr, failed.stderr
