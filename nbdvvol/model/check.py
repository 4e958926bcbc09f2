"""What a farm must satisfy beyond its fields' types: references and combinations.

Pure: looks at no file and no machine. `farmfile.py` adds positions to what is found here; control's API
runs the same checks, so that both doors refuse the same farms with the same words.
"""

from __future__ import annotations

import ipaddress
import itertools
import operator
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import (
    LOG_UNIT,
    TIMEOUT_MAX_S,
    AdoptConfig,
    CacheConfig,
    DatastoreConfig,
    DatastoreKind,
    Farm,
    HostConfig,
    HostListen,
    IoMode,
    MirrorConfig,
    ProfileConfig,
    RemoteTls,
    TlsMode,
    VmConfig,
    VVolConfig,
)
from nbdvvol.model.units import format_size
from nbdvvol.model.uri import NbdUri, parse_uri

Loc = tuple[str, ...]
EXTENT_SIZE_MIN = 64 << 10
EXTENT_SIZE_MAX = 1 << 30
SECTOR_SIZE = 512
VVOL_SIZE_MAX = 1 << 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with a farm. `loc` is its path in the file; `missing` the (section, name) it refers to."""

    loc: Loc
    message: str
    missing: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{'.'.join(self.loc)}: {self.message}"


def check_farm(farm: Farm) -> list[Finding]:
    """Everything wrong with a farm, in the order of its sections."""
    found: list[Finding] = []
    for part in (_control, _hosts, _datastores, _profiles, _vms, _adoptions):
        found += part(farm)
    return found


def require_sound(farm: Farm) -> None:
    """Raise NvError CONFIG unless the farm is sound."""
    found = check_farm(farm)
    if found:
        raise NvError(Code.CONFIG, "; ".join(map(str, found)), "correct the farm file and apply it again")


def datastore_of(farm: Farm, vvol: VVolConfig) -> str | None:
    """The datastore a VVol lives on: adopted, named, its profile's, or the only one; None if undecided."""
    if vvol.adopt is not None:
        return vvol.adopt.datastore
    if vvol.datastore is not None:
        return vvol.datastore
    profile = farm.profiles.get(vvol.profile) if vvol.profile else None
    if profile is not None and (profile.datastore is not None or profile.mirror is not None):
        return profile.datastore
    return next(iter(farm.datastores)) if len(farm.datastores) == 1 else None


def host_of(farm: Farm, vm: VmConfig) -> str | None:
    """The host a VM runs on: named, or the only one; None if undecided."""
    if vm.host is not None:
        return vm.host
    return next(iter(farm.hosts)) if len(farm.hosts) == 1 else None


def _unknown(loc: Loc, section: str, name: str, known: object) -> Finding:
    kind = section.removesuffix("s")
    names = ", ".join(sorted(map(str, known))) if isinstance(known, dict) and known else "none"
    return Finding(loc, f"{kind} {name} is not declared; {section} in this file: {names}", missing=(section, name))


def _control(farm: Farm) -> Iterator[Finding]:
    listen, loc = farm.control.listen, ("control", "listen")
    if listen.startswith("https://"):
        if _split_address(listen.removeprefix("https://").rstrip("/")) is None:
            yield Finding(loc, f"{listen} is not https://ADDRESS:PORT")
        if farm.control.tls is None:
            yield Finding(loc, "https needs control.tls with cert and key")
        if farm.control.tokens is None and (farm.control.tls is None or farm.control.tls.client_ca is None):
            yield Finding(loc, "https needs control.tokens or control.tls.client_ca: who may command the farm")
    elif not listen.startswith("unix:") or listen == "unix:":
        yield Finding(loc, f"{listen} is neither unix:PATH nor https://ADDRESS:PORT")


def _split_address(address: str) -> tuple[str, int] | None:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        return None
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address, without its port, is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(farm: Farm) -> Iterator[Finding]:
    if not farm.hosts:
        yield Finding(("hosts",), "no host is declared; leave `hosts` out to get one called local")
    for name, host in farm.hosts.items():
        if host.listen is not None:
            yield from _listen(("hosts", name, "listen"), host.listen, farm)


