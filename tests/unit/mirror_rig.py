"""A filter's exports over the real data plane, with control played by a record: mirrored VVols on local files.

Everything runs in the rig's event loop; the test's own thread is the VM. `Registry` answers by the rule of
docs/mirror.md section 3, and can be away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from nbdvvol.datastores.format import Label, MapCopy, MapRun, encode_label, encode_map, region_bytes, region_layout
from nbdvvol.filter.claims import ClaimBook
from nbdvvol.filter.exports import ExportTable
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from nbdvvol.model.link import DatastoreSpec, LegSpec, RunSpec, VVolSpec
from nbdvvol.model.mirror import (
    Leased,
    LegChange,
    LegDoubt,
    LegRecord,
    MirrorReport,
    MirrorSpec,
    Record,
    RecordLeg,
    Stamp,
)
from tests.lib.procs import wait_until
from tests.unit.filter_words import MIB, Reports, file_store, host_state, uuid_of, vvol
from tests.unit.plane_rig import Client, Rig

SIZE = 32 * MIB
META = region_bytes(SIZE, MIB)
UUID_OF = uuid_of(1)
NOBODYS = (1 << 64) - 1


class Registry(Reports):
    """Control, as far as a filter's mirrors see it."""

    def __init__(self, epoch: int, legs: int) -> None:
        super().__init__()
        stamp = Stamp(epoch=epoch - 1, generation=1)
        self.record = Record(
            epoch=epoch, generation=1, legs=[RecordLeg(id=n + 1, state="in-sync", stamp=stamp) for n in range(legs)]
        )
        self.away = False
        self.asked: list[str] = []
        self.reasons: list[str] = []
        self.reports_of_mirrors: list[MirrorReport] = []
        self.leases: dict[str, float] = {}

    def ask_leg(self, change: LegChange, answer: Callable[[LegRecord], None]) -> None:
        if self.away:
            return
        refused = self._take(change)
        self.reasons += [change.reason] if change.wanted == "stale" else []
        self.asked.append(f"{change.wanted} {change.leg}" + (f": {refused}" if refused else ""))
        record = self.record.model_copy(deep=True)
        message = LegRecord(id=change.id, vvol=change.vvol, refused=refused, record=record)
        asyncio.get_running_loop().call_soon(answer, message)

    def _take(self, change: LegChange) -> Literal["", "epoch", "generation", "last-leg"]:
        """The compare-and-swap on {epoch, generation}."""
        record, leg = self.record, next(leg for leg in self.record.legs if leg.id == change.leg)
        if change.epoch != record.epoch:
            return "epoch"
        if change.stamp is not None and change.stamp.key() > leg.stamp.key():
            leg.stamp = change.stamp
        if change.wanted in ("confirm", leg.state):
            return ""
        if change.generation != record.generation:
            return "generation"
        if leg.state == "in-sync" and sum(one.state == "in-sync" for one in record.legs) == 1:
            return "last-leg"
        leg.state = change.wanted
        record.generation += 1
        return ""

    def renew(self, vvols: dict[str, int], answer: Callable[[Leased], None]) -> None:
        given = {uuid: self.leases[uuid] for uuid in vvols if uuid in self.leases}
        if not self.away:
            asyncio.get_running_loop().call_soon(answer, Leased(id=0, vvols=given))

    def mirror(self, report: MirrorReport) -> None:
        self.reports_of_mirrors.append(report)

    def doubt(self, said: LegDoubt) -> None:
        self.asked.append(f"doubt {said.leg}: {said.doubt}")

    def leg_released(self, uuid: str, epoch: int, leg: int, doubt: bool) -> None:
        self.lines.append(f"leg_released {leg} epoch {epoch}{' in doubt' if doubt else ''}")

    def state_of(self, leg: int) -> str:
        return next(one.state for one in self.record.legs if one.id == leg)


