"""The filter as a whole over a plane and a control in Python: epochs, sockets, link lost and found, clean stop."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import stat
import struct
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

import nbdvvol.filter.link as link_module
import nbdvvol.filter.view as view_module
from nbdvvol.filter.claims import ClaimBook
from nbdvvol.filter.daemon import Filter, FilterOptions, locked
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import SocketConfig
from nbdvvol.model.link import (
    Answer,
    Applied,
    Delta,
    ExportInfo,
    Exports,
    Fault,
    HostState,
    Listing,
    Notice,
    Query,
    Refused,
    Released,
    Stopped,
    VmSpec,
    Work,
    WorkDone,
)
from tests.unit.fake_control import FakeControl, Session
from tests.unit.fake_plane import FakePlane
from tests.unit.filter_words import MIB, file_store, host_state, until, uuid_of, vvol

HELLO = b"NBDMAGICIHAVEOPT\0\3"
E = 1 << 31
POLICY, UNKNOWN = E + 2, E + 6


class Bench:
    """A running filter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plane = FakePlane()
        self.control = FakeControl(folder / "control.sock")
        (folder / "token").write_text("secret\n")
        self.options = FilterOptions(
            host="h1",
            control=f"unix:{folder}/control.sock",
            token_file=folder / "token",
            run_dir=folder / "run",
        )
        (folder / "run").mkdir()
        self.data = folder / "local.img"
        self.data.write_bytes(bytes(8 * MIB))
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        run_dir = self.options.run_dir
        self.task = asyncio.create_task(
            Filter(self.options, self.plane, FaultBook(run_dir), ClaimBook(run_dir), LogBook(run_dir)).run(self.stop)
        )

    async def end(self) -> None:
        if self.task is not None:
            self.stop.set()
            await asyncio.wait_for(self.task, 10)
            self.task = None

    def state(self, *numbers: int, epoch: int = 1) -> HostState:
        return host_state(*(vvol(n, at=(n - 1) * MIB, epoch=epoch) for n in numbers), file_store(self.data))

    async def up(self, *numbers: int) -> Session:
        """Start control and filter with these VVols."""
        await self.control.start()
        self.start()
        session = await self.control.session()
        await session.greet(5, self.state(*numbers))
        assert (await session.next(Applied)).revision == 5
        return session

    def client(self, vm: str = "vm1") -> Client:
        return Client(self.folder / "run" / "vms" / f"{vm}.sock")


class Client:
    """A raw NBD client."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.setblocking(False)
        self.greeted = False

    async def read(self, count: int) -> bytes:
        data = b""
        async with asyncio.timeout(10):
            while len(data) < count:
                piece = await asyncio.get_running_loop().sock_recv(self.sock, count - len(data))
                if not piece:
                    break
                data += piece
        return data

    async def ask(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; its replies up to the ACK or error."""
        if not self.greeted:
            self.greeted = True
            assert await self.read(18) == HELLO
            self.sock.send(b"\0\0\0\1")
        self.sock.send(b"IHAVEOPT" + struct.pack(">II", option, len(payload)) + payload)
        found = []
        while not found or found[-1][0] in (2, 3, 4):
            _, _, kind, length = struct.unpack(">QIII", await self.read(20))
            found.append((kind, await self.read(length)))
        return found

    async def list(self) -> list[str]:
        return [
            text[4 : 4 + struct.unpack(">I", text[:4])[0]].decode() for kind, text in await self.ask(3) if kind == 2
        ]

    async def info(self, name: str, option: int = 6) -> tuple[int, int]:
        """(size, flags), or (-1, error)."""
        raw = name.encode()
        first, data = (await self.ask(option, struct.pack(">I", len(raw)) + raw + bytes(2)))[0]
        if first & E:
            return -1, first
        size, flags = struct.unpack_from(">QH", data, 2)
        return size, flags

    async def go(self, name: str) -> tuple[int, int]:
        return await self.info(name, 7)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(link_module, "_RETRY_MAX_S", 0.2)
    monkeypatch.setattr(link_module, "QUERY_S", 0.3)
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    bench = Bench(folder)
    yield bench
    await bench.end()
    await bench.control.stop()
    shutil.rmtree(folder)


