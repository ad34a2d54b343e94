"""The figures with which docs/cache.md answers are those of the experiment that is committed beside it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "experiments" / "policies"
MACHINE = "RTX 4090, two channels of DDR5"
FIXED = ("static-best", "static-layers")
KNOW_THE_FUTURE = (*FIXED, "Belady", "bypass-Belady")


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    with (FOLDER / name).open() as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def line(begin: str) -> list[str]:
    """The cells of the one row of a table of the docs that begins so."""
    found = [text for text in (ROOT / "docs" / "cache.md").read_text().splitlines() if text.startswith(f"| {begin}")]
    assert len(found) == 1, begin
    return [cell.strip() for cell in found[0].strip("|").split("|")]


@pytest.mark.parametrize(("begin", "policy"), [("LRU hits, %", "LRU"), ("the bound", "bypass-Belady")])
def test_hits_of_every_size(begin: str, policy: str) -> None:
    ways = line("slots of a layer")[1:]
    curve = {row["nways"]: float(row["hit_rate"]) for row in rows("curves.csv", model="gpt-oss-20b", policy=policy)}
    assert [cell.split()[0] for cell in line(begin)[1:]] == [f"{100 * curve[number]:.1f}" for number in ways]


@pytest.mark.parametrize(
    ("begin", "model", "nways"),
    [
        ("gpt-oss-20b, 44 texts", "gpt-oss-20b", "8"),
        ("half", "gpt-oss-20b", "16"),
        ("Qwen3-30B-A3B, one prompt, a quarter", "qwen3-30b-a3b", "32"),
        ("gpt-oss-120b, one prompt, a quarter", "gpt-oss-120b", "32"),
        ("embedded, 12 texts", "embedded", "4"),
    ],
)
def test_hit_rates_and_their_intervals(begin: str, model: str, nways: str) -> None:
    cells = line(begin)
    for cell, policy in ((cells[1], "LRU"), (cells[3], "static-best"), (cells[4], "bypass-Belady")):
        usual = {"admission": "always", "prefetch": "none", "quota": ""}
        (row,) = (row for row in rows("results.csv", model=model, nways=nways, policy=policy, **usual))
        rate, low, high = (100 * float(row[name]) for name in ("hit_rate", "hit_rate_low", "hit_rate_high"))
        assert cell == f"{rate:.1f} % ({low:.0f} to {high:.0f})"


@pytest.mark.parametrize(
    ("begin", "model", "slots"),
    [
        ("gpt-oss-20b, many texts", "gpt-oss-20b", "192"),
        ("| the same, slots for half", "gpt-oss-20b", "384"),
        ("Qwen3-30B-A3B, one prompt | RTX", "qwen3-30b-a3b", "1536"),
        ("gpt-oss-120b, one prompt | RTX", "gpt-oss-120b", "1152"),
        ("embedded | RTX", "embedded", "64"),
    ],
)
def test_predicted_speeds(begin: str, model: str, slots: str) -> None:
    speeds = f"tokens_per_second, {MACHINE}"
    found = [row for row in rows("results.csv", model=model, slots=slots) if row[speeds]]
    fixed = max(float(row[speeds]) for row in found if row["policy"] in FIXED)
    caches = [row for row in found if row["policy"] not in KNOW_THE_FUTURE and row["prefetch"] != "perfect"]
    cache, cpu = max(float(row[speeds]) for row in caches), float(found[0][f"cpu_{speeds}"])
    assert re.findall(r"\d+", " ".join(line(begin)[-4:-1])) == [f"{speed:.0f}" for speed in (cpu, fixed, cache)]
