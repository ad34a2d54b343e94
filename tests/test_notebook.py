"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parent.parent / "docs" / "laboratory.ipynb"


def test_the_cells_run_in_their_order(monkeypatch, capsys) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), (
        "cells are kept without outputs"
    )
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} {cell['id']}", "exec"), names)
    said = capsys.readouterr().out
    hits = {row["policy"]: row["hit_rate"] for row in names["lab"].table(names["experiment"]) if row["nways"] == 4}
    assert f"{hits['LRU']:.1%}" in said and f"4 {hits['LRU']:.1%} {hits['bypass-Belady']:.1%}" in said
    assert "holds: no" in said and names["report"].read_text().startswith("<!doctype html>")