async def answer_one(session: Session, **values: object) -> Query:
    query = await session.next(Query)
    await session.send(Answer(id=query.id, **values))  # type: ignore[arg-type]
    return query


async def test_who_it_says_it_is(bench: Bench) -> None:
    await bench.control.start()
    bench.start()
    session = await bench.control.session()
    hello = await session.greet(1, bench.state())
    assert session.path == "/v1/link" and session.headers["X-Nbdvvol-Host"] == "h1"
    assert session.headers["Authorization"] == "Bearer secret"
    assert (hello.host, hello.revision, hello.held, hello.control) == ("h1", 0, [], "")
    assert hello.run_dir == str(bench.folder / "run") and len(hello.instance) == 36


async def test_nothing_is_there_before_control_confirms(bench: Bench) -> None:
    await bench.control.start()
    bench.start()
    session = await bench.control.session()
    assert not (bench.folder / "run" / "vms").exists() and bench.plane.volumes == {}
    await session.greet(5, bench.state(1))
    await session.next(Applied)
    assert len(bench.plane.volumes) == 1
    client = bench.client()
    assert (await client.go("disk1"))[0] == MIB
    await until(lambda: bench.plane.connections)


async def test_changes_in_order(bench: Bench) -> None:
    session = await bench.up(1)
    spec = vvol(2, at=MIB)
    await session.send(Delta(revision=6, vvols={spec.uuid: spec}))
    await session.send(Delta(revision=8, vvols={uuid_of(1): None}))
    assert (await session.next(Released)) == Released(uuid=uuid_of(1), epoch=1)
    applied = [m.revision for m in session.seen if isinstance(m, Applied)]
    while applied[-1] != 8:
        applied.append((await session.next(Applied)).revision)
    assert list(dict.fromkeys(applied)) == [5, 6, 8]
    client = bench.client()
    assert await client.go("disk1") == (-1, UNKNOWN)
    assert (await client.go(""))[0] == MIB


async def test_control_answers_list_and_info(bench: Bench) -> None:
    session = await bench.up(1)
    client = bench.client()
    asked = asyncio.create_task(client.list())
    query = await answer_one(session, exports=[Listing(name="disk1"), Listing(name="other", description="x")])
    assert (query.what, query.vm) == ("list", "vm1")
    assert await asked == ["disk1", "other"]
    info = ExportInfo(
        name="other", description="", size=77, flags=1, block_min=1, block_preferred=4096, block_max=1 << 25
    )
    facts = asyncio.create_task(client.info("other"))
    query = await answer_one(session, info=info)
    assert (query.what, query.name) == ("info", "other") and await facts == (77, 1)
    # An export that runs here has the filter's own facts, so that INFO and GO agree.
    facts = asyncio.create_task(client.info("disk1"))
    await answer_one(session, info=info)
    told = await facts
    assert told[0] == MIB and told == await client.go("disk1")


async def test_control_may_refuse(bench: Bench) -> None:
    session = await bench.up(1)
    client = bench.client()
    facts = asyncio.create_task(client.info("nosuch"))
    await answer_one(session, error="UNKNOWN", message="no VVol nosuch")
    assert await facts == (-1, UNKNOWN)
    meta = asyncio.create_task(client.ask(8))
    await meta
    payload = struct.pack(">I", 5) + b"disk1" + bytes(4)
    listed = asyncio.create_task(client.ask(9, payload))
    query = await answer_one(session, contexts=["base:allocation"])
    assert query.what == "list_meta" and (await listed)[0] == (4, bytes(4) + b"base:allocation")


async def test_a_silent_control_is_not_waited_for(bench: Bench) -> None:
    await bench.up(1, 2)
    client = bench.client()
    assert await client.list() == ["disk1", "disk2"]
    assert (await client.info("disk2"))[0] == MIB
    assert await client.info("nosuch") == (-1, UNKNOWN)


