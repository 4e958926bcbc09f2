"""`get KIND`: lists of everything there is."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdvvol.cli.options import Output, OutputOption, RunOption

if TYPE_CHECKING:
    from nbdvvol.cli.client import Client

FOLLOW_WAIT_S = 20.0
Columns = tuple[tuple[str, ...], Callable[[Any], tuple[object, ...]]]
"""Heads, and what makes a row of an item."""


class Kind(enum.StrEnum):
    """What `get` lists."""

    VVOLS = "vvols"
    DATASTORES = "datastores"
    HOSTS = "hosts"
    PROFILES = "profiles"
    VMS = "vms"
    REACTORS = "reactors"
    TASKS = "tasks"
    EVENTS = "events"


def register(app: typer.Typer) -> None:
    """Add this noun's commands."""
    app.command()(get)


def get(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    output: OutputOption = Output.TABLE,
    after: Annotated[int, typer.Option(min=0, help="events: only those after this id.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="events: go on printing new ones.")] = False,
    run: RunOption = None,
) -> None:
    """List VVols, datastores, hosts, profiles, VMs, reactors, tasks or events."""
    from nbdvvol.cli.client import Client
    from nbdvvol.cli.output import emit, table

    if kind is not Kind.EVENTS and (follow or after):
        raise typer.BadParameter("--after and --follow are for events")
    with Client.connect(run) as client:
        if follow:
            _follow(client, after, output)
            return
        heads, row = columns(kind)
        items = client.events(after=after) if kind is Kind.EVENTS else client.all(kind, _model(kind))
        if output is Output.TABLE:
            table(heads, map(row, items))
        else:
            emit(items, output)


def _leg(leg: Any) -> str:
    return leg.datastore if leg.state == "in-sync" else f"{leg.datastore}({leg.state})"


def columns(kind: Kind) -> Columns:
    """A kind's column heads, and how one item becomes a row."""
    return (_declared() | _going_on())[kind]


def _declared() -> dict[Kind, Columns]:
    """What the farm file names."""
    from nbdvvol.model.units import format_size

    return {
        Kind.VVOLS: (
            ("vvol", "size", "type", "profile", "state", "host", "binding", "datastore"),
            lambda v: (
                v.full_name,
                format_size(v.size),
                v.type,
                v.profile,
                v.state,
                v.binding.host if v.binding else "",
                f"{v.binding.state} {v.binding.why}".rstrip() if v.binding else "unbound",
                ",".join(map(_leg, v.legs)),
            ),
        ),
        Kind.DATASTORES: (
            ("datastore", "kind", "size", "free", "use", "fences", "state", "hosts", "path", "detail"),
            lambda d: (
                d.name,
                d.kind,
                format_size(d.size),
                format_size(d.free),
                d.use,
                "yes" if d.fences else "no",
                d.state,
                ",".join(d.hosts) if d.hosts is not None else "all",
                d.path,
                d.detail,
            ),
        ),
        Kind.HOSTS: (
            ("host", "connected", "vvols", "address"),
            lambda h: (h.name, "yes" if h.connected else "no", h.vvols, h.address),
        ),
        Kind.PROFILES: (
            ("profile", "datastore", "read_only", "qos", "cache"),
            lambda p: (
                p.name,
                p.spec.datastore,
                "yes" if p.spec.read_only else "no",
                p.spec.qos.words() if p.spec.qos is not None else "none",
                p.spec.cache.words() if p.spec.cache is not None else "none",
            ),
        ),
        Kind.VMS: (
            ("vm", "host", "vvols", "socket"),
            lambda v: (v.name, v.host, ",".join(v.vvols), v.socket),
        ),
    }


def _going_on() -> dict[Kind, Columns]:
    """What happens."""
    from nbdvvol.cli.output import amount

    def progress(task: Any) -> str:
        return f"{task.state}({task.progress:.0%})" if task.state == "running" else str(task.state)

    return {
        Kind.REACTORS: (
            (
                "reactor",
                "connections",
                "pool_free_bytes",
                "requests",
                "batches",
                "enters",
                "sleeps",
                "pool_waits",
                "copies_bytes",
            ),
            lambda r: (
                f"{r.host}/{r.reactor}",
                r.connections,
                amount(r.pool_free_bytes),
                r.requests,
                r.batches,
                r.enters,
                r.sleeps,
                r.pool_waits,
                amount(r.copies_bytes),
            ),
        ),
        Kind.TASKS: (
            ("task", "kind", "subject", "state", "detail"),
            lambda t: (t.id, t.kind, t.subject, progress(t), t.error or t.detail),
        ),
        Kind.EVENTS: (
            ("event", "time", "kind", "subject", "message"),
            lambda e: (e.id, e.time.isoformat(timespec="seconds"), e.kind, e.subject, e.message),
        ),
    }


def _model(kind: Kind) -> type:
    from nbdvvol.model import resources

    names = {
        Kind.VVOLS: resources.VVol,
        Kind.DATASTORES: resources.Datastore,
        Kind.HOSTS: resources.Host,
        Kind.PROFILES: resources.Profile,
        Kind.VMS: resources.Vm,
        Kind.REACTORS: resources.Reactor,
        Kind.TASKS: resources.Task,
        Kind.EVENTS: resources.Event,
    }
    return names[kind]


def _follow(client: Client, after: int, output: Output) -> None:
    while True:
        for event in client.events(after=after, wait_s=FOLLOW_WAIT_S):
            after = max(after, event.id)
            if output is Output.JSON:
                print(event.model_dump_json(), flush=True)
            else:
                when = event.time.isoformat(timespec="seconds")
                print(f"{event.id} {when} {event.kind} {event.subject} {event.message}", flush=True)
