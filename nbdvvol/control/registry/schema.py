"""Tables of the registry. Extent runs and areas are rows; declared things keep their model as JSON beside keys.

A change here needs a new SCHEMA_VERSION and a step in migrations.py.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

SCHEMA_VERSION = 7
APPLICATION_ID = 0x4E564256
"""Marks the SQLite file as ours (`NVBV`)."""

schema = MetaData()

meta = Table("meta", schema, Column("key", String, primary_key=True), Column("value", Text, nullable=False))
"""schema_version, identity, revision."""

settings = Table("settings", schema, Column("key", String, primary_key=True), Column("doc", Text, nullable=False))
"""`control` and `tls` of the farm file."""

hosts = Table(
    "hosts",
    schema,
    Column("name", String, primary_key=True),
    Column("config", Text, nullable=False),
    Column("instance", String, nullable=False, default=""),
    Column("run_dir", String, nullable=False, default=""),
    Column("address", String, nullable=False, default=""),
    Column("floor", Integer, nullable=False, default=0),
)
"""`floor`: changes up to this revision may have been forgotten; a filter that has less gets a snapshot."""

datastores = Table(
    "datastores",
    schema,
    Column("name", String, primary_key=True),
    Column("config", Text, nullable=False),
    Column("uuid", String, nullable=False, default=""),
    Column("size", Integer, nullable=False, default=0),
    Column("use", String, nullable=False, default="unused"),
    Column("state", String, nullable=False, default="unknown"),
    Column("detail", Text, nullable=False, default=""),
    Column("block_size", Integer, nullable=False, default=0),
    Column("direct_ok", Boolean, nullable=True),
    Column("header", Text, nullable=False, default=""),
    Column("fences", Boolean, nullable=False, default=False),
)
"""`header`: hex of the header that was (or is being) written; `fences`: its server drops hosts of older epochs."""

profiles = Table("profiles", schema, Column("name", String, primary_key=True), Column("spec", Text, nullable=False))

vms = Table(
    "vms",
    schema,
    Column("name", String, primary_key=True),
    Column("host", String, ForeignKey("hosts.name"), nullable=False),
    Column("socket", Text, nullable=False),
)

vvols = Table(
    "vvols",
    schema,
    Column("uuid", String, primary_key=True),
    Column("vm", String, ForeignKey("vms.name"), nullable=False),
    Column("name", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("type", String, nullable=False),
    Column("profile", String, nullable=False, default=""),
    Column("state", String, nullable=False),
    Column("read_only", Boolean, nullable=False, default=False),
    Column("description", Text, nullable=False, default=""),
    Column("epoch", Integer, nullable=False, default=0),
    Column("generation", Integer, nullable=False, default=1),
    Column("map_version", Integer, nullable=False, default=1),
    Column("datastore", String, ForeignKey("datastores.name"), nullable=False),
    Column("adopt", Text, nullable=True),
    Column("task", Integer, ForeignKey("tasks.id"), nullable=True),
    Column("error", Text, nullable=False, default=""),
    Column("mirror", Boolean, nullable=False, default=False),
    Column("places", Text, nullable=False, default=""),
    Column("next_leg", Integer, nullable=False, default=1),
    Column("differed", Text, nullable=False, default=""),
    UniqueConstraint("vm", "name"),
)
"""`task`: the one task that may change it now. `mirror`: it has labels, intents and dirty maps, and may have several
legs. `places`: the datastores that its first legs are to lie on, as a JSON list; empty: `datastore` alone. `next_leg`:
an id that none of its legs ever had. `differed`: what the last comparison of its legs found and left."""

holders = Table(
    "holders",
    schema,
    Column("vvol", String, ForeignKey("vvols.uuid", ondelete="CASCADE"), primary_key=True),
    Column("host", String, ForeignKey("hosts.name"), primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("facts", Text, nullable=False, default=""),
    Column("error", Text, nullable=False, default=""),
    Column("lease_boot", String, nullable=False, default=""),
    Column("lease_ends", Integer, nullable=False, default=0),
    Column("lease_ms", Integer, nullable=False, default=0),
)
"""Hosts that a VVol is bound to, or that may still hold it. At most one host is `assigned` (no filter of it was told,
or the one that was has stopped cleanly: nothing runs there), `binding` (told) or `bound` (serves it). Others are
`releasing`, or `forced`: the operator took it away without the host's word; its extents are not handed out again
before the host speaks.
`lease_ends`: when its lease runs out, milliseconds since the boot `lease_boot` of control's machine; `lease_ms`: how
long each one was; 0: it never had one, so that nobody knows when the filter stops."""

legs = Table(
    "legs",
    schema,
    Column("vvol", String, ForeignKey("vvols.uuid", ondelete="CASCADE"), primary_key=True),
    Column("id", Integer, primary_key=True),
    Column("datastore", String, ForeignKey("datastores.name"), nullable=False),
    Column("state", String, nullable=False, default="in-sync"),
    Column("object", String, nullable=False, default=""),
    Column("adopted", Boolean, nullable=False, default=False),
    Column("slot", Integer, nullable=True),
    Column("meta_offset", Integer, nullable=False, default=0),
    Column("meta_length", Integer, nullable=False, default=0),
    Column("stamp", Integer, nullable=False, default=0),
    Column("fault_host", String, nullable=False, default=""),
    Column("life", String, nullable=False, default="live"),
    Column("epoch", Integer, nullable=False, default=0),
    Column("generation", Integer, nullable=False, default=0),
    Column("resync", String, nullable=False, default="auto"),
    Column("asked", Integer, nullable=False, default=0),
    Column("tries", Integer, nullable=False, default=0),
    Column("lost", String, nullable=False, default=""),
    Column("why", Text, nullable=False, default=""),
    Column("replaces", Integer, nullable=True),
    Column("let_go", Text, nullable=False, default=""),
    Column("map_written", Integer, nullable=False, default=0),
    Column("doubt", Boolean, nullable=False, default=False),
    UniqueConstraint("datastore", "slot"),
)
"""`slot`: its directory entry; `stamp`: sequence of its last label; `fault_host`: a sync failed there, so that bytes
acknowledged there may be lost: another host serves it only once the operator accepts that.
`life`: `making` until it may be used, `live`, `leaving` once it was taken away and its space is not free yet.
`epoch`, `generation`: the confirmed stamp. `resync`, `asked`, `tries`: what is to become of it while it is not in sync,
how often a person said so, and how often something else gave cause to try at once. `lost`, `why`: since when and why it
is stale. `replaces`: the leg whose place it takes as a spare. `let_go`: of a leaving leg, the hosts that said that
nothing of it is in flight there, one a line. `map_written`: the map version of its newest copy on disk. `doubt`: its
server, which cannot fence, may still carry out what it was asked before (`LegDoubt`)."""

logs = Table(
    "logs",
    schema,
    Column("vvol", String, ForeignKey("vvols.uuid", ondelete="CASCADE"), primary_key=True),
    Column("state", String, nullable=False, default="clean"),
    Column("host", String, nullable=False, default=""),
    Column("log", String, nullable=False, default=""),
    Column("file", String, nullable=False, default=""),
    Column("epoch", Integer, nullable=False, default=0),
    Column("generation", Integer, nullable=False, default=0),
    Column("since", String, nullable=False, default=""),
    Column("wish", String, nullable=False, default=""),
    Column("discard", Boolean, nullable=False, default=False),
    Column("given_up", Integer, nullable=False, default=0),
    Column("size", Integer, nullable=False, default=0),
    Column("dirty_bytes", Integer, nullable=False, default=0),
    Column("oldest_ms", Integer, nullable=False, default=0),
    Column("told", String, nullable=False, default=""),
)
"""Write-back logs; a VVol without a row has none that holds data of it.
`state`: `dirty`: on `host`, the log with this id (`log`, in `file`) may hold data that the storage has not, committed
under `epoch` and `generation`, at the time `since`; `clean`: none does; `unknown`: this registry was rebuilt, or is
old, and one may: `host` has noted that of the log `log` in `file`, or nobody knows which. `wish`: `drain`: it is to be
carried below. `discard`: what lies in its place may be overwritten, by the operator's word. `given_up`: what logs of
this epoch and older ones hold was given up. `size`, `dirty_bytes`, `oldest_ms`: as its host said last, at the time
`told`."""

runs = Table(
    "runs",
    schema,
    Column("vvol", String, ForeignKey("vvols.uuid", ondelete="CASCADE"), primary_key=True),
    Column("leg", Integer, primary_key=True),
    Column("offset", Integer, primary_key=True),
    Column("length", Integer, nullable=False),
    Column("at", Integer, nullable=False),
    Column("state", Integer, nullable=False, default=0),
)
"""The map. Runs beyond the VVol's size are reserved for a growth that is going on."""

