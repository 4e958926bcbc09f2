"""Leases: how long a filter that control cannot reach may go on serving a mirrored VVol.

A filter's time runs from before it asked, control's from after that, so that the filter's ends first; `MARGIN` is for
clocks that do not run alike. Control's machine may have been started anew since a lease was given: then nobody knows
how long ago that was, and it counts from the moment when control looks first.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select, update

from nbdvvol.control.clock import Moment
from nbdvvol.control.registry import schema as s
from nbdvvol.control.registry.tx import Tx, transaction
from nbdvvol.control.registry.views import HELD, NO_POLICY, profile_specs

MARGIN, MARGIN_MS_MIN = 0.05, 1000
"""Clocks may differ by this part of a lease, or so many milliseconds."""


def lease_of(tx: Tx, profile: str) -> float | None:
    """The lease that VVols of a profile have, in seconds."""
    mirror = profile_specs(tx).get(profile, NO_POLICY).mirror
    return mirror.lease if mirror is not None else None


@transaction
def renew(tx: Tx, host: str, vvols: dict[str, int], now: Moment) -> dict[str, float]:
    """Renew a host's leases; returns the seconds of each. One is not renewed that the host does not hold any more under
    that epoch, is to release, or has no lease."""
    given: dict[str, float] = {}
    query = select(s.holders, s.vvols.c.profile).join(s.vvols, s.vvols.c.uuid == s.holders.c.vvol)
    query = query.where(s.holders.c.host == host, s.holders.c.state.in_(HELD), s.vvols.c.mirror)
    for row in tx.db.execute(query).all():
        lease_s = lease_of(tx, row.profile)
        if lease_s is None or vvols.get(row.vvol) != row.epoch:
            continue
        lease_ms = round(lease_s * 1000)
        values = {"lease_boot": now.boot, "lease_ends": now.ms + lease_ms, "lease_ms": lease_ms}
        mine = update(s.holders).where(s.holders.c.vvol == row.vvol, s.holders.c.host == host)
        tx.db.execute(mine.values(**values))
        given[row.vvol] = lease_s
    return given


def forget(tx: Tx, profile: str) -> None:
    """VVols of a profile serve without a lease from now on: nobody knows when a filter that is cut off stops."""
    mine = select(s.vvols.c.uuid).where(s.vvols.c.profile == profile)
    tx.db.execute(update(s.holders).where(s.holders.c.vvol.in_(mine)).values(lease_ms=0))


def is_over(tx: Tx, holder: Row[Any], now: Moment) -> bool:
    """Whether a host's lease of a VVol has run out for certain, by its own clock too."""
    if holder.lease_ms == 0:
        return False
    if holder.lease_boot != now.boot:
        mine = update(s.holders).where(s.holders.c.vvol == holder.vvol, s.holders.c.host == holder.host)
        tx.db.execute(mine.values(lease_boot=now.boot, lease_ends=now.ms + holder.lease_ms))
        return False
    margin = max(MARGIN_MS_MIN, round(holder.lease_ms * MARGIN))
    return bool(now.ms >= holder.lease_ends + margin)


def unfenced(tx: Tx, uuid: str) -> list[str]:
    """The datastores of a VVol's legs that cannot keep a host of an older epoch from writing."""
    query = select(s.datastores.c.name).join(s.legs, s.legs.c.datastore == s.datastores.c.name)
    query = query.where(s.legs.c.vvol == uuid, s.legs.c.life == "live", s.datastores.c.fences.is_(False))
    return sorted(tx.db.execute(query).scalars())
