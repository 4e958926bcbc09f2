"""Rooms have one door: an import that breaks DESIGN's rule fails here (contracts: pyproject.toml)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The installed tree must not answer for the copy under test.
LINTER = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path[:] = [".", *(place for place in sys.path if place != sys.argv[1])]
from importlinter.cli import lint_imports_command
lint_imports_command(["--no-cache", "--config", "pyproject.toml"])
"""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINTER, str(ROOT)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_every_import_keeps_the_contracts() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


def test_a_broken_contract_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nbdvvol", tmp_path / "nbdvvol", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "nbdvvol" / "filter" / "shortcut.py").write_text(
        '"""Breaks two rules."""\nimport cffi\nimport nbdvvol.control.policy\n'
    )
    (tmp_path / "nbdvvol" / "cli" / "shortcut.py").write_text(
        '"""Breaks one."""\nimport nbdvvol.control.registry.store\n'
    )
    result = lint(tmp_path)
    assert result.returncode == 1
    for contract in ("filter and control know each other only", "cffi: only dataplane", "cli: control through the API"):
        assert any(contract in line and "BROKEN" in line for line in result.stdout.splitlines()), result.stdout
