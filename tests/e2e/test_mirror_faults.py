"""Legs of real daemons that answer with errors, fill up, hang, are lost for good, or rot: what the mirror does."""

from __future__ import annotations

import select
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.test_mirror import SIZE, local, mirrored, remote
from tests.e2e.test_sync_faults import Lun, lun
from tests.lib import nbdwords as w
from tests.lib.farm import Farm
from tests.lib.nbdwords import MiB
from tests.lib.netfarm import all_in_sync, bring_back, states
from tests.lib.pattern import difference, pattern
from tests.lib.peers import Peer, closed_peers, nbdkit, our_farm, qemu_nbd
from tests.lib.procs import need, run, short_dir, wait_until
from tests.lib.rawio import Transmission

__all__ = ["closed_peers", "lun"]
pytestmark = pytest.mark.timeout(240)
MakeFarm = Callable[..., Farm]


def verified(farm: Farm, *, repair: bool = False) -> str:
    """What `verify` says of the legs."""
    answer = farm.api("POST", "/v1/vvols/vm1/disk/verify", {"repair": repair})
    return str(farm.task(answer, timeout_s=60)["detail"])


def failing(peers: list[Peer], what: str) -> tuple[Peer, Path]:
    """An nbdkit that fails all of these requests while a file is there."""
    peer = nbdkit(64 * MiB, "--filter=error", f"error-{what}=EIO", f"error-{what}-rate=100%")
    trigger = peer.folder / "fail"
    peer.argv = [*peer.argv, f"error-{what}-file={trigger}"]
    peers.append(peer.start())
    return peer, trigger


