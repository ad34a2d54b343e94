"""The same bits as those that were recorded: `tests/recorded/bits.json`, which `tests/recorded/record.py` writes.

A part of the record, quick enough to run each time; `record.py compare tests/recorded/bits.json` tries all of it. The
packed bytes of stores, what is said of wrong input and the columns of files are compared everywhere. Logits are on the
instruction sets that this machine has and the file knows; where another compiler than the recorded one built the
kernels, which may change last bits, greedy tokens stand for them. After a change that is meant to change bits, write
the file anew and say so.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from recorded.cases import all_cases
from recorded.models import FAMILIES, Workshop, workshop
from recorded.names import isas
from recorded.record import BITS, differences, make_record, matches, read

EXPECTED = read(BITS)
HERE = [isa for isa in isas() if isa in EXPECTED["made"]["isas"]]
BEST, OTHERS = HERE[0], HERE[1:]
# On the best instruction set whatever a layer, a format or a setting may change; the others briefly.
PARTS = [
    *("store/", "error/", "output/"),
    *(f"run/{BEST}/", f"kv/{BEST}/", f"numa/{BEST}/*/auto", f"way/{BEST}/qwen2_moe/"),
    *(f"cache/{BEST}/qwen3_moe/", f"cache/{BEST}/*/stream on", f"text/{BEST}/"),
    *(f"run/{isa}/{family}/auto" for isa in OTHERS for family in FAMILIES),
]


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.mark.parametrize("part", PARTS)
def test_what_was_recorded_is_computed_still(shop: Workshop, part: str) -> None:
    found = make_record(shop, HERE, part)
    assert found["cases"]
    assert not differences(EXPECTED, found, part)


def test_the_file_knows_every_case() -> None:
    """And nothing else of what is not torch's."""
    known = {key for key in EXPECTED["cases"] if not key.startswith("torch/")}
    cases = {case.key for case in all_cases(EXPECTED["made"]["isas"]) if not case.key.startswith("torch/")}
    assert known == cases


def test_a_difference_is_told() -> None:
    key = f"run/{BEST}/llama/auto"
    value = EXPECTED["cases"][key]
    record = {"made": EXPECTED["made"], "cases": {key: {**value, "bits": "0 0"}}}
    other = {**record, "made": {**record["made"], "compiler": "another"}}
    assert differences(EXPECTED, record, key) == [f"{key}, bits: {value['bits']!r} became '0 0'"]
    assert differences(EXPECTED, other, key) == []
    first, *rest = value["tokens"].split("/")
    for tokens, differs in ((f"9999 {first}", True), ("", False)):  # the second: a near-tie in the first place
        other["cases"][key]["tokens"] = "/".join([tokens, *rest])
        assert bool(differences(EXPECTED, other, key)) == differs
    assert matches(key, "run/*/llama") and not matches(key, "numa/")
