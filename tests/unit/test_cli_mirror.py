"""The verbs of mirrors, and how legs are shown: what is asked of the API, what is printed, which exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from nbdvvol.cli import main as cli
from nbdvvol.cli import mirror
from nbdvvol.cli.client import Client

WHEN = "2026-01-01T00:00:00Z"
TASK = {"id": 7, "kind": "add-leg", "subject": "vm1/a", "state": "success", "created": WHEN, "updated": WHEN}
IN_SYNC = {"id": 1, "datastore": "near", "state": "in-sync", "now": {"id": 1, "lane": "in-sync"}}
COPYING = {
    "id": 2,
    "datastore": "far",
    "state": "syncing",
    "fences": True,
    "now": {
        "id": 2,
        "lane": "syncing",
        "dirty_bytes": 30 << 20,
        "dirty_regions": 8,
        "copied_bytes": 10 << 20,
        "progress": 0.25,
        "rate": 5 << 20,
        "eta_s": 6.0,
    },
}
LOST = {"id": 2, "datastore": "far", "state": "stale", "why": "write: EIO", "now": {"id": 2, "lane": "absent"}}
NOW = {
    "host": "one",
    "state": "serving",
    "region_bytes": 4096,
    "intent_regions": 3,
    "doubtful_regions": 0,
    "repairs": 1,
}
RISKS = {"vvol": "vm1/a", "risks": ["host one serves it", "leg 1 on datastore near cannot fence"]}
Farm = Callable[..., list[tuple[str, str, Any]]]


def vvol(*legs: dict[str, Any], **more: Any) -> dict[str, Any]:
    names = {"uuid": "u", "vm": "vm1", "name": "a", "size": 4096, "type": "data", "profile": "gold", "state": "ready"}
    numbers = {"epoch": 3, "generation": 5, "map_version": 1, "legs": list(legs)}
    policy = {"legs": ["near", "far"], "lease": 30}
    return names | numbers | {"mirror": policy, "now": NOW, "binding": {"host": "one", "epoch": 3}} | more


@pytest.fixture
def farm(monkeypatch: pytest.MonkeyPatch) -> Farm:
    """Give what GET of the VVol answers, one after the other (the last for ever); returns what was asked otherwise."""

    def given(*answers: dict[str, Any], **more: Any) -> list[tuple[str, str, Any]]:
        asked: list[tuple[str, str, Any]] = []
        left = list(answers)

        def answer(request: httpx.Request) -> httpx.Response:
            path = request.url.path
            if request.method != "GET":
                asked.append((request.method, path, json.loads(request.content) if request.content else None))
                return httpx.Response(200, json=left[0] if path.endswith("resync") else {"task": TASK})
            if path == "/v1/resolve":
                return httpx.Response(200, json=left.pop(0) if len(left) > 1 else left[0])
            known = {"/v1/tasks/7": TASK | more, "/v1/vvols/vm1/a/risks": RISKS, "/v1/counters": []}
            return httpx.Response(200, json=known[path])

        def connect(_run: object = None) -> Client:
            return Client(httpx.Client(transport=httpx.MockTransport(answer), base_url="http://c"), "c")

        monkeypatch.setattr(Client, "connect", connect)
        return asked

    return given


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0)


def test_legs_are_added_and_removed(farm: Farm, capsys: pytest.CaptureFixture[str]) -> None:
    asked = farm(vvol(IN_SYNC))
    assert run("mirror", "add-leg", "a", "--datastore", "far") == 0
    assert "vm1/a has a leg on datastore far" in capsys.readouterr().out
    assert run("mirror", "remove-leg", "a", "far", "--yes", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == 7
    assert run("mirror", "remove-leg", "a", "2", "--no-wait") == 0
    assert capsys.readouterr().out == "task 7\n"
    assert asked == [
        ("POST", "/v1/vvols/vm1/a/legs", {"datastore": "far"}),
        ("DELETE", "/v1/vvols/vm1/a/legs/far", None),
        ("DELETE", "/v1/vvols/vm1/a/legs/2", None),
    ]
    assert run("mirror", "add-leg", "a") == 2


def test_resync_waits_until_the_copy_is_whole(
    farm: Farm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "POLL_S", 0.0)
    whole = IN_SYNC | {"id": 2, "datastore": "far"}
    asked = farm(vvol(IN_SYNC, LOST), vvol(IN_SYNC, COPYING), vvol(IN_SYNC, COPYING), vvol(IN_SYNC, whole))
    assert run("mirror", "resync", "vm1/a", "--full") == 0
    assert asked == [("POST", "/v1/vvols/vm1/a/legs/2/resync", {"full": True, "stop": False})]
    assert capsys.readouterr().out == "leg 2 of vm1/a: in-sync on far, cannot fence\n"
    farm(vvol(IN_SYNC, whole))
    assert run("mirror", "resync", "a") == 0 and "every leg of vm1/a is in sync" in capsys.readouterr().out


def test_resync_does_not_wait_for_what_does_not_move(
    farm: Farm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "POLL_S", 0.0)
    monkeypatch.setattr(mirror, "STUCK_S", 0.0)
    asked = farm(vvol(IN_SYNC, LOST))
    assert run("mirror", "resync", "a", "far") == 1
    told = capsys.readouterr().err
    assert "UNAVAILABLE" in told and "stale (absent) on far, write: EIO" in told and "status -x" in told
    assert run("mirror", "resync", "a", "far", "--no-wait") == 0
    assert run("mirror", "resync", "a", "far", "--stop") == 0
    assert asked[-1][2] == {"full": False, "stop": True}
    assert run("mirror", "resync", "a", "--stop", "--full") == 2


def test_verify_tells_by_its_exit_status(farm: Farm, capsys: pytest.CaptureFixture[str]) -> None:
    asked = farm(vvol(IN_SYNC), detail="all in-sync legs are alike: 4KiB compared")
    assert run("mirror", "verify", "vm1/a") == 0
    assert "vm1/a: all in-sync legs are alike" in capsys.readouterr().out
    farm(vvol(IN_SYNC, differed="2 pieces"), detail="2 pieces of 4KiB differ; nothing was changed")
    assert run("mirror", "verify", "vm1/a", "--report", "-o", "json") == 1
    assert json.loads(capsys.readouterr().out)["detail"].startswith("2 pieces")
    assert asked == [("POST", "/v1/vvols/vm1/a/verify", {"repair": None})]


def test_describe_shows_each_leg(farm: Farm, capsys: pytest.CaptureFixture[str]) -> None:
    farm(vvol(IN_SYNC, COPYING | {"replaces": 1}))
    assert run("describe", "vvol", "vm1/a") == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert (
        lines["mirror"].strip().startswith("serving on host one, reads least-outstanding, holds writes 60s, lease 30s")
    )
    assert lines["leg 1"].strip() == "in-sync on near, cannot fence"
    assert lines["leg 2"].strip() == (
        "syncing on far, 25% copied, 30MiB left, 5MiB/s, about 6s to go, a spare for leg 1, its server fences"
    )


def test_status_has_a_line_for_each_leg() -> None:
    from nbdvvol.model.resources import VVol

    plain = VVol.model_validate(vvol(IN_SYNC, mirror=None))
    found = VVol.model_validate(vvol(IN_SYNC, COPYING, LOST | {"id": 3, "resync": "off"}))
    rows = [dict(zip(mirror.HEADS, row, strict=True)) for row in mirror.leg_rows([plain, found])]
    assert [row["state"] for row in rows] == ["in-sync", "syncing", "stale (absent)"]
    copies = rows[1]
    assert [copies[key] for key in ("regions", "dirty", "copied", "done", "rate", "to_go")] == [
        8,
        "30MiB",
        "10MiB",
        "25%",
        "5MiB/s",
        "6s",
    ]
    assert rows[2]["why"] == "write: EIO"


@pytest.mark.parametrize("verb", ["bind", "unbind"])
def test_force_tells_first_what_is_at_risk(
    farm: Farm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    asked = farm(vvol(IN_SYNC))
    assert run(verb, "vm1/a", "--force") == 0
    assert "leg 1 on datastore near cannot fence" in capsys.readouterr().err
    assert [path for _, path, _ in asked] == [f"/v1/vvols/vm1/a/{verb}"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", _declined)
    assert run(verb, "vm1/a", "--force") == 1
    assert len(asked) == 1, "somebody at a terminal said no"
    assert run(verb, "vm1/a", "--force", "--yes") == 0
    assert run(verb, "vm1/a") == 0 and len(asked) == 3


def _declined(*_: object, **__: object) -> None:
    import typer

    raise typer.Abort
