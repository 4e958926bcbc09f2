"""Write-back in a running farm: what is logged survives kills, is drained, pins its VVol; logs that are gone.

The storage is an O_DIRECT file, so that what it has can be looked at beside the farm.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.test_sync_faults import Lun, lun
from tests.lib.farm import ApiError, Farm, JsonDict, plain_spec
from tests.lib.faultfs import FaultFs
from tests.lib.ledger import Ledger, Writer
from tests.lib.nbdwords import CMD_FLUSH, CMD_READ, KiB, MiB
from tests.lib.pattern import pattern
from tests.lib.procs import need, run, short_dir, wait_until
from tests.lib.rawio import Transmission, open_export

__all__ = ["lun"]
pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]
LOG_RING = 8192
"""Where a log's ring begins."""
LAZY: JsonDict = {"size": "8MiB", "age": "1h"}


def spec(log: JsonDict | None = None, *, mode: str = "writeback", **hosts: Any) -> JsonDict:
    """vm1/root, 16 MiB, whose log lies in the folder `logs` beside the farm file."""
    whole = plain_spec("40MiB", {"root": {"size": "16MiB", "profile": "gold"}})
    whole["datastores"]["main"] |= {"io": "direct"}
    cache: JsonDict = {"mode": mode} | ({"log": log or LAZY} if mode == "writeback" else {})
    whole["profiles"] = {"gold": {"datastore": "main", "cache": cache}}
    whole["hosts"] = {"local": {"logs": "logs", "cache": "8MiB"}} | hosts
    return whole


def log_of(farm: Farm) -> JsonDict:
    """What the log of vm1/root does, by its host's counters."""
    exports = [one for host in farm.api("GET", "/v1/counters") for one in host["exports"]]
    return dict(exports[0]["log"] or {}) if exports else {}


def serving(farm: Farm) -> None:
    wait_until("writes are logged", lambda: log_of(farm).get("state") == "serving")


def opened(farm: Farm) -> Transmission:
    """Enter vm1/root where it is served now."""
    farm.wait_bound("vm1/root", 40)
    socket = Path(parse_qs(urlsplit(farm.vvol("vm1/root")["uri"]).query)["socket"][0])
    return open_export(socket, "root")


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    run([need("mount", "mount"), "-t", "tmpfs", "-o", "size=4m", "logs", tmp_path])
    yield tmp_path
    run([need("umount", "mount"), tmp_path])


def codes(farm: Farm) -> list[str]:
    return [one["code"] for one in json.loads(farm.cli("status", "-x", "-o", "json", check=False).stdout)]


def test_what_is_logged_survives_kills_and_is_drained(farms: MakeFarm) -> None:
    farm = farms(spec())
    farm.start_split()
    serving(farm)
    ledger = Ledger(41)
    for _ in range(2):
        writer = Writer(ledger, farm.open("root", wait_s=20))
        writer.progress(150)
        farm.filters["local"].kill_group()
        writer.join()
        farm.start_filter()
        with farm.open("root", wait_s=20) as nbd:
            ledger.verify(nbd)
        serving(farm)
    with farm.open("root") as nbd:
        nbd.write(8 * MiB, pattern(40, 0, 64 * KiB))
    found = farm.vvol("vm1/root")
    held = log_of(farm)
    assert held["dirty_bytes"] > 0 and held["ring_bytes"] == 8 * MiB - 8 * KiB
    assert found["log"]["host"] == "local" and found["log"]["known"]
    assert "log_recovered" in farm.events()
    _tells(farm)
    drained = farm.cli("cache", "drain", "root").stdout
    assert drained.startswith("vm1/root: drained: ") and "to the storage" in drained
    with farm.open("root") as nbd:
        ledger.verify(nbd)
        assert nbd.read(8 * MiB, 64 * KiB) == pattern(40, 0, 64 * KiB)
    serving(farm)  # it is logged again, as the profile says
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/unbind", {}))
    assert farm.vvol("vm1/root")["log"] is None
    assert not list((farm.folder / "logs").iterdir()), "an empty log leaves nothing behind"
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/bind", {}))
    with farm.open("root", wait_s=20) as nbd:
        ledger.verify(nbd)


