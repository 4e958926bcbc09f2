"""kind nbd end to end: VVols on an export of another server, alone; adoption; what status says while it is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.lib.farm import Farm
from tests.lib.nbdwords import MiB
from tests.lib.pattern import difference, pattern
from tests.lib.peers import Peer, closed_peers, nbdkit, our_farm, qemu_nbd
from tests.lib.procs import wait_until
from tests.lib.rawio import NbdError

__all__ = ["closed_peers"]
pytestmark = pytest.mark.timeout(180)
MakeFarm = Callable[..., Farm]
SIZE = 64 * MiB


def spec_of(peer: Peer, vvols: dict[str, object] | None = None, **store: object) -> dict[str, object]:
    return {
        "datastores": {"far": {"kind": "nbd", "uri": peer.uri, **store}},
        "profiles": {"plain": {"datastore": "far"}},
        "vms": {"vm1": {"vvols": vvols or {"disk": {"size": "16MiB", "profile": "plain"}}}},
    }


def datastore(farm: Farm) -> dict[str, object]:
    found: list[dict[str, object]] = json.loads(farm.cli("get", "datastores", "-o", "json").stdout)
    return found[0]


@pytest.mark.parametrize("make", [nbdkit, qemu_nbd, our_farm], ids=["nbdkit", "qemu-nbd", "nbdvvol"])
def test_a_remote_export_holds_vvols(farms: MakeFarm, peers: list[Peer], make: Callable[[int], Peer]) -> None:
    """Formatted, written, grown, read again after a stop; the header and the bytes are on the export."""
    peers.append(make(SIZE).start())
    farm = farms(spec_of(peers[0])).start()
    data = pattern(11, 0, 16 * MiB)
    with farm.open("disk") as nbd:
        nbd.write(0, data)
        nbd.zero(4 * MiB, MiB)
        nbd.flush()
    farm.cli("resize", "vvol", "vm1/disk", "20MiB")
    want = bytearray(data) + bytes(4 * MiB)
    want[4 * MiB : 5 * MiB] = bytes(MiB)
    found = datastore(farm)
    assert (found["state"], found["use"], found["size"], found["path"]) == ("online", "formatted", SIZE, peers[0].uri)
    region = farm.vvol("vm1/disk")["legs"][0]["regions"][0]
    farm.stop()
    raw = peers[0].file.read_bytes()
    assert raw[:8] == b"NVDSTORE"
    assert difference(bytes(want[: 16 * MiB]), raw[region["object_offset"] :][: 16 * MiB]) == ""
    farm.start()
    with farm.open("disk") as nbd:
        assert nbd.size == 20 * MiB and difference(bytes(want), nbd.read(0, 20 * MiB)) == ""
    farm.delete("vm1/disk")
    assert datastore(farm)["free"] == datastore(farm)["size"] - MiB  # type: ignore[operator]


def test_a_remote_export_is_adopted_as_it_is(farms: MakeFarm, peers: list[Peer]) -> None:
    peers.append(qemu_nbd(SIZE))
    data = pattern(12, 0, SIZE)
    peers[0].file.write_bytes(data)
    peers[0].start()
    farm = farms(spec_of(peers[0], {"old": {"adopt": {"datastore": "far", "offset": MiB, "length": 8 * MiB}}})).start()
    with farm.open("old") as nbd:
        assert nbd.size == 8 * MiB and difference(data[MiB : 9 * MiB], nbd.read(0, 8 * MiB)) == ""
        nbd.write(0, b"new!" * 1024)
        nbd.flush()
    farm.stop()
    assert peers[0].file.read_bytes() == data[:MiB] + b"new!" * 1024 + data[MiB + 4096 :]


def problems_of(farm: Farm) -> list[dict[str, Any]]:
    return json.loads(farm.cli("status", "-o", "json", check=False).stdout)["problems"]


def codes_of(problems: list[dict[str, Any]]) -> list[str]:
    return [one["code"] for one in problems]


def test_a_lost_server_is_shown_and_comes_back(farms: MakeFarm, peers: list[Peer]) -> None:
    peers.append(nbdkit(SIZE).start())
    farm = farms(spec_of(peers[0], **{"write-through": True})).start()
    with farm.open("disk") as nbd:
        nbd.write(0, b"before!!" * 512)
        peers[0].kill()
        wait_until("status tells", lambda: datastore(farm)["state"] == "reconnecting")
        assert "reconnecting since" in str(datastore(farm)["detail"])
        assert codes_of(problems_of(farm)) == ["REMOTE_LOST"]
        cookie = nbd.send(0, 0, 4096)
        peers[0].start()
        assert nbd.wait(cookie).check().data == b"before!!" * 512
        wait_until("status tells", lambda: datastore(farm)["state"] == "online")
        nbd.flush()
    kinds = farm.events()
    assert kinds.index("remote_lost") < kinds.index("remote_back")


def test_what_a_lost_server_owed_is_for_the_operator(farms: MakeFarm, peers: list[Peer]) -> None:
    """Acknowledged, not flushed, server killed: FLUSH fails and status says why, until the operator accepts it."""
    peers.append(nbdkit(SIZE).start())
    farm = farms(spec_of(peers[0])).start()
    with farm.open("disk") as nbd:
        nbd.write(0, b"owed" * 1024)
        peers[0].kill()
        peers[0].start()
        with pytest.raises(NbdError):
            nbd.flush()
        wait_until("its link is back", lambda: "REMOTE_LOST" not in codes_of(problems_of(farm)))
        problems = problems_of(farm)
        assert codes_of(problems) == ["SYNC_FAILED"]
        assert "lost before it had made durable" in problems[0]["message"]
        farm.cli("datastore", "clear-fault", "far")
        nbd.write(0, b"new!" * 1024)
        nbd.flush()
    assert not json.loads(farm.cli("status", "-o", "json").stdout)["problems"]


def test_a_farm_starts_without_its_server(farms: MakeFarm, peers: list[Peer]) -> None:
    """The VVol fails alone and comes up by itself when the server does; so does a filter that is started meanwhile."""
    peers.append(nbdkit(SIZE).start())
    spec = spec_of(peers[0])
    spec["datastores"]["local"] = {"kind": "file", "path": "local.img", "size": "8MiB"}  # type: ignore[index]
    spec["vms"]["vm2"] = {"vvols": {"near": {"size": "4MiB", "datastore": "local"}}}  # type: ignore[index]
    farm = farms(spec).start()
    with farm.open("disk") as nbd:
        nbd.write(0, b"x" * 4096)
        nbd.flush()
    farm.stop()
    peers[0].kill()
    farm.begin()
    with farm.open("near", vm="vm2", wait_s=30) as nbd:
        assert nbd.read(0, 512) == bytes(512)
    peers[0].start()
    with farm.open("disk", wait_s=60) as nbd:
        assert nbd.read(0, 4096) == b"x" * 4096
    farm.wait_ready()


def test_a_filter_stops_while_its_server_is_away(farms: MakeFarm, peers: list[Peer]) -> None:
    """I/O that waits for the server does not keep the farm from stopping."""
    peers.append(nbdkit(SIZE).start())
    farm = farms(spec_of(peers[0], hold="600s")).start()
    with farm.open("disk") as nbd:
        nbd.write(0, b"x" * 4096)
        peers[0].kill()
        nbd.send(0, 0, 4096)
        wait_until("status tells", lambda: datastore(farm)["state"] != "online")
        farm.stop()
