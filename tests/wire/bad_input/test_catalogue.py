"""docs/bad-input.md is the whole catalogue, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "docs" / "bad-input.md"
ROWS = {"H": 28, "T": 25, "L": 15, "S": 15, "M": 9, "C": 13, "A": 7}
LATER = {*(f"L{number}" for number in range(1, 16)), "M5", "M6", "M7", "C11"}
"""Rows about legs, leg labels, bitmaps and a filter graph: they come with mirroring and caching."""


def rows() -> dict[str, str]:
    """Row id → the cell that names its tests."""
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"[HTLSMCA]\d+", cells[0]):
            assert cells[0] not in found, f"{cells[0]} is there twice"
            found[cells[0]] = cells[3]
    return found


def test_every_row_is_there() -> None:
    assert set(rows()) == {f"{group}{number}" for group, count in ROWS.items() for number in range(1, count + 1)}


def test_every_row_that_applies_names_tests() -> None:
    for row, cell in rows().items():
        named = re.findall(r"`[^`]+::[^`]+`", cell)
        assert bool(named) != (row in LATER), f"{row}: {cell}"
        assert named or "issue" in cell, f"{row} says neither its tests nor when they come"


def test_every_named_test_exists_and_names_its_row() -> None:
    for row, cell in rows().items():
        for path, name in re.findall(r"`([^`:]+)::([^`]+)`", cell):
            source = (ROOT / "tests" / path).read_text()
            assert re.search(rf"^(async )?def {re.escape(name)}\(", source, re.MULTILINE), f"{row}: {path}::{name}"
            assert f"_{row.lower()}_" in name, f"{row}: {name} is another row's"
