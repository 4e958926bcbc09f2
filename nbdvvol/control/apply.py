"""What a farm file changes: pure comparison of what is declared with what is there. Nothing is deleted by absence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nbdvvol.control import policy
from nbdvvol.datastores.format import check_extent_size
from nbdvvol.model.base import Model
from nbdvvol.model.check import place_of
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import (
    AdoptConfig,
    CacheConfig,
    ControlConfig,
    DatastoreConfig,
    Farm,
    HostConfig,
    ProfileConfig,
    QosConfig,
    SocketConfig,
    TlsFiles,
    VVolConfig,
)
from nbdvvol.model.resources import Change, CreateVVol
from nbdvvol.model.units import format_size

Kind = Literal["control", "host", "tls", "datastore", "profile", "vm", "vvol"]


@dataclass(frozen=True, slots=True)
class HaveDatastore:
    """A datastore as the registry has it."""

    config: DatastoreConfig
    use: str


@dataclass(frozen=True, slots=True)
class HaveVm:
    """A VM as the registry has it."""

    host: str
    socket: SocketConfig


@dataclass(frozen=True, slots=True)
class HaveVVol:
    """A VVol as the registry has it."""

    uuid: str
    size: int
    type: str
    profile: str
    read_only: bool
    description: str
    places: list[str]
    """The datastores that its legs lie on, or are to lie on."""
    mirror: bool
    adopt: AdoptConfig | None
    state: str
    host: str | None
    busy: bool
    """A task has it."""


@dataclass(slots=True)
class Have:
    """The registry's side of the comparison."""

    control: ControlConfig | None = None
    tls: TlsFiles | None = None
    hosts: dict[str, HostConfig] = field(default_factory=dict)
    datastores: dict[str, HaveDatastore] = field(default_factory=dict)
    profiles: dict[str, ProfileConfig] = field(default_factory=dict)
    vms: dict[str, HaveVm] = field(default_factory=dict)
    vvols: dict[tuple[str, str], HaveVVol] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """What is to be written, and the lines that say so."""

    changes: list[Change] = field(default_factory=list)
    control: ControlConfig | None = None
    tls: bool = False
    hosts: dict[str, HostConfig] = field(default_factory=dict)
    datastores: dict[str, DatastoreConfig] = field(default_factory=dict)
    profiles: dict[str, ProfileConfig] = field(default_factory=dict)
    vms: dict[str, HaveVm] = field(default_factory=dict)
    create: list[CreateVVol] = field(default_factory=list)
    retry: list[tuple[str, CreateVVol]] = field(default_factory=list)
    resize: list[tuple[str, int]] = field(default_factory=list)
    describe: list[tuple[str, str, str, bool]] = field(default_factory=list)
    """(uuid, type, description, read_only)."""
    profile_of: list[tuple[str, str]] = field(default_factory=list)
    """(uuid, profile): what is the VVol's profile from now on."""
    bind: list[tuple[str, str]] = field(default_factory=list)

    def say(
        self, kind: Kind, name: str, action: Literal["create", "update", "keep", "absent"], detail: str = ""
    ) -> None:
        """Add a line."""
        self.changes.append(Change(action=action, kind=kind, name=name, detail=detail))


NEXT_START = ("cache", "first_cpu", "reactors", "spin_us")
"""What a host's filter takes up when it starts, and keeps."""


def _words(policy: QosConfig | CacheConfig | None) -> str:
    return policy.words() if policy is not None else "none"


def _said(model: Model) -> dict[str, object]:
    said: dict[str, object] = model.model_dump(mode="json")
    if isinstance(model, ProfileConfig):
        return said | {"qos": _words(model.qos), "cache": _words(model.cache)}
    return said | {"cache": format_size(model.cache)} if isinstance(model, HostConfig) else said


def _different(old: Model, new: Model) -> str:
    """Names of the fields that differ."""
    before, after = _said(old), _said(new)
    return ", ".join(f"{key}: {before[key]} → {after[key]}" for key in after if before[key] != after[key])


