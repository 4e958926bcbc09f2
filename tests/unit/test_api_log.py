"""The API of write-back logs: what an operator decides about one, asked twice and done once."""

from __future__ import annotations

import pytest

from nbdvvol.control.registry import logs
from nbdvvol.model.log import LogChange, LogReport
from tests.unit.test_api import Api, _error, api
from tests.unit.test_control_log import LOG, spec

__all__ = ["api"]
pytestmark = pytest.mark.timeout(60)
CACHE = "/v1/vvols/vm1/root/cache"


async def events(api: Api, kind: str) -> int:
    return [one["kind"] for one in (await api.client.get("/v1/events")).json()].count(kind)


async def test_a_repeated_word_on_a_log_has_the_same_answer_and_no_second_effect(api: Api) -> None:
    """Also where the second one would be refused: the log that was found has been taken."""
    answer = await api.client.post("/v1/apply", json={"farm": spec()})
    fake = await api.farm.filter("a", "/run/a")
    for task in answer.json()["tasks"]:
        assert (await api.farm.over(task)).state == "success"
    vvol = await api.farm.vvol()
    words = {"headers": {"Idempotency-Key": "mine"}}
    refused = await api.client.post(f"{CACHE}/recover", **words)
    assert refused.status_code == 503 and "no host tells of a log" in _error(refused)["message"]
    await fake.say(LogReport(uuid=vvol.uuid, epoch=vvol.epoch, state="refused", found=LOG, file="/logs/r"))

    async def heard() -> bool:
        return (await api.farm.control.found_log("vm1", "root")).log == LOG

    await api.farm.until(heard)
    first = await api.client.post(f"{CACHE}/recover", **words)
    assert first.status_code == 200 and first.json()["log"]["log"] == LOG
    await fake.say(LogReport(uuid=vvol.uuid, epoch=vvol.epoch, state="serving", dirty_bytes=4096))
    again = await api.client.post(f"{CACHE}/recover", **words)
    assert again.status_code == 200 and again.json() == first.json()
    assert await events(api, "log.recovered") == 1
    change = LogChange(id=1, vvol=vvol.uuid, epoch=vvol.epoch, generation=vvol.generation, log=LOG, wanted="clean")
    assert not (await api.farm.control.registry.run(logs.log_change, "a", change)).refused
    other = await api.client.post(f"{CACHE}/discard", **words)
    assert other.status_code == 409 and "was used for another request" in _error(other)["message"]
    words = {"headers": {"Idempotency-Key": "another"}}
    first, again = [await api.client.post(f"{CACHE}/discard", **words) for _ in range(2)]
    assert first.status_code == 200 and first.json() == again.json()
    assert await events(api, "log.discard") == 1
