"""Control and the filter's exports together: a VVol that was named is released by its number, run or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdvvol.filter.claims import ClaimBook
from nbdvvol.filter.exports import ExportTable
from nbdvvol.filter.lognotes import LogBook
from nbdvvol.filter.objects import ObjectTable
from nbdvvol.filter.syncfaults import FaultBook
from tests.unit.fake_plane import FakePlane
from tests.unit.filter_words import MIB, Reports, file_store, host_state, until, uuid_of, vvol


class Bench:
    """A table over a fake plane and one datastore."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(8 * MIB))
        self.store = file_store(path)
        self.plane = FakePlane()
        self.reports = Reports()
        self.objects = ObjectTable(self.plane, FaultBook(path.parent))
        self.objects.farm = "farm"
        self.table = ExportTable(self.plane, self.objects, self.reports, ClaimBook(path.parent), LogBook(path.parent))

    def want(self, epoch: int | None) -> None:
        """Control names VVol 1 under this epoch, or takes it away; nothing of it is done yet."""
        self.table.take(host_state(self.store) if epoch is None else host_state(vvol(1, epoch=epoch), self.store))

    async def says(self, line: str) -> None:
        """Wait until this is the last line reported."""
        await until(lambda: bool(self.reports.lines) and self.reports.lines[-1] == line)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "local.img")
    yield bench
    await bench.table.stop()
    await bench.table.close_all()
    bench.objects.shutdown()


async def test_what_is_about_to_run_counts_as_held(bench: Bench) -> None:
    bench.want(3)
    assert not bench.plane.volumes
    assert [(held.uuid, held.epoch) for held in bench.table.held()] == [(uuid_of(1), 3)]


async def test_what_was_taken_away_before_it_ran_is_released_by_its_number(bench: Bench) -> None:
    bench.want(3)
    bench.want(None)
    await bench.says("released 1 epoch 3")
    assert not bench.table.held() and not bench.plane.volumes


async def test_a_newer_epoch_that_never_ran_is_released_with_the_older_one(bench: Bench) -> None:
    bench.want(3)
    await until(lambda: len(bench.plane.volumes) == 1)
    bench.want(5)
    bench.want(None)
    await bench.says("released 1 epoch 5")
    await asyncio.sleep(0)
    assert not bench.plane.volumes
