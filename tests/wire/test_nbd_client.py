"""nbd-client (Debian's) as far as it goes without a kernel driver: it lists. Guests attach with it in tests/vm."""

from __future__ import annotations

import pytest

from tests.lib.procs import need, run
from tests.lib.shared import SharedFarm

pytestmark = pytest.mark.timeout(30)


def test_list(shared: SharedFarm) -> None:
    host, port = shared.tcp
    listing = run([need("nbd-client", "nbd-client"), "-l", host, str(port)]).stdout
    names = {line.partition(":")[0] for line in listing.splitlines()}
    assert {"vm1/root", "vm1/ro", "vm2/root", "vm2/private", "vm3/only"} <= names
    assert "vm1/root: the first disk of vm1" in listing
