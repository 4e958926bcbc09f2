"""The command line's words: every verb of the docs is there, help is quick, usage errors exit with 2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbdvvol.model.errors import Code

ROOT = Path(__file__).parents[2]
VERBS = (
    "up control filter apply check schema get adopt bind unbind uri attach detach status doctor create delete "
    "resize describe task datastore registry trace cache mirror"
).split()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nbdvvol", *words]
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", "NBDVVOL_RUN": "/nowhere"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)


def test_help_lists_every_verb() -> None:
    result = run("--help")
    assert result.returncode == 0
    listed = re.findall(r"^│ ([a-z]+)  ", result.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(VERBS)


def test_the_docs_tell_every_verb_and_no_other() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    table = text[text.index("| command") : text.index("`NAME` of a VVol")]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {word for cell in first_cells for word in re.findall(r"`([a-z]+)", cell)}
    assert told == set(VERBS)


def test_the_docs_tell_every_code() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert not [code for code in Code if not re.search(rf"\b{code}\b", text)]


def test_help_needs_none_of_the_heavy_libraries() -> None:
    program = (
        "import sys, nbdvvol.cli.main; print([m for m in ('pydantic', 'httpx', 'yaml', 'uvloop') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.stdout == "[]\n", result.stdout + result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["get", "bananas"],
        ["create", "vvol", "noslash", "--size", "1MiB"],
        ["create", "vvol", "vm1/a", "--size", "huge"],
        ["resize", "vvol", "vm1/a", "-5"],
        ["filter", "--stdio"],
        ["get", "vvols", "--follow"],
        ["nonsense"],
        ["apply"],
    ],
)
def test_usage_errors_exit_with_2(words: list[str]) -> None:
    result = run(*words)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr


def test_no_farm_is_one_line_and_exit_1() -> None:
    result = run("get", "vvols")
    assert result.returncode == 1
    assert result.stderr == (
        "error: NOT_RUNNING: no farm runs here (no /nowhere/control.sock) -- "
        "start one with `nbdvvol up -f FILE`, or name it: --run DIR\n"
    )


def test_all_errors_of_a_farm_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "farm.yaml"
    file.write_text("datastoers: {}\nvms: {a: {host: mars}}\n")
    result = run("check", str(file))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: CONFIG: 2 things are wrong -- see docs/farm-file.md",
        f"  {file}:1:1: datastoers: unknown key; did you mean datastores?",
        f"  {file}:2:17: vms.a.host: host mars is not declared; hosts in this file: local",
    ]


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    result = subprocess.run(
        f"{sys.executable} -m nbdvvol schema | head -c 10",
        cwd=ROOT,
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Traceback" not in result.stderr


def test_the_version() -> None:
    assert re.fullmatch(r"nbdvvol \d+\.\d+\.\d+\n", run("--version").stdout)
