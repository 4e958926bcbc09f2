"""Steps from one schema version to the next. Each runs in a transaction of its own with the version it leads to."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from nbdvvol.control.registry.schema import SCHEMA_VERSION
from nbdvvol.model.errors import Code, NvError


def _to_2(connection: Connection) -> None:
    """Failed syncs have rows of their own: a datastore's word that one failed becomes one of each host that sees it.

    Which file of a `dir` it was, is not known; its faults say so by naming the whole."""
    for statement in _STEP_1.split(";"):
        connection.exec_driver_sql(statement)


_STEP_1 = """
CREATE TABLE faults (
    id VARCHAR NOT NULL PRIMARY KEY, datastore VARCHAR NOT NULL REFERENCES datastores (name),
    object VARCHAR NOT NULL, host VARCHAR NOT NULL REFERENCES hosts (name), message TEXT NOT NULL,
    time VARCHAR NOT NULL);
ALTER TABLE legs ADD COLUMN fault_host VARCHAR NOT NULL DEFAULT '';
INSERT INTO faults
    SELECT lower(hex(randomblob(16))), d.name, '', h.name, d.detail, strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')
    FROM datastores d, hosts h WHERE d.state = 'faulty' AND d.detail LIKE 'sync failed%';
UPDATE legs SET fault_host = (SELECT host FROM holders WHERE holders.vvol = legs.vvol LIMIT 1)
    WHERE datastore IN (SELECT datastore FROM faults)
    AND EXISTS (SELECT 1 FROM holders WHERE holders.vvol = legs.vvol);
UPDATE datastores SET state = 'online', detail = '' WHERE state = 'faulty' AND detail LIKE 'sync failed%'
"""


def _to_3(connection: Connection) -> None:
    """Mirrors: what is known of each leg, of leases, and which servers can fence. Every VVol has one leg, number 0."""
    for statement in STEP_2.strip().split("\n"):
        connection.exec_driver_sql(statement)


STEP_2 = """
ALTER TABLE datastores ADD COLUMN fences BOOLEAN NOT NULL DEFAULT 0
ALTER TABLE vvols ADD COLUMN mirror BOOLEAN NOT NULL DEFAULT 0
ALTER TABLE vvols ADD COLUMN places TEXT NOT NULL DEFAULT ''
ALTER TABLE vvols ADD COLUMN next_leg INTEGER NOT NULL DEFAULT 1
ALTER TABLE holders ADD COLUMN lease_boot VARCHAR NOT NULL DEFAULT ''
ALTER TABLE holders ADD COLUMN lease_ends INTEGER NOT NULL DEFAULT 0
ALTER TABLE holders ADD COLUMN lease_ms INTEGER NOT NULL DEFAULT 0
ALTER TABLE legs ADD COLUMN life VARCHAR NOT NULL DEFAULT 'live'
ALTER TABLE legs ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0
ALTER TABLE legs ADD COLUMN generation INTEGER NOT NULL DEFAULT 0
ALTER TABLE legs ADD COLUMN resync VARCHAR NOT NULL DEFAULT 'auto'
ALTER TABLE legs ADD COLUMN asked INTEGER NOT NULL DEFAULT 0
ALTER TABLE legs ADD COLUMN lost VARCHAR NOT NULL DEFAULT ''
ALTER TABLE legs ADD COLUMN why TEXT NOT NULL DEFAULT ''
ALTER TABLE legs ADD COLUMN replaces INTEGER
ALTER TABLE legs ADD COLUMN let_go TEXT NOT NULL DEFAULT ''
ALTER TABLE legs ADD COLUMN map_written INTEGER NOT NULL DEFAULT 0
"""


def _to_4(connection: Connection) -> None:
    """What the last comparison of a mirror's legs found."""
    connection.exec_driver_sql(STEP_3)


STEP_3 = "ALTER TABLE vvols ADD COLUMN differed TEXT NOT NULL DEFAULT ''"


def _to_5(connection: Connection) -> None:
    """A leg is tried again at once without the operator's word, too."""
    connection.exec_driver_sql(STEP_4)


STEP_4 = "ALTER TABLE legs ADD COLUMN tries INTEGER NOT NULL DEFAULT 0"


def _to_6(connection: Connection) -> None:
    """Doubts about a leg outlive the filter that has them."""
    connection.exec_driver_sql(STEP_5)


STEP_5 = "ALTER TABLE legs ADD COLUMN doubt BOOLEAN NOT NULL DEFAULT 0"


def _to_7(connection: Connection) -> None:
    """Write-back logs. None can hold data yet."""
    connection.exec_driver_sql(STEP_6)


STEP_6 = """
CREATE TABLE logs (
    vvol VARCHAR NOT NULL PRIMARY KEY REFERENCES vvols (uuid) ON DELETE CASCADE, state VARCHAR NOT NULL DEFAULT 'clean',
    host VARCHAR NOT NULL DEFAULT '', log VARCHAR NOT NULL DEFAULT '', file VARCHAR NOT NULL DEFAULT '',
    epoch INTEGER NOT NULL DEFAULT 0, generation INTEGER NOT NULL DEFAULT 0, since VARCHAR NOT NULL DEFAULT '',
    wish VARCHAR NOT NULL DEFAULT '', discard BOOLEAN NOT NULL DEFAULT 0, given_up INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0, dirty_bytes INTEGER NOT NULL DEFAULT 0, oldest_ms INTEGER NOT NULL DEFAULT 0,
    told VARCHAR NOT NULL DEFAULT '')
"""
STEPS: dict[int, Callable[[Connection], None]] = {1: _to_2, 2: _to_3, 3: _to_4, 4: _to_5, 5: _to_6, 6: _to_7}
"""Version → the step that leads from it to the next."""


def migrate(connection: Connection, found: int, steps: dict[int, Callable[[Connection], None]] | None = None) -> int:
    """Run every step from `found` on; return the version reached. Raises UNSUPPORTED for a newer registry."""
    known = STEPS if steps is None else steps
    newest = max([SCHEMA_VERSION, *(version + 1 for version in known)])
    if found > newest:
        raise NvError(
            Code.UNSUPPORTED,
            f"the registry has schema version {found}; this program knows versions up to {newest}",
            "use a newer nbdvvol; nothing was changed",
        )
    while found < newest:
        step = known.get(found)
        if step is None:
            raise NvError(Code.UNSUPPORTED, f"no way leads from registry schema version {found}", "nothing was changed")
        step(connection)
        found += 1
    return found
