"""Specs for the filter's tests, and a reporter that writes down what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbdvvol.model.farm import DatastoreKind, SocketConfig, VVolType
from nbdvvol.model.link import DatastoreSpec, ExportReport, Fault, HostState, LegSpec, RunSpec, VmSpec, VVolSpec
from nbdvvol.model.log import LogChange, LogRecord, LogReport

MIB = 1 << 20


def uuid_of(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012x}"


def vvol(
    number: int = 1, *, store: str = "local", at: int = 0, size: int = MIB, obj: str = "", **more: Any
) -> VVolSpec:
    values: dict[str, Any] = {
        "uuid": uuid_of(number),
        "vm": "vm1",
        "name": f"disk{number}",
        "size": size,
        "type": VVolType.DATA,
        "epoch": 1,
        "generation": 1,
        "map_version": 1,
        "legs": [LegSpec(id=0, datastore=store, state="in-sync", object=obj, runs=[RunSpec(o=0, n=size, at=at)])],
    }
    return VVolSpec(**(values | more))


def file_store(path: Path, name: str = "local", **more: Any) -> DatastoreSpec:
    return DatastoreSpec(name=name, kind=DatastoreKind.FILE, path=str(path), **more)


def dir_store(path: Path, name: str = "nas", **more: Any) -> DatastoreSpec:
    return DatastoreSpec(name=name, kind=DatastoreKind.DIR, path=str(path), **more)


def host_state(*parts: VVolSpec | DatastoreSpec, **more: Any) -> HostState:
    vvols = {part.uuid: part for part in parts if isinstance(part, VVolSpec)}
    stores = {part.name: part for part in parts if isinstance(part, DatastoreSpec)}
    vms = {spec.vm: VmSpec(name=spec.vm, socket=SocketConfig()) for spec in vvols.values()}
    return HostState(**({"host": "h", "vvols": vvols, "datastores": stores, "vms": vms} | more))


class Reports:
    """A Reporter."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.exports: dict[str, ExportReport] = {}
        self.logs: list[LogReport] = []
        self.asked: list[tuple[LogChange, Callable[[LogRecord], None]]] = []

    def export(self, report: ExportReport) -> None:
        self.exports[report.uuid] = report
        self.lines.append(f"export {report.uuid[-1]} epoch {report.epoch} {'error' if report.error else 'ok'}")

    def released(self, uuid: str, epoch: int) -> None:
        self.lines.append(f"released {uuid[-1]} epoch {epoch}")

    def fault(self, fault: Fault) -> None:
        self.lines.append(f"fault {fault.datastore}/{fault.object}")

    def log(self, report: LogReport) -> None:
        self.logs.append(report)

    def ask_log(self, change: LogChange, answer: Callable[[LogRecord], None]) -> None:
        self.asked.append((change, answer))

    def answer(self, wanted: str, refused: Any = "") -> LogChange:
        """Answer what was asked last."""
        change, answer = self.asked.pop()
        assert change.wanted == wanted and not self.asked
        answer(LogRecord(id=change.id, vvol=change.vvol, refused=refused))
        return change

    def notice(self, event: str, subject: str, message: str) -> None:
        self.lines.append(f"notice {event} {subject}")


async def until(true: Callable[[], Any], limit_s: float = 20.0) -> None:
    """Wait for a condition; fail when it does not come true in time."""
    async with asyncio.timeout(limit_s):
        while not true():
            await asyncio.sleep(0.005)