areas = Table(
    "areas",
    schema,
    Column("datastore", String, ForeignKey("datastores.name"), primary_key=True),
    Column("object", String, primary_key=True, default=""),
    Column("offset", Integer, primary_key=True),
    Column("length", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("owner", String, nullable=False, default=""),
)

faults = Table(
    "faults",
    schema,
    Column("id", String, primary_key=True),
    Column("datastore", String, ForeignKey("datastores.name"), nullable=False),
    Column("object", String, nullable=False, default=""),
    Column("host", String, ForeignKey("hosts.name"), nullable=False),
    Column("message", Text, nullable=False),
    Column("time", String, nullable=False),
)
"""Syncs that failed: the host fails every FLUSH on the object until the operator clears them."""

tasks = Table(
    "tasks",
    schema,
    Column("id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("vvol", String, nullable=False, default=""),
    Column("args", Text, nullable=False, default="{}"),
    Column("state", String, nullable=False),
    Column("progress", Integer, nullable=False, default=0),
    Column("detail", Text, nullable=False, default=""),
    Column("error", Text, nullable=False, default=""),
    Column("cancel", Boolean, nullable=False, default=False),
    Column("created", String, nullable=False),
    Column("updated", String, nullable=False),
    sqlite_autoincrement=True,
)
"""`progress` in thousandths."""

orders = Table(
    "orders",
    schema,
    Column("id", Integer, primary_key=True),
    Column("task", Integer, ForeignKey("tasks.id"), nullable=False),
    Column("vvol", String, nullable=False),
    Column("key", String, nullable=False),
    Column("host", String, ForeignKey("hosts.name"), nullable=False),
    Column("what", String, nullable=False),
    Column("args", Text, nullable=False),
    UniqueConstraint("task", "key"),
    sqlite_autoincrement=True,
)
"""Work orders whose outcome is unknown. What they write on is not handed out before they are settled."""

events = Table(
    "events",
    schema,
    Column("id", Integer, primary_key=True),
    Column("time", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("message", Text, nullable=False),
    sqlite_autoincrement=True,
)

touched = Table(
    "touched",
    schema,
    Column("host", String, primary_key=True),
    Column("kind", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("revision", Integer, nullable=False),
)
"""The change feed: when an entry of a host's state last changed. Its value is always read afresh."""

idempotency = Table(
    "idempotency",
    schema,
    Column("key", String, primary_key=True),
    Column("request", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("created", String, nullable=False),
)

Index("touched_by_revision", touched.c.host, touched.c.revision)
Index("holders_by_host", holders.c.host)
