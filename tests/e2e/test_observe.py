"""Counters and traces of a running farm: a known number of requests is counted exactly, a known sequence traced."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.test_control_away import kill_control
from tests.e2e.test_kills import connected
from tests.lib import nbdwords as w
from tests.lib.farm import Farm, JsonDict, plain_spec
from tests.lib.nbdwords import KiB, MiB
from tests.lib.procs import wait_until
from tests.lib.rawio import NbdError, Transmission

pytestmark = pytest.mark.timeout(120)
ROUNDS = 40
LENGTHS = {"root": 4 * KiB, "fast": 8 * KiB}


@pytest.fixture(scope="module")
def whole() -> Iterator[Farm]:
    """vm1/root on a file on disk, vm1/fast on one in memory; two reactors."""
    memory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="nv"))
    spec = plain_spec("40MiB", {"root": {"size": "16MiB", "profile": "plain"}})
    spec["datastores"]["memory"] = {"kind": "file", "path": str(memory / "fast.img"), "size": "40MiB"}
    spec["profiles"]["fast"] = {"datastore": "memory"}
    spec["vms"]["vm1"]["vvols"]["fast"] = {"size": "16MiB", "profile": "fast"}
    spec["hosts"] = {"local": {"reactors": 2}}
    try:
        with Farm(spec) as farm:
            farm.start_split()
            yield farm
    finally:
        shutil.rmtree(memory)


@pytest.fixture
def farm(whole: Farm) -> Farm:
    """A farm with control and filter at work; tests may kill either."""
    if whole.control is None or not whole.control.alive():
        whole.start_control()
    if not whole.filters["local"].alive():
        whole.start_filter()
    wait_until("the filter is connected", lambda: connected(whole))
    for name in LENGTHS:
        whole.wait_bound(f"vm1/{name}")
    wait_until("former clients are gone", lambda: all(not export(whole, name)["connections"] for name in LENGTHS))
    return whole


def host(farm: Farm) -> JsonDict:
    """Counters of the only host."""
    [found] = farm.api("GET", "/v1/counters")
    return dict(found)


def export(farm: Farm, name: str) -> JsonDict:
    """Counters of a VVol."""
    [found] = [one for one in host(farm)["exports"] if one["vvol"] == f"vm1/{name}"]
    return dict(found)


def store(farm: Farm, name: str) -> JsonDict:
    """Counters of a datastore."""
    [found] = [one for one in host(farm)["datastores"] if one["datastore"] == name]
    return dict(found)


def settled(farm: Farm, name: str) -> JsonDict:
    """Counters of a VVol with nothing in flight: a read sent from memory counts just after its reply has gone."""
    wait_until("nothing is in flight", lambda: export(farm, name)["in_flight"] == 0)
    return export(farm, name)


def work(nbd: Transmission, length: int) -> None:
    """Every kind of request, each ROUNDS times."""
    for number in range(ROUNDS):
        nbd.write(number * length, bytes([number + 1]) * length)
        assert nbd.read(number * length, length) == bytes([number + 1]) * length
        nbd.zero(8 * MiB + number * length, length)
        nbd.trim(12 * MiB + number * length, length)
        nbd.call(w.CMD_CACHE, 0, length).check()
        nbd.flush()
        with pytest.raises(NbdError):
            nbd.read(16 * MiB, length)


def grown(after: JsonDict, before: JsonDict) -> dict[str, int]:
    """What was added to each counter."""
    names = [name for name, value in after.items() if isinstance(value, int) and name not in ("epoch", "connections")]
    return {name: after[name] - before[name] for name in names}


@pytest.mark.parametrize(("name", "datastore"), [("root", "main"), ("fast", "memory")])
def test_every_request_is_counted_once(farm: Farm, name: str, datastore: str) -> None:
    length = LENGTHS[name]
    before, below = settled(farm, name), store(farm, datastore)
    requests = sum(one["requests"] for one in host(farm)["reactors"])
    with farm.open(name) as one, farm.open(name, "simple") as two:
        assert export(farm, name)["connections"] == 2
        for nbd in (one, two):  # on both reactors
            work(nbd, length)
        after = settled(farm, name)
    n = 2 * ROUNDS
    assert grown(after, before) == {
        "reads": n, "writes": n, "flushes": n, "trims": n, "zeroes": n, "others": n, "errors": n,
        "read_bytes": n * length, "write_bytes": n * length, "in_flight": 0, "delayed": 0, "delay_ns": 0,
    }  # fmt: skip
    assert grown(store(farm, datastore), below) == {
        "objects": 0, "faults": 0, "reads": n, "writes": n, "zeroes": n, "trims": n, "others": n,
        "syncs": n, "read_bytes": n * length, "write_bytes": n * length, "errors": 0,
    }  # fmt: skip
    assert sum(one["requests"] for one in host(farm)["reactors"]) - requests == 7 * n
    wait_until("both are gone", lambda: export(farm, name)["connections"] == 0)


def test_all_doors_tell_the_same(farm: Farm) -> None:
    with farm.open("root") as nbd:
        nbd.write(0, bytes(4096))
        found = settled(farm, "root")
        status = farm.api("GET", "/v1/status")["counters"][0]
        assert [one for one in status["exports"] if one["vvol"] == "vm1/root"] == [found]
        with farm.client() as client:
            text = client.get("/metrics").text
        scraped = {
            sample.labels.get("type", sample.name): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("vvol") == "vm1/root"
        }
        words = {"read": "reads", "write": "writes", "flush": "flushes", "trim": "trims", "zero": "zeroes"}
        assert {name: scraped[kind] for kind, name in words.items()} == {name: found[name] for name in words.values()}
        assert scraped["nbdvvol_vvol_written_bytes_total"] == found["write_bytes"]
        assert scraped["nbdvvol_vvol_connections"] == 1
        told = farm.cli("describe", "vvol", "root").stdout
        assert f"1 clients; {found['reads']} reads" in told and f"{found['writes']} writes" in told
        line = next(line for line in farm.cli("status").stdout.splitlines() if line.startswith("vm1/root  1 "))
        assert line.split()[3:6] == [f"{found[name]:,}" for name in ("reads", "writes", "flushes")]
        reactors = json.loads(farm.cli("get", "reactors", "-o", "json").stdout)
        assert [(one["host"], one["reactor"]) for one in reactors] == [("local", 0), ("local", 1)]


def test_watching_shows_rates(farm: Farm) -> None:
    command = [sys.executable, "-m", "nbdvvol", "status", "--watch", "--every", "0.2", "--run", str(farm.run)]
    with (
        farm.open("root") as nbd,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching,
    ):
        assert watching.stdout is not None
        seen: list[str] = []
        while len(seen) < 3 or seen[-1] in ("-", "0"):
            line = watching.stdout.readline()
            assert line, "it goes on until it is ended"
            nbd.write(0, bytes(4096))
            if line.startswith("vm1/root"):
                seen.append(line.split()[4])
        assert seen[0] == "-" and float(seen[-1].replace(",", "")) > 0
        watching.terminate()


def test_counters_go_on_over_a_restart_of_control_and_begin_anew_with_a_filter(farm: Farm) -> None:
    with farm.open("root") as nbd:
        nbd.write(0, bytes(4096))
        before = host(farm)
        writes = export(farm, "root")["writes"]
        kill_control(farm)
        nbd.write(0, bytes(4096))
        farm.start_control()
        wait_until("the filter is connected and answers", lambda: connected(farm) and farm.api("GET", "/v1/counters"))
        after = host(farm)
        assert after["instance"] == before["instance"] and after["uptime_s"] > before["uptime_s"]
        assert export(farm, "root")["writes"] == writes + 1
    farm.filters["local"].popen.kill()
    farm.filters["local"].popen.wait(10)
    wait_until("control has noticed", lambda: not connected(farm))
    assert farm.api("GET", "/v1/counters") == []
    farm.start_filter()
    wait_until("the filter is connected and answers", lambda: connected(farm) and farm.api("GET", "/v1/counters"))
    farm.wait_bound("vm1/root")
    assert host(farm)["instance"] != before["instance"] and export(farm, "root")["writes"] == 0


def test_a_datastores_sums_survive_its_objects(farm: Farm) -> None:
    with farm.open("root") as nbd:
        nbd.write(0, bytes(4096))
    before = store(farm, "main")
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/unbind", {}))
    wait_until("the object is closed", lambda: store(farm, "main")["objects"] == 0)
    between = store(farm, "main")
    assert all(between[name] >= before[name] for name in ("reads", "writes", "syncs", "read_bytes", "write_bytes"))
    assert between["syncs"] > before["syncs"], "the last sync before it was let go"
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/bind", {}))
    farm.wait_bound("vm1/root")
    after = store(farm, "main")
    assert after["objects"] == 1 and after["writes"] >= between["writes"] and after["reads"] >= between["reads"]
    assert export(farm, "root")["writes"] == 0


# ---- traces ----


class Tracing:
    """`nbdvvol trace` at work, recording by the time that the block begins."""

    def __init__(self, farm: Farm, name: str, *words: str) -> None:
        command = [sys.executable, "-m", "nbdvvol", "trace", name, *words, "--run", str(farm.run)]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        uuid = farm.vvol(f"vm1/{name.removeprefix('vm1/')}")["uuid"]
        wait_until("it records", lambda: host(farm)["tracing"] == uuid or self.child.poll() is not None)
        assert self.child.poll() is None, self.child.communicate()[1]

    def result(self) -> str:
        """What it printed at its end."""
        out, err = self.child.communicate(timeout=60)
        assert self.child.returncode == 0, err
        return out


@pytest.mark.parametrize("name", ["root", "fast"])
def test_a_known_sequence_is_traced(farm: Farm, name: str) -> None:
    sequence = [
        (w.CMD_WRITE, 8192, 4096, 0, "write", [], 0),
        (w.CMD_WRITE, 0, 512, w.CMD_FLAG_FUA, "write", ["fua"], 0),
        (w.CMD_READ, 8192, 4096, 0, "read", [], 0),
        (w.CMD_READ, 16 * MiB, 512, 0, "read", [], w.EINVAL),
        (w.CMD_WRITE, 1 * MiB, 600 * KiB, 0, "write", [], 0),
        (w.CMD_READ, 1 * MiB, 600 * KiB, 0, "read", [], 0),
        (w.CMD_WRITE_ZEROES, 4096, 4096, w.CMD_FLAG_NO_HOLE, "write-zeroes", ["no-hole"], 0),
        (w.CMD_TRIM, 4096, 4096, 0, "trim", [], 0),
        (w.CMD_BLOCK_STATUS, 0, 1 * MiB, 0, "block-status", [], 0),
        (w.CMD_FLUSH, 0, 0, 0, "flush", [], 0),
    ]
    with farm.open(name) as nbd:
        nbd.read(0, 512)
        tracing = Tracing(farm, f"vm1/{name}", "--count", str(len(sequence)), "--seconds", "60", "-o", "json")
        for command, offset, length, flags, *_ in sequence:
            payload = bytes(length) if command == w.CMD_WRITE else None
            nbd.call(command, offset, length, flags=flags, payload=payload)
        found: JsonDict = json.loads(tracing.result())
    assert (found["vvol"], found["host"], found["ended"], found["dropped"]) == (f"vm1/{name}", "local", "count", 0)
    assert found["every"] == 1 and 0 < found["seconds"] < 60
    requests = found["requests"]
    told = [(one["command"], one["offset"], one["length"], one["flags"], one["error"]) for one in requests]
    assert told == [(word, offset, length, flags, error) for _, offset, length, _, word, flags, error in sequence]
    assert len({(one["connection"], one["reactor"]) for one in requests}) == 1
    moments = ("received_ns", "parsed_ns", "submitted_ns", "completed_ns", "sent_ns")
    flat = [one[moment] for one in requests for moment in moments]
    assert flat == sorted(flat) and flat[0] > 0, "one after the other, and each in the order of its moments"
    assert requests[-1]["sent_ns"] < found["seconds"] * 1e9
    by_command = {one["command"]: one for one in found["commands"]}
    assert {word: one["requests"] for word, one in by_command.items()} == {
        "write": 3, "read": 3, "write-zeroes": 1, "trim": 1, "block-status": 1, "flush": 1,
    }  # fmt: skip
    assert by_command["read"]["errors"] == 1 and by_command["read"]["bytes"] == 4096 + 600 * KiB
    assert by_command["flush"]["total"]["max_ns"] == requests[-1]["sent_ns"] - requests[-1]["received_ns"]


def test_a_trace_leaves_others_and_the_rest_out(farm: Farm) -> None:
    with farm.open("root") as nbd, farm.open("fast") as other:
        tracing = Tracing(farm, "root", "--seconds", "2", "--every", "2", "-o", "json")
        for number in range(10):
            nbd.write(number * 512, bytes(512))
            other.write(0, bytes(512))
        found: JsonDict = json.loads(tracing.result())
    assert found["ended"] == "seconds" and found["seconds"] >= 2
    assert [one["offset"] // 512 for one in found["requests"]] == [0, 2, 4, 6, 8]
    assert host(farm)["tracing"] == ""


def test_a_table_for_people(farm: Farm) -> None:
    with farm.open("root") as nbd:
        tracing = Tracing(farm, "root", "--count", "3")
        nbd.write(0, bytes(4096))
        nbd.write(0, bytes(4096), flags=w.CMD_FLAG_FUA)
        nbd.flush()
        lines = tracing.result().splitlines()
    assert lines[0].startswith("vm1/root on host local: 3 recorded in") and lines[0].endswith("ended at --count 3")
    cells = [line.split() for line in lines]
    assert ["COMMAND", "REQUESTS", "ERRORS", "BYTES", "STAGE", "P50", "P90", "P99", "MAX"] in cells
    assert ["write", "2", "0", "8KiB", "parse"] in [row[:5] for row in cells]
    assert ["flush", "1", "0", "0B", "parse"] in [row[:5] for row in cells]
    assert "slowest of 3:" in lines


def refused(farm: Farm, *words: str) -> str:
    """The error line of a trace that is refused."""
    done = farm.cli("trace", *words, check=False)
    assert done.returncode == 1 and done.stdout == "", done
    return str(done.stderr)


def test_why_there_is_no_trace(farm: Farm) -> None:
    assert refused(farm, "nix") == "error: NOT_FOUND: no VVol nix -- list them: nbdvvol get vvols\n"
    tracing = Tracing(farm, "root", "--seconds", "30")
    busy = refused(farm, "fast")
    assert busy.startswith("error: BUSY: host local cannot trace VVol vm1/fast: another trace runs on this host")
    tracing.child.terminate()
    tracing.child.communicate(timeout=30)
    wait_until("the trace ends with its client", lambda: host(farm)["tracing"] == "")
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/unbind", {}))
    assert refused(farm, "root").startswith("error: UNAVAILABLE: VVol vm1/root is bound to no host")
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/bind", {}))
    farm.wait_bound("vm1/root")
    farm.filters["local"].popen.kill()
    farm.filters["local"].popen.wait(10)
    wait_until("control has noticed", lambda: not connected(farm))
    assert refused(farm, "root").startswith("error: UNAVAILABLE: the filter of host local is not connected")
    assert farm.cli("trace", "root", "--seconds", "61", check=False).returncode == 2


def test_a_trace_ends_when_its_vvol_leaves(farm: Farm) -> None:
    tracing = Tracing(farm, "root", "--seconds", "60", "-o", "json")
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/unbind", {}))
    found: dict[str, Any] = json.loads(tracing.result())
    assert found["ended"] == "closed" and found["requests"] == []
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/bind", {}))