def _tells(farm: Farm) -> None:
    """The command line and Prometheus have it, too."""
    assert "serving; holds " in farm.cli("describe", "vvol", "root").stdout
    assert "writeback" in farm.cli("get", "profiles").stdout
    assert any(line.split()[:2] == ["vm1/root", "serving"] for line in farm.cli("status").stdout.splitlines())
    with farm.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = {one.name: one.value for family in families for one in family.samples}
    assert samples["nbdvvol_vvol_log_dirty_bytes"] > 0 and samples["nbdvvol_vvol_log_serving"] == 1


def test_it_is_turned_off_and_on_by_apply(farms: MakeFarm) -> None:
    farm = farms(spec()).start()
    serving(farm)
    data = pattern(42, 0, 64 * KiB)
    with farm.open("root") as nbd:
        nbd.write(0, data)
        assert log_of(farm)["dirty_bytes"] == 64 * KiB
        farm.apply(spec(mode="read"))
        wait_until("nothing is logged any more", lambda: farm.vvol("vm1/root")["log"] is None)
        assert nbd.read(0, 64 * KiB) == data
        nbd.write(64 * KiB, data)
        assert log_of(farm).get("dirty_bytes", 0) == 0
        farm.apply(spec())
        serving(farm)
        nbd.write(128 * KiB, data)
        assert log_of(farm)["dirty_bytes"] == 64 * KiB
        assert nbd.read(0, 192 * KiB) == data * 3
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/resize", {"size": 20 * MiB}))
    with farm.open("root") as nbd:
        nbd.write(18 * MiB, data)
        assert nbd.read(0, 192 * KiB) == data * 3 and nbd.read(18 * MiB, 64 * KiB) == data


def _has_log_of(farm: Farm, ring: int | None) -> None:
    wait_until(f"its log has {ring} bytes", lambda: log_of(farm).get("ring_bytes") == ring)


def test_apply_changes_a_log_under_a_writer(farms: MakeFarm) -> None:
    """On, another size, another place, off and on: one connection all the time, whose every byte is known."""
    farm = farms(spec(mode="read")).start()
    ledger = Ledger(46)
    writer = Writer(ledger, farm.open("root"))
    small: JsonDict = {"size": "4MiB", "age": "200ms"}
    other = farm.folder / "elsewhere"
    steps: list[tuple[JsonDict, int]] = [(LAZY, 8), (small, 4), (small | {"path": str(other)}, 4), ({}, 0), (small, 4)]

    def stands_in(place: str) -> bool:
        """The registry has heard of a log there; one of the same size somewhere else may go on until then."""
        return ((farm.vvol("vm1/root")["log"] or {}).get("file") or "").startswith(place)

    for log, size in steps:
        farm.apply(spec(log) if log else spec(mode="read"))
        _has_log_of(farm, size * MiB - 8 * KiB if size else None)
        if log:
            place = log.get("path", str(farm.folder / "logs"))
            wait_until(f"its log is in {place}", lambda: stands_in(place), 20)  # noqa: B023
            serving(farm)
        writer.progress(60)
    assert not list(other.iterdir()), "an empty log leaves nothing behind"
    writer.join()
    assert codes(farm) == []
    with farm.open("root") as nbd:
        ledger.verify(nbd)


@pytest.fixture
def two(farms: MakeFarm) -> Farm:
    """Two hosts that see one datastore; vm1/root is served by the first, and its log holds 64 KiB."""
    whole = spec(other={"logs": "logs2", "cache": "8MiB"})
    whole["vms"]["vm1"]["host"] = "local"
    farm = farms(whole)
    farm.start_control()
    farm.apply()
    farm.start_filter()
    farm.start_filter("other", farm.folder / "run2")
    farm.wait_bound("vm1/root", 40)
    serving(farm)
    with farm.open("root", wait_s=20) as nbd:
        nbd.write(0, pattern(43, 0, 64 * KiB))
    wait_until("control has heard of it", lambda: farm.vvol("vm1/root")["log_now"]["dirty_bytes"] == 64 * KiB)
    return farm


