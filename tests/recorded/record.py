"""The record of what the program computes, to the bit: made before a change, compared after it.

    python tests/recorded/record.py write FILE [--only PATTERN]
    python tests/recorded/record.py compare FILE [--only PATTERN]

PATTERN: as of a shell, of the keys of cases; "run/" is short for "*run/*". `compare` prints every difference and exits
with 1 if there is one. It compares the cases of the instruction sets that this machine has and the file knows. Where
another compiler built the kernels the last bits may differ: then checksums of logits and what follows from them are
left out, and greedy tokens, packed bytes, errors and columns are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the tests that are beside this file, of the program that is above them
    sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from recorded.cases import Case, all_cases  # noqa: E402
from recorded.models import Workshop, workshop  # noqa: E402
from recorded.names import compiler, isas  # noqa: E402

OF_COMPILER = {"bits", "counts", "texts", "routes", "replayed", "routed", "experts"}
NEAR = 0.02  # of numbers that torch makes
BITS = Path(__file__).with_name("bits.json")
Progress = Callable[[str, float], None]  # key of a case, seconds that it took
Record = dict[str, Any]  # made: by what; cases: by key


def make_record(shop: Workshop, isas: list[str], only: str = "", progress: Progress | None = None) -> Record:
    """isas: those to try, the best one first."""
    found = {}
    for case in all_cases(isas):
        if matches(case.key, only):
            start = time.perf_counter()
            found[case.key] = _made(case, shop)
            if progress:
                progress(case.key, time.perf_counter() - start)
    return {"made": {"compiler": compiler(), "isas": isas}, "cases": found}


def _made(case: Case, shop: Workshop) -> Any:
    """What a case raises is its value: the others are tried all the same."""
    try:
        return case.make(shop)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def matches(key: str, only: str) -> bool:
    return fnmatchcase(key, f"*{only}*")


def differences(expected: Record, found: Record, only: str = "") -> list[str]:
    """A line for every case that is not the same or is on one side alone."""
    same = expected["made"]["compiler"] == found["made"]["compiler"]
    wanted = {key: value for key, value in expected["cases"].items() if matches(key, only) and _is_here(key, found)}
    lines = [f"{key}: is not computed any more" for key in wanted if key not in found["cases"]]
    lines += [f"{key}: is not in the file" for key in found["cases"] if key not in wanted]
    for key, value in found["cases"].items():
        if key in wanted:
            lines += [f"{key}{line}" for line in _unequal(wanted[key], value, same)]
    return lines


def _is_here(key: str, found: Record) -> bool:
    """Whether what a case needs is here: its instruction set, if it has one, and torch."""
    parts = key.split("/")
    if parts[0] == "torch" and not find_spec("torch"):
        return False
    return parts[0] in ("store", "error", "output") or parts[1] in found["made"]["isas"]


def _unequal(wanted: Any, value: Any, same: bool) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(value, dict):
        for name in {**wanted, **value}:
            if name not in wanted or name not in value:
                yield f", {name}: {wanted.get(name)!r} became {value.get(name)!r}"
            elif name == "tokens" and not same:
                yield from _other_tokens(wanted[name], value[name])
            elif same or name not in OF_COMPILER:
                yield from (f", {name}{line}" for line in _unequal(wanted[name], value[name], same))
    elif isinstance(wanted, list) and isinstance(value, list) and len(wanted) == len(value):
        for i, pair in enumerate(zip(wanted, value, strict=True)):
            yield from (f", {i}{line}" for line in _unequal(*pair, same))
    elif isinstance(wanted, float) and isinstance(value, float):
        if not abs(wanted - value) <= NEAR * max(1.0, abs(wanted)):
            yield f": {wanted} became {value}"
    elif wanted != value:
        yield f": {wanted!r} became {value!r}"


def _other_tokens(wanted: str, found: str) -> Iterator[str]:
    """Another compiler may find another near-tie: answers are the same as far as both go."""
    answers = [[words.split() for words in text.split("/")] for text in (wanted, found)]
    pairs = zip(*answers, strict=False)
    if len(answers[0]) != len(answers[1]) or any(a != b for pair in pairs for a, b in zip(*pair, strict=False)):
        yield f", tokens: {wanted!r} became {found!r}"


_COMPACT = (",", ":")


def read(path: Path) -> Record:
    return json.loads(path.read_text())


def write(path: Path, record: Record) -> None:
    """A line a case, so that a change shows which."""
    lines = [f"{json.dumps(key)}:{json.dumps(value, separators=_COMPACT)}" for key, value in record["cases"].items()]
    made, cases = json.dumps(record["made"]), ",\n".join(lines)
    path.write_text(f'{{"made": {made},\n"cases": {{\n{cases}\n}}}}\n')


def prepare_environment() -> None:
    """As tests do: the machine as it is, whatever the shell says, and no files of the user."""
    for name in ("HYBRID_ISA", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ["HYBRID_DEVICE"] = "cpu"
    os.environ["COLUMNS"] = "120"


def _show(key: str, seconds: float) -> None:
    print(f"{seconds:7.2f} {key}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose keys match")
    parser.add_argument("--verbose", action="store_true", help="print every case and its seconds")
    given = parser.parse_args()
    prepare_environment()
    expected = read(given.file) if given.action == "compare" else None
    start = time.perf_counter()
    tried = [isa for isa in isas() if expected is None or isa in expected["made"]["isas"]]
    with workshop() as shop:
        os.environ["XDG_CACHE_HOME"] = str(shop.new_folder())
        record = make_record(shop, tried, given.only, _show if given.verbose else None)
    print(f"{len(record['cases'])} cases on {', '.join(record['made']['isas'])}: {time.perf_counter() - start:.0f} s")
    if expected is None:
        write(given.file, record)
        raised = [key for key, value in record["cases"].items() if isinstance(value, dict) and "raised" in value]
        print("\n".join(f"{key}: {record['cases'][key]['raised']}" for key in raised) or "nothing was raised")
        return int(bool(raised))
    lines = differences(expected, record, given.only)
    print("\n".join(lines) if lines else "no difference")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
