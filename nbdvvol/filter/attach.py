"""`attach` and `detach`: a VVol as a block device of this machine's own kernel.

Attaching starts a keeper (keeper.py) in a process of its own, in the background unless it is asked for in the
foreground; it makes the device, tells us, and stays. Detaching flushes the device, ends the keeper, then takes
the device down. Both are called from the command line's process, without a running event loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import errno
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbdvvol
from nbdvvol.filter.attachments import Attachment, Attachments
from nbdvvol.filter.dial import NbdDialer
from nbdvvol.filter.keeper import Keeper, Wanted
from nbdvvol.filter.nbdnetlink import NetlinkKernel
from nbdvvol.logs import log_to_stderr
from nbdvvol.model.base import Model
from nbdvvol.model.errors import Code, ErrorBody, NvError
from nbdvvol.model.uri import NbdUri, parse_uri

CONNECTIONS_MAX = 16
TIMEOUT_MAX_S = 86400
START_LIMIT_S = 180.0
"""Longest time for a keeper in the background to attach or say why not."""
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
PR_SET_IO_FLUSHER = 57
DOWN_LIMIT_S, DOWN_POLL_S = 10.0, 0.05


class Order(Model):
    """What `attach` was asked for, as the keeper's process gets it."""

    uri: str
    name: str
    identity: str
    device: str | None
    connections: int
    dead_timeout_s: int
    request_timeout_s: int
    run_dir: Path


class Outcome(Model):
    """What the keeper's process answers."""

    attachment: Attachment | None = None
    error: ErrorBody | None = None


def run_attach(
    uri: str,
    *,
    identity: str,
    device: str | None,
    connections: int,
    dead_timeout_s: int,
    request_timeout_s: int,
    run_dir: Path,
    foreground: bool,
    name: str = "",
    on_attached: Callable[[Attachment], None] = lambda attachment: None,
) -> Attachment:
    """Attach the export at `uri`; `identity` is its VVol's UUID, the kernel's backend identifier, and `name` the
    VVol's full name, by which `detach` finds it (default: the export's name in the URI).

    `device`: /dev/nbdN, or None for a free one. The device's I/O waits `dead_timeout_s` for a server that is
    away and fails then; a request without an answer for `request_timeout_s` is sent again on another connection.
    In the background it returns once the device works; in the foreground it calls `on_attached` then, and
    returns when the device was disconnected or the process is told to stop (which leaves the device).
    An attachment whose keeper died is taken over. Raises NvError: NO_KERNEL_NBD with the lines that work
    instead, EXISTS, BUSY, DENIED, INVALID, UNSUPPORTED, UNAVAILABLE, NOT_FOUND, TIMEOUT."""
    where = parse_uri(uri)
    if where.socket is not None:  # the keeper works in another directory
        where = dataclasses.replace(where, socket=str(Path(where.socket).absolute()))
    order = Order(
        uri=str(where), name=name or where.name, identity=identity, device=device, connections=connections,
        dead_timeout_s=dead_timeout_s, request_timeout_s=request_timeout_s, run_dir=run_dir.absolute(),
    )  # fmt: skip
    _check(order)
    if foreground:
        return asyncio.run(serve(order, on_attached))
    attachment = _start_keeper(order)
    on_attached(attachment)
    return attachment


def run_detach(run_dir: Path, name_or_device: str, *, force: bool = False) -> Attachment:
    """Flush and disconnect an attached VVol, named by its name, UUID or device; return what it was.

    Raises NvError: NOT_FOUND; BUSY while it is mounted or in use; IO when its data cannot be flushed (the server
    is away). `force` disconnects all the same: what was not flushed is lost."""
    store = Attachments(run_dir)
    record = store.find(name_or_device)
    if not force:
        _flush(record)
    lock = store.stop_keeper(record.identity)
    try:
        asyncio.run(_disconnect(record))
        store.remove(record.identity)
    finally:
        lock.release()
    return record


async def serve(order: Order, on_attached: Callable[[Attachment], None]) -> Attachment:
    """Be the keeper: attach, tell, and keep the device until it is gone or SIGTERM or SIGINT comes."""
    store = Attachments(order.run_dir)
    lock = store.lock(order.identity)
    if lock is None:
        record = store.load(order.identity)
        where = f" as {record.device}" if record else ""
        raise NvError(Code.EXISTS, f"{order.uri} is already attached{where}", "detach it first, or use that device")
    kernel = None
    try:
        uri = parse_uri(order.uri)
        kernel = await _open_kernel(uri)
        keeper = Keeper(kernel, NbdDialer(uri), store.save)
        attachment = await _begin(keeper, kernel, store, order)
        on_attached(attachment)
        await _keep(keeper, store)
        return keeper.attachment
    finally:
        if kernel is not None:
            kernel.close()
        lock.release()


def other_ways(uri: NbdUri) -> str:
    """The lines that use an export without this kernel's nbd driver, or on another machine that has one."""
    name = uri.name.replace(",", ",,")
    if uri.socket is not None:
        server = f"server.type=unix,server.path={uri.socket.replace(',', ',,')}"
        client = f"nbd-client -unix {shlex.quote(uri.socket)} -N {shlex.quote(uri.name)} /dev/nbd0"
    else:
        server = f"server.type=inet,server.host={uri.host},server.port={uri.port}"
        client = f"nbd-client {uri.host} {uri.port} -N {shlex.quote(uri.name)} /dev/nbd0"
    drive = shlex.quote(f"driver=nbd,{server},export={name},reconnect-delay=30,if=virtio")
    return (
        f"as a VM's disk, which needs no driver: qemu-system-x86_64 -drive {drive}\n"
        f"where the kernel has the driver: {client}"
    )


