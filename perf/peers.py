"""The servers we compare: how each is started so that cache modes match, and what it cannot do.

"Matched" means: on tmpfs everybody uses the page cache; on disk everybody who can opens with O_DIRECT.
nbdkit and nbd-server cannot, so on disk nbdkit drops its cache behind itself (cache=none) and nbd-server
is left out. Without storage, everybody makes zeros and drops writes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from perf.mirrored import meta_bytes
from perf.model import Backend, Transport
from perf.servers import PSK_IDENTITY, Place, Plan, ServerError
from perf.slow import delayed
from perf.usage import children

ROOT = Path(__file__).parent.parent
OURS = "nbdvvol"
OURS_TWO = "nbdvvol-2-reactors"
OURS_ONE_RUN = "nbdvvol-one-run"
OURS_MILLION_RUNS = "nbdvvol-million-runs"
OURS_MIRROR = "nbdvvol-mirror"
QUORUM = "qemu-quorum"
OURS_CACHE = "nbdvvol-cache"
OURS_HALF = "nbdvvol-cache-half"
OURS_AGAIN = "nbdvvol-again"
OURS_NULL = "nbdvvol-null"
NBDKIT_CACHE = "nbdkit-cache"
OURS_SLOW = "nbdvvol-slow"
OURS_LOG = "nbdvvol-writeback"
OURS_LOG_FULL = "nbdvvol-writeback-full"
NBDKIT_LOG = "nbdkit-writeback"
QEMU_LOG = "qemu-writeback"
LOG_TIMES, LOG_PART = 8, 4
"""So many times the volume a log never fills up in its suite; a volume's fourth is full within a point's warm-up."""
MILLION = 1_000_000
CEILING = "ceiling"
CEILING_FILE = "ceiling-file"
CEILING_DIRECT = "ceiling-direct"
CEILING_RECORDS = "ceiling-records"
STORAGE = "storage"
"""Not a server: fio's io_uring engine on the same kind of file."""
CLIENTS_MAX = 1100
LOG_LIMIT_S = 60.0
"""A log's file is written from end to end before it is formatted."""


@dataclass(frozen=True)
class Peer:
    """One way to run one server."""

    name: str
    backends: frozenset[Backend]
    transports: frozenset[Transport]
    plan: Callable[[Place], Plan]
    program: str
    """What must be installed; a path in the tree, or a name on PATH."""
    variant: bool = False
    """Another form of a server, which takes part only where a suite names it."""
    legs: int = 0
    """It makes so many files of its own beside the one it is given, which is not made."""
    file_of: str = ""
    """It serves that other server's file: two files on one disk differ by more than what is compared."""

    def serves(self, backend: Backend, transport: Transport) -> bool:
        """Whether it takes part."""
        return backend in self.backends and transport in self.transports

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if shutil.which(self.program) else f"{self.program} is not installed"


def _ceiling(place: Place) -> Plan:
    where = ["--unix", str(place.socket)] if place.transport == "unix" else ["--tcp", str(place.port)]
    command = [str(place.build / "ceiling"), *where, "--size", str(place.size)]
    return Plan([*command, "--spin-us", str(place.spin_us)])


def _ceiling_file(place: Place) -> Plan:
    """The same responder, sending from a map of the file and receiving into it: what memory allows."""
    plan = _ceiling(place)
    return replace(plan, command=[*plan.command, "--file", str(place.file)])


def _ceiling_direct(place: Place) -> Plan:
    """The same responder, reading and writing the file past the page cache: what a disk allows any server."""
    plan = _ceiling_file(place)
    return replace(plan, command=[*plan.command, "--direct"])


def _ceiling_records(place: Place) -> Plan:
    """The same responder, writing to the file what a write-back log would: what a log allows any server."""
    plan = _ceiling_file(place)
    return replace(plan, command=[*plan.command, "--records"])


def _nbdkit(place: Place, plugin: list[str]) -> Plan:
    where = {
        "unix": ["-U", str(place.socket)],
        "tcp": ["-p", str(place.port), "-i", "127.0.0.1"],
        "tls": ["-p", str(place.port), "-i", "127.0.0.1"],
    }[place.transport]
    if place.transport == "tls":
        where += ["--tls=require", f"--tls-psk={place.write_psk()}"]
    return Plan(["nbdkit", "-f", *where, *plugin])


def _nbdkit_file(place: Place) -> Plan:
    return _nbdkit(place, ["file", str(place.file), *(["cache=none"] if place.direct else [])])


def _nbdkit_cache(place: Place) -> Plan:
    """Its cache filter, with room for everything, in memory. (Its file plugin's own `cache=none` has the same name.)"""
    words = ["--filter=cache", "file", str(place.file), "cache-on-read=true", "cache=writethrough"]
    return replace(_nbdkit(place, words), environment={"TMPDIR": "/dev/shm"}, warm=True)


