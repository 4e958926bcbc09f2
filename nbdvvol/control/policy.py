"""What a profile means: which datastore holds a new VVol, and what is refused because it is not built yet."""

from __future__ import annotations

from nbdvvol.model.check import log_findings, remote_findings
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.farm import DatastoreConfig, DatastoreKind, IoMode, ProfileConfig
from nbdvvol.model.units import format_size

SECTOR = 512
SIZE_MAX = 1 << 62


def check_profile(name: str, profile: ProfileConfig) -> None:
    """Raise CONFIG for what makes no sense."""
    if profile.mirror is not None:
        named = [*profile.mirror.legs, *profile.mirror.spares]
        twice = sorted({store for store in named if named.count(store) > 1})
        if twice:
            raise NvError(
                Code.CONFIG,
                f"profile {name}: datastore {twice[0]} is named twice in its mirror: copies on one are lost together",
                "name each once",
            )
    for keys, sentence in log_findings(profile):
        raise NvError(Code.CONFIG, f"profile {name}: {sentence}", f"correct cache.{'.'.join(keys)}")
    path = profile.logging.path if profile.logging is not None else None
    if path is not None and not path.startswith("/"):
        raise NvError(
            Code.CONFIG,
            f"profile {name}: the log's path {path!r} is not absolute",
            "write the whole path; the farm file reader resolves relative ones",
        )


def check_datastore(name: str, config: DatastoreConfig) -> None:
    """Raise CONFIG for a declaration that makes no sense."""
    for key, sentence in remote_findings(config):
        raise NvError(Code.CONFIG, f"datastore {name}: {sentence}", f"correct {key}" if key else "add it")
    if config.kind is not DatastoreKind.NBD and not (config.path or "").startswith("/"):
        raise NvError(
            Code.CONFIG,
            f"datastore {name}: path {config.path!r} is not absolute",
            "write the whole path; the farm file reader resolves relative ones",
        )
    if config.size is not None and config.kind is not DatastoreKind.FILE:
        raise NvError(
            Code.CONFIG,
            f"datastore {name}: size is for kind file; kind {config.kind} has the size it has",
            "take size out",
        )


def choose_datastore(
    vvol: str, named: str | None, profile: tuple[str, ProfileConfig] | None, datastores: list[str]
) -> str:
    """The datastore of a new VVol: its own word, else its profile's, else the only one there is.

    Raises CONFIG when that leaves a choice, NOT_FOUND when it names none of `datastores`."""
    if profile is not None:
        check_profile(*profile)
    wanted = named or (profile[1].datastore if profile is not None else None)
    if wanted is None and len(datastores) == 1:
        return datastores[0]
    if wanted is None:
        raise NvError(
            Code.CONFIG,
            f"VVol {vvol} names no datastore and there are {len(datastores)}: {', '.join(datastores) or 'none'}",
            "give it a datastore, or a profile that has one",
        )
    if wanted not in datastores:
        raise NvError(
            Code.NOT_FOUND,
            f"VVol {vvol}: no datastore {wanted}; there are: {', '.join(datastores) or 'none'}",
            "declare it in the farm file and apply",
        )
    return wanted


def choose_places(
    vvol: str, named: str | None, profile: tuple[str, ProfileConfig] | None, datastores: list[str]
) -> list[str]:
    """The datastores of a new VVol: those of its profile's mirror, or the one that `choose_datastore` finds.

    Raises CONFIG when the VVol names one beside its profile's mirror, NOT_FOUND for a leg on none of `datastores`."""
    mirror = profile[1].mirror if profile is not None else None
    if mirror is None:
        return [choose_datastore(vvol, named, profile, datastores)]
    assert profile is not None, "a mirror is a profile's"
    check_profile(*profile)
    if named is not None:
        raise NvError(
            Code.CONFIG,
            f"VVol {vvol} lies where its profile {profile[0]} has its mirror's legs, not on datastore {named}",
            "take the datastore out, or use a profile without a mirror",
        )
    for leg in [*mirror.legs, *mirror.spares]:
        if leg not in datastores:
            raise NvError(
                Code.NOT_FOUND,
                f"profile {profile[0]}: no datastore {leg}; there are: {', '.join(datastores) or 'none'}",
                "declare it in the farm file and apply",
            )
    return list(mirror.legs)


def check_size(vvol: str, size: int, step: int = SECTOR) -> None:
    """Raise INVALID unless `size` is a positive multiple of `step` bytes that the allocator can hold."""
    if not 0 < size <= SIZE_MAX:
        raise NvError(
            Code.INVALID, f"VVol {vvol}: {size} bytes are outside 1..{SIZE_MAX}", "give another size, such as 1GiB"
        )
    if size % step:
        above = -(-size // step) * step
        raise NvError(
            Code.INVALID,
            f"VVol {vvol}: {size} bytes are not a multiple of {step}",
            f"the next one is {above} ({format_size(above)})",
        )


def opens_direct(config: DatastoreConfig, host_count: int, direct_ok: bool | None) -> bool:
    """Whether filters open the datastore with O_DIRECT: asked for, or other hosts can write it too."""
    if config.kind is DatastoreKind.NBD:
        return False
    if config.io is not IoMode.AUTO:
        return config.io is IoMode.DIRECT
    seen_by = host_count if config.hosts is None else len(config.hosts)
    return seen_by > 1 and direct_ok is not False
