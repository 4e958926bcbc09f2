"""`nbdvvol up`: starts, comes back, gives up clearly, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.lib.farm import Farm, plain_spec
from tests.lib.procs import Process, children, run, running, wait_until

Farms = Callable[..., Farm]
PF_MEMALLOC_NOIO = 0x00080000
"""A thread's flag in /proc/PID/stat that PR_SET_IO_FLUSHER sets."""


def up(farm: Farm, *more: str) -> Process:
    words = ["up", "-f", str(farm.file), "--state", str(farm.state), "--run", str(farm.run), *more]
    return Process([sys.executable, "-m", "nbdvvol", *words], farm.folder / "other.log")


def test_it_prints_each_export_then_ready(farms: Farms) -> None:
    farm = farms(plain_spec(vvols={"b": {"size": "1MiB"}, "a": {"size": "2MiB", "profile": "plain"}})).start()
    lines = [line for line in farm.up.text().splitlines() if line.startswith(("vm1/", "    ", "ready"))]
    assert lines[0] == f"vm1/b  1MiB  {farm.uri('b')}"
    assert lines[2] == f"vm1/a  2MiB  {farm.uri('a')}"
    assert "qemu" in lines[1] or "attach vm1/b" in lines[1]
    assert lines[4] == "ready"


def test_a_hosts_reactors_run_where_its_file_says(farms: Farms) -> None:
    here = min(os.sched_getaffinity(0))
    farm = farms(plain_spec(hosts={"local": {"reactors": 1, "first_cpu": here}})).start()
    threads = [int(task.name) for task in Path(f"/proc/{farm.filter_pid()}/task").iterdir()]
    assert {here} in [os.sched_getaffinity(thread) for thread in threads]


def test_a_filter_never_waits_for_memory_that_it_must_free_itself(farms: Farms) -> None:
    """It locks its memory, and its reactors are I/O flushers, where this user may: then this process may too."""
    pid = farms(plain_spec()).start().filter_pid()
    locked = re.search(r"^VmLck:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    stats = [task.read_text().rpartition(")")[2].split() for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    flushers = [bool(int(stat[6]) & PF_MEMALLOC_NOIO) for stat in stats]
    assert locked is not None and (int(locked[1]) > 10_000) == may("mlockall(1 | 2 | 4)")
    assert any(flushers) == may("prctl(57, 1, 0, 0, 0)"), "57 is PR_SET_IO_FLUSHER"


def may(call: str) -> bool:
    """Whether a process like this one is allowed a call of the C library."""
    return run([sys.executable, "-c", f"import ctypes; print(ctypes.CDLL(None).{call})"]).stdout.strip() == "0"


def test_a_second_up_is_refused_at_once(farms: Farms) -> None:
    farm = farms(plain_spec()).start()
    second = up(farm)
    assert second.popen.wait(60) == 1
    assert f"error: BUSY: process {farm.up.pid} runs a farm in {farm.run} already" in second.text()
    with farm.open("root") as client:
        client.read(0, 512)


def test_children_that_die_are_started_again(farms: Farms) -> None:
    farm = farms(plain_spec()).start()
    for role in ("filter", "control"):
        pid = farm.filter_pid() if role == "filter" else farm.control_pid
        os.kill(pid, signal.SIGKILL)
        wait_until(
            f"another {role}", lambda pid=pid: pid not in children(farm.up.pid) and len(children(farm.up.pid)) == 2
        )
        wait_until("control answers", farm.api_answers)
        with farm.open("root", wait_s=60) as client:
            client.read(0, 512)
        assert "ended by SIGKILL; starting it again" in farm.up.text()


def test_killed_it_leaves_nothing_and_comes_back_at_once(farms: Farms) -> None:
    farm = farms(plain_spec()).start()
    with farm.open("root") as client:
        client.write(4096, b"kept" * 1024)
    for _ in range(3):
        offspring = children(farm.up.pid)
        assert len(offspring) == 2
        os.kill(farm.up.pid, signal.SIGKILL)
        farm.up.popen.wait(60)
        farm.start()
        assert not [pid for pid in offspring if running(pid)]
        with farm.open("root") as client:
            assert client.read(4096, 4096) == b"kept" * 1024


def test_interrupt_ends_filters_first_and_cleanly(farms: Farms) -> None:
    farm = farms(plain_spec()).start()
    offspring = children(farm.up.pid)
    farm.up.signal(signal.SIGINT)
    assert farm.up.popen.wait(60) == 0
    assert not [pid for pid in offspring if running(pid)]
    text = farm.up.text()
    assert text.index("stopped") < text.index("control stops")
    assert not farm.socket().exists()


def test_stopping_while_it_starts(farms: Farms) -> None:
    farm = farms(plain_spec())
    farm.begin()
    wait_until("control runs", lambda: children(farm.up.pid))
    farm.up.signal(signal.SIGTERM)
    assert farm.up.popen.wait(60) == 0
    assert not farm.strays()


def test_a_bad_farm_file_starts_nothing(farms: Farms) -> None:
    farm = farms(plain_spec())
    farm.file.write_text("vms: {vm1: {hots: local}}\n")
    process = up(farm)
    assert process.popen.wait(60) == 1
    assert "unknown key; did you mean host?" in process.text()
    assert not farm.state.exists()


