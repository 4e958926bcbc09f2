"""libnbd (Debian's python3-libnbd, in Debian's own Python) against the running daemon."""

from __future__ import annotations

import pytest

from tests.lib.libnbd import libnbd
from tests.lib.shared import ODD_SIZE, RO_SIZE, ROOT_SIZE, VM1_EXPORTS, SharedFarm

pytestmark = pytest.mark.timeout(90)

RANDOM_IO = """
h = connect(structured=P["structured"])
rng = random.Random(P["seed"])
size, align = h.get_size(), P["align"]
base, span = P.get("base", 0), min(size, 6 * MiB)
model = bytearray(h.pread(span, base))
for step in range(120):
    length = rng.randrange(1, 300_000) // align * align or align
    offset = rng.randrange(0, span - length) // align * align
    kind = rng.choice("wwwwrrzzntf")
    if kind == "w":
        data = rng.randbytes(length)
        h.pwrite(data, base + offset, rng.choice([0, nbd.CMD_FLAG_FUA]))
        model[offset:offset + length] = data
    elif kind == "r":
        assert h.pread(length, base + offset) == model[offset:offset + length], (step, offset, length)
    elif kind in "zn":
        h.zero(length, base + offset, nbd.CMD_FLAG_NO_HOLE if kind == "n" else 0)
        model[offset:offset + length] = bytes(length)
    elif kind == "t":
        h.trim(length, base + offset)
        h.zero(length, base + offset)
        model[offset:offset + length] = bytes(length)
    else:
        h.flush()
assert h.pread(span, base) == model
h.shutdown()
again = connect(structured=not P["structured"])
assert again.pread(span, base) == model
result = hashlib.sha256(bytes(model)).hexdigest()
"""


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize(("name", "align"), [("root", 1), ("hard", 4096), ("indir", 1), ("odd", 1)])
def test_random_io_against_a_model(shared: SharedFarm, name: str, align: int, structured: bool) -> None:
    span = min(ODD_SIZE, 6 << 20) if name == "odd" else 6 << 20
    del span
    libnbd(RANDOM_IO, uri=shared.uri(name), seed=1, align=align, structured=structured)


def test_facts_and_flags(shared: SharedFarm) -> None:
    got = libnbd(
        """
h = connect(contexts=["base:allocation"])
result = {name: getattr(h, name)() for name in (
    "get_size", "is_read_only", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn",
    "can_cache", "can_df", "get_structured_replies_negotiated", "get_protocol")}
result["status"] = h.can_meta_context("base:allocation")
result["max"] = h.get_block_size(nbd.SIZE_MAXIMUM)
result["min"] = h.get_block_size(nbd.SIZE_MINIMUM)
""",
        uri=shared.uri("root"),
    )
    assert got.pop("get_size") == ROOT_SIZE
    assert got.pop("get_protocol") == "newstyle-fixed"
    assert got.pop("max") == 32 << 20 and got.pop("min") == 1
    assert got.pop("is_read_only") is False
    assert all(got.values()), got


def test_read_only_export(shared: SharedFarm) -> None:
    got = libnbd(
        """
h = connect()
h.set_strict_mode(0)
result = {"ro": h.is_read_only(), "size": h.get_size(),
          "errors": [error(h.pwrite, b"x" * 512, 0), error(h.zero, 512, 0), error(h.trim, 512, 0)],
          "expected": errno.EPERM}
""",
        uri=shared.uri("ro"),
    )
    assert got["ro"] and got["size"] == RO_SIZE
    assert got["errors"] == [got["expected"]] * 3


def test_bad_requests_let_out(shared: SharedFarm) -> None:
    got = libnbd(
        """
h = connect(contexts=["base:allocation"])
h.set_strict_mode(0)
size = h.get_size()
result = [
    error(h.pread, 512, size) == errno.EINVAL,
    error(h.pwrite, b"x" * 512, size - 1) == errno.ENOSPC,
    error(h.zero, 512, size) == errno.ENOSPC,
    error(h.trim, 512, size) == errno.EINVAL,
    error(h.block_status, 512, size, lambda *a: 0) == errno.EINVAL,
    error(h.pread, 512, 0, 1 << 7) == errno.EINVAL,
    h.pread(512, 0) is not None,
]
""",
        uri=shared.uri("root"),
    )
    assert got == [True] * 7