def test_a_move_drains_the_log_first(two: Farm) -> None:
    two.task(two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "other"}))
    found = two.vvol("vm1/root")
    assert found["binding"]["host"] == "other"
    assert two.events().index("log.drained") < len(two.events()) - 1
    two.wait_bound("vm1/root")
    with opened(two) as nbd:
        assert nbd.read(0, 64 * KiB) == pattern(43, 0, 64 * KiB)


def test_a_log_on_a_host_that_is_gone_pins_its_vvol(two: Farm) -> None:
    two.filters["local"].kill_group()
    wait_until("its host is away", lambda: "LOG_PINNED" in codes(two))
    with pytest.raises(ApiError, match="held 64KiB") as refused:
        two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "other"})
    assert refused.value.code == "CONFLICT"
    answer = two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "other", "force": True})
    assert any("held 64KiB" in risk for risk in answer["risks"])
    two.task(answer)
    with opened(two) as nbd:
        assert nbd.read(0, 64 * KiB) == bytes(64 * KiB), "what was given up is not there"
        nbd.write(0, b"n" * 4 * KiB)
    two.start_filter()
    wait_until("the old host is there again", lambda: all(h["connected"] for h in two.api("GET", "/v1/hosts")))
    two.task(two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "local"}))
    with two.open("root", wait_s=20) as nbd:
        assert nbd.read(0, 8 * KiB) == b"n" * 4 * KiB + bytes(4 * KiB), "an old log is never replayed"
    assert "LOG_REFUSED" in codes(two)
    assert "holds 64KiB" in two.cli("cache", "discard", "root").stderr
    serving(two)


def test_a_log_that_is_lost_is_missed_until_it_is_given_up(farms: MakeFarm) -> None:
    farm = farms(spec())
    farm.start_split()
    serving(farm)
    with farm.open("root") as nbd:
        nbd.write(0, b"x" * 4 * KiB)
    farm.filters["local"].kill_group()
    [path] = (farm.folder / "logs").iterdir()
    moved = path.rename(farm.folder / "moved")
    farm.start_filter()
    wait_until("it is missed", lambda: "LOG_MISSING" in codes(farm))
    assert farm.vvol("vm1/root")["binding"]["state"] == "binding", "it is not served without what it acknowledged"
    moved.rename(path)
    with farm.open("root", wait_s=40) as nbd:
        assert nbd.read(0, 4 * KiB) == b"x" * 4 * KiB
    farm.filters["local"].kill_group()
    path.write_bytes(bytes(8 * MiB))
    farm.start_filter()
    wait_until("it is missed", lambda: "LOG_MISSING" in codes(farm))
    farm.cli("cache", "discard", "root")
    with farm.open("root", wait_s=40) as nbd:
        assert nbd.read(0, 4 * KiB) == bytes(4 * KiB)
    serving(farm)


def test_a_rebuilt_registry_passes_over_no_log_that_holds_data(two: Farm) -> None:
    """It knows of none, and the profile has none any more; the host on which one lies has noted that."""
    assert two.control is not None
    two.filters["local"].kill_group()
    assert two.control.stop(30) == 0
    for path in two.state.glob("registry.db*"):
        path.unlink()
    whole = spec(mode="read", other={"logs": "logs2", "cache": "8MiB"})
    whole["vms"]["vm1"]["host"] = "other"
    two.write_file(whole)
    run([sys.executable, "-m", "nbdvvol", "registry", "rebuild", "-f", two.file, "--state", two.state])
    two.start_control()
    two.start_filter()
    wait_until("all hosts are there", lambda: all(h["connected"] for h in two.api("GET", "/v1/hosts")))
    wait_until("its log is missed", lambda: "LOG_PINNED" in codes(two))
    kept = two.vvol("vm1/root")["log"]
    assert (kept["host"], kept["known"], kept["dirty_bytes"]) == ("local", False, 64 * KiB)
    with pytest.raises(ApiError, match="on host local holds 64KiB of it of which the registry knows nothing"):
        two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "other"})
    two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "local"})
    wait_until("it is not served without what it acknowledged", lambda: "LOG_UNKNOWN" in codes(two))
    assert "/logs/" in two.vvol("vm1/root")["binding"]["error"]
    two.cli("cache", "recover", "root")
    with two.open("root", wait_s=40) as nbd:
        assert nbd.read(0, 64 * KiB) == pattern(43, 0, 64 * KiB)
    wait_until("it is in the storage", lambda: two.vvol("vm1/root")["log"] is None)
    two.task(two.api("POST", "/v1/vvols/vm1/root/bind", {"host": "other"}))
    with opened(two) as nbd:
        assert nbd.read(0, 64 * KiB) == pattern(43, 0, 64 * KiB)
    assert not list((two.folder / "logs").iterdir()) and codes(two) == []