def test_what_control_refuses_ends_it(farms: Farms) -> None:
    farm = farms(plain_spec()).start()
    farm.stop()
    spec = plain_spec()
    spec["datastores"]["main"]["path"] = "elsewhere.img"
    farm.write_file(spec)
    process = up(farm)
    assert process.popen.wait(60) == 1
    assert re.search(r"^error: [A-Z_]+: .*datastore main", process.text(), re.MULTILINE), process.text()
    assert not children(process.pid)


def test_a_path_too_long_for_a_socket_is_told(farms: Farms, tmp_path: Path) -> None:
    farm = farms(plain_spec())
    run_dir = tmp_path / ("x" * 100)
    words = ["up", "-f", str(farm.file), "--state", str(farm.state), "--run", str(run_dir)]
    result = run([sys.executable, "-m", "nbdvvol", *words], check=False)
    assert result.returncode == 1
    assert "error: TOO_LARGE: the socket path" in result.stderr and "the limit of unix sockets is 107" in result.stderr


def test_a_broken_registry_is_refused_and_kept(farms: Farms) -> None:
    farm = farms(plain_spec()).start()
    farm.stop()
    registry = farm.state / "registry.db"
    for path in farm.state.glob("registry.db-*"):
        path.unlink()
    registry.write_bytes(b"\x5a" * 8192)
    process = up(farm)
    assert process.popen.wait(60) == 1
    assert "registry" in process.text()
    assert registry.read_bytes() == b"\x5a" * 8192


def test_one_missing_datastore_harms_no_other(farms: Farms) -> None:
    vvols = {"root": {"size": "1MiB", "datastore": "main"}, "far": {"size": "1MiB", "datastore": "nas"}}
    spec = plain_spec(vvols=vvols)
    spec["datastores"]["nas"] = {"kind": "dir", "path": "nas"}
    farm = farms(spec)
    (farm.folder / "nas").mkdir()
    farm.start()
    farm.stop()
    (farm.folder / "nas").rename(farm.folder / "unmounted")
    farm.begin()
    wait_until("the good one is served", lambda: f"vm1/root  1MiB  {farm.uri('root')}" in farm.up.text(), 60)
    wait_until("the other is told about", lambda: "waiting: vm1/far" in farm.up.text(), 60)
    with farm.open("root") as client:
        client.write(0, b"x" * 512)
    (farm.folder / "unmounted").rename(farm.folder / "nas")
    farm.wait_ready(60)
    with farm.open("far") as client:
        client.read(0, 512)


def test_a_vvol_that_cannot_be_made_is_told_and_the_others_are_ready(farms: Farms) -> None:
    spec = plain_spec(vvols={"root": {"size": "1MiB"}, "huge": {"size": "9TiB"}})
    farm = farms(spec)
    farm.start()
    text = farm.up.text()
    assert "error: create vm1/huge: NO_SPACE" in text
    assert "error: vm1/huge is not served: it could not be created: NO_SPACE" in text
    assert "apply it, or: nbdvvol delete vvol vm1/huge" in text[: text.index("\nready")]
    with farm.open("root") as client:
        client.write(0, b"kept" * 128)
    told = farm.cli("apply", str(farm.file), check=False)
    assert told.returncode == 1 and "NO_SPACE" in told.stderr, "it is tried again, and fails again"
    farm.stop()
    farm.start()
    assert "error: vm1/huge is not served" in farm.up.text()
    spec["vms"]["vm1"]["vvols"]["huge"]["size"] = "2MiB"
    farm.write_file(spec)
    assert "try again to create it: 2MiB on datastore main" in farm.cli("apply", str(farm.file)).stdout
    with farm.open("huge") as client:
        assert client.size == 2 << 20 and not any(client.read(0, 2 << 20))
    assert farm.cli("status", "-x").stdout.strip() == "all is well"
    farm.stop()
    farm.start()
    assert "error" not in farm.up.text()
    with farm.open("root") as client:
        assert client.read(0, 512) == b"kept" * 128


def test_two_hosts_run_side_by_side(farms: Farms) -> None:
    spec = plain_spec(hosts={"alpha": {}, "beta": {}})
    spec["datastores"] = {"main": {"kind": "dir", "path": "pool"}}
    spec["vms"] = {
        "vm1": {"host": "alpha", "vvols": {"root": {"size": "1MiB"}}},
        "vm2": {"host": "beta", "vvols": {"root": {"size": "1MiB"}}},
    }
    farm = farms(spec)
    (farm.folder / "pool").mkdir()
    farm.start()
    assert farm.socket("vm1").exists()
    assert farm.socket("vm2", farm.run / "hosts" / "beta").exists()
    assert farm.cli("uri", "vm2/root").stdout.strip().endswith("/hosts/beta/vms/vm2.sock")


def test_a_remote_hosts_filter_is_not_started(farms: Farms) -> None:
    spec = plain_spec(hosts={"local": {}, "away": {"remote": True}})
    spec["vms"]["vm1"]["host"] = "local"
    farm = farms(spec).start()
    assert len(children(farm.up.pid)) == 2
    assert "HOST_DOWN away" in farm.cli("status", "-x", check=False).stdout