def compare(have: Have, farm: Farm) -> Plan:
    """The plan from `have` to `farm`. Raises NvError that lists everything that is refused."""
    plan = Plan()
    refused: list[NvError] = []
    _try(refused, _compare_settings, plan, have, farm)
    _try(refused, _compare_hosts, plan, have, farm)
    for name, store in farm.datastores.items():
        _try(refused, _compare_datastore, plan, have, name, store)
    _try(refused, _check_paths, have, farm)
    for name, profile in farm.profiles.items():
        _try(refused, _compare_profile, plan, have, farm, name, profile)
    for vm in farm.vms:
        _try(refused, _compare_vm, plan, have, farm, vm)
        for short, vvol in farm.vms[vm].vvols.items():
            _try(refused, _compare_vvol, plan, have, farm, vm, short, vvol)
    _say_absent(plan, have, farm)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        text = "; ".join(error.message for error in refused)
        raise NvError(refused[0].code, text, "; ".join(dict.fromkeys(e.hint for e in refused if e.hint)))
    return plan


def _try(refused: list[NvError], check: object, *args: object) -> None:
    try:
        check(*args)  # type: ignore[operator]
    except NvError as error:
        refused.append(error)


def _compare_settings(plan: Plan, have: Have, farm: Farm) -> None:
    wants = farm.control
    if wants.listen.startswith("https://") and (wants.tls is None or wants.tokens is None):
        raise NvError(
            Code.CONFIG,
            f"control.listen {wants.listen} needs control.tls and control.tokens",
            "add both, or listen on the unix socket only",
        )
    if have.control is None:
        plan.control = farm.control
    elif have.control != farm.control:
        plan.control = farm.control
        plan.say("control", "control", "update", _different(have.control, farm.control))
    if have.tls != farm.tls:
        plan.tls = True
        plan.say("tls", "tls", "create" if have.tls is None else "update")


def _compare_hosts(plan: Plan, have: Have, farm: Farm) -> None:
    for name, host in farm.hosts.items():
        old = have.hosts.get(name)
        if old == host:
            plan.say("host", name, "keep")
            continue
        if host.logs is not None and not host.logs.startswith("/"):
            text = f"host {name}: the folder for logs {host.logs!r} is not absolute"
            raise NvError(Code.CONFIG, text, "write the whole path; the farm file reader resolves relative ones")
        plan.hosts[name] = host
        plan.say("host", name, "update" if old else "create", _host_words(old, host) if old else "")


def _host_words(old: HostConfig, new: HostConfig) -> str:
    """What changes, and since its filter goes on as it was started, when."""
    waits = [key for key in NEXT_START if getattr(old, key) != getattr(new, key)]
    note = f" ({', '.join(waits)}: at the next start of its filter)" if waits else ""
    return _different(old, new) + note


def _compare_datastore(plan: Plan, have: Have, name: str, new: DatastoreConfig) -> None:
    policy.check_datastore(name, new)
    check_extent_size(new.extent_size)
    old = have.datastores.get(name)
    if old is None:
        plan.datastores[name] = new
        plan.say("datastore", name, "create")
        return
    if old.config == new:
        plan.say("datastore", name, "keep")
        return
    if old.use != "unused":
        for key in ("kind", "path", "uri", "extent_size", "format"):
            before, after = getattr(old.config, key), getattr(new, key)
            if before != after and key != "format":
                raise NvError(
                    Code.CONFLICT,
                    f"datastore {name} is in use: {key} cannot change from {before} to {after}",
                    "declare a new datastore under another name",
                )
    blind = sorted(
        f"{vm}/{short}"
        for (vm, short), vvol in have.vvols.items()
        if name in vvol.places and new.hosts is not None and vvol.host is not None and vvol.host not in new.hosts
    )
    if blind:
        raise NvError(
            Code.CONFLICT,
            f"datastore {name}: hosts {', '.join(new.hosts or [])} leave out a host that serves {', '.join(blind)}",
            "unbind them or move them first",
        )
    if old.config.size is not None and (new.size or 0) < old.config.size and old.use != "unused":
        raise NvError(
            Code.CONFLICT,
            f"datastore {name} is in use: size cannot shrink from {format_size(old.config.size)} to "
            f"{format_size(new.size or 0)}",
            "a datastore only grows",
        )
    plan.datastores[name] = new
    plan.say("datastore", name, "update", _different(old.config, new))


def _check_paths(have: Have, farm: Farm) -> None:
    """Two datastores may not be one place. (Symbolic links are for the reader of the farm file, who sees the disk.)"""
    seen: dict[str, str] = {}
    declared = {name: store.config for name, store in have.datastores.items()} | farm.datastores
    for name, config in declared.items():
        path = place_of(config)
        if path in seen:
            raise NvError(
                Code.CONFIG, f"datastores {seen[path]} and {name} are the same place: {path}", "declare it once"
            )
        seen[path] = name


