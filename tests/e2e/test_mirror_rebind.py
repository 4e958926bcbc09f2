"""A mirror that moves to another host while its old host is cut off and goes on serving: who is right, and who stops.

Hosts a and b, and control, are network namespaces; legs lie on exports that another farm serves from host b, which
fences by epochs, and on a file that both hosts see, which cannot."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.e2e.test_mirror import local, mirrored
from tests.lib import nbdwords as w
from tests.lib.farm import JsonDict, serves
from tests.lib.ledger import BLOCK, Ledger, Writer
from tests.lib.netfarm import LegFarm, NetFarm, all_in_sync, bring_back, three
from tests.lib.netns import Net
from tests.lib.procs import wait_until
from tests.lib.rawio import NbdError

__all__ = ["three"]
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def far(three: Net) -> Iterator[LegFarm]:
    with LegFarm(three, exports=7) as made:
        made.start_split()
        yield made


def loaded(farm: NetFarm, ledger: Ledger) -> Writer:
    """A load that is under way."""
    writer = Writer(ledger, farm.open("disk"))
    writer.progress(200)
    return writer


def goes_on(farm: NetFarm, ledger: Ledger) -> None:
    """More of the load, where clients are now; it is there, as is what was acknowledged before."""
    loaded(farm, ledger).join()
    verify(farm, ledger)


def on(farm: NetFarm, host: str) -> NetFarm:
    """Clients use this host's sockets from here on."""
    farm.at = host
    return farm


def whole(farm: NetFarm, ledger: Ledger) -> bytes:
    """All that the ledger's part of the export holds, read as it is."""
    with farm.open("disk", wait_s=20) as nbd:
        return nbd.read(ledger.base, ledger.blocks * BLOCK)


def verify(farm: NetFarm, ledger: Ledger) -> None:
    with farm.open("disk", wait_s=20) as nbd:
        ledger.verify(nbd)


def force(farm: NetFarm) -> JsonDict:
    """`bind --force` to host b; the VVol once it is served there."""
    farm.cli("bind", "vm1/disk", "--host", "b", "--force")
    wait_until("host b serves it", lambda: (farm.vvol("vm1/disk")["binding"] or {}).get("host") == "b", 20)
    return farm.wait_bound("vm1/disk")


def ends_with_errors(writer: Writer) -> None:
    """The old host's client hears errors, or its connection ends; nothing else is wrong with it."""
    writer.ended(30)
    failure = writer.failure
    assert failure is None or (isinstance(failure, NbdError) and failure.error in (w.EIO, w.ESHUTDOWN)), failure


def test_a_host_that_only_control_cannot_reach_is_fenced_at_the_legs(three: Net, far: LegFarm) -> None:
    """It acknowledges until the new host claims the legs, and nothing after that; what it acknowledged is there."""
    with NetFarm(three, mirrored(far.store(1), far.store(2), hold="60s")) as farm:
        farm.start_all()
        ledger = Ledger(41)
        writer = loaded(farm, ledger)
        before = farm.vvol("vm1/disk")["epoch"]
        three.cable("control", "a").cut(True)
        writer.progress(200)
        assert force(farm)["epoch"] == before + 1
        ends_with_errors(writer)
        acknowledged = ledger.answered
        wait_until("host a has stopped", lambda: not serves(farm.socket(), "disk"), 20)
        assert ledger.answered == acknowledged
        verify(on(farm, "b"), ledger)
        seen = whole(farm, ledger)
        three.cable("control", "a").cut(False)
        on(farm, "a")
        assert not serves(farm.socket(), "disk")
        assert whole(on(farm, "b"), ledger) == seen
        assert all_in_sync(farm)
        goes_on(farm, ledger)


def test_what_a_frozen_host_still_sends_lands_nowhere(three: Net, far: LegFarm) -> None:
    """It is stopped in the middle of its writes, another host takes over, then it runs on and sends the rest."""
    with NetFarm(three, mirrored(far.store(3), far.store(4), hold="60s")) as farm:
        farm.start_all()
        ledger = Ledger(42)
        writer = loaded(farm, ledger)
        farm.filters["a"].signal(signal.SIGSTOP)
        force(farm)
        verify(on(farm, "b"), ledger)
        seen = whole(farm, ledger)
        farm.filters["a"].signal(signal.SIGCONT)
        ends_with_errors(writer)
        assert whole(farm, ledger) == seen, "a late write of the old host landed"
        assert all_in_sync(farm)
        goes_on(farm, ledger)
        on(farm, "a")
        assert not serves(farm.socket(), "disk")


def test_a_host_that_is_cut_off_from_a_leg_too_acknowledges_nothing(three: Net, far: LegFarm) -> None:
    """Its other leg is a file that cannot keep it out. The hold does: nobody has written down that a leg is lost."""
    with NetFarm(three, mirrored(local("one"), far.store(5), hold="3s")) as farm:
        farm.start_all()
        ledger = Ledger(43)
        writer = loaded(farm, ledger)
        three.cable("control", "a").cut(True)
        three.cable("a", "b").cut(True)
        ends_with_errors(writer)
        answered = ledger.answered
        force(farm)
        verify(on(farm, "b"), ledger)
        seen = whole(farm, ledger)
        with on(farm, "a").open("disk") as nbd:
            assert nbd.call(w.CMD_WRITE, 0, BLOCK, payload=b"x" * BLOCK).error == w.EIO
        assert ledger.answered == answered
        assert whole(on(farm, "b"), ledger) == seen
        three.cable("control", "a").cut(False)
        three.cable("a", "b").cut(False)
        on(farm, "a")
        wait_until("host a has stopped", lambda: not serves(farm.socket(), "disk"), 40)
        assert whole(on(farm, "b"), ledger) == seen
        bring_back(farm)
        goes_on(farm, ledger)


def test_a_lease_ends_and_another_host_takes_over_without_force(three: Net, far: LegFarm) -> None:
    with NetFarm(three, mirrored(far.store(6), far.store(7), hold="60s", lease="5s")) as farm:
        farm.start_all()
        ledger = Ledger(44)
        writer = loaded(farm, ledger)
        three.cable("control", "a").cut(True)
        task = farm.api("POST", "/v1/vvols/vm1/disk/bind", {"host": "b"})
        ends_with_errors(writer)
        on(farm, "a")
        wait_until("host a has stopped", lambda: not serves(farm.socket(), "disk"), 20)
        farm.task(task, timeout_s=60)
        farm.wait_bound("vm1/disk")
        verify(on(farm, "b"), ledger)
        assert all_in_sync(farm)
        three.cable("control", "a").cut(False)
        wait_until("host a answers", lambda: "a" in [one["host"] for one in farm.api("GET", "/v1/counters")], 40)
        on(farm, "a")
        assert not serves(farm.socket(), "disk")
