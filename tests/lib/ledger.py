"""A verified write load that survives kills: it knows, sector by sector, what a disk may hold.

Each 4 KiB block carries its number and a version in every 512-byte sector. A block's acknowledged version must be
there after a process was killed; a version that was sent but not answered may be. At most one write of a block is in
flight, so anything else is lost, torn beyond a sector, misplaced, or somebody else's data.
"""

from __future__ import annotations

import random
import struct
import threading
import time

from tests.lib import nbdwords as w
from tests.lib.rawio import NbdError, Transmission
from tests.lib.rawnbd import Closed

BLOCK = 4096
SECTOR = 512
ZERO = 0
FOUND = -1
"""The version of a block that a killed write has half written: what was read of it then is what stays."""
DEPTH = 16


class Ledger:
    """What [base, base + blocks * 4096) of an export holds."""

    def __init__(self, seed: int, blocks: int = 1024, base: int = 0, rest_s: float = 0.0) -> None:
        self.seed = seed
        self.blocks = blocks
        self.base = base
        self.acked = [ZERO] * blocks
        self.pending: list[set[int]] = [set() for _ in range(blocks)]
        self._found: dict[int, bytes] = {}
        self.answered = 0
        self.last_answer = time.monotonic()
        self.shutdowns = 0
        self._rest_s = rest_s
        """After each answer, so that it leaves the machine to others."""
        self._next = 1
        self._random = random.Random(seed)

    def content(self, block: int, version: int) -> bytes:
        """A block's bytes at a version."""
        if version == ZERO:
            return bytes(BLOCK)
        if version == FOUND:
            return self._found[block]
        return b"".join(struct.pack(">QQQQ", self.seed, block, version, sector) * 16 for sector in range(8))

    def work(self, nbd: Transmission, stop: threading.Event) -> None:
        """Write until stopped or cut off. Raises NbdError for any error but ESHUTDOWN."""
        flight: dict[int, tuple[int, int]] = {}
        try:
            while not stop.is_set():
                while len(flight) < DEPTH:
                    block = self._random.randrange(self.blocks)
                    if all(block != busy for busy, _ in flight.values()):
                        self._send(nbd, block, flight)
                self._reap(nbd, flight)
            while flight:
                self._reap(nbd, flight)
        except (Closed, OSError):
            return

    def _send(self, nbd: Transmission, block: int, flight: dict[int, tuple[int, int]]) -> None:
        offset = self.base + block * BLOCK
        zero = self._random.random() < 0.1
        version = ZERO if zero else self._next
        self._next += 1
        self.pending[block].add(version)
        if zero:
            cookie = nbd.send(w.CMD_WRITE_ZEROES, offset, BLOCK)
        else:
            flags = w.CMD_FLAG_FUA if self._random.random() < 0.05 else 0
            cookie = nbd.send(w.CMD_WRITE, offset, BLOCK, payload=self.content(block, version), flags=flags)
        flight[cookie] = (block, version)
        if self._random.random() < 0.02:
            flight[nbd.send(w.CMD_FLUSH)] = (-1, ZERO)

    def _reap(self, nbd: Transmission, flight: dict[int, tuple[int, int]]) -> None:
        cookie, answer = nbd.wait_any()
        block, version = flight.pop(cookie)
        if answer.error == w.ESHUTDOWN:
            self.shutdowns += 1
            return  # refused: it may still not be there, and may not have been done
        if answer.error:
            raise NbdError(answer.error, answer.message)
        time.sleep(self._rest_s)
        self.answered += 1
        self.last_answer = time.monotonic()
        if block >= 0:
            self.acked[block] = version
            self.pending[block].clear()

    def verify(self, nbd: Transmission) -> None:
        """Read everything and compare; from then on what was found is what must be there."""
        chunk = 256
        for first in range(0, self.blocks, chunk):
            count = min(chunk, self.blocks - first)
            data = nbd.read(self.base + first * BLOCK, count * BLOCK)
            for index in range(count):
                self._settle(first + index, data[index * BLOCK : (index + 1) * BLOCK])

    def _settle(self, block: int, data: bytes) -> None:
        allowed = {self.acked[block], *self.pending[block]}
        known = {version: self.content(block, version) for version in allowed}
        for version, content in known.items():
            if data == content:
                self.acked[block] = version
                self.pending[block].clear()
                return
        for start in range(0, BLOCK, SECTOR):  # a killed write may have been half done, by sectors
            piece = data[start : start + SECTOR]
            if not any(piece == content[start : start + SECTOR] for content in known.values()):
                raise AssertionError(
                    f"block {block}, byte {start}: holds {describe(piece)}, allowed are versions {sorted(allowed)} "
                    f"(acknowledged {self.acked[block]}) of seed {self.seed}"
                )
        self.pending[block].clear()
        self.acked[block] = FOUND
        self._found[block] = data


def describe(sector: bytes) -> str:
    """What a sector holds, in words."""
    if not any(sector):
        return "zeros"
    seed, block, version, number = struct.unpack_from(">QQQQ", sector)
    return f"seed {seed} block {block} version {version} sector {number}"


class Writer:
    """A ledger's work in a thread, on a connection of its own."""

    def __init__(self, ledger: Ledger, nbd: Transmission) -> None:
        self.ledger = ledger
        self.failure: BaseException | None = None
        self._nbd = nbd
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.ledger.work(self._nbd, self._stop)
        except BaseException as error:
            self.failure = error

    def progress(self, answers: int = 50, timeout_s: float = 10.0) -> None:
        """Wait until that many more writes are answered. Fails when they are not."""
        goal = self.ledger.answered + answers
        end = time.monotonic() + timeout_s
        while self.ledger.answered < goal:
            assert self.failure is None, self.failure
            assert time.monotonic() < end, f"the load made no progress within {timeout_s} s"
            time.sleep(0.005)

    def ended(self, timeout_s: float = 30.0) -> None:
        """Wait until it ends by itself, because its connection closed or a request failed: see `failure`."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the load goes on: nothing ended it within {timeout_s} s"
        self._nbd.stream.close()

    def join(self) -> None:
        """Wait for its end after a kill (or end it); raise what went wrong."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the writer hangs: its connection neither answers nor closes"
        self._nbd.stream.close()
        if self.failure is not None:
            raise AssertionError("the load failed") from self.failure