def _listen(loc: Loc, listen: HostListen, farm: Farm) -> Iterator[Finding]:
    address = _split_address(listen.address)
    if address is None:
        yield Finding((*loc, "address"), f"{listen.address} is not ADDRESS:PORT (IPv6 in brackets, port 1..65535)")
        return
    if listen.tls is not TlsMode.NONE and (farm.tls is None or (farm.tls.certs is None and farm.tls.psk is None)):
        yield Finding((*loc, "tls"), f"{listen.tls} needs the section `tls` with certs or psk")
    if listen.tls is not TlsMode.REQUIRED and not listen.plaintext and not is_loopback(address[0]):
        yield Finding(
            (*loc, "tls"),
            f"{listen.tls} lets anybody who reaches {listen.address} see every VVol of the host; "
            "say `plaintext: true` if that is meant",
        )


def _datastores(farm: Farm) -> Iterator[Finding]:
    for name, datastore in farm.datastores.items():
        yield from _datastore(("datastores", name), datastore, farm)


def place_of(datastore: DatastoreConfig) -> str:
    """What tells one datastore's place from another's: a normal path, or a URI in its one form."""
    if datastore.kind is DatastoreKind.NBD:
        return str(parse_uri(datastore.uri or ""))
    return posixpath.normpath(datastore.path or "")


def remote_findings(datastore: DatastoreConfig) -> Iterator[tuple[str, str]]:
    """What is wrong with the keys of kind nbd: (key, or "" for the whole, sentence)."""
    if datastore.kind is not DatastoreKind.NBD:
        for key in ("uri", "tls", "connections", "timeout", "hold", "write_through"):
            if getattr(datastore, key) is not None:
                yield key.replace("_", "-"), f"kind {datastore.kind} has no {key.replace('_', '-')}: it is for kind nbd"
        return
    if datastore.path is not None:
        yield "path", "kind nbd has a uri, not a path"
    if datastore.io is not IoMode.AUTO:
        yield "io", f"io: {datastore.io} is for files and devices; a server decides for itself"
    if datastore.timeout is not None and not 0 < datastore.timeout <= TIMEOUT_MAX_S:
        yield "timeout", f"{datastore.timeout:g} s is not in 1..{TIMEOUT_MAX_S:g} s"
    if datastore.uri is None:
        yield "", "kind nbd needs a uri, such as nbd://10.0.0.7/export"
        return
    try:
        uri = parse_uri(datastore.uri)
    except NvError as error:
        yield "uri", error.message
        return
    if uri.has_tls_parameters:
        yield "uri", "TLS parameters of a datastore are written under `tls:`"
    yield from _remote_tls(uri, datastore.tls)


def _remote_tls(uri: NbdUri, tls: RemoteTls | None) -> Iterator[tuple[str, str]]:
    if tls is None:
        if uri.tls and uri.socket is not None:
            yield "tls", "over a unix socket TLS needs tls.hostname (what the certificate must say) or tls.psk"
        return
    if not uri.tls:
        yield "tls", f"the uri says {uri.scheme}, without TLS: write nbds to use it"
    if (tls.psk is None) != (tls.identity is None):
        yield "tls", "psk and identity belong together: a file of keys, and which of them is ours"
    if tls.psk is None and tls.hostname is None and uri.socket is not None and tls.verify:
        yield "tls", "a unix socket has no name that the certificate could be checked against: say tls.hostname"


def _datastore(loc: Loc, datastore: DatastoreConfig, farm: Farm) -> Iterator[Finding]:
    for key, sentence in remote_findings(datastore):
        yield Finding((*loc, key) if key else loc, sentence)
    if datastore.kind is not DatastoreKind.NBD and datastore.path is None:
        yield Finding(loc, f"kind {datastore.kind} needs a path")
    if datastore.size is not None and datastore.kind is not DatastoreKind.FILE:
        yield Finding((*loc, "size"), f"size is for kind file; a {datastore.kind} has the size it has")
    extent = datastore.extent_size
    if extent & (extent - 1) or not EXTENT_SIZE_MIN <= extent <= EXTENT_SIZE_MAX:
        limits = f"{format_size(EXTENT_SIZE_MIN)}..{format_size(EXTENT_SIZE_MAX)}"
        yield Finding((*loc, "extent_size"), f"{format_size(extent)} is not a power of two in {limits}")
    if datastore.hosts is not None and not datastore.hosts:
        yield Finding((*loc, "hosts"), "an empty list: no host sees it; leave `hosts` out for all")
    for index, host in enumerate(datastore.hosts or []):
        if host not in farm.hosts:
            yield _unknown((*loc, "hosts", str(index)), "hosts", host, farm.hosts)


