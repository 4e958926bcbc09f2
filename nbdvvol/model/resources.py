"""What the API answers: the farm as it is, not as it was declared. The CLI prints these same words."""

from __future__ import annotations

import enum
import math
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from nbdvvol.model.base import Model
from nbdvvol.model.farm import (
    AdoptConfig,
    CacheConfig,
    DatastoreKind,
    Farm,
    MirrorConfig,
    ProfileConfig,
    QosConfig,
    SocketConfig,
    VVolType,
)
from nbdvvol.model.log import LogPhase, LostRange, holding_words
from nbdvvol.model.mirror import LegProgress, LegState, NotServed, ResyncWish, Stamp
from nbdvvol.model.observe import HostCounters, ReactorCounters
from nbdvvol.model.units import Name, PositiveSize, about_size, about_time, format_size


class VVolState(enum.StrEnum):
    """Life cycle: creating (extents being scrubbed) → ready → deleting (draining, scrubbing) → gone; or failed."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"
    FAILED = "failed"


class Region(Model):
    """A run of extents of a leg: VVol [offset, offset+length) at object_offset of the leg's object."""

    offset: int
    length: int
    object_offset: int
    state: Literal["mapped", "zero", "write-protected"] = "mapped"


class LegNow(LegProgress):
    """A leg of a mirror as the host that serves the VVol runs it, at its last report."""

    dirty_regions: int = 0
    """That are not copied yet."""
    progress: float | None = None
    """Of the copy that runs, 0..1; null: none does."""

    def copy_words(self) -> str:
        """How far the copy is, for people; "" while none runs."""
        if self.progress is None:
            return ""
        said = [f"{math.floor(self.progress * 100)}% copied", f"{about_size(self.dirty_bytes)} left"]
        if self.rate:
            said.append(f"{about_size(self.rate)}/s")
        if self.eta_s is not None:
            said.append(f"about {about_time(self.eta_s)} to go")
        return ", ".join(said)


class MirrorNow(Model):
    """A mirror as the host that serves the VVol runs it, at its last report."""

    host: str
    state: Literal["attaching", "serving", "frozen", "expired", "fenced"]
    """`frozen`: writes wait until the registry knows of a failed leg; `expired`: for too long, clients get errors."""
    region_bytes: int
    intent_regions: int
    """Written to lately, compared after a crash."""
    doubtful_regions: int
    """That an unclean attach has not made alike yet."""
    repairs: int
    """Reads that one leg could not answer and that were mended from another."""


class Leg(Model):
    """One copy of a VVol on one datastore."""

    id: int
    datastore: str
    state: LegState = "in-sync"
    object: str = ""
    """kind dir: the file's name inside the datastore; empty for datastores that are one object."""
    adopted: bool = False
    life: Literal["making", "live", "leaving"] = "live"
    """`making`: its space is being prepared. `leaving`: it was removed, its space is not free yet."""
    stamp: Stamp = Stamp()
    """The newest label that is known to be on it."""
    resync: ResyncWish = "auto"
    """What becomes of it while it is not in sync."""
    lost: datetime | None = None
    """Since when it is stale."""
    why: str = ""
    """Why it is not in sync."""
    replaces: int | None = None
    """The leg whose place it takes, as a spare."""
    fences: bool = False
    """Its server keeps out hosts of older epochs by itself (datastores of kind nbd, of a mirror)."""
    doubt: bool = False
    """Its server may still carry out what it was asked before: it waits for the operator's word that it does not."""
    now: LegNow | None = None
    """As its host runs it; null: no host that answers does."""
    regions: list[Region] = Field(default_factory=list)

    @property
    def reason(self) -> str:
        """Why it is not in sync: its host's words, where it has some."""
        return (self.now.why if self.now is not None else "") or self.why


class LogKept(Model):
    """What the registry says of a write-back log that may hold data of a VVol which its storage has not."""

    host: str
    """The VVol is pinned to it; empty: nobody knows which (`known` is false)."""
    log: str = ""
    """Its id."""
    file: str = ""
    known: bool = True
    """false: the registry was rebuilt, or put back, and a log may hold data: a host has noted that (`host`), or nobody
    knows which."""
    since: datetime | None = None
    size: int = 0
    dirty_bytes: int = 0
    """As its host said last, ..."""
    oldest_age_ms: int = 0
    told: datetime | None = None
    """... at this time; null: it has not said."""
    draining: bool = False
    """It is to be carried to the storage, and nothing more is logged."""

    def words(self) -> str:
        """For people: what it may hold."""
        if not self.known and not self.host:
            return "a write-back log may hold data of it: the registry was rebuilt, and nobody knows of which host"
        if not self.known:
            held = about_size(self.dirty_bytes) if self.told is not None else "data"
            return f"the log {self.file} on host {self.host} holds {held} of it of which the registry knows nothing"
        if self.told is None:
            return f"the log {self.file} on host {self.host} may hold data of it; its host has not said how much"
        held = holding_words(self.dirty_bytes, self.oldest_age_ms)
        most = f", at most {format_size(self.size)}" if self.size else ""
        return (
            f"the log {self.file} on host {self.host} held {held}, as that host said last, at "
            f"{self.told:%Y-%m-%dT%H:%M:%SZ}; what was logged since is not counted{most}"
        )


