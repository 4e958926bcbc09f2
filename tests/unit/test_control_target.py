"""Control's own NBD endpoint, byte by byte: it lists and describes, and sends data elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdvvol.control.sockets import bind_unix
from nbdvvol.control.target import Target
from tests.unit.control_farm import TestFarm

pytestmark = pytest.mark.timeout(60)
MAGIC, REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
EXPORT_NAME, LIST, INFO, GO, LIST_META, SET_META = 1, 3, 6, 7, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERR_POLICY, ERR_UNKNOWN = 2**31 + 2, 2**31 + 6


class Client:
    """A raw NBD client in the option phase."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def option(self, number: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; its replies up to the ACK or an error."""
        self.writer.write(MAGIC + struct.pack(">II", number, len(payload)) + payload)
        replies: list[tuple[int, bytes]] = []
        while not replies or (replies[-1][0] != ACK and replies[-1][0] < 2**31):
            magic, option, kind, length = struct.unpack(">QIII", await self.reader.readexactly(20))
            assert (magic, option) == (REPLY_MAGIC, number)
            replies.append((kind, await self.reader.readexactly(length)))
        return replies


def _named(name: str) -> bytes:
    return struct.pack(">I", len(name)) + name.encode() + b"\0\0"


def _meta(name: str, *queries: str) -> bytes:
    parts = [struct.pack(">I", len(q)) + q.encode() for q in queries]
    return struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(queries)) + b"".join(parts)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nv"))
    farm = TestFarm(folder / "state")
    await farm.start()
    vvols = {"root": {"size": "1MiB", "description": "the system"}, "more": {"size": "2MiB"}}
    spec = {"datastores": {"s": {"kind": "dir", "path": "/fake/s"}}, "vms": {"vm1": {"vvols": vvols}}}
    result = await farm.apply(spec)
    await farm.filter()
    await farm.settle(result)
    target = Target(farm.control.registry)
    target.start(bind_unix(folder / "t.sock", None))
    reader, writer = await asyncio.open_unix_connection(str(folder / "t.sock"))
    assert (await reader.readexactly(18))[:16] == b"NBDMAGICIHAVEOPT"
    writer.write(struct.pack(">I", 3))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        await target.stop()
        await farm.end()
        shutil.rmtree(folder)


async def test_it_lists_every_vvol(client: Client) -> None:
    replies = await client.option(LIST)
    names = [payload[4 : 4 + struct.unpack(">I", payload[:4])[0]] for kind, payload in replies if kind == SERVER]
    assert names == [b"vm1/more", b"vm1/root"] and replies[-1] == (ACK, b"")
    assert replies[1][1].endswith(b"the system")


async def test_it_describes_as_the_filter_reported(client: Client) -> None:
    replies = await client.option(INFO, _named("vm1/root"))
    infos = {struct.unpack(">H", payload[:2])[0]: payload[2:] for kind, payload in replies if kind == REP_INFO}
    size, flags = struct.unpack(">QH", infos[0])
    assert size == 1 << 20 and flags & 1
    assert (await client.option(INFO, _named("vm1/none")))[0][0] == ERR_UNKNOWN


async def test_it_refuses_data_and_names_host_and_uri(client: Client) -> None:
    ((kind, text),) = await client.option(GO, _named("vm1/root"))
    assert kind == ERR_POLICY
    assert b"host local" in text and b"nbd+unix:///root?socket=/run/fake/vms/vm1.sock" in text
    assert (await client.option(GO, _named("vm1/none")))[0][0] == ERR_UNKNOWN
    assert (await client.option(LIST))[-1] == (ACK, b""), "the haggling goes on"


async def test_export_name_drops(client: Client) -> None:
    client.writer.write(MAGIC + struct.pack(">II", EXPORT_NAME, 8) + b"vm1/root")
    assert await client.reader.read() == b""


async def test_meta_contexts_are_listed(client: Client) -> None:
    assert (await client.option(8))[-1] == (ACK, b"")
    replies = await client.option(LIST_META, _meta("vm1/root"))
    assert [payload[4:] for kind, payload in replies if kind == META] == [b"base:allocation"]
