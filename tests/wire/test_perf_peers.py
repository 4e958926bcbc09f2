"""Every server that perf/ measures: it starts as planned, serves our load generator, and its cache modes match."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perf import generators, run
from perf.generators import serving
from perf.model import Backend, Transport
from perf.peers import (
    BY_NAME,
    CEILING,
    CEILING_FILE,
    CEILING_RECORDS,
    NBDKIT_LOG,
    OURS_LOG,
    OURS_LOG_FULL,
    OURS_MILLION_RUNS,
    OURS_SLOW,
    PEERS,
    QEMU_LOG,
    ROOT,
    Peer,
)
from perf.servers import Place, Running, free_port
from perf.usage import children
from tests.unit.plane_rig import eventually

pytestmark = pytest.mark.timeout(400)
SIZE = 16 << 20
LOAD = ["--mix", "read=50,write=50", "--depth", "8", "--count", "400"]
WRITES = ["--mix", "write=100", *LOAD[2:]]
SERVED = [p for p in PEERS if p.name != OURS_MILLION_RUNS]
"""A million runs want four gigabytes."""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tools")
    generators.build(out)
    return out


@contextmanager
def served(peer: Peer, tools: Path, backend: Backend, transport: Transport) -> Iterator[Running]:
    """A server on a file of the tree's file system ("disk") or of /dev/shm."""
    parent = ROOT / "build" if backend == "disk" else Path("/dev/shm")
    store = Path(tempfile.mkdtemp(prefix="nbdvvol-perf-", dir=parent))
    folder = Path(tempfile.mkdtemp(prefix="nv", dir="/tmp"))
    try:
        if backend != "null":
            run.fill(store / "disk.img", SIZE)
        place = Place(folder, backend, transport, store / "disk.img", SIZE, free_port(), tools)
        with serving(peer, place) as server:
            yield server
    finally:
        shutil.rmtree(store)
        shutil.rmtree(folder)


def cases() -> Iterator[object]:
    """Each server once a backend on a unix socket, and once a transport on tmpfs (nothing is served on TCP alone)."""
    for peer in SERVED:
        for backend, transport in (("tmpfs", "unix"), ("null", "unix"), ("tmpfs", "tcp"), ("tmpfs", "tls")):
            if peer.serves(backend, transport):  # type: ignore[arg-type]
                yield pytest.param(peer, backend, transport, id=f"{peer.name}-{backend}-{transport}")


@pytest.mark.parametrize(("peer", "backend", "transport"), list(cases()))
def test_it_serves_the_load_generator(peer: Peer, backend: Backend, transport: Transport, tools: Path) -> None:
    with served(peer, tools, backend, transport) as server:
        out = generators.loadgen_json(tools / "loadgen", server, LOAD)
        assert out["requests"] == 400 and out["server"]["rss_bytes"] > 0
        # A thread that spins is accounted for at the next tick only, and a ceiling may be done before.
        assert out["server"]["cpu_ns"] > 0 or peer.name in (CEILING, CEILING_FILE)
        # One cipher for all: else ciphers would be compared, and not servers.
        assert out["cipher"] == ("TLS_AES_128_GCM_SHA256" if transport == "tls" else "")


def open_files(pid: int) -> dict[str, str]:
    """What each descriptor of a process is, by number."""
    found = {}
    for number in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found[number.name] = str(number.readlink())
    return found


def modes(pid: int) -> set[bool]:
    """Whether the process, or a child of it, has the served file open with O_DIRECT."""
    found = set()
    for number, target in open_files(pid).items():
        if target.endswith("disk.img"):
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                flags = Path(f"/proc/{pid}/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
                found.add(bool(int(flags, 8) & os.O_DIRECT))
    return found.union(*map(modes, children(pid)))


DIRECT = [p for p in SERVED if p.serves("disk", "unix")]


@contextmanager
def connected(tools: Path, server: Running) -> Iterator[None]:
    """A client that does nothing: nbdkit opens the file for a connection, and closes it behind the last."""
    command = [tools / "loadgen", *server.loadgen_arguments(), "--idle", "60"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as idle:
        try:
            yield
        finally:
            idle.terminate()


@pytest.mark.parametrize("peer", DIRECT, ids=lambda peer: peer.name)
def test_past_the_page_cache_on_disk_where_it_can(peer: Peer, tools: Path) -> None:
    # Without storage: nothing is open. nbdkit's file plugin knows no O_DIRECT.
    buffered = {"nbdkit-file", "nbdkit-cache", OURS_SLOW, OURS_LOG, OURS_LOG_FULL, NBDKIT_LOG, QEMU_LOG}
    expected = {"ceiling": set(), "nbdvvol-null": set()}.get(peer.name, {peer.name not in buffered})
    with served(peer, tools, "disk", "unix") as server:
        load = WRITES if peer.name == CEILING_RECORDS else LOAD  # nobody reads from what a log alone holds
        assert generators.loadgen_json(tools / "loadgen", server, load)["requests"] == 400
        with connected(tools, server):
            eventually(f"the file is open with O_DIRECT: {expected}", lambda: modes(server.pid) == expected)


@pytest.mark.parametrize("name", ["nbdvvol", "qemu-nbd-uring", "qemu-nbd-threads", "qemu-storage-daemon"])
def test_io_uring_is_used_by_those_that_say_so(name: str, tools: Path) -> None:
    with served(BY_NAME[name], tools, "tmpfs", "unix") as server:
        rings = [target for target in open_files(server.pid).values() if "io_uring" in target]
        assert bool(rings) == (name != "qemu-nbd-threads")
        assert modes(server.pid) == {False}


def test_nbd_server_listens_on_loopback_only(tools: Path) -> None:
    with served(BY_NAME["nbd-server"], tools, "tmpfs", "unix") as server:
        port = f"{server.place.port:04X}"
        tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
        listening = [line.split()[1] for table in tables for line in table if line.split()[3] == "0A"]
        assert {address for address in listening if address.endswith(f":{port}")} <= {f"0100007F:{port}"}