def _nbdkit_memory(place: Place) -> Plan:
    return replace(_nbdkit(place, ["memory", str(place.size)]), prefill=True)


def _nbdkit_null(place: Place) -> Plan:
    return _nbdkit(place, ["null", str(place.size)])


def _qemu_nbd(place: Place, aio: str) -> Plan:
    where = ["-k", str(place.socket)] if place.transport == "unix" else ["-b", "127.0.0.1", "-p", str(place.port)]
    if place.transport == "tls":
        folder = place.write_psk().parent
        where += ["--object", f"tls-creds-psk,id=tls0,endpoint=server,dir={folder}", "--tls-creds", "tls0"]
    command = ["qemu-nbd", "-t", "-e", str(CLIENTS_MAX), *where]
    if place.backend == "null":
        image = f"driver=null-co,size={place.size},read-zeroes=off"
        return Plan([*command, "--image-opts", image])
    cache = "none" if place.direct else "writeback"
    return Plan([*command, "-f", "raw", f"--cache={cache}", f"--aio={aio}", "--discard=unmap", str(place.file)])


def _storage_daemon(place: Place) -> Plan:
    if place.transport == "unix":
        address = f"addr.type=unix,addr.path={place.socket}"
    else:
        address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={place.port}"
    options = ["--nbd-server", f"{address},max-connections=0"]
    if place.transport == "tls":
        folder = place.write_psk().parent
        options = ["--object", f"tls-creds-psk,id=tls0,endpoint=server,dir={folder}", options[0]]
        options.append(f"{address},max-connections=0,tls-creds=tls0")
    direct = "on" if place.direct else "off"
    disk = f"driver=file,node-name=disk,filename={place.file},aio=io_uring,cache.direct={direct},discard=unmap"
    if place.backend == "null":
        disk = f"driver=null-co,node-name=disk,size={place.size},read-zeroes=off"
    export = ["--export", "type=nbd,id=export0,node-name=disk,name=disk,writable=on"]
    return Plan(["qemu-storage-daemon", "--blockdev", disk, *options, *export], export="disk")


def _nbd_server(place: Place) -> Plan:
    where = f"listenaddr = 127.0.0.1\nport = {place.port}\n"
    if place.transport == "unix":
        where += f"unixsock = {place.socket}\n"
    config = place.folder / "nbd-server.conf"
    export = f"[disk]\nexportname = {place.file}\nflush = true\nfua = true\ntrim = true\n"
    config.write_text(f"[generic]\nallowlist = true\n{where}{export}")
    pid_file = place.folder / "pid"
    return Plan(["nbd-server", "-C", str(config), "-p", str(pid_file)], export="disk", pid_file=pid_file)


def _plane(place: Place, *arguments: str) -> Plan:
    """Our data plane on a map that no farm file can ask for."""
    command = [sys.executable, "-m", "perf.plane", "--unix", str(place.socket), "--size", str(place.size)]
    spin = ["--spin-us", str(place.spin_us)]
    return Plan([*command, *spin, *arguments], environment={"PYTHONPATH": str(ROOT)})


def _runs(place: Place, count: int) -> Plan:
    return _plane(place, "--file", str(place.file), "--runs", str(count))


def _ours(place: Place, cache: int = 0, mode: str = "read") -> Plan:
    """A farm of one VVol, as anybody runs it: `nbdvvol up`. Only its filter is measured: data passes nowhere else.

    `cache`: bytes of RAM."""
    if place.backend == "null":
        return _plane(place)
    host: dict[str, object] = {"spin_us": place.spin_us, "reactors": place.reactors}
    if cache:
        host["cache"] = cache
    io = "direct" if place.direct else "buffered"
    farm: dict[str, object] = {
        "datastores": {"store": {"kind": "file", "path": str(place.file), "io": io}},
        "profiles": {"plain": {"datastore": "store", **({"cache": {"mode": mode}} if cache else {})}},
        "hosts": {"local": host},
        "vms": {PSK_IDENTITY: {"vvols": {"disk": {"adopt": {"datastore": "store"}, "profile": "plain"}}}},
    }
    if place.transport == "unix":
        place.socket.symlink_to(place.folder / "run" / "vms" / f"{PSK_IDENTITY}.sock")
    else:
        tls = "required" if place.transport == "tls" else "none"
        host["listen"] = {"address": f"127.0.0.1:{place.port}", "tls": tls}
    if place.transport == "tls":
        farm["tls"] = {"psk": str(place.write_psk())}
    export = f"{PSK_IDENTITY}/disk" if place.transport == "tcp" else "disk"
    path = place.folder / "farm.yaml"
    path.write_text(json.dumps(farm))
    folders = ["--state", str(place.folder / "state"), "--run", str(place.folder / "run")]
    command = [sys.executable, "-m", "nbdvvol", "up", "-f", str(path), *folders]
    environment = {"PYTHONPATH": str(ROOT)}
    return Plan(command, export, environment, find_pid=filter_of, ready="\nready\n", warm=cache > 0)


