"""The command line against a running farm: every verb, every output, the errors people meet."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nbdvvol.cli.main import main
from tests.lib.farm import Farm, plain_spec
from tests.lib.procs import Process, wait_until

KINDS = ("vvols", "datastores", "hosts", "profiles", "vms", "tasks", "events")


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    spec = plain_spec("192MiB")
    spec["datastores"]["pool"] = {"kind": "dir", "path": "pool"}
    made = Farm(spec)
    (made.folder / "pool").mkdir()
    with made:
        (made.folder / "pool" / "old.raw").write_bytes(b"old bytes" + bytes((1 << 20) - 9))
        made.start()
        yield made


def outcome(farm: Farm, *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command; in this process, because starting one costs a second here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([*words, "--run", str(farm.run)])
        raise SystemExit(0)
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def cli(farm: Farm, *words: str) -> str:
    status, out, err = outcome(farm, *words)
    assert status == 0, (words, out, err)
    return out


def refused(farm: Farm, *words: str) -> str:
    status, out, err = outcome(farm, *words)
    assert status == 1, (words, out, err)
    return err


def as_json(farm: Farm, *words: str) -> Any:
    return json.loads(cli(farm, *words, "-o", "json"))


@pytest.mark.parametrize("kind", KINDS)
def test_get_prints_the_same_in_every_form(farm: Farm, kind: str) -> None:
    listed = as_json(farm, "get", kind)
    assert listed
    assert yaml.safe_load(cli(farm, "get", kind, "-o", "yaml")) == listed
    lines = cli(farm, "get", kind).splitlines()
    assert len(lines) == 1 + len(listed)
    assert lines[0].isupper()


def test_describe_tells_everything(farm: Farm) -> None:
    told = cli(farm, "describe", "vvol", "root")
    vvol = as_json(farm, "describe", "vvol", "vm1/root")
    for word in (
        "vm1/root",
        vvol["uuid"],
        "16MiB (16777216 bytes)",
        "bound to local",
        vvol["uri"],
        "qemu",
        "nbd-client",
    ):
        assert word in told
    assert as_json(farm, "describe", "vvol", vvol["uuid"]) == vvol


def test_uri_is_what_clients_take(farm: Farm) -> None:
    uri = cli(farm, "uri", "root").strip()
    assert uri == farm.uri("root")
    lines = as_json(farm, "uri", "root")["lines"]
    assert cli(farm, "uri", "root", "--lines").count("#") == len(lines)


def test_life_of_a_vvol(farm: Farm) -> None:
    created = cli(farm, "create", "vvol", "vm1/data", "--size", "8MiB", "--profile", "plain", "--type", "swap")
    assert created == "vm1/data created\n"
    farm.wait_bound("vm1/data")
    assert as_json(farm, "describe", "vvol", "data")["type"] == "swap"
    assert cli(farm, "resize", "vvol", "data", "12MiB") == "vm1/data is 12MiB now\n"
    assert farm.vvol("vm1/data")["size"] == 12 << 20
    assert cli(farm, "unbind", "data") == "vm1/data unbound\n"
    assert farm.vvol("vm1/data")["binding"] is None
    before = farm.vvol("vm1/data")["epoch"]
    assert cli(farm, "bind", "data") == "vm1/data bound\n"
    assert farm.wait_bound("vm1/data")["binding"]["epoch"] > before
    assert cli(farm, "delete", "vvol", "data", "--yes") == "vm1/data deleted\n"
    assert "NOT_FOUND" in refused(farm, "describe", "vvol", "data")


def test_adopting_a_file(farm: Farm) -> None:
    assert cli(farm, "adopt", "vm1/old", "--datastore", "pool", "--file", "old.raw") == "vm1/old adopted\n"
    farm.wait_bound("vm1/old")
    with farm.open("old") as client:
        assert client.read(0, 9) == b"old bytes"
    cli(farm, "delete", "vvol", "old", "-y")
    assert (farm.folder / "pool" / "old.raw").read_bytes()[:9] == b"old bytes"


def test_no_wait_prints_a_task_that_can_be_watched(farm: Farm) -> None:
    text = cli(farm, "create", "vvol", "vm1/later", "--size", "1MiB", "--profile", "plain", "--no-wait")
    word, number = text.split()
    assert word == "task"
    assert "create vm1/later: success 100%" in cli(farm, "task", "watch", number)
    assert refused(farm, "task", "cancel", number).startswith("error: ")
    cli(farm, "delete", "vvol", "vm1/later", "-y")


def test_apply_and_its_dry_run(farm: Farm) -> None:
    spec = plain_spec(
        "192MiB", {"root": {"size": "20MiB", "profile": "plain"}, "new": {"size": "4MiB", "profile": "plain"}}
    )
    spec["datastores"]["pool"] = {"kind": "dir", "path": "pool"}
    farm.write_file(spec)
    told = cli(farm, "apply", "--dry-run", str(farm.file))
    assert "nothing was done" in told and "vm1/new" in told
    assert [vvol["name"] for vvol in as_json(farm, "get", "vvols")] == ["root"]
    cli(farm, "apply", str(farm.file))
    farm.wait_bound("vm1/new")
    assert farm.vvol("vm1/root")["size"] == 20 << 20
    again = as_json(farm, "apply", "-f", str(farm.file))
    assert {change["action"] for change in again["changes"]} <= {"keep", "absent"} and again["tasks"] == []


def test_status_says_what_is_wrong_and_what_to_do(farm: Farm) -> None:
    assert "all is well" in cli(farm, "status")
    assert cli(farm, "status", "-x") == "all is well\n"
    text = cli(farm, "status", "-o", "yaml")
    assert yaml.safe_load(text)["hosts"][0]["connected"] is True


def going_on(farm: Farm, *words: str) -> Process:
    """A command that does not end by itself."""
    argv = [sys.executable, "-u", "-m", "nbdvvol", *words, "--run", farm.run]
    return Process(argv, farm.folder / f"{words[0]}.log")


def test_status_can_be_watched(farm: Farm) -> None:
    process = going_on(farm, "status", "-x", "--watch", "--every", "0.2")
    try:
        wait_until("it is printed again and again", lambda: process.text().count("all is well\n") > 2, 20)
        assert process.alive()
    finally:
        process.kill_group()


def test_events_can_be_followed(farm: Farm) -> None:
    last = as_json(farm, "get", "events")[-1]["id"]
    process = going_on(farm, "get", "events", "--follow", "--after", str(last))
    try:
        cli(farm, "create", "vvol", "vm1/seen", "--size", "1MiB", "--profile", "plain")
        wait_until("the event is printed", lambda: "vm1/seen" in process.text(), 10)
    finally:
        process.kill_group()
        cli(farm, "delete", "vvol", "vm1/seen", "-y")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create", "vvol", "vm1/root", "--size", "1MiB", "--profile", "plain"], "EXISTS"),
        (["create", "vvol", "vm1/huge", "--size", "900GiB", "--profile", "plain"], "NO_SPACE"),
        (["create", "vvol", "vm1/x", "--size", "1MiB", "--profile", "gold"], "gold"),
        (["create", "vvol", "nobody/x", "--size", "1MiB", "--profile", "plain"], "nobody"),
        (["resize", "vvol", "root", "1MiB"], "a VVol only grows"),
        (["bind", "root", "--host", "mars"], "mars"),
        (["describe", "vvol", "ghost"], "NOT_FOUND"),
        (["task", "watch", "99999"], "NOT_FOUND"),
        (["datastore", "clear-fault", "ghost"], "NOT_FOUND"),
    ],
)
def test_refusals_are_one_line_with_a_code(farm: Farm, words: list[str], told: str) -> None:
    text = refused(farm, *words)
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert told in text


def test_attach_without_the_driver_prints_what_works_instead(farm: Farm) -> None:
    if Path("/sys/module/nbd").exists():
        device = cli(farm, "attach", "root").strip()
        assert "detached" in cli(farm, "detach", device)
        return
    text = refused(farm, "attach", "root")
    assert text.startswith("error: NO_KERNEL_NBD: ")
    assert "-drive" in text and "nbd-client" in text
