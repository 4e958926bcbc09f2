"""The API of mirrors: every route of legs, what status says of them, and what force puts at risk."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from nbdvvol.control.registry import legs, mirrors
from nbdvvol.model.mirror import LegChange, LegProgress, MirrorReport
from nbdvvol.model.resources import LegNow
from tests.unit.control_farm import MIB
from tests.unit.fake_filter import FakeFilter
from tests.unit.test_api import Api, _error, api

__all__ = ["api"]
pytestmark = pytest.mark.timeout(60)
VVOL = "/v1/vvols/vm1/root"


def farm_of(**mirror: Any) -> dict[str, Any]:
    stores = {name: {"kind": "file", "path": f"/fake/{name}.img", "size": "24MiB"} for name in ("a", "b", "s")}
    return {
        "hosts": {"one": {}, "two": {}},
        "datastores": stores,
        "profiles": {"gold": {"mirror": {"legs": ["a", "b"], **mirror}}, "plain": {"datastore": "a"}},
        "vms": {"vm1": {"host": "one", "vvols": {"root": {"size": "4MiB", "profile": "gold"}}}},
    }


async def served(api: Api, **mirror: Any) -> FakeFilter:
    """A mirror on datastores a and b, served by host one; datastore s is free."""
    answer = await api.client.post("/v1/apply", json={"farm": farm_of(**mirror)})
    assert answer.status_code == 200, answer.text
    fake = await api.farm.filter("one", "/run/one")
    for task in answer.json()["tasks"]:
        assert (await api.farm.over(task)).state == "success"
    return fake


async def done(api: Api, answer: httpx.Response) -> dict[str, Any]:
    """The task that a 202 names, when it is over."""
    assert answer.status_code == 202, answer.text
    task = await api.farm.over(answer.json()["task"]["id"])
    assert task.state == "success", task
    return task.model_dump(mode="json")


async def legs_of(api: Api) -> dict[str, dict[str, Any]]:
    found: list[dict[str, Any]] = (await api.client.get(VVOL)).json()["legs"]
    return {leg["datastore"]: leg for leg in found}


async def problems(api: Api) -> dict[str, dict[str, str]]:
    found: list[dict[str, str]] = (await api.client.get("/v1/status")).json()["problems"]
    return {one["code"]: one for one in found}


async def change(api: Api, wanted: Any, leg: int, reason: str = "", **more: Any) -> None:
    """What the filter asks control for."""
    vvol = await api.farm.vvol()
    values = {"epoch": vvol.epoch, "generation": vvol.generation, "leg": leg, "reason": reason, **more}
    asked = LegChange.model_validate({"id": 1, "vvol": vvol.uuid, "wanted": wanted, **values})
    assert not (await api.farm.control.registry.run(legs.leg_change, "one", asked)).refused


async def says(api: Api, fake: FakeFilter, state: str, *lanes: LegProgress, epoch: int = 0) -> None:
    """The filter reports how the mirror is; returns once control has heard it."""
    vvol = await api.farm.vvol()
    values = {"uuid": vvol.uuid, "epoch": epoch or vvol.epoch, "state": state, "region_bytes": 4096}
    report = MirrorReport.model_validate({**values, "legs": [one.model_dump() for one in lanes]})
    await fake.say(report)

    async def heard() -> bool:
        return api.farm.control.links.mirror("one", vvol.uuid) == report

    await api.farm.until(heard)


async def test_legs_come_and_go(api: Api) -> None:
    await served(api)
    body = {"datastore": "s"}
    first = await api.client.post(f"{VVOL}/legs", json=body, headers={"Idempotency-Key": "add"})
    again = await api.client.post(f"{VVOL}/legs", json=body, headers={"Idempotency-Key": "add"})
    assert first.json()["task"]["id"] == again.json()["task"]["id"], "asked twice, done once"
    assert (await done(api, first))["kind"] == "add-leg"
    added = (await legs_of(api))["s"]
    assert (added["id"], added["state"], added["life"], added["fences"], added["now"]) == (
        3,
        "stale",
        "live",
        False,
        None,
    )
    refused = await api.client.post(f"{VVOL}/legs", json=body)
    assert refused.status_code == 409 and "lies on datastore s already" in _error(refused)["message"]
    assert (await api.client.post(f"{VVOL}/legs", json={"datastore": "x"})).status_code == 404
    assert (await api.client.post(f"{VVOL}/legs", json={})).status_code == 400
    assert (await api.client.post("/v1/vvols/vm1/none/legs", json=body)).status_code == 404
    unknown = await api.client.delete(f"{VVOL}/legs/9")
    assert unknown.status_code == 404 and "1 on a, 2 on b, 3 on s" in _error(unknown)["message"]
    assert (await done(api, await api.client.delete(f"{VVOL}/legs/s")))["kind"] == "remove-leg"

    async def gone() -> bool:
        return set(await legs_of(api)) == {"a", "b"}

    await api.farm.until(gone)


async def test_the_last_leg_in_sync_stays_also_when_the_others_go_meanwhile(api: Api) -> None:
    await served(api)
    ref = await api.client.delete(f"{VVOL}/legs/1")
    assert (await legs_of(api))["a"]["resync"] == "off", "its host takes it out of use"
    await change(api, "stale", 2, "write: EIO")
    task = await api.farm.over(ref.json()["task"]["id"])
    assert task.state == "error" and "the only copy" in task.error
    assert (await legs_of(api))["a"]["resync"] == "auto", "as it was before"
    refused = await api.client.delete(f"{VVOL}/legs/a")
    assert refused.status_code == 409 and "mirror add-leg vm1/root --datastore" in _error(refused)["hint"]


async def test_a_leg_is_copied_to_whole_or_not_at_all(api: Api) -> None:
    await served(api)
    whole = await api.client.post(f"{VVOL}/legs/2/resync", json={})
    assert whole.status_code == 409 and "is in sync" in _error(whole)["message"]
    await change(api, "stale", 2, "write: EIO")
    for body, wish in (({}, "auto"), ({"full": True}, "full"), ({"stop": True}, "off"), ({}, "auto")):
        answer = await api.client.post(f"{VVOL}/legs/b/resync", json=body)
        assert answer.status_code == 200 and (await legs_of(api))["b"]["resync"] == wish
    assert (await api.client.post(f"{VVOL}/legs/b/resync", json={"fast": True})).status_code == 400


async def test_what_a_comparison_leaves_is_told_until_one_finds_nothing_left(api: Api) -> None:
    await served(api)
    told = await done(api, await api.client.post(f"{VVOL}/verify", json={"repair": False}))
    assert told["detail"] == "2 pieces of 1MiB differ; nothing was changed"
    assert (await api.client.get(VVOL)).json()["differed"] == told["detail"]
    assert "verify vm1/root --repair" in (await problems(api))["LEGS_DIFFER"]["action"]
    await done(api, await api.client.post(f"{VVOL}/verify", json={}))
    assert (await api.client.get(VVOL)).json()["differed"] == "" and await problems(api) == {"HOST_DOWN": ANY_HOST}


ANY_HOST = {
    "code": "HOST_DOWN",
    "subject": "two",
    "message": "no filter of host two is connected",
    "action": "start it: nbdvvol filter --host two",
}


async def test_a_single_copy_is_no_mirror(api: Api) -> None:
    await served(api)
    await api.farm.create("solo", MIB, profile="plain")
    for route in ("legs/1/resync", "verify"):
        refused = await api.client.post(f"/v1/vvols/vm1/solo/{route}", json={})
        assert refused.status_code == 409
        assert "nbdvvol mirror add-leg vm1/solo --datastore" in _error(refused)["hint"]


async def test_how_a_copy_gets_on_is_shown(api: Api) -> None:
    fake = await served(api)
    await change(api, "stale", 2, "write: EIO")
    found = await problems(api)
    assert "leg 2 on datastore b is not in sync since" in found["LEG_STALE"]["message"]
    assert "write: EIO" in found["LEG_STALE"]["message"]
    assert "leg 1 on datastore a is the only one of 2" in found["LAST_LEG"]["message"]
    await change(api, "syncing", 2)
    copied = LegProgress(
        id=2, lane="syncing", dirty_bytes=3 << 20, copied_bytes=1 << 20, rate=512 << 10, eta_s=6.0, reads=7
    )
    await says(api, fake, "serving", LegProgress(id=1, lane="in-sync"), copied)
    leg = (await legs_of(api))["b"]["now"]
    assert (leg["progress"], leg["dirty_regions"], leg["copied_bytes"], leg["eta_s"]) == (0.25, 768, 1 << 20, 6.0)
    assert (await api.client.get(VVOL)).json()["now"]["state"] == "serving"
    found = await problems(api)
    assert "25% copied, 3MiB left, 512KiB/s, about 6s to go" in found["LEG_SYNCING"]["message"]
    assert "LEG_STALE" not in found and "copy that runs" in found["LAST_LEG"]["action"]
    lines = (await api.client.get("/metrics")).text.splitlines()
    for name, value in (("in_sync", 0), ("dirty_bytes", 3 << 20), ("resync_bytes_per_second", 512 << 10)):
        head = f'nbdvvol_leg_{name}{{datastore="b",leg="2",vm="vm1",vvol="vm1/root"}} '
        assert [float(line.removeprefix(head)) for line in lines if line.startswith(head)] == [value]
    await says(api, fake, "serving", copied, epoch=99)
    assert (await legs_of(api))["b"]["now"] is None, "what another epoch says is of something else"


@pytest.mark.parametrize(("state", "code"), [("frozen", "WRITES_HELD"), ("expired", "WRITES_FAIL")])
async def test_writes_that_wait_for_the_registry_are_told(api: Api, state: str, code: str) -> None:
    fake = await served(api)
    await says(api, fake, state, LegProgress(id=2, lane="failing", why="write: EIO"))
    told = (await problems(api))[code]
    assert told["subject"] == "vm1/root"
    assert "leg 2 on datastore b has failed on host one: write: EIO" in told["message"]


@pytest.mark.parametrize(
    ("lane", "why", "advice"),
    [
        ("absent", "it has no valid label; `nbdvvol mirror resync --full` copies everything to it", "1 --full"),
        ("stale", "write: EIO", "tried again by itself, or at once: nbdvvol mirror resync vm1/root 1"),
    ],
)
async def test_what_brings_a_leg_back_depends_on_what_is_in_its_way(api: Api, lane: Any, why: str, advice: str) -> None:
    fake = await served(api)
    await change(api, "stale", 1)
    await says(api, fake, "serving", LegProgress(id=1, lane=lane, why=why))
    told = (await problems(api))["LEG_STALE"]
    assert why in told["message"] and advice in told["action"]
    await api.client.post(f"{VVOL}/legs/1/resync", json={"stop": True})
    assert "left so by request" in (await problems(api))["LEG_STALE"]["action"]


async def test_a_doubt_is_told_as_long_as_it_stands(api: Api) -> None:
    fake = await served(api)
    await change(api, "stale", 2, "write: Connection timed out", doubt=True)
    await says(api, fake, "serving", LegProgress(id=2, lane="absent"))
    found = (await problems(api))["LEG_STALE"]
    assert "Connection timed out" in found["message"]
    assert "restart the server of datastore b, then: nbdvvol mirror resync vm1/root 2" in found["action"]
    assert (await legs_of(api))["b"]["doubt"]
    await api.client.post(f"{VVOL}/legs/2/resync", json={})
    assert not (await legs_of(api))["b"]["doubt"]
    assert "restart the server" not in (await problems(api))["LEG_STALE"]["action"]


@pytest.mark.parametrize("lane", ["stale", "absent"])
async def test_a_copy_that_does_not_begin_is_told_with_its_cause(api: Api, lane: Any) -> None:
    """The registry has the leg as copied to: its host asked for that, and then found something in its way."""
    fake = await served(api)
    await change(api, "stale", 2, "write: EIO")
    await change(api, "syncing", 2)
    await says(api, fake, "serving", LegProgress(id=2, lane=lane))
    found = await problems(api)
    assert "it is to be copied to" in found["LEG_SYNCING"]["message"] and "LEG_STALE" not in found
    await says(api, fake, "serving", LegProgress(id=2, lane=lane, why="its resync does not begin: No space left"))
    found = await problems(api)
    assert "its resync does not begin: No space left" in found["LEG_STALE"]["message"]
    assert "mirror resync vm1/root 2" in found["LEG_STALE"]["action"] and "LEG_SYNCING" not in found
    await fake.disconnect()
    found = await problems(api)
    assert "filter of host one is connected" in found["LEG_STALE"]["action"] and "LEG_SYNCING" not in found


async def advice_on_stale(api: Api, fake: FakeFilter) -> str:
    """What is said of a new leg that its host has not begun to copy to."""
    await says(api, fake, "serving", LegProgress(id=3, lane="stale"))
    return (await problems(api))["LEG_STALE"]["action"]


async def test_spares_that_stand_in_are_told(api: Api) -> None:
    fake = await served(api, spares=["s"])
    assert "SPARE_USED" not in await problems(api)
    await done(api, await api.client.post(f"{VVOL}/legs", json={"datastore": "s"}))
    assert "host one begins to copy to it by itself" in await advice_on_stale(api, fake)
    told = (await problems(api))["SPARE_USED"]
    assert "no spare is left" in told["message"] and "make it a leg in the profile" in told["action"]


async def test_a_spare_that_cannot_be_made_is_told_until_none_is_needed(api: Api) -> None:
    await served(api, spares=["s"], **{"spare-after": "0s"})
    elsewhere = farm_of(spares=["s"], **{"spare-after": "0s"})
    elsewhere["datastores"]["s"]["hosts"] = ["two"]
    assert (await api.client.post("/v1/apply", json={"farm": elsewhere})).status_code == 200
    await change(api, "stale", 2, "write: EIO")
    run = api.farm.control.registry.run
    await run(mirrors.tend)
    told = (await problems(api))["NO_SPARE"]
    assert told["subject"] == "vm1/root" and "spare s is unknown" in told["message"] and "another" in told["action"]
    assert "mirror.no_spare" in [event["kind"] for event in (await api.client.get("/v1/events")).json()]
    await change(api, "syncing", 2)
    vvol = await api.farm.vvol()
    await change(api, "in-sync", 2, stamp={"epoch": vvol.epoch, "generation": vvol.generation})
    await run(mirrors.tend)
    assert "NO_SPARE" not in await problems(api)


async def test_what_force_puts_at_risk_is_told_before_and_with_it(api: Api) -> None:
    fake = await served(api)
    risks = (await api.client.get(f"{VVOL}/risks")).json()
    assert [(one["host"], one["connected"], one["lease"]) for one in risks["hosts"]] == [("one", True, "none")]
    assert [(leg["leg"], leg["datastore"], leg["fences"]) for leg in risks["legs"]] == [
        (1, "a", False),
        (2, "b", False),
    ]
    assert "without force it is asked to drain it first" in risks["risks"][0]
    await fake.disconnect()
    answer = await api.client.post(f"{VVOL}/bind", json={"host": "two", "force": True})
    assert answer.status_code == 202
    told = "\n".join(answer.json()["risks"])
    for words in ("host one serves it, under epoch", "leg 1 on datastore a, leg 2 on datastore b cannot fence"):
        assert words in told
    assert "not flushed may be lost" in told

    async def forced() -> bool:
        events = (await api.client.get("/v1/events")).json()
        return any(event["kind"] == "vvol.forced" and "cannot fence" in event["message"] for event in events)

    await api.farm.until(forced)


async def test_nothing_is_at_risk_where_nobody_holds_it(api: Api) -> None:
    await served(api)
    await done(api, await api.client.post(f"{VVOL}/unbind", json={}))
    assert (await api.client.get(f"{VVOL}/risks")).json()["risks"] == []
    assert (await api.client.get("/v1/vvols/vm1/none/risks")).status_code == 404


def test_a_copy_in_words() -> None:
    assert LegNow(id=1, lane="in-sync").copy_words() == ""
    now = LegNow(id=1, lane="syncing", progress=0.999, dirty_bytes=1, rate=3 << 30, eta_s=90061.0)
    assert now.copy_words() == "99% copied, 1B left, 3GiB/s, about 1d 1h to go"