def test_multi_conn_write_flush_read(shared: SharedFarm) -> None:
    """Write on A, flush on B, read on C; and FUA on A is seen by B at once."""
    libnbd(
        """
a, b, c = connect(), connect(), connect()
assert a.can_multi_conn()
rng = random.Random(3)
for step in range(40):
    data, offset = rng.randbytes(70_001), rng.randrange(8 * MiB)
    a.pwrite(data, offset)
    b.flush()
    assert c.pread(len(data), offset) == data
    b.pwrite(data[::-1], offset, nbd.CMD_FLAG_FUA)
    assert a.pread(len(data), offset) == data[::-1]
    c.zero(len(data), offset)
    assert a.pread(len(data), offset) == bytes(len(data))
""",
        uri=shared.uri("root"),
    )


def test_parallel_requests_in_flight(shared: SharedFarm) -> None:
    """Asynchronous: hundreds of writes in flight on three connections, then reads, all verified."""
    libnbd(
        """
handles = [connect() for _ in range(3)]
block, count = 32768, 300
data = {n: random.Random(n).randbytes(block) for n in range(count)}

def run(start):
    waiting = []
    for n in range(count):
        h = handles[n % 3]
        waiting.append((h, start(h, n)))
        while h.aio_in_flight() > 64:
            h.poll(-1)
    for h, cookie in waiting:
        while not h.aio_command_completed(cookie):
            h.poll(-1)

def write(h, n):
    return h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[n])), n * block)

buffers = {n: nbd.Buffer(block) for n in range(count)}
run(write)
handles[0].flush()
run(lambda h, n: handles[(n + 1) % 3].aio_pread(buffers[n], n * block) if False else h.aio_pread(buffers[n], n * block))
for n in range(count):
    assert bytes(buffers[n].to_bytearray()) == data[n], n
""",
        uri=shared.uri("root"),
    )


def test_structured_reads_and_block_status(shared: SharedFarm) -> None:
    got = libnbd(
        """
h = connect(contexts=["base:allocation"])
h.trim(4 * MiB, 16 * MiB)
h.zero(4 * MiB, 16 * MiB)
h.pwrite(b"i" * 65536, 17 * MiB)
pieces = []
data = h.pread_structured(4 * MiB, 16 * MiB, lambda buf, offset, status, err: pieces.append((offset, len(buf), status)))
assert data[MiB:MiB + 65536] == b"i" * 65536 and data.count(b"i") == 65536
assert sum(length for _, length, _ in pieces) >= 65536
one = []
h.pread_structured(65536, 17 * MiB, lambda buf, offset, status, err: one.append(status), nbd.CMD_FLAG_DF)
assert len(one) == 1, one
extents = []
h.block_status(4 * MiB, 16 * MiB, lambda name, offset, e, err: extents.extend(zip(e[::2], e[1::2])) or 0)
first = []
h.block_status(4 * MiB, 16 * MiB, lambda name, offset, e, err: first.extend(e) or 0, nbd.CMD_FLAG_REQ_ONE)
result = [extents, first]
""",
        uri=shared.uri("root"),
    )
    extents, first = got
    assert [flags for _, flags in extents[:3]] == [3, 0, 3], "hole and zero, then data, then hole and zero"
    assert extents[0][0] == 1 << 20
    assert first == [1 << 20, 3]


def test_listing_and_info(shared: SharedFarm) -> None:
    got = libnbd(
        """
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(P["uri"])
names = {}
h.opt_list(lambda name, description: names.__setitem__(name, description))
h.set_export_name("ro")
h.opt_info()
size = h.get_size()
h.set_export_name("nobody")
unknown = error(h.opt_info)
contexts = []
h.set_export_name("root")
h.opt_list_meta_context(lambda name: contexts.append(name))
h.opt_go()
result = {"names": names, "size": size, "unknown": unknown != 0, "contexts": contexts, "read": len(h.pread(512, 0))}
""",
        uri=shared.uri("root"),
    )
    assert set(got["names"]) == VM1_EXPORTS
    assert got["names"]["root"] == "the first disk of vm1"
    assert got["size"] == RO_SIZE and got["unknown"] and got["contexts"] == ["base:allocation"] and got["read"] == 512


def test_full_name_works_too(shared: SharedFarm) -> None:
    got = libnbd("h = connect()\nresult = h.get_size()", uri=shared.uri("vm1/root"))
    assert got == ROOT_SIZE


def test_tcp_in_plaintext_by_full_name(shared: SharedFarm) -> None:
    host, port = shared.tcp
    libnbd(RANDOM_IO, uri=f"nbd://{host}:{port}/vm2/private", seed=9, align=1, structured=True, base=0)


def test_data_of_one_client_is_the_others(shared: SharedFarm) -> None:
    """What libnbd wrote, the raw client reads."""
    libnbd("h = connect()\nh.pwrite(b'seen by all' * 1000, 12345)\nh.flush()", uri=shared.uri("root"))
    with shared.open("root", "simple") as nbd:
        assert nbd.read(12345, 11000) == b"seen by all" * 1000