def _profiles(farm: Farm) -> Iterator[Finding]:
    for name, profile in farm.profiles.items():
        yield from _profile(("profiles", name), name, profile, farm)


def _profile(loc: Loc, name: str, profile: ProfileConfig, farm: Farm) -> Iterator[Finding]:
    if profile.mirror is not None:
        yield from _mirror((*loc, "mirror"), profile.mirror, farm)
    if profile.cache is not None:
        yield from _cache((*loc, "cache"), name, profile.cache, profile)
    if profile.mirror is not None and profile.datastore is not None:
        yield Finding((*loc, "datastore"), "a profile has either a datastore or a mirror")
    if profile.datastore is not None and profile.datastore not in farm.datastores:
        yield _unknown((*loc, "datastore"), "datastores", profile.datastore, farm.datastores)


def _cache(loc: Loc, name: str, cache: CacheConfig, profile: ProfileConfig) -> Iterator[Finding]:
    for key, sentence in log_findings(profile):
        yield Finding((*loc, *key), f"profile {name}: {sentence}")
    if cache.mode == "none" and cache.ram:
        yield Finding((*loc, "ram"), "mode none keeps nothing in RAM: leave it out, or choose mode read")


def has_log_folder(profile: ProfileConfig, host: HostConfig) -> bool:
    """Whether it is said where the write-back logs of a profile's VVols lie on a host, if they have any."""
    return profile.logging is None or profile.logging.path is not None or host.logs is not None