def test_a_log_that_does_not_fit_makes_it_slower_and_nothing_else(small_tmpfs: Path, farms: MakeFarm) -> None:
    farm = farms(spec({"size": "8MiB", "path": str(small_tmpfs)})).start()
    with farm.open("root") as nbd:
        nbd.write(0, b"y" * 4 * KiB)
    [problem] = json.loads(farm.cli("status", "-x", "-o", "json", check=False).stdout)
    assert problem["code"] == "LOG_REFUSED" and "does not fit" in problem["message"]
    assert list(small_tmpfs.iterdir()) == []


def test_what_can_be_read_nowhere_is_told_to_the_byte(farms: MakeFarm) -> None:
    """The log's disk has bad places: people and programs hear which bytes of the VVol those were, until they are
    written again. Nobody is given what is older."""
    folder = short_dir()
    fs = FaultFs(folder)
    try:
        farm = farms(spec({"size": "4MiB", "path": str(folder), "age": "1h"}))
        farm.start_split()
        serving(farm)
        lost = {8 * KiB: pattern(48, 0, 8 * KiB), 3 * MiB: pattern(50, 0, 4 * KiB)}
        with farm.open("root") as nbd:
            for offset, data in lost.items():
                nbd.write(offset, data)
        farm.filters["local"].kill_group()  # and what its RAM has of it
        farm.start_filter()
        with farm.open("root", wait_s=20) as nbd:
            serving(farm)
            [log] = fs.files.values()
            end = log.find(lost[3 * MiB]) + 4 * KiB
            fs.fail("read", errno.EIO, LOG_RING, end - LOG_RING)
            nbd.write(MiB, pattern(49, 0, 4 * KiB))
            for offset in (8 * KiB, 12 * KiB, 3 * MiB):
                assert nbd.call(CMD_READ, offset, 4 * KiB).error == errno.EIO
            ranges = [{"offset": offset, "length": len(data)} for offset, data in lost.items()]
            wait_until("the API has it", lambda: farm.vvol("vm1/root")["log_now"]["lost"] == ranges)
            assert log_of(farm)["lost_bytes"] == 12 * KiB
            problem, *_ = json.loads(farm.cli("status", "-x", "-o", "json", check=False).stdout)
            assert problem["code"] == "LOG_DATA_LOST" and problem["subject"] == "vm1/root"
            assert (
                "12KiB that were logged" in problem["message"] and "bytes 8192+8192, 3145728+4096" in problem["message"]
            )
            told = farm.cli("get", "events").stdout
            assert "log_lost" in told and "8192+8192" in told
            fs.mend()
            assert nbd.call(CMD_READ, 8 * KiB, 4 * KiB).error == errno.EIO and nbd.call(CMD_FLUSH).error == errno.EIO
            assert nbd.read(MiB, 4 * KiB) == pattern(49, 0, 4 * KiB)
            for offset, data in lost.items():
                nbd.write(offset, data)
            nbd.flush()
            wait_until("nothing is lost any more", lambda: "LOG_DATA_LOST" not in codes(farm))
            assert all(nbd.read(offset, len(data)) == data for offset, data in lost.items())
        farm.stop()
    finally:
        fs.close()
        folder.rmdir()


