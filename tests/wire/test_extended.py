"""Extended headers: 64-bit requests beyond 4 GiB, by the raw client (Debian's libnbd and qemu are older than these)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lib import nbdwords as w
from tests.lib.pattern import difference, pattern
from tests.lib.rawio import NbdError, Transmission, open_export
from tests.lib.rawnbd import Haggle
from tests.lib.shared import HUGE_SIZE, SharedFarm

MiB = w.MiB
GiB = 1 << 30
pytestmark = pytest.mark.timeout(60)
HOLE = w.STATE_HOLE | w.STATE_ZERO


@pytest.fixture
def huge(shared: SharedFarm) -> Iterator[Transmission]:
    """A 6 GiB sparse export, all of it zeros."""
    with shared.open("huge", "extended") as nbd:
        assert nbd.size == HUGE_SIZE
        nbd.trim(0, HUGE_SIZE)
        nbd.zero(0, HUGE_SIZE)
        yield nbd


def test_status_of_more_than_4_gib_in_one_extent(huge: Transmission) -> None:
    assert huge.status(0, HUGE_SIZE) == [(HUGE_SIZE, HOLE)]
    assert huge.status(0, HUGE_SIZE, w.CMD_FLAG_REQ_ONE) == [(HUGE_SIZE, HOLE)]
    huge.write(5 * GiB, b"i" * 65536)
    extents = huge.status(0, HUGE_SIZE)
    assert extents[0] == (5 * GiB, HOLE) and extents[1][1] == 0 and extents[2][1] == HOLE
    assert sum(length for length, _ in extents) == HUGE_SIZE


def test_zeroes_of_more_than_4_gib(huge: Transmission) -> None:
    places = [0, 4 * GiB - 4096, 4 * GiB, 5 * GiB + 77, HUGE_SIZE - 4096]
    for at in places:
        huge.write(at, pattern(1, at, 4096))
    huge.zero(1, HUGE_SIZE - 2, w.CMD_FLAG_FUA)
    assert huge.read(0, 4096) == pattern(1, 0, 1) + bytes(4095)
    for at in places[1:4]:
        assert not any(huge.read(at, 4096)), f"at {at}"
    assert huge.read(HUGE_SIZE - 4096, 4096) == bytes(4095) + pattern(1, HUGE_SIZE - 1, 1)
    assert not any(huge.read(HUGE_SIZE // 2, 32 * MiB))


def test_fast_zeroes_of_more_than_4_gib(huge: Transmission) -> None:
    huge.write(5 * GiB, b"x" * MiB)
    error = huge.call(w.CMD_WRITE_ZEROES, 0, HUGE_SIZE, flags=w.CMD_FLAG_FAST_ZERO).error
    assert error in (0, w.ENOTSUP)
    assert huge.read(5 * GiB, MiB) == (bytes(MiB) if error == 0 else b"x" * MiB)


def test_trim_and_cache_of_more_than_4_gib(huge: Transmission) -> None:
    huge.write(0, b"edge")
    huge.trim(4, HUGE_SIZE - 4)
    assert huge.read(0, 4) == b"edge"
    assert huge.call(w.CMD_CACHE, 0, HUGE_SIZE).error in (0, w.EOVERFLOW, w.EINVAL)


def test_one_more_than_the_size_is_refused(huge: Transmission) -> None:
    for command, want in ((w.CMD_TRIM, w.EINVAL), (w.CMD_WRITE_ZEROES, w.ENOSPC), (w.CMD_BLOCK_STATUS, w.EINVAL)):
        with pytest.raises(NbdError) as caught:
            huge.call(command, 1, HUGE_SIZE).check()
        assert caught.value.error == want


@pytest.mark.parametrize("style", ["simple", "structured", "extended"])
def test_io_beyond_4_gib_in_every_style(shared: SharedFarm, style) -> None:
    with open_export(shared.socket(), "huge", style) as nbd:
        for at in (4 * GiB - 100, 4 * GiB + 1, HUGE_SIZE - MiB):
            nbd.write(at, pattern(3, at, MiB))
            assert difference(pattern(3, at, MiB), nbd.read(at, MiB)) == ""
            nbd.zero(at + 10, 1000)
            assert not any(nbd.read(at + 10, 1000))


def test_payload_status_selects_contexts(huge: Transmission) -> None:
    context = huge.agreed.contexts["base:allocation"]
    payload = HUGE_SIZE.to_bytes(8, "big") + context.to_bytes(4, "big")
    answer = huge.call(w.CMD_BLOCK_STATUS, 0, len(payload), payload=payload).check()
    assert answer.extents == {context: [(HUGE_SIZE, HOLE)]}


def test_extended_is_agreed_over_tcp_too_and_export_name_is_not_taken(shared: SharedFarm) -> None:
    with open_export(shared.tcp, "vm1/huge", "extended") as nbd:
        assert nbd.flags & w.TFLAG_BLOCK_STATUS_PAYLOAD and nbd.flags & w.TFLAG_SEND_DF
    with Haggle(shared.tcp) as haggle:
        haggle.begin().extended()
        haggle.send_option(w.OPT_EXPORT_NAME, b"vm1/huge")
        assert haggle.stream.wait_closed(5) == b""