async def test_without_control_bound_exports_open_and_list(bench: Bench) -> None:
    await bench.up(1, 2)
    await bench.control.stop()
    await asyncio.sleep(0.05)
    client = bench.client()
    assert await client.list() == ["disk1", "disk2"]
    assert (await client.info("vm1/disk2"))[0] == MIB
    assert await client.ask(8) == [(1, b"")]
    meta = await client.ask(9, struct.pack(">I", 5) + b"disk1" + bytes(4))
    assert meta[0] == (4, bytes(4) + b"base:allocation")
    assert (await client.go("disk2"))[0] == MIB
    await until(lambda: bench.plane.connections)


async def test_resume_keeps_connections_and_says_again_what_may_be_lost(bench: Bench) -> None:
    session = await bench.up(1, 2)
    client = bench.client()
    await client.go("disk1")
    await session.send(Delta(revision=6, vvols={uuid_of(2): None}))
    await session.next(Released)
    await session.close()
    again = await bench.control.session()
    hello = await again.greet(6)
    assert (hello.revision, hello.control) == (6, "control-1")
    assert [(held.uuid, held.epoch) for held in hello.held] == [(uuid_of(1), 1)]
    assert await again.next(Released) == Released(uuid=uuid_of(2), epoch=1)
    assert (await again.next(Exports)).exports[0].uuid == uuid_of(1)
    assert not bench.plane.connections[0].end.done()
    # Two opened, one closed and made durable: nothing was touched.
    assert [line.split()[0] for line in bench.plane.log] == ["open", "open", "close", "sync"]


async def test_a_snapshot_after_reconnect_drops_what_it_does_not_name(bench: Bench) -> None:
    session = await bench.up(1, 2)
    await session.close()
    again = await bench.control.session()
    await again.greet(9, bench.state(2))
    assert await again.next(Released) == Released(uuid=uuid_of(1), epoch=1)
    assert (await again.next(Applied)).revision == 9


async def test_a_new_instance_asks_from_the_start(bench: Bench) -> None:
    session = await bench.up(1)
    first = session.seen[0]
    await bench.end()
    bench.plane, bench.stop = FakePlane(), asyncio.Event()
    bench.start()
    again = await bench.control.session()
    hello = await again.greet(9, bench.state(1, epoch=2))
    assert hello.revision == 0 and hello.held == [] and hello.instance != first.instance  # type: ignore[attr-defined]
    await again.next(Applied)
    assert [desc.epoch for desc in bench.plane.volumes.values()] == [2]


async def test_refused_by_control(bench: Bench) -> None:
    await bench.control.start()
    bench.start()
    for _ in range(2):
        session = await bench.control.session()
        await session.send(Refused(reason="another filter of host h1 is linked"))
    assert bench.plane.volumes == {}


async def test_nonsense_from_control_costs_only_the_link(bench: Bench) -> None:
    session = await bench.up(1)
    await session._socket.send('{"kind": "what"}')
    again = await bench.control.session()
    await again.greet(5)
    assert len(bench.plane.volumes) == 1


async def test_another_control_means_a_new_snapshot(bench: Bench) -> None:
    session = await bench.up(1)
    await bench.control.stop()
    bench.control.identity = "control-2"
    await bench.control.start()
    del session
    again = await bench.control.session()
    await again.greet(3)  # it resumes what it never began: not believed
    last = await bench.control.session()
    hello = await last.greet(3, bench.state(1))
    assert hello.control == "control-1"
    assert (await last.next(Applied)).revision == 3