def _compare_profile(plan: Plan, have: Have, farm: Farm, name: str, profile: ProfileConfig) -> None:
    policy.check_profile(name, profile)
    named = [profile.datastore] if profile.datastore is not None else []
    if profile.mirror is not None:
        named += [*profile.mirror.legs, *profile.mirror.spares]
    for datastore in named:
        if datastore not in {*have.datastores, *farm.datastores}:
            raise NvError(Code.NOT_FOUND, f"profile {name}: no datastore {datastore}", "declare it under datastores")
    old = have.profiles.get(name)
    if old == profile:
        plan.say("profile", name, "keep")
        return
    plan.profiles[name] = profile
    plan.say("profile", name, "update" if old else "create", _different(old, profile) if old else "")


def vm_host(have: Have, farm: Farm, vm: str) -> str:
    """The host of a VM: its own word, else the only one there is. Raises CONFIG or NOT_FOUND."""
    hosts = sorted({*have.hosts, *farm.hosts})
    wanted = farm.vms[vm].host
    if wanted is None:
        only = list(farm.hosts) if len(farm.hosts) == 1 else hosts
        if len(only) == 1:
            return only[0]
        raise NvError(Code.CONFIG, f"VM {vm} names no host and there are {len(hosts)}: {', '.join(hosts)}", "add host")
    if wanted not in hosts:
        raise NvError(Code.NOT_FOUND, f"VM {vm}: no host {wanted}; there are: {', '.join(hosts)}", "declare it")
    return wanted


def _compare_vm(plan: Plan, have: Have, farm: Farm, vm: str) -> None:
    new = HaveVm(vm_host(have, farm, vm), farm.vms[vm].socket)
    old = have.vms.get(vm)
    if old == new:
        plan.say("vm", vm, "keep")
        return
    plan.vms[vm] = new
    plan.say("vm", vm, "update" if old else "create", f"host {old.host} → {new.host}" if old else f"on host {new.host}")


def _compare_vvol(plan: Plan, have: Have, farm: Farm, vm: str, short: str, new: VVolConfig) -> None:
    name = f"{vm}/{short}"
    stores = sorted({*have.datastores, *farm.datastores})
    profiles = have.profiles | farm.profiles
    if new.profile is not None and new.profile not in profiles:
        raise NvError(Code.NOT_FOUND, f"VVol {name}: no profile {new.profile}", "declare it under profiles")
    profile = (new.profile, profiles[new.profile]) if new.profile is not None else None
    named = new.adopt.datastore if new.adopt is not None else new.datastore
    where = policy.choose_places(name, named, profile, stores)
    if new.size is not None and new.adopt is None:
        policy.check_size(name, new.size)
    old = have.vvols.get((vm, short))
    mirror = profile is not None and profile[1].mirror is not None
    if old is None or old.state == "failed":
        _create_vvol(plan, vm, short, new, where, old, mirror=mirror)
        return
    if old.state == "deleting":
        plan.say("vvol", name, "keep", "is being deleted; apply again when it is gone, to create it anew")
        return
    if old.state == "creating":
        other = (old.places, old.adopt) != (where, new.adopt) or (not old.adopt and old.size != new.size)
        plan.say("vvol", name, "keep", "is being created as it was declared before; apply again then" if other else "")
        return
    notes = _check_same_place(name, old, new, where, mirror)
    read_only = new.read_only or (profile is not None and profile[1].read_only)
    done, more = _update_vvol(plan, old, new, read_only, vm_host(have, farm, vm), have.vms.get(vm))
    done += _change_profile(plan, old, new.profile or "", have.profiles, profiles)
    plan.say("vvol", name, "update" if done else "keep", ", ".join([*done, *notes, *more]))


def _change_profile(
    plan: Plan, old: HaveVVol, profile: str, before: Mapping[str, ProfileConfig], after: Mapping[str, ProfileConfig]
) -> list[str]:
    """What another profile, or another content of the same, means for a VVol that is there."""
    done: list[str] = []
    if old.profile != profile:
        plan.profile_of.append((old.uuid, profile))
        done.append(f"profile: {old.profile or 'none'} → {profile or 'none'}")
    had = before.get(old.profile, ProfileConfig())
    gets = after.get(profile, ProfileConfig())
    if had.qos != gets.qos:
        done.append(f"qos: {_words(had.qos)} → {_words(gets.qos)}")
    if had.caching != gets.caching:
        done.append(f"cache: {_words(had.caching)} → {_words(gets.caching)}")
    if old.mirror and had.mirror != gets.mirror:
        done.append("how its mirror is run")
    return done


