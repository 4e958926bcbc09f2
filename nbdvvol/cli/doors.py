"""The command line's one door to the other rooms: starts daemons and tools, imported only when asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdvvol.doctor import Finding
    from nbdvvol.model.farm import Farm
    from nbdvvol.model.rebuild import Rebuilt


def up(file: Path, *, state: Path, run: Path) -> int:
    """A whole farm in the foreground; returns the exit status."""
    from nbdvvol.up import UpOptions, run_up

    return asyncio.run(run_up(UpOptions(file=file, state=state, run=run)))


def control(*, state: Path, run: Path, listen: str, parent: int) -> None:
    """The control daemon."""
    from nbdvvol.control.daemon import ControlOptions, run_control
    from nbdvvol.lifeline import end_with_parent

    end_with_parent(parent)
    _run(run_control(ControlOptions(state_dir=state, run_dir=run, listen=listen or None)))


def filter_(
    *,
    host: str,
    control: str,
    token_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    run: Path,
    state: Path | None,
    reactors: int,
    spin_us: int,
    first_cpu: int | None,
    cache: str,
    parent: int,
) -> None:
    """A host's filter daemon."""
    from nbdvvol.filter.daemon import FilterOptions, run_filter
    from nbdvvol.lifeline import end_with_parent

    end_with_parent(parent)
    options = FilterOptions(
        host=host,
        control=control,
        token_file=token_file,
        ca_file=ca,
        cert_file=cert,
        key_file=key,
        run_dir=run,
        state_dir=state,
        reactors=reactors,
        spin_us=spin_us,
        first_cpu=first_cpu,
        cache_bytes=_cache_size(cache),
    )
    _run(run_filter(options))


def _cache_size(text: str) -> int:
    """Raises NvError(USAGE)."""
    from pydantic import ValidationError

    from nbdvvol.model.errors import Code, NvError
    from nbdvvol.model.farm import HostConfig

    try:
        return HostConfig(cache=text).cache  # type: ignore[arg-type]  # the model reads `64MiB`
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise NvError(Code.USAGE, f"--cache: {what}", "write a size, such as 256MiB") from None


def standalone(path: Path, *, export: str, read_only: bool, stdio: bool, reactors: int, spin_us: int) -> None:
    """One plain file or device, without control."""
    from nbdvvol.filter.standalone import run_standalone

    _run(run_standalone(path, export=export, read_only=read_only, stdio=stdio, reactors=reactors, spin_us=spin_us))


def rebuild(file: Path, *, state: Path, without: list[str], dry_run: bool) -> Rebuilt:
    """A registry from what the datastores say."""
    from nbdvvol.rebuild import rebuild

    return asyncio.run(rebuild(file, state.absolute(), without, dry_run=dry_run))


def attach(
    uri: str,
    *,
    name: str,
    identity: str,
    device: str | None,
    connections: int,
    dead_timeout_s: int,
    request_timeout_s: int,
    run_dir: Path,
    foreground: bool,
) -> None:
    """A VVol as a device of this machine's kernel; prints the device."""
    from nbdvvol.filter.attach import run_attach

    run_attach(
        uri,
        name=name,
        identity=identity,
        device=device,
        connections=connections,
        dead_timeout_s=dead_timeout_s,
        request_timeout_s=request_timeout_s,
        run_dir=run_dir,
        foreground=foreground,
        on_attached=lambda attachment: print(attachment.device, flush=True),
    )


def detach(run_dir: Path, name_or_device: str, *, force: bool) -> None:
    """Take a device down."""
    from nbdvvol.filter.attach import run_detach

    print(f"{run_detach(run_dir, name_or_device, force=force).device} detached")


def examine(farm: Farm | None) -> list[Finding]:
    """What `doctor` finds."""
    from nbdvvol.doctor import examine

    return examine(farm)


def _run(main: Coroutine[Any, Any, None]) -> None:
    import uvloop

    uvloop.run(main)
