"""Limits on the real plane: what waits is answered, and holds up nothing else.

How much gets through when is judged in simulated time (tests/sim/test_qos.py); here a limit of one I/O a second stands
for "waits until something happens".
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import pytest

from nbdvvol.dataplane.errors import PlaneError
from nbdvvol.dataplane.types import Run, VolumeLimits
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES, Style
from tests.lib.rawnbd import Closed
from tests.unit.plane_rig import Client, Rig, describe, eventually, rig, running

__all__ = ["rig"]
SIZE = 1 << 20
CRAWL = VolumeLimits(iops=1, burst_us=1000)


def limited(rig: Rig, limits: VolumeLimits, size: int = SIZE) -> int:
    desc = describe(size, [Run(0, size, rig.file_object(size), 0)])
    return rig.call(rig.plane.open_volume, desc, limits)


def send_reads(client: Client, count: int, length: int = 4096) -> list[int]:
    return [client.send(w.CMD_READ, i * 4096 % SIZE, length) for i in range(count)]


def answers(client: Client) -> Iterator[int]:
    """The error of each answer, until the server hangs up."""
    with contextlib.suppress(Closed):
        while True:
            yield client.wait_any()[1].error


@pytest.mark.parametrize("style", STYLES)
def test_what_waits_is_answered(style: Style) -> None:
    """More than the burst, on several connections and reactors."""
    with running(reactors=2) as rig:
        volume = limited(rig, VolumeLimits(iops=400, bandwidth=8 << 20, burst_us=10_000))
        clients = [rig.connect(volume, SIZE, style) for _ in range(4)]
        data = bytes(range(256)) * 16
        for client in clients:
            client.write(0, data)
        cookies = [send_reads(client, 20) for client in clients]
        for client, mine in zip(clients, cookies, strict=True):
            for i, cookie in enumerate(mine):
                answer = client.wait(cookie).check()
                assert len(answer.data) == 4096 and (i or answer.data == data)
        stats = rig.stats(volume)
        assert stats.reads == 80 and 0 < stats.delayed <= 84, "how many depends on when the machine lets us run"
        assert stats.delay_ns > 0 and stats.in_flight == 0


def test_large_writes_wait_too(rig: Rig) -> None:
    """Before their payload is taken in: bandwidth that is spent pushes back on the socket."""
    volume = limited(rig, VolumeLimits(bandwidth=64 << 10, burst_us=1000))
    client = rig.connect(volume, SIZE)
    client.write(0, b"1" * (1 << 18))
    cookies = [client.send(w.CMD_WRITE, 1 << 18, 1 << 16, payload=b"2" * (1 << 16))]
    eventually("it waits", lambda: rig.stats(volume).delayed >= 1)
    assert rig.stats(volume).writes == 1
    rig.wait(rig.plane.limit_volume(volume, VolumeLimits(bandwidth=256 << 20, burst_us=1000)))
    cookies += [client.send(w.CMD_WRITE, i << 18, 1 << 16, payload=b"3" * (1 << 16)) for i in (2, 3)]
    for cookie in cookies:
        client.wait(cookie).check()
    for i, byte in enumerate(b"1233"):
        assert client.read(i << 18, 1 << 16) == bytes([byte]) * (1 << 16)


def test_other_limits_hold_for_what_waits_already() -> None:
    """Nobody waits half a minute for limits that are gone."""
    with running(reactors=2) as rig:
        volume = limited(rig, CRAWL)
        clients = [rig.connect(volume, SIZE) for _ in range(3)]
        cookies = [send_reads(client, 30) for client in clients]
        eventually("all wait", lambda: rig.stats(volume).delayed >= 3)
        rig.wait(rig.plane.limit_volume(volume, VolumeLimits(iops=2)))
        rig.wait(rig.plane.limit_volume(volume, VolumeLimits()))
        for client, mine in zip(clients, cookies, strict=True):
            for cookie in mine:
                client.wait(cookie).check()


def test_limits_come_to_a_volume_in_use(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    client = rig.connect(volume, SIZE)
    client.read(0, 4096)
    rig.wait(rig.plane.limit_volume(volume, CRAWL))
    cookies = send_reads(client, 10)
    eventually("it waits", lambda: rig.stats(volume).delayed >= 1)
    rig.wait(rig.plane.limit_volume(volume, VolumeLimits(iops=100, burst_us=1000)))
    for cookie in cookies:
        client.wait(cookie).check()
    assert rig.stats(volume).reads == 11


def test_closing_does_not_wait() -> None:
    """What waits is refused with ESHUTDOWN, as is what has arrived behind it; then the connection ends."""
    with running(reactors=2) as rig:
        volume = limited(rig, CRAWL)
        clients = [rig.connect(volume, SIZE) for _ in range(3)]
        for client in clients:
            send_reads(client, 5)
            client.send(w.CMD_WRITE, 0, 70_000, payload=b"x" * 70_000)
        eventually("all wait", lambda: rig.stats(volume).delayed >= 3)
        rig.wait(rig.plane.close_volume(volume))
        for client in clients:
            errors = list(answers(client))
            assert errno.ESHUTDOWN in errors and set(errors) <= {0, errno.ESHUTDOWN}
            assert client.ended().errno == errno.ESHUTDOWN


def test_a_client_that_hangs_up_while_it_waits_is_let_go(rig: Rig) -> None:
    volume = limited(rig, CRAWL)
    client, other = rig.connect(volume, SIZE), rig.connect(volume, SIZE)
    send_reads(client, 50)
    eventually("it waits", lambda: rig.stats(volume).delayed >= 1)
    client.stream.close()
    assert client.ended().errno in (errno.ECONNRESET, errno.EPIPE), "whichever of reading and writing finds out first"
    other.flush()


def test_a_stop_does_not_wait() -> None:
    with running(reactors=2) as rig:
        volume = limited(rig, CRAWL)
        for _ in range(4):
            send_reads(rig.connect(volume, SIZE), 50)
        eventually("all wait", lambda: rig.stats(volume).delayed >= 4)
        rig.wait(rig.plane.close(), timeout_s=15)


def test_a_map_change_does_not_wait(rig: Rig) -> None:
    """What waits has not taken the map yet: it runs on the new one."""
    obj = rig.file_object(2 * SIZE)
    volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, obj, 0)]), CRAWL)
    client = rig.connect(volume, SIZE)
    cookies = send_reads(client, 3)
    eventually("it waits", lambda: rig.stats(volume).delayed >= 1)
    grown = describe(2 * SIZE, [Run(0, 2 * SIZE, obj, 0)], version=2, start=1)
    rig.wait(rig.plane.change_volume(volume, grown))
    beyond = client.send(w.CMD_READ, SIZE, 4096)
    rig.wait(rig.plane.limit_volume(volume, VolumeLimits()))
    for cookie in (*cookies, beyond):
        client.wait(cookie).check()


def test_a_volume_that_becomes_read_only_refuses_what_waits(rig: Rig) -> None:
    obj = rig.file_object(SIZE)
    volume = rig.call(rig.plane.open_volume, describe(SIZE, [Run(0, SIZE, obj, 0)]), CRAWL)
    client = rig.connect(volume, SIZE)
    cookies = [client.send(w.CMD_WRITE, 0, 40_000, payload=b"x" * 40_000) for _ in range(2)]
    eventually("it waits", lambda: rig.stats(volume).delayed >= 1)
    read_only = describe(SIZE, [Run(0, SIZE, obj, 0)], version=2, start=1, read_only=True)
    rig.wait(rig.plane.change_volume(volume, read_only))
    rig.wait(rig.plane.limit_volume(volume, VolumeLimits()))
    assert [client.wait(cookie).error for cookie in cookies] == [0, errno.EPERM]


def test_what_is_free(rig: Rig) -> None:
    """FLUSH (its writes have paid), and whatever is refused."""
    volume = limited(rig, CRAWL)
    client = rig.connect(volume, SIZE)
    for _ in range(50):
        client.flush()
        bad = client.send(w.CMD_READ, SIZE, 4096)
        assert client.wait(bad).error == errno.EINVAL
    assert rig.stats(volume).delayed == 0


def test_trims_and_zeroes_are_not_charged_for_their_length(rig: Rig) -> None:
    """A trim moves no byte; zeroes count as 32 MiB at most: no request is in debt for hours."""
    size = 8 << 30
    volume = limited(rig, VolumeLimits(bandwidth=64 << 20, burst_us=600_000), size)
    client = rig.connect(volume, size)
    client.trim(0, 1 << 30)
    client.zero(0, 1 << 31)
    client.zero(0, 1 << 31)
    assert rig.stats(volume).delayed == 1


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (VolumeLimits(iops=10**9), "above 100000000"),
        (VolumeLimits(bandwidth=100), "not in 65536"),
        (VolumeLimits(iops=10, burst_us=1), "burst of 1 us"),
        (VolumeLimits(iops=10, io_bytes=100), "I/O of 100 bytes"),
        (VolumeLimits(shares=0), "0 shares"),
    ],
)
def test_bad_limits_are_refused_whole(rig: Rig, limits: VolumeLimits, says: str) -> None:
    obj = rig.file_object(SIZE)
    desc = describe(SIZE, [Run(0, SIZE, obj, 0)])
    with pytest.raises(PlaneError, match=says):
        rig.call(rig.plane.open_volume, desc, limits)
    volume = rig.call(rig.plane.open_volume, desc)
    with pytest.raises(PlaneError, match=says):
        rig.wait(rig.plane.limit_volume(volume, limits))
    client = rig.connect(volume, SIZE)
    for cookie in send_reads(client, 20):
        client.wait(cookie).check()
    assert rig.stats(volume).delayed == 0
    client.disconnect()
    rig.wait(rig.plane.close_volume(volume))
    eventually("nobody uses the object", lambda: closes(rig, obj))


def closes(rig: Rig, obj: int) -> bool:
    try:
        rig.wait(rig.plane.close_object(obj))
    except PlaneError as error:
        return error.errno != errno.EBUSY
    return True


def test_limits_of_a_closed_volume(rig: Rig) -> None:
    volume = rig.volume(SIZE)
    rig.wait(rig.plane.close_volume(volume))
    with pytest.raises(PlaneError) as caught:
        rig.wait(rig.plane.limit_volume(volume, VolumeLimits(iops=5)))
    assert caught.value.errno == errno.ENOENT


def test_a_quiet_volume_is_heard_beside_a_flood() -> None:
    """On one reactor: each turn has a part for both."""
    with running(reactors=1) as rig:
        busy, quiet = limited(rig, VolumeLimits(shares=100)), rig.volume(SIZE)
        floods = [rig.connect(busy, SIZE) for _ in range(4)]
        one = rig.connect(quiet, SIZE)
        cookies = [send_reads(flood, 200, 512) for flood in floods]
        for i in range(20):
            one.write(i * 512, bytes([i]) * 512)
        for flood, mine in zip(floods, cookies, strict=True):
            for cookie in mine:
                flood.wait(cookie).check()
        for i in range(20):
            assert one.read(i * 512, 512) == bytes([i]) * 512
