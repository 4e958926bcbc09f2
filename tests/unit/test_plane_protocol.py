"""The transmission phase, rule by rule (reference: nbd.md 1.6-1.12, 1.15), in the three header styles."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from nbdvvol.dataplane.types import Run
from tests.lib import nbdwords as w
from tests.lib.rawio import STYLES, NbdError, Style
from tests.unit.plane_rig import ALL_FLAGS, CONTEXT, Client, Rig, rig

__all__ = ["rig"]
SIZE = 1 << 20
PAGE = 4096


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> Style:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def client(rig: Rig, style: Style) -> Iterator[Client]:
    one = rig.connect(rig.volume(), SIZE, style)
    yield one
    assert one.read(0, 1) is not None, "the connection lives on"
    one.disconnect()
    assert one.ended().errno == 0


def fails(client: Client, error: int, command: int, *args: int, flags: int = 0, payload: bytes | None = None) -> str:
    answer = client.call(command, *args, flags=flags, payload=payload)
    assert answer.error == error, f"error {answer.error} {answer.message!r}, not {error}"
    assert answer.message or not client.agreed.structured, "an error chunk says why"
    return answer.message


def test_data_comes_back_at_any_byte_offset(client: Client) -> None:
    data = os.urandom(100_000)
    client.write(12_345, data)
    assert client.read(12_345, len(data)) == data
    assert client.read(12_346, 1) == data[1:2]
    assert client.read(0, 12_345) == bytes(12_345)


@pytest.mark.parametrize("length", [1, 16 << 10, (16 << 10) + 1, 200_000])
def test_payloads_of_every_path(client: Client, length: int) -> None:
    data = os.urandom(length)
    client.write(7, data, flags=w.CMD_FLAG_FUA)
    assert client.read(7, length) == data


def test_many_small_writes_then_reads_in_one_stream(client: Client) -> None:
    pieces = [os.urandom(3000) for _ in range(200)]
    cookies = [client.send(w.CMD_WRITE, 5000 * i, 3000, payload=piece) for i, piece in enumerate(pieces)]
    for cookie in cookies:
        client.wait(cookie).check()
    reads = [client.send(w.CMD_READ, 5000 * i, 3000) for i in range(200)]
    assert [client.wait(cookie).data for cookie in reads] == pieces


def test_32_mib_payload_is_served(rig: Rig, style: Style) -> None:
    size = 33 << 20
    client = rig.connect(rig.volume(size), size, style)
    data = os.urandom(1 << 20) * 32
    client.write(4097, data)
    assert client.read(4097, len(data)) == data


def test_longer_payload_ends_the_connection(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style)
    client.send(w.CMD_WRITE, 0, (32 << 20) + 1, payload=b"x")
    client.stream.wait_closed()
    assert client.ended().errno == errno.EPROTO


def test_payload_above_the_advertised_maximum_is_consumed(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style, payload_max=65536)
    fails(client, errno.EINVAL, w.CMD_WRITE, 0, 70_000, payload=bytes(70_000))
    fails(client, errno.EINVAL if style == "simple" else errno.EOVERFLOW, w.CMD_READ, 0, 70_000)
    client.write(0, b"x" * 65536)
    assert client.read(0, 65536) == b"x" * 65536


@pytest.mark.parametrize("offset", [SIZE, SIZE - 1, 1 << 63, (1 << 64) - 2])
def test_ranges_past_the_end(client: Client, offset: int) -> None:
    for command, error in (
        (w.CMD_READ, errno.EINVAL),
        (w.CMD_TRIM, errno.EINVAL),
        (w.CMD_CACHE, errno.EINVAL),
        (w.CMD_WRITE_ZEROES, errno.ENOSPC),
    ):
        fails(client, error, command, offset, 2)
    fails(client, errno.ENOSPC, w.CMD_WRITE, offset, 2, payload=b"xx")
    if client.agreed.structured:
        fails(client, errno.EINVAL, w.CMD_BLOCK_STATUS, offset, 2)


def test_wrapping_lengths(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE, "extended")
    fails(client, errno.ENOSPC, w.CMD_WRITE_ZEROES, 4096, (1 << 64) - 4096)
    fails(client, errno.EINVAL, w.CMD_TRIM, 1, (1 << 64) - 1)
    fails(client, errno.EINVAL, w.CMD_READ, 0, (1 << 64) - 1)


def test_zero_length_is_no_operation(client: Client) -> None:
    assert client.read(0, 0) == b""
    client.write(0, b"")
    client.trim(SIZE, 0)
    client.zero(0, 0)
    if client.agreed.structured:
        fails(client, errno.EINVAL, w.CMD_BLOCK_STATUS, 0, 0)


@pytest.mark.parametrize("command", [8, 9, 100, 65535])
def test_unknown_commands(client: Client, command: int) -> None:
    fails(client, errno.EINVAL, command, 0, 512)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (w.CMD_READ, 1 << 6),
        (w.CMD_READ, w.CMD_FLAG_NO_HOLE),
        (w.CMD_FLUSH, w.CMD_FLAG_REQ_ONE),
        (w.CMD_TRIM, w.CMD_FLAG_FAST_ZERO),
        (w.CMD_CACHE, w.CMD_FLAG_DF),
        (w.CMD_WRITE_ZEROES, w.CMD_FLAG_DF),
        (w.CMD_WRITE_ZEROES, 1 << 15),
    ],
)
def test_misplaced_flags(client: Client, command: int, flags: int) -> None:
    fails(client, errno.EINVAL, command, 0, 512, flags=flags)


def test_fast_zero_on_write(client: Client) -> None:
    client.write(0, b"keep")
    fails(client, errno.EINVAL, w.CMD_WRITE, 0, 4, flags=w.CMD_FLAG_FAST_ZERO, payload=b"drop")
    assert client.read(0, 4) == b"keep"


def test_df_is_for_structured_replies(client: Client) -> None:
    if client.agreed.structured:
        assert client.read(0, 65536, flags=w.CMD_FLAG_DF) == bytes(65536)
    else:
        fails(client, errno.EINVAL, w.CMD_READ, 0, 65536, flags=w.CMD_FLAG_DF)


def test_fua_is_tolerated_on_every_command(client: Client) -> None:
    fua = w.CMD_FLAG_FUA
    client.write(0, b"x", flags=fua)
    assert client.read(0, 1, flags=fua) == b"x"
    client.trim(0, PAGE, flags=fua)
    client.zero(0, PAGE, flags=fua)
    for command in (w.CMD_FLUSH, w.CMD_CACHE):
        client.call(command, 0, 0, flags=fua).check()


def test_fua_is_refused_when_not_offered(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style, tflags=ALL_FLAGS & ~w.TFLAG_SEND_FUA)
    fails(client, errno.EINVAL, w.CMD_WRITE, 0, 1, flags=w.CMD_FLAG_FUA, payload=b"x")
    fails(client, errno.EINVAL, w.CMD_READ, 0, 1, flags=w.CMD_FLAG_FUA)
    assert client.read(0, 1) == b"\0"


def test_commands_that_were_not_offered(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style, tflags=w.TFLAG_HAS_FLAGS)
    for command in (w.CMD_FLUSH, w.CMD_TRIM, w.CMD_WRITE_ZEROES):
        assert "not offered" in fails(client, errno.EINVAL, command, 0, 512) or style == "simple"
    client.call(w.CMD_CACHE, 0, 512).check()


@pytest.mark.parametrize("whose", ["connection", "volume"])
def test_read_only(rig: Rig, style: Style, whose: str) -> None:
    volume = rig.volume(read_only=whose == "volume")
    client = rig.connect(volume, SIZE, style, read_only=whose == "connection")
    fails(client, errno.EPERM, w.CMD_WRITE, 0, 100_000, payload=bytes(100_000))
    fails(client, errno.EPERM, w.CMD_TRIM, 0, PAGE)
    fails(client, errno.EPERM, w.CMD_WRITE_ZEROES, 0, PAGE)
    client.flush()
    assert client.read(0, 3) == bytes(3)


def test_unaligned_requests(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(block_min=512), SIZE, style)
    client.write(512, b"a" * 512)
    fails(client, errno.EINVAL, w.CMD_WRITE, 512, 511, payload=b"b" * 511)
    fails(client, errno.EINVAL, w.CMD_WRITE, 511, 512, payload=b"b" * 512)
    fails(client, errno.EINVAL, w.CMD_READ, 1, 512)
    fails(client, errno.EINVAL, w.CMD_TRIM, 512, 256)
    assert client.read(512, 512) == b"a" * 512


def test_flush_ignores_its_range(client: Client) -> None:
    client.call(w.CMD_FLUSH, 123, 456).check()


@pytest.mark.parametrize("cookie", [0, (1 << 64) - 1])
def test_equal_cookies_in_flight(client: Client, cookie: int) -> None:
    client.write(0, b"ab")
    for offset in (0, 1):
        client.send(w.CMD_READ, offset, 1, cookie=cookie)
    assert {client.wait(cookie).data, client.wait(cookie).data} == {b"a", b"b"}


def test_bad_magic_ends_the_connection(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style)
    client.stream.send(b"\x25\x60\x95\x14" + bytes(40))
    assert client.stream.wait_closed() == b""
    assert client.ended().errno == errno.EPROTO


def test_wrong_style_of_header_ends_the_connection(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE, "extended")
    client.stream.send(struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, 1, 0, 512) + bytes(4))
    assert client.stream.wait_closed() == b""


def test_zeroes_read_back_as_zeros(client: Client) -> None:
    data = os.urandom(64 << 10)
    for flags in (0, w.CMD_FLAG_NO_HOLE, w.CMD_FLAG_FUA):
        client.write(0, data)
        client.zero(1000, 50_000, flags=flags)
        assert client.read(0, len(data)) == data[:1000] + bytes(50_000) + data[51_000:]


def test_zeroes_of_64_bits_are_done_in_full(rig: Rig) -> None:
    size = 5 << 30
    client = rig.connect(rig.volume(size), size, "extended")
    for offset in (0, (4 << 30) + 5, size - 1):
        client.write(offset, b"x")
    client.zero(0, size)
    for offset in (0, (4 << 30) + 5, size - 1):
        assert client.read(offset, 1) == b"\0"
    client.trim(0, size)
    assert client.status(0, size) == [(size, 3)]


def test_trim_frees_whole_blocks_only(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE, "structured")
    client.write(0, b"x" * (128 << 10))
    client.trim(0, 64 << 10)
    assert client.read(0, 64 << 10) == bytes(64 << 10)
    assert client.read(64 << 10, 64 << 10) == b"x" * (64 << 10)
    assert rig.path("disk").stat().st_blocks * 512 <= 80 << 10


@pytest.mark.parametrize("command", [w.CMD_READ, w.CMD_TRIM, w.CMD_FLUSH, w.CMD_CACHE, w.CMD_WRITE_ZEROES, 99])
def test_payload_on_commands_without_one(rig: Rig, command: int) -> None:
    client = rig.connect(rig.volume(), SIZE, "extended")
    fails(client, errno.EINVAL, command, 0, 100_000, payload=bytes(100_000))
    assert client.read(0, 1) == b"\0"


def test_extended_write_must_say_payload(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE, "extended")
    client.send(w.CMD_WRITE, 0, 512, cookie=5)
    client.stream.send(b"x" * 512)
    assert client.wait(5).error == errno.EINVAL
    assert client.read(0, 512) == bytes(512)


def test_disc_finishes_what_is_in_flight(rig: Rig, style: Style) -> None:
    volume = rig.volume()
    client = rig.connect(volume, SIZE, style)
    cookies = [client.send(w.CMD_WRITE, 9000 * i, 9000, payload=bytes([i]) * 9000) for i in range(100)]
    client.send(w.CMD_DISC)
    for cookie in cookies:
        client.wait(cookie).check()
    assert client.stream.wait_closed() == b""
    assert client.ended().errno == 0
    other = rig.connect(volume)
    assert other.read(9000 * 99, 9000) == b"\x63" * 9000


def test_early_bytes_come_first(rig: Rig) -> None:
    write = struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_WRITE, 1, 0, 5) + b"early"
    client = rig.connect(rig.volume(), early=write + b"\x25\x60")
    assert client.stream.recv(16) == struct.pack(">IIQ", w.SIMPLE_REPLY_MAGIC, 0, 1)
    client.stream.send(struct.pack(">IHHQQI", w.REQUEST_MAGIC, 0, w.CMD_READ, 2, 0, 5)[2:])
    assert client.stream.recv(21)[16:] == b"early"


def test_payload_cut_short_is_not_written(rig: Rig, style: Style) -> None:
    volume = rig.volume()
    for length in (1000, 100_000):
        client = rig.connect(volume, SIZE, style)
        client.write(0, b"old" * (length // 3))
        client.send(w.CMD_WRITE, 0, length, payload=b"n" * (length - 1))
        client.stream.close()
        assert client.ended().errno == errno.ECONNRESET
        other = rig.connect(volume)
        assert b"n" not in other.read(0, length)


# --- block status ---


def test_status_tells_data_from_holes(rig: Rig) -> None:
    for style in STYLES[1:]:
        client = rig.connect(rig.volume(), SIZE, style)
        client.zero(0, SIZE)
        client.write(256 << 10, b"x" * (64 << 10))
        assert client.status(0, SIZE) == [(256 << 10, 3), (64 << 10, 0), (SIZE - (320 << 10), 3)]
        assert client.status(260 << 10, 4096) == [(4096, 0)]
        assert client.status(0, SIZE, flags=w.CMD_FLAG_REQ_ONE) == [(256 << 10, 3)]
        assert client.status(1000, 3000) == [(3000, 3)]


def test_status_keeps_to_the_minimum_block(rig: Rig) -> None:
    """Holes of the file lie askew to the volume: a block that is partly data is data."""
    obj = rig.file_object(SIZE + PAGE)
    runs = [Run(0, SIZE, obj, 100)]
    client = rig.connect(rig.volume(SIZE, runs, block_min=512), SIZE, "structured")
    client.write(64 << 10, b"x" * 512)
    extents = client.status(0, SIZE)
    assert all(length % 512 == 0 for length, _ in extents)
    assert [flags for _, flags in extents] == [3, 0, 3]
    start, data = extents[0][0], extents[1][0]
    assert start <= 64 << 10 < start + data <= (64 << 10) + 2 * PAGE


def test_status_without_context(rig: Rig, style: Style) -> None:
    client = rig.connect(rig.volume(), SIZE, style, contexts=())
    fails(client, errno.EINVAL, w.CMD_BLOCK_STATUS, 0, SIZE)


def test_status_of_many_extents_is_cut_not_refused(rig: Rig) -> None:
    size = 16 << 20
    client = rig.connect(rig.volume(size), size, "structured")
    for i in range(0, size, 8192):
        client.send(w.CMD_WRITE, i, 1, payload=b"x", cookie=i + 1)
    for i in range(0, size, 8192):
        client.wait(i + 1).check()
    extents = client.status(0, size)
    assert len(extents) == 1000
    assert set(extents) == {(4096, 0), (4096, 3)}


def test_status_with_a_payload(rig: Rig) -> None:
    client = rig.connect(rig.volume(), SIZE, "extended")

    def ask(length: int, *ids: int) -> dict[int, list[tuple[int, int]]]:
        payload = struct.pack(f">Q{len(ids)}I", length, *ids)
        return client.call(w.CMD_BLOCK_STATUS, 0, len(payload), payload=payload).check().extents

    assert ask(SIZE, CONTEXT) == {CONTEXT: [(SIZE, 3)]}
    for ids in ((CONTEXT, CONTEXT), (CONTEXT + 1,), ()):
        with pytest.raises(NbdError) as caught:
            ask(SIZE, *ids)
        assert caught.value.error == errno.EINVAL
    with pytest.raises(NbdError):
        ask(SIZE + 1, CONTEXT)
    for payload in (b"1234567", b"1234567890", bytes(100_000)):
        fails(client, errno.EINVAL, w.CMD_BLOCK_STATUS, 0, len(payload), payload=payload)
    assert ask(4096, CONTEXT) == {CONTEXT: [(4096, 3)]}


def test_every_error_keeps_other_connections_alive(rig: Rig, style: Style) -> None:
    volume = rig.volume()
    bystander = rig.connect(volume, SIZE, style)
    bad = rig.connect(volume, SIZE, style)
    bad.stream.send(os.urandom(5000))
    bad.stream.wait_closed()
    assert bystander.read(0, 4) == bytes(4)
