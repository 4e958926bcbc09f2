"""The farm file (DESIGN.md section 7): what an operator declares. `farmfile.py` reads YAML into it.

Cross references and "not built yet" refusals are checked here too, so that the API and the YAML reader
agree; `farmfile.py` adds positions.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from nbdvvol.model.base import Model
from nbdvvol.model.units import (
    Duration,
    Name,
    PositiveSize,
    Rate,
    Size,
    format_duration,
    format_rate,
    format_size,
)

EXTENT_SIZE_DEFAULT = 1 << 20


class VVolType(enum.StrEnum):
    """What a VVol is for (VASA's words)."""

    DATA = "data"
    CONFIG = "config"
    SWAP = "swap"
    MEMORY = "memory"
    OTHER = "other"


class TlsMode(enum.StrEnum):
    """How a host's TCP listener treats TLS (NBD spec: NOTLS, SELECTIVETLS without secrets, FORCEDTLS)."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class ControlTls(Model):
    """Files of control's own HTTPS identity."""

    cert: str
    key: str
    client_ca: str | None = None


class ControlConfig(Model):
    """Where control listens: `unix:PATH` (always there) and optionally `https://ADDRESS:PORT`."""

    listen: str = "unix:./run/control.sock"
    tls: ControlTls | None = None
    tokens: str | None = None
    """File of API tokens, one `NAME TOKEN` a line; needed for https."""
    group: str | None = None
    """Unix group whose members may use the socket, besides root and control's own user."""


class HostListen(Model):
    """A host filter's TCP listener for NBD clients."""

    address: str
    """`ADDRESS:PORT`; IPv6 in brackets."""
    tls: TlsMode = TlsMode.REQUIRED
    """`none` and `optional` are taken only on loopback addresses unless `plaintext` says otherwise."""
    plaintext: bool = False
    """Allow unencrypted clients from beyond this machine: everybody who can connect sees every VVol of the host."""


HOST_CACHE_DEFAULT, HOST_CACHE_MIN, HOST_CACHE_MAX = 256 << 20, 1 << 20, 4 << 40


class HostConfig(Model):
    """A host: its credential and, optionally, its TCP listener."""

    token_file: str | None = None
    """The host's own token; left out, control makes one under its state directory."""
    certificate: str | None = None
    """Common name of the host's client certificate, instead of a token (https only)."""
    listen: HostListen | None = None
    remote: bool = False
    """Its filter is started on another machine; `nbdvvol up` starts one here for every other host."""
    reactors: int = Field(default=1, ge=1, le=64)
    spin_us: int = Field(default=200, ge=0, le=10_000)
    first_cpu: int | None = Field(default=None, ge=0, le=1023)
    """Pin reactor i to CPU `first_cpu` + i: for machines with cores to spare."""
    cache: Size = HOST_CACHE_DEFAULT
    """RAM for the caches of all its VVols, resident as it is used; 0: none. Fixed while its filter runs."""
    logs: str | None = None
    """A folder for the write-back logs of its VVols, where a profile names none."""

    @field_validator("cache", mode="after")
    @classmethod
    def _cache_is_possible(cls, value: int) -> int:
        if value and not HOST_CACHE_MIN <= value <= HOST_CACHE_MAX:
            limits = f"{format_size(HOST_CACHE_MIN)}..{format_size(HOST_CACHE_MAX)}"
            raise ValueError(f"{format_size(value)} is not in {limits}; 0 is no cache")
        return value


class TlsFiles(Model):
    """TLS identity that filters show to VMs: a directory (ca-cert.pem, server-cert.pem, server-key.pem), a PSK file."""

    certs: str | None = None
    psk: str | None = None
    """GnuTLS psktool format, one `identity:hexkey` a line; the identity selects the VM."""
    verify_client: bool = True
    """Require a client certificate; its common name selects the VM."""


class DatastoreKind(enum.StrEnum):
    """Kinds of datastores. `farm` and `image` come with later work."""

    FILE = "file"
    DIR = "dir"
    BLOCK = "block"
    NBD = "nbd"


class IoMode(enum.StrEnum):
    """Page cache or O_DIRECT. `auto`: direct where other hosts can write, buffered otherwise."""

    AUTO = "auto"
    BUFFERED = "buffered"
    DIRECT = "direct"


class RemoteTls(Model):
    """Whom a filter trusts as the server of an `nbds` datastore, and who it says it is."""

    certs: str | None = None
    """A directory: ca-cert.pem and, when the server asks for one, client-cert.pem and client-key.pem."""
    hostname: str | None = None
    """The name that the server's certificate must have; left out, the URI's host."""
    verify: bool = True
    """False: any certificate will do, so that anybody in between can be the server."""
    psk: str | None = None
    """GnuTLS psktool format, one `identity:hexkey` a line."""
    identity: str | None = None
    """Which of the keys is ours."""


CONNECTIONS_DEFAULT, CONNECTIONS_MAX = 4, 16
TIMEOUT_DEFAULT_S, TIMEOUT_MAX_S = 30.0, 600.0
HOLD_DEFAULT_S = 60.0


class DatastoreConfig(Model):
    """A place that holds bytes."""

    kind: DatastoreKind
    path: str | None = None
    uri: str | None = None
    """kind nbd: the export of an NBD server."""
    tls: RemoteTls | None = None
    """kind nbd, with an nbds URI."""
    connections: int | None = Field(default=None, ge=1, le=CONNECTIONS_MAX)
    """kind nbd: how many, if the server says that several are safe; else one."""
    timeout: Duration | None = None
    """kind nbd: a request that has no answer for so long ends its connection."""
    hold: Duration | None = None
    """kind nbd: how long I/O waits for a lost server before it fails."""
    write_through: bool | None = Field(default=None, alias="write-through")
    """kind nbd: every write is durable at the server before it is answered, so that a lost server owes nothing."""
    size: PositiveSize | None = None
    """kind file: created with this size when it is missing; grown to it when larger than before."""
    hosts: list[Name] | None = None
    """Hosts that see it; left out, all."""
    io: IoMode = IoMode.AUTO
    extent_size: PositiveSize = EXTENT_SIZE_DEFAULT
    metadata: bool = False
    """Adopted devices may keep their companion metadata here."""
    format: Literal["blank", "force"] = "blank"
    """`blank`: only a device whose bytes are all zero where the header goes is formatted; `force`: any."""


LEGS_MAX = 8


class MirrorConfig(Model):
    """Several copies of every VVol of the profile, one on each of these datastores."""

    legs: list[Name] = Field(min_length=1, max_length=LEGS_MAX)
    """The first one is preferred where one has to be: reads by `primary`, the source of copies."""
    read: Literal["least-outstanding", "primary", "nearest"] = "least-outstanding"
    write_deadline: Annotated[Duration, Field(ge=0.1, le=600)] = Field(default=30.0, alias="write-deadline")
    """A leg that has not ended an operation after so long has failed."""
    hold: Annotated[Duration, Field(ge=0.1, le=3600)] = 60.0
    """How long what a failed leg missed waits for control to write that down, before clients get errors."""
    spares: list[Name] = Field(default_factory=list, max_length=LEGS_MAX)
    """Datastores that take the place of a leg that is lost."""
    spare_after: Annotated[Duration, Field(ge=0, le=7 * 86400)] = Field(default=600.0, alias="spare-after")
    """... for longer than this."""
    resync_rate: Annotated[Rate, Field(ge=64 << 10, le=1 << 40)] | None = Field(default=100 << 20, alias="resync-rate")
    """Bytes a second that copying to a leg takes at most while clients have something to do; null: no limit."""
    intent_idle: Annotated[Duration, Field(ge=0.1, le=3600)] = Field(default=5.0, alias="intent-idle")
    """A region that nobody wrote to for so long counts as equal on all legs, and need not be copied after a crash."""
    verify: Literal["report", "repair"] = "repair"
    """What `mirror verify` does with pieces that differ: tell, or make them what the first in-sync leg has."""
    lease: Annotated[Duration, Field(ge=5, le=3600)] | None = None
    """A filter without control's word for so long stops serving, so that another host may take over."""


LOG_UNIT = 4096
LOG_DEADLINE_S = 30.0
LOG_SIZE_MIN, LOG_SIZE_MAX = 1 << 20, 4 << 40
LOG_BYPASS_MAX = 512 << 10


class CacheLog(Model):
    """The write-back log of each VVol of a profile, on the host that serves it."""

    path: str | None = None
    """A folder, where each VVol has a file of its own, or a device, for one VVol; left out, the host's `logs`."""
    size: Annotated[PositiveSize, Field(ge=LOG_SIZE_MIN, le=LOG_SIZE_MAX)]
    """Of each VVol's log."""
    bypass: Annotated[Size, Field(le=LOG_BYPASS_MAX)] = 128 << 10
    """Writes of so many bytes go to the storage at once; 0: none does for its length."""
    stream: Annotated[Size, Field(le=1 << 30)] = 0
    """... and those of who has written so many in sequence; 0: it makes no difference."""
    age: Annotated[Duration, Field(ge=0.1, le=3600)] = 5.0
    """What was logged so long ago is carried to the storage, however empty the log is."""
    destage_rate: Annotated[Rate, Field(ge=64 << 10, le=1 << 40)] | None = Field(default=None, alias="destage-rate")
    """Bytes a second that are carried to the storage at most while nobody waits for that; None: no limit."""
    deadline: Annotated[Duration, Field(ge=0, le=600)] = LOG_DEADLINE_S
    """A log whose device takes longer for one operation has failed; 0: none does for that."""

    def words(self) -> str:
        """For people, in the farm file's words."""
        said = [f"log {format_size(self.size)}", *([f"in {self.path}"] if self.path else [])]
        said += [f"bypass {format_size(self.bypass) if self.bypass else 0}"]
        said += [f"stream {format_size(self.stream)}"] if self.stream else []
        deadline = format_duration(self.deadline) if self.deadline else "0"
        said += [f"age {format_duration(self.age)}"]
        said += [f"destage-rate {format_rate(self.destage_rate)}"] if self.destage_rate is not None else []
        return ", ".join([*said, f"deadline {deadline}"])


class CacheConfig(Model):
    """What the host's cache does for each VVol of a profile.

    The bounds are the data plane's (native/include/limits.h)."""

    mode: Literal["none", "read", "writethrough", "writeback"]
    ram: Annotated[Size, Field(le=HOST_CACHE_MAX)] = 0
    """Of the host's cache, that other VVols cannot take; the floors of a host's VVols are cut to half of it."""
    read_ahead: Annotated[Size, Field(le=4 << 20)] = Field(default=512 << 10, alias="read-ahead")
    """At most so many bytes are read ahead of a stream of reads; 0: none."""
    log: CacheLog | None = None
    """Mode writeback alone."""

    def words(self) -> str:
        """For people, in the farm file's words."""
        if self.mode == "none":
            return "none"
        ram = [f"ram {format_size(self.ram)}"] if self.ram else []
        ahead = f"read-ahead {format_size(self.read_ahead) if self.read_ahead else 0}"
        log = [self.log.words()] if self.log is not None else []
        return ", ".join([self.mode, *ram, ahead, *log])


class QosConfig(Model):
    """What each VVol of a profile may do, over all its connections, and its part of a busy thread of its host.

    The bounds are the data plane's (native/include/limits.h)."""

    iops: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """I/Os a second."""
    bandwidth: Annotated[Rate, Field(ge=64 << 10, le=1 << 40)] | None = None
    """Bytes a second, read and written together."""
    burst: Annotated[Duration, Field(ge=0.001, le=3600)] = 0.1
    """Seconds of both limits that may be saved up while less is used."""
    iops_size: Annotated[Size, Field(ge=4096, le=32 << 20)] | None = None
    """A request counts as one I/O per so many bytes, begun; left out, as one."""
    shares: int = Field(default=100, ge=1, le=10_000)
    """Of a busy thread, beside other VVols' shares."""

    def words(self) -> str:
        """For people, in the farm file's words."""
        said = {
            "iops": self.iops,
            "bandwidth": format_rate(self.bandwidth) if self.bandwidth is not None else None,
            "burst": format_duration(self.burst) if self.iops or self.bandwidth else None,
            "iops_size": format_size(self.iops_size) if self.iops_size is not None else None,
            "shares": self.shares,
        }
        return ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)


