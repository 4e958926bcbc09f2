"""The pure part of the filter: from what control says to steps and descriptions."""

from __future__ import annotations

import pytest

from nbdvvol.dataplane.types import CacheMode, CachePolicy, LegState, Run, RunState, VolumeLimits
from nbdvvol.filter.reconcile import Step, cache_policy, decide, describe, limits, merge, touched, transmission_flags
from nbdvvol.model.farm import CacheConfig, HostListen, QosConfig, SocketConfig, TlsMode
from nbdvvol.model.link import Delta, LegSpec, RunSpec, VmSpec, VVolSpec
from tests.unit.filter_words import MIB, file_store, host_state, uuid_of, vvol

OLD = vvol(epoch=3)


@pytest.mark.parametrize(
    ("running", "wanted", "highest", "step"),
    [
        (None, None, 0, Step.NOTHING),
        (None, OLD, 0, Step.OPEN),
        (None, OLD, 3, Step.OPEN),
        (None, OLD, 4, Step.REFUSE),
        (OLD, None, 3, Step.CLOSE),
        (OLD, OLD, 3, Step.NOTHING),
        (OLD, vvol(epoch=4), 3, Step.REPLACE),
        (OLD, vvol(epoch=2), 3, Step.REFUSE),
        (OLD, vvol(epoch=3, map_version=2, size=2 * MIB), 3, Step.CHANGE),
        (OLD, vvol(epoch=3, generation=2), 3, Step.CHANGE),
        (OLD, vvol(epoch=3, read_only=True), 3, Step.CHANGE),
        (OLD, vvol(epoch=3, at=MIB), 3, Step.CHANGE),
        (OLD, vvol(epoch=3, qos=QosConfig(iops=5)), 3, Step.LIMIT),
        (OLD, vvol(epoch=3, qos=QosConfig(iops=5), description="new words"), 3, Step.LIMIT),
        (OLD, vvol(epoch=3, qos=QosConfig(iops=5), read_only=True), 3, Step.CHANGE),
        (OLD, vvol(epoch=3, cache=CacheConfig(mode="read")), 3, Step.LIMIT),
        (OLD, vvol(epoch=3, cache=CacheConfig(mode="read"), map_version=2), 3, Step.CHANGE),
        (OLD, vvol(epoch=3, description="new words"), 3, Step.RENAME),
        (OLD, vvol(epoch=3, name="other"), 3, Step.RENAME),
    ],
)
def test_decide(running: VVolSpec | None, wanted: VVolSpec | None, highest: int, step: Step) -> None:
    assert decide(running, wanted, highest) is step


def test_merge_replaces_and_removes_whole_entries() -> None:
    listen = HostListen(address="127.0.0.1:1", tls=TlsMode.NONE)
    state = host_state(vvol(1), vvol(2), listen=listen)
    vm2 = VmSpec(name="vm2", socket=SocketConfig(mode="0660"))
    delta = Delta(revision=2, vvols={uuid_of(1): None, uuid_of(2): vvol(2, epoch=9)}, vms={"vm2": vm2, "gone": None})
    merged = merge(state, delta)
    assert set(merged.vvols) == {uuid_of(2)} and merged.vvols[uuid_of(2)].epoch == 9
    assert set(merged.vms) == {"vm1", "vm2"} and merged.listen == listen
    assert merge(state, Delta(revision=3, settings=True)).listen is None
    assert set(state.vvols) == {uuid_of(1), uuid_of(2)}


def test_touched(tmp_path: object) -> None:
    a, b = vvol(1, store="a"), vvol(2, store="b")
    from pathlib import Path

    store_a, store_b = file_store(Path("/a"), "a"), file_store(Path("/b"), "b")
    state = host_state(a, b, store_a, store_b)
    assert touched(None, state) == {a.uuid, b.uuid}
    assert touched(state, state) == set()
    assert touched(state, host_state(a, store_a, store_b)) == {b.uuid}
    assert touched(state, host_state(a, b, store_a, store_b.model_copy(update={"size": 5}))) == {b.uuid}
    assert touched(state, host_state(a, vvol(2, store="b", epoch=2), store_a, store_b)) == {b.uuid}


def test_describe() -> None:
    legs = [
        LegSpec(id=4, datastore="a", state="in-sync", object="x", runs=[RunSpec(o=0, n=MIB, at=5 * MIB, s=1)]),
        LegSpec(id=5, datastore="b", state="stale", runs=[RunSpec(o=0, n=MIB, at=0)]),
    ]
    spec = vvol(7, legs=legs, epoch=2, generation=3, map_version=4, read_only=True)
    desc = describe(spec, {("a", "x"): 11, ("b", ""): 12}, block_min=512, map_from=1)
    assert desc.uuid == bytes(15) + b"\x07" and (desc.epoch, desc.generation) == (2, 3)
    assert (desc.map_from, desc.map_to, desc.block_min, desc.read_only, desc.size) == (1, 4, 512, True, MIB)
    assert desc.legs[0].id == 4 and desc.legs[0].runs == (Run(0, MIB, 11, 5 * MIB, RunState.ZERO),)
    assert desc.legs[1].state is LegState.STALE and desc.legs[1].runs[0].object == 12


def test_cache_policies() -> None:
    assert cache_policy(vvol()) == CachePolicy()
    read = CacheConfig(mode="read", ram=64 << 20, read_ahead=1 << 20)
    assert cache_policy(vvol(cache=read)) == CachePolicy(CacheMode.READ, ahead_bytes=1 << 20, floor_bytes=64 << 20)
    through = CacheConfig(mode="writethrough")
    assert cache_policy(vvol(cache=through)) == CachePolicy(CacheMode.WRITETHROUGH, ahead_bytes=512 << 10)


def test_limits() -> None:
    assert limits(vvol()) == VolumeLimits()
    qos = QosConfig(iops=20, bandwidth=400 << 20, burst=0.25, iops_size=8192, shares=300)
    assert limits(vvol(qos=qos)) == VolumeLimits(20, 400 << 20, 250_000, 8192, 300)
    assert limits(vvol(qos=QosConfig(shares=5))) == VolumeLimits(shares=5)


def test_transmission_flags() -> None:
    # HAS_FLAGS FLUSH FUA TRIM ZEROES DF MULTI_CONN CACHE FAST_ZERO
    assert transmission_flags(read_only=False) == 1 | 4 | 8 | 32 | 64 | 128 | 256 | 1024 | 2048
    assert transmission_flags(read_only=True) == 1 | 2 | 4 | 8 | 128 | 256 | 1024