def test_a_log_that_is_moved_away_in_use_is_carried_and_begins_anew(farms: MakeFarm) -> None:
    farm = farms(spec()).start()
    serving(farm)
    data = pattern(47, 0, 64 * KiB)
    with farm.open("root") as nbd:
        nbd.write(0, data)
        assert log_of(farm)["dirty_bytes"] == 64 * KiB
        [path] = (farm.folder / "logs").iterdir()
        moved = path.rename(farm.folder / "moved")
        wait_until("it is told", lambda: "LOG_FAILED" in codes(farm))
        nbd.write(64 * KiB, data)
        wait_until("all of it is in the storage", lambda: farm.vvol("vm1/root")["log"] is None)
        assert nbd.read(0, 128 * KiB) == data * 2
        wait_until("it begins anew in its place", path.exists, 30)
        serving(farm)
        nbd.write(128 * KiB, data)
        assert log_of(farm)["dirty_bytes"] == 64 * KiB and codes(farm) == []
        nbd.flush()
        assert nbd.read(0, 192 * KiB) == data * 3
    events = farm.events()
    assert "log_failed" in events and "log_lost" not in events
    moved.unlink()


def test_over_a_mirror_it_outlives_its_filter_and_a_leg(farms: MakeFarm) -> None:
    """Kills of the filter while writes are logged; a leg that is away meanwhile misses nothing."""
    whole = spec()
    for name in ("one", "two"):
        whole["datastores"][name] = {"kind": "dir", "path": name}
    gold: JsonDict = {"mirror": {"legs": ["one", "two"]}, "cache": {"mode": "read"}}
    whole["profiles"]["gold"] = gold
    farm = farms(whole)
    for name in ("one", "two"):
        (farm.folder / name).mkdir()
    farm.start_split()
    gold["cache"] = {"mode": "writeback", "log": LAZY}
    farm.apply(whole)
    serving(farm)
    ledger = Ledger(45)
    for away in (False, True):
        writer = Writer(ledger, farm.open("root", wait_s=20))
        writer.progress(150)
        farm.filters["local"].kill_group()
        writer.join()
        if away:
            (farm.folder / "two").rename(farm.folder / "away")
        farm.start_filter()
        with farm.open("root", wait_s=40) as nbd:
            ledger.verify(nbd)
        serving(farm)
    drained = farm.cli("cache", "drain", "root").stdout
    assert "to the storage" in drained
    (farm.folder / "away").rename(farm.folder / "two")
    wait_until("the leg is back", lambda: all(leg["state"] == "in-sync" for leg in farm.vvol("vm1/root")["legs"]), 60)
    assert "all in-sync legs are alike" in farm.cli("mirror", "verify", "root").stdout
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/unbind", {}))
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/bind", {}))
    with farm.open("root", wait_s=20) as nbd:
        ledger.verify(nbd)


def test_a_log_whose_disk_fails_costs_speed_and_nothing_else(lun: Lun, farms: MakeFarm) -> None:
    """The log is a block device that runs out of space under it; no client gets an error, and nothing is lost."""
    farm = farms(spec({"size": "16MiB", "path": str(lun.device), "age": "1h"})).start()
    serving(farm)
    with farm.open("root") as nbd:
        for block in range(96):
            if block == 32:
                assert log_of(farm)["dirty_bytes"] == 32 * 64 * KiB
                lun.fill_up(12 * MiB, MiB)
            nbd.write(block * 64 * KiB, pattern(44, block, 64 * KiB))
        nbd.flush()
        for block in range(96):
            assert nbd.read(block * 64 * KiB, 64 * KiB) == pattern(44, block, 64 * KiB)
    wait_until("it is told", lambda: "LOG_FAILED" in codes(farm))
    assert log_of(farm)["state"] == "void" and log_of(farm)["lost_bytes"] == 0
    wait_until("nothing is missed", lambda: farm.vvol("vm1/root")["log"] is None)
    assert "log_failed" in farm.events()
    lun.make_room()
    wait_until("it begins anew by itself", lambda: log_of(farm).get("state") == "serving", 60)
    assert "LOG_FAILED" not in codes(farm)