@pytest.mark.parametrize("credential", ["token", "certificate"])
async def test_a_link_over_https(bench: Bench, pki: Path, credential: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki / "ca-cert.pem")
    context.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
    if credential == "certificate":
        context.verify_mode = ssl.CERT_REQUIRED
    port = await bench.control.start_https(context)
    mine = pki / "clients" / "vm1"
    bench.options = FilterOptions(
        host="h1",
        control=f"https://localhost:{port}",
        run_dir=bench.folder / "run",
        ca_file=pki / "ca-cert.pem",
        token_file=bench.folder / "token" if credential == "token" else None,
        cert_file=mine / "client-cert.pem" if credential == "certificate" else None,
        key_file=mine / "client-key.pem" if credential == "certificate" else None,
    )
    bench.start()
    session = await bench.control.session()
    assert session.headers.get("Authorization") == ("Bearer secret" if credential == "token" else None)
    await session.greet(5, bench.state(1))
    assert (await session.next(Applied)).revision == 5


async def test_a_control_with_a_strange_certificate_is_not_believed(bench: Bench, pki: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    strange = pki / "clients" / "stranger"
    context.load_cert_chain(strange / "client-cert.pem", strange / "client-key.pem")
    port = await bench.control.start_https(context)
    bench.options = replace(bench.options, control=f"https://localhost:{port}", ca_file=pki / "ca-cert.pem")
    bench.start()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.control._sessions.get(), 0.5)


async def test_sockets_of_vms(bench: Bench) -> None:
    await bench.control.start()
    vms = bench.folder / "run" / "vms"
    vms.mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(vms / "vm1.sock"))
    stale.close()
    bench.start()
    session = await bench.control.session()
    spec = VmSpec(name="vm1", socket=SocketConfig(mode="0640"))
    await session.greet(1, bench.state(1).model_copy(update={"vms": {"vm1": spec}}))
    await session.next(Applied)
    assert stat.S_IMODE((vms / "vm1.sock").stat().st_mode) == 0o640
    assert (await bench.client().go(""))[0] == MIB
    vm2 = VmSpec(name="vm2", socket=SocketConfig(mode="0666"))
    bad = VmSpec(name="bad", socket=SocketConfig(group="no-such-group"))
    await session.send(Delta(revision=2, vms={"vm1": None, "vm2": vm2, "bad": bad}))
    notice = await session.next(Notice)
    assert notice.event == "listen_failed" and "no-such-group" in notice.message
    await session.next(Applied)
    assert sorted(entry.name for entry in vms.iterdir()) == ["vm2.sock"]
    assert await bench.client("vm2").go("disk1") == (-1, UNKNOWN)


async def test_isolation_of_vms(bench: Bench) -> None:
    await bench.control.start()
    bench.start()
    session = await bench.control.session()
    other = vvol(2, at=MIB, vm="vm2", name="disk1", size=2 * MIB)
    await session.greet(1, host_state(vvol(1), other, file_store(bench.data)))
    await session.next(Applied)
    await bench.control.stop()
    one, two = bench.client("vm1"), bench.client("vm2")
    assert await one.list() == ["disk1"] and await two.list() == ["disk1"]
    assert (await one.info("disk1"))[0] == MIB and (await two.info("disk1"))[0] == 2 * MIB
    assert await one.info("vm2/disk1") == (-1, UNKNOWN) and await one.go("vm2/disk1") == (-1, UNKNOWN)


async def test_go_waits_for_an_export_that_moves_to_a_new_epoch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await bench.up(1)
    bench.plane.closing = asyncio.Event()
    await session.send(Delta(revision=6, vvols={uuid_of(1): vvol(1, epoch=2)}))
    await asyncio.sleep(0.05)
    entering = asyncio.create_task(bench.client().go("disk1"))
    await asyncio.sleep(0.05)
    assert not entering.done()
    bench.plane.closing.set()
    assert (await entering)[0] == MIB
    await until(lambda: bench.plane.connections)
    bench.plane.closing.clear()
    monkeypatch.setattr(view_module, "SETTLE_S", 0.1)
    await session.send(Delta(revision=7, vvols={uuid_of(1): vvol(1, epoch=3)}))
    await asyncio.sleep(0.05)
    assert await bench.client().go("disk1") == (-1, POLICY)
    bench.plane.closing.set()


