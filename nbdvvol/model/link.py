"""The link between control and a host's filter: JSON messages over one WebSocket (`/v1/link`).

The filter authenticates with its host's credential (HTTP header `Authorization: Bearer TOKEN` and
`X-Nbdvvol-Host: NAME`, or a client certificate), sends `hello`, gets `welcome`, then either the ordered
changes after the revision it has, or a full `snapshot`. Revisions only grow and survive control's restarts.
A filter that restarts has revision 0 and holds nothing: it serves nothing until the snapshot gives it epochs.

Ordering rules:
- control sends changes in revision order; the filter applies them in that order and then says `applied`.
- a volume is served only while the last snapshot or change names it with that epoch.
- `released` is sent once the data plane has drained a volume and nothing of it is in flight any more.
- `leg_released` likewise for a leg that a change took away, once operations that were late on it have ended too; its
  extents are scrubbed and reused from then on.
- `fault` goes before the `released` of a VVol whose last sync failed, and again at every connect, until a snapshot or
  change lists it: then it is control's to remember, and the filter clears the fault once it is listed no more.
- `stopped` is a filter's last word; control writes it down, then closes the link.
- `work` is at-least-once and idempotent by its id; the filter answers each with `work_done`.
- `look` and `trace` are questions: asked once, answered once, forgotten with the connection.
- `leg_change`, `log_change` and `renew` are the filter's questions, answered in the order of asking and forgotten with
  the connection: it asks again when it is back. Their words, and those of `leg_doubt`, are in `model/mirror.py` and
  `model/log.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from nbdvvol.model.base import Model
from nbdvvol.model.farm import (
    CONNECTIONS_DEFAULT,
    HOLD_DEFAULT_S,
    TIMEOUT_DEFAULT_S,
    CacheConfig,
    DatastoreConfig,
    DatastoreKind,
    HostListen,
    QosConfig,
    RemoteTls,
    SocketConfig,
    TlsFiles,
    VVolType,
)
from nbdvvol.model.log import LogChange, LogNote, LogRecord, LogReport, LogSpec
from nbdvvol.model.mirror import (
    Leased,
    LegChange,
    LegDoubt,
    LegRecord,
    LegState,
    MirrorReport,
    MirrorSpec,
    NotServed,
    Renew,
    ResyncWish,
    Stamp,
)
from nbdvvol.model.observe import HostCounters, TraceCount, TraceEvery, TraceReport, TraceSeconds

PROTOCOL = 8
MESSAGE_BYTES_MAX = 64 << 20


class RunSpec(Model):
    """A run of extents, as short as JSON allows: VVol offset, length, offset in the object, state (RunState)."""

    o: int
    n: int
    at: int
    s: int = 0


class LegSpec(Model):
    """A leg as the filter needs it."""

    id: int
    """Of the VVol's legs; never given to another one."""
    datastore: str
    state: LegState
    object: str = ""
    adopted: bool = False
    runs: list[RunSpec]
    stamp: Stamp = Stamp()
    """Confirmed: the newest label that is known to be on it."""
    meta_offset: int = 0
    """Of its metadata region in the object (datastores/format.py) ..."""
    meta_length: int = 0
    """... 0: it has none."""
    resync: ResyncWish = "auto"
    asked: int = 0
    """Counts the operator's wishes: a change is a new one, to be tried at once, whatever its server did before."""
    tries: int = 0
    """Counts other causes to try at once, such as its datastore's return: they vouch for nothing."""
    doubt: bool = False
    """What its server was asked before, by this filter or another one, may still be carried out there (`LegDoubt`)."""
    fences: bool = False
    """At the last look, its server knew claims."""


class RemoteSpec(Model):
    """How a filter uses the server of a datastore of kind nbd. Times in seconds."""

    connections: int
    timeout_s: float
    hold_s: float
    write_through: bool = False
    tls: RemoteTls | None = None


def remote_spec(config: DatastoreConfig) -> RemoteSpec | None:
    """The settings of a datastore of kind nbd, with their defaults."""
    if config.kind is not DatastoreKind.NBD:
        return None
    return RemoteSpec(
        connections=config.connections or CONNECTIONS_DEFAULT,
        timeout_s=TIMEOUT_DEFAULT_S if config.timeout is None else config.timeout,
        hold_s=HOLD_DEFAULT_S if config.hold is None else config.hold,
        write_through=bool(config.write_through),
        tls=config.tls,
    )


class DatastoreSpec(Model):
    """How a host's filter opens a datastore."""

    name: str
    kind: DatastoreKind
    path: str
    """kind nbd: the URI."""
    remote: RemoteSpec | None = None
    """kind nbd."""
    uuid: str = ""
    size: int = 0
    direct: bool = False
    adopted: bool = False