def _same_file(place: Place, cache: int = 0) -> Plan:
    """Our data plane past the page cache on a file that `nbdvvol up` serves, too, and so without its claim on it."""
    words = ["--file", str(place.file), *(["--direct"] if place.direct else []), "--cache", str(cache)]
    return replace(_plane(place, *words), warm=cache > 0)


def _legs(place: Place, size: int) -> list[Path]:
    """Two empty files beside the place's own."""
    legs = [place.file.with_name(f"leg{number}-{place.file.name}") for number in (1, 2)]
    for leg in legs:
        with leg.open("wb") as out:
            out.truncate(size)
    return legs


def _ours_mirror(place: Place) -> Plan:
    """Our data plane with a mirror of two files, and nobody who would have to agree to a resync."""
    legs = _legs(place, place.size + meta_bytes(place.size))
    command = [sys.executable, "-m", "perf.mirrored", "--unix", str(place.socket), "--size", str(place.size)]
    command += ["--spin-us", str(place.spin_us), *(["--direct"] if place.direct else [])]
    command += [word for leg in legs for word in ("--file", str(leg))]
    resyncs = place.socket.with_name(f"{place.socket.name}.resyncs")
    return Plan(command, environment={"PYTHONPATH": str(ROOT)}, prefill=True, legs=legs, resyncs=resyncs)


def _quorum(place: Place) -> Plan:
    """QEMU's mirror, in the mode that costs it least: a read asks one child, one child's word is enough for a write."""
    legs = _legs(place, place.size)
    direct = "on" if place.direct else "off"
    disks = []
    for number, leg in enumerate(legs):
        disk = f"driver=file,node-name=leg{number},filename={leg},aio=io_uring,cache.direct={direct},discard=unmap"
        disks += ["--blockdev", disk]
    quorum = "driver=quorum,node-name=disk,children.0=leg0,children.1=leg1,vote-threshold=1,read-pattern=fifo"
    server = ["--nbd-server", f"addr.type=unix,addr.path={place.socket},max-connections=0"]
    export = ["--export", "type=nbd,id=export0,node-name=disk,name=disk,writable=on"]
    command = ["qemu-storage-daemon", *disks, "--blockdev", quorum, *server, *export]
    return Plan(command, export="disk", prefill=True, legs=legs)


def _slow(place: Place, command: list[str], environment: dict[str, str] | None = None) -> Plan:
    """A server over the place's file behind nbdkit's delay filter; its URI is in the command already."""
    first = [sys.executable, "-m", "perf.slow", "--socket", str(_slow_socket(place)), "--file", str(place.file), "--"]
    return Plan([*first, *command], environment={"PYTHONPATH": str(ROOT), **(environment or {})})


def _slow_socket(place: Place) -> Path:
    return place.folder / "slow"


def _ours_slow(place: Place, log_bytes: int = 0) -> Plan:
    """Our data plane over the slow export, with a write-back log of that size on the same disk as the file, or none."""
    command = [sys.executable, "-m", "perf.logged", "--unix", str(place.socket), "--size", str(place.size)]
    command += ["--uri", f"nbd+unix:///?socket={_slow_socket(place)}", "--spin-us", str(place.spin_us)]
    if log_bytes:
        command += ["--log", str(place.file.with_suffix(".log")), "--log-bytes", str(log_bytes)]
    return replace(_slow(place, command), limit_s=LOG_LIMIT_S)


def _nbdkit_log(place: Place) -> Plan:
    """Its cache filter in front of the delay, with its cache on the same disk; nothing of it survives a crash."""
    words = ["--filter=cache", *delayed(["file", str(place.file)]), "cache=writeback"]
    return replace(_nbdkit(place, words), environment={"TMPDIR": str(place.file.parent)})


def _qemu_log(place: Place) -> Plan:
    """qemu-nbd over the slow export in its write-back mode, which is about flushes: it has no cache of its own."""
    source = f"nbd+unix:///?socket={_slow_socket(place)}"
    server = ["qemu-nbd", "-t", "-e", str(CLIENTS_MAX), "-k", str(place.socket), "-f", "raw", "--cache=writeback"]
    return _slow(place, [*server, source])


def filter_of(pid: int) -> int:
    """`up` runs control and a filter as children."""
    for child in children(pid):
        if b"filter" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            return child
    raise ServerError(f"no filter among the children of {pid}")


