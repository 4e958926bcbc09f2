"""Files in memory: reads sent straight from a view, writes stored into it, and what must not happen while they are."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nbdvvol.dataplane.types import Run, VolumeLimits
from tests.lib import nbdwords as w
from tests.lib.procs import need
from tests.lib.rawio import STYLES, NbdError, Style
from tests.unit.plane_rig import Client, Rig, describe, eventually, rig, running

__all__ = ["rig"]
SIZE = 4 << 20
PAGE = 4096
LENGTHS = ((0, 1), (1, 511), (4095, 2), (8192, 4096), (100, 65536), (1 << 20, 256 << 10), (7, 1 << 20))


@contextmanager
def memory_file(size: int = SIZE, fill: bytes | None = b"\x5a") -> Iterator[int]:
    """A file of tmpfs; sparse when `fill` is None."""
    fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        if fill is not None:
            os.pwrite(fd, fill * size, 0)
        yield fd
    finally:
        os.close(fd)


def blocks(fd: int) -> int:
    """Bytes that the file takes."""
    return os.fstat(fd).st_blocks * 512


def ask_reads(client: Client, length: int, turn: int = 0) -> list[int]:
    """Ask for the whole volume in one piece and do not look at the replies; the cookies: offset + 1 + turn * SIZE."""
    offsets = range(0, SIZE, length)
    cookies = [turn * SIZE + offset + 1 for offset in offsets]
    client.stream.send(
        b"".join(
            struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, cookie, offset, length)
            for cookie, offset in zip(cookies, offsets, strict=True)
        )
    )
    return cookies


def take_reply(client: Client, length: int) -> tuple[int, bytes]:
    """The next simple reply: cookie and bytes."""
    magic, error, cookie = struct.unpack(">IIQ", client.stream.recv(16))
    assert (magic, error) == (w.SIMPLE_REPLY_MAGIC, 0)
    return cookie, client.stream.recv(length)


@pytest.mark.parametrize("style", STYLES)
def test_reads_and_writes_of_every_length(rig: Rig, style: Style) -> None:
    with memory_file() as fd:
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE, style)
        model = bytearray(b"\x5a" * SIZE)
        for offset, length in LENGTHS:
            data = os.urandom(length)
            client.write(offset, data)
            model[offset : offset + length] = data
            start = max(offset - 3, 0)
            assert client.read(start, length + 6) == model[start : start + length + 6]
        client.flush()
        assert os.pread(fd, SIZE, 0) == bytes(model)


def test_no_payload_byte_of_a_read_is_copied_and_nothing_enters_the_ring() -> None:
    with running(reactors=1) as rig, memory_file() as fd:
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE)
        assert client.read(0, PAGE) == b"\x5a" * PAGE
        before = rig.call(rig.plane.reactor_stats)[0]
        for i in range(100):
            assert client.read(i * PAGE, PAGE) == b"\x5a" * PAGE
        after = rig.call(rig.plane.reactor_stats)[0]
        assert after.copies_bytes == before.copies_bytes
        assert after.submissions - before.submissions <= 101, "only receives are submitted"
        assert after.pool_free_bytes == before.pool_free_bytes


def test_reading_holes_does_not_fill_them(rig: Rig) -> None:
    with memory_file(fill=None) as fd:
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE)
        client.write(PAGE, b"x" * PAGE)
        taken = blocks(fd)
        for offset in range(0, SIZE, 64 << 10):
            expected = bytearray(64 << 10)
            if offset == 0:
                expected[PAGE : 2 * PAGE] = b"x" * PAGE
            assert client.read(offset, 64 << 10) == bytes(expected)
        assert blocks(fd) == taken == PAGE


def test_trimmed_pages_are_forgotten(rig: Rig) -> None:
    with memory_file() as fd:
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE)
        assert client.read(0, 256 << 10) == b"\x5a" * (256 << 10)
        client.trim(0, SIZE)
        assert blocks(fd) == 0
        assert client.read(0, 256 << 10) == bytes(256 << 10)
        client.zero(0, SIZE)
        assert client.read(SIZE - PAGE, PAGE) == bytes(PAGE)
        assert blocks(fd) == 0
        client.write(0, b"y" * SIZE)
        assert client.read(0, SIZE) == b"y" * SIZE


def test_a_stalled_client_gets_every_byte_in_the_end(rig: Rig) -> None:
    """Far more than the socket takes at once: what does not fit waits in the queue, not in memory."""
    with memory_file() as fd:
        for block in range(SIZE // PAGE):
            os.pwrite(fd, block.to_bytes(4, "big") * (PAGE // 4), block * PAGE)
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE)
        client.stream.polite = False
        length = 64 << 10
        asked = set(ask_reads(client, length)) | set(ask_reads(client, length, 1))
        seen = set()
        for _ in range(len(asked)):
            cookie, data = take_reply(client, length)
            offset = (cookie - 1) % SIZE
            numbers = range(offset // PAGE, (offset + length) // PAGE)
            assert data == b"".join(number.to_bytes(4, "big") * (PAGE // 4) for number in numbers)
            seen.add(cookie)
        assert seen == asked


def test_a_stalled_client_neither_holds_up_a_map_change_nor_sees_the_old_place() -> None:
    """Its bytes move to another object; what it has not received by then comes from the new place."""
    with running(reactors=1) as rig, memory_file(fill=b"\x11") as old, memory_file(fill=b"\x11") as new:
        volume = rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(old, SIZE), 0)])
        client = rig.connect(volume, SIZE, timeout_s=20)
        client.stream.polite = False
        length = 256 << 10
        asked = [cookie for turn in range(8) for cookie in ask_reads(client, length, turn)]
        eventually("the reads are with the plane", lambda: rig.stats(volume).in_flight > 0)
        change = describe(SIZE, [Run(0, SIZE, rig.fd_object(new, SIZE), 0)], start=1, version=2)
        rig.wait(rig.plane.change_volume(volume, change))
        os.pwrite(old, b"\xee" * SIZE, 0)  # the old place belongs to somebody else now
        for _ in asked:
            _, data = take_reply(client, length)
            assert data.count(0xEE) == 0
        assert client.read(0, 16) == b"\x11" * 16


def test_a_file_that_was_cut_is_an_error_of_its_requests_alone(rig: Rig) -> None:
    with memory_file() as fd, memory_file() as other:
        volume = rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)])
        bystander = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(other, SIZE), 0)]), SIZE)
        client = rig.connect(volume, SIZE)
        assert client.read(1 << 20, PAGE) == b"\x5a" * PAGE
        client.write(1 << 20, b"z" * PAGE)
        os.ftruncate(fd, 1 << 20)
        with pytest.raises(NbdError) as raised:
            client.read(1 << 20, PAGE)
        assert raised.value.error == errno.EIO
        client.write(1 << 20, b"w" * PAGE)  # a file grows by writing, and so it is there again
        assert client.read(1 << 20, PAGE) == b"w" * PAGE
        assert bystander.read(0, PAGE) == b"\x5a" * PAGE


def test_a_cut_in_the_middle_of_many_reads(rig: Rig) -> None:
    with memory_file() as fd:
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE)
        for offset in range(0, SIZE, 256 << 10):
            client.read(offset, 256 << 10)
        os.ftruncate(fd, SIZE // 2)
        cookies = {client.send(w.CMD_READ, offset, PAGE): offset for offset in range(0, SIZE, 64 << 10)}
        for cookie, offset in cookies.items():
            reply = client.wait(cookie)
            if offset < SIZE // 2:
                reply.check()
                assert reply.data == b"\x5a" * PAGE
            else:
                with pytest.raises(NbdError):
                    reply.check()


def test_growth_shows_the_new_bytes(rig: Rig) -> None:
    with memory_file(SIZE) as fd:
        number = rig.fd_object(fd, SIZE)
        volume = rig.volume(SIZE, [Run(0, SIZE, number, 0)])
        client = rig.connect(volume, SIZE)
        assert client.read(0, PAGE) == b"\x5a" * PAGE
        os.ftruncate(fd, 2 * SIZE)
        os.pwrite(fd, b"\x77" * SIZE, SIZE)
        rig.call(rig.plane.set_object_size, number, 2 * SIZE)
        grown = describe(2 * SIZE, [Run(0, 2 * SIZE, number, 0)], start=1, version=2)
        rig.wait(rig.plane.change_volume(volume, grown))
        assert client.read(SIZE - PAGE, 2 * PAGE) == b"\x5a" * PAGE + b"\x77" * PAGE
        client.write(2 * SIZE - PAGE, b"q" * PAGE)
        assert os.pread(fd, PAGE, 2 * SIZE - PAGE) == b"q" * PAGE


def test_a_full_file_system_is_an_error_and_not_the_end(rig: Rig) -> None:
    """Bytes that memory cannot give raise SIGBUS inside a copy: it must stay an error of that write."""
    with memory_file() as fd, memory_file() as other:
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(fd, SIZE), 0)]), SIZE)
        bystander = rig.connect(rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(other, SIZE), 0)]), SIZE)
        for offset in range(0, SIZE, 64 << 10):
            client.write(offset, b"a" * PAGE)
        os.ftruncate(fd, PAGE)
        seal_growth(fd)
        with pytest.raises(NbdError):
            client.write(1 << 20, b"b" * PAGE)
        client.write(0, b"c" * PAGE)
        assert client.read(0, PAGE) == b"c" * PAGE
        bystander.write(0, b"d" * PAGE)
        assert bystander.read(0, PAGE) == b"d" * PAGE


def seal_growth(fd: int) -> None:
    """Nobody can make the file longer any more."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


