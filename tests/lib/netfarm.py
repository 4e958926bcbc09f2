"""A farm whose control and two hosts are three machines: network namespaces, joined by cables that can be cut.

Filters speak to control by TLS over their cable. `LegFarm` is somebody else's farm on host b's machine, which serves
remote legs. All of them see one file system, as hosts with a shared one do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lib.farm import ApiError, Farm, JsonDict
from tests.lib.netns import Net, net
from tests.lib.pki import Authority
from tests.lib.procs import Process, short_dir, wait_until

CONTROL, HOSTS = "control", ("a", "b")
CONTROL_PORT, LEG_PORT = 8443, 10809


@pytest.fixture(scope="module")
def three() -> Iterator[Net]:
    """Control and both hosts, with all their cables."""
    with net(CONTROL, *HOSTS) as made:
        yield made


class NetFarm(Farm):
    """Hosts a and b, and control; `at` is the host whose sockets clients use."""

    def __init__(self, net: Net, spec: JsonDict) -> None:
        folder = short_dir()
        self.net = net
        self.at = HOSTS[0]
        self._pki = folder / "pki"
        addresses = [net.cable(CONTROL, host).near_address for host in HOSTS]
        Authority("nbdvvol test authority").issue(self._pki, "server", "control", addresses=addresses)
        tls = {"cert": str(self._pki / "server-cert.pem"), "key": str(self._pki / "server-key.pem")}
        listen = {"listen": f"https://0.0.0.0:{CONTROL_PORT}", "tls": tls, "tokens": "tokens"}
        for vm in spec["vms"].values():
            vm.setdefault("host", HOSTS[0])
        super().__init__({"control": listen, "hosts": {host: {"remote": True} for host in HOSTS}, **spec}, folder)
        (folder / "tokens").write_text(f"operator operator-{'7' * 32}\n")
        (folder / "tokens").chmod(0o600)
        self.inside = {"control": net.enter(CONTROL)} | {f"filter-{host}": net.enter(host) for host in HOSTS}

    def start_filter(self, host: str = HOSTS[0], run: Path | None = None, *, control: str | None = None) -> Process:
        """In its namespace, with the link over its cable."""
        run = run or self.run_of(host)
        run.mkdir(parents=True, exist_ok=True)
        address = self.net.cable(CONTROL, host).near_address
        self.link = [f"https://{address}:{CONTROL_PORT}", "--ca", str(self._pki / "ca-cert.pem")]
        return super().start_filter(host, run, control=control)

    def start_all(self, *hosts: str) -> NetFarm:
        """Control, the farm applied, these hosts' filters, every VVol served."""
        self.start_control()
        self.apply()
        for host in hosts or HOSTS:
            self.start_filter(host)
        self.wait_served()
        return self

    def run_of(self, host: str) -> Path:
        """A host's run directory."""
        return self.run / "hosts" / host

    def socket(self, vm: str = "vm1", run: Path | None = None) -> Path:
        """A VM's socket on the host `at`, or in a run directory."""
        return super().socket(vm, run or self.run_of(self.at))


class LegFarm(Farm):
    """A farm of its own, whose filter runs on host b and serves whole files by TCP to hosts a and b."""

    def __init__(self, net: Net, exports: int = 1, size: int = 64 << 20) -> None:
        folder = short_dir()
        self.address = net.cable(*HOSTS).far_address
        listen = {"address": f"{self.address}:{LEG_PORT}", "tls": "none", "plaintext": True}
        spec: JsonDict = {"hosts": {"local": {"listen": listen}}, "datastores": {}, "vms": {"far": {"vvols": {}}}}
        for number in range(1, exports + 1):
            file = folder / f"leg{number}.img"
            with file.open("wb") as out:
                out.truncate(size)
            spec["datastores"][f"file{number}"] = {"kind": "file", "path": str(file)}
            spec["vms"]["far"]["vvols"][f"e{number}"] = {"adopt": {"datastore": f"file{number}"}}
        super().__init__(spec, folder)
        self.inside = {"filter-local": net.enter(HOSTS[1])}

    def store(self, number: int = 1, **more: Any) -> tuple[str, JsonDict]:
        """A datastore on one of its exports, for a farm file."""
        uri = f"nbd://{self.address}:{LEG_PORT}/far/e{number}"
        return f"far{number}", {"kind": "nbd", "uri": uri, "timeout": "2s", "hold": "1s", "connections": 2} | more


def all_in_sync(farm: Farm, name: str = "vm1/disk") -> bool:
    """Whether every leg of a mirror counts."""
    return set(states(farm, name).values()) == {"in-sync"}


def states(farm: Farm, name: str = "vm1/disk") -> dict[str, str]:
    """By datastore, what the registry has of a VVol's legs."""
    return {leg["datastore"]: leg["state"] for leg in farm.vvol(name)["legs"]}


def bring_back(farm: Farm, name: str = "vm1/disk", timeout_s: float = 60.0) -> None:
    """Wait until every leg is in sync; an operator in a hurry asks for it, once a second, of those that are stale."""
    end = time.monotonic() + timeout_s
    while not all_in_sync(farm, name):
        for store, state in states(farm, name).items():
            if state == "stale":
                with contextlib.suppress(ApiError):  # it came back meanwhile
                    farm.api("POST", f"/v1/vvols/{name}/legs/{store}/resync", {})
        with contextlib.suppress(TimeoutError):
            wait_until("every leg is in sync", lambda: all_in_sync(farm, name), 1.0)
        assert time.monotonic() < end, f"not in sync within {timeout_s} s: {farm.vvol(name)['legs']}"