class LogNow(Model):
    """A write-back log as the host that serves the VVol runs it, at its last report."""

    host: str
    state: LogPhase
    why: str = ""
    """Why it is failed, void, refused or waits."""
    file: str = ""
    found: str = ""
    """Refused: the id of the log that lies there."""
    dirty_bytes: int = 0
    """Not carried to the storage yet; of one that is refused: what it holds."""
    oldest_age_ms: int = 0
    destage_rate: int = 0
    """Bytes a second, smoothed."""
    used_bytes: int = 0
    ring_bytes: int = 0
    lost_bytes: int = 0
    lost: list[LostRange] = Field(default_factory=list)
    """Where that lies, from the VVol's beginning on; `lost_bytes` may be more."""


class Binding(Model):
    """Which host serves a VVol, under which epoch."""

    host: str
    epoch: int
    state: Literal["assigned", "binding", "bound", "releasing"] = "assigned"
    """`assigned`: no filter of the host was told, or it stopped cleanly. `binding`: it was told. `bound`: it confirmed
    that it serves this epoch."""
    error: str = ""
    """Why the host does not serve it, in its words; empty when it does, or has not said."""
    why: NotServed = ""
    """The same, where `status` has advice for it."""


class VVol(Model):
    """A virtual volume."""

    uuid: str
    vm: str
    name: str
    size: int
    type: VVolType
    profile: str
    qos: QosConfig | None = None
    """Its profile's limits; null: none, and the usual shares."""
    cache: CacheConfig | None = None
    """What its host keeps of it in RAM, by its profile; null: nothing. What became of it is in the counters."""
    log: LogKept | None = None
    """The write-back log that may hold data of it; null: none does."""
    log_now: LogNow | None = None
    """How its log is; null: it has none, or no host that answers serves it."""
    mirror: MirrorConfig | None = None
    """How its mirror is run; null: one copy, without a mirror's metadata. Its legs may be others than the profile's."""
    now: MirrorNow | None = None
    """How its mirror is; null: it has none, or no host that answers serves it."""
    differed: str = ""
    """What the last comparison of its legs found and left as it is; empty: nothing."""
    state: VVolState
    error: str = ""
    """What stands in its way: why it could not be created, why no spare can be made."""
    read_only: bool = False
    description: str = ""
    epoch: int
    generation: int
    map_version: int
    binding: Binding | None = None
    legs: list[Leg] = Field(default_factory=list)
    uri: str = ""
    """Where the VM attaches it; empty while unbound."""

    @property
    def full_name(self) -> str:
        """`VM/NAME`."""
        return f"{self.vm}/{self.name}"


class SyncFault(Model):
    """A sync that failed on a host: what was acknowledged there since the last one may be lost."""

    host: str
    object: str = ""
    """kind dir: the file; empty for datastores that are one object."""
    message: str
    time: datetime


class Datastore(Model):
    """A datastore as control knows it."""

    name: str
    kind: DatastoreKind
    path: str
    """kind nbd: the URI."""
    uuid: str = ""
    size: int = 0
    """Usable bytes; 0 until a filter has looked at it."""
    free: int = 0
    extent_size: int
    hosts: list[str] | None = None
    use: Literal["unused", "formatted", "adopted"] = "unused"
    fences: bool = False
    """Its server keeps out hosts of older epochs (kind nbd, when it knows `x-nbdvvol:epoch`)."""
    state: Literal["unknown", "online", "missing", "faulty", "reconnecting"] = "unknown"
    """`reconnecting`: kind nbd, its server was lost and is being dialled; `detail` says since when and why."""
    detail: str = ""
    faults: list[SyncFault] = Field(default_factory=list)
    """FLUSH fails on what they concern until the operator clears them."""


class Host(Model):
    """A host and the state of its filter."""

    name: str
    connected: bool
    address: str = ""
    instance: str = ""
    vvols: int = 0
    """Bound to it."""
    serving: int = 0
    """Of those, what its filter was told to serve, and may go on serving while it is not connected."""


class Reactor(ReactorCounters):
    """A thread of a host's data plane, and what it has counted."""

    host: str