_EVERYWHERE: frozenset[Transport] = frozenset({"unix", "tcp", "tls"})
_PLAIN: frozenset[Transport] = frozenset({"unix", "tcp"})
_UNIX: frozenset[Transport] = frozenset({"unix"})
_FILES: frozenset[Backend] = frozenset({"tmpfs", "disk"})
_ALL: frozenset[Backend] = frozenset({"tmpfs", "disk", "null"})
_PAGE_CACHE: frozenset[Backend] = frozenset({"tmpfs"})
_DISK: frozenset[Backend] = frozenset({"disk"})
_NULL: frozenset[Backend] = frozenset({"null"})
_US = sys.executable

PEERS: tuple[Peer, ...] = (
    Peer(OURS, _ALL, _EVERYWHERE, _ours, _US),
    Peer(OURS_TWO, _FILES, _UNIX, lambda p: _ours(replace(p, reactors=2)), _US, variant=True),
    Peer(OURS_ONE_RUN, _PAGE_CACHE, _UNIX, lambda p: _runs(p, 1), _US, variant=True),
    Peer(OURS_MILLION_RUNS, _PAGE_CACHE, _UNIX, lambda p: _runs(p, MILLION), _US, variant=True),
    Peer(OURS_MIRROR, _FILES, _UNIX, _ours_mirror, _US, variant=True, legs=2),
    Peer(OURS_CACHE, _DISK, _UNIX, lambda p: _ours(p, 2 * p.size, "writethrough"), _US, variant=True),
    Peer(OURS_HALF, _DISK, _UNIX, lambda p: _same_file(p, p.size // 2), _US, variant=True, file_of=OURS),
    Peer(OURS_AGAIN, _DISK, _UNIX, _same_file, _US, variant=True, file_of=OURS),
    Peer(OURS_NULL, _DISK, _UNIX, _plane, _US, variant=True),
    Peer(OURS_SLOW, _DISK, _UNIX, _ours_slow, "nbdkit", variant=True),
    Peer(OURS_LOG, _DISK, _UNIX, lambda p: _ours_slow(p, LOG_TIMES * p.size), "nbdkit", variant=True),
    Peer(OURS_LOG_FULL, _DISK, _UNIX, lambda p: _ours_slow(p, p.size // LOG_PART), "nbdkit", variant=True),
    Peer(NBDKIT_LOG, _DISK, _UNIX, _nbdkit_log, "nbdkit", variant=True),
    Peer(QEMU_LOG, _DISK, _UNIX, _qemu_log, "qemu-nbd", variant=True),
    Peer(CEILING, _ALL, _PLAIN, _ceiling, "cc"),
    Peer(CEILING_FILE, _PAGE_CACHE, _PLAIN, _ceiling_file, "cc", variant=True),
    Peer(CEILING_DIRECT, _DISK, _UNIX, _ceiling_direct, "cc", variant=True),
    Peer(CEILING_RECORDS, _DISK, _UNIX, _ceiling_records, "cc", variant=True),
    Peer("nbdkit-file", _FILES, _EVERYWHERE, _nbdkit_file, "nbdkit"),
    Peer(NBDKIT_CACHE, _DISK, _UNIX, _nbdkit_cache, "nbdkit", variant=True),
    Peer("nbdkit-memory", _PAGE_CACHE, _EVERYWHERE, _nbdkit_memory, "nbdkit"),
    Peer("nbdkit-null", _NULL, _EVERYWHERE, _nbdkit_null, "nbdkit"),
    Peer("qemu-nbd-uring", _ALL, _EVERYWHERE, lambda p: _qemu_nbd(p, "io_uring"), "qemu-nbd"),
    Peer("qemu-nbd-threads", _FILES, _EVERYWHERE, lambda p: _qemu_nbd(p, "threads"), "qemu-nbd"),
    Peer("qemu-storage-daemon", _ALL, _EVERYWHERE, _storage_daemon, "qemu-storage-daemon"),
    Peer(QUORUM, _FILES, _UNIX, _quorum, "qemu-storage-daemon", variant=True, legs=2),
    Peer("nbd-server", _PAGE_CACHE, _PLAIN, _nbd_server, "nbd-server"),
)
BY_NAME = {peer.name: peer for peer in PEERS}
OUR_FORMS = (
    OURS, OURS_TWO, OURS_ONE_RUN, OURS_MILLION_RUNS, OURS_MIRROR, OURS_CACHE, OURS_HALF, OURS_AGAIN, OURS_NULL,
    OURS_SLOW, OURS_LOG, OURS_LOG_FULL,
)  # fmt: skip
OTHERS = (CEILING, CEILING_FILE, CEILING_DIRECT, CEILING_RECORDS, QUORUM, NBDKIT_CACHE, NBDKIT_LOG, QEMU_LOG)
"""Limits, and what is compared with forms of ours alone."""
RIVALS = tuple(peer.name for peer in PEERS if peer.name not in (*OUR_FORMS, *OTHERS))
QEMU_NBD = ("qemu-nbd-uring", "qemu-nbd-threads")
