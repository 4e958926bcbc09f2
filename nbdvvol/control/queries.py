"""Answers to a VM's LIST, INFO and LIST_META_CONTEXT, asked through its host's filter."""

from __future__ import annotations

from nbdvvol.control.registry import Registry, bindings
from nbdvvol.model.link import Answer, ExportInfo, ExportReport, Listing, Query

CONTEXTS = ("base:allocation",)
Facts = tuple[str, str, str, ExportReport | None]


def matching_contexts(queries: list[str]) -> list[str]:
    """The contexts that LIST_META_CONTEXT's queries name; no query means all, `base:` all of that namespace."""
    if not queries:
        return list(CONTEXTS)
    return [context for context in CONTEXTS if any(q in (context, context.split(":")[0] + ":") for q in queries)]


def find(facts: list[Facts], vm: str | None, name: str) -> Facts | None:
    """The VVol a client means: `VM/NAME`; on a VM's own socket also `NAME`, and "" where there is only one."""
    if vm is not None and not name and len(facts) == 1:
        return facts[0]
    for entry in facts:
        if name == f"{entry[0]}/{entry[1]}" or (vm is not None and name == entry[1]):
            return entry
    return None


def canonical(entry: Facts, vm: str | None) -> str:
    """The name a VVol goes by on that socket."""
    return entry[1] if vm is not None else f"{entry[0]}/{entry[1]}"


def decide(facts: list[Facts], query: Query) -> Answer:
    """The answer to a query, given the facts its asker may see."""
    if query.what == "list":
        exports = [Listing(name=canonical(entry, query.vm), description=entry[2]) for entry in facts]
        return Answer(id=query.id, exports=exports)
    entry = find(facts, query.vm, query.name)
    if entry is None:
        return Answer(id=query.id, error="UNKNOWN", message=f"no VVol {query.name!r} here")
    if query.what == "list_meta":
        return Answer(id=query.id, contexts=matching_contexts(query.queries))
    report = entry[3]
    if report is None or report.error:
        why = report.error if report is not None else "its host is about to serve it; try again"
        return Answer(id=query.id, error="POLICY", message=f"VVol {entry[0]}/{entry[1]}: {why}")
    info = ExportInfo(
        name=canonical(entry, query.vm),
        description=entry[2],
        size=report.size,
        flags=report.flags,
        block_min=report.block_min,
        block_preferred=report.block_preferred,
        block_max=report.block_max,
    )
    return Answer(id=query.id, info=info)


async def answer(registry: Registry, host: str, query: Query) -> Answer:
    """Answer a query of this host's filter: it may ask for its own VVols only."""
    return decide(await registry.run(bindings.facts, host, query.vm), query)