class MirrorRig(Rig):
    """One mirrored VVol on local files."""

    def __init__(self, folder: Path, legs: int = 2, cache_bytes: int = 0, **mirror: Any) -> None:
        super().__init__(cache_bytes=cache_bytes)
        self.files = [folder / f"leg{number + 1}.img" for number in range(legs)]
        self.run_dir = folder
        self.epoch = 2
        self.registry = Registry(self.epoch, legs)
        self.wishes: dict[int, Any] = {}
        """By leg: what is to become of it."""
        self.policy = {"read": "primary", "op_deadline_s": 5.0, "hold_s": 20.0, "intent_idle_s": 0.2} | mirror
        for number, file in enumerate(self.files):
            if not file.exists():
                self.make_leg(file, number + 1)
        self.call(self._start)

    def make_leg(self, file: Path, leg: int, *, syncing: bool = False) -> None:
        """A file with an empty leg in it, labelled as control does it."""
        with file.open("wb") as out:
            out.truncate(META + SIZE)
            label = Label(UUID(UUID_OF), leg, self.epoch - 1, 1, SIZE, 1, syncing)
            for at in (0, 4096):
                out.seek(at)
                out.write(encode_label(label))
            copy = MapCopy(UUID(UUID_OF), leg, 1, SIZE, (MapRun(0, SIZE, META),))
            for at in region_layout(META, SIZE).maps:
                out.seek(at)
                out.write(encode_map(copy))

    def _start(self) -> None:
        self.objects = ObjectTable(self.plane, FaultBook(self.run_dir))
        self.objects.farm = "farm"
        self.table = ExportTable(
            self.plane, self.objects, self.registry, ClaimBook(self.run_dir), LogBook(self.run_dir)
        )
        self.plane.on_mirror = self.table.mirror_event
        self.plane.on_sync_failed = self.table.sync_failed

    def spec(self, **more: Any) -> VVolSpec:
        """What control wants, by its record."""
        legs = [
            LegSpec(
                id=leg.id,
                datastore=f"store{leg.id}",
                state=leg.state,
                stamp=leg.stamp,
                meta_offset=0,
                meta_length=META,
                runs=[RunSpec(o=0, n=SIZE, at=META)],
                resync=self.wishes.get(leg.id, "auto"),
            )
            for leg in self.registry.record.legs
        ]
        record = self.registry.record
        values = {"epoch": record.epoch, "generation": record.generation, "legs": legs} | more
        return vvol(1, size=SIZE, mirror=MirrorSpec.model_validate(self.policy), **values)

    def stores(self) -> list[DatastoreSpec]:
        return [file_store(file, f"store{number + 1}") for number, file in enumerate(self.files)]

    def want(self, spec: VVolSpec | None) -> None:
        """Control says so; returns at once."""
        parts = [*self.stores(), *([spec] if spec is not None else [])]
        self.call(self.table.take, host_state(*parts))

    def serve(self, **more: Any) -> int:
        """Wanted, opened, attached: the volume's number."""
        self.want(self.spec(**more))
        wait_until("it serves", lambda: self._volume() is not None)
        volume = self._volume()
        assert volume is not None
        return volume

    def _volume(self) -> int | None:
        export = self.table.get(UUID_OF)
        return export.volume if export is not None else None

    def lane(self, leg: int) -> str:
        """A leg, as the filter runs it."""
        export = self.table.get(UUID_OF)
        assert export is not None and export.mirror is not None
        return export.mirror.places[leg].lane

    def error(self) -> str:
        export = self.table.get(UUID_OF)
        return export.error if export is not None else ""

    def client(self) -> Client:
        volume = self._volume()
        assert volume is not None
        return self.connect(volume, SIZE)

    def away(self, yes: bool) -> None:
        """Control is away, or back."""
        self.registry.away = yes
        if not yes:
            self.call(self.table.linked)

    def bytes_of(self, leg: int) -> bytes:
        return self.files[leg - 1].read_bytes()[META:]

    def stop_table(self) -> None:
        """As the filter does at a clean end."""

        async def stop() -> None:
            await self.table.stop()
            await self.table.close_all()
            self.objects.shutdown()

        self.wait(stop())

    def fail(self, leg: int) -> None:
        """The data plane loses the leg, as after an error."""
        volume = self._volume()
        assert volume is not None
        self.call(self.plane.fail_leg, volume, leg, NOBODYS)

    def close(self) -> None:
        """Close clients, exports, plane and loop."""
        for sock in self.sockets:
            sock.close()
        self.stop_table()
        super().close()
