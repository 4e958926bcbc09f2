"""Fencing at a real filter: a newer claim ends whoever has an older one, and goes on to after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from nbdvvol.filter.claims import EPOCHS_FILE
from nbdvvol.nbd.claims import EPOCH_CONTEXT, Claim
from tests.lib import nbdwords as w
from tests.lib.farm import Farm, plain_spec
from tests.lib.procs import wait_until
from tests.lib.rawio import NbdError, Transmission, open_export
from tests.lib.rawnbd import Closed, OptionRefused

pytestmark = pytest.mark.timeout(120)
MakeFarm = Callable[..., Farm]
MIRROR = "5f0c2b7e-9a41-4c6d-8f3e-1b2a3c4d5e6f"
OLD, NEW = b"old data" * 512, b"new data" * 512


def claim(epoch: int, attempt: int = 0) -> str:
    return str(Claim(MIRROR, 1, epoch, attempt))


def enter(farm: Farm, *queries: str) -> Transmission:
    return open_export(farm.socket(), "root", "structured", queries)


def test_a_newer_claim_ends_older_connections_for_good(farms: MakeFarm) -> None:
    farm = farms(plain_spec()).start()
    plain = enter(farm)
    old = enter(farm, EPOCH_CONTEXT, claim(3))
    with pytest.raises(Closed):  # it knew nothing of claims, and could write
        plain.write(0, OLD)
    second = enter(farm, EPOCH_CONTEXT, claim(3))
    old.write(0, OLD)
    second.write(4096, OLD)
    new = enter(farm, EPOCH_CONTEXT, claim(3, attempt=1))
    for gone in (old, second):
        with pytest.raises(Closed):
            gone.write(0, OLD)
    assert new.read(0, 8192) == OLD + OLD
    new.write(0, NEW)
    new.flush()
    with pytest.raises(OptionRefused, match=r"under epoch 3 \(attempt 1\) now"):
        enter(farm, EPOCH_CONTEXT, claim(3))
    reader = enter(farm)
    assert reader.agreed.facts.flags & w.TFLAG_READ_ONLY and reader.read(0, 4096) == NEW
    with pytest.raises(NbdError):
        reader.write(0, OLD)
    farm.kill_everything()
    farm.start()
    assert json.loads((farm.run / EPOCHS_FILE).read_text())["exports"][farm.vvol("vm1/root")["uuid"]]
    with pytest.raises(OptionRefused, match="under epoch 3"):
        enter(farm, EPOCH_CONTEXT, claim(2))
    enter(farm, EPOCH_CONTEXT, claim(4)).write(0, OLD)


def test_what_a_lower_claim_has_in_flight_is_done_before_the_answer(farms: MakeFarm) -> None:
    """Whoever has the newer claim sees all of an old write, or will never see it."""
    farm = farms(plain_spec()).start()
    for epoch in range(1, 9):
        old = enter(farm, EPOCH_CONTEXT, claim(epoch))
        for place in range(64):
            old.send(w.CMD_WRITE, place * 65536, 65536, payload=bytes([epoch]) * 65536)
        new = enter(farm, EPOCH_CONTEXT, claim(epoch, attempt=1))
        seen = [new.read(place * 65536, 65536) for place in range(64)]
        wait_until("its connection has ended", lambda old=old: _ended(old))  # type: ignore[misc]
        assert seen == [new.read(place * 65536, 65536) for place in range(64)]
        new.disconnect()


def _ended(connection: Transmission) -> bool:
    try:
        connection.stream.recv(1 << 16)
    except Closed:
        return True
    return False
