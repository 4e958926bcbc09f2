"""nbdinfo (libnbd-bin) against the running daemon: what an operator's scripts ask."""

from __future__ import annotations

import json

import pytest

from tests.lib.procs import need, run
from tests.lib.shared import HARD_SIZE, ROOT_SIZE, VM1_EXPORTS, SharedFarm

pytestmark = pytest.mark.timeout(60)


def nbdinfo(*args: str, check: bool = True):
    return run([need("nbdinfo", "libnbd-bin"), *args], check=check)


def test_json_of_one_export(shared: SharedFarm) -> None:
    # Without the guess at its contents: where `file` is installed it may quote bytes that are no UTF-8, nor JSON.
    export = json.loads(nbdinfo("--json", "--no-content", shared.uri("root")).stdout)
    assert export["protocol"] == "newstyle-fixed" and export["structured"] is True
    facts = export["exports"][0]
    assert facts["export-size"] == ROOT_SIZE
    assert facts["description"] == "the first disk of vm1"
    assert facts["contexts"] == ["base:allocation"]
    assert facts["is_read_only"] is False
    for can in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert facts[f"can_{can}"] is True, can
    assert (facts["block_size_minimum"], facts["block_size_maximum"]) == (1, 32 << 20)


def test_list(shared: SharedFarm) -> None:
    listing = json.loads(nbdinfo("--list", "--json", shared.uri("")).stdout)
    sizes = {export["export-name"]: export["export-size"] for export in listing["exports"]}
    assert sizes["root"] == ROOT_SIZE and sizes["hard"] == HARD_SIZE
    assert set(sizes) == VM1_EXPORTS


def test_size_can_is(shared: SharedFarm) -> None:
    assert int(nbdinfo("--size", shared.uri("root")).stdout) == ROOT_SIZE
    for can in ("connect", "flush", "fua", "multi-conn", "read", "structured-reply", "trim", "write", "zero", "df"):
        nbdinfo("--can", can, shared.uri("root"))
    nbdinfo("--is", "read-only", shared.uri("ro"))
    assert nbdinfo("--is", "read-only", shared.uri("root"), check=False).returncode == 2
    assert nbdinfo("--is", "tls", shared.uri("root"), check=False).returncode == 2


def test_map(shared: SharedFarm) -> None:
    with shared.open("root") as nbd:
        nbd.zero(30 << 20, 8 << 20)
        nbd.write(32 << 20, b"d" * (1 << 20))
    extents = json.loads(nbdinfo("--map", "--json", shared.uri("root")).stdout)
    assert sum(extent["length"] for extent in extents) == ROOT_SIZE
    covering = [e for e in extents if e["offset"] <= 32 << 20 < e["offset"] + e["length"]]
    assert covering[0]["type"] == 0, "data"
    hole = [e for e in extents if e["offset"] <= 31 << 20 < e["offset"] + e["length"]]
    assert hole[0]["type"] == 3, "a hole that reads as zeros"


def test_unknown_export_is_an_error(shared: SharedFarm) -> None:
    failed = nbdinfo(shared.uri("nobody"), check=False)
    assert failed.returncode != 0 and "nobody" in failed.stderr
