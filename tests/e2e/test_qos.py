"""Limits of a running farm: in force from the first request, changed by `apply` while clients wait, told by the CLI.

A limit of one I/O a second stands for "waits until something happens": nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.lib import nbdwords as w
from tests.lib.farm import Farm, JsonDict, plain_spec
from tests.lib.procs import wait_until
from tests.lib.rawio import Transmission
from tests.lib.rawnbd import Closed

pytestmark = pytest.mark.timeout(120)
CRAWL = {"iops": 1, "burst": "1ms"}


def spec(qos: JsonDict | None) -> JsonDict:
    """vm1/slow under the profile slow, vm1/root under another."""
    whole = plain_spec()
    whole["profiles"]["slow"] = {"qos": qos} if qos else {}
    whole["vms"]["vm1"]["vvols"]["slow"] = {"size": "4MiB", "profile": "slow"}
    return whole


@pytest.fixture
def farm(farms: Callable[..., Farm]) -> Farm:
    farm = farms(spec(CRAWL))
    farm.start()
    farm.wait_bound("vm1/slow")
    return farm


def apply(farm: Farm, qos: JsonDict | None, *options: str) -> dict[str, tuple[str, str]]:
    farm.write_file(spec(qos))
    out = farm.cli("apply", "-f", str(farm.file), "-o", "json", *options).stdout
    return {f"{one['kind']} {one['name']}": (one["action"], one["detail"]) for one in json.loads(out)["changes"]}


def counters(farm: Farm, name: str) -> dict[str, Any]:
    (host,) = farm.api("GET", "/v1/counters")
    (found,) = [one for one in host["exports"] if one["vvol"] == f"vm1/{name}"]
    return dict(found)


def waiting(farm: Farm, client: Transmission, count: int) -> list[int]:
    """Reads of which the first is answered and the others wait."""
    cookies = [client.send(w.CMD_READ, i * 4096, 4096) for i in range(count)]
    wait_until("one waits", lambda: counters(farm, "slow")["delayed"] >= 1)
    return cookies


def test_limits_change_under_clients_that_wait(farm: Farm) -> None:
    """Without being reconnected, and with nobody else disturbed."""
    with farm.open("slow") as client, farm.open("root") as other:
        cookies = waiting(farm, client, 60)
        generation = farm.vvol("vm1/slow")["generation"]
        for i in range(50):
            other.write(i * 512, b"x" * 512)
        words = "qos: iops 1, burst 1ms, shares 100 → iops 100000, burst 100ms, shares 100"
        dry = apply(farm, {"iops": 100_000}, "--dry-run")
        assert dry["profile slow"] == ("update", words) and dry["vvol vm1/slow"] == ("update", words)
        assert farm.vvol("vm1/slow")["qos"]["iops"] == 1
        done = apply(farm, {"iops": 100_000})
        assert done == dry
        for cookie in cookies:  # at one a second it would take a minute, longer than the client waits
            client.wait(cookie).check()
        assert farm.vvol("vm1/slow")["generation"] == generation
        seen = counters(farm, "slow")
        assert seen["delayed"] >= 1 and seen["delay_ns"] > 0 and seen["connections"] == 1
        assert counters(farm, "root")["delayed"] == 0
        assert set(apply(farm, {"iops": 100_000}).values()) <= {("keep", "")}


def test_limits_come_and_go(farm: Farm) -> None:
    with farm.open("slow") as client:
        apply(farm, None)
        wait_until("the limits are gone", lambda: farm.vvol("vm1/slow")["qos"] is None)
        for i in range(30):
            client.read(i * 4096, 4096)
        apply(farm, CRAWL)
        waiting(farm, client, 3)


def test_the_command_line_tells_limits(farm: Farm) -> None:
    assert "iops 1, burst 1ms, shares 100" in farm.cli("describe", "vvol", "vm1/slow").stdout
    free = farm.cli("describe", "vvol", "vm1/root").stdout.splitlines()
    assert [line.split()[-1] for line in free if line.startswith("qos")] == ["none"]
    assert "iops 1, burst 1ms, shares 100" in farm.cli("get", "profiles").stdout


def test_deleting_and_stopping_wait_for_no_limit(farm: Farm) -> None:
    with farm.open("slow") as client:
        waiting(farm, client, 20)
        farm.delete("vm1/slow")
        errors = []
        with contextlib.suppress(Closed):
            while True:
                errors.append(client.wait_any()[1].error)
        assert errno.ESHUTDOWN in errors and set(errors) <= {0, errno.ESHUTDOWN}


def test_a_restarted_filter_knows_the_limits(farms: Callable[..., Farm]) -> None:
    farm = farms(spec(CRAWL))
    farm.start_split()
    farm.wait_bound("vm1/slow")
    farm.filters["local"].kill_group()
    farm.start_filter()
    with farm.open("slow", wait_s=20) as client:
        waiting(farm, client, 3)
