"""VVols: `create|delete|resize vvol`, `adopt`, `bind`, `unbind`, `describe vvol`, `uri`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvvol.cli.options import Force, NoWait, Output, OutputOption, RunOption, VVolArgument, Yes, two_words

if TYPE_CHECKING:
    from nbdvvol.cli.client import Client
    from nbdvvol.model.observe import CacheCounters, ExportCounters
    from nbdvvol.model.resources import CreateVVol, ExportUri, VVol

FullName = Annotated[str, typer.Argument(metavar="VM/NAME", help="The VM and the new VVol's name.")]
Profile = Annotated[str | None, typer.Option(help="Its profile.")]
Type = Annotated[str, typer.Option("--type", help="data, config, swap, memory or other.")]
Description = Annotated[str, typer.Option(help="Words for people; clients see them too.")]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="Refuse writes.")]


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    for verb, command, text in (
        ("create", create, "Create a VVol."),
        ("delete", delete, "Delete a VVol; its space is overwritten with zeros before anybody gets it."),
        ("resize", resize, "Grow a VVol, also while it is in use."),
        ("describe", describe, "Everything about a VVol."),
    ):
        two_words(app, verb, text, "vvol", command, text)
    app.command()(adopt)
    app.command()(bind)
    app.command()(unbind)
    app.command()(uri)


def create(
    name: FullName,
    size: Annotated[str, typer.Option(help="Bytes, or text such as 10GiB.")],
    profile: Profile = None,
    datastore: Annotated[str | None, typer.Option(help="Where it lives, when no profile says so.")] = None,
    type_: Type = "data",
    description: Description = "",
    read_only: ReadOnly = False,
    no_wait: NoWait = False,
    run: RunOption = None,
) -> None:
    """Create a VVol."""
    vm, short = _split(name)
    wanted = {"vm": vm, "name": short, "size": size, "profile": profile, "datastore": datastore, "type": type_}
    _create({**wanted, "description": description, "read_only": read_only}, "created", no_wait, run)


def adopt(
    name: FullName,
    datastore: Annotated[str, typer.Option(help="The datastore whose bytes are taken over.")],
    offset: Annotated[str, typer.Option(help="Where they start.")] = "0",
    length: Annotated[str | None, typer.Option(help="How many; left out, to the end.")] = None,
    file: Annotated[str | None, typer.Option(help="Datastores of kind dir: the file.")] = None,
    profile: Profile = None,
    type_: Type = "data",
    description: Description = "",
    read_only: ReadOnly = False,
    no_wait: NoWait = False,
    run: RunOption = None,
) -> None:
    """Serve bytes that are already there as a VVol; they stay where and as they are."""
    vm, short = _split(name)
    part = {"datastore": datastore, "offset": offset, "length": length, "file": file}
    wanted = {"vm": vm, "name": short, "adopt": part, "profile": profile, "type": type_}
    _create({**wanted, "description": description, "read_only": read_only}, "adopted", no_wait, run)


def delete(
    name: VVolArgument,
    yes: Yes = False,
    no_wait: NoWait = False,
    run: RunOption = None,
) -> None:
    """Delete a VVol."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        full = client.resolve(name)
        if not yes and sys.stdin.isatty():
            typer.confirm(f"Delete {full} and everything on it?", abort=True)
        follow(client, client.delete(full), f"{full} deleted", no_wait=no_wait)


def resize(
    name: VVolArgument,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="The new size; larger than now.")],
    no_wait: NoWait = False,
    run: RunOption = None,
) -> None:
    """Grow a VVol."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow
    from nbdvvol.model.units import format_size

    size_bytes = _size(size)
    with Client.connect(run) as client:
        full = client.resolve(name)
        follow(client, client.resize(full, size_bytes), f"{full} is {format_size(size_bytes)} now", no_wait=no_wait)


def bind(
    name: VVolArgument,
    host: Annotated[str | None, typer.Option(help="The host that serves it from now on; left out, the VM's.")] = None,
    force: Force = False,
    yes: Yes = False,
    no_wait: NoWait = False,
    run: RunOption = None,
) -> None:
    """Let a host serve a VVol, under a new epoch."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        full = client.resolve(name)
        if force:
            _consent(client, full, yes)
        follow(client, client.bind(full, host, force=force), f"{full} bound", no_wait=no_wait)


def unbind(
    name: VVolArgument,
    force: Force = False,
    yes: Yes = False,
    no_wait: NoWait = False,
    run: RunOption = None,
) -> None:
    """Stop serving a VVol, once everything in flight is done."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    with Client.connect(run) as client:
        full = client.resolve(name)
        if force:
            _consent(client, full, yes)
        follow(client, client.unbind(full, force=force), f"{full} unbound", no_wait=no_wait)


def _consent(client: Client, full: str, yes: bool) -> None:
    """Tell what force puts at risk; somebody at a terminal is asked."""
    found = client.risks(full)
    if not found.risks:
        return
    print(f"taking {full} by force puts this at risk:", file=sys.stderr)
    for risk in found.risks:
        print(f"  {risk}", file=sys.stderr)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Take {full} by force?", abort=True, err=True)


def uri(
    name: VVolArgument,
    lines: Annotated[bool, typer.Option("--lines", help="Also print command lines to paste, per tool.")] = False,
    output: OutputOption = Output.TABLE,
    run: RunOption = None,
) -> None:
    """Print where a VM attaches a VVol."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit

    with Client.connect(run) as client:
        found = client.uri(name)
    if output is not Output.TABLE:
        emit(found, output)
        return
    print(found.uri)
    if lines:
        _print_lines(found)