async def test_an_export_that_failed_says_why(bench: Bench) -> None:
    await bench.control.start()
    bench.start()
    session = await bench.control.session()
    await session.greet(1, host_state(vvol(1), file_store(bench.folder / "nothing.img")))
    await session.next(Applied)
    client = bench.client()
    [(kind, text)] = await client.ask(7, struct.pack(">I", 5) + b"disk1" + bytes(2))
    assert kind == POLICY and b"nothing.img is missing" in text


async def test_clean_stop(bench: Bench) -> None:
    session = await bench.up(1)
    working = bench.client()
    await working.go("disk1")
    idle = bench.client()
    assert await idle.read(18) == HELLO
    await bench.end()
    assert bench.plane.closed and await working.read(1) == b"" and await idle.read(1) == b""
    assert list((bench.folder / "run" / "vms").iterdir()) == []
    assert await session.next(Released) == Released(uuid=uuid_of(1), epoch=1)
    assert isinstance(session.seen[-1], Stopped), "its last word"
    assert bench.plane.objects == {}


async def test_a_stop_that_is_not_clean_claims_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await bench.up(1)

    async def hangs(_: int) -> None:
        raise OSError(5, "it hangs")

    monkeypatch.setattr(bench.plane, "close_volume", hangs)
    await bench.end()
    assert not any(isinstance(message, Stopped | Released) for message in session.seen)


async def test_a_stop_without_control_waits_for_nobody(bench: Bench) -> None:
    await bench.up(1)
    await bench.control.stop()
    await bench.end()
    assert bench.plane.closed


async def test_a_failed_sync_is_said_until_control_lists_it_and_latched_until_it_does_not(bench: Bench) -> None:
    session = await bench.up(1)
    [number] = bench.plane.objects
    assert bench.plane.on_sync_failed is not None
    bench.plane.on_sync_failed(number, 5)
    fault = await session.next(Fault)
    assert (fault.datastore, fault.object) == ("local", "")
    await bench.end()
    bench.plane, bench.stop = FakePlane(), asyncio.Event()
    bench.start()
    session = await bench.control.session()
    await session.greet(6, bench.state(1, epoch=2))
    assert await session.next(Fault) == fault, "control did not list it: it may not have heard of it"
    await session.next(Applied)
    [number] = bench.plane.objects
    assert f"latch_fault {number}" in bench.plane.log
    await session.send(Delta(revision=7, faults={"local": {fault.id: ""}}))
    await session.next(Applied)
    await until(lambda: not list((bench.folder / "run").glob("*.json")))  # control remembers it now
    await session.close()
    session = await bench.control.session()
    await session.greet(7)
    await session.send(Delta(revision=8, faults={"local": {}}))
    await session.next(Applied)
    assert bench.plane.log[-1] == f"clear_fault {number}"
    assert not any(isinstance(message, Fault) for message in session.seen)


async def test_work_goes_through_the_link(bench: Bench) -> None:
    session = await bench.up(1)
    store = file_store(bench.data).model_dump(mode="json")
    order = Work(id=3, what="write_meta", args={"store": store, "offset": 4096, "data": "00ff"})
    await session.send(order)
    assert await session.next(WorkDone) == WorkDone(id=3)
    assert bench.data.read_bytes()[4096:4099] == b"\x00\xff\x00"
    await session.close()
    again = await bench.control.session()
    await again.greet(5)
    await again.send(order)
    assert await again.next(WorkDone) == WorkDone(id=3)


async def test_a_first_word_that_is_no_welcome_ends_the_link(bench: Bench) -> None:
    await bench.control.start()
    bench.start()
    session = await bench.control.session()
    await session.send(Answer(id=1))
    again = await bench.control.session()
    await again.greet(5, bench.state(1))
    assert (await again.next(Applied)).revision == 5


def test_one_filter_a_run_directory(tmp_path: Path) -> None:
    for name, option in (("filter.lock", "--run"), ("logs-h1.lock", "--state")):
        with locked(tmp_path / name):
            with pytest.raises(NvError, match="pid") as caught, locked(tmp_path / name):
                pass
            assert caught.value.code is Code.BUSY and option in caught.value.hint
        with locked(tmp_path / name):
            pass