def _create_vvol(
    plan: Plan, vm: str, short: str, new: VVolConfig, where: list[str], failed: HaveVVol | None, *, mirror: bool
) -> None:
    """Create it; or try again, as it is declared now, what failed before. Where a mirror lies, its profile says."""
    name = f"{vm}/{short}"
    keys = ("size", "profile", "type", "adopt", "read_only", "description")
    place = where[0] if new.adopt is None and not mirror else None
    body = CreateVVol(vm=vm, name=short, datastore=place, **{key: getattr(new, key) for key in keys})
    what = f"{format_size(new.size) if new.size is not None else 'adopted'} on datastore {', '.join(where)}"
    if failed is None:
        plan.create.append(body)
        plan.say("vvol", name, "create", what)
    elif failed.busy:
        plan.say("vvol", name, "keep", "a task has it; apply again when that is done")
    else:
        plan.retry.append((failed.uuid, body))
        plan.say("vvol", name, "update", f"try again to create it: {what}")


def _check_same_place(name: str, old: HaveVVol, new: VVolConfig, where: list[str], mirror: bool) -> list[str]:
    """What is to be said of a VVol that lies elsewhere than it is declared to. Raises NvError where that cannot be."""
    notes: list[str] = []
    if mirror and not old.mirror:
        raise NvError(
            Code.UNSUPPORTED,
            f"VVol {name} has one copy and no mirror's metadata; profile {new.profile} has a mirror",
            f"unbind it and add a leg: nbdvvol mirror add-leg {name} --datastore DATASTORE; then apply again",
        )
    if mirror and sorted(old.places) != sorted(where):
        notes.append(
            f"keeps its legs on {', '.join(old.places)}; the profile's are {', '.join(where)}: "
            "nbdvvol mirror add-leg and remove-leg"
        )
    elif not mirror and where[0] not in old.places:
        raise NvError(
            Code.UNSUPPORTED,
            f"VVol {name} lies on datastore {', '.join(old.places)}; moving it to {where[0]} is not built yet",
            "make a new VVol and copy",
        )
    if old.adopt != new.adopt:
        raise NvError(
            Code.CONFLICT, f"VVol {name}: what it adopts cannot change", "delete it (adopted bytes stay), apply again"
        )
    return notes


def _update_vvol(
    plan: Plan, old: HaveVVol, new: VVolConfig, read_only: bool, host: str, vm: HaveVm | None
) -> tuple[list[str], list[str]]:
    """What is done about a VVol, and what is only said of it."""
    done: list[str] = []
    notes: list[str] = []
    elsewhere = old.host is None or (vm is not None and vm.host != host and old.host != host)
    size = new.size if new.size is not None and old.adopt is None else old.size
    if size > old.size and old.busy:
        notes.append(f"keeps its {format_size(old.size)} while a task has it; apply again when that is done")
    elif size > old.size:
        plan.resize.append((old.uuid, size))
        done.append(f"grow from {format_size(old.size)} to {format_size(size)}")
    elif old.state == "ready" and elsewhere and not old.busy:
        plan.bind.append((old.uuid, host))
        done.append(f"bind to host {host}")
    if size < old.size:
        # No refusal: a VVol that was resized by hand must not keep its old file from starting the farm.
        notes.append(
            f"keeps its {format_size(old.size)}: the file's {format_size(size)} is less, and a VVol only grows"
        )
    words = (new.type.value, new.description, read_only)
    if words != (old.type, old.description, old.read_only):
        plan.describe.append((old.uuid, *words))
        done.append("description, type or read_only")
    return done, notes


def _say_absent(plan: Plan, have: Have, farm: Farm) -> None:
    for kind, mine, theirs in (
        ("host", have.hosts, farm.hosts),
        ("datastore", have.datastores, farm.datastores),
        ("profile", have.profiles, farm.profiles),
        ("vm", have.vms, farm.vms),
    ):
        for name in sorted(set(mine) - set(theirs)):
            plan.say(kind, name, "absent", "not in the file; left alone")  # type: ignore[arg-type]
    for vm, short in sorted(have.vvols):
        if vm not in farm.vms or short not in farm.vms[vm].vvols:
            plan.say("vvol", f"{vm}/{short}", "absent", "not in the file; left alone")
