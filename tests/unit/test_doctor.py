"""`nbdvvol doctor`: what the kernel offers, what the data plane has in use, and what to do about what is missing."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nbdvvol import doctor
from nbdvvol.dataplane.ffi import ffi
from nbdvvol.dataplane.plane import Plane
from nbdvvol.doctor import Finding
from nbdvvol.model.farm import Farm

ROOT = Path(__file__).parents[2]


def found(farm: Farm | None = None) -> dict[str, Finding]:
    return {one.name: one for one in doctor.examine(farm)}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nbdvvol", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_it_tells_of_the_kernel_and_of_every_feature_in_use() -> None:
    """Those that a reactor started a moment ago has: what works for it will work for the filter."""
    told = found()
    assert told["kernel"].value == platform.release() and told["kernel"].verdict == "ok"
    assert told["data plane"].verdict == "ok" and told["io_uring"].verdict == "ok"
    features = {name for name, _ in ffi.typeof("nv_features").fields if name != "reserved"}
    assert {f"data plane: {name}" for name in features} == {name for name in told if name.startswith("data plane: ")}
    for name in features:
        one = told[f"data plane: {name}"]
        assert (one.verdict, one.value) in (("ok", "in use"), ("slower", "no"))
    assert told["data plane: registered_ring"].value == "in use"
    assert {"locked memory", "open files", "kernel nbd"} < set(told)


def test_a_feature_that_is_refused_is_told_as_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plane, "features", lambda _: {"defer_taskrun": False, "registered_ring": True})
    told = found()
    assert (told["data plane: defer_taskrun"].verdict, told["data plane: defer_taskrun"].value) == ("slower", "no")
    assert told["data plane: registered_ring"].verdict == "ok"


def test_what_is_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.10.0-28-amd64")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 << 10, 1024))
    monkeypatch.setattr("os.geteuid", lambda: 1000)

    def refused(_self: Plane, _config: object) -> None:
        raise OSError(38, "io_uring is not allowed")

    monkeypatch.setattr(Plane, "__init__", refused)
    told = found()
    assert (told["kernel"].verdict, told["kernel"].action) == ("missing", "boot Linux 6.1 or newer")
    assert (told["locked memory"].verdict, told["locked memory"].value) == ("slower", "64KiB")
    assert "LimitMEMLOCK" in told["locked memory"].action
    assert told["open files"].verdict == "slower" and "LimitNOFILE" in told["open files"].action
    plane = told["data plane"]
    assert plane.verdict == "missing" and "io_uring is not allowed" in plane.value and plane.action


def test_a_farms_datastores_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "there.img").write_bytes(bytes(1 << 20))
    (tmp_path / "folder").mkdir()
    file = tmp_path / "farm.json"
    stores = {
        "there": {"kind": "file", "path": str(tmp_path / "there.img"), "size": "1MiB"},
        "new": {"kind": "file", "path": str(tmp_path / "new.img"), "size": "1MiB"},
        "huge": {"kind": "file", "path": str(tmp_path / "huge.img"), "size": "4EiB"},
        "folder": {"kind": "dir", "path": str(tmp_path / "folder")},
        "gone": {"kind": "block", "path": str(tmp_path / "nothing")},
        "away": {"kind": "nbd", "uri": f"nbd+unix:///x?socket={tmp_path / 'nobody.sock'}"},
    }
    file.write_text(json.dumps({"datastores": stores, "profiles": {"plain": {"datastore": "there"}}}))
    done = run("-f", str(file), "-o", "json")
    told = {one["name"]: one for one in json.loads(done.stdout)}
    verdicts = {name: told[f"datastore {name}"]["verdict"] for name in stores}
    assert verdicts == {
        "there": "ok", "new": "ok", "huge": "missing", "folder": "ok", "gone": "missing", "away": "missing",
    }  # fmt: skip
    assert "O_DIRECT" in told["datastore there"]["value"]
    assert told["datastore huge"]["action"] == "make room, or give the datastore a smaller size"
    assert done.returncode == 1, "something is missing"


def test_people_read_a_line_each_and_a_good_machine_is_status_0() -> None:
    done = run()
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert f"ok       kernel: {platform.release()}" in lines
    assert "ok       data plane: a reactor starts and stops" in lines
