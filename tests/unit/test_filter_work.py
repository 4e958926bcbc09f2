"""Work orders on real files: results, errors, idempotence; and sockets from a service manager."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import nbdvvol.filter.work as work_module
from nbdvvol.dataplane.mirror import Verified
from nbdvvol.filter.activation import take_sockets
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.filter.work import WorkShop
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.link import DatastoreSpec, Work, WorkDone, WorkProgress
from tests.unit.fake_plane import FakePlane
from tests.unit.filter_words import MIB, dir_store, file_store, until

MODES = {"direct_ok": True, "fences": False}


class Bench:
    def __init__(self, run_dir: Path) -> None:
        self.plane = FakePlane()
        self.objects = ObjectTable(self.plane, FaultBook(run_dir))
        self.objects.farm = "farm"
        self.sent: list[BaseModel] = []
        self.shop = WorkShop(self.plane, self.objects, self.sent.append, self.verify, self.forget_log)
        self.dropped: list[str] = []
        self.number = 0

    async def forget_log(self, uuid: str, file: str) -> None:
        self.dropped.append(uuid)

    async def verify(self, uuid: str, epoch: int, *, repair: bool) -> Verified:
        if epoch != 3:
            raise NvError(Code.STALE, f"VVol {uuid} is not served here as a mirror under epoch {epoch}")
        return Verified(MIB, 2, 2 if repair else 0)

    async def do(self, what: str, store: DatastoreSpec, **args: Any) -> WorkDone:
        self.number += 1
        values = {"store": store.model_dump(mode="json"), **args}
        self.shop.order("farm", Work(id=self.number, what=what, args=values))  # type: ignore[arg-type]
        return await self.answer(self.number)

    async def answer(self, number: int) -> WorkDone:
        await until(lambda: any(isinstance(m, WorkDone) and m.id == number for m in self.sent))
        return next(m for m in self.sent if isinstance(m, WorkDone) and m.id == number)


@pytest.fixture
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("run"))
    yield bench
    await bench.shop.stop()
    assert bench.plane.objects == {}
    bench.objects.shutdown()


async def test_probe_creates_and_looks(bench: Bench, tmp_path: Path) -> None:
    store = file_store(tmp_path / "x.img")
    missing = await bench.do("probe", store)
    assert missing.code == Code.UNAVAILABLE and "is missing" in missing.error
    done = await bench.do("probe", store, create_size=4 * MIB)
    assert done.error == ""
    assert done.result == {"size": 4 * MIB, "block_size": 1, "header": "00" * 8192, "blank": True, **MODES}
    grown = await bench.do("probe", store, create_size=6 * MIB)
    assert grown.result["size"] == 6 * MIB


@pytest.mark.parametrize("offset", [0, 8191, 65536, MIB - 1, 3 * MIB, 4 * MIB - 1])
async def test_a_device_with_bytes_at_either_end_is_not_blank(bench: Bench, tmp_path: Path, offset: int) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(offset) + b"x" + bytes(4 * MIB - offset - 1))
    done = await bench.do("probe", file_store(path))
    assert done.result["blank"] is False and len(done.result["header"]) == 16384


async def test_a_tiny_file_can_be_looked_at(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(b"abc")
    assert (await bench.do("probe", file_store(path))).result["header"] == "616263"


async def test_probe_of_a_directory(bench: Bench, tmp_path: Path) -> None:
    done = await bench.do("probe", dir_store(tmp_path))
    assert done.error == "" and done.result["blank"] is True
    assert (await bench.do("probe", dir_store(tmp_path / "no"))).code == Code.UNAVAILABLE
    (tmp_path / "f").write_bytes(bytes(5000))
    assert (await bench.do("probe", dir_store(tmp_path), object="f")).result["size"] == 5000


async def test_metadata(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    store = file_store(path)
    assert (await bench.do("write_meta", store, offset=4096, data="0102ff")).error == ""
    assert path.read_bytes()[4095:4100] == b"\0\1\2\xff\0"
    assert (await bench.do("read_meta", store, offset=4096, length=4)).result == {"data": "0102ff00"}
    beyond = await bench.do("write_meta", store, offset=MIB - 1, data="0102")
    assert beyond.code == Code.INVALID and str(MIB) in beyond.error and path.stat().st_size == MIB
    assert (await bench.do("read_meta", store, offset=MIB, length=1)).code == Code.INVALID


async def test_scrub(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "SCRUB_PIECE_BYTES", MIB)
    path = tmp_path / "x.img"
    path.write_bytes(b"x" * (8 * MIB))
    done = await bench.do("scrub", file_store(path), ranges=[[MIB, 2 * MIB], [7 * MIB, MIB]])
    assert done.error == ""
    assert path.read_bytes() == b"x" * MIB + bytes(2 * MIB) + b"x" * (4 * MIB) + bytes(MIB)
    progress = [m.progress for m in bench.sent if isinstance(m, WorkProgress)]
    assert progress == sorted(progress) and progress[-1] == 1.0 and len(progress) == 3
    bad = await bench.do("scrub", file_store(path), ranges=[[0, MIB], [8 * MIB, 1]])
    assert bad.code == Code.INVALID and path.read_bytes()[0:1] == b"x"  # nothing is begun that cannot be finished


async def test_files(bench: Bench, tmp_path: Path) -> None:
    store = dir_store(tmp_path)
    for _ in range(2):
        assert (await bench.do("file_create", store, object="leg", size=MIB)).error == ""
    assert (await bench.do("file_create", store, object="leg", size=2 * MIB)).code == Code.EXISTS
    assert (await bench.do("file_grow", store, object="leg", size=2 * MIB)).result == {"size": 2 * MIB}
    assert (await bench.do("file_stat", store, object="leg")).result == {"size": 2 * MIB}
    for _ in range(2):
        assert (await bench.do("file_remove", store, object="leg")).error == ""
    assert (await bench.do("file_stat", store, object="leg")).code == Code.UNAVAILABLE
    assert (await bench.do("file_create", store, object="../leg", size=MIB)).code == Code.INVALID


async def test_a_directory_is_listed(bench: Bench, tmp_path: Path) -> None:
    for name, size in (("b", 3), ("a", MIB)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a")
    done = await bench.do("dir_list", dir_store(tmp_path))
    assert done.result == {"files": [{"name": "a", "size": MIB}, {"name": "b", "size": 3}]}
    assert (await bench.do("dir_list", dir_store(tmp_path / "none"))).code == Code.UNAVAILABLE
    assert (await bench.do("dir_list", file_store(tmp_path / "a"))).error != ""


async def test_legs_are_compared_by_who_serves_them(bench: Bench) -> None:
    bench.shop.order("farm", Work(id=1, what="verify", args={"vvol": "u", "epoch": 3, "repair": True}))
    assert (await bench.answer(1)).result == {"compared_bytes": MIB, "differed": 2, "repaired": 2}
    bench.shop.order("farm", Work(id=2, what="verify", args={"vvol": "u", "epoch": 2, "repair": True}))
    assert (await bench.answer(2)).code == Code.STALE


@pytest.mark.parametrize(
    "args",
    [{}, {"offset": -1, "data": ""}, {"offset": 0, "data": "xyz"}, {"offset": 0, "data": "00" * (MIB + 1)}, {"x": 1}],
)
async def test_malformed_orders(bench: Bench, tmp_path: Path, args: dict[str, Any]) -> None:
    done = await bench.do("write_meta", file_store(tmp_path / "x"), **args)
    assert done.code == Code.INVALID and "write_meta" in done.error


async def test_an_order_is_done_once_and_answered_again(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    done = await bench.do("write_meta", file_store(path), offset=0, data="61")
    path.write_bytes(bytes(MIB))
    bench.sent.clear()
    order = Work(id=1, what="write_meta", args={"store": {"name": "x"}})
    bench.shop.order("farm", order)
    assert bench.sent == [done] and path.read_bytes()[0] == 0
    bench.shop.order("another farm", order)  # its numbers are its own
    await until(lambda: len(bench.sent) == 2)
    assert bench.sent[1].code == Code.INVALID  # type: ignore[attr-defined]


async def test_work_on_an_object_in_use_shares_it(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    held = await bench.objects.acquire(file_store(path, direct=True), "")
    assert (await bench.do("read_meta", file_store(path), offset=0, length=1)).code == Code.BUSY
    done = await bench.do("read_meta", file_store(path, direct=True), offset=1, length=3)
    assert done.result == {"data": "000000"} and len(bench.plane.objects) == 1
    await bench.objects.release(held)


# ---- sockets from a service manager ----


def run_with_fds(code: str, sockets: list[socket.socket], names: str = "") -> str:
    """What Python code prints in a process that has the sockets as fd 3 and on, meant for it."""

    def place() -> None:
        for index, sock in enumerate(sockets):
            os.dup2(sock.fileno(), 40 + index)
        for index in range(len(sockets)):
            os.dup2(40 + index, 3 + index)

    head = "import os\nos.environ['LISTEN_PID'] = str(os.getpid())\n"
    head += "from nbdvvol.filter.activation import take_sockets as take\n"
    environ = os.environ | {"LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names}
    fds = tuple(range(3, 3 + len(sockets)))
    done = subprocess.run(
        [sys.executable, "-c", head + code], preexec_fn=place, pass_fds=fds, env=environ, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr


def test_sockets_are_taken_once_and_named(tmp_path: Path) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "vm1.sock"))
    unix.listen()
    code = "s = take(); print(sorted(s), [k for k in os.environ if 'LISTEN' in k], take(), os.get_inheritable(3))"
    assert run_with_fds(code, [tcp, unix]) == "['tcp', 'vm1'] [] {} False"
    assert run_with_fds("print(sorted(take()))", [unix], "vm9.sock") == "['vm9']"


def test_what_does_not_listen_is_refused() -> None:
    pair = socket.socketpair()
    assert "does not listen" in run_with_fds("take()", [pair[0]])


def test_variables_of_another_process_are_left_alone() -> None:
    assert take_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, pid=2) == {}
    assert take_sockets({}, pid=2) == {}
    with pytest.raises(NvError, match="many"):
        take_sockets({"LISTEN_PID": "2", "LISTEN_FDS": "many"}, pid=2)