def log_findings(profile: ProfileConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with a profile's write-back log: (keys below `cache`, sentence)."""
    cache = profile.cache
    if cache is None:
        return
    if cache.mode != "writeback":
        if cache.log is not None:
            yield ("log",), f"mode {cache.mode} writes no log: leave it out, it is for mode writeback"
    elif cache.log is None:
        yield ("log",), "mode writeback needs a log: say how large, such as `log: {size: 1GiB}`"
    elif cache.log.size % LOG_UNIT:
        yield ("log", "size"), f"{cache.log.size} bytes are not a multiple of {LOG_UNIT}, the log's unit"


def _mirror(loc: Loc, mirror: MirrorConfig, farm: Farm) -> Iterator[Finding]:
    seen: set[str] = set()
    for key, names in (("legs", mirror.legs), ("spares", mirror.spares)):
        for index, name in enumerate(names):
            where = (*loc, key, str(index))
            if name not in farm.datastores:
                yield _unknown(where, "datastores", name, farm.datastores)
            elif name in seen:
                yield Finding(where, f"datastore {name} is named twice: copies on one datastore are lost together")
            seen.add(name)


def _vms(farm: Farm) -> Iterator[Finding]:
    for name, vm in farm.vms.items():
        loc = ("vms", name)
        if vm.host is not None and vm.host not in farm.hosts:
            yield _unknown((*loc, "host"), "hosts", vm.host, farm.hosts)
        elif host_of(farm, vm) is None and farm.hosts:
            yield Finding(loc, f"say which host it runs on: {', '.join(sorted(farm.hosts))}")
        for short, vvol in vm.vvols.items():
            for check in (_vvol_shape, _vvol_place):
                yield from check((*loc, "vvols", short), vm, vvol, farm)


def _vvol_shape(loc: Loc, vm: VmConfig, vvol: VVolConfig, farm: Farm) -> Iterator[Finding]:
    if (vvol.size is None) == (vvol.adopt is None):
        yield Finding(loc, "a VVol has either a size or something to adopt")
    if vvol.size is not None and (vvol.size % SECTOR_SIZE or vvol.size > VVOL_SIZE_MAX):
        limit = format_size(VVOL_SIZE_MAX)
        yield Finding((*loc, "size"), f"{vvol.size} is not a multiple of {SECTOR_SIZE} bytes up to {limit}")
    if vvol.adopt is not None and vvol.datastore is not None:
        yield Finding((*loc, "datastore"), "an adopted VVol stays where its bytes are: leave `datastore` out")


def _vvol_place(loc: Loc, vm: VmConfig, vvol: VVolConfig, farm: Farm) -> Iterator[Finding]:
    if vvol.profile is not None and vvol.profile not in farm.profiles:
        yield _unknown((*loc, "profile"), "profiles", vvol.profile, farm.profiles)
        return
    profile = farm.profiles.get(vvol.profile) if vvol.profile else None
    host = host_of(farm, vm)
    if profile is not None and profile.caching is not None and host in farm.hosts and not farm.hosts[host].cache:
        yield Finding(
            (*loc, "profile"),
            f"profile {vvol.profile} has a cache, and host {host} has `cache: 0`, no memory for one; "
            "give it some, such as 256MiB, or choose a profile without",
        )
    if profile is not None and host in farm.hosts and not has_log_folder(profile, farm.hosts[host]):
        yield Finding(
            (*loc, "profile"),
            f"profile {vvol.profile} has a write-back log without a path, and host {host} names no folder for logs; "
            f"say hosts.{host}.logs, such as /var/lib/nbdvvol/logs, or cache.log.path in the profile",
        )
    if profile is not None and profile.mirror is not None:
        return
    where = (*loc, "adopt", "datastore") if vvol.adopt else (*loc, "datastore") if vvol.datastore else loc
    name = datastore_of(farm, vvol)
    if name is None:
        known = ", ".join(sorted(farm.datastores)) or "none is declared"
        yield Finding(loc, f"say which datastore it lives on, directly or by a profile: {known}")
        return
    datastore = farm.datastores.get(name)
    if datastore is None:
        if len(where) > len(loc):
            yield _unknown(where, "datastores", name, farm.datastores)
        return
    if host in farm.hosts and datastore.hosts is not None and host not in datastore.hosts:
        yield Finding(where, f"datastore {name} is not seen by host {host}, only by {', '.join(datastore.hosts)}")
    if vvol.adopt is not None:
        yield from _adopt((*loc, "adopt"), vvol.adopt, datastore)


def _adopt(loc: Loc, adopt: AdoptConfig, datastore: DatastoreConfig) -> Iterator[Finding]:
    if datastore.kind is DatastoreKind.DIR:
        if adopt.file is None:
            yield Finding(loc, f"datastore {adopt.datastore} is a directory: name the file to adopt")
        elif PurePath(adopt.file).name != adopt.file or adopt.file in (".", ".."):
            yield Finding((*loc, "file"), f"{adopt.file} is not a plain file name inside the datastore")
    elif adopt.file is not None:
        yield Finding((*loc, "file"), f"datastore {adopt.datastore} is a {datastore.kind}: it holds no files")
    for key, value in (("offset", adopt.offset), ("length", adopt.length or 0)):
        if value % SECTOR_SIZE:
            yield Finding((*loc, key), f"{value} is not a multiple of {SECTOR_SIZE} bytes")


def _adoptions(farm: Farm) -> Iterator[Finding]:
    """Adopted parts that overlap, and datastores that would hold allocations and adoptions at once."""
    parts: dict[tuple[str, str], list[tuple[int, float, Loc]]] = {}
    allocated: dict[str, Loc] = {}
    for loc, vvol in _each_vvol(farm):
        if vvol.adopt is None:
            allocated.setdefault(datastore_of(farm, vvol) or "", loc)
            continue
        end = vvol.adopt.offset + vvol.adopt.length if vvol.adopt.length else float("inf")
        parts.setdefault((vvol.adopt.datastore, vvol.adopt.file or ""), []).append((vvol.adopt.offset, end, loc))
    for (name, _), pieces in parts.items():
        datastore = farm.datastores.get(name)
        if datastore is not None and datastore.kind is not DatastoreKind.DIR and name in allocated:
            other = _vvol_name(allocated[name])
            yield Finding(
                (*pieces[0][2], "adopt"),
                f"datastore {name} holds adopted bytes or new VVols, not both; {other} is new",
            )
        yield from _overlaps(pieces)


def _overlaps(pieces: list[tuple[int, float, Loc]]) -> Iterator[Finding]:
    ordered = sorted(pieces, key=operator.itemgetter(0))
    for before, after in itertools.pairwise(ordered):
        if after[0] < before[1]:
            yield Finding((*after[2], "adopt"), f"overlaps what {_vvol_name(before[2])} adopts")


def _each_vvol(farm: Farm) -> Iterator[tuple[Loc, VVolConfig]]:
    for vm_name, vm in farm.vms.items():
        for short, vvol in vm.vvols.items():
            yield ("vms", vm_name, "vvols", short), vvol


def _vvol_name(loc: Loc) -> str:
    return f"{loc[1]}/{loc[3]}"
