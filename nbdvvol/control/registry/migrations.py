"""Steps from one schema version to the next. Each runs in a transaction of its own with the version it leads to."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from nbdvvol.control.registry.schema import SCHEMA_VERSION
from nbdvvol.model.errors import Code, NvError

STEPS: dict[int, Callable[[Connection], None]] = {}
"""Version → the step that leads from it to the next. Version 1 is the first, so there is none yet."""


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
