"""The API client: errors become NvErrors, changes are repeated safely, tasks are waited for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from nbdvvol.cli.client import Client, find_socket
from nbdvvol.model.errors import Code, NvError
from nbdvvol.model.resources import CreateVVol, Task

TASK: dict[str, Any] = {
    "id": 7,
    "kind": "create",
    "subject": "vm1/a",
    "state": "running",
    "created": "2026-01-01T00:00:00Z",
    "updated": "2026-01-01T00:00:00Z",
}


def client(answer: Callable[[httpx.Request], httpx.Response], retry_s: float = 1.0) -> Client:
    http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://nbdvvol")
    return Client(http, "somewhere", retry_s=retry_s)


def test_an_api_error_keeps_code_message_and_hint() -> None:
    body = {"error": {"code": "NO_SPACE", "message": "local has 1GiB free, 2GiB wanted", "hint": "grow it"}}
    with pytest.raises(NvError) as caught, client(lambda request: httpx.Response(507, json=body)) as api:
        api.status()
    assert (caught.value.code, caught.value.message, caught.value.hint) == (
        Code.NO_SPACE,
        "local has 1GiB free, 2GiB wanted",
        "grow it",
    )


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"error": 1}', b'{"error": {"code": "NEW"}}'])
def test_an_answer_without_a_reason_is_told_as_such(content: bytes) -> None:
    with pytest.raises(NvError, match="answered HTTP 502 without a reason"):
        client(lambda request: httpx.Response(502, content=content)).status()


def test_a_change_is_repeated_with_the_same_key_while_control_restarts() -> None:
    keys: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) < 3:
            raise httpx.ConnectError("refused")
        return httpx.Response(202, json={"task": TASK})

    wanted = CreateVVol.model_validate({"vm": "vm1", "name": "a", "size": "1MiB"})
    assert client(answer).create(wanted).task.id == 7
    assert len(keys) == 3 and len(set(keys)) == 1


def test_control_that_stays_away_is_not_running() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(NvError, match="does not answer: refused") as caught:
        client(answer, retry_s=0.2).status()
    assert caught.value.code is Code.NOT_RUNNING


def test_a_silent_control_is_a_timeout() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("silence")

    with pytest.raises(NvError) as caught:
        client(answer).status()
    assert caught.value.code is Code.TIMEOUT


def tasks(*states: str) -> Callable[[httpx.Request], httpx.Response]:
    left = list(states)

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/tasks/7"
        return httpx.Response(200, json={**TASK, "state": left.pop(0), "error": "no room"})

    return answer


def test_waiting_shows_each_change_once() -> None:
    seen: list[Task] = []
    done = client(tasks("queued", "running", "running", "success")).wait(7, seen.append)
    assert [task.state for task in seen] == ["queued", "running", "success"]
    assert done.state == "success"


@pytest.mark.parametrize(("end", "text"), [("error", "failed: no room"), ("cancelled", "was cancelled")])
def test_a_task_that_does_not_succeed_raises(end: str, text: str) -> None:
    with pytest.raises(NvError, match=text):
        client(tasks("running", end)).wait(7)


def test_sizes_go_out_as_bytes() -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, json.loads(request.content)))
        return httpx.Response(202, json={"task": TASK})

    client(answer).resize("vm1/a", 1 << 30)
    assert sent == [("/v1/vvols/vm1/a/resize", {"size": 1 << 30})]


def test_no_farm_here_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NBDVVOL_RUN", raising=False)
    with pytest.raises(NvError, match=f"no {tmp_path}/control.sock") as caught:
        find_socket(tmp_path)
    assert caught.value.code is Code.NOT_RUNNING and "--run DIR" in caught.value.hint
    monkeypatch.setenv("NBDVVOL_RUN", str(tmp_path / "env"))
    with pytest.raises(NvError, match="env/control.sock"):
        find_socket(None)
