"""qemu-nbd and qemu-storage-daemon in front of the daemon: they list it, and serve a VVol on to others."""

from __future__ import annotations

import json

import pytest

from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.procs import Process, need, qemu_nbd, run, short_dir, unix_listens, wait_until
from tests.lib.rawio import open_export
from tests.lib.shared import ROOT_SIZE, VM1_EXPORTS, SharedFarm

pytestmark = pytest.mark.timeout(60)


def test_list(shared: SharedFarm) -> None:
    listing = run([need("qemu-nbd", "qemu-utils"), "--list", "-k", shared.socket()]).stdout
    assert f"exports available: {len(VM1_EXPORTS)}" in listing
    for word in (
        "export: 'root'",
        "the first disk of vm1",
        f"size:  {ROOT_SIZE}",
        "base:allocation",
        "opt block: 4096",
    ):
        assert word in listing, listing


def test_list_over_tcp(shared: SharedFarm) -> None:
    host, port = shared.tcp
    listing = run([need("qemu-nbd", "qemu-utils"), "--list", "-b", host, "-p", str(port)]).stdout
    for name in ("vm1/root", "vm2/root", "vm2/private"):
        assert f"export: '{name}'" in listing, listing


def test_chain_through_qemu_nbd(shared: SharedFarm) -> None:
    data = pattern(50, 0, 3 * MiB)
    with qemu_nbd("-f", "raw", "-x", "chained", shared.uri("root")) as socket, open_export(socket, "chained") as nbd:
        assert nbd.size == ROOT_SIZE
        nbd.write(7 * MiB + 13, data)
        nbd.flush()
        assert difference(data, nbd.read(7 * MiB + 13, len(data))) == ""
        nbd.zero(8 * MiB, MiB)
    with shared.open("root") as nbd:
        want = bytearray(data)
        want[MiB - 13 : 2 * MiB - 13] = bytes(MiB)
        assert difference(bytes(want), nbd.read(7 * MiB + 13, len(data))) == ""


def test_chain_through_the_storage_daemon(shared: SharedFarm) -> None:
    folder = short_dir()
    socket = folder / "qsd.sock"
    node = {
        "driver": "nbd",
        "node-name": "disk",
        "export": "indir",
        "server": {"type": "unix", "path": str(shared.socket())},
    }
    argv = [need("qemu-storage-daemon", "qemu-system-common"), "--blockdev", json.dumps(node)]
    argv += [
        "--nbd-server",
        f"addr.type=unix,addr.path={socket}",
        "--export",
        "nbd,id=e,node-name=disk,name=d,writable=on",
    ]
    daemon = Process(argv, folder / "log")
    try:
        wait_until("the storage daemon listens", lambda: unix_listens(socket) or not daemon.alive())
        assert daemon.alive(), daemon.text()
        with open_export(socket, "d") as nbd:
            nbd.write(0, pattern(51, 0, MiB))
            nbd.flush()
    finally:
        daemon.stop()
    with shared.open("indir") as nbd:
        assert difference(pattern(51, 0, MiB), nbd.read(0, MiB)) == ""
