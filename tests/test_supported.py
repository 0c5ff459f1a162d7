"""The list of what is supported names tests that exist, and leaves out nothing that tables have."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastsd.checkpoints.single import FAMILIES
from fastsd.config import FEW_STEPS
from fastsd.supported import KINDS, ROWS, Row

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_row_names_a_test_that_exists(row: Row) -> None:
    assert row.kind in KINDS and row.name and row.held_to
    file, _, name = row.test.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_rows_are_in_order_and_once() -> None:
    assert [KINDS.index(row.kind) for row in ROWS] == sorted(KINDS.index(r.kind) for r in ROWS)
    assert len({(row.kind, row.name) for row in ROWS}) == len(ROWS)


def test_every_family_and_preset_has_a_row() -> None:
    text = " ".join(f"{row.name} {row.note}" for row in ROWS)
    names = {row.name for row in ROWS if row.kind == "family"}
    assert {family.title for family in FAMILIES} <= names
    for preset in FEW_STEPS:
        stem, _, steps = preset.rpartition("-")
        assert preset in text or f"-{steps}" in text and stem in text, preset
