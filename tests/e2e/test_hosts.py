"""Two hosts in one farm, a filter each: a VVol moves, and is never served twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.lib.farm import START_S, Farm, plain_spec, serves
from tests.lib.ledger import Ledger, Writer
from tests.lib.procs import children, command_line, wait_until
from tests.lib.rawio import open_export

pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]


def two_hosts(farms: MakeFarm) -> Farm:
    """One farm, hosts a and b, a filter each; vm1 lives on a."""
    spec = plain_spec(hosts={"a": {}, "b": {}})
    spec["vms"]["vm1"]["host"] = "a"
    farm = farms(spec)
    farm.start()
    return farm


def socket_of(farm: Farm, name: str) -> Path:
    """The unix socket in a VVol's URI."""
    return Path(parse_qs(urlsplit(farm.vvol(name)["uri"]).query)["socket"][0])


def move(farm: Farm, name: str, host: str) -> None:
    """Unbind, then bind to another host."""
    farm.task(farm.api("POST", f"/v1/vvols/{name}/unbind", {}))
    farm.task(farm.api("POST", f"/v1/vvols/{name}/bind", {"host": host}))
    farm.wait_bound(name)


def test_a_vvol_moves_between_two_hosts(farms: MakeFarm) -> None:
    farm = two_hosts(farms)
    ledger = Ledger(9)
    epochs = [farm.vvol("vm1/root")["epoch"]]
    for host in ("b", "a", "b"):
        here = socket_of(farm, "vm1/root")
        writer = Writer(ledger, open_export(here, "root"))
        writer.progress(100)
        move(farm, "vm1/root", host)
        writer.join()
        assert not serves(here, "root"), "the old host still serves it"
        there = socket_of(farm, "vm1/root")
        assert there != here and farm.vvol("vm1/root")["binding"]["host"] == host
        with open_export(there, "root") as nbd:
            ledger.verify(nbd)
        epochs.append(farm.vvol("vm1/root")["epoch"])
    assert epochs == sorted(set(epochs)), f"epochs only grow: {epochs}"


def test_two_hosts_never_serve_one_vvol(farms: MakeFarm) -> None:
    """The old host's filter does not answer: the move waits for its release."""
    farm = two_hosts(farms)
    here = socket_of(farm, "vm1/root")
    pid = next(pid for pid in children_named(farm, "a"))
    os.kill(pid, signal.SIGSTOP)
    try:
        task = farm.api("POST", "/v1/vvols/vm1/root/unbind", {})
        time.sleep(2)
        assert farm.api("GET", f"/v1/tasks/{task['task']['id']}")["state"] in ("queued", "running")
        assert not serves(farm.run / "hosts" / "b" / "vms" / "vm1.sock", "root")
    finally:
        os.kill(pid, signal.SIGCONT)
    farm.task(task)
    wait_until("the old host let go", lambda: not serves(here, "root"), 10)
    farm.task(farm.api("POST", "/v1/vvols/vm1/root/bind", {"host": "b"}))
    farm.wait_bound("vm1/root")
    assert serves(socket_of(farm, "vm1/root"), "root")


def children_named(farm: Farm, host: str) -> list[int]:
    """Process ids of a host's filter under `up`."""
    assert farm.up is not None
    found = []
    for pid in children(farm.up.pid):
        words = command_line(pid)
        if "filter" in words and words[words.index("--host") + 1] == host:
            found.append(pid)
    return found


@pytest.fixture
def split(farms: MakeFarm) -> Farm:
    """Hosts a and b, whose filters are started and stopped one by one; vm1 lives on a and is served."""
    spec = plain_spec(hosts={"a": {"remote": True}, "b": {"remote": True}})
    spec["vms"]["vm1"]["host"] = "a"
    farm = farms(spec)
    farm.start_control()
    farm.apply()
    start(farm, "a")
    start(farm, "b")
    farm.wait_bound("vm1/root", START_S)
    return farm


def start(farm: Farm, host: str) -> None:
    run = farm.run / "hosts" / host
    run.mkdir(parents=True, exist_ok=True)
    farm.start_filter(host, run)


def test_a_vvol_leaves_a_cleanly_stopped_host_without_force(split: Farm) -> None:
    ledger = Ledger(13)
    here = socket_of(split, "vm1/root")
    writer = Writer(ledger, open_export(here, "root"))
    writer.progress(100)
    before = split.vvol("vm1/root")["epoch"]
    split.filters["a"].stop()
    writer.join()
    binding = split.vvol("vm1/root")["binding"]
    assert (binding["host"], binding["epoch"], binding["state"]) == ("a", before, "assigned")
    assert "nothing of the 1 VVols bound to it runs there" in split.cli("status", "-x", check=False).stdout
    assert split.cli("bind", "vm1/root", "--host", "b").stdout.strip() == "vm1/root bound"
    assert split.wait_bound("vm1/root")["epoch"] == before + 1
    with open_export(socket_of(split, "vm1/root"), "root") as nbd:
        ledger.verify(nbd)

    start(split, "a")  # it comes back, and finds that nothing is its own any more
    wait_until("host a is connected", lambda: all(h["connected"] for h in split.api("GET", "/v1/hosts")))
    assert not serves(here, "root") and serves(socket_of(split, "vm1/root"), "root")


def test_a_vvol_stays_with_a_stopped_host_that_comes_back(split: Farm) -> None:
    before = split.vvol("vm1/root")["epoch"]
    split.filters["a"].stop()
    start(split, "a")
    assert split.wait_bound("vm1/root")["epoch"] == before + 1
    assert serves(socket_of(split, "vm1/root"), "root")


def test_a_vvol_of_a_killed_host_waits_for_force(split: Farm) -> None:
    split.filters["a"].popen.send_signal(signal.SIGKILL)
    split.filters["a"].popen.wait(10)
    task = split.api("POST", "/v1/vvols/vm1/root/bind", {"host": "b"})
    time.sleep(1)
    assert split.api("GET", f"/v1/tasks/{task['task']['id']}")["detail"] == "waits for host a to release it"
    split.cli("bind", "vm1/root", "--host", "b", "--force")
    split.task(task)
    split.wait_bound("vm1/root")
    assert serves(socket_of(split, "vm1/root"), "root")


def test_two_farms_never_share_a_datastore(farms: MakeFarm) -> None:
    """A second farm that names the first one's file is refused; the first is unharmed."""
    first = farms(plain_spec())
    first.start()
    writer = Writer(Ledger(11), first.open("root"))
    writer.progress()
    spec = plain_spec()
    spec["datastores"]["main"]["path"] = str(first.folder / "main.img")
    second = farms(spec)
    second.begin()
    wait_until("the second farm says why it waits", lambda: second.up is not None and "main" in second.up.text(), 40)
    time.sleep(1)
    assert not serves(second.socket(), "root")
    second.kill_everything()
    writer.progress(100)
    writer.join()
    with first.open("root") as nbd:
        writer.ledger.verify(nbd)