def _check(order: Order) -> None:
    for what, value, low, high in (
        ("connections", order.connections, 1, CONNECTIONS_MAX),
        ("dead-connection time-out in seconds", order.dead_timeout_s, 0, TIMEOUT_MAX_S),
        ("request time-out in seconds", order.request_timeout_s, 1, TIMEOUT_MAX_S),
    ):
        if not low <= value <= high:
            raise NvError(Code.INVALID, f"{what}: {value} is not within {low}..{high}")
    NbdDialer(parse_uri(order.uri))
    _index(order.device)


def _index(device: str | None) -> int | None:
    if device is None:
        return None
    match = re.fullmatch(r"(?:/dev/)?nbd(\d{1,6})", device)
    if match is None:
        raise NvError(Code.INVALID, f"device {device!r} is not /dev/nbdN", "leave --device out for a free one")
    return int(match[1])


async def _open_kernel(uri: NbdUri) -> NetlinkKernel:
    try:
        return await NetlinkKernel.open()
    except NvError as error:
        raise NvError(error.code, error.message, other_ways(uri)) from error
    except PermissionError as error:
        raise NvError(Code.DENIED, f"no netlink to the nbd driver: {error}", "run it as root") from error


async def _begin(keeper: Keeper, kernel: NetlinkKernel, store: Attachments, order: Order) -> Attachment:
    record = store.load(order.identity)
    if record is not None and await kernel.connected(record.index) and _backend(record.index) == order.identity:
        return keeper.take_over(record.model_copy(update={"uri": order.uri}))
    store.remove(order.identity)
    for other in _devices():
        if _backend(int(other.name[3:])) == order.identity:
            raise NvError(
                Code.EXISTS, f"{order.uri} is already attached as /dev/{other.name}, from another run directory",
                f"use that device, or take it down: nbd-client -d /dev/{other.name}",
            )  # fmt: skip
    return await keeper.attach(
        Wanted(
            identity=order.identity, vvol=order.name, uri=order.uri, index=_index(order.device),
            connections=order.connections, dead_timeout_s=order.dead_timeout_s,
            request_timeout_s=order.request_timeout_s,
        )
    )  # fmt: skip


async def _keep(keeper: Keeper, store: Attachments) -> None:
    loop = asyncio.get_running_loop()
    keeping = asyncio.create_task(keeper.keep())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, keeping.cancel)
    try:
        await keeping
        store.remove(keeper.attachment.identity)  # somebody else disconnected the device
    except asyncio.CancelledError:
        pass  # told to stop: the device stays, and so does its record
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        keeper.close()


def _devices() -> list[Path]:
    return list(Path("/sys/block").glob("nbd*"))


def _backend(index: int) -> str:
    try:
        return Path(f"/sys/block/nbd{index}/backend").read_text().strip()
    except OSError:
        return ""


def _start_keeper(order: Order) -> Attachment:
    log_path = Attachments(order.run_dir).log_path(order.identity)
    root = str(Path(nbdvvol.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "nbdvvol.filter.attach"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd="/", start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(order.model_dump_json().encode())
    child.stdin.close()
    ready, _, _ = select.select([child.stdout], [], [], START_LIMIT_S)
    line = child.stdout.readline() if ready else b""
    if not line:
        child.kill()
        child.wait()
        raise NvError(
            Code.TIMEOUT if not ready else Code.INTERNAL,
            "the keeper's process " + (f"said nothing for {START_LIMIT_S:.0f} s" if not ready else "died"),
            f"see {log_path}",
        )
    outcome = Outcome.model_validate_json(line)
    if outcome.attachment is None:
        child.wait()
        assert outcome.error is not None
        raise NvError(outcome.error.code, outcome.error.message, outcome.error.hint)
    child.returncode = 0  # it lives on by itself: nobody waits for it
    return outcome.attachment


def _flush(record: Attachment) -> None:
    try:
        fd = os.open(record.device, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise NvError(Code.BUSY, f"{record.device} ({record.vvol}) is in use", "unmount it first") from error
        return  # the device is gone already
    try:
        os.fsync(fd)
    except OSError as error:
        raise NvError(
            Code.IO, f"{record.device} ({record.vvol}) cannot be flushed: {error.strerror}",
            "bring its filter back, or lose what was not flushed with --force",
        ) from error  # fmt: skip
    finally:
        os.close(fd)


async def _disconnect(record: Attachment) -> None:
    try:
        kernel = await NetlinkKernel.open()
    except NvError:
        return  # a kernel without the driver has no device
    try:
        if _backend(record.index) != record.identity or not await kernel.connected(record.index):
            return
        await kernel.disconnect(record.index)
        for _ in range(int(DOWN_LIMIT_S / DOWN_POLL_S)):
            if not await kernel.connected(record.index):
                return
            await asyncio.sleep(DOWN_POLL_S)
        raise NvError(
            Code.BUSY, f"{record.device} ({record.vvol}) is still held open {DOWN_LIMIT_S:.0f} s after the disconnect"
        )
    finally:
        kernel.close()


def _stay_in_memory() -> None:
    """Where we may: never wait for memory that only writes to our own device can free."""
    libc = ctypes.CDLL(None)
    libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)
    libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def main() -> None:
    """The keeper's process: an Order on stdin, an Outcome on stdout, then it keeps the device."""
    order = Order.model_validate_json(sys.stdin.buffer.read())

    def tell(outcome: Outcome) -> None:
        print(json.dumps(outcome.model_dump(mode="json")), flush=True)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads on

    log_to_stderr()
    _stay_in_memory()
    try:
        asyncio.run(serve(order, lambda attachment: tell(Outcome(attachment=attachment))))
    except NvError as error:
        tell(Outcome(error=error.body()))
        sys.exit(1)


if __name__ == "__main__":
    main()
