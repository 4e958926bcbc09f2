"""Bad input, rows T1 to T20: requests that are wrong, each in the three header styles.

Every test runs under the `unharmed` fixture: another client's verified I/O goes on, and both daemons live on.
Rows T21 to T25, about connections that end or stall, are in test_connections.py.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

import pytest

from tests.lib import nbdwords as w
from tests.lib.facts import memory_kib
from tests.lib.pattern import difference, pattern
from tests.lib.procs import wait_until
from tests.lib.rawio import STYLES, Request, Style, Transmission, open_export
from tests.lib.shared import HARD_SIZE, ODD_SEED, ODD_SIZE, RO_SEED, RO_SIZE, ROOT_SIZE, SharedFarm

MiB, KiB = w.MiB, w.KiB
pytestmark = [pytest.mark.usefixtures("unharmed"), pytest.mark.timeout(60)]
PAST_END = {
    w.CMD_READ: w.EINVAL,
    w.CMD_WRITE: w.ENOSPC,
    w.CMD_TRIM: w.EINVAL,
    w.CMD_WRITE_ZEROES: w.ENOSPC,
    w.CMD_CACHE: w.EINVAL,
}
SEED = 5


@pytest.fixture(params=STYLES)
def nbd(request: pytest.FixtureRequest, shared: SharedFarm) -> Iterator[Transmission]:
    """A connection to vm1's root whose first and last 64 KiB hold known bytes, in each header style."""
    style: Style = request.param
    with shared.open("root", style) as connection:
        for offset in (0, ROOT_SIZE - 64 * KiB):
            connection.write(offset, pattern(SEED, offset, 64 * KiB))
        yield connection


def error_of(nbd: Transmission, command: int, offset: int, length: int, flags: int = 0) -> int:
    """The wire error of a request; its payload, if a write, is as long as it says. 0 is success."""
    payload = b"\xee" * length if command == w.CMD_WRITE else None
    return nbd.call(command, offset, length, flags=flags, payload=payload).error


def unchanged(nbd: Transmission) -> None:
    """The connection works and the known bytes are all there."""
    for offset in (0, ROOT_SIZE - 64 * KiB):
        assert difference(pattern(SEED, offset, 64 * KiB), nbd.read(offset, 64 * KiB)) == ""


@pytest.mark.parametrize("magic", [0x12560953, 0x96744668, 0x25609514, w.SIMPLE_REPLY_MAGIC, 0xDEADBEEF])
def test_t1_bad_request_magic(nbd: Transmission, shared: SharedFarm, magic: int) -> None:
    request = struct.pack(">IHHQQIQQ", magic, 0, w.CMD_WRITE, 7, 0, 0, 0, 0)
    nbd.stream.send(request)
    assert nbd.stream.wait_closed(5) == b""
    with shared.open("root") as other:
        unchanged(other)


def test_t1_the_other_styles_magic(nbd: Transmission) -> None:
    magic = w.REQUEST_MAGIC if nbd.agreed.extended else w.EXTENDED_REQUEST_MAGIC
    nbd.stream.send(struct.pack(">IHHQQQ", magic, 0, w.CMD_READ, 7, 0, 512))
    assert nbd.stream.wait_closed(5) == b""


@pytest.mark.parametrize("command", [w.CMD_RESIZE, 9, 100, 0x7FFF, 0xFFFF])
def test_t2_unknown_command(nbd: Transmission, command: int) -> None:
    assert error_of(nbd, command, 0, 0) == w.EINVAL
    assert error_of(nbd, command, 4096, 4096) == w.EINVAL
    unchanged(nbd)


def test_t3_unknown_flags(nbd: Transmission) -> None:
    for command in (*PAST_END, w.CMD_FLUSH, w.CMD_BLOCK_STATUS):
        for bit in range(6, 16):
            length = 0 if command == w.CMD_FLUSH else 4096
            assert error_of(nbd, command, 0, length, 1 << bit) == w.EINVAL, (command, bit)
    unchanged(nbd)


