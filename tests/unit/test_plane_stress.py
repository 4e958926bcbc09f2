"""Everything at once: clients that come, flood, vanish and reset, maps that change, reactors short of memory."""

from __future__ import annotations

import random
import threading
import time

from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES, NbdError
from tests.lib.rawnbd import Closed
from tests.unit.plane_rig import Rig, describe, running

SIZE = 4 << 20
SLICE = SIZE // 8
SECONDS = 4.0


def steady(rig: Rig, volume: int, index: int, until: float) -> None:
    """A good client: owns one slice, and every byte it reads there must be its own."""
    rand = random.Random(index)
    client = rig.connect(volume, SIZE, STYLES[index % 3], timeout_s=20)
    image = bytearray(client.read(index * SLICE, SLICE))
    while time.monotonic() < until:
        offset = rand.randrange(SLICE)
        length = rand.randrange(1, SLICE - offset + 1)
        match rand.randrange(6):
            case 0 | 1:
                image[offset : offset + length] = data = rand.randbytes(length)
                client.write(index * SLICE + offset, data)
            case 2:
                image[offset : offset + length] = bytes(length)
                client.zero(index * SLICE + offset, length)
            case 3:
                client.flush()
            case _:
                assert client.read(index * SLICE + offset, length) == image[offset : offset + length]
    client.disconnect()


def wild(rig: Rig, volume: int, index: int, until: float) -> None:
    """A bad client: floods its own slice, reads some answers or none, and goes away in every way."""
    rand = random.Random(index)
    while time.monotonic() < until:
        client = rig.connect(volume, SIZE, STYLES[rand.randrange(3)], timeout_s=0.2)
        client.stream.polite = False
        base = index * SLICE
        try:
            for _ in range(rand.randrange(1, 300)):
                length = rand.choice([1, 4096, 20_000, SLICE])
                if rand.random() < 0.5:
                    client.send(w.CMD_WRITE, base, length, payload=bytes(length))
                else:
                    client.send(rand.choice([w.CMD_READ, w.CMD_TRIM, w.CMD_WRITE_ZEROES]), base, length)
            for _ in range(rand.randrange(20)):
                client.take()
        except (TimeoutError, Closed, NbdError, OSError, AssertionError):
            pass  # its own fault
        if rand.random() < 0.3:
            client.stream.half_close()
            time.sleep(0.02)
        client.stream.close()


def test_everything_at_once() -> None:
    failures: list[BaseException] = []

    def guarded(function: object, *args: object) -> None:
        try:
            function(*args)  # type: ignore[operator]
        except BaseException as failure:
            failures.append(failure)

    with running(reactors=3, pool_bytes=4 << 20) as rig:
        obj = rig.file_object(SIZE)
        layouts = [[Run(0, SIZE, obj, 0)], [Run(at, SLICE // 4, obj, at) for at in range(0, SIZE, SLICE // 4)]]
        volume = rig.volume(SIZE, layouts[0])
        until = time.monotonic() + SECONDS
        jobs = [(steady, i) for i in range(5)] + [(wild, i) for i in range(5, 8)]
        threads = [threading.Thread(target=guarded, args=(job, rig, volume, i, until)) for job, i in jobs]
        for thread in threads:
            thread.start()
        version = 1
        while time.monotonic() < until:
            desc = describe(SIZE, layouts[version % 2], version=version + 1, start=version)
            rig.wait(rig.plane.change_volume(volume, desc))
            version += 1
            time.sleep(0.01)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"
        assert not failures, failures
        rig.wait(rig.plane.close_volume(volume))
        stats = rig.call(rig.plane.reactor_stats)
        assert [(one.connections, one.pool_free_bytes) for one in stats] == [(0, 4 << 20)] * 3
        assert sum(one.pool_waits for one in stats) > 0, "memory was never short: the test tests nothing"