def test_a_block_device_is_no_file_in_memory(rig: Rig) -> None:
    """Its node lies on a tmpfs, its bytes do not: FUA has to reach the device."""
    backing = rig.path("lun")
    backing.write_bytes(bytes(SIZE))
    losetup = need("losetup", "mount")
    attach = [losetup, "--show", "--find", str(backing)]
    device = subprocess.run(attach, capture_output=True, text=True, check=True).stdout.strip()
    try:
        fd = os.open(device, os.O_RDWR)
        number = rig.fd_object(fd, SIZE, block=True)
        os.close(fd)
        client = rig.connect(rig.volume(SIZE, [Run(0, SIZE, number, 0)]), SIZE)
        assert client.read(0, PAGE) == bytes(PAGE)
        client.write(0, b"f" * PAGE, w.CMD_FLAG_FUA)
        assert backing.read_bytes()[:PAGE] == b"f" * PAGE, "answered, and not on the device"
        client.write(PAGE, b"g" * PAGE)
        client.flush()
        assert backing.read_bytes()[PAGE : 2 * PAGE] == b"g" * PAGE
    finally:
        subprocess.run([losetup, "--detach", device], check=True)


def test_limits_and_map_change_at_once_leave_no_read_behind() -> None:
    """A read that a limit held and that was parsed between two messages holds the new map; its client stalls."""
    with running(reactors=1) as rig, memory_file(fill=b"\x11") as old, memory_file(fill=b"\x11") as new:
        volume = rig.volume(SIZE, [Run(0, SIZE, rig.fd_object(old, SIZE), 0)])
        target = rig.fd_object(new, SIZE)
        client = rig.connect(volume, SIZE, timeout_s=20)
        client.stream.polite = False
        for turn in range(3):  # far more than the socket takes
            ask_reads(client, 256 << 10, turn)
        eventually("the reads are with the plane", lambda: rig.stats(volume).in_flight > 0)
        rig.wait(rig.plane.limit_volume(volume, VolumeLimits(iops=1, burst_us=1000)))
        ask_reads(client, 256 << 10, 3)
        eventually("one waits for the limit", lambda: rig.stats(volume).delayed > 0)

        async def both() -> None:
            limits = asyncio.ensure_future(rig.plane.limit_volume(volume, VolumeLimits(iops=10_000_000)))
            change = describe(SIZE, [Run(0, SIZE, target, 0)], start=1, version=2)
            await rig.plane.change_volume(volume, change)
            await limits

        rig.wait(both(), timeout_s=10)
