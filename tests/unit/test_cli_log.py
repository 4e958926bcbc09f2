"""How the command line tells of write-back logs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from nbdvvol.cli.cache import log_words, lost_words
from nbdvvol.cli.counters import tables
from nbdvvol.model.farm import VVolType
from nbdvvol.model.observe import ExportCounters, HostCounters, LogCounters
from nbdvvol.model.resources import LogKept, LogNow, VVol, VVolState

LOG = LogCounters(
    state="serving", ring_bytes=8 << 20, used_bytes=2 << 20, dirty_bytes=1 << 20, oldest_age_ms=3000,
    destage_rate=512 << 10, logged=500, groups=100, syncs=10, bypassed=20, destaged_bytes=4 << 20,
    merged_bytes=64 << 10,
)  # fmt: skip


def test_a_log_is_told_in_a_line() -> None:
    assert log_words(LOG) == (
        "serving; holds 1MiB, the oldest logged 3s ago, 512KiB/s are carried to the storage; 2MiB of 8MiB used; "
        "500 requests logged in 100 writes, 20 bypassed; 4MiB carried, 64KiB overwritten before that"
    )
    assert log_words(LOG.model_copy(update={"lost_bytes": 4096})).endswith("; 4096 bytes are lost")
    assert log_words(LogCounters(state="refused")).startswith("refused: it is served without")


@pytest.mark.parametrize("live", [False, True])
def test_logs_have_a_table(live: bool) -> None:
    def host(uptime_s: float, logged: int) -> HostCounters:
        log = LOG.model_copy(update={"logged": logged})
        export = ExportCounters(vvol="vm1/a", uuid="a", epoch=1, connections=1, log=log)
        return HostCounters(host="h", instance="i", uptime_s=uptime_s, exports=[export])

    found = tables([host(3, 900)], [host(1, 500)] if live else None)
    heads, [row] = next(table for table in found if table[0][0] == "logged")
    told = dict(zip(heads, map(str, row), strict=True))
    assert (told["logged"], told["state"], told["dirty"], told["oldest"]) == ("vm1/a", "serving", "1MiB", "3s")
    assert (told["used"], told["size"], told["destage/s"]) == ("2MiB", "8MiB", "512KiB")
    assert told["requests/s" if live else "requests"] == ("200" if live else "900")


def vvol(**more: Any) -> VVol:
    return VVol(
        uuid="u", vm="vm1", name="a", size=1, type=VVolType.DATA, profile="", state=VVolState.READY, epoch=1,
        generation=1, map_version=1, **more,
    )  # fmt: skip


def test_what_giving_a_log_up_loses_is_told() -> None:
    kept = LogKept(host="h", file="/l", dirty_bytes=65536, told=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert "held 64KiB, as that host said last, at 2026-01-02T03:04:05" in lost_words(vvol(log=kept))
    assert "has not said how much" in lost_words(vvol(log=kept.model_copy(update={"told": None})))
    assert "registry was rebuilt" in lost_words(vvol(log=LogKept(host="", known=False)))
    now = LogNow(host="h", state="refused", file="/l", found="ab" * 16, dirty_bytes=4096)
    assert lost_words(vvol(log_now=now)) == "the log /l on host h holds 4KiB"
    assert "may be overwritten" in lost_words(vvol())