def test_a_write_error_fails_its_leg_only(farms: MakeFarm, peers: list[Peer]) -> None:
    peer, trigger = failing(peers, "pwrite")
    farm = farms(mirrored(local("one"), remote(peer))).start()
    data = bytearray(pattern(31, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        trigger.touch()
        data[MiB : 2 * MiB] = pattern(32, 0, MiB)
        nbd.write(MiB, data[MiB : 2 * MiB])
        nbd.flush()
        assert states(farm)["one"] == "in-sync" and states(farm)["far"] != "in-sync"
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
        trigger.unlink()
        bring_back(farm)
    kinds = farm.events()
    assert kinds.index("leg_failed") < kinds.index("leg_in_sync")
    assert "alike" in verified(farm)


def test_a_read_error_is_answered_by_the_other_leg_and_mended(farms: MakeFarm, peers: list[Peer]) -> None:
    peer, trigger = failing(peers, "pread")
    farm = farms(mirrored(remote(peer), local("one"), read="primary")).start()
    data = pattern(33, 0, SIZE)
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        trigger.touch()
        assert difference(data, nbd.read(0, SIZE)) == ""
        wait_until("the place was rewritten", lambda: "read_repaired" in farm.events())
        trigger.unlink()
        assert all_in_sync(farm), "a read error alone costs no leg"
        assert difference(data, nbd.read(0, SIZE)) == ""


@pytest.mark.parametrize("kind", ["file", "block"])
def test_a_leg_without_space(lun: Lun, farms: MakeFarm, kind: str) -> None:
    """The file itself: writes fail with ENOSPC. A loop device on it: they fail later, in a sync."""
    store = {"kind": "file", "path": str(lun.file)} if kind == "file" else {"kind": "block", "path": str(lun.device)}
    spec = mirrored(local("one"), ("full", store))
    spec["vms"]["vm1"]["vvols"]["disk"]["size"] = "8MiB"
    farm = farms(spec).start()
    data = pattern(34, 0, 8 * MiB)
    with farm.open("disk") as nbd:
        region = farm.vvol("vm1/disk")["legs"][1]["regions"][0]
        lun.fill_up(region["object_offset"], region["length"])
        nbd.write(0, data)
        nbd.flush()
        wait_until("the registry knows of the loss", lambda: "mirror.stale" in farm.events())
        found = states(farm)
        assert found["one"] == "in-sync" and found["full"] != "in-sync", "stale, or tried again already, in vain"
        nbd.write(0, data[: 4 * MiB])
        nbd.flush()
        lun.make_room()
        bring_back(farm)
        assert difference(data, nbd.read(0, 8 * MiB)) == ""
    kinds = farm.events()
    assert kinds.index("leg_failed") < kinds.index("leg_in_sync")
    assert "alike" in verified(farm)
    assert not [one["fault"] for one in farm.api("GET", "/v1/datastores") if one.get("fault")], "nothing is latched"


def test_a_hanging_leg_fails_at_its_deadline_and_comes_back_by_itself(farms: MakeFarm, peers: list[Peer]) -> None:
    """Its server fences: what the frozen one still has of ours changes nothing, and the leg is copied to again."""
    peers.append(our_farm(64 * MiB).start())
    name, store = remote(peers[0])
    farm = farms(mirrored(local("one"), (name, store | {"timeout": "60s", "hold": "60s"}), **{"write-deadline": "1s"}))
    farm.start()
    data = bytearray(pattern(35, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        peers[0].freeze(True)
        overwrite(nbd, data)  # answered although the server says nothing
        assert states(farm) == {"one": "in-sync", "far": "stale"}
        overwrite(nbd, data)
        waits = "old operations have not ended"
        wait_until("it is told what the leg waits for", lambda: waits in farm.vvol("vm1/disk")["legs"][1]["now"]["why"])
        assert waits in farm.cli("describe", "vvol", "vm1/disk").stdout
        peers[0].freeze(False)
        bring_back(farm)
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    assert "alike" in verified(farm)


def test_a_failed_sync_costs_every_leg_on_that_object_and_a_sole_one_its_flushes(lun: Lun, farms: MakeFarm) -> None:
    """Whose bytes the failed sync has dropped, nobody knows. A VVol with another leg goes on; the last leg latches."""
    spec = mirrored(local("one"), ("full", {"kind": "block", "path": str(lun.device)}))
    spec["profiles"]["alone"] = {"mirror": {"legs": ["full"]}}
    vvols = {name: {"size": "4MiB", "profile": "twice"} for name in ("disk", "other")}
    spec["vms"]["vm1"]["vvols"] = vvols | {"sole": {"size": "4MiB", "profile": "alone"}}
    farm = farms(spec).start()
    data = pattern(43, 0, 4 * MiB)
    with farm.open("disk") as disk, farm.open("other") as other, farm.open("sole") as sole:
        for nbd in (disk, other, sole):
            nbd.write(0, data)
            nbd.flush()
        region = farm.vvol("vm1/disk")["legs"][1]["regions"][0]
        lun.fill_up(region["object_offset"], region["length"])
        disk.write(0, data)
        other.write(0, data[:4096])
        disk.flush()
        for name in ("vm1/disk", "vm1/other"):
            wait_until(f"{name} has lost its leg there", lambda name=name: states(farm, name)["full"] != "in-sync")
            assert states(farm, name)["one"] == "in-sync"
        other.flush()
        for _ in range(2):
            assert sole.call(w.CMD_FLUSH).error == w.EIO
        assert difference(data, other.read(0, 4 * MiB)) == ""
        lun.make_room()
        assert sole.call(w.CMD_FLUSH).error == w.EIO, "what it lost does not come back by there being room"
        assert states(farm, "vm1/sole") == {"full": "in-sync"}
        farm.cli("datastore", "clear-fault", "full")
        sole.write(0, data)
        sole.flush()
        for name in ("vm1/disk", "vm1/other"):
            bring_back(farm, name)
            answer = farm.api("POST", f"/v1/vvols/{name}/verify", {"repair": False})
            assert "alike" in farm.task(answer, timeout_s=60)["detail"]


@pytest.fixture
def icy() -> Iterator[Path]:
    """A file system that a test may freeze (`fsfreeze`): what is written there then hangs in the kernel."""
    folder = short_dir()
    with (folder / "fs.img").open("wb") as file:
        file.truncate(160 * MiB)
    run([need("mkfs.ext4", "e2fsprogs"), "-q", folder / "fs.img"])
    (folder / "fs").mkdir()
    run([need("mount", "mount"), "-o", "loop", folder / "fs.img", folder / "fs"])
    try:
        yield folder / "fs"
    finally:
        run([need("umount", "mount"), folder / "fs"])
        shutil.rmtree(folder)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    freeze = need("fsfreeze", "util-linux")
    run([freeze, "--freeze", folder])
    try:
        yield
    finally:
        run([freeze, "--unfreeze", folder])


@pytest.mark.parametrize("kind", ["file", "block"])
def test_a_local_leg_that_hangs_in_the_kernel(icy: Path, farms: MakeFarm, kind: str) -> None:
    """It fails at its deadline, nothing is copied to it until all it was asked has ended, and then it comes back."""
    file = icy / "leg.img"
    with file.open("wb") as out:
        out.truncate(64 * MiB)
    with ExitStack() as stack:
        path = file
        if kind == "block":
            path = Path(run([need("losetup", "mount"), "--show", "--find", file]).stdout.strip())
            stack.callback(run, [need("losetup", "mount"), "--detach", path])
        spec = mirrored(local("one"), ("slow", {"kind": kind, "path": str(path)}), **{"write-deadline": "1s"})
        with farms(spec) as farm:
            hangs(farm.start(), icy)


def hangs(farm: Farm, icy: Path) -> None:
    data = bytearray(pattern(40, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        with frozen(icy):
            overwrite(nbd, data)
            assert states(farm) == {"one": "in-sync", "slow": "stale"}
            waits = "old operations have not ended"
            told = lambda: farm.vvol("vm1/disk")["legs"][1]["now"]["why"]  # noqa: E731
            wait_until("it is told what the leg waits for", lambda: waits in told())
            overwrite(nbd, data)
            assert difference(bytes(data), nbd.read(0, SIZE)) == ""
            assert states(farm) == {"one": "in-sync", "slow": "stale"} and waits in told()
        bring_back(farm)
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    assert "alike" in verified(farm)


def test_a_hanging_leg_that_cannot_fence_waits_for_the_operator(farms: MakeFarm, peers: list[Peer]) -> None:
    peers.append(qemu_nbd(64 * MiB).start())
    farm = farms(mirrored(local("one"), remote(peers[0]))).start()
    data = bytearray(pattern(36, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        peers[0].freeze(True)
        overwrite(nbd, data)
        peers[0].freeze(False)  # what it was asked before lands now
        overwrite(nbd, data)
        waits_for_the_operator(farm, peers[0])
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    assert "alike" in verified(farm)
    wait_until("all is well", lambda: "all is well" in farm.cli("status", "-x", check=False).stdout, 30)


@pytest.mark.parametrize("lost", [True, False], ids=["after its loss", "before its loss"])
def test_a_doubt_about_a_leg_outlives_the_filter(farms: MakeFarm, peers: list[Peer], lost: bool) -> None:
    """The filter dies while a server that cannot fence has writes of it, which land when the next filter serves."""
    peers.append(qemu_nbd(64 * MiB).start())
    farm = farms(mirrored(local("one"), remote(peers[0])))
    farm.start_split()
    data = bytearray(pattern(39, 0, SIZE))
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        peers[0].freeze(True)
        if lost:
            overwrite(nbd, data)
            assert states(farm) == {"one": "in-sync", "far": "stale"}
        else:
            nbd.send(w.CMD_WRITE, 0, 4096, payload=bytes([data[0] ^ 0xFF]) * 4096)
            assert not select.select([nbd.stream.sock], [], [], 0.5)[0], "answered although a leg has not got it"
        farm.filters["local"].kill_group()
    farm.start_filter()
    with farm.open("disk", wait_s=40) as nbd:
        peers[0].freeze(False)
        overwrite(nbd, data)
        waits_for_the_operator(farm, peers[0])
        assert difference(bytes(data), nbd.read(0, SIZE)) == ""
    assert "alike" in verified(farm)


def waits_for_the_operator(farm: Farm, peer: Peer) -> None:
    """... and comes back by his word, once the leg's server has been restarted."""
    wait_until("the operator is asked", lambda: asks_the_operator(farm), 40)
    time.sleep(2.0)
    assert asks_the_operator(farm) and states(farm) == {"one": "in-sync", "far": "stale"}
    peer.kill()
    peer.start()
    bring_back(farm)


def asks_the_operator(farm: Farm) -> bool:
    said = farm.cli("status", "-x", check=False).stdout
    return "LEG_STALE vm1/disk" in said and "nbdvvol mirror resync" in said


def overwrite(nbd: Transmission, data: bytearray) -> None:
    """Other bytes at the same places as the last time; all are answered on return."""
    fresh = bytes([data[0] ^ 0xFF]) * (64 << 10)
    cookies = []
    for at in range(0, SIZE, 4 * MiB):
        data[at : at + len(fresh)] = fresh
        cookies.append(nbd.send(w.CMD_WRITE, at, len(fresh), payload=fresh))
    for cookie in cookies:
        nbd.wait(cookie).check()
    nbd.flush()


def test_a_spare_takes_the_place_of_a_lost_leg(farms: MakeFarm, peers: list[Peer]) -> None:
    peers.append(qemu_nbd(64 * MiB).start())
    spec = mirrored(local("one"), remote(peers[0]), spares=["spare"], **{"spare-after": "1s"})
    spec["datastores"] |= dict([local("spare")])
    farm = farms(spec).start()
    data = pattern(37, 0, SIZE)
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        peers[0].kill()
        nbd.write(0, data[:MiB])
        wait_until("the spare is in sync", lambda: states(farm).get("spare") == "in-sync", 60)
        lost = lambda: next((leg for leg in farm.vvol("vm1/disk")["legs"] if leg["datastore"] == "far"), None)  # noqa: E731
        wait_until("the lost leg is out", lambda: lost()["life"] == "leaving", 30)
        waits = "waits for datastore far"
        wait_until("its space waits for its server", lambda: waits in str(farm.api("GET", "/v1/tasks")), 30)
        assert difference(data, nbd.read(0, SIZE)) == ""
    assert "alike" in verified(farm)
    peers[0].start()
    wait_until("what the lost leg had is given back", lambda: lost() is None, 30)
    assert states(farm) == {"one": "in-sync", "spare": "in-sync"}


def test_verify_finds_what_rotted_and_mends_it(farms: MakeFarm) -> None:
    farm = farms(mirrored(local("one"), local("two"))).start()
    data = pattern(38, 0, SIZE)
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.flush()
        assert "alike" in verified(farm)
        corrupt(farm.folder / "data" / "two.img", data[5 * MiB : 5 * MiB + 4096])
        assert "differ; nothing was changed" in verified(farm)
        assert "differ; nothing was changed" in verified(farm)
        assert "made what the first leg has" in verified(farm, repair=True)
        assert "alike" in verified(farm)
        assert difference(data, nbd.read(0, SIZE)) == ""
    assert data[5 * MiB : 5 * MiB + 4096] in (farm.folder / "data" / "two.img").read_bytes()


def corrupt(file: Path, block: bytes) -> None:
    """Flip a bit of the block, wherever it lies in the file, behind everybody's back."""
    at = file.read_bytes().index(block)
    with file.open("r+b") as out:
        out.seek(at + 100)
        out.write(bytes([block[100] ^ 1]))


def test_what_a_lost_leg_missed_is_answered_once_control_knows(farms: MakeFarm, peers: list[Peer]) -> None:
    """Control dies, then a leg: the write is held, not refused and not acknowledged, until control is back."""
    peers.append(qemu_nbd(64 * MiB).start())
    farm = farms(mirrored(local("one"), remote(peers[0]), hold="60s"))
    farm.start_split()
    with farm.open("disk") as nbd:
        nbd.write(0, b"before--" * 512)
        nbd.flush()
        assert farm.control is not None
        farm.control.kill_group()
        peers[0].kill()
        cookie = nbd.send(w.CMD_WRITE, 0, 4096, payload=b"degraded" * 512)
        assert not select.select([nbd.stream.sock], [], [], 4.0)[0], "answered before the registry knew"
        farm.start_control()
        nbd.wait(cookie).check()
        assert states(farm) == {"one": "in-sync", "far": "stale"}
        assert nbd.read(0, 4096) == b"degraded" * 512
