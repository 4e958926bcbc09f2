"""A control on TCP with TLS: the command line and a filter of another host use it with their own credentials."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.farm import Farm, free_port, listed, plain_spec
from tests.lib.procs import Process, wait_until

TOKEN = "operator-" + "7" * 32


@pytest.fixture(scope="module")
def farm(pki: Path) -> Iterator[Farm]:
    port = free_port()
    spec = plain_spec(hosts={"local": {}, "away": {"remote": True}})
    spec["control"] = {
        "listen": f"https://127.0.0.1:{port}",
        "tls": {"cert": str(pki / "server-cert.pem"), "key": str(pki / "server-key.pem")},
        "tokens": "tokens",
    }
    spec["datastores"] = {"main": {"kind": "dir", "path": "pool"}}
    spec["vms"] = {
        "vm1": {"host": "local", "vvols": {"root": {"size": "1MiB"}}},
        "vm2": {"host": "away", "vvols": {"far": {"size": "1MiB"}}},
    }
    made = Farm(spec)
    (made.folder / "pool").mkdir()
    (made.folder / "tokens").write_text(f"operator {TOKEN}\n")
    (made.folder / "tokens").chmod(0o600)
    with made:
        made.begin()
        wait_until("the API answers", made.api_answers, 60)
        wait_until("the farm is applied", (made.state / "hosts" / "away.token").exists, 60)
        yield made


def command(
    farm: Farm, pki: Path, *words: str, token: Path | None, ca: bool = True
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "NBDVVOL_CONTROL": farm.spec["control"]["listen"]}
    if token:
        env["NBDVVOL_TOKEN_FILE"] = str(token)
    if ca:
        env["NBDVVOL_CA"] = str(pki / "ca-cert.pem")
    argv = [sys.executable, "-m", "nbdvvol", *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)


def test_a_filter_of_another_host_joins_and_the_operator_sees_it(farm: Farm, pki: Path) -> None:
    run_dir = farm.folder / "away"
    words = ["filter", "--host", "away", "--control", farm.spec["control"]["listen"], "--run", str(run_dir)]
    words += ["--ca", str(pki / "ca-cert.pem"), "--token-file", str(farm.state / "hosts" / "away.token")]
    away = Process([sys.executable, "-m", "nbdvvol", *words], farm.folder / "away.log")
    try:
        farm.wait_ready(60)
        wait_until("its VVol is served", lambda: "vm2/far" in command_ok(farm, pki, "get", "vvols"), 60)
        wait_until("it is bound", lambda: farm.vvol("vm2/far")["binding"]["state"] == "bound", 60)
        assert "far" in listed(run_dir / "vms" / "vm2.sock")
        assert "all is well" in command_ok(farm, pki, "status", "-x")
        assert command_ok(farm, pki, "uri", "far").strip().endswith("/away/vms/vm2.sock")
    finally:
        assert away.stop() == 0


def command_ok(farm: Farm, pki: Path, *words: str) -> str:
    done = command(farm, pki, *words, token=farm.folder / "tokens")
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return done.stdout


def test_without_a_token_nothing_is_told(farm: Farm, pki: Path) -> None:
    done = command(farm, pki, "get", "vvols", token=None)
    assert done.returncode == 1 and "DENIED" in done.stderr and not done.stdout


def test_a_hosts_token_is_no_operators(farm: Farm, pki: Path) -> None:
    done = command(farm, pki, "get", "vvols", token=farm.state / "hosts" / "away.token")
    assert done.returncode == 1 and "DENIED" in done.stderr


def test_a_control_that_nobody_vouches_for_is_not_trusted(farm: Farm, pki: Path) -> None:
    done = command(farm, pki, "get", "vvols", token=farm.folder / "tokens", ca=False)
    assert done.returncode == 1
    assert "certificate" in done.stderr.lower() and done.stderr.count("\n") == 1


def test_a_missing_token_file_is_named(farm: Farm, pki: Path) -> None:
    done = command(farm, pki, "get", "vvols", token=farm.folder / "nowhere")
    assert done.returncode == 1 and "nowhere" in done.stderr