def describe(name: VVolArgument, output: OutputOption = Output.TABLE, run: RunOption = None) -> None:
    """Print everything about a VVol."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit

    with Client.connect(run) as client:
        found = client.vvol(name)
        if output is not Output.TABLE:
            emit(found, output)
            return
        _describe(found, [one for host in client.counters() for one in host.exports if one.uuid == found.uuid])
        if found.uri:
            _print_lines(client.uri(found.full_name))


def _describe(vvol: VVol, counters: list[ExportCounters]) -> None:
    from nbdvvol.cli.cache import log_words, lost_words
    from nbdvvol.cli.mirror import leg_words, mirror_words
    from nbdvvol.cli.output import pairs
    from nbdvvol.model.units import format_size

    binding = vvol.binding
    pairs(
        [
            ("vvol", vvol.full_name),
            ("uuid", vvol.uuid),
            ("size", f"{format_size(vvol.size)} ({vvol.size} bytes)"),
            ("type", vvol.type),
            ("profile", vvol.profile),
            ("qos", vvol.qos.words() if vvol.qos is not None else "none"),
            ("cache", vvol.cache.words() if vvol.cache is not None else "none"),
            ("state", vvol.state),
            ("error", vvol.error),
            ("read_only", "yes" if vvol.read_only else "no"),
            ("description", vvol.description),
            ("binding", f"{binding.state} to {binding.host}, epoch {binding.epoch}" if binding else "unbound"),
            ("not served", binding.error if binding else ""),
            ("generation", vvol.generation),
            ("map_version", vvol.map_version),
            ("mirror", mirror_words(vvol)),
            *((f"leg {leg.id}", _leg(leg) if vvol.mirror is None else leg_words(leg)) for leg in vvol.legs),
            *(("since opened", _done(one)) for one in counters),
            *(("of the cache", _cached(one.cache)) for one in counters if one.cache is not None),
            ("log holds", lost_words(vvol) if vvol.log is not None and not counters else ""),
            *(("write-back log", log_words(one.log)) for one in counters if one.log is not None),
            ("uri", vvol.uri),
        ]
    )


def _done(counters: ExportCounters) -> str:
    from nbdvvol.cli.output import amount

    return (
        f"{counters.connections} clients; {counters.reads} reads ({amount(counters.read_bytes)}), "
        f"{counters.writes} writes ({amount(counters.write_bytes)}), {counters.flushes} flushes, "
        f"{counters.trims + counters.zeroes + counters.others} others, {counters.errors} errors"
    )


def _cached(cache: CacheCounters) -> str:
    from nbdvvol.cli.counters import floor_words
    from nbdvvol.cli.output import amount, number

    if cache.mode == "none":
        return "unused: the host's filter was started without memory for one"
    if cache.bypassed:
        return "bypassed: its storage is in memory already"
    ratio = f"{cache.hit_ratio:.1%} of {number(cache.hits + cache.misses)} blocks" if cache.hit_ratio is not None else 0
    return (
        f"hits {ratio}; {number(cache.filled)} filled, {number(cache.written)} written, {number(cache.ahead_used)} of "
        f"{number(cache.ahead)} fetched ahead used; holds {amount(cache.held_bytes)}, floor {floor_words(cache)}"
    )


def _leg(leg: object) -> str:
    from nbdvvol.model.resources import Leg

    assert isinstance(leg, Leg)
    where = f" file {leg.object}" if leg.object else ""
    adopted = ", adopted" if leg.adopted else ""
    return f"{leg.state} on {leg.datastore}{where}, {len(leg.regions)} regions{adopted}"


def _print_lines(found: ExportUri) -> None:
    print("\nto attach it:")
    for tool, line in found.lines.items():
        print(f"  # {tool}\n  {line}")


def _split(name: str) -> tuple[str, str]:
    vm, slash, short = name.partition("/")
    if not (vm and slash and short):
        raise typer.BadParameter(f"{name} is not VM/NAME, such as vm1/data")
    return vm, short


def _size(text: str) -> int:
    from nbdvvol.model.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _create(wanted: dict[str, object], done: str, no_wait: bool, run: RunOption) -> None:
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import follow

    order = _order(wanted)
    with Client.connect(run) as client:
        follow(client, client.create(order), f"{order.vm}/{order.name} {done}", no_wait=no_wait)


def _order(wanted: dict[str, object]) -> CreateVVol:
    from pydantic import ValidationError

    from nbdvvol.model.resources import CreateVVol

    try:
        return CreateVVol.model_validate(wanted)
    except ValidationError as error:
        told = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
        )
        raise typer.BadParameter("; ".join(told)) from None