MISPLACED = [
    (w.CMD_READ, w.CMD_FLAG_NO_HOLE),
    (w.CMD_READ, w.CMD_FLAG_REQ_ONE),
    (w.CMD_READ, w.CMD_FLAG_FAST_ZERO),
    (w.CMD_WRITE, w.CMD_FLAG_NO_HOLE),
    (w.CMD_WRITE, w.CMD_FLAG_DF),
    (w.CMD_WRITE, w.CMD_FLAG_REQ_ONE),
    (w.CMD_FLUSH, w.CMD_FLAG_NO_HOLE),
    (w.CMD_FLUSH, w.CMD_FLAG_DF),
    (w.CMD_TRIM, w.CMD_FLAG_NO_HOLE),
    (w.CMD_TRIM, w.CMD_FLAG_FAST_ZERO),
    (w.CMD_CACHE, w.CMD_FLAG_DF),
    (w.CMD_WRITE_ZEROES, w.CMD_FLAG_DF),
    (w.CMD_WRITE_ZEROES, w.CMD_FLAG_REQ_ONE),
    (w.CMD_BLOCK_STATUS, w.CMD_FLAG_DF),
    (w.CMD_BLOCK_STATUS, w.CMD_FLAG_NO_HOLE),
]


def test_t3_misplaced_flags(nbd: Transmission) -> None:
    for command, flag in MISPLACED:
        length = 0 if command == w.CMD_FLUSH else 4096
        assert error_of(nbd, command, 0, length, flag) == w.EINVAL, (command, flag)
    unchanged(nbd)


def test_t3_payload_length_flag_without_extended_headers(shared: SharedFarm) -> None:
    with shared.open("root") as nbd:
        nbd.write(0, pattern(SEED, 0, 64 * KiB))
        assert error_of(nbd, w.CMD_READ, 0, 4096, w.CMD_FLAG_PAYLOAD_LEN) == w.EINVAL
        assert error_of(nbd, w.CMD_WRITE, 0, 4096, w.CMD_FLAG_PAYLOAD_LEN) == w.EINVAL
        assert difference(pattern(SEED, 0, 64 * KiB), nbd.read(0, 64 * KiB)) == ""


@pytest.mark.parametrize("cookie", [0, 1, 0xFFFFFFFFFFFFFFFF])
def test_t4_t5_cookie_reuse_and_zero(nbd: Transmission, cookie: int) -> None:
    for _ in range(8):
        nbd.send(w.CMD_READ, 4096, 4096, cookie=cookie)
    for _ in range(8):
        assert nbd.wait(cookie).check().data == pattern(SEED, 4096, 4096)
    nbd.stream.expect_silence(0.1)
    unchanged(nbd)


WRAPPING = [(2**64 - 4096, 4096), (2**64 - 1, 1), (2**64 - 4096, 8192), (2**63, 4096), (2**63 - 4096, 4096)]


def test_t6_offset_plus_length_overflows(nbd: Transmission) -> None:
    for command, want in PAST_END.items():
        for offset, length in WRAPPING:
            assert error_of(nbd, command, offset, length) == want, (command, offset, length)
    unchanged(nbd)


@pytest.mark.parametrize(("offset", "length"), WRAPPING)
def test_t6_status_overflows(shared: SharedFarm, offset: int, length: int) -> None:
    for style in ("structured", "extended"):
        with shared.open("root", style) as nbd:
            assert error_of(nbd, w.CMD_BLOCK_STATUS, offset, length) == w.EINVAL
            nbd.read(0, 512)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**64 - 4096, 2**40])
def test_t6_64_bit_lengths(shared: SharedFarm, length: int) -> None:
    with shared.open("root", "extended") as nbd:
        nbd.write(4096, pattern(SEED, 4096, 4096))
        for command in (w.CMD_TRIM, w.CMD_WRITE_ZEROES, w.CMD_CACHE, w.CMD_BLOCK_STATUS):
            want = PAST_END.get(command, w.EINVAL)
            assert error_of(nbd, command, 4096, length) == want, command
        assert nbd.call(w.CMD_READ, 4096, length).error in (w.EINVAL, w.EOVERFLOW)
        assert nbd.read(4096, 4096) == pattern(SEED, 4096, 4096)