class VVolSpec(Model):
    """All a filter needs to serve a VVol."""

    uuid: str
    vm: str
    name: str
    size: int
    type: VVolType
    description: str = ""
    read_only: bool = False
    epoch: int
    generation: int
    map_version: int
    legs: list[LegSpec]
    qos: QosConfig | None = None
    """None: no limits, and the usual shares."""
    cache: CacheConfig | None = None
    """None: nothing of it is kept in the host's cache."""
    log: LogSpec | None = None
    """None: it has no write-back log, and none holds data of it."""
    mirror: MirrorSpec | None = None
    """None: one leg, without intents. It changes from or to None only while the VVol is bound to no host."""


class VmSpec(Model):
    """A VM of this host: its socket is RUN/vms/NAME.sock."""

    name: str
    socket: SocketConfig


class HostState(Model):
    """Everything one host needs to know."""

    host: str
    listen: HostListen | None = None
    tls: TlsFiles | None = None
    datastores: dict[str, DatastoreSpec] = Field(default_factory=dict)
    vms: dict[str, VmSpec] = Field(default_factory=dict)
    vvols: dict[str, VVolSpec] = Field(default_factory=dict)
    """By UUID: the VVols bound to this host."""
    faults: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Syncs that failed on this host and that the operator has not cleared: datastore → fault id → object in it."""


class Held(Model):
    """A VVol that the filter holds at the moment it (re)connects."""

    uuid: str
    epoch: int
    generation: int
    map_version: int
    legs: list[int] = Field(default_factory=list)
    """Ids of the legs on which it has, or may still have, operations under way; empty for a VVol without a mirror."""


# ---- filter → control ----


class Hello(Model):
    """First message of a filter."""

    kind: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    host: str
    instance: str
    """A new UUID each time the filter process starts."""
    revision: int = 0
    control: str = ""
    """Registry identity of the last snapshot; a different control gets revision 0."""
    held: list[Held] = Field(default_factory=list)
    address: str = ""
    """Address of its TCP listener, when it has one."""
    run_dir: str = ""
    """Absolute; control builds unix URIs from it."""
    logs: list[LogNote] = Field(default_factory=list)
    """Write-back logs of this host that may hold data: a registry that was rebuilt knows of none."""


class Applied(Model):
    """The filter runs everything up to this revision."""

    kind: Literal["applied"] = "applied"
    revision: int


class ExportReport(Model):
    """INFO's facts of one export are the filter's: it reports them."""

    uuid: str
    epoch: int
    size: int
    flags: int
    """Transmission flags with structured replies (DF stripped per connection when it must be)."""
    block_min: int
    block_preferred: int
    block_max: int
    error: str = ""
    """Why it is not served, when it is not."""
    why: NotServed = ""


class Exports(Model):
    """Facts of exports; sent for every VVol that came up, changed or failed."""

    kind: Literal["exports"] = "exports"
    exports: list[ExportReport]


class Released(Model):
    """Drained: nothing of this VVol under this epoch (or an older one) is in flight on this host."""

    kind: Literal["released"] = "released"
    uuid: str
    epoch: int


class LegReleased(Model):
    """A leg that the last change took from a VVol: nothing of it is in flight on this host, and nothing will be."""

    kind: Literal["leg_released"] = "leg_released"
    uuid: str
    epoch: int
    leg: int
    doubt: bool = False
    """Its server may still carry out what it was asked (`LegDoubt`)."""


class Stopped(Model):
    """The filter ends: every volume is drained, its objects are synced, and this process opens nothing any more."""

    kind: Literal["stopped"] = "stopped"


class Fault(Model):
    """A sync of an object failed: acknowledged bytes may be lost, every FLUSH fails until the operator clears it."""

    kind: Literal["fault"] = "fault"
    id: str
    """A new UUID for each failure."""
    datastore: str
    object: str = ""
    message: str


class Notice(Model):
    """Something for the event list (a datastore missing, a VVol refused)."""

    kind: Literal["notice"] = "notice"
    event: str
    subject: str
    message: str


class WorkDone(Model):
    """Result of a work order."""

    kind: Literal["work_done"] = "work_done"
    id: int
    error: str = ""
    code: str = ""
    result: dict[str, Any] = Field(default_factory=dict)


class WorkProgress(Model):
    """0..1 of a long work order."""

    kind: Literal["work_progress"] = "work_progress"
    id: int
    progress: float


class Query(Model):
    """A VM's LIST, INFO or LIST_META_CONTEXT, for control to answer."""

    kind: Literal["query"] = "query"
    id: int
    what: Literal["list", "info", "list_meta"]
    vm: str | None
    """None: a TCP client without an identity; it sees every VVol of this host under its full name."""
    name: str = ""
    queries: list[str] = Field(default_factory=list)


class Counters(Model):
    """Answer to `look`."""

    kind: Literal["counters"] = "counters"
    id: int
    counters: HostCounters


class Traced(Model):
    """Answer to `trace`: the report, or why there is none."""

    kind: Literal["traced"] = "traced"
    id: int
    error: str = ""
    code: str = ""
    hint: str = ""
    report: TraceReport | None = None


