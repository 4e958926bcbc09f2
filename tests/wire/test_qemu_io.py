"""qemu-io against the running daemon: patterns written, read back, discarded, at every alignment."""

from __future__ import annotations

import pytest

from tests.lib.procs import need, run
from tests.lib.shared import ROOT_SIZE, SharedFarm

pytestmark = pytest.mark.timeout(60)


def qemu_io(uri: str, *commands: str, options: tuple[str, ...] = ("-f", "raw"), check: bool = True):
    argv = [need("qemu-io", "qemu-utils"), *options]
    for command in commands:
        argv += ["-c", command]
    done = run([*argv, uri], check=check)
    assert not check or "failed" not in done.stdout.lower(), done.stdout
    return done


@pytest.mark.parametrize("name", ["root", "hard", "indir"])
def test_patterns(shared: SharedFarm, name: str) -> None:
    qemu_io(
        shared.uri(name),
        "write -P 0x11 0 1M",
        "write -P 0x22 1048000 4097",
        "write -f -P 0x33 5M 64k",
        "flush",
        "read -P 0x11 0 1048000",
        "read -P 0x22 1048000 4097",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "write -z -u 5M 32k",
        "read -P 0 5M 32k",
        "read -P 0x33 5275648 32k",
        "discard 5M 64k",
        "write -P 0x44 7M 7M",
        "read -P 0x44 7M 7M",
    )
    done = qemu_io(shared.uri(name), "read -P 0x11 1048000 1", check=False)
    assert "Pattern verification failed" in done.stdout, "qemu-io does verify"


def test_aio(shared: SharedFarm) -> None:
    writes = [f"aio_write -P {n} {n * 65536} 65536" for n in range(1, 64)]
    reads = [f"aio_read -P {n} {n * 65536} 65536" for n in range(1, 64)]
    qemu_io(shared.uri("root"), *writes, "aio_flush", *reads, "aio_flush")


def test_end_of_the_disk(shared: SharedFarm) -> None:
    end = ROOT_SIZE
    qemu_io(shared.uri("root"), f"write -P 0x55 {end - 1} 1", f"read -P 0x55 {end - 1} 1")
    beyond = qemu_io(shared.uri("root"), f"read {end} 512", check=False)
    assert "error" in (beyond.stdout + beyond.stderr).lower() or beyond.returncode


def test_read_only(shared: SharedFarm) -> None:
    done = qemu_io(shared.uri("ro"), "write 0 512", check=False)
    assert done.returncode != 0 and "Permission denied" in done.stderr, "opening it for writing is refused"
    qemu_io(shared.uri("ro"), "read 0 4M", options=("-r", "-f", "raw"))