@pytest.mark.parametrize("command", [*PAST_END, w.CMD_BLOCK_STATUS])
def test_t7_offset_at_or_past_the_end(nbd: Transmission, command: int) -> None:
    for offset, length in ((ROOT_SIZE, 1), (ROOT_SIZE, 4096), (ROOT_SIZE - 4096, 8192)):
        assert error_of(nbd, command, offset, length) == PAST_END.get(command, w.EINVAL), (offset, length)
    unchanged(nbd)


def test_t8_length_zero(nbd: Transmission) -> None:
    for command in (*PAST_END, w.CMD_BLOCK_STATUS):
        for offset in (0, 4096, ROOT_SIZE):
            error = error_of(nbd, command, offset, 0)
            assert error == (w.EINVAL if command == w.CMD_BLOCK_STATUS else 0), (command, offset)
    unchanged(nbd)


def test_t9_largest_payload_is_served(nbd: Transmission) -> None:
    data = pattern(6, 0, 1 * MiB) * 32
    assert len(data) == w.PAYLOAD_MAX
    nbd.write(16 * MiB, data)
    assert difference(data, nbd.read(16 * MiB, w.PAYLOAD_MAX)) == ""
    unchanged(nbd)


def test_t9_largest_payload_outside_the_export_is_consumed(nbd: Transmission) -> None:
    assert error_of(nbd, w.CMD_WRITE, ROOT_SIZE - MiB, w.PAYLOAD_MAX) == w.ENOSPC
    assert error_of(nbd, w.CMD_WRITE, 0, w.PAYLOAD_MAX, 1 << 7) == w.EINVAL
    unchanged(nbd)


@pytest.mark.parametrize("length", [w.PAYLOAD_MAX + 1, 2**31, 2**32 - 1])
def test_t9_longer_payload_ends_the_connection(nbd: Transmission, shared: SharedFarm, length: int) -> None:
    before = memory_kib(shared.filter_pid())
    nbd.stream.send(nbd.header(Request(w.CMD_WRITE, 0, 0, length), 7, payload=True) + bytes(4096))
    nbd.stream.wait_closed(5)
    assert memory_kib(shared.filter_pid()) - before < 8 << 10
    with shared.open("root") as other:
        unchanged(other)


@pytest.mark.parametrize("length", [w.PAYLOAD_MAX + 1, 40 * MiB, ROOT_SIZE])
def test_t9_longer_read(nbd: Transmission, length: int) -> None:
    assert nbd.call(w.CMD_READ, 0, length).error in (w.EINVAL, w.EOVERFLOW)
    unchanged(nbd)