class Profile(Model):
    """A declared policy."""

    name: str
    spec: ProfileConfig


class Vm(Model):
    """A VM, its host, its socket."""

    name: str
    host: str
    socket: str
    socket_config: SocketConfig
    vvols: list[str] = Field(default_factory=list)


class TaskState(enum.StrEnum):
    """States of a task (VASA's words)."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"


class Task(Model):
    """Long work: survives a restart of control, can be watched and cancelled."""

    id: int
    kind: str
    subject: str
    state: TaskState
    progress: float = 0.0
    """0..1."""
    detail: str = ""
    error: str = ""
    created: datetime
    updated: datetime


class Event(Model):
    """Something that happened; ids only grow."""

    id: int
    time: datetime
    kind: str
    subject: str
    message: str


class Problem(Model):
    """A health finding: a stable code, what it is, what to do next."""

    code: str
    subject: str
    message: str
    action: str


class Status(Model):
    """`nbdvvol status`."""

    version: str
    instance: str
    revision: int
    hosts: list[Host] = Field(default_factory=list)
    datastores: list[Datastore] = Field(default_factory=list)
    vvols: list[VVol] = Field(default_factory=list)
    tasks: list[Task] = Field(default_factory=list)
    problems: list[Problem] = Field(default_factory=list)
    counters: list[HostCounters] = Field(default_factory=list)
    """Of every host that answers now."""


class Change(Model):
    """One line of `apply`."""

    action: Literal["create", "update", "keep", "absent"]
    """`absent`: it exists but the file does not name it; it is left alone."""
    kind: Literal["control", "host", "tls", "datastore", "profile", "vm", "vvol"]
    name: str
    detail: str = ""


class ApplyRequest(Model):
    """Body of POST /v1/apply."""

    farm: Farm
    dry_run: bool = False


class ApplyResult(Model):
    """What apply did (or would do)."""

    changes: list[Change]
    tasks: list[int] = Field(default_factory=list)


class CreateVVol(Model):
    """Body of POST /v1/vvols."""

    vm: Name
    name: Name
    size: PositiveSize | None = None
    profile: Name | None = None
    datastore: Name | None = None
    type: VVolType = VVolType.DATA
    adopt: AdoptConfig | None = None
    read_only: bool = False
    description: str = Field(default="", max_length=4096)


class ResizeVVol(Model):
    """Body of POST …/resize: growing only."""

    size: PositiveSize


class AddLeg(Model):
    """Body of POST …/legs."""

    datastore: Name


class ResyncLeg(Model):
    """Body of POST …/legs/LEG/resync."""

    full: bool = False
    """Copy everything, not only what is known to differ."""
    stop: bool = False
    """Stop copying, and leave the leg stale until it is asked for again."""


class VerifyMirror(Model):
    """Body of POST …/verify."""

    repair: bool | None = None
    """Left out, the profile's word."""


class BindVVol(Model):
    """Body of POST …/bind and …/unbind."""

    host: Name | None = None
    force: bool = False


class HolderRisk(Model):
    """A host that a VVol would be taken from by force."""

    host: str
    state: Literal["binding", "bound", "releasing"]
    epoch: int
    connected: bool
    """Its filter answers: without force it would release the VVol by itself."""
    lease: Literal["none", "runs", "over"] = "none"
    """`none`: nobody knows when its filter stops. `over`: it has stopped, unless its clock has."""
    lease_left_s: float | None = None
    """While it runs, by control's clock."""


class LegRisk(Model):
    """Whether a copy keeps a host of an older epoch out by itself."""

    leg: int
    datastore: str
    state: LegState
    fences: bool


class ForceRisks(Model):
    """What taking a VVol by force from hosts that do not answer puts at risk now."""

    vvol: str
    hosts: list[HolderRisk] = Field(default_factory=list)
    legs: list[LegRisk] = Field(default_factory=list)
    log: LogKept | None = None
    """What another host's write-back log may hold, which no other host can have."""
    risks: list[str] = Field(default_factory=list)
    """The same in sentences; empty: no host holds it, and force takes nothing from anybody."""


class TaskRef(Model):
    """202: the work goes on as this task."""

    task: Task
    vvol: VVol | None = None
    risks: list[str] = Field(default_factory=list)
    """With `force`: what that puts at risk."""


class ExportUri(Model):
    """Where to attach a VVol, and ready lines to paste."""

    vvol: str
    uri: str
    host: str
    identity: str
    """The VVol's UUID: the backend identifier for the kernel's nbd driver."""
    lines: dict[str, str] = Field(default_factory=dict)
    """Tool → command line (qemu, nbd-client, nbdcopy, attach)."""


JsonObject = dict[str, Any]