FromFilter = Annotated[
    Hello
    | Applied
    | Exports
    | Released
    | LegReleased
    | Stopped
    | Fault
    | Notice
    | WorkDone
    | WorkProgress
    | Query
    | Counters
    | Traced
    | LegChange
    | LegDoubt
    | MirrorReport
    | LogChange
    | LogReport
    | Renew,
    Field(discriminator="kind"),
]
from_filter: TypeAdapter[FromFilter] = TypeAdapter(FromFilter)


# ---- control → filter ----


class Welcome(Model):
    """Control accepts the filter."""

    kind: Literal["welcome"] = "welcome"
    protocol: int = PROTOCOL
    control: str
    """The registry's identity (UUID); the same after a restart of control."""
    instance: str


class Snapshot(Model):
    """The whole state as of a revision. Epochs in it are confirmed; whatever it does not name is to be dropped."""

    kind: Literal["snapshot"] = "snapshot"
    revision: int
    state: HostState


class Delta(Model):
    """An ordered change: replaces or removes whole entries. `resumed` in the first one confirms the held epochs."""

    kind: Literal["change"] = "change"
    revision: int
    listen: HostListen | None = None
    tls: TlsFiles | None = None
    settings: bool = False
    """True: `listen` and `tls` are meant (None removes them)."""
    datastores: dict[str, DatastoreSpec | None] = Field(default_factory=dict)
    vms: dict[str, VmSpec | None] = Field(default_factory=dict)
    vvols: dict[str, VVolSpec | None] = Field(default_factory=dict)
    faults: dict[str, dict[str, str]] = Field(default_factory=dict)
    """All that stand on each of these datastores; empty: none any more."""


class Resumed(Model):
    """Instead of a snapshot: nothing was missed but the changes that follow; held epochs stand."""

    kind: Literal["resumed"] = "resumed"
    revision: int


class Work(Model):
    """An order that needs the datastore: done by a filter that sees it.

    kinds and their args (all sizes and offsets in bytes; `store` is a DatastoreSpec):
    - probe {store, create_size?}: open (create a missing kind-file to create_size, grow to it); result
      {size, block_size, header: hex of the first 8 KiB, blank: bool, direct_ok: bool, fences?: bool: the server
      drops hosts of older epochs (`x-nbdvvol:epoch`)}
    - write_meta {store, object?, offset, data: hex}: write and sync metadata, at most 1 MiB
    - read_meta {store, object?, offset, length}: result {data: hex}
    - scrub {store, object?, ranges: [[offset, length], …]}: write zeros and flush; progress is reported
    - file_create {store, object, size}: a fully allocated zero-filled file in a `dir`; idempotent
    - file_grow {store, object, size}; file_remove {store, object}; file_stat {store, object}: result {size}
    - dir_list {store}: result {files: [{name, size}, …]} of a `dir`
    - log_remove {vvol, file}: remove the file of a VVol's write-back log, if it is one. It has no `store`
    - verify {vvol, epoch, repair}: compare the in-sync legs of a mirrored VVol that this host serves; result is a
      VerifyResult; progress is reported. It has no `store`
    """

    kind: Literal["work"] = "work"
    id: int
    what: Literal[
        "probe",
        "write_meta",
        "read_meta",
        "scrub",
        "file_create",
        "file_grow",
        "file_remove",
        "file_stat",
        "dir_list",
        "log_remove",
        "verify",
    ]
    args: dict[str, Any]


class Listing(Model):
    """One line of a LIST answer."""

    name: str
    description: str = ""


class ExportInfo(Model):
    """Facts for an INFO answer."""

    name: str
    """Canonical name on that socket."""
    description: str
    size: int
    flags: int
    block_min: int
    block_preferred: int
    block_max: int


class Answer(Model):
    """Answer to a query. `error` is an NBD_REP_ERR name without prefix (UNKNOWN, POLICY, …), with `message`."""

    kind: Literal["answer"] = "answer"
    id: int
    error: str = ""
    message: str = ""
    exports: list[Listing] = Field(default_factory=list)
    info: ExportInfo | None = None
    contexts: list[str] = Field(default_factory=list)


class Look(Model):
    """What has been counted so far?"""

    kind: Literal["look"] = "look"
    id: int


class TraceOrder(Model):
    """Record requests of a VVol, until there are `count` or `seconds` have passed, and send them."""

    kind: Literal["trace"] = "trace"
    id: int
    uuid: str
    seconds: TraceSeconds
    count: TraceCount
    every: TraceEvery = 1


class Forget(Model):
    """Nobody waits for the answer to this question any more."""

    kind: Literal["forget"] = "forget"
    id: int


class Refused(Model):
    """Control does not take this filter; the socket closes after it."""

    kind: Literal["refused"] = "refused"
    reason: str


FromControl = Annotated[
    Welcome
    | Snapshot
    | Resumed
    | Delta
    | Work
    | Answer
    | Look
    | TraceOrder
    | Forget
    | LegRecord
    | LogRecord
    | Leased
    | Refused,
    Field(discriminator="kind"),
]
from_control: TypeAdapter[FromControl] = TypeAdapter(FromControl)