@pytest.mark.parametrize("style", STYLES)
def test_t10_unaligned_to_the_minimum_block(shared: SharedFarm, style: Style) -> None:
    with shared.open("hard", style) as nbd:
        assert nbd.size == HARD_SIZE
        assert nbd.agreed.facts.block_sizes is not None
        smallest, preferred, largest = nbd.agreed.facts.block_sizes
        assert smallest in (512, 1024, 2048, 4096), "the datastore is opened with O_DIRECT"
        assert preferred >= smallest and preferred & (preferred - 1) == 0 and largest == w.PAYLOAD_MAX
        data = pattern(3, 0, 64 * KiB)
        nbd.write(0, data)
        for offset, length in ((1, smallest), (smallest // 2, smallest), (0, 1), (0, smallest + 1), (smallest, 7)):
            for command in (w.CMD_READ, w.CMD_WRITE, w.CMD_WRITE_ZEROES, w.CMD_TRIM):
                assert error_of(nbd, command, offset, length) == w.EINVAL, (command, offset, length)
        assert difference(data, nbd.read(0, 64 * KiB)) == ""
        nbd.write(smallest, data[: 5 * smallest], w.CMD_FLAG_FUA)
        assert nbd.read(smallest, 5 * smallest) == data[: 5 * smallest]


def test_t10_every_byte_offset_where_the_minimum_is_one(nbd: Transmission) -> None:
    assert nbd.agreed.facts.block_sizes is not None and nbd.agreed.facts.block_sizes[0] == 1
    model = bytearray(nbd.read(MiB - 5000, 10000))
    for step, (offset, length) in enumerate([(1, 1), (4095, 2), (511, 513), (4999, 3), (4097, 901), (0, 9999)]):
        data = pattern(step, 0, length)
        nbd.write(MiB - 5000 + offset, data)  # across an extent's edge
        model[offset : offset + length] = data
        nbd.zero(MiB - 5000 + offset + 1, 1)
        model[offset + 1 : offset + 2] = b"\0"
        assert difference(bytes(model), nbd.read(MiB - 5000, 10000)) == ""


@pytest.mark.parametrize("style", STYLES)
def test_t11_read_only_violations(shared: SharedFarm, style: Style) -> None:
    with shared.open("ro", style) as nbd:
        assert nbd.flags & w.TFLAG_READ_ONLY
        for command in (w.CMD_WRITE, w.CMD_TRIM, w.CMD_WRITE_ZEROES):
            assert error_of(nbd, command, 0, 4096) == w.EPERM
            assert error_of(nbd, command, 0, 4096, w.CMD_FLAG_FUA) in (w.EPERM, w.EINVAL)
        assert error_of(nbd, w.CMD_WRITE, 0, 4 * MiB) == w.EPERM  # consumed
        assert difference(pattern(RO_SEED, 0, RO_SIZE), nbd.read(0, RO_SIZE)) == ""
        assert error_of(nbd, w.CMD_FLUSH, 0, 0) in (0, w.EINVAL)
    assert (shared.folder / "ro.img").read_bytes() == pattern(RO_SEED, 0, RO_SIZE)


@pytest.mark.parametrize("sent", [0, 1, 4096, 32 * KiB - 1])
def test_t12_payload_shorter_than_the_header_says(nbd: Transmission, shared: SharedFarm, sent: int) -> None:
    nbd.stream.send(nbd.header(Request(w.CMD_WRITE, 0, 0, 32 * KiB), 7, payload=True) + b"\xee" * sent)
    nbd.stream.half_close()
    assert nbd.stream.wait_closed(5) == b"", "a request that never came whole gets no reply"
    with shared.open("root") as other:
        unchanged(other)


def test_t12_large_payload_cut_short(nbd: Transmission, shared: SharedFarm) -> None:
    nbd.stream.send(nbd.header(Request(w.CMD_WRITE, 0, 0, 8 * MiB), 7, payload=True))
    nbd.stream.send(b"\xee" * (8 * MiB - 1))
    nbd.stream.close()
    with shared.open("root") as other:
        unchanged(other)


def test_t13_slow_drip_payload(nbd: Transmission, shared: SharedFarm, unharmed) -> None:
    drip = nbd.header(Request(w.CMD_WRITE, 0, 128 * KiB, 1 * MiB), 7, payload=True) + b"\xdd" * 100
    for start in range(0, len(drip), 20):
        nbd.stream.send(drip[start : start + 20])
        unharmed.check(1)
        with shared.open("root") as other:
            unchanged(other)


def test_t14_flush_with_offset_and_length(nbd: Transmission) -> None:
    for offset, length in ((4096, 0), (0, 4096), (2**64 - 1, 2**32 - 1)):
        assert error_of(nbd, w.CMD_FLUSH, offset, length) in (0, w.EINVAL)
    unchanged(nbd)


@pytest.mark.parametrize("style", STYLES)
def test_t15_fua_on_every_command_exactly_where_it_is_offered(shared: SharedFarm, style: Style) -> None:
    for name in ("root", "ro", "hard"):
        with shared.open(name, style) as nbd:
            offered = bool(nbd.flags & w.TFLAG_SEND_FUA)
            want = 0 if offered else w.EINVAL
            commands = {w.CMD_READ: 4096, w.CMD_FLUSH: 0, w.CMD_CACHE: 4096}
            if not nbd.flags & w.TFLAG_READ_ONLY:
                commands |= {w.CMD_WRITE: 4096, w.CMD_TRIM: 4096, w.CMD_WRITE_ZEROES: 4096}
            if style != "simple":
                commands[w.CMD_BLOCK_STATUS] = 4096
            for command, length in commands.items():
                if command != w.CMD_CACHE or nbd.flags & w.TFLAG_SEND_CACHE:
                    assert error_of(nbd, command, 1 * MiB, length, w.CMD_FLAG_FUA) == want, (name, command)


def test_t16_fast_zero_on_write(nbd: Transmission) -> None:
    assert error_of(nbd, w.CMD_WRITE, 0, 4096, w.CMD_FLAG_FAST_ZERO) == w.EINVAL
    unchanged(nbd)


def test_t17_df_without_structured_replies(shared: SharedFarm) -> None:
    with shared.open("root", "simple") as nbd:
        assert not nbd.flags & w.TFLAG_SEND_DF
        assert error_of(nbd, w.CMD_READ, 0, 4096, w.CMD_FLAG_DF) == w.EINVAL
        nbd.read(0, 4096)


def test_t17_df_with_structured_replies_is_one_chunk(shared: SharedFarm) -> None:
    for style in ("structured", "extended"):
        with shared.open("root", style) as nbd:
            assert nbd.flags & w.TFLAG_SEND_DF
            nbd.trim(2 * MiB, MiB)
            nbd.write(2 * MiB + 20 * KiB, b"island")
            answer = nbd.call(w.CMD_READ, 2 * MiB, 64 * KiB, flags=w.CMD_FLAG_DF).check()
            assert answer.data[20 * KiB : 20 * KiB + 6] == b"island"
            big = nbd.call(w.CMD_READ, 2 * MiB, 8 * MiB, flags=w.CMD_FLAG_DF)
            assert big.error in (0, w.EOVERFLOW)


def test_t18_block_status_without_context(shared: SharedFarm) -> None:
    for style in STYLES:
        with open_export(shared.socket(), "root", style, contexts=()) as nbd:
            assert error_of(nbd, w.CMD_BLOCK_STATUS, 0, 4096) == w.EINVAL
            nbd.read(0, 4096)


@pytest.mark.parametrize(("offset", "length"), [(ROOT_SIZE - 1, 2), (0, ROOT_SIZE + 1), (ROOT_SIZE, 2**32 - 1)])
def test_t19_trim_past_the_end(nbd: Transmission, offset: int, length: int) -> None:
    assert error_of(nbd, w.CMD_TRIM, offset, length) == w.EINVAL
    unchanged(nbd)


@pytest.mark.parametrize("flags", [0, w.CMD_FLAG_NO_HOLE, w.CMD_FLAG_FUA])
def test_t20_zeroes_beyond_the_largest_payload(nbd: Transmission, flags: int) -> None:
    mega = pattern(8, 0, MiB)
    for at in range(1, 62):
        nbd.write(at * MiB, mega)
    start, length = 2 * MiB + 17, 58 * MiB
    error = error_of(nbd, w.CMD_WRITE_ZEROES, start, length, flags)
    assert error == 0, "a long WRITE_ZEROES is done in full"
    assert nbd.read(start - 17, 17) == mega[:17]
    for at in range(start, start + length, 29 * MiB):
        assert not any(nbd.read(at, 29 * MiB))
    assert nbd.read(start + length, MiB - 17) == mega[17:]
    unchanged(nbd)


def test_t20_fast_zero_is_fast_or_refused(nbd: Transmission) -> None:
    nbd.write(5 * MiB, b"\xaa" * MiB)
    error = error_of(nbd, w.CMD_WRITE_ZEROES, 5 * MiB, MiB, w.CMD_FLAG_FAST_ZERO)
    assert error in (0, w.ENOTSUP)
    assert nbd.read(5 * MiB, MiB) == (bytes(MiB) if error == 0 else b"\xaa" * MiB)


@pytest.mark.parametrize("style", STYLES)
def test_t7_t10_an_odd_sized_export_ends_where_it_ends(shared: SharedFarm, style: Style) -> None:
    with shared.open("odd", style) as nbd:
        assert nbd.size == ODD_SIZE
        nbd.write(0, pattern(ODD_SEED, 0, ODD_SIZE))
        assert nbd.read(ODD_SIZE - 3, 3) == pattern(ODD_SEED, ODD_SIZE - 3, 3)
        for command, want in PAST_END.items():
            assert error_of(nbd, command, ODD_SIZE - 3, 4) == want
        assert difference(pattern(ODD_SEED, 0, ODD_SIZE), nbd.read(0, ODD_SIZE)) == ""
        if style != "simple":
            assert sum(length for length, _ in nbd.status(0, ODD_SIZE)) == ODD_SIZE


PAYLOADLESS = [w.CMD_READ, w.CMD_FLUSH, w.CMD_TRIM, w.CMD_CACHE, w.CMD_WRITE_ZEROES]


@pytest.mark.parametrize("command", PAYLOADLESS)
def test_extended_payload_on_a_command_that_has_none(shared: SharedFarm, command: int) -> None:
    with shared.open("root", "extended") as nbd:
        nbd.write(0, pattern(SEED, 0, 64 * KiB))
        assert nbd.call(command, 0, 8192, payload=bytes(8192)).error == w.EINVAL
        assert difference(pattern(SEED, 0, 64 * KiB), nbd.read(0, 64 * KiB)) == ""


def test_extended_write_without_the_payload_flag(shared: SharedFarm) -> None:
    """Nobody can know where the next request starts: answered or dropped, but never half a write."""
    old, new = pattern(SEED, 0, 64 * KiB), b"\xcc" * 4096
    with shared.open("root", "extended") as nbd:
        nbd.write(0, old)
        nbd.stream.send(nbd.header(Request(w.CMD_WRITE, 0, 0, 4096), 7, payload=False) + new)
        nbd.stream.half_close()
        nbd.stream.wait_closed(5)
    with shared.open("root") as other:
        assert other.read(0, 64 * KiB) in (old, new + old[4096:])


def test_extended_block_status_with_payload(shared: SharedFarm) -> None:
    with shared.open("root", "extended") as nbd:
        assert nbd.flags & w.TFLAG_BLOCK_STATUS_PAYLOAD
        context = nbd.agreed.contexts["base:allocation"]

        def ask(payload: bytes) -> int:
            return nbd.call(w.CMD_BLOCK_STATUS, 0, len(payload), payload=payload).error

        good = struct.pack(">QI", 65536, context)
        answer = nbd.call(w.CMD_BLOCK_STATUS, 0, len(good), payload=good)
        assert list(answer.check().extents) == [context]
        for bad in (
            struct.pack(">QI", 65536, context + 1),
            struct.pack(">QII", 65536, context, context),
            struct.pack(">Q", 65536)[:7],
            struct.pack(">QI", 65536, context)[:-1],
            struct.pack(">QI", ROOT_SIZE + 1, context),
            b"",
        ):
            assert ask(bad) == w.EINVAL, bad.hex()
        nbd.read(0, 512)


def test_errors_carry_a_readable_message(shared: SharedFarm) -> None:
    for style in ("structured", "extended"):
        with shared.open("root", style) as nbd:
            for command, offset in ((w.CMD_READ, ROOT_SIZE), (w.CMD_WRITE_ZEROES, ROOT_SIZE), (99, 0)):
                assert nbd.call(command, offset, 512).message.strip(), command


def test_random_requests_never_harm(shared: SharedFarm) -> None:
    """Seeded nonsense in all fields but the magic; the connection may end, nothing else may."""
    rng = random.Random(int(os.environ.get("NBDVVOL_SEED", "20")))
    for _ in range(40):
        with shared.open("indir", rng.choice(STYLES)) as nbd:
            form, magic = (">IHHQQQ", w.EXTENDED_REQUEST_MAGIC) if nbd.agreed.extended else (">IHHQQI", w.REQUEST_MAGIC)
            blob = b"".join(
                struct.pack(
                    form,
                    magic,
                    rng.choice([0, 1, 2, 4, 8, 16, 32, rng.randrange(1 << 16)]),
                    rng.choice([0, 1, 3, 4, 5, 6, 7, rng.randrange(1 << 16)]),
                    rng.randrange(1 << 64),
                    rng.choice([0, 4096, rng.randrange(1 << 24), rng.randrange(1 << 64)]),
                    rng.choice([0, 1, 512, 4096, rng.randrange(1 << 20), rng.randrange(1 << 32)]),
                )
                for _ in range(rng.randrange(1, 20))
            )
            nbd.stream.send(blob)
            nbd.stream.half_close()
            nbd.stream.wait_closed(20)
    with shared.open("indir") as nbd:
        nbd.write(0, b"alive")
        assert nbd.read(0, 5) == b"alive"
    wait_until("control answers", shared.api_answers)