class ProfileConfig(Model):
    """A policy: one datastore (or a mirror), cache, QoS."""

    datastore: Name | None = None
    mirror: MirrorConfig | None = None
    cache: CacheConfig | None = None
    qos: QosConfig | None = None
    read_only: bool = False

    @property
    def caching(self) -> CacheConfig | None:
        """The cache; None where there is none, whichever way that is said."""
        return self.cache if self.cache is not None and self.cache.mode != "none" else None

    @property
    def logging(self) -> CacheLog | None:
        """The write-back log; None where the mode is another."""
        return self.cache.log if self.cache is not None and self.cache.mode == "writeback" else None


class SocketConfig(Model):
    """Owner group and mode of a VM's unix socket."""

    group: str | None = None
    mode: Annotated[str, StringConstraints(pattern=r"^0?[0-7]{3}$")] = "0600"

    @field_validator("mode", mode="before")
    @classmethod
    def _mode_is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f'write the mode in quotes, such as "0660"; a bare {value} is read as a decimal number')
        return value


class AdoptConfig(Model):
    """Take over bytes that are already there: a whole device or file, a part of one, or a file of a `dir` datastore."""

    datastore: Name
    offset: Size = 0
    length: PositiveSize | None = None
    """Left out: to the end of the device."""
    file: str | None = None
    """kind dir: the file's name inside the directory."""


class VVolConfig(Model):
    """A VVol of a VM: a size, or the bytes to adopt."""

    size: PositiveSize | None = None
    profile: Name | None = None
    datastore: Name | None = None
    type: VVolType = VVolType.DATA
    adopt: AdoptConfig | None = None
    read_only: bool = False
    description: str = Field(default="", max_length=4096)


class VmConfig(Model):
    """A VM: the host it runs on, its socket, its VVols."""

    host: Name | None = None
    socket: SocketConfig = SocketConfig()
    vvols: dict[Name, VVolConfig] = Field(default_factory=dict)


class Farm(Model):
    """A whole farm file."""

    control: ControlConfig = ControlConfig()
    hosts: dict[Name, HostConfig] = Field(default_factory=lambda: {"local": HostConfig()})
    tls: TlsFiles | None = None
    datastores: dict[Name, DatastoreConfig] = Field(default_factory=dict)
    profiles: dict[Name, ProfileConfig] = Field(default_factory=dict)
    vms: dict[Name, VmConfig] = Field(default_factory=dict)
